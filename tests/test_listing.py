"""Listings: of a bucket in ranges of keys at once, and of what there is to do while it is still being listed."""

import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from restore_core import manifest, storage
from restore_core.errors import StorageError, UsageError
from restore_core.manifest import Row
from restore_core.pipelines.listing import Listed, files_of_shard, list_input, object_units, shard_key
from restore_core.storage import LocalStorage, Object, listing, open_storage

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class Bucket:
    """ListObjectsV2 over keys in memory, as S3 documents it, with few entries on a page."""

    def __init__(self, keys: list[str], page: int = 10, seconds: float = 0.0) -> None:
        self.keys = sorted(keys)
        self.page = page
        self.seconds = seconds
        self.requests = 0
        self.fails_at: str | None = None
        self.threads: set[int] = set()

    def __call__(
        self, *, Prefix: str, Delimiter: str = "", StartAfter: str = "", ContinuationToken: str = ""
    ) -> dict[str, Any]:
        self.requests += 1
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        after = ContinuationToken or StartAfter
        entries: list[tuple[str, bool]] = []
        last = after
        for key in self.keys[bisect_right(self.keys, after) :]:
            if not key.startswith(Prefix):
                continue
            if ContinuationToken and last.endswith("/") and Delimiter and key.startswith(last):
                continue  # of a folder that was on the page before
            if key == self.fails_at:
                raise ConnectionError("broken")
            head, slash, _ = key[len(Prefix) :].partition(Delimiter) if Delimiter else (key, "", "")
            entry = (Prefix + head + slash, True) if slash else (key, False)
            if entry in entries[-1:]:
                continue
            if len(entries) == self.page:
                return self._answer(entries, last)
            entries.append(entry)
            last = entry[0]
        return self._answer(entries, None)

    def _answer(self, entries: list[tuple[str, bool]], token: str | None) -> dict[str, Any]:
        return {
            "Contents": [{"Key": key, "Size": 1, "ETag": f'"{key}"'} for key, folder in entries if not folder],
            "CommonPrefixes": [{"Prefix": key} for key, folder in entries if folder],
            "IsTruncated": token is not None,
            "NextContinuationToken": token,
        }


def keys_of(bucket: Bucket, prefix: str = "", after: str = "") -> list[str]:
    return [key for page in listing.pages(bucket, prefix, after) for key, _, _ in page]  # type: ignore[arg-type]


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    st.sets(st.text("ab/0é", min_size=1, max_size=6), max_size=80), st.sampled_from(["", "a", "a/", "b/a"]),
    st.text("ab/0", max_size=4), st.integers(1, 4),
)  # fmt: skip
def test_every_key_comes_once_and_in_order(keys: set[str], prefix: str, after: str, page: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(listing, "RANGES", 5)
        expected = sorted(key for key in keys if key.startswith(prefix) and key > after)
        assert keys_of(Bucket(list(keys), page), prefix, after) == expected


@pytest.mark.parametrize(("prefix", "after"), [("", ""), ("a/", ""), ("", "a/019"), ("a/", "a/019")])
def test_a_page_may_be_empty_and_not_the_last(prefix: str, after: str) -> None:
    """As the first ones are where very many versions were deleted."""
    bucket = Bucket([f"{folder}/{index:03d}" for folder in "abc" for index in range(40)])

    def request(**options: str) -> dict[str, Any]:
        found = bucket(**options)
        if "ContinuationToken" in options or "Delimiter" in options:
            return found
        start = options.get("StartAfter", "")
        return {"Contents": [], "IsTruncated": True, "NextContinuationToken": start or "\x01"}

    pages = listing.pages(request, prefix, after)  # type: ignore[arg-type]
    expected = [key for key in bucket.keys if key.startswith(prefix) and key > after]
    assert [entry[0] for page in pages for entry in page] == expected


def test_one_page_is_one_request() -> None:
    bucket = Bucket([f"a/{index}" for index in range(10)])
    assert len(keys_of(bucket)) == bucket.requests * 10 == 10


def test_ranges_are_listed_at_once() -> None:
    keys = [f"photos/{folder:02d}/{index:03d}.jpg" for folder in range(40) for index in range(100)]
    slow = Bucket(keys, page=100, seconds=0.1)
    started = time.perf_counter()
    assert keys_of(slow, "photos/") == keys
    seconds = time.perf_counter() - started
    assert len(slow.threads) > 4
    assert seconds < 0.6 * slow.requests * slow.seconds, "one after the other"


def test_a_page_that_fails_is_an_error_and_no_hole() -> None:
    keys = [f"{folder:02d}/{index:03d}.jpg" for folder in range(20) for index in range(30)]
    bucket = Bucket(keys)
    bucket.fails_at = "11/017.jpg"
    seen = []
    with pytest.raises(ConnectionError):
        seen.extend(key for page in listing.pages(bucket, "") for key, _, _ in page)  # type: ignore[arg-type]
    assert keys_of(Bucket(keys))[: len(seen)] == seen


def test_a_listing_that_is_left_ends_its_threads() -> None:
    bucket = Bucket([f"{folder:02d}/{index:03d}.jpg" for folder in range(20) for index in range(3000)])
    before = threading.active_count()
    pages = listing.pages(bucket, "")  # type: ignore[arg-type]
    for _ in range(3):
        next(pages)
    assert threading.active_count() > before
    pages.close()  # type: ignore[attr-defined]
    end = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_real_server(s3: str, moto_client: "S3Client", monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pages, in folders of unlike sizes, with a folder marker, and without what has only its beginning."""
    real = storage.s3._list
    monkeypatch.setattr(storage.s3, "_list", lambda *values, **request: real(*values, **{"MaxKeys": 20, **request}))
    keys = [f"in/{'abc'[index % 3]}/{index // 90}/é {index:04d}.jpg" for index in range(170)]
    keys += ["in/z.jpg", "in/a0.jpg", "in/b/"]
    for key in [*keys, "in2/other.jpg"]:
        moto_client.put_object(Bucket="photos", Key=key, Body=b"" if key.endswith("/") else b"x")
    expected = sorted(key.removeprefix("in/") for key in keys if not key.endswith("/"))
    assert [item.key for item in open_storage("s3://photos/in/").list()] == expected
    with pytest.raises(StorageError, match="cannot list s3://nowhere: no such bucket"):
        list(open_storage("s3://nowhere/").list())


class Keys:
    """A storage that does nothing but list, key after key."""

    uri = "s3://many"
    only = None

    def __init__(self, keys: Iterator[str]) -> None:
        self.keys = keys

    def join(self, key: str) -> str:
        return f"{self.uri}/{key}"

    def list(self, prefix: str = "", after: str = "", *, unreadable: bool = False) -> Iterator[Object]:
        return (Object(key, 1, "e") for key in self.keys if key > after)


def test_the_work_begins_before_the_listing_ends() -> None:
    taken = []

    def keys() -> Iterator[str]:
        for index in range(1_000_000):
            taken.append(index)
            yield f"{index:07d}.jpg"

    found = list_input(Keys(keys()))  # type: ignore[arg-type]
    assert next(found.objects).key == "0000000.jpg"
    assert len(taken) == 1


def test_folders_with_an_underscore_are_listed_and_not_waited_for() -> None:
    taken = []

    def keys() -> Iterator[str]:
        for key in (*(f"_archive/{index:03d}.jpg" for index in range(100)), "_restore/run.json", "a.parquet"):
            taken.append(key)
            yield key

    found = list_input(Keys(keys()))  # type: ignore[arg-type]
    assert found.groups is None and len(taken) == 1
    assert [item.key for item in found.objects] == [key for key in taken if key != "_restore/run.json"]
    assert len(taken) == 102


def test_what_lies_beside_a_dataset_is_no_photograph(tmp_path: Path) -> None:
    """Of Spark, Hugging Face, git, macOS. Without Parquet it is listed as any other file."""
    place = LocalStorage(tmp_path)
    notes = ("_SUCCESS", "README.md", ".gitattributes", "data/.DS_Store", "LICENSE")
    for name in notes:
        place.write(name, b"?")
    assert sorted(item.key for item in list_input(place).objects) == sorted(notes)
    pq.write_table(pa.table({"image": [b"1"]}), tmp_path / "data/ok.parquet")
    found = list_input(place)
    assert found.groups is not None and [item.key for item in found.objects] == ["data/ok.parquet#0"]


def test_rows_of_a_dataset_are_no_keys(tmp_path: Path) -> None:
    """As they stand in a ledger: as objects they would fail, over rows of what was restored."""
    place = LocalStorage(tmp_path / "in")
    place.write("a.jpg", b"?")
    pq.write_table(pa.table({"image": [b"1"]}), tmp_path / "in/ok.parquet")
    keys = tmp_path / "keys.csv"
    for text in ("key\nok.parquet#0\n", 'key,size,etag\nok.parquet#0,5,"1"\n', "a.jpg\nok.parquet#0\n"):
        keys.write_text(text)
        with pytest.raises(
            UsageError, match=r"^--keys .*: 'ok.parquet#0' is a row of a Parquet file, .* name the file"
        ):
            list(list_input(place, str(keys)).objects)
    place.write("ok.parquet#0", b"a file of that name")
    assert [item.key for item in list_input(place, str(keys)).objects] == ["a.jpg", "ok.parquet#0"]


def test_a_photograph_among_parquet_is_listed(tmp_path: Path) -> None:
    place = LocalStorage(tmp_path)
    pq.write_table(pa.table({"image": [b"1"]}), tmp_path / "ok.parquet")
    place.write("_pack/options.json", b"{}")
    assert list_input(place).groups is not None
    place.write("z/_scans/a.jpg", b"jpg")
    assert [item.key for item in list_input(place).objects] == ["_pack/options.json", "ok.parquet", "z/_scans/a.jpg"]


def test_parquet_that_is_replaced_while_it_is_listed_has_its_former_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the worker sees that it is another one; the other way new rows would come out under old keys."""
    file, stat = tmp_path / "a.parquet", LocalStorage.stat

    def written(key: str) -> None:
        pq.write_table(pa.table({"key": [key], "image": pa.array([b"x"], pa.binary())}), file)

    def replaced_meanwhile(self: LocalStorage, key: str) -> Object:
        found = stat(self, key)
        written("new")
        return found

    written("old")
    monkeypatch.setattr(LocalStorage, "stat", replaced_meanwhile)
    groups = list_input(LocalStorage(tmp_path)).groups
    assert groups is not None
    assert groups.groups[0].keys.to_pylist() == ["new"]
    assert groups.groups[0].file.etag != f"{file.stat().st_mtime_ns:x}"


def test_an_input_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="--input s3://many: no files there"):
        list_input(Keys(iter(["_restore/run.json"])))  # type: ignore[arg-type]


def test_a_listing_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("restore_core.pipelines.listing.NOTED_OBJECTS", 10)
    keys = [f"{index:03d}.jpg" for index in range(45)]
    output = open_storage(str(tmp_path))

    def listed(keys: list[str], run: str, *, resume: bool) -> Listed:
        listed = Listed(Keys(iter(keys)), output, run, resume=resume)  # type: ignore[arg-type]
        listed.begin()
        return listed

    first = listed(keys, "run-1", resume=False)
    seen = [item.key for item, _ in zip(first, range(35), strict=False)]
    assert seen == keys[:35]
    # 30 were noted. Of what changes meanwhile, the listing that goes on sees what lies behind them.
    changed = ["000-new.jpg", *keys[1:40], "041-new.jpg"]
    assert [item.key for item in listed(changed, "run-2", resume=True)] == [*keys[:40], "041-new.jpg"]
    assert [item.key for item in listed(changed, "run-3", resume=False)] == changed
    last = listed(changed, "run-4", resume=True)
    last.clear()
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    assert [item.key for item in last] == changed


@pytest.mark.parametrize("deleted", [0, 1, 2, 5, 8])
def test_notes_that_are_half_deleted_are_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: int
) -> None:
    monkeypatch.setattr("restore_core.pipelines.listing.NOTED_OBJECTS", 2)
    monkeypatch.setattr(manifest.ledger, "SMALL_FILES", 3)
    monkeypatch.setattr(manifest.ledger, "FILE_ROWS", 4)
    keys = [f"{index:03d}.jpg" for index in range(60)]
    output = open_storage(str(tmp_path))
    listed = Listed(Keys(iter(keys)), output, "run-1", resume=False)  # type: ignore[arg-type]
    listed.begin()
    assert [item.key for item, _ in zip(listed, range(50), strict=False)] == keys[:50]
    left = deleted
    delete = LocalStorage.delete

    def interrupted(self: LocalStorage, key: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        delete(self, key)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(LocalStorage, "delete", interrupted)
        Listed(Keys(iter(keys)), output, "run-2", resume=False).begin()  # type: ignore[arg-type]
    resumed = Listed(Keys(iter(keys)), output, "run-3", resume=True)  # type: ignore[arg-type]
    resumed.begin()
    assert [item.key for item in resumed] == keys


@pytest.mark.parametrize("lost", range(5))
def test_a_note_that_is_missing_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    """One that was damaged, and moved away as told, say."""
    monkeypatch.setattr("restore_core.pipelines.listing.NOTED_OBJECTS", 10)
    keys = [f"{index:03d}.jpg" for index in range(55)]
    output = open_storage(str(tmp_path))

    def run(name: str, *, resume: bool, until: int) -> list[str]:
        listed = Listed(Keys(iter(keys)), output, name, resume=resume)  # type: ignore[arg-type]
        listed.begin()
        return [item.key for item, _ in zip(listed, range(until), strict=False)]

    assert run("run-1", resume=False, until=50) == keys[:50]
    notes = sorted(tmp_path.rglob("*.parquet"))
    assert len(notes) == 5
    notes[lost].unlink()
    assert run("run-2", resume=True, until=35) == keys[:35]  # again interrupted, with notes that overlap now
    assert run("run-3", resume=True, until=100) == keys


def test_what_is_listed_before_the_run_begins_is_noted_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Parquet that comes before the first photograph."""
    monkeypatch.setattr("restore_core.pipelines.listing.NOTED_OBJECTS", 5)
    keys = [*[f"{index:02d}.parquet" for index in range(12)], "a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    output = open_storage(str(tmp_path))
    listed = Listed(Keys(iter(keys)), output, "run-1", resume=False)  # type: ignore[arg-type]
    input = list_input(Keys(iter(())), None, listed)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())
    listed.begin()
    assert [item.key for item, _ in zip(input.objects, keys, strict=True)] == keys
    noted = Listed(Keys(iter(())), output, "run-2", resume=True)  # type: ignore[arg-type]
    assert [item.key for item in noted] == keys[:14]


def sized(*sizes: int) -> list[Row]:
    return [
        Row(key=f"{index:03}", size=size, etag="e", model="m", options="o", run_id="r")
        for index, size in enumerate(sizes)
    ]


def test_units_begin_with_one_object_each_and_end_small() -> None:
    """So that soon there is something to see, and no worker is left alone with much at the end."""
    rows = sized(*[2**18] * 100)
    units = list(object_units(rows, 16, 2))
    assert [key for unit in units for key in unit["key"].to_pylist()] == [row.key for row in rows]
    assert [len(unit) for unit in units] == [1, 1, 16, 16, 16, 13, 10, 7, 5, 4, 3, 2, 2, 1, 1, 1, 1]
    assert [len(unit) for unit in object_units(rows[:3], 16, 8)] == [1, 1, 1]
    assert list(object_units([], 16, 8)) == []


def test_units_of_small_files_are_no_smaller_than_is_worth_their_way() -> None:
    assert [len(unit) for unit in object_units(sized(*[2**16] * 50), 16, 2)] == [1, 1, 12, 9, 7, 5, 4, 4, 4, 3]
    assert [len(unit) for unit in object_units(sized(*[2**10] * 50), 16, 2)] == [1, 1, 13, 13, 13, 9]


def test_units_of_large_files_hold_fewer() -> None:
    rows = sized(*[size * 2**20 for size in (1, 9, 7, 1, 40, 2, 2)] * 9)
    assert [unit["size"].to_pylist() for unit in object_units(rows, 4, 1)][1:5] == [
        [9 * 2**20, 7 * 2**20], [2**20], [40 * 2**20], [2**21, 2**21, 2**20, 9 * 2**20],
    ]  # fmt: skip


@pytest.mark.parametrize("group", [0, 99_999, 100_000])
def test_an_output_of_a_row_group_tells_its_file(group: int) -> None:
    shard = shard_key("album/a.parquet", group, 200_000)
    assert shard == f"album/a-{group:05}.parquet"
    assert files_of_shard(shard) == {shard, "album/a.parquet"}
    assert files_of_shard(shard_key("a-1.parquet", 0, 1)) == {"a-1.parquet"}

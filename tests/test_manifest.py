"""The ledger: its schema, its merge, and what it leaves to do."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import hypothesis
import hypothesis.strategies
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from restore_core import manifest
from restore_core.errors import ErrorClass, StorageError, UsageError
from restore_core.manifest import SCHEMA, Ledger, Row
from restore_core.storage import LocalStorage, Object

COLUMNS = (
    "key, status, error, message, size, etag, input_sha256, format, mode, width, height, output_key, output_sha256, "
    "model, options, sigma, flips, patches, gray, orientation, change, seconds, attempt, node, run_id, finished_at"
)
"""As the design has them."""
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def row(key: str = "a.jpg", at: int = 0, **values: object) -> Row:
    """A restored photograph's row, finished `at` seconds after noon."""
    given = Row(
        key=key, status="restored", size=10, etag="e1", model="m1", options="o1", output_key=key, run_id="run",
        finished_at=NOON + timedelta(seconds=at),
    )  # fmt: skip
    return replace(given, **values)  # type: ignore[arg-type]


def files_of(root: Path) -> list[Path]:
    return sorted((root / "_restore/manifest").glob("*.parquet"))


# --- Rows ----------------------------------------------------------------------------------------------------------


def test_columns_are_those_of_the_design() -> None:
    assert SCHEMA.names == COLUMNS.split(", ")


def test_rows_survive_the_way_through_arrow() -> None:
    full = row(
        sigma=3.5, flips=0.1, patches=0.2, gray=1.0, orientation=6, change=4.25, seconds=0.1, attempt=3, node="n",
        width=7, height=5, format="PNG", mode="RGBA", input_sha256="i", output_sha256="o",
    )  # fmt: skip
    failed = row("b.jpg", status="failed", error="truncated", message="cut off", output_key=None)
    assert manifest.rows_of(manifest.table_of([full, failed])) == [full, failed]


def test_columns_without_values_keep_their_types_on_disk(tmp_path: Path) -> None:
    empty = Row(key="a", size=0, etag="", model="", options="", run_id="")
    Ledger(LocalStorage(tmp_path), "run").append([empty])
    assert pq.read_schema(files_of(tmp_path)[0]).equals(SCHEMA)
    assert manifest.rows_of(Ledger(LocalStorage(tmp_path), "next").latest()) == [empty]


def test_a_failure_forgets_the_output() -> None:
    failed = row(output_sha256="x", change=1.0)
    failed.fail("write", "disk full")
    assert (failed.status, failed.error, failed.message) == ("failed", "write", "disk full")
    assert failed.output_key is failed.output_sha256 is None
    assert failed.change == 1.0  # of what was not written


def test_an_overview_counts_and_picks_samples() -> None:
    overview = manifest.Overview()
    for index in range(1000):
        overview.add(row(f"{index:04d}.jpg", format="JPEG", width=10, height=10, change=index / 100))
    overview.add(row("large.png", format="PNG", width=10_000, height=10_000))
    overview.add(row("x", status="failed", error="read", message="first"))
    overview.add(row("y", status="failed", error="read", message="second"))
    assert overview.statuses == {"restored": 1001, "failed": 2}
    assert overview.errors == {"read": 2} and overview.first_failures == {"read": ("x", "first")}
    assert overview.formats == {"JPEG": 1000, "PNG": 1, "not decoded": 2}
    assert len(overview.changes) == 1001 and max(overview.changes) == pytest.approx(9.99)
    keys = [sample.key for sample in overview.samples]
    assert keys == sorted(keys) and len(set(keys)) == 12 and "large.png" not in keys
    assert keys[0] < "0250.jpg" and keys[-1] > "0750.jpg", "not from all over the collection"


# --- The ledger ----------------------------------------------------------------------------------------------------


def test_an_empty_ledger_has_the_schema(tmp_path: Path) -> None:
    ledger = Ledger(LocalStorage(tmp_path), "run")
    assert ledger.latest().schema.equals(SCHEMA)
    assert ledger.merge() == 0 and not len(ledger.latest())


def test_after_a_merge_there_is_one_row_a_key_and_the_latest_counts(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    first, second = Ledger(storage, "run-1"), Ledger(storage, "run-2")
    first.append([row("b", at=0), row("a", at=1, attempt=1)])
    second.append([row("a", at=9, attempt=2, run_id="run-2"), row("c", at=3, run_id="run-2")])
    first.append([row("a", at=5, attempt=2)])  # written later, finished earlier
    assert second.merge() == 2, "rows of its own"
    merged = manifest.rows_of(second.latest())
    assert [(r.key, r.attempt) for r in merged] == [("a", 2), ("b", 1), ("c", 1)]
    assert manifest.rows_of(pa.concat_tables(pq.read_table(file) for file in files_of(tmp_path))) == merged
    assert Ledger(storage, "run-3").merge() == 0
    assert manifest.rows_of(pa.concat_tables(pq.read_table(file) for file in files_of(tmp_path))) == merged


def test_a_later_attempt_counts_though_clocks_differ(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    Ledger(storage, "run-1").append([row("a", at=600, status="failed", error="read", output_key=None)])
    ledger = Ledger(storage, "run-2")
    ledger.append([row("a", at=0, attempt=2, run_id="run-2")])
    assert ledger.latest()["status"].to_pylist() == ["restored"]
    assert [table.to_pylist() for table in ledger.superseded()] == [[{"key": "a", "output_key": None}]]
    assert ledger.merge() == 1 and ledger.latest()["attempt"].to_pylist() == [2]


def test_what_was_begun_is_forgotten_once_it_is_done(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    ledger, begun = Ledger(storage, "run"), Ledger(storage, "run", folder="begun")
    ledger.append([row("a", attempt=2), row("b"), row("d", attempt=3)])
    begun.append([row(key, attempt=2, status=None) for key in "abcd"])

    def forget() -> int:
        return begun.merge(lambda marks: manifest.unanswered(marks, ledger.rows(("key", "attempt"))))

    for _ in range(2):
        assert forget() == 1  # of c no row could be believed
        assert begun.latest()["key"].to_pylist() == ["b"]
    ledger.append([row("b", at=1, attempt=2)])
    assert forget() == 0 and not list((tmp_path / "_restore/begun").iterdir())


def test_large_ledgers_are_merged_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest.ledger, "FILE_ROWS", 4)
    rows = [row(f"{index:02d}") for index in range(10)]
    ledger = Ledger(LocalStorage(tmp_path), "run")
    ledger.append(rows[:6])
    ledger.append(rows[6:])
    ledger.merge()
    assert [len(pq.read_table(file)) for file in files_of(tmp_path)] == [4, 4, 2]
    assert manifest.rows_of(Ledger(LocalStorage(tmp_path), "next").latest()) == rows


def test_a_damaged_file_is_named_and_others_notes_are_not_read(tmp_path: Path) -> None:
    ledger = Ledger(LocalStorage(tmp_path), "run")
    ledger.append([row("a")])
    (tmp_path / "_restore/manifest/.DS_Store").write_bytes(b"a desktop's")
    assert ledger.latest()["key"].to_pylist() == ["a"]
    for damage in (b"", b"PAR1", files_of(tmp_path)[0].read_bytes()[:-9]):
        (tmp_path / "_restore/manifest/x.parquet").write_bytes(damage)
        with pytest.raises(
            StorageError,
            match=r"read: .*/_restore/manifest/x\.parquet is damaged \(.*\); move it away, and what it .* again",
        ):
            ledger.latest()
    (tmp_path / "_restore/begun").mkdir()
    (tmp_path / "_restore/begun/x.parquet").write_bytes(b"")
    with pytest.raises(StorageError, match=r"begun/x\.parquet is damaged .*; move it away, and run jobs/verify_bucket"):
        Ledger(LocalStorage(tmp_path), "run", folder="begun").latest()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("steps", range(6))
def test_a_merge_interrupted_anywhere_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Two writes and three deletes: the process dies before the first, the second ..."""
    storage = LocalStorage(tmp_path)
    ledger = Ledger(storage, "run-1")
    for part in ([row("a", at=0), row("b", at=0)], [row("a", at=1, attempt=2)], [row("c", at=0)]):
        ledger.append(part)
    expected = manifest.rows_of(ledger.latest())
    monkeypatch.setattr(manifest.ledger, "FILE_ROWS", 2)
    left = steps

    def until_interrupted(real: object) -> object:
        def call(self: LocalStorage, *values: object) -> object:
            nonlocal left
            if left == 0:
                raise Interrupted
            left -= 1
            return real(self, *values)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patched:
        for name in ("write", "delete"):
            patched.setattr(LocalStorage, name, until_interrupted(getattr(LocalStorage, name)))
        if steps < 5:
            with pytest.raises(Interrupted):
                ledger.merge()
        else:
            ledger.merge()
    assert manifest.rows_of(Ledger(storage, "run-2").latest()) == expected
    assert Ledger(storage, "run").merge() == len(expected)
    assert manifest.rows_of(Ledger(storage, "run-2").latest()) == expected
    assert sum(len(pq.read_table(file)) for file in files_of(tmp_path)) == len(expected)


def test_a_ledger_on_s3_reads_back(s3: str) -> None:
    from restore_core.storage import open_storage

    ledger = Ledger(open_storage("s3://photos/out/"), "run")
    ledger.append([row("a", at=0), row("ü b#.jpg", at=0)])
    ledger.append([row("a", at=1, attempt=2)])
    ledger.merge()
    assert [(r.key, r.attempt) for r in manifest.rows_of(ledger.latest())] == [("a", 2), ("ü b#.jpg", 1)]
    assert len(list(open_storage("s3://photos/out/_restore/manifest/").list())) == 1


def test_an_append_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "_restore").write_bytes(b"a file where the folder should be")
    with pytest.raises(StorageError, match="the ledger cannot be written"):
        Ledger(LocalStorage(tmp_path), "run").append([row()])


def test_run_ids_sort_by_time_and_differ() -> None:
    ids = [manifest.new_run_id() for _ in range(50)]
    assert len(set(ids)) == 50
    assert [name[:15] for name in ids] == sorted(name[:15] for name in ids)


# --- What is left to do --------------------------------------------------------------------------------------------

ITEM = Object("a.jpg", 10, "e1")


def left(
    *rows: Row, item: Object = ITEM, model: str = "m1", options: str = "o1", retry: str | None = None,
    exists: frozenset[str] = frozenset({"a.jpg"}), begun: Sequence[Row] = (),
) -> list[tuple[str, int]]:  # fmt: skip
    found = manifest.compare(
        [item], [manifest.table_of(rows)], [manifest.table_of(begun)], exists=exists.__contains__, model=model,
        options=options, retry=manifest.parse_retry(retry),
    )  # fmt: skip
    return [(item.key, attempt) for item, _, attempt in found if attempt is not None]


def test_new_objects_are_left_to_do() -> None:
    assert left() == left(row("another.jpg")) == [("a.jpg", 1)]


@pytest.mark.parametrize("status", ["restored", "unchanged"])
def test_finished_objects_are_not(status: str) -> None:
    assert left(row(status=status)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"item": Object("a.jpg", 10, "e2")},
        {"item": Object("a.jpg", 11, "e1")},
        {"model": "m2"},
        {"options": "o2"},
        {"exists": frozenset()},
    ],
    ids=["etag", "size", "model", "options", "output missing"],
)
def test_what_has_changed_is_done_again(change: dict[str, object]) -> None:
    assert left(row(attempt=2), **change) == [("a.jpg", 3)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("retry", "expected"), [(None, []), ("all", [("a.jpg", 2)]), ("read, denied", [("a.jpg", 2)]), ("write", [])]
)
def test_failures_are_tried_again_only_when_asked(retry: str | None, expected: list[tuple[str, int]]) -> None:
    failed = row(status="failed", error="denied", output_key=None)
    assert left(failed, retry=retry, exists=frozenset()) == expected


def test_a_failure_whose_object_has_changed_is_tried_again() -> None:
    failed = row(status="failed", error="truncated", output_key=None)
    assert left(failed, item=Object("a.jpg", 10, "e2")) == [("a.jpg", 2)]


def test_what_was_begun_again_and_not_finished_is_done_again() -> None:
    """Its output may be another run's by now."""
    assert left(row(attempt=2), begun=[row(attempt=3)]) == [("a.jpg", 4)]
    assert left(row(attempt=3), begun=[row(attempt=3)]) == []
    assert left(row(attempt=2), begun=[row("b.jpg", attempt=3)]) == []
    failed = row(status="failed", error="denied", output_key=None, attempt=1)
    assert left(failed, begun=[row(attempt=2)]) == [("a.jpg", 3)]


def test_listings_have_to_be_sorted() -> None:
    with pytest.raises(StorageError, match="the input's listing does not come in the order of its keys: 'a' after 'b'"):
        list(
            manifest.compare(
                [Object("b", 1, "e"), Object("a", 1, "e")],
                [],
                [],
                exists=bool,
                model="m",
                options="o",
                retry=frozenset(),
            )
        )


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(hypothesis.strategies.data())
def test_a_listing_is_held_against_a_ledger_in_many_files(data: hypothesis.strategies.DataObject) -> None:
    """The streams against dictionaries: any keys, any rows of them in any files, some of them merged."""
    keys = hypothesis.strategies.text("ab/é\U0001f600", min_size=1, max_size=3)
    listed = sorted(data.draw(hypothesis.strategies.sets(keys)))
    files = data.draw(hypothesis.strategies.lists(hypothesis.strategies.lists(keys, max_size=6), max_size=6))
    at = iter(data.draw(hypothesis.strategies.permutations(range(40))))
    expected: dict[str, Row] = {}
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(manifest.ledger, "GROUP_ROWS", 2)
        patched.setattr(manifest.ledger, "FILE_ROWS", 3)
        patched.setattr(manifest.ledger, "SMALL_FILES", 2)
        ledger = Ledger(LocalStorage(Path(folder)), "run")
        for file in files:
            rows = [row(key, at=next(at)) for key in file]
            for one in rows:
                if one.key not in expected or one.finished_at > expected[one.key].finished_at:  # type: ignore[operator]
                    expected[one.key] = one
            if rows:
                ledger.append(rows)
            if data.draw(hypothesis.strategies.booleans()):
                ledger.merge()
        assert manifest.rows_of(ledger.latest()) == [expected[key] for key in sorted(expected)]
        found = manifest.compare(
            [Object(key, 10, "e1") for key in listed], ledger.rows(manifest.COLUMNS), [], exists=lambda key: True,
            model="m1", options="o1", retry=frozenset(),
        )  # fmt: skip
        assert [(item.key, attempt) for item, _, attempt in found] == [
            (key, None if key in expected else 1) for key in listed
        ]
        assert {pair["key"] for table in ledger.superseded() for pair in table.to_pylist()} <= expected.keys()


def test_a_long_run_does_not_leave_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest.ledger, "SMALL_FILES", 8)
    ledger = Ledger(LocalStorage(tmp_path), "run")
    for index in range(200):
        ledger.append([row(f"{index:03d}", at=index)])
        assert len(files_of(tmp_path)) <= 7 + 7 + index // 64
    assert ledger.merge() == 200 and len(files_of(tmp_path)) == 1


def test_outputs_that_no_row_names_any_more_are_known_until_the_merge(tmp_path: Path) -> None:
    ledger = Ledger(LocalStorage(tmp_path), "run")
    ledger.append([row("a", at=0, output_key="old-0"), row("b", at=0, output_key="old-1")])
    ledger.append([row("a", at=1, output_key="new"), row("c", at=1, status="failed", output_key=None)])
    ledger.append([row("d", at=0, output_key="old-1")])
    ledger.append([row("d", at=1, output_key="new")])
    superseded = [(pair["key"], pair["output_key"]) for table in ledger.superseded() for pair in table.to_pylist()]
    assert superseded == [("a", "old-0"), ("d", "old-1")]
    ledger.merge()
    assert not [row for table in ledger.superseded() for row in table.to_pylist()]


def test_the_options_identity_depends_on_values_not_on_their_order() -> None:
    first = manifest.options_hash({"strip_metadata": False, "max_pixels": 1})
    assert first == manifest.options_hash({"max_pixels": 1, "strip_metadata": False})
    assert first != manifest.options_hash({"max_pixels": 1, "strip_metadata": True})


def test_parse_retry() -> None:
    assert manifest.parse_retry(None) == frozenset()
    assert manifest.parse_retry("all") == set(get_args(ErrorClass))
    assert manifest.parse_retry("read,denied") == {"read", "denied"}
    with pytest.raises(
        UsageError, match=r"^--retry-failed borken: no such class of failures; use all or some of .*read"
    ):
        manifest.parse_retry("read,borken")

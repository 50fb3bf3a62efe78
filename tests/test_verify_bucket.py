"""The proof of a restore: it holds for a good one, on disk, on S3 and for Parquet, and each kind of fault is named."""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photos import encoded, write_tree

from jobs import command_line, restore_bucket, verify_bucket
from jobs.restore_bucket import RestoreBucket
from jobs.verify_bucket import VerifyBucket
from restore_core.errors import ItemError, StorageError, UsageError
from restore_core.pipelines import verification
from restore_core.storage import LocalStorage

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

Restore = Callable[[object, object], int]
FILES = {f"album/{index} é&.png": encoded(index, format="PNG") for index in range(6)} | {"notes.txt": b"no photograph"}


@pytest.fixture
def restore(small_model: Callable[[int], Path]) -> Restore:
    def run(input: object, output: object) -> int:
        return restore_bucket.main(
            RestoreBucket(
                input=str(input), output=str(output), model=str(small_model(1)), device="cpu", workers="1", batch_size=4
            )
        )

    return run


def findings(input: object, output: object, report: Path) -> set[tuple[str, str]]:
    """What is wrong, and the exit code agrees."""
    code = verify_bucket.main(VerifyBucket(input=str(input), output=str(output), report=report))
    found = json.loads(report.read_text())["findings"]
    assert code == (1 if found else 0)
    return {(entry["finding"], entry["key"]) for entry in found}


def test_each_fault_is_named(tmp_path: Path, restore: Restore, capsys: pytest.CaptureFixture[str]) -> None:
    source, output, report = write_tree(tmp_path / "in", FILES), tmp_path / "out", tmp_path / "report.json"
    assert restore(source, output) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert findings(source, output, report) == set()
    assert "7 objects: 1 failed, 6 restored; 6 outputs hashed, 0 wrong" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before

    names = [output / key for key in FILES]
    names[0].unlink()
    data = bytearray(names[1].read_bytes())
    data[-20] ^= 1
    names[1].write_bytes(data)
    (output / "album/stranger.png").write_bytes(b"?")
    temporary = f".restore-{'0' * 32}.tmp"
    (output / "album" / temporary).write_bytes(b"half")
    (source / "new.png").write_bytes(encoded(9, format="PNG"))
    (source / "album/2 é&.png").write_bytes(encoded(10, format="PNG"))
    assert findings(source, output, report) == {
        ("missing", "album/0 é&.png"),
        ("changed", "album/1 é&.png"),
        ("outdated", "album/2 é&.png"),
        ("extra", "album/stranger.png"),
        ("temporary", f"album/{temporary}"),
        ("unaccounted", "new.png"),
    }
    said = capsys.readouterr().out
    assert "1 missing: " in said and "6 wrong" in said

    # What can be mended by another run is mended by it.
    names[1].unlink()
    (output / "album" / temporary).unlink()
    assert restore(source, output) == 0
    assert findings(source, output, report) == {("extra", "album/stranger.png")}

    # Nor does it hide that the original has been deleted in the meantime.
    names[0].unlink()
    (source / "album/0 é&.png").unlink()
    assert findings(source, output, report) == {("extra", "album/stranger.png"), ("missing", "album/0 é&.png")}


def test_an_interrupted_restore_is_told_apart_from_a_finished_one(tmp_path: Path, restore: Restore) -> None:
    source, output, report = write_tree(tmp_path / "in", FILES), tmp_path / "out", tmp_path / "report.json"
    output.mkdir()
    assert findings(source, output, report) == {("unaccounted", key) for key in FILES}
    first = write_tree(tmp_path / "first", dict(list(FILES.items())[:3]))
    assert restore(first, output) == 0
    wrong = findings(source, output, report)
    assert {key for kind, key in wrong if kind == "unaccounted"} == set(list(FILES)[3:])


def test_a_bucket(s3: str, moto_client: "S3Client", tmp_path: Path, restore: Restore) -> None:
    for key, data in FILES.items():
        moto_client.put_object(Bucket="photos", Key=f"in/{key}", Body=data)
    assert restore("s3://photos/in", "s3://photos/out") == 0
    report = tmp_path / "report.json"
    assert findings("s3://photos/in", "s3://photos/out", report) == set()
    moto_client.delete_object(Bucket="photos", Key="out/album/3 é&.png")
    moto_client.put_object(Bucket="photos", Key="out/album/4 é&.png", Body=b"other")
    assert findings("s3://photos/in", "s3://photos/out", report) == {
        ("missing", "album/3 é&.png"),
        ("changed", "album/4 é&.png"),
    }


def test_outputs_are_read_side_by_side(
    tmp_path: Path, restore: Restore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In several processes, and of one process in several threads: each waits for another that reads."""
    source, output, notes = write_tree(tmp_path / "in", FILES), tmp_path / "out", tmp_path / "notes"
    assert restore(source, output) == 0
    notes.mkdir()

    class Waiting(LocalStorage):  # of this function, so that Ray carries it to its workers
        def read(self, key: str) -> bytes:
            own = f"{os.getpid()} "
            (notes / (own + Path(key).name)).touch()
            for _ in range(600):
                begun = [path.name for path in notes.iterdir()]
                if len({name.split()[0] for name in begun}) > 1 and sum(name.startswith(own) for name in begun) > 1:
                    return super().read(key)
                time.sleep(0.1)
            raise ItemError("read", "nobody else reads")

    monkeypatch.setattr(verification, "UNIT_FILES", 2)
    monkeypatch.setattr("restore_core.storage.open_storage", lambda uri, **_: Waiting(Path(uri)))
    capsys.readouterr()
    assert verify_bucket.main(VerifyBucket(input=str(source), output=str(output))) == 0
    assert "6 outputs hashed, 0 wrong" in capsys.readouterr().out


def test_a_storage_that_fails_in_a_worker_is_told_in_the_last_line(
    tmp_path: Path, restore: Restore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not one changed output."""
    source, output = write_tree(tmp_path / "in", FILES), tmp_path / "out"
    assert restore(source, output) == 0

    class Unreachable(LocalStorage):  # of this function, so that Ray carries it to its workers
        def read(self, key: str) -> bytes:
            raise ItemError("read", f"cannot read {key}: no network", others_too=True)

    monkeypatch.setattr("restore_core.storage.open_storage", lambda uri, **_: Unreachable(Path(uri)))
    monkeypatch.setattr(sys, "argv", ["verify_bucket.py", "--input", str(source), "--output", str(output)])
    capsys.readouterr()
    assert command_line.run(verify_bucket.main, VerifyBucket) == command_line.UNUSABLE
    out, err = capsys.readouterr()
    assert re.fullmatch(r"error: cannot read album/\d é&.png: no network", err.splitlines()[-1]), err
    assert "Traceback" not in err and out == ""


@pytest.mark.parametrize("keyed", [True, False])
def test_parquet(tmp_path: Path, restore: Restore, keyed: bool) -> None:
    images = [*(encoded(index) for index in range(4)), b"no photograph", b"neither", b"nor this", None]
    columns: dict[str, list[object]] = {"image": list(images)}
    if keyed:
        columns["key"] = [f"row {index}" for index in range(len(images))]
    (tmp_path / "in").mkdir()
    # The last row group has failed rows only: its shard is written all the same, and is no stranger.
    table = pa.table(columns, schema=pa.schema([(name, pa.binary() if name == "image" else pa.string())
                                                for name in columns]))  # fmt: skip
    pq.write_table(table, tmp_path / "in/faces.parquet", row_group_size=5)
    output, report = tmp_path / "out", tmp_path / "report.json"
    restore(tmp_path / "in", output)
    assert findings(tmp_path / "in", output, report) == set()

    shard = output / "faces-00000.parquet"
    written = pq.read_table(shard)
    rows = written.to_pylist()
    rows[3]["image"] = encoded(99)
    pq.write_table(pa.Table.from_pylist(rows, schema=written.schema), shard)
    changed = "row 3" if keyed else "faces.parquet#3"
    assert findings(tmp_path / "in", output, report) == {("changed", changed)}
    # As many of the same bytes, and yet not where they belong; one too many; of a failed one another original.
    key = (lambda index: f"row {index}") if keyed else (lambda index: f"faces.parquet#{index}")
    for altered, wrong in (
        (lambda rows: [rows[1], rows[0], *rows[2:]], {0, 1}),
        (lambda rows: [*rows, rows[0]], {0, 1, 2, 3, 4}),
        (lambda rows: [*rows[:4], rows[4] | {"image": b"nothing"}], {4}),
    ):
        pq.write_table(pa.Table.from_pylist(altered(written.to_pylist()), schema=written.schema), shard)
        assert findings(tmp_path / "in", output, report) == {("changed", key(index)) for index in wrong}
    pq.write_table(written, shard)
    assert findings(tmp_path / "in", output, report) == set()

    # What has become of the input since does not make the output wrong.
    before = (tmp_path / "in/faces.parquet").read_bytes()
    times = (tmp_path / "in/faces.parquet").stat()
    pq.write_table(table.slice(1), tmp_path / "in/faces.parquet", row_group_size=5)
    assert {finding for finding, _ in findings(tmp_path / "in", output, report)} == {"outdated"}
    (tmp_path / "in/faces.parquet").write_bytes(before)
    os.utime(tmp_path / "in/faces.parquet", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert findings(tmp_path / "in", output, report) == set()

    # A column that is no image: its page has a checksum.
    restore(tmp_path / "in", tmp_path / "again")
    good = (tmp_path / "again/faces-00000.parquet").read_bytes()
    shard.write_bytes(good)
    assert findings(tmp_path / "in", output, report) == set()
    if keyed:
        column = pq.read_metadata(shard).row_group(0).column(1)
        at = column.data_page_offset + column.total_compressed_size - 3
        shard.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert len(findings(tmp_path / "in", output, report)) == 5

    shard.write_bytes(shard.read_bytes()[:-9])
    assert len(findings(tmp_path / "in", output, report)) == 5
    pq.write_table(pa.table({"words": ["no", "images"]}), shard)
    assert {finding for finding, _ in findings(tmp_path / "in", output, report)} == {"changed"}


def test_names_cannot_forge_lines(tmp_path: Path, restore: Restore, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tree(tmp_path / "in", {"a.png": encoded(1, format="PNG")})
    assert restore(source, tmp_path / "out") == 0
    (tmp_path / "out" / "x\n1 objects: all is well\x1b[2J.png").write_bytes(b"")
    capsys.readouterr()
    assert verify_bucket.main(VerifyBucket(input=str(source), output=str(tmp_path / "out"))) == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert not any(line.startswith("1 objects: all") for line in said.splitlines())


def test_a_network_that_fails_is_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output would be called unreadable, or changed, with the advice to delete it."""

    def fails(self: LocalStorage, key: str) -> bytes:
        raise ItemError("read", "no route to host", others_too=True)

    row = {"key": "a.jpg", "file": "a.jpg", "row": None, "output_sha256": "0", "input_sha256": "0", "rows": None}
    assert verification._check_file([row], LocalStorage(tmp_path)) == [{"finding": "missing", "key": "a.jpg"}]
    monkeypatch.setattr(LocalStorage, "read", fails)
    with pytest.raises(StorageError, match="no route to host"):
        verification._check_file([row], LocalStorage(tmp_path))


def test_a_report_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UsageError, match=r"--report .*: cannot be written \(Is a directory\); name another"):
        verify_bucket.main(VerifyBucket(input=str(tmp_path), output=str(tmp_path), report=tmp_path / "in"))


def test_what_cannot_be_verified_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UsageError, match=r"^--output .*nowhere: no such"):
        verify_bucket.main(VerifyBucket(input=str(tmp_path / "in"), output=str(tmp_path / "nowhere")))
    with pytest.raises(UsageError, match=r"^--report .*: there is no folder"):
        VerifyBucket(input="in", output="out", report=tmp_path / "no/such/file.json")


def test_the_report_says_what_was_asked(tmp_path: Path, restore: Restore) -> None:
    source, report = write_tree(tmp_path / "in", FILES), tmp_path / "report.json"
    assert restore(source, tmp_path / "out") == 0
    assert findings(source, tmp_path / "out", report) == set()
    record = json.loads(report.read_text())
    assert record["options"]["input"] == str(source)
    assert (record["listed"], record["hashed"], record["statuses"]) == (7, 6, {"failed": 1, "restored": 6})

"""jobs/pack_dataset.py as people use it: photographs of any layout in, person-disjoint Parquet out, nothing lost."""

import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import command_line
from jobs.pack_dataset import PackDataset, main
from restore_core import sources
from restore_core.errors import UsageError
from restore_core.pipelines import packing
from restore_core.sources import DATASET_SCHEMA, split_of
from restore_core.storage import LocalStorage, Storage, open_storage
from tests.photos import encoded, header_of, people, tar_of, write_tree

ROOT = Path(__file__).parent.parent
JOB = ROOT / "jobs" / "pack_dataset.py"
FILES = people(12)

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jobs/pack_dataset.py", *map(str, arguments)])
        try:
            code = command_line.run(main, PackDataset)
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
        return code, *capsys.readouterr()

    return call


def pack_in_process_of_its_own(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-W", "error", JOB, *map(str, arguments)], capture_output=True, text=True, env=environment
    )


def shards(output: Storage) -> dict[str, pa.Table]:
    return {
        item.key: pq.read_table(io.BytesIO(output.read(item.key)))
        for item in output.list()
        if item.key.endswith(".parquet")
    }


def rows(output: Path | Storage) -> dict[str, dict[str, object]]:
    """Every row by its key; no key is there twice."""
    place = open_storage(output) if isinstance(output, Path) else output
    found = [row for table in shards(place).values() for row in table.to_pylist()]
    assert len({row["key"] for row in found}) == len(found)
    return {row["key"]: row for row in found}


def broken(output: Path) -> list[list[str]]:
    with (output / "_pack" / "broken.csv").open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == ["key", "error", "message"]
    return lines


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_untouched(found: dict[str, dict[str, object]], files: dict[str, bytes]) -> None:
    assert found.keys() == files.keys()
    for key, row in found.items():
        assert row["image"] == files[key]
        assert row["sha256"] == hashlib.sha256(files[key]).hexdigest()
        assert (row["height"], row["width"]) == (12, 16)
        assert row["group"] == key.split("/")[-2]


# --- Every layout ----------------------------------------------------------------------------------------------------


def test_a_folder_tree(pack: Cli, tmp_path: Path) -> None:
    source, output = write_tree(tmp_path / "in", FILES), tmp_path / "out" / "packed"
    code, out, err = pack("--input", source, "--output", output, "--val-share", 0.3, "--test-share", 0.2)
    assert (code, err) == (0, "")
    found = rows(output)
    assert_untouched(found, FILES)
    for row in found.values():
        assert row["split"] == split_of(str(row["group"]), 0.3, 0.2)
    for split in ("test", "train", "val"):
        mine = [row for row in found.values() if row["split"] == split]
        assert f"{split}: {len(mine)} photographs of {len({row['group'] for row in mine})} people\n" in out
    assert broken(output) == []
    assert content(source) == FILES


@pytest.mark.parametrize("folder", ["lfw_funneled", "lfw"])
def test_the_official_archives(pack: Cli, tmp_path: Path, folder: str) -> None:
    files = people(12, folder)
    items = list(files.items())
    for index in range(2):
        (tmp_path / f"{index}.tar").write_bytes(tar_of(dict(items[index::2])))
    code, _, err = pack("--input", tmp_path / "0.tar", tmp_path / "1.tar", "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    assert_untouched(rows(tmp_path / "out"), files)


def test_both_layouts_of_a_person_go_to_one_split(pack: Cli, tmp_path: Path) -> None:
    """Somebody in the funneled and in the original archive must not be in train here and in val there."""
    for folder in ("lfw_funneled", "lfw"):
        (tmp_path / f"{folder}.tar").write_bytes(tar_of(people(12, folder)))
    pack("--input", tmp_path / "lfw_funneled.tar", tmp_path / "lfw.tar", "--output", tmp_path / "o", "--val-share", 0.4)
    found = rows(tmp_path / "o")
    assert len(found) == 2 * len(FILES)
    people_of = {split: {r["group"] for r in found.values() if r["split"] == split} for split in ("train", "val")}
    assert not people_of["train"] & people_of["val"]
    assert len(people_of["train"] | people_of["val"]) == 12


def test_from_s3_to_s3_in_a_process_of_its_own(s3: str) -> None:
    """The real command, a prefix with photographs and an archive; a neighbouring prefix is not touched."""
    archive = {key: FILES[key] for key in list(FILES)[:8]}
    single = {key: FILES[key] for key in list(FILES)[8:]}
    place = open_storage("s3://photos/raw/")
    place.write("more/lfw.tar", tar_of(archive))
    for key, data in single.items():
        place.write(key, data)
    open_storage("s3://photos/raw2/").write("x/other.jpg", encoded(1))
    result = pack_in_process_of_its_own("--input", "s3://photos/raw", "--output", "s3://photos/packed/lfw")
    assert (result.returncode, result.stderr) == (0, "")
    assert_untouched(rows(open_storage("s3://photos/packed/lfw/")), FILES)
    keys = [item.key for item in open_storage("s3://photos/packed/").list()]
    assert set(keys) - {"lfw/val-00000.parquet"} == {
        "lfw/_pack/broken.csv", "lfw/_pack/options.json", "lfw/train-00000.parquet",
    }  # fmt: skip


# --- What is written -------------------------------------------------------------------------------------------------


def test_the_schema_is_the_contract(pack: Cli, tmp_path: Path) -> None:
    pack("--input", write_tree(tmp_path / "in", FILES), "--output", tmp_path / "out", "--val-share", 0.5)
    written = shards(open_storage(tmp_path / "out"))
    assert set(written) == {"train-00000.parquet", "val-00000.parquet"}
    for name, table in written.items():
        assert table.schema.equals(DATASET_SCHEMA)
        assert set(table["split"].to_pylist()) == {name.partition("-")[0]}
    assert [(field.name, str(field.type)) for field in DATASET_SCHEMA] == [
        ("key", "string"), ("group", "string"), ("split", "string"), ("image", "binary"), ("width", "int32"),
        ("height", "int32"), ("sha256", "string"),
    ]  # fmt: skip


def test_many_photographs_are_split_into_shards_and_row_groups(pack: Cli, tmp_path: Path) -> None:
    data = encoded(1, 1, 1, "PNG")
    files = {f"p{number // 10:03d}/{number:04d}.png": data for number in range(2100)}
    (tmp_path / "many.tar").write_bytes(tar_of(files))
    output = tmp_path / "out"
    assert pack("--input", tmp_path / "many.tar", "--output", output, "--val-share", 0)[0] == 0
    counts = {path.name: pq.read_metadata(path) for path in sorted(output.glob("*.parquet"))}
    assert {name: meta.num_rows for name, meta in counts.items()} == {
        "train-00000.parquet": 2048, "train-00001.parquet": 52,
    }  # fmt: skip
    meta = counts["train-00000.parquet"]
    assert [meta.row_group(index).num_rows for index in range(meta.num_row_groups)] == [256] * 8
    assert list(rows(output)) == list(files)  # in the archive's order


def test_large_photographs_make_smaller_shards_and_row_groups(
    pack: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are counted: a shard is held while it is written, and a row group's images are one page."""
    files = {f"p{number}/{number}.png": encoded(number, format="PNG") for number in range(40)}
    size = sum(map(len, files.values())) // len(files)
    for name, value in {"SHARD_BYTES": 12 * size, "ROW_GROUP_BYTES": 4 * size}.items():
        monkeypatch.setattr(packing, name, value)
    monkeypatch.setattr(sources, "WINDOW_BYTES", 5 * size)
    output = tmp_path / "out"
    assert pack("--input", write_tree(tmp_path / "in", files), "--output", output, "--val-share", 0)[0] == 0
    assert_untouched(rows(output), files)
    counts = [pq.read_metadata(path) for path in sorted(output.glob("*.parquet"))]
    assert len(counts) in (3, 4) and all(10 <= meta.num_rows <= 14 for meta in counts[:-1])
    groups = [meta.row_group(index).num_rows for meta in counts for index in range(meta.num_row_groups)]
    assert max(groups) <= 5 and len(groups) >= 8


def test_a_page_is_not_a_dictionary_of_all_images(pack: Cli, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert pack("--input", write_tree(tmp_path / "in", FILES), "--output", output, "--val-share", 0)[0] == 0
    column = pq.read_metadata(output / "train-00000.parquet").row_group(0).column(DATASET_SCHEMA.names.index("image"))
    assert not column.has_dictionary_page


def test_options_are_written_beside(pack: Cli, tmp_path: Path) -> None:
    write_tree(tmp_path / "in", FILES)
    (tmp_path / "people.txt").write_text("Person_00\n")
    pack("--input", tmp_path / "in", "--output", tmp_path / "out", "--train-list", tmp_path / "people.txt")
    assert json.loads((tmp_path / "out" / "_pack" / "options.json").read_text()) == {
        "input": [str(tmp_path / "in")], "output": str(tmp_path / "out"), "val_share": 0.1, "test_share": 0.0,
        "train_list": str(tmp_path / "people.txt"), "val_list": None, "test_list": None,
    }  # fmt: skip


def test_packing_twice_gives_the_same_bytes_and_no_leftovers(pack: Cli, tmp_path: Path) -> None:
    source, output = write_tree(tmp_path / "in", {**FILES, "z/broken.jpg": b"x"}), tmp_path / "out"
    arguments = ("--input", source, "--output", output, "--val-share", 0.4)
    pack(*arguments)
    first = content(output)
    pack(*arguments)
    assert content(output) == first

    # an earlier and larger packing left more shards, and one of a split that is empty now
    for name in ("train-00001.parquet", "train-00002.parquet", "test-00000.parquet"):
        (output / name).write_bytes(first["train-00000.parquet"])
    (output / "train-00009.parquet").write_bytes(first["train-00000.parquet"])  # its deletion had been interrupted
    (output / "notes.txt").write_text("not ours")
    pack(*arguments)
    assert content(output) == {**first, "notes.txt": b"not ours"}


def test_a_dataset_whose_packing_was_interrupted_is_not_used(
    pack: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the shards of an earlier one, which had other people in each split."""
    source, output = write_tree(tmp_path / "in", FILES), tmp_path / "out"
    pack("--input", source, "--output", output, "--val-share", 0.4)
    write = LocalStorage.write

    def killed(self: LocalStorage, key: str, data: bytes, content_type: str | None = None) -> None:
        if key.startswith("val"):
            raise KeyboardInterrupt
        write(self, key, data, content_type)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(LocalStorage, "write", killed)
        packing.pack(
            [LocalStorage(source)], LocalStorage(output), packing.Splits(val_share=0.6, test_share=0, lists={}), {}
        )
    with pytest.raises(UsageError, match=rf"^--data {output}: jobs/pack_dataset.py did not finish there; run it again"):
        sources.parquet_files(LocalStorage(output))
    pack("--input", source, "--output", output, "--val-share", 0.6)
    assert sources.parquet_files(LocalStorage(output))
    assert rows(output).keys() == FILES.keys()


def test_splits_are_stable_when_people_come_and_go(pack: Cli, tmp_path: Path) -> None:
    write_tree(tmp_path / "all", FILES)
    write_tree(tmp_path / "some", {key: data for key, data in FILES.items() if "Person_0" not in key})
    for name in ("all", "some"):
        pack("--input", tmp_path / name, "--output", tmp_path / f"{name}-out", "--val-share", 0.4)
    every, some = rows(tmp_path / "all-out"), rows(tmp_path / "some-out")
    assert 0 < len(some) < len(every)
    assert all(every[key] == row for key, row in some.items())


# --- Lists of people -------------------------------------------------------------------------------------------------


def test_official_lists_fix_the_split(pack: Cli, tmp_path: Path) -> None:
    """Whoever is in a list goes there, everybody else by the shares."""
    write_tree(tmp_path / "in", FILES)
    (tmp_path / "train.txt").write_text("4\n" + "".join(f"Person_{n:02d}\t{1 + n % 3}\n" for n in range(4)))
    (tmp_path / "test.txt").write_text("3\nPerson_04\t2\nPerson_05\t3\nNobody_Here\t1\n")
    code, _, err = pack(
        "--input", tmp_path / "in", "--output", tmp_path / "out", "--val-share", 0.9,
        "--train-list", tmp_path / "train.txt", "--test-list", tmp_path / "test.txt",
    )  # fmt: skip
    assert (code, err) == (0, "")
    listed = {f"Person_{n:02d}": "train" for n in range(4)} | {"Person_04": "test", "Person_05": "test"}
    found = rows(tmp_path / "out")
    assert len(found) == len(FILES)
    for row in found.values():
        person = str(row["group"])
        assert row["split"] == listed.get(person, split_of(person, 0.9, 0))
    assert {row["split"] for row in found.values()} == {"train", "val", "test"}


def test_people_of_a_list_are_found_however_it_was_written(pack: Cli, tmp_path: Path) -> None:
    """With a byte order mark as of Windows, accents taken apart as by macOS; and who is not there is told."""
    folders = ["Ann", unicodedata.normalize("NFD", "José"), *(f"Person_{n:02d}" for n in range(20))]
    source = write_tree(tmp_path / "in", {f"{name}/{n}.jpg": encoded(n) for n, name in enumerate(folders)})
    (tmp_path / "test.txt").write_text("\ufeffAnn\nJosé\nNobody\n", encoding="utf-8")
    code, out, err = pack(
        "--input", source, "--output", tmp_path / "out", "--val-share", 0.2, "--test-list", tmp_path / "test.txt"
    )
    assert (code, err) == (0, "")
    assert {row["group"] for row in rows(tmp_path / "out").values() if row["split"] == "test"} == {"Ann", "José"}
    assert "1 of its 3 people have no photograph here, such as 'Nobody'; names are those of the folders\n" in out
    assert "none" not in out


def test_a_split_without_anybody_is_told(pack: Cli, tmp_path: Path) -> None:
    source = write_tree(tmp_path / "in", {f"2024/{n}.jpg": encoded(n) for n in range(9)})
    code, out, _ = pack("--input", source, "--output", tmp_path / "out")
    assert code == 0
    assert "val: none, since there are 1 people only (a folder is one): name some in lists\n" in out
    many = write_tree(tmp_path / "many", people(30))
    assert (
        "val: none; training needs some: use a larger --val-share"
        in pack("--input", many, "--output", tmp_path / "out", "--val-share", 0)[1]
    )


# --- Broken files ----------------------------------------------------------------------------------------------------


def moving_gif() -> bytes:
    file = io.BytesIO()
    first, second = (Image.open(io.BytesIO(encoded(seed, format="PNG"))) for seed in (5, 6))
    first.save(file, "GIF", save_all=True, append_images=[second])
    return file.getvalue()


def test_broken_files_are_listed_and_not_fatal(pack: Cli, tmp_path: Path) -> None:
    photograph = encoded(5, 64, 64)
    write_tree(
        tmp_path / "in",
        {
            **FILES,
            "a/empty.jpg": b"",
            "a/text, with a comma.jpg": b"hello",
            "b/cut.jpg": photograph[:-300],
            "b/moving.gif": moving_gif(),
            "README.txt": b"LFW, the Labeled Faces",
        },
    )
    code, out, err = pack("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    assert_untouched(rows(tmp_path / "out"), FILES)
    listed = broken(tmp_path / "out")
    assert [(key, error) for key, error, _ in listed] == [
        ("README.txt", "not_an_image"), ("a/empty.jpg", "not_an_image"), ("a/text, with a comma.jpg", "not_an_image"),
        ("b/cut.jpg", "truncated"), ("b/moving.gif", "unsupported"),
    ]  # fmt: skip
    assert all(message for _, _, message in listed)
    assert out.endswith(f"5 files could not be used: {tmp_path}/out/_pack/broken.csv\n")


def test_a_truncated_archive_is_listed(pack: Cli, tmp_path: Path) -> None:
    archive, last = tar_of(FILES), list(FILES)[-1]
    (tmp_path / "lfw.tar").write_bytes(archive[: header_of(archive, last) + 512 + 99])
    code, out, _ = pack("--input", tmp_path / "lfw.tar", "--output", tmp_path / "out")
    assert code == 0
    assert_untouched(rows(tmp_path / "out"), {key: data for key, data in FILES.items() if key != last})
    [(key, error, message)] = broken(tmp_path / "out")
    assert (key, error) == ("lfw.tar", "truncated") and "cannot be read to its end" in message
    assert "1 files could not be used" in out


def test_two_files_of_one_name_are_not_both_taken(pack: Cli, tmp_path: Path) -> None:
    write_tree(tmp_path / "one", {"Ann/1.jpg": encoded(1)})
    write_tree(tmp_path / "two", {"Ann/1.jpg": encoded(2), "Ann/2.jpg": encoded(3)})
    assert pack("--input", tmp_path / "one", tmp_path / "two", "--output", tmp_path / "out", "--val-share", 0)[0] == 0
    found = rows(tmp_path / "out")
    assert set(found) == {"Ann/1.jpg", "Ann/2.jpg"} and found["Ann/1.jpg"]["image"] == encoded(1)
    assert broken(tmp_path / "out") == [
        ["Ann/1.jpg", "unsupported", "another input has a file of the same name; this one is left out"]
    ]


# --- Bad input: exit code 2, one line, nothing written ---------------------------------------------------------------


def refused(answer: tuple[int, str, str], message: str) -> None:
    code, out, err = answer
    assert (code, out) == (2, "")
    assert err == f"error: {message}\n"


def unboxed(text: str) -> str:
    """What tyro says, without the lines it draws around it."""
    return " ".join(re.sub(r"[^\w\s:;,./()'-]", " ", text).split())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "in", people(2))


def test_inputs_that_cannot_be_used(pack: Cli, source: Path, tmp_path: Path, s3: str) -> None:
    output, empty = tmp_path / "out", tmp_path / "empty"
    (empty / "sub").mkdir(parents=True)
    for place, message in {
        tmp_path / "nothing": "no such file or folder; check the path",
        empty: "no files there; check the path or prefix",
        "gs://bucket/x": "gs:// is not supported; use a local path or s3://bucket/prefix",
        "s3:///x": "no bucket name in it; use s3://bucket/prefix",
        "s3://no-such-bucket/x": "no such bucket; check the bucket's name",
        "s3://photos/nothing": "no objects there; check the prefix",
        "s3://photos": "no files there; check the path or prefix",
    }.items():
        refused(pack("--input", place, "--output", output), f"--input {place}: {message}")
        refused(pack("--input", source, place, "--output", output), f"--input {place}: {message}")
    assert content(tmp_path) == {f"in/{key}": data for key, data in people(2).items()}
    assert not output.exists()


def test_an_empty_input_list(pack: Cli, tmp_path: Path) -> None:
    code, out, err = pack("--input", "--output", tmp_path / "out")
    assert (code, out) == (2, "") and "name at least one folder, archive or s3:// prefix" in unboxed(err)


def test_outputs_that_cannot_be_used(pack: Cli, source: Path, tmp_path: Path, s3: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    open_storage("s3://photos/raw/").write("a/1.jpg", encoded(1))
    for inputs, output, message in [
        (source, source, f"lies inside --input {source}; choose another place"),
        (source, source / "packed", f"lies inside --input {source}; choose another place"),
        (source, source / "x" / ".." / "packed", f"lies inside --input {source}; choose another place"),
        ("s3://photos/raw", "s3://photos/raw/packed", "lies inside --input s3://photos/raw; choose another place"),
        (source, file, "is a file; name a folder"),
        (source, file / "x", f"{file} is a file; name a folder"),
        (source, "s3://no-such-bucket/x", "no such bucket; check the bucket's name"),
        (source, "ftp://host/x", "ftp:// is not supported; use a local path or s3://bucket/prefix"),
    ]:
        refused(pack("--input", inputs, "--output", output), f"--output {output}: {message}")
    assert content(tmp_path) == {**{f"in/{key}": data for key, data in people(2).items()}, "file": b""}
    assert [item.key for item in open_storage("s3://photos/").list()] == ["raw/a/1.jpg"]


def test_lists_that_contradict_each_other_or_cannot_be_read(pack: Cli, source: Path, tmp_path: Path) -> None:
    one, two, output = tmp_path / "one.txt", tmp_path / "two.txt", tmp_path / "out"
    one.write_text("Person_00\t1\nPerson_01\t2\nZoe\t1\n")
    two.write_text("Person_01\t2\nZoe\t1\n")
    common = ("--input", source, "--output", output)
    refused(
        pack(*common, "--train-list", one, "--val-list", two),
        "--train-list and --val-list both name 'Person_01'; remove one",
    )
    refused(
        pack(*common, "--val-list", two, "--test-list", two),
        "--test-list and --val-list both name 'Person_01'; remove one",
    )
    missing = tmp_path / "none.txt"
    refused(
        pack(*common, "--test-list", missing),
        f"--test-list {missing}: cannot be read as text ([Errno 2] No such file or directory: '{missing}')",
    )
    assert not output.exists()


SHARES = [
    (("--val-share", "1.5"), "--val-share 1.5: use a share from 0 to 1"),
    (("--val-share", "nan"), "--val-share nan: use a share from 0 to 1"),
    (("--test-share", "-0.1"), "--test-share -0.1: use a share from 0 to 1"),
    (("--val-share", "0.6", "--test-share", "0.5"), "--val-share 0.6: leave some people for training"),
]


@pytest.mark.parametrize(("arguments", "message"), SHARES, ids=[" ".join(arguments) for arguments, _ in SHARES])
def test_shares_out_of_range(pack: Cli, source: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = pack("--input", source, "--output", tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    assert message in unboxed(err) and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_shares_out_of_range_are_one_line(pack: Cli, source: Path, tmp_path: Path) -> None:
    arguments, message = SHARES[0]
    refused(pack("--input", source, "--output", tmp_path / "out", *arguments), message)


def test_no_photographs_at_all(pack: Cli, tmp_path: Path) -> None:
    write_tree(tmp_path / "in", {"a.txt": b"hello", "b/c.jpg": encoded(1, 64, 64)[:-300]})
    code, out, err = pack("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --input {tmp_path}/in: none of the 2 files there is a photograph; ")
    assert "the first, 'a.txt', is not_an_image: " in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_archive_without_files(pack: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty.tar").write_bytes(tar_of({}))
    code, out, err = pack("--input", tmp_path / "empty.tar", "--output", tmp_path / "out")
    assert (code, out) == (2, "") and err.startswith(f"error: --input {tmp_path}/empty.tar: ")
    assert not (tmp_path / "out").exists()


def test_no_photographs_at_all_leave_an_older_dataset_alone(pack: Cli, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    pack("--input", source, "--output", output)
    before = rows(output)
    write_tree(tmp_path / "wrong", {"a.txt": b"hello"})
    assert pack("--input", tmp_path / "wrong", "--output", output)[0] == 2
    assert rows(output) == before


def test_refused_in_a_process_of_its_own(s3: str, tmp_path: Path) -> None:
    result = pack_in_process_of_its_own("--input", "s3://no-such-bucket/x", "--output", tmp_path / "out")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --input s3://no-such-bucket/x: no such bucket; check the bucket's name\n"
    assert not (tmp_path / "out").exists()


def test_a_misspelt_option_is_corrected(pack: Cli, tmp_path: Path) -> None:
    code, _, err = pack("--input", tmp_path, "--output", tmp_path, "--val-shares", "0.1")
    assert code == 2 and "--val-share" in err

"""Where photographs come from: nothing is left out silently, nobody is in two splits, any Parquet is understood."""

import gzip
import hashlib
import io
import logging
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from restore_core import codec, sources
from restore_core.errors import ItemError, UsageError
from restore_core.pipelines import evaluation
from restore_core.sources import (
    DATASET_SCHEMA,
    DECODED_SCHEMA,
    Found,
    count_splits,
    dataset_columns,
    dataset_row,
    decode_rows,
    group_of,
    image_bytes,
    image_column,
    keys_of,
    parquet_files,
    photographs,
    read_list,
    read_split,
    split_of,
    splits,
)
from restore_core.storage import Storage, open_storage
from tests.photos import encoded, header_of, people, pixels, tar_of, write_tree

FILES = people(5)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path / "in")
    request.getfixturevalue("s3")
    return open_storage("s3://photos/in/")


def good(found: list[Found]) -> dict[str, bytes]:
    return {one.key: one.data for one in found if isinstance(one.data, bytes)}


def bad(found: list[Found]) -> list[tuple[str, str, str]]:
    return [(one.key, one.data.error, one.data.message) for one in found if isinstance(one.data, ItemError)]


# --- Photographs of folders and archives -----------------------------------------------------------------------------


def test_a_tree_and_the_archives_in_it_are_read_in_listing_order(place: Storage) -> None:
    place.write("b/y.jpg", b"y")
    place.write("a.tar", tar_of({"lfw/One/1.jpg": b"1", "lfw/Two/2.jpg": b"2"}))
    place.write("c.tgz", gzip.compress(tar_of({"Three/3.jpg": b"3"})))
    place.write("d.tar.gz", gzip.compress(tar_of({"Four/4.jpg": b"4"})))
    found = list(photographs(place))
    assert [one.key for one in found] == ["lfw/One/1.jpg", "lfw/Two/2.jpg", "b/y.jpg", "Three/3.jpg", "Four/4.jpg"]
    assert [one.data for one in found] == [b"1", b"2", b"y", b"3", b"4"]


def test_more_files_than_one_window_stay_in_order(tmp_path: Path) -> None:
    write_tree(tmp_path, {f"p{number:03d}.jpg": b"%d" % number for number in range(50)})
    found = list(photographs(open_storage(tmp_path), threads=2))
    assert [one.data for one in found] == [b"%d" % number for number in range(50)]


def test_a_single_archive_or_file_is_an_input_too(place: Storage) -> None:
    place.write("one.tar", tar_of(FILES))
    place.write("other.tar", tar_of({"x/y.jpg": b"no"}))
    place.write("z.jpg", b"z")
    assert good(list(photographs(open_storage(place.join("one.tar"))))) == FILES
    assert good(list(photographs(open_storage(place.join("z.jpg"))))) == {"z.jpg": b"z"}


def test_a_file_that_cannot_be_read_is_found_with_its_reason(tmp_path: Path) -> None:
    write_tree(tmp_path / "in", {"a.jpg": b"a", "c.jpg": b"c"})
    (tmp_path / "secret.jpg").write_bytes(b"s")
    (tmp_path / "in" / "b.jpg").symlink_to(tmp_path / "secret.jpg")  # leads out of the folder
    found = list(photographs(open_storage(tmp_path / "in")))
    assert [one.key for one in found] == ["a.jpg", "b.jpg", "c.jpg"]
    assert good(found) == {"a.jpg": b"a", "c.jpg": b"c"}
    [(key, error, message)] = bad(found)
    assert (key, error) == ("b.jpg", "read") and "symbolic link" in message


LAST = list(FILES)[-1]


def broken_archives() -> dict[str, bytes]:
    archive = tar_of(FILES)
    at = header_of(archive, LAST)
    return {
        "cut within a photograph": archive[: at + 512 + 100],
        "compressed and cut": gzip.compress(archive, mtime=0)[:-900],
        "nothing": b"",
        "no archive": bytes(range(256)) * 20,
    }


@pytest.mark.parametrize("damage", ["cut within a photograph", "compressed and cut", "nothing", "no archive"])
def test_a_broken_archive_is_found_and_its_whole_photographs_are_kept(place: Storage, damage: str) -> None:
    place.write("lfw.tar", broken_archives()[damage])
    place.write("z.jpg", b"z")
    found = list(photographs(place))
    [(key, error, message)] = bad(found)
    assert (key, error) == ("lfw.tar", "truncated")
    assert message.startswith("the archive cannot be read to its end: ")
    kept = good(found)
    assert kept.pop("z.jpg") == b"z"
    assert kept.items() <= FILES.items() and LAST not in kept
    if damage == "cut within a photograph":
        assert len(kept) == len(FILES) - 1


@pytest.mark.parametrize("damage", ["cut between photographs", "cut within a header", "damaged header"])
def test_an_archive_that_ends_early_without_an_error_is_found_too(tmp_path: Path, damage: str) -> None:
    archive = bytearray(tar_of(FILES))
    at = header_of(bytes(archive), LAST)
    if damage == "damaged header":
        archive[at + 10] ^= 0xFF
    else:
        del archive[at + (100 if damage == "cut within a header" else 0) :]
    (tmp_path / "lfw.tar").write_bytes(archive)
    found = list(photographs(open_storage(tmp_path)))
    assert [key for key, _, _ in bad(found)] == ["lfw.tar"]


def test_names_in_an_archive_that_are_not_utf8_can_be_packed(tmp_path: Path) -> None:
    (tmp_path / "old.tar").write_bytes(tar_of({"lfw/José/1.jpg": encoded(1)}, encoding="latin-1"))
    [found] = photographs(open_storage(tmp_path))
    assert isinstance(found.data, bytes)
    row = dataset_row(found.key, split_of(group_of(found.key), 0.1, 0.1), found.data)
    pa.Table.from_pylist([row], schema=DATASET_SCHEMA)


def test_an_archive_on_s3_takes_few_requests(s3: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each costs a round trip and money. Read from the log of the S3 server."""
    place = open_storage("s3://photos/in/")
    files = people(40)
    place.write("lfw.tar", tar_of(files))
    caplog.set_level(logging.INFO)
    caplog.clear()
    assert good(list(photographs(place))) == files
    requests = [record for record in caplog.records if "/photos/in/lfw.tar" in record.getMessage()]
    assert 1 <= len(requests) < 8


# --- People and splits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "group"),
    [
        ("lfw_funneled/Ann_Lee/Ann_Lee_0001.jpg", "Ann_Lee"),
        ("lfw/Ann_Lee/Ann_Lee_0001.jpg", "Ann_Lee"),
        ("./Ann_Lee/1.jpg", "Ann_Lee"),
        ("Zoë Ø/1.jpg", "Zoë Ø"),
        ("single.photo.jpg", "single.photo"),
        ("./single.jpg", "single"),
    ],
)
def test_the_folder_names_the_person(key: str, group: str) -> None:
    assert group_of(key) == group


def test_splits_hash_the_name_and_nothing_else() -> None:
    """Written out by hand, since a person must stay in the split in any packing ever."""
    for number in range(200):
        name = f"Person_{number}"
        place = int(hashlib.blake2b(name.encode(), digest_size=8).hexdigest(), 16) / 2**64
        expected = "test" if place < 0.2 else "val" if place < 0.5 else "train"
        assert split_of(name, val_share=0.3, test_share=0.2) == expected
    assert split_of("George_W_Bush", 0.1, 0.1) == "train"


def test_splits_have_the_shares_asked_for() -> None:
    count = 20_000
    found = [split_of(f"person {number}", 0.1, 0.05) for number in range(count)]
    for split, share in {"train": 0.85, "val": 0.1, "test": 0.05}.items():
        assert abs(found.count(split) / count - share) < 4.5 * math.sqrt(share * (1 - share) / count)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.text(st.characters(codec="utf-8"), min_size=1), st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0, 0.2))
def test_larger_shares_only_take_people_from_train(name: str, val: float, test: float, more: float) -> None:
    before, after = split_of(name, val, test), split_of(name, val + more, test)
    assert before == after or (before, after) == ("train", "val")
    assert split_of(name, 0, 0) == "train"


def test_a_row_holds_the_file_untouched() -> None:
    for format in ("JPEG", "PNG", "WEBP"):
        data = encoded(3, 9, 14, format)
        assert dataset_row("lfw/Ann/1.jpg", "val", data) == {
            "key": "lfw/Ann/1.jpg", "group": "Ann", "split": "val", "image": data, "width": 14, "height": 9,
            "sha256": hashlib.sha256(data).hexdigest(),
        }  # fmt: skip
    with pytest.raises(ItemError, match=r"^not_an_image: "):
        dataset_row("a.jpg", "train", b"hello")
    with pytest.raises(ItemError, match=r"^truncated: "):
        dataset_row("a.jpg", "train", encoded(3, 64, 64)[:-200])


# --- Lists of people -------------------------------------------------------------------------------------------------


def test_lists_as_lfw_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "people.txt"
    path.write_text("3\nAnn_Lee\t1\nBo Li\t12\nZoë\n")
    assert read_list(path, "--val-list") == {"Ann_Lee", "Bo Li", "Zoë"}
    path.write_bytes("Ann_Lee\r\n\r\n  Zoë \r\n".encode())
    assert read_list(path, "--val-list") == {"Ann_Lee", "Zoë"}


def test_lists_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UsageError) as caught:
            read_list(path, "--val-list")
        return str(caught.value)

    missing = tmp_path / "none.txt"
    assert message(missing).startswith(f"--val-list {missing}: cannot be read as text (")
    (tmp_path / "photo.jpg").write_bytes(encoded(1))
    assert message(tmp_path / "photo.jpg").startswith(f"--val-list {tmp_path}/photo.jpg: cannot be read as text (")
    assert message(tmp_path).startswith(f"--val-list {tmp_path}: cannot be read as text (")


def test_people_whose_names_are_numbers(tmp_path: Path) -> None:
    """As in CASIA-WebFace."""
    path = tmp_path / "people.txt"
    path.write_text("2\n0000045\n0000099\n")
    assert read_list(path, "--val-list") == {"0000045", "0000099"}
    path.write_text("0000001\n0000045\n\n0000099\n")  # without their number
    assert read_list(path, "--val-list") == {"0000001", "0000045", "0000099"}


# --- Parquet ---------------------------------------------------------------------------------------------------------


def dataset(files: dict[str, bytes], split: str = "train") -> pa.Table:
    return pa.Table.from_pylist([dataset_row(key, split, data) for key, data in files.items()], schema=DATASET_SCHEMA)


def hugging_face(images: list[bytes | None]) -> pa.Table:
    """As `datasets` writes images: a struct of bytes and path, a label, no key and no split."""
    cells = [None if data is None else {"bytes": data, "path": None} for data in images]
    return pa.table(
        {
            "image": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array(range(len(images)), pa.int64()),
        }
    )


def store(place: Storage, key: str, table: pa.Table, **options: object) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    place.write(key, sink.getvalue().to_pybytes())


def test_parquet_files_are_found_sorted_without_our_own(place: Storage) -> None:
    for key in ("b.parquet", "a/x.parquet", "_restore/manifest/1.parquet", "a/_restore/y.parquet", "readme.txt"):
        place.write(key, b"")
    assert parquet_files(place) == ["a/x.parquet", "b.parquet"]
    with pytest.raises(UsageError) as caught:
        parquet_files(place.child("nothing"))
    assert str(caught.value) == (
        f"--data {place.uri}/nothing: no .parquet files there; make some with jobs/pack_dataset.py"
    )


def test_the_image_column_is_found() -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert image_column(DATASET_SCHEMA) == "image"
    assert image_column(hugging_face([]).schema) == "image"
    assert image_column(pa.schema([("id", pa.int64()), ("jpg", pa.binary())])) == "jpg"
    assert image_column(pa.schema([("photo", pa.large_binary())])) == "photo"
    assert image_column(pa.schema([("picture", struct), ("label", pa.string())])) == "picture"
    assert image_column(pa.schema([("mask", pa.binary()), ("image", struct)])) == "image"
    for kind in (pa.binary(), pa.string()):
        with pytest.raises(UsageError) as caught:
            image_column(pa.schema([("a", kind), ("b", kind)]))
        assert str(caught.value) == (
            "a Parquet file: its columns are a, b; name the one of encoded images 'image' "
            "(type binary, or a struct with a field 'bytes')"
        )


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_image_bytes_of_any_column(kind: str) -> None:
    values = [b"one", None, b"three"]
    if kind == "struct":
        column = hugging_face(values)["image"]
    else:
        column = pa.chunked_array([pa.array(values, pa.binary() if kind == "binary" else pa.large_binary())])
    assert image_bytes(column) == values


def test_decoded_rows_are_the_pixels_of_one_split(tmp_path: Path) -> None:
    table = pa.concat_tables([dataset(dict(list(FILES.items())[:4])), dataset({"v/1.jpg": encoded(7, 5, 3)}, "val")])
    decoded = decode_rows(table, "train", canvas=64)
    assert decoded.schema == DECODED_SCHEMA
    assert decoded["key"].to_pylist() == list(FILES)[:4]
    for row in decoded.to_pylist():
        expected = codec.decode(FILES[row["key"]]).pixels
        assert (row["height"], row["width"]) == expected.shape[:2]
        assert np.array_equal(np.frombuffer(row["pixels"], np.uint8).reshape(expected.shape), expected)
    [row] = decode_rows(table, "val", canvas=64).to_pylist()
    assert (row["key"], row["height"], row["width"]) == ("v/1.jpg", 5, 3)
    assert decode_rows(table, "test", canvas=64).schema == DECODED_SCHEMA


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_trained_on_the_way_up_that_viewers_show_them(orientation: int) -> None:
    """As they are restored. Stored turned, faces would be learnt lying on their side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels(3, 30, 50)).save(file, "PNG", exif=exif)
    [row] = decode_rows(dataset({"a/1.png": file.getvalue()}), "train", 64).to_pylist()
    shown = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    assert (row["height"], row["width"]) == shown.shape[:2]
    assert row["pixels"] == shown.tobytes()
    [found] = evaluation._decoded(Memory({"a/1.png": file.getvalue()}), ["a/1.png"])
    assert found["pixels"] == shown.tobytes() and (found["height"], found["width"]) == shown.shape[:2]


class Memory:
    """As much of a storage as reading takes."""

    uri = "memory"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.read = files.__getitem__


@pytest.mark.parametrize(
    ("height", "width", "resized", "kept"),
    [
        (30, 40, (30, 40), (30, 40)),  # fits
        (40, 40, (40, 40), (40, 40)),  # just fits
        (100, 80, (50, 40), (40, 40)),  # the shorter side becomes the canvas, the longer is cut
        (90, 300, (40, 133), (40, 40)),
        (30, 100, (30, 100), (30, 40)),  # never enlarged
        (41, 41, (40, 40), (40, 40)),
        (200, 1, (200, 1), (40, 1)),
    ],
)
def test_large_photographs_are_shrunk_and_cut_to_the_canvas(
    height: int, width: int, resized: tuple[int, int], kept: tuple[int, int]
) -> None:
    canvas = 40
    [row] = decode_rows(dataset({"a/1.png": encoded(1, height, width, "PNG")}), "train", canvas).to_pylist()
    image = Image.fromarray(pixels(1, height, width)).resize(resized[::-1], Image.Resampling.LANCZOS)
    top, left = max(0, (resized[0] - canvas) // 2), max(0, (resized[1] - canvas) // 2)
    expected = np.asarray(image)[top : top + canvas, left : left + canvas]
    assert (row["height"], row["width"]) == kept == expected.shape[:2]
    assert row["pixels"] == expected.tobytes()


def test_parquet_of_other_makers(place: Storage) -> None:
    """Keys are hashes of the images; 90 % train, 10 % val by the hash, the same whatever is read around them."""
    images = [encoded(seed) for seed in range(60)]
    store(place, "data/train-00000.parquet", hugging_face(images[:25]), row_group_size=7)
    store(place, "data/train-00001.parquet", hugging_face([*images[25:], None, b"no image"]))
    whole = hugging_face(images)
    keys, its_splits = keys_of(whole), splits(whole)
    assert keys == [hashlib.sha256(data).hexdigest() for data in images]
    assert its_splits == [split_of(key, 0.1, 0) for key in keys] and set(its_splits) == {"train", "val"}
    assert splits(whole.slice(10, 5)) == its_splits[10:15]
    assert dataset_columns(whole.schema) == ["image"]

    for split in ("train", "val"):
        table = read_split(place, split, canvas=32, limit=1000)
        assert table["key"].to_pylist() == [key for key, its in zip(keys, its_splits, strict=True) if its == split]
    counted = count_splits(place)
    assert counted.total() == 62 and counted["test"] == 0
    assert counted["val"] - its_splits.count("val") in (0, 1, 2)  # the two unusable rows are somewhere


def test_columns_of_ours_in_parquet_of_other_makers_are_used() -> None:
    table = hugging_face([encoded(1), encoded(2)]).append_column("key", pa.array(["x/1", "y/2"]))
    assert keys_of(table) == ["x/1", "y/2"]
    assert splits(table) == [split_of("x/1", 0.1, 0), split_of("y/2", 0.1, 0)]
    table = table.append_column("split", pa.array(["val", "train"]))
    assert dataset_columns(table.schema) == ["key", "split", "image"]
    assert decode_rows(table, "val", 32)["key"].to_pylist() == ["x/1"]


def test_a_key_column_of_numbers() -> None:
    table = hugging_face([encoded(1)]).append_column("key", pa.array([17]))
    assert len(decode_rows(table, splits(table)[0], 32)) == 1


def test_rows_that_do_not_decode_are_left_out() -> None:
    table = hugging_face([encoded(1), None, b"", b"hello", encoded(1, 64, 64)[:-200], encoded(2)])
    table = table.append_column("split", pa.array(["train"] * 6))
    assert decode_rows(table, "train", 32)["key"].to_pylist() == [
        hashlib.sha256(encoded(seed)).hexdigest() for seed in (1, 2)
    ]


def test_read_split_takes_the_first_of_a_split_over_all_files(place: Storage) -> None:
    for shard in range(3):
        files = {f"p{shard}/{number}.jpg": encoded(10 * shard + number) for number in range(4)}
        rows = pa.concat_tables([dataset(files, "val"), dataset({f"t/{shard}.jpg": encoded(99)})])
        store(place, f"shard-{shard}.parquet", rows)
    keys = [f"p{shard}/{number}.jpg" for shard in range(3) for number in range(4)]
    assert read_split(place, "val", 32, limit=100)["key"].to_pylist() == keys
    assert read_split(place, "val", 32, limit=6)["key"].to_pylist() == keys[:6]
    assert len(read_split(place, "test", 32, limit=6)) == 0
    assert count_splits(place) == {"train": 3, "val": 12}


def test_rows_that_training_would_confuse_are_refused(place: Storage) -> None:
    def refusal() -> str:
        with pytest.raises(UsageError) as caught:
            count_splits(place)
        return str(caught.value)

    ours = dataset({f"a/{n}.jpg": encoded(n) for n in range(3)})
    store(place, "b.parquet", ours)
    assert count_splits(place)["train"] == 3
    store(place, "a.parquet", hugging_face([encoded(1)]))  # whose columns would be taken of all files
    assert refusal() == (
        f"--data {place.join('b.parquet')}: of its columns key, split, image would be taken, of those of a.parquet "
        "image; name them alike, or move one away"
    )
    store(place, "a.parquet", ours.slice(2))
    assert refusal() == f"--data {place.uri}: key 'a/2.jpg' occurs twice; make keys unique"
    keys = pa.array([None, "x"], pa.string())
    schema = pa.schema([field.with_nullable(True) for field in ours.schema])
    store(place, "a.parquet", ours.slice(1).cast(schema).set_column(0, schema.field(0), keys))
    assert refusal() == f"--data {place.uri}: its column key has empty cells; fill them or leave the column out"


def test_sizes_are_no_images() -> None:
    cells = pa.array([{"bytes": 7, "name": "a"}])
    with pytest.raises(UsageError, match="its columns are image; name the one of encoded images"):
        image_column(pa.table({"image": cells}).schema)


def test_counting_does_not_read_the_images_where_there_is_a_split(place: Storage) -> None:
    """Proved by destroying them: all but the footer and the column `split`."""
    sink = io.BytesIO()
    pq.write_table(dataset({f"a/{n}.jpg": encoded(n, 60, 60) for n in range(20)}), sink, compression="none")
    data = bytearray(sink.getvalue())
    meta = pq.read_metadata(io.BytesIO(sink.getvalue()))
    column = meta.row_group(0).column(DATASET_SCHEMA.get_field_index("image"))
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    place.write("a.parquet", bytes(data))
    assert count_splits(place)["train"] == 20
    with pytest.raises(UsageError, match=r"^--data .*a\.parquet: not a readable Parquet file"):
        read_split(place, "train", 32, limit=1)


def test_only_what_the_jobs_write_is_internal() -> None:
    assert sources.is_internal("_restore/run.json") and sources.is_internal("a/_pack/broken.csv")
    assert not sources.is_internal("a/_b.parquet") and not sources.is_internal("a_b/c.parquet")
    assert not sources.is_internal("_scans/a.jpg") and not sources.is_internal("_pack/a.jpg")

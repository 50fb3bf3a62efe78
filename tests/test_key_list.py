"""Lists of keys in place of a listing."""

import gzip
import json
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photos import write_tree

from restore_core.errors import UsageError
from restore_core.key_list import read_key_list
from restore_core.storage import LocalStorage, open_storage

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NAMES = ["b/ü 1.jpg", "a,b.jpg", 'c "quoted".jpg', "plain.jpg"]


@pytest.fixture
def photos(tmp_path: Path) -> LocalStorage:
    return LocalStorage(write_tree(tmp_path / "in", {name: name.encode() for name in [*NAMES, "left out.jpg"]}))


def write(path: Path, data: bytes | pa.Table) -> str:
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        pq.write_table(data, path)
    return str(path)


def csv_of(*rows: list[str]) -> bytes:
    return "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("kind", ["text", "windows text", "csv", "gzip", "parquet"])
def test_the_listed_objects_come_once_sorted_and_with_their_versions(
    tmp_path: Path, photos: LocalStorage, kind: str
) -> None:
    names = [*NAMES, NAMES[0]]
    data: bytes | pa.Table = "\n".join(names).encode()
    if kind == "windows text":
        data = "\ufeff".encode() + "\r\n".join(names).encode()
    if kind in ("csv", "gzip"):
        data = csv_of(["Key", "note"], *([name, "x"] for name in names))
    if kind == "gzip":
        assert isinstance(data, bytes)
        data = gzip.compress(data)
    if kind == "parquet":
        data = pa.table({"key": names, "stars": [1, 2, 3, 4, 5]})
    file = write(tmp_path / ("list.parquet" if kind == "parquet" else "list"), data)
    expected = [item for item in photos.list() if item.key in NAMES]
    assert list(read_key_list(file, photos)) == expected


def test_versions_in_the_list_are_not_asked_for(tmp_path: Path, photos: LocalStorage) -> None:
    file = write(
        tmp_path / "list.csv", csv_of(["key", "size", "etag"], ["gone.jpg", "7", '"e1"'], ["plain.jpg", "", ""])
    )
    gone, there = read_key_list(file, photos)
    assert (gone.key, gone.size, gone.etag) == ("gone.jpg", 7, "e1")
    assert there == photos.stat("plain.jpg")


def test_an_empty_cell_is_no_version(tmp_path: Path, photos: LocalStorage) -> None:
    known = {item.key: item for item in photos.list()}
    size = known["left out.jpg"].size
    file = write(tmp_path / "list.csv", f"key,size,etag\nleft out.jpg,{size},\n".encode())
    assert list(read_key_list(file, photos)) == [known["left out.jpg"]]


def test_what_is_not_there_stays_in_the_list(tmp_path: Path, photos: LocalStorage) -> None:
    found = list(read_key_list(write(tmp_path / "list", b"gone.jpg\n../outside.jpg\nplain.jpg\n"), photos))
    assert [(item.key, item.size > 0) for item in found] == [
        ("../outside.jpg", False), ("gone.jpg", False), ("plain.jpg", True),
    ]  # fmt: skip


SCHEMA = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, ETag"
ROWS: list[tuple[str, Any, Any, int, str]] = [
    ("in/a+b é.jpg", True, False, 3, "e1"),
    ("in/old.jpg", False, False, 3, "e0"),
    ("in/deleted.jpg", True, True, 0, ""),
    ("in/folder/", True, False, 0, "e2"),
    ("in/no folder/", True, False, 9, "e5"),
    ("in/z 100%.jpg", True, False, 4, "e3"),
    ("elsewhere/c.jpg", True, False, 5, "e4"),
]


@pytest.mark.parametrize("format", ["CSV", "Parquet"])
def test_an_s3_inventory(s3: str, moto_client: "S3Client", format: str) -> None:
    if format == "CSV":
        rows = [
            ["photos", urllib.parse.quote_plus(key, safe="/"), "v", str(latest).lower(), str(marker).lower(),
             str(size), etag]
            for key, latest, marker, size, etag in ROWS
        ]  # fmt: skip
        body, name = gzip.compress(csv_of(*rows)), "data/1.csv.gz"
    else:
        columns = list(zip(*ROWS, strict=True))
        names = ("key", "is_latest", "is_delete_marker", "size", "e_tag")
        sink = pa.BufferOutputStream()
        table = {"bucket": ["photos"] * len(ROWS)} | dict(zip(names, map(list, columns), strict=True))
        pq.write_table(pa.table(table), sink)
        body, name = sink.getvalue().to_pybytes(), "data/1.parquet"
    moto_client.create_bucket(Bucket="inventories")
    moto_client.put_object(Bucket="inventories", Key=name, Body=body)
    manifest = {
        "sourceBucket": "photos", "destinationBucket": "arn:aws:s3:::inventories", "fileFormat": format,
        "fileSchema": SCHEMA, "files": [{"key": name, "size": len(body)}],
    }  # fmt: skip
    moto_client.put_object(Bucket="inventories", Key="m/manifest.json", Body=json.dumps(manifest).encode())
    found = list(read_key_list("s3://inventories/m/manifest.json", open_storage("s3://photos/in/")))
    assert [(item.key, item.size, item.etag) for item in found] == [
        ("a+b é.jpg", 3, "e1"), ("no folder/", 9, "e5"), ("z 100%.jpg", 4, "e3"),
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"--keys s3://inventories/m/manifest.json: lists bucket photos, not that of"):
        read_key_list("s3://inventories/m/manifest.json", open_storage("s3://inventories/"))


def test_a_key_that_ends_in_a_slash_is_left_out_only_where_it_is_empty(
    s3: str, moto_client: "S3Client", tmp_path: Path
) -> None:
    """As in a listing of the bucket."""
    for key, data in (("in/marker/", b""), ("in/photo/", b"a photograph")):
        moto_client.put_object(Bucket="photos", Key=key, Body=data)
    bucket = open_storage("s3://photos/in/")
    found = list(read_key_list(write(tmp_path / "list", b"gone/\nmarker/\nphoto/\n"), bucket))
    assert [item.key for item in found] == ["gone/", "photo/"]
    assert found[1:] == list(bucket.list())


@pytest.mark.parametrize("mark", [";", "\t"])
def test_columns_that_are_parted_otherwise_are_no_keys(tmp_path: Path, photos: LocalStorage, mark: str) -> None:
    """As some spreadsheets write them. Taken as text each line would become a failed row."""
    (tmp_path / "keys.csv").write_text(f"Key{mark}size\na.jpg{mark}1\n")
    with pytest.raises(UsageError, match=r"its columns are parted by .*; use commas"):
        list(read_key_list(str(tmp_path / "keys.csv"), photos))


def test_a_column_of_keys_may_hold_such_marks(tmp_path: Path, photos: LocalStorage) -> None:
    file = write(tmp_path / "keys.csv", b'Key\na;b.jpg\n"new\nline.jpg"\n\nplain.jpg\nt\tb "x".jpg\n')
    assert [item.key for item in read_key_list(file, photos)] == [
        "a;b.jpg", "new\nline.jpg", "plain.jpg", 't\tb "x".jpg',
    ]  # fmt: skip
    assert list(read_key_list(write(tmp_path / "none.csv", b"Key\r\n"), photos)) == []


def test_lists_that_cannot_be_used_are_refused(tmp_path: Path, photos: LocalStorage) -> None:
    def refused(data: bytes | pa.Table, name: str, message: str) -> None:
        file = write(tmp_path / name, data)
        with pytest.raises(UsageError, match=f"^--keys {file}: {message}"):
            list(read_key_list(file, photos))

    with pytest.raises(UsageError, match=r"--keys .*nowhere: no such file; name a list"):
        read_key_list(str(tmp_path / "nowhere"), photos)
    refused(b"PAR1", "a.parquet", "not a readable list of keys")
    refused(pa.table({"name": ["a"]}), "b.parquet", "its columns are name; one has to be called key")
    refused(pa.table({"key": ["a", None]}), "c.parquet", "an empty key in it")
    refused(b"\xff\xfe\x00", "d", "not a readable list of keys")
    refused(b"key,size\na.jpg,many\n", "e", "not a readable list of keys")
    refused(b"bucket,key\nphotos,a.jpg\n", "f", "it has a column bucket, but --input .* is not on S3")
    refused(b"{}", "manifest.json", "an S3 Inventory, but --input .* is not on S3; use a list of keys")
    refused(gzip.compress(b"a" * 9999)[:30], "g.gz", "not a readable list of keys")
    refused(gzip.compress(b"a.jpg\n" * 999)[:12] + b"\xff" * 30, "h.gz", "not a readable list of keys")
    refused(b"key,size,etag\na.jpg\n", "i.csv", "not a readable list of keys")

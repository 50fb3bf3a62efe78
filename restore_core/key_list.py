"""Lists of keys in place of a listing: an S3 Inventory, CSV, Parquet, or plain text."""

import codecs
import csv
import gzip
import json
import urllib.parse
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from restore_core.errors import ItemError, UsageError
from restore_core.storage import Object, S3Storage, Storage, open_storage

OPTION = "--keys"
THREADS = 16
"""Objects that are asked for their version at once."""
SCHEMA = pa.schema([("key", pa.string()), ("size", pa.int64()), ("etag", pa.string())])
"""Of a list; size and ETag are null where it does not say them."""


def read_key_list(uri: str, input: Storage) -> Iterator[Object]:
    """The objects of `input` that a list names, each once, in the order of their keys.

    Args:
        uri: a local path or s3:// URI of one of
            - manifest.json of an S3 Inventory (CSV or Parquet) of the input's bucket,
            - a Parquet file or a CSV file with a header, with a column `key` and perhaps `size` and `etag`; with a
              column `bucket` too, keys are those of the whole bucket, else they are relative to the input,
            - any other text: a key a line, relative to the input.
            CSV and text may be compressed by gzip.
        input: where the objects are.

    Objects without size and ETag in the list are asked for them; those that are not there have size 0 and no ETag.
    Raises UsageError, naming the list.
    """
    place = open_storage(uri, option=OPTION)
    if place.only is None:
        raise UsageError(f"{OPTION} {uri}: no such file; name a list of keys")
    try:
        data = _whole(place, place.only)
    except ItemError as error:
        raise UsageError(f"{OPTION} {uri}: {error.message}") from error
    try:
        tables = list(
            _inventory(data, input) if place.only.endswith("manifest.json") else _file(place.only, data, input)
        )
    except UsageError as error:
        raise UsageError(f"{OPTION} {uri}: {error}") from error
    except (pa.ArrowException, ValueError, LookupError, TypeError, OSError, EOFError, zlib.error, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{OPTION} {uri}: not a readable list of keys ({reason}); see --help") from error
    table = pa.concat_tables([SCHEMA.empty_table(), *tables]).sort_by("key")
    if pc.any(pc.or_kleene(pc.is_null(table["key"]), pc.equal(table["key"], ""))).as_py():
        raise UsageError(f"{OPTION} {uri}: an empty key in it; remove it")
    return _objects(table, input)


def _objects(table: pa.Table, input: Storage) -> Iterator[Object]:
    def once() -> Iterator[tuple[str, int | None, str | None]]:
        last = None
        for batch in table.to_batches(max_chunksize=4096):
            for values in zip(*(batch[name].to_pylist() for name in SCHEMA.names), strict=True):
                if values[0] != last:
                    yield values
                last = values[0]

    def version(values: tuple[str, int | None, str | None]) -> Object:
        key, size, etag = values
        if size is not None and etag is not None:
            return Object(key, size, etag)
        try:
            return input.stat(key)
        except ItemError:  # reading it will say so
            return Object(key, 0, "")

    rows = once()
    with ThreadPoolExecutor(THREADS) as pool:
        while window := list(islice(rows, 32 * THREADS)):
            for item in pool.map(version, window):
                marker = item.key.endswith("/") and item.etag and not item.size
                if not marker:  # of a folder, which a listing leaves out too
                    yield item


def _inventory(data: bytes, input: Storage) -> Iterator[pa.Table]:
    manifest = json.loads(data)
    if not isinstance(input, S3Storage):
        raise UsageError(f"an S3 Inventory, but --input {input.uri} is not on S3; use a list of keys")
    if manifest["sourceBucket"] != input.bucket:
        raise UsageError(
            f"lists bucket {manifest['sourceBucket']}, not that of --input {input.uri}; use its own inventory"
        )
    if manifest["fileFormat"] not in ("CSV", "Parquet"):
        raise UsageError(f"its format is {manifest['fileFormat']}; have it made as CSV or Parquet")
    columns = _names(manifest["fileSchema"].split(","))
    files = open_storage(f"s3://{manifest['destinationBucket'].rpartition(':')[2]}/", option=OPTION)
    for entry in manifest["files"]:
        try:
            content = _whole(files, entry["key"])
        except ItemError as error:
            raise UsageError(error.message) from error
        if manifest["fileFormat"] == "Parquet":
            yield _of_columns(pq.read_table(pa.BufferReader(content)), input)
        else:
            table = _of_csv(_unpacked(content), columns)
            parts = [[urllib.parse.unquote_plus(key) for key in part.to_pylist()] for part in table["key"].chunks]
            keys = pa.chunked_array(parts, pa.string())
            yield _of_columns(table.set_column(table.schema.get_field_index("key"), "key", keys), input)


def _whole(place: Storage, key: str) -> bytes:
    """The file, as long as it is said to be: a list that is cut short would leave objects out. Raises ItemError."""
    return place.read_version(place.stat(key))[0]


def _file(name: str, data: bytes, input: Storage) -> Iterator[pa.Table]:
    if name.endswith(".parquet"):
        yield _of_columns(pq.read_table(pa.BufferReader(data)), input)
        return
    data = _unpacked(data)
    first, _, others = data.partition(b"\n")
    header = next(csv.reader([first.decode()]), [])
    for mark in (";", "\t"):
        if len(header) == 1 and mark in header[0] and "key" in _names(header[0].split(mark)):
            raise UsageError(f"its columns are parted by {mark!r}; use commas")
    if "key" in _names(header):
        yield _of_columns(_of_csv(others, _names(header)), input)
    else:
        text = pa.array([data.decode().replace("\r\n", "\n")], pa.large_string())
        lines = pc.split_pattern(text, "\n").flatten()
        yield _completed(pa.table({"key": lines.filter(pc.not_equal(lines, ""))}))


def _names(header: list[str]) -> list[str]:
    return [name.strip().lower() for name in header]


def _unpacked(data: bytes) -> bytes:
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).removeprefix(codecs.BOM_UTF8)


def _of_csv(data: bytes, columns: list[str]) -> pa.Table:
    """All its columns as text."""
    if not data.strip():
        return pa.table({name: pa.array([], pa.string()) for name in columns})
    return pyarrow.csv.read_csv(
        pa.BufferReader(data),
        pyarrow.csv.ReadOptions(column_names=columns),
        pyarrow.csv.ParseOptions(newlines_in_values=True),
        pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False),
    )


def _of_columns(table: pa.Table, input: Storage) -> pa.Table:
    """A list's table as `SCHEMA`: what belongs to the input, with keys relative to it."""
    table = table.rename_columns([name.lower().replace("e_tag", "etag") for name in table.column_names])
    if "key" not in table.column_names:
        raise UsageError(f"its columns are {', '.join(table.column_names)}; one has to be called key")
    for name, wanted in (("islatest", "true"), ("is_latest", "true"), ("isdeletemarker", "false"),
                         ("is_delete_marker", "false")):  # fmt: skip
        if name in table.column_names:
            table = table.filter(pc.equal(pc.utf8_lower(pc.cast(table[name], pa.string())), wanted))
    if "bucket" in table.column_names:
        if not isinstance(input, S3Storage):
            raise UsageError(f"it has a column bucket, but --input {input.uri} is not on S3; remove the column")
        root = input.full_key("")
        mine = pc.and_(pc.equal(table["bucket"], input.bucket), pc.starts_with(table["key"], root))
        table = table.filter(mine)
        keys = pc.utf8_slice_codeunits(table["key"], len(root))
        table = table.set_column(table.schema.get_field_index("key"), "key", keys)
        table = table.filter(pc.not_equal(keys, ""))
    return _completed(table)


def _completed(table: pa.Table) -> pa.Table:
    columns = {
        field.name: _numbers(table[field.name]) if field.name == "size" else table[field.name].cast(pa.string())
        for field in SCHEMA
        if field.name in table.column_names
    }
    nulls = {field.name: pa.nulls(len(table), field.type) for field in SCHEMA if field.name not in columns}
    if "etag" in columns:
        columns["etag"] = _without_empty(pc.utf8_trim(columns["etag"], '"'))
    return pa.table({**columns, **nulls}).select(SCHEMA.names).cast(SCHEMA)


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Integers; null for an empty cell."""
    return (_without_empty(column) if pa.types.is_string(column.type) else column).cast(pa.int64())


def _without_empty(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)

"""The ledger: one row for every input object, and from it what is left to do.

Rows are appended as small Parquet files while a run goes on (each written whole or not at all) and merged into few
sorted ones at its end. Where a key has several rows, the latest counts; so a crash between the two steps costs nothing.
"""

import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from restore_core.errors import ErrorClass, ItemError, StorageError, UsageError
from restore_core.storage import Object, Storage

Status = Literal["restored", "unchanged", "failed"]

FOLDER = "_restore"
MERGED_ROWS = 500_000


@dataclass(kw_only=True)
class Row:
    """What happened to one object. Empty fields are None."""

    key: str
    """Of the input object, relative to --input."""
    status: Status | None = None
    """restored: new pixels were written; unchanged: undamaged, copied byte for byte; failed: see `error`."""
    error: ErrorClass | None = None
    message: str | None = None
    """What went wrong, one line; of a restored file what was out of the ordinary, such as short memory."""
    size: int
    """Bytes of the input."""
    etag: str
    """Version of the input: S3's ETag, or the modification time of a local file."""
    input_sha256: str | None = None
    format: str | None = None
    """As Pillow names it: JPEG, PNG, WEBP ..."""
    mode: str | None = None
    """Pixel mode of the file: L, LA, RGB, RGBA ..."""
    width: int | None = None
    height: int | None = None
    output_key: str | None = None
    """Of the written object, relative to --output."""
    output_sha256: str | None = None
    model: str
    """Hash of the model's weights and architecture."""
    options: str
    """Hash of the options that decide the result."""
    sigma: float | None = None
    """Estimated standard deviation of the noise, of 255."""
    flips: float | None = None
    """Estimated share of flipped pixels, 0 to 1."""
    patches: float | None = None
    """Estimated share of the area under patches, 0 to 1."""
    gray: float | None = None
    """Estimated probability that colour was lost, 0 to 1."""
    orientation: int | None = None
    """EXIF orientation of the file, 1 to 8; the pixels stay as they are stored."""
    change: float | None = None
    """Mean absolute difference between output and input, of 255."""
    seconds: float | None = None
    """Time spent on this object, its share of the batch's time where it was in one."""
    attempt: int = 1
    """How often this object has been tried, over all runs."""
    node: str | None = None
    """Host that did it."""
    run_id: str
    finished_at: datetime | None = None
    """UTC."""

    def fail(self, error: ErrorClass, message: str) -> None:
        self.status, self.error, self.message = "failed", error, message
        self.output_key = self.output_sha256 = self.change = None


_TYPES: dict[str, pa.DataType] = {
    **dict.fromkeys(("size",), pa.int64()),
    **dict.fromkeys(("width", "height", "orientation", "attempt"), pa.int32()),
    **dict.fromkeys(("sigma", "flips", "patches", "gray", "change", "seconds"), pa.float64()),
    "finished_at": pa.timestamp("us", tz="UTC"),
}

SCHEMA = pa.schema([pa.field(field.name, _TYPES.get(field.name, pa.string())) for field in fields(Row)])
"""The one schema of the ledger; every writer uses it, so that a column of Nones keeps its type."""


def table_of(rows: Iterable[Row]) -> pa.Table:
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)


def rows_of(table: pa.Table) -> list[Row]:
    return [Row(**values) for values in table.to_pylist()]


def options_hash(options: dict[str, Any]) -> str:
    """Identity of the options that decide what a restored file looks like."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


class Ledger:
    """The ledger of one output: OUTPUT/_restore/manifest/*.parquet.

    Args:
        output: where the restored files go.
        run_id: of the run that writes, unique.
    """

    def __init__(self, output: Storage, run_id: str) -> None:
        self._files = output.child(f"{FOLDER}/manifest")
        self._run_id = run_id
        self._appended = 0

    def append(self, rows: list[Row]) -> None:
        """Write rows down at once, as a file of their own. Raises StorageError."""
        self._write(f"{self._run_id}-{self._appended:06d}.parquet", table_of(rows))
        self._appended += 1

    def latest(self) -> pa.Table:
        """The row that counts for each key, as `SCHEMA`, sorted by key. Raises StorageError."""
        tables = [self._read(item) for item in self._files.list()]
        return _latest(pa.concat_tables([SCHEMA.empty_table(), *tables]))

    def merge(self) -> pa.Table:
        """Make exactly one row a key, in few files. Returns all rows. Interrupted anywhere, nothing is lost."""
        older = [item.key for item in self._files.list()]
        table = self.latest()
        merged = []
        for index, start in enumerate(range(0, len(table), MERGED_ROWS)):
            merged.append(f"part-{index:05d}-{self._run_id}.parquet")
            self._write(merged[-1], table[start : start + MERGED_ROWS])
        for key in older:
            if key not in merged:
                self._files.delete(key)
        return table

    def _read(self, item: Object) -> pa.Table:
        try:
            data, _ = self._files.read_version(item)
        except ItemError as error:
            raise StorageError(f"the ledger cannot be read: {error.message}") from error
        return pq.read_table(pa.BufferReader(data), schema=SCHEMA)

    def _write(self, key: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        try:
            self._files.write(key, sink.getvalue().to_pybytes())
        except ItemError as error:
            raise StorageError(f"the ledger cannot be written: {error.message}") from error


def _latest(table: pa.Table) -> pa.Table:
    table = table.sort_by([("key", "ascending"), ("finished_at", "ascending")])
    keys = table["key"].combine_chunks()
    if len(keys) < 2:
        return table
    last = pa.compute.not_equal(keys[:-1], keys[1:])
    return table.filter(pa.concat_arrays([pa.array(last), pa.array([True])]))


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Which failed rows are tried again: none, those of some classes, or all."""

    classes: frozenset[str] = frozenset()

    def wants(self, error: str | None) -> bool:
        return error in self.classes


def left_to_do(
    objects: Iterable[Object], done: pa.Table, *, model: str, options: str, retry: Retry, exists: set[str]
) -> Iterator[tuple[Object, int]]:
    """Listing minus ledger: the objects that still need work, each with the number of this attempt.

    Done is what has a row of the same key, version, model and options whose output is (still) there, and what failed
    unless it is to be retried.

    Args:
        objects: the input's listing.
        done: the ledger's latest rows.
        exists: keys of the files in the output.
    """
    columns = ("key", "size", "etag", "model", "options", "status", "error", "output_key", "attempt")
    rows = {values[0]: values[1:] for values in zip(*(done[name].to_pylist() for name in columns), strict=True)}
    for item in objects:
        row = rows.get(item.key)
        if row is None:
            yield item, 1
            continue
        size, etag, its_model, its_options, status, error, output_key, attempt = row
        same = (size, etag, its_model, its_options) == (item.size, item.etag, model, options)
        finished = not retry.wants(error) if status == "failed" else output_key in exists
        if not (same and finished):
            yield item, attempt + 1


def counts(table: pa.Table, column: str) -> dict[str, int]:
    """Rows by the value of `status` or `error`, Nones left out."""
    return dict(sorted(Counter(value for value in table[column].to_pylist() if value is not None).items()))


def new_run_id() -> str:
    """Sorts by time; unique enough for runs started in the same second."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S") + "-" + secrets.token_hex(3)


def parse_retry(text: str | None) -> Retry:
    """`None` -> nothing, `"all"` -> every class, `"read,denied"` -> those. Raises UsageError."""
    known = get_args(ErrorClass)
    if text is None:
        return Retry()
    classes = known if text == "all" else tuple(part for part in re.split(r"[,\s]+", text) if part)
    for name in classes or ("''",):
        if name not in known:
            raise UsageError(f"--retry-failed {name}: no such class of failures; use all or some of {', '.join(known)}")
    return Retry(classes=frozenset(classes))

"""The ledger's row, its schema, and the identity of work."""

import hashlib
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa

from restore_core.errors import ErrorClass

Status = Literal["restored", "unchanged", "failed"]

FOLDER = "_restore"
"""Of the output, for all that is no photograph."""


@dataclass(kw_only=True, slots=True)
class Row:
    """What happened to one object. Empty fields are None."""

    key: str
    """Of the input object, relative to --input."""
    status: Status | None = None
    """restored: new pixels were written; unchanged: undamaged, and copied (byte for byte unless metadata was to go);
    failed: see `error`."""
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
    """How much of the result's colour the input lacked, 0 to 1; None for grey modes."""
    orientation: int | None = None
    """EXIF orientation of the file, 1 to 8, in which its pixels stay stored."""
    change: float | None = None
    """Mean absolute difference between result and input, of 255; also of a result that was not written."""
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
        self.output_key = self.output_sha256 = None


_TYPES: dict[str, pa.DataType] = {
    **dict.fromkeys(("size",), pa.int64()),
    **dict.fromkeys(("width", "height", "orientation", "attempt"), pa.int32()),
    **dict.fromkeys(("sigma", "flips", "patches", "gray", "change", "seconds"), pa.float64()),
    "finished_at": pa.timestamp("us", tz="UTC"),
}

SCHEMA = pa.schema([pa.field(field.name, _TYPES.get(field.name, pa.string())) for field in fields(Row)])
"""The one schema of the ledger; every writer uses it, so that a column of Nones keeps its type."""


def table_of(rows: Iterable[Row]) -> pa.Table:
    rows = list(rows)
    return pa.Table.from_pydict({name: [getattr(row, name) for row in rows] for name in SCHEMA.names}, schema=SCHEMA)


def rows_of(table: pa.Table) -> list[Row]:
    return [Row(**values) for values in table.to_pylist()]


def options_hash(options: dict[str, Any]) -> str:
    """Identity of the options that decide what a restored file looks like."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


def new_run_id() -> str:
    """Sorts by time; unique enough for runs started in the same second."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S") + "-" + secrets.token_hex(3)

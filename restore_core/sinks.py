"""Where restored photographs go: the encoded file, its atomic write, and the row that says so."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from restore_core import codec, manifest
from restore_core.errors import ItemError
from restore_core.manifest import Row
from restore_core.storage import Storage

Pixels = npt.NDArray[np.uint8]

SOFTWARE = "restore_core"
FLAT_STD, FLAT_PIXELS = 16, 256


def encode(
    row: Row,
    source: bytes,
    picture: codec.Picture,
    restored: Pixels,
    codecs: codec.Processes,
    *,
    strip_metadata: bool,
    max_change: float | None = None,
) -> bytes:
    """The restored pixels (uint8 [H, W, 3]) in the source's format; fills in the row's status and change.

    Raises ItemError: `model` where the result is one flat colour though the input was not, or differs from it by more
    than `max_change` (mean absolute difference, of 255); `encode`.
    """
    # Tiny or nearly flat pictures may well end in one colour.
    if np.ptp(restored) == 0 and np.std(picture.pixels) > FLAT_STD and picture.width * picture.height >= FLAT_PIXELS:
        raise ItemError("model", "the network returned one flat colour; the original is kept")
    change = float(np.abs(restored.astype(np.int16) - picture.pixels).mean())
    if max_change is not None and change > max_change:
        raise ItemError("model", f"the result differs by {change:.1f} of 255, over --max-change; the original is kept")
    data = codecs.encode(
        restored,
        source,
        picture=picture,
        software=software(row),
        strip_metadata=strip_metadata,
    )
    row.status = "restored"
    row.change = change
    return data


def software(row: Row) -> str:
    """What the EXIF tag Software of a restored file says."""
    return f"{SOFTWARE} (model {row.model[:12]})"


def write(row: Row, data: bytes, output: Storage) -> None:
    """Put the file at the input's own key, whole or not at all. Raises ItemError `write` or `denied`."""
    if row.key == manifest.FOLDER:
        raise ItemError("write", f"the name {row.key} is the ledger's; rename the file")
    output.write(row.key, data, content_type=f"image/{str(row.format).lower()}")
    row.output_key = row.key
    row.output_sha256 = hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Shard:
    """One row group of an input Parquet file, to be written as a file of its own with new images."""

    table: pa.Table
    column: str
    """Of the encoded images."""
    output_key: str

    def write(self, images: list[bytes | None], output: Storage) -> None:
        """Write the same rows and columns with other images. Raises ItemError `write` or `denied`."""
        field = self.table.schema.field(self.column)
        if pa.types.is_struct(field.type):
            cells = self.table[self.column].to_pylist()
            values = [
                cell if image is None else {**cell, "bytes": image} for cell, image in zip(cells, images, strict=True)
            ]
        else:
            values = list(images)
        index = self.table.schema.get_field_index(self.column)
        table = self.table.set_column(index, field, pa.array(values, type=field.type))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        output.write(self.output_key, sink.getvalue().to_pybytes())

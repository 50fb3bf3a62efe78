"""Where restored photographs go: the encoded file, its atomic write, and the row that says so."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

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
CONTENT_TYPES = {"JPEG2000": "image/jp2", "MPO": "image/jpeg"}
"""Where it is not the format's own name."""
JUDGED_PIXELS = 256
"""Smaller pictures may well end in one colour, or in black and white, unless that is far from what they were."""
FAR = 100
"""Mean absolute difference beyond that of all damages together, of 255: on black, noise of sigma 75 and half of the
pixels flipped come to 78, and to 90 with coloured patches over a quarter."""
VARIED = 9
"""From here on the spread of a picture's local means (of their middle half, of 255) is more than noise or flips."""
LOCAL = 16
"""Side of the squares of the local means, pixels. Noise of sigma 75 spreads them by 6, 50 % of flips by 7."""
STANDS_OUT, STANDS_OUT_STEPS = 4.0, 2.0
"""A square's mean does so from the others' where it is further away than so many times what noise of that square's own
spread would bring it, and so many steps of 255 more."""
SOME_SQUARES, MOST_PATCHES = 0.02, 5
"""So many of the squares of an empty page may do so by chance, and all that so many patches touch, which are more than
lie under them."""
CLIPPED_SHARE = 0.99
SAME, NEAR = 8, 32
"""Input values this far from the result's, of 255, may be the same but for a little or much noise."""
BAND_PIXELS = 2**20
"""Pixels that are compared at once, so that large pictures need no copy."""
SHARD_GROUP_BYTES = 2**26
"""Of a row group in an output Parquet file, about; so much of it is held."""


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
    """The restored pixels (uint8 [H, W, 3]) in the source's format; fills in the row's change, then its status.

    Raises ItemError: `model` where nothing of the picture is left in the result (see `nothing_left`), or it differs
    by more than `max_change` (mean absolute difference, of 255); `encode`.
    """
    difference = compare(picture.pixels, restored)
    change = row.change = difference.change
    if reason := nothing_left(difference, picture.pixels, restored, row.patches):
        raise ItemError("model", f"{reason}; the original is kept")
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
    return data


def software(row: Row) -> str:
    """What the EXIF tag Software of a restored file says."""
    return f"{SOFTWARE} (model {row.model[:12]})"


@dataclass(frozen=True)
class Difference:
    """What a result is beside its input."""

    pixels: int
    change: float
    """Mean absolute difference, of 255."""
    flat: bool
    """The result is of one colour."""
    clipped: float
    """Share of the result's values that are 0 or 255."""


def compare(before: Pixels, after: Pixels) -> Difference:
    """Compare uint8 pictures [H, W, 3] of one size."""
    total = clipped = 0
    flat = bool((after[0] == after[0, 0]).all())
    for a, b in _bands(before, after):
        total += int(_distance(a, b).sum(dtype=np.int64))
        clipped += int(np.count_nonzero(b + np.uint8(1) < 2))  # 255 + 1 is 0
        flat = flat and bool((b == after[0, 0]).all())
    return Difference(before.shape[0] * before.shape[1], total / before.size, flat, clipped / before.size)


def nothing_left(difference: Difference, before: Pixels, after: Pixels, patches: float | None = None) -> str | None:
    """Why a result cannot be a restored picture: one flat colour, or only black and white, though the input was not.

    An empty page under noise or flipped pixels hardly varies in its local means; under patches most of it has kept its
    colour, and if their share is known, no more than they cover may stand out. Line art ends in black and white, and
    most of its values were near them before.
    """
    if difference.pixels < JUDGED_PIXELS:
        nothing = difference.clipped == 1 and difference.change > FAR
        return "the network returned nothing but black and white" if nothing else None
    if difference.flat and _variation(before) > VARIED and _share_within(SAME, before, after) < 0.5:
        return "the network returned one flat colour"
    if difference.flat and patches is not None and _standing_out(before) > SOME_SQUARES + _touched(patches, before):
        return "the network returned one flat colour"
    if difference.clipped > CLIPPED_SHARE and _share_within(NEAR, before, after) < 0.5:
        return "the network returned nothing but black and white"
    return None


def _bands(*pictures: Pixels) -> Iterator[tuple[Pixels, ...]]:
    """Of pictures of one size, rows of whole squares of local means."""
    height, width, _ = pictures[0].shape
    rows = max(1, BAND_PIXELS // (width * LOCAL)) * LOCAL
    for top in range(0, height, rows):
        yield tuple(picture[top : top + rows] for picture in pictures)


def _distance(a: Pixels, b: Pixels) -> Pixels:
    return np.maximum(a, b) - np.minimum(a, b)


def _share_within(most: int, before: Pixels, after: Pixels) -> float:
    """Share of the values that differ by no more than that."""
    return sum(int(np.count_nonzero(_distance(a, b) <= most)) for a, b in _bands(before, after)) / before.size


def _variation(pixels: Pixels) -> float:
    """How far the middle half of the local means spreads, in the channel where it does most, of 255."""
    sides = min(LOCAL, pixels.shape[0]), min(LOCAL, pixels.shape[1])
    means = np.concatenate([_local_means(band, *sides) for (band,) in _bands(pixels)])
    quarter, three_quarters = np.percentile(means, (25, 75), axis=0)
    return float((three_quarters - quarter).max())


def _touched(patches: float, pixels: Pixels) -> float:
    """Share of the squares of local means that patches which cover so much of the area can touch."""
    area = pixels.shape[0] * pixels.shape[1]
    # Of n patches of sides s_i each touches (s_i + 2 LOCAL)^2 at the most, and the sum of s_i^2 is known.
    return (math.sqrt(patches * area) + 2 * LOCAL * math.sqrt(MOST_PATCHES)) ** 2 / area if patches else 0.0


def _standing_out(pixels: Pixels) -> float:
    """Share of the local means of brightness that stand out from their median, see `STANDS_OUT`."""
    sides = min(LOCAL, pixels.shape[0]), min(LOCAL, pixels.shape[1])
    found = []
    for (band,) in _bands(pixels):
        brightness = band.mean(axis=2, keepdims=True)
        found.append(np.hstack([_local_means(part, *sides) for part in (brightness, brightness**2)]))
    mean, square = np.concatenate(found).T
    noise = np.sqrt(np.maximum(square - mean**2, 0) / (sides[0] * sides[1]))
    return float((np.abs(mean - np.median(mean)) > STANDS_OUT * noise + STANDS_OUT_STEPS).mean())


def _local_means(pixels: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[np.float64]:
    """Means of whole squares of height x width pixels (fewer below and on the right are left out), [N, C]."""
    rows, columns, channels = len(pixels) // height, pixels.shape[1] // width, pixels.shape[2]
    squares = pixels[: rows * height, : columns * width].reshape(rows, height, columns, width, channels)
    means: npt.NDArray[np.float64] = squares.mean(axis=(1, 3)).reshape(-1, channels)
    return means


def write(row: Row, data: bytes, output: Storage) -> None:
    """Put the file at the input's own key, whole or not at all. Raises ItemError `write` or `denied`."""
    if row.key == manifest.FOLDER:
        raise ItemError("write", f"the name {row.key} is the ledger's; rename the file")
    output.write(row.key, data, content_type=CONTENT_TYPES.get(row.format or "", f"image/{row.format}".lower()))
    row.output_key = row.key
    row.output_sha256 = hashlib.sha256(data).hexdigest()


class ShardWriter:
    """Rows of a Parquet file with other images, part by part; to be closed, also after an exception."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []

    def write(self, part: pa.Table, column: str, images: list[bytes | None]) -> None:
        """Add rows with new images in a column; where one is None, the part's own stays. Raises OSError.

        All parts have the same schema.
        """
        field = part.schema.field(column)
        cells = part[column].to_pylist()
        if pa.types.is_struct(field.type):
            cells = [
                cell if image is None else {**cell, "bytes": image} for cell, image in zip(cells, images, strict=True)
            ]
        else:
            cells = [cell if image is None else image for cell, image in zip(cells, images, strict=True)]
        index = part.schema.get_field_index(column)
        self._waiting.append(part.set_column(index, field, pa.array(cells, type=field.type)))
        if sum(table.nbytes for table in self._waiting) > SHARD_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting)
        self._waiting = []
        if self._writer is None:
            # With checksums, by which jobs/verify_bucket.py tells whether any column has changed since.
            self._writer = pq.ParquetWriter(self._file, table.schema, compression="zstd", write_page_checksum=True)
        self._writer.write_table(table)

"""What happens to one object on its way: fetch, decode, restore, encode, write. No Ray here.

Every expected failure ends in the object's row and goes no further; anything else is a bug and is not caught.
"""

import faulthandler
import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from restore_core import codec, manifest, sinks, sources
from restore_core.checkpoint import ModelFolder
from restore_core.config import KINDS, Kind
from restore_core.errors import ItemError
from restore_core.inference import Restored, Restorer
from restore_core.manifest import Row
from restore_core.storage import Object, Storage

Pixels = npt.NDArray[np.uint8]
Result = TypeVar("Result")

STAGE_SECONDS = 900
"""Longer than a unit's files may take to be fetched and decoded, or encoded and written, retries included."""


@dataclass(frozen=True, kw_only=True)
class RestoreRun:
    """What every actor is told."""

    input: Storage
    output: Storage
    model: ModelFolder
    device: str
    threads: int
    """Of torch in each actor."""
    max_pixels: int
    """Larger pictures are refused as `too_large`."""
    strip_metadata: bool
    repair: tuple[Kind, ...] = KINDS
    """Kinds of damage to repair."""
    self_ensemble: bool = False
    """Average over the image and its mirror image."""
    max_change: float | None = None
    """Results that differ more from the input are not written: mean absolute difference, of 255."""

    def restorer(self) -> Restorer:
        return Restorer(self.model, self.device, repair=self.repair, self_ensemble=self.self_ensemble)


@dataclass
class Item:
    """One object between two stages; what is not there yet, or no longer needed, is None."""

    row: Row
    source: bytes | None = None
    """The encoded input."""
    picture: codec.Picture | None = None
    """The decoded input."""
    restored: Pixels | None = None
    """uint8 [H, W, 3]; None also where the input was found undamaged."""

    @property
    def open(self) -> bool:
        return self.row.status is None


@contextmanager
def _wall(row: Row) -> Iterator[None]:
    """Turn an expected failure into the row's, and add the time to it."""
    started = time.perf_counter()
    try:
        yield
    except ItemError as error:
        row.fail(error.error, error.message)
    except MemoryError:
        row.fail("out_of_memory", "not enough memory for this image; lower --batch-size or use larger machines")
    row.seconds = (row.seconds or 0.0) + time.perf_counter() - started


def fetch_and_decode(item: Item, run: RestoreRun) -> None:
    with _wall(item.row):
        if item.source is None:
            # The row names the version that was read, not the one that was listed.
            listed = Object(item.row.key, item.row.size, item.row.etag)
            item.source, read = run.input.read_version(listed)
            item.row.size, item.row.etag = read.size, read.etag
        item.row.input_sha256 = hashlib.sha256(item.source).hexdigest()
        item.picture = picture = codec.decode(item.source, max_pixels=run.max_pixels)
        item.row.format, item.row.mode = picture.format, picture.mode
        item.row.width, item.row.height = picture.width, picture.height
        item.row.orientation = picture.orientation


def restore(items: list[Item], restorer: Restorer) -> None:
    """Run the network over the items that are still open, together where it goes, else one by one."""
    waiting = [item for item in items if item.open]
    started = time.perf_counter()
    try:
        results: list[Restored | ItemError] = [*restorer([item.picture.pixels for item in waiting if item.picture])]
    except (FloatingPointError, MemoryError, torch.OutOfMemoryError):
        results = [_restore_one(item, restorer) for item in waiting]
    seconds = (time.perf_counter() - started) / max(1, len(waiting))
    for item, result in zip(waiting, results, strict=True):
        row = item.row
        row.seconds = (row.seconds or 0.0) + seconds
        if isinstance(result, ItemError):
            row.fail(result.error, result.message)
            continue
        assert item.picture is not None
        gray_file = item.picture.gray
        row.sigma, row.flips, row.patches = result.sigma, result.flips, result.patches
        row.gray = None if gray_file else result.gray
        item.restored = None if result.undamaged(gray_file=gray_file, repair=restorer.repair) else result.pixels


def _restore_one(item: Item, restorer: Restorer) -> Restored | ItemError:
    assert item.picture is not None
    try:
        return restorer([item.picture.pixels])[0]
    except FloatingPointError as error:
        return ItemError("model", f"{error}; the original is kept")
    except (MemoryError, torch.OutOfMemoryError):
        return ItemError("out_of_memory", "not enough memory to restore this image; use larger machines")


def encode(item: Item, run: RestoreRun) -> bytes | None:
    """The bytes to write; the source's own where it was undamaged, None where the item has failed."""
    with _wall(item.row):
        if not item.open:
            return None
        assert item.source is not None and item.picture is not None
        if item.restored is None:
            item.row.status, item.row.change = "unchanged", 0.0
            return codec.without_metadata(item.source, picture=item.picture) if run.strip_metadata else item.source
        return sinks.encode(
            item.row, item.source, item.picture, item.restored,
            strip_metadata=run.strip_metadata, max_change=run.max_change,
        )  # fmt: skip
    return None


def encode_and_write(item: Item, run: RestoreRun) -> None:
    data = encode(item, run)
    if data is not None:
        with _wall(item.row):
            sinks.write(item.row, data, run.output)
    finish(item.row)


def finish(row: Row) -> None:
    row.node, row.finished_at = socket.gethostname(), datetime.now(UTC)


def restore_objects(rows: list[Row], run: RestoreRun, restorer: Restorer, pool: Executor) -> list[Row]:
    """All stages for some objects of a folder or prefix. Returns the finished rows."""
    items = [Item(row) for row in rows]
    each(pool, lambda item: fetch_and_decode(item, run), items)
    restore(items, restorer)
    each(pool, lambda item: encode_and_write(item, run), items)
    return [item.row for item in items]


def restore_row_group(
    rows: list[Row], file: str, group: int, output_key: str, run: RestoreRun, restorer: Restorer, pool: Executor,
    batch: int,
) -> list[Row]:  # fmt: skip
    """All stages for one row group of a Parquet file, which becomes one output file. Returns the finished rows."""
    filesystem, root = run.input.filesystem()
    try:
        with filesystem.open_input_file(f"{root}/{file}") as handle:
            table = pq.ParquetFile(handle).read_row_group(group)
    except OSError as error:
        for row in rows:
            row.fail("read", f"cannot read row group {group} of {file}: {error}"[:500])
            finish(row)
        return rows
    column = sources.image_column(table.schema)
    images: list[bytes | None] = []
    for start in range(0, len(rows), batch):
        sources_of = sources.image_bytes(table[column][start : start + batch])
        items = [Item(row, data) for row, data in zip(rows[start : start + batch], sources_of, strict=True)]
        for item in items:
            if not item.source:
                item.row.fail("not_an_image", "the image cell is null or empty")
        each(pool, lambda item: fetch_and_decode(item, run) if item.open else None, items)
        restore(items, restorer)
        images += each(pool, lambda item: encode(item, run), items)
    # A failed row keeps its original bytes, so that the table stays whole.
    originals = sources.image_bytes(table[column])
    kept = [original if image is None else image for image, original in zip(images, originals, strict=True)]
    for row, image in zip(rows, images, strict=True):
        if image is not None:
            row.output_key, row.output_sha256 = output_key, hashlib.sha256(image).hexdigest()
        finish(row)
    try:
        sinks.Shard(table, column, output_key).write(kept, run.output)
    except ItemError as error:
        for row in rows:
            row.fail(error.error, error.message)
    return rows


def each(pool: Executor, function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """Call `function` on all items at once: Pillow and the network release the interpreter.

    A decoder that hangs cannot be stopped from within, so after `STAGE_SECONDS` the process shows where it is and ends;
    Ray starts another, and the item is found out as one that crashes is.
    """
    faulthandler.dump_traceback_later(STAGE_SECONDS, exit=True)
    try:
        return list(pool.map(function, items))
    finally:
        faulthandler.cancel_dump_traceback_later()


# --- Between processes ---------------------------------------------------------------------------------------------

ITEM_SCHEMA = pa.schema(
    [
        *manifest.SCHEMA,
        pa.field("source", pa.large_binary()),
        pa.field("pixels", pa.large_binary()),
        pa.field("alpha", pa.large_binary()),
        pa.field("deep", pa.large_binary()),
        pa.field("restored", pa.large_binary()),
    ]
)
"""Items on their way between stages in different processes: the row, and pixels as flat bytes."""


def items_to_table(items: list[Item]) -> pa.Table:
    def column(values: list[bytes | None]) -> pa.Array:
        return pa.array(values, type=pa.large_binary())

    table = manifest.table_of(item.row for item in items)
    pictures = [item.picture for item in items]
    columns = {
        "source": column([item.source for item in items]),
        "pixels": column([None if p is None else p.pixels.tobytes() for p in pictures]),
        "alpha": column([None if p is None or p.alpha is None else p.alpha.tobytes() for p in pictures]),
        "deep": column([None if p is None or p.deep is None else p.deep.tobytes() for p in pictures]),
        "restored": column([None if item.restored is None else item.restored.tobytes() for item in items]),
    }
    for name, values in columns.items():
        table = table.append_column(ITEM_SCHEMA.field(name), values)
    return table


def items_of_table(table: pa.Table) -> list[Item]:
    rows = manifest.rows_of(table.select(manifest.SCHEMA.names))
    columns = (table[name].to_pylist() for name in ("source", "pixels", "alpha", "deep", "restored"))
    items = []
    for row, source, pixels, alpha, deep, restored in zip(rows, *columns, strict=True):
        item = Item(row, source)
        if pixels is not None:
            assert row.height and row.width and row.format and row.mode
            size = row.height, row.width
            item.picture = codec.Picture(
                pixels=np.frombuffer(pixels, np.uint8).reshape(*size, 3),
                format=row.format,
                mode=row.mode,
                width=row.width,
                height=row.height,
                alpha=None if alpha is None else np.frombuffer(alpha, np.uint8).reshape(size),
                gray=row.mode in codec.GRAY_MODES,
                orientation=row.orientation,
                deep=None if deep is None else np.frombuffer(deep, np.uint16).reshape(size),
            )
            if restored is not None:
                item.restored = np.frombuffer(restored, np.uint8).reshape(*size, 3)
        items.append(item)
    return items

"""What happens to one object on its way: fetch, decode, restore, encode, write. No Ray here.

Every expected failure ends in the object's row and goes no further; anything else is a bug and is not caught.
"""

import contextlib
import faulthandler
import hashlib
import json
import random
import socket
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from restore_core import codec, manifest, memory, sinks, sources
from restore_core.checkpoint import ModelFolder
from restore_core.config import KINDS, Kind, Precision
from restore_core.errors import ItemError
from restore_core.inference import LARGE_PIXELS, Restored, Restorer
from restore_core.manifest import Row
from restore_core.storage import Object, Storage, one_line

Pixels = npt.NDArray[np.uint8]
Argument = TypeVar("Argument")
Result = TypeVar("Result")

GROUP_PIXELS = 2**25
"""Decoded at once in a process, in pixels of about ten bytes; one larger picture is a group of its own."""
READ_BYTES = 2**20
"""Of a Parquet file's columns at once."""
READ_TRIES, READ_PAUSE_SECONDS = 5, 4.0
"""Of a row group that cannot be read."""
MOST_BYTES, SLACK_BYTES = 8, 2**28
"""A file of more bytes than so many a pixel (RGBA of 16 bits, not compressed) and some for what comes with a picture,
such as a film, is not read: whatever it is, it would fill the memory."""
OTHERS_LEFT_OUT = "the others are left out"
STAGE_SECONDS, ITEM_SECONDS = 1800, 120
"""Longer than a unit's files may take to be fetched and decoded, or encoded and written, retries included: all, and
more for each, since files that hang do so one after the other where there are fewer codec processes."""
IDLE_BYTES = 3 * 2**29
"""After large pictures what the network took is given back: it would be in the encoder's way. After others it is kept,
until so much lies unused: pictures that all differ in size leave gaps that fit no other. 2**20 pixels through `faces`
leave 1.2 GB, which the next ones take: to get them anew took a tenth of a job's time."""


@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """What decides what a restored file looks like; with another value it is done again."""

    strip_metadata: bool = False
    repair: tuple[Kind, ...] = KINDS
    """Kinds of damage to repair."""
    self_ensemble: bool = False
    """Average over the image and its mirror image."""
    precision: Precision = "auto"
    """Of the network's arithmetic, see `inference.Restorer`."""
    frames: codec.Frames = "refuse"
    """Of files that hold several pictures."""
    max_change: float | None = None
    """Results that differ more from the input are not written: mean absolute difference, of 255."""

    def result(self) -> dict[str, Any]:
        """These alone, by name."""
        return {option.name: getattr(self, option.name) for option in fields(ResultOptions)}

    def identity(self) -> str:
        return manifest.options_hash(self.result())


@dataclass(frozen=True, kw_only=True)
class RestoreRun(ResultOptions):
    """What every actor is told."""

    input: Storage
    output: Storage
    model: ModelFolder
    device: Literal["cpu", "cuda"]
    threads: int
    """Of torch in each actor."""
    max_pixels: int
    """Larger pictures are refused as `too_large`."""

    def restorer(self) -> Restorer:
        return Restorer(
            self.model, self.device, repair=self.repair, self_ensemble=self.self_ensemble, precision=self.precision
        )


@dataclass(frozen=True)
class Tools:
    """What a process has for the files that it reads, decodes, encodes or writes."""

    run: RestoreRun
    pool: Executor
    """Threads: Pillow and the network release the interpreter."""
    codecs: codec.Processes


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
    whole: bytes | None = None
    """Of the first frame or page of several: the file that holds them all. `source` then is this picture alone."""
    frame: int = 0
    """Frames and pages follow each other as items of their own."""

    @property
    def open(self) -> bool:
        return self.row.status is None


@contextlib.contextmanager
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


def fetch(item: Item, run: RestoreRun) -> Item:
    with _wall(item.row):
        if item.source is None:
            if item.row.size > run.max_pixels * MOST_BYTES + SLACK_BYTES:
                raise ItemError(
                    "too_large",
                    f"{item.row.size} bytes are more than a picture of {run.max_pixels} pixels has; raise "
                    "--max-megapixels, with --retry-failed too_large",
                )
            # The row names the version that was read, not the one that was listed.
            listed = Object(item.row.key, item.row.size, item.row.etag)
            item.source, read = run.input.read_version(listed)
            item.row.size, item.row.etag = read.size, read.etag
        item.row.input_sha256 = hashlib.sha256(item.source).hexdigest()
    return item


def groups(items: list[Item], tools: Tools) -> Iterator[list[Item]]:
    """What is decoded, restored and encoded together: memory stays within bounds, whatever the files unfold to."""
    counts = each(tools.pool, lambda item: _pixel_count(item, tools), items)
    group: list[Item] = []
    total = 0
    for item, count in zip(items, counts, strict=True):
        if group and total + count > GROUP_PIXELS:
            yield group
            group, total = [], 0
        group.append(item)
        total += count
    yield group


def _pixel_count(item: Item, tools: Tools) -> int:
    if not item.open or item.source is None:
        return 0
    try:
        return tools.codecs.pixel_count(item.source, frames=tools.run.frames)
    except ItemError:  # decoding will say so
        return 0


def decode(items: list[Item], tools: Tools) -> list[Item]:
    """Fill in the items; for files of several pictures, where all are wanted, an item for each follows the first."""
    found = each(tools.pool, lambda item: _decode(item, tools), items)
    return [item for frames in found for item in frames]


def _decode(item: Item, tools: Tools) -> list[Item]:
    items = [item]
    if not item.open:
        return items
    with _wall(item.row):
        assert item.source is not None
        first, *others = tools.codecs.decode_frames(item.source, frames=tools.run.frames)
        _describe(item.row, first)
        item.picture = first.picture
        if first.source is not None:
            item.whole, item.source = item.source, first.source
        elif first.picture.left_out:
            item.row.message = f"the first of {first.picture.left_out + 1} frames or pages; {OTHERS_LEFT_OUT}"
        for index, frame in enumerate(others, start=1):
            row = replace(item.row, seconds=None)
            _describe(row, frame)
            items.append(Item(row, frame.source, frame.picture, frame=index))
    return items


def _describe(row: Row, frame: codec.Frame) -> None:
    picture = frame.picture
    row.width, row.height = picture.width, picture.height
    row.format, row.mode, row.orientation = frame.holder or (picture.format, picture.mode, picture.orientation)


def restore(items: list[Item], restorer: Restorer) -> None:
    """Run the network over the items that are still open, together where it goes, else one by one.

    It sees them the way up that viewers show them: faces that lie on their side are not what it knows.
    """
    waiting = [item for item in items if item.open]
    large = _any_large(waiting)
    started = time.perf_counter()
    try:
        results: list[Restored | ItemError] = [*restorer([item.picture.shown for item in waiting if item.picture])]
    except (FloatingPointError, MemoryError):
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
        row.message = "; ".join(text for text in (row.message, result.note) if text) or None
        row.sigma, row.flips, row.patches = result.sigma, result.flips, result.patches
        row.gray = None if gray_file else result.gray
        undamaged = result.undamaged(gray_file=gray_file, repair=restorer.repair)
        # As an array of its own: what comes after would copy a view again and again.
        item.restored = None if undamaged else np.ascontiguousarray(item.picture.stored(result.pixels))
    # Beside a GPU libraries alone are more than that, and GPUs keep their own memory for the next ones.
    if large or (restorer.device.type == "cpu" and memory.idle() > IDLE_BYTES):
        memory.trim()


def _any_large(items: list[Item]) -> bool:
    return any(item.picture and item.picture.width * item.picture.height >= LARGE_PIXELS for item in items)


def _restore_one(item: Item, restorer: Restorer) -> Restored | ItemError:
    assert item.picture is not None
    try:
        return restorer([item.picture.shown])[0]
    except FloatingPointError as error:
        return ItemError("model", f"{error}; the original is kept")
    except MemoryError as error:
        return ItemError("out_of_memory", f"{error}; use larger machines")


def encode(item: Item, tools: Tools) -> bytes | None:
    """The bytes to write; the source's own where it was undamaged, None where the item has failed."""
    run, codecs = tools.run, tools.codecs
    with _wall(item.row):
        if not item.open:
            return None
        assert item.source is not None and item.picture is not None
        if item.restored is None:
            item.row.status, item.row.change = "unchanged", 0.0
            if item.row.message and not run.strip_metadata:
                item.row.message = item.row.message.replace(OTHERS_LEFT_OUT, "all are copied")
            return codecs.without_metadata(item.source, picture=item.picture) if run.strip_metadata else item.source
        return sinks.encode(
            item.row, item.source, item.picture, item.restored, codecs,
            strip_metadata=run.strip_metadata, max_change=run.max_change,
        )  # fmt: skip
    return None


def encode_file(frames: list[Item], tools: Tools) -> bytes | None:
    """The bytes to write for all frames of a file, whose row becomes the first one's; None if one has failed.

    The items let go of all that they hold.
    """
    try:
        parts = [encode(item, tools) for item in frames]
        return parts[0] if len(frames) == 1 else _joined(frames, parts, tools)
    finally:
        large = _any_large(frames)
        for item in frames:
            item.source = item.picture = item.restored = item.whole = None
        if large:  # or it would stand beside what decoding the next one takes
            memory.trim()


def _joined(frames: list[Item], parts: list[bytes | None], tools: Tools) -> bytes | None:
    run, codecs, first = tools.run, tools.codecs, frames[0]
    assert first.whole is not None
    with _wall(first.row):
        rows = [item.row for item in frames]
        for index, row in enumerate(rows):
            if row.error is not None:
                first.row.change = None  # of the first alone
                raise ItemError(row.error, f"frame or page {index + 1}: {row.message}")
        for name in ("sigma", "flips", "patches", "gray", "change"):
            values = [value for row in rows if (value := getattr(row, name)) is not None]
            setattr(first.row, name, sum(values) / len(values) if values else None)
        first.row.seconds = sum(row.seconds or 0.0 for row in rows)
        first.row.status = "unchanged" if all(row.status == "unchanged" for row in rows) else "restored"
        if first.row.status == "unchanged" and not run.strip_metadata:
            return first.whole
        if first.row.status == "unchanged" and first.row.format != "TIFF":  # of which each page has metadata
            assert first.picture is not None and first.row.format is not None
            whole = replace(first.picture, format=first.row.format, orientation=first.row.orientation)
            return codecs.without_metadata(first.whole, picture=whole)
        done = [part for part in parts if part is not None]
        return codecs.join(done, first.whole, software=sinks.software(first.row), strip_metadata=run.strip_metadata)
    return None


def encode_and_write(frames: list[Item], tools: Tools) -> Row:
    """All frames of one file. Returns its finished row."""
    row = frames[0].row
    data = encode_file(frames, tools)
    if data is not None:
        with _wall(row):
            sinks.write(row, data, tools.run.output)
    finish(row)
    return row


def files_of(items: list[Item]) -> list[list[Item]]:
    """The frames of each file."""
    files: list[list[Item]] = []
    for item in items:
        if item.frame == 0:
            files.append([])
        files[-1].append(item)
    return files


def finish(row: Row) -> None:
    row.node, row.finished_at = socket.gethostname(), datetime.now(UTC)


def restore_objects(rows: list[Row], tools: Tools, restorer: Restorer) -> list[Row]:
    """All stages for some objects of a folder or prefix. Returns the finished rows."""
    items = each(tools.pool, lambda row: fetch(Item(row), tools.run), rows)
    done: list[Row] = []
    for group in groups(items, tools):
        decoded = decode(group, tools)
        restore(decoded, restorer)
        done += each(tools.pool, lambda frames: encode_and_write(frames, tools), files_of(decoded))
    return done


def restore_row_group(
    rows: list[Row], file_key: str, group: int, output_key: str, tools: Tools, restorer: Restorer, *, batch: int
) -> list[Row]:
    """All stages for one row group of a Parquet file, which becomes one output file. Returns the finished rows.

    A failed row keeps its original bytes, so that the table stays whole. Of input and output `batch` rows are held.
    """
    run, done = tools.run, 0
    try:
        _require_unchanged(run.input, file_key, rows, len(rows))
        with (
            run.output.create(output_key) as file,
            contextlib.closing(sinks.ShardWriter(file)) as shard,
            contextlib.closing(_parts(run.input, file_key, group, batch)) as parts,
        ):
            for part in parts:
                column = sources.image_column(part.schema)
                cells = sources.image_bytes(part[column])
                some = rows[done : done + len(part)]
                shard.write(part, column, _restore_part(some, cells, output_key, tools, restorer))
                done += len(part)
            _require_unchanged(run.input, file_key, rows, done)
    except ItemError as error:
        for row in rows:
            row.fail(error.error, error.message)
    for row in rows:
        finish(row)
    return rows


def _require_unchanged(input: Storage, file: str, rows: list[Row], count: int) -> None:
    """Rows are known by their places, so their file has to be the one that was listed. Raises ItemError."""
    if count != len(rows) or input.stat(file) != Object(file, rows[0].size, rows[0].etag):
        raise ItemError("read", one_line(f"{file} has changed since it was listed; run again"))


def _parts(input: Storage, file: str, group: int, batch: int) -> Generator[pa.Table, None, None]:
    """The rows of a row group, `batch` at a time at most. Raises ItemError.

    What breaks off is read again from the beginning, without what has been given out: Arrow itself tries a request
    again, but not where an answer's body is cut off.
    """
    done = 0
    for tries_left in reversed(range(READ_TRIES)):
        try:
            filesystem, root = input.filesystem()
            with filesystem.open_input_file(f"{root}/{file}") as handle:
                parquet = pq.ParquetFile(handle, pre_buffer=False, buffer_size=READ_BYTES)
                batches = parquet.iter_batches(batch, row_groups=[group] if group < parquet.num_row_groups else [])
                for index, part in enumerate(batches):
                    if index >= done:
                        yield pa.table(part).replace_schema_metadata(parquet.schema_arrow.metadata)
                        done += 1
            return
        except (OSError, pa.ArrowException) as error:
            input.stat(file)  # which tells what is gone and what is denied
            if not tries_left:
                raise ItemError("read", one_line(f"cannot read row group {group} of {file}: {error}")) from error
            time.sleep(random.uniform(0, READ_PAUSE_SECONDS))  # noqa: S311


def _restore_part(
    rows: list[Row], cells: list[bytes | None], output_key: str, tools: Tools, restorer: Restorer
) -> list[bytes | None]:
    """The new images of some rows, None where one has failed; fills in the rows."""
    if len(rows) < len(cells):  # more than were listed: told once all are read
        return [None] * len(cells)
    items = [Item(row, data) for row, data in zip(rows, cells, strict=True)]
    for item in items:
        if not item.source:
            item.row.fail("not_an_image", "the image cell is null or empty")
    items = each(tools.pool, lambda item: fetch(item, tools.run) if item.open else item, items)
    images: list[bytes | None] = []
    for some in groups(items, tools):
        decoded = decode(some, tools)
        restore(decoded, restorer)
        images += each(tools.pool, lambda frames: encode_file(frames, tools), files_of(decoded))
    for row, image in zip(rows, images, strict=True):
        if image is not None:
            row.output_key, row.output_sha256 = output_key, hashlib.sha256(image).hexdigest()
    return images


def each(pool: Executor, function: Callable[[Argument], Result], items: list[Argument]) -> list[Result]:
    """Call `function` on all items at once.

    What hangs cannot be stopped from within (codecs have processes of their own), so after `STAGE_SECONDS` and
    `ITEM_SECONDS` for each item the process shows where it is and ends; Ray starts another, and the item is found out
    as one that crashes is.
    """
    faulthandler.dump_traceback_later(STAGE_SECONDS + ITEM_SECONDS * len(items), exit=True)
    try:
        return list(pool.map(function, items))
    finally:
        faulthandler.cancel_dump_traceback_later()


# --- Between processes ---------------------------------------------------------------------------------------------

ITEM_SCHEMA = pa.schema(
    [
        *manifest.SCHEMA,
        pa.field("frame", pa.int32()),
        pa.field("picture", pa.string()),  # all but its arrays, as JSON
        pa.field("source", pa.large_binary()),
        pa.field("pixels", pa.large_binary()),
        pa.field("alpha", pa.large_binary()),
        pa.field("native", pa.large_binary()),
        pa.field("restored", pa.large_binary()),
        pa.field("whole", pa.large_binary()),
    ]
)
"""Files on their way between stages in different processes: the row, and pixels as flat bytes."""


def items_to_table(items: list[Item]) -> pa.Table:
    def column(values: list[bytes | None]) -> pa.Array:
        return pa.array(values, type=pa.large_binary())

    pictures = [item.picture for item in items]
    columns = {
        "frame": pa.array([item.frame for item in items], pa.int32()),
        "picture": pa.array([None if p is None else json.dumps(p.described()) for p in pictures], pa.string()),
        "source": column([item.source for item in items]),
        "pixels": column([None if p is None else p.pixels.tobytes() for p in pictures]),
        "alpha": column([None if p is None or p.alpha is None else p.alpha.tobytes() for p in pictures]),
        "native": column([None if p is None or p.native is None else p.native.tobytes() for p in pictures]),
        "restored": column([None if item.restored is None else item.restored.tobytes() for item in items]),
        "whole": column([item.whole for item in items]),
    }
    table = manifest.table_of(item.row for item in items)
    for name, values in columns.items():
        table = table.append_column(ITEM_SCHEMA.field(name), values)
    return table


def items_of_table(table: pa.Table) -> list[Item]:
    rows = manifest.rows_of(table.select(manifest.SCHEMA.names))
    columns = (table[name].to_pylist() for name in ITEM_SCHEMA.names[len(manifest.SCHEMA) :])
    items = []
    for row, frame, described, source, pixels, alpha, native, restored, whole in zip(rows, *columns, strict=True):
        item = Item(row, source, whole=whole, frame=frame)
        if described is not None:
            fields = json.loads(described)
            size = fields["height"], fields["width"]
            item.picture = codec.Picture(
                **fields,
                pixels=np.frombuffer(pixels, np.uint8).reshape(*size, 3),
                alpha=None if alpha is None else np.frombuffer(alpha, np.uint8).reshape(size),
                native=None if native is None else codec.native_from_bytes(native, fields["mode"], *size),
            )
            if restored is not None:
                item.restored = np.frombuffer(restored, np.uint8).reshape(*size, 3)
        items.append(item)
    return items


def pack(table: pa.Table) -> pa.Table:
    """What is worked on together, in one row: Ray cuts and joins tables between any two rows, and with a GPU it insists
    on a number of rows for each call."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    ends = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.table({"packed": pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, data])})


def unpack(table: pa.Table) -> pa.Table:
    """The other way."""
    return pa.ipc.open_stream(table["packed"][0].as_buffer()).read_all()

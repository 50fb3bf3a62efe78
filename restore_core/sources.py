"""Where photographs come from: folders, tar archives, S3 prefixes and Parquet, as bytes with a key.

Packing reads whole archives and trees (`photographs`); training and restoring read Parquet of ours or of other makers.
"""

import gzip
import hashlib
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from restore_core import codec, manifest
from restore_core.errors import ItemError, StorageError, UsageError
from restore_core.storage import Storage, key_of, one_line

TAR_BUFFER_BYTES = 8 * 2**20
WINDOW_BYTES = 2**28
"""Of encoded files that are held together while packing."""
OPTIONS_FILE, BROKEN_FILE, UNFINISHED_FILE = "_pack/options.json", "_pack/broken.csv", "_pack/unfinished"
"""What jobs/pack_dataset.py writes beside a dataset: how it was made, what could not be read; and the last while it is
at work, since some shards may be of an earlier packing then, which put people into other splits."""
Item = TypeVar("Item")
DATA = "--data"
"""The option that names a dataset."""
TRAIN, VALIDATION, TEST = "train", "val", "test"

DATASET_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)
"""A dataset for training: the encoded files untouched, one row each."""


@dataclass(frozen=True)
class Found:
    """One file met while packing: its bytes, or why they could not be read."""

    key: str
    data: bytes | ItemError

    def __len__(self) -> int:
        return 0 if isinstance(self.data, ItemError) else len(self.data)


# --- Photographs for a dataset -------------------------------------------------------------------------------------


def photographs(storage: Storage, threads: int = 16) -> Iterator[Found]:
    """Every file under a folder or S3 prefix, tar archives replaced by their members, in listing order.

    Raises StorageError where the storage fails, and not a file of it.
    """
    with ThreadPoolExecutor(threads) as pool:
        for window in windows(storage.list(), 4 * threads, lambda item: 0 if _is_tar(item.key) else item.size):
            files = [item.key for item in window if not _is_tar(item.key)]
            contents = dict(zip(files, pool.map(lambda key: _try_read(storage, key), files), strict=True))
            for item in window:
                if item.key in contents:
                    yield Found(item.key, contents[item.key])
                else:
                    yield from _tar_members(storage, item.key)


def windows(items: Iterable[Item], most: int, size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Some at a time: `most`, or as many as have `WINDOW_BYTES`."""
    window: list[Item] = []
    total = 0
    for item in items:
        window.append(item)
        total += size(item)
        if len(window) == most or total >= WINDOW_BYTES:
            yield window
            window, total = [], 0
    if window:
        yield window


def group_of(key: str) -> str:
    """The person of a photograph: the folder it lies in; a file at the top is a group of its own.

    Accented letters in one piece: macOS takes them apart, and a person must not become two.
    """
    path = PurePosixPath(key)
    return unicodedata.normalize("NFC", path.parent.name or path.stem)


def split_of(group: str, val_share: float, test_share: float) -> str:
    """A split by a stable hash of the person, so that no person is in two of them, in any packing ever."""
    place = int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big") / 2**64
    if place < test_share:
        return TEST
    return VALIDATION if place < test_share + val_share else TRAIN


def dataset_row(key: str, split: str, data: bytes) -> dict[str, object]:
    """A row of `DATASET_SCHEMA`. The file is decoded once to be sure that it can be. Raises ItemError."""
    picture = codec.decode(data)
    return {
        "key": key,
        "group": group_of(key),
        "split": split,
        "image": data,
        "width": picture.width,
        "height": picture.height,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _is_tar(key: str) -> bool:
    return key.endswith((".tar", ".tar.gz", ".tgz"))


def read(storage: Storage, key: str) -> bytes:
    """One file. Raises ItemError where that cannot be read, and StorageError where none could: no network, say."""
    try:
        return storage.read(key)
    except ItemError as error:
        if error.others_too:
            raise StorageError(error.message) from error
        raise


def _try_read(storage: Storage, key: str) -> bytes | ItemError:
    try:
        return read(storage, key)
    except ItemError as error:
        return error


class StrictHeader(tarfile.TarInfo):
    """Takes only a block of zeros for an archive's end; tarfile by itself also a damaged or missing header."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tarfile_.offset}") from error


def _tar_members(storage: Storage, key: str) -> Iterator[Found]:
    filesystem, root = storage.filesystem()
    try:
        # Read front to back in large pieces: an archive on S3 takes few requests and is never held whole.
        with (
            filesystem.open_input_stream(f"{root}/{key}", compression=None, buffer_size=TAR_BUFFER_BYTES) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=StrictHeader) as tar,
        ):
            for member in tar:
                if member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None
                    yield Found(key_of(member.name), content.read())
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = f"the archive cannot be read to its end: {error}"
        of_file = isinstance(error, gzip.BadGzipFile | FileNotFoundError)
        if isinstance(error, OSError) and not of_file and storage.uri.startswith("s3://"):
            raise StorageError(one_line(f"{storage.join(key)}: {reason}")) from error
        yield Found(key, ItemError("truncated", reason))


# --- Parquet -------------------------------------------------------------------------------------------------------


def parquet_files(storage: Storage) -> list[str]:
    """Keys of the Parquet files in a folder or prefix, sorted. Raises UsageError when there are none."""
    found = [item.key for item in storage.list()]
    if UNFINISHED_FILE in found:
        raise UsageError(f"{DATA} {storage.uri}: jobs/pack_dataset.py did not finish there; run it again")
    keys = sorted(key for key in found if key.endswith(".parquet") and not is_internal(key))
    if not keys:
        raise UsageError(f"{DATA} {storage.uri}: no .parquet files there; make some with jobs/pack_dataset.py")
    return keys


def is_internal(key: str) -> bool:
    """Files that our own jobs keep beside their output: ledger and report, and what was packed with which options."""
    *folders, _ = key.split("/")
    return manifest.FOLDER in folders or f"/{key}".endswith(
        (f"/{OPTIONS_FILE}", f"/{BROKEN_FILE}", f"/{UNFINISHED_FILE}")
    )


@contextmanager
def open_parquet(storage: Storage, key: str, option: str) -> Iterator[pq.ParquetFile]:
    """One Parquet file of photographs. Raises UsageError, naming option and file, when it cannot be read."""
    filesystem, root = storage.filesystem()
    try:
        with filesystem.open_input_file(f"{root}/{key}") as handle:
            yield pq.ParquetFile(handle)
    except StorageError:
        raise
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{option} {storage.join(key)}: not a readable Parquet file ({reason}); replace it") from error


def image_column(schema: pa.Schema, place: str = "a Parquet file") -> str:
    """The column of encoded files: `image`, else the only binary or {bytes, path} one.

    Raises UsageError that begins with `place`.
    """

    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)  # type: ignore[no-any-return]

    candidates = [field.name for field in schema if holds_bytes(field.type)]
    if "image" in candidates:
        candidates = ["image"]
    for name in ("key", "split", *candidates):
        if schema.names.count(name) > 1:
            raise UsageError(f"{place}: two of its columns are called {name!r}; rename one")
    if len(candidates) == 1:
        return str(candidates[0])
    raise UsageError(
        f"{place}: its columns are {', '.join(schema.names)}; name the one of encoded images 'image' "
        f"(type binary, or a struct with a field 'bytes')"
    )


def image_bytes(column: pa.ChunkedArray) -> list[bytes | None]:
    """The encoded files of an image column, None where a cell is null."""
    if pa.types.is_struct(column.type):
        return [None if cell is None else cell["bytes"] for cell in column.to_pylist()]
    return column.to_pylist()  # type: ignore[no-any-return]


def image_of_row(storage: Storage, key: str, group: int | None, index: int) -> bytes:
    """The encoded file in one row of a Parquet file, or of its row group `group`. Raises OSError, ArrowInvalid."""
    filesystem, root = storage.filesystem()
    with filesystem.open_input_file(f"{root}/{key}") as handle:
        file = pq.ParquetFile(handle, pre_buffer=False, buffer_size=2**20)
        column = image_column(file.schema_arrow)
        first = 0
        groups = range(file.num_row_groups) if group is None else [group]
        for batch in file.iter_batches(64, row_groups=list(groups), columns=[column]):
            if index < first + len(batch):
                (image,) = image_bytes(pa.table(batch[index - first : index - first + 1])[column])
                if image is None:
                    break
                return image
            first += len(batch)
    raise OSError(f"{key} has no image in row {index}")


def splits(table: pa.Table) -> list[str]:
    """The split of every row: its column `split`, else by a hash of its key (90 % train, 10 % val)."""
    if "split" in table.column_names:
        return table["split"].to_pylist()  # type: ignore[no-any-return]
    return [split_of(key, val_share=0.1, test_share=0.0) for key in keys_of(table)]


def keys_of(table: pa.Table) -> list[str]:
    """The key of every row: its column `key`, else the hash of its image."""
    if "key" in table.column_names:
        return [str(key) for key in table["key"].to_pylist()]
    column = image_bytes(table[image_column(table.schema)])
    return [hashlib.sha256(data or b"").hexdigest() for data in column]


def dataset_columns(schema: pa.Schema, place: str = "a Parquet file") -> list[str]:
    """The columns that training needs of a Parquet file. Raises UsageError that begins with `place`."""
    return [name for name in ("key", "split") if name in schema.names] + [image_column(schema, place)]


DECODED_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("pixels", pa.binary()),  # uint8 RGB, height x width x 3, row by row
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
    ]
)
"""Decoded photographs on their way to training. Flat bytes, since tensors of unlike shapes are slow in Arrow."""


def decode_rows(table: pa.Table, split: str, canvas: int) -> pa.Table:
    """The photographs of one split as `DECODED_SCHEMA`, sides at most `canvas` pixels.

    Larger ones are shrunk until their shorter side is the canvas, and cropped to its centre. Rows that do not decode
    are left out: packing has listed them.
    """
    rows = []
    columns = zip(keys_of(table), splits(table), image_bytes(table[image_column(table.schema)]), strict=True)
    for key, its_split, data in columns:
        if its_split != split or data is None:
            continue
        try:
            image = _fit(codec.decode(data).shown, canvas)
        except ItemError:
            continue
        rows.append({"key": key, "pixels": image.tobytes(), "height": image.shape[0], "width": image.shape[1]})
    return pa.Table.from_pylist(rows, schema=DECODED_SCHEMA)


def read_split(storage: Storage, split: str, canvas: int, limit: int) -> pa.Table:
    """The first `limit` photographs of a split, decoded as `decode_rows` does, in this process."""
    parts = [DECODED_SCHEMA.empty_table()]
    for key in parquet_files(storage):
        with open_parquet(storage, key, DATA) as file:
            columns = dataset_columns(file.schema_arrow, f"{DATA} {storage.join(key)}")
            for batch in file.iter_batches(batch_size=min(64, limit), columns=columns):
                parts.append(decode_rows(pa.table(batch), split, canvas))
                if sum(map(len, parts)) >= limit:
                    return pa.concat_tables(parts)[:limit]
    return pa.concat_tables(parts)


def count_splits(storage: Storage) -> Counter[str]:
    """Rows of each split over all Parquet files; images are read only where there is no column `split` and no `key`.

    Raises UsageError where training could not tell rows apart, or would take them from other columns than here.
    """
    counts, first = Counter[str](), ""
    common: list[str] = []
    keys = [pa.array([], pa.string())]
    for name in parquet_files(storage):
        place = f"{DATA} {storage.join(name)}"
        with open_parquet(storage, name, DATA) as file:
            columns = dataset_columns(file.schema_arrow, place)
            common, first = common or columns, first or name
            if columns != common:
                raise UsageError(
                    f"{place}: of its columns {', '.join(columns)} would be taken, of those of {first} "
                    f"{', '.join(common)}; name them alike, or move one away"
                )
            needed = [column for column in columns if column in ("key", "split")] or columns
            for batch in file.iter_batches(2**16 if needed != columns else 64, columns=needed):
                counts.update(splits(pa.table(batch)))
                if "key" in needed:
                    keys.append(key_column(batch, place))
    if (found := pa.chunked_array(keys)).null_count:
        raise UsageError(f"{DATA} {storage.uri}: its column key has empty cells; fill them or leave the column out")
    if len(each := found.value_counts()) < len(found):
        twice = next(count["values"] for count in each.to_pylist() if count["counts"] > 1)
        raise UsageError(f"{DATA} {storage.uri}: key {twice!r} occurs twice; make keys unique")
    return counts


def key_column(table: pa.Table | pa.RecordBatch, place: str) -> pa.Array:
    """The column `key` as text. Raises UsageError that begins with `place`."""
    column = table["key"]
    try:
        text = column.cast(pa.string())
    except pa.ArrowException as error:
        raise UsageError(f"{place}: its column key is {column.type}; make it text") from error
    return text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text


def _fit(pixels: npt.NDArray[np.uint8], canvas: int) -> npt.NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    if max(height, width) <= canvas:
        return pixels
    scale = min(1.0, canvas / min(height, width))
    if scale < 1:
        size = max(canvas, round(width * scale)), max(canvas, round(height * scale))
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
        height, width = pixels.shape[:2]
    top, left = max(0, (height - canvas) // 2), max(0, (width - canvas) // 2)
    return pixels[top : top + canvas, left : left + canvas]


def read_list(path: Path, option: str) -> set[str]:
    """People named in a list such as LFW's `peopleDevTrain.txt`: one a line, a tab and a count may follow; a first line
    that says how many others there are is skipped. Raises UsageError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {path}: cannot be read as text ({error})") from error
    lines = [line for line in lines if line.strip()]
    if lines and lines[0].strip() == str(len(lines) - 1):  # LFW's lists begin with their length
        lines = lines[1:]
    return {unicodedata.normalize("NFC", line.split("\t")[0].strip()) for line in lines}

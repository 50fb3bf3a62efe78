"""What there is to do: the input's listing, cut into units that are done together."""

import contextlib
import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from restore_core import manifest, sources
from restore_core.errors import ItemError, StorageError, UsageError
from restore_core.key_list import read_key_list
from restore_core.manifest import Ledger, Row
from restore_core.storage import Object, Storage, one_line

logger = logging.getLogger(__name__)

BLOCK_BYTES = 16 * 2**20
"""Encoded bytes that go to an actor at once: about 300 MB of pixels for JPEG."""
LEAST_BYTES = 2**18
"""Encoded bytes below which a unit's way through Ray takes longer than its work: half a second on a CPU."""
NOTED_OBJECTS = 25_000
"""So many are listed before they are noted down together."""


@dataclass(frozen=True)
class RowGroup:
    """One row group of an input Parquet file: its rows stand in the ledger like objects."""

    file: Object
    group: int
    keys: pa.StringArray
    """Of its rows."""
    output_key: str


class RowGroups:
    """The row groups of all Parquet files of an input. Of their rows it holds the keys."""

    def __init__(self, groups: list[RowGroup]) -> None:
        self.groups = groups
        self._keys = pa.chunked_array([group.keys for group in groups], pa.string())
        self.order = pc.sort_indices(self._keys).to_numpy()
        """Numbers of the rows (as the groups follow each other), sorted by their keys."""
        self.starts = np.cumsum([0, *(len(group.keys) for group in groups)])
        """Number of each group's first row, and how many there are."""

    def group_of(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def objects(self) -> Iterator[Object]:
        """The rows as objects with the size and version of their file, in the order of their keys."""
        for start in range(0, len(self.order), 4096):
            rows = self.order[start : start + 4096]
            groups = np.searchsorted(self.starts, rows, side="right") - 1
            for key, group in zip(self._keys.take(pa.array(rows)).to_pylist(), groups, strict=True):
                file = self.groups[group].file
                yield Object(key, file.size, file.etag)

    def places(self) -> pa.Table:
        """Of all rows: `key`, `file` (the output), `file_size` and `file_etag` (of the input's), `row` (their place in
        the output), `rows` (how many it has)."""
        counts = np.diff(self.starts)
        group_of = pa.array(np.repeat(np.arange(len(counts)), counts))
        return pa.table(
            {
                "key": self._keys,
                "file": pa.array([group.output_key for group in self.groups], pa.string()).take(group_of),
                "file_size": pa.array([group.file.size for group in self.groups], pa.int64()).take(group_of),
                "file_etag": pa.array([group.file.etag for group in self.groups], pa.string()).take(group_of),
                "row": np.arange(self.starts[-1]) - np.repeat(self.starts[:-1], counts),
                "rows": np.repeat(counts, counts),
            }
        )

    def check(self, uri: str) -> None:
        """Raise UsageError for keys that occur twice or are missing, or outputs that would be one."""
        if not len(self.order):
            raise UsageError(f"--input {uri}: no rows in its Parquet files; check the path or prefix")
        targets: dict[str, str] = {}
        for group in self.groups:
            place = f"--input {uri.rstrip('/')}/{group.file.key}"
            if group.keys.null_count:
                raise UsageError(f"{place}: its column key has empty cells; fill them or leave the column out")
            if targets.setdefault(group.output_key, group.file.key) != group.file.key:
                other = targets[group.output_key]
                raise UsageError(f"{place}: its output {group.output_key} is also that of {other}; rename one")
        last = None
        for row, item in zip(self.order, self.objects(), strict=True):
            if item.key == last:
                file = self.groups[self.group_of(int(row))].file.key
                raise UsageError(f"--input {uri.rstrip('/')}/{file}: key {item.key!r} occurs twice; make keys unique")
            last = item.key


@dataclass(frozen=True)
class Input:
    """What is to be restored."""

    objects: Iterator[Object]
    """In the order of their keys; once."""
    groups: RowGroups | None
    """Where every file is Parquet: their rows, which then are the objects."""
    version: Callable[[Object], Object] = lambda item: item
    """Of an object: what it is now, where the listing may be older (a list of keys)."""


class Listed:
    """What a run has listed until now, kept in OUTPUT/_restore/listed until it has accounted for all of it.

    A listing of hundreds of millions takes hours; one that was interrupted can go on where it ended. The first row of
    each note says (in `message`) behind which key it begins, so that a note that is missing is not passed over.

    Args:
        resume: go on from what an earlier run has noted; else list all of it again.
    """

    def __init__(self, storage: Storage, output: Storage, run_id: str, *, resume: bool) -> None:
        place = hashlib.sha256(storage.join(storage.only or "").encode()).hexdigest()[:16]
        self._ledger = Ledger(output, run_id, folder=f"listed/{place}")
        self._storage = storage
        self._resume = resume
        self._begun = False

    def begin(self) -> None:
        """Forget what an earlier run has noted, unless it is gone on from there. Not while another run may write.

        Before this nothing is noted.
        """
        if not self._resume:
            self.clear()
        self._begun = True

    def clear(self) -> None:
        self._ledger.clear()

    def __iter__(self) -> Iterator[Object]:
        last = ""
        if self._resume:
            for item in self._noted():
                yield item
                last = item.key
            logger.info("the listing goes on after %r", last)
        fresh: list[Row] = []
        for item in self._storage.list(after=last, unreadable=True):
            behind = None if fresh else last
            fresh.append(
                Row(key=item.key, size=item.size, etag=item.etag, model="", options="", run_id="", message=behind)
            )
            if self._begun and len(fresh) >= NOTED_OBJECTS:
                self._ledger.append(fresh)
                fresh = []
                last = item.key
            yield item

    def _noted(self) -> Iterator[Object]:
        """What has been noted without a gap."""
        last = ""
        for table in self._ledger.rows(("key", "size", "etag", "message")):
            for key, size, etag, behind in zip(*(column.to_pylist() for column in table.columns), strict=True):
                if behind not in ((None, last) if last else ("",)):
                    return
                yield Object(key, size, etag)
                last = key


def list_input(storage: Storage, keys: str | None = None, listing: Iterable[Object] | None = None) -> Input:
    """The input's objects, without those of an earlier restore's own folder; of files, listed while they are taken.

    Args:
        keys: a list in place of a listing, see `key_list`.
        listing: in place of the storage's own, such as `Listed`.

    Raises UsageError when there are none, and for Parquet that cannot be used.
    """
    if keys is not None:
        listing = _no_rows(read_key_list(keys, storage), storage, keys)
    elif listing is None:
        listing = storage.list(unreadable=True)

    def version(item: Object) -> Object:
        try:
            return storage.stat(item.key) if keys is not None else item
        except ItemError:
            return item

    own = f"{manifest.FOLDER}/"
    objects = (item for item in listing if not item.key.startswith(own))
    head: list[Object] = []
    for item in objects:
        head.append(item)
        unreadable = item.key.endswith("/") and not item.size
        if not item.key.endswith(".parquet") and not unreadable and not _is_beside_data(item.key):
            return Input(chain(head, objects), None, version)
    if not head:
        where = f"--input {storage.uri}" if keys is None else f"--keys {keys}"
        raise UsageError(f"{where}: no files there; check the path or prefix")
    # Without what jobs/pack_dataset.py says about a dataset.
    if dataset := [item for item in head if not _is_beside_data(item.key)]:
        for folder in (item for item in dataset if item.key.endswith("/")):
            raise StorageError(f"cannot list {one_line(storage.join(folder.key))}; fix its permissions or move it away")
        groups = RowGroups(list(_row_groups(storage, dataset)))
        groups.check(storage.uri)
        return Input(groups.objects(), groups)
    return Input(iter(head), None, version)


def _is_beside_data(key: str) -> bool:
    """What lies beside the files of a dataset: our own notes, those of Spark (_SUCCESS), Hugging Face, git, macOS."""
    name = key.rpartition("/")[2]
    return sources.is_internal(key) or name.startswith((".", "_")) or name.lower() in ("readme.md", "license")


def _no_rows(listing: Iterable[Object], storage: Storage, keys: str) -> Iterator[Object]:
    """The same. Raises UsageError for rows of Parquet files, as the ledger names them: those are not objects."""
    for item in listing:
        file, number = item.key.rpartition("#")[::2]
        if number.isdecimal() and file.endswith(".parquet") and storage.exists(file) and not storage.exists(item.key):
            raise UsageError(
                f"--keys {keys}: {item.key!r} is a row of a Parquet file, which goes as a whole; name the file"
            )
        yield item


def _row_groups(storage: Storage, files: list[Object]) -> Iterator[RowGroup]:
    """The rows of all Parquet files. A row's key is its column `key`, else FILE#ROW. Raises UsageError."""
    for listed in files:
        item = listed
        with contextlib.suppress(ItemError):  # which opening it will say
            item = storage.stat(item.key)  # a list of keys may know an older version
        with sources.open_parquet(storage, item.key, "--input") as file:
            sources.image_column(file.schema_arrow, f"--input {storage.join(item.key)}")
            keyed = "key" in file.schema_arrow.names
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if keyed:
                    place = f"--input {storage.join(item.key)}"
                    keys = sources.key_column(file.read_row_group(group, columns=["key"]), place)
                else:
                    keys = pa.array([f"{item.key}#{first + row}" for row in range(count)], pa.string())
                first += count
                yield RowGroup(item, group, keys, shard_key(item.key, group, file.num_row_groups))


def shard_key(file: str, group: int, groups: int) -> str:
    """Where a row group is written to."""
    return file if groups == 1 else f"{file.removesuffix('.parquet')}-{group:05d}.parquet"


def files_of_shard(shard: str) -> set[str]:
    """The input files that it may be an output of."""
    return {shard, re.sub(r"-\d{5,}\.parquet$", ".parquet", shard)}


UNIT_SCHEMA = pa.schema(
    [*manifest.SCHEMA, pa.field("file", pa.string()), pa.field("group", pa.int32()), pa.field("target", pa.string())]
)
"""A block of the dataset: rows that are done together. For Parquet: their file, row group and output key."""


def object_units(rows: Sequence[Row], batch_size: int, workers: int) -> Iterator[pa.Table]:
    """Units of at most `batch_size` objects and `BLOCK_BYTES` encoded bytes.

    The first of each worker is a single object, so that there soon is something to see. Towards the end they become
    smaller, so that all workers end together, but not less than `LEAST_BYTES`.
    """
    unit: list[Row] = []
    total, units = 0, 0
    most = min(batch_size, math.ceil(len(rows) / (2 * workers)))  # so that every worker gets its share of a small job
    for index, row in enumerate(rows):
        left = len(rows) - index + len(unit)
        enough = units < workers or (total >= LEAST_BYTES and len(unit) >= math.ceil(left / (2 * workers)))
        if unit and (enough or len(unit) == most or total + row.size > BLOCK_BYTES):
            yield _unit(unit)
            unit, total, units = [], 0, units + 1
        unit.append(row)
        total += row.size
    if unit:
        yield _unit(unit)


def row_group_unit(rows: list[Row], group: RowGroup) -> pa.Table:
    return _unit(rows, (group.file.key, group.group, group.output_key))


def _unit(rows: list[Row], place: tuple[str | None, int | None, str | None] = (None, None, None)) -> pa.Table:
    table = manifest.table_of(rows)
    for name, value in zip(("file", "group", "target"), place, strict=True):
        field = UNIT_SCHEMA.field(name)
        table = table.append_column(field, pa.array([value] * len(rows), type=field.type))
    return table

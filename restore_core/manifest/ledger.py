"""Rows on disk or S3, in files that are each sorted by key, so that any number of them is read as one sorted stream.

Rows are appended as small Parquet files while a run goes on (each written whole or not at all); now and then a few of
them are made one, and of those again a few, and all at the run's end. Where a key has several rows, that of the latest
attempt counts; so a crash between any two steps costs nothing.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from restore_core.errors import ItemError, StorageError
from restore_core.manifest.rows import FOLDER, SCHEMA, Row, table_of
from restore_core.storage import Object, Storage, one_line

FILE_ROWS = 25_000
"""Of a merged file; about 4 MB, which is held of each stream of them while many are read together."""
GROUP_ROWS = 4096
"""Of them so many are held as rows."""
SMALL_FILES = 64
"""So many appended files are made one stream of files, and so many of those streams one."""
_ORDER = "attempt", "finished_at"
"""Of a key's rows the last one counts: attempts are counted from run to run, while clocks of workers may differ."""
_MOVED_AWAY = {
    "begun": "run jobs/verify_bucket.py after the restore: an interrupted one may have written over what it tells of",
    "listed": "what it tells of is listed again",
}
"""What then, where it is not the ledger itself."""
_PART = re.compile(r"part-(\d+)-(.+)\.parquet")
"""Parts with the same second half follow each other, as the result of one merge."""


class Ledger:
    """The ledger of one output: OUTPUT/_restore/manifest/*.parquet.

    Args:
        output: where the restored files go.
        run_id: of the run that writes, unique.
        folder: others hold the rows of what a run has begun to do again (`begun`, see `pipelines.restoration`), outputs
            of renamed files (`former`, see `pipelines.shards`) and what was listed (see `pipelines.listing`).
    """

    def __init__(self, output: Storage, run_id: str, folder: str = "manifest") -> None:
        self._files = output.child(f"{FOLDER}/{folder}")
        self._folder = folder
        self._run_id = run_id
        self._numbers = itertools.count()
        self._streams: list[set[str]] = []
        """Names of what this run has appended, of what that became, and so on; each time less than `SMALL_FILES`."""

    def append(self, rows: list[Row]) -> None:
        """Write rows down at once, as a file of their own. Raises StorageError."""
        key = f"{self._generation()}.parquet"
        self._write(key, _latest(table_of(rows)))
        self._count(key, 0)

    def rows(self, columns: Sequence[str] = SCHEMA.names) -> Iterator[pa.Table]:
        """The row that counts for each key, sorted by key, some thousands at a time. Raises StorageError."""
        return self._rows(self._found(), columns)

    def latest(self) -> pa.Table:
        """The same in one table, for a ledger that memory holds. Raises StorageError."""
        return pa.concat_tables([SCHEMA.empty_table(), *self.rows()])

    def superseded(self) -> Iterator[pa.Table]:
        """The rows that do not count any more, `key` and `output_key`, sorted by key. After a merge there are none."""
        for window in self._windows(self._found(), ["key", *_ORDER, "output_key"]):
            ordered = _ordered(window)
            yield ordered.filter(pc.invert(_last_of_keys(ordered))).select(["key", "output_key"])

    def merge(self, choose: Callable[[Iterator[pa.Table]], Iterator[pa.Table]] = iter) -> int:
        """Make exactly one row a key, in few files, of those that `choose` leaves.

        Returns how many of them are this run's. Interrupted anywhere, nothing is lost.
        """
        self._streams.clear()
        return self._merge(self._found(), self._generation(), choose)

    def clear(self) -> None:
        """Delete all rows, the last ones first, so that an interruption leaves the beginning. Raises ItemError."""
        for item in sorted(self._files.list(), key=_place, reverse=True):
            self._files.delete(item.key)

    def _count(self, stream: str, level: int) -> None:
        """Of many streams of a level make one of the next, so that never too many are read together."""
        if level == len(self._streams):
            self._streams.append(set())
        names = self._streams[level]
        names.add(stream)
        if len(names) == SMALL_FILES:
            generation = self._generation()
            self._merge([items for items in self._found() if _stream(items[0]) in names], generation)
            names.clear()
            self._count(generation, level + 1)

    def _found(self) -> list[list[Object]]:
        """Files that follow each other in the order of their rows, as streams."""
        streams: dict[str, list[Object]] = defaultdict(list)
        for item in self._files.list():
            if item.key.endswith(".parquet"):  # no other program's notes
                streams[_stream(item)].append(item)
        return list(streams.values())

    def _generation(self) -> str:
        return f"{self._run_id}-{next(self._numbers):06d}"

    def _rows(self, streams: list[list[Object]], columns: Sequence[str]) -> Iterator[pa.Table]:
        needed = list(dict.fromkeys([*columns, "key", *_ORDER]))
        for window in self._windows(streams, needed):
            yield _latest(window).select(list(columns))

    def _windows(self, streams: list[list[Object]], columns: list[str]) -> Iterator[pa.Table]:
        return _windows([self._read(stream, columns) for stream in streams])

    def _merge(
        self,
        streams: list[list[Object]],
        generation: str,
        choose: Callable[[Iterator[pa.Table]], Iterator[pa.Table]] = iter,
    ) -> int:
        waiting, own, parts = SCHEMA.empty_table(), 0, 0

        def write(table: pa.Table) -> None:
            nonlocal parts
            self._write(f"part-{parts:05d}-{generation}.parquet", table)
            parts += 1

        for table in choose(self._rows(streams, SCHEMA.names)):
            own += pc.sum(pc.equal(table["run_id"], self._run_id)).as_py() or 0
            waiting = pa.concat_tables([waiting, table])
            while len(waiting) >= FILE_ROWS:
                write(waiting[:FILE_ROWS])
                waiting = waiting[FILE_ROWS:]
        if len(waiting):
            write(waiting)
        for stream in streams:
            for item in stream:
                self._files.delete(item.key)
        return own

    def _read(self, stream: list[Object], columns: list[str]) -> Iterator[pa.Table]:
        """Files one after the other, of which one is in memory."""
        for item in stream:
            try:
                data, _ = self._files.read_version(item)
            except ItemError as error:
                raise StorageError(f"the ledger cannot be read: {error.message}") from error
            try:
                file = pq.ParquetFile(pa.BufferReader(data))
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group, columns)
            except (pa.ArrowException, OSError) as error:
                place = self._files.join(item.key)
                advice = _MOVED_AWAY.get(self._folder.partition("/")[0], "what it tells of is done again")
                reason = f"{place} is damaged ({one_line(str(error))})"
                raise StorageError(f"the ledger cannot be read: {reason}; move it away, and {advice}") from error

    def _write(self, key: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=GROUP_ROWS)
        try:
            self._files.write(key, sink.getvalue().to_pybytes())
        except ItemError as error:
            raise StorageError(f"the ledger cannot be written: {error.message}") from error


def _place(item: Object) -> tuple[str, int]:
    """Sorts files in the order in which their rows were appended."""
    part = _PART.fullmatch(item.key)
    return (part[2], int(part[1])) if part else (item.key.removesuffix(".parquet"), 0)


def _stream(item: Object) -> str:
    """The name that the files of one stream have in common."""
    part = _PART.fullmatch(item.key)
    return part[2] if part else item.key


def _windows(streams: list[Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """Streams sorted by key as one: all rows of a key in one table, and the keys of a table before the next one's."""
    heads = [(table, stream) for stream in streams if (table := next(stream, None)) is not None]
    while heads:
        end = min(table["key"][-1].as_py() for table, _ in heads)
        window: list[pa.Table] = []
        rest = []
        for table, stream in heads:
            count = pc.sum(pc.less_equal(table["key"], end)).as_py()
            window.append(table[:count])
            left = table[count:] if count < len(table) else next(stream, None)
            if left is not None:
                rest.append((left, stream))
        heads = rest
        yield pa.concat_tables(window)


def _latest(table: pa.Table) -> pa.Table:
    """Sorted by key, of each key the row that counts."""
    table = _ordered(table)
    return table.filter(_last_of_keys(table))


def _ordered(table: pa.Table) -> pa.Table:
    return table.sort_by([(name, "ascending") for name in ("key", *_ORDER)])


def _last_of_keys(ordered: pa.Table) -> pa.BooleanArray:
    keys = ordered["key"].combine_chunks()
    last = pc.not_equal(keys[:-1], keys[1:])
    return pa.concat_arrays([pa.array(last), pa.array([True] * min(1, len(keys)), pa.bool_())])

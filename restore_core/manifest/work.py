"""Listing minus ledger: what is left to do."""

import re
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar, get_args

import pyarrow as pa

from restore_core.errors import ErrorClass, StorageError, UsageError
from restore_core.manifest.rows import Row, rows_of
from restore_core.storage import Object

Value = TypeVar("Value")

COLUMNS = (
    "key", "size", "etag", "model", "options", "status", "error", "message", "format", "width", "height", "output_key",
    "change", "attempt", "run_id",
)  # fmt: skip
"""Of the ledger's rows, what is looked at again in a later run."""


def parse_retry(text: str | None) -> frozenset[str]:
    """The classes of failed rows that are tried again: `None` -> none, `"all"` -> all, `"read,denied"` -> those.

    Raises UsageError.
    """
    known = get_args(ErrorClass)
    if text is None:
        return frozenset()
    classes = known if text == "all" else tuple(part for part in re.split(r"[,\s]+", text) if part)
    for name in classes or ("''",):
        if name not in known:
            raise UsageError(f"--retry-failed {name}: no such class of failures; use all or some of {', '.join(known)}")
    return frozenset(classes)


class Sorted(Generic[Value]):
    """Finds ascending keys in ascending (key, value) pairs, of which it holds one.

    Raises StorageError where the pairs do not ascend.
    """

    def __init__(self, pairs: Iterable[tuple[str, Value]], name: str) -> None:
        self._pairs = ascending(pairs, name)
        self._head = next(self._pairs, None)

    def get(self, key: str) -> Value | None:
        while self._head is not None and self._head[0] < key:
            self._head = next(self._pairs, None)
        return self._head[1] if self._head is not None and self._head[0] == key else None

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None


def ascending(pairs: Iterable[tuple[str, Value]], name: str) -> Iterator[tuple[str, Value]]:
    """The pairs, as they are. Raises StorageError where a key is not greater than the one before."""
    last = None
    for key, value in pairs:
        if last is not None and key <= last:
            raise StorageError(f"{name} does not come in the order of its keys: {key!r} after {last!r}")
        yield key, value
        last = key


class Found(NamedTuple):
    """An object of the listing, held against the ledger."""

    item: Object
    row: Row | None
    """What the ledger says of it, of the columns `COLUMNS`."""
    attempt: int | None
    """The number of this attempt; None where nothing is left to do."""


def compare(
    objects: Iterable[Object],
    done: Iterable[pa.Table],
    begun: Iterable[pa.Table],
    *,
    exists: Callable[[str], bool],
    model: str,
    options: str,
    retry: Container[str],
    version: Callable[[Object], Object] = lambda item: item,
) -> Iterator[Found]:
    """Hold a listing against the ledger. All come in the order of their keys, and little of them is held.

    Done is what has a row of the same key, version, model and options whose output is (still) there, and what failed
    unless it is to be retried; but not what a run that was killed has begun to do again since.

    Args:
        objects: the input's listing.
        done: the ledger's latest rows, at least `COLUMNS`.
        begun: of those rows, the ones that were begun again: `key` and the `attempt`.
        exists: tells whether a key is in the output; asked in ascending order.
        retry: classes of failures that are tried again.
        version: of an object that is another one than its row says: what it is now, where the listing may be old.

    Raises StorageError where a listing is not sorted.
    """
    rows = Sorted(((row.key, row) for table in done for row in rows_of(table.select(COLUMNS))), "the ledger")
    again: Sorted[int] = Sorted(values(begun, "key", "attempt"), "the list of what was begun")
    for key, item in ascending(((item.key, item) for item in objects), "the input's listing"):
        row, tries = rows.get(key), again.get(key) or 0
        if row is None:
            yield Found(item, None, tries + 1)
            continue
        if (row.size, row.etag) != (item.size, item.etag):
            item = version(item)
        same = (row.size, row.etag, row.model, row.options) == (item.size, item.etag, model, options)
        if row.status == "failed":
            finished = row.error not in retry
        else:
            finished = row.output_key is not None and exists(row.output_key)
        finished = finished and tries <= row.attempt
        yield Found(item, row, None if same and finished else max(row.attempt, tries) + 1)


def unanswered(begun: Iterable[pa.Table], done: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Of what was begun again, that of which there still is a row of an earlier attempt.

    Args:
        begun: rows, sorted by key.
        done: the ledger's, at least `key` and `attempt`; not read where nothing was begun.
    """
    attempts: Sorted[int] | None = None
    for table in begun:
        attempts = attempts or Sorted(values(done, "key", "attempt"), "the ledger")
        found = ((attempts.get(key), attempt) for key, attempt in values([table], "key", "attempt"))
        yield table.filter(pa.array([done is not None and done < attempt for done, attempt in found], pa.bool_()))


def values(tables: Iterable[pa.Table], *columns: str) -> Iterator[tuple[Any, ...]]:
    """The rows of tables, of these columns."""
    for table in tables:
        yield from zip(*(table[name].to_pylist() for name in columns), strict=True)

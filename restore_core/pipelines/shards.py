"""Parquet outputs (shards) of earlier runs, where the input's files have been renamed, cut anew or lost rows since."""

import logging
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from restore_core.errors import ItemError
from restore_core.manifest import Ledger, Row, Sorted, values
from restore_core.pipelines.listing import RowGroups, files_of_shard
from restore_core.storage import Storage

logger = logging.getLogger(__name__)


def merge(
    ledger: Ledger, begun: Ledger, groups: RowGroups, output: Storage, run_id: str, written: set[str], *, whole: bool
) -> int:
    """`Ledger.merge` after a run over Parquet; what has outlived its use is deleted, or noted for a later run.

    Args:
        begun: what has been begun to be done again.
        written: the outputs that are as they should be now.
        whole: all of the input was listed, and the run was not stopped: else what is not listed may be there all the
            same.
    """
    notes = Ledger(output, run_id, folder="former")
    wanted, older, gone = targets(groups), former(ledger, notes), set[str]()
    complete = wanted <= written
    keep(notes, older, run_id)  # before the merge, after which the ledger does not tell of them
    if whole and complete:
        gone = delete(outlived(older, ledger, begun, groups), output)

    def of_the_input(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        for departed, rest in left(tables, groups, written | gone, begun.rows(("key", "attempt"))):
            older.update(departed["output_key"].to_pylist())
            yield rest

    own = ledger.merge(of_the_input if whole else iter)
    keep(notes, older - gone - (wanted if complete else set()) - {None}, run_id)
    return own


def targets(groups: RowGroups) -> set[str]:
    """Where the input's rows are written to."""
    return {group.output_key for group in groups.groups}


def left(
    tables: Iterable[pa.Table], groups: RowGroups, shards: set[str], begun: Iterable[pa.Table] = ()
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Tables of rows, sorted by key, each parted: the rows of keys that are no longer in the input and whose output has
    been written over or deleted (it is one of these, or was `begun` again), and all others."""
    listed = Sorted(((item.key, True) for item in groups.objects()), "the input's row groups")
    again: Sorted[int] = Sorted(values(begun, "key", "attempt"), "the list of what was begun")
    for table in tables:
        gone = [
            key not in listed and (output in shards or (again.get(key) or 0) > attempt)
            for key, output, attempt in values([table], "key", "output_key", "attempt")
        ]
        mask = pa.array(gone, pa.bool_())
        yield table.filter(mask), table.filter(pc.invert(mask))


def former(ledger: Ledger, notes: Ledger) -> set[str]:
    """Outputs of rows that do not count any more: in the ledger since its last merge or, before that, in the notes."""
    found = {output for table in ledger.superseded() for output in table["output_key"].to_pylist()}
    found.update(key for table in notes.rows(("key",)) for key in table["key"].to_pylist())
    return found - {None}


def outlived(shards: set[str], ledger: Ledger, begun: Ledger, groups: RowGroups) -> set[str]:
    """Of former outputs, the ones that may be deleted once all of the input has been written to others.

    One in which there still is what was made of photographs that have left the input goes only if their file has not:
    then it was exported anew without them.
    """
    tables = ledger.rows(("key", "output_key", "attempt"))
    marks = begun.rows(("key", "attempt"))
    rest = (rest for _, rest in left(tables, groups, set(), marks))
    named = {output for table in rest for output in table["output_key"].to_pylist()}
    files = {group.file.key for group in groups.groups}
    older = shards - targets(groups)
    return {shard for shard in older if shard not in named or not files.isdisjoint(files_of_shard(shard))}


def delete(shards: set[str], output: Storage) -> set[str]:
    """Returns those that are gone; what cannot be deleted is told."""
    gone = set()
    for shard in shards:
        try:
            output.delete(shard)
            gone.add(shard)
        except ItemError as error:
            logger.warning("%s", error.message)
    return gone


def keep(notes: Ledger, shards: set[str], run_id: str) -> None:
    """Note these, of which the ledger tells no more after its next merge, and forget others. Raises StorageError."""
    now = datetime.now(UTC)
    rows = [Row(key=shard, size=0, etag="", model="", options="", run_id=run_id, finished_at=now) for shard in shards]
    if rows:
        notes.append(rows)
    wanted = pa.array(sorted(shards), pa.string())
    notes.merge(lambda tables: (table.filter(pc.is_in(table["key"], wanted)) for table in tables))

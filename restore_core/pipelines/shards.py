"""Parquet outputs (shards) of earlier runs, where the input's files have been renamed, cut anew or lost rows since."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from restore_core.manifest import Ledger, Row, Sorted
from restore_core.pipelines.listing import RowGroups

_NUMBER = re.compile(r"-\d{5}\.parquet$")
"""What an output's name has more than its input file's, where that has several row groups."""

Former = dict[str, set[str]]
"""Shards of earlier runs to which nothing of the input is written now, and the keys that were done again since."""


def left(tables: Iterable[pa.Table], groups: RowGroups, shards: set[str]) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Tables of rows, sorted by key, each parted: the rows that name one of these outputs and whose key is no longer in
    the input, and all others."""
    listed = _targets_by_key(groups)
    wanted = pa.array(sorted(shards), pa.string())
    for table in tables:
        names_one = pc.is_in(table["output_key"], wanted).to_pylist()
        keys = table["key"].to_pylist()
        gone = pa.array(
            [found and listed.get(key) is None for key, found in zip(keys, names_one, strict=True)], pa.bool_()
        )
        yield table.filter(gone), table.filter(pc.invert(gone))


def former(ledger: Ledger, notes: Ledger, groups: RowGroups) -> Former:
    """Those of which rows do not count any more, in the ledger since its last merge or, before that, in the notes."""
    targets = {group.output_key for group in groups.groups}
    found: Former = defaultdict(set)
    for tables, shard, key in ((ledger.superseded(), "output_key", "key"), (notes.rows(), "output_key", "message")):
        for table in tables:
            for name, its_key in zip(table[shard].to_pylist(), table[key].to_pylist(), strict=True):
                if name is not None and name not in targets:
                    found[name].add(its_key)
    return dict(found)


def outlived(shards: Former, ledger: Ledger, groups: RowGroups) -> set[str]:
    """Of those, the ones that may be deleted, since what is in them is in others now.

    That is so where each of their rows has been written again, if only as the original (in its row group's own output,
    which another row must have been written to), or has left the input together with the file that it was in.
    """
    files = {group.file.key for group in groups.groups}
    listed = _targets_by_key(groups)
    written: set[str] = set()
    needed, alone = set[str](), set[str]()
    of_key: dict[str, list[str]] = defaultdict(list)
    for shard, keys in shards.items():
        for key in keys:
            of_key[key].append(shard)
    waiting: list[tuple[str, str | None]] = []  # shards, and the output that their rows have to be in
    for table in ledger.rows(("key", "output_key")):
        for key, output in zip(*(column.to_pylist() for column in table.columns), strict=True):
            target = listed.get(key)
            if output in shards:
                (alone if target is None else needed).add(output)
            elif output is None:
                waiting += [(shard, target) for shard in of_key.get(key, ())]
            elif target is not None:
                written.add(output)
    needed.update(shard for shard, target in waiting if target not in written)
    return {shard for shard in shards.keys() - needed if shard not in alone or not files.isdisjoint(_files_of(shard))}


def keep(notes: Ledger, shards: Former, run_id: str) -> None:
    """Note these, of which the ledger tells no more after its next merge, and forget others. Raises StorageError."""
    rows = [
        Row(
            key=f"{shard}\n{key}", size=0, etag="", model="", options="", run_id=run_id, output_key=shard, message=key,
            finished_at=datetime.now(UTC),
        )
        for shard, keys in shards.items()
        for key in keys
    ]  # fmt: skip
    if rows:
        notes.append(rows)
    wanted = pa.array(sorted(shards), pa.string())
    notes.merge(lambda tables: (table.filter(pc.is_in(table["output_key"], wanted)) for table in tables))


def _targets_by_key(groups: RowGroups) -> Sorted[str]:
    """Of each key of the input, its output."""
    rows = zip(groups.order, groups.objects(), strict=True)
    return Sorted(
        ((item.key, groups.groups[groups.group_of(row)].output_key) for row, item in rows), "the input's row groups"
    )


def _files_of(shard: str) -> set[str]:
    """The input files that it may be an output of."""
    return {shard, _NUMBER.sub(".parquet", shard)}

"""Parquet outputs, and rows of the ledger whose keys have left the input: a shard that has been written since holds
nothing of theirs any more."""

import re
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from restore_core.manifest import Ledger, Sorted
from restore_core.pipelines.listing import RowGroups
from restore_core.storage import Storage

_NUMBER = re.compile(r"-\d{5}\.parquet$")
"""What an output's name has more than its input file's, where that has several row groups."""


def left(tables: Iterable[pa.Table], groups: RowGroups, shards: set[str]) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Tables of rows, sorted by key, each parted: the rows that name one of these outputs and whose key is no longer in
    the input, and all others."""
    listed = Sorted(((item.key, True) for item in groups.objects()), "the input's row groups")
    wanted = pa.array(sorted(shards), pa.string())
    for table in tables:
        names_one = pc.is_in(table["output_key"], wanted).to_pylist()
        keys = table["key"].to_pylist()
        gone = pa.array(
            [found and listed.get(key) is None for key, found in zip(keys, names_one, strict=True)], pa.bool_()
        )
        yield table.filter(gone), table.filter(pc.invert(gone))


def outlived(ledger: Ledger, groups: RowGroups, output: Storage) -> set[str]:
    """Outputs that may be deleted: every row has been done again in others, or what was their file is in others now.

    None while one of the input's row groups has no output, such as one that could not be read: then the older ones are
    all that there is of it.
    """
    targets = {group.output_key for group in groups.groups}
    files = {group.file.key for group in groups.groups}
    replaced, named = ledger.outputs()
    obsolete = {shard for shard in replaced - targets if shard not in named or not files.isdisjoint(_files_of(shard))}
    return obsolete if obsolete and targets <= {item.key for item in output.list()} else set()


def _files_of(shard: str) -> set[str]:
    """The input files that it may be an output of."""
    return {shard, _NUMBER.sub(".parquet", shard)}

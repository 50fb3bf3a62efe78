"""Photographs of any layout -> the dataset Parquet that training reads."""

import csv
import io
import json
import logging
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from restore_core import sources
from restore_core.errors import ItemError
from restore_core.storage import Storage

logger = logging.getLogger(__name__)

ROW_GROUP_ROWS, ROW_GROUP_BYTES = 256, 2**26
SHARD_ROWS, SHARD_BYTES = 2048, 2**28
"""Whichever comes first. A row group's images are one page, which may not reach 2 GiB."""
_SHARD = re.compile(rf"({'|'.join((sources.TRAIN, sources.VALIDATION, sources.TEST))})-(\d{{5,}})\.parquet")


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Which person goes where: by the lists first, everyone else by a stable hash of the name."""

    val_share: float
    test_share: float
    lists: dict[str, set[str]]
    """split -> people"""

    def of(self, person: str) -> str:
        for split, people in self.lists.items():
            if person in people:
                return split
        return sources.split_of(person, self.val_share, self.test_share)


@dataclass
class PackResult:
    photographs: Counter[str] = field(default_factory=Counter)
    """Rows per split."""
    people: dict[str, set[str]] = field(default_factory=dict)
    broken: list[tuple[str, str, str]] = field(default_factory=list)
    """key, error class, message"""


def pack(inputs: list[Storage], output: Storage, splits: Splits, options: dict[str, Any]) -> PackResult:
    """Read every photograph under the inputs, write `<split>-NNNNN.parquet`, and list what could not be read."""
    result = PackResult()
    waiting: dict[str, list[dict[str, object]]] = {}
    sizes: Counter[str] = Counter()
    shards: Counter[str] = Counter()
    seen: set[str] = set()
    shown = time.monotonic()

    def flush(split: str) -> None:
        sink = pa.BufferOutputStream()
        table = pa.Table.from_pylist(waiting.pop(split), schema=sources.DATASET_SCHEMA)
        rows = min(ROW_GROUP_ROWS, max(1, ROW_GROUP_BYTES * len(table) // max(1, sizes.pop(split))))
        # Photographs do not compress, nor does one occur twice.
        pq.write_table(table, sink, row_group_size=rows, compression="none", use_dictionary=["group", "split"])
        if not shards:
            output.write(sources.UNFINISHED_FILE, b"")
        output.write(f"{split}-{shards[split]:05d}.parquet", sink.getvalue().to_pybytes())
        shards[split] += 1

    def row_or_error(found: sources.Found) -> dict[str, object] | ItemError:
        if isinstance(found.data, ItemError):
            return found.data
        try:
            return sources.dataset_row(found.key, splits.of(sources.group_of(found.key)), found.data)
        except ItemError as error:  # its advice is for restoring
            return ItemError(error.error, error.message.partition(";")[0])

    with ThreadPoolExecutor() as pool:
        for storage in inputs:
            files = sources.photographs(storage)
            for window in sources.windows(files, ROW_GROUP_ROWS, len):
                for found, row in zip(window, pool.map(row_or_error, window), strict=True):
                    if not isinstance(row, ItemError) and found.key in seen:
                        row = ItemError(
                            "unsupported", "another input has a file of the same name; this one is left out"
                        )
                    if isinstance(row, ItemError):
                        result.broken.append((found.key, row.error, row.message))
                        continue
                    seen.add(found.key)
                    split = str(row["split"])
                    result.photographs[split] += 1
                    result.people.setdefault(split, set()).add(str(row["group"]))
                    waiting.setdefault(split, []).append(row)
                    sizes[split] += len(found)
                    if len(waiting[split]) == SHARD_ROWS or sizes[split] >= SHARD_BYTES:
                        flush(split)
                if time.monotonic() - shown > 5:
                    shown = time.monotonic()
                    logger.info("packed %d photographs, %d broken", result.photographs.total(), len(result.broken))
    if not result.photographs:
        return result  # an older dataset in the same place stays as it is
    for split in sorted(waiting):
        flush(split)
    _remove_older_shards(output, shards)
    table = io.StringIO()
    csv.writer(table).writerows([("key", "error", "message"), *result.broken])
    output.write(sources.BROKEN_FILE, table.getvalue().encode("utf-8", "backslashreplace"))
    output.write(sources.OPTIONS_FILE, json.dumps(options, indent=2).encode())
    output.delete(sources.UNFINISHED_FILE)
    return result


def _remove_older_shards(output: Storage, shards: Counter[str]) -> None:
    """An earlier packing into the same place may have left more shards than this one wrote."""
    for item in list(output.list()):
        if (shard := _SHARD.fullmatch(item.key)) and int(shard[2]) >= shards[shard[1]]:
            output.delete(item.key)

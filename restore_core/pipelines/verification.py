"""Proof of a finished restore: the input's listing, the ledger and the output's files held against each other."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from restore_core import manifest, sources
from restore_core.errors import ItemError
from restore_core.manifest import Ledger
from restore_core.pipelines import cluster
from restore_core.pipelines.listing import is_parquet, list_input, list_row_groups
from restore_core.storage import Object, Storage

Finding = Literal["unaccounted", "outdated", "missing", "changed", "unreadable", "extra", "temporary"]
MEANING: dict[Finding, str] = {
    "unaccounted": "in the input, but not in the ledger: run the restore again",
    "outdated": "the input has changed since it was restored: run the restore again",
    "missing": "in the ledger, but not in the output: run the restore again",
    "changed": "the output is not what the ledger says was written: delete it and run the restore again",
    "unreadable": "the output cannot be read: check its permissions",
    "extra": "in the output, but no row of the ledger names it: left by an interrupted restore, or somebody else's",
    "temporary": "an unfinished write of an interrupted restore: delete it",
}
"""What is wrong with an object, and what to do."""

IO_THREADS = 8
UNIT_FILES = 256
FINDINGS = pa.schema([("finding", pa.string()), ("key", pa.string())])


@dataclass(frozen=True)
class Verification:
    listed: int
    """Objects in the input."""
    statuses: dict[str, int]
    """Their rows by status."""
    hashed: int
    """Outputs read and compared."""
    findings: list[tuple[Finding, str]]
    """What is wrong, and with which key (of the input, or for extra and temporary ones of the output)."""


def verify(input: Storage, output: Storage) -> Verification:
    """Compare. Reads everything that was written, in parallel on the cluster; changes nothing.

    Raises UsageError when there is no input, StorageError when something cannot be listed.
    """
    objects = list_input(input)
    groups = list_row_groups(input, objects) if is_parquet(objects) else []
    if groups:
        objects = [item for group in groups for item in group.objects]
    ledger = Ledger(output, manifest.new_run_id()).latest()
    written = ledger.filter(pa.compute.is_valid(ledger["output_key"]))
    known = {*written["output_key"].to_pylist(), *(group.output_key for group in groups)}
    findings: list[tuple[Finding, str]] = [*_of_listing(objects, ledger), *_of_files(output, known)]
    findings += _of_contents(written, output)
    listed = ledger.filter(pa.compute.is_in(ledger["key"], pa.array([item.key for item in objects], pa.string())))
    return Verification(
        listed=len(objects), statuses=manifest.counts(listed, "status"), hashed=len(written), findings=findings
    )


def _of_listing(objects: list[Object], ledger: pa.Table) -> Iterator[tuple[Finding, str]]:
    """Every object has a row, of the version that is there now."""
    versions = dict(
        zip(
            ledger["key"].to_pylist(),
            zip(ledger["size"].to_pylist(), ledger["etag"].to_pylist(), strict=True),
            strict=True,
        )
    )
    for item in objects:
        if item.key not in versions:
            yield "unaccounted", item.key
        elif versions[item.key] != (item.size, item.etag):
            yield "outdated", item.key


def _of_files(output: Storage, known: set[str]) -> Iterator[tuple[Finding, str]]:
    """Nothing else was written. Names on a disk that has no upper case, say, are found by `_of_contents`."""
    own = f"{manifest.FOLDER}/"
    for item in output.list():
        if item.key not in known and not item.key.startswith(own):
            yield "extra", item.key
    for key in output.unfinished():
        yield "temporary", key


def _of_contents(written: pa.Table, output: Storage) -> list[tuple[Finding, str]]:
    """Every output is there and hashes to its row."""
    if not len(written):
        return []
    # The rows of a Parquet shard stay together, so that it is read once.
    rows = written.select(["key", "output_key", "output_sha256"]).sort_by("output_key")
    files = _by_file(rows)
    units = [
        pa.Table.from_pylist([row for file in files[start : start + UNIT_FILES] for row in file], schema=rows.schema)
        for start in range(0, len(files), UNIT_FILES)
    ]
    cluster.connect()
    dataset = ray.data.from_arrow(units).map_batches(
        _check_unit, batch_size=None, batch_format="pyarrow", fn_args=(output,)
    )
    tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    return [(row["finding"], row["key"]) for table in tables for row in table.to_pylist()]


def _check_unit(unit: pa.Table, output: Storage) -> pa.Table:
    files = _by_file(unit)
    with ThreadPoolExecutor(IO_THREADS) as pool:
        found = [row for rows in pool.map(lambda file: _check_file(file, output), files) for row in rows]
    return pa.Table.from_pylist(found, schema=FINDINGS)


def _by_file(rows: pa.Table) -> list[list[dict[str, str]]]:
    return [list(group) for _, group in groupby(rows.to_pylist(), key=lambda row: row["output_key"])]


def _check_file(rows: list[dict[str, str]], output: Storage) -> list[dict[str, str]]:
    """The findings about one output file, which several rows have in common where it is a Parquet shard."""
    name = rows[0]["output_key"]
    try:
        data = output.read(name)
        images = [data] if rows[0]["key"] == name else _images_of_shard(data)
    except ItemError as error:
        finding = "missing" if error.error == "vanished" else "unreadable"
        return [{"finding": finding, "key": row["key"]} for row in rows]
    except (OSError, pa.ArrowException):  # no longer a Parquet file
        images = []
    there = Counter(hashlib.sha256(image).hexdigest() for image in images)
    expected = Counter(row["output_sha256"] for row in rows)
    return [
        {"finding": "changed", "key": row["key"]}
        for row in rows
        if there[row["output_sha256"]] < expected[row["output_sha256"]]
    ]


def _images_of_shard(data: bytes) -> list[bytes]:
    table = pq.read_table(pa.BufferReader(data))
    return [image for image in sources.image_bytes(table[sources.image_column(table.schema)]) if image]

"""Proof of a finished restore: the input's listing, the ledger and the output's files held against each other."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from restore_core import manifest, sources
from restore_core.errors import ItemError, UsageError
from restore_core.manifest import Ledger, Sorted, values
from restore_core.pipelines import cluster
from restore_core.pipelines.listing import Input, RowGroups, list_input
from restore_core.storage import Object, Storage

Finding = Literal["unaccounted", "outdated", "missing", "changed", "unreadable", "extra", "temporary"]
MEANING: dict[Finding, str] = {
    "unaccounted": "in the input, but not in the ledger: run the restore again",
    "outdated": "the input has changed since it was restored: run the restore again",
    "missing": "in the ledger, but not in the output: run the restore again, or, if it is not in the input either, "
    "look for a copy",
    "changed": "the output is not what the ledger says was written: delete it and run the restore again",
    "unreadable": "the output cannot be read: check its permissions",
    "extra": "in the output, but no row of the ledger names it: left by an interrupted restore, of an input whose "
    "newer version failed, or somebody else's",
    "temporary": "an unfinished write of an interrupted restore: run the restore again, which removes it",
}
"""What is wrong with an object, and what to do."""

IO_THREADS = 8
UNIT_FILES, UNIT_SHARDS, WAVE_UNITS = 256, 8, 1000
"""Files and Parquet shards that are read by one task, and tasks that are handed to Ray at once."""
SHARD_ROWS = 64
ROWS = ("key", "size", "etag", "output_key", "output_sha256", "input_sha256")
WRITTEN = pa.schema(
    [(name, pa.string()) for name in ("key", "output_sha256", "input_sha256", "file")]
    + [(name, pa.int64()) for name in ("row", "rows")]
)
"""Of the ledger; and the output file, which row of it where it is a Parquet shard of the input's, of how many."""
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


def verify(input: Storage, output: Storage, keys: str | None = None) -> Verification:
    """Compare. Reads everything that was written, in parallel on the cluster; changes nothing.

    Args:
        keys: the list that the restore was given, see `key_list`.

    Raises UsageError when there is no input, StorageError when something cannot be listed.
    """
    listing = list_input(input, keys)
    targets = [group.output_key for group in listing.groups.groups] if listing.groups else []
    ledger = Ledger(output, manifest.new_run_id())
    statuses: Counter[str] = Counter()
    findings = list(_of_listing(listing, ledger, statuses))
    listed = statuses.total() + sum(finding == "unaccounted" for finding, _ in findings)
    findings += _of_files(output, ledger, targets)
    hashed = 0
    for wave in _waves(ledger, listing.groups):
        hashed += sum(pc.count(unit["output_sha256"]).as_py() for unit in wave)
        findings += _of_contents(wave, output)
    return Verification(listed=listed, statuses=dict(sorted(statuses.items())), hashed=hashed, findings=findings)


def _of_listing(listing: Input, ledger: Ledger, statuses: Counter[str]) -> Iterator[tuple[Finding, str]]:
    """Every object has a row, of the version that is there now. Counts the rows by their status."""
    columns = ("key", "size", "etag", "status")
    rows = Sorted(((row[0], row[1:]) for row in values(ledger.rows(columns), *columns)), "the ledger")
    for item in listing.objects:
        row = rows.get(item.key)
        if row is None:
            yield "unaccounted", item.key
            continue
        size, etag, status = row
        statuses[status] += 1
        if (size, etag) != (item.size, item.etag) and Object(item.key, size, etag) != listing.version(item):
            yield "outdated", item.key


def _of_files(output: Storage, ledger: Ledger, targets: list[str]) -> Iterator[tuple[Finding, str]]:
    """Nothing else was written. Names on a disk that has no upper case, say, are found by `_of_contents`."""
    shards, own, columns = set(targets), f"{manifest.FOLDER}/", ("key", "output_key")
    shards.update(target for key, target in values(ledger.rows(columns), *columns) if target not in (None, key))
    files = ((key, True) for key, target in values(ledger.rows(columns), *columns) if target == key)
    known = Sorted(files, "the ledger")
    for item in output.list():
        if item.key not in known and item.key not in shards and not item.key.startswith(own):
            yield "extra", item.key
    for key in output.unfinished():
        yield "temporary", key


def _waves(ledger: Ledger, groups: RowGroups | None) -> Iterator[list[pa.Table]]:
    """What was written, as `WRITTEN`, in units; the rows of a Parquet shard stay together, failed ones too."""
    shards = []
    waiting, wave = WRITTEN.empty_table(), list[pa.Table]()
    for table in ledger.rows(ROWS):
        single = pc.fill_null(pc.equal(table["key"], table["output_key"]), fill_value=False)
        shards.append(table.filter(pc.invert(single)))
        waiting = pa.concat_tables([waiting, _without_places(table.filter(single))])
        while len(waiting) >= UNIT_FILES:
            wave.append(waiting[:UNIT_FILES])
            waiting = waiting[UNIT_FILES:]
        if len(wave) >= WAVE_UNITS:
            yield wave
            wave = []
    wave.append(waiting)
    if shards:
        wave += _by_shards(_of_shards(pa.concat_tables(shards), groups))
    yield [unit for unit in wave if len(unit)]


def _of_shards(rows: pa.Table, groups: RowGroups | None) -> pa.Table:
    """Rows whose output is part of a file, sorted by it, with their places there as far as the input still tells."""
    if groups is None:
        found = rows.filter(pc.is_valid(rows["output_key"]))
        return _without_places(found).sort_by("file")
    rows = rows.join(groups.places(), "key")
    written = pc.is_valid(rows["output_key"])
    # The rows of another version of the input may have been others, in another order.
    same = pc.and_(pc.equal(rows["size"], rows["file_size"]), pc.equal(rows["etag"], rows["file_etag"]))
    same = pc.fill_null(pc.and_(same, pc.equal(pc.coalesce(rows["output_key"], rows["file"]), rows["file"])), False)
    # Where no row has an output, the shard is of an earlier run, or not there.
    known = rows.filter(pc.and_(same, pc.is_in(rows["file"], rows.filter(written)["output_key"])))
    others = _without_places(rows.filter(pc.and_(written, pc.invert(same))))
    found = pa.concat_tables([known.select(WRITTEN.names).cast(WRITTEN), others])
    return found.sort_by([("file", "ascending"), ("row", "ascending")])


def _without_places(rows: pa.Table) -> pa.Table:
    nulls = pa.nulls(len(rows), pa.int64())
    columns = [rows[name] for name in ("key", "output_sha256", "input_sha256", "output_key")]
    return pa.table([*columns, nulls, nulls], schema=WRITTEN)


def _by_shards(rows: pa.Table) -> Iterator[pa.Table]:
    """Rows that are sorted by file, some files at a time."""
    files = rows["file"].combine_chunks()
    starts = pc.indices_nonzero(pc.not_equal(files[1:], files[:-1])).to_numpy() + 1
    ends = [0, *starts[UNIT_SHARDS - 1 :: UNIT_SHARDS], len(rows)]
    for start, end in pairwise(ends):
        yield rows[start:end]


def _of_contents(units: list[pa.Table], output: Storage) -> list[tuple[Finding, str]]:
    """Every output is there and hashes to its row."""
    if not units:
        return []
    cluster.connect()
    dataset = ray.data.from_arrow(units).map_batches(
        _check_unit, batch_size=None, batch_format="pyarrow", fn_args=(output,)
    )
    tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    return [(row["finding"], row["key"]) for table in tables for row in table.to_pylist()]


def _check_unit(unit: pa.Table, output: Storage) -> pa.Table:
    files = _by_file(unit)
    shards = files[0][0]["key"] != files[0][0]["file"]  # of which one is held at a time
    with ThreadPoolExecutor(1 if shards else IO_THREADS) as pool:
        found = [row for rows in pool.map(lambda file: _check_file(file, output), files) for row in rows]
    return pa.Table.from_pylist(found, schema=FINDINGS)


def _by_file(rows: pa.Table) -> list[list[dict[str, Any]]]:
    return [list(group) for _, group in groupby(rows.to_pylist(), key=lambda row: (row["file"], row["row"] is None))]


def _check_file(rows: list[dict[str, Any]], output: Storage) -> list[dict[str, str]]:
    """The findings about one output file, which several rows have in common where it is a Parquet shard."""
    name = rows[0]["file"]
    try:
        data = sources.read(output, name)
    except ItemError as error:
        finding = "missing" if error.error == "vanished" else "unreadable"
        return [{"finding": finding, "key": row["key"]} for row in rows if row["output_sha256"]]
    hashes: list[str | None]
    try:
        hashes = [hashlib.sha256(data).hexdigest()] if rows[0]["key"] == name else list(_hashes_of_shard(data))
    except (OSError, pa.ArrowException, UsageError):  # no longer a Parquet file of images
        hashes = []
    right = _in_their_places if rows[0]["row"] is not None else _anywhere
    return [
        {"finding": "changed", "key": row["key"]}
        for row, well in zip(rows, right(rows, hashes), strict=True)
        if not well
    ]


def _in_their_places(rows: list[dict[str, Any]], hashes: list[str | None]) -> Iterator[bool]:
    """Whether each row's image is what was written, or, where it has failed, the original; and none is too many."""
    for row in rows:
        expected = row["output_sha256"] or row["input_sha256"]
        yield len(hashes) == row["rows"] and (expected is None or hashes[row["row"]] == expected)


def _anywhere(rows: list[dict[str, Any]], hashes: list[str | None]) -> Iterator[bool]:
    """The same of one file, or of a shard of which the input no longer tells the order."""
    there, expected = Counter(hashes), Counter(row["output_sha256"] for row in rows)
    for row in rows:
        yield there[row["output_sha256"]] >= expected[row["output_sha256"]]


def _hashes_of_shard(data: bytes) -> Iterator[str | None]:
    """Of the images. All columns are read, since each page has a checksum."""
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    column = sources.image_column(file.schema_arrow)
    for batch in file.iter_batches(SHARD_ROWS):
        for image in sources.image_bytes(pa.table(batch)[column]):
            yield None if image is None else hashlib.sha256(image).hexdigest()

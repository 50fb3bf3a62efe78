"""What there is to do: the input's listing, cut into units that are done together."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from restore_core import manifest, sources
from restore_core.errors import UsageError
from restore_core.manifest import Row
from restore_core.storage import Object, Storage

BLOCK_BYTES = 16 * 2**20
"""Encoded bytes that go to an actor at once: about 300 MB of pixels for JPEG."""


def is_parquet(objects: list[Object]) -> bool:
    """The input is taken as Parquet when every file in it is."""
    return all(item.key.endswith(".parquet") for item in objects)


def list_input(storage: Storage) -> list[Object]:
    """Every object but those of an earlier restore's own folder. Raises UsageError when there are none."""
    own = f"{manifest.FOLDER}/"
    objects = [item for item in storage.list() if not item.key.startswith(own)]
    dataset = [item for item in objects if not sources.is_internal(item.key)]
    if dataset and is_parquet(dataset):
        return dataset  # without what jobs/pack_dataset.py says about it
    if not objects:
        raise UsageError(f"--input {storage.uri}: no files there; check the path or prefix")
    return objects


@dataclass(frozen=True)
class RowGroup:
    """One row group of an input Parquet file: its rows stand in the ledger like objects."""

    file: str
    group: int
    objects: list[Object]
    output_key: str


def list_row_groups(storage: Storage, files: list[Object]) -> list[RowGroup]:
    """The rows of all Parquet files. A row's key is its column `key`, else FILE#ROW. Raises UsageError."""
    groups: list[RowGroup] = []
    seen: set[str] = set()
    targets: dict[str, str] = {}
    for item in files:
        place = f"--input {storage.join(item.key)}"
        with sources.open_parquet(storage, item.key, "--input") as file:
            sources.image_column(file.schema_arrow, place)
            keyed = "key" in file.schema_arrow.names
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if keyed:
                    keys = [str(key) for key in file.read_row_group(group, columns=["key"])["key"].to_pylist()]
                else:
                    keys = [f"{item.key}#{first + row}" for row in range(count)]
                first += count
                for key in keys:
                    if key in seen:
                        raise UsageError(f"{place}: key {key!r} occurs twice; make keys unique")
                    seen.add(key)
                suffix = "" if file.num_row_groups == 1 else f"-{group:05d}"
                target = item.key.removesuffix(".parquet") + suffix + ".parquet"
                if targets.setdefault(target, item.key) != item.key:
                    raise UsageError(f"{place}: its output {target} is also that of {targets[target]}; rename one")
                groups.append(
                    RowGroup(
                        file=item.key,
                        group=group,
                        objects=[Object(key, item.size, item.etag) for key in keys],
                        output_key=target,
                    )
                )
    if not seen:
        raise UsageError(f"--input {storage.uri}: no rows in its Parquet files; check the path or prefix")
    return groups


UNIT_SCHEMA = pa.schema(
    [*manifest.SCHEMA, pa.field("file", pa.string()), pa.field("group", pa.int32()), pa.field("target", pa.string())]
)
"""A block of the dataset: rows that are done together. For Parquet: their file, row group and output key."""


def object_units(rows: Iterable[Row], batch_size: int) -> Iterator[pa.Table]:
    """Units of at most `batch_size` objects and `BLOCK_BYTES` encoded bytes."""
    unit: list[Row] = []
    for row in rows:
        if unit and (len(unit) == batch_size or sum(r.size for r in unit) + row.size > BLOCK_BYTES):
            yield _unit(unit)
            unit = []
        unit.append(row)
    if unit:
        yield _unit(unit)


def row_group_unit(rows: list[Row], group: RowGroup) -> pa.Table:
    return _unit(rows, group)


def _unit(rows: list[Row], group: RowGroup | None = None) -> pa.Table:
    place = (group.file, group.group, group.output_key) if group else (None, None, None)
    table = manifest.table_of(rows)
    for name, value in zip(("file", "group", "target"), place, strict=True):
        field = UNIT_SCHEMA.field(name)
        table = table.append_column(field, pa.array([value] * len(rows), type=field.type))
    return table

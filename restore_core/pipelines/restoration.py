"""Ray Data around the stages: the listing, the actor pool, the ledger as it grows, and the account at the end.

On CPUs one actor does everything for an object, since moving pixels between processes costs more than it gains; with
GPUs, tasks on the CPUs decode and encode around the actors that hold the model.
"""

import contextlib
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch

from restore_core import codec, manifest, provenance, sources
from restore_core.checkpoint import ModelFolder
from restore_core.config import KINDS, Kind
from restore_core.errors import ItemError, UsageError
from restore_core.inference import check_repair
from restore_core.lease import Lease
from restore_core.manifest import Ledger, Retry, Row
from restore_core.pipelines import cluster, stages
from restore_core.pipelines.listing import (
    RowGroup,
    is_parquet,
    list_input,
    list_row_groups,
    object_units,
    row_group_unit,
)
from restore_core.pipelines.stages import RestoreRun
from restore_core.storage import Object, Storage

logger = logging.getLogger(__name__)

FLUSH_ROWS, FLUSH_SECONDS = 2000, 10.0
"""The ledger is written down after so many rows or seconds: what a killed driver has to do again."""
PROGRESS_SECONDS = 5.0
VERDICT_ROWS = 1000
"""So many have to be done before a run is stopped because too many fail, as S3 Batch Operations does."""
DENIED_ROWS = 100
"""It is stopped after so many if access was denied to each of them: more photographs would be worked on for nothing."""
IO_THREADS = 8
"""Objects fetched, decoded, encoded and written at once in each actor."""
LEASE_FILE = f"{manifest.FOLDER}/lease.json"
RUN_FILE = f"{manifest.FOLDER}/run.json"
SAMPLES, SAMPLE_PIXELS = 12, 2**24
"""Of the report: how many photographs it shows, and how large one may be for it."""
LOST_ROW = "working on it failed twice, the second time on this object alone: a crash, a hang, or see the log above"
LOST_ROW_GROUP = "working on its row group failed twice: one of the images there crashes or hangs, or see the log above"
INTERRUPTED = "interrupted; the same command goes on from here"
NO_RETRY = Retry()
RESULT_OPTIONS = ("strip_metadata", "repair", "self_ensemble")
"""Options that decide what a restored file looks like; with another value it is done again."""


@dataclass(frozen=True, kw_only=True)
class RestoreOptions:
    model: str
    device: cluster.Device = "auto"
    workers: int | None = None
    batch_size: int = 16
    max_pixels: int
    strip_metadata: bool = False
    frames: codec.Frames = "refuse"
    repair: tuple[Kind, ...] = KINDS
    self_ensemble: bool = False
    max_change: float | None = None
    """Results that differ more from the input are not written: mean absolute difference, of 255."""
    retry: Retry = NO_RETRY
    max_failed_share: float = 1.0
    """When more of the objects of this run have failed, it is stopped, but not before `VERDICT_ROWS` are done."""


class _TooManyFailures(Exception):
    pass


@dataclass(frozen=True)
class Summary:
    listed: int
    already_done: int
    """Of them, finished by earlier runs."""
    statuses: dict[str, int]
    """Rows by status, over everything listed."""
    errors: dict[str, int]
    seconds: float
    rows: pa.Table
    """The ledger's rows of everything listed."""
    record: dict[str, Any]
    """What run.json holds."""
    stopped: str | None
    """Why it ended before all was done; those left out have no row yet, or an old one."""
    samples: list[tuple[Row, bytes, bytes]]
    """Some restored photographs: row, input file, output file."""

    @property
    def failed_share(self) -> float:
        return self.statuses.get("failed", 0) / max(1, self.listed)

    @property
    def interrupted(self) -> bool:
        """Whether it was stopped by a signal: Ctrl-C, or SIGTERM as from `ray job stop`."""
        return self.stopped == INTERRUPTED

    @property
    def images_per_second(self) -> float:
        return float(self.record["images_per_second"])


# --- In the actors -------------------------------------------------------------------------------------------------


class Stage:
    """What all actors have: the run, threads for reading, coding and writing, and processes for the codec."""

    def __init__(self, run: "list[ray.ObjectRef[RestoreRun]]") -> None:
        self.run: RestoreRun = ray.get(run[0])
        torch.set_num_threads(self.run.threads)
        self.pool = ThreadPoolExecutor(IO_THREADS)
        self.codecs = codec.Processes(max(2, self.run.threads), self.run.max_pixels)


class RestoreUnit(Stage):
    """Everything for a unit, in one process that holds the model. unit -> ledger rows"""

    def __init__(self, run: "list[ray.ObjectRef[RestoreRun]]", batch_size: int) -> None:
        super().__init__(run)
        self.batch_size = batch_size
        self.restorer = self.run.restorer()

    def __call__(self, unit: pa.Table) -> pa.Table:
        rows = manifest.rows_of(unit.select(manifest.SCHEMA.names))
        file, group, target = (unit[name][0].as_py() for name in ("file", "group", "target"))
        if file is None:
            return manifest.table_of(stages.restore_objects(rows, self.run, self.restorer, self.pool, self.codecs))
        return manifest.table_of(
            stages.restore_row_group(
                rows, file, group, target, self.run, self.restorer, self.pool, self.codecs, self.batch_size
            )
        )


class DecodeUnit(Stage):
    """unit -> items with pixels, in one table or more"""

    def __call__(self, unit: pa.Table) -> Iterator[pa.Table]:
        rows = manifest.rows_of(unit.select(manifest.SCHEMA.names))
        items = stages.each(self.pool, lambda row: stages.fetch(stages.Item(row), self.run), rows)
        for group in stages.groups(items, self.run, self.codecs, self.pool):
            yield stages.items_to_table(stages.decode(group, self.run, self.codecs, self.pool))


class RestoreItems(Stage):
    """items with pixels -> items with restored pixels"""

    def __init__(self, run: "list[ray.ObjectRef[RestoreRun]]") -> None:
        super().__init__(run)
        self.restorer = self.run.restorer()

    def __call__(self, table: pa.Table) -> pa.Table:
        items = stages.items_of_table(table)
        stages.restore(items, self.restorer)
        return stages.items_to_table(items)


class WriteItems(Stage):
    """items with restored pixels -> ledger rows"""

    def __call__(self, table: pa.Table) -> pa.Table:
        files = stages.files_of(stages.items_of_table(table))
        return manifest.table_of(
            stages.each(self.pool, lambda frames: stages.encode_and_write(frames, self.run, self.codecs), files)
        )


def build_dataset(
    units: list[pa.Table],
    run: RestoreRun,
    *,
    actors: int,
    batch_size: int,
    separate: bool,
    gpus: float,
    alone: bool = False,
) -> ray.data.Dataset:
    """The graph: one fused stage, or decode -> restore -> write in processes of their own (`separate`).

    With `alone` no unit waits at an actor while another is worked on, so that a crash costs the one that caused it.
    """
    shared = [ray.put(run)]  # in a list, since Ray would resolve a bare reference itself, once for each actor
    # A crashed actor is started again and its unit tried once more; a unit that fails twice is left out, and found
    # missing in the ledger afterwards. (Finite max_restarts with max_errored_blocks=-1 hangs: ray#62746.)
    robust: dict[str, Any] = {
        "batch_size": None,
        "batch_format": "pyarrow",
        "max_restarts": -1,
        "max_task_retries": 1,
        "runtime_env": {"env_vars": cluster.KEEP_MEMORY},
    }
    held = {**robust, "fn_constructor_args": (shared,), "num_cpus": 1}
    dataset = ray.data.from_arrow(units)
    pool = ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1 if alone else None)
    with warnings.catch_warnings():
        # max_task_retries has no other way in yet; without it a poisoned unit would be tried for ever.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", DeprecationWarning)
        if not separate:
            held["fn_constructor_args"] = (shared, batch_size)
            return dataset.map_batches(RestoreUnit, compute=pool, num_gpus=gpus, **held)
        around = ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, cluster.resources()[0] // 2))
        dataset = dataset.map_batches(DecodeUnit, compute=around, **held)
        dataset = dataset.map_batches(RestoreItems, compute=pool, num_gpus=gpus, **held)
        return dataset.map_batches(WriteItems, compute=around, **held)


# --- In the driver -------------------------------------------------------------------------------------------------


def restore(
    input: Storage, output: Storage, model: ModelFolder, options: RestoreOptions, command: list[str]
) -> Summary:
    """Restore everything that the ledger does not yet account for, and close the account.

    Raises UsageError before anything is written when input, output or cluster cannot work.
    """
    check_repair(model, options.repair)
    objects = list_input(input)
    groups = list_row_groups(input, objects) if is_parquet(objects) else None
    if groups is not None:
        objects = [item for group in groups for item in group.objects]
    run_id = manifest.new_run_id()
    with Lease(output, LEASE_FILE, run_id) as lease:
        return _restore(input, objects, groups, output, model, options, command, run_id, lease)


def _restore(
    input: Storage,
    objects: list[Object],
    groups: list[RowGroup] | None,
    output: Storage,
    model: ModelFolder,
    options: RestoreOptions,
    command: list[str],
    run_id: str,
    lease: Lease,
) -> Summary:
    """The same for what has been listed, while nobody else writes there."""
    ledger = Ledger(output, run_id)
    deciding = {name: getattr(options, name) for name in RESULT_OPTIONS}
    if options.max_change is not None:
        deciding["max_change"] = options.max_change
    if options.frames != "refuse":
        deciding["frames"] = options.frames
    identity = manifest.options_hash(deciding)
    existing = {item.key for item in output.list()}
    before = ledger.latest()
    work = {
        item.key: Row(
            key=item.key, size=item.size, etag=item.etag, model=model.sha256, options=identity, attempt=attempt,
            run_id=run_id,
        )
        for item, attempt in manifest.left_to_do(
            objects, before, model=model.sha256, options=identity, retry=options.retry, exists=existing
        )
    }  # fmt: skip
    started = time.perf_counter()
    logger.info("%d objects listed, %d of them left to do", len(objects), len(work))
    stopped = None
    try:
        if work:
            _run(work, groups, input, output, model, options, ledger, lease)
    except _TooManyFailures as verdict:
        stopped = str(verdict)
    except KeyboardInterrupt:
        stopped = INTERRUPTED
    if stopped:
        logger.info("stopped: %s", stopped)
    lease.check()
    merged = ledger.merge()
    if groups is not None:
        _remove_outdated(output, before, merged, targets={group.output_key for group in groups})
    output.remove_unfinished(before=lease.since)
    table = _of_listing(merged, objects)
    seconds = time.perf_counter() - started
    assert stopped or len(table) == len(objects), "the ledger does not close: a bug"
    statuses, errors = manifest.counts(table, "status"), manifest.counts(table, "error")
    record = {
        "run_id": run_id,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "options": {**asdict(options), "retry": sorted(options.retry.classes)},
        "model": {"name": model.name, "sha256": model.sha256},
        "versions": provenance.versions(),
        "listed": len(objects),
        "already_done": len(objects) - len(work),
        "statuses": statuses,
        "errors": errors,
        "stopped": stopped,
        "seconds": round(seconds, 3),
        "images_per_second": round(table["run_id"].to_pylist().count(run_id) / max(1e-9, seconds), 3),
    }
    output.write(RUN_FILE, json.dumps(record, indent=2).encode())
    return Summary(
        listed=len(objects),
        already_done=len(objects) - len(work),
        statuses=statuses,
        errors=errors,
        seconds=seconds,
        rows=table,
        record=record,
        stopped=stopped,
        samples=_samples(table, input, output, groups),
    )


def _run(
    work: dict[str, Row],
    groups: list[RowGroup] | None,
    input: Storage,
    output: Storage,
    model: ModelFolder,
    options: RestoreOptions,
    ledger: Ledger,
    lease: Lease,
) -> None:
    cluster.connect()
    device = cluster.pick_device(options.device)
    cpus, gpus = cluster.resources()
    most = gpus if device == "cuda" else cpus
    if most == 0:
        raise UsageError(f"--device {device}: the cluster has 0 CPUs for work now; add a worker node (min_workers: 1)")
    actors = options.workers or most
    if actors > most:
        raise UsageError(
            f"--workers {actors}: the cluster has {most} {'GPUs' if device == 'cuda' else 'CPUs'}; "
            f"use --workers {most} or add nodes"
        )
    run = RestoreRun(
        input=input,
        output=output,
        model=model,
        device=device,
        threads=1 if device == "cuda" else max(1, cpus // actors),
        max_pixels=options.max_pixels,
        strip_metadata=options.strip_metadata,
        frames=options.frames,
        repair=options.repair,
        self_ensemble=options.self_ensemble,
        max_change=options.max_change,
    )
    account = _Account(ledger, lease, total=len(work), max_failed_share=options.max_failed_share)
    context = ray.data.DataContext.get_current()
    allowed, context.max_errored_blocks = context.max_errored_blocks, -1
    try:
        # What is missing after the first pass was beside something that killed its actor; in the second it is alone.
        for alone in (False, True):
            missing = {key: row for key, row in work.items() if key not in account.done}
            if not missing:
                break
            if groups is None:
                units = list(object_units(missing.values(), 1 if alone else _unit_size(options, len(missing), actors)))
            else:
                units = [
                    row_group_unit([_row_of(item, work, missing) for item in group.objects], group)
                    for group in groups
                    if any(item.key in missing for item in group.objects)
                ]
            dataset = build_dataset(
                units,
                run,
                actors=min(actors, len(units)),
                batch_size=options.batch_size,
                separate=device == "cuda" and groups is None,
                gpus=1 if device == "cuda" else 0,
                alone=alone,
            )
            account.follow(dataset)
        for key, row in work.items():
            if key not in account.done:
                row.fail("decode", LOST_ROW if groups is None else LOST_ROW_GROUP)
                stages.finish(row)
                account.add([row])
    finally:
        context.max_errored_blocks = allowed
        account.flush()


def _unit_size(options: RestoreOptions, count: int, actors: int) -> int:
    """Small jobs in small units, so that every actor gets its share."""
    return max(1, min(options.batch_size, math.ceil(count / (2 * actors))))


def _row_of(item: Object, work: dict[str, Row], missing: dict[str, Row]) -> Row:
    """A row group is done as a whole, so rows of it that were finished already are done again."""
    if item.key in missing:
        return missing[item.key]
    other = next(iter(missing.values()))
    return replace(work.get(item.key, other), key=item.key, size=item.size, etag=item.etag)


class _Account:
    """Rows as they come from the actors: into the ledger in time, onto the terminal in short."""

    def __init__(self, ledger: Ledger, lease: Lease, total: int, max_failed_share: float) -> None:
        self.done: set[str] = set()
        self._lease = lease
        self._ledger = ledger
        self._total = total
        self._max_failed_share = max_failed_share
        self._failed = self._denied = 0
        self._waiting: list[Row] = []
        self._started = self._flushed = self._shown = time.monotonic()

    def follow(self, dataset: ray.data.Dataset) -> None:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            self.add(manifest.rows_of(table))

    def add(self, rows: list[Row]) -> None:
        self._lease.check()
        self._waiting += rows
        self.done.update(row.key for row in rows)
        self._failed += sum(row.status == "failed" for row in rows)
        self._denied += sum(row.error == "denied" for row in rows)
        now = time.monotonic()
        if len(self._waiting) >= FLUSH_ROWS or now - self._flushed > FLUSH_SECONDS:
            self.flush()
        if now - self._shown > PROGRESS_SECONDS:
            self._shown = now
            rate = len(self.done) / (now - self._started)
            left = max(0, self._total - len(self.done)) / rate
            logger.info(
                "%d of %d done, %d failed, %.1f images/s, about %.0f s left",
                len(self.done), self._total, self._failed, rate, left,
            )  # fmt: skip
        if self._denied == len(self.done) >= DENIED_ROWS and self._max_failed_share < 1:
            raise _TooManyFailures(
                f"access was denied to each of the first {self._denied} objects (the last: {rows[-1].message}); "
                f"{self._total - len(self.done)} were left alone"
            )
        if len(self.done) >= VERDICT_ROWS and self._failed > self._max_failed_share * len(self.done):
            raise _TooManyFailures(
                f"{self._failed} of the first {len(self.done)} objects failed, more than --max-failed-share "
                f"{self._max_failed_share:g}; {self._total - len(self.done)} were left alone"
            )

    def flush(self) -> None:
        if self._waiting:
            self._ledger.append(self._waiting)
        self._waiting = []
        self._flushed = time.monotonic()


def _remove_outdated(output: Storage, before: pa.Table, after: pa.Table, targets: set[str]) -> None:
    """Delete shards that no row is in any more, as when an input file has another number of row groups than before."""
    for key in set(before["output_key"].to_pylist()) - set(after["output_key"].to_pylist()) - targets - {None}:
        output.delete(key)


def _of_listing(table: pa.Table, objects: list[Object]) -> pa.Table:
    """The rows of what is in the input now; what has been deleted there keeps its row in the ledger."""
    return table.filter(pa.compute.is_in(table["key"], pa.array([item.key for item in objects], pa.string())))


def _samples(
    table: pa.Table, input: Storage, output: Storage, groups: list[RowGroup] | None
) -> list[tuple[Row, bytes, bytes]]:
    """Some restored photographs, spread over the ledger, before and after."""
    small = pa.compute.less(pa.compute.multiply(table["width"], table["height"]), SAMPLE_PIXELS)
    restored = table.filter(pa.compute.and_(pa.compute.equal(table["status"], "restored"), small))
    spread = range(0, len(restored), max(1, len(restored) // SAMPLES))[:SAMPLES]
    rows = manifest.rows_of(restored.take(pa.array(spread, pa.int64())))
    samples = []
    for row in rows:
        # Deleted or damaged in the meantime, say: then the page has one picture less.
        with contextlib.suppress(ItemError, OSError, pa.ArrowInvalid):
            pair = _read_pair(row, input, output, groups)
            for file in pair:
                codec.decode(file)
            samples.append((row, *pair))
    return samples


def _read_pair(row: Row, input: Storage, output: Storage, groups: list[RowGroup] | None) -> tuple[bytes, bytes]:
    assert row.output_key
    if groups is None:
        return input.read(row.key), output.read(row.output_key)
    group = next(group for group in groups if group.output_key == row.output_key)
    index = [item.key for item in group.objects].index(row.key)
    pair = []
    for storage, file, number in ((input, group.file, group.group), (output, group.output_key, 0)):
        filesystem, root = storage.filesystem()
        with filesystem.open_input_file(f"{root}/{file}") as handle:
            table = pq.ParquetFile(handle).read_row_group(number)
        image = sources.image_bytes(table[sources.image_column(table.schema)])[index]
        assert image is not None
        pair.append(image)
    return pair[0], pair[1]

"""Ray Data around the stages: the listing in waves, the actor pool, the ledger as it grows, and the account at the end.

On CPUs one actor does everything for an object, since moving pixels between processes costs more than it gains; with
GPUs, tasks on the CPUs decode and encode around the actors that hold the model.
"""

import contextlib
import functools
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch

from restore_core import codec, manifest, provenance, sources
from restore_core.checkpoint import ModelFolder
from restore_core.errors import ItemError, UsageError
from restore_core.inference import check_repair
from restore_core.lease import Lease
from restore_core.manifest import Found, Ledger, Overview, Row
from restore_core.pipelines import cluster, shards, stages
from restore_core.pipelines.account import BACKPRESSURE, BACKPRESSURE_KEY, Account, Stopped
from restore_core.pipelines.listing import Input, Listed, RowGroup, RowGroups, list_input, object_units, row_group_unit
from restore_core.pipelines.stages import RestoreRun, ResultOptions
from restore_core.storage import Object, Storage

logger = logging.getLogger(__name__)

WAVE_OBJECTS, WAVE_SHARE, WAVE_MOST, WAVE_SECONDS = 100_000, 5_000, 500_000, 2.0
"""So much of the listing is handed to Ray at once (as many for each process that holds the model, if that is more, up
to a most), or what came in that time, twice as long for each wave than before: the work begins with the first pages,
and memory does not grow with the listing. Between waves workers start anew, a few seconds."""
IO_THREADS = 8
"""Objects fetched, decoded, encoded and written at once in each actor."""
MOST_ACTORS = 1024
"""Which nodes that join may bring the model's processes to, unless told."""
LEASE_FILE = f"{manifest.FOLDER}/lease.json"
RUN_FILE = f"{manifest.FOLDER}/run.json"
LOST_ROW = "working on it failed twice, the second time on this object alone: a crash, a hang, or see the log above"
LOST_ROW_GROUP = "working on its row group failed twice: one of the images there crashes or hangs, or see the log above"
INTERRUPTED = "interrupted; the same command goes on from here"
SAMPLE_SIDE = 320
"""Of the pictures on the page, pixels."""


@dataclass(frozen=True, kw_only=True)
class RestoreOptions(ResultOptions):
    model: str
    keys: str | None = None
    """A list of keys to work on, in place of the input's listing."""
    resume_listing: bool = False
    """Go on where the listing of an interrupted run ended, instead of listing all again."""
    device: cluster.Device = "auto"
    workers: int | None = None
    batch_size: int = 16
    max_pixels: int | None
    """None: what the nodes' memory allows."""
    retry: frozenset[str] = frozenset()
    """Classes of failures that are tried again."""
    max_failed_share: float = 1.0
    """When more of the objects of this run have failed, it is stopped, but not before `account.VERDICT_ROWS`."""


@dataclass(frozen=True)
class Summary:
    listed: int
    """Objects of the input; where the run was stopped, those that were listed until then."""
    already_done: int
    """Of them, finished by earlier runs."""
    overview: Overview
    """Of everything listed that has a row."""
    seconds: float
    record: dict[str, Any]
    """What run.json holds."""
    stopped: str | None
    """Why it ended before all was done; those left out have no row yet, or an old one."""
    samples: list[tuple[Row, bytes, bytes]]
    """Some restored photographs: the row, and small JPEGs of what they were and are."""

    @property
    def failed_share(self) -> float:
        return self.overview.statuses["failed"] / max(1, self.listed)

    @property
    def interrupted(self) -> bool:
        """Whether it was stopped by a signal: Ctrl-C, or SIGTERM as from `ray job stop`."""
        return self.stopped == INTERRUPTED

    @property
    def images_per_second(self) -> float:
        return float(self.record["images_per_second"])


# --- In the actors -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _tools(reference: "ray.ObjectRef[RestoreRun]") -> stages.Tools:
    """They stay for the tasks that follow in that process."""
    run: RestoreRun = ray.get(reference)
    torch.set_num_threads(run.threads)
    return stages.Tools(run, ThreadPoolExecutor(IO_THREADS), codec.Processes(max(2, run.threads), run.max_pixels))


class RestoreUnit:
    """Everything for a unit, in one process that holds the model. unit -> ledger rows"""

    def __init__(self, run: "list[ray.ObjectRef[RestoreRun]]", batch_size: int) -> None:
        self.tools = _tools(run[0])
        self.batch_size = batch_size
        self.restorer = self.tools.run.restorer()

    def __call__(self, packed: pa.Table) -> pa.Table:
        unit = stages.unpack(packed)
        rows = manifest.rows_of(unit.select(manifest.SCHEMA.names))
        file, group, target = (unit[name][0].as_py() for name in ("file", "group", "target"))
        with fresh_after_errors(self.tools.run.device):
            if file is None:
                done = stages.restore_objects(rows, self.tools, self.restorer)
            else:
                done = stages.restore_row_group(
                    rows, file, group, target, self.tools, self.restorer, batch=self.batch_size
                )
        return manifest.table_of(done)


@contextlib.contextmanager
def fresh_after_errors(device: str) -> Iterator[None]:
    """End the process where its GPU is lost: no later call would succeed there, while a new process can go on.

    Ray starts one, tries the unit once more, and then each of its objects alone.
    """
    try:
        yield
    except RuntimeError:
        if device == "cuda" and _gpu_is_lost():
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        raise


def _gpu_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def decode_unit(packed: pa.Table, run: "list[ray.ObjectRef[RestoreRun]]") -> Iterator[pa.Table]:
    """unit -> items with pixels, in one table or more"""
    tools = _tools(run[0])
    rows = manifest.rows_of(stages.unpack(packed).select(manifest.SCHEMA.names))
    items = stages.each(tools.pool, lambda row: stages.fetch(stages.Item(row), tools.run), rows)
    for group in stages.groups(items, tools):
        yield stages.pack(stages.items_to_table(stages.decode(group, tools)))


class RestoreItems:
    """items with pixels -> items with restored pixels"""

    def __init__(self, run: "list[ray.ObjectRef[RestoreRun]]") -> None:
        self.run: RestoreRun = ray.get(run[0])
        torch.set_num_threads(self.run.threads)
        self.restorer = self.run.restorer()

    def __call__(self, packed: pa.Table) -> pa.Table:
        items = stages.items_of_table(stages.unpack(packed))
        with fresh_after_errors(self.run.device):
            stages.restore(items, self.restorer)
        return stages.pack(stages.items_to_table(items))


def write_items(packed: pa.Table, run: "list[ray.ObjectRef[RestoreRun]]") -> pa.Table:
    """items with restored pixels -> ledger rows"""
    tools = _tools(run[0])
    files = stages.files_of(stages.items_of_table(stages.unpack(packed)))
    return manifest.table_of(stages.each(tools.pool, lambda frames: stages.encode_and_write(frames, tools), files))


def build_dataset(
    units: list[pa.Table],
    run: RestoreRun,
    *,
    actors: int,
    most_actors: int = 0,
    batch_size: int,
    separate: bool,
    cpus: int = 1,
    alone: bool = False,
) -> ray.data.Dataset:
    """The graph: one fused stage, or decode -> restore -> write in processes of their own (`separate`).

    There are `actors` that hold the model, and up to `most_actors` once nodes for more of them have joined. In the one
    stage each has `cpus`, in several each task has.
    With `alone` no unit waits at an actor while another is worked on, so that a crash costs the one that caused it.
    """
    shared = [ray.put(run)]  # in a list, since Ray would resolve a bare reference itself, once for each actor
    # A crashed process is started again and its unit tried once more; a unit that fails twice is left out, and found
    # missing in the ledger afterwards. (Finite max_restarts with max_errored_blocks=-1 hangs: ray#62746.)
    each: dict[str, Any] = {
        "batch_size": 1, "batch_format": "pyarrow", "runtime_env": {"env_vars": cluster.WORKER_MEMORY},
    }  # fmt: skip
    actor = {**each, "num_gpus": 1 if run.device == "cuda" else 0, "max_restarts": -1, "max_task_retries": 1}
    dataset = ray.data.from_arrow([stages.pack(unit) for unit in units])
    # With GPUs two are worked on, so that one's pixels come and go while the network has the other's. As many wait, so
    # that no actor does; with fewer Ray would take none of the nodes that join (`actor_pool_util_upscaling_threshold`).
    together = 2 if separate and not alone else 1
    pool = ray.data.ActorPoolStrategy(
        min_size=actors, max_size=max(actors, most_actors), max_tasks_in_flight_per_actor=1 if alone else 2 * together,
        max_concurrent_calls_per_actor=together, enable_true_multi_threading=together > 1,
    )  # fmt: skip
    with warnings.catch_warnings():
        # max_task_retries has no other way in yet; without it a poisoned unit would be tried for ever.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", DeprecationWarning)
        if not separate:
            constructor = (shared, batch_size)
            return dataset.map_batches(
                RestoreUnit, compute=pool, fn_constructor_args=constructor, num_cpus=cpus, **actor
            )
        # Tasks, which hold no CPU while they wait, and a network that needs none of its own: when a node is lost, what
        # is left of any stage could otherwise keep the others from starting again.
        task = {**each, "fn_args": (shared,), "num_cpus": cpus, "max_retries": 1}
        dataset = dataset.map_batches(decode_unit, **task)
        dataset = dataset.map_batches(RestoreItems, compute=pool, fn_constructor_args=(shared,), num_cpus=0, **actor)
        return dataset.map_batches(write_items, **task)


# --- In the driver -------------------------------------------------------------------------------------------------


def restore(
    input: Storage, output: Storage, model: ModelFolder, options: RestoreOptions, command: list[str]
) -> Summary:
    """Restore everything that the ledger does not yet account for, and close the account.

    Raises UsageError before anything is written when input, output or cluster cannot work.
    """
    check_repair(model, options.repair)
    run_id = manifest.new_run_id()
    listed = Listed(input, output, run_id, resume=options.resume_listing)
    listing = list_input(input, options.keys, listed)
    if options.workers is not None or options.device == "cuda":
        _actors(options)
    with Lease(output, LEASE_FILE, run_id) as lease:
        if options.keys is None:  # else nothing was listed that what an earlier run has noted would stand for
            listed.begin()
        summary = _restore(input, listing, output, model, options, command, run_id, lease)
        if not summary.stopped and options.keys is None:
            listed.clear()
        return summary


def _restore(
    input: Storage,
    listing: Input,
    output: Storage,
    model: ModelFolder,
    options: RestoreOptions,
    command: list[str],
    run_id: str,
    lease: Lease,
) -> Summary:
    """The same for what is listed, while nobody else writes there."""
    ledger, begun, overview = Ledger(output, run_id), Ledger(output, run_id, folder="begun"), Overview()
    account = Account(ledger, lease, overview, options.max_failed_share, refuse=output.delete)
    work = _Work(
        listing, ledger, begun, output, model.sha256, options.identity(), options.retry, account, overview, run_id
    )
    started = time.perf_counter()
    run, stopped = _run_waves(work, input, model, options, lease)
    if stopped:
        logger.info("stopped: %s", stopped)
    lease.check()
    if listing.groups is None:
        noted = ledger.merge()
    else:
        whole = options.keys is None and input.only is None and not options.resume_listing and not stopped
        noted = shards.merge(ledger, begun, listing.groups, output, run_id, account.shards, whole=whole)
    begun.merge(lambda marks: manifest.unanswered(marks, ledger.rows(("key", "attempt"))))
    output.remove_unfinished(before=lease.since)
    seconds = time.perf_counter() - started
    told = overview.statuses.total()
    if stopped != INTERRUPTED and (noted != account.count or (not stopped and told != account.listed)):
        stopped = (
            f"the ledger does not close: of {account.listed} objects {told} have a row, and of the {account.count} "
            f"rows of this run {noted} are written down; jobs/verify_bucket.py says which are missing"
        )
        logger.info("stopped: %s", stopped)
    record = {
        "run_id": run_id,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "options": {
            **asdict(options),
            "max_pixels": run.max_pixels if run else options.max_pixels,
            "retry": sorted(options.retry),
        },
        "model": {"name": model.name, "sha256": model.sha256},
        "versions": provenance.versions(),
        "listed": account.listed,
        "already_done": account.listed - account.total,
        "statuses": dict(sorted(overview.statuses.items())),
        "errors": dict(sorted(overview.errors.items())),
        "stopped": stopped,
        "seconds": round(seconds, 3),
        "images_per_second": round(account.count / max(1e-9, seconds), 3),
    }
    output.write(RUN_FILE, json.dumps(record, indent=2).encode())
    return Summary(
        listed=account.listed,
        already_done=account.listed - account.total,
        overview=overview,
        seconds=seconds,
        record=record,
        stopped=stopped,
        samples=_samples(overview.samples, input, output, listing.groups),
    )


def _run_waves(
    work: "_Work", input: Storage, model: ModelFolder, options: RestoreOptions, lease: Lease
) -> tuple[RestoreRun | None, str | None]:
    """Returns what the workers of the last wave were told, and why the run has ended before all was done, if it has."""
    run: RestoreRun | None = None
    try:
        for wave in work.waves():
            logger.info("%d objects listed, %d of them left to do", work.account.listed, work.account.total)
            device = run.device if run else None
            run, actors = _plan(input, work.output, model, options, device, parquet=wave.groups is not None)
            # Before their outputs are overwritten: were the driver killed between that and the new row, and the next
            # run told the options of the old one, the old row would be believed.
            lease.check()
            now = datetime.now(UTC)
            if wave.again:
                work.begun.append([replace(row, finished_at=now) for row in wave.again])
            _restore_wave(wave, run, actors, options, work.account)
            del wave  # before the next one is made
    except Stopped as verdict:
        return run, str(verdict)
    except UsageError as error:
        if run is None:
            raise
        return run, f"{error}; the same command goes on from here"  # the cluster has become another
    except KeyboardInterrupt:
        return run, INTERRUPTED
    return run, None


@dataclass(frozen=True)
class _Wave:
    """What is handed to Ray at once."""

    rows: dict[str, Row] = field(default_factory=dict)
    """By their keys, not yet filled in."""
    groups: list[RowGroup] | None = None
    """Where the input is Parquet: theirs, whole."""
    again: list[Row] = field(default_factory=list)
    """What has a row of an earlier run, and is written over; in the first wave of Parquet also what has its former
    output where another row group's is written now: it is of a later wave, or its key has left the input."""
    refusable: dict[str, str] = field(default_factory=dict)
    """Keys whose output an earlier run has made, and of which version of the object (its etag)."""

    def units(self, missing: set[str], batch_size: int, actors: int) -> Iterator[pa.Table]:
        """Of what is missing; of objects `batch_size` at most."""
        if self.groups is None:
            yield from object_units([row for key, row in self.rows.items() if key in missing], batch_size, actors)
            return
        for group in self.groups:
            keys = group.keys.to_pylist()
            if not missing.isdisjoint(keys):
                yield row_group_unit([self.rows[key] for key in keys], group)


@dataclass(frozen=True)
class _Work:
    """What is left to do, in waves; on the way what is done already is counted."""

    listing: Input
    ledger: Ledger
    begun: Ledger
    output: Storage
    model: str
    options: str
    retry: frozenset[str]
    account: Account
    overview: Overview
    run_id: str

    def waves(self) -> Iterator[_Wave]:
        groups = self.listing.groups
        return self._of_objects() if groups is None else self._of_groups(groups)

    def _found(self, input: Input) -> Iterator[Found]:
        exists: Callable[[str], bool]
        if input.groups is None:
            there = manifest.Sorted(((item.key, True) for item in self.output.list()), "the output's listing")
            exists = there.__contains__
        else:
            exists = {item.key for item in self.output.list()}.__contains__
        return manifest.compare(
            input.objects, self.ledger.rows(manifest.COLUMNS), self.begun.rows(("key", "attempt")), exists=exists,
            model=self.model, options=self.options, retry=self.retry, version=input.version,
        )  # fmt: skip

    def _of_objects(self) -> Iterator[_Wave]:
        wave, seconds = _Wave(), WAVE_SECONDS
        end = time.monotonic() + seconds
        for found in self._found(self.listing):
            self.account.listed += 1
            if found.attempt is None:
                assert found.row is not None
                self.overview.add(found.row)
                continue
            self._add(wave, found.item, found.attempt, old=found.row is not None)
            if found.row and found.row.output_key and found.row.etag == found.item.etag:
                wave.refusable[found.item.key] = found.item.etag
            if len(wave.rows) >= self._most() or time.monotonic() > end:
                yield wave
                wave, seconds = _Wave(), 2 * seconds
                end = time.monotonic() + seconds
        self.account.complete = True
        if wave.rows:
            yield wave

    def _of_groups(self, groups: RowGroups) -> Iterator[_Wave]:
        """Row groups are done whole, so rows of theirs that were finished already are done again."""
        attempts = np.zeros(len(groups.order), np.int32)
        old = np.zeros(len(groups.order), bool)
        to_do, moved = np.zeros((2, len(groups.groups)), bool)
        for row, found in zip(groups.order, self._found(self.listing), strict=True):
            place = groups.group_of(row)
            old[row] = found.row is not None
            attempts[row] = found.attempt or (found.row.attempt + 1 if found.row else 1)
            # What lies at an output's place may be another group's by now: files that were renamed, say.
            if found.row and found.row.output_key not in (None, groups.groups[place].output_key):
                moved[place] = True
            to_do[place] |= found.attempt is not None or moved[place]
        written = {group.output_key for index, group in enumerate(groups.groups) if to_do[index]}
        wave = _Wave(groups=[])
        for row, found in zip(groups.order, self._found(Input(groups.objects(), groups)), strict=True):
            place = groups.group_of(row)
            if not to_do[place]:
                assert found.row is not None
                self.overview.add(found.row)
                if found.row.output_key is not None:
                    self.account.shards.add(found.row.output_key)
            elif found.row and found.row.output_key in written and moved[place]:
                wave.again.append(self._row(found.item, int(attempts[row])))
        self.account.listed = len(groups.order)
        rows = self.ledger.rows(manifest.COLUMNS) if written else iter(())  # else nothing of theirs is written over
        for gone, _ in shards.left(rows, groups, written):
            for row in manifest.rows_of(gone):
                wave.again.append(self._row(Object(row.key, row.size, row.etag), row.attempt + 1))
        for index, group in enumerate(groups.groups):
            if not to_do[index]:
                continue
            assert wave.groups is not None
            wave.groups.append(group)
            start = int(groups.starts[index])
            for place, key in enumerate(group.keys.to_pylist(), start):
                item = Object(key, group.file.size, group.file.etag)
                self._add(wave, item, int(attempts[place]), old=bool(old[place]))
            if len(wave.rows) >= self._most():
                yield wave
                wave = _Wave(groups=[])
        self.account.complete = True
        if wave.rows:
            yield wave

    def _most(self) -> int:
        """Objects of a wave. How many processes there are is known from the second one on."""
        return max(WAVE_OBJECTS, min(WAVE_SHARE * self.account.actors, WAVE_MOST))

    def _row(self, item: Object, attempt: int) -> Row:
        return Row(
            key=item.key, size=item.size, etag=item.etag, model=self.model, options=self.options, attempt=attempt,
            run_id=self.run_id,
        )  # fmt: skip

    def _add(self, wave: _Wave, item: Object, attempt: int, *, old: bool) -> None:
        wave.rows[item.key] = self._row(item, attempt)
        if old:
            wave.again.append(wave.rows[item.key])
        self.account.total += 1


@dataclass(frozen=True)
class _Actors:
    """The processes that hold the model."""

    device: Literal["cpu", "cuda"]
    count: int
    cpus: int
    """That each of them has to itself, or, beside GPUs, each task that decodes or writes."""


def _actors(options: RestoreOptions, device: Literal["cpu", "cuda"] | None = None) -> _Actors:
    """On the cluster as it is now. Raises UsageError for what it does not have.

    `device` is that of the waves before: nodes may be away for a moment, and all photographs go the same way.
    """
    cluster.connect()
    first = device is None
    if device is None:
        device = cluster.pick_device(options.device)
    else:
        cluster.await_node(device)
    each = cluster.cpus_each(device) if device == "cuda" or options.workers is None else 1
    count = cluster.processes(device, options.workers if first else None, cpus_each=each)
    return _Actors(device, count if first else max(1, min(options.workers or MOST_ACTORS, count)), each)


def _plan(
    input: Storage,
    output: Storage,
    model: ModelFolder,
    options: RestoreOptions,
    device: Literal["cpu", "cuda"] | None,
    *,
    parquet: bool,
) -> tuple[RestoreRun, _Actors]:
    """What the workers are told, and how many there are; `device` as above.

    Of Parquet one process does everything with each GPU, and so has its share of the CPUs for the codec.
    """
    actors = _actors(options, device)
    cpus, _ = cluster.resources()
    separate = actors.device == "cuda" and not parquet
    run = RestoreRun(
        input=input,
        output=output,
        model=model,
        device=actors.device,
        threads=1 if separate else max(actors.cpus, min(cpus // actors.count, cluster.cpus_per_node())),
        max_pixels=options.max_pixels
        or cluster.pixel_budget(actors.device, actors.count if actors.device == "cpu" else cpus, cpus_each=actors.cpus),
        **options.result(),
    )
    return run, actors


def _restore_wave(wave: _Wave, run: RestoreRun, actors: _Actors, options: RestoreOptions, account: Account) -> None:
    account.done.clear()
    account.refusable = wave.refusable
    context = ray.data.DataContext.get_current()
    allowed, context.max_errored_blocks = context.max_errored_blocks, -1
    context.set_config(BACKPRESSURE_KEY, BACKPRESSURE)
    limits = context.execution_options.resource_limits
    if options.workers is not None:  # else Ray Data asks for more nodes while all that it may use is busy
        most = {"gpu": actors.count} if run.device == "cuda" else {"cpu": actors.count}
        context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(**most)
    try:
        # What is missing after the first pass was beside something that killed its actor; in the second it is alone.
        for alone in (False, True):
            missing = wave.rows.keys() - account.done
            if not missing:
                break
            units = list(wave.units(missing, 1 if alone else options.batch_size, actors.count))
            dataset = build_dataset(
                units,
                run,
                actors=min(actors.count, len(units)),
                most_actors=min(options.workers or MOST_ACTORS, len(units)),
                batch_size=options.batch_size,
                cpus=actors.cpus,
                separate=run.device == "cuda" and wave.groups is None,
                alone=alone,
            )
            unit_rows = 0 if wave.groups is not None else 1 if alone else options.batch_size
            account.follow(dataset, actors=actors.count, unit_rows=unit_rows)
        for key in wave.rows.keys() - account.done:
            row = wave.rows[key]
            row.fail("decode", LOST_ROW if wave.groups is None else LOST_ROW_GROUP)
            stages.finish(row)
            account.add([row])
    finally:
        context.max_errored_blocks, context.execution_options.resource_limits = allowed, limits
        context.remove_config(BACKPRESSURE_KEY)
        account.flush()


def _samples(
    rows: list[Row], input: Storage, output: Storage, groups: RowGroups | None
) -> list[tuple[Row, bytes, bytes]]:
    """Restored photographs before and after."""
    samples = []
    for row in rows:
        # Deleted or damaged in the meantime, say: then the page has one picture less.
        with contextlib.suppress(ItemError, OSError, pa.ArrowInvalid):
            before, after = (
                codec.thumbnail_jpeg(codec.decode(file).shown, SAMPLE_SIDE)
                for file in _read_pair(row, input, output, groups)
            )
            samples.append((row, before, after))
    return samples


def _read_pair(row: Row, input: Storage, output: Storage, groups: RowGroups | None) -> tuple[bytes, bytes]:
    assert row.output_key
    if groups is None:
        return input.read(row.key), output.read(row.output_key)
    group = next((group for group in groups.groups if group.output_key == row.output_key), None)
    index = -1 if group is None else pc.index(group.keys, row.key).as_py()
    if group is None or index < 0:
        raise ItemError("vanished", f"{row.key} is not in {row.output_key} any more")
    one = sources.image_of_row(input, group.file.key, group.group, index)
    return one, sources.image_of_row(output, group.output_key, None, index)

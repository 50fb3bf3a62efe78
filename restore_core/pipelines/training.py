"""Ray Train around the trainer: data ingest, workers, checkpoints, resume, and the finished model folder."""

import csv
import hashlib
import io
import json
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.train
import ray.train.torch
import torch
from torch import Tensor

from restore_core import checkpoint, provenance, sources
from restore_core.config import TrainConfig, to_dict
from restore_core.degradations import seed_of
from restore_core.errors import DivergedError, UsageError
from restore_core.pipelines import cluster
from restore_core.storage import Storage
from restore_core.trainer import VALIDATION, Photographs, Trainer, central_crops

logger = logging.getLogger(__name__)

OPTIONS_FILE = "options.json"
METRICS_FILE = "metrics.csv"
SAMPLES, SAMPLE_SIDE = 6, 128
SHUFFLE_BATCHES = 8
RESIZE_S = 30.0
"""How often it is looked whether more workers can be had, where their number may change."""
PROGRESS_SECONDS = 10.0
DECODED_SHARE = 0.3
"""Decoded training photographs stay in memory if they take less than this share of Ray's object store."""


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """What every worker is told."""

    config: TrainConfig
    data: Storage
    folder: Storage
    initial: checkpoint.ModelFolder | None
    workers: int
    threads: int
    photographs: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run, and what there is to look at."""

    model: Storage
    """The model folder."""
    history: list[dict[str, float]]
    """One row per epoch."""
    clean: Tensor
    """Some validation samples, uint8 [B, 3, S, S]."""
    columns: list[tuple[str, Tensor, Tensor]]
    """For each fixed damage: name, damaged and restored samples, uint8 [B, 3, S, S]."""


def prepare(config: TrainConfig, data: Storage, folder: Storage, initial: checkpoint.ModelFolder | None) -> int:
    """Check data and run folder before Ray starts. Returns the number of training photographs. Raises UsageError."""
    counts = sources.count_splits(data)
    photographs = counts[sources.TRAIN]
    if not photographs:
        raise UsageError(
            f"--data {data.uri}: no photographs in split 'train'; pack again with a smaller --val-share or --train-list"
        )
    if photographs < config.batch_size:
        raise UsageError(
            f"--data {data.uri}: {photographs} photographs in split 'train' do not fill "
            f"--batch-size {config.batch_size}; pack more photographs or lower it"
        )
    if not counts[sources.VALIDATION]:
        raise UsageError(
            f"--data {data.uri}: no photographs in split 'val'; pack again with a larger --val-share or --val-list"
        )
    require_decodable(data, config.canvas)
    name = folder.uri.rsplit("/", 1)[-1]
    options = _options(config, data, initial, photographs)
    require_same(folder, options, "--name", name, "a run of that name exists")
    return photographs


def train(
    config: TrainConfig,
    data: Storage,
    folder: Storage,
    photographs: int,
    *,
    initial: checkpoint.ModelFolder | None,
    name: str,
    workers: int | None,
    min_workers: int | None = None,
    device: cluster.Device,
) -> Trained:
    """Train to the end of the schedule, or go on where a run of the same folder stopped.

    A new run starts from the weights of `initial`, whose architecture is the config's, or from random ones. With
    `min_workers` the number of workers follows the nodes that there are, between that and `workers`.
    Raises DivergedError when the loss stops being finite, UsageError when the cluster is too small.
    """
    cluster.connect(dashboard=True)  # Ray Train's own clean-up asks it which workers live
    cuda = cluster.pick_device(device) == "cuda"
    cpus, gpus = cluster.resources()
    count = worker_count(workers, config.batch_size, cpus=cpus, gpus=gpus if cuda else None)
    if min_workers is not None and min_workers > count:
        raise UsageError(f"--min-workers {min_workers}: more than the {count} workers; lower it")
    threads = max(1, cluster.cpus_per_node() // min(count, cluster.cpus_per_node()))
    run = TrainRun(
        config=config,
        data=data,
        folder=folder,
        initial=initial,
        workers=count,
        threads=threads,
        photographs=photographs,
    )
    folder.write(OPTIONS_FILE, json.dumps(_options(config, data, initial, photographs), indent=2).encode())
    needed, free = count + (not cuda), int(ray.available_resources().get("CPU", 0))  # beside GPUs it is not always so
    if not cuda and free < needed:
        logger.info("waiting for %d CPUs: %d of %d are free now", needed, free, cpus)
    filesystem, path = folder.filesystem()
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"run": run},
        scaling_config=ray.train.ScalingConfig(
            num_workers=count if min_workers is None else (min_workers, count),
            use_gpu=cuda,
            resources_per_worker={"CPU": 1} | ({"GPU": 1} if cuda else {}),
            elastic_resize_monitor_interval_s=RESIZE_S,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path.rsplit("/", 1)[0],
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": cluster.KEEP_MEMORY},
            # Among them are bugs of ours, which come again each time; but where nodes come and go, so do failures.
            failure_config=ray.train.FailureConfig(max_failures=3 if min_workers is None else 30),
        ),
        datasets={"train": _dataset(run)},
        dataset_config=ray.train.DataConfig(execution_options=ray.data.ExecutionOptions(preserve_order=True)),
    )
    result = _fitted(trainer)
    if result.error:
        raise result.error
    if result.return_value is not None:
        raise DivergedError(result.return_value)
    with result.checkpoint.as_directory() as state:
        return _finish(run, Path(state), cuda)


def _fitted(trainer: ray.train.torch.TorchTrainer) -> ray.train.Result:
    """The result of its `fit`, in a thread of its own: in the main one that takes over Ctrl-C and ends the process with
    codes that are not ours. A daemon, so that an interruption need not wait for it."""
    done: Future[ray.train.Result] = Future()

    def fit() -> None:
        try:
            done.set_result(trainer.fit())
        except BaseException as error:  # noqa: BLE001  the caller's
            done.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    return done.result()


def worker_count(wanted: int | None, batch_size: int, *, cpus: int, gpus: int | None) -> int:
    """How many training processes: as wanted, else the most that the batch can be dealt out to.

    `gpus` is None for training on CPUs. Raises UsageError when the wanted number does not work.
    """
    # Ray Data needs a CPU for itself, or all wait for ever; each worker takes one, with a GPU too.
    most = max(1, cpus - 1 if gpus is None else min(gpus, cpus - 1))
    count = wanted or next(number for number in range(most, 0, -1) if batch_size % number == 0)
    if count > most:
        have = "" if gpus is None else f"{gpus} GPUs and "
        have += f"{cpus} CPUs, of which Ray Data needs one"
        raise UsageError(f"--workers {count}: the cluster has {have}; use --workers {most} or add nodes")
    if batch_size % count:
        raise UsageError(f"--batch-size {batch_size}: not a multiple of the {count} workers; choose a multiple")
    return count


# --- In the workers ------------------------------------------------------------------------------------------------


def _worker(loop_config: dict[str, Any]) -> str | None:
    """Train to the end of the schedule. Returns why that was not possible, else None."""
    run: TrainRun = loop_config["run"]
    config = run.config
    torch.set_num_threads(run.threads)
    torch.backends.cudnn.benchmark = True
    workers = ray.train.get_context().get_world_size()
    share = config.batch_size // workers  # rounded down where workers were lost: smaller steps, some more of them
    trainer = Trainer(
        config,
        steps_per_epoch=run.photographs // (share * workers),
        device=ray.train.torch.get_device(),
        distribute=ray.train.torch.prepare_model,
    )
    if resumed := ray.train.get_checkpoint():
        with resumed.as_directory() as folder:
            trainer.load_state(Path(folder))
    elif run.initial:
        trainer.start_from(checkpoint.load(run.initial).state_dict())
    first = ray.train.get_context().get_world_rank() == 0
    held_out = _held_out(run) if first else None
    shard = ray.train.get_dataset_shard("train")
    while trainer.epoch < config.epochs:
        started = time.perf_counter()
        batches = _batches(shard, share, seed_of(config.seed, "order", trainer.epoch), config.canvas)
        try:
            row = trainer.train_epoch(_told(batches, trainer.epoch + 1, run) if first else batches)
        except DivergedError as error:
            # Returned, not raised: Ray Train would start the same failure again and again. (Of what is reported, the
            # result keeps only what came with a checkpoint.)
            return str(error)
        with tempfile.TemporaryDirectory() as folder:
            state = None
            if held_out is not None:
                row |= trainer.evaluate(held_out)
                row["seconds"] = time.perf_counter() - started
                trainer.history.append(row)
                trainer.save_state(Path(folder))
                state = ray.train.Checkpoint.from_directory(folder)
                run.folder.write(METRICS_FILE, _metrics_csv(trainer.history))
                print(_progress(row, config, trainer.history, workers), flush=True)
            ray.train.report(row, checkpoint=state, checkpoint_dir_name=f"epoch_{trainer.epoch:04d}")
    return None


def _batches(shard: Any, size: int, seed: int, canvas: int) -> Iterator[Photographs]:
    for batch in shard.iter_batches(
        batch_size=size,
        batch_format="pyarrow",
        drop_last=True,
        prefetch_batches=2,
        local_shuffle_buffer_size=SHUFFLE_BATCHES * size,
        local_shuffle_seed=seed & 2**31 - 1,
    ):
        yield to_photographs(batch, canvas)


def _told(batches: Iterator[Photographs], epoch: int, run: TrainRun) -> Iterator[Photographs]:
    """The same batches; in a long epoch a line now and then says how far it is."""
    started = shown = time.monotonic()
    done = 0
    for batch in batches:
        yield batch
        done += run.config.batch_size
        now = time.monotonic()
        if now - shown > PROGRESS_SECONDS:
            shown = now
            rate = done / (now - started)
            left = ((run.config.epochs - epoch + 1) * run.photographs - done) / rate
            print(
                f"epoch {epoch}/{run.config.epochs}: {done} of {run.photographs} photographs, {rate:.0f} samples/s, "
                f"about {max(0, left) / 60:.0f} min left",
                flush=True,
            )


def to_photographs(table: pa.Table, canvas: int) -> Photographs:
    """From a table of `sources.DECODED_SCHEMA`."""
    keys, pixels, heights, widths = (table[name].to_pylist() for name in sources.DECODED_SCHEMA.names)
    return Photographs.of(keys, pixels, heights, widths, canvas)


def _held_out(run: TrainRun) -> Photographs:
    config = run.config
    table = sources.read_split(run.data, sources.VALIDATION, config.canvas, config.val_images)
    return to_photographs(table, config.canvas)


def _progress(row: dict[str, float], config: TrainConfig, history: list[dict[str, float]], workers: int) -> str:
    left = (config.epochs - row["epoch"]) * sum(r["seconds"] for r in history[-3:]) / len(history[-3:])
    return (
        f"epoch {row['epoch']}/{config.epochs} at {row['size']} px: loss {row['train_loss']:.4f}, "
        f"validation {row['val_loss']:.4f}, noise 25 {row['psnr_noise_25']:.2f} dB, mixed {row['psnr_mixed']:.2f} dB, "
        f"{row['samples_per_second']:.0f} samples/s, workers: {workers}, about {left / 60:.0f} min left"
    )


# --- In the driver -------------------------------------------------------------------------------------------------


def _dataset(run: TrainRun) -> ray.data.Dataset:
    filesystem, root = run.data.filesystem()
    keys = sources.parquet_files(run.data)
    files = [f"{root}/{key}" for key in keys]
    canvas = run.config.canvas

    def decode(table: pa.Table) -> pa.Table:
        return sources.decode_rows(table, sources.TRAIN, canvas)

    with sources.open_parquet(run.data, keys[0], "--data") as file:
        columns = sources.dataset_columns(file.schema_arrow)
    with cluster.in_order():
        dataset = ray.data.read_parquet(files, filesystem=filesystem).select_columns(columns)
        dataset = dataset.map_batches(decode, batch_format="pyarrow", batch_size=64)
        most_bytes = run.photographs * canvas * canvas * 3
        room = ray.cluster_resources().get("object_store_memory", 0)
        # Decoded once where that leaves most of Ray's memory free, else again in every epoch.
        return dataset.materialize() if most_bytes < room * DECODED_SHARE else dataset


def _finish(run: TrainRun, state: Path, cuda: bool) -> Trained:
    """From the last checkpoint: model folder with its card, metrics, and samples to look at."""
    config, output = run.config, run.folder
    trainer = Trainer(config, steps_per_epoch=1)
    trainer.load_state(state)
    history = trainer.history
    trained = {
        **provenance.record(),
        "hardware": hardware(cuda),
        "workers": run.workers,
        "minutes": round(sum(row["seconds"] for row in history) / 60, 1),
        "photographs": run.photographs,
        "samples": int(sum(row["samples"] for row in history)),
        "started_from": _identity(run.initial),
    }
    card = trainer.card(history[-1], trained)
    model = output.child("model")
    if model.exists(checkpoint.CONFIG_FILE):
        written = json.loads(model.read(checkpoint.CONFIG_FILE))
        if written["trained"]["samples"] == card["trained"]["samples"]:  # finished before: its card stays true
            card = {name: value for name, value in written.items() if name != "architecture"}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(trainer.average, config.model, card, Path(folder))
        for file in sorted(Path(folder).iterdir()):
            model.write(file.name, file.read_bytes())
    output.write(METRICS_FILE, _metrics_csv(history))
    held_out = _held_out(run)
    spread = slice(0, len(held_out), max(1, len(held_out) // SAMPLES))
    chosen = held_out[spread]
    clean = central_crops(chosen, min(SAMPLE_SIDE, max(config.val_size, *config.phases[-1].sizes)))
    columns = []
    for name in VALIDATION:
        damaged, _ = trainer.validation_damage(name, clean, chosen.keys)
        columns.append((name, damaged, trainer.restore(damaged)))
    return Trained(model=model, history=history, clean=clean, columns=columns)


def _metrics_csv(history: list[dict[str, float]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]))
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


def hardware(cuda: bool) -> str:
    """What the cluster trains on, in words."""
    prefix = "accelerator_type:"
    cards = [name.removeprefix(prefix) for name in ray.cluster_resources() if name.startswith(prefix)]
    cpus, gpus = cluster.resources()
    return f"{gpus} x {' / '.join(cards)}" if cuda else f"{cpus} CPUs in the cluster; driver on {provenance.cpu()}"


def _options(
    config: TrainConfig, data: Storage, initial: checkpoint.ModelFolder | None, photographs: int
) -> dict[str, Any]:
    """What a run that is gone on with has to have in common with the one that was begun."""
    return {
        "config": to_dict(config),
        "data": data.uri,
        "photographs": photographs,
        "shards": shards_of(data),
        "init": _identity(initial),
    }


def shards_of(data: Storage) -> str:
    """Which shards a dataset consists of, as a hash: packed again they have other sizes."""
    shards = sorted((item.key, item.size) for item in data.list() if item.key.endswith(".parquet"))
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def _identity(model: checkpoint.ModelFolder | None) -> dict[str, str] | None:
    return {"name": model.name, "sha256": model.sha256} if model else None


def require_decodable(data: Storage, canvas: int) -> None:
    """Raise UsageError where a packed dataset has no photograph to train on, or to validate with."""
    for split in (sources.TRAIN, sources.VALIDATION):
        if not len(sources.read_split(data, split, canvas, limit=1)):
            raise UsageError(f"--data {data.uri}: no photograph in split {split!r} can be decoded; pack it again")


def require_same(folder: Storage, options: dict[str, Any], option: str, value: str, there: str) -> None:
    """Raise UsageError where the folder was begun with other options; `there` says what it holds."""
    if not folder.exists(OPTIONS_FILE):
        return
    older = json.loads(folder.read(OPTIONS_FILE))
    for name, new in options.items():
        if older.get(name) != new:
            difference = _first_difference(older.get(name), new, name)
            raise UsageError(f"{option} {value}: {there} with other options ({difference}); choose another {option}")


def _first_difference(older: object, newer: object, name: str) -> str:
    """The innermost option in which two sets of options differ, in words."""
    if isinstance(older, dict) and isinstance(newer, dict):
        for key in older.keys() | newer.keys():
            if older.get(key) != newer.get(key):
                return _first_difference(older.get(key), newer.get(key), key)
    return f"{name} was {older}, is now {newer}"

"""Ray Tune over networks that are trained alike: what each part of the network is worth.

Tune places the trials, runs them side by side and keeps one's failure from the others. What was reached lies in the
study's own folder, as safetensors and JSON, and a study goes on from there. (Tune's own record of an experiment is a
pickle, and may name a checkpoint that was deleted since.)
"""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch
from ray import tune

from restore_core import sources
from restore_core.config import TrainConfig
from restore_core.degradations import seed_of
from restore_core.errors import DivergedError, UsageError
from restore_core.pipelines import cluster
from restore_core.pipelines.study import (
    DIVERGED_FILE,
    Outcome,
    Study,
    diverged,
    history,
    is_finished,
    load_state,
    options,
    photographs,
    save_state,
)  # fmt: skip
from restore_core.pipelines.training import OPTIONS_FILE, hardware, require_decodable, require_same
from restore_core.trainer import Photographs, Trainer

TUNE_FOLDER = "_tune"


def prepare(study: Study) -> Study:
    """Check data and folder before Ray starts. Returns the study with as many images as there are.

    Raises UsageError.
    """
    config = study.config
    images = min(study.images, sources.count_splits(study.data)[sources.TRAIN])
    if images < config.batch_size:
        raise UsageError(
            f"--images {study.images}: {images} training photographs do not fill --batch-size {config.batch_size}; "
            f"take more photographs or lower it"
        )
    require_decodable(study.data, config.canvas)
    study = dataclasses.replace(study, images=images)
    require_same(study.folder, options(study), "--output", study.folder.uri, "holds a study")
    return study


def run(study: Study, *, parallel: int | None, device: cluster.Device) -> tuple[dict[str, Outcome], str]:
    """Train every variant that is not finished yet, from its last finished epoch on.

    Returns what has become of each, and the hardware in words. Raises UsageError when the cluster is too small.
    """
    cluster.connect(env_vars=cluster.KEEP_MEMORY)
    cuda = cluster.pick_device(device) == "cuda"
    cpus, gpus = cluster.resources()
    left = [name for name in study.trials if not is_finished(study, name)]
    count = trials_at_once(parallel, max(1, len(left)), cpus=cpus, gpus=gpus if cuda else None)
    threads = max(1, min(cpus // count, cluster.cpus_per_node()))
    study.folder.write(OPTIONS_FILE, json.dumps(options(study), indent=2).encode())
    failures = _fit(study, left, count, threads, cuda) if left else {}
    outcomes = {}
    for name in study.trials:
        error = diverged(study.trial_folder(name))
        if not is_finished(study, name):
            error = failures.get(name, "stopped before its last epoch")
        outcomes[name] = Outcome(history=history(study.trial_folder(name)), error=error)
    return outcomes, hardware(cuda)


def trials_at_once(wanted: int | None, trials: int, *, cpus: int, gpus: int | None) -> int:
    """How many of the trials run side by side: as wanted, else one a GPU, or one for every two CPUs.

    `gpus` is None for training on CPUs. Raises UsageError when there is not a processor for each.
    """
    most = cpus if gpus is None else gpus
    if wanted is not None and wanted > most:
        have = f"{cpus} CPUs" if gpus is None else f"{gpus} GPUs"
        raise UsageError(f"--parallel {wanted}: the cluster has {have}; use --parallel {most} or add nodes")
    return wanted or min(trials, max(1, cpus // 2) if gpus is None else gpus)


def _fit(study: Study, names: list[str], count: int, threads: int, cuda: bool) -> dict[str, str]:
    """Let Tune train those variants. Returns why each of the failed ones failed."""
    # Tune would end quietly on Ctrl+C, write down what the trials' folders hold anyway, and print pages about it.
    os.environ |= {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    filesystem, root = study.folder.filesystem()
    tuner = tune.Tuner(
        tune.with_resources(
            # The photographs are decoded once and lie in Ray's object store, which all trials of a machine look into.
            tune.with_parameters(
                _trial,
                study=study,
                threads=threads,
                device="cuda" if cuda else "cpu",
                train=photographs(study, sources.TRAIN, study.images),
                held_out=photographs(study, sources.VALIDATION, study.config.val_images),
            ),
            {"CPU": threads} | ({"GPU": 1} if cuda else {}),
        ),
        param_space={"variant": tune.grid_search(names)},
        tune_config=tune.TuneConfig(max_concurrent_trials=count),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=root,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    )
    results = tuner.fit()
    filesystem.delete_dir(f"{root}/{TUNE_FOLDER}")
    return {result.config["variant"]: _reason(result.error) for result in results if result.error}


def _reason(error: Exception) -> str:
    """What went wrong in a trial, in one line."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"{type(error.cause).__name__}: {' '.join(str(error.cause).split())}"
    return " ".join(str(error).split())[:300]


# --- In a trial ----------------------------------------------------------------------------------------------------


def _trial(
    settings: dict[str, Any],
    *,
    study: Study,
    threads: int,
    device: str,
    train: Photographs,
    held_out: Photographs,
) -> None:
    """Train one variant to its last epoch, from the last one whose state is in its folder."""
    name: str = settings["variant"]
    config, folder = study.trials[name], study.trial_folder(name)
    torch.set_num_threads(threads)
    trainer = Trainer(config, steps_per_epoch=len(train) // config.batch_size, device=device)
    load_state(trainer, folder)
    while trainer.epoch < config.epochs:
        started = time.perf_counter()
        try:
            row = trainer.train_epoch(_batches(train, config, trainer.epoch))
        except DivergedError as error:
            # Not raised: Tune would start the same failure again. The advice after the semicolon is for jobs/train.py.
            folder.write(DIVERGED_FILE, str(error).partition(";")[0].encode())
            return
        row |= trainer.evaluate(held_out)
        row["seconds"] = time.perf_counter() - started
        trainer.history.append(row)
        save_state(trainer, folder)
        tune.report(row)
        print(
            f"{name}: epoch {row['epoch']}/{config.epochs}: loss {row['train_loss']:.4f}, validation "
            f"{row['val_loss']:.4f}, mixed {row['psnr_mixed']:.2f} dB, {row['samples_per_second']:.0f} samples/s",
            flush=True,
        )


def _batches(train: Photographs, config: TrainConfig, epoch: int) -> Iterator[Photographs]:
    """All photographs once in an order that seed and epoch decide, in full batches."""
    order = np.random.default_rng(seed_of(config.seed, "order", epoch) & 2**63 - 1).permutation(len(train))
    for start in range(0, len(order) - config.batch_size + 1, config.batch_size):
        rows = order[start : start + config.batch_size]
        yield Photographs(
            [train.keys[row] for row in rows],
            train.pixels[rows],
            train.height[rows],
            train.width[rows],
        )

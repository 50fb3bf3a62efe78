#!/usr/bin/env python
"""jobs/train.py beside the same steps in a bare loop over photographs that are in memory, taking turns.

What the job does more: Ray Train, Ray Data's blocks on their way to the worker, shuffling. Validation and checkpoints
count in neither. Samples per second after the first epoch; the medians count. And how long the job takes, all but its
start, until its validation photographs come back from noise as good as they should.
"""

import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs import command_line
from restore_core import provenance
from restore_core.config import PRESETS, Phase

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class TrainingSpeed:
    data: str
    """Dataset Parquet from jobs/pack_dataset.py."""
    output: Path
    """The result file."""
    preset: str = "faces-fast"
    """Network and training plan."""
    size: int = 48
    """Side of the samples, pixels."""
    epochs: int = 2
    """Of each turn, beside the first, which does not count."""
    images: int = 1600
    """Photographs that the bare loop holds."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where both train."""
    workers: int = 1
    """Of the job."""
    psnr: float = 24.0
    """How good: noise of standard deviation 25, dB."""
    rounds: int = 5
    """How often each has its turn."""
    bare: bool = False
    """Run the bare loop here and print its rate: what its own process is told."""


def bare_loop(job: TrainingSpeed) -> float:
    import torch

    from restore_core import sources
    from restore_core.pipelines.training import to_photographs
    from restore_core.storage import open_storage
    from restore_core.trainer import Trainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cudnn.benchmark = True  # as in the job
    config = replace(PRESETS[job.preset], phases=(Phase(sizes=(job.size,), epochs=1 + job.epochs),))
    table = sources.read_split(open_storage(job.data), sources.TRAIN, config.canvas, job.images)
    photographs = to_photographs(table, config.canvas)
    starts = range(0, len(photographs) - config.batch_size + 1, config.batch_size)
    batches = [photographs[start : start + config.batch_size] for start in starts]
    trainer = Trainer(config, steps_per_epoch=len(batches), device=job.device)
    trainer.train_epoch(batches)
    return statistics.median(trainer.train_epoch(batches)["samples_per_second"] for _ in range(job.epochs))


@dataclass(frozen=True)
class Measured:
    """A run of the job."""

    rate: float
    """Samples per second."""
    around: float
    """Seconds that no epoch took."""
    seconds: float | None
    """Until its validation photographs were as good as they should; None if they never were."""


def the_job(job: TrainingSpeed) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        done = subprocess.run(  # noqa: S603
            [
                sys.executable, "jobs/train.py", "--data", job.data, "--storage", folder, "--name", "speed",
                "--preset", job.preset, "--schedule", f"{job.size}:{1 + job.epochs}", "--device", job.device,
                "--workers", str(job.workers),
            ],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"the job: {done.stderr[-3000:]}")
        whole = time.time() - started
        with (Path(folder) / "speed/metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        ends = list(itertools.accumulate(float(row["seconds"]) for row in rows))
        good = (end for row, end in zip(rows, ends, strict=True) if float(row["psnr_noise_25"]) >= job.psnr)
        return Measured(
            rate=statistics.median(float(row["samples_per_second"]) for row in rows[1:]),
            around=whole - ends[-1],
            seconds=next(good, None),
        )


def main(job: TrainingSpeed) -> int:
    if job.bare:
        print(bare_loop(job))
        return command_line.DONE
    from restore_core.pipelines.cluster import KEEP_MEMORY

    bare: list[float] = []
    runs: list[Measured] = []
    for number in range(job.rounds):
        for turn in ("bare", "job") if number % 2 else ("job", "bare"):
            if turn == "job":
                runs.append(the_job(job))
            else:
                done = subprocess.run(  # noqa: S603
                    [
                        sys.executable, __file__, "--bare", "--data", job.data, "--preset", job.preset,
                        "--size", str(job.size), "--epochs", str(job.epochs), "--images", str(job.images),
                        "--device", job.device, "--output", job.output,
                    ],
                    env={**os.environ, **KEEP_MEMORY}, capture_output=True, text=True, check=False,
                )  # fmt: skip
                if done.returncode:
                    raise SystemExit(f"the bare loop: {done.stderr[-3000:]}")
                bare.append(float(done.stdout.split()[-1]))
        print(runs[-1], f"bare loop {bare[-1]:.1f}", flush=True)
    whole = [run.rate for run in runs]
    ratios = [one / other for one, other in zip(whole, bare, strict=True)]
    seconds = [run.seconds for run in runs if run.seconds is not None]
    result = {
        **provenance.record(),
        "preset": job.preset,
        "size": job.size,
        "device": job.device,
        "workers": job.workers,
        "samples_per_second": {"job": statistics.median(whole), "bare loop": statistics.median(bare)},
        "ratio": round(statistics.median(ratios), 3),
        "seconds_around_the_epochs": round(statistics.median(run.around for run in runs), 1),
        "psnr_noise_25": job.psnr,
        "seconds_to_that": round(statistics.median(seconds), 1) if len(seconds) == len(runs) else None,
        "rounds": {"job": whole, "bare loop": bare},
    }
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["samples_per_second"]), result["ratio"])
    return command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, TrainingSpeed))

#!/usr/bin/env python
"""jobs/restore_bucket.py beside what one would write by hand, and beside what no pipeline can be faster than.

All take turns over the same damaged photographs, each in a process of its own; benchmarks/contestants.py says who they
are. Written down are the medians, and for the job when its first photograph was done, how fast it went from then on,
and the most memory of each kind of process.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa
import pyarrow.compute as pc

from benchmarks import corpora
from benchmarks.contestants import BY_HAND, CORES, Name
from benchmarks.page import ratios
from jobs import command_line
from restore_core import checkpoint, manifest, provenance
from restore_core.config import Precision, require
from restore_core.manifest import Row
from restore_core.pipelines import cluster, stages
from restore_core.pipelines.listing import object_units
from restore_core.storage import LocalStorage

ROOT = Path(__file__).resolve().parents[1]
MODEL_FLOORS = "model only", "model only, compiled", "model only, pool"
KINDS = {
    "driver": ("restore_bucket.py",), "worker": ("RestoreUnit", "RestoreItems", "decode_unit", "write_items"),
    "codec": ("restore_core.codec",), "raylet": ("raylet",), "control": ("gcs_server",),
}  # fmt: skip
"""Processes of a job, by what their command lines hold."""


@dataclass(frozen=True, kw_only=True)
class RestoreSpeed:
    photographs: Path
    """A folder of photographs (*.jpg) of at least 250x250 pixels, of which the files are made."""
    corpus: Literal["jpeg-250", "jpeg-1024", "jpeg-4000", "png-250", "mixed"]
    """What files, see benchmarks/corpora.py."""
    images: int
    """How many of them."""
    output: Path
    """The result file."""
    model: str = "faces"
    """A bundled model's name, or the path of a model folder."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the network is; on a GPU without the runtimes for CPUs and without pools of networks."""
    precision: Precision = "float32"
    """Of the network's arithmetic, in all."""
    batch_size: int = 16
    """Images handled together, by all."""
    workers: str = "auto"
    """Processes of the job that hold the network, see jobs/restore_bucket.py; the cores are theirs in equal parts."""
    contestants: tuple[Name, ...] = (
        "plain loop", "pool", "data loader", "ray template", "onnxruntime", "openvino",
        "codec only", "model only", "model only, pool", "all looks, pool", "restorer only, pool",
    )  # fmt: skip
    """With whom the job takes turns."""
    rounds: int = 5
    """How often each has its turn; the medians count."""
    dollars_per_hour: float | None = None
    """What the machine costs: then it is written down what a million images cost."""

    def __post_init__(self) -> None:
        require(self.images >= 4 * CORES, "images", self.images, f"use {4 * CORES} or more")
        names = set(self.contestants)
        complete = "codec only" in names and names.intersection(MODEL_FLOORS) and names.intersection(BY_HAND)
        advice = "name 'codec only', one that begins with 'model only', and one by hand, to compare with"
        require(bool(complete), "contestants", " ".join(self.contestants), advice)


def processes_of(mark: bytes) -> dict[Path, str]:
    """Of a job with that mark in its environment: their folders in /proc, and which of `KINDS` they are."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark not in (folder / "environ").read_bytes():
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if kind := next((kind for kind, texts in KINDS.items() if any(text in command for text in texts)), None):
            found[folder] = kind
    return found


class Watch(threading.Thread):
    """While a job runs: the most that was resident of each kind of its processes, megabytes; how busy the GPU was."""

    def __init__(self, mark: str, device: str) -> None:
        super().__init__(daemon=True)
        self._mark = mark.encode()
        self._device = device
        self._ended = threading.Event()
        self.most: dict[str, float] = {}
        self.busy: list[int] = []

    def run(self) -> None:
        while not self._ended.wait(0.5):
            if self._device == "cuda":
                command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
                self.busy.append(int(subprocess.check_output(command, text=True).split()[0]))  # noqa: S603
            for folder, kind in processes_of(self._mark).items():
                try:
                    status = (folder / "status").read_text()
                except OSError:  # it has ended
                    continue
                if peak := [line for line in status.splitlines() if line.startswith("VmHWM")]:
                    self.most[kind] = max(self.most.get(kind, 0), int(peak[0].split()[1]) / 1024)

    def end(self) -> None:
        self._ended.set()
        self.join()


def contestant(name: Name, job: RestoreSpeed, source: Path, target: Path) -> float:
    """Images per second, its loading not counted."""
    done = subprocess.run(  # noqa: S603
        [
            sys.executable, "benchmarks/contestants.py", "--name", name, "--input", source, "--output", target,
            "--model", job.model, "--precision", job.precision, "--batch-size", str(job.batch_size),
            "--device", job.device,
        ],
        cwd=ROOT, env={**os.environ, **cluster.WORKER_MEMORY},  # the allocator's settings that are best for torch
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return float(said["images"] / said["seconds"])


@dataclass(frozen=True)
class Measured:
    """A run of the job."""

    first: float
    """Seconds from its start to the first finished photograph."""
    whole: float
    """Images per second from start to end."""
    steady: float
    """Images per second, by their pixels, once each worker has finished what it began with."""
    memory: dict[str, int]
    """Most of each kind of process, MB."""
    passed: float | None
    """Bytes an image between Ray's processes, by what they are given; in the plan for GPUs not counted."""
    busy: float | None
    """Of the GPU, percent: the median of the time in which it was at work at all."""


def the_job(job: RestoreSpeed, source: Path, target: Path) -> Measured:
    mark = f"RESTORE_SPEED={os.getpid()}-{time.monotonic_ns()}"
    name, _, value = mark.partition("=")
    watch = Watch(mark, job.device)
    watch.start()
    started = datetime.now(UTC)
    done = subprocess.run(  # noqa: S603
        [
            sys.executable, "jobs/restore_bucket.py", "--input", source, "--output", target, "--model", job.model,
            "--precision", job.precision, "--batch-size", str(job.batch_size), "--device", job.device,
            "--workers", job.workers,
        ],
        cwd=ROOT, env={**os.environ, name: value}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = (datetime.now(UTC) - started).total_seconds()
    if done.returncode:
        raise SystemExit(f"the job: {done.stderr[-3000:]}")
    rows = manifest.Ledger(LocalStorage(target), "reader").latest()
    statuses = rows["status"].to_pylist()
    # A grey photograph, say, loses no colour.
    assert "failed" not in statuses and statuses.count("restored") >= 0.95 * len(statuses), "this is no comparison"
    rows = rows.sort_by("finished_at")
    times = rows["finished_at"].to_pylist()
    skipped = CORES * min(job.batch_size, math.ceil(len(times) / (2 * CORES)))  # what each begins with
    pixels = pc.multiply(rows["width"], rows["height"]).to_numpy()  # where they differ, the rest may be larger ones
    rest = len(times) * pixels[skipped:].sum() / pixels.sum()
    steady = float(rest / (times[-1] - times[skipped - 1]).total_seconds())
    watch.end()
    return Measured(
        first=(times[0] - started).total_seconds(),
        whole=len(times) / seconds,
        steady=steady,
        memory={kind: round(watch.most[kind]) for kind in KINDS if kind in watch.most},
        passed=between_processes(rows, job.batch_size) if job.device == "cpu" else None,
        busy=statistics.median(filter(None, watch.busy)) if any(watch.busy) else None,
    )


def between_processes(rows: pa.Table, batch_size: int) -> float:
    """Bytes an image that pass Ray's object store: a unit's block on its way to the actor, and its rows back."""
    listed = [
        Row(key=row["key"], size=row["size"], etag=row["etag"], model=row["model"], options=row["options"], run_id="r")
        for row in rows.select(["key", "size", "etag", "model", "options"]).to_pylist()
    ]
    there = sum(stages.pack(unit).nbytes for unit in object_units(listed, batch_size, CORES))
    return float((there + rows.nbytes) / len(rows))


def turns(job: RestoreSpeed, source: Path) -> Iterator[tuple[str, float | Measured]]:
    """Who, and what was measured: of the others, images per second."""
    for number in range(job.rounds):
        names = ["job", *job.contestants]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder).resolve()
                if name == "job":
                    yield name, the_job(job, source, target)
                else:
                    yield name, contestant(name, job, source, target)  # type: ignore[arg-type]


def main(job: RestoreSpeed) -> int:
    rates: dict[str, list[float]] = {}
    runs: list[Measured] = []
    photographs = sorted(job.photographs.rglob("*.jpg"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder).resolve()
        corpora.write(corpora.CORPORA[job.corpus], photographs, job.images, source)
        megapixels = corpora.megapixels(source)
        size = sum(path.stat().st_size for path in source.iterdir())
        for name, measured in turns(job, source):
            if isinstance(measured, Measured):
                runs.append(measured)
                rates.setdefault("job, steady state", []).append(measured.steady)
                rates.setdefault("job, start-up included", []).append(measured.whole)
            else:
                rates.setdefault(name, []).append(measured)
            print(name, measured, flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    others = (name for name in ("onnxruntime", "openvino") if any(who.startswith(name) for who in job.contestants))
    result = {
        **provenance.record(),
        "versions": provenance.versions(*others),
        "corpus": corpora.CORPORA[job.corpus].title,
        "images": job.images,
        "megapixels": round(megapixels, 3),
        "encoded_bytes": size,
        "model": {"name": job.model, "sha256": checkpoint.read(job.model).sha256},
        "device": job.device,
        "gpu_busy_percent": [run.busy for run in runs],
        "precision": job.precision,
        "workers": job.workers,
        "images_per_second": {name: round(rate, 3) for name, rate in medians.items()},
        "first_image_seconds": round(statistics.median(run.first for run in runs), 2),
        "memory_mb": {
            kind: max(run.memory.get(kind, 0) for run in runs) for kind in KINDS if any(kind in r.memory for r in runs)
        },
        "object_store_bytes_per_image": None if runs[-1].passed is None else round(runs[-1].passed),
        "rounds": rates,
    }
    if job.dollars_per_hour is not None:
        result["dollars_per_hour"] = job.dollars_per_hour
        result["dollars_per_million_images"] = round(
            job.dollars_per_hour / 3600 * 1e6 / medians["job, steady state"], 2
        )
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.output.write_text(json.dumps(result, indent=2) + "\n")
    shown = {name: result[name] for name in ("images_per_second", "memory_mb")}
    print(json.dumps({**shown, "ratios": ratios(rates, job.device)}, indent=2))
    return command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, RestoreSpeed))

#!/usr/bin/env python
"""Train a restorer on clean photographs: Ray Train, distributed data-parallel, fed by Ray Data from packed Parquet.

Start it again with the same --name and options and it goes on after the last finished epoch. At the end STORAGE/NAME
holds model/ (for `restore_bucket.py --model`), metrics.csv, loss.png and samples.png.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs import command_line
from restore_core.config import PRESETS, Precision, ResidualUNetConfig, TrainConfig, parse_schedule, require
from restore_core.errors import DivergedError

LOSS_PLOT, SAMPLE_SHEET, LEASE_FILE = "loss.png", "samples.png", "lease.json"


@dataclass(frozen=True, kw_only=True)
class Train:
    data: str
    """Dataset Parquet from jobs/pack_dataset.py: a local folder or s3://bucket/prefix."""
    storage: str
    """Where runs are kept: a local folder or s3://bucket/prefix."""
    name: str = "restorer"
    """Name of the run, a folder in --storage."""
    preset: Literal["faces", "faces-fast", "origin", "smoke"] = "faces"
    """Network and training plan; see PRESETS in restore_core/config.py."""
    init: str | None = None
    """Start from this model's weights, to fine-tune it: a bundled name, or the path or URI of a model folder. Its
    network is trained, not the preset's, unless the preset's is the same with more blocks."""
    schedule: str | None = None
    """SIZE:EPOCHS,SIZE+SIZE:EPOCHS,...: sides of the training samples in pixels (several: each step takes one of them),
    and passes over the photographs."""
    batch_size: int | None = None
    """Samples per step, over all workers together."""
    step_pixels: int | None = None
    """Where a step's samples would have more pixels than this together, it takes fewer of them: 524,288 by default,
    which suits CPUs; a GPU has room for millions."""
    learning_rate: float | None = None
    """Peak learning rate."""
    seed: int | None = None
    """Run seed: 0, or with --init one that follows from the model it starts from."""
    precision: Precision | None = None
    """auto is bfloat16 where the device computes faster in it (GPUs since Ampere, CPUs with AMX), else float32."""
    workers: str = "auto"
    """Training processes: a number, or auto for every GPU of the cluster, else every CPU but one."""
    min_workers: int | None = None
    """When nodes are lost, go on from the last epoch with at least this many, and take more again when they are back.
    Else it waits for all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs where the cluster has some."""

    def __post_init__(self) -> None:
        require(self.name not in ("", ".", "..") and "/" not in self.name, "name", repr(self.name), "use a plain name")
        command_line.worker_count(self.workers)
        require(self.min_workers is None or self.min_workers >= 1, "min_workers", self.min_workers, "use 1 or more")

    def config(self) -> TrainConfig:
        config = PRESETS[self.preset]
        if self.schedule is not None:
            phases = parse_schedule(self.schedule)
            largest = max(size for phase in phases for size in phase.sizes)
            config = dataclasses.replace(config, phases=phases, canvas=max(config.canvas, largest))
        if self.learning_rate is not None:
            optimizer = dataclasses.replace(config.optimizer, learning_rate=self.learning_rate)
            config = dataclasses.replace(config, optimizer=optimizer)
        chosen = {name: getattr(self, name) for name in ("batch_size", "seed", "step_pixels", "precision")}
        return dataclasses.replace(config, **{name: value for name, value in chosen.items() if value is not None})


def main(job: Train) -> int:
    config = job.config()
    from restore_core import checkpoint, manifest
    from restore_core.lease import Lease

    data, storage = command_line.data_and_output(job.data, job.storage, "--storage")
    initial = checkpoint.read(job.init, option="--init") if job.init is not None else None
    if initial and not (isinstance(config.model, ResidualUNetConfig) and config.model.extends(initial.architecture)):
        config = dataclasses.replace(config, model=initial.architecture)
    if initial and job.seed is None:  # with the seed that it was trained with it would see the same samples again
        config = dataclasses.replace(config, seed=int(initial.sha256[:15], 16))
    from restore_core import report
    from restore_core.pipelines import training

    folder = storage.child(job.name)
    photographs = training.prepare(config, data, folder, initial)
    print(f"{photographs} photographs, {config.epochs} epochs, run folder {folder.uri}", flush=True)
    with Lease(folder, LEASE_FILE, manifest.new_run_id(), option="--name", what="training") as lease:
        try:
            trained = training.train(
                config,
                data,
                folder,
                photographs,
                initial=initial,
                name=job.name,
                workers=command_line.worker_count(job.workers),
                min_workers=job.min_workers,
                device=job.device,
            )
        except DivergedError as error:
            print(f"error: {error}", file=sys.stderr)
            return command_line.TOO_MANY_FAILURES
        lease.check()
        folder.write(LOSS_PLOT, report.loss_plot(trained.history))
        folder.write(SAMPLE_SHEET, report.sample_sheet(trained.clean, trained.columns))
    print(f"model: {trained.model.uri}\nlook at: {folder.join(LOSS_PLOT)} and {folder.join(SAMPLE_SHEET)}")
    return command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, Train))

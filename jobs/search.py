#!/usr/bin/env python
"""Compare networks that are trained alike: Ray Tune over the variants of the project's first autoencoder.

Start it again with the same options and it goes on: finished variants are not trained again, others go on after their
last finished epoch. At the end OUTPUT holds study.md (the table), study.json, losses.png and overview.png.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs import command_line
from restore_core.config import VARIANTS, OptimizerConfig, Phase, TrainConfig, require

RECORD, TABLE, CURVES, PICTURES = "study.json", "study.md", "losses.png", "overview.png"
LEASE_FILE = "lease.json"


@dataclass(frozen=True, kw_only=True)
class Search:
    data: str
    """Dataset Parquet from jobs/pack_dataset.py: a local folder or s3://bucket/prefix."""
    output: str
    """Where the study is kept: a local folder or s3://bucket/prefix."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Networks to compare; see VARIANTS in restore_core/config.py."""
    epochs: int = 20
    """Passes over the photographs."""
    size: int = 48
    """Side of the training and validation samples, pixels."""
    images: int = 2000
    """Training photographs, the same for all; at most the whole split."""
    batch_size: int = 32
    """Samples per step."""
    learning_rate: float = OptimizerConfig().learning_rate
    """Peak learning rate."""
    seed: int = 0
    """Of first weights, order, crops and damages."""
    parallel: str = "auto"
    """Variants trained at the same time: a number, or auto for one a GPU of the cluster, else one for every two CPUs.
    Each gets an equal share of the CPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs where the cluster has some."""

    def __post_init__(self) -> None:
        require(bool(self.variants), "variants", "", f"name some of {', '.join(VARIANTS)}")
        for name in self.variants:
            require(name in VARIANTS, "variants", name, f"use some of {', '.join(VARIANTS)}")
            require(self.variants.count(name) == 1, "variants", name, "name it once")
        for name in ("epochs", "images"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")
        require(self.size >= 16, "size", self.size, "use 16 or more")
        command_line.worker_count(self.parallel, "--parallel")

    def trials(self) -> dict[str, TrainConfig]:
        return {
            name: TrainConfig(
                model=VARIANTS[name],
                optimizer=OptimizerConfig(learning_rate=self.learning_rate),
                phases=(Phase(sizes=(self.size,), epochs=self.epochs),),
                batch_size=self.batch_size,
                val_size=self.size,
                canvas=max(TrainConfig.canvas, self.size),
                seed=self.seed,
            )
            for name in self.variants
        }


def main(job: Search) -> int:
    trials = job.trials()

    data, folder = command_line.data_and_output(job.data, job.output, "--output")
    from restore_core import manifest, provenance, report
    from restore_core.lease import Lease
    from restore_core.pipelines import search
    from restore_core.pipelines.study import OVERVIEW, Study, overview, rows_of

    study = search.prepare(Study(trials=trials, data=data, folder=folder, images=job.images))
    parallel = command_line.worker_count(job.parallel, "--parallel")
    with Lease(folder, LEASE_FILE, manifest.new_run_id(), what="study") as lease:
        outcomes, hardware = search.run(study, parallel=parallel, device=job.device)
        rows = rows_of(study, outcomes)
        result = {**provenance.record(), "hardware": hardware, "images": study.images, "size": job.size, "rows": rows}
        if folder.exists(RECORD):
            older = json.loads(folder.read(RECORD))
            if older["rows"] == rows:  # nothing was trained: what it was made with stays true
                result = older
        table = report.study_table(result)
        lease.check()
        folder.write(RECORD, json.dumps(result, indent=2).encode())
        folder.write(TABLE, table.encode())
        if columns := overview(study, outcomes):
            folder.write(CURVES, report.study_plot({name: outcome.history for name, outcome in outcomes.items()}))
            folder.write(PICTURES, report.overview(OVERVIEW, columns))
    print(table)
    failed = [row["variant"] for row in rows if row["error"]]
    return command_line.TOO_MANY_FAILURES if failed else command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, Search))

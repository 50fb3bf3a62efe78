#!/usr/bin/env python
"""Measure models on held-out photographs: PSNR and SSIM per damage and size, beside the damaged input and baselines.

Writes into OUTPUT: quality.md (tables), quality.json (with command, commit, versions, hardware, date), quality.csv (a
row for each photograph, damage, size and method), quality.png (PSNR over sizes), worst.png (what went worst: look).
"""

import csv
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs import command_line
from restore_core.baselines import Name, named
from restore_core.config import Precision, require


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    data: str
    """Dataset Parquet from jobs/pack_dataset.py, or photographs: a local folder or s3://bucket/prefix."""
    output: str
    """Where the results go: a local folder or s3://bucket/prefix."""
    model: tuple[str, ...] = ("faces",)
    """Bundled models' names, or paths or URIs of model folders; the first is the one that is looked at closely."""
    baselines: tuple[Name, ...] = ()
    """Methods without training to compare with: 3x3 median, non-local means, total variation; Telea's and the Navier-
    Stokes inpainting, which are told the exact mask, need OpenCV: pip install -c constraints.txt -e '.[peers]'."""
    split: Literal["val", "test"] = "val"
    """Which people of a dataset: those of val or of test."""
    damages: tuple[str, ...] = ()
    """Some of the standard damages, such as noise_25 or gray; all of them if none is named."""
    sizes: tuple[int, ...] = (48, 64, 128)
    """Sides of the face crops, pixels; 0 is the whole photograph."""
    images: int = 200
    """Photographs, at most all of them."""
    workers: str = "auto"
    """Processes: a number, or auto for every GPU of the cluster, else every CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs where the cluster has some."""
    precision: Precision = "auto"
    """Of the models' arithmetic: float32 or bfloat16; auto is the latter on GPUs since Ampere, else the former."""
    self_ensemble: bool = False
    """Average over each photograph and its mirror image: twice the work."""

    def __post_init__(self) -> None:
        require(self.images >= 1, "images", self.images, "use 1 or more")
        require(bool(self.sizes), "sizes", "", "name at least one")
        for size in self.sizes:
            require(size == 0 or size >= 16, "sizes", size, "use 16 or more (SSIM needs a window), or 0")
        require(bool(self.model), "model", "", "name at least one")
        for name in ("model", "damages", "sizes"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), name, " ".join(map(str, values)), "name each once")
        command_line.worker_count(self.workers)


def main(job: Evaluate) -> int:
    from restore_core import checkpoint, provenance
    from restore_core.degradations import STANDARD

    for damage in job.damages:
        require(damage in STANDARD, "damages", damage, f"no standard damage; use some of {', '.join(STANDARD)}")
    for name in job.baselines:
        named(name)
    data, output = command_line.data_and_output(job.data, job.output, "--output")
    models = tuple(checkpoint.read(name) for name in job.model)
    from restore_core import report
    from restore_core.pipelines import cluster, evaluation

    evaluation.require_photographs(data, job.split)
    cluster.connect()
    plan = evaluation.Plan(
        models=models,
        baselines=job.baselines,
        damages=job.damages or tuple(STANDARD),
        sizes=job.sizes,
        device=cluster.pick_device(job.device),
        precision=job.precision,
        self_ensemble=job.self_ensemble,
    )
    rows, worst = evaluation.evaluate(
        plan, data, split=job.split, images=job.images, workers=command_line.worker_count(job.workers)
    )
    for size in job.sizes:
        count, most = (len({row["key"] for row in rows if row["size"] in sizes}) for sizes in ((size,), job.sizes))
        if count < most:
            print(f"{most - count} of {most} photographs are smaller than {size} pixels and left out there")
    means = evaluation.means(rows)
    result = {
        **provenance.record(),
        "models": [{"name": model.name, "sha256": model.sha256} for model in models],
        "rows": means,
        "diagnosis": evaluation.diagnosis(rows, models[0].name),
    }
    tables = report.quality_tables(result)
    output.write("quality.json", json.dumps(result, indent=2).encode())
    output.write("quality.md", tables.encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    output.write("quality.csv", text.getvalue().encode("utf-8", "backslashreplace"))
    output.write("quality.png", report.quality_curves(means))
    output.write("worst.png", report.triptychs([(case.caption, case.pictures) for case in worst]))
    print(tables)
    return command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, Evaluate))

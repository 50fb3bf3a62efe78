#!/usr/bin/env python
"""Are photographs left alone that only look damaged? Borders, letters, shapes, other photographs lie on clean ones.

For each model and size: how many of the photographs are copied as undamaged, and how near the others come to
what went in. What is laid over them is of the kinds that training uses, with other seeds and on held-out people.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from jobs import command_line
from restore_core import checkpoint, provenance, sources
from restore_core.degradations import Generator, seed_of
from restore_core.inference import Restorer
from restore_core.metrics import psnr
from restore_core.overlays import draw_overlays
from restore_core.pipelines.training import to_photographs
from restore_core.storage import open_storage
from restore_core.trainer import central_crops


@dataclass(frozen=True, kw_only=True)
class Overlays:
    data: str
    """Dataset Parquet from jobs/pack_dataset.py."""
    output: Path = Path("benchmarks/overlays.json")
    """The result file."""
    model: tuple[str, ...] = ("faces", "faces-fast")
    """Bundled models' names, or paths of model folders."""
    sizes: tuple[int, ...] = (48, 128, 250)
    """Sides of the photographs, pixels; 250 is the whole photograph of LFW, the smaller ones central crops."""
    images: int = 80
    """Held-out photographs."""


def main(job: Overlays) -> int:
    storage = open_storage(job.data, option="--data")
    photographs = to_photographs(sources.read_split(storage, sources.VALIDATION, 256, job.images), 256)
    seeds = [seed_of(1, "overlays", key) for key in photographs.keys]
    rows = []
    for name in job.model:
        restorer = Restorer(checkpoint.read(name))
        for size in job.sizes:
            clean = draw_overlays(central_crops(photographs, size), 1.0, Generator(seeds))
            images = list(clean.permute(0, 2, 3, 1).contiguous().numpy())
            results = restorer(images)
            away = [
                min(100.0, psnr(result.pixels, image))
                for image, result in zip(images, results, strict=True)
                if not result.undamaged()
            ]
            rows.append(
                {
                    "model": name,
                    "size": size,
                    "images": len(images),
                    "copied": len(images) - len(away),
                    "psnr_of_others_median_db": round(float(np.median(away)), 2) if away else None,
                    "psnr_of_others_worst_db": round(min(away), 2) if away else None,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    job.output.write_text(json.dumps({**provenance.record(), "rows": rows}, indent=2) + "\n")
    return command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, Overlays))

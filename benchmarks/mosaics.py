#!/usr/bin/env python
"""Pictures of 1,120 pixels square made of 7 x 7 held-out faces at their own size: what a dataset of small photographs
can say of larger ones.

    python benchmarks/mosaics.py --data data/lfw-packed --output runs/mosaics
    python jobs/evaluate.py --data runs/mosaics --model faces faces-fast --sizes 0 --output benchmarks/mosaics
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from jobs import command_line
from restore_core import sources
from restore_core.storage import open_storage

CANVAS, CROP, ACROSS = 256, 160, 7
"""Sides of what is read and of what is taken of it, from the middle, pixels; and how many stand side by side. The whole
is larger than what goes through the network at once (`inference.TILE`)."""


@dataclass(frozen=True, kw_only=True)
class Mosaics:
    data: str
    """Dataset Parquet from jobs/pack_dataset.py; people of its validation split are taken."""
    output: Path
    """A folder for the pictures."""
    images: int = 6
    """How many of them."""


def main(job: Mosaics) -> int:
    table = sources.read_split(open_storage(job.data, option="--data"), sources.VALIDATION, CANVAS, 10**6)
    faces = []
    for row in table.to_pylist():
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["height"], row["width"], 3)
        top, left = ((side - CROP) // 2 for side in pixels.shape[:2])
        if min(top, left) >= 0:
            faces.append(pixels[top : top + CROP, left : left + CROP])
    job.output.mkdir(parents=True, exist_ok=True)
    for number in range(job.images):
        chosen = random.Random(number).sample(faces, ACROSS**2)  # noqa: S311
        rows = [np.hstack(chosen[start : start + ACROSS]) for start in range(0, ACROSS**2, ACROSS)]
        Image.fromarray(np.vstack(rows)).save(job.output / f"{number}.png")
    return command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, Mosaics))

#!/usr/bin/env python
"""Large pictures out of small photographs, to measure large pictures with photographs of known quality.

Writes PNG files of N x N whole photographs of the validation people each: 4 x 4 of LFW's are 1000 pixels a side. What
`jobs/evaluate.py --data OUTPUT --sizes 0` says of them compares with what it says of the single photographs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from jobs import command_line
from restore_core import sources
from restore_core.config import require
from restore_core.errors import UsageError
from restore_core.storage import open_storage


@dataclass(frozen=True, kw_only=True)
class Mosaics:
    data: str
    """Dataset Parquet from jobs/pack_dataset.py, its photographs of one size."""
    output: Path
    """The folder for the large pictures."""
    side: int = 4
    """Photographs in a row, and rows."""
    pictures: int = 4
    """How many to make."""

    def __post_init__(self) -> None:
        require(self.side >= 1, "side", self.side, "use 1 or more")
        require(self.pictures >= 1, "pictures", self.pictures, "use 1 or more")


def main(job: Mosaics) -> int:
    count = job.side**2
    table = sources.read_split(
        open_storage(job.data, option="--data"), "--data", sources.VALIDATION, 2**20, count * job.pictures
    )
    shapes = set(zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True))
    if len(table) < count * job.pictures or len(shapes) != 1:
        raise UsageError(
            f"--data {job.data}: {len(table)} photographs of {len(shapes)} sizes; lower --pictures or --side"
        )
    ((height, width),) = shapes
    pixels = np.stack([np.frombuffer(data, np.uint8) for data in table["pixels"].to_pylist()])
    grid = pixels.reshape(job.pictures, job.side, job.side, height, width, 3).swapaxes(2, 3)
    job.output.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(grid.reshape(job.pictures, job.side * height, job.side * width, 3)):
        Image.fromarray(picture).save(job.output / f"{job.side}x{job.side}-{index:02d}.png", compress_level=1)
    print(f"{job.pictures} pictures of {job.side * width}x{job.side * height} pixels in {job.output}")
    return command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, Mosaics))

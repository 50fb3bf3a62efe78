#!/usr/bin/env python
"""Damage the public-domain photographs that come with scikit-image, restore them with restore_bucket.py, compare.

The originals are known here, so the summary can say what the restoration was worth (PSNR in dB, before -> after).
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs import command_line, restore_bucket
from restore_core.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

DAMAGES = {
    "noise": "noise_25", "flips": "flips_10", "patches": "patches_15", "gray": "gray", "all": "all",
    "undamaged": "clean",
}  # fmt: skip
"""Its folders, and which of `degradations.STANDARD` they get."""
FACES = {"astronaut": (135, 5, 315, 185), "chelsea": (60, 10, 350, 300)}
"""Square boxes around the faces: left, top, right, bottom, pixels."""
FACE_SIZES = (48, 64, 128)
WHOLE = ("astronaut", "chelsea", "coffee", "rocket")


@dataclass(frozen=True, kw_only=True)
class Demo:
    output: Path = Path("demo")
    """Folder for the damaged photographs (input/), the restored ones (restored/) and the comparison."""
    model: str = "faces"
    """A bundled model's name, or the path of a model folder."""


def main(job: Demo) -> int:
    import numpy as np
    from PIL import Image
    from skimage import data

    from restore_core import report
    from restore_core.degradations import STANDARD, degrade_photograph, seed_of
    from restore_core.metrics import psnr

    marker = job.output / ".demo"
    if job.output.exists() and not marker.exists():
        raise UsageError(f"--output {job.output}: exists and is not a demo's; choose another folder")
    shutil.rmtree(job.output, ignore_errors=True)
    source, restored = job.output / "input", job.output / "restored"
    source.mkdir(parents=True)
    marker.touch()

    originals = {name: Image.fromarray(getattr(data, name)()).convert("RGB") for name in WHOLE}
    for name, box in FACES.items():
        for size in FACE_SIZES:
            originals[f"{name}-face-{size}"] = originals[name].crop(box).resize((size, size), Image.Resampling.LANCZOS)
    for name, image in originals.items():
        for damage, standard in DAMAGES.items():
            damaged, _ = degrade_photograph(np.array(image), seed_of(0, name, damage), **STANDARD[standard])
            file = source / damage / f"{name}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(damaged).save(file)

    code = restore_bucket.main(restore_bucket.RestoreBucket(input=str(source), output=str(restored), model=job.model))

    print(f"\n{'damage':<12}{'before':>9}{'after':>9}   mean PSNR in dB over {len(originals)} photographs")
    columns = []
    for damage in DAMAGES:
        before, after = (
            {name: np.array(Image.open(folder / damage / f"{name}.png").convert("RGB")) for name in originals}
            for folder in (source, restored)
        )
        quality = [
            np.mean([min(psnr(images[name], np.array(original)), 100) for name, original in originals.items()])
            for images in (before, after)
        ]
        print(f"{damage:<12}{quality[0]:9.2f}{quality[1]:9.2f}")
        columns.append((damage, _faces(before), _faces(after)))
    clean = _faces({name: np.array(image) for name, image in originals.items()})
    sheet = job.output / "before_after.png"
    sheet.write_bytes(report.sample_sheet(clean, columns))
    print(f"\nbefore and after: {sheet}\nreport: {restored / restore_bucket.REPORT_FILE}")
    return code


def _faces(images: "dict[str, npt.NDArray[np.uint8]]") -> "Tensor":
    """The largest face crops, uint8 [B, 3, S, S]."""
    import torch

    return torch.stack([torch.from_numpy(images[f"{name}-face-{FACE_SIZES[-1]}"]).permute(2, 0, 1) for name in FACES])


if __name__ == "__main__":
    sys.exit(command_line.run(main, Demo))

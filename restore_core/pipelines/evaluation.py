"""What a model is worth: PSNR and SSIM for each fixed damage at each size, on photographs it was not trained on."""

from typing import Any

import numpy as np

from restore_core import sources
from restore_core.checkpoint import ModelFolder
from restore_core.degradations import Generator, degrade, fixed_damage, seed_of
from restore_core.errors import UsageError
from restore_core.inference import Restorer
from restore_core.metrics import psnr, ssim
from restore_core.storage import Storage
from restore_core.trainer import VALIDATION, Photographs, central_crops

SEED = 20240  # of the damages; unlike the run seeds of training
TOP_PSNR = 100.0  # identical pictures count as this much in a mean


def evaluate(
    model: ModelFolder, data: Storage, *, split: str, sizes: tuple[int, ...], images: int, canvas: int = 256
) -> list[dict[str, Any]]:
    """Mean PSNR (dB) and SSIM of the input as it is (identity) and restored, for each damage and size.

    Samples are central face crops resized with Lanczos; a size of 0 takes the whole photographs. Photographs that the
    model finds undamaged stay as they are, as in the restore job. Returns one row a damage and size.

    Raises UsageError when no photograph can be decoded.
    """
    table = sources.read_split(data, "--data", split, canvas, images)
    if not len(table):
        raise UsageError(f"--split {split}: none of its photographs in {data.uri} can be decoded; pack them again")
    keys, pixels, heights, widths = (table[name].to_pylist() for name in sources.DECODED_SCHEMA.names)
    photographs = Photographs.of(keys, pixels, heights, widths, canvas)
    restorer = Restorer(model)
    rows = []
    for size in sizes:
        if size:
            clean = list(central_crops(photographs, size).permute(0, 2, 3, 1).contiguous().numpy())
        else:
            shapes = zip(photographs.pixels, heights, widths, strict=True)
            clean = [np.ascontiguousarray(image[:height, :width]) for image, height, width in shapes]
        for damage in VALIDATION:
            damaged = [_damage(image, damage, key) for image, key in zip(clean, keys, strict=True)]
            results = restorer(damaged)
            restored = [
                before if result.undamaged() else result.pixels for before, result in zip(damaged, results, strict=True)
            ]
            rows.append(
                {
                    "damage": damage,
                    "size": size,
                    "images": len(clean),
                    "unchanged": sum(result.undamaged() for result in results),
                    "psnr_identity": _mean_psnr(damaged, clean),
                    "psnr": _mean_psnr(restored, clean),
                    "ssim_identity": _mean_ssim(damaged, clean),
                    "ssim": _mean_ssim(restored, clean),
                }
            )
    return rows


def _damage(image: Any, damage: str, key: str) -> Any:
    import torch

    generator = Generator([seed_of(SEED, "evaluate", damage, image.shape[0], key)])
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    strengths = fixed_damage(generator, **VALIDATION[damage])  # type: ignore[arg-type]
    damaged, _ = degrade(pixels, strengths, generator)
    return damaged[0].permute(1, 2, 0).contiguous().numpy()


def _mean_psnr(images: list[Any], truth: list[Any]) -> float:
    return float(np.mean([min(psnr(a, b), TOP_PSNR) for a, b in zip(images, truth, strict=True)]))


def _mean_ssim(images: list[Any], truth: list[Any]) -> float:
    return float(np.mean([ssim(a, b) for a, b in zip(images, truth, strict=True)]))

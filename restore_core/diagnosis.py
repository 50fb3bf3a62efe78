"""What was wrong with a photograph, read off what the network did to it; and results of which only a part is wanted."""

from collections.abc import Container
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from restore_core.config import Kind
from restore_core.degradations import luma, to_gray

CONTEXT = 10
"""How many pixels around it a pixel's part in the diagnosis depends on: windows of 7, 7 and 9 pixels."""
AROUND = 9
"""Colours are means over squares of this side, pixels."""
GRID = 4
"""They are looked at around each fourth pixel of each fourth row: the squares overlap."""

# Below all of these a photograph counts as undamaged and stays as it is. Found on validation photographs: see
# DECISIONS.md, "When is a photograph undamaged".
UNDAMAGED_SIGMA_255 = 2.5
UNDAMAGED_SHARE = 0.002
UNDAMAGED_GRAY = 0.5

LEFT_ALONE = 3
"""Where no noise was found, surviving pixels change by so much less than the network would have it, of 255: most of
them stay as they are."""
FADE = 0.5
"""Of sigma, of 255: so far below `UNDAMAGED_SIGMA_255` that is so in full."""


class Diagnosis(NamedTuple):
    """What was wrong with one image; see `inference.Restored` for each."""

    sigma: float
    flips: float | None
    patches: float | None
    gray: float

    @property
    def has_flips(self) -> bool:
        return self.flips is not None and self.flips >= UNDAMAGED_SHARE

    @property
    def lost_colour(self) -> bool:
        return self.gray >= UNDAMAGED_GRAY


def diagnose(damaged: Tensor, restored: Tensor, survival: Tensor | None) -> list[Diagnosis]:
    """What was wrong with each image, read off what the network did to it.

    Args:
        damaged, restored: uint8 [B, 3, H, W].
        survival: the gate's logits [B, 1, H, W], or None.
    """
    return verdict(evidence(damaged, restored, survival), gated=survival is not None)


def evidence(
    damaged: Tensor,
    restored: Tensor,
    survival: Tensor | None,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Tensor:
    """Sums over `rows` and `columns` that a diagnosis consists of, float64 [7, B].

    Those of the parts of an image, each given with `CONTEXT` pixels around it where there are some, add up to those of
    the whole: but for the colour exactly, since they are whole numbers. Parts must begin at multiples of `GRID`.
    """
    flipped, painted = destroyed_pixels(torch.ones_like(damaged[:, :1]).float() if survival is None else survival)
    kept = (~(flipped | painted)).to(torch.uint8)
    damaged, restored = (images.contiguous() * kept for images in (damaged, restored))  # a colour at a time is faster
    around = _area_around(kept, AROUND)[..., rows, columns][..., ::GRID, ::GRID]
    weight = _on_grid(kept, rows, columns) / around
    had, has = (_colour(_on_grid(images, rows, columns), around, weight) for images in (damaged, restored))
    before, after = (luma(images[..., rows, columns]).float() for images in (damaged, restored))
    removed = before.sub_(after).square_()  # not of colours: what is lost of them is no noise
    masks = (mask[..., rows, columns] for mask in (flipped, painted, kept))
    counts = [mask.sum(dim=(1, 2, 3), dtype=torch.int32) for mask in masks]
    sums = [part.sum(dim=(1, 2, 3), dtype=torch.float64) for part in (removed, weight, had, has)]
    return torch.stack([*(count.double() for count in counts), *sums])


def verdict(sums: Tensor, *, gated: bool) -> list[Diagnosis]:
    """The diagnoses that `evidence` amounts to."""
    flipped, painted, kept, removed, weight, had, has = sums
    luma_sigma = (removed / kept.clamp(min=1)).sqrt()
    sigma = luma_sigma / (0.299**2 + 0.587**2 + 0.114**2) ** 0.5  # independent channels average out in the luma
    had, has = had / weight.clamp(min=1e-6), has / weight.clamp(min=1e-6)
    gray = ((has - had) / has.clamp(min=1.0)).clamp(min=0.0)
    flips, patches = flipped / (flipped + kept).clamp(min=1), painted / (flipped + painted + kept)
    return [
        Diagnosis(row[0], row[1] if gated else None, row[2] if gated else None, row[3])
        for row in torch.stack([sigma, flips, patches, gray], dim=1).tolist()
    ]


def destroyed_pixels(survival: Tensor) -> tuple[Tensor, Tensor]:
    """From the gate's logits [B, 1, H, W], two masks, bool [B, 1, H, W]: flipped pixels, pixels under patches."""
    destroyed = survival < 0
    if not destroyed.any():
        return destroyed, destroyed
    # A patch is where nearly all of a neighbourhood is destroyed; flipped pixels stand among survivors.
    enough = (0.8 * _area_around(destroyed, 7)).floor().to(torch.uint8)
    dense = sum_around(destroyed.to(torch.uint8), 7) > enough
    painted = (sum_around(dense.to(torch.uint8), 7) > 0) & destroyed
    return destroyed & ~painted, painted


def filled(damaged: Tensor, restored: Tensor, survival: Tensor, found: list[Diagnosis]) -> Tensor:
    """The damaged images with what was restored in the place of destroyed pixels, without colour where it was lost.

    Where pixels were flipped the network sees all others better without them: restored once more, such images gain up
    to 3 dB. Figures: DECISIONS.md, "Flips first".

    Args:
        damaged, restored: uint8 [B, 3, H, W].
        survival: the gate's logits [B, 1, H, W].
        found: the images' diagnoses.

    Returns uint8 [B, 3, H, W].
    """
    content = torch.where(_lost_colour(found, damaged.device), to_gray(restored), restored)
    return torch.where(survival < 0, content, damaged)


def kept_still(damaged: Tensor, restored: Tensor, survival: Tensor, found: list[Diagnosis]) -> Tensor:
    """The restored images; where no noise was found, surviving pixels as they were (soft thresholding, Donoho 1995).

    What the network changes in them by more is what it did not tell for sure. Figures: DECISIONS.md, "Nothing else".

    Args:
        damaged, restored: uint8 [B, 3, H, W].
        survival: the gate's logits [B, 1, H, W].
        found: the images' diagnoses.

    Returns uint8 [B, 3, H, W].
    """
    noise = torch.tensor([diagnosis.sigma for diagnosis in found], device=damaged.device)
    limit = LEFT_ALONE * ((UNDAMAGED_SIGMA_255 - noise) / FADE).clamp(0, 1).reshape(-1, 1, 1, 1)
    if not limit.any():
        return restored
    as_it_was = _untouched(damaged, restored, _lost_colour(found, damaged.device)).float()
    change = restored.float() - as_it_was
    rest = change.abs().sub_(limit).clamp_(min=0).copysign_(change)
    return torch.where(survival < 0, restored, rest.add_(as_it_was).round_().to(torch.uint8))


def _lost_colour(found: list[Diagnosis], device: torch.device) -> Tensor:
    """Which images have lost it, bool [B, 1, 1, 1]."""
    return torch.tensor([diagnosis.lost_colour for diagnosis in found], device=device).reshape(-1, 1, 1, 1)


def _untouched(damaged: Tensor, restored: Tensor, lost: Tensor) -> Tensor:
    """The damaged images, uint8 [B, 3, H, W]; those which have lost their colour, with that of the restored ones."""
    if not lost.any():
        return damaged
    colour = restored.int() - to_gray(restored).int()
    coloured = (to_gray(damaged).int() + colour).clamp(0, 255).to(torch.uint8)
    return torch.where(lost, coloured, damaged)


def repair_only(
    repair: Container[Kind], damaged: Tensor, restored: Tensor, survival: Tensor, found: list[Diagnosis]
) -> Tensor:
    """Take from the restored images what repairs the chosen damages, and the rest from the damaged ones.

    Args:
        repair: kinds of damage to repair.
        damaged, restored: uint8 [B, 3, H, W].
        survival: the gate's logits [B, 1, H, W].
        found: the images' diagnoses.

    Returns uint8 [B, 3, H, W].
    """
    flipped, painted = destroyed_pixels(survival)
    lost = _lost_colour(found, damaged.device)
    result = restored if "gray" in repair else torch.where(lost, to_gray(restored), restored)
    if "noise" not in repair:
        still = _untouched(damaged, restored, lost) if "gray" in repair else damaged
        result = torch.where(flipped | painted, result, still)
    if "flips" not in repair:
        result = torch.where(flipped, damaged, result)
    if "patches" not in repair:
        result = torch.where(painted, damaged, result)
    return result


def _colour(sums: Tensor, around: Tensor, weight: Tensor) -> Tensor:
    """How far the surviving, locally averaged colours are from grey, of 255, times their weight.

    Args:
        sums: of the colours that survived in the squares around the points of the grid, int16 [B, 3, h, w].
        around: how many pixels lie in such a square.
        weight: the share of them that survived.
    """
    red, green, blue = sums.split_with_sizes([1, 1, 1], dim=1)
    darker, brighter = torch.minimum(red, green), torch.maximum(red, green)
    least, most = torch.minimum(darker, blue), torch.maximum(brighter, blue)
    middle = torch.maximum(darker, torch.minimum(brighter, blue))
    # Three values' distances from their mean add up to 2/3 of what is between all of them and the two furthest apart.
    spread = (most - least).float().add_(torch.maximum(most - middle, middle - least)).mul_(2 / 9)
    return spread.div_(around).mul_(weight / weight.clamp(min=0.05))


def _on_grid(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """The sum over the square of `AROUND` pixels around every point of the grid in `rows` and `columns`.

    uint8 [B, C, H, W] -> int16 [B, C, h, w]; outside counts as 0. Exact: 81 * 255 fits. The same as `sum_around` has
    there, for a fourth of its time.
    """
    x = F.pad(x, (AROUND // 2,) * 4).to(torch.int16)
    for dim, part in ((2, rows), (3, columns)):
        first, end, _ = part.indices(x.shape[dim] - AROUND + 1)
        lines = x.narrow(dim, first, end - first + AROUND - 1).unfold(dim, AROUND, GRID)
        x = sum(lines.unbind(-1)[1:], lines[..., 0])
    return x


def _area_around(x: Tensor, side: int) -> Tensor:
    """Of the square around each pixel, how much lies inside. [B, C, H, W] -> float32 [1, 1, H, W]"""
    rows, columns = (
        sum_around(torch.ones(1, 1, *shape, device=x.device), side) for shape in ((x.shape[2], 1), (1, x.shape[3]))
    )
    return rows * columns


def sum_around(x: Tensor, side: int) -> Tensor:
    """The sum over the square around each pixel, of odd `side`: exact for whole numbers, whatever the device.

    Sums of 2, 4, 8 neighbours are made of each other: a tenth of the time of torch's avg_pool2d on a CPU.
    """
    for dim in (2, 3):
        length = x.shape[dim]
        half = side // 2
        window = F.pad(x, (0, 0, half, half) if dim == 2 else (half, half, 0, 0))
        x, done, width = window.narrow(dim, 0, length).clone(), 1, 1
        while done < side:
            size = window.shape[dim] - width
            window = window.narrow(dim, 0, size) + window.narrow(dim, width, size)
            width *= 2
            if side & width:
                x += window.narrow(dim, done, length)
                done += width
    return x

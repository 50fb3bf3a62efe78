"""A second look at what the survival gate took for patches: a smooth sky, say, which no training face has.

A patch is painted in one colour, and its border is a step. Where neither is so, the photograph is left to be what it
shows. Thresholds and what they were found on: DECISIONS.md, "What is no patch".
"""

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from restore_core.diagnosis import destroyed_pixels, sum_around
from restore_core.model import Prediction

SMALLEST = 1000
"""Smaller regions are what they were taken for, pixels: what JPEG leaves around a patch is not flat either."""
SOLID = 9
"""A painted square of this side that has exactly one colour is a patch, or a part of one, pixels."""
FLAT, FLAT_SHARE = 2, 0.9
"""A patch of one colour: so many of its pixels are no further from their median, of 255."""
STEP, STEP_SHARE = 20, 0.4
"""A border: along so much of it the means of both sides are further apart, of 255."""
STEP_MEDIAN = 5
"""Or they are further apart along half of it: under noise, flips and then without colour steps are small."""
OUTLIER = 50
"""A single pixel in what is no patch that is further from the median around it counts as flipped, of 255."""
REACH = 8
"""How far around what is no patch the gate is not believed either, pixels."""
COARSE = 15
"""Of the network's change to it, what is coarser than this is left out, pixels."""

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Sums = npt.NDArray[np.int16]


def without_false_patches(damaged: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor | None]:
    """Image and survival of a prediction, without what was filled in for patches that are none.

    There the image is what the network took off as grain, no more: it sees something it does not know.

    Args:
        damaged: uint8 [B, 3, H, W].
        prediction: for it, float32; changed.
    """
    image, survival, kept = prediction
    if survival is None or kept is None:
        return image, survival
    painted = destroyed_pixels(survival)[1]
    for index in painted.flatten(1).any(dim=1).nonzero().flatten().tolist():
        before = damaged[index].contiguous().cpu().numpy()
        false = _false_patches(before, painted[index, 0].cpu().numpy())
        if not false.any():
            continue
        (around,) = ndimage.find_objects(false.astype(np.int8))
        region = torch.from_numpy(false[around]).to(image.device)
        unfilled = kept[index][:, *around].contiguous().cpu().numpy()
        smoothed = _smoothed(before[:, *around], unfilled)
        filled, outliers = (torch.from_numpy(part).to(image.device) for part in smoothed)
        image[index][:, *around] = torch.where(region, filled, image[index][:, *around])
        gate = torch.where(outliers, -1.0, 1.0)
        survival[index, 0][around] = torch.where(region, gate, survival[index, 0][around])
    return image, survival


def _false_patches(image: Pixels, painted: Mask) -> Mask:
    """Which of the painted regions (and what is around them) show the photograph. [3, H, W], [H, W] -> [H, W]"""
    result, solid = np.zeros_like(painted), np.zeros_like(painted)
    (box,) = ndimage.find_objects(painted.astype(np.int8))
    solid[box] = _solid(image[:, *box], painted[box])
    labels, _ = ndimage.label(painted & ~solid, np.ones((3, 3)))
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        around = (
            slice(max(0, rows.start - REACH), rows.stop + REACH),
            slice(max(0, columns.start - REACH), columns.stop + REACH),
        )
        region = labels[around] == label
        if np.count_nonzero(region) < SMALLEST:
            continue
        pixels = image[:, *around]
        if not _is_flat(pixels, region) and not _has_border(pixels, region, painted[around]):
            result[around] |= _grown(region, REACH)
    if result.any():
        result &= ~_grown(solid, 2)
    return result


def _solid(image: Pixels, painted: Mask) -> Mask:
    """Pixels that lie in a painted square of exactly one colour: those of patches, whatever they grew together with."""
    half = SOLID // 2
    whole = _shrunk(painted, half)
    if not whole.any():
        return whole
    as_below, as_right = np.ones_like(painted), np.ones_like(painted)
    as_below[:-1] = _all_three(image[:, 1:] == image[:, :-1])
    as_right[:, :-1] = _all_three(image[:, :, 1:] == image[:, :, :-1])
    whole &= _all_within(as_below, (half, half - 1), (half, half))
    whole &= _all_within(as_right, (half, half), (half, half - 1))
    return _grown(whole, half)


def _is_flat(pixels: Pixels, region: Mask) -> bool:
    inside = _shrunk(region, 1)
    values = pixels[:, inside if np.count_nonzero(inside) >= 9 else region]
    near = np.abs(values - np.median(values, axis=1, keepdims=True)) <= FLAT
    return bool(_all_three(near).mean() >= FLAT_SHARE)


def _has_border(pixels: Pixels, region: Mask, painted: Mask) -> bool:
    """Whether the colours change along the border; also where it has none, as in the middle of a patch."""
    inner = region & ~_shrunk(region, 3)
    outer = _grown(region, 4) & ~_grown(region, 1) & ~painted
    (inside, some), (outside, others) = (_sums(pixels, part) for part in (inner, outer))
    border = region & ~_shrunk(region, 1) & (some > 5) & (others > 5)
    means = [sums[:, border] / count[border] for sums, count in ((inside, some), (outside, others))]
    steps = np.abs(means[0] - means[1]).max(axis=0)
    return len(steps) <= 8 or bool((steps > STEP).mean() >= STEP_SHARE or np.median(steps) > STEP_MEDIAN)


def _sums(pixels: Pixels, part: Mask) -> tuple[Sums, Sums]:
    """Over the 9x9 pixels around each those that belong to `part`: their colours [3, H, W], and how many [H, W]."""
    planes = torch.from_numpy(np.concatenate([pixels * part, part[None]]).astype(np.int16))
    sums = sum_around(planes[None], 9)[0].numpy()
    return sums[:3], sums[3]


def _smoothed(image: Pixels, kept: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], Mask]:
    """The image in 0..1 without the fine part of what the network takes off, and its single pixels that are far off.

    The latter are the median of the 5x5 pixels around them. [3, H, W], [3, H, W] -> [3, H, W], [H, W]
    """
    damaged = image.astype(np.float32) / 255
    change = kept - damaged
    result = damaged + change - ndimage.uniform_filter(change, (1, COARSE, COARSE))
    around = np.lib.stride_tricks.sliding_window_view(  # [3, H, W, 5, 5]
        np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="symmetric"), (5, 5), axis=(1, 2)
    )
    outliers = _far_from_median(image, around)
    result[:, outliers] = np.median(around[:, outliers].reshape(3, -1, 25), axis=2) / 255
    return result, outliers


def _far_from_median(image: Pixels, around: Pixels) -> Mask:
    """Where a colour is further than `OUTLIER` from the median of the 25 values around it: than 13 of them, that is."""
    darker, brighter = np.zeros_like(image), np.zeros_like(image)
    least, most = (np.clip(image.astype(np.int16) + by, 0, 255).astype(np.uint8) for by in (-OUTLIER, OUTLIER))
    for row, column in np.ndindex(5, 5):
        values = around[..., row, column]
        darker += values < least
        brighter += values > most
    far: Mask = (darker > 12) | (brighter > 12)
    return far[0] | far[1] | far[2]  # type: ignore[no-any-return]


def _all_three(colours: Mask) -> Mask:
    return colours[0] & colours[1] & colours[2]  # type: ignore[no-any-return]


def _grown(mask: Mask, by: int) -> Mask:
    """With what is within `by` pixels, in squares."""
    return ~_shrunk(~mask, by)


def _shrunk(mask: Mask, by: int) -> Mask:
    """What is further than `by` pixels from all that does not belong to it, in squares; outside counts as belonging."""
    return _all_within(mask, (by, by), (by, by))


def _all_within(mask: Mask, rows: tuple[int, int], columns: tuple[int, int]) -> Mask:
    """Whether all pixels belong to it from so many rows above to so many below, and so with columns.

    Windows of 2, 4, 8 are made of each other: a fortieth of the time of scipy's filters. Outside counts as belonging.
    """
    for axis, (before, after) in enumerate((rows, columns)):
        padding = [(before, after) if axis == other else (0, 0) for other in range(2)]
        window = np.moveaxis(np.pad(mask, padding, constant_values=True), axis, 0)
        side, width = before + after + 1, 1
        while width < side:
            step = min(width, side - width)
            window = window[:-step] & window[step:]
            width += step
        mask = np.moveaxis(window, 0, axis)
    return mask

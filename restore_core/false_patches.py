"""A second look at what the survival gate took for patches: a smooth sky, say, which no training face has.

A patch is painted in one colour, and its border is a step. Where neither is so, the photograph is left to be what it
shows. Thresholds and what they were found on: DECISIONS.md, "What is no patch".
"""

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from restore_core.diagnosis import destroyed_pixels
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

Mask = npt.NDArray[np.bool_]
SQUARE = np.ones((3, 3), bool)


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
        before = damaged[index].permute(1, 2, 0).cpu().numpy()
        false = _false_patches(before, painted[index, 0].cpu().numpy())
        if not false.any():
            continue
        (around,) = ndimage.find_objects(false.astype(np.int8))
        region = torch.from_numpy(false[around]).to(image.device)
        unfilled = kept[index][:, *around].permute(1, 2, 0).cpu().numpy()
        filled, outliers = (torch.from_numpy(part).to(image.device) for part in _smoothed(before[around], unfilled))
        image[index][:, *around] = torch.where(region, filled.permute(2, 0, 1), image[index][:, *around])
        gate = torch.where(outliers, -1.0, 1.0)
        survival[index, 0][around] = torch.where(region, gate, survival[index, 0][around])
    return image, survival


def _false_patches(image: npt.NDArray[np.uint8], painted: Mask) -> Mask:
    """Which of the painted regions (and what is around them) show the photograph. [H, W, 3], [H, W] -> [H, W]"""
    solid = _solid(image, painted)
    labels, _ = ndimage.label(painted & ~solid, SQUARE)
    result = np.zeros_like(painted)
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        around = (
            slice(max(0, rows.start - REACH), rows.stop + REACH),
            slice(max(0, columns.start - REACH), columns.stop + REACH),
        )
        region = labels[around] == label
        if region.sum() < SMALLEST:
            continue
        pixels = image[around].astype(np.float32)
        if not _is_flat(pixels, region) and not _has_border(pixels, region, painted[around]):
            result[around] |= ndimage.binary_dilation(region, SQUARE, iterations=REACH)
    result &= ~ndimage.binary_dilation(solid, SQUARE, iterations=2)
    return result


def _solid(image: npt.NDArray[np.uint8], painted: Mask) -> Mask:
    """Pixels that lie in a painted square of exactly one colour: those of patches, whatever they grew together with."""
    result = np.zeros_like(painted)
    (around,) = ndimage.find_objects(painted.astype(np.int8))
    least, most = (
        extreme(image[around], (SOLID, SOLID, 1)) for extreme in (ndimage.minimum_filter, ndimage.maximum_filter)
    )
    whole = ndimage.minimum_filter(painted[around], SOLID) & (least == most).all(axis=2)
    result[around] = ndimage.binary_dilation(whole, np.ones((SOLID, SOLID), bool))
    return result


def _is_flat(pixels: npt.NDArray[np.float32], region: Mask) -> bool:
    inside = ndimage.binary_erosion(region, SQUARE, border_value=1)
    values = pixels[inside if inside.sum() >= 9 else region]
    near = np.abs(values - np.median(values, axis=0)).max(axis=1) <= FLAT
    return bool(near.mean() >= FLAT_SHARE)


def _has_border(pixels: npt.NDArray[np.float32], region: Mask, painted: Mask) -> bool:
    """Whether the colours change along the border; also where it has none, as in the middle of a patch."""
    inner = region & ~ndimage.binary_erosion(region, SQUARE, iterations=3, border_value=1)
    near, far = (ndimage.binary_dilation(region, SQUARE, iterations=by) for by in (1, 4))
    (inside, some), (outside, others) = (_means(pixels, part) for part in (inner, far & ~near & ~painted))
    border = region & ~ndimage.binary_erosion(region, SQUARE, border_value=1) & (some > 5) & (others > 5)
    steps = np.abs(inside - outside).max(axis=2)[border]
    return len(steps) <= 8 or bool((steps > STEP).mean() >= STEP_SHARE or np.median(steps) > STEP_MEDIAN)


def _means(pixels: npt.NDArray[np.float32], part: Mask) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Mean colour of that part of the 9x9 pixels around each, and how many of them belong to it."""
    share = ndimage.uniform_filter(part.astype(np.float32), 9, mode="constant")
    sums = ndimage.uniform_filter(pixels * part[..., None], (9, 9, 1), mode="constant")
    return sums / np.maximum(share, 1e-6)[..., None], share * 81


def _smoothed(image: npt.NDArray[np.uint8], kept: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], Mask]:
    """The image in 0..1 without the fine part of what the network takes off, and its single pixels that are far off.

    The latter are the median of the 5x5 pixels around them. [H, W, 3], [H, W, 3] -> [H, W, 3], [H, W]
    """
    median = ndimage.median_filter(image, (5, 5, 1))
    outliers = np.abs(image.astype(np.int16) - median).max(axis=2) > OUTLIER
    damaged = image.astype(np.float32) / 255
    change = kept - damaged
    result = damaged + change - ndimage.uniform_filter(change, (COARSE, COARSE, 1))
    return np.where(outliers[..., None], median.astype(np.float32) / 255, result), outliers

"""Large holes once more, at half the size: there the network sees twice as far around them.

What it fills them with is a mean of what may have been there, so two such looks are better than either. Figures:
DECISIONS.md, "Holes at half the size".
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from restore_core.diagnosis import destroyed_pixels

LEAST = 128
"""Pictures with a longer side under this are too small for it, pixels: at half the size the network knows less."""
BLOCK = 8
"""A hole is large enough if a square of this side on a grid of such squares is destroyed, pixels."""
AROUND = 16
"""How far around such squares is looked at with them, in squares."""
PLAIN_SHARE = 0.7
"""Of a painted hole's pixels."""
TAKEN_SHARE, LEAST_TAKEN, FULL_SHARE, LEAST_DEPTH = 0.4, 100, 0.95, 4
"""Of a region of one colour, to be patches as a whole: what the gate has taken for them, that in pixels, and what lies
in squares of no less than half the side of the largest one in it; and the least that is half of such a side, pixels.
Bars and letters that touch a patch are thinner."""
MOST_COLOURS = 32
"""So many may be looked at: a picture whose pixels were doubled has many with others of their colour beside them."""
MOST = 2**22
"""Of a region, pixels: some 60 bytes of memory each."""
SHARE = 2 / 3
"""Of the look at half the size in the result; the rest is what was there."""

WAVERING = 2
"""So near to what it has not taken for destroyed the gate's result is a mixture with what was painted, pixels."""
DARK = 64
"""What is around a hole is no brighter on average, in its brightest colour, of 255."""

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Colours = npt.NDArray[np.uint32]
Region = tuple[slice, slice]


class Destroyed(Protocol):
    """Which pixels were destroyed: bool [H, W], or `strips.Mask`."""

    def __getitem__(self, at: Region, /) -> Mask: ...


def regions(destroyed: Destroyed, height: int, width: int) -> list[Region]:
    """Rows and columns of what belongs together around the large holes; without what is too large to be held again."""
    if max(height, width) < LEAST or min(height, width) < BLOCK:
        return []
    columns = slice(0, width // BLOCK * BLOCK)
    bands = []
    for top in range(0, height // BLOCK * BLOCK, 64 * BLOCK):
        band = destroyed[slice(top, min(top + 64 * BLOCK, height // BLOCK * BLOCK)), columns]
        bands.append(band.reshape(-1, BLOCK, columns.stop // BLOCK, BLOCK).all(axis=(1, 3)))
    solid = np.concatenate(bands)
    if not solid.any():
        return []
    near = _grown(solid, AROUND)

    def pixels(part: slice, count: int, length: int) -> slice:
        return slice(part.start * BLOCK, length if part.stop == count else part.stop * BLOCK)

    found = [
        (pixels(rows, near.shape[0], height), pixels(places, near.shape[1], width))
        for rows, places in ndimage.find_objects(ndimage.label(near)[0])
    ]
    sizes = ((rows.stop - rows.start) * (places.stop - places.start) for rows, places in found)
    return [region for region, size in zip(found, sizes, strict=True) if size <= MOST]


def painted(destroyed: Mask, damaged: Pixels) -> Mask:
    """Of destroyed pixels [H, W] those in holes that were painted: most pixels there, uint8 [H, W, 3], are like others
    beside and below or above them. Else the gate may be wrong, and what is there is better seen as it is."""
    gate = torch.where(torch.from_numpy(destroyed), -1.0, 1.0)
    hole = destroyed_pixels(gate[None, None])[1][0, 0].numpy()
    labels, count = ndimage.label(hole, np.ones((3, 3)))
    colours = np.pad(damaged, ((0, 0), (0, 0), (0, 1))).view(np.uint32)[:, :, 0]  # as one number each
    plain = _like_a_neighbour(colours, 0) & _like_a_neighbour(colours, 1)
    sizes, plain_sizes = (np.bincount(some, minlength=count + 1) for some in (labels[hole], labels[hole & plain]))
    hole &= (plain_sizes >= PLAIN_SHARE * sizes)[labels]
    return np.asarray(hole | _rest_of_patches(hole & plain, colours))


def _rest_of_patches(hole: Mask, colours: Colours) -> Mask:
    """Regions of one colour of which the gate has taken `TAKEN_SHARE` for patches, or more, and which consist of
    squares: they are patches as a whole, also where some have grown together."""
    result = np.zeros_like(hole)
    found, counts = np.unique(colours[hole], return_counts=True)
    commonest = np.argsort(-counts, kind="stable")[:MOST_COLOURS]
    for colour in found[commonest][counts[commonest] >= LEAST_TAKEN]:
        labels, count = ndimage.label(colours == colour)
        sizes, taken = (np.bincount(part, minlength=count + 1) for part in (labels.ravel(), labels[hole]))
        likely = taken >= np.maximum(LEAST_TAKEN, TAKEN_SHARE * sizes)  # noise may have thousands, of which few are
        likely[0] = False  # all other colours
        if likely.any():
            squares = _in_large_squares(np.where(likely[labels], labels, 0), count)
            likely &= np.bincount(labels[squares], minlength=count + 1) >= FULL_SHARE * sizes
            result |= likely[labels]
    return result


def _in_large_squares(labels: npt.NDArray[np.int32], count: int) -> Mask:
    """What of the regions with labels up to `count` lies in squares of no less than half the side of the largest in
    its region. (A morphological opening, by distances: Soille 2003, chapter 4.)"""
    inside = labels > 0
    depth = ndimage.distance_transform_cdt(np.pad(inside, 1), "chessboard")[1:-1, 1:-1]
    least = (ndimage.maximum(depth, labels, np.arange(count + 1)) + 1) // 2
    least = np.maximum(least, LEAST_DEPTH)
    seeds: Mask = inside & (depth >= least[labels])
    if seeds.any():
        seeds = inside & (ndimage.distance_transform_cdt(~seeds, "chessboard") < least[labels])
    return seeds


def _like_a_neighbour(colours: Colours, axis: int) -> Mask:
    colours = np.moveaxis(colours, axis, 0)
    result = np.zeros(colours.shape, bool)
    same = colours[1:] == colours[:-1]
    result[1:] = same
    result[:-1] |= same
    return np.moveaxis(result, 0, axis)


def halved(pixels: Pixels, hole: Mask) -> Pixels:
    """uint8 [H, W, 3] at half the size, the means of what is not in a hole; holes are black."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    gone = torch.from_numpy(hole)[None, None].float()
    share = _half(gone)
    small = _half(image * (1 - gone)) / (1 - share).clamp(min=1e-3)
    small = torch.where(share > 0.5, 0.0, small).round().to(torch.uint8)
    return np.ascontiguousarray(small[0].permute(1, 2, 0).numpy())


def blended(pixels: Pixels, hole: Mask, destroyed: Mask, small: Pixels, destroyed_small: Mask) -> Pixels:
    """uint8 [H, W, 3] whose holes are, to `SHARE`, what the restored picture of half the size has there.

    Where the gate had not taken the pixels for destroyed, they are that altogether; where it had not at half the size,
    they stay what they are; and where it had in neither look, they become what is around the hole. But a hole that is
    in the dark may be as black as it was painted.
    """
    height, width = hole.shape
    painted_small = (_half(torch.from_numpy(hole)[None, None].float()) > 0.5)[0, 0].numpy()
    left = _grown(painted_small & ~destroyed_small, 1).repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    around = pixels
    if left.any():
        around = _around(pixels, hole)
        labels, count = ndimage.label(hole, np.ones((3, 3)))
        bright = np.zeros(count + 1, bool)
        bright[1:] = ndimage.mean(around.max(axis=2), labels, np.arange(1, count + 1)) > DARK
        left &= bright[labels]
    once = torch.from_numpy(np.ascontiguousarray(small)).permute(2, 0, 1)[None].float()
    twice = F.interpolate(once, scale_factor=2, mode="bilinear", align_corners=False)[0, :, :height, :width]
    filled = destroyed & ~_grown(hole & ~destroyed, WAVERING)
    result = pixels.copy()
    share = np.where(left, 0, np.where(filled, np.float32(SHARE), np.float32(1)))[hole][:, None]
    result[hole] = np.rint(share * twice.permute(1, 2, 0).numpy()[hole] + (1 - share) * pixels[hole]).astype(np.uint8)
    empty = hole & left & ~filled
    result[empty] = around[empty]
    return result


def _half(x: Tensor) -> Tensor:
    """At half the size: means, with the last row and column repeated where there is an odd number of them."""
    return F.avg_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="replicate"), 2)


def _grown(mask: Mask, by: int) -> Mask:
    """With what is within `by` pixels, in squares."""
    return ndimage.maximum_filter(mask, 2 * by + 1)  # type: ignore[no-any-return]


def _around(pixels: Pixels, empty: Mask) -> Pixels:
    """uint8 [H, W, 3] whose empty pixels are means of those around them, from further away the fewer of them are near
    (pull-push: Gortler 1996, section 3.4)."""
    known = torch.from_numpy(~empty)[None, None].float()
    colours = torch.from_numpy(pixels).permute(2, 0, 1)  # one at a time, for the memory
    filled = [_pulled(colour[None, None].float(), known)[0, 0].round().to(torch.uint8).numpy() for colour in colours]
    return np.stack(filled, axis=2)


def _pulled(values: Tensor, known: Tensor) -> Tensor:
    """The values, and where `known` is 0 and not 1 what is there at half the size. [1, 1, H, W] all"""
    if known.min() == 1 or known.numel() == 1:
        return values
    padding = (0, known.shape[3] % 2, 0, known.shape[2] % 2)
    share = F.avg_pool2d(F.pad(known, padding), 2)
    half = F.avg_pool2d(F.pad(values * known, padding), 2) / share.clamp(min=1e-6)
    half = _pulled(half, (share > 0).float())
    twice = F.interpolate(half, scale_factor=2, mode="bilinear", align_corners=False)
    return torch.where(known > 0, values, twice[:, :, : known.shape[2], : known.shape[3]])

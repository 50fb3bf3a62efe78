"""Photographs of any size in pieces: what no memory holds at once is predicted tile by tile, and blended."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from restore_core.metrics import to_uint8

Pixels = npt.NDArray[np.uint8]
Span = tuple[int, int]


def predict(image: Pixels, network: Callable[[Tensor], Tensor], tile: int, overlap: int) -> Pixels:
    """The network's result for a whole image, from overlapping tiles.

    Args:
        image: uint8 [H, W, 3]
        network: uint8 [1, 3, h, w] -> float [1, 3, h, w] in 0..1
        tile: side of the tiles, pixels.
        overlap: pixels that neighbouring tiles share, a multiple of 16 of at most eight ninths of `tile`. Of it each
            tile's outer seven sixteenths count for nothing, since what lies near a border sees too little around it;
            over the eighth between them one tile fades into the other.

    Returns uint8 [H, W, 3]. Beside it this holds one tile and the seam below one row of tiles.
    """
    height, width, _ = image.shape
    result = np.empty_like(image, order="C")
    above: Tensor | None = None  # [3, seam, W], what the row of tiles above has for the seam
    for rows in spans(height, tile, overlap):
        (top, bottom), upper, lower = trimmed(rows, height, overlap)
        left_seam: Tensor | None = None
        for columns in spans(width, tile, overlap):
            (left, right), before, after = trimmed(columns, width, overlap)
            pixels = network(batch_of(image[slice(*rows), slice(*columns)]))[0]
            pixels = pixels[:, top - rows[0] : bottom - rows[0], left - columns[0] : right - columns[0]]
            if left_seam is not None:
                pixels[:, :, :before] = fade(left_seam, pixels[:, :, :before], dim=2)
            left_seam = pixels[:, :, pixels.shape[2] - after :].clone()
            pixels = pixels[:, :, : pixels.shape[2] - after]
            right -= after
            if above is None:
                above = pixels.new_empty(3, lower, width)
            if upper:
                pixels[:, :upper] = fade(above[:, :, left:right], pixels[:, :upper], dim=1)
            if lower:
                above[:, :, left:right] = pixels[:, -lower:]
                pixels = pixels[:, :-lower]
            result[top : bottom - lower, left:right] = to_uint8(pixels).permute(1, 2, 0).cpu().numpy()
    return result


def batch_of(image: Pixels) -> Tensor:
    """[H, W, 3] -> [1, 3, H, W]"""
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None]


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """First pixel and end of each tile along one side; all but the last are of full length."""
    starts = range(0, max(1, length - overlap), tile - overlap)
    return [(start, min(start + tile, length)) for start in starts]


def trimmed(span: Span, length: int, overlap: int) -> tuple[Span, int, int]:
    """What of a tile counts, and how much of that fades over into the tile before and into the one after."""
    seam, ignored = overlap // 8, overlap // 16 * 7
    start, end = span
    before, after = start > 0, end < length
    return (start + ignored * before, end - ignored * after), seam * before, seam * after


def fade(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """From the one to the other, linearly along `dim`."""
    length = first.shape[dim]
    weight = (torch.arange(length, device=first.device) + 0.5) / length
    return torch.lerp(first, second, weight.reshape([-1 if axis == dim else 1 for axis in range(first.ndim)]))


@dataclass(frozen=True)
class Block:
    """A part of an image, and the same with some pixels around it where there are any."""

    at: tuple[slice, slice]
    """Its rows and columns."""
    around: tuple[slice, slice]
    """Those with the margin."""
    within: tuple[slice, slice]
    """Where in the latter it lies."""


def blocks(height: int, width: int, side: int, margin: int) -> Iterator[Block]:
    """The image in parts of at most side x side pixels."""
    for top in range(0, height, side):
        for left in range(0, width, side):
            at = slice(top, min(top + side, height)), slice(left, min(left + side, width))
            around = _grown(at[0], margin, height), _grown(at[1], margin, width)
            within = [slice(a.start - b.start, a.stop - b.start) for a, b in zip(at, around, strict=True)]
            yield Block(at, around, (within[0], within[1]))


def _grown(part: slice, by: int, length: int) -> slice:
    return slice(max(0, part.start - by), min(length, part.stop + by))

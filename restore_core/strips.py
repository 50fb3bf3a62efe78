"""Photographs of any size from top to bottom, for a network that takes some rows at a time; wide ones in columns."""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from restore_core.metrics import to_uint8
from restore_core.model import Prediction, each
from restore_core.tiles import Pixels, fade, spans, trimmed

Results = Iterator[Tensor]
"""[1, C, n, W], one below the other: the image, float in 0..1, and, where the network is gated, survival logits."""


class Mask:
    """One bit a pixel, [H, W]."""

    def __init__(self, height: int, width: int) -> None:
        self._bits = np.zeros((height, (width + 7) // 8), np.uint8)

    def __setitem__(self, at: tuple[slice, slice], values: npt.NDArray[np.bool_]) -> None:
        rows, columns = at
        first, end = columns.start // 8, (columns.stop + 7) // 8
        bits = np.unpackbits(self._bits[rows, first:end], axis=1)
        bits[:, columns.start - 8 * first : columns.stop - 8 * first] = values
        self._bits[rows, first:end] = np.packbits(bits, axis=1)

    def __getitem__(self, at: tuple[slice, slice]) -> npt.NDArray[np.bool_]:
        rows, columns = at
        first = columns.start // 8
        bits = np.unpackbits(self._bits[rows, first : (columns.stop + 7) // 8], axis=1)
        return bits[:, columns.start - 8 * first : columns.stop - 8 * first].astype(bool)


def predict(
    image: Pixels, network: Callable[[Pixels], Results], width: int, overlap: int, *, in_place: bool = False
) -> tuple[Pixels, Mask | None]:
    """The network's result for a whole image.

    Args:
        image: uint8 [H, W, 3]
        network: for a part of the image that is as high and no wider than `width`.
        overlap: pixels that neighbouring columns of a wider image share, as tiles do (`tiles.predict`).
        in_place: write it over the image, of which columns are copied as long as they are needed: two, as a rule.

    Returns uint8 [H, W, 3], and where the gate says that a pixel was destroyed.
    """
    height, whole, _ = image.shape
    result, destroyed = image if in_place else np.empty_like(image, order="C"), Mask(height, whole)
    gated = False
    seam = torch.empty(0)  # [4 or 3, H, seam], what the column to the left has for it
    for columns, part in _columns(image, spans(whole, width, overlap), copied=in_place):
        (left, right), before, after = trimmed(columns, whole, overlap)
        top, parts = 0, []
        for planes in network(part):
            gated = planes.shape[1] == 4
            both = planes[0, :, :, left - columns[0] : right - columns[0]]
            rows = slice(top, top + both.shape[1])
            if before:
                both[:, :, :before] = fade(seam[:, rows], both[:, :, :before], dim=2)
            if after:
                parts.append(both[:, :, -after:].clone())
                both = both[:, :, :-after]
            at = slice(left, left + both.shape[2])
            result[rows, at] = to_uint8(both[:3]).permute(1, 2, 0).cpu().numpy()
            if gated:
                destroyed[rows, at] = (both[3] < 0).cpu().numpy()
            top = rows.stop
        seam = torch.cat(parts, dim=1) if parts else seam
        del part  # before the next one is copied
    return result, destroyed if gated else None


def _columns(
    image: Pixels, columns: list[tuple[int, int]], *, copied: bool
) -> Iterator[tuple[tuple[int, int], Pixels]]:
    """Each with its part of the image, or a copy, made before results are written over what it shares with others."""
    waiting, copies = deque(columns), deque[Pixels]()
    for column in columns:
        while copied and waiting and waiting[0][0] < column[1]:
            copies.append(image[:, slice(*waiting.popleft())].copy())
        yield column, copies.popleft() if copied else image[:, slice(*column)]


def bands(
    parts: Iterator[Prediction], height: int, side: int, margin: int
) -> Iterator[tuple[slice, slice, Prediction]]:
    """The prediction in pieces that may be changed: of `side` rows, with some around them where there are any.

    Yields the rows of the image that a piece shows, which of its own are not the margin, and the piece.
    """
    held: list[Prediction] = []
    first, count, top = 0, 0, 0  # the first row that is held, how many are, and the first that is due
    while top < height:
        bottom = min(top + side, height)
        end = min(bottom + margin, height)
        while first + count < end:
            held.append(next(parts))
            count += held[-1].image.shape[2]
        piece = each(lambda *some: torch.cat(some, dim=2), *held)
        begin = max(0, bottom - margin)
        held = [each(lambda part: part[:, :, begin - first :].clone(), piece)]  # noqa: B023
        shown = slice(first, end)
        yield shown, slice(top - first, bottom - first), each(lambda part: part[:, :, : end - first], piece)  # noqa: B023
        first, count, top = begin, first + count - begin, bottom

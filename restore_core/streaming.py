"""The residual encoder-decoder over a picture some rows at a time, from top to bottom.

It comes to the same as the whole at once: each convolution keeps the last rows that it was given until those below are
there. Memory grows with the width alone, and nothing is computed twice as in tiles, which must overlap.
"""

from collections import deque
from collections.abc import Iterator
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restore_core.model import Prediction, ResidualBlock, ResidualUNet

Rows = Iterator[Tensor]
"""[1, C, n, W] each, one below the other; how many rows n differs, and is never none."""


# What is waiting for its next rows must not hold those it has passed on. So it is an object that `map` calls with each,
# and no generator, which would keep the variables of its loop.


def predict(network: ResidualUNet, image: Rows) -> Iterator[Prediction]:
    """The prediction for the rows of an image, float RGB in 0..1, as soon as enough below them is there.

    Height and width must be multiples of `network.multiple`.
    """
    waiting = Waiting()

    def merged(tail: Tensor) -> Prediction:
        return network.merge(waiting.take(tail.shape[2]), tail)

    head = _convolved(network.head, map(waiting.put, image))
    tail = _convolved(network.tail, _scale(network, 0, head))
    return map(merged, tail)


class Waiting:
    """Rows that wait for others to be added to."""

    def __init__(self) -> None:
        self._parts: deque[Tensor] = deque()

    def put(self, rows: Tensor) -> Tensor:
        """And pass them on."""
        self._parts.append(rows)
        return rows

    def take(self, count: int) -> Tensor:
        """The first `count` of those that are left."""
        return torch.cat(list(self._first(count)), dim=2)

    def add_to(self, rows: Tensor) -> Tensor:
        """Add as many as there are, in place."""
        top = 0
        for part in self._first(rows.shape[2]):
            rows[:, :, top : top + part.shape[2]].add_(part)
            top += part.shape[2]
        return rows

    def _first(self, count: int) -> Rows:
        while count:
            part = self._parts.popleft()
            if part.shape[2] > count:
                self._parts.appendleft(part[:, :, count:].clone())  # which lets go of the rest
                part = part[:, :, :count]
            yield part
            count -= part.shape[2]


def _scale(network: ResidualUNet, level: int, rows: Rows) -> Rows:
    """All that the network does at that scale and at coarser ones. [1, C, n, W] -> the same"""
    if level == len(network.encoder):
        return _blocks(network.bottleneck, rows)
    skips = Waiting()
    fine = map(skips.put, _blocks(network.encoder[level], rows))
    coarse = _scale(network, level + 1, _due(_Halving(network.down[level]), fine))
    return _blocks(network.decoder[-1 - level], map(skips.add_to, map(network.up[-1 - level], coarse)))


def _blocks(blocks: nn.Module, rows: Rows) -> Rows:
    for block in blocks.children():
        assert isinstance(block, ResidualBlock)
        waiting = Waiting()
        inside = _convolved(block.first, map(waiting.put, rows))
        rows = map(waiting.add_to, _convolved(block.second, inside, relu=True))
    return rows


def _due(step: "_Convolution | _Halving", rows: Rows) -> Rows:
    """What a step has to say to some rows, if anything."""
    return filter(lambda part: part.shape[2] > 0, map(step, rows))


def _convolved(convolution: nn.Conv2d, rows: Rows, *, relu: bool = False) -> Rows:
    step = _Convolution(convolution, relu=relu)
    return chain(_due(step, rows), map(_Convolution.last, [step]))


class _Convolution:
    """3x3 with a border of zeros, of the rows or of what is positive in them: a row is due once the next is there."""

    def __init__(self, convolution: nn.Conv2d, *, relu: bool) -> None:
        self._convolution, self._relu = convolution, relu
        self._above: Tensor | None = None

    def __call__(self, part: Tensor) -> Tensor:
        above = torch.zeros_like(part[:, :, :1]) if self._above is None else self._above
        count, channels, height, width = part.shape
        held = above.shape[2]
        x = torch.empty(
            count, channels, held + height, width, dtype=part.dtype, device=part.device,
            memory_format=torch.channels_last,
        )  # fmt: skip
        x[:, :, :held] = above
        if self._relu:  # on the way: each pass over the finest scale counts
            torch.clamp_min(part, 0, out=x[:, :, held:])
        else:
            x[:, :, held:] = part
        self._above = x[:, :, -2:].clone()
        return self._of(x) if x.shape[2] > 2 else part[:, :, :0]

    def last(self) -> Tensor:
        """The row that nothing is below."""
        assert self._above is not None
        return self._of(torch.cat([self._above, torch.zeros_like(self._above[:, :, :1])], dim=2))

    def _of(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self._convolution.weight, self._convolution.bias, padding=(0, 1))


class _Halving:
    """2x2 with stride 2: two rows are due at a time."""

    def __init__(self, down: nn.Module) -> None:
        self._down = down
        self._odd: Tensor | None = None

    def __call__(self, part: Tensor) -> Tensor:
        if self._odd is not None:
            part = torch.cat([self._odd, part], dim=2)
        even = part.shape[2] // 2 * 2
        self._odd = part[:, :, even:].clone() if even < part.shape[2] else None
        return self._down(part[:, :, :even]) if even else part[:, :, :0]

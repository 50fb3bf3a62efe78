"""What is laid over clean training samples: on as many as asked for, always the same, and never a painted patch."""

import pytest
import torch
from torch import Tensor

from restore_core.degradations import Generator
from restore_core.overlays import draw_overlays


def gradients(count: int, height: int = 40, width: int = 56) -> Tensor:
    """Images uint8 [B, 3, H, W] without two equal neighbours."""
    x = torch.arange(width)[None, :] * 3 + torch.arange(height)[:, None] * 2
    return torch.stack([(x + 7 * index).remainder(251).expand(3, height, width) for index in range(count)]).byte()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_as_many_images_change_as_asked_for(share: float) -> None:
    images = gradients(400)
    laid = draw_overlays(images, share, Generator(range(400)))
    changed = (laid != images).flatten(1).any(dim=1).float().mean().item()
    assert laid.shape == images.shape and laid.dtype == torch.uint8
    assert changed == pytest.approx(share, abs=0.07)


def test_the_same_seeds_give_the_same_overlays() -> None:
    images = gradients(16)
    first, again = (draw_overlays(images, 0.7, Generator(range(16))) for _ in range(2))
    other = draw_overlays(images, 0.7, Generator(range(16, 32)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_nothing_drawn_is_a_square_of_one_colour_inside_the_image() -> None:
    images = gradients(300, 64, 64)
    laid = draw_overlays(images, 1.0, Generator(range(300)))
    for image, before in zip(laid, images, strict=True):
        changed = (image != before).any(dim=0)
        rows, columns = changed.any(dim=1).nonzero(), changed.any(dim=0).nonzero()
        if not len(rows):
            continue
        top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
        box = image[:, top : bottom + 1, left : right + 1]
        one_colour = bool((box == box[:, :1, :1]).all())
        square = bottom - top == right - left and min(top, left) > 0 and max(bottom, right) < 63
        assert not (one_colour and square and bottom - top >= 4)


def test_one_pixel_images_pass() -> None:
    assert draw_overlays(gradients(8, 1, 1), 1.0, Generator(range(8))).shape == (8, 3, 1, 1)

"""What looks like damage and is none: borders, captions, signs, logos, collages, shapes cut out of a photograph.

A restorer that has only seen photographs takes them for painted patches and paints over them. So some of the clean
training samples get them, and the network has to leave them as they are. The painted patches of `degradations` are
axis-parallel squares of one colour that lie within the photograph; nothing drawn here is one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from restore_core.degradations import Generator, to_device

MAX_OVERLAYS = 3
CELLS = 24  # the coarse random pattern that letters are cut from, cells a side


def draw_overlays(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Lay one to three of them over a `share` (0 to 1) of the images, uint8 [B, 3, H, W]. Returns the same shape.

    Equally often: a border or a bar from edge to edge, a disc or slanted rectangle, letters with or without a sign
    behind them, part of another photograph of the batch.
    """
    choice = generator.uniform(1)[:, 0]
    count = torch.where(choice < share, (choice / share * MAX_OVERLAYS).long() + 1, 0)  # [B]
    for turn in range(MAX_OVERLAYS):
        images = torch.where((turn < count)[:, None, None, None], _overlay(images, generator), images)
    return images


def _overlay(images: Tensor, generator: Generator) -> Tensor:
    """One overlay on every image."""
    size, _, height, width = images.shape
    draw = generator.uniform(10)  # [B, 10]
    colour, other_colour = _colours(generator), _colours(generator)
    # Coordinates -1 to 1 around a random middle, in which the overlay reaches from -1 to 1.
    y = torch.linspace(0, 1, height, device=images.device)[None, :, None] - draw[:, 0, None, None]
    x = torch.linspace(0, 1, width, device=images.device)[None, None, :] - draw[:, 1, None, None]
    extent = 0.05 + 0.35 * draw[:, 2:4]  # half of the height and width, as a share of the image's
    v, u = y / extent[:, 0, None, None], x / extent[:, 1, None, None]  # [B, H, 1], [B, 1, W]
    upright = (v.abs() < 1) & (u.abs() < 1)  # [B, H, W]

    angle = (0.1 + 0.4 * draw[:, 4, None, None]) * torch.pi  # 18 to 90 degrees
    turned_v = (angle.cos() * y + angle.sin() * x) / extent[:, 0, None, None]
    turned_u = (angle.cos() * x - angle.sin() * y) / extent[:, 1, None, None] * 3  # so that none is a square
    slanted = (turned_v.abs() < 1) & (turned_u.abs() < 1)
    disc = v.square() + u.square() < 1
    shape = torch.where((draw[:, 5] < 0.5)[:, None, None], disc, slanted)

    bits = (generator.uniform(1, CELLS, CELLS) < 0.45).float()  # [B, 1, C, C]
    stretched = u * (0.2 + 0.8 * draw[:, 6, None, None])
    grid = torch.stack((stretched.expand(size, height, width), v.expand(size, height, width)), dim=-1)  # [B, H, W, 2]
    letters = F.grid_sample(bits, grid, mode="nearest", align_corners=False)[:, 0] > 0.5
    letters &= (v.abs() < 0.85) & (u.abs() < 0.85)
    sign = (draw[:, 7] < 0.6)[:, None, None] & upright

    thickness = 0.02 + 0.18 * draw[:, 8, None, None]
    down, across = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
    top = to_device(torch.minimum(down, 1 - down), images.device)[None, :, None] < thickness  # both ends, [B, H, 1]
    side = to_device(torch.minimum(across, 1 - across), images.device)[None, None, :] < thickness
    borders = (top, side, top | side, y.abs() < thickness / 4, x.abs() < thickness / 4)
    which = (draw[:, 9] * len(borders)).long(), torch.arange(size, device=images.device)
    border = torch.stack([each.expand(size, height, width) for each in borders])[which]  # [B, H, W]

    kind = generator.integers(4, 1)[:, 0, None, None]  # [B, 1, 1]
    area = torch.where(kind == 0, border, torch.where(kind == 1, shape, torch.where(kind == 2, sign, upright)))
    filling = torch.where((kind == 3)[:, None], images.roll(1, 0), colour)
    result = torch.where(area[:, None], filling, images)
    return torch.where(((kind == 2) & letters)[:, None], other_colour, result)


def _colours(generator: Generator) -> Tensor:
    """Black, white or any other colour, equally often, uint8 [B, 3, 1, 1]."""
    any_colour = generator.integers(256, 3).to(torch.uint8)
    extreme = (255 * generator.integers(2, 1)).to(torch.uint8)
    return torch.where(generator.integers(3, 1) > 0, extreme, any_colour)[:, :, None, None]

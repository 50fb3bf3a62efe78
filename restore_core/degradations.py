"""The damages: Gaussian noise, flipped pixels, painted patches, lost colour, and all of them mixed.

Images are uint8 RGB [B, 3, H, W] on any torch device, sRGB values as stored; so is every result. Strengths are one
number per image. A strength of 0 leaves the image bit-identical.

All randomness comes from a `Generator` made of one seed per image, so that what happens to a photograph depends on
(run seed, key) alone: not on the batch, the worker, the device or the time.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from restore_core.config import DamageConfig

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

NOISE, FLIPS, PATCHES, GRAY = range(4)
MAX_PATCHES = 5
LAYOUTS = 16  # of the squares, of which the one is taken where they overlap least

STANDARD: dict[str, dict[str, float]] = {
    "clean": {},
    **{f"noise_{sigma}": {"sigma_255": sigma} for sigma in (15, 25, 50, 75)},
    **{f"flips_{percent}": {"flips": percent / 100} for percent in (5, 10, 30, 50)},
    **{f"patches_{percent}": {"area": percent / 100} for percent in (5, 15, 25)},
    "coloured_patches_15": {"area": 0.15, "coloured": True},
    "gray": {"gray": True},
    "mixed": {"sigma_255": 25, "flips": 0.1, "area": 0.1},
    "all": {"sigma_255": 25, "flips": 0.1, "area": 0.1, "gray": True},
}
"""The fixed damages that quality is measured with, as arguments of `fixed_damage`."""

# splitmix64 (Steele 2014, "Fast splittable pseudorandom number generators"), as two's-complement int64.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


def seed_of(run_seed: int, *parts: str | int) -> int:
    """A seed in int64 for one image: the same for the same run seed and key (and epoch, crop ...), everywhere."""
    text = "\0".join(str(part) for part in (run_seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") - 2**63


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Through pinned memory, from which a GPU fetches by itself: nothing waits for what it was given to do before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class Generator:
    """Independent random streams, one per image, from counters (no state on the device, same bits on each device).

    Args:
        seeds: one int64 seed per image, from `seed_of`.
        device: where the numbers are made.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds = to_device(torch.tensor(list(seeds), dtype=torch.int64), torch.device(device))
        self._draws = 0

    def bits(self, *shape: int) -> Tensor:
        """Uniform int64 [B, *shape]; each call continues the streams."""
        self._draws += 1
        stream = _mix(self.seeds + _wrap(self._draws * _GOLDEN))
        count = torch.arange(1, math.prod(shape) + 1, device=self.seeds.device)
        return _mix(stream[:, None] + count[None, :] * _GOLDEN).reshape(len(self.seeds), *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform float32 in [0, 1), [B, *shape]."""
        return (self.bits(*shape) >> 40 & 0xFFFFFF).float() * 2.0**-24

    def integers(self, below: int, *shape: int) -> Tensor:
        """Uniform int64 in 0 .. below - 1, [B, *shape]."""
        return (self.bits(*shape) >> 33 & 0x7FFFFFFF) % below

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32 [B, *shape] (Box-Muller)."""
        radius = torch.sqrt(-2 * torch.log(1 - self.uniform(*shape)))
        return radius * torch.cos(2 * math.pi * self.uniform(*shape))


def _wrap(value: int) -> int:
    """Two's-complement int64, as torch computes but Python does not."""
    return (value + 2**63) % 2**64 - 2**63


def _mix(z: Tensor) -> Tensor:
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _MIX1
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _MIX2
    return z ^ (z >> 31 & (1 << 33) - 1)


# --- The four damages ----------------------------------------------------------------------------------------------


def add_noise(images: Tensor, sigma_255: Tensor, generator: Generator) -> Tensor:
    """Add i.i.d. Gaussian noise per channel, then round and clip. `sigma_255`: float [B], 0..75 of 255."""
    return _add(images, generator.normal(*images.shape[1:]) * _column(sigma_255))


def flip_pixels(images: Tensor, probability: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Give each pixel, with `probability` (float [B], 0..0.5), a uniformly random colour.

    Returns the images and the mask of flipped pixels, bool [B, 1, H, W].
    """
    colours, mask = _draw_flips(images, probability, generator)
    return torch.where(mask, colours, images), mask


def paint_patches(
    images: Tensor, area: Tensor, count: Tensor, coloured: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Paint `count` (int [B], 1..5) equal squares over `area` (float [B], 0..0.25) of each image.

    Black, or one random colour each where `coloured` (bool [B]). Squares may touch and, where they have to, overlap.
    Returns the images and the mask of painted pixels, bool [B, 1, H, W].
    """
    colours, mask = _draw_patches(images, area, count, coloured, generator)
    return torch.where(mask, colours, images), mask


def to_gray(images: Tensor) -> Tensor:
    """ITU-R 601 luma in all three channels; Pillow's integer arithmetic, so equal to `convert("L")`."""
    return luma(images).expand_as(images).contiguous()


def luma(images: Tensor) -> Tensor:
    """The same in one channel, uint8 [B, 1, H, W]."""
    r, g, b = (channel.to(torch.int32) for channel in images.unbind(dim=1))
    y = (r * 19595).add_(g, alpha=38470).add_(b, alpha=7471).add_(0x8000).bitwise_right_shift_(16)
    return y.to(torch.uint8)[:, None]


# --- Their mixture -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What happens to each image of a batch: one strength per image, 0 for none."""

    sigma_255: Tensor
    """float [B]"""
    flips: Tensor
    """float [B], probability"""
    area: Tensor
    """float [B], share under patches"""
    count: Tensor
    """int64 [B], number of patches"""
    coloured: Tensor
    """bool [B], patches of random colours instead of black"""
    gray: Tensor
    """bool [B]"""
    order: Tensor
    """int64 [B, 4], NOISE, FLIPS, PATCHES and GRAY in the order in which they strike"""


def fixed_damage(
    generator: Generator,
    *,
    sigma_255: float = 0.0,
    flips: float = 0.0,
    area: float = 0.0,
    coloured: bool = False,
    gray: bool = False,
) -> Damage:
    """The same strengths for every image, in the order noise, flips, patches, gray; 1 to 5 patches drawn."""
    like = generator.seeds
    size = len(like)

    def column(value: float) -> Tensor:
        return torch.full((size,), value, dtype=torch.float32, device=like.device)

    return Damage(
        sigma_255=column(sigma_255),
        flips=column(flips),
        area=column(area),
        count=1 + generator.integers(MAX_PATCHES, 1)[:, 0],
        coloured=column(coloured).bool(),
        gray=column(gray).bool(),
        order=torch.arange(4, device=like.device).expand(size, 4),
    )


def draw_damage(config: DamageConfig, generator: Generator) -> Damage:
    """Training damages: each kind drawn on its own (or one alone) with its own strength, in random order."""
    device = generator.seeds.device
    each = [config.noise_share, config.flips_share, config.patches_share, config.gray_share]
    shares = to_device(torch.tensor(each), device)
    strike = generator.uniform(4) < shares  # [B, 4]
    strength = generator.uniform(3)
    count = 1 + generator.integers(MAX_PATCHES, 1)[:, 0]
    coloured = generator.uniform(1)[:, 0] < 0.5
    order = generator.uniform(4).argsort(dim=1)
    if config.alone_share and any(each):
        draw = generator.uniform(2)
        limits = shares.cumsum(0) / shares.sum()
        only = torch.bucketize(draw[:, 0].contiguous(), limits[:-1], right=True)  # [B]
        alone = F.one_hot(only, 4).bool()
        strike = torch.where(draw[:, 1:] < config.alone_share, alone, strike)
    return Damage(
        sigma_255=config.noise_sigma_max * strength[:, 0] * strike[:, NOISE],
        flips=config.flips_max * strength[:, 1] * strike[:, FLIPS],
        area=config.patches_area_max * strength[:, 2] * strike[:, PATCHES],
        count=count,
        coloured=coloured,
        gray=strike[:, GRAY],
        order=order,
    )


def degrade(images: Tensor, damage: Damage, generator: Generator) -> tuple[Tensor, Tensor]:
    """Apply a mixture.

    Returns the damaged images and the mask of destroyed (flipped or painted) pixels, bool [B, 1, H, W].
    """
    noise = generator.normal(*images.shape[1:]) * _column(damage.sigma_255)
    flip_colours, flipped = _draw_flips(images, damage.flips, generator)
    patch_colours, painted = _draw_patches(images, damage.area, damage.count, damage.coloured, generator)
    grayed = _column(damage.gray)
    result = images
    for turn in range(4):
        kind = _column(damage.order[:, turn])
        # Noise of sigma 0 adds exactly 0, so the other images of the batch stay bit-identical.
        result = torch.where(kind == NOISE, _add(result, noise), result)
        result = torch.where((kind == FLIPS) & flipped, flip_colours, result)
        result = torch.where((kind == PATCHES) & painted, patch_colours, result)
        result = torch.where((kind == GRAY) & grayed, to_gray(result), result)
    return result, flipped | painted


def degrade_photograph(pixels: Pixels, seed: int, **strengths: float) -> tuple[Pixels, Mask]:
    """A photograph, uint8 [H, W, 3], with the damage of `fixed_damage`; and its destroyed pixels, bool [H, W]."""
    generator = Generator([seed])
    damage = fixed_damage(generator, **strengths)  # type: ignore[arg-type]
    damaged, destroyed = degrade(torch.tensor(pixels).permute(2, 0, 1)[None], damage, generator)
    return damaged[0].permute(1, 2, 0).contiguous().numpy(), destroyed[0, 0].numpy()


def _add(images: Tensor, noise: Tensor) -> Tensor:
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def _draw_flips(images: Tensor, probability: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    height, width = images.shape[-2:]
    mask = generator.uniform(1, height, width) < _column(probability)
    colours = generator.integers(256, 3, height, width).to(torch.uint8)
    return colours, mask


def _draw_patches(
    images: Tensor, area: Tensor, count: Tensor, coloured: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    batch, _, height, width = images.shape
    device = images.device
    used = torch.arange(MAX_PATCHES, device=device)[None, :] < count[:, None]  # [B, K]
    side = torch.sqrt(area * height * width / count).round().clamp(max=min(height, width)).long()  # [B]
    # Where the squares fell on each other the covered area would shrink.
    place = generator.uniform(LAYOUTS, MAX_PATCHES, 2)
    room = torch.stack((height - side + 1, width - side + 1), dim=1)  # [B, 2] positions per axis
    corner = (place * room[:, None, None, :]).long()  # [B, L, K, 2]
    gap = (corner[:, :, :, None] - corner[:, :, None, :]).abs()  # [B, L, K, K, 2]
    overlap = (side[:, None, None, None, None] - gap).clamp(min=0).prod(dim=-1)  # [B, L, K, K]
    pairs = used[:, None, :, None] & used[:, None, None, :] & ~torch.eye(MAX_PATCHES, dtype=torch.bool, device=device)
    best = (overlap * pairs).sum(dim=(2, 3)).argmin(dim=1)  # [B]
    corner = corner[torch.arange(batch, device=device), best]  # [B, K, 2]

    colour = generator.integers(256, MAX_PATCHES, 3) * coloured[:, None, None]  # [B, K, 3]
    rows = torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    colours = torch.zeros_like(images)
    mask = torch.zeros(batch, 1, height, width, dtype=torch.bool, device=device)
    for k in range(MAX_PATCHES):
        top, left = corner[:, k, :1], corner[:, k, 1:]  # [B, 1]
        in_rows = (rows >= top) & (rows < top + side[:, None]) & used[:, k, None]  # [B, H]
        in_columns = (columns >= left) & (columns < left + side[:, None])  # [B, W]
        square = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]  # [B, 1, H, W]
        colours = torch.where(square, colour[:, k, :, None, None].to(torch.uint8), colours)
        mask |= square
    return colours, mask


def _column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)

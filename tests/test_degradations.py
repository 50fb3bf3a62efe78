"""The damages do what the design says, and what happens to a photograph depends on (run seed, key) alone."""

# ruff: noqa: F722  (jaxtyping writes shapes as strings)

import math
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, UInt8, jaxtyped
from PIL import Image
from torch import Tensor

from restore_core import degradations
from restore_core.config import DamageConfig
from restore_core.degradations import (
    FLIPS,
    GRAY,
    MAX_PATCHES,
    NOISE,
    PATCHES,
    Damage,
    Generator,
    add_noise,
    draw_damage,
    fixed_damage,
    flip_pixels,
    paint_patches,
    seed_of,
    to_gray,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(1, 1), (1, 7), (7, 1), (3, 5), (48, 48), (30, 61)]
NOTHING = DamageConfig(noise_share=0, flips_share=0, patches_share=0, gray_share=0)
EVERYTHING = DamageConfig(noise_share=1, flips_share=1, patches_share=1, gray_share=1)


@jaxtyped(typechecker=beartype)
def degrade(
    images: UInt8[Tensor, "b 3 h w"], damage: Damage, generator: Generator
) -> tuple[UInt8[Tensor, "b 3 h w"], Bool[Tensor, "b 1 h w"]]:
    return degradations.degrade(images, damage, generator)


def seeds(count: int, run_seed: int = 0) -> list[int]:
    return [seed_of(run_seed, f"photo-{index}.jpg") for index in range(count)]


def photographs(count: int, height: int, width: int) -> Tensor:
    """Random pixels of all values, uint8 [count, 3, height, width]."""
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (count, 3, height, width), np.uint8))


def mid_gray(count: int, height: int, width: int) -> Tensor:
    return torch.full((count, 3, height, width), 128, dtype=torch.uint8)


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


# --- The generator ---------------------------------------------------------------------------------------------------


def test_uniform_numbers_are_uniform_and_streams_are_uncorrelated() -> None:
    count = 200_000
    values = Generator(seeds(4)).uniform(count)
    assert values.min() >= 0 and values.max() < 1
    # mean of n uniforms: standard error sqrt(1/12/n); bins: binomial; both tested at 5 standard errors
    assert torch.all((values.mean(dim=1) - 0.5).abs() < 5 * math.sqrt(1 / 12 / count))
    for stream in values:
        share = torch.histc(stream, bins=20, min=0, max=1) / count
        assert torch.all((share - 0.05).abs() < 5 * math.sqrt(0.05 * 0.95 / count))
    correlation = torch.corrcoef(torch.cat([values, values.roll(1, dims=1)]))
    others = correlation - torch.eye(8)
    assert others.abs().max() < 6 / math.sqrt(count)


def test_each_draw_continues_the_stream() -> None:
    generator = Generator(seeds(2))
    assert not torch.equal(generator.uniform(100), generator.uniform(100))


def test_integers_are_uniform() -> None:
    count = 256_000
    drawn = Generator(seeds(1)).integers(256, count).flatten()
    counts = torch.bincount(drawn, minlength=256)
    assert len(counts) == 256
    chi_square = ((counts - count / 256) ** 2 / (count / 256)).sum().item()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_normal_numbers_have_the_moments_of_a_standard_normal() -> None:
    count = 200_000
    values = Generator(seeds(1)).normal(count).double().flatten()
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((values**power).mean().item() - expected) < 5 * math.sqrt(variance / count)


def test_seeds_are_stable_and_depend_on_every_part() -> None:
    assert seed_of(7, "a/ü.jpg", 3) == 5078846398369847060  # blake2b, by hand: a change would change every run
    different = {seed_of(*parts) for parts in [(7, "a"), (8, "a"), (7, "b"), (7, "a", 1), (7, "a", 2), (7, "a1")]}
    assert len(different) == 6
    assert all(-(2**63) <= seed < 2**63 for seed in different)


def test_a_key_that_is_not_valid_unicode_has_a_seed_too() -> None:
    assert seed_of(0, "Jos\udce9.jpg") != seed_of(0, "Jos\udce8.jpg")


# --- Noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_255", [2.0, 10.0, 25.0])
def test_noise_has_the_mean_and_deviation_asked_for(sigma_255: float) -> None:
    images = mid_gray(4, 96, 96)  # 128 is over 5 sigma from both ends, so next to nothing is clipped
    noise = add_noise(images, column([sigma_255] * 4), Generator(seeds(4))).double() - 128
    count = noise[0].numel()
    deviation = math.sqrt(sigma_255**2 + 1 / 12)  # rounding adds the variance of a uniform error
    assert torch.all(noise.mean(dim=(1, 2, 3)).abs() < 4.5 * deviation / math.sqrt(count))
    assert torch.all((noise.flatten(1).std(dim=1) - deviation).abs() < 4.5 * deviation / math.sqrt(2 * count))


def test_noise_of_channels_and_of_neighbours_is_uncorrelated() -> None:
    noise = add_noise(mid_gray(1, 200, 200), column([25]), Generator(seeds(1))).double()[0] - 128
    right = noise.roll(1, dims=2)
    correlation = torch.corrcoef(torch.cat([noise.flatten(1), right.flatten(1)])) - torch.eye(6)
    assert correlation.abs().max() < 5 / math.sqrt(200 * 200)


def test_noise_is_rounded_to_nearest_and_clipped() -> None:
    images = photographs(3, 40, 40)
    images[0], images[1] = 0, 255
    sigma_255 = column([75, 75, 30])
    noise = Generator(seeds(3)).normal(3, 40, 40) * sigma_255.reshape(-1, 1, 1, 1)
    expected = np.clip(np.rint(images.numpy().astype(np.float32) + noise.numpy()), 0, 255).astype(np.uint8)
    noisy = add_noise(images, sigma_255, Generator(seeds(3))).numpy()
    assert np.array_equal(noisy, expected)
    # half of the noise points out of the range: on black it all stays 0, and nothing wraps around
    assert abs((noisy[0] == 0).mean() - 0.5) < 0.03 and abs((noisy[1] == 255).mean() - 0.5) < 0.03


# --- Flipped pixels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5])
def test_share_of_flipped_pixels(probability: float) -> None:
    images = photographs(4, 128, 128)
    flipped, mask = flip_pixels(images, column([probability] * 4), Generator(seeds(4)))
    error = math.sqrt(probability * (1 - probability) / 128**2)
    assert torch.all((mask.float().mean(dim=(1, 2, 3)) - probability).abs() < 4.5 * error)
    assert torch.equal(torch.where(mask, 0, flipped), torch.where(mask, 0, images))


def test_flipped_pixels_have_uniform_and_independent_colours() -> None:
    images = mid_gray(1, 600, 600)
    flipped, mask = flip_pixels(images, column([0.5]), Generator(seeds(1)))
    colours = flipped.permute(0, 2, 3, 1)[mask[:, 0]]  # [N, 3]
    count = len(colours)
    for channel in colours.T:
        counts = torch.bincount(channel.int(), minlength=256).double()
        chi_square = ((counts - count / 256) ** 2 / (count / 256)).sum().item()
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    correlation = torch.corrcoef(colours.double().T) - torch.eye(3)
    assert correlation.abs().max() < 5 / math.sqrt(count)


# --- Patches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, MAX_PATCHES + 1))
@pytest.mark.parametrize("area", [0.02, 0.1, 0.25])
@pytest.mark.parametrize("height_width", [(48, 48), (96, 60)])
def test_covered_area_is_close_to_what_was_asked(count: int, area: float, height_width: tuple[int, int]) -> None:
    """Sides are rounded to whole pixels; beside that, overlaps take at most 2 % of it on average, 15 % of one image."""
    height, width = height_width
    batch = 100
    _, mask = paint_patches(
        mid_gray(batch, height, width),
        column([area] * batch),
        torch.full((batch,), count),
        torch.zeros(batch, dtype=torch.bool),
        Generator(seeds(batch)),
    )
    whole_squares = count * round(math.sqrt(area * height * width / count)) ** 2
    covered = mask.sum(dim=(1, 2, 3))
    assert covered.max() == whole_squares
    assert covered.float().mean() > 0.98 * whole_squares
    assert covered.min() > (0.85 if count > 2 else 0.999) * whole_squares
    rounding = count * (math.sqrt(area / count) + 0.25 / math.sqrt(height * width)) / math.sqrt(height * width)
    assert abs(whole_squares / (height * width) - area) <= rounding  # (s + 1/2)^2 - s^2 of each square


def squares_of(mask: np.ndarray, side: int) -> list[tuple[int, int]]:
    """Every place where a whole square of that side fits into the mask."""
    height, width = mask.shape
    return [
        (top, left)
        for top in range(height - side + 1)
        for left in range(width - side + 1)
        if mask[top : top + side, left : left + side].all()
    ]


@pytest.mark.parametrize("count", range(1, MAX_PATCHES + 1))
def test_patches_are_squares_of_one_size(count: int) -> None:
    images = mid_gray(20, 40, 56)
    side = round(math.sqrt(0.1 * 40 * 56 / count))
    _, mask = paint_patches(
        images,
        column([0.1] * 20),
        torch.full((20,), count),
        torch.zeros(20, dtype=torch.bool),
        Generator(seeds(20)),
    )
    for painted in mask[:, 0].numpy():
        rebuilt = np.zeros_like(painted)
        for top, left in squares_of(painted, side):
            rebuilt[top : top + side, left : left + side] = True
        assert np.array_equal(rebuilt, painted)  # nothing but whole squares ...
        assert painted.sum() > (count - 1) * side**2  # ... and `count` of them, which may overlap a little


def test_single_patches_reach_every_border_and_stay_inside() -> None:
    batch = 3000
    _, mask = paint_patches(
        mid_gray(batch, 12, 9), column([0.15] * batch), torch.ones(batch).long(), torch.zeros(batch).bool(),
        Generator(seeds(batch)),
    )  # fmt: skip
    side = 4
    assert torch.equal(mask.sum(dim=(1, 2, 3)), torch.full((batch,), side * side))
    top = mask[:, 0].any(dim=2).float().argmax(dim=1)
    left = mask[:, 0].any(dim=1).float().argmax(dim=1)
    for place, room in ((top, 12 - side + 1), (left, 9 - side + 1)):
        counts = torch.bincount(place, minlength=room)
        assert len(counts) == room
        assert torch.all((counts / batch - 1 / room).abs() < 5 * math.sqrt(1 / room / batch))


def test_patches_are_black_or_of_one_random_colour_each() -> None:
    images = mid_gray(60, 60, 60)
    coloured = torch.arange(60) % 2 == 1
    count = torch.full((60,), 3)
    painted, mask = paint_patches(images, column([0.12] * 60), count, coloured, Generator(seeds(60)))
    assert torch.equal(torch.where(mask, 0, painted), torch.where(mask, 0, images))
    seen = []
    for image, where, has_colour in zip(painted, mask[:, 0], coloured, strict=True):
        colours = torch.unique(image[:, where].T, dim=0)
        if has_colour:
            assert len(colours) <= 3
            seen += colours.tolist()
        else:
            assert colours.tolist() == [[0, 0, 0]]
    channels = np.array(seen)
    assert len(seen) > 80 and len(set(map(tuple, seen))) == len(seen)
    assert np.all(np.abs(channels.mean(axis=0) - 127.5) < 4.5 * 74 / math.sqrt(len(seen)))


# --- Lost colour -----------------------------------------------------------------------------------------------------


def test_luma_equals_pillow_for_every_green_and_blue() -> None:
    """All 65,536 pairs of green and blue, each with several reds."""
    green, blue = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    for red in (0, 1, 77, 128, 254, 255):
        pixels = np.stack([np.full_like(green, red), green, blue], axis=-1)
        gray = to_gray(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
        expected = np.asarray(Image.fromarray(pixels).convert("L"))
        for channel in gray.numpy():
            assert np.array_equal(channel, expected)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255))
def test_luma_equals_pillow(red: int, green: int, blue: int) -> None:
    gray = to_gray(torch.tensor([red, green, blue], dtype=torch.uint8).reshape(1, 3, 1, 1))
    expected = Image.new("RGB", (1, 1), (red, green, blue)).convert("L").getpixel((0, 0))
    assert gray.flatten().tolist() == [expected] * 3


def test_gray_is_kept_by_gray() -> None:
    images = to_gray(photographs(1, 50, 50))
    assert torch.equal(to_gray(images), images)


# --- Strength 0 ------------------------------------------------------------------------------------------------------

ONE_BY_ONE: dict[str, Callable[[Tensor, Tensor, Generator], Tensor]] = {
    "noise": add_noise,
    "flips": lambda images, strength, generator: flip_pixels(images, strength, generator)[0],
    "patches": lambda images, strength, generator: paint_patches(
        images, strength, torch.full((len(images),), 5), torch.ones(len(images)).bool(), generator
    )[0],
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_strength_zero_changes_nothing(name: str, size: tuple[int, int]) -> None:
    images = photographs(5, *size)
    assert torch.equal(ONE_BY_ONE[name](images, torch.zeros(5), Generator(seeds(5))), images)


@pytest.mark.parametrize("size", SIZES)
def test_mixture_of_strength_zero_changes_nothing(size: tuple[int, int]) -> None:
    images = photographs(5, *size)
    generator = Generator(seeds(5))
    for damage in (draw_damage(NOTHING, generator), fixed_damage(generator)):
        damaged, destroyed = degrade(images, damage, generator)
        assert torch.equal(damaged, images) and not destroyed.any()


def test_undamaged_images_of_a_damaged_batch_are_bit_identical() -> None:
    images = photographs(6, 24, 24)
    damage = fixed_damage(Generator(seeds(6)), sigma_255=40, flips=0.3, area=0.2, gray=True)
    for strength in (damage.sigma_255, damage.flips, damage.area, damage.gray):
        strength[[1, 4]] = 0
    damaged, destroyed = degrade(images, damage, Generator(seeds(6)))
    same = (damaged == images).flatten(1).all(dim=1)
    assert same.tolist() == [False, True, False, False, True, False]
    assert not destroyed[[1, 4]].any()


# --- The mixture -----------------------------------------------------------------------------------------------------


def train_like(images: Tensor, image_seeds: list[int], config: DamageConfig) -> tuple[Tensor, Tensor]:
    generator = Generator(image_seeds)
    return degrade(images, draw_damage(config, generator), generator)


@pytest.mark.parametrize("size", SIZES)
def test_damage_is_independent_of_batch_and_position(size: tuple[int, int]) -> None:
    images, image_seeds = photographs(9, *size), seeds(9)
    whole, destroyed = train_like(images, image_seeds, EVERYTHING)
    for rows in ([3], [8, 0], [5, 4, 3, 2, 1], [2, 2, 7]):
        part, part_destroyed = train_like(images[rows], [image_seeds[row] for row in rows], EVERYTHING)
        assert torch.equal(part, whole[rows]) and torch.equal(part_destroyed, destroyed[rows])


def test_damage_depends_on_key_and_run_seed() -> None:
    images = photographs(1, 32, 32).expand(8, -1, -1, -1).contiguous()
    first, _ = train_like(images, seeds(8), EVERYTHING)
    assert len({image.numpy().tobytes() for image in first}) == 8  # one photograph, eight keys
    again, _ = train_like(images, seeds(8), EVERYTHING)
    assert torch.equal(first, again)
    other_run, _ = train_like(images, seeds(8, run_seed=1), EVERYTHING)
    assert not (first == other_run).flatten(1).all(dim=1).any()


@pytest.mark.parametrize("size", SIZES)
def test_mask_is_exactly_the_destroyed_pixels(size: tuple[int, int]) -> None:
    """Without flips and patches the same mixture gives the same pixels outside of the mask, and others inside."""
    images = photographs(40, *size)
    damage = draw_damage(EVERYTHING, Generator(seeds(40)))
    damaged, destroyed = degrade(images, damage, Generator(seeds(40, run_seed=1)))
    damage.flips[:], damage.area[:] = 0, 0
    spared, none = degrade(images, damage, Generator(seeds(40, run_seed=1)))
    assert not none.any()
    keep = destroyed.expand_as(images)
    assert torch.equal(damaged.masked_fill(keep, 0), spared.masked_fill(keep, 0))
    if images.numel() > 10_000:
        changed = (damaged != spared).any(dim=1, keepdim=True)
        assert (changed & destroyed).sum() > 0.9 * destroyed.sum()  # a random colour may be the old one after clipping


ORDERS = [(NOISE, FLIPS, PATCHES, GRAY), (GRAY, PATCHES, FLIPS, NOISE), (PATCHES, NOISE, GRAY, FLIPS)]


@pytest.mark.parametrize("order", ORDERS)
def test_order_of_the_mixture_is_respected(order: tuple[int, ...]) -> None:
    """The mixture equals the single damages, made of the same random numbers, one after the other."""
    images = photographs(8, 40, 40)
    damage = draw_damage(EVERYTHING, Generator(seeds(8)))
    damage.order[:] = torch.tensor(order)
    damaged, _ = degrade(images, damage, Generator(seeds(8, run_seed=1)))

    single = Damage(**{**vars(damage), "order": torch.tensor([NOISE, FLIPS, PATCHES, GRAY]).expand(8, 4)})
    result = images
    for kind in order:
        only = Damage(
            **{
                **vars(single),
                "sigma_255": damage.sigma_255 * (kind == NOISE),
                "flips": damage.flips * (kind == FLIPS),
                "area": damage.area * (kind == PATCHES),
                "gray": damage.gray & (kind == GRAY),
            }
        )
        result, _ = degrade(result, only, Generator(seeds(8, run_seed=1)))
    assert torch.equal(damaged, result)


def test_gray_last_leaves_no_colour_and_first_leaves_coloured_flips() -> None:
    images = photographs(4, 32, 32)
    damage = fixed_damage(Generator(seeds(4)), sigma_255=20, flips=0.2, gray=True)
    last, _ = degrade(images, damage, Generator(seeds(4)))
    assert torch.equal(last[:, 0], last[:, 1]) and torch.equal(last[:, 0], last[:, 2])
    damage = Damage(**{**vars(damage), "order": damage.order.flip(1)})
    first, _ = degrade(images, damage, Generator(seeds(4)))
    assert not torch.equal(first[:, 0], first[:, 1])


def test_undamaged_share_is_the_product_the_config_promises() -> None:
    config = DamageConfig(noise_share=0.4, flips_share=0.3, patches_share=0.5, gray_share=0.2)
    batch = 20_000
    damage = draw_damage(config, Generator(seeds(batch)))
    struck = {
        "noise": damage.sigma_255 > 0,
        "flips": damage.flips > 0,
        "patches": damage.area > 0,
        "gray": damage.gray,
    }
    for share, hit in zip((0.4, 0.3, 0.5, 0.2), struck.values(), strict=True):
        assert abs(hit.float().mean().item() - share) < 4.5 * math.sqrt(share * (1 - share) / batch)
    undamaged = ~torch.stack(list(struck.values())).any(dim=0)
    share = 0.6 * 0.7 * 0.5 * 0.8
    assert abs(undamaged.float().mean().item() - share) < 4.5 * math.sqrt(share * (1 - share) / batch)


def test_a_share_of_the_samples_gets_one_damage_alone() -> None:
    config = DamageConfig(noise_share=0.4, flips_share=0.3, patches_share=0.1, gray_share=0.2, alone_share=1)
    batch = 20_000
    damage = draw_damage(config, Generator(seeds(batch)))
    struck = torch.stack([damage.sigma_255 > 0, damage.flips > 0, damage.area > 0, damage.gray], dim=1)
    assert torch.all(struck.sum(dim=1) == 1)
    for share, hit in zip((0.4, 0.3, 0.1, 0.2), struck.float().mean(dim=0).tolist(), strict=True):
        assert abs(hit - share) < 4.5 * math.sqrt(share * (1 - share) / batch)
    half = draw_damage(replace(config, alone_share=0.5), Generator(seeds(batch)))
    undamaged = (half.sigma_255 == 0) & (half.flips == 0) & (half.area == 0) & ~half.gray
    share = 0.5 * 0.6 * 0.7 * 0.9 * 0.8
    assert abs(undamaged.float().mean().item() - share) < 4.5 * math.sqrt(share * (1 - share) / batch)
    nothing = draw_damage(replace(NOTHING, alone_share=1), Generator(seeds(10)))
    assert nothing.sigma_255.sum() == nothing.flips.sum() == nothing.area.sum() == nothing.gray.sum() == 0


def test_strengths_are_uniform_up_to_the_largest_and_orders_are_random() -> None:
    batch = 20_000
    config = DamageConfig(
        noise_share=1, flips_share=1, patches_share=1, noise_sigma_max=60, flips_max=0.4, patches_area_max=0.2
    )
    damage = draw_damage(config, Generator(seeds(batch)))
    for values, largest in ((damage.sigma_255, 60), (damage.flips, 0.4), (damage.area, 0.2)):
        assert values.min() >= 0 and 0.99 * largest < values.max() < largest
        assert abs(values.mean().item() / largest - 0.5) < 4.5 * math.sqrt(1 / 12 / batch)
    assert torch.all((torch.bincount(damage.count, minlength=6)[1:] / batch - 0.2).abs() < 0.02)
    assert damage.count.min() == 1 and damage.count.max() == MAX_PATCHES
    assert abs(damage.coloured.float().mean().item() - 0.5) < 0.02
    assert torch.equal(damage.order.sort(dim=1).values, torch.arange(4).expand(batch, 4))
    orders, counts = torch.unique(damage.order, dim=0, return_counts=True)
    assert len(orders) == 24
    assert torch.all((counts / batch - 1 / 24).abs() < 5 * math.sqrt(1 / 24 / batch))


def test_an_image_does_not_depend_on_the_others_of_its_batch() -> None:
    images = photographs(6, 20, 20)
    damage = draw_damage(EVERYTHING, Generator(seeds(6)))
    whole, _ = degrade(images, damage, Generator(seeds(6, 1)))
    some = Damage(**{field.name: getattr(damage, field.name)[2:4] for field in fields(damage)})
    part, _ = degrade(images[2:4], some, Generator(seeds(6, 1)[2:4]))
    assert torch.equal(part, whole[2:4])


@pytest.mark.parametrize("size", SIZES)
def test_any_size_and_never_in_place(size: tuple[int, int]) -> None:
    images = photographs(30, *size)
    before = images.clone()
    damaged, destroyed = train_like(images, seeds(30), EVERYTHING)
    assert damaged.shape == images.shape and destroyed.shape == (30, 1, *size)  # dtypes: see `degrade` above
    assert torch.equal(images, before)
    assert not torch.equal(damaged, before)

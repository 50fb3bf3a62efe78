"""What is written and what is not: the difference between result and input, and results that nothing is left in."""

import io
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageDraw

from restore_core import codec, sinks
from restore_core.codec import Pixels
from restore_core.degradations import Generator, degrade, fixed_damage, paint_patches
from restore_core.errors import ItemError
from restore_core.manifest import Row

DAMAGES: dict[str, dict[str, float]] = {
    "clean": {},
    "noise 75": {"sigma_255": 75},
    "flips 50 %": {"flips": 0.5},
    "patches 20 %": {"area": 0.2},
    "coloured patches 20 %": {"area": 0.2, "coloured": True},
    "gray": {"gray": True},
}


def damaged(image: Pixels, **damage: float) -> Pixels:
    batch = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    result, _ = degrade(batch, fixed_damage(Generator([1]), **damage), Generator([1]))  # type: ignore[arg-type]
    return result[0].permute(1, 2, 0).contiguous().numpy()


@cache
def photographs() -> dict[str, Pixels]:
    cat = skimage.data.chelsea()[50:210, 100:300]
    return {
        "portrait": skimage.data.astronaut()[:160, 130:330],
        "cup": skimage.data.coffee()[100:260, 150:350],
        "cat": cat,
        "fog": (128 + (cat.astype(float) - 128) / 2).astype(np.uint8),
    }


@cache
def damaged_photographs(name: str) -> list[Pixels]:
    return [damaged(photographs()[name], **damage) for damage in DAMAGES.values()]


def written(before: Pixels, after: Pixels, max_change: float | None = None) -> Row:
    """The row of a picture whose result is `after`. Raises ItemError."""
    file = io.BytesIO()
    Image.fromarray(before).save(file, "PNG")
    row = Row(key="a.png", size=1, etag="e", model="m", options="o", run_id="r")
    picture = codec.decode(file.getvalue())
    data = sinks.encode(row, file.getvalue(), picture, after, codec, strip_metadata=False, max_change=max_change)
    np.testing.assert_array_equal(codec.decode(data).pixels, after)
    return row


# --- The difference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 999), (999, 1), (5, 7), (250, 250), (33, 410)])
def test_the_difference_is_that_of_the_whole_whatever_the_bands(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "BAND_PIXELS", 1000)
    before, after = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    after[:, size[1] // 2 :] = 255
    found = sinks.compare(before, after)
    distance = np.abs(after.astype(int) - before)
    assert found.pixels == size[0] * size[1]
    assert found.change == pytest.approx(distance.mean(), rel=1e-12)
    assert sinks._share_within(8, before, after) == (distance <= 8).mean()
    assert sinks._share_within(32, before, after) == (distance <= 32).mean()
    assert found.clipped == np.isin(after, (0, 255)).mean()
    assert found.flat == (after == after[0, 0]).all()
    assert sinks.compare(before, np.full_like(before, [3, 200, 90])).flat


def test_the_change_is_in_the_row() -> None:
    before = skimage.data.coffee()[:64, :64]
    assert written(before, before).change == 0
    row = written(before, np.maximum(before, 10) - 10)
    assert row.status == "restored" and row.change == pytest.approx(10, abs=0.5)


def test_a_result_over_max_change_is_not_written() -> None:
    before = np.clip(skimage.data.coffee()[:64, :64], 20, 235)
    after = before + np.uint8(8)
    assert written(before, after, max_change=8).change == 8
    with pytest.raises(ItemError, match=r"model: the result differs by 8.0 of 255, over --max-change; the original"):
        written(before, after, max_change=7.9)


# --- Nothing left --------------------------------------------------------------------------------------------------

SPOILT: dict[str, Callable[[Pixels], Pixels]] = {
    "black": lambda image: np.zeros_like(image),
    "white": lambda image: np.full_like(image, 255),
    "one colour": lambda image: np.full_like(image, [90, 130, 201]),
    "its mean": lambda image: np.full_like(image, image.mean(axis=(0, 1)).astype(np.uint8)),
    "black and white": lambda image: np.where(image < 128, 0, 255).astype(np.uint8),
    "its negative in black and white": lambda image: np.where(image < 128, 255, 0).astype(np.uint8),
    "black and white at random": lambda image: (
        255 * np.random.default_rng(0).integers(0, 2, image.shape, np.uint8)
    ),
    "all but 1 % clipped": lambda image: np.where(
        np.random.default_rng(0).random(image.shape) < 0.008, image, np.where(image < 128, 0, 255)
    ).astype(np.uint8),
}  # fmt: skip


@pytest.mark.parametrize("name", photographs())
@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_photograph_of_which_nothing_is_left_is_not_written(name: str, spoilt: str) -> None:
    image = photographs()[name]
    result = SPOILT[spoilt](image)
    with pytest.raises(ItemError, match=r"model: the network returned (one flat colour|nothing but black and white);"):
        written(image, result)
    for before, damage in zip(damaged_photographs(name), DAMAGES, strict=True):
        assert sinks.nothing_left(sinks.compare(before, result), before, result), damage


def line_art() -> Pixels:
    image = Image.new("RGB", (200, 160), "white")
    draw = ImageDraw.Draw(image)
    for step in range(12):
        draw.ellipse((8 + 7 * step, 8 + 5 * step, 192 - 7 * step, 152 - 5 * step), outline="black", width=2)
    draw.text((15, 15), "Lorem ipsum dolor sit amet", fill="black")
    return np.asarray(image)


def legitimate() -> dict[str, Pixels]:
    """Pictures that hold little, or little but black and white."""
    portrait = photographs()["portrait"].astype(float)
    sky = np.zeros((160, 200, 3), np.uint8)
    sky[np.random.default_rng(0).random((160, 200)) < 0.002] = 255
    return {
        "line art": line_art(),
        "negative of line art": 255 - line_art(),
        "checkerboard": np.kron(np.indices((20, 25)).sum(0) % 2 * 255, np.ones((8, 8)))[:, :, None]
        .repeat(3, 2)
        .astype(np.uint8),
        "empty page": np.full((160, 200, 3), 255, np.uint8),
        "black": np.zeros((160, 200, 3), np.uint8),
        "grey card": np.full((160, 200, 3), 119, np.uint8),
        "blue": np.full((160, 200, 3), [10, 40, 200], np.uint8),
        "starry sky": sky,
        "night": (portrait / 12).astype(np.uint8),
        "overexposed": np.clip(portrait * 4, 0, 255).astype(np.uint8),
        "high contrast": np.clip((portrait - 110) * 9, 0, 255).astype(np.uint8),
    }


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", legitimate())
def test_what_held_little_may_be_restored_to_that(name: str, damage: str) -> None:
    """What a perfect network would make of it is written."""
    image = legitimate()[name]
    before = damaged(image, **DAMAGES[damage])
    for patches in (DAMAGES[damage].get("area", 0.0), None):
        assert sinks.nothing_left(sinks.compare(before, image), before, image, patches) is None


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (100, 150), (250, 250)])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_an_empty_page_may_have_had_patches_of_any_size(size: tuple[int, int], count: int) -> None:
    page = np.full((*size, 3), 245, np.uint8)
    batch = torch.from_numpy(page).permute(2, 0, 1)[None]
    for seed, area in enumerate([0.005, 0.01, 0.02, 0.05, 0.1, 0.25] * 3):
        generator = Generator([seed])
        strength = torch.tensor([area]), torch.tensor([count]), torch.tensor([False])
        painted, _ = paint_patches(batch, *strength, generator)
        before = painted[0].permute(1, 2, 0).contiguous().numpy()
        share = float((before != page).any(axis=2).mean())
        assert sinks.nothing_left(sinks.compare(before, page), before, page, share) is None, (area, share)


def letter() -> Pixels:
    image = Image.new("RGB", (640, 480), "white")
    for line in range(20):
        ImageDraw.Draw(image).text(
            (40, 40 + 16 * line),
            "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor",
            fill=(40, 40, 40),
        )
    return np.asarray(image)


def mist() -> Pixels:
    """Hardly anything: a hill in it, 6 steps of 255 darker."""
    image = np.full((200, 300, 3), 150, np.uint8)
    image[120:170, 60:140] -= 6
    return image


@pytest.mark.parametrize(
    "before", [letter(), mist(), line_art(), 255 - line_art()], ids=["letter", "mist", "art", "negative"]
)
@pytest.mark.parametrize("colour", [0, 77, 150, 255])
@pytest.mark.parametrize("damage", ["clean", "noise 10", "JPEG"])
def test_what_held_a_little_does_not_come_back_empty(before: Pixels, colour: int, damage: str) -> None:
    result = np.full_like(before, colour)
    if damage == "noise 10":
        before = damaged(before, sigma_255=10)
    elif damage == "JPEG":
        file = io.BytesIO()
        Image.fromarray(before).save(file, "JPEG", quality=50)
        before = codec.decode(file.getvalue()).pixels
    assert (
        sinks.nothing_left(sinks.compare(before, result), before, result, 0.0) == "the network returned one flat colour"
    )


def test_tiny_pictures_may_be_of_one_colour_but_not_of_any() -> None:
    before = skimage.data.coffee()[100:115, 100:117]
    assert written(before, np.full_like(before, round(before.mean()))).status == "restored"
    dark = before // 8
    assert written(dark, np.zeros_like(dark)).status == "restored"
    for size in (before.shape[0], 1):
        part = before[:size, :size]
        for value in (0, 255):
            if abs(part.mean() - value) > sinks.FAR:
                with pytest.raises(ItemError, match="model: the network returned nothing but black and white"):
                    written(part, np.full_like(part, value))

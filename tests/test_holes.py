"""Large holes are filled with what is seen at half the size, and nothing else changes."""

import time

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from restore_core import checkpoint, holes, inference, strips
from restore_core.config import KINDS
from restore_core.degradations import degrade_photograph
from restore_core.holes import Mask, Pixels
from restore_core.inference import CPU, Restored, Restorer
from restore_core.metrics import psnr
from restore_core.model import Prediction, ResidualUNet


def mask(height: int, width: int, *boxes: tuple[int, int, int, int]) -> Mask:
    result = np.zeros((height, width), bool)
    for top, left, bottom, right in boxes:
        result[top:bottom, left:right] = True
    return result


def test_regions_hold_the_large_holes_and_what_is_around_them() -> None:
    destroyed = mask(
        2000, 1501, (300, 200, 330, 230), (450, 210, 480, 250), (1985, 1480, 2000, 1501), (1000, 700, 1009, 709)
    )
    packed = strips.Mask(2000, 1501)
    packed[0:2000, 0:1501] = destroyed
    for some in (destroyed, packed):
        (first, second) = holes.regions(some, 2000, 1501)
        assert first == (slice(176, 608), slice(72, 376))  # 128 pixels around, and two that are near are one
        assert second == (slice(1864, 2000), slice(1352, 1501))
    assert holes.regions(mask(120, 120, (20, 20, 60, 60)), 120, 120) == []
    assert holes.regions(mask(1, 20000, (0, 0, 1, 20000)), 1, 20000) == []
    assert holes.regions(mask(3000, 3000, (0, 0, 2900, 2900)), 3000, 3000) == []


def test_half_the_size_shows_what_is_around_a_hole() -> None:
    pixels = np.full((7, 9, 3), 100, np.uint8)
    hole = mask(7, 9, (2, 3, 6, 6))
    pixels[hole] = 200  # of which nothing is left
    small = holes.halved(pixels, hole)
    assert small.shape == (4, 5, 3)
    assert (small[1:3, 2] == 0).all() and (small[0] == 100).all() and (small[:, 1] == 100).all()


def picture_of_a_hole() -> tuple[Pixels, Mask]:
    """Of 100, and 200 was filled into the hole."""
    pixels, hole = np.full((41, 39, 3), 100, np.uint8), mask(41, 39, (10, 10, 30, 30))
    pixels[hole] = 200
    return pixels, hole


def test_a_hole_becomes_a_mixture_of_two_looks() -> None:
    pixels, hole = picture_of_a_hole()
    destroyed = mask(41, 39, (10, 10, 30, 20))
    everywhere = np.ones((21, 20), bool)
    after = holes.blended(pixels, hole, destroyed, np.full((21, 20, 3), 50, np.uint8), everywhere)
    assert (after[~hole] == 100).all()
    assert (after[10:30, 10:18] == 100).all()  # (2 * 50 + 200) / 3
    assert (after[10:30, 18:30] == 50).all()  # what the gate missed, and what is next to it


def test_what_stayed_black_at_half_the_size_is_not_mixed_in() -> None:
    """Where it was not filled in either look, it is like what is around; where all that is dark, it may be black."""
    pixels, hole = picture_of_a_hole()
    destroyed = mask(41, 39, (10, 10, 30, 20))
    black, nowhere = np.zeros((21, 20, 3), np.uint8), np.zeros((21, 20), bool)
    after = holes.blended(pixels, hole, destroyed, black, nowhere)
    assert (after[~hole] == 100).all()
    assert (after[10:30, 10:18] == 200).all()
    assert (after[10:30, 18:30] == 100).all()
    everything = np.ones((41, 39), bool)
    assert not holes.blended(np.zeros_like(pixels), everything, everything, black, nowhere).any()
    pixels[~hole] = 20
    after = holes.blended(pixels, hole, destroyed, black, nowhere)
    assert (after[10:30, 10:18] == 67).all() and (after[10:30, 18:30] == 0).all()


@pytest.mark.parametrize("name", ["faces", "faces-fast"])
def test_holes_are_filled_better(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a photograph that no network was trained on."""
    part = Image.fromarray(skimage.data.chelsea()[:300, 60:360])
    clean = np.asarray(part.resize((250, 250), Image.Resampling.LANCZOS))
    images = [degrade_photograph(clean, seed, area=0.15, coloured=seed % 2)[0] for seed in range(6)]
    restorer = Restorer(checkpoint.read(name))
    after = restorer(images)
    monkeypatch.setattr(holes, "LEAST", 10**9)
    before = restorer(images)
    gains = [psnr(one.pixels, clean) - psnr(other.pixels, clean) for one, other in zip(after, before, strict=True)]
    assert np.mean(gains) > 0.3, gains
    for one, other in zip(after, before, strict=True):
        assert (one.sigma, one.flips, one.patches, one.gray) == (other.sigma, other.flips, other.patches, other.gray)
        assert 0.05 < (one.pixels != other.pixels).any(axis=2).mean() < 0.17


def test_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = skimage.data.chelsea()[:200, 100:300]
    flips, noise = (degrade_photograph(clean, 1, **damage)[0] for damage in ({"flips": 0.3}, {"sigma_255": 25}))
    patches, _ = degrade_photograph(clean, 1, area=0.15)
    restorer, others = (Restorer(checkpoint.read("faces-fast"), repair=kinds) for kinds in (KINDS, ("noise", "flips")))
    after = [*restorer([flips, noise]), *others([patches])]
    monkeypatch.setattr(holes, "LEAST", 10**9)
    before = [*restorer([flips, noise]), *others([patches])]
    for one, other in zip(after, before, strict=True):
        assert np.array_equal(one.pixels, other.pixels)


@pytest.mark.parametrize("where", ["_of_one_size", "_whole"])
def test_without_memory_for_it_all_is_done_again_in_smaller_parts(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not left out: what comes back must not depend on what else there was to do. The row says so, too."""
    clean = skimage.data.chelsea()[:200, 100:300]
    images = [*(degrade_photograph(clean, seed, area=0.15)[0] for seed in (1, 2)), clean]
    restorer = Restorer(checkpoint.read("faces-fast"))
    plenty = restorer(images)
    whole = getattr(Restorer, where)

    def short(self: Restorer, images: list[Pixels], *device: torch.device) -> list[Restored]:
        if len(images) == 2 and images[0].shape == (100, 100, 3):
            raise MemoryError
        return whole(self, images, *device)  # type: ignore[no-any-return]

    monkeypatch.setattr(Restorer, where, short)
    scarce = restorer(images)
    if where == "_whole":  # only those that were looked at again
        assert [result.note for result in scarce] == ["out of memory in a batch of 2; done in a batch of 1"] * 2 + [
            None
        ]
    else:
        assert {result.note for result in scarce} == {"out of memory in a batch of 3; done in a batch of 1"}
    for one, other in zip(plenty, scarce, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)


@pytest.mark.parametrize("tile", [1024, 128])
def test_a_patch_is_repaired_as_a_whole_where_nothing_else_is(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what the gate has missed of it, at once and in pieces."""
    damaged = np.ascontiguousarray(skimage.data.chelsea()[:200, 100:300])
    damaged[60:140, 60:140] = 0
    restorer = Restorer(checkpoint.read("faces-fast"), repair=("patches",))
    network = restorer.network(CPU)
    assert isinstance(network, ResidualUNet)
    merge = network.merge

    def half_blind(image: Tensor, x: Tensor) -> Prediction:
        prediction = merge(image, x)
        if image.shape[3] >= 200:  # not at half the size
            assert prediction.survival is not None
            prediction.survival[:, :, :, 110:] = 5
        return prediction

    monkeypatch.setattr(network, "merge", half_blind)
    monkeypatch.setattr(inference, "TILE", tile)
    (restored,) = restorer([damaged])
    changed = (restored.pixels != damaged).any(axis=2)
    assert changed[60:140, 60:110].mean() > 0.95 and changed[60:140, 110:140].mean() > 0.95
    assert not changed[:, 140:].any()


def test_what_is_not_of_one_colour_is_no_painted_hole() -> None:
    damaged = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    damaged[10:40, 10:30] = 7
    damaged[10:40, 30:40] = (3, 200, 90)  # two that touch
    destroyed = mask(60, 90, (10, 10, 40, 40), (10, 60, 40, 80))
    assert np.array_equal(holes.painted(destroyed, damaged), mask(60, 90, (10, 10, 40, 40)))


def test_of_many_colours_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a picture whose pixels were doubled all are like others beside them."""
    small = np.random.default_rng(0).integers(0, 6, (100, 100, 3), np.uint8) * 40
    labelled = []
    label = ndimage.label

    def counted(*arguments: object) -> object:
        labelled.append(1)
        return label(*arguments)

    monkeypatch.setattr(ndimage, "label", counted)
    holes.painted(mask(200, 200, (10, 10, 190, 190)), small.repeat(2, 0).repeat(2, 1))
    assert len(labelled) == 1 + holes.MOST_COLOURS


def test_half_of_a_patch_is_all_of_it() -> None:
    damaged = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    damaged[10:50, 10:50] = (3, 200, 90)
    half = mask(90, 90, (10, 10, 50, 30))
    assert np.array_equal(holes.painted(half, damaged), mask(90, 90, (10, 10, 50, 50)))
    third = mask(90, 90, (10, 10, 50, 23))  # the gate may be right
    assert np.array_equal(holes.painted(third, damaged), third)
    damaged[30:70, 40:70] = (3, 200, 90)  # another one has grown together with it
    half = mask(90, 90, (10, 10, 50, 50))
    assert np.array_equal(holes.painted(half, damaged), mask(90, 90, (10, 10, 50, 50), (30, 40, 70, 70)))
    damaged[70:85, 10:90] = (3, 200, 90)  # a bar
    assert np.array_equal(holes.painted(half, damaged), half)


def test_stripes_of_one_colour_are_no_patch_and_are_soon_looked_through() -> None:
    rows, columns = np.indices((1000, 1000))
    colours = ((rows + columns) // 2 % 2).astype(np.uint32)
    started = time.perf_counter()
    assert not holes._rest_of_patches(np.ones((1000, 1000), bool), colours).any()
    assert time.perf_counter() - started < 2  # 5 when each stripe's box was looked at

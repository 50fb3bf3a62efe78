import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from restore_core import false_patches
from restore_core.false_patches import without_false_patches
from restore_core.model import Prediction

HERE = (slice(20, 60), slice(30, 80))
"""What the gate takes for a patch."""


def sky() -> npt.NDArray[np.uint8]:
    """A gradient with some grain, [96, 128, 3]."""
    rows, columns = np.mgrid[:96, :128]
    smooth = np.stack([rows * 0.5 + 20, columns * 0.4 + 40, rows * 0.3 + columns * 0.5 + 60], axis=2)
    return (smooth + np.random.default_rng(0).normal(0, 1.5, smooth.shape)).round().astype(np.uint8)


def second_look(image: npt.NDArray[np.uint8], tint: float = 0.0) -> tuple[npt.NDArray[np.uint8], Tensor]:
    """Of a network that paints what it takes for a patch white, and adds a tint to all else."""
    damaged = torch.from_numpy(image).permute(2, 0, 1)[None]
    survival = torch.full((1, 1, 96, 128), 5.0)
    survival[:, :, *HERE] = -5.0
    kept = damaged / 255 + tint
    restored = torch.where(survival < 0, torch.ones(()), kept)
    result, survival = without_false_patches(damaged, Prediction(restored, survival, kept))  # type: ignore[assignment]
    pixels = (result[0] * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels, survival[0, 0] < 0


def test_a_smooth_sky_is_no_patch() -> None:
    image = sky()
    restored, destroyed = second_look(image)
    np.testing.assert_array_equal(restored, image)
    assert not destroyed.any()


def test_what_the_network_does_to_all_of_it_is_not_done_there() -> None:
    image = sky()
    restored, _ = second_look(image, tint=0.1)
    np.testing.assert_array_equal(restored[HERE], image[HERE])
    assert (restored[:10].astype(int) - image[:10]).mean() > 20


def test_flipped_pixels_there_are_the_median_around_them() -> None:
    image = sky()
    image[40, 50] = (255, 0, 255)
    restored, destroyed = second_look(image)
    assert torch.argwhere(destroyed).tolist() == [[40, 50]]
    assert np.abs(restored[40, 50].astype(int) - sky()[40, 50]).max() <= 6


def test_patches_of_one_colour_are_patches() -> None:
    for colour in ((0, 0, 0), (47, 60, 100)):  # the latter is the sky's, more or less
        image = sky()
        image[HERE] = colour
        restored, destroyed = second_look(image)
        assert (restored[HERE] == 255).all()
        assert int(destroyed.sum()) == 40 * 50


def test_a_patch_under_noise_and_flips_is_known_by_its_border() -> None:
    image = sky()
    image[HERE] = (160, 30, 0)
    random = np.random.default_rng(1)
    noisy = (image + random.normal(0, 40, image.shape)).clip(0, 255).astype(np.uint8)
    flipped = random.random((96, 128)) < 0.3
    noisy[flipped] = random.integers(0, 256, (int(flipped.sum()), 3))
    restored, _ = second_look(noisy)
    assert (restored[HERE] == 255).all()


def test_a_patch_that_has_lost_its_colour_is_known_by_small_steps() -> None:
    image = sky()
    random = np.random.default_rng(1)
    image[HERE] = np.mean(image[HERE], axis=(0, 1)) + 14
    noisy = (image.mean(axis=2, keepdims=True).repeat(3, 2) + random.normal(0, 12, image.shape)).clip(0, 255)
    restored, _ = second_look(noisy.astype(np.uint8))
    assert (restored[HERE] == 255).all()


def test_a_small_region_is_what_it_was_taken_for() -> None:
    """As what JPEG leaves around a patch."""
    damaged = torch.from_numpy(sky()).permute(2, 0, 1)[None]
    survival = torch.full((1, 1, 96, 128), 5.0)
    survival[:, :, 20:50, 30:60] = -5.0
    result, after = without_false_patches(
        damaged, Prediction(torch.ones(1, 3, 96, 128), survival.clone(), damaged / 255)
    )
    assert (result == 1).all()
    assert torch.equal(after, survival)  # type: ignore[arg-type]


def test_the_middle_of_a_patch_has_no_border() -> None:
    image = np.random.default_rng(2).integers(0, 99, (96, 128, 3)).astype(np.uint8)
    damaged = torch.from_numpy(image).permute(2, 0, 1)[None]
    survival = torch.full((1, 1, 96, 128), -5.0)
    restored, after = without_false_patches(damaged, Prediction(torch.ones(1, 3, 96, 128), survival, damaged / 255))
    assert (restored == 1).all()
    assert after is not None
    assert (after < 0).all()


def test_a_patch_that_grew_together_with_the_sky_beside_it_stays_one() -> None:
    image = sky()
    square = (slice(20, 60), slice(30, 50))
    image[square] = 0
    restored, destroyed = second_look(image)
    assert (restored[square] == 255).all()
    beyond = (slice(20, 60), slice(53, 80))
    np.testing.assert_array_equal(restored[beyond], image[beyond])
    assert not destroyed[beyond].any()


def test_each_image_of_a_batch_for_itself() -> None:
    damaged = torch.from_numpy(np.stack([sky(), np.zeros_like(sky()), sky()])).permute(0, 3, 1, 2)
    survival = torch.full((3, 1, 96, 128), 5.0)
    survival[:2, :, *HERE] = -5.0
    kept = damaged / 255
    restored = torch.where(survival < 0, torch.ones(()), kept)
    result, _ = without_false_patches(damaged, Prediction(restored.clone(), survival, kept))
    torch.testing.assert_close(result[0], kept[0], rtol=0, atol=1e-6)
    assert torch.equal(result[1:], restored[1:])


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (9, 5), (47, 60)])
def test_windows_are_those_of_scipy(size: tuple[int, int]) -> None:
    """At the borders too."""
    generator = np.random.default_rng(0)
    mask = generator.random(size) < 0.9
    for by in (1, 3, 4):
        square = np.ones((3, 3))
        eroded = ndimage.binary_erosion(mask, square, iterations=by, border_value=1)
        np.testing.assert_array_equal(false_patches._shrunk(mask, by), eroded)
        dilated = ndimage.binary_dilation(~mask, square, iterations=by)
        np.testing.assert_array_equal(false_patches._grown(~mask, by), dilated)


@pytest.mark.parametrize("levels", [20, 100, 256])
def test_pixels_far_from_their_median_are_those_of_scipy(levels: int) -> None:
    image = np.random.default_rng(0).integers(0, levels, (3, 20, 30), np.uint8)
    around = np.lib.stride_tricks.sliding_window_view(
        np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="symmetric"), (5, 5), axis=(1, 2)
    )
    median = ndimage.median_filter(image, (1, 5, 5))
    far = (np.abs(image.astype(int) - median) > false_patches.OUTLIER).any(axis=0)
    np.testing.assert_array_equal(false_patches._far_from_median(image, around), far)
    assert far.any() == (levels > 50)


def test_a_square_of_one_colour_is_found_wherever_it_lies() -> None:
    """Also in a corner, where only a part of the window is inside; beside it everything differs."""
    for top, left in ((0, 0), (0, 13), (7, 25), (30, 40)):
        image = np.random.default_rng(0).integers(0, 256, (3, 40, 50), np.uint8)
        here = (slice(None), slice(top, top + 10), slice(left, left + 10))
        image[here] = 77
        expected = np.zeros((40, 50), bool)
        expected[here[1:]] = True
        np.testing.assert_array_equal(false_patches._solid(image, np.ones((40, 50), bool)), expected)
        assert not false_patches._solid(image, ~expected).any()

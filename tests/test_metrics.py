"""PSNR and SSIM are scikit-image's, and the batched PSNR is the single one."""

import math

import numpy as np
import pytest
import skimage.data
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from restore_core.metrics import Pixels, batch_psnr, psnr, ssim, to_uint8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[(11, 11), (24, 37), (64, 48)], ids=str)
def truth(request: pytest.FixtureRequest) -> Pixels:
    height, width = request.param
    return np.ascontiguousarray(skimage.data.astronaut()[80 : 80 + height, 180 : 180 + width])


def noisy(image: Pixels, sigma_255: float) -> Pixels:
    noise = np.random.default_rng(0).normal(0, sigma_255, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("sigma_255", [1, 20, 75])
def test_psnr_and_ssim_equal_scikit_image(truth: Pixels, sigma_255: float) -> None:
    restored = noisy(truth, sigma_255)
    assert psnr(restored, truth) == pytest.approx(peak_signal_noise_ratio(truth, restored, data_range=255), abs=1e-9)
    reference = structural_similarity(
        truth, restored, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim(restored, truth) == pytest.approx(reference, abs=1e-9)


def test_ssim_is_the_mean_over_the_interior_of_a_gaussian_window() -> None:
    """Wang 2004, equation 13, written out for one channel: 11 x 11 window, population covariance, no border."""
    truth = np.ascontiguousarray(skimage.data.astronaut()[100:124, 200:220])
    truth = np.repeat(truth[:, :, :1], 3, axis=2)
    restored = noisy(truth, 20)
    restored = np.repeat(restored[:, :, :1], 3, axis=2)
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(weights, weights) / weights.sum() ** 2

    def mean(values: np.ndarray) -> np.ndarray:
        return np.einsum("ijkl,kl->ij", np.lib.stride_tricks.sliding_window_view(values, (11, 11)), window)

    x, y = truth[:, :, 0].astype(float), restored[:, :, 0].astype(float)
    variance_x, variance_y = mean(x * x) - mean(x) ** 2, mean(y * y) - mean(y) ** 2
    covariance = mean(x * y) - mean(x) * mean(y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = ((2 * mean(x) * mean(y) + c1) * (2 * covariance + c2)) / (
        (mean(x) ** 2 + mean(y) ** 2 + c1) * (variance_x + variance_y + c2)
    )
    assert ssim(restored, truth) == pytest.approx(values.mean(), abs=1e-9)


def test_psnr_of_a_known_error() -> None:
    black, gray = np.zeros((4, 5, 3), np.uint8), np.full((4, 5, 3), 51, np.uint8)
    assert psnr(gray, black) == pytest.approx(20 * math.log10(5))  # off by a fifth of the range
    assert psnr(black, gray) == psnr(gray, black)  # and nothing wraps around below 0


def test_identical_images(truth: Pixels) -> None:
    assert psnr(truth, truth) == math.inf
    assert ssim(truth, truth) == pytest.approx(1, abs=1e-12)
    batch = torch.from_numpy(truth).permute(2, 0, 1)[None]
    assert batch_psnr(batch, batch).tolist() == [math.inf]


def test_batch_psnr_is_the_psnr_of_each_image_not_of_their_pool() -> None:
    image = np.ascontiguousarray(skimage.data.astronaut()[:40, :30])
    restored = [noisy(image, sigma_255) for sigma_255 in (2, 10, 60)]

    def batch(images: list[Pixels]) -> torch.Tensor:
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    values = batch_psnr(batch(restored), batch([image] * 3))
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx([psnr(one, image) for one in restored], abs=1e-9)
    pooled = 10 * math.log10(255**2 / mean_squared_error(np.stack(restored), np.stack([image] * 3)))
    assert abs(values.mean().item() - pooled) > 1


@pytest.mark.parametrize("height_width", [(10, 40), (40, 10), (1, 1)], ids=str)
def test_ssim_refuses_images_smaller_than_its_window(height_width: tuple[int, int]) -> None:
    image = np.zeros((*height_width, 3), np.uint8)
    with pytest.raises(ValueError, match="win_size exceeds image extent"):
        ssim(image, image)


def test_to_uint8_rounds_to_nearest_and_clips() -> None:
    values = torch.tensor([-0.3, 0.0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 127.6 / 255, 254.6 / 255, 1.0, 1.7, 300.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 127, 128, 255, 255, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every.float() / 255), every)
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.uint8

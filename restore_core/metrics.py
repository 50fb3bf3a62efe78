"""Quality of a restored photograph against the original, as defined once for the whole project."""

from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Pixels = npt.NDArray[np.uint8]


def to_uint8(images: Tensor) -> Tensor:
    """Float images in 0..1 (clipped where outside) to uint8, rounded to nearest. Any shape."""
    return (images.float() * 255).round_().clamp_(0, 255).to(torch.uint8)


def batch_psnr(restored: Tensor, truth: Tensor) -> Tensor:
    """PSNR of each image in dB, float64 [B], over all of RGB; uint8 [B, 3, H, W] both. Identical images are inf."""
    error = (restored.double() - truth.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / error)


def psnr(restored: Pixels, truth: Pixels) -> float:
    """PSNR in dB of one uint8 image [H, W, 3] over RGB, data range 255. Identical images are inf."""
    error = float(np.mean((restored.astype(np.float64) - truth.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(restored: Pixels, truth: Pixels) -> float:
    """SSIM (Wang 2004) of one uint8 image [H, W, 3]: Gaussian window, sigma 1.5, population covariance, interior only.

    Raises ValueError from scikit-image where a side is under 11 pixels.
    """
    from skimage.metrics import structural_similarity  # slow to import, and training does not need it

    return cast(
        float,
        structural_similarity(
            restored,
            truth,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        ),
    )

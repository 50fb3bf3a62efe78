"""What can be had without training, to compare with. Blind, except for the inpainters, which are told the mask.

All take uint8 RGB [H, W, 3] and return the same; the second argument is the mask of destroyed pixels, bool [H, W].
"""

import importlib.util
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from restore_core.errors import UsageError

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Name = Literal["median", "nlm", "tv", "telea", "navier_stokes"]


def median(image: Pixels, destroyed: Mask) -> Pixels:
    """Median of 3x3 pixels, each channel by itself."""
    from scipy.ndimage import median_filter

    return median_filter(image, size=(3, 3, 1), mode="nearest")  # type: ignore[no-any-return]


def nlm(image: Pixels, destroyed: Mask) -> Pixels:
    """Non-local means (Buades 2005) in scikit-image's fast form, as strong as the noise that is estimated."""
    from skimage.restoration import denoise_nl_means

    sigma = _estimated_sigma(image)
    result = denoise_nl_means(
        image / 255, patch_size=5, patch_distance=6, h=0.6 * sigma, sigma=sigma, fast_mode=True, channel_axis=-1
    )
    return _to_uint8(result)


def tv(image: Pixels, destroyed: Mask) -> Pixels:
    """Total variation (Chambolle 2004), as strong as the noise that is estimated."""
    from skimage.restoration import denoise_tv_chambolle

    return _to_uint8(denoise_tv_chambolle(image / 255, weight=max(1e-3, _estimated_sigma(image)), channel_axis=-1))


def telea(image: Pixels, destroyed: Mask) -> Pixels:
    """Inpainting of the destroyed pixels (Telea 2004), which it is told exactly. Needs OpenCV."""
    import cv2

    result: Pixels = cv2.inpaint(image, destroyed.astype(np.uint8), 3, cv2.INPAINT_TELEA)
    return result


def navier_stokes(image: Pixels, destroyed: Mask) -> Pixels:
    """Inpainting of the destroyed pixels (Bertalmio 2001), which it is told exactly. Needs OpenCV."""
    import cv2

    result: Pixels = cv2.inpaint(image, destroyed.astype(np.uint8), 3, cv2.INPAINT_NS)
    return result


def named(name: Name) -> Callable[[Pixels, Mask], Pixels]:
    """The method of that name. Raises UsageError where the library for it is missing."""
    if name in ("telea", "navier_stokes") and not importlib.util.find_spec("cv2"):
        raise UsageError(f"--baselines {name}: needs OpenCV: pip install -c constraints.txt -e '.[peers]'")
    methods: dict[Name, Callable[[Pixels, Mask], Pixels]] = {
        "median": median, "nlm": nlm, "tv": tv, "telea": telea, "navier_stokes": navier_stokes,
    }  # fmt: skip
    assert methods.keys() == set(get_args(Name))
    return methods[name]


def _estimated_sigma(image: Pixels) -> float:
    """Standard deviation of the noise, of 1: from the median of the finest diagonal wavelets (Donoho 1994), of Haar."""
    height, width = (side // 2 * 2 for side in image.shape[:2])
    quads = image[:height, :width].astype(float).reshape(height // 2, 2, width // 2, 2, 3)
    diagonal = (quads[:, 0, :, 0] - quads[:, 0, :, 1] - quads[:, 1, :, 0] + quads[:, 1, :, 1]) / 2
    return float(np.median(np.abs(diagonal)) / 0.6745 / 255) if diagonal.size else 0.0


def _to_uint8(image: npt.NDArray[np.float64]) -> Pixels:
    return (image * 255).round().clip(0, 255).astype(np.uint8)

"""What the plots and sheets share."""

import io
from typing import Any

from PIL import Image
from torch import Tensor


def plot_png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=100)
    return sink.getvalue()


def sheet_png(sheet: Image.Image) -> bytes:
    sink = io.BytesIO()
    sheet.save(sink, format="PNG")
    return sink.getvalue()


def paste(sheet: Any, images: Tensor, left: int, top: int, gap: int) -> None:
    """Paste uint8 images [B, 3, H, W] into a column of a Pillow image, `gap` pixels apart."""
    for row, image in enumerate(images):
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        sheet.paste(Image.fromarray(pixels), (left, top + row * (pixels.shape[0] + gap)))

"""Files of several pictures (animations, pages), taken apart into files of one picture each."""

import io
import struct
from collections.abc import Iterable
from typing import Any

from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from restore_core import exif
from restore_core.codec import png
from restore_core.errors import ItemError

_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")


def too_large(what: str, max_pixels: int) -> ItemError:
    return ItemError(
        "too_large",
        f"{what} are over the budget of {max_pixels} pixels; raise --max-megapixels, with --retry-failed too_large",
    )


def split(image: ImageFile.ImageFile, data: bytes, max_pixels: int) -> list[bytes]:
    """TIFF -> its pages with their tags; animations -> PNG files of the frames as they are shown.

    Raises ItemError `unsupported`, `too_large` (all frames together), and what Pillow raises on broken files.
    """
    frames: int = getattr(image, "n_frames", 1)
    advice = "use --frames first, or split it into single pictures first"
    if isinstance(image, TiffImageFile):
        try:
            return exif.pages(data)
        except (ValueError, struct.error) as error:
            raise ItemError(
                "unsupported", f"TIFF with {frames} pages that hang together ({error}); {advice}"
            ) from error
    if image.format not in _ANIMATED:
        raise ItemError("unsupported", f"{image.format} with {frames} pictures; {advice}")
    if image.format == "PNG" and (image.mode not in ("L", "LA", "RGB", "RGBA") or png.depth_and_colour(data)[0] != 8):
        raise ItemError("unsupported", f"animated PNG with a palette, or not of 8 bits; {advice}")
    if image.format == "AVIF" and image.getexif().get(exif.ORIENTATION, 1) != 1:  # Pillow 13.0.0 crashes on writing it
        raise ItemError("unsupported", f"animated AVIF that is not stored upright; {advice}")
    if image.width * image.height * frames > max_pixels:
        size = f"{frames} frames of {image.width} x {image.height} pixels"
        raise too_large(size, max_pixels)
    if image.format == "GIF" and not fills_screen(image):
        raise ItemError("unsupported", f"GIF whose first picture does not fill its screen; {advice}")
    clear = image.format != "PNG" and _is_clear(image, frames)
    opaque = "L" if image.format == "AVIF" and image.mode == "L" else "RGB"
    parts = []
    for index in range(frames):
        image.seek(index)
        if image.format == "GIF" and image.size != struct.unpack_from("<HH", data, 6):  # Pillow widens it meanwhile
            raise ItemError("unsupported", f"GIF with frames that reach beyond its screen; {advice}")
        frame = image.copy() if image.format == "PNG" else image.convert("RGBA" if clear else opaque)
        file = io.BytesIO()
        Image.frombytes(frame.mode, frame.size, frame.tobytes()).save(file, "PNG", compress_level=1)  # pixels alone
        parts.append(file.getvalue())
    return parts


def fills_screen(image: ImageFile.ImageFile) -> bool:
    """Whether the GIF's picture does, which has not been loaded yet, or what is around it can be seen through.

    Else it would be opaque around it, where viewers show nothing.
    """
    return not image.tile or image.tile[0].extents == (0, 0, *image.size) or "transparency" in image.info


def _is_clear(image: ImageFile.ImageFile, frames: int) -> bool:
    """Whether something can be seen through in some frame."""
    for index in range(frames):
        image.seek(index)
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
            return True
    return False


def alphas(images: Iterable[Image.Image]) -> list[bytes]:
    """What can be seen through, where it changes: Pillow makes one frame of equal ones that follow each other."""
    found: list[bytes] = []
    for image in images:
        alpha = image.convert("RGBA").getchannel("A").tobytes()
        if not found or found[-1] != alpha:
            found.append(alpha)
    return found


def animation_options(image: ImageFile.ImageFile) -> dict[str, Any]:
    """How to save an animation with Pillow so that it plays as before: durations in ms, loops."""
    durations = []
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        image.load()
        durations.append(image.info.get("duration", 0))
    image.seek(0)
    options: dict[str, Any] = {"save_all": True, "duration": durations}
    if "loop" in image.info and image.format != "AVIF":
        options["loop"] = image.info["loop"]
    if image.format == "PNG":
        options |= {"default_image": getattr(image, "default_image", False), "disposal": 0, "blend": 0}
        if options["default_image"]:  # which is not part of the animation
            del durations[0]
    if image.format == "WEBP" and "background" in image.info:
        options["background"] = image.info["background"]
    if image.format == "GIF":
        options |= {"disposal": 2, "optimize": False}
    return options

"""Encoded files -> pixels: header -> size check -> refusals -> pixels."""

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from restore_core import exif
from restore_core.errors import ErrorClass, ItemError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000")  # Pillow opens MPO as JPEG
"""What Pillow may open at all; those outside `RESTORED` are recognised so that they can be refused by name."""
RESTORED = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")

DEFAULT_MAX_PIXELS = 89_478_485
"""Where Pillow begins to warn of decompression bombs. It refuses over twice as many, whatever `max_pixels` says."""

# Everything that Pillow was seen to raise on malformed files, some of it only while it loads the pixels.
BROKEN_FILE = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, AssertionError,
    OverflowError, ZeroDivisionError, RuntimeError, SystemError, struct.error, zlib.error,
)  # fmt: skip

GRAY_MODES = ("L", "LA", "I;16", "I;16B")
"""Modes without colour channels."""
DEEP_MODES = ("I;16", "I;16B")
"""Modes of 16 bits a channel, little- and big-endian."""

Pixels = npt.NDArray[np.uint8]
DeepPixels = npt.NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class Picture:
    """One decoded picture, in the stored orientation (the EXIF tag is not applied)."""

    pixels: Pixels
    """uint8 [H, W, 3], RGB as stored, 0..255, contiguous and writable; grey files have three equal channels."""
    format: str
    """One of `RESTORED`."""
    mode: str
    """As stored: L, LA, RGB, RGBA, I;16 or I;16B."""
    width: int
    height: int
    alpha: Pixels | None
    """uint8 [H, W], None without an alpha channel."""
    gray: bool
    """The file has no colour channels."""
    orientation: int | None = None
    """The EXIF orientation as stored, 1 to 8; None where the file says nothing valid."""
    deep: DeepPixels | None = None
    """uint16 [H, W] of a grey file with 16 bits a channel, whose nearest 8-bit values are `pixels`; else None."""


def decode(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Picture:
    """Decode one file.

    Raises ItemError: `not_an_image`, `truncated`, `decode` (broken), `too_large` (more than `max_pixels`, known from
    the header, nothing is decoded), `unsupported` (this version could not write it back whole), `out_of_memory`.
    """
    image = open_header(data)
    width, height = _stored_size(image)
    if width * height > max_pixels:
        raise ItemError("too_large", f"{width} x {height} pixels are over the budget of {max_pixels} pixels")
    with _decoding(data):
        frames = getattr(image, "n_frames", 1)
    if reason := _unsupported(image, data, frames):
        if _is_cut_off(data):  # the reason may be no more than a missing end, such as half of a BMP's grey palette
            raise _cut_off(data)
        raise ItemError("unsupported", reason)
    turned = image.tag_v2.get(exif.ORIENTATION) if isinstance(image, TiffImageFile) else None
    with _decoding(data):
        image.load()
        undo = _UNDO_TRANSPOSE.get(turned or 1)
        stored: Image.Image = image if undo is None else image.transpose(undo)
        bands = np.array(stored)  # a copy: views of Pillow's memory are read-only
    deep = None
    if image.mode in DEEP_MODES:
        deep = bands.astype(np.uint16)  # in this machine's byte order
        bands = ((deep.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if bands.ndim == 2:
        bands = bands[:, :, np.newaxis]
    gray, has_alpha = image.mode in GRAY_MODES, image.mode in ("LA", "RGBA")
    return Picture(
        pixels=np.repeat(bands[:, :, :1], 3, axis=2) if gray else np.ascontiguousarray(bands[:, :, :3]),
        format=image.format or "",
        mode=image.mode,
        width=width,
        height=height,
        alpha=np.ascontiguousarray(bands[:, :, -1]) if has_alpha else None,
        gray=gray,
        orientation=_valid(turned) or _orientation(image),
        deep=deep,
    )


def one_line(text: str) -> str:
    return " ".join(text.split())[:500]


# --- Opening and refusing --------------------------------------------------------------------------------------------


def open_header(data: bytes) -> ImageFile.ImageFile:
    with _decoding(data):
        return Image.open(io.BytesIO(data), formats=FORMATS)


@contextlib.contextmanager
def _decoding(data: bytes) -> Iterator[None]:
    """Turn what Pillow raises on a bad file into ItemError. Only calls of Pillow belong inside."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ItemError("too_large", one_line(str(error))) from error
    except MemoryError as error:
        raise ItemError("out_of_memory", "not enough memory to decode the picture; lower the pixel budget") from error
    except BROKEN_FILE as error:
        if "truncated" in str(error).lower() or _is_cut_off(data):
            raise _cut_off(data) from error
        kind: ErrorClass = "decode"
        message = f"the file is damaged: {error or type(error).__name__}"
        if isinstance(error, UnidentifiedImageError):
            message = "the file's header is damaged, or of a kind that cannot be read"
            if not data.startswith(_SIGNATURES):
                kind = "not_an_image"
                message = f"no {', '.join(FORMATS)} file: it begins with {data[:8].hex(' ')}" if data else "empty file"
        raise ItemError(kind, one_line(message)) from error


def _cut_off(data: bytes) -> ItemError:
    return ItemError("truncated", f"the file is cut off after {len(data)} bytes")


_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"GIF8")


def _is_cut_off(data: bytes) -> bool:
    """Tell, of a file that Pillow could not read, whether its own structure says that the end is missing."""
    if data.startswith(b"\xff\xd8\xff"):
        return b"\xff\xda" not in data  # no start of scan
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in data
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith((b"II*\0", b"MM\0*")):
        try:
            ifd, _ = exif.read_ifd(data, exif.first_ifd(data))
        except (struct.error, ValueError):
            return True
        places = {entry.tag: entry.integers(data) for entry in ifd if entry.tag in (273, 279, 324, 325)}
        ends = [
            start + size
            for at, sizes in ((273, 279), (324, 325))
            for start, size in zip(places.get(at, ()), places.get(sizes, ()), strict=False)
        ]
        return any(end > len(data) for end in ends)
    return data.startswith(b"BM") and int.from_bytes(data[2:6], "little") > len(data)


_MODE_NAMES = {
    "1": "1-bit", "P": "a palette", "PA": "a palette", "CMYK": "CMYK", "LAB": "LAB colour", "YCbCr": "YCbCr",
    "I": "more than 8 bits a channel", "I;16": "16 bits a channel", "I;16B": "16 bits a channel", "F": "floating point",
}  # fmt: skip


def _unsupported(image: ImageFile.ImageFile, data: bytes, frames: int) -> str | None:
    """Return why the file could not be written back whole, and what to do; None if it can."""
    convert = "convert it to 8-bit grey, RGB or RGBA first"
    if frames > 1:
        return f"{image.format} with {frames} frames or pages; split it into single pictures first"
    if image.format not in RESTORED:
        return f"{image.format} files are not restored; convert to PNG or TIFF first"
    deep = image.mode in DEEP_MODES and image.format in ("PNG", "TIFF")
    if image.mode not in ("L", "LA", "RGB", "RGBA") and not deep:
        return f"{image.format} with {_MODE_NAMES.get(image.mode, image.mode)}; {convert}"
    if isinstance(image.info.get("transparency"), (bytes, int, tuple)):  # a text of that name is only a text
        return f"{image.format} with one colour marked as transparent; convert it to an alpha channel first"
    xmp = image.info.get("xmp")
    if isinstance(xmp, bytes) and b"hdrgm:Version" in xmp:
        return "JPEG with an HDR gain map (Ultra HDR); save it as a plain JPEG first"
    if image.format == "PNG" and data[24] != (16 if deep else 8):  # Pillow silently makes 8 bits of 16, 4 and 2
        return f"PNG with {data[24]} bits a channel; {convert}"
    if image.format == "BMP":
        depth = int.from_bytes(data[24:26] if data[14] == 12 else data[28:30], "little")
        if depth == 16 or image.mode == "RGBA":
            return f"BMP with {depth} bits a pixel{' and alpha' * (depth == 32)}; convert it to PNG first"
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        if data[2:4] not in (b"*\0", b"\0*"):
            return "BigTIFF; convert it to plain TIFF first"
        if set(_as_tuple(tags.get(258, 1))) != {16 if deep else 8} or set(_as_tuple(tags.get(339, 1))) != {1}:
            return f"TIFF that is not of 8-bit (or grey and 16-bit) unsigned numbers; {convert}"
        if tags.get(277, 1) != len(image.getbands()) or 1 in _as_tuple(tags.get(338, ())):
            return f"TIFF with extra channels or premultiplied alpha; {convert}"
        for tag, what in ((330, "sub-images (camera raw or pyramid)"), (50706, "DNG"), (37724, "Photoshop layers")):
            if tag in tags:
                return f"TIFF with {what}; export it as a flat TIFF first"
    return None


def _as_tuple(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


def _stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Pillow turns TIFF, and only TIFF, upright while it loads, and already reports that size."""
    width, height = image.size
    turned = isinstance(image, TiffImageFile) and image.tag_v2.get(exif.ORIENTATION) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _orientation(image: ImageFile.ImageFile) -> int | None:
    try:
        return _valid(image.getexif().get(exif.ORIENTATION))
    except BROKEN_FILE:  # a damaged EXIF block does not make the pixels worse
        return None


def _valid(orientation: object) -> int | None:
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else None


_UNDO_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip

"""Encoded files -> pixels: header -> size check -> refusals -> pixels."""

import contextlib
import io
import math
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from restore_core import exif, memory
from restore_core.codec import avif, bmp, colour, gif, jpeg, jpeg2000, png
from restore_core.codec.colour import Native, Pixels
from restore_core.codec.frames import fills_screen, split, too_large
from restore_core.errors import ErrorClass, ItemError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000")
"""What Pillow may open at all. It opens MPO as JPEG."""

Frames = Literal["refuse", "first", "all"]
"""What to do with files of several pictures: refuse them, take the first picture alone, or all of them."""

# A profile, XMP or what ImageMagick keeps as texts may be larger than the megabyte that Pillow unpacks unless told.
PngImagePlugin.MAX_TEXT_CHUNK = png.MOST_TEXT

DEFAULT_MAX_PIXELS = 89_478_485
"""Where Pillow begins to warn of decompression bombs."""

# Everything that Pillow was seen to raise on malformed files, some of it only while it loads the pixels.
BROKEN_FILE = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, AssertionError,
    OverflowError, ZeroDivisionError, RuntimeError, SystemError, struct.error, zlib.error,
)  # fmt: skip

GRAY_MODES = ("L", "LA", "I;16", "I;16B")
"""Modes without colour channels."""
DEEP_MODES = ("I;16", "I;16B")
"""Grey modes of 16 bits, little- and big-endian. Colour of 16 bits has the modes of 8: `Picture.native` tells."""
MODES = ("L", "LA", "RGB", "RGBA", "P", "CMYK", "LAB", *DEEP_MODES)
"""What can be restored, where the format can hold it."""


ARRAYS = ("pixels", "alpha", "native")
"""Of a picture."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One decoded picture, in the stored orientation (the EXIF tag is not applied)."""

    pixels: Pixels
    """uint8 [H, W, 3], RGB as stored, 0..255, contiguous and writable; grey files have three equal channels."""
    format: str
    """One of `FORMATS`, or MPO."""
    mode: str
    """As Pillow names it, one of `MODES`."""
    width: int
    height: int
    alpha: Pixels | None
    """uint8 [H, W], None without an alpha channel, a transparent colour or palette entry."""
    gray: bool
    """The file has no colour channels."""
    orientation: int | None = None
    """The EXIF orientation as stored, 1 to 8; None where the file says nothing valid."""
    native: Native | None = None
    """The file's own values where `pixels` is only the nearest 8-bit RGB: uint16 [H, W] (grey) or [H, W, 3 or 4] (RGB,
    alpha), uint8 [H, W, 4] (CMYK) or [H, W, 3] (LAB); else None."""
    left_out: int = 0
    """Further frames or pages of the file."""

    def described(self) -> dict[str, Any]:
        """All but the arrays, which are `ARRAYS`."""
        return {name: value for name, value in vars(self).items() if name not in ARRAYS}

    @property
    def shown(self) -> Pixels:
        """The pixels the way up that viewers show them: a view, or the pixels themselves."""
        return _TO_SHOWN[self.orientation or 1](self.pixels)

    def stored(self, shown: Pixels) -> Pixels:
        """The other way: uint8 [H, W, 3] in the stored orientation, a view of pixels as they are shown."""
        orientation = self.orientation or 1
        return _TO_SHOWN[_INVERSE.get(orientation, orientation)](shown)


class Holder(NamedTuple):
    """An animation: see `Picture` for the same fields of one picture."""

    format: str
    mode: str
    orientation: int | None


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a file that may hold several."""

    picture: Picture
    source: bytes | None = None
    """The frame or page as a file of its own; None where it is the file itself."""
    holder: Holder | None = None
    """The file itself, where its frames became files of another format."""


def decode_frames(data: bytes, *, max_pixels: int, frames: Frames = "refuse") -> list[Frame]:
    """Decode one file of one or several pictures: see `Frames`. Raises ItemError like `decode`."""
    parts: list[bytes] = []
    holder: Holder | None = None
    if frames == "all":
        image = open_header(data, max_pixels=max_pixels)
        with _decoding(data):
            if _count(data, max_pixels, frames) > 1:
                if image.format == "AVIF" and (reason := _unsupported(image, data, 1)):
                    raise ItemError("unsupported", reason)
                mode = image.mode  # which going through the frames may change
                parts = split(image, data, max_pixels)
                if not isinstance(image, TiffImageFile):  # not before: of PNG it decodes the first frame
                    holder = Holder(image.format or "", mode, orientation_of(image))
    if not parts:
        return [Frame(decode(data, max_pixels=max_pixels, frames=frames))]
    total = sum(_weighed(open_header(part, max_pixels=max_pixels), part) for part in parts)
    if total > max_pixels:
        raise too_large(f"{len(parts)} pages that count as {total} pixels", max_pixels)
    return [Frame(decode(part, max_pixels=max_pixels), part, holder) for part in parts]


def pixel_count(data: bytes, *, max_pixels: int, frames: Frames = "refuse") -> int:
    """What `decode_frames` would have to hold, by the header alone: pixels. Raises ItemError."""
    image = open_header(data, max_pixels=max_pixels)
    with _decoding(data):
        return math.prod(image.size) * (_count(data, max_pixels, frames) if frames == "all" else 1)


def _count(data: bytes, max_pixels: int, frames: Frames) -> int:
    """How many pictures it holds. Raises ItemError: `unsupported` where those behind the first one are damaged."""
    image = open_header(data, max_pixels=max_pixels)
    try:
        return int(getattr(image, "n_frames", 1))
    except BROKEN_FILE as error:
        with _decoding(data):
            open_header(data, max_pixels=max_pixels).load()
        if frames == "first":
            return 1
        what = f"{image.format} with damaged frames or pages behind the first ({str(error) or type(error).__name__})"
        raise ItemError("unsupported", one_line(f"{what}; use --frames first")) from error


def decode(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, frames: Frames = "refuse") -> Picture:
    """Decode one file of one picture, or the first one of several.

    Raises ItemError: `not_an_image`, `truncated`, `decode` (broken), `too_large` (more than `max_pixels`, known from
    the header, nothing is decoded; pixels that take more memory than those of an 8-bit RGB file count as more),
    `unsupported` (this version could not write it back whole), `out_of_memory`.
    """
    image = open_header(data, max_pixels=max_pixels)
    width, height = _stored_size(image)
    with _decoding(data):
        weighed = _weighed(image, data)
    if weighed > max_pixels:
        counted = f", which count as {weighed}," if weighed > width * height else ""
        raise too_large(f"{width} x {height} pixels{counted}", max_pixels)
    count = _count(data, max_pixels, frames)
    if reason := _unsupported(image, data, 1 if frames == "first" else count):
        # The reason may be no more than a missing end, such as half of a BMP's grey palette, or damage.
        if image.format == "GIF" or _is_cut_off(data):
            with _decoding(data):
                image.load()
        raise ItemError("unsupported", reason)
    turned = _tiff_orientation(image)  # which loading forgets
    native: Native | None
    _require_all_strips(image)
    with _decoding(data):
        if image.mode in ("RGB", "RGBA") and _is_deep(image, data):
            pixels, alpha, native = colour.rgb_of_deep(_deep_values(image, data, max_pixels))
        else:
            pixels, alpha, native = colour.rgb_of(as_stored(image))
        if alpha is None and isinstance(key := image.info.get("transparency"), (int, tuple)):
            values = pixels if native is None else native.reshape(height, width, -1)
            if native is None and image.format == "PNG":  # the key is of as few bits as the file's values
                values = colour.steps_of(pixels, png.depth_and_colour(data)[0])
            alpha = np.where((values == np.asarray(key)).all(axis=2), 0, 255).astype(np.uint8)
    if pixels.shape != (height, width, 3):
        raise ItemError("decode", f"its header says {width} x {height} pixels, and it has {pixels.shape[:2][::-1]}")
    if image.format == "PNG" and (png.is_interlaced(data) or _is_empty(pixels[-1], image.mode)):
        with _decoding(data):
            whole = png.has_all_rows(data)
        if not whole:
            raise _cut_off(data)
    return Picture(
        pixels=pixels,
        format=image.format or "",
        mode=image.mode,
        width=width,
        height=height,
        alpha=alpha,
        gray=image.mode in GRAY_MODES,
        orientation=_valid(turned) or orientation_of(image),
        native=native,
        left_out=count - 1,
    )


_HEAVIER_BYTES = {
    "BMP": 44, "GIF": 44, "AVIF": 50, "JPEG2000": 64, "WEBP": 72, "P": 44, "CMYK": 50, "LA": 54, "RGBA": 54,
}  # fmt: skip
_DEEP_BYTES = 58
"""Of noise, a pixel, in a worker and its codec together at their most, where that is more than `memory.CODING`."""


def _weighed(image: ImageFile.ImageFile, data: bytes) -> int:
    """Pixels, more for kinds of which each takes more memory."""
    kinds = (image.format or "", image.mode)
    heavier = [_HEAVIER_BYTES[kind] for kind in kinds if kind in _HEAVIER_BYTES]
    if image.mode in ("RGB", "RGBA") and _is_deep(image, data):
        heavier.append(_DEEP_BYTES)
    return math.prod(image.size) * max([memory.CODING, *heavier]) // memory.CODING


def as_stored(image: ImageFile.ImageFile) -> Image.Image:
    """The pixels as they are stored: Pillow turns TIFF upright."""
    undo = _UNDO_TRANSPOSE.get(_tiff_orientation(image) or 1)
    if undo is None and isinstance(image, TiffImageFile):
        image.info.pop("xmp", None)  # where Pillow would look for an orientation next, and turn it by that
    image.load()
    return image if undo is None else image.transpose(undo)


def _is_empty(row: Pixels, mode: str) -> bool:
    """Whether all values may be 0, as those are that Pillow did not find."""
    return bool((row == row[0]).all()) if mode == "P" else not row.any()


def _require_all_strips(image: ImageFile.ImageFile) -> None:
    """Of TIFF that is not compressed Pillow reads the strips that there are, and takes the rest for zeros. Raises
    ItemError."""
    if not isinstance(image, TiffImageFile) or not image.tile or image.tile[0].codec_name != "raw":
        return
    planes = len(image.getbands()) if image.tag_v2.get(284, 1) == 2 else 1
    areas = (tile.extents or (0, 0, 0, 0) for tile in image.tile)
    there = sum((right - left) * (below - top) for left, top, right, below in areas)
    if there < math.prod(image.size) * planes or any(tile.offset == 0 for tile in image.tile):
        raise ItemError("decode", "the file is damaged: it does not say where all of its strips or tiles are")


def _deep_values(image: ImageFile.ImageFile, data: bytes, max_pixels: int) -> Native:
    """RGB or RGBA of 16 bits a channel, uint16 [H, W, 3 or 4], of which Pillow keeps one byte.

    So it is read twice, the second time with the bytes named in the opposite order.
    """
    other = open_header(data, max_pixels=max_pixels)
    other.tile = [tile._replace(args=_swapped(tile.args)) for tile in other.tile]
    high, low = (np.asarray(as_stored(one)) for one in (image, other))
    deep = high.astype(np.uint16)
    deep <<= 8
    deep |= low
    return deep


def _swapped(args: Any) -> Any:
    if isinstance(args, tuple):
        return (_swapped(args[0]), *args[1:])
    name, _, order = args.partition(";16")
    big_endian = order == "B" or (order == "N" and sys.byteorder == "big")
    return f"{name};16{'L' if big_endian else 'B'}"


def one_line(text: str) -> str:
    return " ".join(text.split())[:500]


# --- Opening and refusing --------------------------------------------------------------------------------------------


def open_header(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> ImageFile.ImageFile:
    """Open without decoding. Raises ItemError."""
    # Pillow's own guard follows where more was asked for; nothing else in this process opens files of strangers.
    Image.MAX_IMAGE_PIXELS = max(max_pixels, Image.MAX_IMAGE_PIXELS or DEFAULT_MAX_PIXELS)
    with _decoding(data):
        return Image.open(io.BytesIO(data), formats=FORMATS)


@contextlib.contextmanager
def _decoding(data: bytes) -> Iterator[None]:
    """Turn what Pillow raises on a bad file into ItemError. What reads the file belongs inside, no more."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ItemError(
            "too_large", one_line(f"{error}; raise --max-megapixels, with --retry-failed too_large")
        ) from error
    except MemoryError as error:
        raise _out_of_memory() from error
    except BROKEN_FILE as error:
        if OUT_OF_MEMORY in str(error):
            raise _out_of_memory() from error
        # "Truncated cHRM chunk" says Pillow of a chunk that is too short, of a whole file
        if _is_cut_off(data) or ("truncated" in str(error).lower() and not str(error).endswith(" chunk")):
            raise _cut_off(data) from error
        kind: ErrorClass = "decode"
        message = f"the file is damaged: {str(error) or type(error).__name__}"
        if isinstance(error, UnidentifiedImageError):
            message = "the file's header is damaged, or of a kind that cannot be read"
            if not _has_signature(data):
                kind = "not_an_image"
                message = f"no {', '.join(FORMATS)} file: it begins with {data[:8].hex(' ')}" if data else "empty file"
            if name := _other_format(data):
                kind, message = "unsupported", f"{name}; convert it to JPEG, PNG or TIFF first"
        elif str(error).startswith("Unsupported BMP"):
            kind, message = "unsupported", f"{error}; convert it to PNG first"
        raise ItemError(kind, one_line(message)) from error


OUT_OF_MEMORY = "out of memory error"
"""How Pillow begins to say that a decoder found none."""


def _out_of_memory() -> ItemError:
    return ItemError("out_of_memory", "not enough memory to decode the picture; lower the pixel budget")


def _cut_off(data: bytes) -> ItemError:
    return ItemError("truncated", f"the file is cut off after {len(data)} bytes")


_SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"GIF8",
    b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n",
)  # fmt: skip


def _has_signature(data: bytes) -> bool:
    return data.startswith(_SIGNATURES) or data[8:12] == b"WEBP" or data[4:12] in (b"ftypavif", b"ftypavis")


_OTHER_FORMATS = {
    "HEIF": rb"....ftyp(hei|hev|mif1|msf1)",
    "JPEG XL": rb"\0\0\0\x0cJXL ",
    "camera raw": rb"....ftypcrx|FUJIFILM|II\x1a\0\0\0HEAP",
    "Photoshop": rb"8BPS",
    "GIMP": rb"gimp xcf",
    "PNM": rb"P[1-7]\s",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "MNG or JNG": rb"(\x8aM|\x8bJ)NG\r\n",
    "icon": rb"\0\0[\1\2]\0[^\0]\0",
    "DDS": rb"DDS ",
}
"""Images all the same, by how they begin."""


def _other_format(data: bytes) -> str | None:
    """Also kinds of our own formats that Pillow does not know, though they are whole."""
    if data.startswith(b"\xff\xd8\xff") and (bits := jpeg.frame(data)[1]) not in (0, 8):
        return f"JPEG of {bits} bits a sample"
    if data[4:12] in (b"ftypavif", b"ftypavis") and avif.longest_side(data) > _AVIF_SIDE:
        return f"AVIF with a side of more than {_AVIF_SIDE} pixels"
    if data.startswith((b"II*\0", b"MM\0*")) and {256, 257} < {entry.tag for entry in _tiff_entries(data)}:
        return "TIFF of a kind that cannot be read"
    return next((name for name, start in _OTHER_FORMATS.items() if re.match(start, data, re.DOTALL)), None)


def _tiff_entries(data: bytes) -> list[exif.Entry]:
    """Of the first directory, if its pixels are told to be inside of the file."""
    try:
        ifd, _ = exif.read_ifd(data, exif.first_ifd(data))
    except (struct.error, ValueError):
        return []
    places = [entry for entry in ifd if entry.tag in (273, 324)]
    return ifd if places and all(0 < at < len(data) for entry in places for at in entry.integers(data)) else []


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
        except ValueError:  # some tag's value is outside: not that of the strips, perhaps
            ifd, _ = exif.read_ifd(data, exif.first_ifd(data), skip_damaged=True)
            if not {273, 279} <= (tags := {entry.tag for entry in ifd}) and not {324, 325} <= tags:
                return True
        except struct.error:
            return True
        places = {entry.tag: entry.integers(data) for entry in ifd if entry.tag in (273, 279, 324, 325)}
        ends = [
            start + size
            for at, sizes in ((273, 279), (324, 325))
            for start, size in zip(places.get(at, ()), places.get(sizes, ()), strict=False)
        ]
        return any(end > len(data) for end in ends)
    if data.startswith(b"GIF8"):
        return not gif.has_picture(data)
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return not avif.is_whole(data)
    if data.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n")):
        return not jpeg2000.is_whole(data)
    return data.startswith(b"BM") and int.from_bytes(data[2:6], "little") > len(data)


_MODE_NAMES = {
    "1": "1-bit", "PA": "a palette and alpha", "YCbCr": "YCbCr", "I": "more than 16 bits a channel",
    "F": "floating point", "I;16": "16 bits a channel", "I;16B": "16 bits a channel", "RGBX": "four channels",
}  # fmt: skip
_JPEG_SIDE, _AVIF_SIDE = 65_500, 32_768
"""What libjpeg and libavif read at the most, pixels."""
_FORMAT_MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "MPO": ("L", "RGB"),
    "PNG": ("L", "LA", "RGB", "RGBA", "P", *DEEP_MODES),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": MODES,
    "BMP": ("L", "RGB", "RGBA", "P"),
    "GIF": ("L", "P"),
    "AVIF": ("L", "RGB", "RGBA"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA"),
}
"""What can be written back as it was."""


def _unsupported(image: ImageFile.ImageFile, data: bytes, frames: int) -> str | None:
    """Return why the file could not be written back whole, and what to do; None if it can."""
    convert = "convert it to 8-bit grey, RGB or RGBA first"
    if frames > 1:
        return f"{image.format} with {frames} frames or pages; use --frames, or split it into single pictures first"
    if image.mode not in _FORMAT_MODES.get(image.format or "", ()):
        return f"{image.format} with {_MODE_NAMES.get(image.mode, image.mode)}; {convert}"
    xmp = image.info.get("xmp")
    if isinstance(xmp, bytes) and b"hdrgm:Version" in xmp:
        return "JPEG with an HDR gain map (Ultra HDR); save it as a plain JPEG first"
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe_transform" not in image.info:
        return f"CMYK JPEG that does not say whether its inks are inverted; {convert}"
    if isinstance(image, JpegImageFile) and max(image.size) > _JPEG_SIDE:
        return f"JPEG with a side of more than {_JPEG_SIDE} pixels; convert it to PNG or TIFF first"
    if isinstance(image, JpegImageFile) and (kind := jpeg.unreadable(data)):
        return f"{kind} JPEG; convert it to PNG or TIFF first"
    match image.format:
        case "PNG":
            return _unsupported_png(image, data)
        case "GIF":
            if not fills_screen(image):
                return f"GIF whose picture does not fill its screen; {convert}"
        case "BMP":
            depth = bmp.depth(data)
            if depth == 1 or (image.mode == "L" and depth != 8):
                return f"BMP with {depth} bits a pixel{' and grey' * (depth > 1)}; convert it to PNG first"
            if image.mode == "RGB" and bmp.has_alpha(data):
                return "BMP with an alpha channel that cannot be read; convert it to PNG first"
        case "AVIF":
            at = data.find(b"av1C")
            if at < 0 or data[at + 6] & 0x40:
                return f"AVIF with more than 8 bits a channel; {convert}"
            return avif.unsupported(data)
        case "JPEG2000":
            return jpeg2000.unsupported(data)
    return _unsupported_tiff(image, data) if isinstance(image, TiffImageFile) else None


_GRAY_ALPHA = 4
"""Colour type of PNG."""


def _unsupported_png(image: ImageFile.ImageFile, data: bytes) -> str | None:
    convert = "convert it to 8-bit grey, RGB or RGBA first"
    (depth, kind), deep = png.depth_and_colour(data), _is_deep(image, data)
    if next(png.chunks(data))[0] == b"CgBI":
        return f"PNG of Apple's own kind (CgBI); {convert}"
    if depth == 1:
        return f"PNG with 1 bit a channel; {convert}"
    if deep and image.mode == "RGBA" and kind == _GRAY_ALPHA:  # Pillow makes 8 bits of them
        return f"PNG with 16 bits a channel and alpha; {convert}"
    return None


def _is_deep(image: ImageFile.ImageFile, data: bytes) -> bool:
    """16 bits a channel."""
    if isinstance(image, TiffImageFile):
        return set(_as_tuple(image.tag_v2.get(258, 1))) == {16}
    return image.format == "PNG" and png.depth_and_colour(data)[0] == 16


def _unsupported_tiff(image: TiffImageFile, data: bytes) -> str | None:
    tags, convert = image.tag_v2, "convert it to 8-bit grey, RGB or RGBA first"
    if data[2:4] not in (b"*\0", b"\0*"):
        return "BigTIFF; convert it to plain TIFF first"
    deep = image.mode in DEEP_MODES or (image.mode in ("RGB", "RGBA") and _is_deep(image, data))
    if set(_as_tuple(tags.get(258, 1))) != {16 if deep else 8} or set(_as_tuple(tags.get(339, 1))) != {1}:
        return f"TIFF that is not of 8-bit or 16-bit unsigned numbers; {convert}"
    if tags.get(277, 1) != len(image.getbands()) or 1 in _as_tuple(tags.get(338, ())):
        return f"TIFF with extra channels or premultiplied alpha; {convert}"
    if deep and tags.get(262) == 0:  # Pillow inverts those of 8 bits, and not these
        return f"TIFF of 16 bits where 0 is white; {convert}"
    if deep and tags.get(284, 1) != 1 and len(image.getbands()) > 1:
        return f"TIFF of 16 bits with its channels apart; {convert}"
    for tag, what in ((330, "sub-images (camera raw or pyramid)"), (50706, "DNG"), (37724, "Photoshop layers")):
        if tag in tags:
            return f"TIFF with {what}; export it as a flat TIFF first"
    return None


def _as_tuple(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


def _stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Pillow turns TIFF, and only TIFF, upright while it loads, and already reports that size."""
    width, height = image.size
    return (height, width) if _tiff_orientation(image) in (5, 6, 7, 8) else (width, height)


def _tiff_orientation(image: ImageFile.ImageFile) -> Any:
    return image.tag_v2.get(exif.ORIENTATION) if isinstance(image, TiffImageFile) else None


def orientation_of(image: ImageFile.ImageFile) -> int | None:
    """That of EXIF. Where that has none Pillow's `getexif` takes one from XMP, which viewers do not heed."""
    found = Image.Exif()
    try:
        found.load(image.info.get("exif") or png.exif_text(image.info))
        return _valid(found.get(exif.ORIENTATION))
    except BROKEN_FILE:  # a damaged EXIF block does not make the pixels worse
        return None


def _valid(orientation: object) -> int | None:
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else None


# By EXIF orientation; the others are their own inverse.
_INVERSE = {6: 8, 8: 6}
_TO_SHOWN: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}

_UNDO_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip

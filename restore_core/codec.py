"""Encoded files <-> pixels. The bytes decide what a file is, never its name; what cannot be returned whole is refused.

decode: header -> size check -> refusals -> pixels. encode: pixels -> the source's own format -> the source's metadata.
"""

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile, get_sampling
from PIL.TiffImagePlugin import TiffImageFile

from restore_core import exif
from restore_core.errors import ErrorClass, ItemError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000")  # Pillow opens MPO as JPEG
"""What Pillow may open at all; those outside `RESTORED` are recognised so that they can be refused by name."""
RESTORED = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")

DEFAULT_MAX_PIXELS = 89_478_485
"""Where Pillow begins to warn of decompression bombs. It refuses over twice as many, whatever `max_pixels` says."""

# Everything that Pillow was seen to raise on malformed files, some of it only while it loads the pixels.
_BROKEN_FILE = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, AssertionError,
    OverflowError, ZeroDivisionError, RuntimeError, SystemError, struct.error, zlib.error,
)  # fmt: skip

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Picture:
    """One decoded picture, in the stored orientation (the EXIF tag is not applied)."""

    pixels: Pixels
    """uint8 [H, W, 3], RGB as stored, 0..255, contiguous and writable; grey files have three equal channels."""
    format: str
    """One of `RESTORED`."""
    mode: str
    """As stored: L, LA, RGB or RGBA."""
    width: int
    height: int
    alpha: Pixels | None
    """uint8 [H, W], None without an alpha channel."""
    gray: bool
    """The file has no colour channels."""
    orientation: int | None = None
    """The EXIF orientation as stored, 1 to 8; None where the file says nothing valid."""


def probe(data: bytes) -> tuple[str, str, int, int]:
    """Return (format, mode, width, height), as stored, from the header. Raises ItemError like `decode`."""
    image = _open(data)
    width, height = _stored_size(image)
    return image.format or "", image.mode, width, height


def decode(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Picture:
    """Decode one file.

    Raises ItemError: `not_an_image`, `truncated`, `decode` (broken), `too_large` (more than `max_pixels`, known from
    the header, nothing is decoded), `unsupported` (this version could not write it back whole), `out_of_memory`.
    """
    image = _open(data)
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
    if bands.ndim == 2:
        bands = bands[:, :, np.newaxis]
    gray, has_alpha = image.mode in ("L", "LA"), image.mode in ("LA", "RGBA")
    return Picture(
        pixels=np.repeat(bands[:, :, :1], 3, axis=2) if gray else np.ascontiguousarray(bands[:, :, :3]),
        format=image.format or "",
        mode=image.mode,
        width=width,
        height=height,
        alpha=np.ascontiguousarray(bands[:, :, -1]) if has_alpha else None,
        gray=gray,
        orientation=turned or _orientation(image),
    )


def encode(pixels: Pixels, source: bytes, *, picture: Picture, software: str, strip_metadata: bool = False) -> bytes:
    """Encode restored pixels as the file they came from: same format, size, mode and alpha, no coarser compression.

    Args:
        pixels: uint8 [H, W, 3], RGB, 0..255, of `picture`'s size. Grey files get their ITU-R 601 luma.
        source: the file that `picture` was decoded from; metadata and compression settings are taken from it.
        software: written to the EXIF tag Software. BMP has no place for it.
        strip_metadata: drop EXIF, XMP, IPTC and texts; the ICC profile stays, and so does an orientation that is not 1.

    Raises ItemError `encode`, and ValueError if `pixels` does not fit `picture`.
    """
    if pixels.dtype != np.uint8 or pixels.shape != (picture.height, picture.width, 3):
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, the picture is {picture.height} x {picture.width}")
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if picture.gray:
        image = image.convert("L")
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha))
    original = _open(source)
    try:
        match original:
            case JpegImageFile():
                return _encode_jpeg(image, original, software, strip_metadata)
            case TiffImageFile():
                return _encode_tiff(image, original, source, software, strip_metadata)
        if original.format == "PNG":
            return _encode_png(image, original, source, software, strip_metadata)
        if original.format == "WEBP":
            return _encode_webp(image, original, source, software, strip_metadata)
        return _saved(image, "BMP", dpi=original.info.get("dpi", (96, 96)))
    except (*_BROKEN_FILE, MemoryError) as error:
        raise ItemError(
            "encode", _line(f"cannot write as {original.format}: {error or type(error).__name__}")
        ) from error


def encode_png(pixels: Pixels) -> bytes:
    """Encode uint8 RGB [H, W, 3] or grey [H, W] pixels as a PNG, without metadata."""
    return _saved(Image.fromarray(np.ascontiguousarray(pixels)), "PNG", compress_level=1)


def thumbnail_png(pixels: Pixels, max_side: int) -> bytes:
    """Encode uint8 [H, W, 3] pixels as a PNG whose sides are at most `max_side`; smaller pictures keep their size."""
    return _saved(_thumbnail(pixels, max_side), "PNG", optimize=True)


def thumbnail_jpeg(pixels: Pixels, max_side: int) -> bytes:
    """Encode uint8 [H, W, 3] pixels as a JPEG of quality 90; otherwise like `thumbnail_png`."""
    return _saved(_thumbnail(pixels, max_side), "JPEG", quality=90)


def _thumbnail(pixels: Pixels, max_side: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((max_side, max_side))
    return image


def _saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _line(text: str) -> str:
    return " ".join(text.split())[:500]


# --- Opening and refusing --------------------------------------------------------------------------------------------


def _open(data: bytes) -> ImageFile.ImageFile:
    with _decoding(data):
        return Image.open(io.BytesIO(data), formats=FORMATS)


@contextlib.contextmanager
def _decoding(data: bytes) -> Iterator[None]:
    """Turn what Pillow raises on a bad file into ItemError. Only calls of Pillow belong inside."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ItemError("too_large", _line(str(error))) from error
    except MemoryError as error:
        raise ItemError("out_of_memory", "not enough memory to decode the picture; lower the pixel budget") from error
    except _BROKEN_FILE as error:
        if "truncated" in str(error).lower() or _is_cut_off(data):
            raise _cut_off(data) from error
        kind: ErrorClass = "decode"
        message = f"the file is damaged: {error or type(error).__name__}"
        if isinstance(error, UnidentifiedImageError):
            message = "the file's header is damaged, or of a kind that cannot be read"
            if not data.startswith(_SIGNATURES):
                kind = "not_an_image"
                message = f"no {', '.join(FORMATS)} file: it begins with {data[:8].hex(' ')}" if data else "empty file"
        raise ItemError(kind, _line(message)) from error


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
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        return f"{image.format} with {_MODE_NAMES.get(image.mode, image.mode)}; {convert}"
    if "transparency" in image.info:
        return f"{image.format} with one colour marked as transparent; convert it to an alpha channel first"
    if b"hdrgm:Version" in image.info.get("xmp", b""):
        return "JPEG with an HDR gain map (Ultra HDR); save it as a plain JPEG first"
    if image.format == "PNG" and data[24] != 8:  # Pillow silently makes 8 bits of 16, 4 and 2
        return f"PNG with {data[24]} bits a channel; {convert}"
    if image.format == "BMP":
        depth = int.from_bytes(data[24:26] if data[14] == 12 else data[28:30], "little")
        if depth == 16 or image.mode == "RGBA":
            return f"BMP with {depth} bits a pixel{' and alpha' * (depth == 32)}; convert it to PNG first"
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        if data[2:4] not in (b"*\0", b"\0*"):
            return "BigTIFF; convert it to plain TIFF first"
        if set(_as_tuple(tags.get(258, 1))) != {8} or set(_as_tuple(tags.get(339, 1))) != {1}:
            return f"TIFF that is not of 8-bit unsigned numbers; {convert}"
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
        value = image.getexif().get(exif.ORIENTATION)
    except _BROKEN_FILE:  # a damaged EXIF block does not make the pixels worse
        return None
    return value if value in range(1, 9) else None


_UNDO_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


# --- Encoding, one function a format ---------------------------------------------------------------------------------


def _encode_jpeg(image: Image.Image, original: JpegImageFile, software: str, strip: bool) -> bytes:
    info = original.info
    tables = [original.quantization[layer[3]] for layer in original.layer]  # one for each component
    sampling = get_sampling(original)
    options: dict[str, object] = {"xmp": info.get("xmp"), "comment": info.get("comment"), "extra": _segments(original)}
    block = exif.annotated(exif.bare(info.get("exif")), software, strip)
    if len(block) > 65_527:  # it fitted before the note was added; JPEG segments end at 64 KiB
        block = exif.bare(info.get("exif"))
    return _saved(
        image,
        "JPEG",
        qtables=tables[:2] if tables[1:2] == tables[2:3] else tables,
        subsampling=sampling if sampling >= 0 else 0,  # kinds that Pillow cannot write: keep all of the colour
        keep_rgb=info.get("adobe_transform") == 0 and len(tables) == 3,
        progressive=bool(info.get("progressive")),
        dpi=info["dpi"] if info.get("jfif_unit") in (1, 2) else (0, 0),
        icc_profile=info.get("icc_profile"),
        exif=b"Exif\0\0" + block if block else b"",
        **({} if strip else options),
    )


def _segments(original: JpegImageFile) -> bytes:
    """Return the segments that Pillow does not carry: IPTC captions (APP13) and the rest of a long XMP (APP1)."""
    kept = [
        (name, segment)
        for name, segment in original.applist
        if name == "APP13" or (name == "APP1" and segment.startswith(b"http://ns.adobe.com/xmp/extension/\0"))
    ]
    return b"".join(
        struct.pack(">BBH", 0xFF, 0xE0 + int(name.removeprefix("APP")), len(segment) + 2) + segment
        for name, segment in kept
    )


def _encode_webp(image: Image.Image, original: ImageFile.ImageFile, source: bytes, software: str, strip: bool) -> bytes:
    info = original.info
    options: dict[str, object] = (
        {"lossless": True, "quality": 20, "method": 1} if _lossless(source) else {"quality": 95}
    )
    return _saved(
        image,
        "WEBP",
        exact=True,  # else the colours under transparent pixels are lost
        alpha_quality=100,
        icc_profile=info.get("icc_profile"),
        exif=exif.annotated(exif.bare(info.get("exif")), software, strip),
        xmp=b"" if strip else info.get("xmp", b""),
        **options,
    )


def _lossless(webp: bytes) -> bool:
    at = 12
    while at + 8 <= len(webp) and webp[at : at + 4] not in (b"VP8L", b"VP8 "):
        at += 8 + (int.from_bytes(webp[at + 4 : at + 8], "little") + 1) // 2 * 2
    return webp[at : at + 4] == b"VP8L"


_PNG_LAYOUT = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"hIST", b"acTL", b"fcTL", b"fdAT", b"eXIf")
_PNG_COLOUR = (b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"sBIT", b"pHYs")


def _encode_png(image: Image.Image, original: ImageFile.ImageFile, source: bytes, software: str, strip: bool) -> bytes:
    """Put the source's own ancillary chunks, byte for byte, around the new pixels."""
    new, old = list(_png_chunks(_saved(image, "PNG", compress_level=1))), list(_png_chunks(source))
    first = next(index for index, (kind, _) in enumerate(old) if kind == b"IDAT")
    kept = [(kind, body) for kind, body in old if kind not in _PNG_LAYOUT and (kind in _PNG_COLOUR or not strip)]
    before = sum(kind not in _PNG_LAYOUT and (kind in _PNG_COLOUR or not strip) for kind, _ in old[:first])
    block = next((body for kind, body in old if kind == b"eXIf"), b"")
    if not block and (text := original.info.get("Raw profile type exif")):  # where older ImageMagick put it
        block = bytes.fromhex("".join(text.split("\n")[3:]))
    block = exif.annotated(exif.bare(block), software, strip)
    chunks = [
        new[0],
        *kept[:before],
        *([(b"eXIf", block)] if block else []),
        *(chunk for chunk in new if chunk[0] == b"IDAT"),
        *kept[before:],
        (b"IEND", b""),
    ]
    return source[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _png_chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at + 12 <= len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        at += size + 12


_TIFF_LOSSLESS = ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "lzma", "zstd")
# Tags that describe how pixels are laid out in the file: Pillow's, not the source's, are true after encoding.
_TIFF_LAYOUT = {
    *range(254, 267), 273, *range(277, 282), 284, *range(288, 294), 317, 318, 319, 320, *range(322, 326), 330,
    *range(338, 348), *range(512, 522), *range(529, 533), 34675,
}  # fmt: skip
_TIFF_RESOLUTION = (282, 283, 296)


def _encode_tiff(image: Image.Image, original: TiffImageFile, source: bytes, software: str, strip: bool) -> bytes:
    """Let Pillow write the pixels, then append a directory that also holds the source's tags (Pillow loses some)."""
    compression = original.info.get("compression")
    tiff = bytearray(
        _saved(
            image,
            "TIFF",
            compression=compression if compression in _TIFF_LOSSLESS else "tiff_adobe_deflate",
            icc_profile=original.info.get("icc_profile"),
            tiffinfo={317: 2} if original.tag_v2.get(317) == 2 else {},
        )
    )
    layout, _ = exif.read_ifd(tiff, exif.first_ifd(tiff))
    entries = {entry.tag: entry for entry in layout}
    for entry in exif.read_ifd(source, exif.first_ifd(source))[0]:
        if strip and entry.tag not in (*_TIFF_RESOLUTION, exif.ORIENTATION):
            continue
        if entry.tag not in _TIFF_LAYOUT:
            entries[entry.tag] = exif.moved(entry, source, tiff)
    if not strip:
        entries[exif.SOFTWARE] = exif.text_entry(exif.SOFTWARE, software)
    exif.write_first_ifd(tiff, entries.values(), 0)
    return bytes(tiff)

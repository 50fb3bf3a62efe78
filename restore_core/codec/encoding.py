"""Pixels -> encoded files: the source's own format, compression and metadata."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile, get_sampling
from PIL.TiffImagePlugin import TiffImageFile

from restore_core import exif
from restore_core.codec.decoding import BROKEN_FILE, DeepPixels, Picture, Pixels, one_line, open_header
from restore_core.errors import ItemError


def encode(pixels: Pixels, source: bytes, *, picture: Picture, software: str, strip_metadata: bool = False) -> bytes:
    """Encode restored pixels as the file they came from: same format, size, mode and alpha, no coarser compression.

    Args:
        pixels: uint8 [H, W, 3], RGB, 0..255, of `picture`'s size. Grey files get their ITU-R 601 luma, those of 16 bits
            the difference that it makes.
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
    if picture.deep is not None:
        image = Image.fromarray(_deepened(np.asarray(image), picture.deep, picture.pixels))
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha))
    original = open_header(source)
    try:
        if strip_metadata:
            block = exif.stripped(picture.orientation)
        else:
            stored = _png_exif(original, source) if original.format == "PNG" else original.info.get("exif")
            block = exif.annotated(exif.bare(stored), software)
        match original:
            case JpegImageFile():
                return _encode_jpeg(image, original, block, strip_metadata)
            case TiffImageFile():
                return _encode_tiff(image, original, source, software, strip_metadata)
        if original.format == "PNG":
            return _encode_png(image, source, block, strip_metadata)
        if original.format == "WEBP":
            return _encode_webp(image, original, source, block, strip_metadata)
        return _saved(image, "BMP", dpi=original.info.get("dpi", (96, 96)))
    except (*BROKEN_FILE, MemoryError) as error:
        raise ItemError(
            "encode", one_line(f"cannot write as {original.format}: {error or type(error).__name__}")
        ) from error


def _deepened(gray: Pixels, deep: DeepPixels, pixels: Pixels) -> DeepPixels:
    """What was restored at 8 bits, as a correction of the 16-bit values: where nothing changed, all bits stay."""
    correction = gray.astype(np.int32) - pixels[:, :, 0]
    return np.clip(deep + 257 * correction, 0, 65_535).astype(np.uint16)


def without_metadata(source: bytes, *, picture: Picture) -> bytes:
    """The file without EXIF, XMP, IPTC and texts, and with the very same pixels.

    The ICC profile stays, and so does an orientation that is not 1. Of JPEG and WebP the compressed data is copied.
    Raises ItemError `encode`.
    """
    if picture.format == "JPEG":
        return _strip_jpeg(source, exif.stripped(picture.orientation))
    if picture.format == "WEBP":
        return _strip_webp(source, exif.stripped(picture.orientation))
    return encode(picture.pixels, source, picture=picture, software="", strip_metadata=True)  # lossless formats


def _strip_jpeg(source: bytes, block: bytes) -> bytes:
    kept, at = [source[:2]], 2
    while at + 4 <= len(source) and source[at + 1] != 0xDA:  # start of scan: the rest is pixels
        if source[at + 1] == 0xFF:  # a filling byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(source[at + 2 : at + 4], "big")
        body = source[at + 4 : end]
        is_application = 0xE0 <= source[at + 1] <= 0xEF
        if not (is_application or source[at + 1] == 0xFE) or body.startswith((b"JFIF\0", b"ICC_PROFILE\0", b"Adobe")):
            kept.append(source[at:end])
        at = end
    if block:
        kept.insert(1, struct.pack(">BBH", 0xFF, 0xE1, len(block) + 8) + b"Exif\0\0" + block)
    return b"".join([*kept, source[at:]])


def _strip_webp(source: bytes, block: bytes) -> bytes:
    chunks, at = [], 12
    while at + 8 <= len(source):
        end = at + 8 + (int.from_bytes(source[at + 4 : at + 8], "little") + 1) // 2 * 2
        chunk = bytearray(source[at:end])
        if chunk[:4] == b"VP8X":
            chunk[8] = chunk[8] & ~0x0C | (0x08 if block else 0)  # flags: no XMP, EXIF as it will be
        if bytes(chunk[:4]) in (b"VP8X", b"ICCP", b"ALPH", b"VP8 ", b"VP8L"):
            chunks.append(bytes(chunk))
        at = end
    if block:
        chunks.append(b"EXIF" + struct.pack("<I", len(block)) + block + bytes(len(block) % 2))
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def thumbnail_jpeg(pixels: Pixels, max_side: int) -> bytes:
    """Encode uint8 [H, W, 3] pixels as a JPEG of quality 90; its sides are at most `max_side`."""
    return _saved(_thumbnail(pixels, max_side), "JPEG", quality=90)


def _thumbnail(pixels: Pixels, max_side: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((max_side, max_side))
    return image


def _saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# --- Encoding, one function a format ---------------------------------------------------------------------------------


def _encode_jpeg(image: Image.Image, original: JpegImageFile, block: bytes, strip: bool) -> bytes:
    info = original.info
    tables = [original.quantization[layer[3]] for layer in original.layer]  # one for each component
    sampling = get_sampling(original)
    options: dict[str, object] = {"xmp": info.get("xmp"), "comment": info.get("comment"), "extra": _segments(original)}
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


def _encode_webp(image: Image.Image, original: ImageFile.ImageFile, source: bytes, block: bytes, strip: bool) -> bytes:
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
        exif=block,
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


def _png_exif(original: ImageFile.ImageFile, source: bytes) -> bytes:
    for kind, body in _png_chunks(source):
        if kind == b"eXIf":
            return body
    text = original.info.get("Raw profile type exif")  # where older ImageMagick put it
    try:
        return bytes.fromhex("".join(text.split("\n")[3:])) if isinstance(text, str) else b""
    except ValueError:  # damaged; the text itself is carried over as it is
        return b""


def _encode_png(image: Image.Image, source: bytes, block: bytes, strip: bool) -> bytes:
    """Put the source's own ancillary chunks, byte for byte, around the new pixels."""
    new, old = list(_png_chunks(_saved(image, "PNG", compress_level=1))), list(_png_chunks(source))
    first = next(index for index, (kind, _) in enumerate(old) if kind == b"IDAT")
    kept = [(kind, body) for kind, body in old if kind not in _PNG_LAYOUT and (kind in _PNG_COLOUR or not strip)]
    before = sum(kind not in _PNG_LAYOUT and (kind in _PNG_COLOUR or not strip) for kind, _ in old[:first])
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

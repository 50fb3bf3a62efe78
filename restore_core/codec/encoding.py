"""Pixels -> encoded files: the source's own format, compression and metadata."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageSequence
from PIL.JpegImagePlugin import JpegImageFile, get_sampling
from PIL.TiffImagePlugin import TiffImageFile

from restore_core import exif
from restore_core.codec import avif, bmp, colour, gif, jpeg, jpeg2000, png
from restore_core.codec.colour import Native, Pixels
from restore_core.codec.decoding import (
    ARRAYS,
    BROKEN_FILE,
    DEFAULT_MAX_PIXELS,
    OUT_OF_MEMORY,
    Picture,
    as_stored,
    decode,
    one_line,
    open_header,
    orientation_of,
)
from restore_core.codec.frames import alphas, animation_options
from restore_core.errors import ItemError


def encode(pixels: Pixels, source: bytes, *, picture: Picture, software: str, strip_metadata: bool = False) -> bytes:
    """Encode restored pixels as the file they came from: same format, size, mode and alpha, no coarser compression.

    Args:
        pixels: uint8 [H, W, 3], RGB, 0..255, of `picture`'s size. Grey files get their ITU-R 601 luma, those of 16 bits
            the difference that it makes.
        source: the file that `picture` was decoded from; metadata and compression settings are taken from it.
        software: written to the EXIF tag Software. BMP, GIF and JPEG 2000 have no place for it.
        strip_metadata: drop EXIF, XMP, IPTC and texts; the ICC profile stays, and so does an orientation that is not 1.

    Raises ItemError `encode`, and ValueError if `pixels` does not fit `picture`.
    """
    if pixels.dtype != np.uint8 or pixels.shape != (picture.height, picture.width, 3):
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, the picture is {picture.height} x {picture.width}")
    original = open_header(source, max_pixels=picture.width * picture.height)
    try:
        block = _exif_block(original, source, picture.orientation, software, strip_metadata)
        match original:
            case JpegImageFile():
                new = _encode_jpeg(_image(pixels, picture), original, source, block, strip_metadata)
                return new if strip_metadata or original.format == "MPO" else new + _after_jpeg(source)
            case TiffImageFile():
                return _encode_tiff(pixels, picture, original, source, software, strip_metadata)
        match original.format:
            case "PNG":
                return _encode_png(pixels, picture, original, source, block, strip_metadata)
            case "WEBP":
                return _encode_webp(pixels, picture, original, source, block, strip_metadata)
            case "AVIF":
                image = _image(pixels, picture)
                new = _saved(image, "AVIF", **_avif_options(image, original, block, strip_metadata))
                return avif.with_colours_of(source, new)
            case "GIF":
                new = _encode_gif(pixels, picture, original, strip_metadata)
                return gif.with_applications_of(source, new, strip_metadata=strip_metadata)
            case "JPEG2000":
                return _encode_jpeg2000(_image(pixels, picture), source, strip_metadata)
        if picture.mode == "P":
            image, _ = colour.with_palette(pixels, None, 2 ** bmp.depth(source), as_stored(original))
            return bmp.encoded(image, source)
        return bmp.encoded(_image(pixels, picture), source)
    except (*BROKEN_FILE, MemoryError) as error:
        raise _not_done(f"cannot write as {original.format}", error) from error


def _not_done(what: str, error: Exception) -> ItemError:
    if isinstance(error, MemoryError) or OUT_OF_MEMORY in str(error):
        return ItemError("out_of_memory", f"{what}: not enough memory; lower --workers or use larger machines")
    return ItemError("encode", one_line(f"{what}: {str(error) or type(error).__name__}"))


def _image(pixels: Pixels, picture: Picture) -> Image.Image:
    """In the file's own mode, if that is not a palette or 16-bit colour."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if picture.gray:
        image = image.convert("L")
    if picture.native is not None:
        native = _native(pixels, picture)
        if picture.mode in ("CMYK", "LAB"):
            return Image.frombytes(picture.mode, (picture.width, picture.height), native.tobytes())
        return Image.fromarray(native)
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha))
    return image


def _native(pixels: Pixels, picture: Picture) -> Native:
    assert picture.native is not None
    if picture.gray:
        pixels = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[:, :, np.newaxis]
        return colour.native_of(pixels, picture.pixels[:, :, :1], picture.native, picture.mode)
    return colour.native_of(pixels, picture.pixels, picture.native, picture.mode)


def _has_deep_colour(picture: Picture) -> bool:
    return picture.native is not None and picture.native.dtype == np.uint16 and not picture.gray


def without_metadata(source: bytes, *, picture: Picture) -> bytes:
    """The file without EXIF, XMP, IPTC and texts, and with the very same pixels.

    The ICC profile stays, and so does an orientation that is not 1. The compressed data is copied where that can be.
    Raises ItemError `encode`, also where a damaged file would come out as another picture.
    """
    bare = _without_metadata(source, picture)
    most = 3 * picture.width * picture.height
    try:
        before, after = (decode(data, max_pixels=most, frames="first") for data in (source, bare))
    except ItemError as error:
        raise _not_taken_out(picture.format, error.message) from error
    same = all(_equal(getattr(before, name), getattr(after, name)) for name in ARRAYS)
    if not same or (before.orientation or 1) != (after.orientation or 1):
        raise _not_taken_out(picture.format, "the picture would change")
    return bare


def _equal(one: Native | None, other: Native | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


def _without_metadata(source: bytes, picture: Picture) -> bytes:
    block = exif.stripped(picture.orientation)
    match picture.format:
        case "JPEG" | "MPO":
            return _strip_jpeg(source, block)
        case "WEBP":
            return _strip_webp(source, block)
        case "PNG":
            return _strip_png(source, block)
        case "GIF":
            return gif.without_metadata(source)
        case "JPEG2000":
            return jpeg2000.with_codestream(source, jpeg2000.codestream(source), strip_metadata=True)
        case "AVIF":
            return _unless_broken("AVIF", lambda: avif.without_metadata(source, block))
        case "TIFF":
            return _unless_broken("TIFF", lambda: exif.with_tags(source, _TIFF_IMAGE))
        case "BMP":
            return source  # it holds none
    raise AssertionError(picture.format)


def _unless_broken(format: str, strip: Callable[[], bytes]) -> bytes:
    try:
        return strip()
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise _not_taken_out(format, str(error)) from error


def _not_taken_out(format: str, why: str) -> ItemError:
    return ItemError("encode", one_line(f"the metadata of this {format} cannot be taken out ({why}); convert it first"))


def join(
    parts: list[bytes],
    source: bytes,
    *,
    software: str,
    strip_metadata: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> bytes:
    """Put the frames or pages of a file together again, restored or not.

    Args:
        parts: files of one picture each, as `decoding.decode_frames` made them or as `encode` wrote them.
        source: the file that they come from, whose timing, loops and metadata are taken.
        software, strip_metadata: see `encode`.
        max_pixels: see `codec.decode`.

    Raises ItemError `encode`.
    """
    original = open_header(source, max_pixels=max_pixels)
    try:
        if isinstance(original, TiffImageFile):
            return exif.joined(_in_one_byte_order(parts, software, max_pixels))
        images = [Image.open(io.BytesIO(part), formats=["PNG"]) for part in parts]
        joined = _animation(images, original, source, software, strip_metadata)
        if alphas(ImageSequence.Iterator(open_header(joined, max_pixels=max_pixels))) != alphas(images):
            raise ItemError("encode", "the animation's transparency cannot be written as it was; use --frames first")
        return joined
    except (*BROKEN_FILE, MemoryError) as error:
        raise _not_done("cannot join the frames", error) from error


def _animation(
    images: list[ImageFile.ImageFile], original: ImageFile.ImageFile, source: bytes, software: str, strip: bool
) -> bytes:
    options = animation_options(original)
    block = _exif_block(original, source, orientation_of(original), software, strip)
    match original.format:
        case "GIF":
            frames = [_gif_frame(image) for image in images]
            new = _saved_frames(frames, "GIF", options | _gif_comment(original, strip))
            return gif.with_applications_of(source, new, strip_metadata=strip)
        case "PNG":
            new = _saved_frames(images, "PNG", options | {"compress_level": 1})
            return _png_like(source, list(png.chunks(new)), [], block, strip)
        case "AVIF":
            new = _saved_frames(images, "AVIF", options | _avif_options(images[0], original, block, strip))
            return avif.with_colours_of(source, new)
    return _saved_frames(images, "WEBP", options | _webp_options(original, source, block, strip))


def _exif_block(
    original: ImageFile.ImageFile, source: bytes, orientation: int | None, software: str, strip: bool
) -> bytes:
    if strip:
        return exif.stripped(orientation)
    stored = _png_exif(original, source) if original.format == "PNG" else original.info.get("exif")
    return exif.annotated(exif.bare(stored), software)


def _in_one_byte_order(parts: list[bytes], software: str, max_pixels: int) -> list[bytes]:
    """Pages that were not restored may be big-endian; restored ones never are."""
    if len({part[:2] for part in parts}) == 1:
        return parts
    pictures = [decode(part, max_pixels=max_pixels) if part[:2] == b"MM" else None for part in parts]
    return [
        part if picture is None else encode(picture.pixels, part, picture=picture, software=software)
        for part, picture in zip(parts, pictures, strict=True)
    ]


def _saved_frames(images: Sequence[Image.Image], format: str, options: dict[str, object]) -> bytes:
    return _saved(images[0], format, append_images=images[1:], **options)


def _gif_frame(image: Image.Image) -> Image.Image:
    pixels, alpha, _ = colour.rgb_of(image)
    if alpha is not None:
        alpha = np.where(alpha < 128, 0, 255).astype(np.uint8)
    return _with_gif_palette(pixels, alpha)


def _strip_jpeg(source: bytes, block: bytes) -> bytes:
    """Without what follows the picture, such as others with metadata of their own (MPO)."""
    kept = [source[:2]]
    for at, end in jpeg.segments(source)[0]:
        code, body = source[at + 1], source[at + 4 : end]
        is_text = 0xE0 <= code <= 0xEF or code == 0xFE
        if code == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14:
            kept.append(b"\xff\xe0\0\x10" + body[:12] + b"\0\0")  # without the thumbnail
        elif not is_text or (code in _JPEG_COLOUR and body.startswith(_JPEG_COLOUR[code])):
            kept.append(source[at:end])
    if block:
        kept.insert(1, struct.pack(">BBH", 0xFF, 0xE1, len(block) + 8) + b"Exif\0\0" + block)
    return b"".join([*kept, jpeg.END])


def _strip_webp(source: bytes, block: bytes) -> bytes:
    chunks, at = [], 12
    while at + 8 <= len(source):
        end = at + 8 + (int.from_bytes(source[at + 4 : at + 8], "little") + 1) // 2 * 2
        chunk = bytearray(source[at:end])
        if chunk[:4] == b"VP8X":
            chunk[8] = chunk[8] & ~0x0C | (0x08 if block else 0)  # flags: no XMP, EXIF as it will be
        if bytes(chunk[:4]) in (b"VP8X", b"ICCP", b"ALPH", b"ANIM", *_WEBP_PIXELS):
            chunks.append(bytes(chunk))
        at = end
    if not any(chunk.startswith(_WEBP_PIXELS) for chunk in chunks):
        raise _not_taken_out("WEBP", "no pixels found")
    if block:
        chunks.append(b"EXIF" + struct.pack("<I", len(block)) + block + bytes(len(block) % 2))
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def thumbnail_jpeg(pixels: Pixels, max_side: int) -> bytes:
    """Encode uint8 [H, W, 3] pixels as a JPEG of quality 90; its sides are at most `max_side`."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((max_side, max_side))
    return _saved(image, "JPEG", quality=90)


def _saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# --- Encoding, one function a format ---------------------------------------------------------------------------------


def _encode_jpeg(image: Image.Image, original: JpegImageFile, source: bytes, block: bytes, strip: bool) -> bytes:
    info = original.info
    finest = original.quantization | jpeg.finest_tables(source)
    tables = [finest[layer[3]] for layer in original.layer]  # one for each component
    sampling = get_sampling(original)
    options: dict[str, object] = {"xmp": info.get("xmp"), "extra": _segments(original)}
    if image.mode == "CMYK":  # Pillow writes the inks as they are, not YCCK, and one table for all: the finest
        tables, sampling = [[min(steps) for steps in zip(*tables, strict=True)]], 0
    if len(block) > 65_527:  # it fitted before the note was added; JPEG segments end at 64 KiB
        block = exif.bare(info.get("exif"))
    components = [layer[0] for layer in original.layer]
    marked = info["adobe_transform"] == 0 if "adobe_transform" in info else bytes(components) == b"RGB"
    keep_rgb = len(tables) == 3 and marked and "jfif" not in info  # as libjpeg tells it (jdapimin.c)
    new = _saved_jpeg(
        image,
        qtables=tables[:2] if tables[1:2] == tables[2:3] else tables,
        # kinds that Pillow cannot write, and any of RGB as it is: keep all of the colour
        subsampling=sampling if sampling >= 0 and not keep_rgb else 0,
        keep_rgb=keep_rgb,
        progressive=bool(info.get("progressive")),
        icc_profile=info.get("icc_profile"),
        exif=b"Exif\0\0" + block if block else b"",
        **({} if strip else options),
    )
    return _with_jpeg_density(new, info)


def _saved_jpeg(image: Image.Image, **options: object) -> bytes:
    try:
        return _saved(image, "JPEG", **options)
    except OSError:
        if not options["progressive"]:
            raise
    # Of progressive files libjpeg writes all at once, and Pillow gives it two bytes a pixel: too few for fine grain.
    before = ImageFile.MAXBLOCK  # of this process, in which nobody else writes
    headers = sum(len(value) for value in options.values() if isinstance(value, bytes))
    needed = 2**16 + 2 * headers + 4 * len(image.getbands()) * image.width * image.height
    ImageFile.MAXBLOCK = min(needed, 2**31)  # beyond 2**32 Pillow begins again at 0
    try:
        return _saved(image, "JPEG", **options)
    finally:
        ImageFile.MAXBLOCK = before


def _after_jpeg(source: bytes) -> bytes:
    """What follows the picture, as the film of a motion photo does; its place is told from the file's end."""
    return source[jpeg.segments(source)[1] :]


def _with_jpeg_density(new: bytes, info: dict[str | tuple[int, int], Any]) -> bytes:
    """The source's JFIF density in its own unit, also where that is none and it tells the pixels' aspect ratio."""
    if "jfif_density" not in info:
        return new
    if new[6:11] != b"JFIF\0":  # libjpeg writes none beside inks
        new = new[:2] + struct.pack(">HH5sHBHHBB", 0xFFE0, 16, b"JFIF\0", 0x101, 0, 1, 1, 0, 0) + new[2:]
    return new[:13] + struct.pack(">BHH", info["jfif_unit"], *info["jfif_density"]) + new[18:]


def _segments(original: JpegImageFile) -> bytes:
    """The segments that Pillow does not carry: IPTC captions, the rest of a long XMP, comments, and what programs and
    cameras have added, previews among it; but not those that are written anew or would lead to what is gone."""
    return b"".join(
        struct.pack(">BBH", 0xFF, 0xFE if name == "COM" else 0xE0 + int(name[3:]), len(segment) + 2) + segment
        for name, segment in original.applist
        if not segment.startswith(_JPEG_OWN.get(name, b"\0no such beginning"))
    )


def _encode_webp(
    pixels: Pixels, picture: Picture, original: ImageFile.ImageFile, source: bytes, block: bytes, strip: bool
) -> bytes:
    webp = _saved(_image(pixels, picture), "WEBP", **_webp_options(original, source, block, strip))
    return webp if picture.alpha is None else _with_alpha_marks(webp, picture)


def _with_alpha_marks(webp: bytes, picture: Picture) -> bytes:
    """The marks of an alpha channel, which libwebp leaves out where all is opaque."""
    chunks = webp[12:]
    if not chunks.startswith(b"VP8X"):
        sides = b"".join((side - 1).to_bytes(3, "little") for side in (picture.width, picture.height))
        chunks = b"VP8X" + struct.pack("<II", 10, 0) + sides + chunks
    file = bytearray(b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks)
    file[20] |= 0x10
    if _lossless(file):
        file[_webp_pixels(file) + 12] |= 0x10
    return bytes(file)


def _webp_options(original: ImageFile.ImageFile, source: bytes, block: bytes, strip: bool) -> dict[str, object]:
    quality = {"lossless": True, "quality": 20, "method": 1} if _lossless(source) else {"quality": 95}
    return quality | {
        "exact": True,  # else the colours under transparent pixels are lost
        "alpha_quality": 100,
        "icc_profile": original.info.get("icc_profile"),
        "exif": block,
        "xmp": b"" if strip else original.info.get("xmp", b""),
    }


def _lossless(webp: bytes | bytearray) -> bool:
    at = _webp_pixels(webp)
    return webp[at : at + 4] == b"VP8L"


def _webp_pixels(webp: bytes | bytearray) -> int:
    """Where the chunk of the pixels, or of the first frame's, begins."""
    at = 12
    while at + 8 <= len(webp) and webp[at : at + 4] not in (b"VP8L", b"VP8 "):
        if webp[at : at + 4] == b"ANMF":  # a frame: its chunks follow
            at += 24
            continue
        at += 8 + (int.from_bytes(webp[at + 4 : at + 8], "little") + 1) // 2 * 2
    return at


_PNG_LAYOUT = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"hIST", b"acTL", b"fcTL", b"fdAT", b"eXIf")
_PNG_TRUE = (b"tIME", b"bKGD", b"pCAL", b"sCAL", b"sTER", b"mDCV", b"cLLI")
"""What stays true of restored pixels."""
_PNG_PIXELS = (b"IDAT", b"acTL", b"fcTL", b"fdAT")
_PNG_COLOUR = (b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"sBIT", b"pHYs")


def _png_exif(original: ImageFile.ImageFile, source: bytes) -> bytes:
    for kind, body in png.chunks(source):
        if kind == b"eXIf":
            return body
    return png.exif_text(original.info)


def _encode_png(
    pixels: Pixels, picture: Picture, original: ImageFile.ImageFile, source: bytes, block: bytes, strip: bool
) -> bytes:
    transparency: list[png.Chunk] = []
    depth, _ = png.depth_and_colour(source)
    if picture.mode == "P":
        image, alphas = colour.with_palette(pixels, picture.alpha, 2**depth, as_stored(original))
        palette = image.getpalette() or []
        # Pillow takes fewer bits a pixel where the palette has few colours: the last one again until it does not.
        image.putpalette(palette + palette[-3:] * (_PNG_COLOURS[depth] - len(palette) // 3))
        new = _saved(image, "PNG", compress_level=1, bits=depth, **({"transparency": alphas} if alphas else {}))
    else:
        has_key = picture.alpha is not None and picture.mode not in ("LA", "RGBA")
        key = as_stored(original).info.get("transparency") if has_key else None  # it may follow the pixels
        if picture.alpha is not None and isinstance(key, (int, tuple)):
            values = _keyed(_values(pixels, replace(picture, alpha=None), depth), picture.alpha, key)
            transparency = [chunk for chunk in png.chunks(source) if chunk[0] == b"tRNS"]
            new = _png_of(values, depth)
        elif depth < 8 or _has_deep_colour(picture):
            new = _png_of(_values(pixels, picture, depth), depth)
        else:  # without an array of it in between: such pictures may be large
            new = _saved(_image(pixels, picture), "PNG", compress_level=1)
    return _png_like(source, list(png.chunks(new)), transparency, block, strip)


def _png_of(values: Native, depth: int) -> bytes:
    if depth < 8:
        return _shallow_png(values, depth)
    if values.dtype == np.uint16 and values.ndim == 3:
        return _deep_png(values)
    return _saved(Image.fromarray(values), "PNG", compress_level=1)


def _with_png_exif(chunks: list[png.Chunk], old: list[png.Chunk], block: bytes) -> list[png.Chunk]:
    """Where the old file has its own: not all readers heed what follows the pixels, or what is but a text, and each is
    to show the picture as before."""
    if not block:
        return chunks
    kinds = [kind for kind, _ in old]
    if b"eXIf" in kinds:
        at = 1 if b"IDAT" not in kinds or kinds.index(b"eXIf") < kinds.index(b"IDAT") else len(chunks) - 1
        return [*chunks[:at], (b"eXIf", block), *chunks[at:]]
    if not any(map(png.is_exif_text, old)):
        return [chunks[0], (b"eXIf", block), *chunks[1:]]
    others = [chunk for chunk in chunks[1:] if not png.is_exif_text(chunk)]
    return [chunks[0], png.exif_text_chunk(block), *others]


def _png_like(source: bytes, new: list[png.Chunk], transparency: list[png.Chunk], block: bytes, strip: bool) -> bytes:
    """The new file's pixels among the source's ancillary chunks, byte for byte."""
    has_palette = any(kind == b"PLTE" for kind, _ in new)  # another one, of which a background would name a colour
    old = [
        (kind, b"" if kind in _PNG_PIXELS else body)
        for kind, body in png.chunks(source)
        if not (kind == b"bKGD" and has_palette)
    ]
    first = next((index for index, (kind, _) in enumerate(old) if kind == b"IDAT"), len(old))
    before = [chunk for chunk in old[:first] if _is_kept(chunk[0], strip)]
    following = b"" if strip else png.following(source)
    chunks = [
        new[0],
        *before,
        *(chunk for chunk in new[1:-1] if chunk[0] in (b"PLTE", b"tRNS")),
        *transparency,
        *(chunk for chunk in new[1:-1] if chunk[0] in _PNG_PIXELS),
        *(chunk for chunk in old[first:] if _is_kept(chunk[0], strip)),
        (b"IEND", b""),
    ]
    return png.joined(_with_png_exif(chunks, old, block)) + following


def _is_kept(kind: bytes, strip: bool) -> bool:
    safe = kind[3:4].islower() or kind in _PNG_TRUE  # to copy beside other pixels, as the chunk itself says
    return kind not in _PNG_LAYOUT and (kind in _PNG_COLOUR or (safe and not strip))


def _values(pixels: Pixels, picture: Picture, depth: int) -> Native:
    """As they are written: [H, W] or [H, W, channels] of `depth` bits."""
    if _has_deep_colour(picture):
        return _native(pixels, picture)
    values = np.asarray(_image(pixels, picture))
    return colour.steps_of(values, depth) if depth < 8 else values


def _keyed(values: Native, alpha: Pixels, key: int | tuple[int, ...]) -> Native:
    """The transparent colour where it was before, and a colour beside it where restoration came upon it by chance."""
    last = values.copy()
    channels = last.reshape(*alpha.shape, -1)
    channels[(channels == np.asarray(key)).all(axis=2), -1] ^= 1
    channels[alpha == 0] = np.asarray(key).astype(last.dtype)
    return last


def _deep_png(deep: Native) -> bytes:
    """RGB or RGBA of 16 bits a channel, which Pillow does not write. ISO 15948; every row is filtered with "up"."""
    height, width, channels = deep.shape
    packer, packed = zlib.compressobj(1), []
    above = np.zeros(width * channels * 2, np.uint8)
    for row in deep:
        values = np.frombuffer(row.astype(">u2").tobytes(), np.uint8)
        packed.append(packer.compress(b"\2" + (values - above).tobytes()))
        above = values
    packed.append(packer.flush())
    header = struct.pack(">IIBBBBB", width, height, 16, 6 if channels == 4 else 2, 0, 0, 0)
    return png.joined([(b"IHDR", header), (b"IDAT", b"".join(packed)), (b"IEND", b"")])


def _shallow_png(values: Pixels, bits: int) -> bytes:
    """Grey of 2 or 4 bits, which Pillow does not write: as a picture with a palette, without the palette."""
    steps = Image.fromarray(values)
    steps.putpalette(bytes(3 * 2**bits))
    (_, header), *others = png.chunks(_saved(steps, "PNG", compress_level=1, bits=bits))
    gray = (b"IHDR", header[:9] + b"\0" + header[10:])
    return png.joined([gray, *(chunk for chunk in others if chunk[0] != b"PLTE")])


def _strip_png(source: bytes, block: bytes) -> bytes:
    old = list(png.chunks(source))
    chunks = [chunk for chunk in old if chunk[0] != b"eXIf" and (chunk[0] in _PNG_LAYOUT + _PNG_COLOUR)]
    return png.joined(_with_png_exif(chunks, old, block))


_PNG_COLOURS = {2: 3, 4: 5, 8: 17}
"""By bits a pixel: fewer fit into less."""
_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"ANMF")
_JPEG_COLOUR = {0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}
"""Segments that say what the numbers mean."""
_JPEG_OWN: dict[str, bytes | tuple[bytes, ...]] = {
    "APP0": b"",
    "APP1": (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"),
    "APP2": (b"ICC_PROFILE\0", b"MPF\0"),
    "APP11": b"",
    "APP14": b"",
}
"""By their beginnings: JFIF, EXIF, XMP, the profile, where other pictures are, content credentials, Adobe's."""
_TIFF_LOSSLESS = ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "lzma", "zstd")
# Tags that describe how pixels are laid out in the file: Pillow's, not the source's, are true after encoding.
_TIFF_LAYOUT = {
    *range(254, 267), 273, *range(277, 282), 284, *range(288, 294), 317, 320, *range(322, 326), 330,
    *range(338, 348), *range(512, 522), *range(529, 533), 34675,
}  # fmt: skip
_TIFF_SHOWN = (282, 283, 296, 301, 318, 319, exif.ORIENTATION)
"""Resolution, what the numbers mean (transfer function, white point, primaries), and the way up."""
_TIFF_IMAGE = _TIFF_LAYOUT - {330} | {*_TIFF_SHOWN}
"""What a page needs to be read; 330 are other pictures."""


def _encode_tiff(
    pixels: Pixels, picture: Picture, original: TiffImageFile, source: bytes, software: str, strip: bool
) -> bytes:
    """Write the pixels, then append a directory that also holds the source's tags (Pillow loses some)."""
    if _has_deep_colour(picture):
        compression = None if original.info.get("compression") == "raw" else "zlib"
        tiff = bytearray(_deep_tiff(_native(pixels, picture), compression, original.info.get("icc_profile")))
    else:
        tiff = bytearray(_plain_tiff(pixels, picture, original))
    layout, _ = exif.read_ifd(tiff, exif.first_ifd(tiff))
    entries = {entry.tag: entry for entry in layout}
    tags = [
        entry
        for entry in exif.read_ifd(source, exif.first_ifd(source), skip_damaged=True)[0]
        if entry.tag not in _TIFF_LAYOUT and (not strip or entry.tag in _TIFF_SHOWN)
    ]
    entries |= {entry.tag: entry for entry in exif.all_moved(tags, source, tiff)}
    if not strip:
        entries[exif.SOFTWARE] = exif.text_entry(exif.SOFTWARE, software)
    exif.write_first_ifd(tiff, entries.values(), 0)
    return bytes(tiff)


def _plain_tiff(pixels: Pixels, picture: Picture, original: TiffImageFile) -> bytes:
    """The pixels alone, as Pillow writes them."""
    if picture.mode == "P":
        image, _ = colour.with_palette(pixels, None, 256, as_stored(original))
    else:
        image = _image(pixels, picture)
    compression = original.info.get("compression")
    return _saved(
        image,
        "TIFF",
        compression=compression if compression in _TIFF_LOSSLESS else "tiff_adobe_deflate",
        icc_profile=original.info.get("icc_profile"),
        tiffinfo={317: 2} if original.tag_v2.get(317) == 2 else {},
    )


def _deep_tiff(deep: Native, compression: str | None, icc_profile: bytes | None) -> bytes:
    """RGB or RGBA of 16 bits a channel, which Pillow does not write."""
    import tifffile

    file = io.BytesIO()
    tifffile.imwrite(
        file,
        deep,
        photometric="rgb",
        compression=compression,
        iccprofile=icc_profile,
        extrasamples=["unassalpha"] if deep.shape[2] == 4 else None,
        metadata=None,
        software=False,
    )
    return file.getvalue()


def _avif_options(image: Image.Image, original: ImageFile.ImageFile, block: bytes, strip: bool) -> dict[str, object]:
    return {
        "quality": 100 if "A" in image.mode else 95,  # which is also the alpha's: 100 keeps it as it is
        "subsampling": "4:0:0" if image.mode == "L" else "4:4:4",
        "speed": 9,  # 8 times faster than Pillow's 6, for 8 % more bytes
        "max_threads": 1,  # with more the bytes differ, and other files have the other cores
        "icc_profile": original.info.get("icc_profile"),
        "exif": block,
        "xmp": b"" if strip else original.info.get("xmp", b""),
    }


def _encode_gif(pixels: Pixels, picture: Picture, original: ImageFile.ImageFile, strip: bool) -> bytes:
    options = {"interlace": bool(original.info.get("interlace")), "optimize": False, **_gif_comment(original, strip)}
    if picture.left_out == 0:
        options |= {name: original.info[name] for name in ("duration", "loop") if name in original.info}
    if picture.mode == "P":
        return _saved(_with_gif_palette(pixels, picture.alpha, as_stored(original)), "GIF", **options)
    image = _image(pixels, replace(picture, alpha=None))
    if picture.alpha is not None:
        options["transparency"] = key = original.info["transparency"]
        image = Image.fromarray(_keyed(np.asarray(image), picture.alpha, key))
    return _saved(image, "GIF", **options)


def _with_gif_palette(pixels: Pixels, alpha: Pixels | None, own: Image.Image | None = None) -> Image.Image:
    """An index that is transparent, if any is, also where no pixel has it."""
    unused = alpha is not None and alpha.all()
    image, alphas = colour.with_palette(pixels, alpha, 255 if unused else 256, own)
    if unused and 0 not in alphas:
        image.putpalette([*(image.getpalette() or []), 0, 0, 0])
    if alpha is not None:
        image.info["transparency"] = (alphas + b"\0").index(0)
    return image


def _gif_comment(original: ImageFile.ImageFile, strip: bool) -> dict[str, object]:
    return {"comment": original.info["comment"]} if not strip and "comment" in original.info else {}


_TILE, _TILE_BITS = 8192, 2**32
"""Of JPEG 2000: Pillow writes no tile of so many bits."""


def _encode_jpeg2000(image: Image.Image, source: bytes, strip: bool) -> bytes:
    """Lossless where the source may have been, or has alpha, which stays as it is; else nothing is cut off, since what
    is cut off for a mean error over all of the picture may all be in the few letters of an empty page."""
    reversible = jpeg2000.is_reversible(source) or "A" in image.mode
    bits = 8 * len(image.getbands()) * image.width * image.height
    new = _saved(
        image,
        "JPEG2000",
        no_jp2=True,
        irreversible=not reversible,
        mct=int(image.mode.startswith("RGB")),
        tile_size=(_TILE, _TILE) if bits >= _TILE_BITS else None,
    )
    return jpeg2000.with_codestream(source, new, strip_metadata=strip)

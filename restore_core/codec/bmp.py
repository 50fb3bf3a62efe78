"""BMP files: Pillow reads more kinds than it writes, so new pixels are put behind the old file's header."""

import struct

import numpy as np
import numpy.typing as npt
from PIL import Image

from restore_core.codec.colour import Pixels, steps_of

_OLD_HEADER = 12
"""Bytes of the header of OS/2, which holds only sizes."""
_BITFIELDS = 3
_FIVE_BITS = (0x7C00, 0x3E0, 0x1F)
_EIGHT_BITS = (0xFF0000, 0xFF00, 0xFF)
_ALPHA = 0xFF000000


def depth(data: bytes) -> int:
    """Bits a pixel."""
    return int.from_bytes(data[24:26] if _header_size(data) == _OLD_HEADER else data[28:30], "little")


def has_alpha(data: bytes) -> bool:
    """Whether some of a pixel's bits are said to be its alpha."""
    masked = int.from_bytes(data[30:34], "little") == _BITFIELDS and _header_size(data) >= 56
    return masked and any(data[66:70])


def encoded(image: Image.Image, source: bytes) -> bytes:
    """A picture of mode L, P, RGB or RGBA as an uncompressed file of the source's kind, of as many bits a pixel."""
    size, bits = _header_size(source), depth(source)
    header = bytearray(source[14 : 14 + size])
    colours = b"" if bits > 8 else _colours(image, 2**bits)
    pixels = _packed_colour(image, source) if bits > 8 else _packed(image, bits)
    rows = b"".join(row.tobytes().ljust((row.nbytes + 3) // 4 * 4, b"\0") for row in pixels[::-1])  # bottom up
    if size == _OLD_HEADER:
        table = b"".join(colours[at : at + 3] for at in range(0, len(colours), 4))
    else:
        has_masks = int.from_bytes(header[16:20], "little") == _BITFIELDS
        table = source[54:66] if has_masks and size == 40 else colours
        struct.pack_into("<i", header, 8, image.height)
        struct.pack_into("<II", header, 16, _BITFIELDS if has_masks else 0, len(rows))
        struct.pack_into("<II", header, 32, len(colours) // 4, 0)
    start = 14 + size + len(table)
    profile = _profile(source)
    if profile:
        struct.pack_into("<I", header, 112, start + len(rows) - 14)
    length = start + len(rows) + len(profile)
    return b"".join([struct.pack("<2sIII", b"BM", length, 0, start), header, table, rows, profile])


def _header_size(data: bytes) -> int:
    return int.from_bytes(data[14:18], "little")


def _masks(data: bytes) -> list[int]:
    """Which bits of a pixel hold red, green, blue and alpha."""
    size, compression = _header_size(data), int.from_bytes(data[30:34], "little")
    if size != _OLD_HEADER and compression == _BITFIELDS:
        masks = [*struct.unpack_from("<4I", data, 54)]
        if size < 56:
            masks[3] = 0
        return masks if any(masks) else [*_EIGHT_BITS, _ALPHA]
    return [*(_FIVE_BITS if depth(data) == 16 else _EIGHT_BITS), 0]


def _colours(image: Image.Image, count: int) -> bytes:
    """Blue, green, red, 0 of each of `count` colours."""
    if image.mode == "P":
        palette = np.array(image.getpalette(), np.uint8).reshape(-1, 3)[:count]
        palette = np.concatenate([palette, palette[-1:].repeat(count - len(palette), 0)])
    else:
        palette = np.linspace(0, 255, count).astype(np.uint8)[:, np.newaxis].repeat(3, 1)
    return np.concatenate([palette[:, ::-1], np.zeros((count, 1), np.uint8)], 1).tobytes()


def _packed(image: Image.Image, bits: int) -> Pixels:
    index = np.asarray(image)
    if bits == 8:
        return index
    places = np.unpackbits(index[:, :, np.newaxis], axis=2)[:, :, 8 - bits :]
    return np.packbits(places.reshape(len(index), -1), axis=1)


def _packed_colour(image: Image.Image, source: bytes) -> Pixels:
    bits, masks = depth(source), _masks(source)
    pixels = _unused_bits(source, image.height, image.width) & ~np.uint32(masks[0] | masks[1] | masks[2] | masks[3])
    for channel, mask in zip(image.split(), masks, strict=False):
        if mask:
            steps = steps_of(np.asarray(channel), mask.bit_count()).astype(np.uint32)
            pixels |= steps << ((mask & -mask).bit_length() - 1)
    return pixels.view(np.uint8).reshape(*pixels.shape, 4)[:, :, : bits // 8]


def _unused_bits(source: bytes, height: int, width: int) -> npt.NDArray[np.uint32]:
    """The pixels as they are in the file, for what no mask names: some programs take the fourth byte for alpha."""
    bytes_each = depth(source) // 8
    if bytes_each == 3 or _header_size(source) == _OLD_HEADER:
        return np.zeros((height, width), np.uint32)
    stride = (width * bytes_each + 3) // 4 * 4
    at = struct.unpack_from("<I", source, 10)[0] or 14 + _header_size(source)
    rows = np.frombuffer(source[at : at + height * stride].ljust(height * stride, b"\0"), np.uint8)
    pixels = np.ascontiguousarray(rows.reshape(height, stride)[:, : width * bytes_each]).view(f"<u{bytes_each}")
    top_down = struct.unpack_from("<i", source, 22)[0] < 0
    return (pixels if top_down else pixels[::-1]).astype(np.uint32)


def _profile(data: bytes) -> bytes:
    """The ICC profile that a header of version 5 points to."""
    if _header_size(data) < 124 or data[70:74] != b"DEBM":
        return b""
    at, size = struct.unpack_from("<II", data, 126)
    return data[14 + at : 14 + at + size]

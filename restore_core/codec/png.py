"""PNG files (ISO 15948) as chunks."""

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Chunk = tuple[bytes, bytes]
"""Type and body."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""By colour type."""
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Of Adam7: the first pixel's column and row, and how far the next ones are to the right and below."""
_EXIF_TEXT = b"Raw profile type exif"
MOST_TEXT = 2**26
"""Bytes that a compressed text or profile may unfold to."""
_PIECE = 2**20


def chunks(png: bytes) -> Iterator[Chunk]:
    """Up to the one that ends the picture, whatever follows that."""
    at, kind = len(SIGNATURE), b""
    while at + 12 <= len(png) and kind != b"IEND":
        size = int.from_bytes(png[at : at + 4], "big")
        kind = png[at + 4 : at + 8]
        yield kind, png[at + 8 : at + 8 + size]
        at += size + 12


def following(png: bytes) -> bytes:
    """What follows the end of the picture."""
    found = list(chunks(png))
    end = len(SIGNATURE) + sum(12 + len(body) for _, body in found)
    return png[end:] if found[-1][0] == b"IEND" else b""


def exif_text(info: Mapping[Any, Any]) -> bytes:
    """The EXIF block where older ImageMagick put it, from Pillow's info of a picture; b"" where there is none."""
    text = info.get(_EXIF_TEXT.decode())
    return _from_hex(text) if isinstance(text, str) else b""


def is_exif_text(chunk: Chunk) -> bool:
    """Whether it is such a text, and no damaged one."""
    kind, body = chunk
    if kind not in (b"tEXt", b"zTXt") or not body.startswith(_EXIF_TEXT + b"\0"):
        return False
    text = body[len(_EXIF_TEXT) + 1 :]
    try:
        text = zlib.decompressobj().decompress(text[1:], MOST_TEXT) if kind == b"zTXt" else text
    except zlib.error:
        return False
    return bool(_from_hex(text.decode("latin-1")))


def _from_hex(text: str) -> bytes:
    try:
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:  # damaged
        return b""


def exif_text_chunk(block: bytes) -> Chunk:
    """The other way."""
    full = b"Exif\0\0" + block
    lines = "\n".join(full.hex()[at : at + 72] for at in range(0, 2 * len(full), 72))
    return b"zTXt", _EXIF_TEXT + b"\0\0" + zlib.compress(f"\nexif\n{len(full):8}\n{lines}\n".encode())


def joined(chunks: Iterable[Chunk]) -> bytes:
    pieces = [SIGNATURE]
    for kind, body in chunks:  # bodies are not copied but once: of large pictures they are what memory goes to
        pieces += [struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))]
    return b"".join(pieces)


def depth_and_colour(png: bytes) -> tuple[int, int]:
    """Bits a channel and colour type."""
    header = _header(png)
    return header[8], header[9]


def is_interlaced(png: bytes) -> bool:
    return bool(_header(png)[12])


def has_all_rows(png: bytes) -> bool:
    """Whether the compressed pixels are as many as the header says. Pillow takes those that are not there for zeros,
    where the compressed data ends as it should."""
    header = _header(png)
    width, height = struct.unpack_from(">II", header)
    bits = header[8] * _CHANNELS.get(header[9], 1)
    passes = _PASSES if header[12] else ((0, 0, 1, 1),)
    sizes = [
        (-(-(width - left) // across), -(-(height - top) // down))
        for left, top, across, down in passes
        if left < width and top < height
    ]
    needed = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes)
    unpacker, rest = zlib.decompressobj(), b""
    try:
        for part in (part for kind, body in chunks(png) if kind == b"IDAT" for part in _pieces(body)):
            rest = part
            while rest and needed > 0 and not unpacker.eof:
                needed -= len(unpacker.decompress(rest, _PIECE))
                rest = unpacker.unconsumed_tail
        while needed > 0 and not unpacker.eof and (more := unpacker.decompress(b"", _PIECE)):
            needed -= len(more)
    except zlib.error:  # which Pillow, who read it, did not mind
        return True
    return bool(needed <= 0)


def _pieces(body: bytes) -> Iterator[bytes]:
    """Since what is not consumed is copied each time."""
    return (body[at : at + _PIECE] for at in range(0, len(body), _PIECE))


def _header(png: bytes) -> bytes:
    """The one that counts to Pillow: the last one before the pixels."""
    header = bytes(13)
    for kind, body in chunks(png):
        if kind == b"IHDR":
            header = body.ljust(13, b"\0")
        if kind == b"IDAT":
            break
    return header

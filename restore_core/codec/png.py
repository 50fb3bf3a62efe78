"""PNG files (ISO 15948) as chunks."""

import struct
import zlib
from collections.abc import Iterable, Iterator

Chunk = tuple[bytes, bytes]
"""Type and body."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"


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


def joined(chunks: Iterable[Chunk]) -> bytes:
    return SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def depth_and_colour(png: bytes) -> tuple[int, int]:
    """Bits a channel and colour type, of the header that counts to Pillow: the last one before the pixels."""
    header = bytes(13)
    for kind, body in chunks(png):
        if kind == b"IHDR":
            header = body.ljust(13, b"\0")
        if kind == b"IDAT":
            break
    return header[8], header[9]

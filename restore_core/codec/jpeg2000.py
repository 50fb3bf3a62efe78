"""JPEG 2000 files (ISO 15444-1): what Pillow does not say of them, and new pixels in the boxes of the old file."""

import struct
from collections.abc import Iterator

_HEADER, _COLOUR, _PALETTE, _CHANNELS, _CODESTREAM = b"jp2h", b"colr", b"pclr", b"cdef", b"jp2c"
_NEEDED = (b"jP  ", b"ftyp", b"rreq", _HEADER, _CODESTREAM)
_COMMENT, _TILE, _END = b"\xff\x64", b"\xff\x90", b"\xff\xd9"
_SRGB, _GRAY = 16, 17
_ALPHAS = 1, 0xFFFF
"""Kinds of a last channel: transparency, or not told."""
_WHOLE = 0, 0xFFFF
"""What a channel is told to belong to, if that is no single colour."""


def unsupported(data: bytes) -> str | None:
    """Return why the file could not be written back whole, and what to do; None if it can."""
    advice = "convert it to PNG or TIFF first"
    stream = codestream(data)
    components = int.from_bytes(stream[40:42], "big")
    if len(stream) < 42 + 3 * components:
        return f"JPEG 2000 with a damaged header; {advice}"
    if any(stream[43 + 3 * index : 45 + 3 * index] != b"\1\1" for index in range(components)):  # Pillow shears them
        return f"JPEG 2000 whose channels are not all of the picture's size; {advice}"
    if {stream[42 + 3 * index] for index in range(components)} != {7}:  # bits - 1; the top bit means signed
        return f"JPEG 2000 that is not of 8-bit unsigned numbers; {advice}"
    if sum(kind == _CODESTREAM for kind, _ in _boxes(data)) > 1:
        return f"JPEG 2000 of several pictures; {advice}"
    for kind, body in _boxes(_header(data)):
        if kind == _CHANNELS and not _in_order(body, components):
            return f"JPEG 2000 with its channels in another order, or premultiplied alpha; {advice}"
        if kind == _PALETTE:
            return f"JPEG 2000 with a palette; {advice}"
        if kind == _COLOUR and body[:1] == b"\1" and int.from_bytes(body[3:7], "big") not in (_SRGB, _GRAY):
            return f"JPEG 2000 that is neither grey nor RGB; {advice}"
    return None


def _in_order(channels: bytes, components: int) -> bool:
    """Whether they are the colours, and then alpha if there is one (box cdef, I.5.3.6), as Pillow takes them to be."""
    count = min(int.from_bytes(channels[:2], "big"), (len(channels) - 2) // 6)
    for index in range(count):
        channel, kind, belongs = struct.unpack_from(">3H", channels, 2 + 6 * index)
        is_alpha = kind in _ALPHAS and channel == components - 1 and components in (2, 4)
        if not is_alpha and (kind != 0 or belongs not in (channel + 1, *_WHOLE)):
            return False
    return True


def is_whole(data: bytes) -> bool:
    """Whether its end is there."""
    return codestream(data).rstrip(b"\0").endswith(_END)


def codestream(data: bytes) -> bytes:
    """The compressed picture without the boxes around it."""
    if data.startswith(b"\xff\x4f"):
        return data
    return next((body for kind, body in _boxes(data) if kind == _CODESTREAM), b"")


def is_reversible(data: bytes) -> bool:
    """Whether it uses the wavelet that can be lossless (COD segment, A.6.1)."""
    stream, at = codestream(data), 2
    while stream[at : at + 2] not in (b"\xff\x52", b"\xff\x90", b""):
        at += 2 + max(2, int.from_bytes(stream[at + 2 : at + 4], "big"))
    return stream[at + 13 : at + 14] == b"\1"


def with_codestream(data: bytes, new: bytes, *, strip_metadata: bool) -> bytes:
    """The old file's boxes around another codestream of the same size and components."""
    if strip_metadata:
        new = _without_comments(new)
    if data.startswith(b"\xff\x4f"):
        return new
    kept = [
        (kind, new if kind == _CODESTREAM else body)
        for kind, body in _boxes(data)
        if not strip_metadata or kind in _NEEDED
    ]
    return b"".join(struct.pack(">I4s", len(body) + 8, kind) + body for kind, body in kept)


def _without_comments(stream: bytes) -> bytes:
    """Of those in the main header (A.9.2)."""
    kept, at = [stream[:2]], 2
    while stream[at : at + 2] not in (_TILE, b"") and at + 4 <= len(stream):
        end = at + 2 + max(2, int.from_bytes(stream[at + 2 : at + 4], "big"))
        if stream[at : at + 2] != _COMMENT:
            kept.append(stream[at:end])
        at = end
    return b"".join([*kept, stream[at:]])


def _header(data: bytes) -> bytes:
    return b"" if data.startswith(b"\xff\x4f") else next((body for kind, body in _boxes(data) if kind == _HEADER), b"")


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1 and at + 16 <= len(data):
            (size,), head = struct.unpack_from(">Q", data, at + 8), 16
        if size == 0:  # to the end
            size = len(data) - at
        if size < head:
            return
        yield kind, data[at + head : at + size]
        at += size

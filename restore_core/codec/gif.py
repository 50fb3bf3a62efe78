"""GIF files (GIF89a) as blocks: what Pillow does not carry over, and what has to go with the metadata."""

from collections.abc import Iterator

_EXTENSION, _IMAGE, _END = 0x21, 0x2C, 0x3B
_APPLICATION, _CONTROL = 0xFF, 0xF9
_PROFILE = b"ICCRGBG1012"
_XMP = b"XMP DataXMP"
_LOOPS = (b"NETSCAPE2.0", b"ANIMEXTS1.0")


def without_metadata(gif: bytes) -> bytes:
    """Without comments, texts and what applications wrote, such as XMP; loops and the ICC profile stay."""
    kept = [block for kind, name, block in _blocks(gif) if kind in (_IMAGE, _CONTROL) or name in (_PROFILE, *_LOOPS)]
    return b"".join([gif[: _start(gif)], *kept, b";"])


def with_applications_of(source: bytes, new: bytes, *, strip_metadata: bool) -> bytes:
    """The new file with the source's ICC profile, and with its XMP unless that is stripped."""
    names = (_PROFILE,) if strip_metadata else (_PROFILE, _XMP)
    blocks = [block for _, name, block in _blocks(source) if name in names]
    if not blocks:
        return new
    at = _start(new)
    return b"".join([b"GIF89a", new[6:at], *blocks, new[at:]])


def has_picture(gif: bytes) -> bool:
    """Whether one begins before the file ends."""
    return len(gif) > 13 and any(kind == _IMAGE for kind, _, _ in _blocks(gif))


def _start(gif: bytes) -> int:
    """Where the blocks begin, after the header (18) and the colours that all pictures share (19)."""
    return 13 + (3 * 2 ** ((gif[10] & 7) + 1) if gif[10] & 0x80 else 0)


def _blocks(gif: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Kind of each block (20 to 26: an image, or the label of an extension), its application's name, and all of it."""
    at = _start(gif)
    while at + 1 < len(gif) and gif[at] != _END:
        if gif[at] not in (_EXTENSION, _IMAGE):  # decoders pass over it
            at += 1
            continue
        start, kind, name = at, gif[at], b""
        if kind == _IMAGE:  # its descriptor, colours and first code size; the coded pixels follow in pieces
            at += 10
            at += (3 * 2 ** ((gif[at - 1] & 7) + 1) if at <= len(gif) and gif[at - 1] & 0x80 else 0) + 1
        else:
            kind = gif[at + 1]
            at += 2
            if kind == _APPLICATION:
                name = gif[at + 1 : at + 12]
        while at < len(gif) and gif[at]:
            at += gif[at] + 1
        at += 1
        yield kind, name, gif[start:at]

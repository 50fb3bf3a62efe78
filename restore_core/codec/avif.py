"""AVIF files as boxes: metadata taken out in place, since encoding anew would change the pixels.

The structure is that of ISO/IEC 14496-12 (boxes) and 23008-12 (items, sections 8.11.3 and 8.11.6 of the former).
"""

import re
import struct
from collections.abc import Iterator

_CONTAINERS = (b"moov", b"trak", b"udta")
_METADATA = (b"Exif", b"mime")
_NCLX = re.compile(rb"colrnclx(.{4})", re.DOTALL)
_HEAD_BYTES = 2**16
"""Within which a file describes its pictures."""
_IGNORED = b"skip"
"""An item type that no reader knows, and therefore passes over."""


def without_metadata(source: bytes, exif: bytes) -> bytes:
    """The file with EXIF and XMP overwritten by zeros, of the same length; all else, pixels included, stays.

    Args:
        exif: the TIFF block to put in the place of EXIF, b"" for none.

    Raises ValueError, struct.error where the structure is another than the format's, or EXIF has no place in it.
    """
    file, written = bytearray(source), False
    for start, end in _metas(source, 0, len(source)):
        boxes = {kind: (inner, inner_end) for kind, inner, inner_end in _boxes(source, start + 4, end)}
        if b"iinf" not in boxes or b"iloc" not in boxes:
            continue
        places = _places(source, *boxes[b"iloc"], boxes.get(b"idat", (0, 0))[0])
        for item, at in _items(source, *boxes[b"iinf"]):
            kind = source[at : at + 4]
            if kind not in _METADATA:
                continue
            total = sum(length for _, length in places[item])
            block = bytes(4) + exif if kind == b"Exif" and exif else b""
            if not block or len(block) > total:
                file[at : at + 4] = _IGNORED
                block = b""
            written |= bool(block)
            content = block.ljust(total, b"\0")
            for place, length in places[item]:
                if place + length > len(file):
                    raise ValueError("an item lies outside of the file")
                file[place : place + length], content = content[:length], content[length:]
    if exif and not (written or b"irot" in source or b"imir" in source):  # which turn it without EXIF
        raise ValueError("there is no place for its orientation")
    return bytes(file)


def is_whole(source: bytes) -> bool:
    """Whether no box reaches beyond the file's end, and there are pixels."""
    try:
        return b"mdat" in {kind for kind, _, _ in _boxes(source, 0, len(source))}
    except ValueError:
        return False


def longest_side(source: bytes) -> int:
    """Of all that it describes (boxes ispe), pixels; 0 where it says nothing."""
    found = re.finditer(rb"ispe\0\0\0\0(.{8})", source[:_HEAD_BYTES], re.DOTALL)
    return max((max(struct.unpack(">II", match[1])) for match in found), default=0)


def unsupported(source: bytes) -> str | None:
    """Return what the file says of its picture that Pillow does not carry over, and what to do; None if nothing."""
    advice = "convert it to PNG first"
    try:
        metas = list(_metas(source, 0, len(source)))
    except (ValueError, struct.error):
        return None
    for start, end in metas:
        properties = source[start:end]
        if b"clap" in properties:
            return f"AVIF with a crop that viewers apply; {advice}"
        if (at := properties.find(b"pasp")) >= 0 and properties[at + 4 : at + 8] != properties[at + 8 : at + 12]:
            return f"AVIF with pixels that are not square; {advice}"
        if b"tmap" in properties:
            return f"AVIF with an HDR gain map; {advice}"
    return None


def with_colours_of(source: bytes, new: bytes) -> bytes:
    """The new file with the source's colour primaries and transfer function (nclx, ISO/IEC 23091-2), which Pillow sets
    to those of sRGB whatever the numbers mean."""
    found = _NCLX.search(source)
    if found is None:
        return new
    file = bytearray(new)
    for match in _NCLX.finditer(new, 0, new.find(b"mdat")):
        file[match.start(1) : match.end(1)] = found[1]
    return bytes(file)


def _boxes(source: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind of each box, and where its content begins and ends."""
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", source, at)
        head = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", source, at + 8)
            head = 16
        elif size == 0:
            size = end - at
        if size < head or at + size > end:
            raise ValueError("a box is larger than what it lies in")
        yield kind, at + head, at + size
        at += size


def _metas(source: bytes, at: int, end: int) -> Iterator[tuple[int, int]]:
    """The boxes of metadata, of the file and of its tracks."""
    for kind, start, stop in _boxes(source, at, end):
        if kind == b"meta":
            yield start, stop
        elif kind in _CONTAINERS:
            yield from _metas(source, start, stop)


def _items(source: bytes, at: int, end: int) -> Iterator[tuple[int, int]]:
    """Number of each item, and where its type stands."""
    head = 6 if source[at] == 0 else 8
    for kind, start, _ in _boxes(source, at + head, end):
        version = source[start]
        if kind == b"infe" and version >= 2:
            wide = version > 2
            (item,) = struct.unpack_from(">I" if wide else ">H", source, start + 4)
            yield item, start + (10 if wide else 8)


def _places(source: bytes, at: int, end: int, idat: int) -> dict[int, list[tuple[int, int]]]:
    """Where the content of each item lies in the file: places and lengths."""
    version, sizes = source[at], struct.unpack_from(">H", source, at + 4)[0]
    offset_size, length_size, base_size, index_size = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15, sizes & 15
    at += 6

    def number(size: int) -> int:
        nonlocal at
        if at + size > end:
            raise ValueError("the places of its items are cut off")
        at += size
        return int.from_bytes(source[at - size : at], "big")

    places = {}
    for _ in range(number(4 if version == 2 else 2)):
        item = number(4 if version == 2 else 2)
        method = number(2) & 15 if version else 0
        number(2)  # the file that it is in: this one
        base = number(base_size)
        extents = []
        for _ in range(number(2)):
            if version and index_size:
                number(index_size)
            place = number(offset_size)
            extents.append((base + place + (idat if method == 1 else 0), number(length_size)))
        places[item] = extents
    return places

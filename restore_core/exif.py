"""Blocks in the structure of TIFF, of which EXIF is one: read, and appended to so that all offsets stay true."""

import contextlib
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np

ORIENTATION, SOFTWARE = 274, 305
_SUB_IFDS = (34665, 34853, 40965)  # Exif, GPS, Interoperability
_IPTC = 33723
"""Bytes in an order of their own, which many programs call words."""
_ITEM_SIZE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_WORD_SIZE = _ITEM_SIZE | {5: 4, 10: 4}  # rationals are pairs of 32-bit numbers
_NO_EXIF = b"II*\0\x08\0\0\0" + bytes(6)


@dataclass(frozen=True)
class Entry:
    """One directory entry; `value` holds its bytes in the file's byte order."""

    tag: int
    type: int
    count: int
    value: bytes

    def integers(self, tiff: bytes | bytearray) -> list[int]:
        size, order = _WORD_SIZE.get(self.type, 1), "<" if tiff[:2] == b"II" else ">"
        return [int(value) for value in np.frombuffer(self.value, f"{order}u{size}")]


def annotated(exif: bytes, software: str) -> bytes:
    """Return the EXIF block (b"" for none) with its Software set.

    The block is appended to, not rewritten, so that offsets inside maker notes and the thumbnail stay true. A damaged
    block is returned as it was.
    """
    tiff = bytearray(exif or _NO_EXIF)
    try:
        entries, following = read_ifd(tiff, first_ifd(tiff))
    except (struct.error, ValueError):
        return exif
    kept = [entry for entry in entries if entry.tag != SOFTWARE]
    write_first_ifd(tiff, [*kept, text_entry(SOFTWARE, software)], following)
    return bytes(tiff)


def stripped(orientation: int | None) -> bytes:
    """Return an EXIF block of nothing but the orientation; b"" where it says nothing."""
    if orientation in (None, 1):
        return b""
    tiff = bytearray(_NO_EXIF)
    write_first_ifd(tiff, [Entry(ORIENTATION, 3, 1, struct.pack("<H", orientation))], 0)
    return bytes(tiff)


def bare(exif: object) -> bytes:
    return exif.removeprefix(b"Exif\0\0") if isinstance(exif, bytes) else b""


def text_entry(tag: int, text: str) -> Entry:
    value = text.encode("ascii", "replace") + b"\0"
    return Entry(tag, 2, len(value), value)


def _order(tiff: bytes | bytearray) -> str:
    if tiff[:2] not in (b"II", b"MM"):
        raise ValueError("no TIFF structure")
    return "<" if tiff[:2] == b"II" else ">"


def first_ifd(tiff: bytes | bytearray) -> int:
    return int(struct.unpack_from(_order(tiff) + "I", tiff, 4)[0])


def read_ifd(tiff: bytes | bytearray, at: int, *, skip_damaged: bool = False) -> tuple[list[Entry], int]:
    """Return the entries of the directory at an offset, and the next one's offset. Raises ValueError, struct.error.

    Args:
        skip_damaged: leave out entries whose value is not in the file.
    """
    order = _order(tiff)
    (count,) = struct.unpack_from(order + "H", tiff, at)
    if skip_damaged and at + 2 + 12 * count + 4 > len(tiff):
        count = (len(tiff) - at - 6) // 12
    entries = []
    for index in range(count):
        place = at + 2 + 12 * index
        tag, kind, items = struct.unpack_from(order + "HHI", tiff, place)
        size = _ITEM_SIZE[kind] * items if kind in _ITEM_SIZE else 4  # of unknown types only the place is known
        start = place + 8 if size <= 4 else struct.unpack_from(order + "I", tiff, place + 8)[0]
        if start + size > len(tiff):
            if skip_damaged:
                continue
            raise ValueError(f"tag {tag} lies outside of the file")
        entries.append(Entry(tag, kind, items, bytes(tiff[start : start + size])))
    return entries, int(struct.unpack_from(order + "I", tiff, at + 2 + 12 * count)[0])


def moved(entry: Entry, source: bytes, tiff: bytearray, depth: int = 2) -> Entry:
    """Return a source's entry for use in `tiff`: in its byte order, sub-directories appended to it."""
    if entry.tag in _SUB_IFDS and depth:
        entries, _ = read_ifd(source, entry.integers(source)[0], skip_damaged=True)
        at = _append_ifd(tiff, all_moved(entries, source, tiff, depth - 1), 0)
        return replace(entry, type=4, count=1, value=struct.pack(_order(tiff) + "I", at))
    if _order(source) == _order(tiff) or _WORD_SIZE.get(entry.type, 1) == 1 or entry.tag == _IPTC:
        return entry
    return replace(entry, value=np.frombuffer(entry.value, f"u{_WORD_SIZE[entry.type]}").byteswap().tobytes())


def all_moved(entries: Iterable[Entry], source: bytes, tiff: bytearray, depth: int = 2) -> list[Entry]:
    """`moved` of those entries that do not point to damaged directories."""
    kept = []
    for entry in entries:
        with contextlib.suppress(ValueError, IndexError, struct.error):
            kept.append(moved(entry, source, tiff, depth))
    return kept


def _append_ifd(tiff: bytearray, entries: Iterable[Entry], following: int) -> int:
    """Append a directory and its values; return its offset.

    Without entries of types that there are not: readers take a directory that begins with one for none.
    """
    order, table, values = _order(tiff), b"", b""
    entries = sorted((entry for entry in entries if entry.type in _ITEM_SIZE), key=lambda entry: entry.tag)
    tiff += bytes(len(tiff) % 2)
    at = len(tiff)
    behind = at + 2 + 12 * len(entries) + 4
    for entry in entries:
        place = entry.value.ljust(4, b"\0")
        if len(place) > 4:
            place = struct.pack(order + "I", behind + len(values))
            values += entry.value + bytes(len(entry.value) % 2)
        table += struct.pack(order + "HHI", entry.tag, entry.type, entry.count) + place
    tiff += struct.pack(order + "H", len(entries)) + table + struct.pack(order + "I", following) + values
    return at


def write_first_ifd(tiff: bytearray, entries: Iterable[Entry], following: int) -> None:
    at = _append_ifd(tiff, entries, following)
    struct.pack_into(_order(tiff) + "I", tiff, 4, at)


# --- Pages -----------------------------------------------------------------------------------------------------------

_MAX_PAGES = 10_000
_MOST_COPIED = 8
"""Pages may share an ICC profile, say; this many times the file's size they may have together."""
_PIXEL_PLACES = ((273, 279), (324, 325))
"""Tags of where strips or tiles are, and of their sizes in bytes."""
_OLD_JPEG = (513, 519, 520, 521)
"""Tags of where parts of old-style JPEG are."""


def pages(tiff: bytes) -> list[bytes]:
    """Take a TIFF file of several pages apart into files of one page, with their tags and their compressed pixels.

    Raises ValueError, struct.error.
    """
    found: list[bytes] = []
    copied = 0
    seen: set[int] = set()
    at = first_ifd(tiff)
    while at:
        if at in seen or len(found) == _MAX_PAGES:
            raise ValueError("its pages form a loop, or are too many")
        seen.add(at)
        page = bytearray(tiff[:4] + bytes(4))
        struct.pack_into(_order(tiff) + "I", page, 4, _copy_page(tiff, at, page))
        found.append(bytes(page))
        copied += len(page)
        if copied > _MOST_COPIED * len(tiff) + 2**20:
            raise ValueError("its pages share so much that apart they would be many times as large")
        _, at = read_ifd(tiff, at)
    return found


def with_tags(tiff: bytes, tags: Collection[int]) -> bytes:
    """The first page of a TIFF file with some of its tags alone, and its compressed pixels. Raises as `pages`."""
    page = bytearray(tiff[:4] + bytes(4))
    struct.pack_into(_order(tiff) + "I", page, 4, _copy_page(tiff, first_ifd(tiff), page, tags))
    return bytes(page)


def joined(pages: list[bytes]) -> bytes:
    """Put files of one page and the same byte order together into one. Raises ValueError, struct.error."""
    tiff, link = bytearray(pages[0][:4] + bytes(4)), 4
    for page in pages:
        at = _copy_page(page, first_ifd(page), tiff)
        struct.pack_into(_order(tiff) + "I", tiff, link, at)
        link = at + 2 + 12 * struct.unpack_from(_order(tiff) + "H", tiff, at)[0]
    return bytes(tiff)


def _copy_page(source: bytes, at: int, tiff: bytearray, tags: Collection[int] | None = None) -> int:
    """Append a directory, or some of its tags, with all that it points to; return its offset."""
    found = read_ifd(source, at, skip_damaged=True)[0]
    entries = {entry.tag: entry for entry in found if tags is None or entry.tag in tags}
    if not entries.keys().isdisjoint(_OLD_JPEG):
        raise ValueError("its pixels are old-style JPEG")
    if not any(place in entries for place, _ in _PIXEL_PLACES):
        raise ValueError("where its pixels are is damaged")
    for place, size in _PIXEL_PLACES:
        if place not in entries:
            continue
        if size not in entries:
            raise ValueError("the sizes of its strips are missing")
        starts, lengths = [], entries[size].integers(source)
        for start, length in zip(entries[place].integers(source), lengths, strict=True):
            tiff += bytes(len(tiff) % 2)
            starts.append(len(tiff))
            tiff += source[start : start + length]
        for tag, values in ((place, starts), (size, lengths)):
            entries[tag] = Entry(tag, 4, len(values), struct.pack(f"{_order(source)}{len(values)}I", *values))
    return _append_ifd(tiff, all_moved(entries.values(), source, tiff), 0)

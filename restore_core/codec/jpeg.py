"""JPEG files (ITU-T T.81, annex B) as segments."""

import re
from collections.abc import Iterator

import numpy as np
from PIL.JpegImagePlugin import zigzag_index

END = b"\xff\xd9"
SCAN = 0xDA
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
_HIERARCHICAL = {0xC5, 0xC6, 0xCD, 0xCE, 0xDE}
_TABLES = 0xDB
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
"""That is no part of coded pixels (escaped bytes, restarts)."""


def segments(source: bytes) -> tuple[list[tuple[int, int]], int]:
    """Where each segment begins and ends, and where the picture does; scans reach up to the next marker."""
    found, at = [], 2
    while at + 4 <= len(source) and source[at : at + 2] != END:
        code = source[at + 1]
        if source[at] != 0xFF or code in (0, 1, 0xFF) or 0xD0 <= code <= 0xD8:  # decoders pass over it
            at += 1
            continue
        end = at + 2 + int.from_bytes(source[at + 2 : at + 4], "big")
        if code == SCAN:  # coded pixels follow
            marker = _MARKER.search(source, end)
            end = marker.start() if marker else len(source)
        found.append((at, end))
        at = end
    return found, at + 2 if source[at : at + 2] == END else len(source)


def frame(source: bytes) -> tuple[int, int]:
    """Its kind, by its marker's code, and the bits of a sample; zeros where the file does not say."""
    starts = (at for at, _ in segments(source)[0] if source[at + 1] in _FRAMES)
    return next(((source[at + 1], source[at + 4]) for at in starts if at + 4 < len(source)), (0, 0))


def unreadable(source: bytes) -> str | None:
    """The name of its kind, if that is one which libjpeg does not read though Pillow opens it."""
    codes = (source[at + 1] for at, _ in segments(source)[0])
    first = next((code for code in codes if code in _FRAMES or code in _HIERARCHICAL), None)
    if first in _HIERARCHICAL:  # several frames, each of which refines the one before (annex J)
        return "hierarchical"
    return "lossless" if first in _LOSSLESS else None


def finest_tables(source: bytes) -> dict[int, list[int]]:
    """Of each quantization table the finest steps, row by row. It may be defined anew between scans, which Pillow does
    not look at."""
    found: dict[int, list[int]] = {}
    for at, end in segments(source)[0]:
        if source[at + 1] == _TABLES:
            for number, steps in _tables(source[at + 4 : end]):
                found[number] = [min(pair) for pair in zip(steps, found.get(number, steps), strict=True)]
    return found


def _tables(body: bytes) -> Iterator[tuple[int, list[int]]]:
    at = 0
    while at < len(body):
        wide, number = divmod(body[at], 16)
        values = np.frombuffer(body[at + 1 : at + 1 + 64 * (1 + bool(wide))], ">u2" if wide else "u1")
        if len(values) < 64:
            return
        yield number, [int(values[index]) for index in zigzag_index]
        at += 65 + 64 * bool(wide)

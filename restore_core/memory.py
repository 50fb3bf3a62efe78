"""Memory as the system and its allocator see it."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

WORKER_BYTES = 500 * 10**6
"""Of a process that holds a bundled model, and its idle codec processes."""
TILE_BYTES = 900 * 10**6
"""What `faces` takes beside a large picture: for a column of it 600 MB, more where much is looked at again."""
RESTORING, CODING = 10, 34
"""Bytes a pixel of a large picture takes in a worker while it is restored, and in worker and codec together while it is
encoded: of noise, which packs worst, in an 8-bit PNG; other kinds count as more pixels. See DECISIONS.md."""
LEAST_PIXELS, MOST_PIXELS = 2**20, 2**30
SHARE_BYTES = 2 * 10**9
"""What a worker should have: with so much a photograph of 44 megapixels goes, with 1.4 GB none of a camera."""


def pixel_budget(available: int, workers: int) -> int:
    """Pixels of the largest picture that each of the workers that share `available` bytes can restore at once."""
    free = available // workers - WORKER_BYTES
    return min(max(min((free - TILE_BYTES) // RESTORING, free // CODING), LEAST_PIXELS), MOST_PIXELS)


def trim() -> None:
    """Give back to the system what the allocator keeps of freed memory."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a libc other than glibc
            ctypes.CDLL(None).malloc_trim(0)


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2`, of which we want bytes in use: mapped one by one, and in the heaps."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in ("a", "b", "c", "d", "mapped", "e", "f", "used", "g", "h"))


def idle() -> int:
    """Resident memory of this process, bytes, beyond what is allocated: libraries, and what has been freed and kept.

    0 where that cannot be told (a libc other than glibc from 2.33 on).
    """
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError):
        return 0
    mallinfo2.restype = _Mallinfo2
    known = mallinfo2()
    return max(0, resident - int(known.mapped) - int(known.used))

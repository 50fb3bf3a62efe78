"""Memory as the system and its allocator see it."""

import contextlib
import ctypes
import sys


def trim() -> None:
    """Give back to the system what the allocator keeps of freed memory."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a libc other than glibc
            ctypes.CDLL(None).malloc_trim(0)

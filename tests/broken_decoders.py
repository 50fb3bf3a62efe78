"""Decoders that really hang, crash and eat memory in the processes that decode: what malformed files may do to them."""

from pathlib import Path

_SITE = """
import os, signal, threading
from restore_core.codec import child

def decode(data, *, max_pixels, real=child.decode):
    if data == b"hang":
        threading.Event().wait()
    if data == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == b"killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if data == b"eat":
        kept = []
        while True:
            kept.append(bytearray(2**26))
    if data == b"chatter":
        os.write(1, b"a library's message\\\\n")
        raise child.ItemError("decode", "said what it had to say")
    return real(data, max_pixels=max_pixels)

child.decode = decode
"""


def break_decoders(folder: Path) -> Path:
    """Return a folder that has to be first on the path of the process that starts the decoders."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITE)
    return folder

"""Codecs that really hang, crash and eat memory in the processes that they work in, as malformed files make them."""

from pathlib import Path

_SITE = """
import os, signal, threading
import numpy as np
from restore_core.codec import processes

def decode_frames(data, *, real=processes.decode_frames, **options):
    if data == b"hang":
        threading.Event().wait()
    if data == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == b"killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if data == b"eat":
        kept = []
        while True:
            kept.append(np.empty(2**26, np.uint8))  # not written to, which takes long where others are at work
    if data == b"chatter":
        os.write(1, b"a library's message\\\\n")
        raise processes.ItemError("decode", "said what it had to say")
    return real(data, **options)

def encode(pixels, source, *, real=processes.encode, **options):
    if source.endswith(b"crash the encoder"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(pixels, source, **options)

processes.decode_frames, processes.encode = decode_frames, encode
"""


def break_codecs(folder: Path) -> Path:
    """Return a folder that has to be first on the path of the process that starts the others."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITE)
    return folder

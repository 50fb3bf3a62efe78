"""Encoded files <-> pixels. The bytes decide what a file is, never its name; what cannot come back whole is refused."""

from restore_core.codec.decoding import DEFAULT_MAX_PIXELS, FORMATS, RESTORED, Picture, Pixels, decode, probe
from restore_core.codec.encoding import encode, thumbnail_jpeg

__all__ = [
    "DEFAULT_MAX_PIXELS", "FORMATS", "RESTORED", "Picture", "Pixels", "decode", "encode", "probe", "thumbnail_jpeg",
]  # fmt: skip

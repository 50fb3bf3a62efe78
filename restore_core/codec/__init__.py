"""Encoded files <-> pixels. The bytes decide what a file is, never its name; what cannot come back whole is refused."""

from restore_core.codec.decoding import DEFAULT_MAX_PIXELS, FORMATS, GRAY_MODES, RESTORED, Picture, Pixels, decode
from restore_core.codec.encoding import encode, thumbnail_jpeg, without_metadata

__all__ = [
    "DEFAULT_MAX_PIXELS", "FORMATS", "GRAY_MODES", "RESTORED", "Picture", "Pixels", "decode", "encode",
    "thumbnail_jpeg", "without_metadata",
]  # fmt: skip

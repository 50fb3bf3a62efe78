"""Encoded files <-> pixels. The bytes decide what a file is, never its name; what cannot come back whole is refused."""

from restore_core.codec.child import Decoders
from restore_core.codec.colour import Pixels, native_from_bytes
from restore_core.codec.decoding import DEFAULT_MAX_PIXELS, FORMATS, GRAY_MODES, MODES, Picture, decode
from restore_core.codec.encoding import encode, thumbnail_jpeg, without_metadata

__all__ = [
    "DEFAULT_MAX_PIXELS", "FORMATS", "GRAY_MODES", "MODES", "Decoders", "Picture", "Pixels", "decode", "encode",
    "native_from_bytes", "thumbnail_jpeg", "without_metadata",
]  # fmt: skip

"""Encoded files <-> pixels. The bytes decide what a file is, never its name; what cannot come back whole is refused."""

from restore_core.codec.colour import Pixels, native_from_bytes
from restore_core.codec.decoding import DEFAULT_MAX_PIXELS, FORMATS, Frame, Frames, Picture, decode
from restore_core.codec.encoding import encode, join, thumbnail_jpeg, without_metadata
from restore_core.codec.processes import Processes

__all__ = [
    "DEFAULT_MAX_PIXELS", "FORMATS", "Frame", "Frames", "Picture", "Pixels", "Processes",
    "decode", "encode", "join", "native_from_bytes", "thumbnail_jpeg", "without_metadata",
]  # fmt: skip

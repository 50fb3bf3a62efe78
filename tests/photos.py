"""Photographs, folders and archives made for the tests."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from restore_core.codec import Pixels


def pixels(seed: int, height: int = 12, width: int = 16) -> Pixels:
    """A smooth picture, another one for each seed: uint8 [height, width, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(seed: int, height: int = 12, width: int = 16, format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).save(file, format)
    return file.getvalue()


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of these chunks (kind, body), whatever they say."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def people(count: int, folder: str = "lfw_funneled") -> dict[str, bytes]:
    """Files as in the official archives, one to three photographs of each person."""
    return {
        f"{folder}/Person_{person:02d}/Person_{person:02d}_{number:04d}.jpg": encoded(100 * person + number)
        for person in range(count)
        for number in range(1, 2 + person % 3)
    }


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for key, data in files.items():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def tar_of(files: dict[str, bytes], encoding: str = "utf-8") -> bytes:
    """An archive with the folders as members of their own, as tar makes it."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.GNU_FORMAT, encoding=encoding) as tar:
        folders: set[str] = set()
        for key, data in files.items():
            folder = key.rpartition("/")[0]
            if folder not in folders:
                entry = tarfile.TarInfo(folder)
                entry.type = tarfile.DIRTYPE
                tar.addfile(entry)
                folders.add(folder)
            entry = tarfile.TarInfo(key)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return archive.getvalue()


def header_of(archive: bytes, key: str) -> int:
    """Where the header of a member begins."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return tar.getmember(key).offset

"""Folders of damaged photographs to measure speed with: mosaics of real ones, in sizes that archives have."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from restore_core.degradations import degrade_photograph, seed_of

Pixels = npt.NDArray[np.uint8]

DAMAGES: tuple[dict[str, float], ...] = ({"sigma_255": 15}, {"flips": 0.05}, {"area": 0.05}, {"gray": True})
"""One after the other over the files, so that each of them has to be restored and written anew."""
MIXED_SIDES = 64, 1600
"""The longer one, pixels; as often between 100 and 200 as between 400 and 800."""


@dataclass(frozen=True)
class Corpus:
    title: str
    width: int | None
    height: int | None
    """Of the pictures, pixels; None: they differ."""
    format: str | None
    """None: JPEG, PNG and WebP in turn."""


CORPORA = {
    "jpeg-250": Corpus("JPEG, 250 x 250", 250, 250, "JPEG"),
    "jpeg-1024": Corpus("JPEG, 1024 x 768", 1024, 768, "JPEG"),
    "jpeg-4000": Corpus("JPEG, 4000 x 3000", 4000, 3000, "JPEG"),
    "png-250": Corpus("PNG, 250 x 250", 250, 250, "PNG"),
    "mixed": Corpus("JPEG, PNG and WebP, 64 to 1600 pixels", None, None, None),
}


def write(corpus: Corpus, photographs: list[Path], count: int, folder: Path) -> None:
    """Write `count` files into a folder that is there: the same ones for the same photographs.

    Args:
        photographs: of at least 250 x 250 pixels.
    """
    for index in range(count):
        generator = np.random.default_rng(index)
        width, height = _size(corpus, generator)
        mosaic = _mosaic(photographs, index, width, height)
        data = _encoded(_damaged(mosaic, index), corpus.format or ("JPEG", "PNG", "WEBP")[index % 3])
        (folder / f"{index:06d}.{(corpus.format or ('jpeg', 'png', 'webp')[index % 3]).lower()}").write_bytes(data)


def _size(corpus: Corpus, generator: np.random.Generator) -> tuple[int, int]:
    if corpus.width and corpus.height:
        return corpus.width, corpus.height
    longer = int(np.exp(generator.uniform(*np.log(MIXED_SIDES))))
    shorter = max(1, int(longer * generator.uniform(0.5, 1)))
    return (longer, shorter) if generator.random() < 0.5 else (shorter, longer)


def _mosaic(photographs: list[Path], first: int, width: int, height: int) -> Pixels:
    """Photographs beside each other at their own size, so that the details are those of real pixels."""
    whole = np.empty((height, width, 3), np.uint8)
    tiles = _tiles(photographs, first)
    for top in range(0, height, 250):
        for left in range(0, width, 250):
            part = whole[top : top + 250, left : left + 250]
            part[:] = next(tiles)[: part.shape[0], : part.shape[1]]
    return whole


def _tiles(photographs: list[Path], first: int) -> Iterator[Pixels]:
    number = first
    while True:
        with Image.open(photographs[number % len(photographs)]) as image:
            yield np.asarray(image.convert("RGB"))
        number += 1


def _damaged(pixels: Pixels, index: int) -> Pixels:
    return degrade_photograph(pixels, seed_of(0, index), **DAMAGES[index % len(DAMAGES)])[0]


def _encoded(pixels: Pixels, format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **({} if format == "PNG" else {"quality": 90}))
    return file.getvalue()


def megapixels(folder: Path) -> float:
    """Of all files of a folder."""
    total = 0
    for path in folder.iterdir():
        with Image.open(path) as image:
            total += image.width * image.height
    return total / 1e6

"""Modes that a file cannot be restored in as it is: to 8-bit RGB, and the restored RGB back into them.

Where a file's own values say more than 8-bit RGB does (`native`), what changed is carried over as a correction of them,
so that pixels which restoration left alone keep every bit.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

Pixels = npt.NDArray[np.uint8]
Native = npt.NDArray[Any]
"""uint8 or uint16; see `Picture.native`."""

_ROW = 2**24
"""Pixels that are looked up together stand in rows of so many."""
_BAND_PIXELS = 2**22
"""Converted at a time: intermediate values take up to 48 bytes a pixel."""


def rgb_of(image: Image.Image) -> tuple[Pixels, Pixels | None, Native | None]:
    """Loaded picture of one of `decoding.MODES` -> (RGB [H, W, 3], alpha [H, W], native)."""
    match image.mode:
        case "L":
            return _three(np.asarray(image)), None, None
        case "LA":
            bands = np.asarray(image)
            return _three(bands[:, :, 0]), np.ascontiguousarray(bands[:, :, 1]), None
        case "RGB":
            return _array(image), None, None
        case "RGBA":
            bands = _array(image)
            return np.ascontiguousarray(bands[:, :, :3]), np.ascontiguousarray(bands[:, :, 3]), None
        case "P":
            # a text chunk of that name is only a text
            clear = isinstance(image.info.get("transparency"), (int, bytes))
            return rgb_of(image.convert("RGBA" if clear else "RGB"))
        case "CMYK":
            return _array(image.convert("RGB")), None, _array(image)
        case "LAB":
            return np.array(_lab_transform(to_rgb=True).apply(image)), None, np.array(image)
        case "I;16" | "I;16B":
            return rgb_of_deep(np.asarray(image).astype(np.uint16))  # in this machine's byte order
    raise ValueError(f"mode {image.mode}")


def _array(image: Image.Image) -> Pixels:
    """What np.array gives of several channels, which takes two copies of the pixels more while it is made."""
    result = np.empty((image.height, image.width, len(image.getbands())), np.uint8)
    for rows in _bands(result.shape):
        result[rows] = np.asarray(image.crop((0, rows.start, image.width, min(rows.stop, image.height))))
    return result


def rgb_of_deep(deep: Native) -> tuple[Pixels, None, Native]:
    """16-bit values [H, W] or [H, W, 3 or 4] -> (the nearest 8-bit RGB [H, W, 3], None, native)."""
    colours = deep[:, :, :3] if deep.ndim == 3 else deep
    pixels = np.empty(colours.shape, np.uint8)
    for rows in _bands(deep.shape):
        pixels[rows] = (colours[rows].astype(np.uint32) + 128) // 257
    return pixels if deep.ndim == 3 else _three(pixels), None, deep


def native_from_bytes(data: bytes, mode: str, height: int, width: int) -> Native:
    """`Picture.native` again from its bytes."""
    values: Native = np.frombuffer(data, np.uint8 if mode in ("CMYK", "LAB") else np.uint16)
    return values.reshape((height, width) if values.size == height * width else (height, width, -1))


def native_of(restored: Pixels, pixels: Pixels, native: Native, mode: str) -> Native:
    """Restored RGB in a file's own values.

    Args:
        restored: uint8 [H, W, 3], of grey files [H, W, 1].
        pixels: the same of what `native` was decoded to.
        native: uint16 [H, W] or [H, W, 3 or 4] (RGB, alpha), uint8 [H, W, 4] (CMYK) or [H, W, 3] (LAB).
        mode: the file's.

    Returns an array like `native`.
    """
    result = np.empty_like(native)
    convert: Callable[[Pixels, Pixels, Native], Native] = {"CMYK": _to_cmyk, "LAB": _to_lab}.get(mode, _to_deep)
    for rows in _bands(native.shape):
        result[rows] = convert(restored[rows], pixels[rows], native[rows])
    return result


def _to_deep(restored: Pixels, pixels: Pixels, deep: Native) -> Native:
    change = 257 * (restored.astype(np.int32) - pixels)
    if deep.ndim == 2:
        change = change[:, :, 0]
        return np.asarray(np.clip(deep + change, 0, 65_535), np.uint16)
    colour = np.clip(deep[:, :, :3] + change, 0, 65_535).astype(np.uint16)
    return np.concatenate([colour, deep[:, :, 3:]], axis=2)


def _to_cmyk(restored: Pixels, pixels: Pixels, cmyk: Native) -> Native:
    """Where the colour changed: as much black as before, unless it has to be lighter, and inks for the rest.

    The inverse of Pillow's R = (255 - C)(255 - K) / 255, so that a viewer which knows the inks better than that still
    shows unchanged pixels as before and the others near them.
    """
    light = np.maximum(255 - cmyk[:, :, 3:].astype(np.int32), restored.max(axis=2, keepdims=True))
    inks = 255 - (restored.astype(np.int32) * 255 + light // 2) // np.maximum(light, 1)
    changed = np.concatenate([inks, 255 - light], axis=2).astype(np.uint8)
    return np.where((restored == pixels).all(axis=2, keepdims=True), cmyk, changed)


def _to_lab(restored: Pixels, pixels: Pixels, lab: Native) -> Native:
    after, before = (
        np.asarray(_lab_transform(to_rgb=False).apply(Image.fromarray(rgb))).astype(np.int32)
        for rgb in (restored, pixels)
    )
    return np.asarray(np.clip(lab + after - before, 0, 255), np.uint8)


@functools.cache
def _lab_transform(*, to_rgb: bool) -> ImageCms.ImageCmsTransform:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    if to_rgb:
        return ImageCms.buildTransform(lab, rgb, "LAB", "RGB")
    return ImageCms.buildTransform(rgb, lab, "RGB", "LAB")


def with_palette(
    restored: Pixels, alpha: Pixels | None, colours: int, own: Image.Image | None = None
) -> tuple[Image.Image, bytes]:
    """Reduce to a palette of at most `colours`, with every pixel's alpha as it was.

    Args:
        own: the picture before it was restored, of mode P: its own palette is kept where it fits no worse than a new
            one, and so are the pixels that did not change.

    Returns the picture of mode P and the alpha of the palette's entries, b"" without `alpha`.
    """
    image = Image.fromarray(restored)
    if alpha is None:
        palette = image.quantize(colours, Image.Quantize.MEDIANCUT)
        new, alphas = image.quantize(palette=palette, dither=Image.Dither.NONE), b""
    else:
        new, alphas = _with_new_palette(restored, alpha, colours)
    if own is not None and (kept := _with_own_palette(restored, alpha, own, colours)) is not None:
        image_kept, alphas_kept = kept
        if _squared_error(image_kept, restored, alpha) <= _squared_error(new, restored, alpha):
            return image_kept, alphas_kept
    return (image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) if alpha is None else new), alphas


def _squared_error(image: Image.Image, pixels: Pixels, alpha: Pixels | None) -> float:
    """Of what can be seen."""
    shown, total = np.asarray(image.convert("RGB")), 0.0
    for rows in _bands(pixels.shape):
        errors = np.square(shown[rows].astype(np.float32) - pixels[rows])
        total += float((errors if alpha is None else errors[alpha[rows] > 0]).sum())
    return total


def _with_own_palette(
    restored: Pixels, alpha: Pixels | None, own: Image.Image, colours: int
) -> tuple[Image.Image, bytes] | None:
    """Of the changed pixels the nearest entry of the same alpha. None where pixels have no entry among `colours`."""
    palette = np.asarray(own.getpalette() or [], np.uint8).reshape(-1, 3)
    index = np.array(own)
    missing = int(index.max()) + 1 - len(palette)
    if missing > 0 and len(palette) + missing > colours:
        return None
    if missing > 0:  # Pillow shows them as black
        palette = np.concatenate([palette, np.zeros((missing, 3), np.uint8)])
    alphas = np.full(256, 255, np.uint8)
    match own.info.get("transparency"):
        case int(entry):
            alphas[entry] = 0
        case bytes(values):
            alphas[: len(values)] = np.frombuffer(values[:256], np.uint8)
    alphas = alphas[: len(palette)]
    changed = (palette[index] != restored).any(axis=2)
    for level in (255,) if alpha is None else np.unique(alpha[changed]):
        here = changed if alpha is None else changed & (alpha == level)
        entries = np.flatnonzero(alphas == level) if alpha is not None else np.arange(len(palette))
        choice = Image.new("P", (1, 1))
        choice.putpalette(palette[np.resize(entries, 256)].tobytes())
        some = restored[here]
        nearest = _image_of(some).quantize(palette=choice, dither=Image.Dither.NONE)
        index[here] = np.resize(entries, 256).astype(np.uint8)[_values_of(nearest, len(some))]
    image = Image.fromarray(index)
    image.putpalette(palette.tobytes())
    return image, b"" if alpha is None else alphas.tobytes()


def _with_new_palette(restored: Pixels, alpha: Pixels, colours: int) -> tuple[Image.Image, bytes]:
    index = np.zeros(alpha.shape, np.uint8)
    entries, alphas = b"", b""
    levels, counts = np.unique(alpha, return_counts=True)
    visible = max(1, int(counts[levels > 0].sum()))
    for level, count in zip(levels, counts, strict=True):
        size = 1 + (int((colours - len(levels)) * count / visible) if level else 0)  # nobody sees what is transparent
        part = _image_of(restored[alpha == level]).quantize(size, Image.Quantize.MEDIANCUT)
        index[alpha == level] = _values_of(part, int(count)) + len(alphas)
        used = (part.getpalette() or [])[: 3 * (int(np.asarray(part).max()) + 1)]
        entries += bytes(used)
        alphas += bytes([level]) * (len(used) // 3)
    image = Image.fromarray(index)
    image.putpalette(entries)  # which makes it mode P
    return image, alphas


def _image_of(colours: Pixels) -> Image.Image:
    """Of [N, 3] values: one row, or where Pillow takes none so long (from 89 million on) several, filled up."""
    if len(colours) <= _ROW:
        return Image.fromarray(colours[np.newaxis])
    filled = np.concatenate([colours, colours[: -len(colours) % _ROW]])
    return Image.fromarray(filled.reshape(-1, _ROW, 3))


def _values_of(image: Image.Image, count: int) -> Pixels:
    """The other way: [N]."""
    values: Pixels = np.asarray(image).reshape(-1)[:count]
    return values


def steps_of(values: Pixels, bits: int) -> Pixels:
    """8-bit values to the nearest of fewer bits."""
    steps: Pixels = ((values.astype(np.uint16) * (2**bits - 1) + 127) // 255).astype(np.uint8)
    return steps


def _three(gray: Pixels) -> Pixels:
    return np.repeat(gray[:, :, np.newaxis], 3, axis=2)


def _bands(shape: tuple[int, ...]) -> list[slice]:
    step = max(1, _BAND_PIXELS // max(1, shape[1]))
    return [slice(top, top + step) for top in range(0, shape[0], step)]

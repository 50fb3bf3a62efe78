"""The contract over all formats at once: profiles that are not sRGB, pictures one pixel wide, all ways up of an MPO."""

import io
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms
from test_codec_modes import opened, saved

from restore_core.codec import decode, encode

SOFTWARE = "restore_core (model 0123456789ab)"


def display_p3() -> bytes:
    """A profile with the primaries of Display P3 (SMPTE EG 432-1, white D65 adapted to D50), made of Pillow's sRGB."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for index in range(int.from_bytes(profile[128:132], "big")):
        name, at, _ = struct.unpack_from(">4sII", profile, 132 + 12 * index)
        if name in primaries:
            struct.pack_into(">3i", profile, at + 8, *(round(value * 65536) for value in primaries[name]))
    return bytes(profile)


P3 = display_p3()


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack(
        [60 + x * 150 // max(1, width - 1), 60 + y * 150 // max(1, height - 1), np.full_like(x, 90)], -1
    ).astype(np.uint8)


def with_profile(jp2: bytes, profile: bytes) -> bytes:
    """A JPEG 2000 file whose colours are told by a profile (ISO 15444-1, I.5.3.3, METH 2) instead of by a number."""
    at = jp2.index(b"colr") - 4
    size = int.from_bytes(jp2[at : at + 4], "big")
    box = struct.pack(">I4s", 11 + len(profile), b"colr") + b"\2\0\0" + profile
    header = jp2.index(b"jp2h") - 4
    length = int.from_bytes(jp2[header : header + 4], "big") + len(box) - size
    return jp2[:header] + struct.pack(">I", length) + jp2[header + 4 : at] + box + jp2[at + size :]


def restored(source: bytes, pixels: np.ndarray) -> bytes:
    return encode(pixels, source, picture=decode(source), software=SOFTWARE)


WIDE_COLOUR = {
    "JPEG": saved(Image.fromarray(smooth(24, 40)), "JPEG", quality=95, icc_profile=P3),
    "PNG": saved(Image.fromarray(smooth(24, 40)), "PNG", icc_profile=P3),
    "WEBP": saved(Image.fromarray(smooth(24, 40)), "WEBP", lossless=True, icc_profile=P3),
    "TIFF": saved(Image.fromarray(smooth(24, 40)), "TIFF", icc_profile=P3),
    "AVIF": saved(Image.fromarray(smooth(24, 40)), "AVIF", quality=95, icc_profile=P3),
    "JPEG2000": with_profile(saved(Image.fromarray(smooth(24, 40)), "JPEG2000"), P3),
}


def test_the_profile_is_another_one() -> None:
    to_srgb = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(P3)), ImageCms.createProfile("sRGB"), "RGB", "RGB"
    )
    red = np.asarray(to_srgb.apply(Image.new("RGB", (1, 1), (200, 80, 80))))[0, 0]
    assert red[0] > 210 and red[1] < 75  # the same numbers mean a stronger red there


@pytest.mark.parametrize("name", WIDE_COLOUR)
def test_colours_stay_those_of_their_profile(name: str) -> None:
    """The numbers are neither converted on the way in nor on the way out, and still mean what they did."""
    source = WIDE_COLOUR[name]
    picture = decode(source)
    assert np.abs(picture.pixels.astype(int) - smooth(24, 40)).max() <= 6
    wanted = picture.pixels.copy()
    wanted[:, :16] = 200, 80, 80
    after = restored(source, wanted)
    # Pillow does not read those of JPEG 2000.
    assert P3 in after if name == "JPEG2000" else opened(after).info["icc_profile"] == P3
    # Away from the edge, where lossy formats ring.
    difference = np.abs(decode(after).pixels.astype(int) - wanted)
    assert max(difference[:, :8].max(), difference[:, 28:].max()) <= (0 if name in ("PNG", "WEBP", "TIFF") else 10)


def kinds(height: int, width: int) -> dict[str, bytes]:
    image = Image.fromarray(smooth(height, width))
    deep = io.BytesIO()
    tifffile.imwrite(deep, smooth(height, width).astype(np.uint16) * 257, photometric="rgb", metadata=None)
    palette = image.quantize(palette=Image.fromarray(smooth(24, 40)).quantize(16))
    with_alpha = image.copy()
    with_alpha.putalpha(200)
    return {
        "AVIF": saved(image, "AVIF", quality=95),
        "JPEG 2000": saved(image, "JPEG2000"),
        "GIF": saved(palette, "GIF"),
        "PNG, palette": saved(palette, "PNG"),
        "PNG, alpha": saved(with_alpha, "PNG"),
        "PNG, grey and alpha": saved(with_alpha.convert("LA"), "PNG"),
        "PNG, 16 bits": saved(Image.fromarray(smooth(height, width)[:, :, 0].astype(np.uint16) * 257), "PNG"),
        "TIFF, 16 bits": deep.getvalue(),
        "TIFF, CMYK": saved(image.convert("CMYK"), "TIFF"),
        "JPEG": saved(image, "JPEG", quality=95, subsampling=0),
        "JPEG, CMYK": saved(image.convert("CMYK"), "JPEG", quality=95),
        "TIFF, LAB": saved(image.convert("LAB"), "TIFF"),
        "BMP": saved(image, "BMP"),
    }


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (7, 1), (1, 20_000), (20_000, 1)], ids=str)
@pytest.mark.parametrize("kind", kinds(1, 1))
def test_pictures_one_pixel_wide(kind: str, height: int, width: int) -> None:
    source = kinds(height, width)[kind]
    before = decode(source)
    assert (before.height, before.width) == (height, width)
    wanted = before.pixels.copy()
    wanted[height // 2 :, width // 2 :] = 150 if before.gray else (150, 100, 100)
    after = decode(restored(source, wanted))
    assert (after.format, after.mode, after.height, after.width) == (before.format, before.mode, height, width)
    assert (after.native is None) == (before.native is None)
    assert np.array_equal(after.alpha, before.alpha) if before.alpha is not None else after.alpha is None
    # A palette, inks and lossy formats come near.
    most = 0 if kind in ("PNG, alpha", "PNG, grey and alpha", "PNG, 16 bits", "TIFF, 16 bits", "BMP") else 25
    assert np.abs(after.pixels.astype(int) - wanted).max() <= most


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_first_picture_of_an_mpo_keeps_its_way_up(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    images = [Image.fromarray(smooth(24, 40)), Image.fromarray(smooth(40, 24))]
    source = saved(images[0], "MPO", save_all=True, append_images=images[1:], exif=exif, quality=95)
    picture = decode(source, frames="first")
    assert (picture.orientation, picture.width, picture.height) == (orientation, 40, 24)
    after = decode(encode(255 - picture.pixels, source, picture=picture, software=SOFTWARE))
    assert (after.orientation, after.width, after.height) == (orientation, 40, 24)
    assert np.abs(after.pixels.astype(int) - (255 - picture.pixels)).max() <= 12


@pytest.mark.parametrize("transform", [0, 2])
def test_inks_of_both_kinds_of_jpeg(transform: int) -> None:
    """CMYK, and YCCK as Photoshop writes it (transform 2 in its marker, Adobe technical note 5116)."""
    ramp = np.repeat(np.linspace(40, 210, 48).astype(np.uint8)[None], 32, axis=0)
    inks = np.stack([ramp, ramp[:, ::-1], np.full_like(ramp, 128), np.full_like(ramp, 20)], -1)
    source = bytearray(saved(Image.frombytes("CMYK", (48, 32), inks.tobytes()), "JPEG", quality=95, subsampling=0))
    source[source.index(b"Adobe") + 11] = transform
    picture = decode(bytes(source))
    assert picture.mode == "CMYK" and opened(bytes(source)).info["adobe_transform"] == transform
    wanted = picture.pixels.copy()
    wanted[:, :16] = 150, 100, 100
    after = restored(bytes(source), wanted)
    assert opened(after).mode == "CMYK"
    difference = np.abs(decode(after).pixels.astype(int) - wanted)
    assert max(difference[:, :8].max(), difference[:, 24:].max()) <= 12

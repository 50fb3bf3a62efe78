"""The codec against Pillow: the same pixels in, and everything but the pixels kept on the way out."""

import io
import struct
import subprocess
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from photos import png_of
from PIL import Image, ImageCms, ImageOps
from PIL.JpegImagePlugin import JpegImageFile, get_sampling
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import IFDRational, ImageFileDirectory_v2

from restore_core import exif as exif_blocks
from restore_core.codec import Picture, decode, encode, thumbnail_jpeg, without_metadata
from restore_core.errors import ItemError

SOFTWARE = "restore_core 0.1.0 (model tiny)"
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r/></x:xmpmeta>'
STORED = {  # every format and mode that is restored
    "JPEG": ("L", "RGB"),
    "PNG": ("L", "LA", "RGB", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("L", "LA", "RGB", "RGBA"),
    "BMP": ("L", "RGB"),
}
CASES = [(name, mode) for name, modes in STORED.items() for mode in modes]
LOSSLESS = [case for case in CASES if case[0] != "JPEG"]


def random_pixels(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth_pixels(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y) % 256], -1).astype(np.uint8)


def file_of(image: Image.Image, name: str, **options: object) -> bytes:
    if name == "WEBP" and "quality" not in options:
        options |= {"lossless": True, "exact": True}
    if name == "JPEG":
        options = options if "qtables" in options else {"quality": 92} | options
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def image_of(name: str, mode: str, height: int = 11, width: int = 7, **options: object) -> bytes:
    return file_of(Image.fromarray(random_pixels(height, width, len(mode))), name, **options)


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def restored(source: bytes, pixels: np.ndarray | None = None, **options: bool) -> bytes:
    picture = decode(source)
    return encode(
        255 - picture.pixels if pixels is None else pixels, source, picture=picture, software=SOFTWARE, **options
    )


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def failing(data: bytes, error: str, **options: int) -> str:
    with pytest.raises(ItemError) as caught:
        decode(data, **options)
    assert caught.value.error == error, caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


# --- Pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_decode_gives_pillows_pixels(name: str, mode: str) -> None:
    data = image_of(name, mode)
    picture = decode(data)
    truth = opened(data)
    assert (name, mode, 7, 11) == (picture.format, picture.mode, picture.width, picture.height)
    assert np.array_equal(picture.pixels, np.asarray(truth.convert("RGB")))
    assert picture.pixels.dtype == np.uint8 and picture.pixels.flags.c_contiguous and picture.pixels.flags.writeable
    assert picture.gray == (mode in ("L", "LA"))
    assert (picture.alpha is None) == ("A" not in mode)
    if picture.alpha is not None:
        assert np.array_equal(picture.alpha, np.asarray(truth.getchannel("A")))


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(LOSSLESS), height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 2**32 - 1)
)
def test_lossless_round_trip(case: tuple[str, str], height: int, width: int, seed: int) -> None:
    name, mode = case
    source = image_of(name, mode, height, width)
    before = decode(source)
    pixels = random_pixels(height, width, 3, seed)
    if before.gray:
        pixels = np.repeat(pixels[:, :, :1], 3, axis=2)
    after = decode(restored(source, pixels))
    assert (after.format, after.mode, after.width, after.height) == (name, mode, width, height)
    assert np.array_equal(after.pixels, pixels)
    assert (before.alpha is None and after.alpha is None) or np.array_equal(before.alpha, after.alpha)


@settings(max_examples=40, deadline=None)
@given(mode=st.sampled_from(["L", "RGB"]), height=st.integers(1, 40), width=st.integers(1, 40))
def test_jpeg_round_trip_at_every_size(mode: str, height: int, width: int) -> None:
    source = file_of(Image.fromarray(smooth_pixels(height, width)).convert(mode), "JPEG", subsampling=0)
    before = decode(source)
    after = decode(restored(source, before.pixels))
    assert (after.format, after.mode, after.width, after.height) == ("JPEG", mode, width, height)
    assert np.abs(after.pixels.astype(int) - before.pixels).max() <= 12


def test_grey_files_stay_grey_by_their_luma() -> None:
    pixels = random_pixels(11, 7, 3)
    for name in ("PNG", "TIFF", "BMP"):
        after = decode(restored(image_of(name, "L"), pixels))
        luma = pixels @ np.array([0.299, 0.587, 0.114])
        assert after.mode == "L" and np.abs(after.pixels[:, :, 0] - luma).max() <= 0.51


def test_the_caller_must_pass_pixels_of_the_pictures_size() -> None:
    source = image_of("PNG", "RGB")
    with pytest.raises(ValueError, match=r"pixels are uint8 \(7, 11, 3\), the picture is 11 x 7"):
        encode(np.zeros((7, 11, 3), np.uint8), source, picture=decode(source), software=SOFTWARE)


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"hello, world", b"<svg/>", b"BM", bytes(1000), b"PK\3\4" + bytes(100)])
def test_other_files_are_not_images(data: bytes) -> None:
    message = failing(data, "not_an_image")
    assert message == "empty file" if not data else "JPEG, PNG" in message and data[:4].hex(" ") in message


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(100), "HEIF"), (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (file_of(Image.new("RGB", (4, 4)), "PPM"), "PNM"), (file_of(Image.new("RGB", (16, 16)), "ICO"), "icon"),
        (b"8BPS\0\1" + bytes(100), "Photoshop"), (file_of(Image.new("RGB", (4, 4)), "DDS"), "DDS"),
    ],
)  # fmt: skip
def test_images_of_other_formats_are_refused_by_name(data: bytes, name: str) -> None:
    assert failing(data, "unsupported") == f"{name}; convert it to JPEG, PNG or TIFF first"


@pytest.mark.parametrize(("name", "mode"), [*CASES, ("GIF", "L"), ("AVIF", "RGB"), ("JPEG2000", "RGB")])
def test_files_cut_off_anywhere_are_truncated(name: str, mode: str) -> None:
    data = image_of(name, mode, 40, 40)
    for share in (0.95, 0.6, 0.3):
        cut = data[: int(len(data) * share)]
        assert failing(cut, "truncated") == f"the file is cut off after {len(cut)} bytes"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning", "ignore:Truncated File Read:UserWarning")
def test_a_header_alone_is_truncated() -> None:
    for name in ("JPEG", "PNG", "WEBP", "TIFF"):
        failing(image_of(name, "RGB", 40, 40)[:20], "truncated")


@settings(max_examples=150, deadline=None)
@given(case=st.sampled_from(CASES), hits=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=20))
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::RuntimeWarning:PIL")
def test_garbage_is_an_item_error_or_a_picture(case: tuple[str, str], hits: list[tuple[float, int]]) -> None:
    data = bytearray(image_of(*case))
    for place, value in hits:
        data[int(place * len(data))] = value
    try:
        picture = decode(bytes(data), max_pixels=10**6)
    except ItemError:
        return
    assert isinstance(picture, Picture) and picture.pixels.shape == (picture.height, picture.width, 3)


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    body = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return png_of((b"IHDR", body), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))


def test_bombs_are_refused_by_their_header() -> None:
    assert "pixels" in failing(png_header(100_000, 100_000), "too_large")
    assert "pixels" in failing(png_header(10_000, 10_000), "too_large")
    message = failing(image_of("JPEG", "RGB", 11, 7), "too_large", max_pixels=76)
    assert (
        message
        == "7 x 11 pixels are over the budget of 76 pixels; raise --max-megapixels, with --retry-failed too_large"
    )
    assert decode(image_of("JPEG", "RGB", 11, 7), max_pixels=77).width == 7


def frames(name: str) -> bytes:
    first, second = (Image.fromarray(random_pixels(8, 8, 3, seed)) for seed in (1, 2))
    return file_of(first, name, save_all=True, append_images=[second], **({"quality": 90} if name == "MPO" else {}))


def tagged_tiff(**tags: object) -> bytes:
    ifd = ImageFileDirectory_v2()
    for tag, value in tags.items():
        ifd[int(tag.removeprefix("t"))] = value
    return file_of(Image.new("RGB", (4, 6)), "TIFF", tiffinfo=ifd)


GREY16 = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
RGB = Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (file_of(RGB.convert("P"), "PNG", bits=1), "PNG with 1 bit a channel; convert it to 8-bit grey, RGB or RGBA"),
        (file_of(RGB.convert("1"), "PNG"), "PNG with 1-bit"),
        (file_of(RGB.convert("1"), "TIFF"), "TIFF with 1-bit"),
        (file_of(RGB.convert("1"), "BMP"), "BMP with 1-bit"),
        (file_of(GREY16, "JPEG2000"), "JPEG2000 with 16 bits a channel"),
        (file_of(Image.new("F", (4, 4)), "TIFF"), "TIFF with floating point"),
        (png_header(4, 4, 16, 4), "PNG with 16 bits a channel and alpha"),
        (frames("GIF"), "GIF with 2 frames or pages; use --frames, or split it"),
        (frames("PNG"), "PNG with 2 frames or pages"),
        (frames("WEBP"), "WEBP with 2 frames or pages"),
        (frames("TIFF"), "TIFF with 2 frames or pages"),
        (frames("MPO"), "MPO with 2 frames or pages"),
        (file_of(RGB, "JPEG", xmp=b'<x hdrgm:Version="1.0"/>'), "JPEG with an HDR gain map"),
        (tagged_tiff(t37724=b"layers"), "TIFF with Photoshop layers"),
        (tagged_tiff(t50706=b"\1\4\0\0"), "TIFF with DNG"),
        (file_of(RGB, "TIFF", big_tiff=True), "BigTIFF"),
    ],
)
def test_what_cannot_be_kept_whole_is_refused_by_name(data: bytes, reason: str) -> None:
    assert failing(data, "unsupported").startswith(reason)


def test_one_picture_in_a_mpo_or_apng_or_tiff_is_a_picture() -> None:
    assert decode(file_of(RGB, "MPO")).format == "JPEG"
    assert decode(file_of(RGB, "PNG", save_all=True)).format == "PNG"


# --- 16-bit grey -----------------------------------------------------------------------------------------------------


def deep_values(height: int = 11, width: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 65_536, (height, width), np.uint16)


def deep_file(name: str, **options: object) -> bytes:
    values = deep_values()
    if name == "PNG":
        return file_of(Image.fromarray(values), "PNG", **options)
    return file_of(Image.fromarray(values.astype(">u2" if name == "TIFF big-endian" else "<u2")), "TIFF", **options)


DEEP = pytest.mark.parametrize("name", ["PNG", "TIFF", "TIFF big-endian"])


@DEEP
def test_16_bit_grey_is_seen_as_the_nearest_8_bits(name: str) -> None:
    picture = decode(deep_file(name))
    assert (picture.mode, picture.gray) == ("I;16B" if name == "TIFF big-endian" else "I;16", True)
    expected = np.round(deep_values() / 257).astype(np.uint8)
    assert np.array_equal(picture.pixels, np.repeat(expected[:, :, None], 3, axis=2))
    assert picture.native is not None and np.array_equal(picture.native, deep_values())


@DEEP
def test_16_bit_grey_keeps_all_bits_where_nothing_changes(name: str) -> None:
    source = deep_file(name)
    picture = decode(source)
    pixels = picture.pixels.copy()
    pixels[2:5, 1:4] = 200
    after = opened(restored(source, pixels))
    assert np.asarray(after).dtype.itemsize == 2
    values = np.asarray(after).astype(np.int64)
    same = np.ones(values.shape, bool)
    same[2:5, 1:4] = False
    assert np.array_equal(values[same], deep_values()[same])
    assert np.abs(values[~same] - 200 * 257).max() <= 128
    assert np.array_equal(np.asarray(opened(restored(source, picture.pixels))), deep_values())
    assert np.array_equal(np.asarray(opened(without_metadata(source, picture=picture))), deep_values())
    assert decode(restored(source, pixels)).format == name.split()[0]


def test_16_bit_grey_does_not_run_over() -> None:
    values = np.array([[0, 65_535, 100, 65_400, 130]], np.uint16)
    source = file_of(Image.fromarray(values), "PNG")
    result = np.asarray(opened(restored(source))).astype(np.int64)  # inverted at 8 bits
    assert np.abs(result - 257 * np.array([[255, 0, 255, 1, 254]])).max() <= 128


def test_16_bit_grey_keeps_its_metadata() -> None:
    source = file_of(Image.fromarray(deep_values()), "PNG", icc_profile=ICC, dpi=(300, 300))
    after = opened(restored(source))
    assert after.info["icc_profile"] == ICC and after.info["dpi"] == pytest.approx((300, 300), abs=0.1)


# --- Metadata --------------------------------------------------------------------------------------------------------


def exif_of_a_camera(orientation: int) -> bytes:
    """Big-endian, with a maker note, GPS and a thumbnail directory: what Pillow's own writer would rearrange."""
    exif = Image.Exif()
    exif.endian = ">"
    exif[271], exif[274], exif[305] = "Camera", orientation, "Editor 1.0"
    exif.get_ifd(34665)[37500] = b"maker note" * 30
    exif.get_ifd(34853).update({1: "N", 2: (IFDRational(48), IFDRational(8), IFDRational(14))})
    return exif.tobytes()


def check_exif(after: bytes, orientation: int) -> None:
    exif = Image.open(io.BytesIO(after)).getexif()
    assert (exif[271], exif[274], exif[305]) == ("Camera", orientation, SOFTWARE)
    assert exif.get_ifd(34665)[37500] == b"maker note" * 30
    assert exif.get_ifd(34853)[1] == "N" and exif.get_ifd(34853)[2] == (48, 8, 14)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_exif_icc_and_xmp_are_kept_and_the_way_up_too(name: str, orientation: int) -> None:
    exif = exif_of_a_camera(orientation)
    source = file_of(Image.fromarray(smooth_pixels(11, 7)), name, exif=exif, icc_profile=ICC, **xmp_for(name))
    picture = decode(source)
    assert (picture.width, picture.height) == (7, 11)  # stored, not turned
    after = restored(source, picture.pixels)
    check_exif(after, orientation)
    image = opened(after)
    assert image.info["icc_profile"] == ICC and image.info["xmp"] == XMP
    shown_before, shown_after = (np.asarray(ImageOps.exif_transpose(opened(data))) for data in (source, after))
    assert shown_before.shape == shown_after.shape
    assert np.abs(shown_before.astype(int) - shown_after).max() <= (12 if name == "JPEG" else 0)


def xmp_for(name: str) -> dict[str, object]:
    if name != "PNG":
        return {"xmp": XMP}
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    return {"pnginfo": info}


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_software_is_noted_without_any_exif(name: str) -> None:
    assert dict(opened(restored(image_of(name, "RGB"))).getexif()) == {305: SOFTWARE}


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "AVIF", "MPO"])
def test_stripping_keeps_profile_and_orientation(name: str, orientation: int) -> None:
    exif = exif_of_a_camera(orientation)
    source = image_of(name, "RGB", exif=exif, icc_profile=ICC, **xmp_for(name))
    image = opened(restored(source, strip_metadata=True))
    way_up = {} if orientation == 1 else {274: orientation}
    assert dict(image.getexif()) == way_up
    assert image.info["icc_profile"] == ICC and "xmp" not in image.info and not image.getexif().get_ifd(34853)
    image = opened(restored(source))
    assert dict(image.getexif().get_ifd(34853)) and image.info["icc_profile"] == ICC and image.info["xmp"] == XMP


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("name", "options"), [("JPEG", {"comment": b"Ann at home", "quality": 70}), ("PNG", {}),
                         ("WEBP", {"quality": 60}), ("WEBP", {"lossless": True}), ("TIFF", {}),
                         ("AVIF", {"quality": 60})], ids=str)  # fmt: skip
def test_metadata_goes_without_a_change_to_the_pixels(name: str, options: dict[str, object], orientation: int) -> None:
    xmp = {} if name == "TIFF" else xmp_for(name)
    source = image_of(name, "RGB", exif=exif_of_a_camera(orientation), icc_profile=ICC, **xmp, **options)
    picture = decode(source)
    after = without_metadata(source, picture=picture)
    again = decode(after)
    assert np.array_equal(again.pixels, picture.pixels)
    assert (again.orientation or 1, again.format) == (orientation, name)
    image = opened(after)
    assert image.info["icc_profile"] == ICC and not {"xmp", "comment"} & set(image.info)
    assert not {271, 305, 34665, 34853} & set(image.getexif())
    assert b"GPS" not in after and b"Ann at home" not in after


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def test_a_jpeg_keeps_no_text_whatever_it_begins_with() -> None:
    texts = [(0xFE, b"Adobe: Ann at home"), (0xFE, b"-Ann"), (0xED, b"Adobe_Photoshop2.5:8BIM Ann"),
             (0xE1, b"Adobe_CM Ann"), (0xE0, b"JFXX\0\x13 Ann"), (0xE2, b"Adobe Ann"),
             (0xEE, b"ICC_PROFILE\0 Ann")]  # fmt: skip
    plain = image_of("JPEG", "RGB", 64, 64, icc_profile=ICC)
    assert plain[2:4] == b"\xff\xe0"
    small = random_pixels(16, 20, 3).tobytes()
    jfif = segment(0xE0, plain[6:18] + bytes([20, 16]) + small)
    source = plain[:2] + jfif + b"".join(segment(*text) for text in texts) + plain[20:]
    assert without_metadata(source, picture=decode(source)) == plain
    after = restored(source, strip_metadata=True)
    assert b"Ann" not in after and small not in after


def test_all_comments_of_a_jpeg_are_kept() -> None:
    plain = image_of("JPEG", "RGB")
    source = plain[:20] + segment(0xFE, b"one") + segment(0xFE, b"two") + plain[20:]
    after = restored(source)
    assert segment(0xFE, b"one") + segment(0xFE, b"two") in after and after.count(b"\xff\xfe") == 2


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
def test_nothing_follows_a_jpeg_without_metadata(options: dict[str, object]) -> None:
    """Other pictures (MPO) and what cameras append have metadata of their own."""
    source = image_of("JPEG", "RGB", **options)
    picture = decode(source)
    assert without_metadata(source + b"a film with Ann", picture=picture) == source
    others = [Image.fromarray(random_pixels(7, 11, 3)) for _ in range(2)]
    several = file_of(others[0], "MPO", save_all=True, append_images=others[1:], exif=exif_of_a_camera(6))
    first = decode(several, frames="first")
    bare = without_metadata(several, picture=first)
    assert np.array_equal(decode(bare).pixels, first.pixels) and decode(bare).orientation == 6
    assert bare.count(b"\xff\xd8\xff") == 1 and b"GPS" not in bare and b"Camera" not in bare


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
def test_what_follows_a_jpeg_stays(options: dict[str, object]) -> None:
    """The film of a motion photo, whose place the metadata tells from the file's end."""
    film = b"\0\0\0\x18ftypmp42\xff\xd8\xff\xd9" + bytes(range(256)) * 9
    source = image_of("JPEG", "RGB", **options)
    picture = decode(source + film)
    after = encode(255 - picture.pixels, source + film, picture=picture, software=SOFTWARE)
    assert after.endswith(b"\xff\xd9" + film)
    assert after.removesuffix(film) == encode(255 - picture.pixels, source, picture=picture, software=SOFTWARE)
    bare = encode(picture.pixels, source + film, picture=picture, software=SOFTWARE, strip_metadata=True)
    assert bare.endswith(b"\xff\xd9") and film not in bare
    several = file_of(Image.fromarray(random_pixels(7, 11, 3)), "MPO", save_all=True,
                      append_images=[Image.fromarray(random_pixels(7, 11, 3))])  # fmt: skip
    first = decode(several, frames="first")
    assert encode(first.pixels, several, picture=first, software=SOFTWARE).count(b"\xff\xd8\xff") == 1


def test_what_follows_a_png_stays_behind_its_end() -> None:
    source = image_of("PNG", "RGB")
    picture = decode(source)
    for tail in (bytes(512), source, b"some text"):
        after = encode(255 - picture.pixels, source + tail, picture=picture, software=SOFTWARE)
        assert after.removesuffix(tail) == encode(255 - picture.pixels, source, picture=picture, software=SOFTWARE)
        assert after.endswith(b"IEND\xae\x42\x60\x82" + tail)
        assert without_metadata(source + tail, picture=picture) == without_metadata(source, picture=picture)


def test_chunks_of_a_png_that_name_its_old_pixels_go() -> None:
    """As ISO 15948 has it of chunks that nobody knows: "unsafe to copy" says the case of the fourth letter."""
    source = image_of("PNG", "RGB")
    header = source[: 8 + 25]
    true = {b"tIME": b"\x07\xea\x01\x02\x03\x04\x05", b"bKGD": bytes(6), b"sCAL": b"\x011\x001", b"prVt": b"private"}
    extra = {b"iDOT": bytes(28), **true}
    chunks = b"".join(
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        for kind, body in extra.items()
    )
    source = header + chunks + source[len(header) :]
    after = encode(decode(source).pixels, source, picture=decode(source), software=SOFTWARE)
    assert b"iDOT" not in after and all(kind + body in after for kind, body in true.items())


def test_a_marker_without_a_length_does_not_hide_metadata() -> None:
    file = file_of(Image.fromarray(random_pixels(7, 11, 3)), "JPEG", exif=exif_of_a_camera(6))
    at = file.index(b"\xff\xe1")
    source = file[:at] + b"\xff\xd0" + file[at:]
    picture = decode(source)
    assert picture.orientation == 6
    bare = without_metadata(source, picture=picture)
    assert b"Camera" not in bare and b"GPS" not in bare and np.array_equal(decode(bare).pixels, picture.pixels)
    assert encode(picture.pixels, source + b"film", picture=picture, software=SOFTWARE).endswith(b"\xff\xd9film")


def test_bytes_between_the_blocks_of_a_gif_do_not_end_it() -> None:
    source = image_of("GIF", "P")
    start = 13 + 3 * 2 ** ((source[10] & 7) + 1)
    odd = source[:start] + b"\0" + source[start:]
    picture = decode(odd)
    assert np.array_equal(picture.pixels, decode(source).pixels)
    assert without_metadata(odd, picture=picture) == without_metadata(source, picture=picture)


def test_metadata_of_a_bare_photograph_is_nothing_to_take_away() -> None:
    for name in ("JPEG", "WEBP", "BMP"):
        source = image_of(name, "RGB")
        assert without_metadata(source, picture=decode(source)) == source


@pytest.mark.parametrize(("value", "kind"), [(9, 3), (300, 3), (0, 3), (6, 2)], ids=str)
def test_an_orientation_that_means_nothing_is_none(value: int, kind: int) -> None:
    """Out of range, or of type ASCII (2) instead of SHORT (3)."""
    file = io.BytesIO()
    Image.fromarray(smooth_pixels(11, 7)).save(file, "TIFF", tiffinfo={274: value})
    tiff = file.getvalue().replace(struct.pack("<HHI", 274, 3, 1), struct.pack("<HHI", 274, kind, 1))
    assert decode(tiff).orientation is None


def test_texts_with_the_names_of_settings_are_texts() -> None:
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    for name in ("xmp", "transparency", "Raw profile type exif"):
        texts.add_text(name, "\n\n\nno hex")
    source = image_of("PNG", "RGB", pnginfo=texts)
    for name in ("xmp", "Raw profile type exif"):
        assert opened(restored(source)).info[name] == "\n\n\nno hex"


def test_everything_else_in_the_exif_stays_where_it_was() -> None:
    exif = exif_of_a_camera(6)
    after = opened(restored(image_of("JPEG", "RGB", exif=exif))).info["exif"]
    assert after[14 : len(exif)] == exif[14:]  # but for the offset of the first directory
    assert len(after) < len(exif) + 200


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_a_damaged_exif_is_carried_as_it_is() -> None:
    for broken in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\1", b"Exif\0\0nothing"):
        for name in ("JPEG", "WEBP"):
            source = image_of(name, "RGB", exif=broken)
            after = opened(restored(source)).info.get("exif", b"")
            assert broken == b"Exif\0\0" or after.removeprefix(b"Exif\0\0") == broken.removeprefix(b"Exif\0\0")
            assert "exif" not in opened(restored(source, strip_metadata=True)).info


def test_an_exif_too_long_for_the_note_is_kept_without_it() -> None:
    exif = Image.Exif()
    exif[271] = "x" * 65_400
    source = image_of("JPEG", "RGB", exif=exif.tobytes())
    assert opened(restored(source)).info["exif"] == opened(source).info["exif"]


# --- Compression -----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(quality=st.integers(1, 100), subsampling=st.integers(0, 2), progressive=st.booleans())
def test_jpeg_tables_and_sampling_are_the_sources(quality: int, subsampling: int, progressive: bool) -> None:
    source = image_of("JPEG", "RGB", 33, 31, quality=quality, subsampling=subsampling, progressive=progressive)
    before, after = opened(source), opened(restored(source))
    assert isinstance(before, JpegImageFile) and isinstance(after, JpegImageFile)
    assert after.quantization == before.quantization and get_sampling(after) == get_sampling(before) == subsampling
    assert after.info.get("progressive", 0) == before.info.get("progressive", 0) == int(progressive)


def test_jpeg_with_a_table_for_each_channel_keeps_them_in_order() -> None:
    tables = [[value] * 64 for value in (3, 9, 5)]
    after = opened(restored(image_of("JPEG", "RGB", qtables=tables)))
    assert [after.quantization[layer[3]][0] for layer in after.layer] == [3, 9, 5]


def test_grey_and_rgb_jpegs_keep_their_table() -> None:
    source = image_of("JPEG", "L", quality=40)
    assert opened(restored(source)).quantization == opened(source).quantization
    after = opened(restored(image_of("JPEG", "RGB", keep_rgb=True)))
    assert after.info.get("adobe_transform") == 0


def test_rgb_jpeg_with_fewer_samples_of_some_channels_is_written_with_all() -> None:
    source = bytearray(image_of("JPEG", "RGB", keep_rgb=True))
    source[source.index(b"\xff\xc0") + 11] = 0x22  # of red alone there are as many samples as pixels
    after = opened(restored(bytes(source)))
    assert after.info.get("adobe_transform") == 0 and after.size == opened(bytes(source)).size


@pytest.mark.parametrize("unit", [0, 1, 2])
def test_jpeg_density_keeps_its_unit(unit: int) -> None:
    source = bytearray(image_of("JPEG", "RGB"))
    source[13:18] = struct.pack(">BHH", unit, 59, 118)
    after = opened(restored(bytes(source)))
    assert (after.info["jfif_unit"], after.info["jfif_density"]) == (unit, (59, 118))


@pytest.mark.parametrize("junk", [b"", b"\0\x01junk\xff\xff"])
def test_metadata_is_taken_out_of_a_jpeg_with_bytes_between_its_segments_and_without_an_end(junk: bytes) -> None:
    source = image_of("JPEG", "RGB", comment=b"Ann at home", exif=exif_of_a_camera(6))
    source = source[:20] + junk + source[20:].removesuffix(b"\xff\xd9") + bytes(60)
    bare = without_metadata(source, picture=decode(source))
    assert b"Ann" not in bare and opened(bare).getexif()[274] == 6
    assert np.array_equal(decode(bare).pixels, decode(source).pixels)


def test_jpeg_density_comment_and_iptc_are_kept() -> None:
    iptc = b"\xff\xed" + struct.pack(">H", 2 + 20) + b"Photoshop 3.0\0caption"[:20]
    source = image_of("JPEG", "RGB", dpi=(300, 200), comment=b"hello", extra=iptc)
    after = opened(restored(source))
    assert after.info["dpi"] == (300, 200) and after.info["comment"] == b"hello"
    assert ("APP13", iptc[4:]) in after.applist
    stripped = opened(restored(source, strip_metadata=True))
    assert "comment" not in stripped.info and "APP13" not in stripped.app


def test_webp_stays_lossless_or_becomes_no_coarser() -> None:
    lossless, lossy = image_of("WEBP", "RGBA"), image_of("WEBP", "RGBA", quality=50)
    assert b"VP8L" in restored(lossless) and b"VP8L" in restored(image_of("WEBP", "RGB", exif=exif_of_a_camera(1)))
    assert b"VP8 " in restored(lossy) and b"VP8L" not in restored(lossy)
    assert np.array_equal(decode(restored(lossy)).alpha, decode(lossy).alpha)  # type: ignore[arg-type]


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("quality", [None, 50])
def test_webp_with_alpha_stays_so_where_all_is_opaque(quality: int | None, strip: bool) -> None:
    options = {} if quality is None else {"quality": quality}
    marked = bytearray(image_of("WEBP", "RGBA", exif=exif_of_a_camera(1), **options))
    picture = decode(bytes(marked))
    opaque = np.full((picture.height, picture.width), 255, np.uint8)
    after = encode(
        255 - picture.pixels,
        bytes(marked),
        picture=replace(picture, alpha=opaque),
        software=SOFTWARE,
        strip_metadata=strip,
    )
    assert opened(after).mode == "RGBA" and np.array_equal(decode(after).alpha, opaque)  # type: ignore[arg-type]
    assert difference(decode(after).pixels, 255 - picture.pixels) <= (0 if quality is None else 255)


def test_png_chunks_are_carried_byte_for_byte() -> None:
    info = PngInfo()
    info.add_text("Title", "Grüße")
    info.add_itxt("Comment", "größer", lang="de")
    info.add(b"gAMA", struct.pack(">I", 45455))
    info.add(b"vpAg", b"private", after_idat=True)
    source = image_of("PNG", "RGBA", pnginfo=info, dpi=(300, 300))
    after = restored(source)
    image = opened(after)
    assert image.info["Title"] == "Grüße" and image.info["Comment"] == "größer" and image.info["gamma"] == 0.45455
    assert image.info["dpi"] == opened(source).info["dpi"] and b"vpAgprivate" in after
    stripped = opened(restored(source, strip_metadata=True))
    assert "Title" not in stripped.info and stripped.info["gamma"] == 0.45455


@pytest.mark.parametrize("mode", ["RGB", "P", "I;16"])
def test_a_png_whose_header_is_not_its_first_chunk_keeps_its_kind(mode: str) -> None:
    image = Image.fromarray(random_pixels(11, 7, 3)).convert("L" if mode == "I;16" else mode)
    source = file_of(image.convert("I;16") if mode == "I;16" else image, "PNG")
    at = source.index(b"IDAT") - 4
    other = png_of((b"IHDR", struct.pack(">IIBBBBB", 3, 3, 1, 0, 0, 0, 0)))[8:]
    moved = source[:8] + png_of((b"tEXt", b"Title\0a"))[8:] + other + source[8:at] + source[at:]
    picture = decode(moved)
    assert picture.mode == mode and np.array_equal(picture.pixels, decode(source).pixels)
    after = restored(moved)
    assert opened(after).mode == mode and opened(after).text == {"Title": "a"}  # type: ignore[attr-defined]
    assert after[24:26] == source[24:26]


def test_png_exif_of_older_imagemagick_counts() -> None:
    exif, info = exif_of_a_camera(6), PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n", zip=True)
    source = image_of("PNG", "RGB", pnginfo=info)
    check_exif(restored(source), 6)
    assert dict(opened(restored(source, strip_metadata=True)).getexif()) == {274: 6}


@pytest.mark.parametrize("dpi", [(300, 300), (0, 0)])
def test_bmp_keeps_its_resolution(dpi: tuple[int, int]) -> None:
    source = image_of("BMP", "RGB", dpi=dpi)
    assert opened(restored(source)).info.get("dpi") == opened(source).info.get("dpi")


def full_tiff(compression: str, prefix: bytes) -> bytes:
    """A TIFF with tags of all kinds, Exif and GPS directories, in either byte order, any compression."""

    pixels = file_of(Image.fromarray(smooth_pixels(11, 7)), "TIFF", compression=compression, icc_profile=ICC)
    ifd = ImageFileDirectory_v2(prefix=prefix)
    ifd[271], ifd[274], ifd[305], ifd[700], ifd[65001] = "Camera", 6, "Editor 1.0", XMP, (1, 2, 3)
    ifd[282], ifd[283], ifd[296] = IFDRational(300), IFDRational(300), 2
    ifd[34665] = {37500: b"maker note" * 30, 33434: IFDRational(1, 100)}
    ifd[34853] = {1: "N", 2: (IFDRational(48), IFDRational(8), IFDRational(14))}
    block = (b"II*\0\x08\0\0\0" if prefix == b"II" else b"MM\0*\0\0\0\x08") + ifd.tobytes(8)
    tiff = bytearray(pixels)
    layout, _ = exif_blocks.read_ifd(tiff, exif_blocks.first_ifd(tiff))
    tags = [exif_blocks.moved(entry, block, tiff) for entry in exif_blocks.read_ifd(block, 8)[0]]
    exif_blocks.write_first_ifd(tiff, [*layout, *tags], 0)
    return bytes(tiff)


@pytest.mark.parametrize("prefix", [b"II", b"MM"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg"])
def test_tiff_tags_are_kept_at_every_compression(compression: str, prefix: bytes) -> None:
    source = full_tiff(compression, prefix)
    picture = decode(source)
    assert (picture.width, picture.height) == (7, 11)  # stored, though Pillow turns TIFF
    if compression != "jpeg":
        assert np.array_equal(picture.pixels, smooth_pixels(11, 7))
    after = restored(source, picture.pixels)
    check_exif(after, 6)
    image = Image.open(io.BytesIO(after))
    assert image.info["compression"] == (compression if compression != "jpeg" else "tiff_adobe_deflate")
    assert image.info["icc_profile"] == ICC and image.info["xmp"] == XMP and image.info["dpi"] == (300, 300)
    assert image.tag_v2[65001] == (1, 2, 3)  # type: ignore[attr-defined]
    assert np.array_equal(np.asarray(opened(after)), np.asarray(opened(source)))  # Pillow shows both the same way up
    stripped = Image.open(io.BytesIO(restored(source, strip_metadata=True)))
    assert stripped.getexif()[274] == 6 and stripped.info["icc_profile"] == ICC and stripped.info["dpi"] == (300, 300)
    assert not {271, 305, 700, 34665, 34853, 65001} & set(stripped.getexif())
    bare = Image.open(io.BytesIO(without_metadata(source, picture=picture)))
    assert bare.getexif()[274] == 6 and bare.info["icc_profile"] == ICC and bare.info["dpi"] == (300, 300)
    assert not {271, 305, 700, 34665, 34853, 65001} & set(bare.getexif())
    assert bare.info["compression"] == compression
    assert np.array_equal(np.asarray(bare), np.asarray(Image.open(io.BytesIO(source))))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("damage", [65001, 34665, 33434])
def test_a_damaged_tag_of_a_tiff_is_left_out(damage: int) -> None:
    source = bytearray(full_tiff("tiff_lzw", b"II"))
    at, entry = 0, struct.pack("<H", damage)
    while source[at + 2 : at + 4] not in (b"\3\0", b"\4\0", b"\5\0"):
        at = source.index(entry, at + 1)
    source[at + 8 : at + 12] = b"\xff\xff\xff\x7f"  # where its value is: beyond the file
    picture = decode(bytes(source))
    after = restored(bytes(source), picture.pixels)
    tags = Image.open(io.BytesIO(after)).getexif()
    assert tags[305] == SOFTWARE and tags[274] == 6 and (65001 in tags) == (damage != 65001)
    assert (37500 in tags.get_ifd(34665)) == (damage != 34665)
    assert np.array_equal(decode(after).pixels, picture.pixels)
    bare = without_metadata(bytes(source), picture=picture)
    assert decode(bare).orientation == 6 and np.array_equal(decode(bare).pixels, picture.pixels)


def test_metadata_of_a_tiff_of_old_style_jpeg_is_not_taken_out() -> None:
    source = file_of(Image.fromarray(smooth_pixels(11, 7)), "TIFF", tiffinfo={519: (8, 8, 8)})
    with pytest.raises(ItemError, match=r"^encode: the metadata of this TIFF cannot be taken out \(its pixels are old"):
        without_metadata(source, picture=decode(source))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_of_every_orientation_is_shown_the_same_way_up(orientation: int) -> None:
    source = file_of(Image.fromarray(smooth_pixels(11, 7)), "TIFF", tiffinfo={274: orientation})
    picture = decode(source)
    assert np.array_equal(picture.pixels, smooth_pixels(11, 7))
    assert np.array_equal(np.asarray(opened(restored(source, picture.pixels))), np.asarray(opened(source)))


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_tiff_whose_xmp_alone_says_how_it_is_turned_stays_as_it_is_stored(orientation: int) -> None:
    xmp = (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    ).encode()
    pixels = smooth_pixels(20, 30)
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="rgb", metadata=None, extratags=[(700, 1, len(xmp), xmp, True)])
    source = file.getvalue()
    picture = decode(source)
    assert np.array_equal(picture.pixels, pixels) and (picture.width, picture.height) == (30, 20)
    after = restored(source, pixels)
    assert np.array_equal(tifffile.imread(io.BytesIO(after)), pixels) and xmp in after


def test_a_16_bit_tiff_where_0_is_white_is_refused() -> None:
    deep = np.arange(6 * 8, dtype=np.uint16).reshape(6, 8) * 999
    file = io.BytesIO()
    tifffile.imwrite(file, deep, photometric="miniswhite", metadata=None)
    assert "where 0 is white" in failing(file.getvalue(), "unsupported")
    shallow = io.BytesIO()
    tifffile.imwrite(shallow, (deep >> 8).astype(np.uint8), photometric="miniswhite", metadata=None)
    picture = decode(shallow.getvalue())
    assert np.array_equal(picture.pixels[:, :, 0], 255 - (deep >> 8))
    again = decode(restored(shallow.getvalue(), picture.pixels))
    assert np.array_equal(again.pixels, picture.pixels)


def test_what_pillow_cannot_write_is_an_encode_error() -> None:
    source = image_of("JPEG", "RGB")
    segment = b"Exif\0\0MM\0*\0\0\0\x08" + bytes(40_000)
    segment = b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
    with pytest.raises(ItemError, match=r"^encode: cannot write as JPEG: EXIF data is too long$"):
        restored(source[:2] + segment + segment + source[2:])  # EXIF over two segments


# --- Small helpers ---------------------------------------------------------------------------------------------------


def test_thumbnails() -> None:
    pixels = smooth_pixels(30, 60)
    sizes = [opened(thumbnail_jpeg(pixels, side)).size for side in (100, 60, 20, 1)]
    assert sizes == [(60, 30), (60, 30), (20, 10), (1, 1)]
    assert np.abs(np.asarray(opened(thumbnail_jpeg(pixels[:, ::2], 60))).astype(int) - pixels[:, ::2]).max() < 30


def test_importing_stays_light() -> None:
    heavy = {"torch", "ray", "boto3", "pyarrow", "matplotlib"}
    code = f"import sys, restore_core.codec; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_avif_is_the_same_file_on_a_machine_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its encoder cuts large pictures into as many parts as it may use threads, which by default is the machine's."""
    smooth = np.asarray(Image.fromarray(random_pixels(9, 9, 1)).resize((4000, 3000), Image.Resampling.BICUBIC))
    source = file_of(Image.fromarray(smooth), "AVIF", speed=10)
    picture = decode(source)
    files = set()
    for threads in (1, 8):
        monkeypatch.setattr("PIL.AvifImagePlugin._get_default_max_threads", lambda threads=threads: threads)
        files.add(encode(picture.pixels, source, picture=picture, software=SOFTWARE))
    assert len(files) == 1


def test_pixels_that_take_more_memory_count_more() -> None:
    budget = 1000 * 1000
    for name, mode, times in (("PNG", "RGB", 34), ("PNG", "RGBA", 54), ("WEBP", "RGB", 72), ("TIFF", "RGBA", 54)):
        side = int((budget * 34 / times) ** 0.5)
        assert decode(image_of(name, mode, side, side), max_pixels=budget).width == side
        message = failing(image_of(name, mode, side + 1, side + 1), "too_large", max_pixels=budget)
        assert message.startswith(f"{side + 1} x {side + 1} pixels")
        assert ("which count as" in message) == (times > 34)


# --- Odd kinds ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
@pytest.mark.parametrize("link", [1, -4, 100, 0xFFFFFFFF])
def test_a_damaged_page_behind_the_first_does_not_spoil_that(link: int) -> None:
    source = bytearray(image_of("TIFF", "RGB"))
    first = int.from_bytes(source[4:8], "little")
    place = first + 2 + 12 * int.from_bytes(source[first : first + 2], "little")
    source[place : place + 4] = (link if abs(link) == 1 or link > 2**31 else len(source) + link).to_bytes(4, "little")
    assert "TIFF with damaged frames or pages behind the first" in failing(bytes(source), "unsupported")
    assert np.array_equal(decode(bytes(source), frames="first").pixels, decode(image_of("TIFF", "RGB")).pixels)


def test_metadata_is_not_taken_out_where_that_would_change_the_picture() -> None:
    tiff = bytearray(image_of("TIFF", "RGB"))
    first = int.from_bytes(tiff[4:8], "little")
    for at in range(first + 2, first + 2 + 12 * int.from_bytes(tiff[first : first + 2], "little"), 12):
        if int.from_bytes(tiff[at : at + 2], "little") == 279:  # Pillow does not look at the sizes of strips
            tiff[at + 8 : at + 12] = (9).to_bytes(4, "little")
    picture = decode(bytes(tiff))
    with pytest.raises(ItemError, match=r"encode: the metadata of this TIFF cannot be taken out \(.*\); convert it"):
        without_metadata(bytes(tiff), picture=picture)


def test_a_marker_that_means_nothing_within_a_scan_stays() -> None:
    source = image_of("JPEG", "RGB", 40, 40, restart_marker_rows=1)
    at = source.index(b"\xff\xd0")
    odd = source[:at] + b"\xff\x01" + source[at:]
    picture = decode(odd)
    assert np.array_equal(decode(without_metadata(odd, picture=picture)).pixels, picture.pixels)


def test_whole_files_of_kinds_that_pillow_lacks_are_unsupported() -> None:
    bmp = bytearray(image_of("BMP", "RGB"))
    bmp[28] = 2
    assert failing(bytes(bmp), "unsupported") == "Unsupported BMP pixel depth (2); convert it to PNG first"
    jpeg = bytearray(image_of("JPEG", "RGB"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 4] = 12
    assert failing(bytes(jpeg), "unsupported") == "JPEG of 12 bits a sample; convert it to JPEG, PNG or TIFF first"
    jpeg[frame + 1], jpeg[frame + 4] = 0xC3, 8
    assert failing(bytes(jpeg), "unsupported") == "lossless JPEG; convert it to PNG or TIFF first"
    tiff = image_of("TIFF", "RGB").replace(b"\x06\x01\x03\0\1\0\0\0\2\0", b"\x06\x01\x03\0\1\0\0\0\x0a\0")
    assert failing(tiff, "unsupported").startswith("TIFF of a kind that cannot be read; convert it")
    avif = image_of("AVIF", "RGB").replace(b"pixi", b"pasp")  # both hold eight bytes
    assert failing(avif, "unsupported") == "AVIF with pixels that are not square; convert it to PNG first"


def test_bmp_with_alpha_in_sixteen_bits_is_refused() -> None:
    masks = struct.pack("<4I", 0x7C00, 0x3E0, 0x1F, 0x8000)
    header = struct.pack("<IiiHHIIiiII", 124, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0) + masks
    header = header.ljust(124, b"\0")
    data = struct.pack("<2sIII", b"BM", 14 + 124 + 8, 0, 138) + header + b"\x5f\x82\x1f\x03" * 2
    assert failing(data, "unsupported") == "BMP with an alpha channel that cannot be read; convert it to PNG first"


def test_jpeg_is_rgb_only_where_libjpeg_takes_it_so() -> None:
    plain = image_of("JPEG", "RGB", 40, 40, subsampling=2)
    adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")
    source = plain[:20] + adobe + plain[20:]  # JFIF, which wins
    after = opened(restored(source))
    assert isinstance(after, JpegImageFile)
    assert get_sampling(after) == 2 and after.quantization == opened(source).quantization  # type: ignore[attr-defined]
    bare = plain[:2] + plain[20:]
    for start in (b"\xff\xc0", b"\xff\xda"):
        at = bare.index(start) + (10 if start == b"\xff\xc0" else 5)
        step = 3 if start == b"\xff\xc0" else 2
        for number, name in enumerate(b"RGB"):
            place = at + step * number
            bare = bare[:place] + bytes([name]) + bare[place + 1 :]
    after = opened(restored(bare))
    assert [layer[0] for layer in after.layer] == [*b"RGB"]  # type: ignore[attr-defined]


def test_pixels_beyond_the_palette_do_not_move_the_others() -> None:
    colours = random_pixels(32, 3, 1)[:, :3]
    index = np.random.default_rng(5).integers(0, 40, (12, 16), np.uint8)
    table = np.concatenate([colours, np.zeros((32, 1), np.uint8)], 1).tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, 16, 12, 1, 8, 0, index.size, 0, 0, 32, 0)
    start = 14 + len(header) + len(table)
    data = struct.pack("<2sIII", b"BM", start + index.size, 0, start) + header + table + index.tobytes()
    picture = decode(data)
    changed = picture.pixels.copy()
    changed[0, 0] = 255 - changed[0, 0]
    after = decode(encode(changed, data, picture=picture, software=SOFTWARE)).pixels
    assert np.array_equal(after[1:], picture.pixels[1:]) and np.array_equal(after[0, 1:], picture.pixels[0, 1:])

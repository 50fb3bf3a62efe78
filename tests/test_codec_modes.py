"""Formats and modes beyond 8-bit grey and RGB: same mode and depth out, what did not change is kept."""

import io
import struct
import zlib

import numpy as np
import pytest
from photos import png_of
from PIL import Image, ImageCms, ImageOps

from restore_core.codec import colour, decode, encode, without_metadata
from restore_core.errors import ItemError

SOFTWARE = "restore_core (model tiny)"
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
HEIGHT, WIDTH = 24, 40
AREA = np.s_[4:12, 6:20]
"""What the tests change; the rest has to stay."""
REST = np.ones((HEIGHT, WIDTH), bool)
REST[AREA] = False


def smooth(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 255 - x * 128 // (width - 1)], -1).astype(
        np.uint8
    )


def alpha() -> np.ndarray:
    return np.repeat(np.linspace(0, 255, WIDTH).astype(np.uint8)[None], HEIGHT, axis=0)


def saved(image: Image.Image, name: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def chunks_of(png: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + size]))
        at += size + 12
    return found


def changed(source: bytes, colour: tuple[int, int, int] = (200, 120, 40), *, strip_metadata: bool = False) -> bytes:
    """The file with `AREA` in another colour."""
    picture = decode(source)
    pixels = picture.pixels.copy()
    pixels[AREA] = colour
    return encode(pixels, source, picture=picture, software=SOFTWARE, strip_metadata=strip_metadata)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# --- 16 bits a channel -----------------------------------------------------------------------------------------------


def deep_values(channels: int) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 65_536, (HEIGHT, WIDTH, channels), np.uint16)


def deep_png(values: np.ndarray, *extra: tuple[bytes, bytes]) -> bytes:
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return png_of((b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def deep_png_values(png: bytes) -> np.ndarray:
    """By hand, with the two filters that are in use here: none, and up."""
    at, packed = 8, b""
    while at < len(png):
        size = struct.unpack_from(">I", png, at)[0]
        if png[at + 4 : at + 8] == b"IHDR":
            width, height, depth, colour = struct.unpack_from(">IIBB", png, at + 8)
        if png[at + 4 : at + 8] == b"IDAT":
            packed += png[at + 8 : at + 8 + size]
        at += size + 12
    assert depth == 16
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, -1)
    rows = np.zeros((height, lines.shape[1] - 1), np.uint8)
    for index, line in enumerate(lines):
        assert line[0] in (0, 2)
        rows[index] = line[1:] + (rows[index - 1] if line[0] == 2 and index else 0)
    return rows.copy().view(">u2").reshape(height, width, {2: 3, 6: 4}[colour]).astype(np.uint16)


def deep_tiff(values: np.ndarray, **options: object) -> bytes:
    import tifffile

    file = io.BytesIO()
    extra = ["unassalpha"] if values.shape[2] == 4 else None
    tifffile.imwrite(file, values, photometric="rgb", extrasamples=extra, metadata=None, **options)
    return file.getvalue()


def tiff_values(tiff: bytes) -> np.ndarray:
    import tifffile

    return tifffile.imread(io.BytesIO(tiff))


DEEP = {
    "PNG RGB": (deep_png(deep_values(3)), deep_png_values, 3),
    "PNG RGBA": (deep_png(deep_values(4)), deep_png_values, 4),
    "TIFF RGB": (deep_tiff(deep_values(3)), tiff_values, 3),
    "TIFF RGB big-endian": (deep_tiff(deep_values(3), byteorder=">"), tiff_values, 3),
    "TIFF RGB deflate": (deep_tiff(deep_values(3), compression="zlib", rowsperstrip=5), tiff_values, 3),
    "TIFF RGB deflate big-endian": (deep_tiff(deep_values(3), byteorder=">", compression="zlib"), tiff_values, 3),
    "TIFF RGBA": (deep_tiff(deep_values(4)), tiff_values, 4),
}


@pytest.mark.parametrize("name", DEEP)
def test_16_bit_colour_keeps_all_bits_where_nothing_changes(name: str) -> None:
    source, values_of, channels = DEEP[name]
    picture = decode(source)
    truth = deep_values(channels)
    assert picture.mode == "RGBA"[:channels] and picture.native is not None
    assert np.array_equal(picture.native, truth)
    assert np.array_equal(picture.pixels, np.round(truth[:, :, :3] / 257).astype(np.uint8))
    after = values_of(changed(source))
    assert after.dtype == np.uint16 and np.array_equal(after[REST], truth[REST])
    assert difference(after[AREA][..., :3], 257 * np.array([200, 120, 40])) <= 128
    assert np.array_equal(after[..., 3:], truth[..., 3:])  # alpha untouched
    assert np.array_equal(values_of(without_metadata(source, picture=picture)), truth)


def test_16_bit_colour_keeps_its_profile_and_way_up() -> None:
    source = deep_png(
        deep_values(3), (b"iCCP", b"sRGB\0\0" + zlib.compress(ICC)), (b"pHYs", struct.pack(">IIB", 300, 300, 1))
    )
    after = opened(changed(source))
    assert after.info["icc_profile"] == ICC and after.info["dpi"] == pytest.approx((7.62, 7.62))
    tiff = opened(changed(deep_tiff(deep_values(3), extratags=[(274, 3, 1, 6, True)], iccprofile=ICC)))
    assert tiff.info["icc_profile"] == ICC and decode(changed(DEEP["TIFF RGB"][0])).native is not None
    turned = deep_tiff(deep_values(3), extratags=[(274, 3, 1, 6, True)])
    picture = decode(turned)
    assert (picture.orientation, picture.width, picture.height) == (6, WIDTH, HEIGHT)
    assert np.array_equal(picture.native, deep_values(3))
    assert decode(changed(turned)).orientation == 6
    assert np.array_equal(tiff_values(changed(turned))[REST], deep_values(3)[REST])


# --- Fewer bits than 8 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_png_of_few_bits_stays_so(bits: int) -> None:
    steps = np.asarray(Image.fromarray(smooth()).convert("L")) >> (8 - bits)
    image = Image.fromarray(steps)
    image.putpalette(bytes(3 * 2**bits))
    header, _, *others = chunks_of(saved(image, "PNG", bits=bits))
    source = png_of((b"IHDR", header[1][:9] + b"\0" + header[1][10:]), *others)
    before, after = opened(source), opened(changed(source))
    assert before.mode == after.mode == "L" and changed(source)[24:26] == source[24:26] == bytes([bits, 0])
    assert np.array_equal(np.asarray(before)[REST], np.asarray(after)[REST])
    assert difference(np.asarray(after)[AREA], np.array(135)) <= 128 // (2**bits - 1)


def bmp(bits: int, rows: bytes, *, compression: int = 0, table: bytes = b"", size: int = 40) -> bytes:
    """A file of `WIDTH` x `HEIGHT` pixels; the masks of a long header, and a short one's colours, are in `table`."""
    header = struct.pack("<IiiHHIIiiII", size, WIDTH, HEIGHT, 1, bits, compression, len(rows), 3780, 1890, 0, 0)
    if size == 12:
        header = struct.pack("<IHHHH", size, WIDTH, HEIGHT, 1, bits)
    start = 14 + len(header) + len(table)
    return struct.pack("<2sIII", b"BM", start + len(rows), 0, start) + header + table + rows


NOISE = np.random.default_rng(3).integers(0, 256, 4 * WIDTH * HEIGHT, np.uint8).tobytes()
TABLE = bytes(value for index in range(256) for value in (index * 15 % 256, 255 - index, index // 2, 0))
V4 = bytes(108 - 56)
BMPS = {
    "4 bits": bmp(4, NOISE[: WIDTH // 2 * HEIGHT], table=TABLE[: 4 * 16]),
    "4 bits, OS/2": bmp(4, NOISE[: WIDTH // 2 * HEIGHT], table=TABLE[: 3 * 16], size=12),
    "16 bits": bmp(16, NOISE[: 2 * WIDTH * HEIGHT]),
    "16 bits, 6 of them green": bmp(
        16, NOISE[: 2 * WIDTH * HEIGHT], compression=3, table=struct.pack("<3I", 0xF800, 0x7E0, 0x1F)
    ),
    "24 bits, OS/2": bmp(24, NOISE[: 3 * WIDTH * HEIGHT], size=12),
    "32 bits": bmp(32, NOISE),
    "32 bits, red last": bmp(
        32, NOISE, compression=3, table=struct.pack("<4I", 0xFF, 0xFF00, 0xFF0000, 0xFF000000) + V4, size=108
    ),
}


@pytest.mark.parametrize("name", BMPS)
def test_bmp_of_every_depth_keeps_it_and_what_does_not_change(name: str) -> None:
    source = BMPS[name]
    picture = decode(source)
    before, after = opened(source), opened(changed(source))
    assert before.mode == after.mode and before.info.get("dpi") == after.info.get("dpi")
    assert changed(source)[14:18] == source[14:18]
    assert changed(source)[24:26] == source[24:26] and (source[14] == 12 or changed(source)[28:30] == source[28:30])
    assert int.from_bytes(changed(source)[2:6], "little") == len(changed(source))
    if before.mode == "P":
        again = encode(picture.pixels, source, picture=picture, software=SOFTWARE)
        assert np.array_equal(decode(again).pixels, picture.pixels)
    else:
        assert np.array_equal(np.asarray(before)[REST], np.asarray(after)[REST])
        assert difference(np.asarray(after)[AREA][..., :3], np.array([200, 120, 40])) <= (4 if "16" in name else 0)
    if picture.alpha is not None:
        assert np.array_equal(np.asarray(before)[..., 3], np.asarray(after)[..., 3])


def test_the_icc_profile_of_a_bmp_stays() -> None:
    tail = bytearray(124 - 40)
    struct.pack_into("<4I4s", tail, 0, 0xFF0000, 0xFF00, 0xFF, 0, b"DEBM")
    struct.pack_into("<II", tail, 112 - 40, 124 + len(NOISE), len(ICC))
    after = changed(bmp(32, NOISE, table=bytes(tail), size=124) + ICC)
    at, size = struct.unpack_from("<II", after, 14 + 112)
    assert after[14 + at : 14 + at + size] == ICC and opened(after).mode == "RGB"


# --- CMYK and LAB ----------------------------------------------------------------------------------------------------


def inks() -> np.ndarray:
    values = np.random.default_rng(5).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 4), np.uint8)
    return np.asarray(Image.frombytes("CMYK", (WIDTH // 8, HEIGHT // 8), values.tobytes()).resize((WIDTH, HEIGHT)))


def test_cmyk_tiff_keeps_its_inks_where_nothing_changes() -> None:
    source = saved(Image.frombytes("CMYK", (WIDTH, HEIGHT), inks().tobytes()), "TIFF", compression="tiff_lzw")
    after = opened(changed(source))
    assert after.mode == "CMYK" and np.array_equal(np.asarray(after)[REST], inks()[REST])
    assert difference(np.asarray(after.convert("RGB"))[AREA], np.array([200, 120, 40])) <= 2
    black = np.asarray(after)[AREA][..., 3]
    assert (black <= inks()[AREA][..., 3]).all()  # lighter where it has to be, never more


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (255, 0, 0), (1, 2, 3)])
def test_every_colour_can_be_printed(colour: tuple[int, int, int]) -> None:
    source = saved(Image.frombytes("CMYK", (WIDTH, HEIGHT), inks().tobytes()), "TIFF")
    assert difference(np.asarray(opened(changed(source, colour)).convert("RGB"))[AREA], np.array(colour)) <= 2


def test_cmyk_jpeg_stays_adobes() -> None:
    source = saved(Image.frombytes("CMYK", (WIDTH, HEIGHT), inks().tobytes()), "JPEG", quality=95)
    before, after = opened(source), opened(changed(source))
    assert after.mode == "CMYK" and after.info["adobe_transform"] == before.info["adobe_transform"]
    far = np.ones((HEIGHT, WIDTH), bool)
    far[:16, :24] = False  # blocks of 8 around the change
    assert difference(np.asarray(after)[far], np.asarray(before)[far]) <= 6


def test_cmyk_jpeg_that_may_or_may_not_be_inverted_is_refused() -> None:
    source = saved(Image.frombytes("CMYK", (WIDTH, HEIGHT), inks().tobytes()), "JPEG", quality=95)
    at = source.index(b"Adobe") - 4
    bare = source[:at] + source[at + 2 + struct.unpack_from(">H", source, at + 2)[0] :]
    with pytest.raises(ItemError, match="unsupported: CMYK JPEG that does not say whether its inks are inverted"):
        decode(bare)


def test_lab_keeps_its_values_where_nothing_changes() -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    pixels = smooth() // 2 + 64  # colours that LAB and sRGB both know
    lab = to_lab.apply(Image.fromarray(pixels))
    source = saved(lab, "TIFF", compression="tiff_adobe_deflate")
    picture = decode(source)
    assert picture.mode == "LAB" and difference(picture.pixels, pixels) <= 14  # one step of 8-bit LAB
    after = opened(changed(source))
    assert after.mode == "LAB" and np.array_equal(np.asarray(after)[REST], np.asarray(lab)[REST])
    assert difference(decode(changed(source)).pixels[AREA], np.array([200, 120, 40])) <= 6


# --- Palettes and transparent colours --------------------------------------------------------------------------------


def palette_image(colours: int) -> Image.Image:
    return Image.fromarray(smooth()).quantize(colours)


@pytest.mark.parametrize(
    ("name", "colours", "options"),
    [("PNG", 256, {}), ("PNG", 16, {"bits": 4}), ("PNG", 4, {"bits": 2}),
     ("GIF", 256, {}), ("BMP", 256, {}), ("TIFF", 256, {})],
    ids=str,
)  # fmt: skip
def test_a_palette_stays_a_palette_of_the_same_depth(name: str, colours: int, options: dict[str, object]) -> None:
    source = saved(palette_image(colours), name, **options)
    before, after = opened(source), opened(changed(source))
    assert (before.format, before.mode, before.size) == (after.format, after.mode, after.size) and after.mode == "P"
    assert np.asarray(after).max() < colours
    if name == "PNG":
        assert changed(source)[24:26] == source[24:26]
    pixels = np.asarray(after.convert("RGB")).astype(int)
    limit = {256: 24, 16: 60, 4: 130}[colours]
    assert np.abs(pixels[REST] - np.asarray(before.convert("RGB"))[REST]).mean() <= limit / 4
    assert np.abs(pixels[AREA].mean(axis=(0, 1)) - [200, 120, 40]).max() <= limit


@pytest.fixture(params=[2**24, 64], ids=["one row", "rows"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many pixels, as Pillow is handed those that are looked up together."""
    monkeypatch.setattr(colour, "_ROW", request.param)


def test_more_colours_than_pillow_takes_in_a_row() -> None:
    """One that was: a palette of 100 megapixels."""
    colours = np.zeros((90_000_000, 3), np.uint8)
    colours[-1] = 7
    values = np.asarray(colour._image_of(colours)).reshape(-1, 3)
    assert (values[len(colours) - 1] == 7).all() and not values[: len(colours) - 1].any()


@pytest.mark.parametrize(("name", "bits"), [("PNG", 2), ("PNG", 8), ("GIF", 8), ("BMP", 8), ("TIFF", 8)])
@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.usefixtures("rows")
def test_a_palette_is_kept_where_a_new_one_fits_no_better(name: str, bits: int, clear: bool) -> None:
    if clear and name not in ("PNG", "GIF"):
        return
    values = np.random.default_rng(5).integers(0, 256, (2**bits, 3), np.uint8)
    values[0] = 200, 120, 40
    image = Image.fromarray((np.arange(HEIGHT * WIDTH) % 2**bits).reshape(HEIGHT, WIDTH).astype(np.uint8))
    image.putpalette(values.tobytes())
    source = saved(
        image,
        name,
        optimize=False,
        **({"bits": bits} if name == "PNG" else {}),
        **({"transparency": 1} if clear else {}),
    )
    before, after = opened(source), opened(changed(source))
    assert before.getpalette() == after.getpalette()
    assert before.info.get("transparency") == after.info.get("transparency")
    assert np.array_equal(np.asarray(before)[REST], np.asarray(after)[REST])
    here = np.asarray(before.convert("RGBA"))[AREA][..., 3] > 0
    assert (np.asarray(after)[AREA][here] == 0).all() and (np.asarray(after)[AREA][~here] == 1).all()


@pytest.mark.parametrize("levels", [2, 9])
@pytest.mark.usefixtures("rows")
def test_alpha_of_a_palette_is_untouched(levels: int) -> None:
    steps = np.linspace(0, 255, levels).astype(np.uint8)
    clear = steps[np.arange(WIDTH) * levels // WIDTH][None].repeat(HEIGHT, 0)
    index = (np.arange(WIDTH) * levels // WIDTH)[None].repeat(HEIGHT, 0) * 20 + np.arange(HEIGHT)[:, None] % 20
    image = Image.fromarray(index.astype(np.uint8))
    image.putpalette(np.random.default_rng(1).integers(0, 256, 3 * levels * 20, np.uint8).tobytes())
    source = saved(image, "PNG", transparency=bytes(np.repeat(steps, 20)))
    assert np.array_equal(decode(source).alpha, clear)
    after = opened(changed(source))
    assert after.mode == "P" and np.array_equal(np.asarray(after.convert("RGBA"))[..., 3], clear)
    seen = (clear > 0) & REST
    assert np.abs(np.asarray(after.convert("RGBA"))[..., :3].astype(int) - decode(source).pixels)[seen].mean() < 12


@pytest.mark.parametrize("colours", [1, 2, 3, 9])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_png_with_a_palette_keeps_its_bits_whatever_becomes_of_its_colours(bits: int, colours: int) -> None:
    source = saved(palette_image(2**bits), "PNG", bits=bits)
    picture = decode(source)
    tones = (np.arange(picture.width) * colours // picture.width * 25)[np.newaxis, :, np.newaxis]
    pixels = np.broadcast_to(tones, picture.pixels.shape).astype(np.uint8)
    after = encode(pixels, source, picture=picture, software=SOFTWARE)
    assert after[24:26] == source[24:26] == bytes([bits, 3])
    assert opened(after).mode == "P"
    assert difference(decode(after).pixels, pixels) <= (1 if colours <= 2**bits else 255)


@pytest.mark.parametrize("size", [(1, 1), (60, 40)])
def test_a_grey_gif_without_a_palette_stays_so(size: tuple[int, int]) -> None:
    source = saved(Image.fromarray(smooth()).convert("L").resize(size), "GIF", optimize=False)
    source = source[:10] + bytes([source[10] & 0x70]) + source[11:13] + source[13 + 768 :]
    picture = decode(source)
    after = opened(encode(255 - picture.pixels, source, picture=picture, software=SOFTWARE))
    assert opened(source).mode == after.mode == "L"
    assert difference(np.asarray(after), 255 - np.asarray(opened(source))) <= 1


def test_a_transparent_gif_stays_transparent() -> None:
    image = palette_image(200)
    index = np.asarray(image).copy()
    index[:, 30:] = 200
    clear = Image.fromarray(index)
    clear.putpalette([*image.getpalette()[:600], 1, 2, 3])
    source = saved(clear, "GIF", transparency=200, comment=b"Ann at home")
    after = opened(changed(source))
    assert np.array_equal(
        np.asarray(after.convert("RGBA"))[..., 3], np.where(np.arange(WIDTH) < 30, 255, 0)[None].repeat(HEIGHT, 0)
    )
    assert after.info["comment"] == b"Ann at home"
    bare = without_metadata(source, picture=decode(source))
    assert b"Ann" not in bare and np.array_equal(
        np.asarray(opened(bare).convert("RGBA")), np.asarray(opened(source).convert("RGBA"))
    )


@pytest.mark.parametrize("colours", [1, 128, 255])
def test_a_gif_keeps_a_transparent_index_that_no_pixel_has(colours: int) -> None:
    image = palette_image(colours)
    image.putpalette([*image.getpalette()[: 3 * colours], 1, 2, 3])
    source = saved(image, "GIF", transparency=colours, optimize=False)
    assert "transparency" in opened(source).info
    after = opened(changed(source))
    assert after.mode == "P" and "transparency" in after.info
    assert np.asarray(after.convert("RGBA"))[..., 3].min() == 255


def test_a_grey_gif_keeps_its_transparent_tone() -> None:
    tones = np.asarray(Image.fromarray(smooth()).convert("L")).copy()
    tones[15:20, 30:] = 135  # what `changed` paints, so that it comes upon it by chance
    source = saved(Image.fromarray(tones), "GIF", transparency=135, optimize=False, duration=70, loop=3)
    before, after = opened(source), opened(changed(source))
    assert before.mode == after.mode == "L"
    clear = [np.asarray(image.convert("RGBA"))[..., 3] == 0 for image in (before, after)]
    assert clear[0].any() and np.array_equal(*clear)
    assert np.array_equal(np.asarray(before)[REST], np.asarray(after)[REST])
    assert after.info["duration"] == 70 and after.info["loop"] == 3


def test_a_grey_gif_with_a_palette_keeps_it() -> None:
    source = saved(Image.fromarray(smooth()).convert("L"), "GIF", optimize=False)
    assert opened(source).mode == opened(changed(source)).mode == "L"
    assert changed(source)[13 : 13 + 768] == source[13 : 13 + 768]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_one_transparent_colour_stays_where_it_was(mode: str) -> None:
    pixels = np.asarray(Image.fromarray(smooth()).convert(mode)).copy()
    key = (200, 120, 40) if mode == "RGB" else 135  # what `changed` paints, so that it comes upon it by chance
    pixels[15:20, 30:] = key
    source = saved(Image.fromarray(pixels), "PNG", transparency=key)
    before, after = (np.asarray(opened(data).convert("RGBA"))[..., 3] for data in (source, changed(source)))
    assert (before == 0).any() and np.array_equal(before, after)
    assert changed(source).count(b"tRNS") == 1 and opened(changed(source)).mode == mode
    assert difference(np.asarray(opened(changed(source)))[AREA], np.array(key)) <= 1
    *others, end = chunks_of(source)
    (late,) = [chunk for chunk in others if chunk[0] == b"tRNS"]
    moved = png_of(*(chunk for chunk in others if chunk != late), late, end)
    assert np.array_equal(np.asarray(opened(changed(moved)).convert("RGBA"))[..., 3], before)
    assert opened(changed(moved)).mode == mode


@pytest.mark.parametrize(("bits", "channels"), [(2, 1), (4, 1), (16, 1), (16, 3)])
def test_one_transparent_colour_of_any_depth_stays_where_it_was(bits: int, channels: int) -> None:
    values = np.random.default_rng(4).integers(0, 2**bits, (HEIGHT, WIDTH, channels), np.uint16)
    paint = (np.array([200, 120, 40] if channels == 3 else [135]) * (2**bits - 1) + 127) // 255
    values[15:20, 30:] = paint  # what `changed` paints, so that it comes upon it by chance
    values[AREA] = 0
    rows = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(HEIGHT, -1, 2), axis=2)[:, :, 16 - bits :]
    packed = np.packbits(rows.reshape(HEIGHT, -1), axis=1)
    source = png_of(
        (b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, 2 if channels == 3 else 0, 0, 0, 0)),
        (b"tRNS", paint.astype(">u2").tobytes()),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))),
        (b"IEND", b""),
    )
    before, after = decode(source), decode(changed(source))
    clear = (values == paint).all(axis=2)
    assert before.alpha is not None and np.array_equal(before.alpha == 0, clear)
    assert np.array_equal(before.alpha, after.alpha) and (before.mode, before.gray) == (after.mode, after.gray)  # type: ignore[arg-type]
    assert changed(source)[24:26] == source[24:26] and changed(source).count(b"tRNS") == 1
    if before.native is None:
        assert np.array_equal(before.pixels[REST], after.pixels[REST])
    else:
        assert after.native is not None and np.array_equal(before.native[REST], after.native[REST])


# --- AVIF and JPEG 2000 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_of_every_orientation_is_shown_the_same_way_up(orientation: int) -> None:
    exif = Image.Exif()
    exif[274], exif[271] = orientation, "Camera"
    source = saved(Image.fromarray(smooth()), "AVIF", quality=90, exif=exif.tobytes(), icc_profile=ICC, xmp=b"<x/>")
    picture = decode(source)
    assert (picture.orientation or 1, picture.width, picture.height) == (orientation, WIDTH, HEIGHT)
    after = encode(picture.pixels, source, picture=picture, software=SOFTWARE)
    image = opened(after)
    assert image.info["icc_profile"] == ICC and image.info["xmp"] == b"<x/>"
    assert image.getexif()[271] == "Camera" and image.getexif()[305] == SOFTWARE
    shown = [np.asarray(ImageOps.exif_transpose(opened(data))) for data in (source, after)]
    assert shown[0].shape == shown[1].shape and difference(*shown) <= 8


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("orientation", [1, 6])
def test_metadata_of_avif_is_taken_out_in_place(frames: int, orientation: int) -> None:
    exif = Image.Exif()
    exif[271], exif[274] = "A camera of Ann", orientation
    pictures = [Image.fromarray(np.roll(smooth(), index, 0)) for index in range(frames)]
    options = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
    if frames > 1:
        del exif[274]  # Pillow 13.0.0 crashes on an animation with it
    source = saved(pictures[0], "AVIF", exif=exif.tobytes(), xmp=b"<x>Ann</x>", icc_profile=ICC, **options)
    picture = decode(source, frames="first")
    after = without_metadata(source, picture=picture)
    assert len(after) == len(source) and source.count(b"Ann") >= 2 and b"Ann" not in after
    image, before = opened(after), opened(source)
    assert not image.info.get("xmp") and image.info["icc_profile"] == ICC
    assert dict(image.getexif()) == ({} if picture.orientation in (None, 1) else {274: orientation})
    for frame in range(frames):
        image.seek(frame)
        before.seek(frame)
        assert np.array_equal(np.asarray(image), np.asarray(before))


def test_an_avif_turned_by_its_own_boxes_keeps_them() -> None:
    exif = Image.Exif()
    exif[274] = 6
    source = saved(Image.fromarray(smooth()), "AVIF", exif=exif.tobytes()).replace(b"Exif", b"none")
    picture = decode(source)
    assert picture.orientation == 6 and decode(without_metadata(source, picture=picture)).orientation == 6


@pytest.mark.parametrize("place", range(12, 400, 7))
def test_broken_avif_is_left_or_told(place: int) -> None:
    source = saved(Image.fromarray(smooth()), "AVIF", exif=b"Exif\0\0II*\0\x08\0\0\0" + bytes(6), xmp=b"<x>Ann</x>")
    broken = bytearray(source)
    broken[place] ^= 0x55
    picture = decode(source)
    try:
        assert len(without_metadata(bytes(broken), picture=picture)) == len(source)
    except ItemError as error:
        assert error.error == "encode" and "metadata of this AVIF cannot be taken out" in error.message


def test_metadata_of_a_tiff_with_a_palette_is_taken_out() -> None:
    source = saved(palette_image(200), "TIFF", tiffinfo={271: "A camera of Ann", 315: "Ann"}, compression="tiff_lzw")
    after = without_metadata(source, picture=decode(source))
    assert b"Ann" in source and b"Ann" not in after and opened(after).mode == "P"
    assert opened(after).info["compression"] == "tiff_lzw"
    assert np.array_equal(np.asarray(opened(after)), np.asarray(opened(source)))
    assert opened(after).getpalette() == opened(source).getpalette()


def test_avif_keeps_alpha_as_it_is() -> None:
    source = saved(Image.fromarray(np.dstack([smooth(), alpha()])), "AVIF", quality=90)
    before, after = opened(source), opened(changed(source))
    assert after.mode == "RGBA" and np.array_equal(np.asarray(before)[..., 3], np.asarray(after)[..., 3])


def test_avif_of_a_grey_mode_stays_grey() -> None:
    source = saved(Image.fromarray(smooth()).convert("L"), "AVIF", quality=90)
    assert opened(source).mode == opened(changed(source)).mode


@pytest.mark.parametrize("container", [True, False])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_jpeg_2000_without_loss_stays_without(mode: str, container: bool) -> None:
    bands = np.dstack([smooth(), alpha()])
    values = {"L": bands[..., 0], "LA": bands[..., [0, 3]], "RGB": smooth(), "RGBA": bands}[mode]
    source = saved(Image.fromarray(values), "JPEG2000", no_jp2=not container)
    before, after = opened(source), opened(changed(source))
    if before.mode == mode:  # a bare codestream does not say which channel is alpha
        assert after.mode == mode
    assert changed(source)[:4] == source[:4]
    assert np.array_equal(np.asarray(after)[REST], np.asarray(before)[REST])
    assert np.array_equal(decode(without_metadata(source, picture=decode(source))).pixels, decode(source).pixels)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_jpeg_2000_with_loss_keeps_its_alpha(mode: str) -> None:
    values = np.dstack([smooth(120, 160), smooth(120, 160)[..., 1]])
    image = Image.fromarray(values).convert(mode)
    source = saved(image, "JPEG2000", irreversible=True, quality_mode="rates", quality_layers=[20])
    assert not np.array_equal(np.asarray(opened(source)), np.asarray(image)), "it was to lose something"
    before, after = decode(source), decode(changed(source))
    assert before.alpha is not None and after.alpha is not None
    assert len(np.unique(before.alpha)) > 50
    assert np.array_equal(after.alpha, before.alpha)


def test_jpeg_2000_with_loss_loses_nothing_that_is_seen() -> None:
    source = saved(
        Image.fromarray(smooth(120, 160)), "JPEG2000", irreversible=True, quality_mode="rates", quality_layers=[20]
    )
    picture = decode(source)
    after = decode(encode(picture.pixels, source, picture=picture, software=SOFTWARE))
    assert np.abs(after.pixels.astype(int) - picture.pixels).mean() < 0.7
    assert difference(after.pixels, picture.pixels) <= 4


@pytest.mark.parametrize("colours", [(12, 13), (9, 16)], ids=["Display P3", "BT.2020 PQ"])
def test_avif_keeps_what_its_numbers_mean(colours: tuple[int, int]) -> None:
    plain = saved(Image.fromarray(smooth()), "AVIF", quality=95)
    assert plain.count(b"colrnclx\0\1\0\x0d") == 1
    meaning = b"colrnclx" + struct.pack(">HH", *colours)
    source = plain.replace(b"colrnclx\0\1\0\x0d", meaning)
    after = changed(source)
    assert after.count(meaning) == after.count(b"colrnclx") == 1
    assert difference(decode(after).pixels[REST], decode(source).pixels[REST]) <= 14


def test_metadata_of_jpeg_2000_is_taken_out_wherever_it_is() -> None:
    plain = saved(Image.fromarray(smooth()), "JPEG2000", comment="Ann at home")
    at = plain.index(b"jp2c") - 4
    xml = struct.pack(">I4s", 8 + 8, b"xml ") + b"Ann lat="
    boxes = [(b"asoc", xml), (b"jumb", b"Ann"), (b"free", b"Ann"), (b"uuid", bytes(16) + b"Ann")]
    source = plain[:at] + b"".join(struct.pack(">I4s", 8 + len(body), kind) + body for kind, body in boxes) + plain[at:]
    picture = decode(source)
    for after in (without_metadata(source, picture=picture), changed(source, strip_metadata=True)):
        assert b"Ann" not in after
        assert np.array_equal(decode(after).pixels[REST], picture.pixels[REST])
    stream = plain[plain.index(b"jp2c") + 4 :]
    bare = without_metadata(stream, picture=decode(stream))
    assert b"Ann" not in bare and np.array_equal(decode(bare).pixels, picture.pixels)


def test_a_gif_keeps_its_profile_and_its_xmp() -> None:
    def extension(name: bytes, body: bytes) -> bytes:
        return b"\x21\xff\x0b" + name + body + b"\0"

    plain = saved(Image.fromarray(smooth()).quantize(64), "GIF", comment=b"Ann at home")
    profile = extension(b"ICCRGBG1012", bytes([200]) + bytes(range(200)))
    trailer = b"\1" + bytes(range(255, -1, -1))
    xmp = extension(b"XMP DataXMP", b"<x:xmpmeta>Ann</x:xmpmeta>" + trailer)
    colours = 13 + 3 * 2 ** ((plain[10] & 7) + 1)
    source = plain[:colours] + profile + xmp + plain[colours:]
    picture = decode(source)
    after = changed(source)
    assert profile in after and xmp in after and b"Ann at home" in after
    for bare in (changed(source, strip_metadata=True), without_metadata(source, picture=picture)):
        assert profile in bare and b"Ann" not in bare
        assert decode(bare).pixels.shape == picture.pixels.shape
    assert np.array_equal(decode(without_metadata(source, picture=picture)).pixels, picture.pixels)


def test_jpeg_2000_keeps_the_boxes_around_its_pixels() -> None:
    plain = saved(Image.fromarray(smooth()), "JPEG2000")
    at = plain.index(b"jp2c") - 4
    box = struct.pack(">I4s", 8 + 16 + 5, b"uuid") + bytes(range(16)) + b"<x/>!"
    source = plain[:at] + box + plain[at:]
    assert box in changed(source)
    assert box not in without_metadata(source, picture=decode(source))
    assert np.array_equal(decode(changed(source)).pixels[REST], smooth()[REST])

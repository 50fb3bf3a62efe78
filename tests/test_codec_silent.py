"""What Pillow passes over without a word: it would come out as another picture, or with less than it had."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from photos import pixels, png_of
from PIL import Image, ImageCms, ImageDraw, ImageFile
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from restore_core import exif
from restore_core.codec import decode, decoding, encode, encoding, jpeg, png, without_metadata
from restore_core.errors import ItemError


def file_of(image: Image.Image, name: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def photograph(mode: str = "RGB", height: int = 24, width: int = 32) -> Image.Image:
    return Image.fromarray(pixels(3, height, width)).convert(mode)


def failing(data: bytes, error: str) -> str:
    with pytest.raises(ItemError) as raised:
        decode(data)
    assert raised.value.error == error, raised.value.message
    return raised.value.message


def restored(source: bytes, change: int = 9, strip_metadata: bool = False) -> bytes:
    picture = decode(source)
    new = np.clip(picture.pixels.astype(int) + change, 0, 255).astype(np.uint8)
    return encode(new, source, picture=picture, software="test", strip_metadata=strip_metadata)


# --- JPEG 2000 -------------------------------------------------------------------------------------------------------


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body) + 8, kind) + body


def jp2(*, header: bytes = b"", times: int = 1) -> bytes:
    """With more boxes in its header, or more pictures."""
    size = box(b"ihdr", struct.pack(">IIHBBBB", 24, 32, 3, 7, 7, 0, 0))
    colour = box(b"colr", b"\1\0\0" + struct.pack(">I", 16))
    stream = box(b"jp2c", file_of(photograph(), "JPEG2000", no_jp2=True))
    start = box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
    return start + box(b"jp2h", size + colour + header) + times * stream


def channels(*of: tuple[int, int, int]) -> bytes:
    return box(b"cdef", struct.pack(f">H{3 * len(of)}H", len(of), *(value for one in of for value in one)))


@pytest.mark.parametrize("component", [0, 1, 2])
@pytest.mark.parametrize("step", [b"\2\1", b"\1\2", b"\2\2"])
def test_jpeg_2000_with_fewer_samples_of_a_channel_is_refused(component: int, step: bytes) -> None:
    data = bytearray(file_of(photograph(), "JPEG2000", no_jp2=True))
    data[43 + 3 * component : 45 + 3 * component] = step
    assert "not all of the picture's size" in failing(bytes(data), "unsupported")


@pytest.mark.parametrize(
    "of",
    [
        [(0, 0, 3), (1, 0, 2), (2, 0, 1)],  # blue first
        [(0, 1, 0), (1, 0, 1), (2, 0, 2)],  # transparency first
        [(0, 0, 1), (1, 0, 2), (2, 2, 0)],  # premultiplied
        [(0, 0, 1), (1, 0, 2), (2, 65535, 65535)],  # no colour, where one is needed
    ],
)
def test_jpeg_2000_with_channels_in_another_order_is_refused(of: list[tuple[int, int, int]]) -> None:
    assert "channels in another order" in failing(jp2(header=channels(*of)), "unsupported")


def test_jpeg_2000_that_names_its_channels_in_order_is_restored() -> None:
    plain, named = jp2(), jp2(header=channels((0, 0, 1), (1, 0, 2), (2, 0, 3)))
    assert np.array_equal(decode(plain).pixels, decode(named).pixels)
    assert channels((0, 0, 1), (1, 0, 2), (2, 0, 3)) in restored(named)
    alpha = file_of(photograph("RGBA"), "JPEG2000")
    assert decode(alpha).mode == decode(restored(alpha)).mode == "RGBA"
    untold = alpha.replace(struct.pack(">3H", 3, 1, 0), struct.pack(">3H", 3, 65535, 65535))
    assert decode(restored(untold)).mode == "RGBA"


def test_jpeg_2000_of_several_pictures_is_refused() -> None:
    assert "several pictures" in failing(jp2(times=2), "unsupported")


def test_what_is_small_on_an_empty_page_of_jpeg_2000_stays() -> None:
    """A mean error over all of it would allow the few letters to be destroyed."""
    page = Image.new("RGB", (512, 512), (245, 245, 245))
    ImageDraw.Draw(page).text((380, 480), "Photo 1923", (20, 30, 90))
    for image in (page, Image.new("RGB", (8, 8), (90, 30, 200)), Image.new("L", (1, 1), 77)):
        source = file_of(image, "JPEG2000", irreversible=True)
        picture = decode(source)
        after = decode(encode(picture.pixels, source, picture=picture, software="test"))
        assert np.abs(after.pixels.astype(int) - picture.pixels).max() <= 3


@pytest.mark.parametrize("irreversible", [False, True])
def test_jpeg_2000_too_large_for_one_tile_is_written_in_several(
    irreversible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_TILE", 64)
    monkeypatch.setattr(encoding, "_TILE_BITS", 8 * 3 * 100 * 150)
    source = file_of(photograph("RGB", 100, 150), "JPEG2000", irreversible=irreversible)
    after = restored(source, 0)
    assert after.count(b"\xff\x90\0\x0a") == 6
    assert restored(file_of(photograph(), "JPEG2000")).count(b"\xff\x90\0\x0a") == 1
    assert np.abs(decode(after).pixels.astype(int) - decode(source).pixels).max() <= (3 if irreversible else 0)


# --- JPEG ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_fine_grain_fits_into_a_progressive_jpeg(mode: str) -> None:
    noise = np.random.default_rng(0).normal(128, 60, (300, 200, 3)).clip(0, 255).astype(np.uint8)
    tables = [[1] * 64]
    source = file_of(Image.fromarray(noise).convert(mode), "JPEG", qtables=tables, subsampling=0)
    progressive = file_of(photograph(mode, 300, 200), "JPEG", qtables=tables, subsampling=0, progressive=True)
    long = progressive[:2] + 12 * (b"\xff\xe5\xff\xff" + bytes(65533)) + progressive[2:]  # as large as the buffer
    assert decode(encode(decode(source).pixels, long, picture=decode(long), software="test")).mode == mode
    after = encode(decode(source).pixels, progressive, picture=decode(progressive), software="test")
    assert Image.open(io.BytesIO(after)).info["progressive"]
    assert np.abs(decode(after).pixels.astype(int) - decode(source).pixels).max() <= (12 if mode == "RGB" else 3)


def scans_of_their_own(*tables: int, later: int) -> bytes:
    """A JPEG of three channels, one scan each; its second table is defined between the scans."""
    parts = [file_of(photograph("L", 16, 24), "JPEG", qtables=[[table] * 64]) for table in tables]

    def segment(source: bytes, code: int) -> bytes:
        return b"".join(source[at:end] for at, end in jpeg.segments(source)[0] if source[at + 1] == code)

    def scan(channel: int) -> bytes:
        return b"\xff\xda\0\x08\1" + bytes([channel, 0, 0, 63, 0]) + segment(parts[channel - 1], 0xDA)[10:]

    frame = struct.pack(">BBHBHHB", 0xFF, 0xC0, 17, 8, 16, 24, 3) + b"\1\x11\0\2\x11\1\3\x11\1"
    huffman = segment(parts[0], 0xC4)
    second = b"\xff\xdb\0\x43\1" + bytes([later] * 64)
    return b"\xff\xd8" + segment(parts[0], 0xDB) + frame + huffman + scan(1) + second + scan(2) + scan(3) + b"\xff\xd9"


def test_a_table_between_the_scans_of_a_jpeg_is_the_one_that_is_taken() -> None:
    source = scans_of_their_own(7, 3, 3, later=3)
    after = Image.open(io.BytesIO(restored(source)))
    assert [set(after.quantization[layer[3]]) for layer in after.layer] == [{7}, {3}, {3}]
    assert jpeg.finest_tables(source) == {0: [7] * 64, 1: [3] * 64}


def test_tables_are_pillows() -> None:
    source = file_of(photograph(), "JPEG", quality=70)
    assert jpeg.finest_tables(source) == Image.open(io.BytesIO(source)).quantization


@pytest.mark.parametrize("height", [65_501, 65_535])
def test_a_jpeg_longer_than_libjpeg_reads_is_refused_by_name(height: int) -> None:
    source = file_of(photograph("L", 24, 16), "JPEG")
    at = source.index(b"\xff\xc0") + 5
    long = source[:at] + height.to_bytes(2, "big") + source[at + 2 :]
    assert failing(long, "unsupported") == "JPEG with a side of more than 65500 pixels; convert it to PNG or TIFF first"


def test_an_avif_wider_than_libavif_reads_is_refused_by_name() -> None:
    wide = file_of(Image.new("L", (32_769, 2)), "AVIF", speed=10)
    expected = "AVIF with a side of more than 32768 pixels; convert it to JPEG, PNG or TIFF first"
    assert failing(wide, "unsupported") == expected
    assert decode(file_of(Image.new("L", (32_768, 2)), "AVIF", speed=10)).width == 32_768


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when writing image file")], ids=repr)
def test_too_little_memory_to_write_is_told_as_that(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    source = file_of(photograph(), "PNG")
    picture = decode(source)

    def save(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(ItemError, match="cannot write as PNG: not enough memory") as raised:
        encode(picture.pixels, source, picture=picture, software="test")
    assert raised.value.error == "out_of_memory"


def test_too_little_memory_to_read_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> None:
        raise OSError("out of memory error when reading image file")

    source = file_of(photograph(), "JPEG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert "not enough memory" in failing(source, "out_of_memory")


@pytest.mark.parametrize("code", [0xC5, 0xC6, 0xCD, 0xCE, 0xDE])
def test_hierarchical_jpeg_is_refused_by_name(code: int) -> None:
    data = file_of(photograph(), "JPEG").replace(b"\xff\xc0", bytes([0xFF, code]), 1)
    assert failing(data, "unsupported").startswith("hierarchical JPEG")


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO")
def test_what_cameras_and_programs_add_to_a_jpeg_stays() -> None:
    kept = [
        (0xE1, b"FLIR\0thermal"), (0xE2, b"FPXR\0preview"), (0xE3, b"Meta\0\0"), (0xE5, b"RMETA\0"), (0xEC, b"Ducky\0"),
        (0xED, b"Photoshop 3.0\0"), (0xFE, b"a comment"),
    ]  # fmt: skip
    gone = [(0xE0, b"JFXX\0thumbnail"), (0xE2, b"MPF\0places"), (0xEB, b"JP\0\0credentials")]
    plain = file_of(photograph(), "JPEG")
    more = b"".join(struct.pack(">BBH", 0xFF, code, len(body) + 2) + body for code, body in (*kept, *gone))
    source = plain[:20] + more + plain[20:]
    after, bare = restored(source), restored(source, strip_metadata=True)
    for _, body in kept:
        assert after.count(body) == 1 and body not in bare
    for _, body in gone:
        assert body not in after and body not in bare


def test_a_marker_within_damaged_pixels_names_no_kind() -> None:
    data = file_of(photograph(height=200, width=200), "JPEG")
    middle = data.index(b"\xff\xda") + 300
    for code in (0xC3, 0xC5, 0xDE):
        try:
            decode(data[:middle] + bytes([0xFF, code]) + data[middle:])
        except ItemError as error:
            assert error.error in ("decode", "truncated"), error.message


# --- PNG -------------------------------------------------------------------------------------------------------------

KINDS = {"L": (1, 0), "RGB": (3, 2), "P": (1, 3), "LA": (2, 4), "RGBA": (4, 6)}


def png_with(mode: str, rows: bytes, height: int, width: int, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, KINDS[mode][1], 0, 0, interlaced)
    palette = [(b"PLTE", bytes(range(256)) * 3)] if mode == "P" else []
    packed = zlib.compress(rows)
    half = len(packed) // 2
    parts = [(b"IDAT", packed[:half]), (b"IDAT", packed[half:])]
    return png_of((b"IHDR", header), *palette, *parts, (b"IEND", b""))


@pytest.mark.parametrize("mode", KINDS)
def test_a_png_without_its_last_rows_is_truncated(mode: str) -> None:
    height, width = 64, 50
    row = b"\0" + bytes([200] * width * KINDS[mode][0])
    assert decode(png_with(mode, row * height, height, width)).height == height
    for there in (0, 20, height - 1):
        failing(png_with(mode, row * there, height, width), "truncated")
    black = b"\0" + bytes(width * KINDS[mode][0])
    assert decode(png_with(mode, row * (height - 1) + black, height, width)).height == height
    failing(png_with(mode, row * (height - 1) + black[:-1], height, width), "truncated")


@pytest.mark.parametrize("height", range(1, 12))
@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 9, 50])
def test_an_interlaced_png_needs_all_its_passes(height: int, width: int) -> None:
    """What a real one holds is counted, and a byte less is too few."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    picture = pixels(1, height, width)
    rows = b""
    for left, top, across, down in passes:
        part = picture[top::down, left::across]
        rows += b"".join(b"\0" + row.tobytes() for row in part if row.size)
    assert np.array_equal(decode(png_with("RGB", rows, height, width, 1)).pixels, picture)
    failing(png_with("RGB", rows[:-1], height, width, 1), "truncated")
    assert png.has_all_rows(png_with("RGB", rows + b"more", height, width, 1))


def test_a_large_png_is_counted_in_pieces() -> None:
    black = file_of(Image.new("RGB", (3000, 2000)), "PNG")
    assert decode(black).width == 3000


def test_a_large_png_is_counted_in_pieces_of_its_own_pieces() -> None:
    """Whose compressed pixels are one chunk of several megabytes."""
    values = np.random.default_rng(0).integers(0, 256, (1200, 1000, 3), np.uint8)
    values[-1] = 0
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = (b"IHDR", struct.pack(">IIBBBBB", 1000, 1200, 8, 2, 0, 0, 0))
    whole, short = (png_of(header, (b"IDAT", zlib.compress(part, 0)), (b"IEND", b"")) for part in (rows, rows[:-1]))
    assert np.array_equal(decode(whole).pixels, values)
    failing(short, "truncated")


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_long_texts_and_profiles_of_a_png_stay(kind: bytes) -> None:
    long = zlib.compress(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(2_000_000))
    body = {b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\1\0\0\0", b"iCCP": b"sRGB\0\0"}[kind] + long
    first, *others = png.chunks(file_of(photograph(), "PNG"))
    source = png_of(first, (kind, body), *others)
    assert (kind, body) in png.chunks(restored(source))


def test_apples_own_png_is_refused_by_name() -> None:
    first, *others = png.chunks(file_of(photograph(), "PNG"))
    assert "CgBI" in failing(png_of((b"CgBI", b"\x50\0\x20\2"), first, *others), "unsupported")


# --- TIFF ------------------------------------------------------------------------------------------------------------


def with_entries(tiff: bytes, *new: exif.Entry) -> bytes:
    file = bytearray(tiff)
    entries = {entry.tag: entry for entry in exif.read_ifd(file, exif.first_ifd(file))[0]}
    exif.write_first_ifd(file, (entries | {entry.tag: entry for entry in new}).values(), 0)
    return bytes(file)


def number(tag: int, *values: int) -> exif.Entry:
    return exif.Entry(tag, 4, len(values), struct.pack(f"<{len(values)}I", *values))


def test_a_tiff_that_does_not_say_where_all_its_strips_are_is_damaged() -> None:
    whole = file_of(photograph("L", 64, 32), "TIFF")
    assert decode(with_entries(whole, number(278, 64))).height == 64
    assert "strips" in failing(with_entries(whole, number(278, 16)), "decode")
    assert "strips" in failing(with_entries(whole, number(278, 16), number(273, 8, 0, 8, 8)), "decode")
    colour = file_of(photograph("RGB", 64, 32), "TIFF")
    assert "strips" in failing(with_entries(colour, number(284, 2)), "decode")
    planes = with_entries(colour, number(284, 2), number(273, 8, 2056, 4104), number(279, 2048, 2048, 2048))
    assert decode(planes).mode == "RGB"


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF data")
def test_a_tag_outside_does_not_make_a_damaged_tiff_a_truncated_one() -> None:
    """It is whole, but its pixels make no sense; of one that is cut off the strips lie outside."""
    source = file_of(photograph("L", 64, 32), "TIFF", compression="tiff_adobe_deflate")
    (start,) = next(entry for entry in exif.read_ifd(source, exif.first_ifd(source))[0] if entry.tag == 273).integers(
        source
    )
    spoilt = source[:start] + b"\xff" * 8 + source[start + 8 :]
    outside = bytearray(with_entries(spoilt, exif.Entry(315, 2, 30, b"x" * 30)))
    at = outside.index(struct.pack("<HHI", 315, 2, 30))
    outside[at + 8 : at + 12] = struct.pack("<I", 10**6)
    failing(bytes(outside), "decode")
    failing(source[:start] + bytes(4), "truncated")


def test_a_tiff_keeps_what_its_numbers_mean() -> None:
    tags = ImageFileDirectory_v2()
    tags[318], tags[319], tags[301] = (
        (0.3127, 0.329),
        (0.64, 0.33, 0.3, 0.6, 0.15, 0.06),
        tuple(range(0, 65536, 256)) * 3,
    )
    source = file_of(photograph(), "TIFF", tiffinfo=tags)
    bare = without_metadata(source, picture=decode(source))
    for after in (restored(source), restored(source, strip_metadata=True), bare):
        for tag in (318, 319, 301):
            assert Image.open(io.BytesIO(after)).tag_v2[tag] == Image.open(io.BytesIO(source)).tag_v2[tag]


# --- GIF and BMP -----------------------------------------------------------------------------------------------------


def test_a_gif_that_does_not_fill_its_screen_is_refused() -> None:
    data = bytearray(file_of(photograph("P", 20, 20), "GIF"))
    assert decode(bytes(data)).width == 20
    data[6:10] = struct.pack("<HH", 40, 40)
    assert "does not fill its screen" in failing(bytes(data), "unsupported")
    first = photograph("P", 20, 20)
    clear = bytearray(file_of(first, "GIF", transparency=first.getpixel((0, 0))))
    clear[6:10] = struct.pack("<HH", 40, 40)
    picture = decode(bytes(clear))
    assert picture.alpha is not None and not picture.alpha[30:].any()


@pytest.mark.parametrize("top_down", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_the_fourth_byte_of_a_bmp_stays(top_down: bool, masks: bool) -> None:
    height, width = 5, 7
    fourth = np.arange(height * width, dtype=np.uint8).reshape(height, width)
    values = np.dstack([pixels(2, height, width)[:, :, ::-1], fourth])
    size = struct.pack("<IiiHHIIiiII", 40, width, -height if top_down else height, 1, 32, 3 * masks, 0, 0, 0, 0, 0)
    table = struct.pack("<III", 0xFF0000, 0xFF00, 0xFF) if masks else b""
    start = 14 + len(size) + len(table)
    body = (values if top_down else values[::-1]).tobytes()
    source = struct.pack("<2sIII", b"BM", start + len(body), 0, start) + size + table + body
    after = restored(source, change=1)
    at = struct.unpack_from("<I", after, 10)[0]
    written = np.frombuffer(after, np.uint8, height * width * 4, at).reshape(height, width, 4)[::-1]
    assert np.array_equal(written[:, :, 3], fourth)
    assert np.array_equal(decode(after).pixels, np.clip(pixels(2, height, width).astype(int) + 1, 0, 255))


@pytest.mark.parametrize("bits", [16, 32])
def test_a_bmp_without_its_last_padding_is_a_bmp(bits: int) -> None:
    """Or with an offset of 0, where the pixels follow the header."""
    height, width = 3, 5
    size = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, 0, 0, 0, 0, 0)
    stride = (width * bits // 8 + 3) // 4 * 4
    body = np.random.default_rng(1).integers(0, 127, height * stride, np.uint8).tobytes()
    whole = struct.pack("<2sIII", b"BM", 54 + len(body), 0, 54) + size + body
    expected = decode(whole).pixels
    for source in (whole[: len(whole) - (2 if bits == 16 else 0)], whole[:10] + bytes(4) + whole[14:]):
        assert np.array_equal(decode(source).pixels, expected)
        assert np.array_equal(decode(restored(source, change=0)).pixels, expected)


# --- All -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_exif", [False, True])
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_a_way_up_that_xmp_alone_tells_turns_nothing(name: str, with_exif: bool) -> None:
    """No viewer turns it; with the EXIF tag that would be made of it, all would."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    block = Image.Exif()
    block[271] = "Maker"
    options = {"exif": block.tobytes()} if with_exif else {}
    source = file_of(photograph(), name, xmp=xmp, **options)
    if name == "JPEG":  # as cameras write it; then Pillow has looked for a resolution in EXIF already
        source = source[:2] + source[20:]
    if name == "PNG":
        plain = list(png.chunks(file_of(photograph(), "PNG", **options)))
        text = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
        source = png_of(plain[0], (b"iTXt", text), *plain[1:])
    assert Image.open(io.BytesIO(source)).getexif().get(exif.ORIENTATION) == 6, "Pillow does not say so any more"
    picture = decode(source)
    assert picture.orientation is None
    for bare in (restored(source, strip_metadata=True), without_metadata(source, picture=picture)):
        assert exif.ORIENTATION not in Image.open(io.BytesIO(bare)).getexif()
    assert xmp in restored(source)


# --- What a collection of odd files has shown ------------------------------------------------------------------------


def exif_block(order: str = "<", *entries: exif.Entry) -> bytes:
    block = bytearray((b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8) + bytes(6))
    exif.write_first_ifd(block, entries, 0)
    return bytes(block)


def png_kinds(data: bytes) -> list[bytes]:
    return [kind for kind, _ in png.chunks(data)]


def test_exif_of_a_png_stays_what_it_was() -> None:
    """A text, which browsers do not heed and Pillow does, or behind the pixels: it is shown as before, by all."""
    way_up = exif_block("<", exif.Entry(exif.ORIENTATION, 3, 1, b"\6\0"))
    plain = file_of(photograph(), "PNG")
    texts = PngInfo()
    texts.add_text("Raw profile type exif", f"\nexif\n{len(way_up):8}\n{way_up.hex()}\n", zip=True)
    as_text = file_of(photograph(), "PNG", pnginfo=texts)
    *others, end = png.chunks(plain)
    late = png_of(*others, (b"eXIf", way_up), end)
    for strip in (False, True):
        for source in (as_text, late):
            picture = decode(source)
            written = restored(source, strip_metadata=strip)
            for after in (written, without_metadata(source, picture=picture)):
                kinds = png_kinds(after)
                assert (b"eXIf" in kinds, b"zTXt" in kinds) == (source is late, source is as_text)
                assert decode(after).orientation == picture.orientation == 6
            assert (b"test" in exif_of(written)) != strip
    assert png_kinds(restored(late)).index(b"eXIf") > png_kinds(restored(late)).index(b"IDAT")
    assert png_kinds(restored(plain)).index(b"eXIf") < png_kinds(restored(plain)).index(b"IDAT")


def exif_of(data: bytes) -> bytes:
    """EXIF of a PNG, wherever it stands."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return bytes(image.info.get("exif") or png.exif_text(image.info))


def test_captions_of_a_big_endian_tiff_are_not_swapped() -> None:
    caption = b"\x1c\2\0\0\2\0\2\x1c\2\x78\0\7caption"
    words = caption.ljust(-(-len(caption) // 4) * 4, b"\0")
    file = io.BytesIO()
    tifffile.imwrite(file, np.asarray(photograph()), photometric="rgb", byteorder=">", metadata=None)
    source = with_entries(file.getvalue(), exif.Entry(33723, 4, len(words) // 4, words))
    assert caption in restored(source)


def test_an_entry_of_no_type_does_not_cost_the_others() -> None:
    camera = exif.text_entry(271, "Camera")
    block = exif_block("<", exif.Entry(1, 7, 4, b"junk"), camera)
    place = block.index(struct.pack("<HH", 1, 7))
    block = block[:place] + struct.pack("<HH", 1, 0) + block[place + 4 :]
    source = file_of(photograph(), "JPEG", exif=b"Exif\0\0" + block)
    after = Image.open(io.BytesIO(restored(source))).info["exif"][6:]
    assert {entry.tag: entry.value for entry in exif.read_ifd(after, exif.first_ifd(after))[0]} == {
        271: b"Camera\0", exif.SOFTWARE: b"test\0",
    }  # fmt: skip


def test_frames_of_an_avif_of_more_bits_are_refused() -> None:
    frames = [photograph("RGB", 32, 32), Image.new("RGB", (32, 32))]
    source = bytearray(file_of(frames[0], "AVIF", save_all=True, append_images=frames[1:], speed=10))
    assert len(decoding.decode_frames(bytes(source), max_pixels=10**6, frames="all")) == 2
    source[source.index(b"av1C") + 6] |= 0x40
    with pytest.raises(ItemError, match="AVIF with more than 8 bits"):
        decoding.decode_frames(bytes(source), max_pixels=10**6, frames="all")


def test_jpeg_of_inks_keeps_its_density() -> None:
    source = file_of(photograph("CMYK"), "JPEG")
    app0 = b"\xff\xe0\0\x10JFIF\0\1\1\1\1\x2c\1\x2c\0\0"
    after = Image.open(io.BytesIO(restored(source[:2] + app0 + source[2:])))
    assert (after.mode, after.info["dpi"]) == ("CMYK", (300, 300))
    assert "jfif" not in Image.open(io.BytesIO(restored(source))).info


def test_a_chunk_that_is_too_short_does_not_make_a_png_truncated() -> None:
    first, *others = png.chunks(file_of(photograph(), "PNG"))
    assert "Truncated cHRM chunk" in failing(png_of(first, (b"cHRM", b""), *others), "decode")

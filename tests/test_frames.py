"""Animations and pages: every picture on its own, and the file put together as it was."""

import io
import re
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from test_codec_modes import ICC, SOFTWARE, difference, smooth

from restore_core import checkpoint
from restore_core.codec import Processes, decode, encode, join, without_metadata
from restore_core.codec.decoding import decode_frames
from restore_core.errors import ItemError
from restore_core.manifest import Row
from restore_core.pipelines import stages
from restore_core.storage import LocalStorage

COUNT = 3
DURATIONS = [100, 200, 50]


def pictures(mode: str = "RGB") -> list[Image.Image]:
    """Each is another one, with a transparent corner where the mode has alpha."""
    made = []
    for shift in range(COUNT):
        pixels = np.roll(smooth(), 9 * shift, axis=1)
        clear = np.full(pixels.shape[:2], 255, np.uint8)
        clear[:6, : 6 + shift] = 0
        made.append(Image.fromarray(np.dstack([pixels, clear])).convert(mode))
    return made


def saved(images: list[Image.Image], name: str, **options: object) -> bytes:
    file = io.BytesIO()
    images[0].save(file, name, save_all=True, append_images=images[1:], **options)
    return file.getvalue()


def frames_of(data: bytes, mode: str = "RGBA") -> list[np.ndarray]:
    return [np.asarray(frame.convert(mode)) for frame in ImageSequence.Iterator(Image.open(io.BytesIO(data)))]


def durations_of(data: bytes) -> list[float]:
    image, found = Image.open(io.BytesIO(data)), []
    for index in range(image.n_frames):
        image.seek(index)
        image.load()
        found.append(image.info.get("duration"))
    return found


def changed(data: bytes, which: tuple[int, ...] = (1,)) -> bytes:
    """The file with some frames turned dark and the others untouched, as the stages do it."""
    parts = []
    for index, frame in enumerate(decode_frames(data, max_pixels=10**6, frames="all")):
        assert frame.source is not None
        pixels = frame.picture.pixels // 2
        encoded = encode(pixels, frame.source, picture=frame.picture, software=SOFTWARE)
        parts.append(encoded if index in which else frame.source)
    return join(parts, data, software=SOFTWARE)


ANIMATED = {
    "GIF": (saved(pictures(), "GIF", duration=DURATIONS, loop=3, comment=b"Ann at home"), 14),
    "GIF clear": (saved(pictures("RGBA"), "GIF", duration=DURATIONS, loop=0, disposal=2), 14),
    "PNG": (saved(pictures(), "PNG", duration=DURATIONS, loop=3), 0),
    "PNG clear": (saved(pictures("RGBA"), "PNG", duration=DURATIONS, loop=0), 0),
    "PNG grey": (saved(pictures("L"), "PNG", duration=DURATIONS), 0),
    "PNG default": (saved(pictures(), "PNG", duration=DURATIONS[1:], default_image=True), 0),
    "WEBP": (saved(pictures(), "WEBP", duration=DURATIONS, loop=3, lossless=True), 0),
    "WEBP lossy": (saved(pictures("RGBA"), "WEBP", duration=DURATIONS, loop=3, quality=90), 25),
    "AVIF": (saved(pictures(), "AVIF", duration=DURATIONS, quality=95), 14),
    "AVIF clear": (saved(pictures("RGBA"), "AVIF", duration=DURATIONS, quality=100), 14),
}


@pytest.mark.parametrize("name", ANIMATED)
def test_an_animation_plays_as_before_with_only_the_restored_frames_changed(name: str) -> None:
    source, limit = ANIMATED[name]
    before, after = Image.open(io.BytesIO(source)), Image.open(io.BytesIO(changed(source)))
    assert (after.format, after.size, after.n_frames) == (before.format, before.size, before.n_frames)
    assert after.info.get("loop") == before.info.get("loop")
    assert durations_of(after.fp.getvalue()) == durations_of(source)  # type: ignore[union-attr]
    assert getattr(after, "default_image", None) == getattr(before, "default_image", None)
    for index, (one, other) in enumerate(zip(frames_of(source), frames_of(changed(source)), strict=True)):
        assert np.array_equal(one[..., 3], other[..., 3]), "alpha was touched"
        seen = one[..., 3] > 0
        expected = one[..., :3] // 2 if index == 1 else one[..., :3]
        assert difference(expected[seen], other[..., :3][seen]) <= limit


def test_metadata_of_animations_is_kept_or_dropped() -> None:
    exif = Image.Exif()
    exif[271], exif[274] = "Camera", 6
    texts = PngInfo()
    texts.add_text("Author", "Ann")
    for name, options in (("PNG", {"pnginfo": texts}), ("WEBP", {"xmp": b"<x/>"}), ("AVIF", {"xmp": b"<x/>"})):
        way_up = 1 if name == "AVIF" else 6  # see `split`
        exif[274] = way_up
        source = saved(pictures(), name, duration=DURATIONS, icc_profile=ICC, exif=exif.tobytes(), **options)
        kept = Image.open(io.BytesIO(changed(source)))
        assert kept.info["icc_profile"] == ICC
        assert dict(kept.getexif()) == {271: "Camera", 305: SOFTWARE} | ({} if way_up == 1 else {274: 6})
        assert kept.info.get("xmp") == options.get("xmp") and kept.info.get("Author") == (
            "Ann" if name == "PNG" else None
        )
        parts = [frame.source or b"" for frame in decode_frames(source, max_pixels=10**6, frames="all")]
        bare = Image.open(io.BytesIO(join(parts, source, software=SOFTWARE, strip_metadata=True)))
        assert bare.info["icc_profile"] == ICC and dict(bare.getexif()) == ({} if way_up == 1 else {274: 6})
        assert not bare.info.get("xmp") and "Author" not in bare.info
    assert Image.open(io.BytesIO(changed(ANIMATED["GIF"][0]))).info["comment"] == b"Ann at home"


def pages(big_endian: bool = False) -> tuple[bytes, list[np.ndarray]]:
    """Pages of unlike sizes, modes, depths and compressions, as scanners and fax servers make them."""
    import tifffile

    deep = np.random.default_rng(3).integers(0, 65_536, (20, 30, 3), np.uint16)
    truths = [smooth(), smooth(11, 17)[..., 0], deep, smooth(40, 70)]
    file = io.BytesIO()
    with tifffile.TiffWriter(file, byteorder=">" if big_endian else "<") as writer:
        for index, truth in enumerate(truths):
            writer.write(
                truth,
                photometric="rgb" if truth.ndim == 3 else "minisblack",
                compression="zlib" if index == 1 else None,
                rowsperstrip=7,
                tile=(16, 16) if index == 3 else None,
                description=f"page {index}",
                software=False,
                metadata=None,
                resolution=(300, 300),
                extratags=[(34675, 7, len(ICC), ICC, True), (274, 3, 1, 6 if index == 0 else 1, True)],
            )
    return file.getvalue(), truths


@pytest.mark.parametrize("big_endian", [False, True])
def test_pages_of_a_tiff_keep_sizes_depths_and_tags(big_endian: bool) -> None:
    import tifffile

    source, truths = pages(big_endian)
    for which in ((), (1,), (0, 2, 3), (0, 1, 2, 3)):
        after = changed(source, which)
        with tifffile.TiffFile(io.BytesIO(after)) as tiff:
            assert len(tiff.pages) == len(truths)
            for index, (page, truth) in enumerate(zip(tiff.pages, truths, strict=True)):
                values = page.asarray()
                assert (values.shape, values.dtype) == (truth.shape, truth.dtype)
                assert page.tags[270].value == f"page {index}" and page.tags[34675].value == ICC
                assert page.tags[274].value == (6 if index == 0 else 1) and page.tags[282].value == (300, 1)
                if index not in which:
                    assert np.array_equal(values, truth)
                elif truth.dtype == np.uint8:
                    assert np.array_equal(values, truth // 2)
                else:
                    assert difference(values, truth / 2) <= 257
        assert Image.open(io.BytesIO(after)).n_frames == len(truths)


def test_the_first_picture_alone() -> None:
    for name in ("GIF", "PNG", "WEBP", "AVIF"):
        source = ANIMATED[name][0]
        picture = decode(source, frames="first")
        assert picture.left_out == COUNT - 1
        after = Image.open(io.BytesIO(encode(picture.pixels, source, picture=picture, software=SOFTWARE)))
        assert (after.format, getattr(after, "n_frames", 1)) == (name, 1)
        assert difference(np.asarray(after.convert("RGB")), frames_of(source, "RGB")[0]) <= 14
    tiff, truths = pages()
    picture = decode(tiff, frames="first")
    after = Image.open(io.BytesIO(encode(picture.pixels, tiff, picture=picture, software=SOFTWARE)))
    assert after.n_frames == 1 and picture.left_out == 3 and np.array_equal(picture.pixels, truths[0])
    mpo = saved(pictures(), "MPO", quality=90)
    picture = decode(mpo, frames="first")
    assert (picture.format, picture.left_out) == ("MPO", 2)
    assert Image.open(io.BytesIO(encode(picture.pixels, mpo, picture=picture, software=SOFTWARE))).format == "JPEG"


@pytest.mark.parametrize("name", ["GIF", "WEBP", "WEBP lossy"])
def test_an_undamaged_animation_without_metadata_plays_as_before(name: str) -> None:
    source, _ = ANIMATED[name]
    picture = decode(source, frames="first")
    bare = without_metadata(source, picture=picture)
    assert b"Ann" not in bare
    assert np.array_equal(frames_of(bare), frames_of(source)) and durations_of(bare) == durations_of(source)
    assert Image.open(io.BytesIO(bare)).info["loop"] == Image.open(io.BytesIO(source)).info["loop"] == 3


def test_a_webp_of_a_single_frame_of_an_animation_keeps_it() -> None:
    still = io.BytesIO()
    Image.fromarray(smooth()).save(still, "WEBP", quality=90)
    height, width, _ = smooth().shape
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frame = bytes(6) + sides + bytes(4) + still.getvalue()[12:]
    chunks = [(b"VP8X", b"\2\0\0\0" + sides), (b"ANIM", bytes(6)), (b"ANMF", frame)]
    body = b"WEBP" + b"".join(kind + len(data).to_bytes(4, "little") + data for kind, data in chunks)
    source = b"RIFF" + len(body).to_bytes(4, "little") + body
    picture = decode(source)
    bare = without_metadata(source, picture=picture)
    assert np.array_equal(decode(bare).pixels, picture.pixels)
    with pytest.raises(ItemError, match="no pixels found"):
        without_metadata(source.replace(b"ANMF", b"FMNA"), picture=picture)


def test_pages_that_share_their_pixels_do_not_unfold_without_end() -> None:
    block, count = bytes(2**18), 200
    at = 8 + len(block)
    tiff = bytearray(b"II*\0" + struct.pack("<I", at) + block)
    for index in range(count):
        tags = [(256, 3, 1), (257, 3, 1), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 1),
                (279, 4, len(block))]  # fmt: skip
        following = 0 if index == count - 1 else len(tiff) + 2 + 12 * len(tags) + 4
        tiff += struct.pack("<H", len(tags))
        tiff += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
        tiff += struct.pack("<I", following)
    with pytest.raises(ItemError, match="share so much"):
        decode_frames(bytes(tiff), max_pixels=10**6, frames="all")


def test_what_cannot_be_taken_apart_is_refused_by_name() -> None:
    def reason(data: bytes, **options: int) -> str:
        with pytest.raises(ItemError) as caught:
            decode_frames(data, frames="all", **{"max_pixels": 10**6, **options})
        return str(caught.value)

    assert reason(saved(pictures(), "MPO", quality=90)).startswith(
        "unsupported: MPO with 3 pictures; use --frames first"
    )
    palettes = [image.convert("P") for image in pictures()]
    assert reason(saved(palettes, "PNG")).startswith("unsupported: animated PNG with a palette")
    assert reason(ANIMATED["GIF"][0], max_pixels=2879) == (
        "too_large: 3 frames of 40 x 24 pixels are over the budget of 2879 pixels; "
        "raise --max-megapixels, with --retry-failed too_large"
    )
    assert len(decode_frames(ANIMATED["GIF"][0], max_pixels=2880, frames="all")) == 3
    tiff, truths = pages()
    total = sum(truth.shape[0] * truth.shape[1] for truth in truths)
    refusal = r"too_large: 4 pages that count as (\d+) pixels are over the budget of \d+ pixels; raise .*"
    found = re.fullmatch(refusal, reason(tiff, max_pixels=total - 1))
    assert found and int(found[1]) >= total
    assert len(decode_frames(tiff, max_pixels=int(found[1]), frames="all")) == 4
    endless = bytearray(saved(pictures(), "TIFF"))
    first = int.from_bytes(endless[4:8], "little")
    place, _ = following(endless, first)
    endless[place : place + 4] = first.to_bytes(4, "little")  # after the second page comes the first again
    assert reason(bytes(endless)).startswith("unsupported: TIFF with 2 pages that hang together (its pages form a loop")


def test_frames_beyond_the_screen_are_refused() -> None:
    source = bytearray(ANIMATED["GIF"][0])
    at = source.rindex(b"!\xf9\x04") + 8  # the last frame's descriptor
    assert source[at : at + 1] == b","
    source[at + 1 : at + 5] = (30).to_bytes(2, "little") * 2
    with pytest.raises(ItemError, match="unsupported: GIF with frames that reach beyond its screen; use"):
        decode_frames(bytes(source), max_pixels=10**6, frames="all")


def following(tiff: bytearray, first: int) -> tuple[int, int]:
    """Where the second directory says where the third is, and what it says."""
    at = first
    for _ in range(2):
        count = int.from_bytes(tiff[at : at + 2], "little")
        place = at + 2 + 12 * count
        at = int.from_bytes(tiff[place : place + 4], "little")
    return place, at


def test_frames_come_through_the_processes_too() -> None:
    tiff, truths = pages()
    ifd = ImageFileDirectory_v2()
    ifd[270] = "one"
    single = saved(pictures()[:1], "TIFF", tiffinfo=ifd)
    with Processes(1, max_pixels=10**6) as codecs:
        found = codecs.decode_frames(tiff, frames="all")
        assert [frame.picture.width for frame in found] == [truth.shape[1] for truth in truths]
        here = decode_frames(tiff, max_pixels=10**6, frames="all")
        assert [frame.source for frame in found] == [frame.source for frame in here]
        assert np.array_equal(found[2].picture.native, truths[2])
        assert [frame.source for frame in codecs.decode_frames(single, frames="all")] == [None]


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP lossy", "AVIF"])
def test_of_an_undamaged_animation_only_the_metadata_goes(
    name: str, tmp_path: Path, small_model: Callable[[int], Path]
) -> None:
    source, _ = ANIMATED[name]
    place = LocalStorage(tmp_path)
    run = stages.RestoreRun(
        input=place, output=place, model=checkpoint.read(str(small_model(1))), device="cpu", threads=1,
        max_pixels=10**6, strip_metadata=True, frames="all",
    )  # fmt: skip
    row = Row(key="a", size=len(source), etag="e", model="m", options="o", run_id="r")
    with Processes(1, max_pixels=10**6) as codecs, ThreadPoolExecutor(1) as pool:
        tools = stages.Tools(run, pool, codecs)
        frames = stages.decode([stages.Item(row, source)], tools)
        assert len(frames) == COUNT
        after = stages.encode_file(frames, tools)
        assert (row.status, row.change, row.format) == ("unchanged", 0.0, name.split()[0])
        with Image.open(io.BytesIO(source)) as image:
            assert row.mode == image.mode
        assert after == without_metadata(source, picture=decode(source, frames="first"))
        assert np.array_equal(frames_of(after), frames_of(source))
        row.status, tools = None, replace(tools, run=replace(run, frames="first", strip_metadata=False))
        frames = stages.decode([stages.Item(row, source)], tools)
        assert row.message == "the first of 3 frames or pages; the others are left out"
        assert stages.encode_file(frames, tools) == source
        assert row.message == "the first of 3 frames or pages; all are copied"


def test_small_files_that_unfold_to_much_are_counted(tmp_path: Path, small_model: Callable[[int], Path]) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(file, "WEBP", lossless=True)
    source = file.getvalue()
    assert len(source) < 1000
    place = LocalStorage(tmp_path)
    run = stages.RestoreRun(
        input=place, output=place, model=checkpoint.read(str(small_model(1))), device="cpu", threads=1,
        max_pixels=10**8, strip_metadata=False,
    )  # fmt: skip
    row = Row(key="a", size=len(source), etag="e", model="m", options="o", run_id="r")
    small = io.BytesIO()
    Image.new("L", (64, 64)).save(small, "JPEG")
    at = small.getvalue().index(b"\xff\xc0") + 5
    cut_off = small.getvalue()[:at] + struct.pack(">HH", 4000, 4000) + small.getvalue()[at + 4 :]
    with Processes(1, max_pixels=10**8) as codecs, ThreadPoolExecutor(1) as pool:
        for data in (source, cut_off):
            items = [stages.Item(row, data) for _ in range(5)]
            assert [len(group) for group in stages.groups(items, stages.Tools(run, pool, codecs))] == [2, 2, 1]


def test_a_damaged_frame_of_an_animated_png_is_not_taken_for_whole() -> None:
    source = bytearray(saved(pictures(), "PNG"))
    at = source.index(b"IDAT")
    size = int.from_bytes(source[at - 4 : at], "big")
    middle = at + 4 + size // 2
    source[middle : middle + 40] = bytes(40)
    source[at + 4 + size : at + 8 + size] = zlib.crc32(source[at : at + 4 + size]).to_bytes(4, "big")
    with pytest.raises(ItemError, match=r"decode: the file is damaged|truncated: the file is cut off"):
        decode_frames(bytes(source), max_pixels=10**6, frames="all")

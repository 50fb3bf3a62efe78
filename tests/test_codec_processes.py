"""The codec in processes of its own: the same results, and whatever happens there happens to one file."""

import io
import re
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from broken_codecs import break_codecs
from photos import encoded, png_of
from PIL import Image
from processes import wait_for

from restore_core.codec import Frames, Picture, Processes, decode, encode, without_metadata
from restore_core.codec.processes import BASE_BYTES, BYTES_PER_PIXEL
from restore_core.errors import ItemError


@pytest.fixture
def codecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    """One process, whose decoder hangs, crashes and eats memory when it is told to."""
    monkeypatch.syspath_prepend(str(break_codecs(tmp_path / "site")))
    with Processes(1, max_pixels=10**6, seconds=60) as made:
        yield made


def process_of(codecs: Processes) -> int | None:
    process = codecs._children[0]._process
    return None if process is None else process.pid


def only(codecs: Processes, data: bytes) -> Picture:
    (frame,) = codecs.decode_frames(data)
    assert frame.source is None
    return frame.picture


def failing(codecs: Processes, data: bytes) -> str:
    with pytest.raises(ItemError) as caught:
        codecs.decode_frames(data)
    return f"{caught.value.error}: {caught.value.message}"


@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF"])
def test_pictures_come_through_as_they_are(codecs: Processes, name: str) -> None:
    data = encoded(1, 30, 41, name)
    here, there = decode(data), only(codecs, data)
    assert np.array_equal(here.pixels, there.pixels) and there.pixels.flags.writeable
    values = [{key: value for key, value in vars(picture).items() if key != "pixels"} for picture in (here, there)]
    assert values[0] == values[1]


def test_alpha_and_native_values_come_through_too(codecs: Processes) -> None:
    deep = np.random.default_rng(0).integers(0, 65_536, (9, 5), np.uint16)
    clear = np.random.default_rng(0).integers(0, 256, (9, 5, 4), np.uint8)
    for values in (deep, clear):
        file = io.BytesIO()
        Image.fromarray(values).save(file, "PNG")
        here, there = decode(file.getvalue()), only(codecs, file.getvalue())
        assert np.array_equal(here.pixels, there.pixels)
        for name in ("alpha", "native"):
            one, other = getattr(here, name), getattr(there, name)
            assert (one is None and other is None) or (one.dtype == other.dtype and np.array_equal(one, other))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "I;16", "P"])
def test_files_are_encoded_as_without_the_process(codecs: Processes, mode: str) -> None:
    image = Image.open(io.BytesIO(encoded(3, 20, 30, "PNG")))
    image = (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    file = io.BytesIO()
    image.save(file, "TIFF" if mode == "CMYK" else "PNG")
    source = file.getvalue()
    picture = only(codecs, source)
    pixels = 255 - picture.pixels
    for strip in (False, True):
        options = {"picture": picture, "software": "test", "strip_metadata": strip}
        assert codecs.encode(pixels, source, **options) == encode(pixels, source, **options)
    assert codecs.without_metadata(source, picture=picture) == without_metadata(source, picture=picture)


def test_an_encoder_that_crashes_costs_one_process_and_one_file(codecs: Processes) -> None:
    source = encoded(1) + b"crash the encoder"
    picture = only(codecs, source)
    with pytest.raises(ItemError, match=r"encode: its encoder crashed \(SIGSEGV\)"):
        codecs.encode(picture.pixels, source, picture=picture, software="test")
    assert only(codecs, encoded(1)).width == 16


def test_errors_come_through_as_they_are(codecs: Processes) -> None:
    assert failing(codecs, b"hello") == failing(codecs, b"hello")
    before = process_of(codecs)
    assert failing(codecs, b"hello").startswith("not_an_image: no JPEG")
    assert failing(codecs, encoded(1)[:80]).startswith("truncated: the file is cut off after 80 bytes")
    assert failing(codecs, encoded(1, 1001, 1000)) == (
        "too_large: 1000 x 1001 pixels are over the budget of 1000000 pixels; "
        "raise --max-megapixels, with --retry-failed too_large"
    )
    assert process_of(codecs) == before  # none of them costs a process


def test_a_crash_costs_one_process_and_one_file(codecs: Processes) -> None:
    codecs.decode_frames(encoded(1))
    before = process_of(codecs)
    assert failing(codecs, b"crash") == "decode: its decoder crashed (SIGSEGV)"
    assert only(codecs, encoded(1)).width == 16
    assert process_of(codecs) != before
    assert failing(codecs, b"killed").startswith("out_of_memory: its decoder was killed")
    assert only(codecs, encoded(1)).width == 16


def test_a_hang_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(break_codecs(tmp_path / "site")))
    with Processes(1, max_pixels=10**6, seconds=1) as codecs:
        started = time.monotonic()
        assert failing(codecs, b"hang") == "decode: its decoder was not done after 1 s and was stopped"
        assert time.monotonic() - started < 20
    with Processes(1, max_pixels=10**6) as codecs:
        assert only(codecs, encoded(1)).width == 16


def test_a_decoder_gets_no_more_memory_than_its_share(codecs: Processes) -> None:
    assert failing(codecs, b"eat") == "out_of_memory: its codec needed more memory than it may have"
    limits = Path(f"/proc/{process_of(codecs)}/limits").read_text()
    found = re.search(r"Max address space +(\d+)", limits)
    assert found is not None and int(found[1]) == BASE_BYTES + BYTES_PER_PIXEL * 10**6
    assert only(codecs, encoded(1)).width == 16


def one_bit_png(side: int) -> bytes:
    """A black square, one bit a pixel."""
    row = bytes(1 + side // 8)
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    return png_of((b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b""))


def gif_of(width: int, height: int, frame_width: int, frame_height: int) -> bytes:
    """A GIF of a few hundred bytes: a screen, and one frame whose pixels break off."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"," + struct.pack("<HHHHB", 0, 0, frame_width, frame_height, 0) + b"\2"
    return screen + frame + b"\xff" + b"\x84" * 255 + b"\0;"


BOMBS = {
    "png": one_bit_png(20_000),
    "gif screen": gif_of(20_000, 10_000, 20_000, 10_000),
    "gif frame": gif_of(10, 10, 20_000, 10_000),
}


@pytest.mark.parametrize("frames", ["refuse", "first", "all"])
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_too_large_without_being_decoded(tmp_path: Path, name: str, frames: Frames) -> None:
    assert len(BOMBS[name]) < 60_000
    with Processes(1, max_pixels=89_000_000) as codecs:
        for data in (encoded(1), BOMBS[name]):
            try:
                codecs.decode_frames(data, frames=frames)
            except ItemError as error:
                assert error.error == "too_large" and data == BOMBS[name]
            peak = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process_of(codecs)}/status").read_text())[1])  # type: ignore[index]
            if data != BOMBS[name]:
                before = peak
        assert peak - before < 20_000, "kB: something was unpacked"


def test_what_libraries_print_is_no_answer(codecs: Processes) -> None:
    for _ in range(3):
        assert failing(codecs, b"chatter") == "decode: said what it had to say"


def test_many_threads_share_few_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(break_codecs(tmp_path / "site")))
    files = [encoded(seed, 10 + seed % 7, 12) if seed % 9 else b"crash" for seed in range(60)]
    with Processes(2, max_pixels=10**6) as codecs, ThreadPoolExecutor(8) as pool:

        def height(data: bytes) -> int | str:
            try:
                return only(codecs, data).height
            except ItemError as error:
                return error.message

        expected = [10 + seed % 7 if seed % 9 else "its decoder crashed (SIGSEGV)" for seed in range(60)]
        assert list(pool.map(height, files)) == expected


def test_the_processes_end_with_the_one_that_started_them(codecs: Processes) -> None:
    codecs.decode_frames(encoded(1))
    process = process_of(codecs)
    codecs.close()
    wait_for(lambda: not Path(f"/proc/{process}").exists(), 20)


def test_a_child_at_work_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    """It hangs in the middle of a file, so that it does not see its input's end."""
    program = f"""
import sys, threading
sys.path.insert(0, {str(break_codecs(tmp_path / "site"))!r})
from restore_core.codec import Processes
codecs = Processes(1, max_pixels=10**6, seconds=600)
codecs.pixel_count({encoded(1)!r})
threading.Thread(target=codecs.decode_frames, args=(b"hang",), daemon=True).start()
print(codecs._children[0]._process.pid, flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = Path(f"/proc/{int(parent.stdout.readline())}")
        time.sleep(1)
        assert child.exists()
        parent.kill()
    wait_for(lambda: not child.exists(), 20)


def test_an_interrupted_answer_is_not_taken_for_the_next(codecs: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    from restore_core.codec import processes

    class Interrupted(BaseException):
        pass

    real = processes._read_part

    def interrupted(*_: object) -> None:
        raise Interrupted

    threads = threading.active_count()
    monkeypatch.setattr(processes, "_read_part", interrupted)
    with pytest.raises(Interrupted):
        codecs.decode_frames(encoded(1))
    monkeypatch.setattr(processes, "_read_part", real)
    assert np.array_equal(only(codecs, encoded(2)).pixels, decode(encoded(2)).pixels)
    wait_for(lambda: threading.active_count() <= threads + len(codecs._children), 20)

"""Decoding in processes of its own: the same pictures, and whatever happens there happens to one file."""

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from broken_decoders import break_decoders
from photos import encoded
from processes import wait_for

from restore_core.codec import Decoders, decode
from restore_core.codec.child import BASE_BYTES, BYTES_PER_PIXEL
from restore_core.errors import ItemError


@pytest.fixture
def decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoders]:
    """One process, whose decoder hangs, crashes and eats memory when it is told to."""
    monkeypatch.syspath_prepend(str(break_decoders(tmp_path / "site")))
    with Decoders(1, max_pixels=10**6, seconds=60) as made:
        yield made


def process_of(decoders: Decoders) -> int | None:
    process = decoders._children[0]._process
    return None if process is None else process.pid


def failing(decoders: Decoders, data: bytes) -> str:
    with pytest.raises(ItemError) as caught:
        decoders.decode(data)
    return f"{caught.value.error}: {caught.value.message}"


@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF"])
def test_pictures_come_through_as_they_are(decoders: Decoders, name: str) -> None:
    data = encoded(1, 30, 41, name)
    here, there = decode(data), decoders.decode(data)
    assert np.array_equal(here.pixels, there.pixels) and there.pixels.flags.writeable
    values = [{key: value for key, value in vars(picture).items() if key != "pixels"} for picture in (here, there)]
    assert values[0] == values[1]


def test_alpha_and_native_values_come_through_too(decoders: Decoders) -> None:
    import io

    from PIL import Image

    deep = np.random.default_rng(0).integers(0, 65_536, (9, 5), np.uint16)
    clear = np.random.default_rng(0).integers(0, 256, (9, 5, 4), np.uint8)
    for values in (deep, clear):
        file = io.BytesIO()
        Image.fromarray(values).save(file, "PNG")
        here, there = decode(file.getvalue()), decoders.decode(file.getvalue())
        assert np.array_equal(here.pixels, there.pixels)
        for name in ("alpha", "native"):
            one, other = getattr(here, name), getattr(there, name)
            assert (one is None and other is None) or (one.dtype == other.dtype and np.array_equal(one, other))


def test_errors_come_through_as_they_are(decoders: Decoders) -> None:
    assert failing(decoders, b"hello") == failing(decoders, b"hello")
    before = process_of(decoders)
    assert failing(decoders, b"hello").startswith("not_an_image: no JPEG")
    assert failing(decoders, encoded(1)[:80]).startswith("truncated: the file is cut off after 80 bytes")
    assert failing(decoders, encoded(1, 1001, 1000)) == (
        "too_large: 1000 x 1001 pixels are over the budget of 1000000 pixels"
    )
    assert process_of(decoders) == before  # none of them costs a process


def test_a_crash_costs_one_process_and_one_file(decoders: Decoders) -> None:
    decoders.decode(encoded(1))
    before = process_of(decoders)
    assert failing(decoders, b"crash") == "decode: its decoder crashed (SIGSEGV)"
    assert decoders.decode(encoded(1)).width == 16
    assert process_of(decoders) != before
    assert failing(decoders, b"killed").startswith("out_of_memory: its decoder was killed")
    assert decoders.decode(encoded(1)).width == 16


def test_a_hang_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(break_decoders(tmp_path / "site")))
    with Decoders(1, max_pixels=10**6, seconds=1) as decoders:
        started = time.monotonic()
        assert failing(decoders, b"hang") == "decode: its decoder was not done after 1 s and was stopped"
        assert time.monotonic() - started < 20
    with Decoders(1, max_pixels=10**6) as decoders:
        assert decoders.decode(encoded(1)).width == 16


def test_a_decoder_gets_no_more_memory_than_its_share(decoders: Decoders) -> None:
    assert failing(decoders, b"eat") == "out_of_memory: its decoder needed more memory than it may"
    limits = Path(f"/proc/{process_of(decoders)}/limits").read_text()
    found = re.search(r"Max address space +(\d+)", limits)
    assert found is not None and int(found[1]) == BASE_BYTES + BYTES_PER_PIXEL * 10**6
    assert decoders.decode(encoded(1)).width == 16


def test_what_libraries_print_is_no_answer(decoders: Decoders) -> None:
    for _ in range(3):
        assert failing(decoders, b"chatter") == "decode: said what it had to say"


def test_many_threads_share_few_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(break_decoders(tmp_path / "site")))
    files = [encoded(seed, 10 + seed % 7, 12) if seed % 9 else b"crash" for seed in range(60)]
    with Decoders(2, max_pixels=10**6) as decoders, ThreadPoolExecutor(8) as pool:

        def height(data: bytes) -> int | str:
            try:
                return decoders.decode(data).height
            except ItemError as error:
                return error.message

        expected = [10 + seed % 7 if seed % 9 else "its decoder crashed (SIGSEGV)" for seed in range(60)]
        assert list(pool.map(height, files)) == expected


def test_the_processes_end_with_the_one_that_started_them(decoders: Decoders) -> None:
    decoders.decode(encoded(1))
    process = process_of(decoders)
    decoders.close()
    wait_for(lambda: not Path(f"/proc/{process}").exists(), 20)


def test_an_interrupted_answer_is_not_taken_for_the_next(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    from restore_core.codec import child

    class Interrupted(BaseException):
        pass

    real = child._read_array

    def interrupted(*_: object) -> None:
        raise Interrupted

    monkeypatch.setattr(child, "_read_array", interrupted)
    with pytest.raises(Interrupted):
        decoders.decode(encoded(1))
    monkeypatch.setattr(child, "_read_array", real)
    assert np.array_equal(decoders.decode(encoded(2)).pixels, decode(encoded(2)).pixels)
    assert threading.active_count() < 20

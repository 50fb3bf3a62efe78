"""Large pictures: as a worker handles them, in a process of their own whose memory is looked at."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from restore_core import checkpoint, inference
from restore_core.codec import Pixels
from restore_core.config import ResidualUNetConfig
from restore_core.model import build

WORKER = Path(__file__).parent / "large_worker.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As small as it goes: it is not the network's work that is looked at. It takes nothing for destroyed, since what
    is no patch would be looked for in each tile, of which each sees more or less of it."""
    import torch

    folder = tmp_path_factory.mktemp("model")
    config = ResidualUNetConfig(channels=(4, 8), blocks=(1, 1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(config)
        with torch.no_grad():
            network.tail.bias[6] = 10  # type: ignore[union-attr, index, operator]
        checkpoint.save(network, config, {}, folder)
    return folder


def save(path: Path, height: int, width: int, seed: int = 0, **options: Any) -> None:
    """A smooth picture without much in it, whatever its size."""
    small = np.random.default_rng(seed).integers(40, 216, (9, 9, 3), np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path, **options)


def work(source: Path, output: Path, model: Path, *limit: int) -> list[dict[str, Any]]:
    """Let a worker restore the folder: with the real ones' settings of the allocator, or without its reserves."""
    from restore_core.pipelines.cluster import WORKER_MEMORY

    command = [sys.executable, "-W", "ignore::UserWarning", WORKER, source, output, model, *limit]
    done = subprocess.run(
        [*map(str, command)],
        env={**os.environ, **({} if limit else WORKER_MEMORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def pixels_of(path: Path) -> Pixels:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return np.asarray(Image.open(path))


def test_where_memory_really_ends_smaller_tiles_go_on(tmp_path: Path, model: Path) -> None:
    """The kernel refuses what is over a limit, so that numpy, torch and Pillow really fail to allocate."""
    sizes = {"a.png": (1000, 1000), "b.png": (1, 20000), "c.png": (20000, 1)}
    for name, size in sizes.items():
        save(tmp_path / "in" / name, *size)
    plenty = work(tmp_path / "in", tmp_path / "plenty", model)
    assert [(row["status"], row["message"]) for row in plenty] == [("restored", None)] * 3
    save(tmp_path / "in/d.png", 6000, 6000)  # which alone, before and after, is twice what there is
    scarce = work(tmp_path / "in", tmp_path / "scarce", model, 120)
    assert [(row["status"], row["error"]) for row in scarce] == [("restored", None)] * 3 + [("failed", "out_of_memory")]
    assert re.fullmatch(r"out of memory in tiles of 1024 pixels; done in tiles of (512|256)", scarce[0]["message"])
    for name in sizes:
        before, one, other = (pixels_of(tmp_path / place / name).astype(int) for place in ("in", "plenty", "scarce"))
        assert np.abs(one - other).max() <= 1
        assert not np.array_equal(one, before)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("file", "options"), [("a.jpg", {}), ("a.png", {}), ("a.tif", {"compression": "tiff_adobe_deflate"})]
)
def test_a_hundred_megapixels_fit_a_small_worker(
    tmp_path: Path, model: Path, file: str, options: dict[str, str]
) -> None:
    """Of 2 GiB; the bundled networks want up to 500 MiB more for a tile than the one here does."""
    save(tmp_path / "in" / file, 10_000, 10_000, **options)
    (row,) = work(tmp_path / "in", tmp_path / "out", model)
    assert (row["status"], row["message"]) == ("restored", None)
    assert row["VmHWM"] < 1500
    assert row["together"] < 2048, "with its codec process"
    assert row["VmRSS"] < 700, "its pixels were not given back: decoding the next one comes on top of them"
    before, after = pixels_of(tmp_path / "in" / file), pixels_of(tmp_path / "out" / file)
    assert after.shape == before.shape
    rows = slice(4000, 4400)  # some are enough, and the whole as integers would be large
    assert np.abs(after[rows].astype(int) - before[rows]).mean() > 0


@pytest.mark.faults
@pytest.mark.parametrize("file", ["a.jpg", "a.tif"])
def test_a_scan_of_200_megapixels(tmp_path: Path, model: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    save(tmp_path / "in" / file, 12_500, 16_000)
    (row,) = work(tmp_path / "in", tmp_path / "out", model)
    assert (row["status"], row["message"]) == ("restored", None)
    assert row["VmHWM"] < 3000
    with Image.open(tmp_path / "out" / file) as image:
        assert image.size == (16_000, 12_500)


@pytest.mark.faults
def test_a_hundred_megapixels_fit_2_gib_with_a_bundled_model(tmp_path: Path) -> None:
    """Ten minutes and more on one core, until it is written again: something is painted over."""
    save(tmp_path / "in/a.jpg", 10_000, 10_000)
    picture = Image.fromarray(pixels_of(tmp_path / "in/a.jpg"))
    for left in range(100, 10_000, 700):
        for top in range(100, 10_000, 700):
            picture.paste((0, 0, 0), (left, top, left + 150, top + 150))
    picture.save(tmp_path / "in/a.jpg", quality=95)
    (row,) = work(tmp_path / "in", tmp_path / "out", Path("faces-fast"))
    assert (row["status"], row["message"]) == ("restored", None)
    assert max(row["VmHWM"], row["together"]) < 2048, "with its codec process"


@pytest.mark.faults
def test_memory_stays_flat_over_many_large_pictures(tmp_path: Path, model: Path) -> None:
    for index in range(40):
        height, width = 2100 + 37 * index % 400, 2100 + 91 * index % 500
        save(tmp_path / f"in/{index:02d}{('.jpg', '.png')[index % 2]}", height, width, seed=index)
    rows = work(tmp_path / "in", tmp_path / "out", model)
    assert [row["status"] for row in rows] == ["restored"] * 40
    resident = [row["VmRSS"] for row in rows]
    assert max(resident[10:]) < max(resident[:10]) + 30, resident
    # Pieces leave gaps, and more with every size; of them no more is kept than that.
    assert max(row["idle"] for row in rows) * 2**20 < inference.IDLE_BYTES + 2**26

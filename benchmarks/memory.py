#!/usr/bin/env python
"""Memory of jobs/restore_bucket.py over large pictures: what each kind of file takes, and whether it stays flat.

`--images 1` measures two sizes of each kind, one job for each, with noise, which packs worst: the difference is what a
pixel takes. More images go through one job, all kinds in turn, smooth ones, and the most memory of each kind of process
is written down for each tenth of them. The network is as small as it goes: what is looked at is not the network's.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.restore_speed import KINDS, ROOT, processes_of
from jobs import command_line
from restore_core import manifest, provenance
from restore_core.config import ResidualUNetConfig, require
from restore_core.storage import LocalStorage

Pixels = npt.NDArray[np.uint8]
SAMPLE_S, SEARCH_S = 0.05, 1.0
"""How often memory is looked at, and how often for new processes."""
SIZES = 97
"""Of many pictures: no two neighbours are of one size."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    output: Path
    """The result file."""
    kinds: tuple[str, ...] = ("all",)
    """Of files, see `FILES`."""
    megapixels: float = 16
    """Of each picture; where kinds are measured, of the larger one."""
    images: int = 1
    """Through one job."""
    workers: int = 1
    """Of the job."""

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - {"all", *FILES}
        require(not unknown, "kinds", " ".join(self.kinds), f"use all, or some of: {', '.join(FILES)}")


def _deep(pixels: Pixels) -> npt.NDArray[np.uint16]:
    return pixels.astype(np.uint16) * 257


def _save_deep(pixels: Pixels, path: Path) -> None:
    import tifffile

    tifffile.imwrite(path, _deep(pixels), photometric="rgb", compression="zlib")


def _saved(mode: str, **options: Any) -> Callable[[Pixels, Path], None]:
    def save(pixels: Pixels, path: Path) -> None:
        image = Image.fromarray(pixels)
        if mode.endswith("A"):
            image.putalpha(Image.fromarray(pixels[:, :, 0]))
        image.convert(mode).save(path, **options)

    return save


FILES: dict[str, tuple[str, Callable[[Pixels, Path], None]]] = {
    "JPEG": ("jpg", _saved("RGB", quality=95)),
    "TIFF of JPEG, CMYK": ("cmyk.tif", _saved("CMYK", compression="jpeg", quality=95)),
    "PNG": ("png", _saved("RGB", compress_level=1)),
    "PNG, grey": ("grey.png", _saved("L", compress_level=1)),
    "PNG, palette": ("palette.png", _saved("P", compress_level=1)),
    "PNG, alpha": ("alpha.png", _saved("RGBA", compress_level=1)),
    "PNG, grey of 16 bits": ("deep.png", lambda pixels, path: Image.fromarray(_deep(pixels[:, :, 0])).save(path)),
    "TIFF": ("tif", _saved("RGB", compression="tiff_adobe_deflate")),
    "TIFF, alpha": ("alpha.tif", _saved("RGBA")),
    "TIFF, CMYK": ("inks.tif", _saved("CMYK")),
    "TIFF, LAB": ("lab.tif", _saved("LAB")),
    "TIFF, 16 bits": ("deep.tif", _save_deep),
    "BMP": ("bmp", _saved("RGB")),
    "GIF": ("gif", _saved("P")),
    "WebP": ("webp", _saved("RGB", quality=90, method=0)),
    "WebP, lossless": ("lossless.webp", _saved("RGB", lossless=True, quality=0, method=0)),
    "WebP, alpha": ("alpha.webp", _saved("RGBA", quality=90, method=0)),
    "AVIF": ("avif", _saved("RGB", quality=90, speed=10)),
    "JPEG 2000": ("jp2", _saved("RGB", irreversible=False)),
}
"""By name: how such a file's name ends, and what writes it."""


def noise(side: int, seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def smooth(side: int, seed: int) -> Pixels:
    small = np.random.default_rng(seed).integers(40, 216, (9, 9, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC))


class Watch(threading.Thread):
    """While a job runs: megabytes resident of each of its processes, again and again."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self._mark = mark.encode()
        self._ended = threading.Event()
        self.samples: list[tuple[float, dict[str, float]]] = []
        """When, and the largest process of each kind; "worker and codecs" is the largest sum of one worker's."""

    def run(self) -> None:
        found: dict[Path, str] = {}
        searched = 0.0
        while not self._ended.wait(SAMPLE_S):
            if time.time() - searched > SEARCH_S:
                found, searched = processes_of(self._mark), time.time()
            most: dict[str, float] = {}
            together: dict[int, float] = {}
            for folder, kind in found.items():
                try:
                    status = (folder / "status").read_text()
                except OSError:  # it has ended
                    continue
                lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
                if "VmRSS" not in lines:
                    continue
                size = int(lines["VmRSS"].split()[0]) / 1024
                most[kind] = max(most.get(kind, 0), size)
                if kind in ("worker", "codec"):
                    worker = int(folder.name) if kind == "worker" else int(lines["PPid"])
                    together[worker] = together.get(worker, 0) + size
            self.samples.append((time.time(), {**most, "worker and codecs": max(together.values(), default=0)}))

    def end(self) -> None:
        self._ended.set()
        self.join()


def the_job(job: Memory, source: Path, target: Path, model: Path) -> tuple[Watch, list[dict[str, Any]]]:
    """Runs it; returns what was seen, and the ledger's rows as they were finished."""
    name, value = "RESTORE_MEMORY", f"{os.getpid()}-{time.monotonic_ns()}"
    watch = Watch(f"{name}={value}")
    watch.start()
    done = subprocess.run(  # noqa: S603
        [
            sys.executable, "jobs/restore_bucket.py", "--input", source, "--output", target, "--model", model,
            "--device", "cpu", "--workers", str(job.workers), "--max-megapixels", "1000",
        ],
        cwd=ROOT, env={**os.environ, name: value}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    watch.end()
    if done.returncode:
        raise SystemExit(f"the job: {done.stderr[-3000:]}")
    rows = manifest.Ledger(LocalStorage(target), "reader").latest().to_pylist()
    if bad := [row for row in rows if row["status"] != "restored"]:
        raise SystemExit(f"this is no measurement: {bad[0]['key']} {bad[0]['status']} {bad[0]['message']}")
    return watch, sorted(rows, key=lambda row: row["finished_at"])


def bytes_per_pixel(job: Memory, kind: str, model: Path) -> dict[str, Any]:
    """Of worker and codec processes together at their most: the difference between two sizes, for each pixel."""
    ending, save = FILES[kind]
    most = []
    sides = [int((job.megapixels * 1e6 * part) ** 0.5) for part in (0.5, 1)]
    for side in sides:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder).resolve()
            (root / "in").mkdir()
            save(noise(side, 0), root / f"in/a.{ending}")
            watch, rows = the_job(job, root / "in", root / "out", model)
        most.append(max(sample["worker and codecs"] for _, sample in watch.samples))
    slope = (most[1] - most[0]) * 2**20 / (sides[1] ** 2 - sides[0] ** 2)
    return {"kind": kind, "bytes_per_pixel": round(slope, 1), "mb": round(most[1]), "mode": rows[0]["mode"]}


def over_many(job: Memory, kinds: tuple[str, ...], model: Path) -> dict[str, Any]:
    """The most of each kind of process, megabytes, while each tenth of the pictures was restored."""
    side = int((job.megapixels * 1e6) ** 0.5)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        (root / "in").mkdir()
        distinct = math.lcm(SIZES, len(kinds))
        for index in range(job.images):
            ending, save = FILES[kinds[index % len(kinds)]]
            path = root / f"in/{index:06d}.{ending}"
            if index < distinct:
                save(smooth(side - index % SIZES, index), path)
            else:  # the same again under another name
                path.hardlink_to(root / f"in/{index % distinct:06d}.{ending}")
        size = sum(path.stat().st_size for path in (root / "in").iterdir())
        started = time.time()
        watch, rows = the_job(job, root / "in", root / "out", model)
    ends = [row["finished_at"].timestamp() for row in rows]
    tenths = [started, *(ends[(len(ends) * part) // 10 - 1] for part in range(1, 11))]
    most: dict[str, list[int]] = {kind: [] for kind in (*KINDS, "worker and codecs")}
    for begin, end in itertools.pairwise(tenths):
        samples = [sample for at, sample in watch.samples if begin <= at <= end]
        for kind, values in most.items():
            values.append(round(max((sample.get(kind, 0) for sample in samples), default=0)))
    return {"seconds": round(ends[-1] - started), "encoded_bytes": size, "most_mb_by_tenth": most}


def save_smallest_network(folder: Path) -> None:
    """Of one scale; what is looked at is all the rest."""
    import torch

    from restore_core import checkpoint
    from restore_core.model import ResidualUNet

    torch.manual_seed(0)
    config = ResidualUNetConfig(channels=(4,), blocks=(1,))
    network = ResidualUNet(config)
    assert network.tail.bias is not None
    with torch.no_grad():
        network.tail.bias[6] = 100  # all pixels survive: what such a network invents would be looked at twice
    checkpoint.save(network, config, {}, folder)


def main(job: Memory) -> int:
    kinds = tuple(FILES) if "all" in job.kinds else job.kinds
    result: dict[str, Any] = {**provenance.record(), "megapixels": job.megapixels, "images": job.images}
    with tempfile.TemporaryDirectory() as folder:
        save_smallest_network(Path(folder))
        if job.images == 1:
            result["kinds"] = []
            for kind in kinds:
                result["kinds"].append(bytes_per_pixel(job, kind, Path(folder)))
                print(result["kinds"][-1], flush=True)
        else:
            result |= {"files": kinds, **over_many(job, kinds, Path(folder))}
            print(json.dumps(result["most_mb_by_tenth"]))
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.output.write_text(json.dumps(result, indent=2) + "\n")
    return command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, Memory))

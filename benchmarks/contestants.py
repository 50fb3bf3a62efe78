#!/usr/bin/env python
"""What someone would write by hand in place of the restore job, and what no pipeline can be faster than.

Each reads a folder of photographs, lets the same weights restore them, and writes files of the same names and formats
with Pillow; what else the job does (diagnosis, metadata, quality tables, hashes, ledger, resume, a wall against bad
files) is not theirs. Prints a line of JSON: images, seconds once all was loaded, and seconds until then.
"""

import io
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import numpy.typing as npt
import torch
import tyro
from PIL import Image

from restore_core import checkpoint, codec, inference
from restore_core.config import Precision
from restore_core.model import Prediction

Pixels = npt.NDArray[np.uint8]
Network = Callable[[Pixels], Pixels]
"""uint8 [B, H, W, 3] -> the same"""
Name = Literal[
    "plain loop", "pool", "data loader", "ray template", "onnxruntime", "openvino", "openvino, pool",
    "codec only", "model only", "model only, compiled", "model only, pool", "all looks, pool", "restorer only, pool",
]  # fmt: skip
STARTED = time.perf_counter()
CORES = len(os.sched_getaffinity(0))
BY_HAND = "plain loop", "pool", "data loader", "ray template"
ALONE = "model only, pool", "all looks, pool", "restorer only, pool"
"""In a process a core, on pixels that are there."""
BATCH_PIXELS = {"cpu": 2**17, "cuda": 2**20}
"""Together, at most: what is best for the caches of CPUs (more take 1.1 to 1.5 times as long)."""
MULTIPLE = 16
"""Of which the sides are that the exported networks are given."""
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jpeg": ("JPEG", {"quality": 95}), ".png": ("PNG", {"compress_level": 1}), ".webp": ("WEBP", {"quality": 95}),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Contestant:
    name: Name
    """Who it is."""
    input: Path
    """A folder of photographs."""
    output: Path
    """A folder for what is restored."""
    model: str
    """A bundled model's name, or the path of a model folder."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where torch's network is."""
    precision: Precision = "float32"
    """Of the network's arithmetic."""
    batch_size: int = 16
    """Images of one size handled together, at most."""


# --- Files ---------------------------------------------------------------------------------------------------------


def decode(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def encode(pixels: Pixels, path: Path) -> None:
    format, options = FORMATS[path.suffix]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    path.write_bytes(file.getvalue())


def batches(decoded: Iterable[tuple[Path, Pixels]], size: int, pixels: int) -> Iterator[tuple[list[Path], Pixels]]:
    """Of `size` at a time, those of one shape together, up to so many `pixels`."""
    rest = iter(decoded)
    while some := list(islice(rest, size)):
        for shape in dict.fromkeys(image.shape for _, image in some):
            alike = [pair for pair in some if pair[1].shape == shape]
            most = max(1, pixels // (shape[0] * shape[1]))
            for start in range(0, len(alike), most):
                paths, images = zip(*alike[start : start + most], strict=True)
                yield list(paths), np.stack(images)


# --- Networks ------------------------------------------------------------------------------------------------------


class ImageOnly(torch.nn.Module):
    """float [B, 3, H, W] -> the same"""

    def __init__(self, job: Contestant) -> None:
        super().__init__()
        self.network = checkpoint.load(checkpoint.read(job.model), "cpu").to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x).image  # type: ignore[no-any-return]


def torch_network(job: Contestant, threads: int, *, compiled: bool = False) -> Network:
    torch.set_num_threads(threads)
    network = ImageOnly(job).to(job.device)
    run = torch.compile(network) if compiled else network

    @torch.inference_mode()
    def restore(batch: Pixels) -> Pixels:
        x = torch.from_numpy(batch).to(job.device).permute(0, 3, 1, 2)
        x = x.contiguous(memory_format=torch.channels_last) / 255
        with torch.autocast(job.device, torch.bfloat16, enabled=job.precision == "bfloat16"):
            image = run(x)
        image = (image.float() * 255).round_().clamp_(0, 255).to(torch.uint8)
        return image.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    return restore


class TimedRestorer(inference.Restorer):
    """All that the job does to pixels: the network, its second looks and the diagnosis."""

    in_network = 0.0
    """Seconds that the network took of it."""

    def _forward(self, batch: torch.Tensor, device: torch.device) -> Prediction:
        started = time.perf_counter()
        try:
            return super()._forward(batch, device)
        finally:
            self.in_network += time.perf_counter() - started

    def _streamed(self, image: Pixels, rung: inference.Rung) -> Iterator[Prediction]:
        parts = super()._streamed(image, rung)
        while True:
            started = time.perf_counter()
            part = next(parts, None)
            self.in_network += time.perf_counter() - started
            if part is None:
                return
            yield part


def _exported(run: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]) -> Network:
    def restore(batch: Pixels) -> Pixels:
        _, height, width, _ = batch.shape
        batch = np.pad(batch, ((0, 0), (0, -height % MULTIPLE), (0, -width % MULTIPLE), (0, 0)), "edge")
        image = run(np.ascontiguousarray(batch.transpose(0, 3, 1, 2), np.float32) / 255)[:, :, :height, :width]
        return np.ascontiguousarray((image * 255).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1))

    return restore


def onnx_network(job: Contestant) -> Network:
    import onnxruntime

    if job.precision == "bfloat16":
        raise SystemExit("onnxruntime: has no convolution in bfloat16 on CPUs")
    file = io.BytesIO()
    torch.onnx.export(
        ImageOnly(job), (torch.rand(1, 3, 64, 64),), file, input_names=["x"], output_names=["y"], dynamo=False,
        dynamic_axes={name: {0: "b", 2: "h", 3: "w"} for name in "xy"},
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return _exported(lambda x: session.run(None, {"x": x})[0])


def openvino_network(job: Contestant, threads: int = 0) -> Network:
    """On so many threads; 0 for as many as it takes by itself."""
    import openvino

    model = openvino.convert_model(ImageOnly(job), example_input=torch.rand(1, 3, 64, 64))
    precision = "bf16" if job.precision == "bfloat16" else "f32"
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return _exported(lambda x: compiled(x)[0])


# --- Contestants ---------------------------------------------------------------------------------------------------


def loop(decoded: Iterable[tuple[Path, Pixels]], job: Contestant, network: Network, *, write: bool = True) -> None:
    for paths, pixels in batches(decoded, job.batch_size, BATCH_PIXELS[job.device]):
        restored = network(pixels)
        if write:
            for path, one in zip(paths, restored, strict=True):
                encode(one, job.output / path.name)


class Child:
    """A process of a pool: one core, a network of its own where it needs one."""

    network: Network
    restorer: TimedRestorer

    @classmethod
    def start(cls, job: Contestant) -> None:
        if job.name == "openvino, pool":
            cls.network = openvino_network(job, threads=1)
        elif job.name in ("all looks, pool", "restorer only, pool"):
            torch.set_num_threads(1)
            cls.restorer = TimedRestorer(checkpoint.read(job.model), precision=job.precision)
            cls.network = lambda batch: np.stack([result.pixels for result in cls.restorer(list(batch))])
        elif job.name != "codec only":
            cls.network = torch_network(job, threads=1)

    @classmethod
    def work(cls, job: Contestant, files: list[Path]) -> float:
        """Returns seconds, of what counts."""
        decoded = [(path, decode(path)) for path in files] if job.name in ALONE else []
        loop(decoded[: job.batch_size], job, cls.network, write=False) if decoded else None  # as warm as it gets
        started = time.perf_counter()
        before = cls.restorer.in_network if job.name == "all looks, pool" else 0
        if job.name in ("pool", "openvino, pool"):
            loop(((path, decode(path)) for path in files), job, cls.network)
        elif decoded:
            loop(decoded, job, cls.network, write=False)
        else:
            for path in files:
                cls.code(path, job.output / path.name)
        return cls.restorer.in_network - before if job.name == "all looks, pool" else time.perf_counter() - started

    @staticmethod
    def code(path: Path, output: Path) -> None:
        """As the job does it, with quality tables, metadata and all; each pixel differs from the source's."""
        data = path.read_bytes()
        picture = codec.decode(data)
        output.write_bytes(codec.encode(picture.pixels ^ 1, data, picture=picture, software="speed"))


class Files(torch.utils.data.Dataset[tuple[Path, Pixels]]):
    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Path, Pixels]:
        return self.files[index], decode(self.files[index])


class RayNetwork:
    """What Ray's documentation shows: a class with the model, called with a batch of columns."""

    def __init__(self, job: Contestant) -> None:
        self.network = torch_network(job, threads=1)
        self.most = BATCH_PIXELS[job.device]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = list(batch["image"])
        restored = {}
        named = ((Path(str(index)), image) for index, image in enumerate(images))
        for names, pixels in batches(named, len(images), self.most):
            restored |= {int(str(name)): one for name, one in zip(names, self.network(pixels), strict=True)}
        batch["image"] = [restored[index] for index in range(len(images))]
        return batch


def ray_template(files: list[Path], job: Contestant) -> None:
    """As in its guide to batch inference: read_images, map_batches, write_images. (It names the files anew, and its
    processes start within the time.)"""
    import ray.data

    dataset = ray.data.read_images([str(path) for path in files], mode="RGB")
    dataset = dataset.map_batches(  # half a CPU each, or nothing would be left to read with
        RayNetwork, fn_constructor_args=(job,), batch_size=job.batch_size, concurrency=CORES, num_cpus=0.5
    )
    dataset.write_images(str(job.output), "image", file_format=FORMATS[files[0].suffix][0].lower())


def prepare(files: list[Path], job: Contestant) -> Callable[[], float | None]:
    """Load everything. Returns what is measured; it may return the seconds that count itself."""
    if job.name == "ray template":
        import ray

        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        ray.init(address="local", num_cpus=CORES, runtime_env={"env_vars": {"PYTHONPATH": path}})
        return lambda: ray_template(files, job)
    if job.name in ("pool", "openvino, pool", "codec only", *ALONE):
        processes = multiprocessing.get_context("spawn").Pool(CORES, Child.start, (job,))
        mixed = random.Random(0).sample(files, len(files))  # their damages take turns  # noqa: S311
        shares = [mixed[core::CORES] for core in range(CORES)]
        if job.name not in ALONE:  # in smaller pieces, so that all end together
            shares = [files[start : start + job.batch_size] for start in range(0, len(files), job.batch_size)]
            processes.starmap(Child.work, [(job, files[: job.batch_size])] * CORES, chunksize=1)  # so warm
            return lambda: processes.starmap(Child.work, [(job, share) for share in shares], chunksize=1) and None
        return lambda: max(processes.starmap(Child.work, [(job, share) for share in shares], chunksize=1))
    if job.name == "onnxruntime":
        network = onnx_network(job)
    elif job.name == "openvino":
        network = openvino_network(job)
    else:
        network = torch_network(job, CORES, compiled=job.name == "model only, compiled")
    loop([(path, decode(path)) for path in files[: job.batch_size]], job, network, write=False)  # as warm as it gets
    if job.name.startswith("model only"):
        decoded = [(path, decode(path)) for path in files]
        return lambda: loop(decoded, job, network, write=False)
    if job.name == "data loader":
        # One process decodes, while the network has all cores.
        loader = torch.utils.data.DataLoader(Files(files), job.batch_size, num_workers=1, collate_fn=list)
        return lambda: loop((pair for batch in loader for pair in batch), job, network)
    return lambda: loop(((path, decode(path)) for path in files), job, network)


def main(job: Contestant) -> None:
    files = sorted(job.input.iterdir())
    run = prepare(files, job)
    loaded = time.perf_counter()
    seconds = run()
    seconds = time.perf_counter() - loaded if seconds is None else seconds
    print(json.dumps({"images": len(files), "seconds": seconds, "until loaded, s": loaded - STARTED}))


if __name__ == "__main__":
    main(tyro.cli(Contestant))

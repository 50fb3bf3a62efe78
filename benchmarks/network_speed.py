#!/usr/bin/env python
"""A bundled network alone, at several batch sizes: as it is, compiled, as a CUDA graph, and beside its convolutions.

The convolutions alone, each on an input of its own that lies ready (on a GPU as a graph), are what no network of these
shapes can be faster than with the same library. Images a second, medians of all rounds.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from jobs import command_line
from restore_core import checkpoint, provenance
from restore_core.config import require
from restore_core.model import count_macs, exact_float32

Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class NetworkSpeed:
    output: Path
    """The result file."""
    model: str = "faces"
    """A bundled model's name, or the path of a model folder."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the network is."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of its arithmetic."""
    side: int = 256
    """Of the square images, pixels."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """How many images go through at once."""
    compile: bool = False
    """Measure torch.compile too, which takes minutes."""
    rounds: int = 5
    """How often each has its turn; the medians count."""

    def __post_init__(self) -> None:
        require(bool(self.batches) and min(self.batches) > 0, "batches", self.batches, "name some numbers of images")


def ways(network: nn.Module, job: NetworkSpeed, count: int) -> Iterator[tuple[str, Run]]:
    """What is measured for `count` images at once."""
    x = torch.rand(count, 3, job.side, job.side, device=job.device).contiguous(memory_format=torch.channels_last)

    def run(model: nn.Module = network) -> Tensor:
        with torch.autocast(job.device, torch.bfloat16, enabled=job.precision == "bfloat16"):
            return model(x).image  # type: ignore[no-any-return]

    yield "network", run
    alone = convolutions(network, x, job)
    yield "its convolutions", recorded(alone) if job.device == "cuda" else alone
    if job.compile:
        compiled = torch.compile(network)
        yield "network, compiled", lambda: run(compiled)
    if job.device == "cuda":
        yield "network, CUDA graph", recorded(run)


def convolutions(network: nn.Module, x: Tensor, job: NetworkSpeed) -> Run:
    """All convolutions of the network for `x`, in its precision."""
    layers: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        layers.append((module, torch.rand_like(inputs[0])))

    kinds = nn.Conv2d | nn.ConvTranspose2d
    hooks = [part.register_forward_pre_hook(note) for part in network.modules() if isinstance(part, kinds)]
    network(x)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        with torch.autocast(job.device, torch.bfloat16, enabled=job.precision == "bfloat16"):
            for layer, values in layers:
                layer(values)

    if job.precision == "bfloat16":
        layers[:] = [(layer, values.bfloat16()) for layer, values in layers]
    return run


def recorded(run: Run) -> Run:
    """The same kernels, launched by the GPU itself."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@torch.inference_mode()
def measured(network: nn.Module, job: NetworkSpeed, count: int) -> dict[str, float]:
    """Images a second, by the ways."""
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        for name, run in ways(network, job, count)
    }
    rates: dict[str, list[float]] = {}
    for _ in range(job.rounds):
        for name, timer in timers.items():
            rates.setdefault(name, []).append(count / timer.blocked_autorange(min_run_time=0.2).median)
    return {name: round(statistics.median(values), 2) for name, values in rates.items()}


def main(job: NetworkSpeed) -> int:
    exact_float32()
    folder = checkpoint.read(job.model)
    network = checkpoint.load(folder, job.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = []
    for count in job.batches:
        try:
            rates = measured(network, job, count)
        except torch.OutOfMemoryError:
            print(f"{count} images do not fit", flush=True)
            break
        share = rates["network"] / rates["its convolutions"]
        rows.append({"images": count, "images_per_second": rates, "of its convolutions": round(share, 3)})
        print(json.dumps(rows[-1]), flush=True)
    if not rows:
        raise SystemExit("--batches: begin with fewer images")
    macs = count_macs(folder.architecture, job.side, job.side)
    fastest = max(rate for row in rows for rate in row["images_per_second"].values())
    result = {
        **provenance.record(),
        "model": {"name": job.model, "sha256": folder.sha256},
        "device": torch.cuda.get_device_name() if job.device == "cuda" else "cpu",
        "precision": job.precision,
        "side": job.side,
        "macs_per_image": macs,
        "teraflops_at_most": round(fastest * 2 * macs / 1e12, 3),
        "rows": rows,
    }
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.output.write_text(json.dumps(result, indent=2) + "\n")
    return command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, NetworkSpeed))

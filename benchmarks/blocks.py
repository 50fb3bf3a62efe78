#!/usr/bin/env python
"""Which block in the network? Others of the field in place of ours, in the same U-Net, trained alike for the same time.

All learn from the same photographs in memory with the same damages, one after the other on all cores. Written down are
parameters, multiply-adds, what a photograph costs, and what is reached after equal time. Short: for choosing.
"""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs import command_line
from restore_core import provenance, sources, trainer
from restore_core.config import PRESETS, Phase, ResidualUNetConfig
from restore_core.model import ResidualBlock, ResidualUNet, count_parameters, macs_of
from restore_core.pipelines.training import to_photographs
from restore_core.storage import open_storage
from restore_core.trainer import VALIDATION, Photographs, Trainer

SIZE, BATCH, VALIDATED = 48, 32, 128


@dataclass(frozen=True, kw_only=True)
class Blocks:
    data: str
    """Dataset Parquet from jobs/pack_dataset.py."""
    output: Path = Path("benchmarks/blocks.json")
    """The result file."""
    seconds: int = 120
    """Training time of each, without validation."""
    images: int = 3200
    """Training photographs."""


class LargeKernel(ResidualBlock):
    """Ours with 5x5 kernels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.first = nn.Conv2d(channels, channels, 5, padding=2)
        self.second = nn.Conv2d(channels, channels, 5, padding=2)
        with torch.no_grad():
            self.second.weight.mul_(0.1)


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [B, C, H, W]


class NAFBlock(nn.Module):
    """NAFNet's block (Chen 2022, figure 2e): gates by products instead of activations, simplified channel attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(ChannelNorm(channels) for _ in range(2))
        self.widen = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.attention = nn.Conv2d(channels, channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)
        self.feed = nn.Conv2d(channels, 2 * channels, 1)
        self.back = nn.Conv2d(channels, channels, 1)
        self.scales = nn.ParameterList(torch.zeros(1, channels, 1, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.depthwise(self.widen(self.norms[0](x))).chunk(2, dim=1)
        y = left * right
        y = y * self.attention(y.mean(dim=(2, 3), keepdim=True))
        x = x + self.project(y) * self.scales[0]
        left, right = self.feed(self.norms[1](x)).chunk(2, dim=1)
        return x + self.back(left * right) * self.scales[1]


class WithAttention(ResidualBlock):
    """Ours with squeeze-and-excitation (Hu 2018): every block sees the mean over the whole image."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.squeeze = nn.Conv2d(channels, max(4, channels // 4), 1)
        self.excite = nn.Conv2d(max(4, channels // 4), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.first(x)))
        weight = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean(dim=(2, 3), keepdim=True)))))
        return x + y * weight * 2


CONTESTANTS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "residual 3x3 (ours)": (ResidualBlock, (1, 1, 1, 1, 1)),
    "residual 5x5": (LargeKernel, (1, 1, 1, 1, 1)),
    "residual 3x3, channel attention": (WithAttention, (1, 1, 1, 1, 1)),
    "NAFNet": (NAFBlock, (2, 2, 2, 2, 2)),
}
"""Block, and how many at each scale: NAFNet's are light, so it gets two."""


def measure(name: str, train: Photographs, held_out: Photographs, seconds: int) -> dict[str, object]:
    block, counts = CONTESTANTS[name]
    network = ResidualUNetConfig(channels=(24, 48, 96, 160, 192), blocks=counts)
    config = dataclasses.replace(
        PRESETS["faces"], model=network, phases=(Phase(sizes=(SIZE,), epochs=1),), batch_size=BATCH, val_size=SIZE
    )

    def fresh(steps: int) -> Trainer:
        with patch.object(trainer, "build", lambda _: ResidualUNet(network, block)):
            return Trainer(dataclasses.replace(config, val_images=VALIDATED), steps)

    batches = _batches(train)
    warm = fresh(1000)
    for batch in itertools.islice(batches, 3):
        warm.step(batch, SIZE)
    started = time.perf_counter()
    for batch in itertools.islice(batches, 10):
        warm.step(batch, SIZE)
    steps = round(seconds / ((time.perf_counter() - started) / 10))  # the learning rate ends with the time
    learner = fresh(steps)
    started = time.perf_counter()
    learner.train_epoch(itertools.islice(_batches(train), steps))
    spent = time.perf_counter() - started
    quality = learner.evaluate(held_out)
    with torch.device("meta"):
        on_meta = ResidualUNet(network, block)
    return {
        "block": name,
        "parameters": count_parameters(learner.model),
        "macs": macs_of(on_meta, SIZE, SIZE),
        "steps": steps,
        "seconds": round(spent, 1),
        "milliseconds_per_photograph": round(_forward_ms(learner.average), 3),
        "psnr_db": {damage: round(quality[f"psnr_{damage}"], 2) for damage in VALIDATION},
    }


def _batches(train: Photographs) -> Iterator[Photographs]:
    random = np.random.default_rng(0)
    for step in itertools.count():
        rows = random.integers(0, len(train), BATCH)
        keys = [f"{train.keys[row]} {step}" for row in rows]
        yield Photographs(keys, train.pixels[rows], train.height[rows], train.width[rows])


@torch.no_grad()
def _forward_ms(model: nn.Module) -> float:
    """Of one photograph in a batch, float32, median of 10."""
    images = torch.rand(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - started)
    return float(np.median(times)) / BATCH * 1000


def main(job: Blocks) -> int:
    storage = open_storage(job.data, option="--data")

    def photographs(split: str, count: int) -> Photographs:
        return to_photographs(sources.read_split(storage, split, 256, count), 256)

    train, held_out = photographs(sources.TRAIN, job.images), photographs(sources.VALIDATION, VALIDATED)
    rows = []
    for name in CONTESTANTS:
        rows.append(measure(name, train, held_out, job.seconds))
        print(json.dumps(rows[-1]), flush=True)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.output.write_text(json.dumps({**provenance.record(), "rows": rows}, indent=2) + "\n")
    return command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, Blocks))

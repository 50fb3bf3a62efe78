#!/usr/bin/env python
"""Go on with a bundled network for so many seconds on one GPU, with all photographs on it.

Without Ray, and with no packages but torch, numpy, pyarrow, Pillow and safetensors: for a machine that is lent for
minutes. The steps are those of jobs/train.py. The learning rate falls by the clock, so that what there is at the end is
a finished model. The model folder is written now and then; a line of JSON for each time goes to OUTPUT/PRESET.jsonl, of
which the first says how good the network was before.

    python benchmarks/train_resident.py --data data/lfw-packed --output runs/resident --preset faces --seconds 360
"""

import argparse
import dataclasses
import io
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps

from restore_core import checkpoint, provenance
from restore_core.config import PRESETS, Phase, TrainConfig
from restore_core.degradations import to_device
from restore_core.trainer import Photographs, Trainer

SAVE_SECONDS, SAVE_STEPS = 75.0, 20
"""The model is written after so much time, but not before so many steps."""
PHASES = Phase(sizes=(48, 64, 96), epochs=2), Phase(sizes=(48, 64, 128, 250), epochs=3)
"""Sides of the samples, pixels; an epoch is a fifth of the time, however many passes over the photographs that is."""
LEARNING_RATES = {"faces": 4e-4, "faces-fast": 7e-4}


def read(folder: Path, split: str, most: int | None = None) -> Photographs:
    """The photographs of a packed dataset, all of them in memory. Their longer side fits the canvas."""
    tables = [pq.read_table(path, columns=["key", "split", "image"]) for path in sorted(folder.glob("*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist() if row["split"] == split][:most]
    canvas = TrainConfig.canvas

    def decode(row: dict[str, bytes]) -> np.ndarray:
        with Image.open(io.BytesIO(row["image"])) as image:
            upright = ImageOps.exif_transpose(image)
            upright.thumbnail((canvas, canvas), Image.Resampling.LANCZOS)
            return np.asarray(upright.convert("RGB"))

    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(decode, rows))
    heights, widths = ([image.shape[axis] for image in pixels] for axis in (0, 1))
    return Photographs.of([row["key"] for row in rows], [p.tobytes() for p in pixels], heights, widths, canvas)


def batches(
    photographs: Photographs, config: TrainConfig, share_done: Callable[[], float]
) -> Iterator[tuple[Photographs, int, float]]:
    """Photographs (on the trainer's device) in random order, the side of the samples, and how many epochs are over.
    Under other keys in every pass: from those come crops and damages."""
    generator = random.Random(config.seed)  # noqa: S311
    order: list[int] = []
    passes = 0
    while (epochs := share_done() * config.epochs) < config.epochs:
        size = generator.choice(config.sizes(int(epochs)))
        count = max(1, min(config.batch_size, config.step_pixels // size**2, len(photographs)))
        if len(order) < count:
            passes += 1
            order = generator.sample(range(len(photographs)), len(photographs))
        rows, order = order[:count], order[count:]
        at = to_device(torch.tensor(rows), photographs.pixels.device)
        keys = [f"{photographs.keys[row]} {passes}" for row in rows]
        yield Photographs(keys, photographs.pixels[at], photographs.height[at], photographs.width[at]), size, epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a packed dataset (jobs/pack_dataset.py)")
    parser.add_argument("--output", type=Path, required=True, help="where the folder PRESET and PRESET.jsonl go")
    parser.add_argument("--preset", choices=sorted(LEARNING_RATES), default="faces")
    parser.add_argument("--seconds", type=float, required=True, help="of training, without reading and validation")
    parser.add_argument("--batch-size", type=int, default=256, help="photographs of a step, at most")
    parser.add_argument("--step-pixels", type=int, default=2**21, help="pixels of a step, at most")
    parser.add_argument(
        "--learning-rate", type=float, help="at the beginning; 4e-4 for faces and 7e-4 for faces-fast if not given"
    )
    parser.add_argument("--val-images", type=int, default=128, help="photographs of the validation")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    rate = options.learning_rate or LEARNING_RATES[options.preset]
    initial = checkpoint.read(options.preset)
    config = dataclasses.replace(
        preset, phases=PHASES, batch_size=options.batch_size, step_pixels=options.step_pixels,
        val_images=options.val_images, optimizer=dataclasses.replace(preset.optimizer, learning_rate=rate),
        seed=int(initial.sha256[:15], 16),  # as jobs/train.py --init has it: other samples than before
    )  # fmt: skip
    torch.backends.cudnn.benchmark = True  # few shapes, each seen thousands of times
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / f"{options.preset}.jsonl"

    def say(**values: object) -> None:
        print(json.dumps(values), flush=True)
        with log.open("a") as file:
            file.write(json.dumps(values) + "\n")

    started = time.monotonic()
    device = torch.device(options.device)
    held_out, photographs = read(options.data, "val", config.val_images), read(options.data, "train")
    resident = Photographs(
        photographs.keys,
        *(torch.from_numpy(a).to(device) for a in (photographs.pixels, photographs.height, photographs.width)),
    )
    trainer = Trainer(config, steps_per_epoch=1, device=device)
    trainer.start_from(checkpoint.load(initial).state_dict())
    say(loaded_in=round(time.monotonic() - started, 1), photographs=len(resident), **trainer.evaluate(held_out))

    samples = steps = 0
    total = torch.zeros((), device=device)
    began = saved = time.monotonic()

    def trained() -> float:
        """Seconds of training until now."""
        return time.monotonic() - began

    def save() -> None:
        """Validate, and write the model folder, unless the training has diverged: then what is there stays."""
        nonlocal began, saved, total, steps
        seconds, paused = trained(), time.monotonic()
        row, loss = trainer.evaluate(held_out), total.item() / max(1, steps)
        rate = trainer.optimizer.param_groups[0]["lr"]
        say(seconds=round(seconds, 1), steps=trainer.steps, samples=samples, learning_rate=rate, train_loss=loss, **row)
        if not (math.isfinite(loss) and math.isfinite(row["val_loss"])):
            raise SystemExit("the training has diverged; lower --learning-rate")
        card = trainer.card(
            row,
            {
                **provenance.record(),
                "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else provenance.cpu(),
                "workers": 1, "minutes": round(seconds / 60, 1), "photographs": len(resident), "samples": samples,
                "started_from": {"name": initial.name, "sha256": initial.sha256},
            },
        )  # fmt: skip
        checkpoint.save(trainer.average, config.model, card, options.output / options.preset)
        total, steps, saved = torch.zeros((), device=device), 0, time.monotonic()
        began += saved - paused

    for batch, size, epochs in batches(resident, config, lambda: trained() / options.seconds):
        total += trainer.step(batch, size, epochs)
        samples, steps = samples + len(batch), steps + 1
        if steps >= SAVE_STEPS and time.monotonic() > saved + SAVE_SECONDS:
            save()
    save()


if __name__ == "__main__":
    main()

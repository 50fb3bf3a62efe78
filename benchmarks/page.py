#!/usr/bin/env python
"""Write benchmarks/README.md from the result files beside it, so that no figure there is typed."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER / "README.md"
NAMES = (
    ("job, steady state", "**the job, steady state**"),
    ("job, start-up included", "the job, start-up included"),
    ("plain loop", "plain loop: Pillow, torch on all cores, Pillow"),
    ("pool", "the same loop in a multiprocessing pool, one thread each"),
    ("data loader", "torch DataLoader decodes beside the network"),
    ("ray template", "Ray Data: read_images, map_batches, write_images"),
    ("onnxruntime", "plain loop with ONNX Runtime"),
    ("openvino", "plain loop with OpenVINO"),
    ("codec only", "floor: decode and encode only"),
    ("model only", "floor: network only, one process"),
    ("model only, compiled", "floor: network only, torch.compile"),
    ("model only, pool", "floor: network only, a process a core"),
)


def page() -> str:
    parts = [
        "# Measured",
        "Written by `python benchmarks/page.py` from the result files in this folder; each says how it came about.",
        *restoring(),
        *training(),
        *growing(),
        "## Quality",
        "[quality](quality/quality.md), [other methods](baselines/quality.md), [bfloat16](bfloat16/quality.md), "
        "[the study of seven networks](study/study.md); what is no damage: overlays.json; other blocks: blocks.json.",
    ]
    return "\n\n".join(parts) + "\n"


def restoring() -> Iterator[str]:
    results = [json.loads(path.read_text()) for path in sorted((FOLDER / "restore").glob("*.json"))]
    yield "## Restoring"
    yield (
        "Images a second, medians of all rounds; the contestants take turns over the same damaged files, each in a "
        "process of its own, and nearly all are restored. By hand means files through Pillow and the network and no more: no "
        "diagnosis, no metadata, no quality tables, no ledger."
    )
    for result in results:
        rates = result["images_per_second"]
        steady = rates["job, steady state"]
        megapixels = result["megapixels"] / result["images"]
        title = f"{result['corpus']}; `{result['model']['name']}`, {result['precision']}"
        rows = [
            f"| {title} | images/s | megapixels/s | the job is |",
            "|---|---|---|---|",
            *(
                f"| {words} | {rates[name]:.2f} | {rates[name] * megapixels:.2f} | {steady / rates[name]:.2f} |"
                for name, words in NAMES
                if name in rates
            ),
        ]
        yield "\n".join(rows)
        memory = ", ".join(f"{kind} {size}" for kind, size in result["memory_mb"].items())
        ratios = ", ".join(f"{ratio:.2f} {what}" for what, ratio in result["ratios"].items())
        yield (
            f"{ratios}. First photograph after {result['first_image_seconds']:.1f} s. Most memory, MB: {memory}. "
            f"{result['object_store_bytes_per_image']:,} bytes an image between processes of Ray. "
            f"{result['images']:,} images, {result['encoded_bytes'] / 1e6:.1f} MB."
        )
        yield origin(result)


def training() -> Iterator[str]:
    path = FOLDER / "training_speed.json"
    if not path.exists():
        return
    result = json.loads(path.read_text())
    rates = result["samples_per_second"]
    yield "## Training"
    yield (
        f"| `{result['preset']}` at {result['size']} px | samples/s |\n|---|---|\n"
        f"| jobs/train.py | {rates['job']:.1f} |\n| the same steps in a bare loop | {rates['bare loop']:.1f} |"
    )
    yield f"Median of the ratios: {result['ratio']:.2f}. {result['seconds_around_the_epochs']:.0f} s around the epochs."
    yield origin(result)


def growing() -> Iterator[str]:
    result = json.loads((FOLDER / "growth.json").read_text())
    names = list(result["results"][0])
    yield "## Number of objects"
    yield "What an object costs beside its pixels: files that are not there."
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(f"{row[name]:,}" for name in names) + " |" for row in result["results"]]
    yield "\n".join(lines)
    yield origin(result)


def origin(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    where = f"{result['hardware']}; commit {result['commit'][:12]}, {result['date']}; {versions}."
    return f"    {result['command']}\n\n{where}"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE)
    sys.exit(0)

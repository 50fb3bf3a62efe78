#!/usr/bin/env python
"""Write benchmarks/README.md, and the table in README.md, from the result files: no figure there is typed but
those of other tools, in peers.csv."""

import csv
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from restore_core import provenance

FOLDER = Path(__file__).resolve().parent
PAGE, README = FOLDER / "README.md", FOLDER.parent / "README.md"
QUALITY, PEERS = FOLDER / "quality" / "quality.json", FOLDER / "peers.csv"
BEGIN, END = "<!-- written by benchmarks/page.py -->\n", "<!-- until here -->\n"
NAMES = (
    ("job, steady state", "**the job, steady state**"),
    ("job, start-up included", "the job, start-up included"),
    ("plain loop", "plain loop: Pillow, torch on all cores, Pillow"),
    ("pool", "the same loop in a multiprocessing pool, one thread each"),
    ("data loader", "torch DataLoader decodes beside the network"),
    ("ray template", "Ray Data: read_images, map_batches, write_images; start included"),
    ("onnxruntime", "plain loop with ONNX Runtime"),
    ("openvino", "plain loop with OpenVINO"),
    ("openvino, pool", "OpenVINO in a multiprocessing pool, one thread each"),
    ("codec only", "floor: decode and encode only"),
    ("model only", "floor: network only, one process"),
    ("model only, compiled", "floor: network only, torch.compile"),
    ("model only, pool", "floor: network only, a process a core"),
    ("all looks, pool", "the network's part of all looks, a process a core"),
    ("restorer only, pool", "network, second looks and diagnosis only, a process a core"),
)
OWN = {
    "all looks, pool": "of the network's part of all looks",
    "restorer only, pool": "of network, looks and diagnosis alone",
}
"""No floors, since they are the job's own: how much the rest of it takes."""


def page() -> str:
    parts = [
        "# Measured",
        "Written by `python benchmarks/page.py` from the result files in this folder; each says how it came about.",
        *restoring(),
        *networks(),
        *training(),
        *growing(),
        *nodes(),
        *collecting(),
        *remembering(),
        "## Quality",
        *peers(),
        "[quality](quality/quality.md), [other methods](baselines/quality.md), [bfloat16](bfloat16/quality.md), "
        "[with the mirror image](self-ensemble/quality.md), "
        "[the study of nine networks](study/study.md), how the origin's was trained (origin/metrics.csv, "
        "origin/loss.png); what is no damage: overlays.json; other blocks: blocks.json.",
    ]
    return "\n\n".join(parts) + "\n"


def results_of(folder: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((FOLDER / folder).glob("*.json"))]


def restoring() -> Iterator[str]:
    yield "## Restoring"
    yield (
        "Images a second, medians of all rounds; the contestants take turns over the same damaged files, each in a "
        "process of its own, and nearly all are restored. By hand means files through Pillow and the network and no "
        "more: no diagnosis, no metadata, no quality tables, no ledger. To be reached are 0.9 of the slower floor and "
        "1.0 of the fastest other."
    )
    for result in results_of("restore"):
        rates = result["images_per_second"]
        steady = rates["job, steady state"]
        megapixels = result["megapixels"] / result["images"]
        title = f"{result['corpus']}; `{result['model']['name']}`, {result['precision']}" + _workers(result)
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
        shares = ratios(result["rounds"], result["device"])
        passed = result["object_store_bytes_per_image"]
        if result["device"] == "cuda":
            memory += f"; GPU busy {statistics.median(result['gpu_busy_percent']):.0f} % of its time"
        yield (
            f"Medians of the rounds' ratios: {', '.join(f'{ratio:.2f} {what}' for what, ratio in shares.items())}. "
            f"First photograph after {result['first_image_seconds']:.1f} s. Most memory, MB: {memory}. "
            + ("" if passed is None else f"{passed:,} bytes an image between processes of Ray. ")
            + f"{result['images']:,} images, {result['encoded_bytes'] / 1e6:.1f} MB."
        )
        if "workers" not in result:
            yield (
                "Measured when loops by hand took 2**20 pixels at once and had the allocator as it comes, the network "
                "alone began cold, and the job did not look again at large holes and at what had flipped pixels."
            )
        if "dollars_per_hour" in result:
            yield (
                f"A million images cost {result['dollars_per_million_images']:.2f} dollars "
                f"at {result['dollars_per_hour']:.2f} an hour."
            )
        yield origin(result)


def ratios(rates: dict[str, list[float]], device: str) -> dict[str, float]:
    """The job's rate by others': of each round, in which machine and time are the same, and of those the median."""
    found: dict[str, list[float]] = {}
    for number, steady in enumerate(rates["job, steady state"]):
        now = {name: values[number] for name, values in rates.items()}
        codec, model = now["codec only"], max(now[name] for name in now if name.startswith("model only"))
        found.setdefault("of the slower floor", []).append(steady / min(model, codec))
        if device == "cpu":  # where both take their time from the same cores
            found.setdefault("of both floors", []).append(steady * (1 / model + 1 / codec))
        for name, words in OWN.items():
            if name in now:
                found.setdefault(words, []).append(steady / now[name])
        no_others = "job", "codec", "model", "all looks", "restorer"
        others = [rate for name, rate in now.items() if not name.startswith(no_others)]
        found.setdefault("of the fastest other", []).append(steady / max(others))
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def _workers(result: dict[str, Any]) -> str:
    count = result.get("workers", "auto")
    return "" if count == "auto" else f", --workers {count}"


def networks() -> Iterator[str]:
    results = results_of("network")
    if results:
        yield "## The networks alone"
    for result in results:
        ways = list(result["rows"][0]["images_per_second"])
        title = f"`{result['model']['name']}`, {result['precision']}, {result['side']} px, {result['device']}"
        lines = [f"| {title}: at once | {' | '.join(ways)} | of its convolutions |", "|" + "---|" * (len(ways) + 2)]
        for row in result["rows"]:
            rates = " | ".join(f"{row['images_per_second'][way]:,.1f}" for way in ways)
            lines.append(f"| {row['images']} | {rates} | {row['of its convolutions']:.2f} |")
        yield "\n".join(lines)
        yield f"Images a second; {result['teraflops_at_most']:g} TFLOP/s at the most."
        yield origin(result)


def training() -> Iterator[str]:
    results = results_of("training")
    if results:
        yield "## Training"
    for result in results:
        rates, reached = result["samples_per_second"], result["seconds_to_that"]
        yield (
            f"| `{result['preset']}` at {result['size']} px, {result['device']} | samples/s |\n|---|---|\n"
            f"| jobs/train.py, workers: {result['workers']} | {rates['job']:.1f} |\n"
            f"| the same steps in a bare loop | {rates['bare loop']:.1f} |"
        )
        yield (
            f"Median of the ratios: {result['ratio']:.2f}. {result['seconds_around_the_epochs']:.0f} s around the "
            f"epochs. Noise 25 at {result['psnr_noise_25']:.1f} dB "
            + ("is not reached." if reached is None else f"after {reached:.0f} s of epochs, validation included.")
        )
        yield origin(result)


def growing() -> Iterator[str]:
    result = json.loads((FOLDER / "growth.json").read_text())
    names = list(result["results"][0])
    yield "## Number of objects"
    yield "What an object costs beside its pixels: files that are not there."
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(f"{row[name]:,}" for name in names) + " |" for row in result["results"]]
    yield "\n".join(lines)
    if len(result["results"]) > 1:
        (some, seconds), (more, longer) = [(row["objects"], row["first run, s"]) for row in result["results"][-2:]]
        exponent = math.log(longer / seconds) / math.log(more / some)
        yield f"From {some:,} to {more:,} objects a first run's seconds grow with their number to the {exponent:.2f}."
    yield f"The driver can take and write down {result['driver_rows_per_second']:,} rows a second, on a local disk."
    yield origin(result)


def nodes() -> Iterator[str]:
    path = FOLDER / "nodes.json"
    if not path.exists():
        return
    result = json.loads(path.read_text())
    yield "## Number of nodes"
    yield "Simulated on one machine, one worker each, with a network that only waits: whether all the rest keeps up."
    lines = ["| nodes | images | images/s | if none waited for another | share |", "|---|---|---|---|---|"]
    for row in result["results"]:
        rate, possible = row["images/s"], row["possible"]
        lines.append(f"| {row['nodes']} | {row['images']:,} | {rate:,} | {possible:,} | {rate / possible:.2f} |")
    yield "\n".join(lines)
    yield origin(result)


def collecting() -> Iterator[str]:
    path = FOLDER / "collection.json"
    if not path.exists():
        return
    result = json.loads(path.read_text())
    yield "## Size of the collection"
    yield (
        f"{result['corpus']}, the whole job with a network as small as it goes; medians of {result['rounds']} rounds. "
        "A photograph costs so much more or less than in the collection before:"
    )
    names = [name for name in result["results"][0] if name != "each round"]
    lines = [f"| {' | '.join(names)} | cost of one |", "|" + "---|" * (len(names) + 1)]
    for before, row in zip([None, *result["results"]], result["results"], strict=False):
        rate = "images/s, steady"
        more = "" if before is None else f"{(before[rate] / row[rate] - 1) * 100:+.1f} %"
        lines.append("| " + " | ".join(f"{row[name]:,}" for name in names) + f" | {more} |")
    yield "\n".join(lines)
    yield origin(result)


def remembering() -> Iterator[str]:
    results = results_of("memory")
    if results:
        yield "## Memory"
    for result in results:
        if "kinds" in result:
            size = f"{result['megapixels']:g} megapixels of noise"
            head = f"{size} | bytes a pixel, from the difference to half as many | MB in all"
            rows = (f"| {row['kind']} | {row['bytes_per_pixel']} | {row['mb']:,} |" for row in result["kinds"])
            lines = [f"| {head} |", "|---|---|---|", *rows]
            yield "What a worker and its codec processes take together at their most, a small network's share included."
        else:
            most, tenths = result["most_mb_by_tenth"], " | ".join(f"{number}. tenth" for number in range(1, 11))
            lines = [
                f"| MB at most, in each tenth of the pictures | {tenths} |",
                "|" + "---|" * 11,
                *(f"| {kind} | {' | '.join(f'{value:,}' for value in values)} |" for kind, values in most.items()),
            ]
            yield (
                f"{result['images']:,} pictures of {result['megapixels']:g} megapixels ({', '.join(result['files'])}) "
                f"in {result['seconds']:,} s, one after the other in each worker."
            )
        yield "\n".join(lines)
        yield origin(result)


def peers() -> Iterator[str]:
    """The bundled models beside the best other tool for each damage, cell by cell. Those figures were given."""
    result = json.loads(QUALITY.read_text())
    models = [model["name"] for model in result["models"]]
    psnr = {(row["damage"], str(row["size"]), row["method"]): row["psnr"] for row in result["rows"]}
    margins = {model: list[float]() for model in models}
    with PEERS.open(newline="") as file:
        best = list(csv.DictReader(file))
    sizes = list(best[0])[2:]
    head = " | ".join("whole" if size == "0" else f"{size} px" for size in sizes)
    lines = [f"| damage | the best other tool | {head} |", "|---" * (len(sizes) + 2) + "|"]
    for row in best:
        cells = []
        for size in sizes:
            more = [round(psnr[row["damage"], size, model] - float(row[size]), 1) for model in models]
            for model, margin in zip(models, more, strict=True):
                margins[model].append(margin)
            cells.append(" ".join([row[size], *(f"{margin:+.1f}" for margin in more)]))
        lines.append(f"| {' | '.join([row['damage'].replace('_', ' '), row['peer'], *cells])} |")
    names = ", ".join(f"`{model}`" for model in models)
    yield (
        f"PSNR in dB of the best other tool for each damage, and what the models ({names}) have more. Most of those "
        "tools are told the true sigma or the exact mask, the models nothing. The tools were measured on LFW's test "
        "people, not by a command here (peers.csv), the models on other held-out people "
        "([quality](quality/quality.md)): what is less than some tenths says little. To be reached is 1 dB more "
        "everywhere."
    )
    yield "\n".join(lines)
    yield (
        "; ".join(
            f"`{model}`: {sum(margin >= 1 for margin in found)} of {len(found)} by 1 dB or more, "
            f"{sum(0 < margin < 1 for margin in found)} by less, {sum(margin <= 0 for margin in found)} not"
            for model, found in margins.items()
        )
        + "."
    )


def summary() -> str:
    """The README's table."""
    lines = [
        "| files | network | the job | floor | loop by hand | ONNX Runtime | OpenVINO | first photograph, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results_of("restore"):
        rates = result["images_per_second"]
        models = [rates[name] for name in rates if name.startswith("model only")]
        floor = min(max(models), rates["codec only"])
        by_hand = max(rates[name] for name in ("plain loop", "pool", "data loader", "ray template") if name in rates)
        openvino = max((rates[name] for name in ("openvino", "openvino, pool") if name in rates), default=None)
        others = ("" if rate is None else f"{rate:.1f}" for rate in (rates.get("onnxruntime"), openvino))
        cells = (
            result["corpus"], f"`{result['model']['name']}`, {result['precision']}" + _workers(result),
            f"**{rates['job, steady state']:.1f}**", f"{floor:.1f}", f"{by_hand:.1f}", *others,
            f"{result['first_image_seconds']:.1f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def origin(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    where = f"{result['hardware']}; commit {provenance.short(result['commit'])}, {result['date']}; {versions}."
    return f"    {result['command']}\n\n{where}"


if __name__ == "__main__":
    PAGE.write_text(page())
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + summary() + END + after)

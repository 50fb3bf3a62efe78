"""The speed benchmarks at their smallest: they run to their end, and what they write is what the page reads."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import skimage.data
import torch
from photos import people, write_tree
from PIL import Image

from benchmarks import collection_speed, corpora, memory, network_speed, nodes, page, restore_speed
from benchmarks.contestants import CORES
from jobs import pack_dataset
from jobs.pack_dataset import PackDataset
from restore_core import checkpoint

ROOT = Path(__file__).resolve().parent.parent
Models = Callable[[int], Path]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_network_goes_on_for_some_seconds(tmp_path: Path) -> None:
    """As on a machine without Ray."""
    photos = write_tree(tmp_path / "photos", people(9))
    data, output = tmp_path / "data", tmp_path / "out"
    assert pack_dataset.main(PackDataset(input=(str(photos),), output=str(data), val_share=0.25)) == 0
    command = [
        sys.executable, "-c",
        "import sys, runpy; sys.modules['ray'] = sys.modules['tyro'] = sys.modules['boto3'] = None; "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
        str(ROOT / "benchmarks/train_resident.py"), "--data", str(data), "--output", str(output),
        "--preset", "faces-fast", "--seconds", "4", "--batch-size", "4", "--step-pixels", "9216", "--val-images", "2",
        "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = map(json.loads, (output / "faces-fast.jsonl").read_text().splitlines())
    assert after["steps"] > 0 and after["samples"] >= after["steps"] and after["learning_rate"] < 1e-4
    assert before["val_loss"] != after["val_loss"] < 2 * before["val_loss"]
    model = checkpoint.read(str(output / "faces-fast"))
    assert model.config["trained"]["started_from"]["sha256"] == checkpoint.read("faces-fast").sha256
    assert model.architecture == checkpoint.read("faces-fast").architecture


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.jpg")
    return folder


@pytest.mark.parametrize("name", sorted(corpora.CORPORA.keys() - {"jpeg-4000"}))
def test_files_are_as_they_are_called(name: str, photographs: Path, tmp_path: Path) -> None:
    corpus = corpora.CORPORA[name]
    corpora.write(corpus, sorted(photographs.iterdir()), 4, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4
    total = 0
    for path in files:
        with Image.open(path) as image:
            total += image.width * image.height
            assert image.format == corpus.format or (corpus.format is None and image.format in ("JPEG", "PNG", "WEBP"))
            assert image.size == (corpus.width, corpus.height) or (corpus.width is None and max(image.size) <= 1600)
    assert corpora.megapixels(tmp_path) == total / 1e6


@pytest.mark.slow
@pytest.mark.ray
def test_all_take_turns_and_the_page_says_so(
    photographs: Path, small_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = restore_speed.RestoreSpeed(
        photographs=photographs, corpus="jpeg-250", images=4 * CORES, output=tmp_path / "restore/small.json",
        model=str(small_model(1)), batch_size=2, rounds=1,
        contestants=(
            "plain loop", "pool", "data loader", "codec only", "model only", "model only, pool", "all looks, pool",
            "restorer only, pool",
        ),
        dollars_per_hour=1.8,
    )  # fmt: skip
    assert restore_speed.main(job) == 0
    result = json.loads(job.output.read_text())
    rates = result["images_per_second"]
    assert set(rates) == {"job, steady state", "job, start-up included", *job.contestants}
    assert all(rate > 0 for rate in rates.values())
    slower = min(rates["codec only"], max(rates["model only"], rates["model only, pool"]))
    found = page.ratios(result["rounds"], "cpu")
    assert found["of the slower floor"] == pytest.approx(rates["job, steady state"] / slower, abs=0.001)
    for name, words in page.OWN.items():
        assert found[words] == pytest.approx(rates["job, steady state"] / rates[name], abs=0.001)
    assert rates["all looks, pool"] > rates["restorer only, pool"]
    rate = statistics.median(result["rounds"]["job, steady state"])  # not of three decimals
    assert result["dollars_per_million_images"] == pytest.approx(500 / rate, abs=0.01)
    assert "driver" in result["memory_mb"]  # the others may be gone before they are looked at
    (tmp_path / "growth.json").write_text((page.FOLDER / "growth.json").read_text())
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    assert f"| {rates['plain loop']:.2f} |" in page.page()
    assert f"| **{rates['job, steady state']:.1f}** |" in page.summary()


@pytest.mark.slow
@pytest.mark.ray
def test_on_more_nodes_more_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = nodes.Nodes(nodes=(1, 2), seconds=0.1, objects=100, batch_size=4, output=tmp_path / "nodes.json")
    assert nodes.main(job) == 0
    one, two = json.loads(job.output.read_text())["results"]
    assert (one["images"], two["images"]) == (100, 200)
    assert 0.5 < one["images/s"] / one["possible"] < 1.1 and two["images/s"] > 1.5 * one["images/s"]
    (tmp_path / "growth.json").write_text((page.FOLDER / "growth.json").read_text())
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    assert f"| 2 | 200 | {two['images/s']} | 20.0 |" in page.page()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_network_is_held_against_its_convolutions(
    precision: Literal["float32", "bfloat16"], small_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = network_speed.NetworkSpeed(
        output=tmp_path / "network/small.json", model=str(small_model(1)), side=32, batches=(1, 2), rounds=1,
        precision=precision,
    )  # fmt: skip
    assert network_speed.main(job) == 0
    result = json.loads(job.output.read_text())
    assert [row["images"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        rates = row["images_per_second"]
        assert row["of its convolutions"] == pytest.approx(rates["network"] / rates["its convolutions"], abs=0.001)
        assert row["of its convolutions"] > 0
    (tmp_path / "growth.json").write_text((page.FOLDER / "growth.json").read_text())
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    assert f"| 2 | {result['rows'][1]['images_per_second']['network']:,.1f} |" in page.page()


def test_all_convolutions_run_as_in_the_network(small_model: Models, tmp_path: Path) -> None:
    job = network_speed.NetworkSpeed(output=tmp_path / "small.json")
    network = checkpoint.load(checkpoint.read(str(small_model(1))))
    shapes: list[tuple[str, torch.Size]] = []
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            layer.register_forward_hook(lambda _, inputs, output, name=name: shapes.append((name, output.shape)))
    x = torch.rand(2, 3, 32, 48)
    run = network_speed.convolutions(network, x, job)
    there, shapes[:] = shapes.copy(), []
    run()
    assert shapes == there and len(there) > 5


def test_memory_is_looked_at_over_many_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SEARCH_S", 0.05)  # these pictures take no second
    job = memory.Memory(output=tmp_path / "many.json", images=10, megapixels=0.2, kinds=("JPEG", "PNG"))
    assert memory.main(job) == 0
    result = json.loads(job.output.read_text())
    assert result["images"] == 10
    most = result["most_mb_by_tenth"]
    assert {len(tenths) for tenths in most.values()} == {10}
    # It is looked at every 50 ms: not in each tenth of so small a job.
    assert max(most["worker"]) > 100
    assert max(most["codec"]) > 20
    assert max(most["worker and codecs"]) > max(most["worker"])


def test_what_a_photograph_costs_in_a_larger_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(steady: float) -> restore_speed.Measured:
        return restore_speed.Measured(
            first=9.0, whole=steady / 2, steady=steady, memory={"driver": 500}, passed=900.0, busy=None
        )

    runs = {1_000: [run(200.0), run(100.0), run(210.0)], 10_000: [run(190.0), run(250.0), run(160.0)]}
    result = {**json.loads((page.FOLDER / "growth.json").read_text()), "corpus": "JPEG", "rounds": 3}
    (tmp_path / "growth.json").write_text(json.dumps(result))
    (tmp_path / "collection.json").write_text(json.dumps({**result, "results": collection_speed.table(runs)}))
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    (line,) = [line for line in page.page().splitlines() if line.startswith("| 10,000 | 190.0 | ")]
    assert line.endswith(" | +5.3 % |")

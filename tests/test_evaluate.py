"""The evaluation against scikit-image, and what it refuses."""

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from jobs import command_line, evaluate, pack_dataset
from jobs.evaluate import Evaluate
from restore_core import baselines, checkpoint, sources
from restore_core.errors import UsageError
from restore_core.inference import Restorer
from restore_core.metrics import psnr
from restore_core.pipelines import cluster, evaluation
from restore_core.report.quality import _diagnosis_table
from restore_core.storage import open_storage
from tests.photos import encoded, pixels, write_tree

pytestmark = pytest.mark.usefixtures("one_thread")
Models = Callable[[int], Path]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    source = write_tree(tmp_path / "photos", {f"Person_{n}/{n}.jpg": encoded(n, 40, 50) for n in range(6)})
    assert pack_dataset.main(pack_dataset.PackDataset(input=(str(source),), output=str(tmp_path / "data"))) == 0
    table = pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / "data").glob("*.parquet")))
    everything = table.set_column(2, "split", pa.array(["val"] * len(table)))
    for path in (tmp_path / "data").glob("*.parquet"):
        path.unlink()
    pq.write_table(everything, tmp_path / "data/val-00000.parquet")
    return tmp_path / "data"


@pytest.mark.ray
def test_numbers_are_scikit_images(local_ray: None, data: Path, tmp_path: Path, small_model: Models) -> None:
    models = (str(small_model(1)), str(small_model(2)))
    job = Evaluate(
        data=str(data), output=str(tmp_path / "out"), model=models, baselines=("median",), sizes=(24, 0), images=4,
        damages=("clean", "noise_25", "patches_15", "gray"), workers="1",
    )  # fmt: skip
    assert evaluate.main(job) == 0
    result = json.loads((tmp_path / "out/quality.json").read_text())
    assert result["models"] == [{"name": name, "sha256": checkpoint.read(name).sha256} for name in models]
    with (tmp_path / "out/quality.csv").open() as file:
        rows = list(csv.DictReader(file))
    methods = ["identity", "median", *models]
    assert len(rows) == 4 * 2 * 4 * len(methods)

    table = sources.read_split(open_storage(data), "val", 10**6, 4)
    folders = [checkpoint.read(name) for name in models]
    plan = evaluation.Plan(models=(), baselines=(), damages=job.damages, sizes=job.sizes)
    restorers = {folder.name: Restorer(folder) for folder in folders}
    found = {(row["key"], row["size"], row["damage"], row["method"]): row for row in rows}
    assert len(found) == len(rows)
    cells: dict[tuple[int, str, str], list[float]] = {}
    for sample in [sample for batch in evaluation.samples(table, plan) for sample in batch]:
        assert sample.clean.shape == ((24, 24, 3) if sample.size else (40, 50, 3))
        images = {"identity": sample.damaged, "median": baselines.median(sample.damaged, sample.destroyed)}
        for name, restorer in restorers.items():
            (restored,) = restorer([sample.damaged])
            images[name] = sample.damaged if restored.undamaged() else restored.pixels
        for method, image in images.items():
            row = found[sample.key, str(sample.size), sample.damage, method]
            same = np.array_equal(image, sample.clean)
            psnr = 100.0 if same else peak_signal_noise_ratio(sample.clean, image)
            ssim = structural_similarity(
                image, sample.clean, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
            assert float(row["psnr"]) == pytest.approx(psnr, abs=0.2)  # another batch size: other roundings
            assert float(row["ssim"]) == pytest.approx(ssim, abs=0.01)
            cells.setdefault((sample.size, sample.damage, method), []).append(float(row["psnr"]))
    assert {(row["size"], row["damage"], row["method"]) for row in result["rows"]} == cells.keys()
    for row in result["rows"]:
        assert row["images"] == 4
        assert row["psnr"] == pytest.approx(np.mean(cells[row["size"], row["damage"], row["method"]]))

    tables = (tmp_path / "out/quality.md").read_text()
    assert "| noise 25 |" in tables and "## Beside other methods" in tables
    assert "What the model says was wrong" in tables
    for name, smallest in (("quality.png", (600, 200)), ("worst.png", (1500, 1300))):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.width >= smallest[0] and image.height >= smallest[1], (name, image.size)


def test_the_mean_with_the_mirror_image_is_measured_on_demand(data: Path, small_model: Models) -> None:
    folder = checkpoint.read(str(small_model(1)))
    table = sources.read_split(open_storage(data), "val", 10**6, 2)
    measured = []
    for ensemble in (False, True):
        plan = evaluation.Plan(
            models=(folder,), baselines=(), damages=("noise_25",), sizes=(24,), self_ensemble=ensemble
        )
        rows = [row for row in evaluation.Evaluator(plan)(table).to_pylist() if row["method"] == folder.name]
        (samples,) = evaluation.samples(table, plan)
        restored = Restorer(folder, self_ensemble=ensemble)([sample.damaged for sample in samples])
        expected = [peak_signal_noise_ratio(s.clean, r.pixels) for s, r in zip(samples, restored, strict=True)]
        assert [row["psnr"] for row in rows] == pytest.approx(expected, abs=1e-3)
        measured.append(expected)
    assert measured[0] != pytest.approx(measured[1], abs=1e-2)


@pytest.mark.ray
def test_a_folder_of_photographs_can_be_measured(local_ray: None, tmp_path: Path, small_model: Models) -> None:
    """Whole, larger than training's canvas; what is no photograph is left out."""
    photos = write_tree(tmp_path / "photos", {"a/x.png": encoded(1, 300, 280, "PNG"), "b.txt": b"no photograph"})
    job = Evaluate(
        data=str(photos), output=str(tmp_path / "out"), model=(str(small_model(1)),), sizes=(0,),
        damages=("noise_50",), workers="1",
    )  # fmt: skip
    assert evaluate.main(job) == 0
    rows = json.loads((tmp_path / "out/quality.json").read_text())["rows"]
    assert [(row["method"], row["images"]) for row in rows] == [("identity", 1), (str(small_model(1)), 1)]
    assert rows[0]["psnr"] < 20


@pytest.mark.ray
def test_of_many_photographs_the_first_ones_are_measured(
    local_ray: None, tmp_path: Path, small_model: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is decoded first; and none is enlarged to a size that it does not have."""
    files = {f"{n:02d}.png": encoded(n, 40 + 9 * n, 60 + 3 * n, "PNG") for n in range(20)}
    photos = write_tree(tmp_path / "photos", {**files, "_restore/manifest/a.parquet": b"another job's"})
    job = Evaluate(
        data=str(photos), output=str(tmp_path / "out"), model=(str(small_model(1)),), sizes=(24, 64),
        damages=("noise_50",), images=10, workers="2",
    )  # fmt: skip
    assert evaluate.main(job) == 0
    with (tmp_path / "out/quality.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = {size: {row["key"] for row in rows if row["size"] == size} for size in ("24", "64")}
    assert measured == {"24": set(list(files)[:10]), "64": set(list(files)[3:10])}
    assert "3 of 10 photographs are smaller than 64 pixels and left out there" in capsys.readouterr().out
    assert not ray.data.DataContext.get_current().execution_options.preserve_order, "that is for its own datasets"
    with pytest.raises(UsageError, match="--workers 9: the cluster has 3 CPUs; use --workers 3 or add nodes"):
        evaluate.main(dataclasses.replace(job, workers="9"))


@pytest.mark.ray
def test_an_actor_that_is_nobodys_any_more_gives_its_cpus_back(
    local_ray: None, tmp_path: Path, small_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error there are such in reference cycles. Python looks for those where it has work, or is told to."""

    class Nobodys:
        def ready(self) -> bool:
            return True

    actor = ray.remote(num_cpus=3)(Nobodys).remote()
    assert ray.get(actor.ready.remote())
    monkeypatch.setattr("gc.collect", lambda: ray.kill(actor))
    monkeypatch.setattr(cluster, "IDLE_SECONDS", 1.0)
    photos = write_tree(tmp_path / "photos", {"x.png": encoded(1, 40, 50, "PNG")})
    job = Evaluate(
        data=str(photos), output=str(tmp_path / "out"), model=(str(small_model(1)),), sizes=(0,),
        damages=("noise_50",), workers="1",
    )  # fmt: skip
    assert evaluate.main(job) == 0


def test_median_is_scikit_images() -> None:
    from skimage.filters import median

    image = pixels(3, 20, 30)
    expected = np.stack([median(image[..., c], np.ones((3, 3)), mode="nearest") for c in range(3)], axis=-1)
    np.testing.assert_array_equal(baselines.median(image, np.zeros((20, 30), bool)), expected)


@pytest.mark.parametrize("name", ["nlm", "tv"])
def test_baselines_remove_noise_and_leave_what_is_clean(name: baselines.Name) -> None:
    clean = pixels(3, 64, 64)
    nothing = np.zeros((64, 64), bool)
    noise = np.random.default_rng(0).normal(0, 25, clean.shape)
    noisy = (clean + noise).round().clip(0, 255).astype(np.uint8)
    method = baselines.named(name)
    assert psnr(method(noisy, nothing), clean) > psnr(noisy, clean) + 6
    assert psnr(method(clean, nothing), clean) > 40


@pytest.mark.parametrize("name", ["telea", "navier_stokes"])
def test_inpainters_fill_exactly_what_is_destroyed(name: baselines.Name) -> None:
    pytest.importorskip("cv2")
    clean = pixels(4, 40, 40)
    destroyed = np.zeros((40, 40), bool)
    destroyed[10:18, 12:20] = True
    damaged = np.where(destroyed[:, :, None], 0, clean).astype(np.uint8)
    filled = baselines.named(name)(damaged, destroyed)
    np.testing.assert_array_equal(filled[~destroyed], clean[~destroyed])
    assert psnr(filled, clean) > psnr(damaged, clean) + 10


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--baselines telea: needs OpenCV: pip install -c constraints.txt -e "):
        baselines.named("telea")


@pytest.mark.parametrize("sigma_255", [0, 10, 40])
def test_noise_is_estimated(sigma_255: float) -> None:
    noisy = 128 + np.random.default_rng(1).normal(0, sigma_255, (100, 101, 3))
    estimate = baselines._estimated_sigma(noisy.round().clip(0, 255).astype(np.uint8)) * 255
    assert estimate == pytest.approx(sigma_255, rel=0.06)
    assert baselines._estimated_sigma(np.zeros((1, 1, 3), np.uint8)) == 0


def test_diagnoses_are_scored() -> None:
    """Against every pair of photographs, one with the damage and one without."""
    said = {"clean": [0.0, 0.2, 0.1], "noise_25": [20.0, 0.1, 26.0], "gray": [0.3, 0.0, 0.0]}
    rows: list[dict[str, Any]] = [
        {"size": 48, "damage": damage, "method": "m", "destroyed": 0.0, "sigma": sigma, "flips": 0.0, "patches": 0.0,
         "gray": 0.9 if damage == "gray" else 0.1}
        for damage, values in said.items() for sigma in values
    ]  # fmt: skip
    found = {row["kind"]: row for row in evaluation.diagnosis(rows, "m")}
    assert found.keys() == {"sigma", "gray"}  # of the others nothing was done, so nothing can be told apart
    with_noise, without = said["noise_25"], said["clean"] + said["gray"]
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in with_noise for b in without]
    assert found["sigma"]["auc"] == pytest.approx(np.mean(pairs))
    assert found["sigma"]["mean_error"] == pytest.approx(np.mean([5, 24.9, 1, 0, 0.2, 0.1, 0.3, 0, 0]))
    assert (found["gray"]["auc"], found["gray"]["mean_error"]) == (1.0, None)
    noisy = [row | {"damage": damage} for row, damage in zip(rows[:2], ("noise_25", "noise_50"), strict=True)]
    (only,) = evaluation.diagnosis(noisy, "m")  # there are none without
    assert (only["kind"], only["auc"], only["mean_error"]) == ("sigma", None, pytest.approx((25 + 49.8) / 2))
    assert _diagnosis_table([only], [48])[-1] == "| sigma, of 255 | 37.40 |"


def test_what_cannot_be_evaluated_is_refused(
    data: Path, tmp_path: Path, small_model: Models, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, one line, nothing written."""

    def call(**changed: object) -> str:
        options = {"data": data, "output": tmp_path / "out", "model": small_model(1), **changed}
        arguments = [text for name, value in options.items() for text in ("--" + name, *str(value).split())]
        monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
        capsys.readouterr()
        assert command_line.run(evaluate.main, Evaluate) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert not (tmp_path / "out").exists()
        return err

    assert f"--output {data}/quality: lies inside --data {data}; choose" in call(output=data / "quality")
    assert "--split test: no photographs of it in --data" in call(split="test")
    assert "--images 0: use 1 or more" in call(images=0)
    assert "--sizes 3: use 16 or more" in call(sizes="48 3")
    assert "--model nothing: no bundled model" in call(model="nothing")
    assert "--model faces faces: name each once" in call(model="faces faces")
    assert "--damages scratches: no standard damage; use some of clean, noise_15" in call(damages="gray scratches")
    assert "no such file or folder" in call(data=tmp_path / "nowhere")
    broken = write_tree(tmp_path / "broken", {"a.parquet": b"PAR1 or not"})
    assert f"--data {broken}/a.parquet: not a readable Parquet file" in call(data=broken)
    (tmp_path / "undecodable").mkdir()
    pq.write_table(pa.table({"split": ["val"], "image": [b"?"]}), tmp_path / "undecodable/a.parquet")
    assert "--split val: none of its photographs" in call(data=tmp_path / "undecodable")


def test_seeds_of_the_damages_are_not_those_of_training() -> None:
    from restore_core.config import PRESETS

    assert evaluation.SEED not in {preset.seed for preset in PRESETS.values()}

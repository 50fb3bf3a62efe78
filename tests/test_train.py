"""The training job on a real local Ray: it finishes, resumes, refuses, and gives the same weights twice."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
import torch
from photos import write_tree
from PIL import Image
from processes import descendants, wait_for

from jobs import command_line, pack_dataset, train
from jobs.pack_dataset import PackDataset
from jobs.train import Train
from restore_core import checkpoint
from restore_core.config import PRESETS
from restore_core.errors import UsageError
from restore_core.inference import Restorer
from restore_core.trainer import VALIDATION

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent
RUN_FILES = {"options.json", "metrics.csv", "loss.png", "samples.png", "model/model.safetensors", "model/config.json"}
SCHEDULE = "32:6"
Run = Callable[..., Path]


def photographs(count: int) -> dict[str, bytes]:
    """Crops of real photographs, two of each person."""
    sources = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    files = {}
    for index in range(count):
        source = sources[index % 3]
        top, left = np.random.default_rng(index).integers(0, np.array(source.shape[:2]) - (72, 64) + 1)
        file = io.BytesIO()
        Image.fromarray(source[top : top + 72, left : left + 64]).save(file, "JPEG", quality=92)
        files[f"Person_{index // 2:02d}/{index}.jpg"] = file.getvalue()
    return files


def packed(root: Path, count: int, val_share: float) -> Path:
    job = PackDataset(
        input=(str(write_tree(root / "photos", photographs(count))),), output=str(root / "data"), val_share=val_share
    )
    assert pack_dataset.main(job) == 0
    return root / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("data"), 40, 0.25)


@pytest.fixture(scope="module")
def run(local_ray: None, data: Path) -> Run:
    def start(storage: object, name: str = "run", *, code: int = 0, **options: Any) -> Path:
        job = Train(
            storage=str(storage),
            name=name,
            device="cpu",
            **{"data": str(data), "preset": "smoke", "workers": "1", "precision": "float32", **options},
        )
        assert train.main(job) == code
        return Path(str(storage)) / name

    return start


@pytest.fixture(scope="module")
def finished(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the preset `smoke` in which nothing happened. Read-only."""
    return run(tmp_path_factory.mktemp("runs"), "first", schedule=SCHEDULE)


def epochs_of(folder: Path) -> list[int]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


def last_row(folder: Path) -> dict[str, float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {name: float(value) for name, value in list(csv.DictReader(file))[-1].items()}


# --- A run ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    files = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert files >= RUN_FILES
    assert epochs_of(finished) == [1, 2, 3, 4, 5, 6]
    options = json.loads((finished / "options.json").read_text())
    assert options["config"]["phases"] == [{"sizes": [32], "epochs": 6}]
    for name in ("loss.png", "samples.png"):
        with Image.open(finished / name) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 100
    row = last_row(finished)
    assert np.isfinite(list(row.values())).all()
    assert row.keys() >= {"train_loss", "val_loss", "seconds", *(f"psnr_{name}" for name in VALIDATION)}


def test_the_card_says_where_the_weights_come_from(finished: Path) -> None:
    card = json.loads((finished / "model/config.json").read_text())
    trained = card["trained"]
    assert trained["command"].startswith("python ")
    assert trained["commit"]
    assert " cores" in trained["hardware"]
    assert trained["minutes"] >= 0
    assert trained["workers"] == 1
    assert 8 <= trained["photographs"] < 40
    assert trained["samples"] == 6 * 8 * (trained["photographs"] // 8)
    row = last_row(finished)
    assert card["validation"]["psnr_db"] == {name: round(row[f"psnr_{name}"], 2) for name in VALIDATION}
    assert card["validation"]["identity_psnr_db"].keys() == VALIDATION.keys()
    assert card["architecture"]["channels"] == [8, 16]
    assert card["parameters"] > 1000 and card["macs_at_48_px"] > 1e6


def test_the_model_restores(finished: Path) -> None:
    (result,) = Restorer(checkpoint.read(str(finished / "model")))([skimage.data.astronaut()[:33, :47].copy()])
    assert result.pixels.shape == (33, 47, 3)


def test_a_finished_run_returns_at_once_with_the_same_result(
    finished: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def content() -> dict[str, bytes]:
        return {name: (finished / name).read_bytes() for name in RUN_FILES}

    before = content()
    monkeypatch.setenv("RESTORE_COMMIT", "another")  # what is found here today is not what trained it
    run(finished.parent, "first", schedule=SCHEDULE)
    assert f"model: {finished}/model\n" in capsys.readouterr().out
    assert content() == before


def test_two_workers_learn_as_one_does(finished: Path, run: Run, tmp_path: Path) -> None:
    """At an equal global batch; the workers see the samples in another order. Within 1 dB."""
    two, one = last_row(run(tmp_path, "two", workers="2", schedule=SCHEDULE)), last_row(finished)
    assert two["steps"] == pytest.approx(one["steps"], abs=2)  # the smaller share decides how often all can step
    for name in VALIDATION:
        assert two[f"psnr_{name}"] == pytest.approx(one[f"psnr_{name}"], abs=1.0), name
    assert json.loads((tmp_path / "two/model/config.json").read_text())["trained"]["workers"] == 2


def test_a_loss_that_is_no_number_ends_the_run_with_one_line(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path, "diverged", learning_rate=1e30, code=1)
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "error: the training loss is " in lines[0]
    assert "lower --learning-rate (now 1e+30) and use a new --name" in lines[0]
    assert not (folder / "model").exists()


def test_a_model_is_trained_on_with_everything_on_s3(s3: str, data: Path, finished: Path, run: Run) -> None:
    """The network and the first weights are those of --init, read there; the run's folder is written there."""
    from restore_core.storage import open_storage

    for source, prefix in ((data, "data"), (finished / "model", "models/mine")):
        for path in source.glob("*.*"):
            open_storage(f"s3://photos/{prefix}").write(path.name, path.read_bytes())
    run("s3://photos/runs", "on", data="s3://photos/data", preset="faces", init="s3://photos/models/mine",
        schedule="32:1", batch_size=8, learning_rate=1e-12)  # fmt: skip
    assert {item.key for item in open_storage("s3://photos/runs/on").list()} >= RUN_FILES
    before, after = checkpoint.read(str(finished / "model")), checkpoint.read("s3://photos/runs/on/model")
    assert after.architecture == before.architecture == PRESETS["smoke"].model
    weights = checkpoint.load(before).state_dict()
    for name, tensor in checkpoint.load(after).state_dict().items():
        assert torch.allclose(tensor, weights[name], rtol=1e-3, atol=1e-6), name  # kept in half precision
    assert after.config["trained"]["started_from"] == {"name": "s3://photos/models/mine", "sha256": before.sha256}


# --- Deaths --------------------------------------------------------------------------------------------------------


def training_workers() -> list[int]:
    """Ray Train's worker processes below this one."""
    return descendants(os.getpid(), "RayTrainWorker")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.read(str(folder / "model"))).state_dict()


def test_a_worker_that_is_killed_is_replaced_and_no_epoch_is_doubled(run: Run, finished: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill() -> None:
        metrics = tmp_path / "run/metrics.csv"
        wait_for(lambda: metrics.exists() and len(epochs_of(metrics.parent)) >= 2)
        killed.extend(training_workers())
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    folder = run(tmp_path, schedule=SCHEDULE)
    thread.join()
    assert killed
    assert epochs_of(folder) == epochs_of(finished)
    expected = weights_of(finished)
    for name, tensor in weights_of(folder).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_where_it_was(data: Path, finished: Path, run: Run, tmp_path: Path) -> None:
    options = [
        "--data",
        data,
        "--storage",
        tmp_path,
        "--preset",
        "smoke",
        "--schedule",
        SCHEDULE,
        "--workers",
        1,
        "--precision",
        "float32",
    ]
    process = subprocess.Popen(
        [sys.executable, ROOT / "jobs/train.py", *map(str, options), "--name", "run", "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / "run/metrics.csv"
    try:
        wait_for(lambda: process.poll() is not None or (metrics.exists() and len(epochs_of(metrics.parent)) >= 2))
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "run/model").exists(), "it was not in the middle"
    folder = run(tmp_path, schedule=SCHEDULE)
    assert epochs_of(folder) == epochs_of(finished)
    # Not bit for bit: that process had as many threads as the machine has cores, this one has three.
    result, expected = last_row(folder), last_row(finished)
    assert result["steps"] == expected["steps"]
    assert result["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-3)


@pytest.mark.slow
def test_an_interrupted_training_says_so_and_goes_on(data: Path, finished: Path, run: Run, tmp_path: Path) -> None:
    """By Ctrl-C: Ray Train would take that over, and end with 0 or 1."""
    options = [
        "--data", data, "--storage", tmp_path, "--preset", "smoke", "--schedule", SCHEDULE, "--workers", 1,
        "--precision", "float32", "--name", "run", "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, ROOT / "jobs/train.py", *map(str, options)], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run/metrics.csv"
    wait_for(lambda: process.poll() is not None or (metrics.exists() and len(epochs_of(metrics.parent)) >= 2))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.endswith("interrupted; the same command goes on from here\n") and "Traceback" not in said, said
    assert not (tmp_path / "run/model").exists() and not (tmp_path / "run/lease.json").exists()
    assert epochs_of(run(tmp_path, schedule=SCHEDULE)) == epochs_of(finished)


# --- What cannot work ----------------------------------------------------------------------------------------------


def test_the_same_name_with_other_options_is_refused(finished: Path, run: Run) -> None:
    with pytest.raises(UsageError, match=r"^--name first: a run of that name exists with other options \(seed was 0"):
        run(finished.parent, "first", seed=5, schedule=SCHEDULE)
    with pytest.raises(UsageError, match=r"learning_rate was 0\.001, is now 0\.5"):
        run(finished.parent, "first", learning_rate=0.5, schedule=SCHEDULE)


def test_the_same_name_with_other_data_is_refused(finished: Path, run: Run) -> None:
    """Packed again into the same place: whom a model was trained on may be in another split now."""
    options = json.loads((finished / "options.json").read_text())
    (finished / "options.json").write_text(json.dumps(options | {"shards": "of others"}))
    try:
        with pytest.raises(UsageError, match=r"exists with other options \(shards was of others, is now"):
            run(finished.parent, "first", schedule=SCHEDULE)
    finally:
        (finished / "options.json").write_text(json.dumps(options, indent=2))


def test_more_workers_than_there_are_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"^--workers 9: the cluster has 3 CPUs, of which Ray Data needs one; use --wor"
    ):
        run(tmp_path, workers="9")
    with pytest.raises(UsageError, match=r"^--batch-size 7: not a multiple of the 2 workers"):
        run(tmp_path, "seven", workers="2", batch_size=7)
    with pytest.raises(UsageError, match=r"^--device cuda: needs 1 GPU for each worker, the cluster has 0 GPUs"):
        job = Train(data=str(tmp_path), storage="x", device="cuda")
        assert job.device == "cuda"
        from restore_core.pipelines import cluster

        cluster.pick_device(job.device)


@pytest.mark.parametrize(("cpus", "gpus", "batch", "count"), [(1, None, 8, 1), (4, None, 16, 2), (8, None, 16, 4),
                         (16, None, 32, 8), (16, 3, 32, 2), (16, 8, 32, 8), (9, None, 7, 7),
                         (4, 8, 32, 2), (1, 1, 8, 1)])  # fmt: skip
def test_workers_by_themselves_share_the_batch_evenly(cpus: int, gpus: int | None, batch: int, count: int) -> None:
    from restore_core.pipelines.training import worker_count

    assert worker_count(None, batch, cpus=cpus, gpus=gpus) == count


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """The CLI in this process: exit code 2 and one line. Returns the line."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    assert command_line.run(train.main, Train) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --") and err.count("\n") == 1, err
    return err


def test_data_that_cannot_be_used_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Ray starts, and before anything is written."""
    runs = tmp_path / "runs"

    def call(place: object, *more: object) -> str:
        line = refused(capsys, monkeypatch, "--data", place, "--storage", runs, "--preset", "smoke", *more)
        assert not runs.exists()
        return line

    few = packed(tmp_path / "few", 8, 0.5)
    assert f"--data {few}: " in call(few) and "do not fill --batch-size 8" in call(few)
    assert "do not fill --batch-size 500" in call(data, "--batch-size", 500)
    none = packed(tmp_path / "none", 20, 0.0)
    assert f"--data {none}: no photographs in split 'val'; pack again with a larger --val-share" in call(none)
    assert "--data " in call(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no .parquet files there" in call(tmp_path / "empty")
    assert "choose another place" in refused(
        capsys, monkeypatch, "--data", data, "--storage", data / "runs", "--preset", "smoke"
    )
    assert not (data / "runs").exists()
    for name, content in {"no parquet": b"PAR1 or not", "cut": (data / "val-00000.parquet").read_bytes()[:-9]}.items():
        broken = write_tree(tmp_path / name, {"a.parquet": content})
        assert f"--data {broken}/a.parquet: not a readable Parquet file" in call(broken)
    rows = [{"key": f"{split}/{n}", "split": split, "image": b"?"} for split in ("train", "val") for n in range(8)]
    (tmp_path / "undecodable").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "undecodable/a.parquet")
    assert "no photograph in split 'train' can be decoded" in call(tmp_path / "undecodable")
    (tmp_path / "columns").mkdir()
    pq.write_table(pa.Table.from_pylist(rows).drop_columns("image"), tmp_path / "columns/a.parquet")
    assert f"--data {tmp_path}/columns/a.parquet: its columns are key, split; name" in call(tmp_path / "columns")
    assert "--init no-such-model: no bundled model" in call(data, "--init", "no-such-model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": "0"}, "--workers 0"),
        ({"name": "a/b"}, "--name 'a/b'"),
        ({"name": ""}, "--name ''"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        Train(data="d", storage="s", **options)  # type: ignore[arg-type]


def test_schedules_that_make_no_sense_are_refused() -> None:
    for schedule in ("48", "48:0", "0:4", "a:b", ""):
        with pytest.raises(UsageError, match=r"^--schedule"):
            Train(data="d", storage="s", schedule=schedule).config()
    with pytest.raises(UsageError, match=r"learning.rate"):
        Train(data="d", storage="s", learning_rate=-1.0).config()

"""The study on a real local Ray: every variant is a row, nothing is trained twice, one's failure is not the others'."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from photos import encoded, write_tree
from PIL import Image
from processes import wait_for

from jobs import command_line, pack_dataset, search, train
from jobs.pack_dataset import PackDataset
from jobs.search import Search
from restore_core.config import VARIANTS, AutoencoderConfig, ResidualUNetConfig
from restore_core.errors import UsageError
from restore_core.lease import Lease
from restore_core.model import build, count_macs, count_parameters
from restore_core.pipelines.search import trials_at_once
from restore_core.pipelines.study import OVERVIEW
from restore_core.storage import LocalStorage
from restore_core.trainer import VALIDATION

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("depth-3", "no-skips", "residual")
TINY = {"epochs": 2, "size": 16, "images": 8, "batch_size": 4, "device": "cpu"}
ONE_THREAD = {"parallel": "3"}  # of three CPUs, a trial has one: for tiny tensors the second costs more than it brings
Run = Callable[..., int]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    source = write_tree(root / "photos", {f"Person_{n}/{n}.jpg": encoded(n, 40, 50) for n in range(20)})
    assert pack_dataset.main(PackDataset(input=(str(source),), output=str(root / "data"), val_share=0.3)) == 0
    return root / "data"


@pytest.fixture(scope="module")
def run(local_ray: None, data: Path) -> Run:
    def start(output: object, **options: Any) -> int:
        job = Search(output=str(output), **{"data": str(data), "variants": NAMES[:1], **TINY, **ONE_THREAD, **options})
        return search.main(job)

    return start


@pytest.fixture(scope="module")
def finished(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study in which nothing happened. Read-only."""
    folder = tmp_path_factory.mktemp("studies") / "first"
    assert run(folder, variants=NAMES, parallel="2") == 0
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "study.json").read_text())["rows"]  # type: ignore[no-any-return]


def history_of(folder: Path, name: str) -> list[dict[str, float]]:
    """Of the newest state of a variant; nothing before the first."""
    states = sorted((folder / "trials" / name).glob("epoch_*.json"))
    return json.loads(states[-1].read_text())["history"] if states else []  # type: ignore[no-any-return]


# --- A study -------------------------------------------------------------------------------------------------------


def test_every_variant_is_a_row_once(finished: Path) -> None:
    rows = rows_of(finished)
    assert [row["variant"] for row in rows] == list(NAMES)
    for row in rows:
        assert row["error"] is None
        assert (row["epochs"], row["parameters"]) == (2, count_parameters(build(VARIANTS[row["variant"]])))
        assert row["macs"] == count_macs(VARIANTS[row["variant"]], 16, 16)
        last = history_of(finished, row["variant"])[-1]
        assert (row["train_loss"], row["val_loss"]) == (last["train_loss"], last["val_loss"])
        assert row["psnr_db"] == {name: round(last[f"psnr_{name}"], 2) for name in VALIDATION}
    assert rows[0]["identity_psnr_db"] == rows[1]["identity_psnr_db"] == rows[2]["identity_psnr_db"]
    assert rows[0]["network"] == "depth 3" and rows[1]["network"] == "skips False"
    lines = (finished / "study.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")] == [
        "| variant", "| identity", "| depth-3", "| no-skips", "| residual"
    ]  # fmt: skip
    assert len({line.count(" | ") for line in lines if line.startswith("| ")}) == 1


def test_it_says_where_its_numbers_come_from(finished: Path) -> None:
    record = json.loads((finished / "study.json").read_text())
    assert record["command"].startswith("python ") and record["commit"] and record["date"]
    assert record["hardware"].startswith("3 CPUs in the cluster")
    assert (record["images"], record["size"]) == (8, 16)
    assert record["command"] in (finished / "study.md").read_text()


def test_it_leaves_two_figures_and_nothing_besides(finished: Path) -> None:
    with Image.open(finished / "losses.png") as image:
        assert image.size == (1300, 500)
    with Image.open(finished / "overview.png") as image:
        assert image.size == (84 + 5 * (16 * 9 + 6), 24 + len(OVERVIEW) * (16 * 9 + 6))
        left, top = 84 + 4 * 150, 24 + 3 * 150  # the true face of the row `gray` has colours, its input has none
        assert len({len(set(image.getpixel((left + 9 * n + 4, top + 40)))) for n in range(16)} - {1}) == 1
        assert {len(set(image.getpixel((84 + 9 * n + 4, top + 40)))) for n in range(16)} == {1}
    assert {path.name for path in finished.iterdir()} == {
        "options.json", "study.json", "study.md", "losses.png", "overview.png", "trials", "lease.json.lock"
    }  # fmt: skip
    for name in NAMES:
        files = {path.name for path in (finished / "trials" / name).iterdir()}
        assert files == {"epoch_0002.json", "epoch_0002.safetensors"}


def test_how_many_run_side_by_side_changes_nothing(finished: Path, run: Run, tmp_path: Path) -> None:
    """On three CPUs two trials get one thread each, and so do three."""
    assert run(tmp_path, variants=NAMES) == 0
    for one, other in zip(rows_of(finished), rows_of(tmp_path), strict=True):
        assert {**one, "minutes": 0, "samples_per_second": 0} == {**other, "minutes": 0, "samples_per_second": 0}


def test_a_study_with_everything_on_s3(s3: str, data: Path, run: Run) -> None:
    from restore_core.storage import open_storage

    for path in data.glob("*.parquet"):
        open_storage("s3://photos/data").write(path.name, path.read_bytes())
    for _ in range(2):
        assert run("s3://photos/studies/one", data="s3://photos/data") == 0
        assert {item.key for item in open_storage("s3://photos/studies/one").list()} == {
            "options.json", "study.json", "study.md", "losses.png", "overview.png",
            "trials/depth-3/epoch_0002.json", "trials/depth-3/epoch_0002.safetensors",
        }  # fmt: skip


# --- Again ---------------------------------------------------------------------------------------------------------


def test_a_finished_study_is_not_trained_again(finished: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    states = {path: path.stat().st_mtime_ns for path in finished.glob("trials/*/*")}
    monkeypatch.setenv("RESTORE_COMMIT", "another")  # what is found here today is not what trained it
    assert run(finished, variants=NAMES) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.glob("trials/*/*")} == states
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_study_that_is_killed_goes_on_after_its_last_epoch(data: Path, run: Run, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    every_cpu = max(2, len(os.sched_getaffinity(0)))  # one thread a trial there too
    options = {"data": data, "output": output, "variants": NAMES[0], **TINY, "epochs": 12, "parallel": every_cpu}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    process = subprocess.Popen(
        [sys.executable, ROOT / "jobs/search.py", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: process.poll() is not None or history_of(output, "depth-3"))
    finally:
        process.kill()
        process.wait()
    assert not (output / "study.json").exists(), "it was not in the middle"
    before = history_of(output, "depth-3")
    assert run(output, epochs=12) == 0
    assert not (output / "_tune").exists()
    history = history_of(output, "depth-3")
    assert history[: len(before)] == before  # with the seconds they took
    assert [row["epoch"] for row in history] == list(range(1, 13))
    assert run(tmp_path / "whole", epochs=12) == 0
    whole = history_of(tmp_path / "whole", "depth-3")
    assert (history[-1]["train_loss"], history[-1]["val_loss"]) == (whole[-1]["train_loss"], whole[-1]["val_loss"])


def test_a_trial_that_fails_is_a_row_and_is_tried_again(run: Run, tmp_path: Path) -> None:
    """The other one is finished all the same."""
    blocked = tmp_path / "trials/no-skips/epoch_0001.safetensors"
    (blocked / "a folder where a file should be").mkdir(parents=True)
    assert run(tmp_path, variants=NAMES[:2]) == command_line.TOO_MANY_FAILURES
    good, bad = rows_of(tmp_path)
    assert good["error"] is None and "psnr_db" not in bad
    assert bad["error"] == f"ItemError: write: cannot write {blocked}: Is a directory"
    assert f"| no-skips | skips False; failed after 0 epochs: {bad['error']} |" in (tmp_path / "study.md").read_text()
    assert (tmp_path / "overview.png").exists()
    (blocked / "a folder where a file should be").rmdir()
    blocked.rmdir()
    assert run(tmp_path, variants=NAMES[:2]) == command_line.DONE
    assert rows_of(tmp_path)[0] == good
    assert rows_of(tmp_path)[1]["error"] is None


def test_a_variant_that_diverges_is_a_row(run: Run, tmp_path: Path) -> None:
    for _ in range(2):
        assert run(tmp_path, learning_rate=1e30) == command_line.TOO_MANY_FAILURES
        (row,) = rows_of(tmp_path)
        assert row["error"].startswith("the training loss is ") and row["error"].endswith("at or before step 2")
        assert f"| depth-3 | depth 3; failed after 0 epochs: {row['error']} |" in (tmp_path / "study.md").read_text()
        assert not (tmp_path / "overview.png").exists()


# --- What cannot work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"epochs": 3}, "epochs was 2, is now 3"),
        ({"size": 24}, "size was 16, is now 24"),
        ({"images": 7}, "images was 8, is now 7"),
        ({"seed": 5}, "seed was 0, is now 5"),
        ({"learning_rate": 0.5}, "learning_rate was 0.001, is now 0.5"),
        ({"variants": NAMES[:1]}, f"variants was {list(NAMES)}, is now {list(NAMES[:1])}"),
    ],
)
def test_the_same_output_with_other_options_is_refused(
    finished: Path, run: Run, changed: dict[str, Any], difference: str
) -> None:
    with pytest.raises(UsageError) as caught:
        run(finished, **{"variants": NAMES, **changed})
    assert str(caught.value) == (
        f"--output {finished}: holds a study with other options ({difference}); choose another --output"
    )


def test_a_study_of_data_that_was_packed_again_is_refused(finished: Path, run: Run) -> None:
    """Some variants would be of the one dataset and some of the other."""
    options = (finished / "options.json").read_text()
    (finished / "options.json").write_text(json.dumps(json.loads(options) | {"shards": "of others"}))
    try:
        with pytest.raises(UsageError, match=r"holds a study with other options \(shards was of others, is now"):
            run(finished, variants=NAMES)
    finally:
        (finished / "options.json").write_text(options)


def test_a_study_at_a_large_size_has_room_for_it() -> None:
    assert Search(data="d", output="o", size=300).trials()["base"].canvas == 300
    assert Search(data="d", output="o", size=48).trials()["base"].canvas == 256


@pytest.mark.parametrize("job", [search, train])
def test_two_at_once_in_one_folder_are_refused(
    job: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out/one"
    options = ["--output", folder] if job is search else ["--storage", tmp_path / "out", "--name", "one"]
    what = "study" if job is search else "training"
    monkeypatch.setattr(sys, "argv", ["job.py", "--data", str(data), "--batch-size", "4", *map(str, options)])
    with Lease(LocalStorage(folder), "lease.json", "another"):
        assert command_line.run(job.main, Search if job is search else train.Train) == command_line.UNUSABLE
    assert f": another {what} is at work there (host " in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["lease.json.lock"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("base", "basis")}, f"--variants basis: use some of {', '.join(VARIANTS)}"),
        ({"variants": ("base", "base")}, "--variants base: name it once"),
        ({"variants": ()}, f"--variants : name some of {', '.join(VARIANTS)}"),
        ({"parallel": "0"}, "--parallel 0: use auto or a number from 1"),
        ({"epochs": 0}, "--epochs 0: use 1 or more"),
        ({"images": 0}, "--images 0: use 1 or more"),
        ({"size": 15}, "--size 15: use 16 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Search(data="d", output="o", **options)
    assert str(caught.value) == message


def test_the_command_refuses_in_one_line_before_anything_is_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["search.py", *map(str, arguments)])
        assert command_line.run(search.main, Search) == command_line.UNUSABLE
        err = capsys.readouterr().err
        assert err.startswith("error: --") and err.count("\n") == 1, err
        assert not (tmp_path / "out").exists()
        return err

    out = tmp_path / "out"
    assert "--variants basis: use some of base, " in refused("--data", data, "--output", out, "--variants", "basis")
    assert "--batch-size 0: use 1 or more" in refused("--data", data, "--output", out, "--batch-size", 0)
    assert "--images 5: 5 training photographs do not fill --batch-size 32; take more" in refused(
        "--data", data, "--output", out, "--images", 5
    )
    assert "lies inside --data" in refused("--data", data, "--output", data / "study")
    assert "--data " in refused("--data", tmp_path / "nowhere", "--output", out)


def test_more_side_by_side_than_there_are_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--parallel 9: the cluster has 3 CPUs; use --parallel 3 or add nodes$"):
        run(tmp_path, parallel="9")
    with pytest.raises(UsageError, match=r"^--device cuda: needs 1 GPU for each worker, the cluster has 0 GPUs"):
        run(tmp_path, device="cuda")


@pytest.mark.parametrize(("wanted", "trials", "cpus", "gpus", "count"), [
    (None, 9, 1, None, 1), (None, 9, 2, None, 1), (None, 9, 8, None, 4), (None, 2, 8, None, 2), (None, 9, 16, 3, 3),
    (None, 1, 16, 3, 1), (8, 1, 8, None, 8), (2, 9, 16, 4, 2)])  # fmt: skip
def test_trials_side_by_side(wanted: int | None, trials: int, cpus: int, gpus: int | None, count: int) -> None:
    assert trials_at_once(wanted, trials, cpus=cpus, gpus=gpus) == count


def test_the_variants_are_the_origins_with_one_change_and_a_successor_of_its_size() -> None:
    base = VARIANTS["base"]
    assert base == AutoencoderConfig()
    for name, model in VARIANTS.items():
        if isinstance(model, AutoencoderConfig):
            changes = [field for field in vars(base) if getattr(model, field) != getattr(base, field)]
            assert len(changes) == (name != "base"), name
    residual = VARIANTS["residual"]
    assert isinstance(residual, ResidualUNetConfig)
    assert count_macs(residual, 48, 48) <= count_macs(base, 48, 48)
    assert count_parameters(build(residual)) == pytest.approx(count_parameters(build(base)), rel=0.05)

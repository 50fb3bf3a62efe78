"""The README's commands, run as they stand there, with small folders in place of the user's and a small preset."""

import importlib
import json
import re
import shlex
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tyro
from photos import people, write_tree

from benchmarks import page
from restore_core import checkpoint, manifest

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """What stands in the README's ```sh blocks, one command a line."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))
    return [shlex.split(line) for line in blocks.splitlines() if line]


def job_commands() -> list[list[str]]:
    return [command for command in commands() if command[0] == "python"]


def parse(command: list[str]) -> tuple[Any, Any]:
    """The job's module and its options, as the job itself parses them."""
    module = importlib.import_module("jobs." + Path(command[1]).stem)
    options = getattr(module, "".join(part.title() for part in Path(command[1]).stem.split("_")))
    return module, tyro.cli(options, args=command[2:])


def test_submitted_jobs_are_jobs() -> None:
    submitted = [command for command in commands() if command[:3] == ["ray", "job", "submit"]]
    assert submitted
    for command in submitted:
        parse(command[command.index("--") + 1 :])


def test_only_known_commands() -> None:
    # `ray up` needs an AWS account; tests/test_cluster_yaml.py holds its file against Ray's schema.
    for command in commands():
        assert command[0] in ("python", "export") or command[:2] in (["ray", "up"], ["ray", "job"]), command


@pytest.mark.ray
def test_local_commands_in_their_order(
    local_ray: None, s3: str, moto_client: "S3Client", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs = people(24)
    write_tree(tmp_path / "photos", photographs)
    write_tree(tmp_path / "damaged", dict(list(photographs.items())[:4]))
    for key, data in list(photographs.items())[:4]:
        moto_client.put_object(Bucket="photos", Key=f"raw/{key}", Body=data)
    monkeypatch.chdir(tmp_path)
    ran = []
    for command in job_commands():
        extra = {
            "train": ["--preset", "smoke"],
            "evaluate": ["--images", "2", "--sizes", "0"],
            "search": ["--variants", "base", "--epochs", "1", "--size", "16", "--images", "8", "--batch-size", "8"],
        }
        module, job = parse([*command, *extra.get(Path(command[1]).stem, [])])
        assert module.main(job) == 0, command
        ran.append(Path(command[1]).stem)
    assert set(ran) == {"restore_bucket", "verify_bucket", "pack_dataset", "train", "evaluate", "search"}
    assert moto_client.list_objects_v2(Bucket="photos", Prefix="restored/lfw_funneled/")["KeyCount"] == 4
    for name in ("metrics.csv", "loss.png", "samples.png", "model/model.safetensors", "quality/quality.md"):
        assert (tmp_path / "runs/mine" / name).stat().st_size > 0
    assert (tmp_path / "runs/study/study.md").stat().st_size > 0


def test_files_named_in_the_tree_exist() -> None:
    tree = README.split("## What is in the repository")[1].split("## ")[0]
    for line in tree.splitlines():
        if line.startswith("    "):
            assert (ROOT / line.split()[0]).exists(), line


def test_every_column_of_the_ledger_is_explained() -> None:
    table = README.split("## What lands where")[1].split("## ")[0]
    for name in manifest.SCHEMA.names:
        assert f"`{name}`" in table


def test_tables_and_outputs_are_the_measured_ones() -> None:
    assert (ROOT / "benchmarks/quality/quality.md").read_text().split("\n## ")[0] in README
    assert textwrap.indent((ROOT / "benchmarks/demo.txt").read_text(), "    ", lambda line: True) in README


def test_the_bundled_model_is_described_by_its_card() -> None:
    card = json.loads((checkpoint.BUNDLED / "faces/config.json").read_text())
    trained = card["trained"]
    assert f"    {trained['command']}\n" in README
    assert f"in {trained['minutes']:.0f} minutes on " in README and f"(commit {trained['commit'][:12]})" in README
    measured = json.loads((ROOT / "benchmarks/quality/quality.json").read_text())
    assert measured["models"][0] == {"name": "faces", "sha256": checkpoint.read("faces").sha256}


def test_speed_is_the_measured_one() -> None:
    assert page.PAGE.read_text() == page.page()
    assert page.BEGIN + page.summary() + page.END in README
    results = [json.loads(path.read_text()) for path in (ROOT / "benchmarks/restore").glob("*.json")]
    assert results
    for result in results:
        assert result["model"]["sha256"] == checkpoint.read(result["model"]["name"]).sha256


def test_what_bfloat16_costs_is_the_measured_loss() -> None:
    def psnr(folder: str) -> dict[tuple[str, int], tuple[float, int]]:
        result = json.loads((ROOT / "benchmarks" / folder / "quality.json").read_text())
        assert result["models"][0] == {"name": "faces", "sha256": checkpoint.read("faces").sha256}
        rows = [row for row in result["rows"] if row["method"] == "faces"]
        return {(row["damage"], row["size"]): (row["psnr"], row["unchanged"]) for row in rows}

    exact, fast = psnr("quality"), psnr("bfloat16")
    assert len(fast) == 14 and "at most 0.03 dB" in README
    for case, (value, unchanged) in fast.items():
        assert value > exact[case][0] - 0.03
        assert unchanged == exact[case][1] == (60 if case[0] == "clean" else 0)


def test_what_an_object_costs_is_measured() -> None:
    growth = json.loads((ROOT / "benchmarks/growth.json").read_text())
    for row in growth["results"]:
        memory = max(row["first run, driver MB"], row["nothing left to do, driver MB"])
        cells = row["first run, s"], row["first row, s"], row["nothing left to do, s"], memory
        assert f"| {row['objects']:,} | " + " | ".join(map(str, cells)) + " |" in README
    some, most = (row["first run, driver MB"] for row in growth["results"][-2:])
    slope = (most - some) / 0.9  # between 100,000 and a million
    assert f"{slope:.0f} MB more a million objects: 10 million would take {(most + 9 * slope) / 1000:.1f} GB" in README

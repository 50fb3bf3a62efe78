"""Clusters of several nodes: they come, go, are too few, or are still to come."""

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from photos import encoded, people, write_tree
from processes import TESTS, Nodes, Process, Started, descendants, kill, started, wait_for

from jobs import pack_dataset, verify_bucket
from jobs.pack_dataset import PackDataset
from jobs.verify_bucket import VerifyBucket
from restore_core.manifest import Ledger
from restore_core.storage import LocalStorage

# The proof (verify_bucket) needs a Ray in this process: the one that all tests share.
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

Models = Callable[[int], Path]

JOBS = TESTS.parent / "jobs"
IMAGES, BATCH, FLUSH = 160, 4, 20


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Started]:
    with started(tmp_path) as them:
        yield them


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that a run takes a while."""
    files = {f"{index:04d}.png": encoded(index, 300, 400, format="PNG") for index in range(IMAGES)}
    return write_tree(tmp_path_factory.mktemp("source") / "in", files)


@pytest.fixture(scope="module")
def expected(source: Path, small_model: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of what a run on a single node of CPUs writes."""
    folder = tmp_path_factory.mktemp("expected")
    with started(folder) as processes:
        driver = restore(processes, source, folder / "out", small_model(1))
        assert driver.wait(300) == 0, processes.said(driver, "err")
    return hashes(folder / "out")


def restore(processes: Started, source: Path, output: Path, model: Path, *options: object, **settings: str) -> Process:
    """The job, with a line in OUTPUT's neighbour `notes` for each write."""
    return processes.run(
        "counted_driver.py", "--input", source, "--output", output, "--model", model, "--batch-size", BATCH, *options,
        COUNTED_NOTES=str(output.with_name("notes")), COUNTED_FLUSH_ROWS=str(FLUSH), **settings,
    )  # fmt: skip


def written(output: Path) -> Counter[str]:
    notes = output.with_name("notes")
    return Counter(notes.read_text().splitlines()) if notes.exists() else Counter()


def hashes(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*.png")}


def assert_whole(source: Path, output: Path, expected: dict[str, str]) -> None:
    assert hashes(output) == expected
    rows = Ledger(LocalStorage(output), "reader").latest()
    assert sorted(rows["key"].to_pylist()) == sorted(expected)
    assert set(rows["status"].to_pylist()) == {"restored"}
    assert verify_bucket.main(VerifyBucket(input=str(source), output=str(output))) == 0


@pytest.mark.faults
def test_the_plan_for_gpus_loses_a_node(
    tmp_path: Path, processes: Started, source: Path, expected: dict[str, str], small_model: Models
) -> None:
    """Decoding, network and encoding in processes of their own, on nodes of which one is suddenly gone."""
    nodes, output = Nodes(processes, head_cpus=0), tmp_path / "out"
    nodes.add(2)
    nodes.add(1, gpus=1)
    lost = nodes.add(2, gpus=1)
    driver = restore(processes, source, output, small_model(1), RAY_ADDRESS=nodes.address, COUNTED_NO_CUDA="1")
    wait_for(lambda: driver.poll() is not None or len(written(output)) >= IMAGES // 4)
    assert driver.poll() is None, processes.said(driver, "err")
    assert descendants(lost, "RestoreItems")
    kill(lost, *descendants(lost, ""))
    assert driver.wait(300) == 0, processes.said(driver, "err")
    assert_whole(source, output, expected)
    record = json.loads((output / "_restore/run.json").read_text())
    assert record["statuses"] == {"restored": IMAGES}
    twice = written(output).total() - IMAGES
    print(f"{twice} of {IMAGES} written twice")
    assert twice <= 2 * 2 * 2 * BATCH  # on two nodes, two that restore and two that write or wait


@pytest.mark.faults
@pytest.mark.parametrize("notice", ["terminated", "drained"])
def test_a_node_that_is_taken_away_loses_a_batch(
    tmp_path: Path, processes: Started, source: Path, expected: dict[str, str], small_model: Models, notice: str
) -> None:
    """As spot instances are: all of its processes get SIGTERM, or Ray is told some seconds before the node is gone."""
    nodes, output = Nodes(processes, head_cpus=0), tmp_path / "out"
    nodes.add(1)
    lost = nodes.add(1)
    driver = restore(processes, source, output, small_model(1), RAY_ADDRESS=nodes.address)
    wait_for(
        lambda: driver.poll() is not None or (len(written(output)) >= 5 * BATCH and descendants(lost, "RestoreUnit"))
    )
    if notice == "drained":
        ray = Path(sys.executable).with_name("ray")
        order = [
            ray, "drain-node", "--address", nodes.address, "--node-id", nodes.ids[-1], "--reason-message", "spot",
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", "5",
        ]  # fmt: skip
        subprocess.run(order, check=True, env={**os.environ, "RAY_AUTH_MODE": "disabled"})
        time.sleep(5)
    for process in (lost, *descendants(lost, "")):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    wait_for(lambda: not descendants(lost, "RestoreUnit"))
    assert driver.poll() is None, processes.said(driver, "err")
    assert driver.wait(300) == 0, processes.said(driver, "err")
    assert_whole(source, output, expected)
    twice = written(output).total() - IMAGES
    print(f"{notice}: {twice} of {IMAGES} written twice, in batches of {BATCH}")
    assert twice <= BATCH


@pytest.mark.slow
def test_a_node_that_joins_is_used(tmp_path: Path, processes: Started, source: Path) -> None:
    """With a network that takes its time, so that there is some."""
    nodes, output = Nodes(processes, head_cpus=0), tmp_path / "out"
    nodes.add(1)
    driver = restore(processes, source, output, Path("faces"), RAY_ADDRESS=nodes.address)
    wait_for(lambda: driver.poll() is not None or len(written(output)) >= BATCH)
    joined = nodes.add(1)
    wait_for(lambda: driver.poll() is not None or descendants(joined, "RestoreUnit"))
    assert driver.poll() is None, "it was done before"
    driver.send_signal(signal.SIGINT)
    assert driver.wait(60) == 130, processes.said(driver, "err")


@pytest.mark.faults
def test_a_first_node_is_waited_for_where_it_can_come(
    tmp_path: Path, processes: Started, source: Path, expected: dict[str, str], small_model: Models
) -> None:
    """As with min_workers: 0, but for who starts the node."""
    nodes, output = Nodes(processes, head_cpus=0), tmp_path / "out"
    settings = {"RAY_ADDRESS": nodes.address, "COUNTED_NO_CUDA": "1", "RESTORE_GROWS_TO": "CPU=2,GPU=1"}
    driver = restore(processes, source, output, small_model(1), **settings)
    wait_for(lambda: driver.poll() is not None or "waiting for the first node with a GPU" in said(processes, driver))
    nodes.add(2, gpus=1)
    assert driver.wait(300) == 0, processes.said(driver, "err")
    assert_whole(source, output, expected)


def test_many_cpus_that_share_little_memory(tmp_path: Path, processes: Started, small_model: Models) -> None:
    """Fewer processes of several threads each, or nothing larger than a megapixel would go."""
    nodes, output = Nodes(processes, head_cpus=0), tmp_path / "out"
    node = nodes.add(5, gigabytes=5)
    files = {f"{index}.png": encoded(index, 40, 60, format="PNG") for index in range(30)}
    source = write_tree(tmp_path / "in", files | {"large.jpg": encoded(99, 1200, 1600)})
    driver = restore(processes, source, output, small_model(1), RAY_ADDRESS=nodes.address)
    seen = Counter[int]()
    while driver.poll() is None:
        seen.update(descendants(node, "RestoreUnit"))
        time.sleep(0.1)
    assert driver.returncode == 0, processes.said(driver, "err")
    rows = Ledger(LocalStorage(output), "reader").latest()
    assert set(rows["status"].to_pylist()) == {"restored"}
    assert sum(times > 3 for times in seen.values()) == 2  # a codec has its worker's name while it is started


def said(processes: Started, process: Process) -> str:
    return processes.said(process) + processes.said(process, "err")


def test_too_few_resources_are_told_within_a_minute(
    tmp_path: Path, processes: Started, source: Path, small_model: Models
) -> None:
    nodes = Nodes(processes, head_cpus=0)
    settings = {"RAY_ADDRESS": nodes.address}
    wanted = {
        "--device auto: needs 1 CPU for each worker, the cluster has 0 CPUs for work; add a worker node": (),
        "--device cuda: needs 1 GPU for each worker, the cluster has 0 GPUs; add GPU nodes or use --device cpu": (
            "--device", "cuda"),
    }  # fmt: skip
    begun = time.monotonic()
    for message, options in wanted.items():
        driver = restore(processes, source, tmp_path / "out", small_model(1), *options, **settings)
        assert driver.wait(60) == 2
        assert message in said(processes, driver)
        assert "Traceback" not in said(processes, driver)
    assert time.monotonic() - begun < 60
    driver = restore(processes, source, tmp_path / "out", small_model(1), **settings, RESTORE_GROWS_TO="GPU:8")
    assert driver.wait(60) == 2
    assert "RESTORE_GROWS_TO=GPU:8: not of the form CPU=64,GPU=8" in said(processes, driver)


@pytest.mark.faults
def test_training_goes_on_with_fewer_workers_and_takes_them_back(tmp_path: Path, processes: Started) -> None:
    clean = write_tree(tmp_path / "clean", people(40))
    job = PackDataset(input=(str(clean),), output=str(tmp_path / "data"), val_share=0.25)
    assert pack_dataset.main(job) == 0
    nodes = Nodes(processes, head_cpus=1)  # which is Ray Data's
    nodes.add(1)
    nodes.add(1)
    driver = processes.run(
        JOBS / "train.py", "--data", tmp_path / "data", "--storage", tmp_path / "runs", "--preset", "smoke",
        "--schedule", "32:1000", "--workers", 2, "--min-workers", 1, RAY_ADDRESS=nodes.address,
    )  # fmt: skip

    def has(*numbers: int) -> bool:
        """In that order, other lines between them."""
        found = re.findall(r"workers: (\d)", said(processes, driver))
        return [number for number, _ in itertools.groupby(found)][: len(numbers)] == [*map(str, numbers)]

    for numbers in ((2,), (2, 1), (2, 1, 2)):
        wait_for(lambda numbers=numbers: driver.poll() is not None or has(*numbers))
        assert driver.poll() is None, said(processes, driver)
        if len(numbers) == 1:
            for lost in nodes.raylets[1:]:  # one alone would leave room for two
                kill(lost, *descendants(lost, ""))
        elif len(numbers) == 2:
            nodes.add(1)
    epochs = [int(epoch) for epoch in re.findall(r"epoch (\d+)/1000", processes.said(driver))]
    assert len(epochs) - len(set(epochs)) <= 2, "more than the epoch in hand was done again"

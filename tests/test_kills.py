"""Whatever is killed, and whenever: the next run ends with the bytes of an uninterrupted one, and little is done twice.

On tiny photographs, so that what is tested is the account and not the network.
"""

import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from counted_driver import counted
from photos import encoded, write_tree
from processes import descendants, marked, wait_for

from jobs import restore_bucket
from jobs.restore_bucket import RestoreBucket

pytestmark = pytest.mark.ray

Models = Callable[[int], Path]

ROOT = Path(__file__).resolve().parent.parent
TESTS = Path(__file__).resolve().parent
GRACE_SECONDS = 30
"""So long processes may take to end that have lost their driver or their node."""


def bound(actors: int, batch: int, flush_rows: int) -> int:
    """So many images may be done twice: what the actors have in hand, and one flush of the ledger, in whole units."""
    return actors * batch + math.ceil(flush_rows / batch) * batch


# --- What is on disk -----------------------------------------------------------------------------------------------


def images(count: int) -> dict[str, bytes]:
    """JPEG and PNG in turn; all keys are of one length."""
    return {
        f"{index:04d}.{ending}": encoded(index, format=format)
        for index, (ending, format) in zip(range(count), (("jpg", "JPEG"), ("png", "PNG")) * count, strict=False)
    }


def outputs(output: Path) -> dict[str, bytes]:
    """What was written beside the ledger and the report, temporary files included."""
    paths = (path for path in output.rglob("*") if path.is_file() and output / "_restore" not in path.parents)
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def ledger(output: Path) -> list[dict[str, str]]:
    """All rows in the ledger's files; of an unfinished run there may be several of one key."""
    columns = ["key", "status", "output_key", "output_sha256", "attempt"]
    files = sorted((output / "_restore/manifest").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]


def assert_as_uninterrupted(source: Path, output: Path, expected: dict[str, bytes]) -> None:
    """The same bytes, one row a key that its output hashes to, nothing half-written, and the proof says so too."""
    written = outputs(output)
    assert written.keys() == expected.keys()
    assert [key for key, data in written.items() if data != expected[key]] == []
    rows = ledger(output)
    assert sorted(row["key"] for row in rows) == sorted(expected)
    for row in rows:
        assert (row["status"], row["output_key"]) == ("restored", row["key"])
        assert row["output_sha256"] == hashlib.sha256(expected[row["key"]]).hexdigest()
    assert not list(output.rglob(".restore-*.tmp")) and not (output / "_restore/lease.json").exists()
    command = [sys.executable, ROOT / "jobs/verify_bucket.py", "--input", source, "--output", output]
    proof = subprocess.run(command, capture_output=True, text=True)
    assert proof.returncode == 0, proof.stdout + proof.stderr


class Notes:
    """The keys of all writes, in the order in which they began; see counted_driver.py."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def count(self, length: int = len("0000.jpg\n")) -> int:
        return self.path.stat().st_size // length if self.path.exists() else 0

    def keys(self) -> Counter[str]:
        return Counter(self.path.read_text().splitlines()) if self.path.exists() else Counter()


# --- Processes -----------------------------------------------------------------------------------------------------


class Started:
    """Processes with a mark in their environment, by which whatever they leave behind is found and ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Short, for the sockets; its own, so that no other Ray of this machine is joined by mistake.
        self._ray = tempfile.TemporaryDirectory(prefix="kills", dir="/tmp", ignore_cleanup_errors=True)
        self._mark = f"KILLS_TEST={uuid.uuid4().hex}"
        self._processes: list[subprocess.Popen[str]] = []

    def run(self, script: str, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
        """Its standard output and error are in the folder, as NUMBER.out and NUMBER.err."""
        name, _, value = self._mark.partition("=")
        own = {name: value, "RAY_TMPDIR": self._ray.name, "RAY_AUTH_MODE": "disabled", **environment}
        outer = {key: text for key, text in os.environ.items() if not key.startswith("RAY_")}
        number = len(self._processes)
        with (self._folder / f"{number}.out").open("w") as out, (self._folder / f"{number}.err").open("w") as err:
            process = subprocess.Popen(
                [sys.executable, TESTS / script, *map(str, arguments)],
                stdin=subprocess.PIPE, stdout=out, stderr=err, text=True, env={**outer, **own},
            )  # fmt: skip
        self._processes.append(process)
        return process

    def said(self, process: "subprocess.Popen[str]", stream: str = "out") -> str:
        return (self._folder / f"{self._processes.index(process)}.{stream}").read_text()

    def left(self) -> list[int]:
        return marked(self._mark)

    def end(self) -> None:
        for pid in self.left():
            kill(pid)
        for process in self._processes:
            process.communicate()
        self._ray.cleanup()


def kill(*pids: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def started(folder: Path) -> Iterator[Started]:
    processes = Started(folder)
    try:
        yield processes
    finally:
        processes.end()


# --- Short ones ----------------------------------------------------------------------------------------------------

FEW, FEW_ACTORS, FEW_BATCH, FEW_FLUSH = 100, 2, 4, 20
FEW_BOUND = bound(FEW_ACTORS, FEW_BATCH, FEW_FLUSH)


@pytest.fixture
def again(
    local_ray: None, small_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Counter[str]]:
    """Run the job in this process; exit code 0. Returns the keys that it has written, and how often."""
    from restore_core.pipelines import restoration

    def restore(source: Path, output: Path, model: Path | None = None, **options: bool) -> Counter[str]:
        notes = Notes(tmp_path / f"notes-{uuid.uuid4().hex}")
        monkeypatch.setattr(restoration, "RestoreUnit", counted(notes.path))
        job = RestoreBucket(
            input=str(source), output=str(output), model=str(model or small_model(1)), device="cpu",
            workers=str(FEW_ACTORS), batch_size=FEW_BATCH, **options,
        )  # fmt: skip
        assert restore_bucket.main(job) == 0
        return notes.keys()

    return restore


@pytest.fixture
def few(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "in", images(FEW))


def start_few(
    processes: Started, source: Path, tmp_path: Path, model: Path, **settings: str
) -> "subprocess.Popen[str]":
    return processes.run(
        "counted_driver.py", "--input", source, "--output", tmp_path / "out", "--model", model,
        "--workers", FEW_ACTORS, "--batch-size", FEW_BATCH,
        COUNTED_NOTES=str(tmp_path / "notes"), COUNTED_FLUSH_ROWS=str(FEW_FLUSH), **settings,
    )  # fmt: skip


def test_a_driver_that_is_killed_anywhere(
    tmp_path: Path, few: Path, small_model: Models, again: Callable[..., Counter[str]]
) -> None:
    output, notes = tmp_path / "out", Notes(tmp_path / "notes")
    with started(tmp_path) as processes:
        driver = start_few(processes, few, tmp_path, small_model(1))
        wait_for(lambda: driver.poll() is not None or notes.count() >= FEW // 2)
        kill(driver.pid)
        # As a killed writer leaves them, at any time before the next run.
        for folder in (output, output / "_restore/manifest"):
            (folder / f".restore-{'0' * 32}.tmp").write_bytes(b"half")
        recorded = {row["key"] for row in ledger(output)}
        later = again(few, output)
        assert driver.wait() == -signal.SIGKILL, processes.said(driver, "err")
        wait_for(lambda: not processes.left(), GRACE_SECONDS)
    assert_as_uninterrupted(few, output, again_elsewhere(again, few, tmp_path))
    assert not recorded & later.keys()
    assert sum((notes.keys() + later).values()) - FEW <= FEW_BOUND


def again_elsewhere(again: Callable[..., Counter[str]], source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The outputs of a run in which nothing happens."""
    output = tmp_path / "uninterrupted"
    again(source, output)
    return outputs(output)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_driver_that_is_killed_around_an_append(
    tmp_path: Path, few: Path, small_model: Models, again: Callable[..., Counter[str]], moment: str
) -> None:
    """Before it: the outputs are written, and no row says so. Just after it: all is in order, and nobody knows."""
    output, notes = tmp_path / "out", Notes(tmp_path / "notes")
    with started(tmp_path) as processes:
        driver = start_few(processes, few, tmp_path, small_model(1), COUNTED_DEATH=f"{moment} 2")
        assert driver.wait(240) == -signal.SIGKILL, processes.said(driver, "err")
        recorded = {row["key"] for row in ledger(output)}
        appends = 1 if moment == "before" else 2
        assert appends * FEW_FLUSH <= len(recorded) < appends * (FEW_FLUSH + FEW_BATCH)
        assert recorded < outputs(output).keys()
        wait_for(lambda: not processes.left(), GRACE_SECONDS)
    if moment == "after":  # and of what was recorded, two objects change before the next run
        changed = sorted(recorded)[:2]
        for index, key in enumerate(changed):
            (few / key).write_bytes(encoded(FEW + index, 14, 18, "JPEG" if key.endswith("jpg") else "PNG"))
    else:
        changed = []
    later = again(few, output)
    assert later.keys() == images(FEW).keys() - (recorded - set(changed))
    assert set(later.values()) == {1}
    assert sum((notes.keys() + later).values()) - FEW - len(changed) <= FEW_BOUND
    assert_as_uninterrupted(few, output, again_elsewhere(again, few, tmp_path))
    if moment == "after":
        everything = Counter(images(FEW).keys())
        assert again(few, output) == Counter()
        assert again(few, output, strip_metadata=True) == everything
        assert again(few, output, small_model(2), strip_metadata=True) == everything
        attempts = Counter(row["attempt"] for row in ledger(output))
        assert attempts == {3: FEW - len(changed), 4: len(changed)}


# --- All victims, everywhere ---------------------------------------------------------------------------------------

MANY, BATCH, FLUSH = 2000, 16, 200
PLACES = (10, 50, 90, 99, None)
VICTIMS = ("actor", "node", "driver", "head")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("many") / "in", images(MANY))


def start_many(
    processes: Started, source: Path, output: Path, model: Path, actors: int, notes: Path, **more: str
) -> "subprocess.Popen[str]":
    return processes.run(
        "counted_driver.py", "--input", source, "--output", output, "--model", model,
        "--workers", actors, "--batch-size", BATCH,
        COUNTED_NOTES=str(notes), COUNTED_FLUSH_ROWS=str(FLUSH), **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(many: Path, small_model: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    with started(folder) as processes:
        driver = start_many(processes, many, folder / "out", small_model(1), 2, folder / "notes")
        assert driver.wait(600) == 0, processes.said(driver, "err")
    assert Notes(folder / "notes").keys() == Counter(images(MANY).keys())
    return outputs(folder / "out")


@pytest.mark.faults
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place}%" if place else "random")
@pytest.mark.parametrize("victim", VICTIMS)
def test_nothing_is_lost_or_doubled(
    tmp_path: Path, many: Path, uninterrupted: dict[str, bytes], small_model: Models, victim: str, place: int | None
) -> None:
    seed = 100 * VICTIMS.index(victim) + PLACES.index(place)
    chance = random.Random(seed)
    actors = chance.choice((2, 3))
    at = round((place or chance.uniform(1, 99)) / 100 * MANY)
    output, first, second = tmp_path / "out", Notes(tmp_path / "first"), Notes(tmp_path / "second")
    with started(tmp_path) as processes:
        cluster, raylets, settings = None, [], {}
        if victim in ("node", "head"):
            cluster = processes.run("three_nodes.py")
            wait_for(lambda: cluster.poll() is not None or processes.said(cluster).endswith("\n"), 60)
            found = json.loads(processes.said(cluster))
            raylets, settings = found["raylets"], {"RAY_ADDRESS": found["address"]}
        driver = start_many(processes, many, output, small_model(1), actors, first.path, **settings)
        wait_for(lambda: driver.poll() is not None or first.count() >= at)
        if victim == "actor":
            targets = [chance.choice(sorted(descendants(driver.pid, "RestoreUnit")))]
        elif victim == "node":
            node = chance.choice([pid for pid in raylets[1:] if descendants(pid, "RestoreUnit")])
            targets = [node, *descendants(node, "")]
        elif victim == "driver":
            targets = [driver.pid]
        else:
            assert cluster is not None
            targets = [driver.pid, cluster.pid, *descendants(driver.pid, ""), *descendants(cluster.pid, "")]
        assert driver.poll() is None, "it was done already: " + processes.said(driver, "err")
        kill(*targets)
        killed_at = first.count()
        recorded: set[str] = set()
        if driver.pid in targets:
            recorded = {row["key"] for row in ledger(output)}
        else:
            assert driver.wait(600) == 0, processes.said(driver, "err")
            recorded = {row["key"] for row in ledger(output)}
            assert len(recorded) == MANY
        # The killed driver is not even waited for: its lease must count as a dead one's.
        next_driver = start_many(processes, many, output, small_model(1), actors, second.path)
        assert next_driver.wait(600) == 0, processes.said(next_driver, "err")
        if driver.pid in targets:
            assert driver.wait() == -signal.SIGKILL
        if cluster is not None:
            assert cluster.stdin is not None
            cluster.stdin.close()
        wait_for(lambda: not processes.left(), GRACE_SECONDS)
    assert_as_uninterrupted(many, output, uninterrupted)
    later = second.keys()
    assert not recorded & later.keys(), "what was recorded was done again"
    writes = first.keys() + later
    assert writes.keys() == uninterrupted.keys()
    twice = sum(writes.values()) - MANY
    allowed = bound(actors, BATCH, FLUSH)
    print(f"{victim} {place}: seed {seed}, {actors} actors, killed at {killed_at}, {len(recorded)} recorded, ", end="")
    print(f"{later.total()} by the next run, {twice} done again, at most {max(writes.values())} times; bound {allowed}")
    assert twice <= allowed

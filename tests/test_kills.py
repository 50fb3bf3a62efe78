"""Whatever is killed, and whenever: the next run ends with the bytes of an uninterrupted one, and little is done twice.

On tiny photographs, so that what is tested is the account and not the network.
"""

import functools
import hashlib
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from counted_driver import counted
from photos import encoded, write_tree
from processes import Nodes, Process, Started, descendants, kill, killed, started, wait_for

from jobs import restore_bucket, verify_bucket
from jobs.restore_bucket import RestoreBucket
from jobs.verify_bucket import VerifyBucket
from restore_core.manifest import Ledger, Row
from restore_core.storage import open_storage

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# The proof (verify_bucket) needs a Ray in this process: the one that all tests share.
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

Models = Callable[[int], Path]
Again = Callable[..., Counter[str]]


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


def keys_of(rows: list[dict[str, str]]) -> set[str]:
    return {row["key"] for row in rows}


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
    assert verify_bucket.main(VerifyBucket(input=str(source), output=str(output))) == 0


class Notes:
    """The keys of all writes, in the order in which they began; see counted_driver.py."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def count(self, length: int = len("0000.jpg\n")) -> int:
        return self.path.stat().st_size // length if self.path.exists() else 0

    def keys(self) -> Counter[str]:
        return Counter(self.path.read_text().splitlines()) if self.path.exists() else Counter()


# --- Short ones ----------------------------------------------------------------------------------------------------

FEW, FEW_ACTORS, FEW_BATCH, FEW_FLUSH = 100, 2, 4, 20


@pytest.fixture(scope="module")
def again(local_ray: None, small_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Again:
    """Run the job in this process; exit code 0. Returns the keys that it has written, and how often."""
    from restore_core.pipelines import restoration

    def restore(source: Path | str, output: Path | str, model: Path | None = None, **options: bool) -> Counter[str]:
        notes = Notes(tmp_path_factory.mktemp("notes") / "notes")
        job = RestoreBucket(
            input=str(source), output=str(output), model=str(model or small_model(1)), device="cpu",
            workers="1", batch_size=FEW_BATCH, **options,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(restoration, "RestoreUnit", counted(notes.path))
            assert restore_bucket.main(job) == 0
        return notes.keys()

    return restore


@pytest.fixture
def few(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "in", images(FEW))


@pytest.fixture(scope="module")
def restored(again: Again, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Some more than those, after a run in which nothing happened."""
    folder = tmp_path_factory.mktemp("restored")
    assert again(write_tree(folder / "in", images(FEW + 2)), folder / "out") == Counter(images(FEW + 2).keys())
    return outputs(folder / "out")


def start_few(
    processes: Started, source: Path | str, output: Path | str, model: Path, notes: Notes, **settings: str
) -> Process:
    return processes.run(
        "counted_driver.py", "--input", source, "--output", output, "--model", model,
        "--workers", FEW_ACTORS, "--batch-size", FEW_BATCH,
        COUNTED_NOTES=str(notes.path), COUNTED_FLUSH_ROWS=str(FEW_FLUSH), **settings,
    )  # fmt: skip


def test_a_driver_that_is_killed_anywhere(
    tmp_path: Path, few: Path, small_model: Models, again: Again, restored: dict[str, bytes]
) -> None:
    output, notes = tmp_path / "out", Notes(tmp_path / "notes")
    with started(tmp_path) as processes:
        driver = start_few(processes, few, output, small_model(1), notes)
        wait_for(lambda: driver.poll() is not None or notes.count() >= FEW // 2)
        kill(driver.pid)
        assert killed(driver), processes.said(driver, "err")
        recorded = keys_of(ledger(output))
        for folder in (output, output / "_restore/manifest"):  # as killed writers leave them, now and then
            (folder / f".restore-{'0' * 32}.tmp").write_bytes(b"half")
        later = again(few, output)
        processes.wait_until_gone()
    assert_as_uninterrupted(few, output, {key: restored[key] for key in images(FEW)})
    assert later == Counter(images(FEW).keys() - recorded)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_driver_that_is_killed_around_an_append(
    tmp_path: Path, few: Path, small_model: Models, again: Again, restored: dict[str, bytes], moment: str
) -> None:
    """Before it: the outputs are written, and no row says so. Just after it: they are recorded, and nobody knows."""
    output, notes = tmp_path / "out", Notes(tmp_path / "notes")
    with started(tmp_path) as processes:
        driver = start_few(processes, few, output, small_model(1), notes, COUNTED_DEATH=f"{moment} 2")
        assert killed(driver), processes.said(driver, "err")
        recorded = keys_of(ledger(output))
        appends = 1 if moment == "before" else 2
        due = FEW_FLUSH - FEW_ACTORS * FEW_BATCH  # since so much may come back meanwhile
        assert 0 <= len(recorded) - due * appends < FEW_BATCH * appends  # in whole units
        written = outputs(output).keys()
        assert recorded <= written
        if moment == "before":
            assert len(written - recorded) >= due
            processes.wait_until_gone()  # else its workers may still write
            written = outputs(output).keys()
            proof = VerifyBucket(input=str(few), output=str(output), report=tmp_path / "report.json")
            assert verify_bucket.main(proof) == 1
            found = json.loads((tmp_path / "report.json").read_text())["findings"]
            expected_findings = {("unaccounted", key) for key in images(FEW).keys() - recorded}
            left = {key: ".restore-" in key for key in written - recorded}  # in the middle of a write, if so
            expected_findings |= {("temporary" if half else "extra", key) for key, half in left.items()}
            assert {(one["finding"], one["key"]) for one in found} == expected_findings
        expected, changed = {key: restored[key] for key in images(FEW)}, set()
        if moment == "after":  # and before the next run two objects change of which there is a row
            for key, other in zip(sorted(recorded)[:2], sorted(restored)[FEW:], strict=True):
                (few / key).write_bytes(images(FEW + 2)[other])
                expected[key] = restored[other]
                changed.add(key)
        assert again(few, output) == Counter(images(FEW).keys() - (recorded - changed))
        processes.wait_until_gone()
    assert_as_uninterrupted(few, output, expected)
    assert again(few, output) == Counter()


def test_the_listing_goes_on_where_it_was(
    tmp_path: Path, few: Path, small_model: Models, again: Again, restored: dict[str, bytes]
) -> None:
    """What comes in the part that was listed before is left to the next run; nothing else is."""
    output, notes = tmp_path / "out", Notes(tmp_path / "notes")
    with started(tmp_path) as processes:
        driver = start_few(processes, few, output, small_model(1), notes, COUNTED_LISTED="40")
        wait_for(lambda: driver.poll() is not None or notes.count() >= FEW // 2)
        kill(driver.pid)
        assert killed(driver), processes.said(driver, "err")
        assert len(list((output / "_restore/listed").rglob("*.parquet"))) == 2
        recorded = keys_of(ledger(output))
        new = dict(zip(("0000-new.jpg", "0090-new.jpg"), sorted(restored)[FEW:], strict=True))
        for key, other in new.items():
            (few / key).write_bytes(images(FEW + 2)[other])
        assert again(few, output, resume_listing=True) == Counter({*images(FEW), "0090-new.jpg"} - recorded)
        processes.wait_until_gone()
    assert not list((output / "_restore/listed").rglob("*.parquet"))
    assert again(few, output) == Counter(["0000-new.jpg"])
    expected = {key: restored[key] for key in images(FEW)}
    assert_as_uninterrupted(few, output, {**expected, **{key: restored[other] for key, other in new.items()}})


def test_while_the_ledger_is_written_nothing_new_begins(
    tmp_path: Path, few: Path, small_model: Models, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes: what is written meanwhile would be done again if the driver were killed."""
    from restore_core.pipelines import account

    monkeypatch.setattr(account, "FLUSH_ROWS", FEW_FLUSH)
    output, recorded = tmp_path / "out", 0
    unrecorded = []
    append = Ledger.append

    def slow(self: Ledger, rows: list[Row]) -> None:
        nonlocal recorded
        append(self, rows)
        recorded += len(rows)
        time.sleep(4)
        unrecorded.append(len(outputs(output)) - recorded)

    monkeypatch.setattr(Ledger, "append", slow)
    job = RestoreBucket(
        input=str(few), output=str(output), model=str(small_model(1)), device="cpu", workers=str(FEW_ACTORS),
        batch_size=FEW_BATCH,
    )  # fmt: skip
    assert restore_bucket.main(job) == 0
    assert len(unrecorded) > 2 and recorded == FEW
    # What each actor has in hand and waiting, and as much that had come back already.
    assert max(unrecorded) <= 2 * (FEW_ACTORS * 2 * FEW_BATCH) < FEW - FEW_FLUSH, unrecorded


@pytest.mark.faults
def test_a_driver_that_is_killed_over_a_bucket(
    s3: str, moto_client: "S3Client", tmp_path: Path, small_model: Models, again: Again, restored: dict[str, bytes]
) -> None:
    for key, data in images(FEW).items():
        moto_client.put_object(Bucket="photos", Key=f"in/{key}", Body=data)
    source, output, notes = "s3://photos/in", "s3://photos/out", Notes(tmp_path / "notes")
    with started(tmp_path) as processes:
        driver = start_few(processes, source, output, small_model(1), notes)
        wait_for(lambda: driver.poll() is not None or notes.count() >= FEW // 2)
        kill(driver.pid)
        assert killed(driver), processes.said(driver, "err")
        recorded = set(Ledger(open_storage(output), "reader").latest()["key"].to_pylist())
        assert 0 < len(recorded) < FEW
        later = again(source, output)
        processes.wait_until_gone()
    assert later == Counter(images(FEW).keys() - recorded)
    place = open_storage(output)
    written = {item.key: place.read(item.key) for item in place.list() if not item.key.startswith("_restore/")}
    assert written == {key: restored[key] for key in images(FEW)}
    assert not place.exists("_restore/lease.json")
    assert "Uploads" not in moto_client.list_multipart_uploads(Bucket="photos")
    assert verify_bucket.main(VerifyBucket(input=source, output=output)) == 0


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["driver", "actor"])
def test_parquet_is_whole_after_a_kill(
    tmp_path: Path, small_model: Models, again: Again, restored: dict[str, bytes], victim: str
) -> None:
    """Row groups are done again whole: no more of them than the actors had in hand, and one flush of the ledger."""
    groups, rows = 20, FEW // 20
    source, output, notes = tmp_path / "in", tmp_path / "out", Notes(tmp_path / "notes")
    source.mkdir()
    files = images(FEW)
    table = pa.table({"key": list(files), "image": list(files.values()), "number": range(FEW)})
    pq.write_table(table, source / "a.parquet", row_group_size=rows)
    shards = Counter(f"a-{group:05}.parquet" for group in range(groups))
    with started(tmp_path) as processes:
        driver = start_few(processes, source, output, small_model(1), notes)
        wait_for(lambda: driver.poll() is not None or notes.keys().total() >= groups // 2)
        if victim == "driver":
            kill(driver.pid)
            assert killed(driver), processes.said(driver, "err")
        else:
            kill(descendants(driver.pid, "RestoreUnit")[0])
            assert driver.wait(300) == 0, processes.said(driver, "err")
        recorded = keys_of(ledger(output))
        later = again(source, output)
        processes.wait_until_gone()
    done = Counter(f"a-{int(key[:4]) // rows:05}.parquet" for key in recorded)
    assert set(done.values()) == {rows} and later == shards - Counter(done.keys())
    twice = (notes.keys() + later).total() - groups
    assert 0 <= twice <= 2 * FEW_ACTORS + FEW_FLUSH // rows
    found = pa.concat_tables(pq.read_table(output / shard) for shard in sorted(shards))
    assert found["key"].to_pylist() == list(files) and found["number"].to_pylist() == list(range(FEW))
    assert dict(zip(files, found["image"].to_pylist(), strict=True)) == {key: restored[key] for key in files}
    assert sorted(row["key"] for row in ledger(output)) == sorted(files)
    assert verify_bucket.main(VerifyBucket(input=str(source), output=str(output))) == 0


# --- All victims, everywhere ---------------------------------------------------------------------------------------

MANY, BATCH, FLUSH = 2000, 16, 96
PLACES = (10, 50, 90, 99)
VICTIMS = ("actor", "node", "driver", "head", "cluster")
"""On the head the driver runs, too, and the other nodes live on for a while; "cluster" is all but the driver."""
CASES = [(victim, place) for victim in VICTIMS for place in PLACES if victim != "cluster" or place == 50]
SEEDS, KILLS = 4, 5


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("many") / "in", images(MANY))


def start_many(
    processes: Started, source: Path, output: Path, model: Path, actors: int, notes: Notes, **settings: str
) -> Process:
    return processes.run(
        "counted_driver.py", "--input", source, "--output", output, "--model", model,
        "--workers", actors, "--batch-size", BATCH,
        COUNTED_NOTES=str(notes.path), COUNTED_FLUSH_ROWS=str(FLUSH), **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(many: Path, small_model: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    with started(folder) as processes:
        driver = start_many(processes, many, folder / "out", small_model(1), 2, Notes(folder / "notes"))
        assert driver.wait(600) == 0, processes.said(driver, "err")
    assert Notes(folder / "notes").keys() == Counter(images(MANY).keys())
    return outputs(folder / "out")


def three_nodes(processes: Started) -> Nodes:
    nodes = Nodes(processes, head_cpus=2)
    nodes.add(2)
    nodes.add(2)
    return nodes


def strike(victim: str, chance: random.Random, driver: Process, nodes: Nodes | None) -> None:
    """Kill what it names; which actor or node, by chance."""
    if victim == "driver":
        targets = [driver.pid]
    elif victim == "actor":
        hosts = [driver.pid] if nodes is None else nodes.raylets
        targets = [chance.choice(sorted(pid for host in hosts for pid in descendants(host, "RestoreUnit")))]
    else:
        assert nodes is not None
        if victim == "node":
            node = chance.choice([pid for pid in nodes.raylets[1:] if descendants(pid, "RestoreUnit")])
            targets = [node, *descendants(node, "")]
        elif victim == "head":
            servers = descendants(nodes.process.pid, "gcs_server")
            assert len(servers) == 1
            targets = [*servers, nodes.raylets[0], driver.pid]
            targets += [pid for process in (nodes.raylets[0], driver.pid) for pid in descendants(process, "")]
        else:
            targets = [nodes.process.pid, *descendants(nodes.process.pid, "")]
    kill(*targets)


def allowed_twice(victim: str, actors: int) -> int:
    """Where the driver lives, its rows are not lost: only what the actors had in hand is done again."""
    return bound(actors, BATCH, 0 if victim in ("actor", "node") else FLUSH)


@pytest.mark.faults
@pytest.mark.parametrize(("victim", "place"), CASES, ids=[f"{victim}-{place}%" for victim, place in CASES])
def test_nothing_is_lost_or_doubled(
    tmp_path: Path, many: Path, uninterrupted: dict[str, bytes], small_model: Models, victim: str, place: int
) -> None:
    seed = 100 * VICTIMS.index(victim) + PLACES.index(place)
    output, first, second = tmp_path / "out", Notes(tmp_path / "first"), Notes(tmp_path / "second")
    with started(tmp_path) as processes:
        nodes = None if victim in ("actor", "driver") else three_nodes(processes)
        settings = {"RAY_ADDRESS": nodes.address} if nodes else {}
        actors = 3 if nodes else 2
        driver = start_many(processes, many, output, small_model(1), actors, first, **settings)
        wait_for(lambda: driver.poll() is not None or first.count() >= place * MANY // 100)
        assert driver.poll() is None, "it was done already: " + processes.said(driver, "err")
        strike(victim, random.Random(seed), driver, nodes)
        killed_at = first.count()
        if victim in ("driver", "head"):  # which stays a zombie: its lease must count as a dead one's
            assert killed(driver)
        elif victim == "cluster":
            assert driver.wait(600) != 0
        else:
            assert driver.wait(600) == 0, processes.said(driver, "err")
        recorded = keys_of(ledger(output))
        next_driver = start_many(processes, many, output, small_model(1), 2, second)
        assert next_driver.wait(600) == 0, processes.said(next_driver, "err")
        if nodes is not None:
            nodes.close()
        processes.wait_until_gone()
    assert_as_uninterrupted(many, output, uninterrupted)
    later = second.keys()
    assert not recorded & later.keys(), "what was recorded was done again"
    writes = first.keys() + later
    assert writes.keys() == uninterrupted.keys()
    twice = sum(writes.values()) - MANY
    allowed = allowed_twice(victim, actors)
    print(f"{victim} {place}: seed {seed}, {actors} actors, killed at {killed_at}, {len(recorded)} recorded, ", end="")
    print(f"{later.total()} by the next run, {twice} done again, at most {max(writes.values())} times; bound {allowed}")
    assert twice <= allowed


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(SEEDS))
def test_one_kill_after_another(
    tmp_path: Path, many: Path, uninterrupted: dict[str, bytes], small_model: Models, seed: int
) -> None:
    """Five of them, of what and when by chance: also in a run that goes on after one, or has only just begun."""
    chance, actors = random.Random(seed), 3
    places = sorted(round(chance.uniform(0.01, 0.95) * MANY) for _ in range(KILLS))
    victims = [chance.choice(("actor", "node", "driver", "head")) for _ in range(KILLS)]
    output, notes = tmp_path / "out", Notes(tmp_path / "notes")

    def start() -> Process:
        return start_many(processes, many, output, small_model(1), actors, notes, RAY_ADDRESS=nodes.address)

    def is_due(victim: str, place: int) -> bool:
        if driver.poll() is not None:
            return True
        hosts = {"actor": nodes.raylets, "node": nodes.raylets[1:]}.get(victim)  # of a run that begins, not at once
        return notes.count() >= place and (hosts is None or any(descendants(host, "RestoreUnit") for host in hosts))

    with started(tmp_path) as processes:
        nodes = three_nodes(processes)
        driver = start()
        for victim, place in zip(victims, places, strict=True):
            wait_for(functools.partial(is_due, victim, place))
            assert driver.poll() is None, processes.said(driver, "err")
            print(f"seed {seed}: {victim}, meant at {place}, at {notes.count()} writes")
            strike(victim, chance, driver, nodes)
            if victim == "node":
                nodes.add(2)
            if victim == "head":
                nodes.close()
                nodes = three_nodes(processes)
            if victim in ("driver", "head"):
                assert killed(driver)
                driver = start()
        assert driver.wait(600) == 0, processes.said(driver, "err")
        nodes.close()
        processes.wait_until_gone()
    assert_as_uninterrupted(many, output, uninterrupted)
    writes = notes.keys()
    assert writes.keys() == uninterrupted.keys()
    allowed = sum(allowed_twice(victim, actors) for victim in victims)
    print(f"seed {seed}: {writes.total() - MANY} done again, at most {max(writes.values())} times; bound {allowed}")
    assert writes.total() - MANY <= allowed

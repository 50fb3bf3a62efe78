"""Of several runs on one output exactly one works; that of a dead owner is taken over, that of a living one never."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from processes import wait_for

from restore_core import lease
from restore_core.errors import ItemError, StorageError, UsageError
from restore_core.lease import Lease
from restore_core.storage import LocalStorage, Storage, open_storage

KEY = "_restore/lease.json"


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "disk":
        yield LocalStorage(tmp_path)
    else:
        request.getfixturevalue("s3")
        yield open_storage("s3://photos/out/")


@pytest.fixture(autouse=True)
def close_watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.05)
    yield
    left = [thread for thread in threading.enumerate() if "_keep" in thread.name]
    assert not left, "a lease that nobody gives back is renewed in the middle of other tests"


def stored(output: Storage) -> dict[str, Any]:
    """What it says. On disk it is away for a moment while it is renewed."""
    while True:
        with suppress(ItemError):
            return json.loads(output.read(KEY))  # type: ignore[no-any-return]


def rewrite(output: Storage, **changes: object) -> None:
    output.write(KEY, json.dumps({**stored(output), **changes}).encode())


def test_the_second_run_is_refused_until_the_first_ends(output: Storage) -> None:
    with Lease(output, KEY, "first") as held:
        with pytest.raises(
            UsageError, match=r"^--output .*another restore is at work there \(host .*process \d+"
        ) as no:
            Lease(output, KEY, "second").__enter__()
        assert "\n" not in str(no.value)
        held.check()
        assert stored(output)["run_id"] == "first"
    assert not output.exists(KEY)
    with Lease(output, KEY, "second"):
        pass


def test_of_many_at_once_one_works(output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    start, refused = threading.Barrier(8), []
    working: list[tuple[str, Lease]] = []

    def enter(name: str) -> None:
        start.wait()
        try:
            working.append((name, Lease(output, KEY, name).__enter__()))
        except UsageError as error:
            refused.append(str(error))

    def race() -> dict[str, Any]:
        """The lease, which is given back."""
        threads = [threading.Thread(target=enter, args=(f"run {number}",)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = stored(output)
        ((name, held),) = working
        assert found["run_id"] == name
        held.__exit__()
        working.clear()
        return found

    found = race()
    assert len(refused) == 7
    # and of many that find a dead one
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 0.5)
    dead = {**found, "renewed": time.time() - 2 * lease.EXPIRE_SECONDS, "host": "elsewhere", "process": ""}
    output.write(KEY, json.dumps(dead).encode())
    race()


@pytest.mark.parametrize("hours", [0, -1, 1])
def test_a_lease_of_another_machine_counts_until_it_has_expired(
    output: Storage, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """Whatever the time is over there."""
    with Lease(output, KEY, "first"):
        rewrite(output, host="elsewhere", process="elsewhere/boot/pid/17/3", renewed=time.time() - 40)
        with pytest.raises(UsageError, match=r"'elsewhere'.* start again in (19|20) s"):
            Lease(output, KEY, "second").__enter__()
        monkeypatch.setattr(lease, "EXPIRE_SECONDS", 0.5)
        rewrite(output, renewed=time.time() + 3600 * hours - 1)
        with Lease(output, KEY, "third") as held:
            held.check()
            assert stored(output)["run_id"] == "third"


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_living_owner_whose_clock_is_wrong_is_left_alone(
    output: Storage, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 2)
    with Lease(output, KEY, "first"):
        rewrite(output, host="elsewhere", process="elsewhere/boot/pid/17/3", renewed=time.time() + 3600 * hours)
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(0.3):
                rewrite(output, renewed=time.time() + 3600 * hours)

        owner = threading.Thread(target=renew)
        owner.start()
        try:
            with pytest.raises(UsageError, match=r"at work there \(host 'elsewhere'.*\); wait until it ends$"):
                Lease(output, KEY, "second").__enter__()
        finally:
            ended.set()
            owner.join()


def test_a_living_owner_renews_and_learns_that_it_has_lost(output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    with Lease(output, KEY, "first") as held:
        before = stored(output)["renewed"]
        wait_for(lambda: stored(output)["renewed"] > before)
        held.check()
        # written by somebody else in the meantime; a renewal under way may win once
        wait_for(lambda: (rewrite(output, run_id="thief"), held._lost)[1])
        with pytest.raises(StorageError, match=r"could not renew its lease"):
            held.check()
    assert output.exists(KEY), "the thief's lease was deleted"


def test_a_short_outage_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    output = LocalStorage(tmp_path)
    down = threading.Event()
    tried: list[int] = []
    write_if = LocalStorage.write_if

    def flaky(self: LocalStorage, key: str, data: bytes, version: str | None) -> str | None:
        if down.is_set():
            tried.append(1)
            raise ItemError("write", "no route to host")
        return write_if(self, key, data, version)

    monkeypatch.setattr(LocalStorage, "write_if", flaky)
    with Lease(output, KEY, "first") as held:
        down.set()
        wait_for(lambda: len(tried) > 3)
        held.check()
        down.clear()
        before = time.time()
        wait_for(lambda: stored(output)["renewed"] > before)
        down.set()
        monkeypatch.setattr(lease, "EXPIRE_SECONDS", 0.2)
        time.sleep(0.3)
        with pytest.raises(StorageError, match=r"could not renew its lease"):
            held.check()
        down.clear()


def test_errors_of_any_type_do_not_end_the_renewals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As botocore's, of credentials that could not be refreshed."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    output, tried = LocalStorage(tmp_path), []

    def fail(*_: object) -> None:
        tried.append(1)
        raise RuntimeError("Credentials were refreshed, but the refreshed credentials are still expired.")

    with Lease(output, KEY, "first") as held:
        before = stored(output)["renewed"]
        with monkeypatch.context() as patched:
            patched.setattr(LocalStorage, "write_if", fail)
            wait_for(lambda: len(tried) > 3)
            patched.setattr(lease, "EXPIRE_SECONDS", 0.1)
            time.sleep(0.2)
            with pytest.raises(StorageError, match=r"could not renew its lease"):
                held.check()
        wait_for(lambda: stored(output)["renewed"] > before)
        held.check()


def test_a_renewal_whose_answer_is_lost_is_ours(output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 1000)
    write_if = type(output).write_if

    def lose_the_answer(self: Storage, key: str, data: bytes, version: str | None) -> str | None:
        write_if(self, key, data, version)  # type: ignore[arg-type]
        raise ItemError("write", "no route to host")

    with Lease(output, KEY, "first") as held:
        with monkeypatch.context() as patched:
            patched.setattr(type(output), "write_if", lose_the_answer)
            held._renew()
        held._renew()
        held.check()
        monkeypatch.setattr(lease, "EXPIRE_SECONDS", 0.5)
        time.sleep(0.6)
        held.check()
        rewrite(output, run_id="thief")
        held._renew()
        with pytest.raises(StorageError, match=r"could not renew its lease"):
            held.check()


def test_a_driver_that_slept_keeps_what_nobody_took(output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 1000)
    with Lease(output, KEY, "first") as held:
        monkeypatch.setattr(lease, "EXPIRE_SECONDS", 1.0)
        time.sleep(1.1)
        held.check()
        time.sleep(1.1)
        rewrite(output, run_id="thief")
        with pytest.raises(StorageError, match=r"could not renew its lease"):
            held.check()
    assert stored(output)["run_id"] == "thief"


def test_a_lease_that_another_took_is_not_given_back(output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 1000)
    with Lease(output, KEY, "first"):
        rewrite(output, run_id="thief")
    assert stored(output)["run_id"] == "thief"


def test_the_lease_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from restore_core.lease import Lease; from restore_core.storage import LocalStorage;"
        f"from pathlib import Path; Lease(LocalStorage(Path({str(tmp_path)!r})), {KEY!r}, 'killed').__enter__();"
        "print('held', flush=True); time.sleep(60)"
    )
    output = LocalStorage(tmp_path)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"process {process.pid}, "):
            Lease(output, KEY, "second").__enter__()
        os.kill(process.pid, signal.SIGKILL)
    with Lease(output, KEY, "second"):
        assert stored(output)["run_id"] == "second"


def test_a_killed_process_is_dead_before_its_parent_has_asked(tmp_path: Path) -> None:
    output = LocalStorage(tmp_path)
    process = subprocess.Popen(["sleep", "60"])
    try:
        owner = lease.Owner("killed", "here", process.pid, lease._process(process.pid), time.time(), time.time())
        output.write(KEY, json.dumps(asdict(owner)).encode())
        with pytest.raises(UsageError, match=f"process {process.pid}, "):
            Lease(output, KEY, "second").__enter__()
        process.kill()
        wait_for(lambda: ") Z " in Path(f"/proc/{process.pid}/stat").read_text())
        with Lease(output, KEY, "second"):
            assert stored(output)["run_id"] == "second"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[1]", b'{"run_id": 1}'])
def test_what_is_no_lease_is_refused_and_kept(output: Storage, content: bytes) -> None:
    output.write(KEY, content)
    with pytest.raises(UsageError, match=r"lease\.json there is no lease of a run; delete it"):
        Lease(output, KEY, "second").__enter__()
    assert output.read(KEY) == content


def test_a_lease_does_not_vanish_while_it_is_renewed(tmp_path: Path) -> None:
    output, versions = LocalStorage(tmp_path), [None]
    renewals = 300

    def renew() -> None:
        for number in range(renewals):
            versions.append(output.write_if(KEY, str(number).encode(), versions[-1]))  # type: ignore[arg-type]

    versions = [output.write_if(KEY, b"owner", None)]
    owner = threading.Thread(target=renew)
    owner.start()
    while owner.is_alive():
        assert output.exists(KEY)
        assert output.write_if(KEY, b"another", None) is None
    assert len(versions) == renewals + 1 and None not in versions


@pytest.mark.parametrize("lockable", [True, False])
def test_conditional_writes(output: Storage, monkeypatch: pytest.MonkeyPatch, lockable: bool) -> None:
    if not lockable:
        monkeypatch.setattr(fcntl, "flock", _raise_not_supported)
    first = output.write_if("a/b", b"1", None)
    assert first is not None
    assert output.write_if("a/b", b"2", None) is None
    assert output.write_if("a/b", b"2", "0" * 32) is None
    assert output.read("a/b") == b"1"
    time.sleep(0.01)
    second = output.write_if("a/b", b"2", first)
    assert second is not None and output.read("a/b") == b"2"
    assert output.write_if("a/b", b"3", first) is None
    assert output.write_if("never there", b"3", first) is None
    found = [item for item in output.list() if not item.key.endswith(".lock")]
    assert [(item.key, item.etag) for item in found] == [("a/b", second)]
    assert not list(output.unfinished())


def test_a_lock_does_not_lead_out_of_the_output(tmp_path: Path) -> None:
    output = LocalStorage(tmp_path / "out")
    (tmp_path / "out/_restore").mkdir(parents=True)
    (tmp_path / "out" / f"{KEY}.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ItemError, match="cannot write"):
        output.write_if(KEY, b"1", None)
    assert not (tmp_path / "elsewhere").exists()


def _raise_not_supported(*_: object) -> None:
    raise OSError(95, "Operation not supported")


def test_conditional_writes_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    output = LocalStorage(tmp_path)
    first = output.write_if("a", b"1", None)
    assert output.write_if("a", b"2", None) is None
    assert output.write_if("a", b"2", "0") is None
    assert output.read("a") == b"1"
    assert output.stat("a").etag == first
    assert output.write_if("a", b"2", first) is not None
    assert output.read("a") == b"2"


def test_a_storage_that_does_not_heed_conditions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs there would both have the lease."""
    output = LocalStorage(tmp_path)

    def always(self: LocalStorage, key: str, data: bytes, version: str | None) -> str:
        self.write(key, data)
        return self.stat(key).etag

    monkeypatch.setattr(LocalStorage, "write_if", always)
    with pytest.raises(UsageError, match="does not heed conditional writes"), Lease(output, "lease.json", "first"):
        pass
    assert not output.exists("lease.json")

#!/usr/bin/env python
"""Seconds and the driver's memory against the number of objects, on a listing of files that are not there.

The whole restore job runs, on a local Ray, but each object ends as `vanished` when it is read: what is measured is what
an object costs beside its pixels. Then it runs once more, with only the listing to hold against the ledger; and again
with a ledger that says that all were restored, and as many (empty) files in the output, which is then listed too. Each
number of objects in a process of its own.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs import command_line
from restore_core import checkpoint, provenance
from restore_core.manifest import Ledger, Row
from restore_core.storage import LocalStorage, Object

PER_FOLDER, PER_FILE = 1000, 25_000
"""Objects in a folder, and rows in a file of the ledger."""
SIZE = 12_345


@dataclass(frozen=True, kw_only=True)
class Growth:
    objects: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    """How many; each is a measurement of its own."""
    batch_size: int = 128
    """Objects that a worker handles together."""
    output: Path = Path("benchmarks/growth.json")
    """The result file."""
    one: bool = False
    """Measure here, and print the result: what a measurement's own process is told."""


class Listing(LocalStorage):
    """Lists objects that are not there."""

    count = 0

    def list(self, prefix: str = "", after: str = "", *, unreadable: bool = False) -> Iterator[Object]:
        for index in range(self.count):
            if key_of(index) > after:
                yield Object(key_of(index), SIZE, etag_of(index))


def key_of(index: int) -> str:
    return f"collection-{index // PER_FOLDER:05d}/photograph of the year {index % PER_FOLDER:04d}.jpg"


def etag_of(index: int) -> str:
    return f"{index:032x}"


def restored(index: int, model: str, options: str) -> Row:
    return Row(
        key=key_of(index), status="restored", size=SIZE, etag=etag_of(index), input_sha256=f"{index:064x}",
        format="JPEG", mode="RGB", width=250, height=250, output_key=key_of(index), output_sha256=f"{index:064x}",
        model=model, options=options, sigma=25.0, flips=0.1, patches=0.1, gray=0.0, change=9.5, seconds=0.1,
        node="worker", run_id="growth", finished_at=datetime.now(UTC),
    )  # fmt: skip


def peak_mb(*, reset: bool = False) -> float:
    """The most that was resident of this process, since the last reset. Megabytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def measure(job: Growth) -> dict[str, float]:
    from restore_core.pipelines import account, cluster
    from restore_core.pipelines.restoration import RestoreOptions, restore

    cluster.connect()
    model = checkpoint.read("faces-fast")
    options = RestoreOptions(model="faces-fast", device="cpu", max_pixels=10**6, batch_size=job.batch_size)
    (count,) = job.objects
    first_row: list[float] = []
    real = account.Account.add

    def add(self: account.Account, rows: list[object]) -> None:
        first_row.append(time.perf_counter())
        del first_row[1:]
        real(self, rows)  # type: ignore[arg-type]

    account.Account.add = add  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        Listing.count = count
        result: dict[str, float] = {"objects": count}
        idle = peak_mb(reset=True)
        for name in ("first run", "nothing left to do"):
            started = time.perf_counter()
            summary = restore(Listing(root / "in"), LocalStorage(root / "out"), model, options, ["growth"])
            result[f"{name}, s"] = round(time.perf_counter() - started, 2)
            result[f"{name}, driver MB"] = round(peak_mb())
            peak_mb(reset=True)
            assert summary.overview.errors == {"vanished": count}
            if name == "first run":
                result["first row, s"] = round(first_row[0] - started, 2)
                result["ledger MB"] = round(
                    sum(file.stat().st_size for file in (root / "out").rglob("*.parquet")) / 2**20, 1
                )
        result["files of the ledger"] = len(list((root / "out/_restore/manifest").iterdir()))
        ledger = Ledger(LocalStorage(root / "all"), "growth")
        sha256, identity = model.sha256, options.identity()  # the first hashes the weights
        for start in range(0, count, PER_FILE):
            some = range(start, min(start + PER_FILE, count))
            for index in some:
                if index % PER_FOLDER == 0:
                    (root / "all" / key_of(index)).parent.mkdir(parents=True)
                (root / "all" / key_of(index)).touch()
            ledger.append([restored(index, sha256, identity) for index in some])
        ledger.merge()
        peak_mb(reset=True)
        started = time.perf_counter()
        summary = restore(Listing(root / "in"), LocalStorage(root / "all"), model, options, ["growth"])
        result["all restored before, s"] = round(time.perf_counter() - started, 2)
        result["all restored before, driver MB"] = round(peak_mb())
        assert summary.already_done == count
        result["before, driver MB"] = round(idle)
    return result


def account_rate(rows: int = 200_000, at_once: int = 128) -> float:
    """Rows a second that the driver can take from the workers and write down: the most that one job can do."""
    from restore_core.lease import Lease
    from restore_core.manifest import Overview, rows_of, table_of
    from restore_core.pipelines.account import Account

    def some(start: int) -> list[Row]:
        return [restored(index, "0" * 64, "0" * 16) for index in range(start, start + at_once)]

    tables = [table_of(some(start)) for start in range(0, rows, at_once)]
    with tempfile.TemporaryDirectory() as folder:
        output = LocalStorage(Path(folder).resolve())
        with Lease(output, "_restore/lease.json", "growth") as lease:
            account = Account(Ledger(output, "growth"), lease, Overview(), 1.0, refuse=output.delete)
            started = time.perf_counter()
            for table in tables:
                account.add(rows_of(table))
            account.flush()
            return rows / (time.perf_counter() - started)


def by_itself(command: list[str], **settings: str) -> dict[str, float]:
    """The result that a measurement's own process prints; `settings` are added to its environment."""
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        raise SystemExit(done.returncode)
    result: dict[str, float] = json.loads(done.stdout.rpartition("result:")[2])
    print(result, flush=True)
    return result


def main(job: Growth) -> int:
    if job.one:
        print("result:", json.dumps(measure(job)))
        return command_line.DONE
    results = []
    for count in job.objects:
        command = [sys.executable, __file__, "--one", "--objects", str(count), "--batch-size", str(job.batch_size)]
        results.append(by_itself(command))
    rates = [round(account_rate()) for _ in range(5)]
    result = {**provenance.record(), "driver_rows_per_second": statistics.median(rates), "results": results}
    job.output.write_text(json.dumps(result, indent=2) + "\n")
    return command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, Growth))

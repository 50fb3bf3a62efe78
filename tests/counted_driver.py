"""jobs/restore_bucket.py that notes every write of an output, and may be told when to die.

    COUNTED_NOTES=FILE COUNTED_FLUSH_ROWS=200 [COUNTED_DEATH="before 2"] [COUNTED_LISTED=40] [COUNTED_NO_CUDA=1] \\
        python tests/counted_driver.py --input ...

FILE gets a line with the key as each write begins (of Parquet: with the shard's). The ledger is appended to after so
many rows, never by time. With COUNTED_DEATH the driver kills itself before or after (as soon as it has returned) the
n-th time that this is done. So many objects as COUNTED_LISTED are listed before they are noted down. With
COUNTED_NO_CUDA all goes as on GPUs, but for the network, which is on the CPU.
"""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa

from jobs import command_line, restore_bucket
from restore_core.manifest import Ledger, Row


def counted(notes: Path) -> type:
    """RestoreUnit with the notes. Local, so that Ray carries it to its workers, where nothing is patched yet."""
    note_writes = noting(notes)

    class CountedRestoreUnit:
        def __init__(self, *arguments: Any) -> None:
            from restore_core.pipelines import restoration

            note_writes()
            self.restore = restoration.RestoreUnit(*arguments)

        def __call__(self, unit: pa.Table) -> pa.Table:
            return self.restore(unit)

    return CountedRestoreUnit


def counted_task(notes: Path) -> Callable[..., pa.Table]:
    """write_items in the same way."""
    note_writes = noting(notes)

    def write_items(*arguments: Any) -> pa.Table:
        from restore_core.pipelines import restoration

        note_writes()
        return restoration.write_items(*arguments)

    return write_items


def noting(notes: Path) -> Callable[[], None]:
    """What makes a process note its writes, from then on; once is enough."""
    path = str(notes)

    def note_writes() -> None:
        from restore_core import sinks
        from restore_core.pipelines import stages

        if hasattr(sinks.write, "noted"):
            return
        file_of_notes = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        write, write_shard = sinks.write, stages.restore_row_group

        def noted_shard(rows: list[Row], file: str, group: int, key: str, *others: Any, **named: Any) -> list[Row]:
            os.write(file_of_notes, f"{key}\n".encode())
            return write_shard(rows, file, group, key, *others, **named)

        def noted(row: Row, *others: Any, **named: Any) -> None:
            os.write(file_of_notes, f"{row.key}\n".encode())
            write(row, *others, **named)

        noted.noted = True  # type: ignore[attr-defined]
        sinks.write, stages.restore_row_group = noted, noted_shard

    return note_writes


def without_cuda(run: type) -> type:
    """RestoreRun whose network is on the CPU, whatever the device; local like the other."""

    class OnCpu(run):  # type: ignore[valid-type, misc]
        def restorer(self) -> Any:
            return run.restorer(dataclasses.replace(self, device="cpu"))

    return OnCpu


def die_at_append(moment: str, number: int) -> None:
    append = Ledger.append
    calls = 0

    def deadly(self: Ledger, rows: list[Row]) -> None:
        nonlocal calls
        calls += 1
        if moment == "before" and calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, rows)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)

    Ledger.append = deadly  # type: ignore[method-assign]


if __name__ == "__main__":
    from restore_core.pipelines import account, listing, restoration

    its_notes = Path(os.environ["COUNTED_NOTES"])
    restoration.RestoreUnit = counted(its_notes)  # type: ignore[misc]
    if "COUNTED_NO_CUDA" in os.environ:
        restoration.write_items = counted_task(its_notes)
        restoration.RestoreRun = without_cuda(restoration.RestoreRun)  # type: ignore[misc]
    account.FLUSH_ROWS, account.FLUSH_SECONDS = int(os.environ["COUNTED_FLUSH_ROWS"]), float("inf")
    listing.NOTED_OBJECTS = int(os.environ.get("COUNTED_LISTED", listing.NOTED_OBJECTS))
    if "COUNTED_DEATH" in os.environ:
        its_moment, its_number = os.environ["COUNTED_DEATH"].split()
        die_at_append(its_moment, int(its_number))
    sys.exit(command_line.run(restore_bucket.main, restore_bucket.RestoreBucket))

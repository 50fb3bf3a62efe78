#!/usr/bin/env python
"""Prove a finished restore: every input has one row, every output exists and hashes to its row, nothing else is there.

Changes nothing. Also right after a failed or interrupted restore. Exit code 1 when something is wrong.
"""

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs import command_line
from restore_core.config import require
from restore_core.errors import UsageError

SHOWN = 20
"""Findings of each kind that are printed."""


@dataclass(frozen=True, kw_only=True)
class VerifyBucket:
    input: str
    """--input of the restore."""
    output: str
    """--output of the restore."""
    keys: str | None = None
    """--keys of the restore."""
    report: Path | None = None
    """A local JSON file to write every finding to; on the terminal are the first 20 of each kind."""

    def __post_init__(self) -> None:
        if self.report is not None:
            folder = self.report.absolute().parent
            require(folder.is_dir(), "report", self.report, f"there is no folder {folder}; make it or name another")


def main(job: VerifyBucket) -> int:
    from restore_core import provenance
    from restore_core.storage import open_storage

    source, output = open_storage(job.input, option="--input"), open_storage(job.output, option="--output")
    source.check_readable("--input")
    output.check_readable("--output")
    if job.report:
        try:
            job.report.open("a").close()  # before the work, not after it
        except OSError as error:
            raise UsageError(f"--report {job.report}: cannot be written ({error.strerror}); name another") from error
    from restore_core.pipelines.verification import MEANING, verify

    result = verify(source, output, job.keys)
    found = Counter(kind for kind, _ in result.findings)
    for kind, meaning in MEANING.items():
        if not found[kind]:
            continue
        print(f"{found[kind]} {kind}: {meaning}")
        keys = sorted(key for its_kind, key in result.findings if its_kind == kind)
        for key in islice(keys, SHOWN):
            print(f"    {key!r}")
        if len(keys) > SHOWN:
            print(f"    and {len(keys) - SHOWN} more" + ("" if job.report else "; --report FILE lists all"))
    counts = ", ".join(f"{count} {status}" for status, count in result.statuses.items())
    print(
        f"{result.listed} objects: {counts or 'no rows'}; {result.hashed} outputs hashed, {sum(found.values())} wrong"
    )
    if job.report:
        record = {
            **provenance.record(),
            "options": {**asdict(job), "report": str(job.report)},
            "listed": result.listed,
            "statuses": result.statuses,
            "hashed": result.hashed,
            "findings": [{"finding": kind, "key": key} for kind, key in result.findings],
        }
        job.report.write_text(json.dumps(record, indent=2) + "\n")
    return command_line.TOO_MANY_FAILURES if result.findings else command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, VerifyBucket))

"""Where a published number comes from: commit, versions, hardware, date. Standard library only."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("restore_core", "ray", "torch", "pillow", "pyarrow")


def commit() -> str:
    """The checkout's commit, `-dirty` when changed; RESTORE_COMMIT where the code came without its history."""
    if given := os.environ.get("RESTORE_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not run from a git checkout)"
    return done.stdout.strip()


def short(commit: str) -> str:
    """Its first digits, and whether the checkout was changed."""
    digits, dirty, _ = commit.partition("-dirty")
    return digits[:12] + dirty


def record() -> dict[str, object]:
    """What every result file says about where its numbers come from."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": cpu(),
        "versions": versions(),
    }


def versions(*others: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: _version(name) for name in (*PACKAGES, *others)}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a bare checkout, on a machine that is lent for minutes
        return "not installed"


def cpu() -> str:
    """Cores and processor of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores {name}"

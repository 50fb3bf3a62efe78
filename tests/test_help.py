"""Every job explains itself at once: no torch and no Ray before the arguments are parsed."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
JOBS = sorted(path for path in (ROOT / "jobs").glob("*.py") if path.read_text().startswith("#!"))


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_help_answers_in_under_two_seconds(job: Path, tmp_path: Path) -> None:
    """Started as an executable from anywhere. CPU seconds, so that a busy machine does not fail the test."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPROFILEIMPORTTIME": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([job, "--help"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert f"usage: {job.name}" in result.stdout.replace(f"{job.parent}/", "")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "restore_core" in imported
    assert not imported & {"torch", "ray", "pyarrow", "boto3", "matplotlib", "skimage"}


def test_every_job_is_covered() -> None:
    assert {"pack_dataset", "train"} <= {job.stem for job in JOBS}
    assert all(os.access(job, os.X_OK) for job in JOBS)

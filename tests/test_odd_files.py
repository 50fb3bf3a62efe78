"""Several hundred odd and malformed files of Pillow's own tests: one row each, and the readable come back faithful."""

import hashlib
import io
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_restore_bucket import Run, files_of, ledger_of, run  # noqa: F401

from jobs import verify_bucket
from restore_core import codec
from restore_core.errors import ItemError

MEMBERS = ("Tests/images/", "Tests/fonts/", "Tests/icc/")


@pytest.fixture(scope="session")
def odd_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From the source distribution on the package index; not part of this project."""
    root = tmp_path_factory.mktemp("odd")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-binary",
        ":all:",
        "--no-deps",
        "pillow==13.0.0",
    ]
    found = subprocess.run([*command, "--dest", str(root)], capture_output=True, text=True, check=False, timeout=600)
    if found.returncode:
        pytest.skip(f"the package index cannot be reached: {found.stderr[-200:]}")
    source = root / "in"
    with tarfile.open(next(root.glob("pillow-*.tar.gz"))) as archive:
        for member in archive.getmembers():
            name = member.name.partition("/")[2]
            if member.isfile() and name.startswith(MEMBERS):
                file = archive.extractfile(member)
                assert file is not None
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                (source / name).write_bytes(file.read())
    return source


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore::Warning")
def test_odd_files_have_one_row_each_and_readable_ones_come_back_faithful(
    odd_files: Path,
    tmp_path: Path,
    run: Run,  # noqa: F811
) -> None:
    listed = files_of(odd_files)
    assert len(listed) > 1000
    output = tmp_path / "out"
    assert run(odd_files, output, max_failed_share=1.0) == 0
    rows = ledger_of(output)
    assert rows.keys() == listed.keys()
    written = files_of(output)
    assert written.keys() == {key for key, row in rows.items() if row.status != "failed"}
    assert not any("failed twice" in (row.message or "") for row in rows.values()), "a worker had to start again"
    for key, data in listed.items():
        row = rows[key]
        assert row.input_sha256 == hashlib.sha256(data).hexdigest()
        if row.status == "failed":
            continue
        before, after = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(written[key]))
        assert (before.format, before.size) == (after.format, after.size), key
        assert before.mode.replace("I;16B", "I;16") == after.mode.replace("I;16B", "I;16"), key
        assert before.info.get("icc_profile") == after.info.get("icc_profile"), key
        one, other = codec.decode(data), codec.decode(written[key])
        assert (one.orientation or 1, one.gray) == (other.orientation or 1, other.gray), key
        assert (one.alpha is None and other.alpha is None) or np.array_equal(one.alpha, other.alpha), key
        assert (one.native is None) == (other.native is None), key
        if row.status == "unchanged":
            assert written[key] == data, key
    assert verify_bucket.main(verify_bucket.VerifyBucket(input=str(odd_files), output=str(output))) == 0


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore::Warning")
def test_what_pillow_reads_is_never_called_broken(odd_files: Path) -> None:
    """Refused by name at most; and what is called broken is so for Pillow too."""
    wrong = []
    with codec.Processes(2, codec.DEFAULT_MAX_PIXELS) as codecs:
        for key, data in files_of(odd_files).items():
            try:
                codecs.decode_frames(data)
                error = None
            except ItemError as failure:
                error = failure.error
            if error in ("too_large", "unsupported"):
                continue
            try:
                with warnings.catch_warnings(action="ignore"):
                    Image.open(io.BytesIO(data), formats=codec.FORMATS).load()
                readable = True
            except Exception:  # noqa: BLE001  ten kinds of it
                readable = False
            if readable != (error is None):
                wrong.append((key, error))
    assert wrong == []

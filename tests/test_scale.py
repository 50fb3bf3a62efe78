"""A million objects, and two gigabytes in one row group: neither is held. Minutes; in make test-faults."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photos import encoded

from restore_core.manifest.ledger import FILE_ROWS

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parent.parent


def test_a_million_objects(tmp_path: Path) -> None:
    """Under 1 GB in the driver, and a minute to find that nothing is left to do."""
    command = [
        sys.executable,
        ROOT / "benchmarks/growth.py",
        "--objects",
        1_000_000,
        "--output",
        tmp_path / "growth.json",
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "growth.json").read_text())["results"]
    assert result["first run, driver MB"] < 1000 and result["nothing left to do, driver MB"] < 1000
    assert result["nothing left to do, s"] < 60
    assert result["all restored before, s"] < 60 and result["all restored before, driver MB"] < 1000
    assert result["first row, s"] < 60 < result["first run, s"], "it began when all was listed"
    assert result["files of the ledger"] == 1_000_000 / FILE_ROWS


WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from restore_core import checkpoint, codec
from restore_core.manifest import Row
from restore_core.pipelines import stages
from restore_core.pipelines.listing import list_input
from restore_core.storage import LocalStorage

root = Path(sys.argv[2])
run = stages.RestoreRun(
    input=LocalStorage(root / "in"), output=LocalStorage(root / "out"), model=checkpoint.read(sys.argv[3]),
    device="cpu", threads=1, max_pixels=10**6, strip_metadata=False,
)
listed = list(list_input(run.input).objects)
rows = [
    Row(key=f"{index}", size=item.size, etag=item.etag, model="m", options="o", run_id="r")
    for index, item in enumerate(listed)
]
restorer = run.restorer()
with ThreadPoolExecutor(4) as pool, codec.Processes(1, run.max_pixels) as codecs:
    def peak():
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    before = peak()
    tools = stages.Tools(run, pool, codecs)
    stages.restore_row_group(rows, "a.parquet", 0, "a.parquet", tools, restorer, batch=16)
print(sum(row.status == "restored" for row in rows), peak() - before)
"""


def test_a_row_group_of_two_gigabytes(tmp_path: Path, small_model: object) -> None:
    noise = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    schema = pa.schema([("image", pa.large_binary()), ("text", pa.string())])
    rows = 21_000  # a page, which has to be held, is a thousand of them
    cells = [noise.bytes(100 * 2**10) for _ in range(rows)]  # not decoded, but kept
    cells[::1000] = [encoded(index) for index in range(rows // 1000)]
    table = pa.table({"image": cells, "text": [f"é {index}" for index in range(rows)]}, schema=schema)
    pq.write_table(table, tmp_path / "in/a.parquet", compression="none")
    del table
    model = small_model(1)  # type: ignore[operator]
    command = [sys.executable, "-W", "ignore::UserWarning", "-c", WORKER, ROOT, tmp_path, model]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    restored, megabytes = done.stdout.split()
    assert restored == "21"
    assert float(megabytes) < 650
    written = pq.ParquetFile(tmp_path / "out/a.parquet")
    first = 0
    for batch in written.iter_batches(50):
        for offset, (image, text) in enumerate(zip(batch["image"].to_pylist(), batch["text"].to_pylist(), strict=True)):
            assert text == f"é {first + offset}"
            assert (image == cells[first + offset]) == ((first + offset) % 1000 != 0)
        first += len(batch)
    assert first == rows

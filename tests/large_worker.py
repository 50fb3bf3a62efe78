"""What a worker does with the files of a folder, one after the other, with its memory after each as a line of JSON
(and the most of it and its codec process together meanwhile).

    python tests/large_worker.py INPUT OUTPUT MODEL [MEGABYTES]

With MEGABYTES, no more than that may be taken beyond what loaded model and one small picture need. Torch then works
without oneDNN, which was seen to crash the process (torch 2.13) where one of its own small allocations failed.
"""

import json
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from restore_core import checkpoint, codec
from restore_core.manifest import Row
from restore_core.memory import idle
from restore_core.pipelines import stages
from restore_core.storage import LocalStorage


def memory() -> dict[str, float]:
    """Megabytes of this process: address space, resident, and the most that was resident since the last call."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found = {name: int(status[name].split()[0]) / 1024 for name in ("VmSize", "VmRSS", "VmHWM")}
    Path("/proc/self/clear_refs").write_text("5")
    return found


class Together(threading.Thread):
    """Looks at the megabytes resident in this process and its codec process, again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0.0

    def run(self) -> None:
        while True:
            self.most = max(self.most, sum(map(resident, ["self", *children()])))
            time.sleep(0.02)


def children() -> list[str]:
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread has ended
            found += path.read_text().split()
    return found


def resident(process: str) -> float:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except (OSError, IndexError):  # it has ended
        return 0.0


def main(source: Path, output: Path, model: str, megabytes: str = "") -> None:
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = not megabytes
    place = LocalStorage(source)
    run = stages.RestoreRun(
        input=place,
        output=LocalStorage(output),
        model=checkpoint.read(model),
        device="cpu",
        threads=1,
        max_pixels=2**30,
        strip_metadata=False,
    )
    together = Together()
    together.start()
    restorer = run.restorer()
    restorer([np.zeros((32, 32, 3), np.uint8)])
    with ThreadPoolExecutor(1) as pool, codec.Processes(1, run.max_pixels) as codecs:
        pool.submit(memory).result()
        if megabytes:
            limit = int((memory()["VmSize"] + float(megabytes)) * 2**20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for item in place.list():
            row = Row(key=item.key, size=item.size, etag=item.etag, model="m", options="o", run_id="r")
            (row,) = stages.restore_objects([row], stages.Tools(run, pool, codecs), restorer)
            line = {"key": row.key, "status": row.status, "error": row.error, "message": row.message}
            line |= {"change": row.change, "seconds": row.seconds, "idle": idle() / 2**20}
            print(json.dumps({**line, **memory(), "together": together.most}), flush=True)
            together.most = 0.0


if __name__ == "__main__":
    with ThreadPoolExecutor(1) as thread:  # as Ray Data has it: another malloc arena than the main thread's
        thread.submit(main, Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]).result()

#!/usr/bin/env python
"""Images per second of jobs/restore_bucket.py beside a plain loop over the same files, taking turns in one run.

The plain loop is what one would write by hand in one process: decode, the same network on all cores, encode, write.
Both lose nothing and write the same bytes; the loop has no ledger, no resume and no wall against bad files.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow.compute as pc

from jobs import command_line, restore_bucket
from restore_core import checkpoint, codec, manifest, provenance
from restore_core.config import Precision
from restore_core.inference import Restorer
from restore_core.storage import LocalStorage, Storage, open_storage


@dataclass(frozen=True, kw_only=True)
class RestoreSpeed:
    input: str
    """A folder of photographs, or a file of them."""
    output: Path = Path("benchmarks/restore/speed.json")
    """The result file."""
    model: str = "faces"
    """A bundled model's name, or the path of a model folder."""
    precision: Precision = "auto"
    """Of the network's arithmetic, in both: float32 or bfloat16; auto is the former on CPUs."""
    batch_size: int = 16
    """Images handled together, by both."""
    rounds: int = 3
    """How often each has its turn; the medians count."""


def plain_loop(source: Storage, target: Storage, job: RestoreSpeed) -> float:
    """Images per second, the loading of the model not counted."""
    model = checkpoint.read(job.model)
    restorer = Restorer(model, precision=job.precision)
    started = time.perf_counter()
    count = 0
    keys = (item.key for item in source.list())
    while batch := list(islice(keys, job.batch_size)):
        files = [source.read(key) for key in batch]
        pictures = [codec.decode(file) for file in files]
        results = restorer([picture.pixels for picture in pictures])
        for key, file, picture, result in zip(batch, files, pictures, results, strict=True):
            data = file
            if not result.undamaged(gray_file=picture.gray):
                software = f"restore_core (model {model.sha256[:12]})"
                data = codec.encode(result.pixels, file, picture=picture, software=software)
            target.write(key, data)
        count += len(batch)
    return count / (time.perf_counter() - started)


def the_job(job: RestoreSpeed, target: Storage) -> tuple[float, float]:
    """Images per second over the whole job, and from its first finished unit to its last."""
    options = restore_bucket.RestoreBucket(
        input=job.input, output=target.uri, model=job.model, batch_size=job.batch_size, device="cpu",
        precision=job.precision,
    )  # fmt: skip
    started = time.perf_counter()
    assert restore_bucket.main(options) == command_line.DONE
    seconds = time.perf_counter() - started
    times = manifest.Ledger(target, "reader").latest()["finished_at"]
    first, last = pc.min(times).as_py(), pc.max(times).as_py()
    later = pc.sum(pc.greater(times, first)).as_py()
    return len(times) / seconds, later / (last - first).total_seconds()


def main(job: RestoreSpeed) -> int:
    source = open_storage(job.input)
    loop, whole, steady = [], [], []
    for _ in range(job.rounds):
        with tempfile.TemporaryDirectory() as by_loop, tempfile.TemporaryDirectory() as by_job:
            loop.append(plain_loop(source, LocalStorage(Path(by_loop).resolve()), job))
            target = LocalStorage(Path(by_job).resolve())
            rates = the_job(job, target)
            whole.append(rates[0])
            steady.append(rates[1])
            count = sum(1 for _ in source.list())
    result = {
        **provenance.record(),
        "model": {"name": job.model, "sha256": checkpoint.read(job.model).sha256},
        "precision": job.precision,
        "images": count,
        "images_per_second": {
            "plain loop": round(statistics.median(loop), 2),
            "job, start-up included": round(statistics.median(whole), 2),
            "job, steady state": round(statistics.median(steady), 2),
        },
        "rounds": {"plain loop": loop, "job, start-up included": whole, "job, steady state": steady},
    }
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["images_per_second"], indent=2))
    return command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, RestoreSpeed))

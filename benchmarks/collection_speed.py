#!/usr/bin/env python
"""What a photograph costs in a small collection and in a large one: the job from end to end, with a network that is as
small as it goes, so that everything else is seen.

JPEG files of 250x250 pixels, all restored and written; of a large collection most are the same again under other names.
"""

import json
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import corpora
from benchmarks.memory import save_smallest_network
from benchmarks.restore_speed import KINDS, Measured, RestoreSpeed, the_job
from jobs import command_line
from restore_core import provenance
from restore_core.config import require

PER_FOLDER = 1000


@dataclass(frozen=True, kw_only=True)
class CollectionSpeed:
    photographs: Path
    """A folder of photographs (*.jpg) of at least 250x250 pixels, of which the files are made."""
    output: Path = Path("benchmarks/collection.json")
    """The result file."""
    images: tuple[int, ...] = (1_000, 10_000, 100_000)
    """How many; the sizes take turns."""
    distinct: int = 1_000
    """Files that are made; the others are links to them."""
    rounds: int = 3
    """How often each has its turn; the medians count."""

    def __post_init__(self) -> None:
        require(min(self.images) >= 100, "images", min(self.images), "use 100 or more")
        require(self.distinct >= 1, "distinct", self.distinct, "use 1 or more")


def main(job: CollectionSpeed) -> int:
    runs: dict[int, list[Measured]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        (root / "model").mkdir()
        save_smallest_network(root / "model")
        (root / "distinct").mkdir()
        corpus = corpora.CORPORA["jpeg-250"]
        corpora.write(corpus, sorted(job.photographs.rglob("*.jpg")), job.distinct, root / "distinct")
        files = sorted((root / "distinct").iterdir())
        for count in job.images:
            for index in range(count):
                link = root / f"{count}/{index // PER_FOLDER:04d}/{index % PER_FOLDER:04d}.jpeg"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.hardlink_to(files[index % len(files)])
        for _ in range(job.rounds):
            for count in job.images:
                with tempfile.TemporaryDirectory(dir=root) as target:
                    told = RestoreSpeed(
                        photographs=job.photographs, corpus="jpeg-250", images=count, output=job.output,
                        model=str(root / "model"),
                    )  # fmt: skip
                    runs[count].append(the_job(told, root / str(count), Path(target)))
                print(count, runs[count][-1], flush=True)
    result = {**provenance.record(), "corpus": corpus.title, "rounds": job.rounds, "results": table(runs)}
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.output.write_text(json.dumps(result, indent=2) + "\n")
    return command_line.DONE


def table(runs: dict[int, list[Measured]]) -> list[dict[str, Any]]:
    """A row for each size of the collection."""
    return [
        {
            "images": count,
            "images/s, steady": round(statistics.median(run.steady for run in some), 1),
            "each round": [round(run.steady, 1) for run in some],
            "images/s, start-up included": round(statistics.median(run.whole for run in some), 1),
            "first photograph, s": round(statistics.median(run.first for run in some), 1),
            **{f"{kind} MB": max(run.memory.get(kind, 0) for run in some) for kind in KINDS},
        }
        for count, some in runs.items()
    ]


if __name__ == "__main__":
    sys.exit(command_line.run(main, CollectionSpeed))

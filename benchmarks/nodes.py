#!/usr/bin/env python
"""Images a second against the number of nodes, all of them simulated on this machine, with a network that only waits.

The whole restore job runs on a cluster of so many nodes, one worker on each; in place of reading, restoring and writing
a photograph the worker waits and says that it is done. So what is measured is whether listing, plan, driver and ledger
keep up, or make nodes wait for each other. Each number of nodes in a process of its own, on a cluster of its own.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.growth import Listing, by_itself
from jobs import command_line
from restore_core import checkpoint, provenance
from restore_core.storage import LocalStorage


@dataclass(frozen=True, kw_only=True)
class Nodes:
    nodes: tuple[int, ...] = (1, 2, 4, 8)
    """How many; each is a measurement of its own."""
    seconds: float = 0.02
    """That a worker takes for an image."""
    objects: int = 2_000
    """For each node."""
    batch_size: int = 16
    """Objects that a worker handles together."""
    output: Path = Path("benchmarks/nodes.json")
    """The result file."""
    one: bool = False
    """Measure here, and print the result: what a measurement's own process is told."""


def waiting(seconds: float) -> type:
    """RestoreUnit that waits. Local, so that Ray carries it to its workers."""

    class WaitingUnit:
        def __init__(self, *_: object) -> None:
            pass

        def __call__(self, packed: pa.Table) -> pa.Table:
            import ray

            from restore_core import manifest
            from restore_core.pipelines import stages

            rows = manifest.rows_of(stages.unpack(packed).select(manifest.SCHEMA.names))
            time.sleep(seconds * len(rows))
            for row in rows:
                row.status, row.output_key = "restored", row.key
                stages.finish(row)
                row.node = ray.get_runtime_context().get_node_id()  # all are on one machine
            return manifest.table_of(rows)

    return WaitingUnit


def measure(job: Nodes) -> dict[str, float]:
    import ray
    from ray.cluster_utils import Cluster

    from restore_core.manifest import Ledger
    from restore_core.pipelines import cluster, restoration

    (count,) = job.nodes
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(count):
        nodes.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = nodes.address
    cluster.connect()
    restoration.RestoreUnit = waiting(job.seconds)  # type: ignore[misc]
    Listing.count = count * job.objects
    options = restoration.RestoreOptions(
        model="faces-fast", device="cpu", workers=count, max_pixels=10**6, batch_size=job.batch_size
    )
    with tempfile.TemporaryDirectory() as folder:
        output = LocalStorage(Path(folder).resolve() / "out")
        model = checkpoint.read("faces-fast")
        summary = restoration.restore(Listing(Path(folder).resolve() / "in"), output, model, options, ["nodes"])
        rows = Ledger(output, "reader").latest()
    assert summary.overview.statuses == {"restored": Listing.count}
    firsts = rows.group_by("node").aggregate([("finished_at", "min")])["finished_at_min"]
    assert len(firsts) == count
    begun = pc.max(firsts)  # workers start one after the other: from here on all are at work
    later = rows.filter(pc.greater(rows["finished_at"], begun))
    rate = len(later) / (pc.max(later["finished_at"]).as_py() - begun.as_py()).total_seconds()
    ray.shutdown()
    nodes.shutdown()
    return {"nodes": count, "images": len(rows), "images/s": round(rate, 1), "possible": round(count / job.seconds, 1)}


def main(job: Nodes) -> int:
    if job.one:
        print("result:", json.dumps(measure(job)))
        return command_line.DONE
    results = []
    for count in job.nodes:
        command = [
            sys.executable, __file__, "--one", "--nodes", str(count), "--seconds", str(job.seconds),
            "--objects", str(job.objects), "--batch-size", str(job.batch_size),
        ]  # fmt: skip
        # Nothing of such a cluster listens beyond this machine.
        results.append(by_itself(command, RAY_AUTH_MODE="disabled"))
    result = {**provenance.record(), "results": results}
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.output.write_text(json.dumps(result, indent=2) + "\n")
    return command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, Nodes))

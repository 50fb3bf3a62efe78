"""Memory: what a picture may take, and what is given back."""

import numpy as np
import pytest

from restore_core import memory
from restore_core.pipelines import cluster

GB = 10**9


@pytest.mark.parametrize(
    ("available", "workers", "megapixels"),
    [
        (2 * 2**30, 1, 48),
        (4 * GB, 1, 102),
        (16 * GB, 2, 220),
        (16 * GB, 1, 455),
        (GB, 1, 1),  # too little for anything: small pictures may still go
        (10**12, 1, 1073),
    ],
)
def test_the_pixel_budget_follows_from_memory(available: int, workers: int, megapixels: int) -> None:
    assert memory.pixel_budget(available, workers) // 10**6 == megapixels


def test_the_budget_is_that_of_the_node_which_has_least_for_each_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(cpus: float, gigabytes: float, alive: bool = True) -> dict[str, object]:
        return {"Alive": alive, "Resources": {"CPU": cpus, "memory": gigabytes * GB}}

    nodes = [node(8, 32), node(2, 16), node(1, 1, alive=False), {"Alive": True, "Resources": {"memory": GB}}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert cluster.pixel_budget("cpu", 8) == memory.pixel_budget(32 * GB, 8)
    assert cluster.pixel_budget("cpu", 1) == memory.pixel_budget(16 * GB, 1)
    nodes.clear()
    assert cluster.pixel_budget("cpu", 8) == memory.LEAST_PIXELS


@pytest.mark.parametrize(
    ("nodes", "each", "workers"),
    [
        ([(2, 14)], 1, 2),
        ([(8, 12)], 2, 4),
        ([(8, 7)], 4, 2),  # of 3 each two CPUs would be left over
        ([(5, 5)], 2, 2),
        ([(8, 1)], 8, 1),
        ([(1, 1)], 1, 1),
        ([(8, 12), (8, 12)], 2, 8),
        ([(8, 12), (3, 12)], 3, 3),  # one fits on the smallest
        ([(8, 7), (1, 14)], 4, 2),  # a head of one CPU does not count
        ([(8, 12), (0, 4)], 2, 4),  # a head without work
    ],
)
def test_processes_share_cpus_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, nodes: list[tuple[int, int]], each: int, workers: int
) -> None:
    found = [{"Alive": True, "Resources": {"CPU": cpus, "memory": gigabytes * GB}} for cpus, gigabytes in nodes]
    monkeypatch.setattr("ray.nodes", lambda: found)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": float(sum(cpus for cpus, _ in nodes))})
    assert cluster.cpus_each("cpu") == each
    assert cluster.processes("cpu", None, cpus_each=each) == workers
    fit = [(cpus, gigabytes) for cpus, gigabytes in nodes if cpus >= each]
    least = min(memory.pixel_budget(gigabytes * GB, cpus // each) for cpus, gigabytes in fit)
    assert cluster.pixel_budget("cpu", workers, cpus_each=each) == least
    smallest = min(cpus for cpus, _ in fit)
    monkeypatch.setenv(cluster.GROWS_TO, f"CPU={8 * smallest}")  # eight of the smallest node
    assert cluster.processes("cpu", None, cpus_each=each) == max(workers, 8 * (smallest // each))
    assert cluster.processes("cpu", 5, cpus_each=1) == 5


@pytest.mark.parametrize(
    ("cpus", "gigabytes", "each", "megapixels"),
    [(16, 24, 2, 64), (4, 10.5, 1, 44), (16, 90, 1, 146), (8, 12, 2, 55), (2, 2, 2, 1)],
)
def test_beside_a_gpu_its_process_has_memory_too(
    monkeypatch: pytest.MonkeyPatch, cpus: int, gigabytes: float, each: int, megapixels: int
) -> None:
    """And those that decode and write are as many as the rest suffices for."""
    node = {"Alive": True, "Resources": {"CPU": cpus, "GPU": 1, "memory": gigabytes * GB}}
    monkeypatch.setattr("ray.nodes", lambda: [node])
    assert cluster.cpus_each("cuda") == each
    budget = cluster.pixel_budget("cuda", cpus, cpus_each=each)
    assert budget // 10**6 == megapixels
    rest = gigabytes * GB - cluster.GPU_BYTES
    assert budget == memory.LEAST_PIXELS or budget * memory.CODING <= rest / (cpus // each) - memory.WORKER_BYTES


def test_a_budget_fits_into_the_memory_that_it_is_made_from() -> None:
    for available in range(2 * GB, 64 * GB, GB):
        pixels = memory.pixel_budget(available, 2)
        if pixels > memory.LEAST_PIXELS:
            assert memory.WORKER_BYTES + memory.CODING * pixels <= available / 2
            assert memory.WORKER_BYTES + memory.TILE_BYTES + memory.RESTORING * pixels <= available / 2


def test_what_is_allocated_is_not_idle() -> None:
    memory.trim()
    before = memory.idle()
    block = np.ones(2**27, np.uint8)
    assert memory.idle() < before + 2**26
    del block
    memory.trim()  # it may have lain in a gap of the heap that other tests had left
    assert memory.idle() < before + 2**26

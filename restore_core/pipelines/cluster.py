"""Finding or starting Ray, and what it has to offer."""

import gc
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import ray
import ray.data
from ray._private import ray_logging
from ray._private import worker as ray_worker

from restore_core import memory
from restore_core.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds `restore_core` and `jobs`."""

# Large tensors come and go at every layer. By default glibc returns each to the kernel and faults it in again, which
# took a sixth of the training time on a CPU; with these it keeps them.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}

WORKER_MEMORY = {
    **KEEP_MEMORY,
    # Ray Data calls us in a thread of its own. Its arena would be of pieces of 64 MB: larger blocks come from the
    # system each time, and none is made of what two pieces have left.
    "MALLOC_ARENA_MAX": "1",
    # oneDNN and what binds it to torch prepare a network anew for each size of picture, and keep 1024 of each such
    # piece by default. A network of 30 layers needs 30 of them for one size.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
    # cuDNN prepares it for each size of picture too: 10,000 pieces by default, which take about 2 GB of host memory
    # (docs.pytorch.org, "CUDA environment variables"). With much fewer they would be made again and again.
    "TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT": "2000",
}
"""Of processes that restore pictures of many sizes."""

GROWS_TO = "RESTORE_GROWS_TO"
"""Environment variable of the head node: CPUs and GPUs that its autoscaler can bring the workers to, CPU=64,GPU=8. Ray
does not tell jobs; without it a job plans with the nodes that are there when it starts."""
WAIT_S, WAIT_LINE_S = 1200.0, 15.0
"""How long for a first node, and how often that is told. A GPU node on AWS takes about five minutes."""

GPU_BYTES = 5 * 10**9 // 2
"""Of a node's memory, for the process that holds the network on each of its GPUs: CUDA's libraries are in it too. An
assumption, see DECISIONS.md."""

IDLE_SECONDS = 10.0
"""After so long without anything new the driver's garbage is collected, see `releasing_actors`."""

Device = Literal["auto", "cpu", "cuda"]

LEFT_OUT = [".venv", "venv", ".git", "__pycache__", "runs", "data", "demo"]
"""Of the folder that goes to the workers; beside what .gitignore names."""

PRINTER = "ray_print_logs"
"""Ray's name for what prints the workers' lines in the driver."""
PRINT_ERRORS = ray_worker.print_to_stdstream
"""What prints in the driver what Ray tells of failed tasks."""

logger = logging.getLogger(__name__)


def quiet_data() -> None:
    """The jobs print their own progress; Ray Data's would be a page every few seconds."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def connect(*, dashboard: bool = False, env_vars: Mapping[str, str] = MappingProxyType({})) -> None:
    """Join the cluster that the job was submitted to or that RAY_ADDRESS names, else start a private Ray here.

    `env_vars` are set in every worker process of this job.
    """
    quiet_data()
    if not ray.is_initialized():
        _init(dashboard, env_vars)
        ray_logging.global_worker_stdstream_dispatcher.remove_handler(PRINTER)
        ray_logging.global_worker_stdstream_dispatcher.add_handler(PRINTER, _print_lines)
        ray_worker.print_to_stdstream = _print_errors
        if threading.current_thread() is threading.main_thread():
            # As from `ray job stop`: like Ctrl-C, so that what is done is written down. Ray's own handler ends at once.
            signal.signal(signal.SIGTERM, signal.default_int_handler)


def _print_lines(data: dict[str, Any]) -> None:
    """Print what workers print, as it is, and what Ray says of the nodes. Its own way adds colours to every line.

    The workers' standard error is left out: there Ray's libraries tell of each step they take. What is raised in a
    worker comes to the driver as an exception, and everything is in the session's logs (`ray logs`).
    """
    if data.get("pid") in ("autoscaler", "raylet"):
        ray_worker.print_worker_logs(data, sys.stderr)
    elif not data["is_err"]:
        for line in data["lines"]:
            print(line, flush=True)


def _print_errors(data: dict[str, Any], ignore_prefix: bool) -> None:
    """Print what Ray tells of failed tasks, but not of actors that Ray Data itself ends, as when a job is stopped."""
    if lines := [line for line in data["lines"] if "killed by `ray.kill`" not in line]:
        PRINT_ERRORS({**data, "lines": lines}, ignore_prefix)


def _init(dashboard: bool, env_vars: Mapping[str, str]) -> None:
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    # Else the packing of the working directory tells what is left out of it, and that the bundled models are large.
    os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
    logging.getLogger("ray._private.runtime_env").setLevel(logging.ERROR)
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    if job or os.environ.get("RAY_ADDRESS"):
        carried = (job.get("runtime_env") or {}).get("working_dir")  # set twice, Ray refuses
        settings = {} if carried else {"working_dir": str(ROOT), "excludes": LEFT_OUT}
        ray.init(
            logging_level=logging.WARNING,
            runtime_env=(settings | ({"env_vars": dict(env_vars)} if env_vars else {})) or None,
        )
        return
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    # Unlike a bare ray.init(), never join some other program's Ray on this machine: it would take ours down with it.
    # Ray 2.60 turns token authentication on by itself for a cluster started here (not so with `ray start`).
    ray.init(
        address="local",
        num_cpus=max(2, len(os.sched_getaffinity(0))),  # with one CPU, a training worker would starve Ray Data
        include_dashboard=dashboard,  # on loopback
        logging_level=logging.WARNING,
        runtime_env={"env_vars": {**env_vars, "PYTHONPATH": os.pathsep.join(filter(None, paths))}},
    )


@contextmanager
def in_order() -> Iterator[None]:
    """Blocks of datasets that are made here come in the order of what they are made from."""
    options = ray.data.DataContext.get_current().execution_options
    before, options.preserve_order = options.preserve_order, True
    try:
        yield
    finally:
        options.preserve_order = before


@contextmanager
def releasing_actors(done: Callable[[], int]) -> Iterator[None]:
    """While a dataset with actors is executed; `done` tells how far it is.

    An actor that Ray Data has let go of ends with the last Python reference to it. After errors, as when a node is
    lost, there are some in reference cycles. While nothing happens Python does not collect those by itself: the idle
    actor would keep its CPU or GPU, for which other work waits.
    """
    over = threading.Event()
    threading.Thread(target=_collect_when_idle, args=(done, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _collect_when_idle(done: Callable[[], int], over: threading.Event) -> None:
    before = done()
    while not over.wait(IDLE_SECONDS):
        if done() == before:
            gc.collect()
        before = done()


def resources() -> tuple[int, int]:
    """CPUs and GPUs for work: as many as there are now, or as the cluster can come to have by itself, if that is more.

    Raises UsageError when `RESTORE_GROWS_TO` cannot be read.
    """
    total, growing = ray.cluster_resources(), _grows_to()
    cpus, gpus = (max(int(total.get(name, 0)), growing.get(name, 0)) for name in ("CPU", "GPU"))
    return cpus, gpus


def processes(device: Literal["cpu", "cuda"], wanted: int | None, *, cpus_each: int = 1) -> int:
    """How many hold a network: as many as wanted, else one for each GPU or so many CPUs. Raises UsageError for too
    many."""
    cpus, gpus = resources()
    most, kind = (gpus, "GPUs") if device == "cuda" else (cpus, "CPUs")
    if wanted is not None and wanted > most:
        raise UsageError(f"--workers {wanted}: the cluster has {most} {kind}; use --workers {most} or add nodes")
    if wanted is None and device == "cpu" and cpus_each > 1:  # a process is on one node
        nodes = [int(node["CPU"]) for node in _working_nodes()]
        smallest = min((cpus for cpus in nodes if cpus >= cpus_each), default=cpus_each)
        grown = _grows_to().get("CPU", 0) // smallest * (smallest // cpus_each)
        most = max(1, sum(cpus // cpus_each for cpus in nodes), grown)
    return wanted or most


def cpus_each(device: Literal["cpu", "cuda"]) -> int:
    """How many CPUs what decodes and encodes in a process should have to itself, on CPUs the network too, for its share
    of the memory to suffice: 1 where that is plenty, more where many CPUs share little of it.

    Nodes of fewer CPUs than that are left out, unless there are no others.
    """
    nodes = _working_nodes()
    shares = (memory.SHARE_BYTES * node["CPU"] / max(1, _bytes(node, device)) for node in nodes)
    needed = max(map(math.ceil, shares), default=1)
    cpus = [int(node["CPU"]) for node in nodes] or [1]
    smallest = min((count for count in cpus if count >= needed), default=max(cpus))
    return smallest // (smallest // min(needed, smallest))  # so that few are left over


def _grows_to() -> dict[str, int]:
    text = os.environ.get(GROWS_TO, "")
    pairs = [pair.strip().partition("=") for pair in text.split(",") if pair.strip()]
    if any(name not in ("CPU", "GPU") or not number.isdecimal() for name, _, number in pairs):
        raise UsageError(f"{GROWS_TO}={text}: not of the form CPU=64,GPU=8; it is set where the head node starts")
    return {name: int(number) for name, _, number in pairs}


def pick_device(device: Device) -> Literal["cpu", "cuda"]:
    """`auto` is cuda when the cluster has GPUs, or can have them. Returns when there is one such node at least.

    Raises UsageError for what the cluster does not have, where Ray would wait for ever.
    """
    cpus, gpus = resources()
    if device == "cuda" and gpus == 0:
        raise UsageError(
            "--device cuda: needs 1 GPU for each worker, the cluster has 0 GPUs; add GPU nodes or use --device cpu"
        )
    if cpus == 0:
        raise UsageError(
            f"--device {device}: needs 1 CPU for each worker, the cluster has 0 CPUs for work; add a worker node, or "
            f"start the head with {GROWS_TO} where nodes are added on demand"
        )
    found: Literal["cpu", "cuda"] = "cuda" if device == "cuda" or (device == "auto" and gpus) else "cpu"
    await_node(found)
    return found


def await_node(device: Literal["cpu", "cuda"]) -> None:
    """A task that cannot run yet is what lets Ray start a node; nothing is left of it if this process ends."""
    name = "GPU" if device == "cuda" else "CPU"
    if ray.cluster_resources().get(name, 0) >= 1:
        return
    started = time.monotonic()
    first = ray.remote(num_cpus=1, num_gpus=int(device == "cuda"), max_retries=-1)(lambda: True).remote()
    while not ray.wait([first], timeout=WAIT_LINE_S)[0]:
        waited = time.monotonic() - started
        if waited > WAIT_S:
            ray.cancel(first)
            raise UsageError(
                f"--device {device}: no node with a {name} has come in {waited / 60:.0f} minutes; "
                "`ray status` on the head says why"
            )
        logger.info("waiting for the first node with a %s, for %.0f s now", name, waited)


def pixel_budget(device: Literal["cpu", "cuda"], workers: int, *, cpus_each: int = 1) -> int:
    """What a picture may have on the node that has least memory for each of its workers, of `workers` in all."""
    nodes = _working_nodes()
    budgets = [
        memory.pixel_budget(_bytes(node, device), max(1, min(workers, int(node["CPU"]) // cpus_each)))
        for node in [node for node in nodes if node["CPU"] >= cpus_each] or nodes
    ]
    return min(budgets, default=memory.LEAST_PIXELS)


def cpus_per_node() -> int:
    """CPUs of the smallest node that works."""
    return min((int(node["CPU"]) for node in _working_nodes()), default=1)


def _working_nodes() -> list[dict[str, float]]:
    """The resources of each node that has CPUs for work; the head often has none."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]


def _bytes(node: Mapping[str, float], device: Literal["cpu", "cuda"]) -> int:
    """The memory for CPUs' work that Ray offers there: heeds a container's limit, leaves the object store out."""
    held = GPU_BYTES * int(node.get("GPU", 0)) if device == "cuda" else 0
    return max(0, int(node.get("memory", 0)) - held)

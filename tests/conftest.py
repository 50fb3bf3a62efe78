"""Fixtures shared by all tests."""

import gc
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# What a shell starts in the background ignores it, and so would every job that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Else Ray's workers wait for whatever else is at work on the machine, other tests too.
os.environ.update(RAY_worker_niceness="0")

AWS_SETTINGS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray come first, of many tests before few: one of two processes would be left with the last."""
    sizes = Counter(item.path for item in items)
    with_ray = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: (item.path not in with_ray, -sizes[item.path]))


@pytest.fixture(scope="session")
def moto_client() -> "Iterator[S3Client]":
    """A client of a real S3 server on loopback that lives as long as the test session."""
    import boto3
    from moto.server import ThreadedMotoServer

    from restore_core import storage

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    storage.s3.s3_client.cache_clear()
    yield boto3.session.Session("test", "test-secret", region_name="us-east-1").client(
        "s3", endpoint_url=f"http://{host}:{port}"
    )
    storage.s3.s3_client.cache_clear()
    server.stop()


@pytest.fixture
def s3(moto_client: "S3Client", monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 endpoint with one empty bucket, "photos"; the AWS_* variables point there. Yields the endpoint's URL.

    Sub-processes (Ray's workers, the jobs) inherit the variables. Tests that change them clear `storage.s3.s3_client`.
    """
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_CONFIG_FILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in AWS_SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_client.meta.endpoint_url)
    moto_client.create_bucket(Bucket="photos")
    yield moto_client.meta.endpoint_url
    for bucket in moto_client.list_buckets()["Buckets"]:
        for page in moto_client.get_paginator("list_objects_v2").paginate(Bucket=bucket["Name"]):
            for found in page.get("Contents", []):
                moto_client.delete_object(Bucket=bucket["Name"], Key=found["Key"])
        moto_client.delete_bucket(Bucket=bucket["Name"])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: for tiny tensors the second one costs more than it brings, above all on busy machines."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def local_ray(moto_client: "S3Client") -> Iterator[None]:
    """One local Ray for all tests that need one; its workers reach the S3 server too."""
    import ray

    from restore_core.pipelines.cluster import ROOT

    settings = {**AWS_SETTINGS, "AWS_ENDPOINT_URL": moto_client.meta.endpoint_url, "PYTHONPATH": str(ROOT)}
    # Three CPUs, whatever the machine has: two training workers, and one for Ray Data.
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=True,
        log_to_driver=False,
        logging_level="warning",
        runtime_env={"env_vars": settings},
    )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def no_actors_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After an error an actor may be in a reference cycle, and have a CPU that the next test waits for."""
    yield
    if "local_ray" in request.fixturenames:
        import ray

        if ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
            gc.collect()


@pytest.fixture(scope="module", autouse=True)
def nothing_unclosed() -> Iterator[None]:
    """What a file leaves unclosed is told at its end, not in whichever test of another file comes to collect it."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[int], Path]":
    """Model folders of a small network with random weights, another one for each seed."""
    import torch

    from restore_core import checkpoint
    from restore_core.config import ResidualUNetConfig
    from restore_core.model import build

    root = tmp_path_factory.mktemp("models")

    def make(seed: int) -> Path:
        folder = root / str(seed)
        if not folder.exists():
            config = ResidualUNetConfig(channels=(8, 16), blocks=(1, 1))
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                checkpoint.save(build(config), config, {}, folder)
        return folder

    return make

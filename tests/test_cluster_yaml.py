"""cluster.yaml against Ray's own schema, without AWS, and against what must not be left at Ray's defaults."""

import copy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_it(cluster: dict) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_it_is_not_an_open_door(cluster: dict) -> None:
    for rule in cluster["provider"]["security_group"]["IpPermissions"]:
        assert all(entry["CidrIp"].endswith("/32") for entry in rule["IpRanges"])
    for node in cluster["available_node_types"].values():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert node["node_config"]["IamInstanceProfile"], "Ray's default gives the head full access to EC2 and S3"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["node_config"]["BlockDeviceMappings"])
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert any("--dashboard-host=127.0.0.1" in command for command in starts)


def test_a_job_finds_a_worker_when_it_starts(cluster: dict) -> None:
    """The head has no CPUs for work, and the jobs do not wait for nodes that are not asked for."""
    assert sum(node.get("min_workers", 0) for node in cluster["available_node_types"].values()) >= 1

"""cluster.yaml against Ray's own schema, without AWS, and against what must not be left at Ray's defaults."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from restore_core.pipelines.spot import SpotOrOnDemand, grows_to

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "cluster.yaml").read_text()


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_its_provider_is_ours(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.providers import _NODE_PROVIDERS

    provider = cluster["provider"]
    assert _NODE_PROVIDERS[provider["type"]](provider) is SpotOrOnDemand
    assert provider["cache_stopped_nodes"] is False


def test_it_is_not_an_open_door(cluster: dict[str, Any]) -> None:
    assert "security_group" not in cluster["provider"], "Ray adds SSH from the whole world to those rules"
    for node in cluster["available_node_types"].values():
        assert node["node_config"]["SecurityGroupIds"] == cluster["provider"]["yours"]["security_group"]
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert node["node_config"]["IamInstanceProfile"], "Ray's default gives the head full access to EC2 and S3"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["node_config"]["BlockDeviceMappings"])
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert any("--dashboard-host=127.0.0.1" in command for command in starts)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_why_the_security_group_is_not_left_to_ray() -> None:
    from ray.autoscaler._private.aws.config import _create_default_inbound_rules

    mine = [{"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "203.0.113.7/32"}]}]
    open_to = [
        entry["CidrIp"] for rule in _create_default_inbound_rules({"sg"}, mine) for entry in rule.get("IpRanges", [])
    ]
    assert open_to == ["0.0.0.0/0", "203.0.113.7/32"], "Ray has mended it: say so in cluster.yaml"


def test_it_scales_to_nothing(cluster: dict[str, Any]) -> None:
    """The head has no CPUs for work, and workers come when a job asks for them."""
    head, *workers = cluster["available_node_types"].values()
    assert head["resources"] == {"CPU": 0} and "min_workers" not in head
    assert [node["min_workers"] for node in workers] == [0, 0]
    assert all(node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for node in workers)
    assert "InstanceMarketOptions" not in head["node_config"]


def test_what_is_to_be_changed_stands_at_the_top(cluster: dict[str, Any]) -> None:
    top, _, below = TEXT.partition("# --- Below nothing needs to be changed")
    for value in ("region: ", "cluster_name: ", "max_workers: ", "sg-", "resolve:ssm:", "restore-worker", "g6.2xlarge"):
        assert value in top and (value == "max_workers: " or value not in below), value
    assert cluster["available_node_types"]["gpu_worker"]["node_config"]["InstanceType"] == "g6.2xlarge"


def test_jobs_are_told_what_the_workers_can_come_to(cluster: dict[str, Any], tmp_path: Path) -> None:
    """Where there are none yet: by the file that `ray up` leaves on the head, with what AWS says of the machines."""
    cluster["available_node_types"]["gpu_worker"]["resources"] = {"CPU": 8, "GPU": 1}
    cluster["available_node_types"]["cpu_worker"] |= {"resources": {"CPU": 16}, "max_workers": 3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cluster))
    (start,) = (command for command in cluster["head_start_ray_commands"] if "ray start" in command)
    (module,) = re.findall(
        r"export RESTORE_GROWS_TO=\$\(~/env/bin/python -m (\S+) ~/ray_bootstrap_config.yaml\)", start
    )
    command = [sys.executable, "-m", module, tmp_path / "config.yaml"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert told == "CPU=64,GPU=8\n"
    del cluster["available_node_types"]["gpu_worker"]
    assert grows_to(cluster) == "CPU=48,GPU=0"


# --- On demand where there is no spot ------------------------------------------------------------------------------


def test_why_the_fallback_is_not_left_to_ray() -> None:
    """A node type whose launch was refused does not count as unavailable, so that it is asked for again."""
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    monitor = CloudResourceMonitor()
    for status, unavailable in ((Instance.ALLOCATION_FAILED, set()), (Instance.ALLOCATION_TIMEOUT, {"spot"})):
        monitor.notify([InstanceUpdateEvent(instance_type="spot", new_instance_status=status)])
        assert monitor.get_recoverable_resource_availabilities().keys() == unavailable


class FakeEC2:
    """Answers to create_instances in their order: an error's code, or the instance's ID."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), []

    def create_instances(self, **request: Any) -> list[Any]:
        import botocore.exceptions

        self.asked.append(request.get("InstanceMarketOptions"))
        answer = self.answers.pop(0)
        if not answer.startswith("i-"):
            raise botocore.exceptions.ClientError({"Error": {"Code": answer, "Message": "no"}}, "RunInstances")
        state = {"Name": "pending"}
        return [type("Instance", (), {"id": answer, "instance_id": answer, "state": state, "state_reason": None})]


def start(ec2: FakeEC2, config: dict[str, Any]) -> dict[str, Any]:
    provider = object.__new__(SpotOrOnDemand)
    provider.ec2_fail_fast, provider.cluster_name, provider.provider_config = ec2, "restore", {}
    return provider._create_node({"SubnetIds": ["a", "b"], **config}, {"ray-node-name": "x"}, 1)


SPOT = {"InstanceMarketOptions": {"MarketType": "spot"}}
REFUSED = ["InsufficientInstanceCapacity"] * 5


def test_spot_comes_first() -> None:
    ec2 = FakeEC2("i-1")
    assert list(start(ec2, SPOT)) == ["i-1"] and ec2.asked == [{"MarketType": "spot"}]


def test_without_spot_a_machine_is_started_on_demand() -> None:
    ec2 = FakeEC2(*REFUSED, "i-2")
    assert list(start(ec2, SPOT)) == ["i-2"]
    assert ec2.asked == [{"MarketType": "spot"}] * 5 + [None]


@pytest.mark.parametrize(
    ("answers", "config"),
    [(REFUSED, {}), ([*REFUSED, *REFUSED], SPOT), (["UnauthorizedOperation"] * 5, SPOT)],
    ids=["on demand in the first place", "nor on demand", "not allowed"],
)
def test_other_refusals_are_refusals(answers: list[str], config: dict[str, Any]) -> None:
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    ec2 = FakeEC2(*answers)
    with pytest.raises(NodeLaunchException):
        start(ec2, config)
    assert not ec2.answers

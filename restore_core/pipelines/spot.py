"""Amazon EC2 for Ray's cluster launcher: spot instances, and on-demand ones while AWS has no spot to give.

Ray 2.60 has no such fallback of its own. Where a launch is refused, its autoscaler asks for the same node type again
and again, though another one with the same resources stands beside it: only a machine that was given and never joined
counts as unavailable. `cluster.yaml` names the class as its provider; it runs where `ray up` is typed and on the head.

    python -m restore_core.pipelines.spot ~/ray_bootstrap_config.yaml

prints what the workers of a cluster can come to, as `cluster.GROWS_TO` wants it.
"""

import sys
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

NO_SPOT = {
    "InsufficientInstanceCapacity",
    "MaxSpotInstanceCountExceeded",  # the account's limit
    "SpotMaxPriceTooLow",
    "UnfulfillableCapacity",
}
"""EC2's error codes that on-demand instances may well not meet."""


class SpotOrOnDemand(AWSNodeProvider):  # type: ignore[misc]
    """AWSNodeProvider, but for the fallback."""

    def _create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Return the new instances by their IDs. Ray's own has tried every subnet when it gives up."""
        try:
            return dict(super()._create_node(node_config, dict(tags), count))
        except NodeLaunchException as error:
            if error.category not in NO_SPOT or "InstanceMarketOptions" not in node_config:
                raise
        on_demand = {key: value for key, value in node_config.items() if key != "InstanceMarketOptions"}
        return dict(super()._create_node(on_demand, dict(tags), count))


def grows_to(config: dict[str, Any]) -> str:
    """The most CPUs and GPUs that nodes of one type can have together, by a config with the types' resources filled in
    (as `ray up` leaves it on the head): CPU=64,GPU=8."""
    workers = [
        (kind["resources"], min(kind.get("max_workers", config["max_workers"]), config["max_workers"]))
        for name, kind in config["available_node_types"].items()
        if name != config["head_node_type"]
    ]
    most = {
        what: max((int(has.get(what, 0)) * count for has, count in workers), default=0) for what in ("CPU", "GPU")
    }  # fmt: skip
    return ",".join(f"{what}={number}" for what, number in most.items())


if __name__ == "__main__":
    print(grows_to(yaml.safe_load(Path(sys.argv[1]).read_text())))

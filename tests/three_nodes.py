"""A Ray cluster of three nodes on this machine, the first of them the head, until the standard input ends.

Writes one line: its address, and the processes (raylets) that are the nodes, as JSON.
"""

import json
import sys

from ray._private import ray_constants
from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes = [cluster.head_node, *(cluster.add_node(num_cpus=2) for _ in range(2))]
    raylets = [node.all_processes[ray_constants.PROCESS_TYPE_RAYLET][0].process.pid for node in nodes]
    print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()

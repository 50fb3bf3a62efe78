"""A Ray cluster on this machine whose nodes come as told, until the standard input ends; the first is the head.

    python tests/growing_cluster.py HEAD_CPUS

Each line `CPUS GPUS GIGABYTES` adds a node, of 0 gigabytes one with what the machine has. Of each node, the head's
with the cluster's address, a line of JSON names its id and the process (raylet) that it is. GPUs are numbers only:
nothing is there that could use them.
"""

import json
import sys

from ray._private import ray_constants
from ray.cluster_utils import Cluster


def tell(node: object, **more: str) -> None:
    raylet = node.all_processes[ray_constants.PROCESS_TYPE_RAYLET][0].process.pid
    print(json.dumps({"raylet": raylet, "id": node.node_id, **more}), flush=True)


def main(head_cpus: int) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus, "include_dashboard": False})
    tell(cluster.head_node, address=cluster.address)
    for line in sys.stdin:
        cpus, gpus, gigabytes = map(int, line.split())
        memory = {"memory": gigabytes * 10**9} if gigabytes else {}
        tell(cluster.add_node(num_cpus=cpus, num_gpus=gpus, **memory))
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))

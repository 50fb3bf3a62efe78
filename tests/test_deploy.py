"""docker/ and deploy/kuberay: read, since neither Docker nor Kubernetes is at hand."""

import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

from jobs import restore_bucket, train

ROOT = Path(__file__).parent.parent
KUBERAY = ROOT / "deploy/kuberay"
JOBS = ["rayjob-train.yaml", "rayjob-restore.yaml"]

# Every field that the documents use, as KubeRay 1.6 (ray.io/v1) and Kubernetes name them; a leaf is the value's type.
SECURITY = {"allowPrivilegeEscalation": bool, "capabilities": {"drop": list}}
AMOUNTS = {"cpu": str, "memory": str, "nvidia.com/gpu": str}
RESOURCES = {"requests": AMOUNTS, "limits": AMOUNTS}
POD = {
    "restartPolicy": str,
    "serviceAccountName": str,
    "automountServiceAccountToken": bool,
    "terminationGracePeriodSeconds": int,
    "tolerations": [{"key": str, "operator": str, "effect": str}],
    "securityContext": {
        "runAsNonRoot": bool,
        "runAsUser": int,
        "runAsGroup": int,
        "fsGroup": int,
        "seccompProfile": {"type": str},
    },
    "containers": [
        {
            "name": str,
            "image": str,
            "env": [{"name": str, "value": str}],
            "securityContext": SECURITY,
            "resources": RESOURCES,
        }
    ],
}
RAY_JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "submissionMode": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "submitterPodTemplate": {"spec": POD},
        "rayClusterSpec": {
            "rayVersion": str,
            "authOptions": {"mode": str},
            "enableInTreeAutoscaling": bool,
            "autoscalerOptions": {"idleTimeoutSeconds": int, "securityContext": SECURITY, "resources": RESOURCES},
            "headGroupSpec": {"rayStartParams": {"num-cpus": str}, "template": {"spec": POD}},
            "workerGroupSpecs": [
                {
                    "groupName": str,
                    "replicas": int,
                    "minReplicas": int,
                    "maxReplicas": int,
                    "rayStartParams": {},
                    "template": {"spec": POD},
                }
            ],
        },
    },
}


def misfits(value: Any, fields: Any, where: str = "") -> Iterator[str]:
    """Fields that are not known, and values of another type."""
    if isinstance(fields, dict) and isinstance(value, dict):
        yield from (f"{where}.{key}" for key in value if key not in fields)
        for key in value.keys() & fields.keys():
            yield from misfits(value[key], fields[key], f"{where}.{key}")
    elif isinstance(fields, list) and isinstance(value, list):
        for at, item in enumerate(value):
            yield from misfits(item, fields[0], f"{where}[{at}]")
    elif type(value) is not fields:  # a bool is an int to Python, and not to Kubernetes
        yield f"{where}: {value!r}"


def ray_version() -> str:
    (line,) = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    return line.removeprefix("ray==")


@pytest.fixture(params=JOBS)
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load((KUBERAY / request.param).read_text())


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = document["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [document["spec"]["submitterPodTemplate"]["spec"], *(group["template"]["spec"] for group in groups)]


def test_ray_jobs_have_only_fields_that_kuberay_knows(document: dict[str, Any]) -> None:
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayJob")
    assert list(misfits(document, RAY_JOB)) == []


def test_jobs_are_told_what_the_workers_can_come_to(document: dict[str, Any]) -> None:
    cluster = document["spec"]["rayClusterSpec"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    (group,) = cluster["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus, gpus = (int(limits[name]) * group["maxReplicas"] for name in ("cpu", "nvidia.com/gpu"))
    assert {"name": "RESTORE_GROWS_TO", "value": f"CPU={cpus},GPU={gpus}"} in head["env"]


def test_a_misspelt_field_is_found(document: dict[str, Any]) -> None:
    document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 0
    document["spec"]["backoffLimit"] = "0"
    assert sorted(misfits(document, RAY_JOB)) == [
        ".spec.backoffLimit: '0'",
        ".spec.rayClusterSpec.workerGroupSpecs[0].minReplica",
    ]


def test_ray_jobs_run_our_jobs(document: dict[str, Any]) -> None:
    options = {"jobs/train.py": train.Train, "jobs/restore_bucket.py": restore_bucket.RestoreBucket}
    python, job, *arguments = shlex.split(document["spec"]["entrypoint"])
    assert python == "python"
    tyro.cli(options[job], args=arguments)
    assert yaml.safe_load(document["spec"]["runtimeEnvYAML"]).keys() == {"working_dir"}


def test_ray_jobs_scale_from_nothing_and_leave_nothing(document: dict[str, Any]) -> None:
    spec, cluster = document["spec"], document["spec"]["rayClusterSpec"]
    assert spec["shutdownAfterJobFinishes"] and spec["backoffLimit"] == 0
    assert cluster["enableInTreeAutoscaling"] and cluster["rayVersion"] == ray_version()
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["replicas"] == 0 < workers["maxReplicas"]
    gpus = [
        container["resources"]["limits"].get("nvidia.com/gpu")
        for pod in pods(document)
        for container in pod["containers"]
    ]
    assert gpus == [None, None, "1"]


def test_ray_jobs_have_no_rights_that_they_do_not_need(document: dict[str, Any]) -> None:
    assert document["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    account = yaml.safe_load((KUBERAY / "service-account.yaml").read_text())
    assert (account["kind"], account["metadata"]["name"]) == ("ServiceAccount", "restore")
    containers = [container for pod in pods(document) for container in pod["containers"]]
    for pod in pods(document):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    for container in [*containers, document["spec"]["rayClusterSpec"]["autoscalerOptions"]]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["limits"].keys() == container["resources"]["requests"].keys()
    assert [pod.get("serviceAccountName") for pod in pods(document)] == [None, "restore", "restore"]
    assert len({container["image"] for container in containers}) == 1
    assert containers[0]["image"].endswith(f":{ray_version()}")


# --- docker/Dockerfile -------------------------------------------------------------------------------------------


def instructions() -> list[list[str]]:
    text = (ROOT / "docker/Dockerfile").read_text().replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_the_image_is_of_the_ray_that_is_pinned() -> None:
    assert [words[1] for words in instructions() if words[0] == "FROM"] == [f"rayproject/ray:{ray_version()}-py311-gpu"]
    assert f"ray.__version__ == '{ray_version()}'" in (ROOT / "docker/Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(line.startswith("ray[") and f">={ray_version()[:4]}" in line for line in project["dependencies"])


def test_the_image_is_nobodys_root_and_takes_files_that_are_there() -> None:
    assert [words[1] for words in instructions() if words[0] == "USER"] == ["1000"]
    (copied,) = (
        [word for word in words[1:-1] if not word.startswith("--")] for words in instructions() if words[0] == "COPY"
    )
    sent = [
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    assert sorted(copied) == sorted(sent) and all((ROOT / name).is_file() for name in copied)
    assert {words[0] for words in instructions()} == {"FROM", "USER", "WORKDIR", "COPY", "RUN"}

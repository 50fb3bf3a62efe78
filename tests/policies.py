"""What IAM policies allow, and what the requests that a simulated AWS has had would need.

Conditions are evaluated here, since moto leaves out most of them.
"""

import fnmatch
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recorded_aws import Request

IAM = Path(__file__).parent.parent / "deploy/iam"
WORKER = [json.loads((IAM / "worker.json").read_text())]
HEAD = [*WORKER, json.loads((IAM / "head.json").read_text())]


@dataclass(frozen=True)
class Need:
    """A permission: an action on a resource, and what a condition may ask about the request."""

    action: str
    resource: str
    context: dict[str, str] = field(default_factory=dict)


def allowed(policies: list[dict[str, Any]], need: Need) -> bool:
    return any(
        statement["Effect"] == "Allow"
        and any(fnmatch.fnmatchcase(need.action, pattern) for pattern in _list(statement["Action"]))
        and any(fnmatch.fnmatchcase(need.resource, pattern) for pattern in _list(statement["Resource"]))
        and all(
            key in need.context and any(_holds(operator, need.context[key], pattern) for pattern in _list(patterns))
            for operator, keys in statement.get("Condition", {}).items()
            for key, patterns in keys.items()
        )
        for policy in policies
        for statement in policy["Statement"]
    )


def _list(element: Any) -> list[str]:
    return element if isinstance(element, list) else [element]


def _holds(operator: str, value: str, pattern: str) -> bool:
    if operator == "StringLike":
        return fnmatch.fnmatchcase(value, pattern)
    assert operator in ("StringEquals", "Bool"), f"{operator} is not known here"
    return value == pattern


def in_vain(request: Request) -> bool:
    """Whether nothing is lost when it is denied: is the folder itself an object, and is this MinIO (asks pyarrow)?"""
    folders = "/photos/raw", "/photos/packed", "/photos/restored"
    return request.method == "HEAD" and request.path in (*folders, "/$extremelyunlikelytoexist$")


def needs(request: Request) -> Iterator[Need]:
    """The permissions that a request takes. A request that is not known here is a failure of the test."""
    if request.service == "s3":
        yield from _of_s3(request)
        return
    assert request.service == "ec2", request
    yield from _of_ec2(request)


def _of_s3(request: Request) -> Iterator[Need]:
    bucket, _, key = request.path.lstrip("/").partition("/")
    here, parameters = f"arn:aws:s3:::{bucket}", request.parameters
    if not key:
        assert request.method in ("GET", "HEAD"), request
        assert request.method == "HEAD" or "list-type" in parameters, request
        yield Need("s3:ListBucket", here, {"s3:prefix": parameters["prefix"]} if "prefix" in parameters else {})
        return
    actions = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject", "POST": "s3:PutObject"}
    actions["DELETE"] = "s3:AbortMultipartUpload" if "uploadId" in parameters else "s3:DeleteObject"
    yield Need(actions[request.method], f"{here}/{key}")


def _of_ec2(request: Request) -> Iterator[Need]:
    action, parameters = request.parameters["Action"], request.parameters
    here = "arn:aws:ec2:eu-central-1:123456789012"
    tags = {parameters[name]: parameters[name.replace("Key", "Value")] for name in parameters if name.endswith(".Key")}
    if action == "RunInstances":
        context = {f"aws:RequestTag/{key}": value for key, value in tags.items()}
        context["ec2:MetadataHttpTokens"] = parameters["MetadataOptions.HttpTokens"]
        yield Need("ec2:RunInstances", f"{here}:instance/*", context)
        yield Need("ec2:CreateTags", f"{here}:instance/*", {"ec2:CreateAction": "RunInstances"})
        encrypted = parameters["BlockDeviceMapping.1.Ebs.Encrypted"]
        yield Need("ec2:RunInstances", f"{here}:volume/*", {"ec2:Encrypted": encrypted})
        for kind in ("key-pair", "network-interface", "security-group", "subnet"):
            yield Need("ec2:RunInstances", f"{here}:{kind}/x")
        yield Need("ec2:RunInstances", "arn:aws:ec2:eu-central-1::image/x")
        role = f"arn:aws:iam::123456789012:role/{parameters['IamInstanceProfile.Name']}"
        yield Need("iam:PassRole", role, {"iam:PassedToService": "ec2.amazonaws.com"})
        image = parameters["ImageId"].removeprefix("resolve:ssm:")
        yield Need("ssm:GetParameters", f"arn:aws:ssm:eu-central-1::parameter{image}")
    elif action in ("CreateTags", "TerminateInstances"):
        yield Need(f"ec2:{action}", f"{here}:instance/x", {"ec2:ResourceTag/ray-cluster-name": "restore"})
    else:
        yield Need(f"ec2:{action}", "*")

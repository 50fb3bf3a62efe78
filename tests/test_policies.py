"""deploy/iam: what head and workers may do, and what they may not."""

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import boto3
import botocore.exceptions
import moto.core
import policies
import pytest
from policies import HEAD, IAM, WORKER, Need, allowed
from recorded_aws import RecordedAWS

from restore_core import storage
from restore_core.errors import ItemError
from restore_core.lease import Lease

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

EC2 = "arn:aws:ec2:eu-central-1:123456789012"
START = {"aws:RequestTag/ray-cluster-name": "restore", "ec2:MetadataHttpTokens": "required"}


@pytest.fixture
def worker() -> "Iterator[S3Client]":
    """S3 as a worker sees it: by moto's evaluation of the policy, for each request."""
    with RecordedAWS() as aws:

        def client(service: str, *keys: str) -> "S3Client":
            return boto3.session.Session(*keys, region_name="us-east-1").client(service, endpoint_url=aws.url)

        iam, user = client("iam", "test", "test"), client("s3", "test", "test")
        trust = (IAM / "trust.json").read_text()
        role = iam.create_role(RoleName="restore-worker", AssumeRolePolicyDocument=trust)["Role"]["Arn"]
        document = (IAM / "worker.json").read_text()
        iam.put_role_policy(RoleName="restore-worker", PolicyName="photos", PolicyDocument=document)
        for bucket in ("photos", "photos-runs", "others"):
            user.create_bucket(Bucket=bucket)
            for key in ("raw/a.jpg", "restored/a.jpg", "raw-secret/a.jpg"):
                user.put_object(Bucket=bucket, Key=key, Body=b"x")
        given = client("sts", "test", "test").assume_role(RoleArn=role, RoleSessionName="worker")["Credentials"]
        keys = given["AccessKeyId"], given["SecretAccessKey"], given["SessionToken"]

        enforced = moto.core.set_initial_no_auth_action_count(0)
        yield Enforced(client("s3", *keys), enforced)


class Enforced:
    """A client whose calls moto checks against the policies."""

    def __init__(self, client: "S3Client", enforced: Callable) -> None:
        self._client, self._enforced = client, enforced

    def may(self, call: str, bucket: str, key: str = "", **arguments: object) -> bool:
        if key:
            arguments["Key"] = key
        try:
            self._enforced(getattr(self._client, call))(Bucket=bucket, **arguments)
        except botocore.exceptions.ClientError as error:
            assert error.response["Error"]["Code"] in ("AccessDenied", "403"), error
            return False
        return True


def test_a_worker_reads_inputs_writes_outputs_and_nothing_else(worker: Enforced) -> None:
    assert worker.may("get_object", "photos", "raw/a.jpg")
    assert worker.may("put_object", "photos", "restored/b.jpg", Body=b"x")
    assert worker.may("get_object", "photos", "restored/a.jpg")
    assert worker.may("delete_object", "photos", "restored/b.jpg")
    upload = "create_multipart_upload"
    assert worker.may(upload, "photos-runs", "faces/state.pt")
    assert worker.may("list_objects_v2", "photos-runs")
    assert not worker.may(upload, "photos", "raw/state.pt")
    assert not worker.may("put_object", "photos", "raw/a.jpg", Body=b"x")
    assert not worker.may("delete_object", "photos", "raw/a.jpg")
    assert not worker.may("get_object", "photos", "raw-secret/a.jpg")
    assert not worker.may("put_object", "photos", "elsewhere", Body=b"x")
    assert not worker.may("get_object", "others", "raw/a.jpg")
    assert not worker.may("put_object", "others", "restored/a.jpg", Body=b"x")
    assert not worker.may("delete_bucket", "photos")
    assert not worker.may("put_bucket_policy", "photos", Policy="{}")


@pytest.mark.parametrize(
    ("prefix", "may"),
    [
        ("raw/", True),
        ("raw/a/b", True),
        ("restored/_restore/", True),
        ("raw", False),
        ("raw-secret/", False),
        ("", False),
        (None, False),
    ],
)
def test_a_worker_lists_only_below_its_prefixes(prefix: str | None, may: bool) -> None:
    context = {} if prefix is None else {"s3:prefix": prefix}
    assert allowed(WORKER, Need("s3:ListBucket", "arn:aws:s3:::photos", context)) == may
    assert not allowed(WORKER, Need("s3:ListBucket", "arn:aws:s3:::others", context))


def test_the_lease_the_probe_and_the_ledger_need_no_more_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that S3Storage can ask for, on input and output."""
    with RecordedAWS() as aws:
        monkeypatch.setenv("AWS_ENDPOINT_URL", aws.url)
        for name, value in {"ACCESS_KEY_ID": "w", "SECRET_ACCESS_KEY": "w", "DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
        boto3.session.Session().client("s3").create_bucket(Bucket="photos")
        boto3.session.Session().client("s3").put_object(Bucket="photos", Key="raw/a.jpg", Body=b"x")
        before = len(aws.requests)
        storage.s3.s3_client.cache_clear()
        source, output = storage.open_storage("s3://photos/raw/"), storage.open_storage("s3://photos/restored/")
        source.check_readable("--input")
        output.check_writable("--output")
        with Lease(output, "_restore/lease.json", "run") as lease:
            lease.check()
            (item,) = source.list()
            output.write(item.key, source.read_version(item)[0])
            with output.create("_restore/manifest/a.parquet") as file:
                file.write(b"x")
            assert output.exists("a.jpg") and [found.key for found in output.list("_restore/manifest/")]
            output.delete("_restore/manifest/a.parquet")
        filesystem, root = output.filesystem()
        with filesystem.open_output_stream(f"{root}/run/large") as stream:
            stream.write(bytes(12 << 20))  # in parts
        storage.s3.s3_client.cache_clear()
        asked = {need for request in aws.requests[before:] for need in map(str, policies.needs(request))}
        for request in aws.requests[before:]:
            for need in policies.needs(request):
                assert allowed(WORKER, need), need
        assert any("uploadId" in request.parameters for request in aws.requests)
        assert len(asked) > 8


def test_the_head_starts_and_ends_only_machines_of_its_cluster() -> None:
    instance, theirs = f"{EC2}:instance/x", {"ec2:ResourceTag/ray-cluster-name": "another"}
    ours = {"ec2:ResourceTag/ray-cluster-name": "restore"}
    for action in ("ec2:TerminateInstances", "ec2:CreateTags"):
        assert allowed(HEAD, Need(action, instance, ours))
        assert not allowed(HEAD, Need(action, instance, theirs))
        assert not allowed(HEAD, Need(action, instance))
    assert allowed(HEAD, Need("ec2:RunInstances", instance, START))
    assert not allowed(HEAD, Need("ec2:RunInstances", instance, START | {"ec2:MetadataHttpTokens": "optional"}))
    assert not allowed(HEAD, Need("ec2:RunInstances", instance, START | {"aws:RequestTag/ray-cluster-name": "another"}))
    assert not allowed(HEAD, Need("ec2:RunInstances", f"{EC2}:volume/*", {"ec2:Encrypted": "false"}))


def test_the_head_gives_no_role_but_the_workers() -> None:
    def may_pass(role: str, service: str) -> bool:
        role = f"arn:aws:iam::123456789012:role/{role}"
        return allowed(HEAD, Need("iam:PassRole", role, {"iam:PassedToService": service}))

    assert may_pass("restore-worker", "ec2.amazonaws.com")
    assert not may_pass("restore-head", "ec2.amazonaws.com")
    assert not may_pass("administrator", "ec2.amazonaws.com")
    assert not may_pass("restore-worker", "lambda.amazonaws.com")
    for action in ("iam:CreateRole", "iam:PutRolePolicy", "ec2:AuthorizeSecurityGroupIngress", "s3:DeleteBucket"):
        assert not allowed(HEAD, Need(action, "*"))


def test_workers_have_no_say_in_machines() -> None:
    text = json.dumps(WORKER)
    assert "ec2:" not in text and "iam:" not in text and '"*"' not in text
    trust = json.loads((IAM / "trust.json").read_text())
    assert [statement["Principal"] for statement in trust["Statement"]] == [{"Service": "ec2.amazonaws.com"}]


def test_what_is_missing_is_told_from_what_is_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 itself does not, for who may list no more than prefixes."""
    with RecordedAWS(hiding=("photos",)) as aws:
        monkeypatch.setenv("AWS_ENDPOINT_URL", aws.url)
        for name, value in {"ACCESS_KEY_ID": "w", "SECRET_ACCESS_KEY": "w", "DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        boto3.session.Session().client("s3").create_bucket(Bucket="photos")
        storage.s3.s3_client.cache_clear()
        output = storage.S3Storage("photos", "restored")
        output.write("a.jpg", b"x")
        assert output.exists("a.jpg") and not output.exists("b.jpg")
        (item,) = output.list()
        output.delete("a.jpg")
        for read in (lambda: output.read("a.jpg"), lambda: output.read_version(item)):
            with pytest.raises(ItemError) as caught:
                read()
            assert caught.value.error == "vanished"
            assert caught.value.message == "cannot read s3://photos/restored/a.jpg: not found"
        storage.s3.s3_client.cache_clear()

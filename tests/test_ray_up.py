"""docs/cluster.md, typed as it stands there: a cluster comes up on a simulated AWS, works, and is gone again.

Nothing leaves this machine. AWS is moto on loopback, ssh and rsync are tests/shims.py, home folders are private, and
proxies point nowhere. What `cluster.yaml` says is run by real shells, Ray's processes are real, and so are the jobs.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import policies
import pytest
import shims
import tyro
from photos import people
from recorded_aws import RecordedAWS

from jobs import restore_bucket, train

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/cluster.md").read_text()
NOT_RUN = {
    "git": "the copy in which the guide is typed is no repository; the archive is for Kubernetes",
    "docker": "there is no Docker in the tests; tests/test_deploy.py reads docker/Dockerfile",
    "aws s3 cp": "there is no such archive in the tests",
    "kubectl": "there is no Kubernetes in the tests; tests/test_deploy.py reads deploy/kuberay",
}
"""Commands of docs/cluster.md that no test types, and why. All others are typed here."""
SMALL = {"train.py": "--device cpu --preset smoke --workers 1", "restore_bucket.py": "--device cpu --workers 1"}
"""Added to the jobs of docs/cluster.md, which are for larger machines."""


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if not line.startswith(tuple(NOT_RUN))]


@dataclass
class User:
    """Somebody with a terminal, who types what the guide says."""

    folder: Path
    environment: dict[str, str]
    dashboard: int
    """The port of the tunnel's end here, in place of 8265."""

    def __post_init__(self) -> None:
        self.transcript: list[str] = []
        self.last_job = ""
        self._shell = subprocess.Popen(
            ["bash"], cwd=self.folder, env=self.environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def types(self, command: str, expect: int = 0) -> str:
        """Run it in the one shell; what it prints."""
        assert self._shell.stdin and self._shell.stdout
        command = command.replace("localhost:8265", f"localhost:{self.dashboard}").replace("_NUMBER", self.last_job)
        started, output = time.monotonic(), ""
        self._shell.stdin.write(f"{command} </dev/null\ncode=$?; echo; echo ENDED $code\n")
        self._shell.stdin.flush()
        for line in self._shell.stdout:
            if line.startswith("ENDED "):
                break
            output += line
        self.transcript.append(f"$ {command}\n{output}({time.monotonic() - started:.1f} s)")
        assert line == f"ENDED {expect}\n", "\n".join(self.transcript)[-8000:]
        if found := re.search(r"Job 'raysubmit(_\w+)' submitted", output):
            self.last_job = found[1]
        return output

    def ends(self) -> None:
        self._shell.kill()
        self._shell.communicate()  # closes its pipes


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: Ray's sockets lie below it."""
    path = Path("/tmp") / f"ray-up-{os.getpid()}"
    path.mkdir()
    yield path
    shims.stop(path / "homes")
    shutil.rmtree(path)


def copy_of_the_repository(target: Path) -> Path:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def fill_the_bucket(endpoint: str) -> None:
    client = boto3.session.Session("test", "test", region_name="eu-central-1").client("s3", endpoint_url=endpoint)
    for key, data in people(24).items():
        client.put_object(Bucket="photos", Key=f"clean/{key}", Body=data)
    for key, data in people(4).items():
        client.put_object(Bucket="photos", Key=f"raw/{key}", Body=data)


@pytest.mark.ray
@pytest.mark.slow
def test_the_guide_from_roles_to_ray_down(folder: Path) -> None:
    with RecordedAWS(no_spot=True, hiding=("photos",)) as aws:
        settings = {
            "AWS_ENDPOINT_URL": aws.url,
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
            **dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost"),
        }
        ports = {"6379": shims.free_port(), "8265": shims.free_port()}
        for name in ("home", "tmp"):
            (folder / name).mkdir()
        own = {"AUTOSCALER_METRIC_PORT": str(shims.free_port())}
        shims.install(folder, {"homes": str(folder / "homes"), "environment": settings | own, "ports": ports})
        repository = copy_of_the_repository(folder / "repository")
        # Each is on this machine: one has to do, though Ray Data would like more.
        config = repository / "cluster.yaml"
        config.write_text(config.read_text().replace("\nmax_workers: 8", "\nmax_workers: 1"))
        user = User(
            repository,
            {
                "HOME": str(folder / "home"),
                "TMPDIR": str(folder / "tmp"),
                "USER": "somebody",
                "LANG": "C.UTF-8",
                "PATH": f"{folder}/user:{Path(sys.executable).parent}:/usr/bin:/bin",
                "PYTHONPATH": str(repository),
                "AWS_ACCESS_KEY_ID": "user",
                **settings,
            },
            shims.free_port(),
        )
        tunnel: subprocess.Popen[bytes] | None = None
        try:
            for command in commands():
                if command == "ray dashboard cluster.yaml":
                    words = [*shlex.split(command), "--port", str(user.dashboard), "--remote-port", "8265"]
                    tunnel = subprocess.Popen(
                        words, cwd=repository, env=user.environment, stdout=subprocess.DEVNULL,
                        stderr=subprocess.STDOUT, start_new_session=True,
                    )  # fmt: skip
                    wait_for_port(user.dashboard)
                    nobody_comes_in_without_the_token(user, ports)
                elif command.startswith("ray job submit"):
                    (extra,) = (extra for job, extra in SMALL.items() if job in command)
                    logs = user.types(f"{command} {extra}")
                    assert "model: s3://photos-runs/faces/mine/model" in logs or f"{len(people(4))} objects: " in logs
                elif command.startswith("ray down"):
                    the_worker_is_on_demand(aws)
                    assert "No nodes remaining." in user.types(command)
                else:
                    output = user.types(command)
                    if command == "aws s3 mb s3://photos":
                        fill_the_bucket(aws.url)
        finally:
            if tunnel:
                os.killpg(tunnel.pid, signal.SIGKILL)
                tunnel.wait()
            user.ends()
            print("\n".join(user.transcript))  # shown when the test fails, and by pytest -rP
        assert output.strip() == "[]", "an instance is left"
        only_what_the_policies_allow(aws)
        nothing_left_the_machine(folder, aws)


def test_no_command_of_the_guide_is_left_out_without_a_reason() -> None:
    blocks = "".join(re.findall(r"```sh\n(.*?)```", GUIDE, flags=re.DOTALL))
    for start in NOT_RUN:
        assert f"\n{start} " in f"\n{blocks}", "a reason without a command"
    typed = {shlex.split(line)[0].partition("=")[0] for line in commands()}
    assert typed == {"aws", "chmod", "export", "group", "python", "ray", "sed", "vpc"}


def test_the_jobs_of_the_guide_are_jobs() -> None:
    options = {"jobs/train.py": train.Train, "jobs/restore_bucket.py": restore_bucket.RestoreBucket}
    submitted = [shlex.split(line.partition(" -- python ")[2]) for line in commands() if "job submit" in line]
    assert {job for job, *_ in submitted} == options.keys()
    for job, *arguments in submitted:
        tyro.cli(options[job], args=arguments)


def wait_for_port(port: int) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.1)


def nobody_comes_in_without_the_token(user: User, ports: dict[str, int]) -> None:
    for headers, code in (({}, 401), ({"Authorization": "Bearer wrong"}, 403)):
        request = urllib.request.Request(f"http://127.0.0.1:{user.dashboard}/api/jobs/", headers=headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == code
        refused.value.close()
    address = f"127.0.0.1:{ports['6379']}"
    user.types(f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong ray status --address {address}", expect=1)
    listening = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    hosts = {
        place.split(":")[0]
        for place, _, state in listening
        if state == "0A" and int(place.split(":")[1], 16) == ports["8265"]
    }
    assert hosts == {"0100007F"}, "the dashboard listens beyond loopback"


def the_worker_is_on_demand(aws: RecordedAWS) -> None:
    asked = [request.parameters for request in aws.requests if request.parameters.get("Action") == "RunInstances"]
    head, *workers = [("spot" if "InstanceMarketOptions.MarketType" in request else "on demand") for request in asked]
    assert head == "on demand"
    assert workers == ["spot"] * 5 + ["on demand"]
    assert asked[-1]["InstanceType"] == "c7i.2xlarge", "a GPU was started, though none was asked for"


def only_what_the_policies_allow(aws: RecordedAWS) -> None:
    done = set()
    for request in aws.requests:
        policy = {"head": policies.HEAD, "worker": policies.WORKER}.get(request.access_key)
        if policy is not None and not policies.in_vain(request):
            for need in policies.needs(request):
                assert policies.allowed(policy, need), (request, need)
                done.add((request.access_key, need.action))
    assert {("head", "ec2:RunInstances"), ("head", "s3:ListBucket"), ("worker", "s3:PutObject")} <= done


def nothing_left_the_machine(folder: Path, aws: RecordedAWS) -> None:
    """Every host that was named is one that moto made up, and was reached by a stand-in."""
    calls = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    ran = {(program, host) for program, host, _ in calls}
    hosts = {host for _, host in ran} - {"user"}
    assert len(hosts) == 2
    for host in hosts:
        assert {("python3", host), ("pip", host), ("ray", host)} <= ran

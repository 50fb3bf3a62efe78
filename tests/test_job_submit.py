"""The jobs as they are used on a cluster: `ray job submit` and its kin, on a real head with token authentication.

The head has secrets in its environment, which are looked for in everything that the jobs leave behind.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import pyarrow.parquet as pq
import pytest
from fault_proxy import Fault, FaultProxy
from photos import encoded, people, write_tree
from processes import environment_without, marked, wait_for
from shims import free_port

from restore_core.pipelines import cluster

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent
PLANTED = f"planted{uuid.uuid4().hex}"
"""Part of every secret. Not to be found in this file, which goes to the workers too."""
MODEL_SEED = 1
STOP_WAIT_SECONDS = 30


# --- The head ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """A submitted job, or another command."""

    code: int
    out: str

    @property
    def id(self) -> str:
        found = re.search(r"raysubmit_\w+", self.out)
        assert found, self.out
        return found[0]


@dataclass
class Head:
    folder: Path
    """Ray's temporary one."""
    address: str
    """Of dashboard and job server."""
    port: int
    """Of the GCS."""
    token: str
    environment: dict[str, str]
    """Of the clients, as of the head itself."""
    said: list[str] = field(default_factory=list)
    """All that commands have printed."""

    def ray(self, *arguments: object, **environment: str) -> Ended:
        done = subprocess.run(
            ["ray", *map(str, arguments)], cwd=ROOT, env={**self.environment, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
        )  # fmt: skip
        self.said.append(done.stdout)
        return Ended(done.returncode, done.stdout)

    def submit(self, *arguments: object) -> Ended:
        return self.submit_as({}, *arguments)

    def submit_as(self, environment: dict[str, str], *arguments: object) -> Ended:
        """The head's agent may be some seconds late on a busy machine; Ray says then to try again."""
        until = time.monotonic() + 60
        while True:
            ended = self.ray("job", "submit", "--log-color", "false", *arguments, **environment)
            if "No available agent to submit job" not in ended.out or time.monotonic() > until:
                return ended
            time.sleep(1)

    def jobs(self, id: str = "") -> Any:
        """What the job server tells of one, or of all."""
        request = urllib.request.Request(
            f"{self.address}/api/jobs/{id}", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def status(self, id: str) -> tuple[str, int | None]:
        job = self.jobs(id)
        return job["status"], job["driver_exit_code"]

    def has_ended(self, id: str) -> bool:
        time.sleep(0.2)  # for loops that ask and ask
        return self.status(id)[0] not in ("PENDING", "RUNNING")

    def log(self, id: str, kind: str = "job-driver") -> str:
        """Of a job's own log what `ray job logs` shows, without a process for each look."""
        path = self.folder / f"session_latest/logs/{kind}-{id}.log"
        return path.read_text() if path.exists() else ""


def serves(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=5)
    except urllib.error.HTTPError:  # it asks for the token
        return True
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def proxy(moto_client: "S3Client") -> Iterator[FaultProxy]:
    with FaultProxy(moto_client.meta.endpoint_url) as between:
        yield between


@pytest.fixture(scope="module")
def head(proxy: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Started in the repository, as the literal `ray job submit -- jobs/train.py` needs it."""
    home, mark, token = tmp_path_factory.mktemp("home"), uuid.uuid4().hex, f"{PLANTED}-token-{uuid.uuid4().hex}"
    (home / "token").write_text(token)
    (home / "token").chmod(0o600)
    port, dashboard = free_port(), free_port()
    address = f"http://127.0.0.1:{dashboard}"
    environment = {
        **environment_without("RAY_", "AWS_"),
        "JOB_SUBMIT_TEST": mark,
        "HOME": str(home),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # where the fonts have been looked for already
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "token"),
        "RAY_API_SERVER_ADDRESS": address,
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS),
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": f"{PLANTED}/secret",
        "AWS_SESSION_TOKEN": f"{PLANTED}/session",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": proxy.url.replace("//", f"//user:{PLANTED}-password@"),
    }
    with tempfile.TemporaryDirectory(prefix="head", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short
        command = [
            "ray", "start", "--head", "--block", "--disable-usage-stats", "--temp-dir", folder, "--num-cpus", 3,
            "--node-ip-address", "127.0.0.1", "--port", port, "--ray-client-server-port", free_port(),
            "--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard,
            "--dashboard-agent-listen-port", free_port(), "--object-store-memory", 300_000_000,
        ]  # fmt: skip
        with (home / "head.log").open("w") as log:
            process = subprocess.Popen(
                [*map(str, command)], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_for(lambda: process.poll() is not None or serves(address), 60)
            assert process.poll() is None, (home / "head.log").read_text()
            found = Head(Path(folder), address, port, token, environment)
            wait_for(lambda: found.ray("job", "list").code == 0, 60)
            yield found
        finally:
            # SIGTERM would drain the node for half a minute.
            for pid in (process.pid, *marked(f"JOB_SUBMIT_TEST={mark}")):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def model(small_model: Callable[[int], Path]) -> Path:
    return small_model(MODEL_SEED)


@pytest.fixture(scope="module")
def packed(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By a job that Ray unpacks elsewhere, `--working-dir .`"""
    root = tmp_path_factory.mktemp("packed")
    photos = write_tree(root / "photos", people(24))
    done = head.submit(
        "--working-dir", ".", "--", "python", "jobs/pack_dataset.py", "--input", photos, "--output", root / "data",
        "--val-share", 0.3,
    )  # fmt: skip
    assert done.code == 0, done.out
    assert head.status(done.id) == ("SUCCEEDED", 0)
    assert "train: " in head.log(done.id) and "photographs of " in head.log(done.id)
    return root / "data"


# --- What a log may hold -------------------------------------------------------------------------------------------

ITS_OWN = r"""
Running entrypoint for job \w+: .*
.*INFO job_manager.py:\d+ -- Runtime env is setting up.
\[.* E \d+ \d+\] core_worker.cc:\d+: Actor with class name: 'MapWorker.* has constructor arguments in the object store.*
"""
"""Lines of Ray that nothing but Ray could leave out."""
RESTORE = r"""
\d+ objects listed, \d+ of them left to do
\d+ of \d+ done, \d+ failed, \d+\.\d images/s, about \d+ s left(, and what is not listed yet)?
\d+ objects: .*\(\d+ by earlier runs\)
failures: .*
\d+\.\d s, \d+\.\d images/s
report: .*/_restore/report.html
stopped: interrupted; the same command goes on from here
"""
TRAIN = r"""
\d+ photographs, \d+ epochs, run folder .*
epoch \d+/\d+: \d+ of \d+ photographs, \d+ samples/s, about \d+ min left
epoch \d+/\d+ at \d+ px: loss \d.*, \d+ samples/s, workers: \d+, about \d+ min left
interrupted; the same command goes on from here
model: .*
look at: .*
"""
VERIFY = r"""
\d+ \w+: .*
    .*
\d+ objects: .* outputs hashed, \d+ wrong
"""


def assert_readable(log: str, *allowed: str) -> None:
    patterns = [pattern for text in (ITS_OWN, *allowed) for pattern in text.strip("\n").splitlines()]
    strange = [line for line in log.splitlines() if not any(re.fullmatch(pattern, line) for pattern in patterns)]
    assert strange == []
    assert "\x1b" not in log and "\r" not in log


def test_what_ray_ends_itself_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """When a job is stopped, its actors are killed in the middle of something."""
    retried = "Task RestoreUnit.submit failed. There are 1 retries remaining, so the task will be retried. Error: "
    killed, lost = f"{retried}The actor is dead because it was killed by `ray.kill`.", f"{retried}Its node has died."
    for line in (killed, lost):
        cluster._print_errors({"pid": "raylet", "is_err": False, "lines": [line]}, ignore_prefix=False)
    shown = capsys.readouterr().out
    assert lost in shown and killed not in shown


# --- Every job, both ways ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_as_it_is_written_in_the_repository(head: Head, packed: Path, tmp_path: Path) -> None:
    done = head.submit(
        "--", "jobs/train.py", "--data", packed, "--storage", tmp_path, "--name", "run", "--preset", "smoke",
        "--schedule", "32:2", "--workers", 1, "--device", "cpu",
    )  # fmt: skip
    assert done.code == 0, done.out
    assert head.status(done.id) == ("SUCCEEDED", 0)
    assert (tmp_path / "run/model/model.safetensors").stat().st_size > 0
    log = head.log(done.id)
    assert_readable(log, TRAIN)
    assert re.findall(r"^epoch (\d/\d) ", log, re.MULTILINE) == ["1/2", "2/2"]
    commit = json.loads((tmp_path / "run/model/config.json").read_text())["trained"]["commit"]
    assert re.match("[0-9a-f]{40}", commit)


@pytest.mark.slow
def test_restore_and_verify(head: Head, model: Path, tmp_path: Path) -> None:
    """The one as it stands in the repository, the other from a copy of it that Ray unpacks."""
    files = {f"{number:02}.jpg": encoded(number) for number in range(12)} | {"bad.jpg": b"no photograph"}
    places = "--input", write_tree(tmp_path / "in", files), "--output", tmp_path / "out"
    done = head.submit("--", "jobs/restore_bucket.py", *places, "--model", model, "--device", "cpu", "--workers", 1)
    assert done.code == 0, done.out
    assert head.status(done.id) == ("SUCCEEDED", 0)
    log = head.log(done.id)
    assert_readable(log, RESTORE)
    assert "13 objects: 1 failed, 12 restored (0 by earlier runs)\nfailures: 1 not_an_image\n" in log
    done = head.submit("--working-dir", ".", "--", "python", "jobs/verify_bucket.py", *places)
    assert done.code == 0, done.out
    assert_readable(head.log(done.id), VERIFY)
    assert "12 outputs hashed, 0 wrong" in head.log(done.id)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [("--",), ("--working-dir", ".", "--", "python")], ids=["literal", "working-dir"])
@pytest.mark.parametrize("job", ["train", "search", "evaluate", "restore_bucket", "demo", "pack_dataset"])
def test_every_job(head: Head, packed: Path, model: Path, tmp_path: Path, job: str, prefix: tuple[str, ...]) -> None:
    photos = write_tree(tmp_path / "photos", people(6))
    options: dict[str, tuple[object, ...]] = {
        "train": ("--data", packed, "--storage", tmp_path / "o", "--preset", "smoke", "--schedule", "32:1",
                  "--workers", 1),
        "search": ("--data", packed, "--output", tmp_path / "o", "--variants", "base", "--epochs", 1, "--size", 16,
                   "--images", 8, "--batch-size", 8),
        "evaluate": ("--data", packed, "--output", tmp_path / "o", "--model", model, "--images", 2, "--sizes", 0,
                     "--workers", 1),
        "restore_bucket": ("--input", photos, "--output", tmp_path / "o", "--model", model, "--workers", 1),
        "demo": ("--output", tmp_path / "o", "--model", model),
        "pack_dataset": ("--input", photos, "--output", tmp_path / "o"),
    }  # fmt: skip
    done = head.submit(*prefix, f"jobs/{job}.py", *options[job])
    assert done.code == 0, done.out
    assert head.status(done.id) == ("SUCCEEDED", 0)
    assert any((tmp_path / "o").rglob("*.p*"))  # Parquet, PNG
    log = head.log(done.id)
    assert "\x1b" not in log and "Traceback" not in log and "INFO" not in log.split("Running entrypoint")[1]


# --- Stopped -------------------------------------------------------------------------------------------------------

MANY = 1500


def findings(head: Head, places: tuple[object, ...], report: Path) -> set[str]:
    """The kinds of what jobs/verify_bucket.py finds wrong, as a submitted job with that exit code."""
    done = head.submit("--working-dir", ".", "--", "python", "jobs/verify_bucket.py", *places, "--report", report)
    kinds = {found["finding"] for found in json.loads(report.read_text())["findings"]}
    assert head.status(done.id) == (("FAILED", 1) if kinds else ("SUCCEEDED", 0))
    assert_readable(head.log(done.id), VERIFY)
    return kinds


@pytest.mark.slow
@pytest.mark.parametrize("wait", [STOP_WAIT_SECONDS, 0])
def test_a_restore_is_stopped_and_goes_on(head: Head, model: Path, tmp_path: Path, wait: int) -> None:
    """With 0 seconds to wait Ray kills it at once: then there is no report, but the ledger is as whole."""
    pictures = [encoded(seed, 200, 200) for seed in range(20)]
    write_tree(tmp_path / "in", {f"{number:04}.jpg": pictures[number % 20] for number in range(MANY)})
    output, account = tmp_path / "out", tmp_path / "out/_restore"
    places = "--input", tmp_path / "in", "--output", output
    restore = (
        "--", "jobs/restore_bucket.py", *places, "--model", model, "--device", "cpu", "--workers", 1, "--batch-size", 8,
    )  # fmt: skip
    patience = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(wait)}})
    job = head.submit("--no-wait", "--runtime-env-json", patience, *restore).id
    wait_for(lambda: head.has_ended(job) or (" done, 0 failed, " in head.log(job) and ledger(output)), 120)
    began = time.monotonic()
    stopped = head.ray("job", "stop", job)
    seconds = time.monotonic() - began
    assert stopped.code == 0 and head.status(job)[0] == "STOPPED", head.log(job)
    assert seconds < 30
    rows = ledger(output)
    assert 0 < len(rows) < MANY and len(set(rows)) == len(rows)
    assert (account / "run.json").exists() == (account / "report.html").exists() == (wait > 0)
    log = head.log(job)
    assert_readable(log, RESTORE)
    assert re.search(r"^\d+ of 1500 done, 0 failed, \d+\.\d images/s, about \d+ s left$", log, re.MULTILINE)
    if wait:
        record = json.loads((account / "run.json").read_text())
        assert record["stopped"].startswith("interrupted") and record["statuses"] == {"restored": len(rows)}
        assert not (account / "lease.json").exists()
        assert "gracefully with SIGTERM" in head.log(job, "jobs/supervisor")
        assert log.endswith("stopped: interrupted; the same command goes on from here\n")
    print(f"{len(rows)} rows when stopped; the stop took {seconds:.1f} s")

    assert findings(head, places, tmp_path / "report.json") <= {"unaccounted", "extra"}
    done = head.submit(*restore)
    assert done.code == 0, done.out
    assert f"{MANY} objects: {MANY} restored ({len(rows)} by earlier runs)" in head.log(done.id)
    assert findings(head, places, tmp_path / "report.json") == set()


@pytest.mark.slow
def test_a_training_is_stopped_and_goes_on(head: Head, packed: Path, tmp_path: Path) -> None:
    train = (
        "--", "jobs/train.py", "--data", packed, "--storage", tmp_path, "--name", "run", "--preset", "smoke",
        "--schedule", "32:40", "--workers", 1, "--device", "cpu",
    )  # fmt: skip
    job = head.submit("--no-wait", *train).id
    wait_for(lambda: head.has_ended(job) or "epoch 6/40" in head.log(job), 120)
    began = time.monotonic()
    assert head.ray("job", "stop", job).code == 0
    assert time.monotonic() - began < 30
    assert head.status(job)[0] == "STOPPED", head.log(job)
    assert_readable(head.log(job), TRAIN)
    done = head.submit(*train)
    assert done.code == 0, done.out
    assert_readable(head.log(done.id), TRAIN)
    first, second = (re.findall(r"^epoch (\d+)/40 at", head.log(id), re.MULTILINE) for id in (job, done.id))
    # Ray Train learns of checkpoints every two seconds, so that the last epochs may be done again.
    assert 1 < int(second[0]) <= int(first[-1]) + 1 and second[-1] == "40"
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, 41))


def ledger(output: Path) -> list[str]:
    files = (output / "_restore/manifest").glob("*.parquet")
    with suppress(FileNotFoundError):  # made one by the job meanwhile
        return [key for file in files for key in pq.read_table(file, columns=["key"])["key"].to_pylist()]
    return []


# --- Who may submit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"RAY_AUTH_TOKEN_PATH": "", "HOME": "/nowhere"}, "couldn't find an authentication token"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""}, "Unauthorized: Missing authentication token"),
        ({"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "x" * 40}, "Forbidden: Invalid authentication token"),
    ],
    ids=["no token", "no authentication", "wrong token"],
)
def test_others_are_refused(head: Head, tmp_path: Path, settings: dict[str, str], said: str) -> None:
    refused = head.submit_as(settings, "--", "touch", tmp_path / "ran")
    assert refused.code == 1 and said in refused.out
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("headers", "code"), [({}, 401), ({"Authorization": "Bearer " + "x" * 40}, 403)])
def test_the_job_server_itself_refuses_others(head: Head, headers: dict[str, str], code: int) -> None:
    data = json.dumps({"entrypoint": "true"}).encode()
    for path, body in (("/api/jobs/", data), ("/api/jobs/", None), ("/api/cluster_status", None), ("/logs", None)):
        request = urllib.request.Request(head.address + path, body, {"Content-Type": "application/json", **headers})
        with pytest.raises(urllib.error.HTTPError, match=f"HTTP Error {code}"):
            urllib.request.urlopen(request)


# --- Secrets -------------------------------------------------------------------------------------------------------


def test_no_secret_is_left_anywhere(
    head: Head, proxy: FaultProxy, s3: str, moto_client: "S3Client", model: Path, tmp_path: Path
) -> None:
    """Of jobs that work, fail and are refused, in all that they and Ray have printed and written."""
    for number in range(3):
        moto_client.put_object(Bucket="photos", Key=f"raw/{number}.jpg", Body=encoded(number))
    moto_client.put_object(Bucket="photos", Key="raw/denied.jpg", Body=encoded(4))
    moto_client.put_object(Bucket="photos", Key="raw/broken.jpg", Body=b"no photograph")
    proxy.set(Fault(kind="denied", method="GET", key="photos/raw/denied.jpg"))
    options = "--model", model, "--device", "cpu", "--workers", 1

    def restore(input: str, output: object, command: object = "jobs/restore_bucket.py") -> Ended:
        return head.submit("--", command, "--input", input, "--output", output, *options)

    done = restore("s3://photos/raw", "s3://photos/out")
    assert head.status(done.id) == ("SUCCEEDED", 0), done.out
    log = head.log(done.id)
    assert "failures: 1 denied, 1 not_an_image" in log
    assert_readable(log, RESTORE)
    done = restore("s3://not-there/raw", tmp_path / "out")
    assert head.status(done.id) == ("FAILED", 2) and done.code == 1  # Ray's own, whatever the job's was
    line = "error: --input s3://not-there/raw: no such bucket; check the bucket's name\n"
    message = head.jobs(done.id)["message"]
    assert "failed with exit code 2" in message and message.endswith(line)
    assert "failed with exit code 2" in done.out and line in done.out
    # What follows the job's name is in Ray's record of it; an environment of one's own is not.
    script = tmp_path / "elsewhere"
    script.write_text(
        f"#!/bin/sh\nexport AWS_ENDPOINT_URL=http://user:{PLANTED}-password@127.0.0.1:{free_port()}\n"
        'exec jobs/restore_bucket.py "$@"\n'
    )
    script.chmod(0o755)
    done = restore("s3://photos/raw", tmp_path / "out", script)
    assert head.status(done.id) == ("FAILED", 2), done.out
    assert re.search(
        r"^error: --input s3://photos/raw: Could not connect .*//127.0.0.1:\d+/photos", done.out, re.MULTILINE
    )
    proxy.set()

    for item in moto_client.list_objects_v2(Bucket="photos", Prefix="out/")["Contents"]:
        body = moto_client.get_object(Bucket="photos", Key=item["Key"])["Body"].read()
        write_tree(tmp_path / "from-s3", {item["Key"]: body})
    names = {path.name for path in (tmp_path / "from-s3").rglob("*")}
    assert names >= {"run.json", "report.html", "manifest"}
    write_tree(tmp_path / "printed", {f"{number}": text.encode() for number, text in enumerate(head.said)})
    places = (tmp_path / "from-s3", tmp_path / "printed", head.folder)
    files = [path for place in places for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 50
    assert [path for path in files if PLANTED.encode() in path.read_bytes()] == []
    tables = (tmp_path / "from-s3/out/_restore/manifest").glob("*.parquet")  # compressed, perhaps
    assert PLANTED not in str([pq.read_table(path).to_pylist() for path in tables])
    assert PLANTED not in json.dumps(head.jobs())

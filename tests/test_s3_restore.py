"""The restore job on S3 behind `FaultProxy`: whatever happens there, each object has one row and the right bytes.

What the job has written is compared with a run without faults, and proven by jobs/verify_bucket.py.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_proxy import Fault, FaultProxy, Kind
from photos import encoded

from restore_core import manifest
from restore_core.manifest import Row
from restore_core.storage import LocalStorage

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent
JOBS = """
import contextlib, importlib, io, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from jobs import command_line, restore_bucket, verify_bucket
from restore_core.storage.s3 import s3_client
classes = {"restore_bucket": restore_bucket.RestoreBucket, "verify_bucket": verify_bucket.VerifyBucket}
for line in sys.stdin:
    settings, job, arguments = json.loads(line)
    if any(os.environ.get(name) != value for name, value in settings.items()):
        import ray
        ray.shutdown()  # workers have the variables of when it was started
        os.environ.update(settings)
    s3_client.cache_clear()
    sys.argv = [job + ".py", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command_line.run(importlib.import_module("jobs." + job).main, classes[job])
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=answers, flush=True)
"""
"""Runs jobs one after the other in a process with a Ray of its own, whose workers know the proxy alone."""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@dataclass
class Jobs:
    process: "subprocess.Popen[str]"
    model: Path
    settings: dict[str, str]

    def run(self, job: str, *arguments: object, **settings: str) -> Result:
        assert self.process.stdin and self.process.stdout
        order = [{**self.settings, **settings}, job, [str(argument) for argument in arguments]]
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return Result(*json.loads(self.process.stdout.readline()))

    def restore(self, input: object, output: object, *arguments: object, **settings: str) -> Result:
        return self.run(
            "restore_bucket", "--input", input, "--output", output, "--model", self.model, "--device", "cpu",
            "--workers", 2, "--batch-size", 4, *arguments, **settings,
        )  # fmt: skip

    def findings(self, input: object, output: object, report: Path, **settings: str) -> list[dict[str, str]]:
        result = self.run("verify_bucket", "--input", input, "--output", output, "--report", report, **settings)
        assert result.code in (0, 1), result.err
        return list(json.loads(report.read_text())["findings"])


@pytest.fixture(scope="module")
def only_proxy(moto_client: "S3Client") -> Iterator[FaultProxy]:
    with FaultProxy(moto_client.meta.endpoint_url, newlines=True) as between:
        yield between


@pytest.fixture
def proxy(s3: str, only_proxy: FaultProxy) -> Iterator[FaultProxy]:
    yield only_proxy
    only_proxy.set()
    only_proxy.keys_a_page = None


@pytest.fixture(scope="module")
def jobs(
    only_proxy: FaultProxy, small_model: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Jobs]:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_CONFIG_FILE", "AWS_REGION"):
        assert name not in os.environ
    settings = {
        "AWS_ENDPOINT_URL": only_proxy.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    log = tmp_path_factory.mktemp("jobs") / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", JOBS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            cwd=ROOT, env={**os.environ, **settings},
        )  # fmt: skip
    try:
        yield Jobs(process, small_model(1), settings)
    finally:
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        process.wait(timeout=120)


def fill(client: "S3Client", files: dict[str, bytes], prefix: str = "raw/") -> None:
    for key, data in files.items():
        client.put_object(Bucket="photos", Key=prefix + key.replace("\n", "\ue00a"), Body=data)


def stored(client: "S3Client", prefix: str) -> dict[str, bytes]:
    """What lies there, asked without the proxy, but for the jobs' own folder."""
    found = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="photos", Prefix=prefix):
        for item in page.get("Contents", []):
            key = item["Key"].removeprefix(prefix).replace("\ue00a", "\n")
            if not key.startswith("_restore/"):
                found[key] = client.get_object(Bucket="photos", Key=item["Key"])["Body"].read()
    return found


def ledger(client: "S3Client", prefix: str) -> dict[str, Row]:
    """The ledger's rows by key, in whatever files they stand; no key has two."""
    place = f"{prefix}_restore/manifest/"
    tables = [
        pq.read_table(pa.BufferReader(client.get_object(Bucket="photos", Key=item["Key"])["Body"].read()))
        for item in client.list_objects_v2(Bucket="photos", Prefix=place).get("Contents", [])
    ]
    rows = manifest.rows_of(pa.concat_tables(tables))
    assert len({row.key for row in rows}) == len(rows), "a key has two rows"
    return {row.key: row for row in rows}


def assert_closed(client: "S3Client", prefix: str, keys: set[str]) -> dict[str, Row]:
    """One row a key, no other; what is not failed is there and hashes to its row; nothing else is; nothing leaks."""
    rows, written = ledger(client, prefix), stored(client, prefix)
    assert rows.keys() == keys
    assert {key: hashlib.sha256(data).hexdigest() for key, data in written.items()} == {
        row.output_key: row.output_sha256 for row in rows.values() if row.status != "failed"
    }
    assert not client.list_multipart_uploads(Bucket="photos").get("Uploads")
    assert not client.list_objects_v2(Bucket="photos", Prefix=f"{prefix}_restore/lease").get("Contents")
    return rows


def failures(rows: dict[str, Row]) -> dict[str, str | None]:
    return {key: row.error for key, row in rows.items() if row.status == "failed"}


# --- Faults of single objects --------------------------------------------------------------------------------------


@pytest.mark.faults
def test_faults_of_single_objects(proxy: FaultProxy, moto_client: "S3Client", jobs: Jobs, tmp_path: Path) -> None:
    files = {f"{number:02}.jpg": encoded(number) for number in range(24)}
    fill(moto_client, files)
    assert (
        jobs.restore(
            "s3://photos/raw", "s3://photos/quiet", "--storage-class", "STANDARD_IA", "--kms-key", "alias/a"
        ).code
        == 0
    )
    assert failures(assert_closed(moto_client, "quiet/", set(files))) == {}
    quiet = stored(moto_client, "quiet/")
    for item in moto_client.list_objects_v2(Bucket="photos", Prefix="quiet/")["Contents"]:
        head = moto_client.head_object(Bucket="photos", Key=item["Key"])
        assert (head["StorageClass"], head["SSEKMSKeyId"]) == ("STANDARD_IA", "alias/a"), item["Key"]
    assert "24 objects: 24 restored (24 by earlier runs)" in jobs.restore("s3://photos/raw", "s3://photos/quiet").out

    def replace() -> None:
        moto_client.put_object(Bucket="photos", Key="raw/04.jpg", Body=encoded(404))

    def delete() -> None:
        moto_client.delete_object(Bucket="photos", Key="raw/05.jpg")

    broken: tuple[Kind, ...] = ("reset", "truncated", "short", "garbled", "error", "refused", "lost_answer")
    proxy.set(
        Fault(kind="call", method="GET", key="photos/raw/04.jpg", action=replace, times=1),
        Fault(kind="call", method="GET", key="photos/raw/05.jpg", action=delete, times=1),
        Fault(kind="denied", method="GET", key="photos/raw/06.jpg"),
        Fault(kind="denied", method="PUT", key="photos/out/07.jpg"),
        *(Fault(kind=kind, method="GET", key=f"photos/raw/1{digit}.jpg", times=2) for digit, kind in enumerate(broken)),
        Fault(kind="lost_answer", method="PUT", key="photos/out/20.jpg", times=2),
        Fault(kind="error", method="PUT", key="photos/out/21.jpg", times=2),
        Fault(kind="lost_answer", method="PUT", key="photos/out/_restore/.*", share=0.3),
        Fault(kind="error", method="LIST", share=0.3),
    )
    result = jobs.restore("s3://photos/raw", "s3://photos/out")
    assert result.code == 0, result.err
    assert proxy.injected["lost_answer"] >= 5 and all(proxy.injected[kind] for kind in (*broken, "call", "denied"))
    rows = assert_closed(moto_client, "out/", set(files))
    assert failures(rows) == {"05.jpg": "vanished", "06.jpg": "denied", "07.jpg": "denied"}
    assert rows["06.jpg"].message == "cannot read s3://photos/raw/06.jpg: access denied, s3:GetObject is missing"
    assert rows["07.jpg"].message == "cannot write s3://photos/out/07.jpg: access denied, s3:PutObject is missing"
    assert "s3:GetObject" not in result.err and "Traceback" not in result.err
    written = stored(moto_client, "out/")
    untouched = files.keys() - {"04.jpg", "05.jpg", "06.jpg", "07.jpg"}
    assert {key: written[key] for key in untouched} == {key: quiet[key] for key in untouched}
    # the row of what was replaced is that of the new one
    assert rows["04.jpg"].input_sha256 == hashlib.sha256(encoded(404)).hexdigest()
    assert rows["04.jpg"].etag == moto_client.head_object(Bucket="photos", Key="raw/04.jpg")["ETag"].strip('"')
    assert jobs.findings("s3://photos/raw", "s3://photos/out", tmp_path / "report.json") == []

    proxy.set()
    assert jobs.restore("s3://photos/raw", "s3://photos/out", "--retry-failed", "denied").code == 0
    put = {key for method, key in proxy.requests if method == "PUT" and "_restore" not in key}
    assert put == {"photos/out/06.jpg", "photos/out/07.jpg"}
    rows = assert_closed(moto_client, "out/", set(files))
    assert failures(rows) == {"05.jpg": "vanished"}
    assert jobs.findings("s3://photos/raw", "s3://photos/out", tmp_path / "report.json") == []


# --- Faults everywhere ---------------------------------------------------------------------------------------------


def assert_like_a_quiet_run(
    jobs: Jobs, proxy: FaultProxy, client: "S3Client", files: dict[str, bytes], report: Path
) -> None:
    """Exactly the bytes that a run without faults writes, one row each; verified with and without the proxy between."""
    faulty, rows = stored(client, "out/"), assert_closed(client, "out/", set(files))
    assert failures(rows) == {}
    assert {row.attempt for row in rows.values()} == {1}
    proxy.set()
    assert jobs.restore("s3://photos/raw", "s3://photos/quiet").code == 0
    assert stored(client, "quiet/") == faulty
    assert f"({len(files)} by earlier runs)" in jobs.restore("s3://photos/raw", "s3://photos/out").out
    assert jobs.findings("s3://photos/raw", "s3://photos/out", report) == []
    direct = {"AWS_ENDPOINT_URL": client.meta.endpoint_url}
    assert jobs.findings("s3://photos/raw", "s3://photos/out", report, **direct) == []


@pytest.mark.faults
@pytest.mark.parametrize(("share", "count"), [(0.01, 60), (0.05, 60), (0.2, 60), (0.5, 40)])
def test_a_bucket_that_asks_to_slow_down(
    proxy: FaultProxy, moto_client: "S3Client", jobs: Jobs, tmp_path: Path, share: float, count: int
) -> None:
    # What happens is drawn from the names, and of sixty others none was asked to slow down at 1 %.
    files = {f"{number:02} of {count}.jpg": encoded(number) for number in range(count)}
    fill(moto_client, files)
    proxy.keys_a_page = 7
    proxy.set(Fault(kind="slow_down", share=share))
    result = jobs.restore("s3://photos/raw", "s3://photos/out")
    assert result.code == 0, result.err
    reads = sum(number for (method, key), number in proxy.requests.items() if method == "GET" and "/raw/" in key)
    print(f"{share:.0%}: {proxy.injected}, {sum(proxy.requests.values())} requests, {result.out}")
    assert proxy.injected["slow_down"] >= share * 2 * count / 2
    assert reads <= (count + 2 * 12) / (1 - share) * 2  # the report's samples are read once more
    assert_like_a_quiet_run(jobs, proxy, moto_client, files, tmp_path / "report.json")


@pytest.mark.faults
def test_a_bucket_where_everything_happens(
    proxy: FaultProxy, moto_client: "S3Client", jobs: Jobs, tmp_path: Path
) -> None:
    files = {f"{number:03}.jpg": encoded(number) for number in range(120)}
    fill(moto_client, files)
    kinds: tuple[Kind, ...] = ("error", "refused", "lost_answer", "reset", "truncated", "short", "garbled")
    proxy.keys_a_page = 7
    proxy.set(
        Fault(kind="slow_down", share=0.01), Fault(kind="latency", share=0.01, seconds=10),
        *(Fault(kind=kind, share=0.04) for kind in kinds),
    )  # fmt: skip
    result = jobs.restore("s3://photos/raw", "s3://photos/out")
    print(f"{proxy.injected}, {sum(proxy.requests.values())} requests, {result.out}")
    assert result.code == 0, result.err
    assert all(proxy.injected[kind] for kind in (*kinds, "latency"))
    assert proxy.requests["LIST", "photos"] > len(files) / 7
    assert_like_a_quiet_run(jobs, proxy, moto_client, files, tmp_path / "report.json")


@pytest.mark.faults
def test_parquet_of_a_bucket_where_everything_happens(
    proxy: FaultProxy, moto_client: "S3Client", jobs: Jobs, tmp_path: Path
) -> None:
    """Read by Arrow, written by boto3."""
    images = [encoded(number, 120, 160) for number in range(60)]
    file = pa.BufferOutputStream()
    keys = [f"{number:02}" for number in range(60)]
    pq.write_table(pa.table({"key": keys, "image": images}), file, row_group_size=10)
    fill(moto_client, {"a.parquet": file.getvalue().to_pybytes()})
    kinds: tuple[Kind, ...] = ("slow_down", "error", "refused", "lost_answer", "reset", "truncated", "short")
    proxy.set(*(Fault(kind=kind, share=0.06) for kind in kinds))
    put = "--storage-class", "STANDARD_IA", "--kms-key", "alias/a"
    result = jobs.restore("s3://photos/raw", "s3://photos/out", *put)
    print(f"{proxy.injected}, {sum(proxy.requests.values())} requests, {result.out}")
    assert result.code == 0, result.err
    assert proxy.injected.total() > 20 and all(proxy.injected[kind] for kind in ("slow_down", "error", "reset"))
    rows, faulty = ledger(moto_client, "out/"), stored(moto_client, "out/")
    assert sorted(rows) == keys and failures(rows) == {}
    for item in moto_client.list_objects_v2(Bucket="photos", Prefix="out/a")["Contents"]:
        head = moto_client.head_object(Bucket="photos", Key=item["Key"])
        assert (head["StorageClass"], head["SSEKMSKeyId"]) == ("STANDARD_IA", "alias/a"), item["Key"]
    proxy.set()
    assert jobs.restore("s3://photos/raw", "s3://photos/quiet").code == 0
    assert sorted(faulty) == [f"a-{group:05}.parquet" for group in range(6)]
    assert stored(moto_client, "quiet/") == faulty
    assert not moto_client.list_multipart_uploads(Bucket="photos").get("Uploads")
    assert jobs.findings("s3://photos/raw", "s3://photos/out", tmp_path / "report.json") == []


# --- Access --------------------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize(
    ("method", "key", "said"),
    [
        ("GET", "photos/raw/.*", r"cannot read s3://photos/raw/\d+.jpg: access denied, s3:GetObject is missing"),
        ("PUT", r"photos/out/\d.*", r"cannot write s3://photos/out/\d+.jpg: access denied, s3:PutObject is missing"),
    ],
)
def test_work_that_is_all_denied_is_stopped(
    proxy: FaultProxy, moto_client: "S3Client", jobs: Jobs, method: str, key: str, said: str
) -> None:
    files = {f"{number:03}.jpg": encoded(number) for number in range(160)}
    fill(moto_client, files)
    proxy.set(Fault(kind="denied", method=method, key=key))
    result = jobs.restore("s3://photos/raw", "s3://photos/out")
    assert result.code == 1, result.err
    line = next(line for line in result.out.splitlines() if line.startswith("stopped: "))
    assert re.match(
        rf"stopped: access was denied to each of the first \d+ objects \(the last: {said}\); \d+ were", line
    )
    assert line.endswith("mend the cause, then start again with --retry-failed all")
    rows = assert_closed(moto_client, "out/", set(ledger(moto_client, "out/")))
    assert 100 <= len(rows) < 140 and set(failures(rows).values()) == {"denied"} and len(failures(rows)) == len(rows)
    proxy.set()
    assert jobs.restore("s3://photos/raw", "s3://photos/out", "--retry-failed", "all").code == 0
    assert failures(assert_closed(moto_client, "out/", set(files))) == {}


@pytest.mark.faults
def test_a_token_that_expires_ends_the_run_and_the_next_goes_on(
    proxy: FaultProxy, moto_client: "S3Client", jobs: Jobs, tmp_path: Path
) -> None:
    files = {f"{number:03}.jpg": encoded(number) for number in range(60)}
    fill(moto_client, files)
    proxy.set(Fault(kind="expired", credential="OLD", after=70))
    result = jobs.restore("s3://photos/raw", "s3://photos/out", AWS_ACCESS_KEY_ID="OLD")
    assert result.code == 2
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert "the credentials have expired; renew them, and the same command goes on" in line
    assert "Traceback" not in result.err
    assert 0 < len(stored(moto_client, "out/")) < 60, "it was not in the middle"
    # which it could not give back; a command's would be taken over at once, but this process lives on
    moto_client.delete_object(Bucket="photos", Key="out/_restore/lease.json")
    result = jobs.restore("s3://photos/raw", "s3://photos/out", AWS_ACCESS_KEY_ID="NEW")
    assert result.code == 0, result.err
    assert_like_a_quiet_run(jobs, proxy, moto_client, files, tmp_path / "report.json")


@pytest.mark.faults
def test_a_token_that_expires_says_nothing_of_the_objects(
    proxy: FaultProxy, moto_client: "S3Client", jobs: Jobs, tmp_path: Path
) -> None:
    """The ledger can be written here, on a disk; what could not be read has no row, and the same command goes on."""
    files = {f"{number:03}.jpg": encoded(number) for number in range(60)}
    fill(moto_client, files)
    proxy.set(Fault(kind="expired", credential="OLD", after=30))
    result = jobs.restore("s3://photos/raw", tmp_path / "out", AWS_ACCESS_KEY_ID="OLD")
    assert result.code == 1, result.err
    (line,) = [line for line in result.out.splitlines() if line.startswith("stopped: ")]
    expected = r"stopped: cannot read s3://photos/raw/\d+.jpg: the credentials have expired; renew them, and the same "
    assert re.fullmatch(rf"{expected}command goes on \(node .+\); \d+ were left alone", line)
    rows = manifest.rows_of(manifest.Ledger(LocalStorage(tmp_path / "out"), "test").latest())
    assert 0 < len(rows) < 60, "it was not in the middle"
    assert not [row for row in rows if row.error]
    result = jobs.restore("s3://photos/raw", tmp_path / "out", AWS_ACCESS_KEY_ID="NEW")
    assert result.code == 0, result.err
    rows = manifest.rows_of(manifest.Ledger(LocalStorage(tmp_path / "out"), "test").latest())
    assert {row.key for row in rows} == files.keys() and not [row for row in rows if row.error]


def test_an_output_that_may_not_be_written_is_refused_before_anything_is_read(
    proxy: FaultProxy, moto_client: "S3Client", jobs: Jobs
) -> None:
    fill(moto_client, {"a.jpg": encoded(1)})
    proxy.set(Fault(kind="denied", method="PUT"))
    result = jobs.restore("s3://photos/raw", "s3://photos/out")
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "error: --output s3://photos/out: cannot put s3://photos/out/_restore/probe: access denied, s3:PutObject is "
        "missing; check the credentials and their permissions\n"
    )
    assert proxy.requests["PUT", "photos/out/_restore/probe"] == 1
    assert not any(method == "GET" for method, _ in proxy.requests)


# --- Names ---------------------------------------------------------------------------------------------------------

LONGEST = ("x" * 199 + "/") * 5 + "y" * 16 + ".jpg"  # with the prefix "raw/" 1,024 bytes
NAMES = [
    " spaces .jpg", "#hash?query&amp;.jpg", "per%2Fcent%00%.jpg", "plus+ and & and =.jpg", "quote'\"`.jpg", "😀é.jpg",
    "new\nline\r.jpg", "\u202egpj.thgir\u2066.jpg", "\x1b[31mred\x07.jpg", "<script>alert(1)</script>.jpg",
    "back\\slash.jpg", "Same.jpg", "same.jpg", "SAME.JPG", "same.png", "same", "e\u0301.jpg", "é.jpg",
    "{{7*7}}.jpg", ".hidden.jpg", LONGEST,
]  # fmt: skip
NOT_ON_DISK = [
    "/leading.jpg",
    "../up.jpg",
    "../../../etc/up.jpg",
    "a//b.jpg",
    "./dot.jpg",
    "trailing.jpg/",
    "z/../z.jpg",
]
NO_PHOTOGRAPHS = ["Thumbs.db", ".DS_Store", "\x1b[31m\u202e<img src=x onerror=alert(1)>\n.txt"]


def test_hostile_names(proxy: FaultProxy, moto_client: "S3Client", jobs: Jobs, tmp_path: Path) -> None:
    assert len(f"raw/{LONGEST}") == 1024
    files = {name: encoded(seed) for seed, name in enumerate(NAMES + NOT_ON_DISK)}
    files |= dict.fromkeys(NO_PHOTOGRAPHS, b"no photograph")
    fill(moto_client, {**files, "folder/": b"", "a/": b""})
    keys = {"raw/" + name.replace("\n", "\ue00a") for name in (*files, "folder/", "a/")}
    listed = moto_client.list_objects_v2(Bucket="photos", Prefix="raw/")["Contents"]
    assert {item["Key"] for item in listed} == keys, "the server has changed a name"

    def replace() -> None:
        moto_client.put_object(Bucket="photos", Key="raw/same", Body=encoded(404))

    proxy.set(
        Fault(kind="call", method="GET", key="photos/raw/same", action=replace, times=1),
        Fault(kind="short", method="GET", key="photos/raw/Same.jpg", times=2),
        Fault(kind="denied", method="PUT", key="photos/out/same.png"),
    )
    result = jobs.restore("s3://photos/raw", "s3://photos/out")
    assert result.code == 0, result.err
    assert proxy.injected == {"call": 1, "short": 2, "denied": 1}
    rows = assert_closed(moto_client, "out/", set(files))
    assert failures(rows) == {**dict.fromkeys(NO_PHOTOGRAPHS, "not_an_image"), "same.png": "denied"}
    assert rows["same"].etag == moto_client.head_object(Bucket="photos", Key="raw/same")["ETag"].strip('"')
    assert len(set(stored(moto_client, "out/").values())) == len(files) - 4, "two have the same bytes: a collision"
    page = moto_client.get_object(Bucket="photos", Key="out/_restore/report.html")["Body"].read().decode()
    for text in (result.out, result.err):
        # Ray colours its own lines, but none red
        assert not any(steering in text for steering in ("\x1b[31m", "\x07", "\u202e")), text
    assert "<script" not in page and "<img src=x" not in page and "49.jpg" not in page
    assert jobs.findings("s3://photos/raw", "s3://photos/out", tmp_path / "report.json") == []

    files["same"] = encoded(404)
    around, disk = tmp_path / "around", tmp_path / "around/deep/out"
    result = jobs.restore("s3://photos/raw", disk)
    assert result.code == 0, result.err
    place = LocalStorage(disk)
    written = {item.key: place.read(item.key) for item in place.list() if not item.key.startswith("_restore/")}
    assert written.keys() == set(NAMES)
    on_s3 = stored(moto_client, "out/")
    assert {name: written[name] for name in NAMES if name != "same.png"} == {
        name: on_s3[name] for name in NAMES if name != "same.png"
    }
    assert [path for path in around.rglob("*") if path.is_file() and not path.is_relative_to(disk)] == []
    rows = {
        row.key: row for path in (disk / "_restore/manifest").iterdir() for row in manifest.rows_of(pq.read_table(path))
    }
    assert rows.keys() == set(files)
    assert failures(rows) == {**dict.fromkeys(NO_PHOTOGRAPHS, "not_an_image"), **dict.fromkeys(NOT_ON_DISK, "write")}
    assert jobs.restore(disk, "s3://photos/back").code == 0
    assert failures(assert_closed(moto_client, "back/", set(NAMES))) == {}
    for name in NOT_ON_DISK:
        message = str(rows[name].message)
        assert "\n" not in message and "not allowed in the local folder" in message

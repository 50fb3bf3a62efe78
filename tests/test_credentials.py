"""Credentials of every kind that AWS's standard chain has: they sign what driver and workers ask for, and no others do.

Between the tests and the S3 server is a proxy that denies every request signed with another access key.
"""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_proxy import Fault, FaultProxy
from photos import encoded
from processes import environment_without

from restore_core.storage import S3Storage
from restore_core.storage.s3 import s3_client

if TYPE_CHECKING:
    from collections.abc import Callable

    from mypy_boto3_s3 import S3Client

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("profile", "web identity", "instance role")
SECRET = "the-secret"


class InstanceMetadata:
    """What EC2 answers at 169.254.169.254 (IMDSv2): credentials of the instance's role, other ones each time."""

    def __init__(self) -> None:
        self.given = 0
        self.refused: Counter[str] = Counter()
        """Requests without a session token, as IMDSv1 had them."""
        metadata = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self._answer(b"session" if self.path == "/latest/api/token" else None)

            def do_GET(self) -> None:
                folder = "/latest/meta-data/iam/security-credentials/"
                if self.headers.get("x-aws-ec2-metadata-token") != "session":
                    metadata.refused[self.path] += 1
                    self._answer(None, 401)
                elif self.path == folder:
                    self._answer(b"restorer")
                elif self.path == folder + "restorer":
                    metadata.given += 1
                    now = datetime.now(UTC)
                    answer = {
                        "Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": f"ROLE{metadata.given:06}",
                        "SecretAccessKey": SECRET, "Token": SECRET, "LastUpdated": f"{now:%Y-%m-%dT%H:%M:%SZ}",
                        "Expiration": f"{now + timedelta(hours=6):%Y-%m-%dT%H:%M:%SZ}",
                    }  # fmt: skip
                    self._answer(json.dumps(answer).encode())
                else:
                    self._answer(None)

            def _answer(self, body: bytes | None, code: int = 404) -> None:
                self.send_response(code if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator["InstanceMetadata"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


@pytest.fixture
def proxy(s3: str) -> Iterator[FaultProxy]:
    s3_client.cache_clear()
    with FaultProxy(s3) as between:
        yield between
    s3_client.cache_clear()


@pytest.fixture
def metadata() -> Iterator[InstanceMetadata]:
    with InstanceMetadata().running() as metadata:
        yield metadata


@pytest.fixture(params=KINDS)
def settings(request: pytest.FixtureRequest, s3: str, proxy: FaultProxy, tmp_path: Path) -> dict[str, str]:
    """The AWS_* variables with credentials of one kind; requests that are signed with others are denied."""
    common = {"AWS_ENDPOINT_URL": proxy.url, "AWS_DEFAULT_REGION": "us-east-1"}
    if request.param == "profile":
        (tmp_path / "config").write_text(
            f"[profile archive]\naws_access_key_id = PROFILE\naws_secret_access_key = {SECRET}\nregion = us-east-1\n"
        )
        own, key = {"AWS_PROFILE": "archive", "AWS_CONFIG_FILE": str(tmp_path / "config")}, "PROFILE"
    elif request.param == "web identity":
        (tmp_path / "token").write_text(SECRET)
        role = {"AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/restorer"}
        own = role | {"AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"), "AWS_ENDPOINT_URL_STS": s3}
        key = "ASIA"  # what STS gives begins so
    else:
        metadata: InstanceMetadata = request.getfixturevalue("metadata")
        own, key = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url, "AWS_EC2_METADATA_DISABLED": "false"}, "ROLE"
    proxy.set(Fault(kind="denied", credential=f"(?!{key}).*"))
    return common | own


def use(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    s3_client.cache_clear()


def test_objects_and_parquet(settings: dict[str, str], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    use(settings, monkeypatch)
    place = S3Storage("photos", "data")
    place.write("a.jpg", b"a")
    assert [(item.key, place.read(item.key)) for item in place.list()] == [("a.jpg", b"a")]
    filesystem, root = place.filesystem()
    packed = pickle.dumps(filesystem)
    assert SECRET.encode() not in packed and len(packed) < 500
    filesystem = pickle.loads(packed)
    table = pa.table({"key": ["a", "b"]})
    pq.write_table(table, f"{root}/deep/part.parquet", filesystem=filesystem)
    assert pq.read_table(f"{root}/deep", filesystem=filesystem).equals(table)
    assert proxy.injected == {}


def test_other_credentials_are_denied(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """That the tests here could fail."""
    use(settings | {"AWS_ACCESS_KEY_ID": "OTHER", "AWS_SECRET_ACCESS_KEY": "other"}, monkeypatch)
    monkeypatch.delenv("AWS_PROFILE", raising=False)  # it would win
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        filesystem, root = S3Storage("photos", "data").filesystem()
        filesystem.open_output_stream(f"{root}/a").close()


@pytest.mark.parametrize("settings", ["instance role"], indirect=True)
def test_a_filesystem_renews_credentials(
    settings: dict[str, str], proxy: FaultProxy, metadata: InstanceMetadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(settings, monkeypatch)
    filesystem, root = S3Storage("photos", "data").filesystem()
    for number in range(1, 4):
        proxy.set(Fault(kind="denied", credential=f"(?!ROLE00000{number}$).*"))
        with filesystem.open_output_stream(f"{root}/{number}") as stream:
            stream.write(b"x")
        assert metadata.given == number
        # As if hours had gone by.
        s3_client()._get_credentials()._expiry_time = datetime.now(UTC)  # type: ignore[attr-defined]
    assert not metadata.refused and proxy.injected == {}


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_and_its_workers(
    settings: dict[str, str], proxy: FaultProxy, moto_client: "S3Client", small_model: "Callable[[int], Path]",
    tmp_path: Path,
) -> None:  # fmt: skip
    """On objects through boto3, on Parquet through Arrow."""
    images = [encoded(number) for number in range(8)]
    for number, image in enumerate(images):
        moto_client.put_object(Bucket="photos", Key=f"raw/{number}.jpg", Body=image)
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"key": [str(number) for number in range(8)], "image": images}), file)
    moto_client.put_object(Bucket="photos", Key="packed/a.parquet", Body=file.getvalue().to_pybytes())
    for source in ("raw", "packed"):
        done = subprocess.run(
            [
                sys.executable, "jobs/restore_bucket.py", "--input", f"s3://photos/{source}", "--output",
                f"s3://photos/out-{source}", "--model", small_model(1), "--device", "cpu", "--workers", "1",
            ],
            cwd=ROOT, env={**environment_without("AWS_", "RAY_"), **settings}, text=True, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "8 objects: 8 restored (0 by earlier runs)" in done.stdout
        assert SECRET not in done.stdout + done.stderr
    assert proxy.injected == {}

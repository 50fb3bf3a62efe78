"""S3 as it is on a bad day: nothing is lost, doubled, taken for whole when it is not, or tried for ever.

Between the tests and the S3 server stands `FaultProxy`.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import urllib3
from botocore.response import StreamingBody
from fault_proxy import Fault, FaultProxy, Kind
from photos import people, tar_of, write_tree
from processes import wait_for

from jobs import pack_dataset
from jobs.pack_dataset import PackDataset
from restore_core import lease, storage
from restore_core.errors import ItemError, StorageError, UsageError
from restore_core.key_list import read_key_list
from restore_core.lease import Lease
from restore_core.manifest import Ledger, Row
from restore_core.sources import count_splits
from restore_core.storage import (
    LocalStorage,
    Object,
    S3Storage,
    open_storage,
    with_put_options,
)
from restore_core.storage.base import one_line

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


s3_module = storage.s3
FAULTS = pytest.mark.faults
SLOW_DOWN = pytest.param("slow_down", marks=FAULTS)  # takes its time on purpose


@pytest.fixture(scope="module")
def only_proxy(moto_client: "S3Client") -> Iterator[FaultProxy]:
    """One for all tests: making a client for another takes half a second."""
    s3_module.s3_client.cache_clear()
    with FaultProxy(moto_client.meta.endpoint_url) as between:
        yield between
    s3_module.s3_client.cache_clear()


@pytest.fixture
def proxy(s3: str, only_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of the S3 server; the AWS_* variables point there."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", only_proxy.url)
    yield only_proxy
    if only_proxy.ever["slow_down"]:  # the client has slowed down
        s3_module.s3_client.cache_clear()
    only_proxy.ever.clear()


@pytest.fixture
def other_clients(proxy: FaultProxy) -> Iterator[None]:
    """For tests that change the AWS_* variables."""
    s3_module.s3_client.cache_clear()
    yield
    s3_module.s3_client.cache_clear()


@pytest.fixture
def impatient(other_clients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and shorter rounds, for what never gets better, by a client with all its attempts left."""
    monkeypatch.setattr(s3_module, "ROUNDS", 3)
    monkeypatch.setattr(s3_module, "LONGEST_PAUSE_SECONDS", 0.01)


def content(number: int) -> bytes:
    return bytes([number % 251]) * (1000 + number)


def filled(client: "S3Client", count: int, prefix: str = "in/") -> dict[str, bytes]:
    files = {f"{number:03}.jpg": content(number) for number in range(count)}
    for key, data in files.items():
        client.put_object(Bucket="photos", Key=prefix + key, Body=data)
    return files


def stored(client: "S3Client", prefix: str) -> dict[str, bytes]:
    """What the server holds, asked without the proxy."""
    found = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="photos", Prefix=prefix):
        for item in page.get("Contents", []):
            body = client.get_object(Bucket="photos", Key=item["Key"])["Body"].read()
            found[item["Key"].removeprefix(prefix)] = body
    return found


def fails(error: str, call: object, *arguments: object) -> str:
    with pytest.raises(ItemError) as caught:
        call(*arguments)  # type: ignore[operator]
    assert caught.value.error == error
    assert "\n" not in caught.value.message
    return caught.value.message


# --- Faults that pass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "count"),
    [(0.01, 30), pytest.param(0.05, 60, marks=FAULTS), (0.2, 8), pytest.param(0.5, 20, marks=FAULTS)],
)
def test_slow_down_costs_time_and_nothing_else(
    proxy: FaultProxy, moto_client: "S3Client", share: float, count: int
) -> None:
    files = filled(moto_client, count)
    place = open_storage("s3://photos/in/")
    with proxy.injecting(Fault(kind="slow_down", share=share)):
        listed = list(place.list())

        def copy(item: Object) -> tuple[bytes, Object]:
            data, version = place.read_version(item)
            place.child("out").write(item.key, data)
            return data, version

        with ThreadPoolExecutor(8) as pool:
            copied = list(pool.map(copy, listed))
        assert proxy.injected["slow_down"] > 0 or share < 0.05
        assert max(proxy.requests.values()) <= s3_module.ATTEMPTS * s3_module.ROUNDS
        total = sum(proxy.requests.values()) - proxy.unanswered
        assert total == 2 * count + 1 + proxy.injected["slow_down"], "one request was made for nothing"
    assert {version.key: data for data, version in copied} == files
    assert [version for _, version in copied] == listed
    assert stored(moto_client, "in/out/") == files


def test_calls_are_slowed_down_with_the_server(proxy: FaultProxy) -> None:
    """Botocore's adaptive mode: exponential waits with jitter, and a rate that follows what is throttled."""
    retries = s3_module.s3_client().meta.config.retries  # type: ignore[attr-defined]
    assert (retries["mode"], retries["total_max_attempts"]) == ("adaptive", s3_module.ATTEMPTS)


def test_attempts_do_not_run_out(
    proxy: FaultProxy, moto_client: "S3Client", other_clients: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Botocore allows all requests of a client together 100 more attempts, then one alone for each."""
    monkeypatch.setattr(s3_module, "LONGEST_PAUSE_SECONDS", 0.01)
    files = filled(moto_client, 10)
    place = open_storage("s3://photos/in/")
    with proxy.injecting(Fault(kind="error", method="GET", share=0.6)), ThreadPoolExecutor(8) as pool:
        for _ in range(15):
            assert list(pool.map(place.read, files)) == list(files.values())
        assert proxy.injected["error"] > 100


@pytest.mark.parametrize("kind", ["error", "refused", "lost_answer", "reset", "truncated", "short", "garbled"])
def test_a_body_that_breaks_off_is_read_again(proxy: FaultProxy, moto_client: "S3Client", kind: Kind) -> None:
    files = filled(moto_client, 2)
    place = open_storage("s3://photos/in/")
    for item in list(place.list()):
        with proxy.injecting(Fault(kind=kind, method="GET", times=2)):
            assert place.read_version(item) == (files[item.key], item)
            assert proxy.injected == {kind: 2} and proxy.requests["GET", f"photos/in/{item.key}"] == 3


def test_a_body_whose_encryption_breaks_is_read_again(
    proxy: FaultProxy, moto_client: "S3Client", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Botocore translates most of what urllib3 raises there, and this not."""
    files, place = filled(moto_client, 1), open_storage("s3://photos/in/")
    read, times = StreamingBody.read, 2
    bodies = []

    def broken(self: StreamingBody, amt: int | None = None) -> bytes:
        nonlocal times
        times -= 1
        bodies.append(self)
        if times >= 0:
            raise urllib3.exceptions.SSLError("bad record mac")
        return read(self, amt)

    monkeypatch.setattr(StreamingBody, "read", broken)
    assert place.read("000.jpg") == files["000.jpg"]
    times = 1000
    monkeypatch.setattr(s3_module, "ROUNDS", 2)
    assert "bad record mac" in fails("read", place.read, "000.jpg")
    assert len(bodies) > 3 and all(body._raw_stream.closed for body in bodies)  # and with it the socket


def test_the_probe_is_no_photograph(proxy: FaultProxy, moto_client: "S3Client") -> None:
    moto_client.put_object(Bucket="photos", Key="out/.restore-probe", Body=b"a photograph")
    open_storage("s3://photos/out").check_writable("--output")
    assert stored(moto_client, "out/") == {".restore-probe": b"a photograph"}


@pytest.mark.parametrize("kind", [SLOW_DOWN, "error", "refused", "lost_answer"])
def test_a_put_that_fails_is_made_again(proxy: FaultProxy, moto_client: "S3Client", kind: Kind) -> None:
    with proxy.injecting(Fault(kind=kind, method="PUT|DELETE", times=2)):
        open_storage("s3://photos/in/").write("a.jpg", content(1))
        assert proxy.injected == {kind: 2}
    assert stored(moto_client, "in/") == {"a.jpg": content(1)}
    with proxy.injecting(Fault(kind=kind, method="DELETE", times=2)):
        open_storage("s3://photos/in/").delete("a.jpg")
    assert stored(moto_client, "in/") == {}


@pytest.mark.parametrize("kind", [SLOW_DOWN, "error", "refused", "reset", "truncated", "short"])
def test_a_page_that_fails_leaves_no_hole_in_the_listing(
    proxy: FaultProxy, moto_client: "S3Client", other_clients: None, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = filled(moto_client, 7)
    place = open_storage("s3://photos/in/")

    def two_keys_a_page(params: dict[str, object], **_: object) -> dict[str, object]:
        return params | {"MaxKeys": 2}

    s3_module.s3_client().meta.events.register("provide-client-params.s3.ListObjectsV2", two_keys_a_page)
    with proxy.injecting():
        assert [item.key for item in place.list()] == list(files)
        needed = proxy.requests["LIST", "photos"]
    with proxy.injecting(Fault(kind=kind, method="LIST", after=1, times=2)):
        assert [item.key for item in place.list()] == list(files)
        assert proxy.injected == {kind: 2} and proxy.requests["LIST", "photos"] == needed + 2
    monkeypatch.setattr(s3_module, "ROUNDS", 2)
    with (
        proxy.injecting(Fault(kind=kind, method="LIST", after=2)),
        pytest.raises(StorageError, match="cannot list s3://photos/in: "),
    ):
        list(place.list())


@pytest.mark.faults
def test_latency_is_waited_for(proxy: FaultProxy, moto_client: "S3Client") -> None:
    files = filled(moto_client, 8)
    place = open_storage("s3://photos/in/")
    with proxy.injecting(Fault(kind="latency", seconds=10, share=0.3)):
        started = time.monotonic()
        assert {item.key: place.read(item.key) for item in place.list()} == files
        assert place.write_if("lease.json", b"{}", None)
        assert time.monotonic() - started > 10 * proxy.injected["latency"] > 0
        assert sum(proxy.requests.values()) == 10, "it was not waited for"


# --- Faults that stay ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SLOW_DOWN, "error", "refused", "reset", "truncated", "short", "garbled"])
def test_a_read_that_never_works_ends(proxy: FaultProxy, moto_client: "S3Client", impatient: None, kind: Kind) -> None:
    filled(moto_client, 1)
    place = open_storage("s3://photos/in/")
    (item,) = place.list()
    with proxy.injecting(Fault(kind=kind, method="GET")):
        assert "cannot read s3://photos/in/000.jpg: " in fails("read", place.read_version, item)
        # botocore makes requests again, but not those whose body breaks off
        each = s3_module.ATTEMPTS if kind in ("slow_down", "error", "refused") else 1
        assert proxy.injected == {kind: each * s3_module.ROUNDS}
    if kind == "short":
        with proxy.injecting(Fault(kind=kind, method="GET")):
            message = fails("read", place.read_version, item)
        assert message == "cannot read s3://photos/in/000.jpg: 500 bytes came of 1000 that are listed"


@pytest.mark.parametrize("kind", ["truncated", "short"])
def test_a_list_of_keys_that_is_cut_short_leaves_nothing_out(
    proxy: FaultProxy, moto_client: "S3Client", impatient: None, kind: Kind
) -> None:
    files = filled(moto_client, 9)
    moto_client.put_object(Bucket="photos", Key="list.txt", Body="".join(f"{key}\n" for key in files).encode())
    place = open_storage("s3://photos/in/")
    with proxy.injecting(Fault(kind=kind, method="GET", key="photos/list.txt", times=2)):
        assert [item.key for item in read_key_list("s3://photos/list.txt", place)] == list(files)
        assert proxy.injected == {kind: 2}
    with (
        proxy.injecting(Fault(kind=kind, method="GET", key="photos/list.txt")),
        pytest.raises(UsageError, match=r"^--keys s3://photos/list.txt: cannot read s3://photos/list.txt: "),
    ):
        list(read_key_list("s3://photos/list.txt", place))


@pytest.mark.parametrize("kind", [SLOW_DOWN, "error", "refused"])
def test_a_put_that_never_works_keeps_the_old(
    proxy: FaultProxy, moto_client: "S3Client", impatient: None, kind: Kind
) -> None:
    files = filled(moto_client, 1)
    with proxy.injecting(Fault(kind=kind, method="PUT")):
        message = fails("write", open_storage("s3://photos/in/").write, "000.jpg", b"new")
        assert message.startswith("cannot write s3://photos/in/000.jpg: ")
        assert proxy.injected == {kind: s3_module.ATTEMPTS * s3_module.ROUNDS}
    assert stored(moto_client, "in/") == files
    assert not moto_client.list_multipart_uploads(Bucket="photos").get("Uploads")


def test_patience_has_an_end(proxy: FaultProxy, moto_client: "S3Client", monkeypatch: pytest.MonkeyPatch) -> None:
    filled(moto_client, 1)
    monkeypatch.setattr(s3_module, "PATIENCE_SECONDS", 0)
    with proxy.injecting(Fault(kind="error", method="GET")):
        place = S3Storage("photos", "in")
        with pytest.raises(Exception, match="InternalError"):
            s3_module._patiently(lambda client: place._get(client, "000.jpg"), 0)
        assert proxy.injected == {"error": s3_module.ATTEMPTS}


# --- Access --------------------------------------------------------------------------------------------------------


def test_a_key_that_is_denied_is_named_with_the_permission(proxy: FaultProxy, moto_client: "S3Client") -> None:
    files = filled(moto_client, 2)
    place = open_storage("s3://photos/in/")
    with proxy.injecting(Fault(kind="denied", key="photos/in/000.jpg")):
        for call, arguments, verb, permission in (
            (place.read, ("000.jpg",), "read", "GetObject"),
            (place.read_version, (next(iter(place.list())),), "read", "GetObject"),
            (place.write, ("000.jpg", b""), "write", "PutObject"),
            (place.delete, ("000.jpg",), "delete", "DeleteObject"),
        ):
            message = fails("denied", call, *arguments)
            assert message == f"cannot {verb} s3://photos/in/000.jpg: access denied, s3:{permission} is missing"
        assert proxy.injected == {"denied": 4}, "what is denied was asked for again"
        assert place.read("001.jpg") == files["001.jpg"]
    said = "User: arn:aws:iam::1:user/me is not authorized to perform: kms:GenerateDataKey on resource: arn:aws:kms:k"
    with proxy.injecting(Fault(kind="denied", message=said)):
        assert fails("denied", place.write, "a", b"").endswith("access denied, kms:GenerateDataKey is missing")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("LIST", "access denied, s3:ListBucket is missing"),
        ("PUT", "cannot put s3://photos/out/_restore/probe: access denied, s3:PutObject is missing"),
        ("GET", "cannot get s3://photos/out/_restore/probe: access denied, s3:GetObject is missing"),
        ("DELETE", "cannot delete s3://photos/out/_restore/probe: access denied, s3:DeleteObject is missing"),
    ],
)
def test_a_bucket_that_may_not_be_written_is_refused_at_once(proxy: FaultProxy, method: str, said: str) -> None:
    output = open_storage("s3://photos/out/")
    with proxy.injecting(Fault(kind="denied", method=method)):
        with pytest.raises(UsageError) as caught:
            output.check_writable("--output")
        assert str(caught.value) == f"--output s3://photos/out: {said}; check the credentials and their permissions"
        assert proxy.injected == {"denied": 1}


def test_one_object_that_is_archived_does_not_end_a_packing(
    proxy: FaultProxy, moto_client: "S3Client", tmp_path: Path
) -> None:
    for key, data in people(12).items():
        moto_client.put_object(Bucket="photos", Key=f"in/{key}", Body=data)
    with proxy.injecting(Fault(kind="archived", method="GET", key=".*Person_07_0001.jpg")):
        assert pack_dataset.main(PackDataset(input=("s3://photos/in",), output=str(tmp_path / "out"))) == 0
    (line,) = (tmp_path / "out/_pack/broken.csv").read_text().splitlines()[1:]
    assert "Person_07_0001.jpg,read," in line and "archived" in line


def test_a_bucket_that_may_not_be_listed_is_refused_at_once(proxy: FaultProxy) -> None:
    with proxy.injecting(Fault(kind="denied", method="LIST")):
        with pytest.raises(UsageError, match="--input s3://photos/raw: access denied, s3:ListBucket is missing; check"):
            S3Storage("photos", "raw").check_readable("--input")
        assert proxy.injected == {"denied": 1}
        with pytest.raises(StorageError, match="cannot list s3://photos/raw: access denied, s3:ListBucket is missing"):
            list(S3Storage("photos", "raw").list())


def test_the_probe_leaves_nothing_and_bears_faults(proxy: FaultProxy, moto_client: "S3Client") -> None:
    moto_client.put_object(Bucket="photos", Key="raw/a.jpg", Body=b"x")
    with proxy.injecting(Fault(kind="error", share=0.5)):
        assert open_storage("s3://photos/raw/a.jpg").only == "a.jpg"
        open_storage("s3://photos/raw/").check_readable("--input")
        open_storage("s3://photos/out/").check_writable("--output")
        assert proxy.injected["error"] > 2
    assert stored(moto_client, "").keys() == {"raw/a.jpg"}


def test_an_expired_token_is_denied_and_named(proxy: FaultProxy, moto_client: "S3Client") -> None:
    files = filled(moto_client, 3)
    place = open_storage("s3://photos/in/")
    assert place.read("000.jpg") == files["000.jpg"]
    with proxy.injecting(Fault(kind="expired", after=1)):
        assert place.read("001.jpg") == files["001.jpg"]
        message = fails("denied", place.read, "002.jpg")
        renew = "the credentials have expired; renew them, and the same command goes on"
        assert message == f"cannot read s3://photos/in/002.jpg: {renew}"
        assert proxy.injected == {"expired": 2}, "looked up once more, and no more"
        with pytest.raises(UsageError, match="the credentials have expired; renew them"):
            place.check_writable("--output")


def test_credentials_that_were_renewed_meanwhile_are_found(
    proxy: FaultProxy, moto_client: "S3Client", other_clients: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = filled(moto_client, 12)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))

    def sign_in(name: str) -> None:
        section = f"[default]\naws_access_key_id = {name}\naws_secret_access_key = x\naws_session_token = y\n"
        (tmp_path / "credentials").write_text(section)

    sign_in("OLD")
    place = open_storage("s3://photos/in/")
    with proxy.injecting(Fault(kind="expired", credential="OLD", after=4)):
        assert [place.read(key) for key in list(files)[:4]] == list(files.values())[:4]
        sign_in("NEW")
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(place.read, list(files)[4:])) == list(files.values())[4:]
        assert proxy.injected["expired"] >= 1


# --- Replaced and deleted ------------------------------------------------------------------------------------------


def test_a_row_names_the_version_that_was_read(proxy: FaultProxy, moto_client: "S3Client") -> None:
    filled(moto_client, 1)
    place = open_storage("s3://photos/in/")
    (item,) = place.list()

    def replace() -> None:
        moto_client.put_object(Bucket="photos", Key="in/000.jpg", Body=b"another photograph")

    with proxy.injecting(Fault(kind="call", method="GET", times=1, action=replace)):
        data, version = place.read_version(item)
        assert proxy.injected == {"call": 1}
    (now,) = place.list()
    assert (data, version) == (b"another photograph", now) and now != item

    # also where the new one's body breaks off with the length of what came
    with proxy.injecting(Fault(kind="short", method="GET", times=1)):
        assert place.read_version(item) == (b"another photograph", now)
        assert proxy.injected == {"short": 1}


def test_what_is_replaced_again_and_again_is_not_waited_for(proxy: FaultProxy, moto_client: "S3Client") -> None:
    filled(moto_client, 1)
    place = open_storage("s3://photos/in/")
    (item,) = place.list()
    numbers = iter(range(1000, 2000))

    def replace() -> None:
        moto_client.put_object(Bucket="photos", Key="in/000.jpg", Body=content(next(numbers)))

    with proxy.injecting(Fault(kind="call", method="GET|LIST", action=replace)):
        assert "replaced again and again" in fails("read", place.read_version, item)
        assert proxy.requests["GET", "photos/in/000.jpg"] == s3_module.VERSION_TRIES


def test_what_is_deleted_has_vanished(proxy: FaultProxy, moto_client: "S3Client") -> None:
    filled(moto_client, 1)
    place = open_storage("s3://photos/in/")
    (item,) = place.list()

    def delete() -> None:
        moto_client.delete_object(Bucket="photos", Key="in/000.jpg")

    with proxy.injecting(Fault(kind="call", method="GET", action=delete)):
        assert fails("vanished", place.read_version, item).startswith("cannot read s3://photos/in/000.jpg: ")
    # replaced before it was read, and deleted after
    filled(moto_client, 1)
    with proxy.injecting(Fault(kind="call", method="LIST", action=delete)):
        old = Object("000.jpg", 5, "another version")
        assert "deleted since it was listed" in fails("vanished", place.read_version, old)


def test_a_local_file_that_was_replaced(tmp_path: Path) -> None:
    folder = LocalStorage(tmp_path)
    folder.write("a.jpg", b"old")
    (item,) = folder.list()
    assert folder.read_version(item) == (b"old", item)
    folder.write("a.jpg", b"newer")
    (now,) = folder.list()
    assert folder.read_version(item) == (b"newer", now) and now != item
    folder.delete("a.jpg")
    fails("vanished", folder.read_version, item)


# --- The lease and the ledger --------------------------------------------------------------------------------------


def test_a_conditional_write_knows_its_own(proxy: FaultProxy, moto_client: "S3Client") -> None:
    """It succeeds, the answer is lost, it is made again, and the condition no longer holds: by its own doing."""
    place = open_storage("s3://photos/out/")
    with proxy.injecting(Fault(kind="lost_answer", method="PUT", times=1)):
        first = place.write_if("lease.json", b"one", None)
    (item,) = place.list()
    assert first == item.etag
    with proxy.injecting(Fault(kind="lost_answer", method="PUT", times=1)):
        second = place.write_if("lease.json", b"two", first)
    (item,) = place.list()
    assert second == item.etag != first
    with proxy.injecting(Fault(kind="lost_answer", method="PUT", times=1)):
        assert place.write_if("lease.json", b"three", first) is None
        assert place.write_if("lease.json", b"three", None) is None
    assert place.read("lease.json") == b"two"
    place.delete("lease.json")
    assert place.write_if("lease.json", b"three", second) is None


def test_a_lease_is_kept_while_answers_are_lost(
    proxy: FaultProxy, moto_client: "S3Client", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    output = open_storage("s3://photos/out/")

    def renewed() -> float:
        body = moto_client.get_object(Bucket="photos", Key="out/lease.json")["Body"].read()
        return float(json.loads(body)["renewed"])

    faults = Fault(kind="lost_answer", method="PUT", share=0.4), Fault(kind="error", method="PUT", share=0.2)
    with proxy.injecting(*faults), Lease(output, "lease.json", "mine") as held:
        since = renewed()
        wait_for(lambda: proxy.injected["lost_answer"] >= 3 and renewed() > since)
        held.check()
        with pytest.raises(UsageError, match="another restore is at work there"):
            Lease(output, "lease.json", "other").__enter__()
    assert stored(moto_client, "out/") == {}


def test_the_ledger_loses_no_row(proxy: FaultProxy, moto_client: "S3Client") -> None:
    ledger = Ledger(open_storage("s3://photos/out/"), "run")
    kinds: tuple[Kind, ...] = ("error", "lost_answer", "refused", "reset", "truncated", "short")
    with proxy.injecting(*(Fault(kind=kind, share=0.1) for kind in kinds)):
        for first in range(0, 60, 5):
            ledger.append(
                [
                    Row(key=f"{number:02}", size=1, etag="e", model="m", options="o", run_id="run", status="restored")
                    for number in range(first, first + 5)
                ]
            )
        keys = ledger.latest()["key"].to_pylist()
        assert ledger.merge() == len(keys) and keys == [f"{number:02}" for number in range(60)]
        assert ledger.latest()["key"].to_pylist() == keys
        assert all(proxy.injected[kind] for kind in kinds)
    assert list(stored(moto_client, "out/_restore/")) == ["manifest/part-00000-run-000012.parquet"]


def test_a_ledger_that_cannot_be_read_is_one_line(proxy: FaultProxy, moto_client: "S3Client", impatient: None) -> None:
    ledger = Ledger(open_storage("s3://photos/out/"), "run")
    ledger.append([Row(key="a", size=1, etag="e", model="m", options="o", run_id="run")])
    with (
        proxy.injecting(Fault(kind="short", method="GET")),
        pytest.raises(
            StorageError, match=r"^the ledger cannot be read: cannot read s3://photos/out/_restore/manifest/"
        ),
    ):
        ledger.latest()


# --- Options of what is written ------------------------------------------------------------------------------------


def test_every_object_is_put_with_class_and_key(proxy: FaultProxy, moto_client: "S3Client") -> None:
    output = with_put_options(open_storage("s3://photos/out/"), storage_class="STANDARD_IA", kms_key="alias/archive")
    output.check_writable("--output")
    output.write("a.jpg", b"x", "image/jpeg")
    output.child("deep").write("b.jpg", b"x")
    version = output.write_if("lease.json", b"x", None)
    assert output.write_if("lease.json", b"y", version)
    Ledger(output, "run").append([Row(key="a", size=1, etag="e", model="m", options="o", run_id="run")])
    keys = list(stored(moto_client, "out/"))
    assert keys == ["_restore/manifest/run-000000.parquet", "a.jpg", "deep/b.jpg", "lease.json"]
    for key in keys:
        head = moto_client.head_object(Bucket="photos", Key=f"out/{key}")
        found = (head["StorageClass"], head["ServerSideEncryption"], head["SSEKMSKeyId"])
        assert found == ("STANDARD_IA", "aws:kms", "alias/archive"), key


def test_options_of_s3_are_refused_where_they_cannot_work(proxy: FaultProxy, tmp_path: Path) -> None:
    for place, storage_class, kms_key, said in (
        (LocalStorage(tmp_path), "STANDARD_IA", None, "--storage-class STANDARD_IA: --output /.* is not on S3"),
        (LocalStorage(tmp_path), None, "alias/a", "--kms-key alias/a: --output /.* is not on S3; leave it out"),
        (S3Storage("photos"), "DEEP_ARCHIVE", None, "--storage-class DEEP_ARCHIVE: the ledger .* could not be read"),
        (S3Storage("photos"), None, " ", "--kms-key ' ': is empty; leave it out"),
    ):
        with pytest.raises(UsageError, match=f"^{said}"):
            with_put_options(place, storage_class=storage_class, kms_key=kms_key)
    assert with_put_options(LocalStorage(tmp_path), storage_class=None, kms_key=None) == LocalStorage(tmp_path)
    wrong = with_put_options(S3Storage("photos"), storage_class="COLD", kms_key=None)
    with pytest.raises(UsageError, match=r"--output s3://photos: cannot put .*check --storage-class and --kms-key"):
        wrong.check_writable("--output")


def test_an_endpoint_with_a_name_is_asked_by_path_unless_told_otherwise(
    proxy: FaultProxy, moto_client: "S3Client", other_clients: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    filled(moto_client, 1)
    endpoint = proxy.url.replace("127.0.0.1", "localhost")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    s3_module.s3_client.cache_clear()
    assert S3Storage("photos", "in").read("000.jpg") == content(0)
    assert endpoint.removeprefix("http://") in proxy.hosts
    (tmp_path / "config").write_text("[default]\ns3 =\n    addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    s3_module.s3_client.cache_clear()
    url = s3_module.s3_client().generate_presigned_url("get_object", Params={"Bucket": "photos", "Key": "a.jpg"})
    assert url.startswith(endpoint.replace("localhost", "photos.localhost") + "/a.jpg?")


# --- Names ---------------------------------------------------------------------------------------------------------


def test_messages_do_not_steer_the_terminal() -> None:
    assert one_line("a\n b\x1b[31m\u202egpj.\x07 é😀") == "a b\\x1b[31m\\u202egpj.\\x07 é😀"


# --- Packing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault(kind="expired", method="GET", key="photos/in/.*", after=5),
        Fault(kind="reset", method="GET", key="photos/in/.*/Person_07/.*"),
        Fault(kind="truncated", method="GET", key="photos/in/lfw.tar"),
    ],
    ids=["expired", "reset", "archive"],
)
def test_a_network_that_fails_while_packing_is_no_broken_photograph(
    proxy: FaultProxy, moto_client: "S3Client", impatient: None, tmp_path: Path, fault: Fault
) -> None:
    """It ends with it; else training would go on with half of the people, and the older dataset be gone."""
    files = {"lfw.tar": tar_of(people(12))} if "tar" in fault.key else people(12)
    for key, data in files.items():
        moto_client.put_object(Bucket="photos", Key=f"in/{key}", Body=data)
    older, output = write_tree(tmp_path / "older", people(20)), tmp_path / "out"
    assert pack_dataset.main(PackDataset(input=(str(older),), output=str(output))) == 0
    before = {path.name: path.read_bytes() for path in output.glob("*.parquet")}
    job = PackDataset(input=("s3://photos/in",), output=str(output))
    with proxy.injecting(fault), pytest.raises(StorageError, match="photos/in"):
        pack_dataset.main(job)
    assert {path.name: path.read_bytes() for path in output.glob("*.parquet")} == before
    assert pack_dataset.main(job) == 0
    assert count_splits(open_storage(output)).total() == 24

"""Both storages answer alike: the same tests run on a local folder and on a real S3 endpoint (moto on loopback)."""

import functools
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import boto3
import botocore.exceptions
import botocore.stub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from restore_core import storage
from restore_core.errors import ItemError, StorageError, UsageError
from restore_core.storage import (
    LocalStorage,
    Object,
    S3Storage,
    Storage,
    open_storage,
    overlaps,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path / "photos")
    request.getfixturevalue("s3")
    return open_storage("s3://photos/raw")


def keys(place: Storage, prefix: str = "") -> list[str]:
    return [found.key for found in place.list(prefix)]


def fails(error: str, call: object, *arguments: object) -> str:
    with pytest.raises(ItemError) as caught:
        call(*arguments)  # type: ignore[operator]
    assert caught.value.error == error
    return caught.value.message


# --- both ------------------------------------------------------------------------------------------------------------


def test_write_list_read_delete(root: Storage) -> None:
    for key, data in {"b.jpg": b"b", "a/x.jpg": b"axx", "a.jpg": b"", "a/deep/er/ü n#%2F+😀.png": b"u"}.items():
        root.write(key, data, "image/jpeg")
    found = {item.key: item for item in root.list()}
    assert list(found) == sorted(found) == ["a.jpg", "a/deep/er/ü n#%2F+😀.png", "a/x.jpg", "b.jpg"]
    assert found["a/x.jpg"].size == 3 and found["a.jpg"].size == 0
    assert all(item.etag and '"' not in item.etag for item in found.values())
    assert {key: root.read(key) for key in found} == {
        "a.jpg": b"", "a/deep/er/ü n#%2F+😀.png": b"u", "a/x.jpg": b"axx", "b.jpg": b"b",
    }  # fmt: skip
    assert root.exists("a/x.jpg") and not root.exists("a/y.jpg") and not root.exists("a")
    root.delete("a/x.jpg")
    root.delete("a/x.jpg")  # a missing one is no error
    assert not root.exists("a/x.jpg")


def test_the_etag_changes_with_the_content(root: Storage) -> None:
    root.write("a.jpg", b"one")
    before = next(root.list())
    root.write("a.jpg", b"two")
    assert next(root.list()).etag != before.etag


def test_list_by_prefix_is_a_prefix_of_the_text_as_on_s3(root: Storage) -> None:
    for key in ("in/a.jpg", "in2/b.jpg", "in/sub/c.jpg", "out.jpg"):
        root.write(key, b"x")
    assert keys(root, "in/") == ["in/a.jpg", "in/sub/c.jpg"]
    assert keys(root, "in") == ["in/a.jpg", "in/sub/c.jpg", "in2/b.jpg"]
    assert keys(root, "in/s") == ["in/sub/c.jpg"]
    assert keys(root, "nothing/") == []
    assert keys(root.child("in/")) == ["a.jpg", "sub/c.jpg"]
    assert root.child("in").join("a.jpg") == root.join("in/a.jpg")


def test_a_missing_object_is_vanished_and_the_message_names_it(root: Storage) -> None:
    assert root.join("gone.jpg") in fails("vanished", root.read, "gone.jpg")


def test_pickles_without_clients_and_works_from_threads(root: Storage) -> None:
    root.write("a.jpg", b"x" * 1000)
    packed = pickle.dumps(root)
    assert len(packed) < 500 and b"test-secret" not in packed
    copy: Storage = pickle.loads(packed)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(copy.read, ["a.jpg"] * 32)) == {b"x" * 1000}


def test_filesystem_reads_and_writes_parquet(root: Storage) -> None:
    filesystem, base = root.filesystem()
    root.write("keep/me", b"")  # the folder exists
    pq.write_table(pa.table({"key": ["a", "b"]}), f"{base}/part.parquet", filesystem=filesystem)
    assert pq.read_table(f"{base}/part.parquet", filesystem=filesystem)["key"].to_pylist() == ["a", "b"]
    assert keys(root) == ["keep/me", "part.parquet"]


def test_a_single_file_is_opened_as_a_listing_of_one(root: Storage) -> None:
    root.write("sub/photo.jpg", b"one")
    root.write("sub/photo.jpg2", b"other")
    one = open_storage(root.join("sub/photo.jpg"))
    one.check_readable("--input")
    assert one.only == "photo.jpg" and keys(one) == ["photo.jpg"] and keys(one, "x") == []
    assert one.read("photo.jpg") == b"one"
    assert open_storage(root.join("sub/photo.jpg")).only == "photo.jpg" and open_storage(root.join("sub")).only is None
    with pytest.raises(UsageError, match=r"--output .*sub/photo\.jpg: is an? (file|object); name a"):
        one.check_writable("--output")


def test_preflight_accepts_a_good_place_and_creates_nothing(root: Storage) -> None:
    root.write("a.jpg", b"x")
    root.check_readable("--input")
    root.child("new/deep").check_writable("--output")
    assert keys(root) == ["a.jpg"]


def test_overlaps_at_folder_boundaries(root: Storage) -> None:
    root.write("in/a.jpg", b"x")
    inside, sibling = root.child("in"), root.child("in2")
    assert overlaps(root, root) and overlaps(root, inside) and overlaps(inside, inside)
    assert not overlaps(inside, root) and not overlaps(inside, sibling) and not overlaps(sibling, inside)
    one = open_storage(root.join("in/a.jpg"))
    assert overlaps(one, inside) and not overlaps(one, inside.child("restored"))
    assert not overlaps(root, S3Storage("elsewhere")) and not overlaps(LocalStorage(Path("/elsewhere")), root)


def test_child_of_the_only_storage_and_join(root: Storage) -> None:
    assert root.join("a/b") == f"{root.uri}/a/b"


@pytest.mark.parametrize(
    "uri",
    ["http://host/x", "gs://bucket/x", "s3://", "s3:///x", "s3:/bucket/x", "", "hdfs://a", "file://host/x"],
)
def test_other_addresses_are_refused_with_advice(uri: str) -> None:
    with pytest.raises(UsageError, match=r"--data .*; use .*s3://bucket/prefix") as caught:
        open_storage(uri, option="--data")
    assert (uri or "''") in str(caught.value) and "\n" not in str(caught.value)


def test_a_refused_address_does_not_show_its_password() -> None:
    for uri in ("https://me:hun/ter2@host/x", "s3://me:hun/ter2@bucket/x", "https://host/x?X-Amz-Signature=hunter2"):
        with pytest.raises(UsageError) as caught:
            open_storage(uri)
        assert "ter2" not in str(caught.value) and "/x" in str(caught.value)


def test_importing_stays_light() -> None:
    heavy = {"boto3", "botocore", "pyarrow", "torch", "ray"}
    code = f"import sys, restore_core.storage; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- local -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> LocalStorage:
    (tmp_path / "photos").mkdir()
    opened = open_storage(tmp_path / "photos")
    assert isinstance(opened, LocalStorage)
    return opened


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("../evil.jpg", 'has an empty, "." or ".." component'),
        ("a/../../evil.jpg", 'has an empty, "." or ".." component'),
        ("/etc/evil.jpg", 'has an empty, "." or ".." component'),
        ("a//b.jpg", 'has an empty, "." or ".." component'),
        ("", 'has an empty, "." or ".." component'),
        ("a/", 'has an empty, "." or ".." component'),
        ("a\0b.jpg", "holds a NUL character"),
        ("é" * 128, "has a component longer than 255 bytes"),
        ("a/" + "b" * 256, "has a component longer than 255 bytes"),
        ("\ud800.jpg", "is not valid Unicode"),
        (".restore-" + "0" * 32 + ".tmp", "has the name of a temporary file"),
        ("link/evil.jpg", "leads out of the folder through a symbolic link"),
        ("link/new/evil.jpg", "leads out of the folder through a symbolic link"),
    ],
)
def test_nothing_lands_outside_the_folder(folder: LocalStorage, tmp_path: Path, key: str, reason: str) -> None:
    (tmp_path / "outside").mkdir()
    (folder.root / "link").symlink_to(tmp_path / "outside")
    before = sorted(tmp_path.rglob("*"))
    assert reason in fails("write", folder.write, key, b"evil")
    assert reason in fails("read", folder.read, key)
    assert reason in fails("write", folder.delete, key)
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_written_through_a_link_to_a_folder(folder: LocalStorage) -> None:
    """A listing does not follow it: the file would be there, and not be found."""
    (folder.root / "real").mkdir()
    (folder.root / "link").symlink_to("real")
    for key in ("link/a.jpg", "link/new/a.jpg"):
        assert "lies in a folder that is a symbolic link" in fails("write", folder.write, key, b"x")
    assert list(folder.list()) == []
    folder.write("real/a.jpg", b"x")
    assert folder.read("link/a.jpg") == b"x"


def test_a_link_to_a_file_outside_is_listed_but_never_followed(folder: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (folder.root / "a.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder.root / "dangling.jpg").symlink_to(tmp_path / "nothing")
    (folder.root / "loop").symlink_to(folder.root)
    assert keys(folder) == ["a.jpg"]
    assert "symbolic link" in fails("read", folder.read, "a.jpg")
    folder.write("a.jpg", b"new")  # replaces the link, not what it points to
    assert (tmp_path / "secret.jpg").read_bytes() == b"secret" and folder.read("a.jpg") == b"new"


def test_a_write_that_fails_leaves_nothing_and_keeps_the_old(
    folder: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write("a.jpg", b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert "No space left on device" in fails("write", folder.write, "a.jpg", b"new")
    assert [path.name for path in folder.root.iterdir()] == ["a.jpg"] and folder.read("a.jpg") == b"old"


def test_leftovers_of_a_killed_write_are_not_listed(folder: LocalStorage) -> None:
    (folder.root / (".restore-" + "0" * 32 + ".tmp")).write_bytes(b"half")
    (folder.root / ".hidden.jpg").write_bytes(b"")
    (folder.root / "_restore").mkdir()
    (folder.root / "_restore" / "run.json").write_bytes(b"")
    assert keys(folder) == [".hidden.jpg", "_restore/run.json"]


def test_leftovers_of_a_killed_write_are_removed_but_not_those_under_way(folder: LocalStorage) -> None:
    old, renamed, young = (folder.root / "a" / f".restore-{digit * 32}.tmp" for digit in "012")
    like = folder.root / "a" / ".restore-0.tmp"
    old.parent.mkdir()
    for path in (old, like):
        path.write_bytes(b"half")
    (folder.root / "b").write_bytes(b"moved away, as a lease is while it is renewed")
    time.sleep(0.05)
    before = time.time()
    time.sleep(0.05)
    (folder.root / "b").rename(renamed)
    young.write_bytes(b"half")
    folder.remove_unfinished(before)
    assert sorted(path.name for path in old.parent.iterdir()) == [like.name, renamed.name, young.name]
    folder.remove_unfinished(time.time() + 1)
    assert sorted(path.name for path in old.parent.iterdir()) == [like.name]


def test_a_file_where_a_folder_is_needed(folder: LocalStorage) -> None:
    folder.write("a", b"x")
    assert folder.join("a/b") in fails("write", folder.write, "a/b", b"y")
    fails("vanished", folder.read, "a/b")
    folder.write("d/e", b"x")
    fails("write", folder.write, "d", b"y")
    fails("read", folder.read, "d")
    assert keys(folder) == ["a", "d/e"]


def test_names_that_are_not_utf8_keep_their_bytes(folder: LocalStorage) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        (folder.root / name).write_bytes(b"latin-1")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (key,) = keys(folder)
    assert key == "caf\uefe9.jpg" and key.encode() and folder.read(key) == b"latin-1"
    folder.child("out").write(key, b"restored")
    assert (folder.root / "out" / name).read_bytes() == b"restored"


def test_no_two_names_have_one_key_nor_two_keys_one_name(folder: LocalStorage) -> None:
    names = ["é.jpg", "\uefc3\uefa9.jpg", "\uefe9.jpg", os.fsdecode(b"\xe9.jpg"), "\uef7f.jpg"]
    for name in names:
        try:
            (folder.root / name).write_bytes(os.fsencode(name))
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
    (folder.root / "\uef80").mkdir()
    (folder.root / "\uef80/a.jpg").write_bytes("\uef80/a.jpg".encode())
    listed = keys(folder)
    assert len(listed) == len(set(listed)) == len(names) + 1 and listed == sorted(listed)
    assert {folder.read(key) for key in listed} == {os.fsencode(name) for name in [*names, "\uef80/a.jpg"]}
    copy = folder.child("copy")
    for key in listed:
        copy.write(key, folder.read(key))
    assert keys(copy) == listed and all(copy.read(key) == folder.read(key) for key in listed)
    # as it may come from S3, where any text is a key
    for key in ("\uefc3\uefa9.jpg", "\uef80\uefc3\uefa9"):
        assert "stands for a file name that is another key's" in fails("write", copy.write, key, b"x")
    copy.write("\uef80.jpg", b"x")
    assert "\uef80.jpg" in keys(copy)


def test_links_that_lead_nowhere_are_no_files(folder: LocalStorage) -> None:
    folder.write("a.jpg", b"x")
    for name, target in (("loop", "loop"), ("through", "a.jpg/b"), ("gone", "nowhere")):
        (folder.root / name).symlink_to(target)
    assert keys(folder) == ["a.jpg"]


def test_local_preflight_messages(folder: LocalStorage, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--input .*/nowhere: no such file or folder; check the path$"):
        open_storage(tmp_path / "nowhere").check_readable("--input")
    folder.write("a.jpg", b"x")
    with pytest.raises(UsageError, match=r"^--output .*/photos/a.jpg/b: .*/photos/a.jpg is a file; name a folder$"):
        open_storage(folder.root / "a.jpg" / "b").check_writable("--output")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_denied_places_are_named(folder: LocalStorage) -> None:
    folder.write("closed/a.jpg", b"x")
    folder.write("shut.jpg", b"x")
    (folder.root / "shut.jpg").chmod(0)
    (folder.root / "closed").chmod(0)
    try:
        assert "shut.jpg" in fails("denied", folder.read, "shut.jpg")
        with pytest.raises(StorageError, match=r"cannot list .*/closed: Permission denied"):
            list(folder.list())
        (folder.root / "open").mkdir()
        (folder.root / "open/link.jpg").symlink_to(folder.root / "closed/a.jpg")
        assert keys(folder.child("open")) == ["link.jpg"]
        fails("read", folder.child("open").read, "link.jpg")  # it leads out of the folder
        with pytest.raises(UsageError, match=r"^--output .*/closed/out: cannot write in .*/closed;"):
            open_storage(folder.root / "closed" / "out").check_writable("--output")
    finally:
        (folder.root / "closed").chmod(0o700)


def test_denied_places_are_named_even_for_root(folder: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write("closed/a.jpg", b"x")
    scandir = os.scandir

    def refusing(path: object) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(StorageError, match=r"cannot list .*/photos/closed: Permission denied; fix its permissions"):
        list(folder.list())
    assert [item.key for item in folder.list(unreadable=True)] == ["closed/"]
    assert "photos/closed/: Permission denied" in fails("denied", folder.read_version, Object("closed/", 0, ""))
    monkeypatch.undo()  # since it was listed
    assert "its files are not listed yet" in fails("read", folder.read_version, Object("closed/", 0, ""))
    fails("vanished", folder.read_version, Object("gone/", 0, ""))
    for outside in ("../closed/", "/"):
        fails("read", folder.read_version, Object(outside, 0, ""))


def test_a_file_that_cannot_be_looked_at_hides_no_other(folder: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("a.jpg", "b.jpg", "c/d.jpg"):
        folder.write(key, b"x")
    stat = os.stat

    def failing(path: str, *arguments: object, **more: object) -> os.stat_result:
        if str(path).endswith("b.jpg"):
            raise OSError(5, "Input/output error", str(path))
        return stat(path, *arguments, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "stat", failing)
    with pytest.raises(StorageError, match=r"cannot list .*/b.jpg: Input/output error"):
        list(folder.list())
    assert [(item.key, item.size) for item in folder.list(unreadable=True)] == [
        ("a.jpg", 1),
        ("b.jpg", 0),
        ("c/d.jpg", 1),
    ]


def test_overlaps_sees_through_links_and_dots(folder: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folder.root)
    assert overlaps(folder, open_storage(tmp_path / "alias" / "out"))
    assert overlaps(folder, open_storage(f"{folder.root}/x/../y"))
    assert not overlaps(folder, open_storage(f"{folder.root}/../elsewhere"))


def test_file_uris_and_relative_paths(folder: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write("a b.jpg", b"x")
    assert open_storage(f"file://{folder.root}/a%20b.jpg").only == "a b.jpg"
    monkeypatch.chdir(folder.root.parent)
    assert open_storage("photos/") == folder


@pytest.fixture
def new_clients(s3: str) -> Iterator[None]:
    """For tests that change the AWS_* variables: clients are made anew, before and after."""
    storage.s3.s3_client.cache_clear()
    yield
    storage.s3.s3_client.cache_clear()


# --- S3 --------------------------------------------------------------------------------------------------------------


def test_s3_keys_are_taken_as_they_are(s3: str) -> None:
    place = open_storage("s3://photos/in")
    odd = [
        "a//b.jpg",
        "../up.jpg",
        "/slash.jpg",
        "tab\there.jpg",
        "x" * 1000,
        "plus+and space%41.jpg",
        "marker/with bytes/",
    ]
    for key in odd:
        place.write(key, key.encode())
    place.write("folder/", b"")  # a marker: no object of its own
    assert sorted(keys(place)) == sorted(odd)
    assert all(place.read(key) == key.encode() for key in odd)


def two_keys_a_page(params: dict[str, object], **_: object) -> dict[str, object]:
    return params | {"MaxKeys": 2}


def test_s3_listing_goes_over_many_pages_and_stays_inside_the_prefix(s3: str) -> None:
    place = open_storage("s3://photos/in")
    open_storage("s3://photos/in2/").write("no.jpg", b"")
    storage.s3.s3_client().meta.events.register("provide-client-params.s3.ListObjectsV2", two_keys_a_page)
    try:
        for n in range(5):
            place.write(f"{n}.jpg", b"")
        assert keys(place) == [f"{n}.jpg" for n in range(5)]
    finally:
        storage.s3.s3_client().meta.events.unregister("provide-client-params.s3.ListObjectsV2", two_keys_a_page)


def test_s3_content_type_is_stored(s3: str) -> None:
    open_storage("s3://photos").write("a.png", b"x", "image/png")
    assert storage.s3.s3_client().head_object(Bucket="photos", Key="a.png")["ContentType"] == "image/png"


def test_s3_folder_wins_over_an_object_of_the_same_name(s3: str) -> None:
    whole = open_storage("s3://photos")
    whole.write("raw", b"marker")
    whole.write("raw/a.jpg", b"x")
    assert keys(open_storage("s3://photos/raw")) == ["a.jpg"]


def test_s3_preflight_names_what_is_missing(s3: str) -> None:
    with pytest.raises(UsageError, match=r"^--input s3://nobody/raw: no such bucket; check the bucket's name$"):
        open_storage("s3://nobody/raw").check_readable("--input")
    with pytest.raises(UsageError, match=r"^--output s3://nobody/out: no such bucket; check the bucket's name$"):
        open_storage("s3://nobody/out").check_writable("--output")
    with pytest.raises(UsageError, match=r"^--input s3://photos/empty: no objects there; check the prefix$"):
        open_storage("s3://photos/empty").check_readable("--input")
    open_storage("s3://photos").check_readable("--input")


def test_s3_without_credentials(new_clients: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr(storage.s3, "CREDENTIALS_SECONDS", 0)
    advice = r"Unable to locate credentials; set AWS_ACCESS_KEY_ID and"
    with pytest.raises(UsageError, match=rf"^--input s3://photos/x: {advice}"):
        open_storage("s3://photos/x").check_readable("--input")
    with pytest.raises(UsageError, match=rf"^--output s3://photos: {advice}"):
        open_storage("s3://photos").check_writable("--output")
    assert "s3://photos/x/a.jpg" in fails("denied", open_storage("s3://photos/x").read, "a.jpg")


def test_s3_credentials_that_come_a_little_later(
    new_clients: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As from a machine's metadata service that did not answer in time; a client keeps what it began with."""
    place = S3Storage("photos")
    place.write("a.jpg", b"a")
    storage.s3.s3_client.cache_clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setattr(storage.s3, "CREDENTIALS_SECONDS", 0)
    message = fails("denied", place.read, "a.jpg")
    assert message == (
        "cannot read s3://photos/a.jpg: Unable to locate credentials; give this machine credentials "
        "that work, and the same command goes on"
    )
    assert message.endswith(storage.GO_ON)
    assert fails("denied", place.read, "x" * 1024).endswith(storage.GO_ON)
    monkeypatch.setattr(storage.s3, "CREDENTIALS_SECONDS", 30)
    write = threading.Timer(
        0.5, file.write_text, ["[default]\naws_access_key_id = me\naws_secret_access_key = secret\n"]
    )
    write.start()
    assert place.read("a.jpg") == b"a"
    write.join()


def test_s3_refreshed_credentials_that_have_expired(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Botocore says so with a RuntimeError."""

    def expired(**_: object) -> None:
        raise RuntimeError("Credentials were refreshed, but the refreshed credentials are still expired.")

    monkeypatch.setattr(storage.s3, "CREDENTIALS_SECONDS", 0)
    monkeypatch.setattr(storage.s3.s3_client(), "get_object", expired)
    message = fails("denied", S3Storage("photos").read, "a.jpg")
    assert "still expired" in message and message.endswith(storage.GO_ON)


def client_error(code: str, status: int) -> botocore.exceptions.ClientError:
    response = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(response, "Operation")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        client_error("RequestTimeTooSkewed", 403),
        client_error("InvalidAccessKeyId", 403),
        client_error("ExpiredToken", 400),
        botocore.exceptions.UnauthorizedSSOTokenError(),
        botocore.exceptions.ProfileNotFound(profile="nobody"),
    ],
    ids=str,
)
def test_s3_what_is_wrong_with_a_machine_is_said_of_no_object(
    s3: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(storage.s3, "s3_client", functools.cache(lambda *_: SimpleNamespace(get_object=fail)))
    assert fails("denied", S3Storage("photos").read, "a.jpg").endswith(storage.GO_ON)


def test_s3_a_signature_may_be_wrong_for_one_key_alone(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where something between changes odd keys: it must not stop all the others."""

    def fail(**_: object) -> None:
        raise client_error("SignatureDoesNotMatch", 403)

    monkeypatch.setattr(storage.s3, "s3_client", functools.cache(lambda *_: SimpleNamespace(get_object=fail)))
    assert not fails("denied", S3Storage("photos").read, "a//b.jpg").endswith(storage.GO_ON)


def test_s3_expired_credentials_are_told_of_an_answer_without_a_body(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 answers HEAD by the status alone."""

    def head(**_: object) -> None:
        raise client_error("400", 400)

    def listing(**_: object) -> None:
        raise client_error("ExpiredToken", 400)

    client = SimpleNamespace(head_object=head, list_objects_v2=listing)
    monkeypatch.setattr(storage.s3, "s3_client", functools.cache(lambda *_: client))
    assert fails("denied", S3Storage("photos").stat, "a.parquet").endswith(storage.GO_ON)
    client.list_objects_v2 = lambda **_: {}
    assert "Operation" in fails("read", S3Storage("photos").stat, "a.parquet")


def test_s3_archived_objects_are_no_matter_of_permissions(s3: str, moto_client: "S3Client") -> None:
    moto_client.put_object(Bucket="photos", Key="old.jpg", Body=b"x", StorageClass="GLACIER")
    assert fails("read", S3Storage("photos").read, "old.jpg") == (
        "cannot read s3://photos/old.jpg: it is archived; restore it from there first (aws s3api restore-object)"
    )


def test_s3_an_object_is_found_by_who_may_not_list(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    S3Storage("photos").write("lists/todo.txt", b"a.jpg")

    def denied(**_: object) -> None:
        raise client_error("AccessDenied", 403)

    monkeypatch.setattr(storage.s3.s3_client(), "list_objects_v2", denied)
    place = open_storage("s3://photos/lists/todo.txt")
    assert place.only == "todo.txt" and place.read("todo.txt") == b"a.jpg"
    assert open_storage("s3://photos/lists").only is None


def test_s3_endpoint_that_does_not_answer(new_clients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2@127.0.0.1:9")
    with pytest.raises(UsageError, match=r"^--input s3://photos: .*; check AWS_ENDPOINT_URL") as caught:
        S3Storage("photos", "").check_readable("--input")
    assert "hunter2" not in str(caught.value)


def test_s3_endpoint_that_is_no_url(new_clients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost")
    with pytest.raises(UsageError, match=r"localhost; check AWS_ENDPOINT_URL \(http://host:port\)"):
        S3Storage("photos").check_readable("--input")


def test_s3_bucket_gone_while_working(s3: str) -> None:
    place = S3Storage("gone")
    assert "no such bucket" in fails("read", place.read, "a.jpg")
    assert "no such bucket" in fails("write", place.write, "a.jpg", b"")
    with pytest.raises(StorageError, match="cannot list s3://gone: no such bucket"):
        list(place.list())


def test_s3_denied(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(**_: object) -> None:
        raise client_error("AccessDenied", 403)

    client, place = storage.s3.s3_client(), S3Storage("photos")
    place.write("a.jpg", b"x")
    for name in ("get_object", "put_object", "head_object"):
        monkeypatch.setattr(client, name, denied)
    assert (
        fails("denied", place.read, "a.jpg") == "cannot read s3://photos/a.jpg: access denied, s3:GetObject is missing"
    )
    assert (
        fails("denied", place.write, "a.jpg", b"")
        == "cannot write s3://photos/a.jpg: access denied, s3:PutObject is missing"
    )
    fails("denied", place.exists, "a.jpg")


def test_s3_filesystem_takes_credentials_of_the_standard_chain(
    new_clients: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = me\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    filesystem, base = S3Storage("photos", "runs").filesystem()
    with filesystem.open_output_stream(f"{base}/a.bin") as stream:
        stream.write(b"x")
    assert S3Storage("photos", "runs").read("a.bin") == b"x"


@pytest.mark.parametrize(
    ("endpoint", "override"),
    [
        ("https://s3.amazonaws.com", ""),
        ("https://s3.eu-central-1.amazonaws.com", ""),
        ("https://s3.cn-north-1.amazonaws.com.cn", ""),
        ("https://s3-fips.us-gov-west-1.amazonaws.com", "s3-fips.us-gov-west-1.amazonaws.com"),
        ("https://s3.dualstack.eu-central-1.amazonaws.com", "s3.dualstack.eu-central-1.amazonaws.com"),
        (
            "https://bucket.vpce-0abc-1.s3.eu-central-1.vpce.amazonaws.com",
            "bucket.vpce-0abc-1.s3.eu-central-1.vpce.amazonaws.com",
        ),
        ("http://127.0.0.1:9000", "127.0.0.1:9000"),
    ],
)
def test_s3_filesystem_goes_where_boto3_goes(
    new_clients: None, monkeypatch: pytest.MonkeyPatch, endpoint: str, override: str
) -> None:
    """Also to the bucket's region, whatever the settings say, where that can be asked."""
    from restore_core.storage import arrow

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setattr(storage.s3, "region_of", lambda bucket: "ap-south-1")
    filesystem = arrow.S3Files("photos").now()
    (settings,) = filesystem.__reduce__()[1]
    assert (settings["endpoint_override"], settings["scheme"]) == (override, endpoint.partition(":")[0])
    assert filesystem.region == ("ap-south-1" if "amazonaws" in endpoint else "us-east-1")


def test_s3_filesystem_stores_a_small_file_by_one_request(new_clients: None, moto_client: "S3Client") -> None:
    """Else a process that is killed would leave a multipart upload behind."""
    filesystem, base = S3Storage("photos", "runs").filesystem()
    with filesystem.open_output_stream(f"{base}/a.bin") as stream:
        stream.write(b"x" * 100)
        assert "Uploads" not in moto_client.list_multipart_uploads(Bucket="photos")
        assert not S3Storage("photos", "runs").exists("a.bin")
    assert S3Storage("photos", "runs").read("a.bin") == b"x" * 100


def test_s3_region_is_told_to_who_may_not_list_the_bucket() -> None:
    client = boto3.session.Session("me", "secret", region_name="us-east-1").client("s3")
    with botocore.stub.Stubber(client) as stubber:
        headers = {"x-amz-bucket-region": "eu-central-1"}
        stubber.add_client_error("head_bucket", "403", http_status_code=403, response_meta={"HTTPHeaders": headers})
        assert storage.s3._region_of(client, "photos") == "eu-central-1"
        stubber.add_client_error("head_bucket", "404", http_status_code=404)
        with pytest.raises(botocore.exceptions.ClientError):
            storage.s3._region_of(client, "photos")


def test_s3_is_written_by_who_may_list_no_more_than_the_prefix(new_clients: None) -> None:
    asked = []

    def note(params: dict[str, Any], **_: object) -> None:
        asked.append(params)

    storage.s3.s3_client().meta.events.register("provide-client-params.s3.ListObjectsV2", note)
    S3Storage("photos", "out").check_writable("--output")
    assert [params["Prefix"] for params in asked] == ["out/"]

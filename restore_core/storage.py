"""The one door to files: local folders and S3 behind one small interface.

boto3 lists and moves objects (its listings carry ETags, one request an object); pyarrow.fs reads and writes Parquet.
Both are imported inside functions, so that importing this module stays light. Custom S3 endpoints, regions and
credentials come from the standard AWS_* variables and files, never from an option.
"""

import contextlib
import functools
import os
import re
import urllib.parse
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from restore_core.errors import ErrorClass, ItemError, StorageError, UsageError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from pyarrow.fs import FileSystem


@dataclass(frozen=True)
class Object:
    """One stored file, as a listing shows it."""

    key: str
    """Path relative to the storage's root, with "/" between components."""
    size: int
    """Bytes."""
    etag: str
    """Changes when the content does. S3: the ETag without quotes; local: the modification time in ns, hexadecimal."""


class Storage(Protocol):
    """A root under which objects are named by keys. Cheap to pickle, safe to use from several threads."""

    @property
    def uri(self) -> str:
        """The root in canonical form, for messages; never carries credentials."""

    @property
    def only(self) -> str | None:
        """The single key to list, when the storage was opened on one file instead of a folder."""

    def list(self, prefix: str = "") -> Iterator[Object]:
        """Yield the objects whose key starts with `prefix`, recursively, lazily, in the order of their keys.

        Nothing there yields nothing. Raises StorageError, naming the place, when it cannot be listed.
        """

    def read(self, key: str) -> bytes:
        """Return the object's bytes. Raises ItemError `vanished`, `denied` or `read`."""

    def write(self, key: str, data: bytes, content_type: str | None = None) -> None:
        """Write the object whole or not at all, over an older one. Raises ItemError `denied` or `write`."""

    def delete(self, key: str) -> None:
        """Delete the object; a missing one is no error. Raises ItemError `denied` or `write`."""

    def exists(self, key: str) -> bool:
        """Tell whether the object is there. Raises ItemError `denied` or `read` when that cannot be told."""

    def filesystem(self) -> "tuple[FileSystem, str]":
        """Return a pyarrow filesystem and the root's path in it, for Parquet and Ray Data."""

    def join(self, key: str) -> str:
        """Return the full path or URI of a key."""

    def child(self, prefix: str) -> "Storage":
        """Return the storage rooted at the sub-folder `prefix`."""

    def check_readable(self, option: str) -> None:
        """See `require_readable`."""

    def check_writable(self, option: str) -> None:
        """See `require_writable`."""


def open_storage(uri: str | Path, *, option: str = "--input") -> Storage:
    """Open a local path, file:// URI or s3://bucket/prefix; the place need not exist.

    A single file is opened as its parent folder with `only` set. On S3 that takes one small request, none if `uri` ends
    in "/". Raises UsageError, naming `option`, for anything else.
    """
    text = str(uri)
    if not text or "\0" in text:
        raise UsageError(f"{option} {text!r}: not a path; use a local path or s3://bucket/prefix")
    if text.startswith("s3:/"):  # one slash is what pathlib makes of s3://
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        if not text.startswith("s3://") or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]+", bucket):
            raise UsageError(f"{option} {_redacted(text)}: no bucket name in it; use s3://bucket/prefix")
        folder, _, name = prefix.rpartition("/")
        if name and _is_s3_object(bucket, prefix):
            return S3Storage(bucket, folder, only=name)
        return S3Storage(bucket, prefix.removesuffix("/"))
    if text.startswith("file://"):
        host, _, path = text.removeprefix("file://").partition("/")
        if host not in ("", "localhost"):
            raise UsageError(
                f"{option} {_redacted(text)}: names another machine; use file:///path or s3://bucket/prefix"
            )
        text = "/" + urllib.parse.unquote(path)
    elif match := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text):
        raise UsageError(
            f"{option} {_redacted(text)}: {match[1]}:// is not supported; use a local path or s3://bucket/prefix"
        )
    root = Path(os.path.realpath(text))  # absolute: Ray's workers run in other directories
    return LocalStorage(root.parent, only=key_of(root.name)) if root.is_file() else LocalStorage(root)


def is_object(uri: str | Path) -> bool:
    """Tell whether `uri` names a single file or S3 object instead of a folder."""
    return open_storage(uri).only is not None


def require_readable(storage: Storage, option: str) -> None:
    """Check, before any work, that `storage` can be listed. Raises UsageError: one line of option, value, advice."""
    storage.check_readable(option)


def require_writable(storage: Storage, option: str) -> None:
    """Check, without creating anything, that `storage` can be written. Raises UsageError like `require_readable`."""
    storage.check_writable(option)


def overlaps(a: Storage, b: Storage) -> bool:
    """Tell whether `b` is the same place as `a` or lies inside it. A single file overlaps only its own folder."""
    if isinstance(a, LocalStorage) and isinstance(b, LocalStorage):
        # samefile sees through bind mounts and case-insensitive disks; the comparison of paths serves missing folders
        above = [b.root] if a.only is not None else [b.root, *b.root.parents]
        return any(path == a.root or (path.exists() and a.root.exists() and path.samefile(a.root)) for path in above)
    if isinstance(a, S3Storage) and isinstance(b, S3Storage) and a.bucket == b.bucket:
        return b.full_key("") == a.full_key("") if a.only is not None else b.full_key("").startswith(a.full_key(""))
    return False


# --- Local -----------------------------------------------------------------------------------------------------------

# Names that are not UTF-8 (old archives, Latin-1) reach Python as lone surrogates, which Arrow and S3 refuse. In keys
# such a byte 0x80..0xFF is the private-use character U+EF80..U+EFFF, and it becomes the same byte again on disk.
_TO_KEY = {0xDC00 + byte: 0xEF00 + byte for byte in range(0x80, 0x100)}
_FROM_KEY = {char: surrogate for surrogate, char in _TO_KEY.items()}

_TEMPORARY = re.compile(r"\.restore-[0-9a-f]{32}\.tmp")  # short, so that any legal name can be written


def key_of(name: str) -> str:
    """Return a file's name as a key: text that can be encoded, whatever bytes the name holds."""
    return name.translate(_TO_KEY)


@dataclass(frozen=True)
class LocalStorage:
    """A local folder. Keys are taken as hostile: nothing outside `root` is ever read or written."""

    root: Path
    """Absolute, without symbolic links."""
    only: str | None = None

    @property
    def uri(self) -> str:
        return key_of(str(self.root))

    def list(self, prefix: str = "") -> Iterator[Object]:
        """See `Storage`. Symbolic links to folders are not followed; links to files are listed like files."""
        folder, slash, start = prefix.rpartition("/")
        top = self._path(folder, "read") if folder else self.root
        pending = _entries(top, folder + slash)
        while pending:
            key, entry = pending.pop()
            if self.only not in (None, key) or not key.startswith(folder + slash + start):
                continue
            if key.endswith("/"):
                pending += _entries(entry.path, key)
                continue
            try:
                if entry.is_file() and not _TEMPORARY.fullmatch(entry.name):
                    stat = entry.stat()
                    yield Object(key, stat.st_size, f"{stat.st_mtime_ns:x}")
            except FileNotFoundError:  # deleted since its folder was listed
                continue
            except OSError as error:
                raise StorageError(_line(f"cannot list {self.join(key)}: {error.strerror}")) from error

    def read(self, key: str) -> bytes:
        with _os_errors("read", self.join(key)):
            return self._path(key, "read").read_bytes()

    def write(self, key: str, data: bytes, content_type: str | None = None) -> None:
        with _os_errors("write", self.join(key)):
            path = self._path(key, "write")
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".restore-{uuid.uuid4().hex}.tmp")
            try:
                with temporary.open("xb") as file:
                    file.write(data)
                temporary.replace(path)
            except BaseException:  # also on KeyboardInterrupt: leave no half a file behind
                temporary.unlink(missing_ok=True)
                raise

    def delete(self, key: str) -> None:
        with _os_errors("write", self.join(key)):
            self._path(key, "write").unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        with _os_errors("read", self.join(key)):
            return self._path(key, "read").is_file()

    def filesystem(self) -> "tuple[FileSystem, str]":
        from pyarrow.fs import LocalFileSystem

        return LocalFileSystem(), str(self.root)

    def join(self, key: str) -> str:
        return f"{self.uri.rstrip('/')}/{key}"

    def child(self, prefix: str) -> "LocalStorage":
        return LocalStorage(Path(os.path.realpath(self._path(prefix.rstrip("/"), "read"))))

    def check_readable(self, option: str) -> None:
        try:
            with os.scandir(self.root):
                pass
        except FileNotFoundError:
            raise UsageError(f"{option} {self.uri}: no such file or folder; check the path") from None
        except NotADirectoryError:
            raise UsageError(f"{option} {self.uri}: not a regular file or folder; name one") from None
        except OSError as error:
            raise UsageError(f"{option} {self.uri}: {error.strerror}; make it readable or name another") from None

    def check_writable(self, option: str) -> None:
        if self.only is not None:
            raise UsageError(f"{option} {self.join(self.only)}: is a file; name a folder")
        existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not existing.is_dir():
            raise UsageError(f"{option} {self.uri}: {existing} is a file; name a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UsageError(f"{option} {self.uri}: cannot write in {existing}; change its permissions or name another")

    def _path(self, key: str, doing: ErrorClass) -> Path:
        """Return the path of a key. Raises ItemError(`doing`) if it would leave the root or cannot be a file name."""
        parts = [part.translate(_FROM_KEY) for part in key.split("/")]
        reason = None
        if "\0" in key:
            reason = "holds a NUL character"
        elif any(part in ("", ".", "..") for part in parts):
            reason = 'has an empty, "." or ".." component'
        elif any(0xD800 <= ord(char) < 0xE000 for char in key):
            reason = "is not valid Unicode"
        elif any(len(os.fsencode(part)) > 255 for part in parts):
            reason = "has a component longer than 255 bytes"
        elif _TEMPORARY.fullmatch(parts[-1]):
            reason = "has the name of a temporary file"
        else:
            path = self.root.joinpath(*parts)
            # A link in the last place is replaced by a write, not followed, but a read would follow it.
            real = os.path.realpath(path if doing == "read" else path.parent)
            if Path(real).is_relative_to(self.root):
                return path
            reason = "leads out of the folder through a symbolic link"
        raise ItemError(doing, _line(f"key {key!r} {reason}; not allowed in the local folder {self.uri}"))


def _entries(folder: str | Path, prefix: str) -> list[tuple[str, os.DirEntry[str]]]:
    """Keys (those of folders end in "/", which sorts them as S3 does) and entries, the last key first."""
    try:
        with os.scandir(folder) as entries:
            found = [
                (prefix + key_of(entry.name) + "/" * entry.is_dir(follow_symlinks=False), entry) for entry in entries
            ]
    except FileNotFoundError:
        return []
    except OSError as error:
        place = _line(key_of(str(folder)))
        raise StorageError(f"cannot list {place}: {error.strerror}; fix its permissions or move it away") from error
    return sorted(found, key=lambda pair: pair[0], reverse=True)


@contextlib.contextmanager
def _os_errors(doing: ErrorClass, uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind: ErrorClass = doing
        if isinstance(error, PermissionError):
            kind = "denied"
        elif doing == "read" and isinstance(error, (FileNotFoundError, NotADirectoryError)):
            kind = "vanished"
        raise ItemError(kind, _line(f"cannot {doing} {uri}: {error.strerror or error}")) from error


# --- S3 --------------------------------------------------------------------------------------------------------------

_BODY_TRIES = 3  # botocore retries requests, but not a body that breaks off


@dataclass(frozen=True)
class S3Storage:
    """A bucket, or the part of it below a prefix. Holds no client and no credentials: each process makes its own."""

    bucket: str
    prefix: str = ""
    """Without the "/" that follows it in keys."""
    only: str | None = None

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def full_key(self, key: str) -> str:
        """Return the key in the bucket. Any text is a legal key: it is neither cleaned nor decoded."""
        return f"{self.prefix}/{key}" if self.prefix else key

    def list(self, prefix: str = "") -> Iterator[Object]:
        """See `Storage`. Folder markers (empty objects whose key ends in "/") are left out."""
        root = self.full_key("")
        try:
            pages = _client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=root + (self.only or prefix)):
                for found in page.get("Contents", []):
                    key = found["Key"].removeprefix(root)
                    marker = found["Key"].endswith("/") and not found["Size"]
                    if key and not marker and self.only in (None, key) and key.startswith(prefix):
                        yield Object(key, found["Size"], found["ETag"].strip('"'))
        except _s3_exceptions() as error:
            raise StorageError(f"cannot list {self.uri}: {_describe(error)}") from error

    def read(self, key: str) -> bytes:
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        with _s3_errors("read", self.join(key)):
            for last in (*[False] * (_BODY_TRIES - 1), True):
                try:
                    return _client().get_object(Bucket=self.bucket, Key=self.full_key(key))["Body"].read()
                except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                    if last:
                        raise
        raise AssertionError("unreachable")

    def write(self, key: str, data: bytes, content_type: str | None = None) -> None:
        extra: dict[str, Any] = {"ContentType": content_type} if content_type else {}
        with _s3_errors("write", self.join(key)):
            _client().put_object(Bucket=self.bucket, Key=self.full_key(key), Body=data, **extra)

    def delete(self, key: str) -> None:
        with _s3_errors("write", self.join(key)):
            _client().delete_object(Bucket=self.bucket, Key=self.full_key(key))

    def exists(self, key: str) -> bool:
        try:
            with _s3_errors("read", self.join(key)):
                _client().head_object(Bucket=self.bucket, Key=self.full_key(key))
        except ItemError as error:
            if error.error == "vanished":
                return False
            raise
        return True

    def filesystem(self) -> "tuple[FileSystem, str]":
        """See `Storage`. Raises StorageError when the bucket's region is neither set nor can be asked for."""
        import boto3
        from pyarrow.fs import S3FileSystem

        settings: dict[str, Any] = {}
        try:
            client = _client()
            endpoint = urllib.parse.urlsplit(client.meta.endpoint_url)
            region = _region() or boto3.session.Session().region_name
            if not re.search(r"\.amazonaws\.com(\.cn)?$", endpoint.hostname or ""):
                settings |= {"endpoint_override": endpoint.netloc.rpartition("@")[2], "scheme": endpoint.scheme}
            elif region is None:  # pyarrow, unlike boto3, does not follow the redirect to the bucket's own region
                headers = client.head_bucket(Bucket=self.bucket)["ResponseMetadata"]["HTTPHeaders"]
                region = headers.get("x-amz-bucket-region")
            if "AWS_ACCESS_KEY_ID" not in os.environ and (found := boto3.session.Session().get_credentials()):
                frozen = found.get_frozen_credentials()
                settings |= {"access_key": frozen.access_key, "secret_key": frozen.secret_key}
                settings |= {"session_token": frozen.token} if frozen.token else {}
        except _s3_exceptions() as error:
            raise StorageError(f"cannot use {self.uri}: {_describe(error)}") from error
        return S3FileSystem(region=region or "us-east-1", **settings), f"{self.bucket}/{self.prefix}".rstrip("/")

    def join(self, key: str) -> str:
        return f"s3://{self.bucket}/{self.full_key(key)}"

    def child(self, prefix: str) -> "S3Storage":
        return S3Storage(self.bucket, self.full_key(prefix).removesuffix("/"))

    def check_readable(self, option: str) -> None:
        try:
            prefix = self.full_key(self.only or "")
            found = _client(attempts=2).list_objects_v2(Bucket=self.bucket, Prefix=prefix, MaxKeys=1)
        except _s3_exceptions() as error:
            raise UsageError(f"{option} {self.uri}: {_describe(error)}; {_advice(error)}") from error
        if self.prefix and not found.get("Contents"):
            raise UsageError(f"{option} {self.uri}: no objects there; check the prefix")

    def check_writable(self, option: str) -> None:
        if self.only is not None:
            raise UsageError(f"{option} {self.join(self.only)}: is an object; name a prefix")
        try:
            _client(attempts=2).head_bucket(Bucket=self.bucket)
        except _s3_exceptions() as error:
            raise UsageError(f"{option} {self.uri}: {_describe(error)}; {_advice(error)}") from error


@functools.cache
def _client(attempts: int = 8) -> "S3Client":
    """One client per process (clients are thread-safe); few attempts before the work begins, many during it."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "adaptive", "total_max_attempts": attempts},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
    )
    try:
        # An own session: boto3's default one must not be used from several threads.
        return boto3.session.Session(region_name=_region()).client("s3", config=config)
    except ValueError as error:
        raise UsageError(f"{_line(str(error))}; check AWS_ENDPOINT_URL (http://host:port) and AWS_REGION") from error


def _region() -> str | None:
    """Other SDKs read AWS_REGION, botocore only the second."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


def _is_s3_object(bucket: str, key: str) -> bool:
    """Tell whether `key` is an object and no folder. Failures are left to `require_readable` to explain."""
    try:
        client = _client(attempts=2)
        if client.list_objects_v2(Bucket=bucket, Prefix=key + "/", MaxKeys=1).get("Contents"):
            return False
        client.head_object(Bucket=bucket, Key=key)
    except _s3_exceptions():
        return False
    return True


def _s3_exceptions() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError


@contextlib.contextmanager
def _s3_errors(doing: ErrorClass, uri: str) -> Iterator[None]:
    try:
        yield
    except _s3_exceptions() as error:
        kind: ErrorClass = doing
        if _status(error) == 403:
            kind = "denied"
        elif doing == "read" and _status(error) == 404 and _code(error) != "NoSuchBucket":
            kind = "vanished"
        raise ItemError(kind, _line(f"cannot {doing} {uri}: {_describe(error)}")) from error


def _code(error: Exception) -> str:
    response: dict[str, Any] = getattr(error, "response", {})  # only ClientError has one
    return str(response.get("Error", {}).get("Code", type(error).__name__))


def _status(error: Exception) -> int:
    """The answer's HTTP status; 403 for bad credentials however they show, 0 without an answer."""
    if _code(error) in ("NoCredentialsError", "PartialCredentialsError", "ExpiredToken", "InvalidToken"):
        return 403
    response: dict[str, Any] = getattr(error, "response", {})
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _describe(error: Exception) -> str:
    code = _code(error)
    if code in ("NoSuchBucket", "404"):
        return "no such bucket" if code == "NoSuchBucket" else "not found"
    return "access denied" if code in ("AccessDenied", "403") else _line(str(error))


def _advice(error: Exception) -> str:
    if _code(error) in ("NoCredentialsError", "PartialCredentialsError"):
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the machine a role"
    if _status(error) == 403:
        return "check the credentials and their permissions"
    return "check the bucket's name" if _status(error) == 404 else "check AWS_ENDPOINT_URL, AWS_REGION and the network"


def _line(text: str) -> str:
    """One line without user names and passwords of URLs."""
    return re.sub(r"//[^/@\s]+@", "//", " ".join(text.split()))[:1000]


def _redacted(uri: str) -> str:
    """A URI that was refused, without what may be a password or a signature."""
    return _line(re.sub(r"//.*@|\?.*", lambda found: found[0][:2] if found[0].startswith("//") else "", uri))

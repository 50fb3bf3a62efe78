"""S3 buckets, by boto3; credentials, region and endpoint from the standard AWS_* variables and files alone."""

import contextlib
import functools
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, TYPE_CHECKING, Any, TypeVar

from restore_core.errors import ErrorClass, ItemError, StorageError, UsageError
from restore_core.storage import listing
from restore_core.storage.base import GO_ON, Object, one_line

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef
    from pyarrow.fs import FileSystem

Result = TypeVar("Result")

ATTEMPTS, READ_TIMEOUT_SECONDS = 3, 60
ROUNDS, PATIENCE_SECONDS = 20, 240
"""Botocore makes `ATTEMPTS` of a request, and of all requests of a client together only so many; such a round is made
again as long as it fails for a passing reason, but no more than so often, and not after so many seconds. A request to a
server that hangs takes ATTEMPTS * READ_TIMEOUT_SECONDS more; two in a row have to end before `stages.STAGE_SECONDS`."""
PREFLIGHT_SECONDS = 20
"""The same before the work begins, where a wrong endpoint should be told soon."""
CONDITIONAL_SECONDS, CONDITIONAL_TIMEOUT_SECONDS = 30, 15
"""The same for conditional writes: a lease has to be renewed in time."""
CREDENTIALS_SECONDS = 30
"""The same where there are no credentials (a machine's metadata service did not answer in a second, say)."""
LONGEST_PAUSE_SECONDS = 8.0
VERSION_TRIES = 5
"""Of reading an object that is replaced meanwhile."""
NO_CREDENTIALS = ("NoCredentialsError", "CredentialRetrievalError", "MetadataRetrievalError", "TokenRetrievalError")
"""There are none, which may pass."""
BAD_CREDENTIALS = (
    "PartialCredentialsError", "InvalidToken", "InvalidAccessKeyId", "ProfileNotFound", "UnauthorizedSSOTokenError",
    "SSOTokenLoadError", "LoginRefreshRequired",
)  # fmt: skip
"""There are some that do not work on this machine, for whatever object."""
PASSING = (
    "RequestTimeout", "ConditionalRequestConflict",
    # Of the services that give out credentials, with status 400.
    "Throttling", "ThrottlingException", "IDPCommunicationError",
)  # fmt: skip
ARCHIVED = "InvalidObjectState"
"""Comes with status 403 too."""
CLOCK = "RequestTimeTooSkewed"
PROBE = "_restore/probe"
"""The key of what is put and deleted to see whether both are allowed: no photograph's."""


@dataclass(frozen=True)
class S3Storage:
    """A bucket, or the part of it below a prefix. Holds no client and no credentials: each process makes its own."""

    bucket: str
    prefix: str = ""
    """Without the "/" that follows it in keys."""
    only: str | None = None
    storage_class: str | None = None
    """Of what is written; the bucket's default where it is None."""
    kms_key: str | None = None
    """ID, ARN or alias of the key that encrypts what is written (SSE-KMS); the bucket's default where it is None."""

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def full_key(self, key: str) -> str:
        """Return the key in the bucket. Any text is a legal key: it is neither cleaned nor decoded."""
        return f"{self.prefix}/{key}" if self.prefix else key

    def list(self, prefix: str = "", after: str = "", *, unreadable: bool = False) -> Iterator[Object]:
        """See `Storage`. Folder markers (empty objects whose key ends in "/") are left out; nothing is `unreadable`."""
        root = self.full_key("")
        try:
            behind = root + after if after else ""
            for page in listing.pages(partial(_list, Bucket=self.bucket), root + (self.only or prefix), behind):
                for full_key, size, etag in page:
                    key = full_key.removeprefix(root)
                    marker = full_key.endswith("/") and not size
                    if key and not marker and self.only in (None, key) and key.startswith(prefix):
                        yield Object(key, size, etag)
        except _s3_exceptions() as error:
            raise StorageError(f"cannot list {self.uri}: {_describe(error, 's3:ListBucket')}") from error

    def read(self, key: str) -> bytes:
        with self._told_apart(key), _s3_errors("read", self.join(key), "s3:GetObject"):
            return _patiently(lambda client: self._get(client, key)[0])
        raise AssertionError("unreachable")

    def read_version(self, item: Object) -> tuple[bytes, Object]:
        """See `Storage`. One request, unless the object has been replaced: then a listing tells by what."""
        for _ in range(VERSION_TRIES):
            with self._told_apart(item.key), _s3_errors("read", self.join(item.key), "s3:GetObject"):
                data, etag = _patiently(partial(self._get, key=item.key, expected=item))
            if etag == item.etag:
                return data, item
            now = self._listed(item.key)
            if now is None:
                raise ItemError("vanished", one_line(f"cannot read {self.join(item.key)}: deleted since it was listed"))
            if (etag, len(data)) == (now.etag, now.size):
                return data, now
            item = now
        raise ItemError("read", one_line(f"cannot read {self.join(item.key)}: it is replaced again and again"))

    def _get(self, client: "S3Client", key: str, expected: Object | None = None) -> tuple[bytes, str]:
        """The object's bytes and ETag. Raises _CutShort where they are fewer than those of the `expected` version."""
        response = client.get_object(Bucket=self.bucket, Key=self.full_key(key))
        with contextlib.closing(response["Body"]) as body:
            data, etag = body.read(), response.get("ETag", "").strip('"')
        if expected is not None and etag == expected.etag and len(data) != expected.size:
            raise _CutShort(f"{len(data)} bytes came of {expected.size} that are listed")
        return data, etag

    def _listed(self, key: str) -> Object | None:
        """The object as a listing shows it now: the first whose key starts so."""
        with _s3_errors("read", self.join(key), "s3:ListBucket"):
            for full_key, size, etag in _first(self.bucket, self.full_key(key)):
                if full_key == self.full_key(key):
                    return Object(key, size, etag)
        return None

    @contextlib.contextmanager
    def _told_apart(self, key: str) -> Iterator[None]:
        """S3 says "denied" of a missing key too, to who may list no more than a prefix; a listing below that tells."""
        try:
            yield
        except ItemError as error:
            if error.__cause__ is None or _code(error.__cause__) not in ("AccessDenied", "403"):
                raise
            try:
                there = self._listed(key) is not None
            except ItemError:
                there = True  # as far as one may know
            if there:
                raise
            raise ItemError("vanished", one_line(f"cannot read {self.join(key)}: not found")) from error

    def write(self, key: str, data: bytes, content_type: str | None = None) -> None:
        extra: dict[str, Any] = {"ContentType": content_type} if content_type else {}
        with _s3_errors("write", self.join(key), "s3:PutObject"):
            _patiently(lambda client: client.put_object(**self._put_options(key), Body=data, **extra))

    @contextlib.contextmanager
    def create(self, key: str) -> Iterator[IO[bytes]]:
        """See `Storage`. Written to a temporary file of this machine first, then put by one request (5 GiB at most)."""

        def put(client: "S3Client") -> None:
            file.seek(0)
            client.put_object(**self._put_options(key), Body=file)

        try:
            with tempfile.TemporaryFile() as file:
                yield file
                with _s3_errors("write", self.join(key), "s3:PutObject"):
                    _patiently(put)
        except OSError as error:
            place = f"the temporary file for {self.join(key)} in {tempfile.gettempdir()}"
            raise ItemError("write", one_line(f"cannot write {place}: {error.strerror or error}")) from error

    def _put_options(self, key: str) -> dict[str, Any]:
        options: dict[str, Any] = {"Bucket": self.bucket, "Key": self.full_key(key)}
        if self.storage_class is not None:
            options["StorageClass"] = self.storage_class
        if self.kms_key is not None:
            options |= {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self.kms_key}
        return options

    def write_if(self, key: str, data: bytes, version: str | None) -> str | None:
        """See `Storage`. One conditional request (Amazon S3 and MinIO have them)."""
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}

        def put(client: "S3Client") -> str | None:
            try:
                done = client.put_object(**self._put_options(key), Body=data, **condition)
            except _s3_exceptions() as error:
                # 404: it should be replaced, and is gone
                if _status(error) != 412 and not (version is not None and _code(error) == "NoSuchKey"):
                    raise
                return self._version_of(client, key, data)
            return done["ETag"].strip('"')

        with _s3_errors("write", self.join(key), "s3:PutObject"):
            return _patiently(put, CONDITIONAL_SECONDS, read_timeout=CONDITIONAL_TIMEOUT_SECONDS)
        raise AssertionError("unreachable")

    def _version_of(self, client: "S3Client", key: str, data: bytes) -> str | None:
        """The version that holds these bytes: written by an attempt whose answer was lost, and which was made again."""
        try:
            there, etag = self._get(client, key)
        except _s3_exceptions() as error:
            if _status(error) == 404:
                return None
            raise
        return etag if there == data else None

    def delete(self, key: str) -> None:
        with _s3_errors("write", self.join(key), "s3:DeleteObject", verb="delete"):
            _patiently(lambda client: client.delete_object(Bucket=self.bucket, Key=self.full_key(key)))

    def stat(self, key: str) -> Object:
        try:
            with self._told_apart(key), _s3_errors("read", self.join(key), "s3:GetObject"):
                found = _patiently(lambda client: client.head_object(Bucket=self.bucket, Key=self.full_key(key)))
                return Object(key, found["ContentLength"], found["ETag"].strip('"'))
        except ItemError as error:
            if error.__cause__ is not None and _code(error.__cause__) == "400":
                self._listed(key)  # an answer without a body does not say that credentials have expired
            raise
        raise AssertionError("unreachable")

    def exists(self, key: str) -> bool:
        try:
            self.stat(key)
        except ItemError as error:
            if error.error == "vanished":
                return False
            raise
        return True

    def unfinished(self) -> Iterator[str]:
        """See `Storage`. None: each object is put by one request, which stores all of it or nothing."""
        return iter(())

    def remove_unfinished(self, before: float) -> None:
        """See `Storage`. There are none."""

    def filesystem(self) -> "tuple[FileSystem, str]":
        """See `Storage`. Raises StorageError when the bucket's region is neither set nor can be asked for."""
        from pyarrow.fs import PyFileSystem

        from restore_core.storage.arrow import S3Files

        files = S3Files(self.bucket)
        try:
            files.now()  # what cannot work is told here
        except _s3_exceptions() as error:
            raise StorageError(f"cannot use {self.uri}: {_describe(error, 's3:ListBucket')}") from error
        return PyFileSystem(files), f"{self.bucket}/{self.prefix}".rstrip("/")

    def join(self, key: str) -> str:
        return f"s3://{self.bucket}/{self.full_key(key)}"

    def child(self, prefix: str) -> "S3Storage":
        return replace(self, prefix=self.full_key(prefix).removesuffix("/"), only=None)

    def check_readable(self, option: str) -> None:
        try:
            prefix = self.full_key(self.only or "")
            found = _first(self.bucket, prefix, PREFLIGHT_SECONDS, offline=False)
        except _s3_exceptions() as error:
            raise UsageError(f"{option} {self.uri}: {_describe(error, 's3:ListBucket')}; {_advice(error)}") from error
        if self.prefix and not found:
            raise UsageError(f"{option} {self.uri}: no objects there; check the prefix")

    def check_writable(self, option: str) -> None:
        """See `Storage`. Puts a small object as everything else will be put, and deletes it."""
        if self.only is not None:
            raise UsageError(f"{option} {self.join(self.only)}: is an object; name a prefix")
        key = self.full_key(PROBE)
        steps: tuple[tuple[str, str, Callable[[S3Client], object]], ...] = (
            # Below the prefix, since a policy may allow no more than that.
            (
                "",
                "s3:ListBucket",
                lambda client: client.list_objects_v2(Bucket=self.bucket, Prefix=self.full_key(""), MaxKeys=1),
            ),
            ("put", "s3:PutObject", lambda client: client.put_object(**self._put_options(PROBE), Body=b"")),
            # The ledger is read again; with --kms-key that takes the right to decrypt.
            ("get", "s3:GetObject", lambda client: client.get_object(Bucket=self.bucket, Key=key)["Body"].close()),
            ("delete", "s3:DeleteObject", lambda client: client.delete_object(Bucket=self.bucket, Key=key)),
        )
        for verb, permission, step in steps:
            try:
                _patiently(step, PREFLIGHT_SECONDS, offline=False)
            except _s3_exceptions() as error:
                doing = verb and f"cannot {verb} {one_line(self.join(PROBE))}: "
                raise UsageError(
                    f"{option} {self.uri}: {doing}{_describe(error, permission)}; {_advice(error)}"
                ) from error


class _CutShort(Exception):
    """Fewer bytes came than the object has, though their number was that of the answer's header."""


def _patiently(
    call: "Callable[[S3Client], Result]",
    seconds: float = PATIENCE_SECONDS,
    *,
    read_timeout: int | None = None,
    offline: bool = True,
) -> Result:
    """Call with this process's client, and again as long as it fails for a reason that may pass, as `ROUNDS` says.

    With `offline` that includes having no connection, and having no credentials for a while: a client keeps those that
    it began with, none too, so another one looks for them. So it does, once, for those that have expired.
    """
    started, pause = time.monotonic(), 0.25
    for last in (*[False] * (ROUNDS - 1), True):
        try:
            return _call(call, s3_client() if read_timeout is None else s3_client(read_timeout))
        except _s3_exceptions() as error:
            if _code(error) in NO_CREDENTIALS and offline:
                seconds = min(seconds, CREDENTIALS_SECONDS)
            elif not (_passing(error, offline) or _expired(error)):
                raise
            if last or time.monotonic() > started + seconds:
                raise
            if _code(error) in NO_CREDENTIALS or _expired(error):
                s3_client.cache_clear()
            if _expired(error):
                # A chain that knows when they expire renews them itself; those in a file may have been replaced there.
                seconds = 0.0
                continue
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
        time.sleep(random.uniform(0, pause))  # noqa: S311
    raise AssertionError("unreachable")


def _call(call: "Callable[[S3Client], Result]", client: "S3Client") -> Result:
    """Botocore says with a bare RuntimeError that renewed credentials have expired too."""
    from botocore.exceptions import CredentialRetrievalError

    try:
        return call(client)
    except RuntimeError as error:
        if "credentials" not in str(error):
            raise
        raise CredentialRetrievalError(provider="the standard chain", error_msg=str(error)) from error


def _list(seconds: float = PATIENCE_SECONDS, *, offline: bool = True, **request: Any) -> "ListObjectsV2OutputTypeDef":
    """One page of a listing."""
    return _patiently(lambda client: client.list_objects_v2(**request), seconds, offline=offline)


def _first(bucket: str, prefix: str, seconds: float = PATIENCE_SECONDS, *, offline: bool = True) -> listing.Page:
    """The first object below a prefix, if there is one."""
    more: dict[str, Any] = {}
    while True:  # a page may be empty and yet not the last
        found = _list(seconds, offline=offline, Bucket=bucket, Prefix=prefix, MaxKeys=1, **more)
        if (page := listing.page_of(found)) or not found.get("IsTruncated"):
            return page
        more = {"ContinuationToken": found["NextContinuationToken"]}


@functools.cache
def s3_client(read_timeout: int = READ_TIMEOUT_SECONDS) -> "S3Client":
    """One client per process (clients are thread-safe). `read_timeout`: seconds without a byte of the answer."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "adaptive", "total_max_attempts": ATTEMPTS},
        connect_timeout=10,
        read_timeout=read_timeout,
        max_pool_connections=32,
    )
    try:
        # An own session: boto3's default one must not be used from several threads.
        return boto3.session.Session(region_name=region()).client("s3", config=config)
    except ValueError as error:
        raise UsageError(f"{one_line(str(error))}; check AWS_ENDPOINT_URL (http://host:port) and AWS_REGION") from error


def region() -> str | None:
    """Other SDKs read AWS_REGION, botocore only the second."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


def region_of(bucket: str) -> str | None:
    """Where a bucket lies. S3 tells it also who may not list all of it, as a policy with a condition on the prefix has
    it."""
    return _patiently(partial(_region_of, bucket=bucket))


def _region_of(client: "S3Client", bucket: str) -> str | None:
    from botocore.exceptions import ClientError

    try:
        answer: Any = client.head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
        if _status(error) != 403:
            raise
    region = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    return None if region is None else str(region)


def is_s3_object(bucket: str, key: str) -> bool:
    """Tell whether `key` is an object and no folder. Failures are left to `check_readable` to explain."""
    try:
        try:
            if _first(bucket, key + "/", PREFLIGHT_SECONDS, offline=False):
                return False
        except _s3_exceptions() as error:
            if _status(error) != 403:  # who may not list may read it yet
                raise
        _patiently(lambda client: client.head_object(Bucket=bucket, Key=key), PREFLIGHT_SECONDS, offline=False)
    except _s3_exceptions():
        return False
    return True


def _s3_exceptions() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError  # of a body's connection, such as TLS that breaks: not all are translated

    return BotoCoreError, ClientError, ResponseParserError, HTTPError, _CutShort


def _passing(error: Exception, offline: bool) -> bool:
    """Whether the same request may well work a little later."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    broken = (exceptions.IncompleteReadError, exceptions.ResponseStreamingError, exceptions.FlexibleChecksumError)
    if isinstance(error, (*broken, ResponseParserError, HTTPError, _CutShort)):
        return True
    if isinstance(error, (exceptions.ConnectionError, exceptions.HTTPClientError)):
        return offline
    if _code(error) in PASSING:
        return True
    return _status(error) in (429, 500, 502, 503, 504)


def _expired(error: Exception) -> bool:
    return _code(error) in ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")


@contextlib.contextmanager
def _s3_errors(doing: ErrorClass, uri: str, permission: str, verb: str | None = None) -> Iterator[None]:
    try:
        yield
    except _s3_exceptions() as error:
        kind: ErrorClass = doing
        if _status(error) == 403 and _code(error) != ARCHIVED:
            kind = "denied"
        elif doing == "read" and _status(error) == 404 and _code(error) != "NoSuchBucket":
            kind = "vanished"
        why = _describe(error, permission)
        if _code(error) in NO_CREDENTIALS + BAD_CREDENTIALS:
            why += f"; give this machine credentials that work, {GO_ON}"
        # Not cut off with the uri, which may be long.
        message = f"{one_line(f'cannot {verb or doing} {uri}')}: {why}"
        others_too = _status(error) in (0, 429) or _status(error) >= 500 or message.endswith(GO_ON)
        raise ItemError(kind, message, others_too=others_too or _code(error) == "NoSuchBucket") from error


def _code(error: BaseException) -> str:
    response: dict[str, Any] = getattr(error, "response", None) or {}  # only ClientError has one
    return str(response.get("Error", {}).get("Code", type(error).__name__))


def _status(error: Exception) -> int:
    """The answer's HTTP status; 403 for bad credentials however they show, 0 without an answer."""
    if _code(error) in NO_CREDENTIALS + BAD_CREDENTIALS or _expired(error):
        return 403
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _describe(error: Exception, permission: str) -> str:
    """What went wrong. `permission`: that is missing where access is denied and the server does not name another."""
    code = _code(error)
    if code in ("NoSuchBucket", "404"):
        return "no such bucket" if code == "NoSuchBucket" else "not found"
    if code in ("AccessDenied", "403"):
        named = re.search(r"not authorized to perform: (\w+:\w+)", str(error))
        return f"access denied, {named[1] if named else permission} is missing"
    if code == ARCHIVED:
        return "it is archived; restore it from there first (aws s3api restore-object)"
    if code == CLOCK:
        return f"this machine's clock is wrong; set it, {GO_ON}"
    if _expired(error):
        return f"the credentials have expired; renew them, {GO_ON}"
    return one_line(str(error))


def _advice(error: Exception) -> str:
    if _code(error) in ("NoCredentialsError", "PartialCredentialsError"):
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the machine a role"
    if _code(error) == "ProfileNotFound":
        return "check AWS_PROFILE"
    if _code(error) == "SignatureDoesNotMatch":
        return "check the credentials; where it is not AWS, try AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
    if _status(error) == 403:
        return "check the credentials and their permissions"
    if _code(error) == "InvalidStorageClass" or _code(error).startswith("KMS."):
        return "check --storage-class and --kms-key"
    if _status(error) == 503:
        return "try again later"
    return "check the bucket's name" if _status(error) == 404 else "check AWS_ENDPOINT_URL, AWS_REGION and the network"

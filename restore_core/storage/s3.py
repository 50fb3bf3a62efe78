"""S3 buckets, by boto3; credentials, region and endpoint from the standard AWS_* variables and files alone."""

import contextlib
import functools
import os
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from restore_core.errors import ErrorClass, ItemError, StorageError, UsageError
from restore_core.storage.base import Object, one_line

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from pyarrow.fs import FileSystem

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
            pages = s3_client().get_paginator("list_objects_v2")
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
                    return s3_client().get_object(Bucket=self.bucket, Key=self.full_key(key))["Body"].read()
                except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                    if last:
                        raise
        raise AssertionError("unreachable")

    def write(self, key: str, data: bytes, content_type: str | None = None) -> None:
        extra: dict[str, Any] = {"ContentType": content_type} if content_type else {}
        with _s3_errors("write", self.join(key)):
            s3_client().put_object(Bucket=self.bucket, Key=self.full_key(key), Body=data, **extra)

    def write_if(self, key: str, data: bytes, version: str | None) -> str | None:
        """See `Storage`. One conditional request (Amazon S3 and MinIO have them)."""
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        with _s3_errors("write", self.join(key)):
            try:
                put = s3_client().put_object(Bucket=self.bucket, Key=self.full_key(key), Body=data, **condition)
            except _s3_exceptions() as error:
                # 409: another conditional write of it was under way; 404: it should be replaced, and is gone
                if _status(error) in (409, 412) or (version is not None and _code(error) == "NoSuchKey"):
                    return None
                raise
            return put["ETag"].strip('"')
        raise AssertionError("unreachable")

    def delete(self, key: str) -> None:
        with _s3_errors("write", self.join(key)):
            s3_client().delete_object(Bucket=self.bucket, Key=self.full_key(key))

    def exists(self, key: str) -> bool:
        try:
            with _s3_errors("read", self.join(key)):
                s3_client().head_object(Bucket=self.bucket, Key=self.full_key(key))
        except ItemError as error:
            if error.error == "vanished":
                return False
            raise
        return True

    def unfinished(self) -> Iterator[str]:
        """See `Storage`. None: each object is put by one request, which stores all of it or nothing."""
        return iter(())

    def filesystem(self) -> "tuple[FileSystem, str]":
        """See `Storage`. Raises StorageError when the bucket's region is neither set nor can be asked for."""
        import boto3
        from pyarrow.fs import S3FileSystem

        settings: dict[str, Any] = {}
        try:
            client = s3_client()
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
            found = s3_client(attempts=2).list_objects_v2(Bucket=self.bucket, Prefix=prefix, MaxKeys=1)
        except _s3_exceptions() as error:
            raise UsageError(f"{option} {self.uri}: {_describe(error)}; {_advice(error)}") from error
        if self.prefix and not found.get("Contents"):
            raise UsageError(f"{option} {self.uri}: no objects there; check the prefix")

    def check_writable(self, option: str) -> None:
        if self.only is not None:
            raise UsageError(f"{option} {self.join(self.only)}: is an object; name a prefix")
        try:
            s3_client(attempts=2).head_bucket(Bucket=self.bucket)
        except _s3_exceptions() as error:
            raise UsageError(f"{option} {self.uri}: {_describe(error)}; {_advice(error)}") from error


@functools.cache
def s3_client(attempts: int = 8) -> "S3Client":
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
        raise UsageError(f"{one_line(str(error))}; check AWS_ENDPOINT_URL (http://host:port) and AWS_REGION") from error


def _region() -> str | None:
    """Other SDKs read AWS_REGION, botocore only the second."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


def is_s3_object(bucket: str, key: str) -> bool:
    """Tell whether `key` is an object and no folder. Failures are left to `require_readable` to explain."""
    try:
        client = s3_client(attempts=2)
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
        raise ItemError(kind, one_line(f"cannot {doing} {uri}: {_describe(error)}")) from error


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
    return "access denied" if code in ("AccessDenied", "403") else one_line(str(error))


def _advice(error: Exception) -> str:
    if _code(error) in ("NoCredentialsError", "PartialCredentialsError"):
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the machine a role"
    if _code(error) == "ProfileNotFound":
        return "check AWS_PROFILE"
    if _status(error) == 403:
        return "check the credentials and their permissions"
    return "check the bucket's name" if _status(error) == 404 else "check AWS_ENDPOINT_URL, AWS_REGION and the network"

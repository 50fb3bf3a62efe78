"""S3 for Arrow and Ray: goes to other processes without credentials, and has those of the standard chain in each.

Arrow's own filesystem takes the credentials that it was told along when it is pickled: workers would have the driver's
instead of their machine's role, and none after an hour or six.
"""

import functools
import re
import urllib.parse
from typing import TYPE_CHECKING, Any

from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystemHandler, S3FileSystem

from restore_core.storage import s3

if TYPE_CHECKING:
    from pyarrow import NativeFile
    from pyarrow.fs import FileInfo, FileSelector

ATTEMPTS = 10
"""Of a request, at growing intervals."""
AWS = re.compile(r"\.amazonaws\.com(\.cn)?$")
PUBLIC = re.compile(r"s3\.([a-z]+(-[a-z]+)+-[0-9]+\.)?amazonaws\.com(\.cn)?")
"""The endpoints that Arrow would choose itself: not those of a private network (VPC), FIPS or IPv6."""


class S3Files(FileSystemHandler):  # type: ignore[misc]
    """Hands everything on to an S3FileSystem of this process, with the credentials of now. For PyFileSystem.

    What is open already keeps those that it was opened with.
    """

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket

    def now(self) -> S3FileSystem:
        """Raises what boto3 raises when there are no credentials, or the bucket's region cannot be asked for."""
        found = s3.s3_client()._get_credentials()  # type: ignore[attr-defined]
        # Renewed here when they are about to expire.
        return _connect(self.bucket, s3.s3_client().meta.endpoint_url, found and found.get_frozen_credentials())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Files) and other.bucket == self.bucket

    def __hash__(self) -> int:
        return hash(self.bucket)

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> Any:
        return self.now().normalize_path(path)

    def get_file_info(self, paths: list[str]) -> "list[FileInfo]":
        return list(self.now().get_file_info(paths))

    def get_file_info_selector(self, selector: "FileSelector") -> "list[FileInfo]":
        return list(self.now().get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        self.now().create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self.now().delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.now().delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("every bucket emptied: never meant")

    def delete_file(self, path: str) -> None:
        self.now().delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self.now().move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self.now().copy_file(src, dest)

    def open_input_stream(self, path: str) -> "NativeFile":
        return self.now().open_input_stream(path, compression=None)

    def open_input_file(self, path: str) -> "NativeFile":
        return self.now().open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> "NativeFile":
        return self.now().open_output_stream(path, compression=None, metadata=metadata)

    def open_append_stream(self, path: str, metadata: Any) -> "NativeFile":
        return self.now().open_append_stream(path, compression=None, metadata=metadata)


@functools.lru_cache(maxsize=4)
def _connect(bucket: str, endpoint_url: str, credentials: Any) -> S3FileSystem:
    import boto3

    # Delayed: else each file is a multipart upload, which a worker that is killed leaves behind, and which an exception
    # while it is written completes.
    settings: dict[str, Any] = {
        "retry_strategy": AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        "allow_delayed_open": True,
    }
    endpoint = urllib.parse.urlsplit(endpoint_url)
    host = endpoint.hostname or ""
    region = s3.region() or boto3.session.Session().region_name
    if not PUBLIC.fullmatch(host):
        settings |= {"endpoint_override": endpoint.netloc.rpartition("@")[2], "scheme": endpoint.scheme}
    if AWS.search(host):  # pyarrow, unlike boto3, does not follow the redirect to the bucket's own region
        region = s3.region_of(bucket) or region
    if credentials is not None:
        settings |= {"access_key": credentials.access_key, "secret_key": credentials.secret_key}
        settings |= {"session_token": credentials.token} if credentials.token else {}
    return S3FileSystem(region=region or "us-east-1", **settings)

"""The one door to files: local folders and S3 behind one small interface.

boto3 lists and moves objects (its listings carry ETags, one request an object); pyarrow.fs reads and writes Parquet.
Both are imported inside functions, so that importing this package stays light. Custom S3 endpoints, regions and
credentials come from the standard AWS_* variables and files, never from an option.
"""

import os
import re
import urllib.parse
from dataclasses import replace
from pathlib import Path

from restore_core.errors import UsageError
from restore_core.storage.base import GO_ON, Object, Storage, one_line
from restore_core.storage.local import LocalStorage, key_of
from restore_core.storage.s3 import S3Storage, is_s3_object

__all__ = [
    "GO_ON", "LocalStorage", "Object", "S3Storage", "Storage", "key_of", "one_line", "open_storage", "overlaps",
    "with_put_options",
]  # fmt: skip


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
        if name and is_s3_object(bucket, prefix):
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
    try:
        return LocalStorage(root.parent, only=key_of(root.name)) if root.is_file() else LocalStorage(root)
    except OSError as error:  # a folder above may not be entered, or the name is too long
        raise UsageError(
            f"{option} {one_line(key_of(text))}: {error.strerror}; check the path and its permissions"
        ) from error


def with_put_options(storage: Storage, *, storage_class: str | None, kms_key: str | None) -> Storage:
    """Return the storage, which writes with these options of S3; None leaves it to the bucket. Raises UsageError.

    Args:
        storage_class: as S3 names it; one whose objects can be read at once, since ledger and outputs are read again.
        kms_key: ID, ARN or alias of the key that encrypts what is written (SSE-KMS).
    """
    options = {"--storage-class": storage_class, "--kms-key": kms_key}
    for option, value in options.items():
        if value is not None and not isinstance(storage, S3Storage):
            raise UsageError(f"{option} {value}: --output {storage.uri} is not on S3; leave it out")
        if value is not None and not value.strip():
            raise UsageError(f"{option} {value!r}: is empty; leave it out for the bucket's own default")
    if storage_class in ("GLACIER", "DEEP_ARCHIVE"):
        raise UsageError(
            f"--storage-class {storage_class}: the ledger there could not be read again; use GLACIER_IR or STANDARD_IA"
        )
    if not isinstance(storage, S3Storage):
        return storage
    return replace(storage, storage_class=storage_class, kms_key=kms_key)


def overlaps(a: Storage, b: Storage) -> bool:
    """Tell whether `b` is the same place as `a` or lies inside it. A single file overlaps only its own folder."""
    if isinstance(a, LocalStorage) and isinstance(b, LocalStorage):
        # samefile sees through bind mounts and case-insensitive disks; the comparison of paths serves missing folders
        above = [b.root] if a.only is not None else [b.root, *b.root.parents]
        return any(path == a.root or (path.exists() and a.root.exists() and path.samefile(a.root)) for path in above)
    if isinstance(a, S3Storage) and isinstance(b, S3Storage) and a.bucket == b.bucket:
        return b.full_key("") == a.full_key("") if a.only is not None else b.full_key("").startswith(a.full_key(""))
    return False


def _redacted(uri: str) -> str:
    """A URI that was refused, without what may be a password or a signature."""
    return one_line(re.sub(r"//.*@|\?.*", lambda found: found[0][:2] if found[0].startswith("//") else "", uri))

"""What a storage is: objects under a root, named by keys."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


GO_ON = "and the same command goes on"
"""How the message of an ItemError `denied` ends that is a machine's, not the object's: without credentials, say."""


@dataclass(frozen=True, slots=True)
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

    def list(self, prefix: str = "", after: str = "", *, unreadable: bool = False) -> Iterator[Object]:
        """Yield the objects whose key starts with `prefix`, recursively, lazily, in the order of their keys.

        Only those that come behind the key `after`, if that is given.

        Nothing there yields nothing. Raises StorageError, naming the place, when it cannot be listed; with `unreadable`
        a file or folder (KEY/) below the root that cannot be looked at is an object too, and reading it says why.
        """

    def read(self, key: str) -> bytes:
        """Return the object's bytes. Raises ItemError `vanished`, `denied` or `read`."""

    def read_version(self, item: Object) -> tuple[bytes, Object]:
        """Return the bytes of a listed object, whole, and what a listing says of the version that they are.

        That is `item` itself, unless the object has been replaced since. Raises ItemError like `read`.
        """

    def write(self, key: str, data: bytes, content_type: str | None = None) -> None:
        """Write the object whole or not at all, over an older one. Raises ItemError `denied` or `write`."""

    def create(self, key: str) -> AbstractContextManager[IO[bytes]]:
        """Return a file to write into, for what is too large to be held: stored as `write` does when the context ends.

        After an exception nothing is stored. Raises ItemError like `write`.
        """

    def write_if(self, key: str, data: bytes, version: str | None) -> str | None:
        """Write the object only if it is not there (`version` None), or still is that version (an `Object.etag`).

        Returns the new version, None if the condition does not hold. Raises ItemError `denied` or `write`.
        """

    def delete(self, key: str) -> None:
        """Delete the object; a missing one is no error. Raises ItemError `denied` or `write`."""

    def stat(self, key: str) -> Object:
        """Return what a listing shows of the object. Raises ItemError `vanished`, `denied` or `read`."""

    def exists(self, key: str) -> bool:
        """Tell whether the object is there. Raises ItemError `denied` or `read` when that cannot be told."""

    def unfinished(self) -> Iterator[str]:
        """Yield the keys of half-written files that a killed process has left behind; `list` leaves them out.

        Raises StorageError like `list`.
        """

    def remove_unfinished(self, before: float) -> None:
        """Delete those that have not changed since that time (seconds since 1970), where that is allowed.

        Raises StorageError like `list`.
        """

    def filesystem(self) -> "tuple[FileSystem, str]":
        """Return a pyarrow filesystem and the root's path in it, for Parquet and Ray Data."""

    def join(self, key: str) -> str:
        """Return the full path or URI of a key."""

    def child(self, prefix: str) -> "Storage":
        """Return the storage rooted at the sub-folder `prefix`."""

    def check_readable(self, option: str) -> None:
        """Check, before any work, that it can be listed. Raises UsageError: one line of `option`, value and advice."""

    def check_writable(self, option: str) -> None:
        """Check that it can be written: on S3 with an object that is deleted again, else creating nothing.

        Raises UsageError likewise.
        """


def one_line(text: str) -> str:
    """One line without user names and passwords of URLs, and without characters that steer a terminal."""
    line = re.sub(r"//[^/@\s]+@", "//", " ".join(text.split()))[:1000]
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)

"""Local folders. Keys are taken as hostile: whatever they say, nothing outside the root is touched."""

import contextlib
import errno
import fcntl
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import IO, TYPE_CHECKING

from restore_core.errors import ErrorClass, ItemError, StorageError, UsageError
from restore_core.storage.base import Object, one_line

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

# Names that are not UTF-8 (old archives, Latin-1) reach Python as lone surrogates, which Arrow and S3 refuse. In keys
# such a byte 0x80..0xFF is the private-use character U+EF80..U+EFFF, and it becomes the same byte again on disk. A name
# that holds such a character itself has its three bytes in that form, so that no two names have the same key.
_FROM_KEY = {0xEF00 + byte: 0xDC00 + byte for byte in range(0x80, 0x100)}
_TO_KEY = {surrogate: chr(char) for char, surrogate in _FROM_KEY.items()}
_TO_KEY |= {char: "".join(chr(0xEF00 + byte) for byte in chr(char).encode()) for char in _FROM_KEY}

VERSION_TRIES = 5
"""Of reading a file that is written to meanwhile."""

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

    def list(self, prefix: str = "", after: str = "", *, unreadable: bool = False) -> Iterator[Object]:
        """See `Storage`. Symbolic links to folders are not followed; links to files are listed like files."""
        for key, path in self._files(prefix, unreadable):
            if key <= after or _is_temporary(key):
                continue
            if key.endswith("/"):
                yield Object(key, 0, "")
                continue
            try:
                stat = os.stat(path)  # noqa: PTH116  half the time of Path's
            except FileNotFoundError:  # deleted since its folder was listed, or a link that leads nowhere
                continue
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):  # a link that leads nowhere, too
                    continue
                if not (unreadable or (isinstance(error, PermissionError) and Path(path).is_symlink())):
                    raise StorageError(one_line(f"cannot list {self.join(key)}: {error.strerror}")) from error
                yield Object(key, 0, "")  # reading it says what is wrong
                continue
            if S_ISREG(stat.st_mode):
                yield Object(key, stat.st_size, _etag(stat))

    def unfinished(self) -> Iterator[str]:
        return (key for key, _ in self._files("") if _is_temporary(key))

    def remove_unfinished(self, before: float) -> None:
        for key, path in self._files(""):
            if _is_temporary(key):
                with contextlib.suppress(OSError):  # finished in the meantime, or another user's
                    stat = os.lstat(path)
                    # A rename changes only the second: a lease that is just being renewed is moved away for a moment.
                    if max(stat.st_mtime, stat.st_ctime) < before:
                        Path(path).unlink()

    def _files(self, prefix: str, unreadable: bool = False) -> Iterator[tuple[str, str]]:
        """Keys and paths of all that is no folder, in the order of the keys. Of each open folder it holds the names.

        With `unreadable` also folders that cannot be listed, whose keys end in "/".
        """
        folder, slash, start = prefix.rpartition("/")
        top = self._path(folder, "read") if folder else self.root
        folders = [(os.fspath(top), folder + slash, _names(top))]
        while folders:
            place, above, names = folders[-1]
            if not names:
                folders.pop()
                continue
            name = names.pop()
            key, path = above + name, f"{place}/{name.removesuffix('/').translate(_FROM_KEY)}"
            if self.only not in (None, key) or not key.startswith(folder + slash + start):
                continue
            if not key.endswith("/"):
                yield key, path
                continue
            try:
                folders.append((path, key, _names(path)))
            except StorageError:
                if not unreadable:
                    raise
                yield key, path

    def read(self, key: str) -> bytes:
        with _os_errors("read", self.join(key)):
            return self._path(key, "read").read_bytes()

    def read_version(self, item: Object) -> tuple[bytes, Object]:
        with _os_errors("read", self.join(item.key)):
            if item.key.endswith("/"):  # a folder that could not be listed
                with os.scandir(self._path(item.key.removesuffix("/"), "read")):
                    raise ItemError(
                        "read", one_line(f"cannot read {self.join(item.key)}: its files are not listed yet")
                    )
            for _ in range(VERSION_TRIES):
                with self._path(item.key, "read").open("rb") as file:
                    before, data, after = os.fstat(file.fileno()), file.read(), os.fstat(file.fileno())
                if _etag(before) == _etag(after) and before.st_size == after.st_size == len(data):
                    return data, Object(item.key, len(data), _etag(after))
        raise ItemError("read", one_line(f"cannot read {self.join(item.key)}: it is written to all the time"))

    def write(self, key: str, data: bytes, content_type: str | None = None) -> None:
        with self.create(key) as file:
            file.write(data)

    @contextlib.contextmanager
    def create(self, key: str) -> Iterator[IO[bytes]]:
        with _os_errors("write", self.join(key)):
            path = self._path(key, "write")
            with _temporary_file(path) as (temporary, file):
                yield file
                file.close()
                temporary.replace(path)

    def write_if(self, key: str, data: bytes, version: str | None) -> str | None:
        """See `Storage`. Leaves a file KEY.lock. Where files cannot be locked, the old version is moved away first,
        which only one succeeds in, and for a moment nothing is there."""
        with _os_errors("write", self.join(key)):
            path = self._path(key, "write")
            with _temporary_file(path) as (temporary, file), _locked(path) as alone:
                file.write(data)
                file.close()
                if version is not None and alone:
                    if _stored_version(path) != version:
                        return None
                    temporary.replace(path)
                    return _etag(path.stat())
                if version is not None and not _move_away(path, version):
                    return None
                try:
                    _put_new(temporary, path)
                except FileExistsError:
                    return None
                return _etag(path.stat())

    def delete(self, key: str) -> None:
        with _os_errors("write", self.join(key)):
            self._path(key, "write").unlink(missing_ok=True)

    def stat(self, key: str) -> Object:
        with _os_errors("read", self.join(key)):
            stat = self._path(key, "read").stat()
            if not S_ISREG(stat.st_mode):
                raise FileNotFoundError(errno.ENOENT, "not a file")
            return Object(key, stat.st_size, _etag(stat))

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
        try:
            existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        except OSError as error:
            raise UsageError(f"{option} {self.uri}: {error.strerror}; check the path and its permissions") from None
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
        elif any(
            key_of(os.fsdecode(os.fsencode(name))) != part for name, part in zip(parts, key.split("/"), strict=True)
        ):
            reason = "stands for a file name that is another key's"
        elif any(len(os.fsencode(part)) > 255 for part in parts):
            reason = "has a component longer than 255 bytes"
        elif _TEMPORARY.fullmatch(parts[-1]):
            reason = "has the name of a temporary file"
        else:
            path = self.root.joinpath(*parts)
            # A link in the last place is replaced by a write, not followed, but a read would follow it.
            real = Path(os.path.realpath(path if doing == "read" else path.parent))
            if not real.is_relative_to(self.root):
                reason = "leads out of the folder through a symbolic link"
            elif doing != "read" and real != path.parent:  # which a listing does not follow
                reason = "lies in a folder that is a symbolic link"
            else:
                return path
        raise ItemError(doing, one_line(f"key {key!r} {reason}; not allowed in the local folder {self.uri}"))


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A file beside its place, and its path; gone at the end, unless it was moved there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_temporary_name())
    try:
        with temporary.open("xb") as file:
            yield temporary, file
    finally:  # also on KeyboardInterrupt: leave no half a file behind
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Others wait meanwhile, on other machines and threads too; False where the file system cannot do that.

    Not the folder, which NFS would lock on this machine alone.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path.with_name(f"{path.name}.lock"), flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)


def _stored_version(path: Path) -> str | None:
    try:
        with path.open("rb") as file:  # NFS asks its server on opening; a name's own times it remembers for seconds
            return _etag(os.fstat(file.fileno()))
    except FileNotFoundError:
        return None


def _temporary_name() -> str:
    return f".restore-{uuid.uuid4().hex}.tmp"


def _move_away(path: Path, version: str) -> bool:
    """Remove the file if it is that version, else leave it as it is. Returns whether it was."""
    away = path.with_name(_temporary_name())
    try:
        if _etag(path.stat()) != version:
            return False
        path.rename(away)
    except FileNotFoundError:
        return False
    try:
        if _etag(away.stat()) == version:
            return True
        with contextlib.suppress(FileExistsError):  # changed just now, and again since
            _put_new(away, path)
        return False
    finally:
        away.unlink()


def _put_new(source: Path, path: Path) -> None:
    """Give the file another name, which unlike a rename fails with FileExistsError where there is something."""
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with path.open("xb") as file:
            file.write(source.read_bytes())


def _etag(stat: os.stat_result) -> str:
    return f"{stat.st_mtime_ns:x}"


def _names(folder: str | Path) -> list[str]:
    """Names as in keys (those of folders end in "/", which sorts them as S3 does), the last one first."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (key_of(entry.name) + "/" * entry.is_dir(follow_symlinks=False) for entry in entries), reverse=True
            )
    except FileNotFoundError:
        return []
    except OSError as error:
        place = one_line(key_of(str(folder)))
        raise StorageError(f"cannot list {place}: {error.strerror}; fix its permissions or move it away") from error


def _is_temporary(key: str) -> bool:
    return _TEMPORARY.fullmatch(key.rpartition("/")[2]) is not None


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
        raise ItemError(kind, one_line(f"cannot {doing} {uri}: {error.strerror or error}")) from error

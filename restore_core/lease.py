"""One writer at a time: a file in the output, created only if it is not there, and renewed while its owner lives.

Stands on conditional writes (If-None-Match and If-Match on S3, links and locks on disk), so it needs no other service.
Clocks of machines that share an output need not agree: before a lease of another machine is taken over it is watched,
since a living owner renews it.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from restore_core.errors import ItemError, StorageError, UsageError
from restore_core.storage import Object, Storage

logger = logging.getLogger(__name__)

RENEW_SECONDS, EXPIRE_SECONDS = 15.0, 60.0
"""How often a living owner renews its lease, and how long a dead one has not. Seconds."""
WATCH_SECONDS = 1.0
"""How often a lease is looked at that may be a dead one's."""


@dataclass(frozen=True)
class Owner:
    """What the file says. Times are seconds since 1970."""

    run_id: str
    host: str
    pid: int
    process: str
    """Identifies the process among all that ever ran on its machine; "" where the system does not tell."""
    since: float
    renewed: float

    def describe(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).isoformat(" ", "seconds")
        return f"host {self.host!r}, process {self.pid}, since {since}"

    def left(self) -> float:
        """Seconds until it may be taken for dead, by this machine's clock; 0 where that is so, or cannot be told."""
        age = time.time() - self.renewed
        return EXPIRE_SECONDS - age if abs(age) <= EXPIRE_SECONDS else 0.0

    def gone(self) -> bool:
        """Whether it was a process of this machine that is gone."""
        machine = _machine()
        return bool(machine) and self.process.startswith(machine) and self.process != _process(self.pid)


class Lease:
    """Holds OUTPUT/`key` as a context manager.

    Entering raises UsageError when another run holds it, ItemError or StorageError when the output cannot be used.

    Args:
        output: where nobody else may write meanwhile.
        key: of the file.
        run_id: of this run, unique.
        option: to name in the error.
        what: the run is, in the error.
    """

    def __init__(self, output: Storage, key: str, run_id: str, option: str = "--output", what: str = "restore") -> None:
        self._output = output
        self._key = key
        self._option = option
        self._what = what
        now = time.time()
        self._owner = Owner(run_id, socket.gethostname(), os.getpid(), _process(os.getpid()), now, now)
        self._version: str | None = None
        self._lost = False
        self._ended = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    @property
    def since(self) -> float:
        """Before it was taken. Seconds since 1970."""
        return self._owner.since

    def __enter__(self) -> Self:
        self._version = self._put(None)
        if self._version is None:
            self._version = self._take_over()
        elif self._put(None, replace(self._owner, pid=0)) is not None:  # what is there is not this
            self._output.delete(self._key)
            raise UsageError(
                f"{self._option} {self._output.uri}: this storage does not heed conditional writes (If-None-Match), so "
                "two runs there could not be kept apart; use one that does"
            )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(ItemError, StorageError, UsageError):  # it expires by itself
            if not self._lost and self._parse(self._output.read(self._key)).run_id == self._owner.run_id:
                self._output.delete(self._key)

    def check(self) -> None:
        """Raise StorageError if another run may have taken the lease over, since this one could not renew it."""
        if self._gone():  # or this machine slept
            self._renew()
        if self._gone():
            raise StorageError(
                f"{self._option} {self._output.uri}: this run could not renew its lease {self._key} and another may be "
                "at work there; start again to go on"
            )

    def _gone(self) -> bool:
        return self._lost or time.time() - self._owner.renewed > EXPIRE_SECONDS

    def _put(self, version: str | None, owner: Owner | None = None) -> str | None:
        data = json.dumps(asdict(owner or self._owner), indent=2).encode()
        return self._output.write_if(self._key, data, version)

    def _take_over(self) -> str:
        """The lease of an owner that is dead. Raises UsageError if it lives, or another is quicker."""
        found = self._stored()
        try:
            data = self._output.read(self._key) if found else None
        except ItemError as error:
            if error.error != "vanished":
                raise
            data = None
        if data is None:  # given back in the meantime
            version = self._put(None)
        else:
            owner = self._parse(data)
            assert found is not None
            left = owner.left()
            if not owner.gone() and (left or not self._rests(found, owner)):
                killed = f", or, if it was killed, start again in {max(1, round(left))} s" if left else ""
                raise UsageError(
                    f"{self._option} {self._output.uri}: another {self._what} is at work there ({owner.describe()}); "
                    f"wait until it ends{killed}"
                )
            self._owner = replace(self._owner, renewed=time.time())
            version = self._put(found.etag)
        if version is None:
            raise UsageError(
                f"{self._option} {self._output.uri}: another {self._what} began at the same moment; wait for it"
            )
        return version

    def _rests(self, found: Object, owner: Owner) -> bool:
        """Whether nobody renews it for long enough. Clocks may differ by more than that."""
        logger.info("the lease of another run (%s) seems to be a dead one's: watched", owner.describe())
        end = time.monotonic() + EXPIRE_SECONDS
        while time.monotonic() < end:
            time.sleep(WATCH_SECONDS)
            if self._stored() != found:
                return False
        return True

    def _stored(self) -> Object | None:
        return next((item for item in self._output.list(self._key) if item.key == self._key), None)

    def _parse(self, data: bytes) -> Owner:
        try:
            owner = Owner(**json.loads(data))
            owner.describe()
            float(owner.renewed)
            owner.process.startswith("")
        except (ValueError, TypeError, AttributeError, OverflowError, OSError):
            raise UsageError(
                f"{self._option} {self._output.uri}: {self._key} there is no lease of a run; delete it"
            ) from None
        return owner

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            self._renew()

    def _renew(self) -> None:
        with self._one_at_a_time:
            if self._lost:
                return
            owner = replace(self._owner, renewed=time.time())
            # No connection, say, or credentials that could not be renewed, whose errors are of any type.
            with contextlib.suppress(Exception):
                self._version = self._put(self._version, owner) or self._put_again(owner)
                self._owner, self._lost = owner, self._version is None

    def _put_again(self, owner: Owner) -> str | None:
        """Where it is another version than was known, but ours: one was stored whose answer was lost."""
        found = self._stored()
        if found is None or self._parse(self._output.read(self._key)).run_id != owner.run_id:
            return None
        return self._put(found.etag, owner)


def _machine() -> str:
    """Identifies this machine since its start, and the container; "" where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').readlink()}/"
    except OSError:
        return ""


def _process(pid: int) -> str:
    """Identifies a process that runs here now; the number alone would do for a later one too."""
    machine = _machine()
    gone = f"{machine}gone" if machine else ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return gone
    state, started = fields[0], fields[19]  # started: in clock ticks since the boot
    return gone if state in "ZX" else f"{machine}{pid}/{started}"  # Z: it has ended, and its parent has not asked

"""Rows as they come from the actors: into the ledger in time, onto the terminal in short, and a verdict on the run."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

import ray.data
from ray.data._internal.execution import backpressure_policy

from restore_core import manifest
from restore_core.errors import ItemError
from restore_core.lease import Lease
from restore_core.manifest import Ledger, Overview, Row
from restore_core.pipelines import cluster
from restore_core.storage import GO_ON

logger = logging.getLogger(__name__)

FLUSH_ROWS, FLUSH_SECONDS = 2000, 10.0
"""The ledger is written down after so many rows or seconds: what a killed driver has to do again."""
PROGRESS_SECONDS = 5.0
VERDICT_ROWS = 1000
"""So many have to be done before a run is stopped because too many fail, as S3 Batch Operations does."""
DENIED_ROWS = 100
"""It is stopped after so many if access was denied to each of them: more photographs would be worked on for nothing."""


MEND = "mend the cause, then start again with --retry-failed all"


class Stopped(Exception):
    """The run ends before all is done; what is not done has no row of it."""


_writing = threading.Event()
"""Set while the driver writes rows down."""


class WaitForLedger(backpressure_policy.BackpressurePolicy):  # type: ignore[misc]
    """Nothing new goes to the actors while rows are written down: were the driver killed then, it would be done again.

    Asked by Ray Data's scheduler, in the driver. A ledger on S3 may take minutes when the network is in trouble.
    """

    def can_add_input(self, op: object) -> bool:
        return not _writing.is_set()


BACKPRESSURE = [*backpressure_policy.ENABLED_BACKPRESSURE_POLICIES, WaitForLedger]
BACKPRESSURE_KEY = backpressure_policy.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY


class Account:
    """Of one run.

    Args:
        max_failed_share: when more of what is done has failed, `add` raises Stopped, but not before
            `VERDICT_ROWS` are done.
        refuse: takes an output away; called for what an earlier run has written and this one would not.
    """

    def __init__(
        self, ledger: Ledger, lease: Lease, overview: Overview, max_failed_share: float, refuse: Callable[[str], None]
    ) -> None:
        self.listed = 0
        """Objects listed until now."""
        self.total = 0
        """Of them, those to work on."""
        self.complete = False
        """Whether there are no more."""
        self.count = 0
        """Objects done."""
        self.done: set[str] = set()
        """The keys of those of this wave."""
        self.shards: set[str] = set()
        """Of Parquet: the outputs that are as they should be, since this run has written them or found them so."""
        self.refusable: dict[str, str] = {}
        """Keys of this wave that an earlier run has written an output of, and of which version (the object's etag)."""
        self._refuse = refuse
        self._lease = lease
        self._ledger = ledger
        self._overview = overview
        self._max_failed_share = max_failed_share
        self._failed = self._denied = 0
        self._waiting: list[Row] = []
        self._flushed = self._shown = time.monotonic()
        # When the first rows came, and how many: what came before was the start of the workers.
        self._first: tuple[float, int] | None = None

    def follow(self, dataset: ray.data.Dataset) -> None:
        """Execute it and take its rows."""
        with cluster.releasing_actors(lambda: self.count):
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                self.add(manifest.rows_of(table))

    def add(self, rows: list[Row]) -> None:
        """Raises Stopped, and StorageError where the lease is lost or the ledger cannot be written."""
        self._lease.check()
        no_credentials = None
        for row in rows:
            if row.error == "denied" and (row.message or "").endswith(GO_ON):
                no_credentials = row  # nothing is wrong with the object, and nothing is said of it
            elif row.key not in self.done:
                # Not of a version that there is no more: it would be the last that is left of it.
                if row.error == "model" and self.refusable.get(row.key) == row.etag:
                    with contextlib.suppress(ItemError):  # then it is what jobs/verify_bucket.py calls extra
                        self._refuse(row.key)
                self.done.add(row.key)
                self.count += 1
                if row.output_key not in (None, row.key):
                    self.shards.add(row.output_key)
                self._waiting.append(row)
                self._overview.add(row)
                self._failed += row.status == "failed"
                self._denied += row.error == "denied"
        now = time.monotonic()
        if self._first is None:
            self._first, self._shown = (now, self.count), now
        if len(self._waiting) >= FLUSH_ROWS or now - self._flushed > FLUSH_SECONDS:
            self.flush()
        since, before = self._first
        if now - self._shown > PROGRESS_SECONDS and self.count > before:
            self._shown = now
            self._show((self.count - before) / (now - since))
        if no_credentials is not None:
            raise Stopped(f"{no_credentials.message} (node {no_credentials.node}); {self._left()}")
        self._judge(rows)

    def flush(self) -> None:
        if self._waiting:
            self._lease.check()  # or they would stand beside those of another run, which may have done them anew
            _writing.set()
            try:
                self._ledger.append(self._waiting)
            finally:
                _writing.clear()
        self._waiting = []
        self._flushed = time.monotonic()

    def _show(self, rate: float) -> None:
        left = max(0, self.total - self.count) / rate
        more = "" if self.complete else ", and what is not listed yet"
        logger.info(
            "%d of %d done, %d failed, %.1f images/s, about %.0f s left%s",
            self.count, self.total, self._failed, rate, left, more,
        )  # fmt: skip

    def _left(self) -> str:
        more = "" if self.complete else "and what was not listed yet "
        return f"{self.total - self.count} {more}were left alone"

    def _judge(self, rows: list[Row]) -> None:
        if self._denied == self.count >= DENIED_ROWS and self._max_failed_share < 1:
            raise Stopped(
                f"access was denied to each of the first {self._denied} objects (the last: {rows[-1].message}); "
                f"{self._left()}; {MEND}"
            )
        if self.count >= VERDICT_ROWS and self._failed > self._max_failed_share * self.count:
            raise Stopped(
                f"{self._failed} of the first {self.count} objects failed, more than --max-failed-share "
                f"{self._max_failed_share:g}; {self._left()}; {MEND}"
            )

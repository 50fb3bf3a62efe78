"""Rows as they come from the actors: into the ledger in time, onto the terminal in short, and a verdict on the run."""

import contextlib
import logging
import time
from collections.abc import Callable
from typing import ClassVar

import ray.data
from ray.data._internal.execution import backpressure_policy, interfaces

from restore_core import manifest
from restore_core.errors import ItemError
from restore_core.lease import Lease
from restore_core.manifest import Ledger, Overview, Row
from restore_core.pipelines import cluster
from restore_core.storage import GO_ON

logger = logging.getLogger(__name__)

FLUSH_ROWS, FLUSH_SECONDS = 2000, 10.0
"""The ledger is written down after so many rows (less what comes back meanwhile) or seconds: a killed driver has no
more to do again than these and what its actors had in hand. Where they have more in hand, twice as much instead."""
PROGRESS_SECONDS = 5.0
VERDICT_ROWS = 1000
"""So many have to be done before a run is stopped because too many fail, as S3 Batch Operations does."""
DENIED_ROWS = 100
"""It is stopped after so many if access was denied to each of them: more photographs would be worked on for nothing."""


MEND = "mend the cause, then start again with --retry-failed all"


class Stopped(Exception):
    """The run ends before all is done; what is not done has no row of it."""


class WaitForLedger(backpressure_policy.BackpressurePolicy):  # type: ignore[misc]
    """Nothing new goes to the actors while rows are written down, or have to be: were the driver killed then, it would
    be done again.

    Asked by Ray Data's scheduler, in a thread of the driver. A ledger on S3 may take minutes when the network is in
    trouble, and a driver on a busy machine some time to come to what has come back.
    """

    account: "ClassVar[Account | None]" = None
    """Of the run of this process."""

    def can_add_input(self, op: interfaces.PhysicalOperator) -> bool:
        return self.account is None or self.account.has_room(op)


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
        self.actors = 0
        """Processes that the last wave was for."""
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
        self._writing = False
        self._units, self._unit_rows, self._due = 0, 0, FLUSH_ROWS
        self._flushed = self._shown = time.monotonic()
        # When the first rows came, and how many: what came before was the start of the workers.
        self._first: tuple[float, int] | None = None

    def follow(self, dataset: ray.data.Dataset, *, actors: int, unit_rows: int) -> None:
        """Execute it and take its rows: a block for each unit, of `unit_rows` at the most (0: of any number)."""
        self.actors, in_hand = actors, actors * unit_rows
        self._units, self._unit_rows, self._due = 0, unit_rows, max(FLUSH_ROWS - in_hand, in_hand)
        WaitForLedger.account = self
        with cluster.releasing_actors(lambda: self.count):
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                self.add(manifest.rows_of(table))
                self._units += 1

    def has_room(self, op: interfaces.PhysicalOperator) -> bool:
        """Whether more may be begun, before rows are written down; of the last operator also of what has come back and
        was not taken yet."""
        coming = 0 if op.output_dependencies else op.metrics.num_task_outputs_generated - self._units
        return not self._writing and len(self._waiting) + coming * self._unit_rows < self._due

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
        if len(self._waiting) >= self._due or now - self._flushed > FLUSH_SECONDS:
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
            self._writing = True
            try:
                self._ledger.append(self._waiting)
            finally:
                self._writing = False
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

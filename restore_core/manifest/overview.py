"""What became of everything listed, in figures: hardly larger for a million objects than for ten."""

import heapq
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field

from restore_core.manifest.rows import Row

SAMPLES, SAMPLE_PIXELS = 12, 2**24
"""Of the report: how many photographs it shows, and how large one may be for it."""


@dataclass
class Overview:
    """Rows are added one by one, each object's last one."""

    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    """As Pillow names them; "not decoded" for the others."""
    first_failures: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Of each error: key and message."""
    changes: "array[float]" = field(default_factory=lambda: array("f"))
    """Of the restored: mean absolute difference, of 255."""
    _samples: list[tuple[int, str, Row]] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.statuses[str(row.status)] += 1
        self.formats[row.format or "not decoded"] += 1
        if row.error is not None:
            self.errors[row.error] += 1
            self.first_failures.setdefault(row.error, (row.key, row.message or ""))
        if row.status == "restored":
            self.changes.append(row.change or 0.0)
            if (row.width or 0) * (row.height or 0) < SAMPLE_PIXELS:
                # Those with the largest checksums: the same in every run, and from all over the collection.
                sample = zlib.crc32(row.key.encode()), row.key, row
                if len(self._samples) < SAMPLES:
                    heapq.heappush(self._samples, sample)
                else:
                    heapq.heappushpop(self._samples, sample)

    @property
    def samples(self) -> list[Row]:
        """Some rows of restored photographs, sorted by key."""
        return [row for _, _, row in sorted(self._samples, key=lambda sample: sample[1])]

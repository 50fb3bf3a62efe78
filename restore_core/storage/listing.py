"""A bucket's listing page by page, several ranges of keys at once, in the order of the keys."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from queue import Full, Queue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef

Page = list[tuple[str, int, str]]
"""Keys, sizes in bytes and ETags."""
Request = Callable[..., "ListObjectsV2OutputTypeDef"]
"""ListObjectsV2 of one bucket."""

RANGES = 64
"""Into which the keys are cut, at the folders that are there."""
THREADS = 8
"""Ranges that are listed at once."""
PAGES_AHEAD = 32
"""Of each of them, a thousand keys each: with all of the threads' about 70 MB."""
FOLDER_PAGES = 4
"""That are looked at for folders, a thousand each."""
DEPTH = 32
"""Folders with nothing but one folder in them that are gone down."""


def pages(request: Request, prefix: str, after: str = "") -> Iterator[Page]:
    """All keys with a prefix that come behind `after`. What fits on one page takes one request."""
    first = request(Prefix=prefix, **_behind(after))
    page = page_of(first)
    yield page
    if not first.get("IsTruncated"):
        return
    last = page[-1][0] if page else after  # a page may be empty and yet not the last
    cuts: list[str | None] = [last, *_cuts(request, prefix, last), None]
    ranges = [_range(request, prefix, after, last) for after, last in pairwise(cuts)]
    yield from _in_turn(ranges)


def _behind(key: str | None) -> dict[str, str]:
    return {"StartAfter": key} if key else {}


def page_of(found: "ListObjectsV2OutputTypeDef") -> Page:
    return [(entry["Key"], entry["Size"], entry["ETag"].strip('"')) for entry in found.get("Contents", [])]


def _cuts(request: Request, prefix: str, after: str) -> list[str]:
    """Some folders and keys beyond `after`, evenly spread over what is there."""
    entries: list[str] = []
    for _ in range(DEPTH):
        entries = []
        more = _behind(after)
        for _ in range(FOLDER_PAGES):
            found = request(Prefix=prefix, Delimiter="/", **more)
            entries += [entry["Prefix"] for entry in found.get("CommonPrefixes", [])]
            entries += [entry["Key"] for entry in found.get("Contents", [])]
            if not found.get("IsTruncated"):
                break
            more = {"ContinuationToken": found["NextContinuationToken"]}
        if len(entries) != 1 or not entries[0].endswith("/") or entries[0] == prefix:
            break
        prefix = entries[0]
    entries = sorted({entry for entry in entries if entry > after})
    step = max(1, len(entries) // RANGES)
    return entries[::step]


def _range(request: Request, prefix: str, after: str | None, last: str | None) -> Iterator[Page]:
    """The keys behind `after` up to and with `last`."""
    more = _behind(after)
    while True:
        found = request(Prefix=prefix, **more)
        page = page_of(found)
        inside = [entry for entry in page if last is None or entry[0] <= last]
        yield inside
        if len(inside) < len(page) or not found.get("IsTruncated"):
            return
        more = {"ContinuationToken": found["NextContinuationToken"]}


def _in_turn(ranges: list[Iterator[Page]]) -> Iterator[Page]:
    """One range after the other, while threads read ahead in the next ones."""
    ended = threading.Event()
    queues: list[Queue[Page | BaseException | None]] = [Queue(PAGES_AHEAD) for _ in ranges]

    def put(queue: "Queue[Page | BaseException | None]", value: Page | BaseException | None) -> None:
        while not ended.is_set():
            try:
                queue.put(value, timeout=0.2)
                return
            except Full:
                continue

    def read(pages: Iterator[Page], queue: "Queue[Page | BaseException | None]") -> None:
        try:
            for page in pages:
                put(queue, page)
                if ended.is_set():
                    return
            put(queue, None)
        except BaseException as error:  # noqa: BLE001  raised where the page is waited for
            put(queue, error)

    pool = ThreadPoolExecutor(THREADS)
    try:
        for pages, queue in zip(ranges, queues, strict=True):
            pool.submit(read, pages, queue)
        for queue in queues:
            while (value := queue.get()) is not None:
                if isinstance(value, BaseException):
                    raise value
                yield value
    finally:
        ended.set()
        pool.shutdown(wait=False, cancel_futures=True)

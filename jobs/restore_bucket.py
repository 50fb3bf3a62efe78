#!/usr/bin/env python
"""Restore every photograph of a folder, an S3 prefix or a Parquet dataset, and account for each of them.

Outputs keep the inputs' names and formats. OUTPUT/_restore holds the ledger (manifest/*.parquet, one row per input
object), run.json and report.html. Started again, it does only what is missing or has changed.
"""

import itertools
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs import command_line
from restore_core.config import Precision, parse_repair, require
from restore_core.errors import UsageError

logger = logging.getLogger(__name__)

REPORT_FILE = "_restore/report.html"
FEW_FILES, IO_THREADS = 1000, 16
"""Of an output that holds more than so many files of others, and no ledger, the input is listed before the work; else
the input is asked for each of those names, so many at once."""

if TYPE_CHECKING:
    from restore_core.storage import Storage


@dataclass(frozen=True, kw_only=True)
class RestoreBucket:
    input: str
    """A local folder or file, s3://bucket/prefix, or Parquet files with a column of encoded images."""
    output: str
    """A local folder or s3://bucket/prefix, outside --input."""
    keys: str | None = None
    """Work only on the keys in this list: manifest.json of an S3 Inventory, a Parquet or CSV file with a column key
    (and perhaps size and etag), or text with a key a line, relative to --input."""
    resume_listing: bool = False
    """After an interruption: go on where the listing ended, instead of listing --input anew. What has since changed in
    the part that is not listed again, the next run finds."""
    model: str = "faces"
    """A bundled model's name, or the path or URI of a model folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs where the cluster has some."""
    workers: str = "auto"
    """Processes that hold the model: a number, or auto for every GPU of the cluster, else every CPU (fewer processes of
    several threads each, where CPUs share less than 2 GB)."""
    batch_size: int = 16
    """Images that a worker handles together; lower it when memory runs out."""
    max_megapixels: float | None = None
    """Larger pictures are refused as too_large, before they are decoded. Megapixels of 8-bit colour; others count by
    the memory that they take: alpha 1.6 times, 16 bits 1.7, WebP 2.1. Else what the workers' memory allows."""
    strip_metadata: bool = False
    """Drop EXIF, XMP and texts (the ICC profile and the orientation stay)."""
    frames: Literal["refuse", "first", "all"] = "refuse"
    """Animations and files of several pages: refuse them, restore the first picture alone (the others are left out of
    the output), or all."""
    repair: str = "noise,flips,patches,gray"
    """Kinds of damage to repair; what the others did stays. Without gray, what lost its colour stays gray."""
    self_ensemble: bool = False
    """Restore each image and its mirror image and take the mean: a little better, twice the work."""
    precision: Precision = "auto"
    """Of the network's arithmetic. bfloat16 is 1.8 times as fast as float32 on CPUs with AMX or AVX-512 BF16, and
    changes values by 1 or 2 of 255; auto takes it on GPUs since Ampere, else float32."""
    max_change: float | None = None
    """Do not write results that differ more from the input than this, on average over the pixels; 0 to 255."""
    retry_failed: str | None = None
    """Try failed objects again: all, or classes of the ledger's column `error`, such as read,denied."""
    max_failed_share: float = 0.5
    """Exit with 1 when more than this share has failed, 0 to 1; from 1,000 done on, stop as soon as that is so."""

    storage_class: str | None = None
    """Of all that is written to S3, such as STANDARD_IA or GLACIER_IR; else the bucket's default."""
    kms_key: str | None = None
    """ID, ARN or alias of the KMS key that encrypts all that is written to S3; else the bucket's default."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "use 1 or more")
        most = self.max_megapixels
        require(most is None or 0 < most < 1e6, "max_megapixels", most, "use a number from 0 to 1000000")
        require(0 <= self.max_failed_share <= 1, "max_failed_share", self.max_failed_share, "use a share from 0 to 1")
        if self.max_change is not None:
            require(0 <= self.max_change <= 255, "max_change", self.max_change, "use a number from 0 to 255")
        if self.resume_listing and self.keys:
            raise UsageError("--resume-listing: leave it out, with --keys nothing is listed")
        parse_repair(self.repair)
        command_line.worker_count(self.workers)


def in_the_way(source: "Storage", output: "Storage") -> str | None:
    """What the output has, before the first restore into it, in the place of something that would be written.

    Raises StorageError where the input cannot be asked.
    """
    from restore_core import manifest
    from restore_core.errors import ItemError, StorageError
    from restore_core.pipelines.listing import files_of_shard

    def is_there(key: str) -> bool:
        try:
            return source.only in (None, key) and source.exists(key)
        except ItemError as error:
            if error.others_too:
                raise StorageError(error.message) from error
            return error.error == "denied"  # else it is no name that the input can have

    def would_be_written(key: str) -> bool:
        return any(map(is_there, files_of_shard(key)))

    if next(iter(output.list(f"{manifest.FOLDER}/")), None) is not None:
        return None
    found = (item.key for item in output.list())
    few = list(itertools.islice(found, FEW_FILES))
    with ThreadPoolExecutor(IO_THREADS) as pool:
        if there := [key for key, written in zip(few, pool.map(would_be_written, few), strict=True) if written]:
            return there[0]
    first = next(found, None)
    if first is None:
        return None
    logger.info("the output has many files and no restore's: its names are held against the input's first")
    rest = manifest.Sorted(((key, True) for key in itertools.chain([first], found)), "the output's listing")
    listed = (item.key for item in source.list(after=few[-1], unreadable=True))
    if (key := next((key for key in listed if key in rest), None)) is not None:
        return key
    shards = (item.key for item in output.list(after=few[-1]) if len(files_of_shard(item.key)) > 1)
    return next((key for key in shards if would_be_written(key)), None)


def main(job: RestoreBucket) -> int:
    from restore_core import checkpoint, manifest
    from restore_core.storage import open_storage, overlaps, with_put_options

    retry = manifest.parse_retry(job.retry_failed)
    source = open_storage(job.input, option="--input")
    source.check_readable("--input")
    output = open_storage(job.output, option="--output")
    if overlaps(source, output) or overlaps(output, source):
        raise UsageError(f"--output {job.output}: lies inside --input {job.input} or around it; choose another place")
    if job.keys and source.only is not None:
        raise UsageError(f"--input {job.input}: is one file; with --keys name the folder or prefix that they are in")
    output = with_put_options(output, storage_class=job.storage_class, kms_key=job.kms_key)
    output.check_writable("--output")
    if (found := in_the_way(source, output)) is not None:
        raise UsageError(
            f"--output {job.output}: has a file {found!r} that no restore has made, and it would be written over; name "
            "another place"
        )
    model = checkpoint.read(job.model)
    from restore_core import report
    from restore_core.pipelines.restoration import RestoreOptions, restore

    options = RestoreOptions(
        model=job.model,
        keys=job.keys,
        resume_listing=job.resume_listing,
        device=job.device,
        workers=command_line.worker_count(job.workers),
        batch_size=job.batch_size,
        max_pixels=None if job.max_megapixels is None else max(1, int(job.max_megapixels * 1e6)),
        strip_metadata=job.strip_metadata,
        frames=job.frames,
        repair=parse_repair(job.repair),
        self_ensemble=job.self_ensemble,
        precision=job.precision,
        max_change=job.max_change,
        retry=retry,
        max_failed_share=job.max_failed_share,
    )
    summary = restore(source, output, model, options, sys.argv)
    page = report.restore_page(summary.overview, summary.record, summary.samples, source.uri, output.uri)
    output.write(REPORT_FILE, page, content_type="text/html; charset=utf-8")
    counts = ", ".join(f"{count} {status}" for status, count in summary.record["statuses"].items())
    print(f"{summary.listed} objects: {counts} ({summary.already_done} by earlier runs)")
    if errors := summary.record["errors"]:
        print("failures: " + ", ".join(f"{count} {error}" for error, count in errors.items()))
    print(f"{summary.seconds:.1f} s, {summary.images_per_second:.1f} images/s")
    print(f"report: {output.join(REPORT_FILE)}")
    if summary.stopped:
        print(f"stopped: {summary.stopped}")
    if summary.interrupted:
        return command_line.INTERRUPTED
    failed = summary.stopped or summary.failed_share > job.max_failed_share
    return command_line.TOO_MANY_FAILURES if failed else command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, RestoreBucket))

#!/usr/bin/env python
"""Pack photographs (folders, the official LFW archives, S3 prefixes) into the Parquet that training reads.

People are kept apart: nobody is in two of train, val and test. The encoded files are stored untouched. Files that
cannot be read are listed in OUTPUT/_pack/broken.csv.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs import command_line
from restore_core.config import require
from restore_core.errors import UsageError

FEW_PEOPLE = 20
"""With fewer a share of them may well be none or all."""


@dataclass(frozen=True, kw_only=True)
class PackDataset:
    input: tuple[str, ...]
    """Folders, archives (.tar, .tar.gz, .tgz) or s3://bucket/prefix; a photograph's folder names its person."""
    output: str
    """Where the Parquet shards go: a local folder or s3://bucket/prefix."""
    val_share: float = 0.1
    """Share of the people whose photographs are held out for validation, 0 to 1."""
    test_share: float = 0.0
    """Share of the people whose photographs are held out for a final test, 0 to 1."""
    train_list: Path | None = None
    """People who are in train whatever the shares say: a text file, a name a line (LFW's peopleDevTrain.txt). A
    first line that only counts the others is skipped."""
    val_list: Path | None = None
    """The same for val."""
    test_list: Path | None = None
    """The same for test (LFW's peopleDevTest.txt)."""

    def __post_init__(self) -> None:
        for name in ("val_share", "test_share"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "use a share from 0 to 1")
        require(self.val_share + self.test_share < 1, "val_share", self.val_share, "leave some people for training")
        require(len(self.input) > 0, "input", "", "name at least one folder, archive or s3:// prefix")


def main(job: PackDataset) -> int:
    from restore_core import sources
    from restore_core.pipelines.packing import Splits, pack
    from restore_core.storage import open_storage, overlaps

    inputs = [open_storage(place, option="--input") for place in job.input]
    output = open_storage(job.output, option="--output")
    for storage in inputs:
        storage.check_readable("--input")
        if overlaps(storage, output):
            raise UsageError(f"--output {job.output}: lies inside --input {storage.uri}; choose another place")
    output.check_writable("--output")
    lists = {sources.TRAIN: job.train_list, sources.VALIDATION: job.val_list, sources.TEST: job.test_list}
    people = {split: sources.read_list(path, f"--{split}-list") for split, path in lists.items() if path is not None}
    for split, names in people.items():
        for other, others in people.items():
            if split < other and names & others:
                raise UsageError(f"--{split}-list and --{other}-list both name {min(names & others)!r}; remove one")
    for storage in inputs:
        if next(iter(storage.list()), None) is None:
            raise UsageError(f"--input {storage.uri}: no files there; check the path or prefix")
    splits = Splits(val_share=job.val_share, test_share=job.test_share, lists=people)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(job).items()}
    result = pack(inputs, output, splits, options)
    if not result.photographs and not result.broken:
        raise UsageError(f"--input {' '.join(job.input)}: the archives there hold no files")
    if not result.photographs:
        key, error, message = result.broken[0]
        raise UsageError(
            f"--input {' '.join(job.input)}: none of the {len(result.broken)} files there is a photograph; "
            f"the first, {key!r}, is {error}: {message}"
        )
    for split in sorted(result.photographs):
        print(f"{split}: {result.photographs[split]} photographs of {len(result.people[split])} people")
    there = set().union(*result.people.values())
    for split, names in people.items():
        if missing := sorted(names - there):
            print(
                f"--{split}-list {lists[split]}: {len(missing)} of its {len(names)} people have no photograph here, "
                f"such as {missing[0]!r}; names are those of the folders"
            )
    for split, option in ((sources.TRAIN, "a smaller --val-share"), (sources.VALIDATION, "a larger --val-share")):
        if not result.photographs[split] and len(there) < FEW_PEOPLE and not people:
            print(f"{split}: none, since there are {len(there)} people only (a folder is one): name some in lists")
        elif not result.photographs[split]:
            print(f"{split}: none; training needs some: use {option} or lists")
    if result.broken:
        print(f"{len(result.broken)} files could not be used: {output.join(sources.BROKEN_FILE)}")
    return command_line.DONE


if __name__ == "__main__":
    sys.exit(command_line.run(main, PackDataset))

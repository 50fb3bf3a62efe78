"""What all jobs share as commands: options from a dataclass, one line for an error, the exit code."""

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from restore_core.errors import StorageError, UsageError

Options = TypeVar("Options")

DONE, TOO_MANY_FAILURES, UNUSABLE, INTERRUPTED = 0, 1, 2, 130


def run(main: Callable[[Options], int], options: type[Options]) -> int:
    """Parse the command line into `options` and call `main`. Returns the exit code: 0 done, 1 failures, 2 unusable."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("botocore").setLevel(logging.WARNING)  # else it tells where it found the credentials
    try:
        return main(tyro.cli(options, description=sys.modules[main.__module__].__doc__))
    except (UsageError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


def worker_count(text: str) -> int | None:
    """The option --workers: None for auto. Raises UsageError."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--workers {text}: use auto or a number from 1")
    return int(text)

"""What all jobs share as commands: options from a dataclass, one line for an error, the exit code."""

import contextlib
import io
import logging
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import tyro

from restore_core.errors import ItemError, StorageError, UsageError

if TYPE_CHECKING:
    from restore_core.storage import Storage

Options = TypeVar("Options")

DONE, TOO_MANY_FAILURES, UNUSABLE, INTERRUPTED = 0, 1, 2, 130


def run(main: Callable[[Options], int], options: type[Options]) -> int:
    """Parse the command line into `options` and call `main`. Returns the exit code: 0 done, 1 failures, 2 unusable."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("botocore", "matplotlib"):  # they tell where credentials were found, that fonts were looked for
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        return main(_parsed(options, sys.modules[main.__module__].__doc__))
    except (UsageError, StorageError) as error:
        return _unusable(str(error))
    except ItemError as error:  # of a file that the whole job needs, such as its report
        return _unusable(error.message)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        # Of what was raised in a worker Ray makes an error of its own, whose text is the traceback there.
        found = re.findall(r"^restore_core\.errors\.(?:Usage|Storage)Error: (.*)", str(error), re.MULTILINE)
        if not found:
            raise
        return _unusable(found[-1])


def _unusable(message: str) -> int:
    from restore_core.storage import one_line

    print(f"error: {one_line(message)}", file=sys.stderr)  # names of files and columns in it are hostile text
    return UNUSABLE


def _parsed(options: type[Options], description: str | None) -> Options:
    """The command line as `options`. Raises UsageError, and SystemExit after --help."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(options, description=description)
    except SystemExit as end:
        if not end.code:
            raise
        raise UsageError(_in_one_line(said.getvalue())) from None


def _in_one_line(box: str) -> str:
    """What tyro says about a bad command line, without the frame and the help that it puts around it."""
    words: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip("╭╮╰╯│─ ")
        if text.startswith(("For full helptext", "Argument helptext")):
            break
        words += text.split()
    return " ".join(words) + "; see --help"


def data_and_output(data: str, output: str, option: str) -> "tuple[Storage, Storage]":
    """The place of --data, which can be read, and outside of it that of the results, which can be written.

    Raises UsageError that names --data or `option`.
    """
    from restore_core.storage import open_storage, overlaps

    source = open_storage(data, option="--data")
    source.check_readable("--data")
    target = open_storage(output, option=option)
    if overlaps(source, target):
        raise UsageError(f"{option} {output}: lies inside --data {source.uri}; choose another place")
    target.check_writable(option)
    return source, target


def worker_count(text: str, option: str = "--workers") -> int | None:
    """An option that is auto, which gives None, or a number from 1. Raises UsageError."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{option} {text}: use auto or a number from 1")
    return int(text)

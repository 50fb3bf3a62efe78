"""Finding, watching and waiting for processes that the tests have started themselves."""

import time
from collections.abc import Callable
from pathlib import Path


def descendants(pid: int, title: str) -> list[int]:
    """Processes started by a process or its children, by a part of their command line."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat, command = (entry / "stat").read_text(), (entry / "cmdline").read_text()
            except OSError:  # gone meanwhile
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1]), command

    def below(process: int) -> bool:
        while process in parents:
            process = parents[process][0]
            if process == pid:
                return True
        return False

    return [process for process, (_, command) in parents.items() if title in command and below(process)]


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def marked(variable: str, title: str = "") -> list[int]:
    """Living processes that were started with this in their environment (NAME=VALUE), by a part of their command."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                ours = variable.encode() in (entry / "environ").read_bytes().split(b"\0")
                if ours and title in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
            except OSError:  # gone meanwhile, or somebody else's
                continue
    return found

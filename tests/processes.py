"""Finding, watching and waiting for processes that the tests have started themselves."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Process = subprocess.Popen[str]

TESTS = Path(__file__).resolve().parent
GRACE_SECONDS = 120
"""So long workers may take to end that have lost their driver or their node, on a busy machine."""


def environment_without(*prefixes: str) -> dict[str, str]:
    """The environment of the tests, but for variables that would lead to a Ray or to an S3 that is not meant."""
    ours = "RAY_worker_niceness"
    return {name: text for name, text in os.environ.items() if name == ours or not name.startswith(prefixes)}


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


class Started:
    """Processes with a mark in their environment, by which whatever they leave behind is found and ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Short, for the sockets; its own, so that no other Ray of this machine is joined by mistake.
        self._ray = tempfile.TemporaryDirectory(prefix="rt", dir="/tmp", ignore_cleanup_errors=True)
        self._mark = f"RESTORE_TEST={uuid.uuid4().hex}"
        self._processes: list[Process] = []

    def run(self, script: str, *arguments: object, **environment: str) -> Process:
        """Its standard output and error are in the folder, as NUMBER.out and NUMBER.err."""
        name, _, value = self._mark.partition("=")
        own = {name: value, "RAY_TMPDIR": self._ray.name, "RAY_AUTH_MODE": "disabled", **environment}
        number = len(self._processes)
        with (self._folder / f"{number}.out").open("w") as out, (self._folder / f"{number}.err").open("w") as err:
            process = subprocess.Popen(
                [sys.executable, TESTS / script, *map(str, arguments)],
                stdin=subprocess.PIPE, stdout=out, stderr=err, text=True, env={**environment_without("RAY_"), **own},
            )  # fmt: skip
        self._processes.append(process)
        return process

    def said(self, process: Process, stream: str = "out") -> str:
        return (self._folder / f"{self._processes.index(process)}.{stream}").read_text()

    def wait_until_gone(self) -> None:
        """Until no worker is left that could write. Ray's agents, which cannot, outlive their driver by a minute."""
        wait_for(lambda: not marked(self._mark, "RestoreUnit"), GRACE_SECONDS)

    def end(self) -> None:
        kill(*marked(self._mark))
        for process in self._processes:
            process.communicate()
        self._ray.cleanup()


def kill(*pids: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def killed(process: Process) -> bool:
    """Whether it has ended by SIGKILL. It stays a zombie, unless somebody has waited for it."""
    if process.returncode is not None:
        return process.returncode == -signal.SIGKILL
    end = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return end is not None and (end.si_code, end.si_status) == (os.CLD_KILLED, signal.SIGKILL)


@contextmanager
def started(folder: Path) -> Iterator[Started]:
    processes = Started(folder)
    try:
        yield processes
    finally:
        processes.end()


class Nodes:
    """A Ray cluster of several nodes on this machine; see growing_cluster.py."""

    def __init__(self, processes: Started, head_cpus: int) -> None:
        self._processes = processes
        self.process = processes.run("growing_cluster.py", head_cpus)
        first = self._answer(1)
        self.address: str = first["address"]
        self.raylets: list[int] = [first["raylet"]]
        """The processes that are the nodes, the head first."""
        self.ids: list[str] = [first["id"]]

    def add(self, cpus: int, gpus: int = 0, gigabytes: int = 0) -> int:
        """Returns when it has joined; with no gigabytes it has what the machine has."""
        assert self.process.stdin is not None
        print(cpus, gpus, gigabytes, file=self.process.stdin, flush=True)
        node = self._answer(len(self.raylets) + 1)
        self.raylets.append(node["raylet"])
        self.ids.append(node["id"])
        return self.raylets[-1]

    def _answer(self, number: int) -> dict[str, Any]:
        wait_for(
            lambda: self.process.poll() is not None or self._processes.said(self.process).count("\n") == number, 90
        )
        lines = self._processes.said(self.process).splitlines()
        assert len(lines) == number, self._processes.said(self.process, "err")
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

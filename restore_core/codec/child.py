"""Decoding in child processes: a file that crashes, hangs or floods its decoder costs that process and nothing else.

A child runs `serve`: it reads the files from its input, each after its length, and answers each with a line of JSON (an
error, or the picture's fields and the shapes of its arrays) and the arrays.
"""

import contextlib
import fcntl
import io
import json
import os
import queue
import resource
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import numpy as np
import numpy.typing as npt

from restore_core.codec.decoding import Picture, decode
from restore_core.errors import ItemError

SECONDS, SECONDS_PER_MIB = 120.0, 2.0
"""How long a decoder may take: generous, since on a busy machine honest files take long too."""
BASE_BYTES, BYTES_PER_PIXEL = 2**30, 32
"""Address space of a child: the interpreter with its libraries, and what the greediest decoder (JPEG 2000) needs."""
_ROOT = Path(__file__).resolve().parent.parent.parent
_PROGRAM = "import sys; from restore_core.codec import child; child.serve(int(sys.argv[1]))"
_LENGTH = struct.Struct(">Q")
_ARRAYS = ("pixels", "alpha", "native")
_PIPE_BYTES = 2**20


class Decoders:
    """`count` child processes, started when first needed; may be used from any number of threads.

    Args:
        count: files decoded at the same time.
        max_pixels: see `codec.decode`; it also decides how much memory a child may use.
        seconds: how long a decoder may take, `SECONDS_PER_MIB` not counted; `SECONDS` unless told.
    """

    def __init__(self, count: int, max_pixels: int, seconds: float | None = None) -> None:
        self._children = [_Child(max_pixels, SECONDS if seconds is None else seconds) for _ in range(count)]
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)

    def decode(self, data: bytes) -> Picture:
        """Like `codec.decode`. A crash or a hang is ItemError `decode`, too little memory `out_of_memory`."""
        child = self._idle.get()
        try:
            return child.decode(data)
        finally:
            self._idle.put(child)

    def close(self) -> None:
        for child in self._children:
            child.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Child:
    def __init__(self, max_pixels: int, seconds: float) -> None:
        self._max_pixels = max_pixels
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, data: bytes) -> Picture:
        process = self._process or self._start()
        timed_out = threading.Event()

        def give_up() -> None:
            timed_out.set()
            process.kill()

        seconds = self._seconds + SECONDS_PER_MIB * len(data) / 2**20
        timer = threading.Timer(seconds, give_up)
        timer.start()
        try:
            return _ask(process, data)
        except ItemError:
            raise
        except (EOFError, BrokenPipeError) as error:
            code = self.stop()
            if timed_out.is_set():
                raise ItemError("decode", f"its decoder was not done after {seconds:.0f} s and was stopped") from error
            if code == -signal.SIGKILL:  # by the system, which does so when memory runs out
                raise ItemError("out_of_memory", "its decoder was killed, as happens when memory runs out") from error
            raise ItemError("decode", f"its decoder crashed ({_ending(code)})") from error
        except BaseException:  # half an answer would be taken for the next file's
            process.kill()
            self.stop()
            raise
        finally:
            timer.cancel()

    def _start(self) -> "subprocess.Popen[bytes]":
        path = os.pathsep.join([str(_ROOT), *(entry for entry in sys.path if entry)])
        process = subprocess.Popen(  # noqa: S603  nothing but ourselves
            [sys.executable, "-P", "-c", _PROGRAM, str(self._max_pixels)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is the job's to answer
        )
        assert process.stdin is not None and process.stdout is not None
        _widen(process.stdin)
        _widen(process.stdout)
        if process.stdout.read(1) != b"\n":
            process.kill()
            raise RuntimeError(
                f"the decoder process did not start ({_ending(process.wait())}); its own message is above"
            )
        self._process = process
        return process

    def stop(self) -> int:
        """End the process; returns its exit code, negative for a signal."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # at the end of its input it ends
        process.stdout.close()
        return process.wait()


def _ask(process: "subprocess.Popen[bytes]", data: bytes) -> Picture:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(_LENGTH.pack(len(data)))
    process.stdin.write(data)
    process.stdin.flush()
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    answer = json.loads(line)
    if "error" in answer:
        raise ItemError(answer["error"], answer["message"])
    for name in _ARRAYS:
        answer[name] = None if answer[name] is None else _read_array(process.stdout, *answer[name])
    return Picture(**answer)


def _read_array(file: IO[bytes], shape: list[int], kind: str) -> npt.NDArray[Any]:
    array = np.empty(shape, kind)
    if cast(io.BufferedReader, file).readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
        raise EOFError
    return array


def _widen(pipe: IO[bytes]) -> None:
    """Fewer switches between the processes, where the system allows it."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


# --- In the child ----------------------------------------------------------------------------------------------------


def serve(max_pixels: int) -> None:
    """Answer until the input ends."""
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    _widen(answers)
    quiet, messages = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(quiet, 1)  # what libraries print is no answer
    os.dup2(quiet, 2)  # libtiff and others complain of every bad file
    answers.write(b"\n")  # ready
    answers.flush()
    _limit_memory(BASE_BYTES + BYTES_PER_PIXEL * max_pixels)
    try:
        while header := source.read(_LENGTH.size):
            _answer(source.read(*_LENGTH.unpack(header)), max_pixels, answers)
    except BaseException:  # a bug of ours, which may be seen
        os.dup2(messages, 2)
        raise


def _answer(data: bytes, max_pixels: int, answers: IO[bytes]) -> None:
    try:
        picture = decode(data, max_pixels=max_pixels)
    except ItemError as error:
        answers.write(json.dumps({"error": error.error, "message": error.message}).encode() + b"\n")
    except MemoryError:
        answers.write(b'{"error": "out_of_memory", "message": "its decoder needed more memory than it may"}\n')
    else:
        fields = dict(vars(picture))
        arrays = {name: fields[name] for name in _ARRAYS}
        shapes = {name: None if array is None else (array.shape, array.dtype.str) for name, array in arrays.items()}
        answers.write(json.dumps(fields | shapes).encode() + b"\n")
        for array in arrays.values():
            if array is not None:
                answers.write(np.ascontiguousarray(array).data)
    answers.flush()


def _limit_memory(most: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [most, machine] + ([] if hard == resource.RLIM_INFINITY else [hard])
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))

"""The codec in child processes: a file that crashes, hangs or floods its decoder costs that process and nothing else.

A child runs `serve`. A message is a line of JSON, with fields and the shapes of the parts, and then the parts: arrays
and files. None of them is copied on its way, since of large pictures they are what memory goes to.
"""

import contextlib
import ctypes
import fcntl
import io
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import numpy as np
import numpy.typing as npt

from restore_core import memory
from restore_core.codec.colour import Pixels
from restore_core.codec.decoding import ARRAYS, Frame, Frames, Holder, Picture, decode_frames, pixel_count
from restore_core.codec.encoding import encode, join, without_metadata
from restore_core.errors import ErrorClass, ItemError

SECONDS, SECONDS_PER_MIB = 120.0, 2.0
"""How long a file may take, by what is sent of it: generous, since on a busy machine honest files take long too."""
BASE_BYTES, BYTES_PER_PIXEL = 2**30, 32
"""Address space of a child: the interpreter with its libraries, and what the greediest codec (JPEG 2000) needs."""
_ROOT = Path(__file__).resolve().parent.parent.parent
_PROGRAM = "import sys; from restore_core.codec import processes; processes.serve(int(sys.argv[1]))"
_PIPE_BYTES = 2**20
_LARGE_BYTES = 2**22
"""After a message of more than that a child gives back what it has freed."""
_PR_SET_PDEATHSIG = 1

Array = npt.NDArray[Any]
Part = Array | bytes | None
Message = tuple[dict[str, Any], list[Part]]


class Processes:
    """`count` child processes, started when first needed; may be used from any number of threads.

    Each method is the function of that name in `codec.decoding` or `codec.encoding`. In addition, a crash or a hang is
    ItemError `decode` or `encode`, and too little memory ItemError `out_of_memory`.

    Args:
        count: files worked on at the same time.
        max_pixels: see `codec.decode`; it also decides how much memory a child may use.
        seconds: how long a file may take, `SECONDS_PER_MIB` not counted; `SECONDS` unless told.
    """

    def __init__(self, count: int, max_pixels: int, seconds: float | None = None) -> None:
        # A child ends with the thread that started it: one that lives as long as this process, or this object.
        self._starter = ThreadPoolExecutor(1)
        self._starter.submit(int).result()  # it takes its memory now, not when there may be little left
        seconds = SECONDS if seconds is None else seconds
        self._children = [_Child(max_pixels, seconds, self._starter) for _ in range(count)]
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)

    def decode_frames(self, data: bytes, *, frames: Frames = "refuse") -> list[Frame]:
        fields, arrays = self._call("decode", {"call": "decode", "frames": frames}, [data])
        found = []
        holder = Holder(*fields["holder"]) if fields["holder"] else None
        for index, picture in enumerate(fields["pictures"]):
            *parts, source = arrays[4 * index : 4 * index + 4]
            pixels, alpha, native = cast(list[Array], parts)
            made = Picture(**picture, pixels=pixels, alpha=alpha, native=native)
            found.append(Frame(made, cast(bytes | None, source), holder))
        return found

    def pixel_count(self, data: bytes, *, frames: Frames = "refuse") -> int:
        fields, _ = self._call("decode", {"call": "pixel_count", "frames": frames}, [data])
        return int(fields["count"])

    def encode(
        self, pixels: Pixels, source: bytes, *, picture: Picture, software: str, strip_metadata: bool = False
    ) -> bytes:
        fields, arrays = _described(picture)
        if picture.native is None:
            arrays[0] = None  # not looked at
        options = {"software": software, "strip_metadata": strip_metadata, "picture": fields}
        return self._file("encode", options, [source, pixels, *arrays])

    def without_metadata(self, source: bytes, *, picture: Picture) -> bytes:
        fields, arrays = _described(picture)
        return self._file("without_metadata", {"picture": fields}, [source, *arrays])

    def join(self, parts: list[bytes], source: bytes, *, software: str, strip_metadata: bool = False) -> bytes:
        options = {"software": software, "strip_metadata": strip_metadata}
        return self._file("join", options, [source, *parts])

    def _file(self, call: str, fields: dict[str, Any], parts: list[Part]) -> bytes:
        _, (data,) = self._call("encode", {"call": call, **fields}, parts)
        return cast(bytes, data)

    def _call(self, doing: ErrorClass, fields: dict[str, Any], parts: list[Part]) -> Message:
        child = self._idle.get()
        try:
            return child.call(doing, fields, parts)
        finally:
            self._idle.put(child)

    def close(self) -> None:
        for child in self._children:
            child.stop()
        self._starter.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Child:
    def __init__(self, max_pixels: int, seconds: float, starter: Executor) -> None:
        self._max_pixels = max_pixels
        self._starter = starter
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, doing: ErrorClass, fields: dict[str, Any], parts: list[Part]) -> Message:
        process = self._process or self._starter.submit(self._start).result()
        assert process.stdin is not None and process.stdout is not None
        timed_out = threading.Event()

        def give_up() -> None:
            timed_out.set()
            process.kill()

        sent = sum(_size(part) for part in parts)
        seconds = self._seconds + SECONDS_PER_MIB * sent / 2**20
        timer = threading.Timer(seconds, give_up)
        timer.start()
        try:
            _send(process.stdin, fields, parts)
            answer, found = _receive(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            code, coder = self.stop(), f"its {doing}r"
            if timed_out.is_set():
                raise ItemError(doing, f"{coder} was not done after {seconds:.0f} s and was stopped") from error
            if code == -signal.SIGKILL:  # by the system, which does so when memory runs out
                raise ItemError("out_of_memory", f"{coder} was killed, as happens when memory runs out") from error
            raise ItemError(doing, f"{coder} crashed ({_ending(code)})") from error
        except BaseException:  # half an answer would be taken for the next file's
            process.kill()
            self.stop()
            raise
        finally:
            timer.cancel()
        if "error" in answer:
            raise ItemError(answer["error"], answer["message"])
        return answer, found

    def _start(self) -> "subprocess.Popen[bytes]":
        path = os.pathsep.join([*(entry for entry in sys.path if entry), str(_ROOT)])
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
            raise RuntimeError(f"a codec process did not start ({_ending(process.wait())}); its own message is above")
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


def _send(file: IO[bytes], fields: dict[str, Any], parts: Sequence[Part]) -> None:
    parts = [np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part for part in parts]
    shapes = [
        (part.shape, part.dtype.str) if isinstance(part, np.ndarray) else None if part is None else len(part)
        for part in parts
    ]
    file.write(json.dumps({"fields": fields, "shapes": shapes}).encode() + b"\n")
    for part in parts:
        if part is not None:
            file.write(part.data if isinstance(part, np.ndarray) else part)
    file.flush()


def _receive(file: IO[bytes]) -> Message:
    """Raises EOFError."""
    line = file.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    message = json.loads(line)
    return message["fields"], [None if shape is None else _read_part(file, shape) for shape in message["shapes"]]


def _read_part(file: IO[bytes], shape: Any) -> Array | bytes:
    if isinstance(shape, int):
        data = file.read(shape)
        if len(data) != shape:
            raise EOFError
        return data
    array = np.empty(*shape)
    if cast(io.BufferedReader, file).readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
        raise EOFError
    return array


def _size(part: Part) -> int:
    return part.nbytes if isinstance(part, np.ndarray) else len(part or b"")


def _described(picture: Picture) -> tuple[dict[str, Any], list[Part]]:
    return picture.described(), [getattr(picture, name) for name in ARRAYS]


def _widen(pipe: IO[bytes]) -> None:
    """Fewer switches between the processes, where the system allows it."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


# --- In the child ----------------------------------------------------------------------------------------------------


def serve(max_pixels: int) -> None:
    """Answer until the input ends."""
    _end_with_parent()
    with contextlib.suppress(OSError):  # when the machine's memory runs out, this is to be killed, not the worker
        Path("/proc/self/oom_score_adj").write_text("1000")
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    _widen(answers)
    quiet, messages = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(quiet, 1)  # what libraries print is no answer
    os.dup2(quiet, 2)  # libtiff and others complain of every bad file
    answers.write(b"\n")  # ready
    answers.flush()
    _limit_memory(BASE_BYTES + BYTES_PER_PIXEL * max_pixels)
    try:
        while True:
            if _answer_one(source, answers, max_pixels) > _LARGE_BYTES:
                memory.trim()
    except EOFError:
        return
    except BaseException:  # a bug of ours, which may be seen
        os.dup2(messages, 2)
        raise


def _answer_one(source: IO[bytes], answers: IO[bytes], max_pixels: int) -> int:
    """Returns how much came and went, in bytes; by the return nothing of it is held any more."""
    fields, parts = _receive(source)
    came = sum(_size(part) for part in parts)
    answer, made = _answer(fields, parts, max_pixels)
    _send(answers, answer, made)
    return came + sum(_size(part) for part in made)


def _answer(fields: dict[str, Any], parts: list[Part], max_pixels: int) -> Message:
    call = fields.pop("call")
    try:
        if call in ("decode", "pixel_count"):
            data = cast(bytes, parts[0])
            if call == "decode":
                return _decoded(data, max_pixels, fields["frames"])
            return {"count": pixel_count(data, max_pixels=max_pixels, frames=fields["frames"])}, []
        return {}, [_encoded(call, fields, parts, max_pixels)]
    except ItemError as error:
        return {"error": error.error, "message": error.message}, []
    except MemoryError:
        return {"error": "out_of_memory", "message": "its codec needed more memory than it may have"}, []


def _decoded(data: bytes, max_pixels: int, frames: Frames) -> Message:
    pictures: list[dict[str, Any]] = []
    answer: list[Part] = []
    found = decode_frames(data, max_pixels=max_pixels, frames=frames)
    for frame in found:
        described, parts = _described(frame.picture)
        pictures.append(described)
        answer += [*parts, frame.source]
    return {"pictures": pictures, "holder": found[0].holder}, answer


def _encoded(call: str, fields: dict[str, Any], parts: list[Part], max_pixels: int) -> bytes:
    source, *others = parts
    assert isinstance(source, bytes)
    if call == "join":
        return join(cast(list[bytes], others), source, max_pixels=max_pixels, **fields)
    pixels = others.pop(0) if call == "encode" else others[0]
    before, alpha, native = cast(list[Array], others)
    before = cast(Pixels, pixels) if before is None else before
    picture = Picture(**fields.pop("picture"), pixels=before, alpha=alpha, native=native)
    if call == "without_metadata":
        return without_metadata(source, picture=picture)
    return encode(cast(Pixels, pixels), source, picture=picture, **fields)


def _end_with_parent() -> None:
    """Be killed when the thread that started this process is gone, even in the middle of a file."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit_memory(most: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [most, machine] + ([] if hard == resource.RLIM_INFINITY else [hard])
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))

"""The codec in child processes: a file that crashes, hangs or floods its decoder costs that process and nothing else.

A child runs `serve`. A message is a line of JSON, with fields and the shapes of arrays, and then the arrays.
"""

import contextlib
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
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import numpy as np
import numpy.typing as npt

from restore_core.codec.colour import Pixels
from restore_core.codec.decoding import Frame, Frames, Picture, decode_frames, pixel_count
from restore_core.codec.encoding import encode, join, without_metadata
from restore_core.errors import ErrorClass, ItemError

SECONDS, SECONDS_PER_MIB = 120.0, 2.0
"""How long a file may take, by what is sent of it: generous, since on a busy machine honest files take long too."""
BASE_BYTES, BYTES_PER_PIXEL = 2**30, 32
"""Address space of a child: the interpreter with its libraries, and what the greediest codec (JPEG 2000) needs."""
_ROOT = Path(__file__).resolve().parent.parent.parent
_PROGRAM = "import sys; from restore_core.codec import processes; processes.serve(int(sys.argv[1]))"
_ARRAYS = ("pixels", "alpha", "native")
_PIPE_BYTES = 2**20

Array = npt.NDArray[Any]
Message = tuple[dict[str, Any], list[Array | None]]


class Processes:
    """`count` child processes, started when first needed; may be used from any number of threads.

    Each method is the function of that name in `codec`. In addition, a crash or a hang is ItemError `decode` or
    `encode`, and too little memory ItemError `out_of_memory`.

    Args:
        count: files worked on at the same time.
        max_pixels: see `codec.decode`; it also decides how much memory a child may use.
        seconds: how long a file may take, `SECONDS_PER_MIB` not counted; `SECONDS` unless told.
    """

    def __init__(self, count: int, max_pixels: int, seconds: float | None = None) -> None:
        self._children = [_Child(max_pixels, SECONDS if seconds is None else seconds) for _ in range(count)]
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)

    def decode_frames(self, data: bytes, *, frames: Frames = "refuse") -> list[Frame]:
        fields, arrays = self._call("decode", {"call": "decode", "frames": frames}, [_bytes(data)])
        found = []
        for index, picture in enumerate(fields["pictures"]):
            pixels, alpha, native, source = arrays[4 * index : 4 * index + 4]
            made = Picture(**picture, pixels=cast(Pixels, pixels), alpha=alpha, native=native)
            found.append(Frame(made, None if source is None else source.tobytes()))
        return found

    def pixel_count(self, data: bytes, *, frames: Frames = "refuse") -> int:
        fields, _ = self._call("decode", {"call": "pixel_count", "frames": frames}, [_bytes(data)])
        return int(fields["count"])

    def encode(
        self, pixels: Pixels, source: bytes, *, picture: Picture, software: str, strip_metadata: bool = False
    ) -> bytes:
        fields, arrays = _described(picture)
        if picture.native is None:
            arrays[0] = None  # not looked at
        options = {"software": software, "strip_metadata": strip_metadata, "picture": fields}
        return self._file("encode", options, [_bytes(source), pixels, *arrays])

    def without_metadata(self, source: bytes, *, picture: Picture) -> bytes:
        fields, arrays = _described(picture)
        return self._file("without_metadata", {"picture": fields}, [_bytes(source), *arrays])

    def join(self, parts: list[bytes], source: bytes, *, software: str, strip_metadata: bool = False) -> bytes:
        options = {"software": software, "strip_metadata": strip_metadata}
        return self._file("join", options, [_bytes(source), *(_bytes(part) for part in parts)])

    def _file(self, call: str, fields: dict[str, Any], arrays: list[Array | None]) -> bytes:
        _, (data,) = self._call("encode", {"call": call, **fields}, arrays)
        assert data is not None
        return data.tobytes()

    def _call(self, doing: ErrorClass, fields: dict[str, Any], arrays: list[Array | None]) -> Message:
        child = self._idle.get()
        try:
            return child.call(doing, fields, arrays)
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

    def call(self, doing: ErrorClass, fields: dict[str, Any], arrays: list[Array | None]) -> Message:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        timed_out = threading.Event()

        def give_up() -> None:
            timed_out.set()
            process.kill()

        sent = sum(array.nbytes for array in arrays if array is not None)
        seconds = self._seconds + SECONDS_PER_MIB * sent / 2**20
        timer = threading.Timer(seconds, give_up)
        timer.start()
        try:
            _send(process.stdin, fields, arrays)
            answer, arrays = _receive(process.stdout)
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
        return answer, arrays

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


def _send(file: IO[bytes], fields: dict[str, Any], arrays: Sequence[Array | None]) -> None:
    arrays = [None if array is None else np.ascontiguousarray(array) for array in arrays]
    shapes = [None if array is None else (array.shape, array.dtype.str) for array in arrays]
    file.write(json.dumps({"fields": fields, "shapes": shapes}).encode() + b"\n")
    for array in arrays:
        if array is not None:
            file.write(array.data)
    file.flush()


def _receive(file: IO[bytes]) -> Message:
    """Raises EOFError."""
    line = file.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    message = json.loads(line)
    return message["fields"], [None if shape is None else _read_array(file, *shape) for shape in message["shapes"]]


def _read_array(file: IO[bytes], shape: list[int], kind: str) -> Array:
    array = np.empty(shape, kind)
    if cast(io.BufferedReader, file).readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
        raise EOFError
    return array


def _bytes(data: bytes) -> Array:
    return np.frombuffer(data, np.uint8)


def _described(picture: Picture) -> Message:
    fields = {name: value for name, value in vars(picture).items() if name not in _ARRAYS}
    return fields, [getattr(picture, name) for name in _ARRAYS]


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
        while True:
            _send(answers, *_answer(*_receive(source), max_pixels))
    except EOFError:
        return
    except BaseException:  # a bug of ours, which may be seen
        os.dup2(messages, 2)
        raise


def _answer(fields: dict[str, Any], arrays: list[Array | None], max_pixels: int) -> Message:
    call = fields.pop("call")
    try:
        if call in ("decode", "pixel_count"):
            assert arrays[0] is not None
            data = arrays[0].tobytes()
            if call == "decode":
                return _decoded(data, max_pixels, fields["frames"])
            return {"count": pixel_count(data, max_pixels=max_pixels, frames=fields["frames"])}, []
        return {}, [_bytes(_encoded(call, fields, arrays))]
    except ItemError as error:
        return {"error": error.error, "message": error.message}, []
    except MemoryError:
        return {"error": "out_of_memory", "message": "its codec needed more memory than it may have"}, []


def _decoded(data: bytes, max_pixels: int, frames: Frames) -> Message:
    pictures, answer = [], []
    for frame in decode_frames(data, max_pixels=max_pixels, frames=frames):
        described, parts = _described(frame.picture)
        pictures.append(described)
        answer += [*parts, None if frame.source is None else _bytes(frame.source)]
    return {"pictures": pictures}, answer


def _encoded(call: str, fields: dict[str, Any], arrays: list[Array | None]) -> bytes:
    first, *others = arrays
    assert first is not None
    source = first.tobytes()
    if call == "join":
        return join([part.tobytes() for part in others if part is not None], source, **fields)
    pixels = others.pop(0) if call == "encode" else others[0]
    assert pixels is not None
    before, alpha, native = others
    before = pixels if before is None else before
    picture = Picture(**fields.pop("picture"), pixels=before, alpha=alpha, native=native)
    if call == "without_metadata":
        return without_metadata(source, picture=picture)
    return encode(pixels, source, picture=picture, **fields)


def _limit_memory(most: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [most, machine] + ([] if hard == resource.RLIM_INFINITY else [hard])
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))

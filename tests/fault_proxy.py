"""A faulty network between the tests and an S3 server: an HTTP proxy that injects faults, and counts them.

What happens to the n-th request of a kind for a key is drawn from (seed, fault, method, key, n), so that it does not
depend on which thread comes first.
"""

import contextlib
import http.client
import random
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Kind = Literal[
    "slow_down",  # 503, as S3 asks for fewer requests
    "error",  # 500
    "denied",  # 403
    "expired",  # the token has expired
    "archived",  # the object has to be taken out of an archive first
    "refused",  # the connection is reset before the request is passed on
    "lost_answer",  # the server does it, but the connection is reset before it can say so
    "reset",  # the connection is reset in the middle of the answer's body
    "truncated",  # half of the body, then the end of the connection
    "short",  # half of the body and the length of that half, of an object that was stored without a checksum
    "garbled",  # half of the body, filled up to its length with spaces
    "latency",
    "call",  # something is done first, such as replacing the object
]
_ANSWERS: dict[str, tuple[int, str]] = {
    "slow_down": (503, "SlowDown"),
    "error": (500, "InternalError"),
    "denied": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
    "archived": (403, "InvalidObjectState"),
}
_BODY = ("reset", "truncated", "short", "garbled")
_NEWLINE, _STAND_IN = "%0A", "%EE%80%8A"  # a private-use character


@dataclass(frozen=True, kw_only=True)
class Fault:
    kind: Kind
    share: float = 1.0
    """Of the requests that it could hit."""
    method: str = ".*"
    """A regular expression; "LIST" for listings."""
    key: str = "(?s:.*)"
    """A regular expression for BUCKET/KEY; for listings BUCKET."""
    after: int = 0
    """How many such requests are spared first."""
    times: int | None = None
    """How often it happens at most; None: always."""
    credential: str = ".*"
    """A regular expression for the access key ID that the request is signed with."""
    message: str = "injected"
    """What the server says, with an error's code."""
    seconds: float = 10.0
    """Of latency."""
    action: Callable[[], object] | None = None
    """What is done first."""


class FaultProxy:
    """In front of the server at `upstream`, as a context manager.

    Args:
        upstream: URL of the S3 server.
        seed: of the draws.
        newlines: give the server another character for each newline in a key, since moto's cannot store those.
    """

    def __init__(self, upstream: str, seed: int = 0, newlines: bool = False) -> None:
        self.faults: list[Fault] = []
        self.injected: Counter[str] = Counter()
        self.ever: Counter[str] = Counter()
        """The same, but not counted anew with other faults."""
        self.requests: Counter[tuple[str, str]] = Counter()
        """By method and BUCKET/KEY."""
        self.unanswered = 0
        """Requests that the server itself did not answer, as happens with a busy one; since the faults were set."""
        self.keys_a_page: int | None = None
        """Of listings, where less than the server's thousand is wanted."""
        self.hosts: set[str] = set()
        """What the requests said in their header Host."""
        self._upstream = urllib.parse.urlsplit(upstream).netloc
        self._seed = seed
        self._newlines = newlines
        self._lock = threading.Lock()
        self._seen: Counter[tuple[Fault, str, str]] = Counter()
        self._done: Counter[Fault] = Counter()
        self._met: Counter[Fault] = Counter()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextlib.contextmanager
    def injecting(self, *faults: Fault) -> Iterator[None]:
        self.set(*faults)
        try:
            yield
        finally:
            self.set()

    def set(self, *faults: Fault) -> None:
        """Inject these faults from now on, and count anew."""
        with self._lock:
            self.faults = list(faults)
            for counter in (self.injected, self.requests, self._seen, self._done, self._met):
                counter.clear()
            self.unanswered = 0

    def draw(self, method: str, key: str, credential: str) -> list[Fault]:
        """What happens to this request."""
        with self._lock:
            self.requests[method, key] += 1
            drawn = []
            for index, fault in enumerate(self.faults):
                asked = ((fault.method, method), (fault.key, key), (fault.credential, credential))
                if not all(re.fullmatch(pattern, text) for pattern, text in asked):
                    continue
                number = self._seen[fault, method, key]
                self._seen[fault, method, key] += 1
                self._met[fault] += 1
                spared = self._met[fault] <= fault.after or (
                    fault.times is not None and self._done[fault] >= fault.times
                )
                chance = random.Random(f"{self._seed} {index} {method} {key} {number}").random()
                if not spared and chance < fault.share:
                    self._done[fault] += 1
                    drawn.append(fault)
            return drawn

    def count(self, fault: Fault) -> None:
        with self._lock:
            self.injected[fault.kind] += 1
            self.ever[fault.kind] += 1

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> "tuple[int, str, list[tuple[str, str]], bytes]":
        if self._newlines:
            path = path.replace(_NEWLINE, _STAND_IN)
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            connection.request(method, path, body or None, headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            with self._lock:
                self.unanswered += 1
            raise ConnectionError("no answer") from error
        finally:
            connection.close()
        if self._newlines:
            content = content.replace(_STAND_IN.encode(), _NEWLINE.encode())
        return response.status, response.reason, response.getheaders(), content


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            body = self._body()
            url = urllib.parse.urlsplit(self.path)
            place = urllib.parse.unquote(url.path[1:])
            signed = re.search("Credential=([^/]*)", self.headers.get("Authorization", ""))
            listing = self.command == "GET" and "list-type=" in url.query
            proxy.hosts.add(self.headers["Host"])
            drawn = proxy.draw("LIST" if listing else self.command, place, signed[1] if signed else "")
            for fault in drawn:
                if fault.kind == "latency":
                    proxy.count(fault)
                    time.sleep(fault.seconds)
                elif fault.kind == "call":
                    proxy.count(fault)
                    assert fault.action is not None
                    fault.action()
            for fault in drawn:
                if fault.kind in _ANSWERS:
                    proxy.count(fault)
                    status, code = _ANSWERS[fault.kind]
                    text = f"<Error><Code>{code}</Code><Message>{fault.message}</Message></Error>".encode()
                    self._answer(status, "injected", [("Content-Type", "application/xml")], text)
                    return
                if fault.kind == "refused":
                    proxy.count(fault)
                    self._reset()
                    return
            path = self.path
            if listing and proxy.keys_a_page and "max-keys=" not in url.query:
                path += f"&max-keys={proxy.keys_a_page}"
            status, reason, headers, content = proxy.forward(self.command, path, dict(self.headers), body)
            for fault in drawn:
                if fault.kind == "lost_answer":
                    proxy.count(fault)
                    self._reset()
                    return
                if fault.kind in _BODY and self.command == "GET" and status in (200, 206) and len(content) > 1:
                    proxy.count(fault)
                    half = content[: len(content) // 2]
                    if fault.kind == "short":
                        content = half
                        headers = [pair for pair in headers if not pair[0].lower().startswith("x-amz-checksum")]
                    elif fault.kind == "garbled":
                        content = half + b" " * (len(content) - len(half))
                    else:
                        self._answer(status, reason, headers, half, length=len(content))
                        self.wfile.flush()
                        self.close_connection = True
                        if fault.kind == "reset":
                            self._reset()
                        return
            self._answer(status, reason, headers, content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                chunks = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                del self.headers["Transfer-Encoding"]
                self.headers["Content-Length"] = str(sum(map(len, chunks)))
                return b"".join(chunks)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _answer(
            self, status: int, reason: str, headers: list[tuple[str, str]], content: bytes, length: int | None = None
        ) -> None:
            self.send_response_only(status, reason)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            if self.command == "HEAD":
                length = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _reset(self) -> None:
            """Close the connection with RST, which discards what the other side has not read yet."""
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def handle(self) -> None:
            with contextlib.suppress(OSError, ValueError):  # a connection that was reset, by us or the other side
                super().handle()

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().finish()

        def log_message(self, *_: object) -> None:
            pass

    return Handler

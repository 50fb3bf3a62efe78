"""A simulated AWS on loopback that keeps what it was asked for, and can be told to have no spot instances."""

import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

NO_CAPACITY = (
    b"<Response><Errors><Error><Code>InsufficientInstanceCapacity</Code>"
    b"<Message>no spot</Message></Error></Errors><RequestID>1</RequestID></Response>"
)
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


@dataclass(frozen=True)
class Request:
    """`credential`: "ID/date/region/service/aws4_request". `parameters`: of the URL, and of a form in the body."""

    method: str
    path: str
    parameters: dict[str, str]
    credential: str

    @property
    def access_key(self) -> str:
        return self.credential.split("/")[0]

    @property
    def service(self) -> str:
        return (self.credential.split("/") + [""] * 4)[3]


class Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """What was asked for is kept, and need not be printed."""


@dataclass
class RecordedAWS:
    """Use as a context manager.

    `no_spot`: none is to be had. `hiding`: buckets in which S3 says "denied" of keys that are not there, as it does to
    who may list no more than some prefixes.
    """

    requests: list[Request] = field(default_factory=list)
    no_spot: bool = False
    hiding: tuple[str, ...] = ()

    def __enter__(self) -> "RecordedAWS":
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._forget()
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()
        self._server.shutdown()

    def _forget(self) -> None:
        """Before and after: moto keeps one state in a process, whichever server is asked."""
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/reset", method="POST")).close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.port}"

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        form = environ.get("CONTENT_TYPE", "").startswith("application/x-www-form-urlencoded")
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)) if form else b""
        if form:
            environ["wsgi.input"] = BytesIO(body)
        pairs = urllib.parse.parse_qsl(environ.get("QUERY_STRING", "") + "&" + body.decode(), keep_blank_values=True)
        credential = environ.get("HTTP_AUTHORIZATION", "").partition("Credential=")[2].partition(",")[0]
        path = environ["PATH_INFO"].encode("latin-1").decode()
        request = Request(environ["REQUEST_METHOD"], path, dict(pairs), credential)
        self.requests.append(request)
        spot = request.parameters.get("InstanceMarketOptions.MarketType") == "spot"
        if self.no_spot and spot and request.parameters.get("Action") == "RunInstances":
            start("500 Internal Server Error", [("Content-Type", "text/xml")])
            return [NO_CAPACITY]
        bucket, _, key = request.path.strip("/").partition("/")
        if bucket not in self.hiding or request.method not in ("GET", "HEAD"):
            return self._app(environ, start)
        answered: list[tuple[str, Any]] = []
        body = list(self._app(environ, lambda status, headers, _=None: answered.append((status, headers))))
        status, headers = answered[0]
        if status.startswith("404") and key:
            start("403 Forbidden", [("Content-Type", "text/xml"), ("Content-Length", str(len(DENIED)))])
            return [DENIED]
        start(status, headers)
        return body

"""A proxy before an S3 server that breaks requests and drops conditions on demand."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


@dataclass(frozen=True)
class Request:
    """What is asked for, by the name that S3's API has for it."""

    operation: str
    path: str
    query: str = ""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens in the place of an answer.

    Attributes:
        kind: `status` answers with `status` and `body`; `reset` and `close` end the connection before an answer;
            `cut` answers with half of the body; `garbage` with 200 and no XML; `lost` forwards the request and ends
            the connection before the answer; `slow` forwards it after some seconds; `unconditional` forwards it
            without `If-None-Match`.
    """

    kind: str
    status: int = 500
    seconds: float = 0.0
    body: bytes = b""


def error_body(code: str) -> bytes:
    """An error response of S3."""
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>of the test</Message></Error>".encode()


Choose = Callable[[Request], Fault | None]


def operation_of(method: str, path: str) -> str:
    """Which operation of S3 a request is."""
    url = urlsplit(path)
    query, is_object = parse_qs(url.query, keep_blank_values=True), url.path.strip("/").count("/") > 0
    if "uploads" in query:
        return "CreateMultipartUpload" if method == "POST" else "ListMultipartUploads"
    if "uploadId" in query:
        return {
            "PUT": "UploadPart", "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload", "GET": "ListParts"
        }[method]  # fmt: skip
    if "delete" in query:
        return "DeleteObjects"
    names = {"GET": "GetObject", "PUT": "PutObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}
    return names[method] if is_object else {"GET": "ListObjects", "HEAD": "HeadBucket"}.get(method, "Bucket")


class Proxy(http.server.ThreadingHTTPServer):
    """Forwards to `endpoint`.

    Attributes:
        choose: the fault of a request, or None.
        seen: operations that were asked for.
    """

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = endpoint.removeprefix("http://")
        self.choose: Choose = lambda request: None
        self.seen: list[str] = []
        # One after the other: moto looks whether a name is taken, and takes it, in two steps.
        self.creating = threading.Lock()
        self.uri = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up."""


@contextmanager
def proxy_of(endpoint: str) -> Iterator[Proxy]:
    """A proxy before a server, in a thread."""
    with Proxy(endpoint) as proxy:
        threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield proxy
        proxy.shutdown()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request."""

    server: Proxy
    protocol_version = "HTTP/1.1"

    def handle_one(self) -> None:
        """Forward it, or break it."""
        size = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        body = self.rfile.read(size)
        url = urlsplit(self.path)
        request = Request(operation_of(self.command, self.path), url.path, url.query)
        self.server.seen.append(request.operation)
        fault = self.server.choose(request)
        time.sleep(fault.seconds if fault else 0.0)
        if fault is None or fault.kind in ("unconditional", "cut", "lost", "slow"):
            dropped = {"if-none-match"} if fault and fault.kind == "unconditional" else set()
            self.pass_on(body, dropped, fault.kind if fault else "")
        elif fault.kind == "status":
            self.answer(fault.status, [("Content-Type", "application/xml")], fault.body)
        elif fault.kind == "garbage":
            self.answer(200, [("Content-Type", "application/xml")], b"<html>a portal of the network")
        else:
            self.hang_up(is_reset=fault.kind == "reset")

    def pass_on(self, body: bytes, dropped: set[str], kind: str) -> None:
        """Ask the server behind, and hand its answer on."""
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped | {"connection"}}
        connection = http.client.HTTPConnection(self.server.behind)
        with self.server.creating if self.headers.get("If-None-Match") else contextlib.nullcontext():
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        connection.close()
        if kind == "lost":
            self.hang_up(is_reset=False)
            return
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in HOP]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.answer(answer.status, kept, data, length=length, is_cut=kind == "cut")

    def answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        body: bytes,
        *,
        length: str | None = None,
        is_cut: bool = False,
    ) -> None:
        """Send an answer, or the half of it."""
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
        if is_cut:
            self.hang_up(is_reset=False)

    def hang_up(self, *, is_reset: bool) -> None:
        """End the connection, in good order or by a reset."""
        self.wfile.flush()
        if is_reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

    def log_message(self, *_: Any) -> None:
        """Nothing."""

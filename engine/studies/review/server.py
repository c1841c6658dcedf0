"""The server of a review: a page, its images by their ids, and answers that are stored before they are confirmed.

It listens on the loopback interface alone. Its address has a secret, which other users of the machine and other pages
in the browser do not know; requests for another host or from another page are refused (DNS rebinding, CSRF). No part
of a request becomes a path.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.data.review.answers import rater_problem
from engine.errors import JobError, RiskforgeError, first_line
from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import MAX_RECORD_BYTES, read_whole
from engine.studies.review.design import Design
from engine.studies.review.images import ReviewImages
from engine.studies.review.page import entries, images_by_id, server_page
from engine.studies.review.records import MAX_BATCH, AnswerBook, GivenAnswer, Session

HOST = "127.0.0.1"
MAX_BODY_BYTES = 2**20
# Of an idle connection.
TIMEOUT_SECONDS = 60
_PORTS = range(20_000, 60_000)
_HOSTS = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")
_Rater = Annotated[str, Field(max_length=100)]


class _Begin(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    rater: _Rater


class _Answers(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    rater: _Rater
    session: Session
    answers: Annotated[list[GivenAnswer], Field(max_length=MAX_BATCH)]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a review is served: the same for a run each time, so that an open page finds the server again."""

    port: int
    token: str


def review_address(uri: str, port: int | None) -> Address:
    """Port and secret of a run's reviews; the secret is kept in the user's state folder, readable by the user alone.

    Args:
        port: in place of the one that is kept.
    """
    name = hashlib.sha256(uri.encode()).hexdigest()[:24]
    path = _state_folder() / f"review-{name}.json"
    token = ""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        token = str(parse_json(read_whole(path, MAX_RECORD_BYTES))["token"])
    if not re.fullmatch(r"[A-Za-z0-9_-]{22,64}", token):
        token = secrets.token_urlsafe(24)
        # Without it the next server has another address, and a page that was left open must be opened anew.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.unlink(missing_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump({"run": uri, "token": token}, file)
    return Address(_PORTS[int(name, 16) % len(_PORTS)] if port is None else port, token)


def _state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "riskforge"


def check_port(port: int) -> None:
    """Check that a port can be used now.

    Raises:
        JobError: it cannot.
    """
    try:
        with HTTPServer((HOST, port), BaseHTTPRequestHandler):
            pass
    except (OSError, OverflowError) as error:
        raise _port_refused(port, error) from None


def _port_refused(port: int, error: Exception) -> JobError:
    reason = getattr(error, "strerror", None) or str(error)
    return JobError(f"--port: {port} cannot be used ({reason}); omit it, or give another")


class ReviewServer(ThreadingHTTPServer):
    """Serves one design of a run.

    Args:
        address: its port may be taken, then another one is used unless `is_fixed`.
        rater: whom answers are of; empty to ask on the page.
        progress: called with the name of a rater and how many items are answered.

    Attributes:
        url: of the page.

    Raises:
        JobError: the port cannot be used.
    """

    daemon_threads = True
    # A server that was killed leaves connections behind.
    allow_reuse_address = True

    def __init__(
        self,
        design: Design,
        images: ReviewImages,
        book: AnswerBook,
        address: Address,
        *,
        is_fixed: bool = False,
        rater: str = "",
        progress: Callable[[str, int], None] = lambda rater, number: None,
    ) -> None:
        self.design, self.images, self.book, self.rater, self.progress = design, images, book, rater, progress
        self.token = address.token
        self.image_names = images_by_id(design)
        self.page, self.policy = server_page(design, rater)
        try:
            super().__init__((HOST, address.port), ReviewHandler)
        except (OSError, OverflowError) as error:
            if is_fixed:
                raise _port_refused(address.port, error) from None
            super().__init__((HOST, 0), ReviewHandler)
        self.url = f"http://{HOST}:{self.server_address[1]}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that break off are nobody's concern; the handler answers all other errors."""


class ReviewHandler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: ReviewServer
    protocol_version = "HTTP/1.1"
    server_version = "riskforge"
    sys_version = ""
    timeout = TIMEOUT_SECONDS

    def do_GET(self) -> None:
        """The page, or an image."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Begin, or answers."""
        self._answer(self._post)

    def _answer(self, respond: Callable[[str], None]) -> None:
        """Respond to a request that comes from the page, or refuse it."""
        try:
            if not self._is_own():
                self._refuse(403, "this address is for the browser of this machine alone")
                return
            token, slash, name = self.path.removeprefix("/").partition("/")
            if not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()) or not slash:
                self._refuse(404, "there is nothing here")
                return
            respond(name)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except RiskforgeError as error:
            # The store does not take the answer now: the page keeps it and sends it again.
            self._refuse(503, first_line(error)[:300])
        except Exception as error:
            self._refuse(500, f"the server failed ({type(error).__name__}); the answer is kept and sent again")

    def _is_own(self) -> bool:
        """Whether a request is for this machine by name, and from the page or from no page."""
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(hosts) != 1 or not _HOSTS.fullmatch(hosts[0]) or len(origins) > 1:
            return False
        return not origins or origins[0] == f"http://{hosts[0]}"

    def _get(self, name: str) -> None:
        if name == "":
            self._send(200, self.server.page, "text/html; charset=utf-8")
            return
        folder, _, image = name.partition("/")
        known = self.server.image_names.get(image) if folder == "image" else None
        if known is None:
            self._refuse(404, "there is nothing here")
            return
        self._send(200, self.server.images.png(known), "image/png")

    def _post(self, name: str) -> None:
        actions = {"begin": self._begin, "answers": self._answers}
        if name not in actions:
            self._refuse(404, "there is nothing here")
            return
        if (body := self._body()) is None:
            return
        try:
            document = parse_json(body, max_depth=4)
            actions[name](document)
        except ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"]))
            self._refuse(400, f"not a request of the page ({place[:100]})")
        except ValueError as error:
            self._refuse(400, f"not a request of the page ({first_line(error)[:200]})")

    def _body(self) -> bytes | None:
        """The bytes of a request, or None where it was refused."""
        lengths = self.headers.get_all("Content-Length", [])
        if self.headers.get("Transfer-Encoding") or len(lengths) != 1 or not re.fullmatch(r"\d{1,12}", lengths[0]):
            self._refuse(411, "a request has its length")
        elif int(lengths[0]) > MAX_BODY_BYTES:
            self._refuse(413, "the request is too large")
        elif self.headers.get_content_type() != "application/json":
            self._refuse(415, "a request is JSON")
        else:
            return self.rfile.read(int(lengths[0]))
        return None

    def _begin(self, document: Any) -> None:
        rater = self._rater(_Begin.model_validate(document).rater)
        if rater is None:
            return
        self.server.book.refresh()
        history = self.server.book.history(rater)
        self.server.progress(rater, len(history))
        self._send_json(200, {"items": entries(self.server.design, rater), "history": history})

    def _answers(self, document: Any) -> None:
        given = _Answers.model_validate(document)
        rater = self._rater(given.rater)
        if rater is None:
            return
        self.server.book.add(rater, given.session, given.answers)
        self.server.progress(rater, len(self.server.book.history(rater)))
        self._send_json(200, {"stored": len(given.answers)})

    def _rater(self, name: str) -> str | None:
        """The name of a rater, or None where it was refused."""
        problem = rater_problem(name)
        if not problem and self.server.rater and name != self.server.rater:
            problem = f"this review is {self.server.rater}'s; another rater needs a command of their own"
        if problem:
            self._refuse(400, problem)
            return None
        return name

    # Responses -----------------------------------------------------------------------------------------------------

    def _send_json(self, status: int, document: Any) -> None:
        self._send(status, json.dumps(document).encode(), "application/json")

    def _refuse(self, status: int, reason: str) -> None:
        # What was sent with it is not read.
        self.close_connection = True
        with contextlib.suppress(OSError):
            self._send_json(status, {"error": reason})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """In place of a page of HTML: for requests that cannot be parsed, and other methods."""
        self._refuse(int(code), "not a request of the page")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            "Content-Security-Policy": self.server.policy,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cache-Control": "no-store",
        } | ({"Connection": "close"} if self.close_connection else {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """No log: the terminal shows the progress of raters."""

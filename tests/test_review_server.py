"""The server of a review over real HTTP: what it serves to its page, and what it refuses to all others."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.data.review.answers import last_answers, read_answers
from engine.data.stores.base import Store
from engine.errors import JobError, OutputError
from engine.studies.review.design import Design
from engine.studies.review.program import serving
from engine.studies.review.server import ReviewServer, review_address
from tests.review_cases import SESSION, TIME, make_reviewed_run, open_small, pixels_of


class Client:
    """Requests as the page sends them, unless something else is given."""

    def __init__(self, server: ReviewServer, store: Store) -> None:
        self.server, self.store, self.design = server, store, server.design
        self.port, self.token = server.server_address[1], server.token

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, named)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def get(self, name: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        return self.request("GET", f"/{self.token}/{name}", **headers)

    def post(self, name: str, document: Any, **headers: str) -> tuple[int, Any]:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        sent = {"Content_Type": "application/json"} | headers
        status, _, data = self.request("POST", f"/{self.token}/{name}", body, **sent)
        return status, json.loads(data)

    def num_stored(self) -> int:
        """Parts, of which each request that is not refused stores one."""
        raters = [name for name in self.store.list("_review") if not name.endswith("designs")]
        return sum(len(self.store.list(name)) for name in raters)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("served")
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    store = make_reviewed_run(folder / "run")
    with serving(open_small(store.uri)) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield Client(server, store)
        server.shutdown()
    del os.environ["XDG_STATE_HOME"]


def one(design: Design, place: int = 0, **changes: Any) -> dict[str, Any]:
    """An answer as the page sends it."""
    return {"item": design.items[place].id, "choice": 3, "at": TIME, "seconds": 1, "retracted": False} | changes


def test_the_page_and_its_images(client: Client) -> None:
    """Served with a policy that lets nothing from elsewhere in, and no cache keep them."""
    status, headers, page = client.get("")
    assert status == 200 and headers["Content-Security-Policy"].startswith("default-src 'none'; img-src blob: data:;")
    assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"], headers["Cache-Control"]) == (
        "nosniff", "no-referrer", "no-store",
    )  # fmt: skip
    assert "Server" in headers and "Python" not in headers["Server"]
    assert not re.findall(rb'(?:src|href)="(?!data:,)', page)
    for item in client.design.items:
        status, headers, data = client.get(f"image/{item.id}")
        assert status == 200 and headers["Content-Type"] == "image/png" and pixels_of(data).shape == (8, 8, 3)


def test_answers_are_stored_before_they_are_confirmed(client: Client) -> None:
    """Each is on disk with its reply; the rater's history comes back, to any browser; sent twice it counts once."""
    status, began = client.post("begin", {"rater": "ann"})
    assert status == 200 and began["history"] == [] and len(began["items"]) == len(client.design.items)
    before = client.num_stored()
    body = {"rater": "ann", "session": SESSION, "answers": [one(client.design)]}
    for _ in range(2):
        assert client.post("answers", body) == (200, {"stored": 1})
        assert client.num_stored() == before + 1
    later = [
        one(client.design, 0, at=TIME + 1, choice=-1, retracted=True),
        one(client.design, 1, at=TIME + 2, choice=-1),
    ]
    assert client.post("answers", body | {"answers": later})[0] == 200
    assert client.post("begin", {"rater": "ann"})[1]["history"] == [[client.design.items[1].id, -1]]
    # Another rater has the same items in another order, and none of these answers.
    _, other = client.post("begin", {"rater": "bob"})
    assert other["history"] == [] and other["items"] != began["items"]
    assert sorted(map(str, other["items"])) == sorted(map(str, began["items"]))


def test_many_raters_at_once(client: Client) -> None:
    """Threads that answer at the same time lose no answer."""
    before = client.num_stored()

    def rate(name: str) -> None:
        for place in range(len(client.design.items)):
            assert (
                client.post("answers", {"rater": name, "session": SESSION, "answers": [one(client.design, place)]})[0]
                == 200
            )

    threads = [threading.Thread(target=rate, args=(f"rater-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.num_stored() == before + 4 * len(client.design.items)
    assert client.server.book.num_answered()["rater-3"] == len(client.design.items)


def test_others_are_refused(client: Client) -> None:
    """Requests without the secret, for another host or from another page; other paths and methods; nothing is stored,
    and no reply has a path, a traceback or a page."""
    before, token = client.num_stored(), client.token
    body = json.dumps({"rater": "eve", "session": SESSION, "answers": [one(client.design)]}).encode()
    item = client.design.items[0].id
    refused = [
        ("GET", "/", {}, 404), ("GET", "/favicon.ico", {}, 404), ("GET", f"/{token[:-1]}/", {}, 404),
        ("GET", f"/{token}", {}, 404), ("GET", f"/{token}/image/{item}/", {}, 404),
        ("GET", f"/x/image/{item}", {}, 404), ("GET", f"/{token}/image/../../metadata.parquet", {}, 404),
        ("GET", f"/{token}/image/%2e%2e/metadata.parquet", {}, 404), ("GET", f"/{token}//etc/passwd", {}, 404),
        ("GET", f"/{token}/image/", {}, 404), ("GET", f"/{token}/answers", {}, 404), ("GET", f"/{token}/?x", {}, 404),
        ("GET", f"/{token}/", {"Host": "evil.example"}, 403), ("GET", f"/{token}/", {"Host": "127.0.0.1.evil"}, 403),
        ("GET", f"/{token}/", {"Host": ""}, 403),
        ("POST", f"/{token}/answers", {"Host": "evil.example"}, 403),
        ("POST", f"/{token}/answers", {"Origin": "http://evil.example"}, 403),
        ("POST", f"/{token}/answers", {"Origin": "null"}, 403),
        ("POST", f"/{token}/answers", {"Origin": f"https://127.0.0.1:{client.port}"}, 403),
        ("POST", f"/{token}/answers", {"Content_Type": "text/plain"}, 415),
        ("POST", f"/{token}/answers", {"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/answers", {}, 404), ("POST", f"/{token}/", {}, 404), ("POST", f"/{token}/delete", {}, 404),
        ("PUT", f"/{token}/answers", {}, 501), ("DELETE", f"/{token}/", {}, 501), ("OPTIONS", f"/{token}/", {}, 501),
        ("TRACE", f"/{token}/", {}, 501),
    ]  # fmt: skip
    for method, path, headers, wanted in refused:
        sent = {"Content_Type": "application/json"} | headers if method == "POST" else headers
        status, answered, data = client.request(method, path, body if method == "POST" else None, **sent)
        assert status == wanted, (method, path, headers)
        assert "Access-Control-Allow-Origin" not in answered
        assert status == 200 or (b"Traceback" not in data and list(json.loads(data)) == ["error"])
    assert client.num_stored() == before
    # From the page itself, by either name of this machine.
    for host in ("127.0.0.1", "localhost"):
        named = f"{host}:{client.port}"
        assert client.post("begin", {"rater": "eve"}, Host=named, Origin=f"http://{named}")[0] == 200


HOSTILE_BODIES: list[tuple[Any, int]] = [
    (b"", 400), (b"null", 400), (b"[]", 400), (b"{", 400), (b"\xff\xfe", 400), (b'{"rater": NaN}', 400),
    (b"[" * 10_000, 400), (b" " * (2**20 + 1), 413), ({"rater": "eve"}, 400),
    ({"rater": "../../x"}, 400), ({"rater": "designs"}, 400), ({"rater": "Eve"}, 400), ({"rater": ["eve"]}, 400),
    ({"session": "../x"}, 400), ({"session": 1}, 400), ({"more": 1}, 400), ({"answers": {}}, 400),
    ({"answers": [{}]}, 400), ({"item": "0" * 16}, 400), ({"item": "../x"}, 400), ({"choice": 10}, 400),
    ({"choice": 2**70}, 400), ({"choice": "3"}, 400), ({"at": -1}, 400), ({"seconds": 1e400}, 400), ({"key": "x"}, 400),
    ({"retracted": 1}, 400), ({"label": 3}, 400),
]  # fmt: skip


@pytest.mark.parametrize(("hostile", "wanted"), HOSTILE_BODIES)
def test_hostile_bodies(client: Client, hostile: Any, wanted: int) -> None:
    """Refused with a reason of a line; nothing is stored, and the server goes on."""
    before = client.num_stored()
    body: dict[str, Any] = {"rater": "eve", "session": SESSION, "answers": [one(client.design)]}
    if isinstance(hostile, dict) and hostile != {"rater": "eve"}:
        is_answer = set(hostile) <= {"item", "choice", "at", "seconds", "key", "retracted", "label"}
        hostile = body | ({"answers": [one(client.design) | hostile]} if is_answer else hostile)
    status, document = client.post("answers", hostile)
    assert status == wanted and "Traceback" not in document["error"] and "\n" not in document["error"]
    assert client.num_stored() == before and client.get("")[0] == 200


def test_requests_that_are_not_http(client: Client) -> None:
    """Garbage, half a request, a wrong length, a body in chunks: the connection ends, the server stays."""
    head = f"POST /{client.token}/answers HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n".encode()
    for data in (
        b"\0\xff garbage\r\n\r\n", b"GET /" + b"x" * 100_000, b"GET / HTTP/9.9\r\n\r\n",
        head + b"Content-Length: -1\r\n\r\n", head + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", head + b"Content-Length: 9\r\n\r\n{",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    ):  # fmt: skip
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
            answered = b""
            # The server may end the connection before it has read all.
            with contextlib.suppress(OSError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while more := connection.recv(65536):
                    answered += more
        assert b"Traceback" not in answered and not answered.startswith(b"HTTP/1.1 200")
    assert client.get("")[0] == 200


def test_a_store_that_fails_keeps_the_answer_in_the_page(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reply says so, and the page sends it again: no confirmation without the file."""

    def full(*_: Any) -> bool:
        raise OutputError("the disk is full")

    body = {"rater": "frieda", "session": SESSION, "answers": [one(client.design)]}
    with monkeypatch.context() as patch:
        patch.setattr(type(client.store), "publish", full)
        assert client.post("answers", body) == (503, {"error": "the disk is full"})
    assert client.post("answers", body) == (200, {"stored": 1})
    assert "frieda" in last_answers(read_answers(client.store))["rater"].to_pylist()


def test_a_review_of_one_rater_and_its_address(client: Client, tmp_path: Path) -> None:
    """With `--rater` others are refused; a run has the same port and secret each time, a secret for the user alone;
    a port that is taken is named where it was asked for."""
    address = review_address("some/run", None)
    assert review_address("some/run", None) == address != review_address("other/run", None)
    assert review_address("some/run", 0) == type(address)(0, address.token)
    files = list(Path(os.environ["XDG_STATE_HOME"]).rglob("review-*.json"))
    assert len(files) >= 2 and {file.stat().st_mode & 0o777 for file in files} == {0o600}
    review = open_small(client.store.uri)
    with serving(review, rater="ann", port=0) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        mine = Client(server, client.store)
        assert mine.post("begin", {"rater": "ann"})[0] == 200
        status, document = mine.post("begin", {"rater": "bob"})
        assert status == 400 and "this review is ann's" in document["error"]
        server.shutdown()
    with (
        pytest.raises(JobError, match=r"--port: \d+ cannot be used .*; omit it, or give another"),
        serving(review, port=client.port),
    ):
        pass
    with pytest.raises(JobError, match="--port: 99999"), serving(review, port=99999):
        pass
    # The run's own port is taken by the other server: another one is used.
    with serving(review) as server:
        assert server.server_address[1] != client.port and server.server_address[0] == "127.0.0.1"


def test_the_command_ends_well(client: Client) -> None:
    """Ctrl-C and SIGTERM are its regular end: a summary, exit code 0, no traceback."""
    command = [sys.executable, "-m", "engine.cli", "review", client.store.uri, "--samples", "3", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        rest, errors = process.stdout.read(), process.stderr.read()
        assert process.wait(60) == 0 and rest == "no answers yet\n" and "Traceback" not in errors
    assert lines[0].startswith("design ") and "items (" in lines[0] and lines[1].startswith("page: http://127.0.0.1:")

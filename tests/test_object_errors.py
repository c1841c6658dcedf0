"""What is said of a store that refuses, fails or is not there: cause and remedy in one line."""

from __future__ import annotations

import http.server
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from engine.data.stores import object_client
from engine.data.stores.opening import open_store
from engine.errors import EXIT_DRAINED, EXIT_USER, OutputError


@pytest.fixture
def error_of(s3_server: str, call: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `riskforge status` says of an address; nothing is tried for long."""
    monkeypatch.setattr(object_client, "RETRY_WAITS", (0.01,) * 4)

    def error(address: str, code: int = EXIT_USER) -> str:
        ended, output, errors = call("status", address)
        assert ended == code and not output and "Traceback" not in errors, errors
        return str(errors.strip())

    return error


def test_a_bucket_that_is_not_there(error_of: Callable[..., str]) -> None:
    error = "error: s3://nobody/x/_state/plan: there is no such bucket; create it, or correct the address"
    error += " (or that of the endpoint)"
    assert error_of("s3://nobody/x") == error
    with pytest.raises(OutputError, match=r"^s3://nobody/x/y: there is no such bucket; create it"):
        open_store("s3://nobody/x").publish("y", b"")
    with pytest.raises(OutputError, match=r"^s3://nobody/x/y: there is no such bucket; create it"):
        open_store("s3://nobody/x").exists("y")


def test_no_credentials(error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert error_of("s3://bucket/x") == (
        "error: s3://bucket/x/_state/plan: no credentials are found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,"
        " or AWS_PROFILE, or give the machine a role, here and on every machine with workers"
    )


def test_an_endpoint_that_nobody_listens_on(error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    error = error_of("s3://bucket/x", code=EXIT_DRAINED)
    assert error.startswith(
        "error: s3://bucket/x/_state/plan: the endpoint cannot be reached (Could not connect to the"
    )
    assert "look at the network and at AWS_ENDPOINT_URL (what is committed is kept, and the same command" in error


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("AWS_ENDPOINT_URL", "127.0.0.1:9000", "Invalid endpoint: 127.0.0.1:9000"),
        ("AWS_MAX_ATTEMPTS", "many", "invalid literal for int() with base 10: 'many'"),
        ("AWS_RETRY_MODE", "patient", 'Invalid value provided to "mode": "patient" must be one of: '),
    ],
)
def test_settings_that_the_library_does_not_understand(
    s3_server: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    """Some of them are raised as a plain `ValueError`."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(OutputError) as caught:
        open_store("s3://bucket/x").list()
    assert str(caught.value).startswith(f"s3://bucket/x: a setting is not understood ({reason}")
    assert "correct AWS_ENDPOINT_URL (http:// or https:// and a host), or another AWS_ variable" in str(caught.value)


def test_access_denied(s3_server: str, error_of: Callable[..., str]) -> None:
    """The server checks keys from here on, and knows none."""
    reset, plain = f"{s3_server}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(reset, b"0", plain, method="POST")).close()
    try:
        error = error_of("s3://bucket/x")
    finally:
        urllib.request.urlopen(urllib.request.Request(reset, b"inf", plain, method="POST")).close()
    assert error.startswith("error: s3://bucket/x/_state/plan: access denied (InvalidAccessKeyId: ")
    assert "must be allowed to list, read, write and delete there (s3:ListBucket, GetObject, PutObject" in error


def test_a_store_that_is_asked_too_much(error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that says so to everybody."""

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            self.send_response(503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as busy:
        threading.Thread(target=busy.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{busy.server_port}")
        error = error_of("s3://bucket/x", code=EXIT_DRAINED)
        busy.shutdown()
    assert error.startswith("error: s3://bucket/x/_state/plan: the store asks for fewer requests (SlowDown: Please")
    assert "use fewer workers or a larger samples_per_shard, or set AWS_RETRY_MODE=adaptive" in error

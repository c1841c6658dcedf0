"""Headless Chromium, driven over a pipe by the DevTools protocol: no server, no port, no further package."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT_SECONDS = 300.0
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
_KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Escape": 27, "Enter": 13, "Tab": 9}


class Browser:
    """A browser with one page.

    Attributes:
        complaints: errors and warnings of the page's console, exceptions, and what its content policy refused.
    """

    def __init__(self, profile: Path) -> None:
        self.complaints: list[str] = []
        self._received = b""
        self._number = 0
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The protocol's ends are the descriptors 3 and 4 of the browser; nothing of ours may lie there.
        ends = [fcntl.fcntl(one, fcntl.F_DUPFD, 20) for one in (theirs_in, theirs_out)]
        command = ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", str(CHROMIUM), *_OPTIONS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=ends, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for one in (theirs_in, theirs_out, *ends):
            os.close(one)
        self._session = ""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            self._session = ""
            self.send("Browser.close")
        for one in (self._in, self._out):
            os.close(one)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def open(self, address: str) -> None:
        """Load a page and wait for it."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=address)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self.evaluate("location.href === 'about:blank' || document.readyState !== 'complete'"):
            assert time.monotonic() < deadline, f"{address} does not load"

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of the page, as JSON has it."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until an expression of the page is true."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"it does not come to {condition}"

    def press(self, key: str) -> None:
        """Press a key, as a user does."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key])

    def type(self, text: str) -> None:
        """Type characters, as a user does; a line feed is the Enter key."""
        names = {"\n": "Enter", "\b": "Backspace"}
        codes = {"\n": 13, "\b": 8, "-": 189, "+": 187, "/": 191}
        for letter in text:
            about = {"key": names.get(letter, letter), "windowsVirtualKeyCode": codes.get(letter, ord(letter.upper()))}
            typed = {} if letter == "\b" else {"text": "\r" if letter == "\n" else letter}
            self.send("Input.dispatchKeyEvent", type="keyDown", **about, **typed)
            self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def tap(self, selector: str) -> None:
        """Touch the middle of an element."""
        x, y = self.evaluate(
            f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=True)
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.send("Emulation.setTouchEmulationEnabled", enabled=False)

    def click(self, selector: str, place: int = 0) -> None:
        """Click on the middle of an element, as a user does: what lies over it gets the click."""
        self.evaluate(f"document.querySelectorAll({selector!r})[{place}].scrollIntoView({{block: 'center'}})")
        x, y = self.evaluate(
            f"(() => {{ const b = document.querySelectorAll({selector!r})[{place}].getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose(self, selector: str, value: str) -> None:
        """Set a control and tell the page that it changed."""
        self.evaluate(
            f"(() => {{ const one = document.querySelector({selector!r}); one.value = {value!r};"
            " for (const kind of ['input', 'change']) one.dispatchEvent(new Event(kind, {bubbles: true})); })()"
        )

    def look(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Have a window of a size, in light or dark."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The next message; what the console says is kept."""
        message = self._next(deadline)
        method, about = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(about["exceptionDetails"]))
        elif method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.complaints.append(str(about["entry"]["text"]))
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(about["args"]))
        return message

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._in, 1 << 20) if ready else b""
            if not data:
                raise TimeoutError("the browser does not answer")
            self._received += data
        text, _, self._received = self._received.partition(b"\0")
        return dict(json.loads(text))

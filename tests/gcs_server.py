"""So much of a GCS as a small run needs."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import time
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from tests.s3_cases import BUCKET


class FewWordsOfGcs(http.server.BaseHTTPRequestHandler):
    """So much of the JSON API of GCS as a small run needs; it shows what gcsfs asks for, not what Google answers."""

    objects: ClassVar[dict[str, tuple[int, bytes]]] = {}
    asked: ClassVar[list[str]] = []

    def answer(self, status: int, body: bytes) -> None:
        self.asked.append(f"{self.command} {self.path}")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        # gcsfs asks for an object and a folder at once, and hangs up on one of them.
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def about(self, name: str) -> dict[str, str]:
        generation, data = self.objects[name]
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        return {"name": name, "bucket": BUCKET, "size": str(len(data)), "generation": str(generation), "md5Hash": md5}

    def do_POST(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        about, _, data = body.partition(b"\n\n")[2].partition(b"\n--==0==\n")
        name = json.loads(about)["name"]
        if query.get("ifGenerationMatch") == ["0"] and name in self.objects:
            self.answer(412, b"{}")
            return
        self.objects[name] = time.time_ns(), data.partition(b"\n\n")[2].removesuffix(b"\n--==0==--")
        self.answer(200, json.dumps(self.about(name)).encode())

    def do_GET(self) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        name = unquote(path.partition(f"/b/{BUCKET}/o/")[2])
        if name in self.objects and query.get("alt") == ["media"]:
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            self.answer(200, self.objects[name][1][int(first) : int(last) + 1 if last else None])
        elif name in self.objects:
            self.answer(200, json.dumps(self.about(name)).encode())
        elif path.endswith(f"/b/{BUCKET}"):
            self.answer(200, b"{}")
        elif path.endswith(f"/b/{BUCKET}/o"):
            self.answer(200, json.dumps(self.listing(query["prefix"][0], query.get("delimiter", [""])[0])).encode())
        else:
            self.answer(404, b"{}")

    def listing(self, prefix: str, delimiter: str) -> dict[str, Any]:
        rest = {name: name.removeprefix(prefix) for name in sorted(self.objects) if name.startswith(prefix)}
        deeper = {one.partition("/")[0] for one in rest.values() if delimiter and "/" in one}
        items = [self.about(name) for name, one in rest.items() if not delimiter or "/" not in one]
        return {"items": items, "prefixes": [f"{prefix}{one}/" for one in sorted(deeper)]}

    def do_DELETE(self) -> None:
        there = self.objects.pop(unquote(urlsplit(self.path).path.partition(f"/b/{BUCKET}/o/")[2]), None)
        self.answer(404 if there is None else 204, b"")

    def log_message(self, *_: Any) -> None:
        pass

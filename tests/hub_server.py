"""So much of the Hugging Face Hub as a push and a reader need: repositories, Git LFS, commits, listings, downloads.

Every request is checked as the Hub's own protocol has it (huggingface_hub's source), and what breaks it is noted in
`violations`. It speaks Git LFS only: the Xet protocol's token is not found, which is how a client can tell.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_" + "aBcDeF" * 5
OWNER = "ada"
PAGE = 7
PART_BYTES = 64_000
LFS = re.compile(r".*\.(tar|parquet|png|jpg)")
ID = r"(?P<id>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    """A repository: branches, each with its files by name as `(content, whether by LFS)`."""

    private: bool
    branches: dict[str, dict[str, tuple[bytes, bool]]]
    commits: list[tuple[str, str, list[str]]] = field(default_factory=list)


@dataclass
class Fault:
    """What happens to some requests in place of an answer.

    Attributes:
        request: pattern of `METHOD PATH`.
        times: how many requests it happens to.
        skip: how many requests pass before.
        status: of the answer; 0 breaks the connection, after half of a body was read.
        act: is called then.
        answers: whether the request is served all the same, and the answer alone is lost.
    """

    request: str
    times: int = 1
    skip: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "not now"
    act: Callable[[], None] = lambda: None
    is_served: bool = False


class HubServer:
    """A Hub on this machine.

    Attributes:
        puts: how often each LFS object came whole.
        violations: requests that no client should make.
        asked: all requests.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.puts: Counter[str] = Counter()
        self.violations: list[str] = []
        self.asked: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = "http://{}:{}".format(*self.server.server_address)
        self.token = TOKEN
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def clear(self) -> None:
        for one in (self.repos, self.objects, self.parts, self.puts, self.violations, self.asked, self.faults):
            one.clear()

    def add(self, name: str, *, private: bool = True, files: dict[str, bytes] | None = None) -> Repo:
        """A repository that is there before."""
        content = {name: (data, LFS.fullmatch(name) is not None) for name, data in (files or {}).items()}
        self.repos[f"{OWNER}/{name}"] = Repo(private, {"main": content})
        return self.repos[f"{OWNER}/{name}"]

    def tree(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch without the one that the Hub makes."""
        files = self.repos[f"{OWNER}/{name}"].branches[branch]
        return {path: data for path, (data, _) in files.items() if path != ".gitattributes"}

    def writes(self) -> list[str]:
        """Requests that change something."""
        return [one for one in self.asked if re.match(r"PUT|POST \S*(create|/commit/|/branch/|batch|/lfs/)", one)]

    def fault_of(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.request, request):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


@pytest.fixture(scope="module")
def hub_of_module() -> Iterator[HubServer]:
    """The server of the fixture `hub`."""
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def hub(hub_of_module: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub that the environment names; in the end nobody has asked it for what no client should."""
    from huggingface_hub import constants

    hub_of_module.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    for module in ("hub", "push"):
        monkeypatch.setattr(f"engine.data.publishing.{module}.WAITS", (0.01, 0.02))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", hub_of_module.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub_of_module
    assert hub_of_module.violations == []


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        hub, where = self.server_hub, f"{self.command} {self.path}"
        with hub.lock:
            hub.asked.append(where)
        fault = hub.fault_of(where)
        length = int(self.headers.get("Content-Length") or 0)
        if fault and not fault.is_served:
            self._fail(fault, length)
            return
        body = self.rfile.read(length)
        if len(body) < length:
            self.close_connection = True
            return
        try:
            with hub.lock:
                status, headers, data = self._route(body)
        except Refused as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            status, data = error.status, json.dumps({"error": str(error)}).encode()
        if fault:
            self._fail(fault, 0)
            return
        self._answer(status, headers, data)

    def _fail(self, fault: Fault, length: int) -> None:
        if not fault.status:
            self.rfile.read(length // 2)
            fault.act()
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)
            return
        self.rfile.read(length)
        fault.act()
        self._answer(fault.status, fault.headers, json.dumps({"error": fault.message}).encode())

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", headers.get("Content-Length", str(len(data))))
        for name, value in headers.items():
            if name != "Content-Length":
                self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            if self.command != "HEAD":
                self.wfile.write(data)

    # Routes --------------------------------------------------------------------------------------------------------

    def _route(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        path = parts.path
        if self.command == "PUT":
            return self._put(path, body)
        for method, pattern, serve in _ROUTES:
            if (method == self.command or (method, self.command) == ("GET", "HEAD")) and (
                match := re.fullmatch(pattern, path)
            ):
                named = {name: unquote(value or "") for name, value in match.groupdict().items()}
                # The address of a completion is signed, as those of the storage are.
                if serve is not _Handler.complete:
                    self._authorize(named.get("id", ""))
                answer = serve(self, body, **named)
                return answer if isinstance(answer, tuple) else (200, _JSON, json.dumps(answer).encode())
        raise Refused(404, f"no such page: {path}")

    def _violate(self, text: str) -> None:
        self.server_hub.violations.append(f"{self.command} {self.path}: {text}")
        raise Refused(400, text)

    def _authorize(self, name: str) -> None:
        given = self.headers.get("Authorization")
        if given is None:
            repo = self.server_hub.repos.get(name)
            if self.command in ("GET", "HEAD") and repo is not None and not repo.private:
                return
            raise Refused(401, "Invalid username or password.")
        if given != f"Bearer {self.server_hub.token}":
            raise Refused(401, "Invalid credentials in Authorization header")

    def _repo(self, name: str) -> Repo:
        if name not in self.server_hub.repos:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.server_hub.repos[name]

    def _files(self, name: str, revision: str) -> dict[str, tuple[bytes, bool]]:
        branches = self._repo(name).branches
        for branch, files in branches.items():
            if revision in (branch, _sha(branch, files)):
                return files
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    # Repositories --------------------------------------------------------------------------------------------------

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        if asked.get("type") != "dataset" or not asked.get("organization"):
            self._violate(f"creates {asked}")
        if asked.get("visibility") not in ("private", "public") and not isinstance(asked.get("private"), bool):
            self._violate("does not say whether it is private")
        if asked["organization"] != OWNER:
            raise Refused(
                403, f'You don\'t have the rights to create a dataset under the namespace "{asked["organization"]}"'
            )
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server_hub.repos:
            raise Refused(409, "You already created this dataset repo")
        private = asked.get("private", asked.get("visibility") == "private")
        attributes = b"*.tar filter=lfs diff=lfs merge=lfs -text\n"
        self.server_hub.repos[name] = Repo(private, {"main": {".gitattributes": (attributes, False)}})
        return {"url": f"{self.server_hub.endpoint}/datasets/{name}", "name": name, "id": "1"}

    def info(self, body: bytes, id: str, revision: str = "main") -> Any:
        repo, files = self._repo(id), self._files(id, revision or "main")
        siblings = [{"rfilename": name} for name in files]
        return {
            "_id": "1", "id": id, "author": OWNER, "private": repo.private, "gated": False, "disabled": False,
            "sha": _sha(revision or "main", files), "tags": [], "downloads": 0, "likes": 0, "siblings": siblings,
            "lastModified": "2026-11-30T00:00:00.000Z", "createdAt": "2026-11-30T00:00:00.000Z",
        }  # fmt: skip

    def refs(self, body: bytes, id: str) -> Any:
        branches = self._repo(id).branches
        heads = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": _sha(name, files)}
            for name, files in branches.items()
        ]
        return {"branches": heads, "converts": [], "tags": []}

    def branch(self, body: bytes, id: str, branch: str) -> Any:
        branches = self._repo(id).branches
        if branch in branches:
            raise Refused(409, "Reference already exists")
        branches[branch] = dict(branches["main"])
        return {}

    def validate(self, body: bytes) -> Any:
        import yaml

        asked = json.loads(body)
        header = yaml.load(asked["content"].split("---\n")[1], getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if asked["repoType"] != "dataset" or "configs" not in header:
            self._violate("a card without configurations")
        if header.get("license") == "nonsense":
            return 400, _JSON, json.dumps({"errors": [{"message": '"license" must be one of [...]'}]}).encode()
        return {"errors": [], "warnings": []}

    # Files ---------------------------------------------------------------------------------------------------------

    def tree(self, body: bytes, id: str, revision: str, folder: str = "") -> Any:
        files = self._files(id, revision)
        inside = {name: one for name, one in files.items() if not folder or name.startswith(f"{folder}/")}
        if folder and not inside:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        entries: dict[str, Any] = {}
        for name, one in sorted(inside.items()):
            above = name.split("/")[:-1]
            for depth in range(len(above)):
                path = "/".join(above[: depth + 1])
                entries.setdefault(path, {"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
            entries[name] = _entry(name, *one)
        depth = folder.count("/") + 1 if folder else 0
        is_deep = self.query.get("recursive", "").lower() in ("1", "true")
        kept = [entry for path, entry in entries.items() if path != folder and (is_deep or path.count("/") == depth)]
        start = int(self.query.get("cursor", 0))
        page, rest = kept[start : start + PAGE], kept[start + PAGE :]
        url = f"{self.server_hub.endpoint}{urlsplit(self.path).path}?recursive={is_deep}&cursor={start + PAGE}"
        return 200, _JSON | ({"Link": f'<{url}>; rel="next"'} if rest else {}), json.dumps(page).encode()

    def paths(self, body: bytes, id: str, revision: str) -> Any:
        is_json = "json" in self.headers.get("Content-Type", "")
        asked = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
        if len(asked) > 1000:
            raise Refused(413, "too many parameters")
        files = self._files(id, revision)
        found = [_entry(name, *files[name]) for name in asked if name in files]
        folders = [name for name in asked if any(path.startswith(f"{name}/") for path in files)]
        return found + [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]

    def resolve(self, body: bytes, id: str, revision: str, name: str) -> Any:
        files = self._files(id, revision)
        if name not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data, is_lfs = files[name]
        etag = hashlib.sha256(data).hexdigest() if is_lfs else _blob(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": _sha(revision, files), "Accept-Ranges": "bytes"}
        if is_lfs:
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            part = data[first : last + 1]
            return 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, part
        return 200, headers | {"Content-Length": str(len(data))}, data

    # Pushing -------------------------------------------------------------------------------------------------------

    def preupload(self, body: bytes, id: str, revision: str) -> Any:
        files, asked = self._files(id, revision), json.loads(body)["files"]
        if len(asked) > 256:
            self._violate("asks about more than 256 files")
        ignored = files.get(".gitignore", (b"", False))[0].decode().split()
        answers = []
        for file in asked:
            if len(base64.b64decode(file["sample"], validate=True)) != min(512, file["size"]):
                self._violate(f"the sample of {file['path']} is not its beginning")
            old = files.get(file["path"])
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if LFS.fullmatch(file["path"]) else "regular",
                    "shouldIgnore": any(file["path"].endswith(one.lstrip("*")) for one in ignored),
                    "oid": None if old is None else hashlib.sha256(old[0]).hexdigest() if old[1] else _blob(old[0]),
                }
            )
        return {"files": answers}

    def batch(self, body: bytes, id: str) -> Any:
        self._repo(id)
        asked, objects = json.loads(body), []
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256" or "basic" not in asked["transfers"]:
            self._violate(f"asks for {asked}")
        if "lfs+json" not in self.headers.get("Accept", ""):
            self._violate("accepts no answers of LFS")
        for one in asked["objects"]:
            if not re.fullmatch("[0-9a-f]{64}", one["oid"]) or one["size"] < 1:
                self._violate(f"names the object {one}")
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.server_hub.objects:
                answer["actions"] = self._actions(one["oid"], one["size"])
            objects.append(answer)
        return 200, {"Content-Type": "application/vnd.git-lfs+json"}, json.dumps({"objects": objects}).encode()

    def _actions(self, oid: str, size: int) -> dict[str, Any]:
        base = f"{self.server_hub.endpoint}/lfs/{oid}"
        verify = {"href": f"{base}/verify", "header": {}}
        if size <= PART_BYTES:
            return {"upload": {"href": f"{base}?size={size}", "header": {}}, "verify": verify}
        numbers = range(1, -(-size // PART_BYTES) + 1)
        urls = {str(number): f"{base}/{number}" for number in numbers}
        header = {"chunk_size": str(PART_BYTES), **urls}
        return {"upload": {"href": f"{base}/complete", "header": header}, "verify": verify}

    def _put(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        match = re.fullmatch(r"/lfs/([0-9a-f]{64})(?:/(\d+))?", path)
        if match is None:
            self._violate("no such place")
        if self.headers.get("Authorization"):
            self._violate("the token is sent to the storage")
        if match[2]:
            self.server_hub.parts.setdefault(match[1], {})[int(match[2])] = body
            return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""
        self._store(match[1], body)
        return 200, {}, b""

    def _store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            self._violate(f"the bytes are not those of {oid}")
        self.server_hub.objects[oid] = data
        self.server_hub.puts[oid] += 1

    def complete(self, body: bytes, oid: str) -> Any:
        asked, parts = json.loads(body), self.server_hub.parts.pop(oid)
        etags = {one["partNumber"]: one["etag"] for one in asked["parts"]}
        if asked["oid"] != oid or etags != {
            number: f'"{hashlib.md5(data).hexdigest()}"' for number, data in parts.items()
        }:
            self._violate("the parts are not those that came")
        self._store(oid, b"".join(parts[number] for number in sorted(parts)))
        return {}

    def verify(self, body: bytes, oid: str) -> Any:
        asked, data = json.loads(body), self.server_hub.objects.get(oid)
        if data is None or (asked["oid"], asked["size"]) != (oid, len(data)):
            self._violate("is not what came")
        return {}

    def commit(self, body: bytes, id: str, revision: str) -> Any:
        if "ndjson" not in self.headers.get("Content-Type", ""):
            self._violate("a commit is lines of JSON")
        files = dict(self._files(id, revision))
        header, *lines = [json.loads(line) for line in body.splitlines()]
        if header["key"] != "header" or not header["value"]["summary"]:
            self._violate("a commit begins with its message")
        names = []
        for line in lines:
            key, value = line["key"], line["value"]
            names.append(value["path"])
            if key == "lfsFile":
                data = self.server_hub.objects.get(value["oid"])
                if data is None or len(data) != value["size"] or not LFS.fullmatch(value["path"]):
                    self._violate(f"{value['path']}: no such object was uploaded")
                files[value["path"]] = data, True
            elif key == "file":
                if LFS.fullmatch(value["path"]) or value["encoding"] != "base64":
                    self._violate(f"{value['path']} belongs into LFS")
                files[value["path"]] = base64.b64decode(value["content"], validate=True), False
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                self._violate(f"no such operation: {key}")
        for name in files:
            if any(other.startswith(f"{name}/") for other in files):
                self._violate(f"{name} is a file and a folder")
        repo = self._repo(id)
        repo.branches[revision] = files
        repo.commits.append((revision, header["value"]["summary"], names))
        sha = _sha(revision, files)
        return {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{self.server_hub.endpoint}/datasets/{id}/commit/{sha}",
        }

    def whoami(self, body: bytes) -> Any:
        return {"name": OWNER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha(branch: str, files: dict[str, tuple[bytes, bool]]) -> str:
    """The commit of a branch, which follows from its files."""
    return hashlib.sha1(repr([(name, _blob(data)) for name, (data, _) in sorted(files.items())]).encode()).hexdigest()


def _entry(name: str, data: bytes, is_lfs: bool) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry | ({"lfs": lfs} if is_lfs else {})


_JSON = {"Content-Type": "application/json"}
_ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("GET", rf"/api/datasets/{ID}", _Handler.info),
    ("GET", rf"/api/datasets/{ID}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", rf"/api/datasets/{ID}/refs", _Handler.refs),
    ("POST", rf"/api/datasets/{ID}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("GET", rf"/api/datasets/{ID}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    ("POST", rf"/api/datasets/{ID}/paths-info/(?P<revision>[^/]+)", _Handler.paths),
    ("POST", rf"/api/datasets/{ID}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/api/datasets/{ID}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"/datasets/{ID}\.git/info/lfs/objects/batch", _Handler.batch),
    ("GET", rf"/datasets/{ID}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", _Handler.complete),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", _Handler.verify),
)

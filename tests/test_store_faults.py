"""Stores that forget conditions, and networks that break: every operation of S3 with every fault, by a proxy at HTTP.

`RISKFORGE_S3='AWS_ENDPOINT_URL=... AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=...'` names a store with a bucket
`riskforge-tests` on which large objects are created, too.
"""

from __future__ import annotations

import http.server
import itertools
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from engine.data.run.verify import verify
from engine.data.stores import conditional_put, object_client
from engine.data.stores.object_store import ObjectStore
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.errors import EXIT_DRAINED, EXIT_OK, EXIT_USER, OutputError, RiskforgeError, StoreLostError
from tests.gcs_server import FewWordsOfGcs
from tests.s3_proxy import Fault, Proxy, Request, error_body, proxy_of
from tests.sleepy import run_sleepy, tars

BUCKET = "bucket"
# In the place of 100 MiB: the sizes from which s3fs uploads in parts, of which S3 wants 5 MiB at least.
PART_BYTES = 5 * 2**20
LARGE_BYTES = 2 * PART_BYTES
NAMES = itertools.count()
# One for all stores: to make it takes longer than most tests.
CONNECTIONS: list[Any] = []


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    """A proxy before moto's S3, which the environment names; nothing is tried for long."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    with proxy_of("http://{}:{}".format(*moto.get_host_and_port())) as found, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": found.uri,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_CONFIG_FILE": os.devnull,
        }.items():
            patch.setenv(name, value)
        patch.setattr(object_client, "RETRY_WAITS", (0.01,) * 4)
        patch.setattr(object_client, "S3_TRIES", 1)
        patch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: PART_BYTES)
        CONNECTIONS.append(connected().client.fs)
        CONNECTIONS[0].call_s3("create_bucket", Bucket=BUCKET)
        yield found
        CONNECTIONS.clear()
    moto.stop()


@pytest.fixture(autouse=True)
def whole(proxy: Proxy) -> Iterator[None]:
    """Every test begins and ends without faults."""
    proxy.choose = lambda request: None
    proxy.seen.clear()
    yield
    proxy.choose = lambda request: None


def connected(name: str = "") -> ObjectStore:
    found = open_store(f"s3://{BUCKET}/{name or f'store-{next(NAMES)}'}")
    assert isinstance(found, ObjectStore)
    found.client._connection = next(iter(CONNECTIONS), None)
    return found


def at(*operations: str, fault: Fault, times: int | None = None) -> Callable[[Request], Fault | None]:
    """The fault at each of these operations, or at the first requests of them."""
    lock, seen = threading.Lock(), Counter[str]()

    def choose(request: Request) -> Fault | None:
        with lock:
            seen[request.operation] += request.operation in operations
            is_due = times is None or seen[request.operation] <= times
            return fault if request.operation in operations and is_due else None

    return choose


# Conditions -----------------------------------------------------------------------------------------------------------

PUT, PARTS = "PutObject", "CompleteMultipartUpload"
IGNORED = [
    Fault(kind="unconditional"),
    Fault(kind="status", status=501, body=error_body("NotImplemented")),
    Fault(kind="status", status=400, body=error_body("InvalidArgument")),
]


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, Path]:
    """Two files of one size that are uploaded in parts."""
    paths = tmp_path / "first", tmp_path / "other"
    for path, byte in zip(paths, b"12", strict=True):
        path.write_bytes(bytes([byte]) * LARGE_BYTES)
    return paths


@pytest.mark.parametrize("fault", [None, *IGNORED], ids=lambda one: "honoured" if one is None else str(one.status))
def test_a_large_object_is_created_once(proxy: Proxy, large: tuple[Path, Path], fault: Fault | None) -> None:
    """Also where uploads in parts overwrite (as on Ceph's gateway) or are not taken with a condition: then in one PUT.

    A later writer, one after a crash, and two at once.
    """
    proxy.choose = at(PARTS, fault=fault) if fault else proxy.choose
    store, late = connected("once"), connected("once")
    store.remove_tree("")
    assert store.publish("x", large[0]) and store.publish("x", large[0]), "a lost answer"
    assert not late.publish("x", large[1])
    assert store.read("x") == large[0].read_bytes()
    assert store.client.info("x")["ETag"].strip('"').endswith("-2") == (fault is None)  # type: ignore[index]
    writers = [connected("once") for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(one.publish, "y", path) for one, path in zip(writers, large, strict=True)]
    won = [one.result() for one in done]
    assert sorted(won) == [False, True] and store.read("y") == large[won.index(True)].read_bytes()
    check_nothing_left(store)


def check_nothing_left(store: ObjectStore) -> None:
    """No probe, and no upload that was begun."""
    assert not store.list("_state")
    uploads = store.client.fs.call_s3("list_multipart_uploads", Bucket=store.client.bucket).get("Uploads", [])
    assert not [one for one in uploads if one["Key"].startswith(store.uri.rpartition("/")[2])]


@pytest.mark.parametrize("fault", IGNORED, ids=lambda one: str(one.status))
def test_a_store_whose_single_uploads_ignore_the_condition_is_refused(proxy: Proxy, fault: Fault) -> None:
    """By overwriting, or by not knowing it."""
    proxy.choose = at(PUT, fault=fault)
    with pytest.raises(OutputError, match="overwrites where it was asked to create if absent") as caught:
        connected().publish("x", b"x")
    assert caught.value.exit_code == EXIT_USER


@pytest.mark.parametrize("fault", IGNORED, ids=lambda one: str(one.status))
def test_a_store_that_ignores_every_condition_is_refused_before_a_large_object_is_there(
    proxy: Proxy, large: tuple[Path, Path], fault: Fault
) -> None:
    """Also where a process publishes nothing small before."""
    store = connected()
    store.replace("x", b"of another writer")

    def choose(request: Request) -> Fault | None:
        is_probe = "/_state/probes/" in request.path
        return fault if request.operation in (PUT, PARTS) and (fault.kind == "unconditional" or not is_probe) else None

    proxy.choose = choose
    with pytest.raises(OutputError):
        store.publish("x", large[0])
    proxy.choose = lambda request: None
    assert store.read("x") == b"of another writer"
    check_nothing_left(store)


def test_an_answer_of_200_can_be_a_refusal(proxy: Proxy, large: tuple[Path, Path]) -> None:
    """S3 may begin to answer before an upload is put together, and say in the body that the name was taken."""
    store = connected()
    assert store.publish("x", large[0]) and store._conditional.are_parts_conditional
    proxy.choose = at(PARTS, fault=Fault(kind="status", status=200, body=error_body("PreconditionFailed")))
    assert not store.publish("x", large[1]) and store.read("x") == large[0].read_bytes()


@pytest.mark.parametrize(("limit", "shown"), [(b"", ""), (b"<MaxSizeAllowed>7340032</MaxSizeAllowed>", " of 7 MiB")])
def test_what_one_request_does_not_take_is_refused(
    proxy: Proxy, large: tuple[Path, Path], limit: bytes, shown: str
) -> None:
    """With the size that the store names, where uploads in parts are of no use."""
    body = error_body("EntityTooLarge").replace(b"</Error>", limit + b"</Error>")
    too_large = Fault(kind="status", status=400, body=body)
    store = connected()
    store.replace("small", b"")

    def choose(request: Request) -> Fault | None:
        if request.operation == PARTS:
            return IGNORED[0]
        return too_large if request.path.endswith("/x") else None

    proxy.choose = choose
    with pytest.raises(
        OutputError, match=rf"has 10 MiB, more than the one request{shown} in which .*samples_per_shard"
    ):
        store.publish("x", large[0])


def test_more_than_any_request_takes_is_refused_before_it_is_sent(
    proxy: Proxy, large: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of S3 and GCS that is 5 GiB; the message has the largest shard."""
    monkeypatch.setattr(conditional_put, "MAX_REQUEST_BYTES", LARGE_BYTES - 1)
    monkeypatch.setattr(conditional_put, "_parts_from", lambda scheme, size: LARGE_BYTES)
    proxy.choose = at(PARTS, fault=IGNORED[0])
    with pytest.raises(OutputError, match="more than the one request of 10 MiB in which this store creates"):
        connected().publish("x", large[0])


@pytest.mark.skipif("RISKFORGE_S3" not in os.environ, reason="needs RISKFORGE_S3, settings of a store")
def test_a_store_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two writers has a large object."""
    for setting in os.environ["RISKFORGE_S3"].split():
        monkeypatch.setenv(*setting.split("=", 1))
    stores = [open_store(f"s3://riskforge-tests/{os.getpid()}") for _ in range(2)]
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(path.name.encode() * LARGE_BYTES)
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(one.publish, "x", path) for one, path in zip(stores, paths, strict=True)]
    assert sorted(one.result() for one in done) == [False, True]
    stores[0].remove_tree("")


class ResumableGcs(FewWordsOfGcs):
    """With the uploads of large objects, whose condition it may forget."""

    objects: ClassVar[dict[str, tuple[int, bytes]]] = {}
    honours: ClassVar[bool] = True
    begun: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        name = query.get("name", [""])[0]
        if query.get("uploadType") != ["resumable"] and "part" not in query:
            super().do_POST()
            return
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if query.get("ifGenerationMatch") == ["0"] and name in self.objects and self.honours:
            self.answer(412, b"{}")
        elif "part" in query:
            self.objects[name] = time.time_ns(), data
            self.answer(200, json.dumps(self.about(name)).encode())
        else:
            self.begun.append(name)
            self.send_response(200)
            self.send_header("Location", f"http://{self.headers['Host']}/upload/storage/v1?part=1&name={quote(name)}")
            self.send_header("Content-Length", "0")
            self.end_headers()


@pytest.mark.parametrize("honours", [True, False])
def test_a_large_object_is_created_once_on_gcs(
    large: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, honours: bool
) -> None:
    """By a resumable upload, or in one request where such uploads overwrite."""
    ResumableGcs.objects.clear()
    ResumableGcs.begun.clear()
    monkeypatch.setattr(ResumableGcs, "honours", honours)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), ResumableGcs) as gcs:
        threading.Thread(target=gcs.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{gcs.server_port}")
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        store, late = (open_store(f"gs://{BUCKET}/x") for _ in range(2))
        assert store.publish("y", large[0]) and store.publish("y", large[0])
        assert not late.publish("y", large[1]) and store.read("y") == large[0].read_bytes()
        assert set(ResumableGcs.objects) == {"x/y"}, "no probe is left"
        assert ("x/y" in ResumableGcs.begun) == honours
        gcs.shutdown()


# What may pass --------------------------------------------------------------------------------------------------------

CODES = {
    "InternalError": 500, "ServiceUnavailable": 503, "SlowDown": 503, "RequestTimeout": 400, "BadGateway": 502,
    "GatewayTimeout": 504, "TooManyRequests": 429, "OperationAborted": 409, "XAmzContentSHA256Mismatch": 400,
}  # fmt: skip
FAULTS = {
    "reset": Fault(kind="reset"),
    "close": Fault(kind="close"),
    "no-xml": Fault(kind="status", status=502, body=b"<html>bad gateway</html>"),
    "empty-500": Fault(kind="status", status=500),
    **{code: Fault(kind="status", status=status, body=error_body(code)) for code, status in CODES.items()},
}
# An answer that breaks off, or is none; and one that is lost when the store has done what was asked.
READ_FAULTS = {"cut": Fault(kind="cut"), "lost": Fault(kind="lost")}
ACTIONS: dict[str, tuple[str, Callable[[ObjectStore], Any]]] = {
    "read": ("GetObject", lambda store: store.read("there")),
    "read_each": ("GetObject", lambda store: list(store.read_each(["there", "none"]))),
    "tail": ("GetObject", lambda store: store.tail("there", 3)),
    "fetch": ("GetObject", lambda store: store.fetch("there").read_bytes()),
    "fetch_each": ("GetObject", lambda store: [one.read_bytes() for one in store.fetch_each(["there"])]),
    "exists": ("HeadObject", lambda store: (store.exists("there"), store.exists("none"))),
    "list": ("ListObjects", lambda store: store.list()),
    "total_size": ("ListObjects", lambda store: store.total_size()),
    "publish": ("PutObject", lambda store: (store.publish("new", b"new"), store.read("new"))),
    "replace": ("PutObject", lambda store: (store.replace("there", b"new"), store.read("there"))),
    "remove": ("DeleteObject", lambda store: (store.remove("there"), store.exists("there"))),
    "remove_all": ("DeleteObjects", lambda store: (store.remove_all(["there", "none"]), store.exists("there"))),
    "remove_tree": ("ListObjects", lambda store: (store.remove_tree(""), store.list())),
    "set_aside": ("PutObject", lambda store: (store.set_aside("there"), store.list())),
}
# The faults of each kind, which every action meets. All others are met by one action that reads and one that writes,
# and divided among one of each other operation; with `RISKFORGE_FUZZ` all meet all.
KINDS = ("reset", "cut", "lost", "InternalError")
THOROUGH = ("read", "publish")
PARTLY = ("fetch", "exists", "list", "remove_all")


def is_met(action: str, place: int, name: str) -> bool:
    """Whether an action meets the fault at a place of the list."""
    shared = action in PARTLY and place % len(PARTLY) == PARTLY.index(action)
    return action in THOROUGH or name in KINDS or shared or "RISKFORGE_FUZZ" in os.environ


CASES = [
    (action, name, fault)
    for action, (operation, _) in ACTIONS.items()
    for place, (name, fault) in enumerate((FAULTS | READ_FAULTS).items())
    # The answer to HEAD has no body, which may be cut or say more than its status.
    if operation != "HeadObject" or (name != "cut" and fault.status != 400)
    if is_met(action, place, name)
]


def prepared() -> ObjectStore:
    """A store with one object, of its own."""
    store = connected()
    store.replace("there", b"some bytes that are there")
    return store


@pytest.fixture(scope="module")
def expected(proxy: Proxy) -> dict[str, Any]:
    """What each action gives where nothing breaks."""
    return {name: act(prepared()) for name, (_, act) in ACTIONS.items()}


@pytest.mark.parametrize(("action", "name", "fault"), CASES, ids=[f"{one[0]}-{one[1]}" for one in CASES])
def test_what_passes_is_tried_again(
    proxy: Proxy, expected: dict[str, Any], action: str, name: str, fault: Fault
) -> None:
    """Every action of a store with every fault at the requests that it is made of, twice: it gives what it would."""
    store = prepared()
    operation, act = ACTIONS[action]
    proxy.choose = at(operation, fault=fault, times=2)
    assert act(store) == expected[action]


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        ("CreateMultipartUpload", "reset"), ("CreateMultipartUpload", "lost"), ("UploadPart", "SlowDown"),
        ("UploadPart", "lost"), (PARTS, "InternalError"), (PARTS, "lost"), (PARTS, "in-200"),
    ],
)  # fmt: skip
def test_an_upload_in_parts_is_tried_again(proxy: Proxy, large: tuple[Path, Path], operation: str, name: str) -> None:
    """Also where the store says in an answer of 200 that it failed, and where it did what it was asked unseen."""
    inside = Fault(kind="status", status=200, body=error_body("InternalError"))
    fault = (FAULTS | READ_FAULTS | {"in-200": inside})[name]
    store = connected()
    store._conditional.are_parts_conditional = True
    proxy.choose = at(operation, fault=fault, times=2)
    assert store.publish("x", large[0])
    proxy.choose = lambda request: None
    assert store.read("x") == large[0].read_bytes()


@pytest.mark.parametrize("name", FAULTS)
def test_what_stays_ends_with_75_and_one_sentence(proxy: Proxy, name: str) -> None:
    """After all retries; nothing is tried for ever."""
    store = prepared()
    proxy.choose = at("GetObject", fault=FAULTS[name])
    proxy.seen.clear()
    with pytest.raises(StoreLostError) as caught:
        store.read("there")
    # aiohttp asks once more by itself where a connection ends before an answer.
    assert caught.value.exit_code == EXIT_DRAINED and 5 <= len(proxy.seen) <= 10
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"{store.uri}/there: ") and "the same command continues" in text


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (403, "AccessDenied", "access denied (AccessDenied: of the test)"),
        (403, "SignatureDoesNotMatch", "access denied (SignatureDoesNotMatch"),
        (403, "RequestTimeTooSkewed", "access denied (RequestTimeTooSkewed"),
        (404, "NoSuchBucket", "there is no such bucket"),
        (404, "NoSuchKey", "there is no such object"),
        (501, "NotImplemented", "the store refuses (NotImplemented"),
        (400, "InvalidRequest", "the store refuses (InvalidRequest"),
        (400, "EntityTooLarge", "the store does not take an object of this size (EntityTooLarge"),
    ],
)
def test_what_does_not_pass_is_refused_at_once(proxy: Proxy, status: int, code: str, text: str) -> None:
    """Whoever is not allowed to is not allowed to later: exit code 2."""
    store = prepared()
    proxy.choose = at("GetObject", fault=Fault(kind="status", status=status, body=error_body(code)))
    proxy.seen.clear()
    with pytest.raises(OutputError) as caught:
        store.read("there")
    assert caught.value.exit_code == EXIT_USER and text in str(caught.value)
    assert proxy.seen == ["GetObject"]


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_over_a_network_that_breaks_is_complete(proxy: Proxy, tmp_path: Path) -> None:
    """Each kind of request breaks now and then, in each of the ways: not a byte is another."""
    lock, count = threading.Lock(), itertools.count()
    broken = [*FAULTS.values(), *READ_FAULTS.values()]

    def choose(request: Request) -> Fault | None:
        with lock:
            number = next(count)
        is_due = number % 5 == 0 and not (request.operation == "HeadObject" and number % 2)
        return broken[number // 5 % len(broken)] if is_due else None

    run_sleepy(tmp_path / "local", 1, LocalExecutor(1))
    store = connected()
    proxy.choose = choose
    assert run_sleepy(store.uri, 1, LocalExecutor(2)).exit_code == EXIT_OK
    proxy.choose = lambda request: None
    assert not verify(store).findings
    assert {name: store.read(f"shards/{name}") for name in tars(tmp_path / "local")} == tars(tmp_path / "local")


@pytest.mark.parametrize("what", ["any", *(pytest.param(one, marks=pytest.mark.slow) for one in ("worker", "closing"))])
def test_a_run_whose_store_is_lost_is_continued(proxy: Proxy, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For good, from some request on: of the driver, of a worker that publishes, of what closes the run."""
    # The next driver would be another process.
    monkeypatch.setattr("engine.data.stores.lease._is_dead_here", lambda holder: True)
    store = connected()
    begun = threading.Event()

    def choose(request: Request) -> Fault | None:
        if "/shards/" in request.path and request.operation == "PutObject" and what != "closing":
            begun.set()
        if request.path.endswith("/metadata.parquet") and request.operation == "PutObject":
            begun.set()
        is_hit = begun.is_set() and (what != "worker" or ("/shards/" in request.path))
        return Fault(kind="reset") if is_hit else None

    proxy.choose = choose
    with pytest.raises(RiskforgeError) as caught:
        run_sleepy(store.uri, 1, LocalExecutor(1))
    assert caught.value.exit_code == EXIT_DRAINED and "the same command continues" in str(caught.value)
    proxy.choose = lambda request: None
    run_sleepy(store.uri, 1, LocalExecutor(1))
    assert not verify(store).findings

"""Runs on S3, against a real server of its protocol, moto's, in this process; of GCS the requests are looked at."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import http.server
import importlib.util
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from botocore.exceptions import EndpointConnectionError

import engine
from engine.data.run.commit_record import COMMITS
from engine.data.run.commits import list_commits, read_commits
from engine.data.run.file_names import METADATA, SUCCESS
from engine.data.run.repair import repair
from engine.data.run.shards import SHARDS, shard_name
from engine.data.run.verify import verify
from engine.data.stores import object_appends, object_client, object_copies
from engine.data.stores.base import STATE, TORN
from engine.data.stores.journal import Journal, read_events
from engine.data.stores.object_store import ObjectStore
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.driver.scheduling.messages import SchedulerLimits
from engine.driver.status import read_status
from engine.errors import EXIT_DRAINED, EXIT_OK, EXIT_OWNED, CorruptShardError, OutputError, StoreLostError
from tests.conftest import REPOSITORY
from tests.run_cases import commit_one, open_case
from tests.sleepy import run_sleepy, tars, wait_until

BUCKET = "bucket"
COUNT = 2
NUM_SHARDS = 5


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The endpoint of an S3 with one bucket, which the environment names."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    endpoint = "http://{}:{}".format(*moto.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        connected("unused").client.fs.call_s3("create_bucket", Bucket=BUCKET)
        yield endpoint
    moto.stop()


@pytest.fixture
def store(server: str, request: pytest.FixtureRequest) -> ObjectStore:
    """An empty place for a test."""
    return connected(request.node.name.replace("[", "-").replace("]", ""))


def connected(name: str) -> ObjectStore:
    found = open_store(f"s3://{BUCKET}/{name}")
    assert isinstance(found, ObjectStore)
    return found


def objects(store: ObjectStore, folder: str = "") -> dict[str, bytes]:
    """Everything below a folder by its name, listed and read past the store's own methods."""
    keys = store.client.fs.find(f"{BUCKET}/{store.name}/{folder}")
    return {key.removeprefix(f"{BUCKET}/{store.name}/"): store.client.fs.cat_file(key) for key in keys}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tars of the same run in a folder."""
    output = tmp_path_factory.mktemp("local") / "run"
    run_sleepy(output, COUNT, LocalExecutor(2))
    return {f"{SHARDS}/{name}": data for name, data in tars(output).items()}


# The store ------------------------------------------------------------------------------------------------------------


def test_a_name_is_taken_once(store: ObjectStore, tmp_path: Path) -> None:
    """The first to publish has the name; whoever offers the same bytes, as after a lost response, succeeds."""
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "first").write_bytes(b"first")
    assert store.publish("a/x", b"first") and store.publish("a/x", b"first")
    assert store.publish("a/x", tmp_path / "first")
    assert not store.publish("a/x", b"other") and not store.publish("a/x", tmp_path / "other")
    assert not store.publish("a/x", b"firsT"), "of the same size"
    assert objects(store) == {"a/x": b"first"}
    store.replace("a/x", b"other")
    assert store.read("a/x") == b"other" and (tmp_path / "first").exists()


def test_an_upload_in_parts_does_not_overwrite(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The condition goes with the request that completes it; what was uploaded and refused is not left behind."""
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 * 2**20)
    large = tmp_path / "large"
    large.write_bytes(bytes(11 * 2**20))
    assert store.publish("large", large) and store.client.info("large")["ETag"].strip('"').endswith("-3")  # type: ignore[index]
    assert store.publish("large", large), "the same bytes"
    large.write_bytes(b"1" * 11 * 2**20)
    assert not store.publish("large", large) and store.read("large") == bytes(11 * 2**20)
    # Of this store alone: others use the server too, some with faults.
    left = store.client.fs.call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads", [])
    assert not [one for one in left if one["Key"].startswith(store.client.key("").removeprefix(f"{BUCKET}/"))]


def test_two_who_publish_at_once(server: str, request: pytest.FixtureRequest) -> None:
    """Of many threads with connections of their own, one has the name."""
    stores = [connected(request.node.name) for _ in range(4)]
    for number in range(5):
        with ThreadPoolExecutor(len(stores)) as pool:
            found = [pool.submit(one.publish, f"{number}", bytes([which])) for which, one in enumerate(stores)]
        assert sorted(one.result() for one in found) == [False, False, False, True]


def test_a_store_that_ignores_the_condition_is_refused(store: ObjectStore) -> None:
    """The same server without the header: it would overwrite."""

    def strip(request: Any, **_: Any) -> None:
        del request.headers["If-None-Match"]

    assert not store.is_there()
    store.client.fs.s3.meta.events.register("before-send.s3.PutObject", strip)
    with pytest.raises(OutputError, match=r"overwrites where it was asked to create if absent \(If-None-Match: \*\)"):
        store.publish("x", b"x")


def test_names_and_bytes(store: ObjectStore) -> None:
    """Listings, sizes, ends of files and removal; a folder whose name begins alike is another."""
    assert store.list() == [] and not store.is_there() and not store.exists("a") and store.size_of(["a"]) == 0
    for name in ("a/1", "a/2", "a/b/3", "ab/4", "5"):
        store.replace(name, name.encode())
    assert store.list() == ["5", "a", "ab"] and store.list("a") == ["a/1", "a/2", "a/b"]
    assert store.is_there() and store.exists("a") and store.is_folder("a") and not store.is_folder("5")
    assert store.sizes("none") == {} and set(store.sizes("a")) == {"a/1", "a/2"}
    assert sum(store.sizes("a").values()) == store.size_of(["a/1", "a/2"])
    assert store.size_of(["a/1", "none", "a/b/3"]) == 8 and store.total_size() == 3 + 3 + 5 + 4 + 1
    assert store.tail("a/b/3", 3) == b"b/3" and store.tail("5", 100) == b"5"
    assert list(store.read_each(["5", "none", "a/2"])) == [("5", b"5"), ("a/2", b"a/2")]
    store.remove("none")
    store.remove_tree("none")
    store.remove_tree("a")
    assert set(objects(store)) == {"5", "ab/4"}
    store.remove_all(["5", "none"])
    assert set(objects(store)) == {"ab/4"}
    with pytest.raises(OutputError, match=r"^s3://bucket/test_names_and_bytes/5: there is no such object$") as caught:
        store.read("5")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(ValueError, match="not a name inside"):
        store.address("../other")
    assert [open_store(one).uri for one in ("S3://b/x/", "gcs://b/x/y")] == ["s3://b/x", "gs://b/x/y"]
    assert pickle.loads(pickle.dumps(store)).list() == ["ab"]


def test_copies_follow_the_object(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One download a version; nothing where nothing is; folders of parts; and not more than there is room for."""
    other = connected(store.name)
    other.replace("x", b"old")
    path = store.fetch("x")
    seen = path.stat().st_mtime_ns, path.stat().st_ino
    assert path.read_bytes() == b"old" and (store.fetch("x").stat().st_mtime_ns, path.stat().st_ino) == seen
    other.replace("x", b"new")
    assert store.fetch("x").read_bytes() == b"new"
    other.remove("x")
    assert not store.fetch("x").exists()
    for number in range(3):
        other.replace(f"parts/{number}", bytes(number))
    assert [one.stat().st_size for one in sorted(store.fetch("parts").iterdir())] == [0, 1, 2]
    other.remove("parts/1")
    assert sorted(one.name for one in store.fetch("parts").iterdir()) == ["0", "2"]
    late = connected(store.name)
    monkeypatch.setattr(late.client, "entries", lambda name: [])
    assert not late.fetch("parts").exists(), "removed since it was found to be a folder"
    other.remove_tree("parts")
    other.replace("parts", b"a file now")
    assert store.fetch("parts").read_bytes() == b"a file now"
    monkeypatch.setattr(object_copies, "MAX_COPIED_BYTES", 100)
    monkeypatch.setattr(object_copies, "MIN_COPIES", 2)
    for number in range(6):
        other.replace(f"y/{number}", bytes(50))
    kept = store.fetch("y/0", keep=True)
    paths = [store.fetch(f"y/{number}") for number in range(1, 6)]
    assert kept.exists() and paths[-1].exists() and sum(one.exists() for one in paths) == 2
    monkeypatch.undo()
    found = store.fetch_each(f"y/{number % 6}" for number in range(40))
    assert [path.name for path in found] == [str(number % 6) for number in range(40)]
    home = store.staging()
    store.leave()
    assert not home.exists() and store.fetch("y/1").stat().st_size == 50


def test_a_forked_process_connects_again(store: ObjectStore) -> None:
    """Workers of a data loader are forked: the parent's connections and threads are not theirs."""
    store.replace("x", b"of the parent")
    assert store.read("x") == b"of the parent"
    ours, theirs = os.pipe()
    if not (child := os.fork()):
        with contextlib.suppress(BaseException):
            os.write(theirs, store.read("x") + store.fetch("x").read_bytes())
        os._exit(0)
    os.close(theirs)
    os.waitpid(child, 0)
    assert os.read(ours, 1000) == b"of the parent" * 2
    os.close(ours)


def test_what_was_appended_is_seen(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end at the latest; after some time, where a flush is due."""
    store.append("log", "one\n")
    store.flush(if_due=True)
    assert not store.exists("log")
    monkeypatch.setattr(object_appends, "APPEND_SECONDS", 0.0)
    store.flush(if_due=True)
    store.append("log", "two\n")
    wait_until(lambda: store.exists("log"), "the first line is seen")
    assert store.read("log").startswith(b"one\n")
    store.flush()
    assert store.read("log") == b"one\ntwo\n"


def test_nobody_waits_for_what_is_due(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver goes on while the network holds a line up; one upload at a time, and the end waits for it."""
    is_open, begun, put = threading.Event(), threading.Event(), store.client.put

    def wait(name: str, data: Any, *, mode: str) -> None:
        begun.set()
        assert is_open.wait(60)
        put(name, data, mode=mode)

    monkeypatch.setattr(object_appends, "APPEND_SECONDS", 0.0)
    monkeypatch.setattr(store.client, "put", wait)
    for line in "abc":
        store.append("log", line)
        store.flush(if_due=True)
        assert begun.wait(60) and not is_open.is_set()
    assert sum(one.name == "flush" for one in threading.enumerate()) == 1
    is_open.set()
    store.flush()
    assert store.read("log") == b"abc"


def test_a_network_that_swallows_everything(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience ends, and before that of the scheduler: the worker that waits does not hang."""
    import s3fs

    last_try = 5 * object_client.S3_TRIES * s3fs.S3FileSystem.read_timeout  # botocore tries five times.
    longest = object_client.MAX_RETRY_SECONDS + 1.25 * max(object_client.RETRY_WAITS) + last_try
    assert longest < SchedulerLimits().min_limit_seconds / 1.5
    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 0.2)
    monkeypatch.setattr(object_client, "MAX_RETRY_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as hole:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{hole.getsockname()[1]}")
        with pytest.raises(StoreLostError, match=r"the endpoint cannot be reached \(Read timeout on endpoint URL"):
            connected("x").read("y")
        hole.settimeout(0.2)
        for _ in range(object_client.S3_TRIES):
            hole.accept()[0].close()
        with pytest.raises(TimeoutError):
            hole.accept()


def test_what_could_not_be_uploaded_is_uploaded_later(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that breaks for a while costs no line; a removed local folder costs no run."""
    monkeypatch.setattr(object_appends, "APPEND_SECONDS", 0.0)
    journal = Journal(store, 0)
    journal.note("one")
    with monkeypatch.context() as patch:
        patch.setattr(store.client, "_connection", object_client.connect("s3"))
        store.client.fs.connect()
        store.client.fs.s3.meta.events.register("before-send.s3.PutObject", broken)
        patch.setattr(object_client, "RETRY_WAITS", (0.01,))
        with pytest.raises(StoreLostError, match="the endpoint cannot be reached"):
            store.flush()
    assert not store.exists("_state/events/000000.jsonl")
    journal.keep(is_end=True)
    assert [one["event"] for one in read_events(store)] == ["one"]
    journal.note("two")
    shutil.rmtree(store.staging())
    journal.keep()
    journal.note("three")
    journal.keep(is_end=True)


def broken(**_: Any) -> None:
    raise EndpointConnectionError(endpoint_url="http://nowhere")


def test_what_may_not_be_removed_is_reported(store: ObjectStore) -> None:
    """S3 answers a request to remove many with 200, and in it which of them it did not."""

    def deny(parsed: dict[str, Any], **_: Any) -> None:
        parsed["Errors"] = [{"Key": f"{store.name}/b", "Code": "AccessDenied", "Message": "Access Denied"}]

    store.replace("a", b"")
    store.client.fs.s3.meta.events.register("after-call.s3.DeleteObjects", deny)
    with pytest.raises(OutputError, match=rf"^{store.uri}/b: access denied \(AccessDenied: Access Denied\); the"):
        store.remove_all(["a", "b"])


def test_many_are_removed(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one request takes."""
    monkeypatch.setattr(object_client, "DELETE_TOGETHER", 2)
    for name in "abcde":
        store.replace(name, b"")
    store.remove_all("abcd")
    assert set(objects(store)) == {"e"}


def test_a_file_that_was_repaired_is_not_set_aside(store: ObjectStore) -> None:
    """Without locks another worker may be faster; what it put there is not what was looked at."""
    store.replace("shards/x.tar", b"torn")
    store.fetch("shards/x.tar")
    connected(store.name).replace("shards/x.tar", b"whole")
    store.set_aside("shards/x.tar")
    assert objects(store) == {"shards/x.tar": b"whole"}
    store.fetch("shards/x.tar")
    store.set_aside("shards/x.tar")
    store.set_aside("shards/x.tar")
    [(name, data)] = objects(store).items()
    assert name.startswith(f"{TORN}/x.tar.") and data == b"whole"
    assert not store.fetch("shards/x.parquet").exists()
    connected(store.name).replace("shards/x.parquet", b"whole")
    store.set_aside("shards/x.parquet")
    assert store.exists("shards/x.parquet"), "it was not there when it was looked for"


def test_many_workers_at_one_damaged_shard(store: ObjectStore) -> None:
    """No lock is between them: each looks again, and all end with the record of one pair."""
    run, plan, job = open_case(store.uri)
    run.replace(f"{SHARDS}/{shard_name(job.name, 0)}.tar", b"torn")
    stores = [connected(store.name) for _ in range(3)]
    with ThreadPoolExecutor(len(stores)) as pool:
        done = [pool.submit(commit_one, one, plan, 0, attempt=which) for which, one in enumerate(stores, start=1)]
    [record] = read_commits(run)
    assert {one.result().parquet_sha256 for one in done} == {record.parquet_sha256}
    assert hashlib.sha256(run.read(f"{SHARDS}/{record.name}.parquet")).hexdigest() == record.parquet_sha256


def test_what_dead_processes_left_is_removed(store: ObjectStore, tmp_path: Path, monkeypatch: Any) -> None:
    """Their folders under TMPDIR; those of living ones stay."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = store.staging()
    program = (
        "import os, signal, sys, tempfile; from engine.data.stores.opening import open_store\n"
        "tempfile.tempdir = sys.argv[1]\n"
        "(open_store('s3://bucket/x').staging() / 'left').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, check=False)
    assert len(list(own.parent.iterdir())) == 4
    store.clean_staging()
    assert {one.name for one in own.parent.iterdir()} == {own.name, f"{own.name}.lock"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, check=False)
    reader = connected("another").staging()
    assert {one.name for one in own.parent.iterdir() if one.is_dir()} == {own.name, reader.name}, "a reader does, too"


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://bucket", "output 's3://bucket': is not of the form SCHEME://BUCKET/NAME; name a folder in a bucket"),
        ("s3:///x", "output 's3:///x': is not of the form SCHEME://BUCKET/NAME; name a folder in a bucket"),
        ("s3://b/x/../y", "output 's3://b/x/../y': holds one of * ? [ ] \\ #, a control character, or a part . or .."),
        ("s3://b/*", "output 's3://b/*': holds one of * ? [ ] \\ #, a control character, or a part . or .."),
        ("s3:/b/x", "output s3:/b/x: would be a folder called s3:; write s3://BUCKET/NAME"),
        ("GS:b/x", "output GS:b/x: would be a folder called GS:; write gs://BUCKET/NAME"),
        ("ftp://b/x", "output ftp://b/x: ftp:// is not supported; use a folder, s3://BUCKET/NAME or gs://BUCKET/NAME"),
    ],
)
def test_addresses_that_cannot_be(uri: str, message: str) -> None:
    with pytest.raises(OutputError) as caught:
        open_store(uri)
    assert str(caught.value) == message


@pytest.mark.parametrize(("uri", "library", "extra"), [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gcs")])
def test_a_missing_extra(uri: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else found(name))
    with pytest.raises(OutputError) as caught:
        open_store(uri)
    assert (
        str(caught.value) == f"output {uri}: needs {library}, which is not installed; pip install 'riskforge[{extra}]'"
    )


def error_of(*arguments: str, code: int = 2) -> str:
    """What `riskforge status` says of an address, in a process of its own, within seconds."""
    started = time.monotonic()
    command = [str(Path(sys.executable).with_name("riskforge")), "status", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr and not done.stdout, done
    assert time.monotonic() - started < 40
    return done.stderr.strip()


def test_a_bucket_that_is_not_there(server: str) -> None:
    error = "error: s3://nobody/x/_state/plan: there is no such bucket; create it, or correct the address"
    error += " (or that of the endpoint)"
    assert error_of("s3://nobody/x") == error
    with pytest.raises(OutputError, match=r"^s3://nobody/x/y: there is no such bucket; create it"):
        open_store("s3://nobody/x").publish("y", b"")
    with pytest.raises(OutputError, match=r"^s3://nobody/x/y: there is no such bucket; create it"):
        open_store("s3://nobody/x").exists("y")


def test_no_credentials(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert error_of("s3://bucket/x") == (
        "error: s3://bucket/x/_state/plan: no credentials are found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,"
        " or AWS_PROFILE, or give the machine a role, here and on every machine with workers"
    )


def test_an_endpoint_that_nobody_listens_on(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    server: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    """Some of them are raised as a plain `ValueError`."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(OutputError) as caught:
        open_store("s3://bucket/x").list()
    assert str(caught.value).startswith(f"s3://bucket/x: a setting is not understood ({reason}")
    assert "correct AWS_ENDPOINT_URL (http:// or https:// and a host), or another AWS_ variable" in str(caught.value)


def test_a_file_of_credentials_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of TMPDIR."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    monkeypatch.setattr("tempfile.tempdir", "/elsewhere")
    with pytest.raises(OutputError) as caught:
        open_store("gs://bucket/x").list()
    error = f"gs://bucket/x: the library reads {tmp_path}: Is a directory; correct GOOGLE_APPLICATION_CREDENTIALS"
    assert str(caught.value) == error


def test_what_gcsfs_logs_is_not_printed() -> None:
    """It logs every error with its traceback, and raises it as well."""
    program = "import logging; from engine.data.stores.opening import open_store; open_store('gs://b/x').client.fs;"
    program += "logging.getLogger('gcsfs').error('out of retries')"
    emulated = os.environ | {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=emulated, capture_output=True, text=True, check=True
    )
    assert not done.stderr


def test_access_denied(server: str) -> None:
    """The server checks keys from here on, and knows none."""
    reset, plain = f"{server}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(reset, b"0", plain, method="POST")).close()
    try:
        error = error_of("s3://bucket/x")
    finally:
        urllib.request.urlopen(urllib.request.Request(reset, b"inf", plain, method="POST")).close()
    assert error.startswith("error: s3://bucket/x/_state/plan: access denied (InvalidAccessKeyId: ")
    assert "must be allowed to list, read, write and delete there (s3:ListBucket, GetObject, PutObject" in error


def test_a_store_that_is_asked_too_much(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_has_the_bytes_of_a_local_one(store: ObjectStore, local: dict[str, bytes]) -> None:
    """Tars byte for byte, every file of the contract, a journal, nothing torn; the same command has nothing to do."""
    summary = run_sleepy(store.uri, COUNT, LocalExecutor(2))
    assert summary.exit_code == EXIT_OK and summary.report == f"{store.uri}/report.html"
    found = objects(store)
    assert {name: data for name, data in found.items() if name.endswith(".tar")} == local
    assert {SUCCESS, METADATA, "manifest.json", "README.md", "report.html", "shards/wids.json"} <= set(found)
    assert not any(name.startswith((TORN, "_state/staging", "_state/locks")) for name in found)
    assert [one["event"] for one in read_events(store)][-1] == "ended"
    assert not verify(store).findings and len(list(read_commits(store))) == NUM_SHARDS
    assert read_status(store).state == "complete"
    again = run_sleepy(store.uri, COUNT, LocalExecutor(2))
    assert again.was_complete and {name: data for name, data in objects(store).items() if STATE in name} == {
        name: data for name, data in found.items() if STATE in name
    }


def test_a_lost_object_of_a_finished_run_is_reported(store: ObjectStore) -> None:
    """By one listing of names and sizes; the marker goes, and comes back with the repaired shard."""
    assert run_sleepy(store.uri, 1, LocalExecutor(1)).exit_code == EXIT_OK
    name = "shards/sleepy-000001.tar"
    for damage in (store.remove, lambda name: store.replace(name, b"")):
        damage(name)
        with pytest.raises(CorruptShardError, match=r"shards/sleepy-000001\.tar: .* shard 1"):
            run_sleepy(store.uri, 1, LocalExecutor(1))
        assert not store.exists(SUCCESS)
        repair(store)
        assert run_sleepy(store.uri, 1, LocalExecutor(1)).exit_code == EXIT_OK and store.exists(SUCCESS)


def driver(uri: str, kind: str, **faults: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.sleepy", uri, str(COUNT), kind, json.dumps(faults)]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_killed_run_is_continued(store: ObjectStore, local: dict[str, bytes]) -> None:
    """SIGKILL in the middle; before it a second driver is refused; after it the same command makes what is missing."""
    first = driver(store.uri, "local", hang_once=[NUM_SHARDS - 1])
    while not list_commits(store):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    second = driver(store.uri, "local")
    _, errors = second.communicate(timeout=200)
    assert second.returncode == EXIT_OWNED and f"error: output {store.uri}: another driver is running on it" in errors
    assert read_status(store).state == "running"
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = len(list_commits(store))
    assert 1 <= before < NUM_SHARDS and not store.exists(SUCCESS)
    corpus = engine.open_run(store.uri)
    assert len(corpus) == 4 * before and corpus.runs[0].state == f"not finished: {before} committed shards so far"
    assert run_sleepy(store.uri, COUNT, LocalExecutor(2)).exit_code == EXIT_OK
    assert objects(store, "shards/").items() >= local.items() and not verify(store).findings


@pytest.mark.slow
def test_ray_workers_open_the_store_themselves(store: ObjectStore, local: dict[str, bytes]) -> None:
    done = driver(store.uri, "ray")
    _, errors = done.communicate(timeout=200)
    assert done.returncode == EXIT_OK, errors
    assert objects(store, "shards/").items() >= local.items() and not verify(store).findings


def test_what_is_there_already_is_adopted_or_set_aside(store: ObjectStore, local: dict[str, bytes]) -> None:
    """Other bytes under a shard's name are moved; a whole pair without a record is kept, whoever made it.

    Then files are damaged: `verify` names the objects, `repair` takes them out, the same command makes them again.
    """
    run_sleepy(store.uri, COUNT, LocalExecutor(2))
    lost = (f"{COMMITS}/000001.", f"{COMMITS}/000003.")
    for name in (SUCCESS, *(one for one in store.list(COMMITS) if one.startswith(lost))):
        store.remove(name)
    before = objects(store)
    store.replace("shards/sleepy-000001.tar", b"planted")
    assert run_sleepy(store.uri, COUNT, LocalExecutor(2)).exit_code == EXIT_OK
    after = objects(store)
    assert after.items() >= local.items() and not verify(store).damage
    assert after["shards/sleepy-000003.parquet"] == before["shards/sleepy-000003.parquet"], "adopted"
    assert b"planted" in [data for name, data in after.items() if name.startswith(TORN)]

    name = "shards/sleepy-000002.tar"
    store.replace(name, local[name][:-512])
    store.remove("shards/sleepy-000004.parquet")
    found = {finding.shard: finding.text for finding in verify(store).damage}
    assert set(found) == {2, 4} and found[2].startswith(f"{store.uri}/{name}: ")
    assert found[4] == f"{store.uri}/shards/sleepy-000004.parquet: is missing, but shard 4 is committed"
    assert sorted(repair(store).to_make) == [2, 4]
    assert run_sleepy(store.uri, COUNT, LocalExecutor(2)).exit_code == EXIT_OK
    assert objects(store, "shards/").items() >= local.items() and not verify(store).damage


def test_a_store_that_cannot_be_read_is_no_damage(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full local disk, or a store that falls silent: `repair` would take out what is whole."""
    run_sleepy(store.uri, COUNT, LocalExecutor(2))
    before = objects(store)

    def fail(lpath: str, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    reader = connected(store.name)
    monkeypatch.setattr(reader.client.fs, "get_file", fail)
    for look in (verify, repair):
        with pytest.raises(OutputError, match=r"shards/sleepy-000000\.tar: the local folder .* the disk is full"):
            look(reader)
    assert objects(store) == before


def test_a_run_of_a_folder_goes_on_in_a_bucket(store: ObjectStore, local: dict[str, bytes], tmp_path: Path) -> None:
    """Copied as it is, with its state; the address is no part of its plan."""
    run_sleepy(tmp_path / "run", COUNT, LocalExecutor(2))
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and path.name != SUCCESS and path.stem != "sleepy-000002" and "000002." not in path.name:
            store.replace(path.relative_to(tmp_path / "run").as_posix(), path.read_bytes())
    assert len(list_commits(store)) == NUM_SHARDS - 1
    assert run_sleepy(store.uri, COUNT, LocalExecutor(2)).exit_code == EXIT_OK
    assert objects(store, "shards/").items() >= local.items() and not verify(store).findings


# GCS ------------------------------------------------------------------------------------------------------------------


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


def test_gcs_is_asked_to_create_if_absent(local: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests of gcsfs: everything that is published goes out with the condition, and a refusal is understood."""
    FewWordsOfGcs.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FewWordsOfGcs) as gcs:
        threading.Thread(target=gcs.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{gcs.server_port}")
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        store = open_store(f"gs://{BUCKET}/x")
        assert store.publish("a", b"first") and store.publish("a", b"first") and not store.publish("a", b"other")
        uploads = [one for one in FewWordsOfGcs.asked if one.startswith("POST")]
        assert uploads and all("uploadType=multipart&ifGenerationMatch=0" in one for one in uploads)
        store.replace("a", b"other")
        assert "ifGenerationMatch" not in FewWordsOfGcs.asked[-1] and store.fetch("a").read_bytes() == b"other"
        assert run_sleepy(f"gcs://{BUCKET}/run", COUNT, LocalExecutor(2)).exit_code == EXIT_OK
        run = open_store(f"gs://{BUCKET}/run")
        assert not verify(run).findings and {name: run.read(name) for name in local} == local
        with pytest.raises(OutputError, match=r"^gs://nobody/x: there is no such bucket"):
            open_store("gs://nobody/x").is_there()
        gcs.shutdown()


def test_what_gcs_refuses_is_reported_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs logs what it raises with its traceback, and raises a bare ValueError for some."""

    class Refusing(FewWordsOfGcs):
        def do_GET(self) -> None:
            self.answer(400, json.dumps({"error": {"code": 400, "message": unquote(self.path.split("/")[4])}}).encode())

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as gcs:
        threading.Thread(target=gcs.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{gcs.server_port}")
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        for bucket in ("invalid", "other"):
            error = error_of(f"gs://{bucket}/x")
            assert "\n" not in error and error.startswith(f"error: gs://{bucket}/x/_state/plan: the store refuses ("), (
                error
            )
        gcs.shutdown()


# All commands ---------------------------------------------------------------------------------------------------------

SMALL = [
    "sampling.num_inference_steps=4", "requests.0.count=3", "requests.1.count=3", "requests.2.count=1",
    "requests.2.contexts=['']", "output.samples_per_shard=4", "guidance.boundary.every=2",
]  # fmt: skip


@pytest.mark.slow
def test_every_command_on_the_quickstart(server: str, call: Any, tmp_path: Path) -> None:
    """The real models, a date in the address, and everything that reads a run, as it reads a copy in a folder."""
    sets = [part for one in SMALL for part in ("--set", one)]
    job, uri = str(REPOSITORY / "jobs/quickstart.yaml"), "s3://bucket/nightly-{date}"
    code, out, err = call("plan", job, "--set", f"output.uri={uri}", *sets)
    assert code == 0 and "output: s3://bucket/nightly-20" in out, err
    code, out, err = call("run", job, "--output", uri, "--executor", "local", *sets)
    assert code == 0, err
    [name] = [one for one in connected("x").client.fs.ls(BUCKET, detail=False) if "nightly-" in one]
    run, folder = f"s3://{name}", str(tmp_path / "folder")
    assert f"report: {run}/report.html" in out
    for key, data in objects(connected(Path(name).name)).items():
        (tmp_path / "folder" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / key).write_bytes(data)
    _, out, _ = call("run", job, "--output", folder, "--executor", "local", *sets)
    assert "is complete: all 5 shards exist" in out, "the address is no part of the plan"

    assert json.loads(call("status", run, "--json")[1])["state"] == "complete"
    assert call("verify", run, "--deep")[:2] == (0, "5 of 5 shards, 16 samples: no damage\n")
    assert call("repair", run)[1] == "nothing to repair\n"
    assert call("report", run)[1] == f"{run}/report.html\n"
    assert call("retry", run, "--executor", "local")[0] == 0
    about = json.loads(call("inspect", run, "--json")[1])
    there = json.loads(call("inspect", folder, "--json")[1])
    assert about["quantiles"] == there["quantiles"] and about["image"] == there["image"] and about["rows"] == 16
    assert about["runs"][0]["disk_bytes"] > about["runs"][0]["data_bytes"] > 10_000

    for one, out in ((run, "e1"), (folder, "e2")):
        assert call("export", one, "--output", tmp_path / out, "--format", "parquet")[0] == 0
    assert (tmp_path / "e1/train-00000-of-00001.parquet").read_bytes() == (
        tmp_path / "e2/train-00000-of-00001.parquet"
    ).read_bytes()
    code, _, err = call("export", run, "--output", "s3://bucket/export")
    assert code == 2 and err == (
        "error: --output s3://bucket/export: an export is written to folders alone; give a folder, and copy it from"
        " there, such as with `aws s3 sync`\n"
    )
    code, out, err = call("rescore", run, "--target", "zoo:digits/classifier-b")
    assert code == 0 and f"scores: {run}/rescored/classifier-b-" in out, err
    [scores] = open_store(run).list("rescored")
    assert call("compare", run, f"{run}/{scores}")[0] == 0
    code, out, err = call("evaluate", run, "--limit", "10")
    assert code == 0 and f"figures: {run}/evaluation.json" in out, err
    check_reading(run, f"{run}/{scores}")


def check_reading(run: str, scores: str) -> None:
    """Rows, images at random and in a stream; of a folder of new scores, the images of the run."""
    corpus = engine.open_run(run)
    assert len(corpus) == 16 and len(corpus.filter("class_name == 'nine'")) == 1
    samples = corpus.to_torch()
    assert len(samples) == 16 and samples[15][0].shape == (3, 32, 32)
    assert pickle.loads(pickle.dumps(samples))[3][1] == samples[3][1]
    streamed = {one["__key__"]: one["__url__"] for one in corpus.to_webdataset()}
    assert set(streamed) == set(samples.keys) and all(url.startswith(f"{run}/shards/") for url in streamed.values())
    again = engine.open_run(scores)
    assert len(again.to_torch()) == 16 and again.runs[0].is_rescored
    assert corpus.to_table(["key"])["key"].to_pylist() == again.to_table(["key"])["key"].to_pylist()

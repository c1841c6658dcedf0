"""The store on S3, against a real server of its protocol, moto's, in this process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError

from engine.data.run.commits import read_commits
from engine.data.run.shards import SHARDS, shard_name
from engine.data.stores import object_appends, object_client, object_copies
from engine.data.stores.base import TORN
from engine.data.stores.journal import Journal, read_events
from engine.data.stores.object_store import ObjectStore
from engine.data.stores.opening import open_store
from engine.driver.scheduling.messages import SchedulerLimits
from engine.errors import OutputError, StoreLostError
from tests.conftest import REPOSITORY
from tests.run_cases import commit_one, open_case
from tests.s3_cases import BUCKET, connected, objects
from tests.sleepy import wait_until


def test_a_name_is_taken_once(s3_store: ObjectStore, tmp_path: Path) -> None:
    """The first to publish has the name; whoever offers the same bytes, as after a lost response, succeeds."""
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "first").write_bytes(b"first")
    assert s3_store.publish("a/x", b"first") and s3_store.publish("a/x", b"first")
    assert s3_store.publish("a/x", tmp_path / "first")
    assert not s3_store.publish("a/x", b"other") and not s3_store.publish("a/x", tmp_path / "other")
    assert not s3_store.publish("a/x", b"firsT"), "of the same size"
    assert objects(s3_store) == {"a/x": b"first"}
    s3_store.replace("a/x", b"other")
    assert s3_store.read("a/x") == b"other" and (tmp_path / "first").exists()


def test_an_upload_in_parts_does_not_overwrite(
    s3_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The condition goes with the request that completes it; what was uploaded and refused is not left behind."""
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 * 2**20)
    large = tmp_path / "large"
    large.write_bytes(bytes(11 * 2**20))
    assert s3_store.publish("large", large) and s3_store.client.info("large")["ETag"].strip('"').endswith("-3")  # type: ignore[index]
    assert s3_store.publish("large", large), "the same bytes"
    large.write_bytes(b"1" * 11 * 2**20)
    assert not s3_store.publish("large", large) and s3_store.read("large") == bytes(11 * 2**20)
    # Of this store alone: others use the server too, some with faults.
    left = s3_store.client.fs.call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads", [])
    assert not [one for one in left if one["Key"].startswith(s3_store.client.key("").removeprefix(f"{BUCKET}/"))]


def test_two_who_publish_at_once(s3_server: str, request: pytest.FixtureRequest) -> None:
    """Of many threads with connections of their own, one has the name."""
    stores = [connected(request.node.name) for _ in range(4)]
    for number in range(5):
        with ThreadPoolExecutor(len(stores)) as pool:
            found = [pool.submit(one.publish, f"{number}", bytes([which])) for which, one in enumerate(stores)]
        assert sorted(one.result() for one in found) == [False, False, False, True]


def test_a_store_that_ignores_the_condition_is_refused(s3_store: ObjectStore) -> None:
    """The same server without the header: it would overwrite."""

    def strip(request: Any, **_: Any) -> None:
        del request.headers["If-None-Match"]

    assert not s3_store.is_there()
    s3_store.client.fs.s3.meta.events.register("before-send.s3.PutObject", strip)
    with pytest.raises(OutputError, match=r"overwrites where it was asked to create if absent \(If-None-Match: \*\)"):
        s3_store.publish("x", b"x")


def test_names_and_bytes(s3_store: ObjectStore) -> None:
    """Listings, sizes, ends of files and removal; a folder whose name begins alike is another."""
    assert (
        s3_store.list() == [] and not s3_store.is_there() and not s3_store.exists("a") and s3_store.size_of(["a"]) == 0
    )
    for name in ("a/1", "a/2", "a/b/3", "ab/4", "5"):
        s3_store.replace(name, name.encode())
    assert s3_store.list() == ["5", "a", "ab"] and s3_store.list("a") == ["a/1", "a/2", "a/b"]
    assert s3_store.is_there() and s3_store.exists("a") and s3_store.is_folder("a") and not s3_store.is_folder("5")
    assert s3_store.sizes("none") == {} and set(s3_store.sizes("a")) == {"a/1", "a/2"}
    assert sum(s3_store.sizes("a").values()) == s3_store.size_of(["a/1", "a/2"])
    assert s3_store.size_of(["a/1", "none", "a/b/3"]) == 8 and s3_store.total_size() == 3 + 3 + 5 + 4 + 1
    assert s3_store.tail("a/b/3", 3) == b"b/3" and s3_store.tail("5", 100) == b"5"
    assert list(s3_store.read_each(["5", "none", "a/2"])) == [("5", b"5"), ("a/2", b"a/2")]
    s3_store.remove("none")
    s3_store.remove_tree("none")
    s3_store.remove_tree("a")
    assert set(objects(s3_store)) == {"5", "ab/4"}
    s3_store.remove_all(["5", "none"])
    assert set(objects(s3_store)) == {"ab/4"}
    with pytest.raises(OutputError, match=r"^s3://bucket/test_names_and_bytes/5: there is no such object$") as caught:
        s3_store.read("5")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(ValueError, match="not a name inside"):
        s3_store.address("../other")
    assert [open_store(one).uri for one in ("S3://b/x/", "gcs://b/x/y")] == ["s3://b/x", "gs://b/x/y"]
    assert pickle.loads(pickle.dumps(s3_store)).list() == ["ab"]


def test_copies_follow_the_object(s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One download a version; nothing where nothing is; folders of parts; and not more than there is room for."""
    other = connected(s3_store.name)
    other.replace("x", b"old")
    path = s3_store.fetch("x")
    seen = path.stat().st_mtime_ns, path.stat().st_ino
    assert path.read_bytes() == b"old" and (s3_store.fetch("x").stat().st_mtime_ns, path.stat().st_ino) == seen
    other.replace("x", b"new")
    assert s3_store.fetch("x").read_bytes() == b"new"
    other.remove("x")
    assert not s3_store.fetch("x").exists()
    for number in range(3):
        other.replace(f"parts/{number}", bytes(number))
    assert [one.stat().st_size for one in sorted(s3_store.fetch("parts").iterdir())] == [0, 1, 2]
    other.remove("parts/1")
    assert sorted(one.name for one in s3_store.fetch("parts").iterdir()) == ["0", "2"]
    late = connected(s3_store.name)
    monkeypatch.setattr(late.client, "entries", lambda name: [])
    assert not late.fetch("parts").exists(), "removed since it was found to be a folder"
    other.remove_tree("parts")
    other.replace("parts", b"a file now")
    assert s3_store.fetch("parts").read_bytes() == b"a file now"
    monkeypatch.setattr(object_copies, "MAX_COPIED_BYTES", 100)
    monkeypatch.setattr(object_copies, "MIN_COPIES", 2)
    for number in range(6):
        other.replace(f"y/{number}", bytes(50))
    kept = s3_store.fetch("y/0", keep=True)
    paths = [s3_store.fetch(f"y/{number}") for number in range(1, 6)]
    assert kept.exists() and paths[-1].exists() and sum(one.exists() for one in paths) == 2
    monkeypatch.undo()
    found = s3_store.fetch_each(f"y/{number % 6}" for number in range(40))
    assert [path.name for path in found] == [str(number % 6) for number in range(40)]
    home = s3_store.staging()
    s3_store.leave()
    assert not home.exists() and s3_store.fetch("y/1").stat().st_size == 50


def test_a_document_is_read_once_while_it_is_unchanged(s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the names of a listing; what another process wrote since is read again, what it removed is not there."""
    other = connected(s3_store.name)
    for name in ("a", "b", "c"):
        other.replace(f"x/{name}", name.encode())
    asked: list[str] = []
    ranges = s3_store.client.fs.cat_ranges

    def note(keys: list[str], *arguments: Any, **options: Any) -> Any:
        asked.extend(keys)
        return ranges(keys, *arguments, **options)

    monkeypatch.setattr(s3_store.client.fs, "cat_ranges", note)

    def read() -> dict[str, Any]:
        asked.clear()
        return dict(s3_store.read_each(s3_store.list("x"), listed=True))

    assert read() == {"x/a": b"a", "x/b": b"b", "x/c": b"c"} and len(asked) == 3
    assert read() == {"x/a": b"a", "x/b": b"b", "x/c": b"c"} and not asked
    other.replace("x/a", b"A")
    other.remove("x/b")
    s3_store.replace("x/c", b"C")
    assert read() == {"x/a": b"A", "x/c": b"C"} and len(asked) == 2
    assert dict(s3_store.read_each(["x/a"])) == {"x/a": b"A"} and len(asked) == 3, "not of a listing"


def test_what_was_written_is_not_read_back(s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file from the staging folder is its own copy, by its checksum, also of parts; not where another wrote since."""
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 * 2**20)
    for size in (10, 11 * 2**20):
        staged = s3_store.staging() / "staged"
        staged.write_bytes(b"1" * size)
        s3_store.replace("large", staged)
        with monkeypatch.context() as patch:
            patch.setattr(s3_store.client.fs, "get_file", None)
            assert not staged.exists() and s3_store.fetch("large").read_bytes() == b"1" * size
        staged.write_bytes(b"2" * size)
        s3_store.replace("large", staged)
        connected(s3_store.name).replace("large", b"3" * size)
        assert s3_store.fetch("large").read_bytes() == b"3" * size


def test_a_forked_process_connects_again(s3_store: ObjectStore) -> None:
    """Workers of a data loader are forked: the parent's connections and threads are not theirs."""
    s3_store.replace("x", b"of the parent")
    assert s3_store.read("x") == b"of the parent"
    ours, theirs = os.pipe()
    if not (child := os.fork()):
        with contextlib.suppress(BaseException):
            os.write(theirs, s3_store.read("x") + s3_store.fetch("x").read_bytes())
        os._exit(0)
    os.close(theirs)
    os.waitpid(child, 0)
    assert os.read(ours, 1000) == b"of the parent" * 2
    os.close(ours)


def test_what_was_appended_is_seen(s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end at the latest; after some time, where a flush is due."""
    s3_store.append("log", "one\n")
    s3_store.flush(if_due=True)
    assert not s3_store.exists("log")
    monkeypatch.setattr(object_appends, "APPEND_SECONDS", 0.0)
    s3_store.flush(if_due=True)
    s3_store.append("log", "two\n")
    wait_until(lambda: s3_store.exists("log"), "the first line is seen")
    assert s3_store.read("log").startswith(b"one\n")
    s3_store.flush()
    assert s3_store.read("log") == b"one\ntwo\n"


def test_nobody_waits_for_what_is_due(s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver goes on while the network holds a line up; one upload at a time, and the end waits for it."""
    is_open, begun, put = threading.Event(), threading.Event(), s3_store.client.put

    def wait(name: str, data: Any, *, mode: str) -> None:
        begun.set()
        assert is_open.wait(60)
        put(name, data, mode=mode)

    monkeypatch.setattr(object_appends, "APPEND_SECONDS", 0.0)
    monkeypatch.setattr(s3_store.client, "put", wait)
    for line in "abc":
        s3_store.append("log", line)
        s3_store.flush(if_due=True)
        assert begun.wait(60) and not is_open.is_set()
    assert sum(one.name == "flush" for one in threading.enumerate()) == 1
    is_open.set()
    s3_store.flush()
    assert s3_store.read("log") == b"abc"


def test_a_network_that_swallows_everything(s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_could_not_be_uploaded_is_uploaded_later(s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that breaks for a while costs no line; a removed local folder costs no run."""
    monkeypatch.setattr(object_appends, "APPEND_SECONDS", 0.0)
    journal = Journal(s3_store, 0)
    journal.note("one")
    with monkeypatch.context() as patch:
        patch.setattr(s3_store.client, "_connection", object_client.connect("s3"))
        s3_store.client.fs.connect()
        s3_store.client.fs.s3.meta.events.register("before-send.s3.PutObject", broken)
        patch.setattr(object_client, "RETRY_WAITS", (0.01,))
        with pytest.raises(StoreLostError, match="the endpoint cannot be reached"):
            s3_store.flush()
    assert not s3_store.exists("_state/events/000000.jsonl")
    journal.keep(is_end=True)
    assert [one["event"] for one in read_events(s3_store)] == ["one"]
    journal.note("two")
    shutil.rmtree(s3_store.staging())
    journal.keep()
    journal.note("three")
    journal.keep(is_end=True)


def broken(**_: Any) -> None:
    raise EndpointConnectionError(endpoint_url="http://nowhere")


def test_what_may_not_be_removed_is_reported(s3_store: ObjectStore) -> None:
    """S3 answers a request to remove many with 200, and in it which of them it did not."""

    def deny(parsed: dict[str, Any], **_: Any) -> None:
        parsed["Errors"] = [{"Key": f"{s3_store.name}/b", "Code": "AccessDenied", "Message": "Access Denied"}]

    s3_store.replace("a", b"")
    s3_store.client.fs.s3.meta.events.register("after-call.s3.DeleteObjects", deny)
    with pytest.raises(OutputError, match=rf"^{s3_store.uri}/b: access denied \(AccessDenied: Access Denied\); the"):
        s3_store.remove_all(["a", "b"])


def test_many_are_removed(s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one request takes."""
    monkeypatch.setattr(object_client, "DELETE_TOGETHER", 2)
    for name in "abcde":
        s3_store.replace(name, b"")
    s3_store.remove_all("abcd")
    assert set(objects(s3_store)) == {"e"}


def test_a_file_that_was_repaired_is_not_set_aside(s3_store: ObjectStore) -> None:
    """Without locks another worker may be faster; what it put there is not what was looked at."""
    s3_store.replace("shards/x.tar", b"torn")
    s3_store.fetch("shards/x.tar")
    connected(s3_store.name).replace("shards/x.tar", b"whole")
    s3_store.set_aside("shards/x.tar")
    assert objects(s3_store) == {"shards/x.tar": b"whole"}
    s3_store.fetch("shards/x.tar")
    s3_store.set_aside("shards/x.tar")
    s3_store.set_aside("shards/x.tar")
    [(name, data)] = objects(s3_store).items()
    assert name.startswith(f"{TORN}/x.tar.") and data == b"whole"
    assert not s3_store.fetch("shards/x.parquet").exists()
    connected(s3_store.name).replace("shards/x.parquet", b"whole")
    s3_store.set_aside("shards/x.parquet")
    assert s3_store.exists("shards/x.parquet"), "it was not there when it was looked for"


def test_many_workers_at_one_damaged_shard(s3_store: ObjectStore) -> None:
    """No lock is between them: each looks again, and all end with the record of one pair."""
    run, plan, job = open_case(s3_store.uri)
    run.replace(f"{SHARDS}/{shard_name(job.name, 0)}.tar", b"torn")
    stores = [connected(s3_store.name) for _ in range(3)]
    with ThreadPoolExecutor(len(stores)) as pool:
        done = [pool.submit(commit_one, one, plan, 0, attempt=which) for which, one in enumerate(stores, start=1)]
    [record] = read_commits(run)
    assert {one.result().parquet_sha256 for one in done} == {record.parquet_sha256}
    assert hashlib.sha256(run.read(f"{SHARDS}/{record.name}.parquet")).hexdigest() == record.parquet_sha256


def test_what_dead_processes_left_is_removed(s3_store: ObjectStore, tmp_path: Path, monkeypatch: Any) -> None:
    """Their folders under TMPDIR; those of living ones stay."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = s3_store.staging()
    program = (
        "import os, signal, sys, tempfile; from engine.data.stores.opening import open_store\n"
        "tempfile.tempdir = sys.argv[1]\n"
        "(open_store('s3://bucket/x').staging() / 'left').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, check=False)
    assert len(list(own.parent.iterdir())) == 4
    s3_store.clean_staging()
    assert {one.name for one in own.parent.iterdir()} == {own.name, f"{own.name}.lock"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, check=False)
    reader = connected("another").staging()
    assert {one.name for one in own.parent.iterdir() if one.is_dir()} == {own.name, reader.name}, "a reader does, too"

"""Runs on S3, killed, damaged and continued, and every command on one."""

from __future__ import annotations

import errno
import json
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import engine
from engine.data.run.commit_record import COMMITS
from engine.data.run.commits import list_commits, read_commits
from engine.data.run.file_names import METADATA, SUCCESS
from engine.data.run.repair import repair
from engine.data.run.verify import verify
from engine.data.stores.base import STATE, TORN
from engine.data.stores.journal import read_events
from engine.data.stores.object_store import ObjectStore
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.driver.status import read_status
from engine.errors import EXIT_OK, EXIT_OWNED, CorruptShardError, OutputError
from tests.conftest import REPOSITORY
from tests.hub_server import OWNER, HubServer
from tests.s3_cases import BUCKET, COUNT, NUM_SHARDS, connected, objects
from tests.s3_proxy import Request, proxy_of
from tests.sleepy import run_sleepy


def check_costs(asked: list[Request]) -> None:
    """Seven requests a shard, from its upload to the closed run: three create it, record and rows are read once.

    Two are for images of the report, which are of a limited number of shards. All others do not grow with the shards.
    """
    named = re.compile(r"(?:sleepy-|_state/commits/)\d{6}")
    shards = [one.operation for one in asked if named.search(unquote(one.path + one.query))]
    costs = Counter(shards)
    # Each worker tests the condition of the store once, with its first file.
    assert costs["PutObject"] - 3 * NUM_SHARDS in (1, 2)
    assert costs == {"PutObject": costs["PutObject"], "GetObject": 3 * NUM_SHARDS, "HeadObject": NUM_SHARDS}
    assert len(asked) - len(shards) < 140


def test_a_run_has_the_bytes_of_a_local_one(
    s3_server: str, s3_store: ObjectStore, local_tars: dict[str, bytes]
) -> None:
    """Tars byte for byte, every file of the contract, a journal, nothing torn; the same command has nothing to do.

    It asks the store no more often than it need.
    """
    asked: list[Request] = []
    with proxy_of(s3_server) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.uri)
        proxy.choose = asked.append
        summary = run_sleepy(s3_store.uri, COUNT, LocalExecutor(2))
    assert summary.exit_code == EXIT_OK and summary.report == f"{s3_store.uri}/report.html"
    check_costs(asked)
    found = objects(s3_store)
    assert {name: data for name, data in found.items() if name.endswith(".tar")} == local_tars
    assert {SUCCESS, METADATA, "manifest.json", "README.md", "report.html", "shards/wids.json"} <= set(found)
    assert not any(name.startswith((TORN, "_state/staging", "_state/locks")) for name in found)
    assert [one["event"] for one in read_events(s3_store)][-1] == "ended"
    assert not verify(s3_store).findings and len(list(read_commits(s3_store))) == NUM_SHARDS
    assert read_status(s3_store).state == "complete"
    again = run_sleepy(s3_store.uri, COUNT, LocalExecutor(2))
    assert again.was_complete and {name: data for name, data in objects(s3_store).items() if STATE in name} == {
        name: data for name, data in found.items() if STATE in name
    }


def test_a_run_is_pushed_from_its_address(call, s3_store: ObjectStore, hub: HubServer) -> None:
    """Its tars arrive on the Hub byte for byte."""
    assert run_sleepy(s3_store.uri, 1, LocalExecutor(1)).exit_code == EXIT_OK
    assert call("push", s3_store.uri, "--to", f"hf://datasets/{OWNER}/sleepy")[0] == 0
    tars = {name: data for name, data in objects(s3_store).items() if name.endswith(".tar")}
    pushed = hub.tree("sleepy")
    assert tars and {name: data for name, data in pushed.items() if name.endswith(".tar")} == tars
    assert SUCCESS in pushed and s3_store.uri.encode() not in b"".join(pushed.values())


def test_a_lost_object_of_a_finished_run_is_reported(s3_store: ObjectStore) -> None:
    """By one listing of names and sizes; the marker goes, and comes back with the repaired shard."""
    assert run_sleepy(s3_store.uri, 1, LocalExecutor(1)).exit_code == EXIT_OK
    name = "shards/sleepy-000001.tar"
    for damage in (s3_store.remove, lambda name: s3_store.replace(name, b"")):
        damage(name)
        with pytest.raises(CorruptShardError, match=r"shards/sleepy-000001\.tar: .* shard 1"):
            run_sleepy(s3_store.uri, 1, LocalExecutor(1))
        assert not s3_store.exists(SUCCESS)
        repair(s3_store)
        assert run_sleepy(s3_store.uri, 1, LocalExecutor(1)).exit_code == EXIT_OK and s3_store.exists(SUCCESS)


def driver(uri: str, kind: str, **faults: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.sleepy", uri, str(COUNT), kind, json.dumps(faults)]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_killed_run_is_continued(s3_store: ObjectStore, local_tars: dict[str, bytes]) -> None:
    """SIGKILL in the middle; before it a second driver is refused; after it the same command makes what is missing."""
    first = driver(s3_store.uri, "local", hang_once=[NUM_SHARDS - 1])
    while not list_commits(s3_store):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    second = driver(s3_store.uri, "local")
    _, errors = second.communicate(timeout=200)
    assert (
        second.returncode == EXIT_OWNED and f"error: output {s3_store.uri}: another driver is running on it" in errors
    )
    assert read_status(s3_store).state == "running"
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = len(list_commits(s3_store))
    assert 1 <= before < NUM_SHARDS and not s3_store.exists(SUCCESS)
    corpus = engine.open_run(s3_store.uri)
    assert len(corpus) == 4 * before and corpus.runs[0].state == f"not finished: {before} committed shards so far"
    assert run_sleepy(s3_store.uri, COUNT, LocalExecutor(2)).exit_code == EXIT_OK
    assert objects(s3_store, "shards/").items() >= local_tars.items() and not verify(s3_store).findings


@pytest.mark.slow
def test_ray_workers_open_the_store_themselves(s3_store: ObjectStore, local_tars: dict[str, bytes]) -> None:
    done = driver(s3_store.uri, "ray")
    _, errors = done.communicate(timeout=200)
    assert done.returncode == EXIT_OK, errors
    assert objects(s3_store, "shards/").items() >= local_tars.items() and not verify(s3_store).findings


@pytest.mark.slow
def test_what_is_there_already_is_adopted_or_set_aside(s3_store: ObjectStore, local_tars: dict[str, bytes]) -> None:
    """Other bytes under a shard's name are moved; a whole pair without a record is kept, whoever made it.

    Then files are damaged: `verify` names the objects, `repair` takes them out, the same command makes them again.
    """
    run_sleepy(s3_store.uri, COUNT, LocalExecutor(2))
    lost = (f"{COMMITS}/000001.", f"{COMMITS}/000003.")
    for name in (SUCCESS, *(one for one in s3_store.list(COMMITS) if one.startswith(lost))):
        s3_store.remove(name)
    before = objects(s3_store)
    s3_store.replace("shards/sleepy-000001.tar", b"planted")
    assert run_sleepy(s3_store.uri, COUNT, LocalExecutor(2)).exit_code == EXIT_OK
    after = objects(s3_store)
    assert after.items() >= local_tars.items() and not verify(s3_store).damage
    assert after["shards/sleepy-000003.parquet"] == before["shards/sleepy-000003.parquet"], "adopted"
    assert b"planted" in [data for name, data in after.items() if name.startswith(TORN)]

    name = "shards/sleepy-000002.tar"
    s3_store.replace(name, local_tars[name][:-512])
    s3_store.remove("shards/sleepy-000004.parquet")
    found = {finding.shard: finding.text for finding in verify(s3_store).damage}
    assert set(found) == {2, 4} and found[2].startswith(f"{s3_store.uri}/{name}: ")
    assert found[4] == f"{s3_store.uri}/shards/sleepy-000004.parquet: is missing, but shard 4 is committed"
    assert sorted(repair(s3_store).to_make) == [2, 4]
    assert run_sleepy(s3_store.uri, COUNT, LocalExecutor(2)).exit_code == EXIT_OK
    assert objects(s3_store, "shards/").items() >= local_tars.items() and not verify(s3_store).damage


def test_a_store_that_cannot_be_read_is_no_damage(s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full local disk, or a store that falls silent: `repair` would take out what is whole."""
    run_sleepy(s3_store.uri, COUNT, LocalExecutor(2))
    before = objects(s3_store)

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    reader = connected(s3_store.name)
    monkeypatch.setattr(reader.client, "download", fail)
    for look in (verify, repair):
        with pytest.raises(OutputError, match=r"shards/sleepy-000000\.tar: the local folder .* the disk is full"):
            look(reader)
    assert objects(s3_store) == before


def test_a_run_of_a_folder_goes_on_in_a_bucket(
    s3_store: ObjectStore, local_tars: dict[str, bytes], tmp_path: Path
) -> None:
    """Copied as it is, with its state; the address is no part of its plan."""
    run_sleepy(tmp_path / "run", COUNT, LocalExecutor(2))
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and path.name != SUCCESS and path.stem != "sleepy-000002" and "000002." not in path.name:
            s3_store.replace(path.relative_to(tmp_path / "run").as_posix(), path.read_bytes())
    assert len(list_commits(s3_store)) == NUM_SHARDS - 1
    assert run_sleepy(s3_store.uri, COUNT, LocalExecutor(2)).exit_code == EXIT_OK
    assert objects(s3_store, "shards/").items() >= local_tars.items() and not verify(s3_store).findings


SMALL = [
    "sampling.num_inference_steps=4", "requests.0.count=3", "requests.1.count=3", "requests.2.count=1",
    "requests.2.contexts=['']", "output.samples_per_shard=4", "guidance.boundary.every=2",
]  # fmt: skip


@pytest.mark.slow
def test_every_command_on_the_quickstart(s3_server: str, call: Any, tmp_path: Path) -> None:
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
    code, out, err = call("merge", run, "--output", "s3://bucket/merged")
    assert code == 0 and out.endswith(" images in s3://bucket/merged\n") and connected("merged").exists(SUCCESS), err
    assert len(engine.open_run("s3://bucket/merged")) == len(engine.open_run(run).with_images())
    calibration = ["--data", "digits:validation", "--only", "calibration", "--executor", "local"]
    code, out, err = call("prepare", job, *calibration, "--output", "s3://bucket/artefacts")
    assert code == 0 and "artefact       s3://bucket/artefacts/calibration-" in out, err
    assert "existed already" in call("prepare", job, *calibration, "--output", "s3://bucket/artefacts")[1]
    code, out, err = call("rescore", run, "--target", "zoo:digits/classifier-b")
    assert code == 0 and f"scores: {run}/rescored/classifier-b-" in out, err
    [scores] = open_store(run).list("rescored")
    assert call("compare", run, "--pin", tmp_path / "pin.json")[0] == 0
    page = tmp_path / "night.html"
    code, out, err = call("compare", f"{run}/{scores}", "--baseline", tmp_path / "pin.json", "--html", page, "--json")
    found = json.loads(out)
    changed = len(found["new_failures"]) + len(found["mended"])
    assert code == 0 and page.read_text().count("<img") == 2 * changed, err
    assert open_store(f"{run}/{scores}").exists("comparison.json")
    assert call("report", f"{run}/{scores}")[::2] == (0, "")
    assert open_store(f"{run}/{scores}").read("report.html").count(b"<img src=") == 16
    code, out, err = call("evaluate", run, "--limit", "10")
    assert code == 0 and f"figures: {run}/evaluation.json" in out, err
    code, out, err = call("evaluate", run, "--limit", "10", "--output", "s3://bucket/evaluated")
    assert code == 0 and "figures: s3://bucket/evaluated/evaluation.json" in out, err
    assert set(connected("evaluated").list()) >= {"evaluation.json", "report.html"}
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

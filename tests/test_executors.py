"""Driver and executors with workers that have no models: threads, a real Ray, real processes killed.

What the tests of the scheduler cannot see: that Ray's errors become the right events, that every process and file of
a cluster is gone afterwards, and that both executors make the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

import engine.driver.run
from engine.data.run.commits import list_commits, read_commit, read_commits
from engine.data.run.shards import read_rows
from engine.data.run.verify import verify
from engine.data.stores.opening import open_store
from engine.driver import checks
from engine.driver.checks import plan_job
from engine.driver.executors.base import ShardResult, WorkerHost
from engine.driver.executors.local import LocalExecutor
from engine.driver.executors.ray import RayExecutor
from engine.driver.executors.ray_actor import RayHost
from engine.driver.interrupts import SAME_REQUEST_SECONDS
from engine.driver.metrics import METRICS
from engine.driver.run import run_job
from engine.driver.scheduler_loop import WorkersFailingError
from engine.driver.scheduling.messages import (
    SchedulerLimits,
    ShardError,
    UserFault,
    WorkerLost,
    WorkerReady,
)
from engine.errors import EXIT_DRAINED, EXIT_INCOMPLETE, EXIT_OK, JobError, OutputError, RiskforgeError, StoreLostError
from engine.job.parsing import parse_job
from engine.job.plan import ShardSpec
from tests.conftest import REPOSITORY
from tests.cuda_failures import Failure, make_failing
from tests.forked import make_forked
from tests.sleepy import GATE_SECONDS, Faults, Gates, Recorder, light_forks, make_job, run_sleepy, tars, wait_until


@pytest.fixture
def join(cluster):
    """Makes executors on the shared cluster."""

    def make(num_workers: int = 2) -> RayExecutor:
        return RayExecutor(address=cluster.address, num_workers=num_workers, device="cpu")

    return make


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """What a run of twelve samples makes when nothing goes wrong."""
    output = tmp_path_factory.mktemp("runs") / "clean"
    assert run_sleepy(output, 2, LocalExecutor(1)).exit_code == EXIT_OK
    return tars(output)


class Unopened(LocalExecutor):
    """An executor that may prepare and must not start a worker."""

    def open(self, factory, num_shards):
        """Fail."""
        raise AssertionError("nothing should be started")


class Untouchable(LocalExecutor):
    """An executor that must not be used."""

    def begin(self):
        """Fail."""
        raise AssertionError("nothing should be started")

    open = start_worker = begin


def test_code_that_ends_its_process_becomes_an_event():
    """`sys.exit` in what a job names: an event as of any exception, not a thread that is gone without a word."""

    def leave(*_: object) -> None:
        sys.exit(3)

    shard = ShardSpec(number=0, request=0, start=0, stop=1)
    for worker in (SimpleNamespace(sample_shard=leave), SimpleNamespace(sample_shard=lambda *_: leave)):
        host = WorkerHost(0)
        assert isinstance(host.load(lambda one=worker: one), WorkerReady)
        event = host.sample_shard(shard, 1, lambda *_: None)()
        assert isinstance(event, ShardError) and "SystemExit: 3" in event.message and host.has_failed
        host.close()
    lost = WorkerHost(0).load(leave)
    assert isinstance(lost, WorkerLost) and "SystemExit: 3" in lost.message


def test_errors_of_the_user_keep_their_exit_code():
    """While a worker is built, while it samples, and while it commits: a lost store may be retried, a full disk not."""
    shard = ShardSpec(number=0, request=0, start=0, stop=1)
    for error in (StoreLostError("gone"), OutputError("full")):
        expected = UserFault(str(error), error.exit_code)
        fail = raising(error)
        assert WorkerHost(0).load(fail) == expected
        for worker in (SimpleNamespace(sample_shard=fail), SimpleNamespace(sample_shard=lambda *_, fail=fail: fail)):
            host = WorkerHost(0)
            host.load(lambda worker=worker: worker)
            assert host.sample_shard(shard, 1, lambda *_: None)() == expected and host.has_failed
    assert StoreLostError.exit_code != OutputError.exit_code


def test_a_run_is_complete_and_a_second_one_starts_nothing(tmp_path):
    """The marker is there, the report is named, and the next run says so without touching the executor."""
    first = run_sleepy(tmp_path, 2, LocalExecutor(2))
    assert (first.exit_code, first.num_committed, first.num_shards) == (EXIT_OK, 5, 5)
    assert Path(first.report).is_file() and (tmp_path / "_SUCCESS").exists()
    second = run_sleepy(tmp_path, 2, Untouchable(1))
    assert second.was_complete and second.exit_code == EXIT_OK and second.report == first.report


def test_only_what_is_missing_is_made(tmp_path):
    """Grown counts extend; the shards that were there keep their bytes and are not made again."""
    run_sleepy(tmp_path, 2, LocalExecutor(1))
    before = tars(tmp_path)
    grown = run_sleepy(tmp_path, 3, LocalExecutor(1), faults=Faults(error=tuple(range(5))))
    assert grown.exit_code == EXIT_OK and grown.num_shards == 8
    assert {name: tars(tmp_path)[name] for name in before} == before


def test_what_is_there_is_listed_once_and_models_are_checked_twice(monkeypatch, tmp_path):
    """Records may be many; and models of the hub are here only when their digests are known."""
    calls = []
    for module, name in ((checks, "check_addresses"), (checks, "model_digests"), (engine.driver.run, "list_commits")):
        monkeypatch.setattr(module, name, noting(name, getattr(module, name), calls))
    monkeypatch.setattr(LocalExecutor, "opening", property(lambda self: calls.append("opening") or "opening"))
    run_sleepy(tmp_path, 1, LocalExecutor(1))
    assert calls[: calls.index("opening")] == ["check_addresses", "model_digests", "check_addresses", "list_commits"]


def noting(name, inner, calls):
    """The function, with each call noted."""

    def noted(*arguments):
        calls.append(name)
        return inner(*arguments)

    return noted


def test_relative_addresses_start_where_the_driver_is(monkeypatch, tmp_path):
    """Also in actors elsewhere; a machine without that folder says itself what it lacks."""
    monkeypatch.chdir("/")
    monkeypatch.setattr("engine.generation.worker.Worker", lambda *_, name: Path.cwd())
    job = make_job(tmp_path, 1)
    assert engine.driver.run.default_worker(job, plan_job(job), folder=str(tmp_path)) == tmp_path
    assert engine.driver.run.default_worker(job, plan_job(job), folder=str(tmp_path / "none")) == tmp_path


class Opener(Recorder):
    """Opens the gate of the first shard as soon as it has seen samples of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.gates = Gates(folder)

    def show(self, tally):
        """See it."""
        super().show(tally)
        if self.in_flight:
            self.gates.open(0)


def test_progress_is_seen_while_a_shard_is_in_flight(tmp_path):
    """Not only when it is committed: the shard is not finished before."""
    display = Opener(tmp_path)
    faults = Faults(gated=(0,), gates=str(tmp_path))
    run_sleepy(tmp_path / "run", 1, LocalExecutor(1), faults=faults, display=display)
    assert display.in_flight > 0 and display.closed
    assert any("loading models" in phase for phase in display.phases)


def test_a_shard_that_always_fails_is_quarantined_until_it_is_to_be_retried(tmp_path):
    """Exit code 3, no marker, the reasons on file; everything else is made. A plain resume leaves it where it is."""
    summary = run_sleepy(tmp_path, 2, LocalExecutor(2), faults=Faults(error=(1,)))
    assert (summary.exit_code, summary.quarantined, summary.num_committed) == (EXIT_INCOMPLETE, (1,), 4)
    assert not (tmp_path / "_SUCCESS").exists() and (tmp_path / "report.html").exists()
    note = json.loads((tmp_path / "_state/quarantine/000001.json").read_text())
    assert note["request"] == "all" and len(note["reasons"]) == 3 and "is cursed" in note["reasons"][0]
    same = run_sleepy(tmp_path, 2, Unopened(1))
    assert (same.exit_code, same.quarantined) == (EXIT_INCOMPLETE, (1,))
    again = run_sleepy(tmp_path, 2, LocalExecutor(2), retry=True)
    assert again.exit_code == EXIT_OK and (tmp_path / "_SUCCESS").exists() and not again.quarantined


def test_all_shards_quarantined_is_no_crash(tmp_path):
    """There is nothing to report on, and that is said with exit code 3."""
    summary = run_sleepy(tmp_path / "one", 1, LocalExecutor(1), faults=Faults(error=(0, 1, 2)))
    assert summary.exit_code == EXIT_INCOMPLETE and not summary.report


def test_a_fault_of_the_user_ends_the_run_with_its_message(tmp_path):
    """A full disk is not retried."""
    with pytest.raises(RiskforgeError, match="the disk is full"):
        run_sleepy(tmp_path, 2, LocalExecutor(1), faults=Faults(user_fault="/data: the disk is full"))


def test_workers_that_cannot_start_end_the_run_with_the_reason(tmp_path):
    """A defect is reported by its last line, without a loop of restarts."""
    with pytest.raises(WorkersFailingError, match="the last one: ZeroDivisionError: no such kernel\n") as raised:
        run_sleepy(tmp_path, 2, LocalExecutor(1), faults=Faults(no_start="defect"))
    assert raised.value.exit_code == EXIT_INCOMPLETE


def test_progress_of_a_new_shard_begins_at_none_of_it():
    """Not with the progress of the shard before."""
    host, seen = RayHost(0, 1), []

    def sample(shard, attempt, report, batch_limit):
        seen.append((host.progress()[0], batch_limit))
        return lambda: "outcome"

    host.load(lambda: SimpleNamespace(sample_shard=sample))
    host._report(7, 4)
    host.run_shard(ShardSpec(number=8, request=0, start=0, stop=1), 1, 16)
    assert seen == [((8, 0, 0.0, 0, None), 16)] and host.outcome() == ShardResult(0, 8, "outcome")


def test_timing_is_of_all_sessions(tmp_path):
    """Shards of an earlier session took their time, too."""
    run_sleepy(tmp_path, 1, LocalExecutor(1), faults=Faults(seconds=0.05))
    run_sleepy(tmp_path, 2, LocalExecutor(1))
    assert json.loads((tmp_path / "manifest.json").read_text())["timing"]["sampling_seconds"] > 0.5


def test_a_ray_that_does_not_start_is_one_line(monkeypatch):
    """With the reason and what else to try."""
    executor = RayExecutor(address=None, num_workers=1, device="cpu")
    monkeypatch.setattr(executor._cluster, "_start", raising(ConnectionError("raylet died\nlots of text")))
    with pytest.raises(RiskforgeError, match=r"^Ray does not start .*\(raylet died\); try --executor local$"):
        executor.open(Faults, 1)
    executor.close()


def test_a_ray_that_is_too_late_for_itself_is_started_again(monkeypatch):
    """On a busy machine; the processes of the first attempt are ended and its folder is removed."""
    executor = RayExecutor(address=None, num_workers=1, device="cpu")
    begun: list[tuple[Path, subprocess.Popen[bytes]]] = []

    def start(quiet: dict[str, Any]) -> None:
        folder = executor._cluster._folder = tempfile.mkdtemp()
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", folder])
        # The kernel lets `Popen` go on a moment before the process has its arguments.
        wait_until(lambda: folder in psutil.Process(process.pid).cmdline(), "it is known by its folder")
        begun.append((Path(folder), process))
        if len(begun) == 1:
            raise RuntimeError("The current node timed out during startup.")

    monkeypatch.setattr(executor._cluster, "_start_once", start)
    executor._cluster._start({})
    (first, killed), (second, going) = begun
    assert killed.wait(timeout=30) == -signal.SIGKILL and not first.exists()
    assert going.poll() is None and second.exists()
    going.kill()
    going.wait()
    executor.close()


def raising(error: Exception):
    """A function that raises."""

    def fail(*_):
        raise error

    return fail


def test_closing_while_ray_starts_takes_its_folder_away(monkeypatch, tmp_path):
    """The folder is made when the run was closed already."""
    executor = RayExecutor(address=None, num_workers=1, device="cpu")

    def connect() -> bool:
        time.sleep(0.5)
        executor._cluster._folder = str(tmp_path / "rf")
        (tmp_path / "rf").mkdir()
        return False

    monkeypatch.setattr(executor._cluster, "_connect", connect)
    executor.begin()
    executor.close()
    assert not (tmp_path / "rf").exists() and not executor._cluster._thread.is_alive()


@pytest.mark.slow
def test_workers_on_cpus_of_this_machine_are_forked_and_are_lost_like_others(clean, tmp_path, monkeypatch):
    """Their processes are not the actors': SIGKILL of one in a shard gives that shard its strike, all the same.

    A process that has been in a cluster can have one of its own, and cannot go back to the first: tests that join one
    come later.
    """
    monkeypatch.setattr("engine.driver.executors.ray.ForkServer", light_forks)
    display = Recorder()
    summary = run_job(
        make_job(tmp_path, 2), executor=RayExecutor(address=None, num_workers=2, device="cpu"), resume="auto",
        confirmed=False, display=display,
        make_worker=partial(make_forked, faults=Faults(die_once=(2,), signal=signal.SIGSEGV)),
    )  # fmt: skip
    assert summary.exit_code == EXIT_OK and tars(tmp_path) == clean
    check_last_words(tmp_path, 2)
    assert read_commit(open_store(str(tmp_path)), 2).attempt == 2
    assert display.notices and all("process died" in notice for notice in display.notices)


def test_ray_makes_the_bytes_that_threads_make_also_where_an_actor_is_killed(join, clean, tmp_path):
    """Other processes, another order: equal tars. Progress comes from inside a shard here, too.

    SIGKILL in the middle of a shard: the run completes, with the same bytes and the second attempt on record.
    """
    display, output = Opener(tmp_path), tmp_path / "run"
    faults = Faults(gated=(0,), gates=str(tmp_path), die_once=(2,))
    summary = run_sleepy(output, 2, join(), faults=faults, display=display)
    assert summary.exit_code == EXIT_OK and tars(output) == clean
    assert display.in_flight > 0 and read_commit(open_store(str(output)), 2).attempt == 2
    assert json.loads((output / "manifest.json").read_text())["hardware"]["executor"] == "ray"
    # The shard before it may still be written, and the word that it is sampled die with the process: then that one is
    # given the strike, and the next try of this one is its first to the scheduler and dies as well.
    assert len(display.notices) in (1, 2) and all("process died" in notice for notice in display.notices)


def test_failures_of_cuda_in_an_actor_cost_no_strike(join, tmp_path):
    """Memory that runs out, and a kernel that counts no further: batches shrink, no shard is made twice.

    A worker with models, of which calls fail as on a GPU.
    """
    output, notices, display = tmp_path / "run", tmp_path / "notices", Recorder()
    raw = make_job(output, 1).model_dump(mode="json", exclude_unset=True)
    raw["requests"] = [raw["requests"][0] | {"classes": [3], "count": 12}]
    raw["output"] |= {"samples_per_shard": 6}
    job = parse_job(raw | {"runtime": {"batch_size": 6}, "sampling": {"num_inference_steps": 1, "guidance_scale": 2.0}})
    failures = (
        Failure(call="decoder", error="cublas", above=4),
        Failure(call="network", error="runtime", at=[4]),
        Failure(call="classifier", error="int max", above=2),
    )
    summary = run_job(
        job, executor=join(1), resume="auto", confirmed=False, display=display,
        make_worker=partial(make_failing, failures=failures, notices=str(notices)),
    )  # fmt: skip
    assert summary.exit_code == EXIT_OK and not [text for text in display.notices if "replaced" in text]
    rows = [row for path in sorted(output.glob("shards/*.parquet")) for row in read_rows(path)]
    assert [row["status"] for row in rows] == ["ok"] * 12 and {row["attempt"] for row in rows} == {1}
    assert {row["batch_size"] for row in rows} <= {1, 2, 3}
    first, *more = notices.read_text().splitlines()
    assert first.startswith("requests.0: a batch of 6 samples failed (RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC")
    assert "it goes on with batches of" in first and len(more) <= 2
    # From the actor to the user: as the local executor's threads in tests/test_notices.py.
    stored = [text for record in read_commits(open_store(str(output))) for text in record.notices]
    assert stored == [first, *more] and [text for text in display.notices if text in stored] == stored
    assert [row["text"] for row in json.loads((output / "manifest.json").read_text())["notices"]] == stored


@pytest.mark.slow
def test_a_process_killed_while_it_writes_the_shard_before_gives_both_a_strike(join, clean, tmp_path):
    """Both get a strike; each runs alone then, and one is made although the other never is.

    It is in quarantine after three processes, with the reason.
    """
    faults = Faults(slow_once=(0,), seconds=0.25, die=(1,))
    summary = run_sleepy(tmp_path, 2, join(1), faults=faults)
    assert (summary.exit_code, summary.quarantined, summary.num_committed) == (EXIT_INCOMPLETE, (1,), 4)
    assert read_commit(open_store(str(tmp_path)), 0).attempt == 2
    reasons = json.loads((tmp_path / "_state/quarantine/000001.json").read_text())["reasons"]
    assert len(reasons) == SchedulerLimits().max_strikes and all("process died" in one for one in reasons)
    assert {name: data for name, data in clean.items() if "000001" not in name} == tars(tmp_path)


@pytest.mark.slow
def test_a_shard_that_kills_its_process_is_quarantined(join, tmp_path):
    """Three processes are enough; the others' shards are made. What a process printed last says where it died."""
    summary = run_sleepy(tmp_path, 1, join(), faults=Faults(die=(0,), signal=signal.SIGSEGV))
    assert (summary.exit_code, summary.quarantined, summary.num_committed) == (EXIT_INCOMPLETE, (0,), 2)
    reason = json.loads((tmp_path / "_state/quarantine/000000.json").read_text())["reasons"][-1]
    assert "process died" in reason and "last words of shard 0" in reason
    check_last_words(tmp_path, 0)


def check_last_words(run: Path, shard: int) -> None:
    """The journal names a file with the last output of the worker that died with a shard, and where it was then."""
    events = [json.loads(line) for path in (run / "_state/events").iterdir() for line in path.read_text().splitlines()]
    texts = [(run / event["log"]).read_text() for event in events if event["event"] == "replaced"]
    assert texts and all(text.startswith("the worker's process died: ") for text in texts)
    last = next(text for text in texts if f"these are the last words of shard {shard}\n" in text)
    assert "Fatal Python error: Segmentation fault" in last
    # Threads go on while the stack is printed, which may end the printing early.
    assert any("in next_batch" in text for text in texts)
    assert not (run / "_state/workers.json").exists()


def test_metrics_of_a_run_are_scraped(cluster, join, tmp_path):
    """By HTTP from Ray's agent, as Prometheus does: the values of the finished run, each under the name in the code."""
    faults = Faults(bad_samples=2, bad_message="target 'zoo:t' gives logits that are not finite")
    request = {"accept": {"risk": ">= 0"}, "count": 2, "max_attempts": "2x", "classes": [0, 1, 5]}
    summary = run_sleepy(tmp_path / "metered", 2, join(1), faults=faults, request=request)
    counts = [record.counts for record in read_commits(open_store(summary.uri))]
    values = scrape(cluster.head_node, run="metered", until=sum(count.attempted for count in counts))
    for status in ("ok", "rejected", "failed"):
        expected = sum(getattr(count, status) for count in counts)
        assert values["riskforge_samples", ("request", "all"), ("status", status)] == expected, status
    accepted = sum(count.accepted for count in counts)
    assert values["riskforge_accepted_samples", ("request", "all")] == accepted
    failed = sum(count.failed for count in counts)
    assert failed == summary.num_failed == values["riskforge_failed_samples", ("kind", "not_finite")] > 0
    assert values["riskforge_shards", ("state", "committed")] == summary.num_committed
    assert values["riskforge_shard_duration_seconds_count", ("request", "all")] > 0
    assert values["riskforge_quota_missing_samples", ("class", "five"), ("request", "all")] == 2 - accepted
    assert 0 < values["riskforge_sampling_time_ratio",] <= 1 and values["riskforge_samples_per_second",] > 0
    assert {name for name, *_ in values} - {f"{name}_{part}" for name in METRICS for part in PARTS} <= METRICS.keys()


PARTS = ("bucket", "count", "sum")
# Of every metric of Ray's, and of buckets.
OTHERS = {"WorkerId", "NodeAddress", "SessionName", "Version", "Component", "run", "le"}


def scrape(node, run: str, until: int) -> dict[tuple, float]:
    """Values by name and labels, once so many samples are counted."""
    url = f"http://{node.node_ip_address}:{node.metrics_export_port}/metrics"
    values: dict[tuple, float] = {}

    def has_all() -> bool:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        values.clear()
        for sample in samples:
            if sample.labels.get("run") == run:
                labels = [
                    item for item in sorted(sample.labels.items()) if item[0] not in OTHERS and "otel" not in item[0]
                ]
                values[sample.name.removeprefix("ray_"), *labels] = sample.value
        return sum(value for key, value in values.items() if key[0] == "riskforge_samples") >= until

    wait_until(has_all, "Ray has exported the last values", seconds=60)
    return values


def test_faults_of_the_user_come_out_of_actors_in_words(join, tmp_path):
    """All lines of a job error from loading models, and an output error from a shard, without Ray's wrapping."""
    with pytest.raises(RiskforgeError) as raised:
        run_sleepy(tmp_path / "a", 1, join(1), faults=Faults(no_start="user"))
    assert str(raised.value) == "models.clip: broken\nmodels.target: broken too"
    with pytest.raises(RiskforgeError, match=r"^no space$"):
        run_sleepy(tmp_path / "b", 1, join(1), faults=Faults(user_fault="no space"))


@pytest.mark.slow
def test_a_lost_node_gives_no_strike(cluster, join, tmp_path):
    """The raylet of a second node is killed under its worker, in the middle of a shard: no strike, and the run
    completes on the first."""
    node = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    display, gates = Recorder(), Gates(tmp_path)

    def lose_node() -> None:
        wait_until(lambda: len(gates.waiting()) == 2, "both workers are in the middle of a shard")
        cluster.remove_node(node, allow_graceful=False)
        wait_until(lambda: display.notices, "the loss is noticed")
        gates.open(*range(8))

    killer = threading.Thread(target=lose_node)
    killer.start()
    faults = Faults(gated=range(8), gates=str(tmp_path))
    summary = run_sleepy(tmp_path / "run", 3, join(2), faults=faults, display=display)
    killer.join()
    assert summary.exit_code == EXIT_OK and summary.num_committed == 8
    assert [notice for notice in display.notices if "node was lost" in notice]
    assert not [notice for notice in display.notices if "process died" in notice]


def test_a_cluster_that_is_not_there_is_named():
    """A wrong address ends soon and with one line, not with Ray's."""
    executor = RayExecutor(address="127.0.0.1:1", num_workers=1, device="cpu")
    with pytest.raises(JobError, match=r"--address: no Ray cluster at '127.0.0.1:1' \(.*refused"):
        executor.open(Faults, 1)
    executor.close()
    with pytest.raises(JobError, match="--address"):
        RayExecutor(address="ray://somewhere:10001", num_workers=1, device="cpu")


def sleepy(output: Path, count: int, executor: str, faults: dict[str, Any], **popen) -> subprocess.Popen:
    """A driver in a process of its own, with a Ray of its own; a stale cluster address is in its environment."""
    command = [sys.executable, "-m", "tests.sleepy", str(output), str(count), executor, json.dumps(faults)]
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, **popen)


def wait_for_shards(process: subprocess.Popen, output: Path) -> None:
    """Wait until a driver has published something."""
    wait_until(lambda: tars(output) or process.poll() is not None, "a shard is published")
    assert process.poll() is None


def arguments_of_all() -> str:
    """The command lines of all processes."""
    return subprocess.run(["ps", "-ww", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout


def ray_folders(pid: int) -> list[str]:
    """Temporary folders of the clusters that a process's children serve."""
    lines = [line for line in arguments_of_all().splitlines() if line.split()[0] == str(pid)]
    return sorted(set(re.findall(r"/tmp/rf-\w+", "\n".join(lines))))


@pytest.mark.slow
def test_a_killed_driver_leaves_no_process_and_is_continued(tmp_path):
    """SIGKILL of the driver between commits; the same command finishes with the bytes of a clean run.

    Also that a cluster of our own needs no address, prints nothing of Ray's, and takes its folder away.
    """
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    # It does not end by itself before it is killed.
    first = sleepy(tmp_path / "killed", 3, "ray", {"hang_once": [5]}, **quiet)
    wait_for_shards(first, tmp_path / "killed")
    [folder] = ray_folders(first.pid)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    num_before = len(list_commits(open_store(str(tmp_path / "killed"))))
    second = sleepy(tmp_path / "killed", 3, "ray", {"seconds": 0.2}, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    out, err = second.communicate(timeout=GATE_SECONDS)
    assert second.returncode == EXIT_OK and out == "8 of 8\n"
    assert all(
        re.match(r"\d\d:\d\d:\d\d (checking|starting Ray|loading|all|writing)", line) for line in err.splitlines()
    )
    [num_left] = re.findall(r"for (\d) of 8 shards", err)
    assert 0 < int(num_left) <= 8 - num_before
    wait_until(lambda: folder not in arguments_of_all(), "the processes of the killed driver's Ray have ended")
    run_sleepy(tmp_path / "clean", 3, LocalExecutor(2))
    assert tars(tmp_path / "killed") == tars(tmp_path / "clean")


def test_output_error_keeps_its_kind(tmp_path):
    """An output that is a file is refused before anything is started."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        run_sleepy(tmp_path / "file", 1, Untouchable(1))


def read_until(process: subprocess.Popen, text: str) -> None:
    """Read the output of a driver until this text."""
    assert any(text in line for line in process.stderr)


def num_noted(output: Path) -> int:
    """Shards whose commits are in the journal."""
    return sum(path.read_text().count('"committed"') for path in output.glob("_state/events/*.jsonl"))


NOTICE = "SIGTERM: shards in flight have 60 s to finish"


def test_a_signal_drains_and_the_same_command_continues(tmp_path):
    """Shards in flight are finished and committed, those queued behind them are not; exit code 75."""
    output, gates = tmp_path / "run", Gates(tmp_path)
    faults = {"gated": list(range(2, 10)), "gates": str(tmp_path)}
    process = sleepy(output, 4, "local", faults, stderr=subprocess.PIPE)
    wait_until(lambda: len(gates.waiting()) == 2 and num_noted(output) == 2, "two are committed and two in flight")
    in_flight = gates.waiting()
    process.send_signal(signal.SIGTERM)
    read_until(process, NOTICE)
    gates.open(*in_flight)
    assert process.wait(GATE_SECONDS) == EXIT_DRAINED
    assert set(list_commits(open_store(str(output)))) == {0, 1} | in_flight and not (output / "_SUCCESS").exists()
    # The sender of a signal may not wait for a report.
    assert not (output / "manifest.json").exists() and not (output / "report.html").exists()
    events = [json.loads(line) for line in (output / "_state/events/000000.jsonl").read_text().splitlines()]
    assert [one["reason"] for one in events if one["event"] == "draining"] == ["SIGTERM"]
    assert events[-1]["event"] == "ended" and events[-1]["drained"] == "SIGTERM"
    assert run_sleepy(output, 4, LocalExecutor(2)).exit_code == EXIT_OK
    run_sleepy(tmp_path / "clean", 4, LocalExecutor(1))
    assert tars(tmp_path / "clean") == tars(output)


def test_a_second_signal_ends_at_once_and_loses_nothing(tmp_path):
    """Shards in flight are given up, of which one would take an hour; committed ones stay intact."""
    output = tmp_path / "run"
    process = sleepy(output, 1, "local", {"hang_once": [2]}, stderr=subprocess.PIPE)
    wait_for_shards(process, output)
    process.send_signal(signal.SIGTERM)
    read_until(process, NOTICE)
    # One that follows at once is the same request.
    time.sleep(SAME_REQUEST_SECONDS)
    process.send_signal(signal.SIGTERM)
    read_until(process, "interrupted; committed shards are kept")
    assert process.wait(GATE_SECONDS) == EXIT_DRAINED
    store = open_store(str(output))
    assert verify(store).damage == () and len(list_commits(store)) < 3

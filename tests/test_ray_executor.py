"""The Ray executor without a cluster: what becomes of the answers of actors, and what an actor reports."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from engine.driver.executors import ray as ray_executor
from engine.driver.executors.ray import ASK_SECONDS, MAX_ASKS_PER_SECOND, Handle, RayExecutor, _progress_event
from engine.driver.executors.ray_actor import RayHost
from engine.driver.executors.ray_layout import Layout, Machine, divide
from engine.driver.executors.software import _source_digest, software
from engine.driver.scheduling.messages import (
    CapacityChanged,
    ShardProgress,
    ShardSampled,
    UserFault,
    WorkerActive,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from engine.generation.usage import BatchUsage
from engine.job.plan import ShardSpec
from engine.job.resources import ResourcesSpec


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> RayExecutor:
    """Two nodes, `a` alive and `b` lost; killed actors are in `killed`."""
    made: Any = RayExecutor(address="127.0.0.1:1", num_workers=2, device="cpu")
    nodes = [
        {"NodeID": "a", "Alive": True, "Resources": {}, "NodeManagerAddress": "10.0.0.1"},
        {"NodeID": "b", "Alive": False, "Resources": {}},
    ]
    made._cluster = SimpleNamespace(nodes=lambda: nodes, check=lambda: None, machines=lambda: made.machines)
    made.machines = [Machine("a", {"CPU": 2.0})]
    made._layout = Layout(2, 1, {"num_cpus": 1})
    made.killed = []
    monkeypatch.setattr("ray.kill", lambda actor, no_restart: made.killed.append(actor))
    return made


def answered(value: Any = None, error: Exception | None = None) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error) if error else future.set_result(value)
    return future


def test_answers_become_events(executor: RayExecutor) -> None:
    """A shard counts as queued until it is committed, not until it is sampled."""
    handle = executor._handles[0] = Handle("actor", num_queued=1)
    assert executor.num_unplaced == 1
    assert executor._event(0, "where", answered(("a", {}))) == WorkerPlaced(0, "0 GB", "a", "10.0.0.1")
    assert executor.num_unplaced == 0 and not handle.is_ready
    executor._event(0, "event", answered(WorkerReady(0)))
    assert handle.is_ready
    assert executor._event(0, "sampled", answered(7)) == ShardSampled(0, 7) and handle.num_queued == 1
    executor._event(0, "shard", answered("done"))
    assert handle.num_queued == 0


@pytest.mark.parametrize(
    ("node", "is_unavailable", "is_lost_with_node"),
    [("a", False, False), ("b", False, True), ("gone", False, True), ("", False, False), ("a", True, True)],
)
def test_an_actor_is_lost_with_its_node_or_alone(
    executor: RayExecutor, node: str, is_unavailable: bool, is_lost_with_node: bool
) -> None:
    """One that was never placed died alone; one that cannot be reached is not at fault. It is killed in any case."""
    import ray.exceptions

    executor._handles[0] = Handle("actor", node=node)
    kind = ray.exceptions.ActorUnavailableError if is_unavailable else ray.exceptions.ActorDiedError
    event = executor._event(0, "shard", answered(error=kind("x", None) if is_unavailable else kind()))
    assert isinstance(event, WorkerLost) and event.node_lost == is_lost_with_node
    assert executor.killed == ["actor"] and not executor._handles  # type: ignore[attr-defined]


def test_the_loss_of_a_worker_waits_for_its_last_output(executor: RayExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is read on its machine; not for long, as that may be lost as well, and once, whatever else fails."""
    import ray.exceptions

    task = SimpleNamespace(future=Future)
    monkeypatch.setattr(ray_executor, "_tails_on", lambda node, files: task)
    died = ray.exceptions.ActorDiedError
    for worker in (0, 1, 2):
        executor._handles[worker] = Handle("actor", node="a")
        executor._event(worker, "output", answered(("/logs/worker.err",)))
        assert executor._event(worker, "shard", answered(error=died())) is None
        assert executor._event(worker, "progress", answered(error=died())) is None
    event = executor._event(0, "tail", answered("the end of /logs/worker.err:\nSegmentation fault"))
    assert isinstance(event, WorkerLost) and event.message.endswith(":\nSegmentation fault") and not event.node_lost
    event = executor._event(1, "tail", answered(error=died()))
    assert isinstance(event, WorkerLost) and event.message.startswith("the worker's process died: ")
    assert executor._overdue(time.monotonic()) == []
    [event] = executor._overdue(time.monotonic() + ray_executor.TAIL_SECONDS)
    assert isinstance(event, WorkerLost) and event.worker == 2
    assert executor.killed == ["actor"] * 3 and not executor._handles  # type: ignore[attr-defined]


def test_answers_of_workers_that_were_stopped_are_dropped(executor: RayExecutor) -> None:
    executor._answers.put((3, "sampled", answered(1)))
    assert executor.poll(0.0) == [CapacityChanged(2, ("a",))]
    assert executor.poll(0.0) == []


def look(executor: Any, *machines: Machine) -> list[CapacityChanged]:
    """What is reported of these machines, a few seconds later."""
    executor.machines, executor._next_look = list(machines), 0.0
    return executor._look()  # type: ignore[no-any-return]


def test_the_machines_of_a_cluster_are_counted(executor: Any) -> None:
    """What joins and leaves is reported once; a fixed number stays; nothing is asked for where nothing fits."""
    small, large = Machine("a", {"CPU": 2.0}), Machine("b", {"CPU": 8.0, "memory": 8e9})
    executor._num_workers = None
    assert look(executor, small) == [CapacityChanged(2, ("a",))]
    assert look(executor, small) == []
    assert look(executor, small, large) == [CapacityChanged(5, ("a", "b"))], "three by its memory"
    executor.avoid_nodes(["b"])
    assert look(executor, small, large) == [CapacityChanged(2, ("a", "b"))]
    assert executor._labels() == {"ray.io/node-id": "!in(b)"} and executor.node_name("b") == "b"
    assert look(executor) == [CapacityChanged(0)]
    executor._num_workers = 16
    assert look(executor, small) == [CapacityChanged(16, ("a",))]


def test_a_cluster_of_our_own_does_not_change() -> None:
    """It is this machine; nobody else uses it."""
    assert RayExecutor(address=None, num_workers=None, device="cpu")._look() == []


def test_only_machines_with_the_labels_count(executor: Any) -> None:
    executor._num_workers, executor._asked = None, ResourcesSpec(label_selector={"zone": "!in(a, b)"})
    machines = [Machine(zone, {"CPU": 2.0}, {"zone": zone}) for zone in "abc"] + [Machine("d", {"CPU": 1.0})]
    assert look(executor, *machines) == [CapacityChanged(3, ("c", "d"))]
    executor.avoid_nodes(["c", "d"])
    assert executor._labels() == {"ray.io/node-id": "!in(c, d)", "zone": "!in(a, b)"}


def test_the_first_worker_shows_how_many_share_a_gpu(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a GPU to itself until its first batch is made; then it makes room, if several fit.

    Has not been run on a GPU.
    """
    executor._num_workers, executor._asked = None, ResourcesSpec(num_gpus="auto")
    gpus = Machine("a", {"CPU": 16.0, "GPU": 4.0})
    executor._layout = divide([gpus.resources], "auto", None, 99, is_own=False, asked=executor._asked)
    assert executor._layout.num_workers == 1 and look(executor, gpus) == [CapacityChanged(1, ("a",))]
    asked: list[str] = []
    monkeypatch.setattr(executor, "_expect", lambda worker, kind, reference: asked.append(kind))
    actor = SimpleNamespace(memory=SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: None)))
    executor._handles[0] = Handle(actor)
    executor._event(0, "progress", answered(((0, 0, 0.0, 0), 1)))
    assert not asked, "no batch is made yet"
    executor._event(0, "progress", answered(((0, 8, 2.0, 0), 1)))
    assert asked == ["memory"]
    event = executor._event(0, "memory", answered((16 * 2**30, 80 * 2**30)))
    assert event.node_lost and event.message == "it used 16.0 of 80 GiB of its GPU, which 3 workers share now"
    assert executor._layout.resources == {"num_gpus": 1 / 3, "num_cpus": 0}
    assert executor._layout.workers_per_gpu == 3 and look(executor, gpus) == [CapacityChanged(12, ("a",))]


def test_a_machine_with_other_software_is_refused_by_name(executor: Any) -> None:
    """Before its worker gets a shard: samples would depend on the machine."""
    executor._handles[0] = Handle("actor")
    executor._software = software()
    assert isinstance(executor._event(0, "where", answered(("a", software()))), WorkerPlaced)
    there = software() | {"torch": "1.0", "Python": "3.9"}
    event = executor._event(0, "where", answered(("a", there)))
    assert isinstance(event, UserFault)
    assert event.message.startswith("machine 10.0.0.1 has other software: Python 3.9 there and 3.")
    assert "torch 1.0 there and 2." in event.message and "Install the same versions" in event.message


def test_checkouts_of_one_version_differ_by_their_source(tmp_path: Any) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = _source_digest(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert _source_digest(tmp_path) != before and software()["riskforge"].endswith(")")


def test_only_news_in_a_progress_is_an_event() -> None:
    """A heartbeat without a batch is one, too; the handle may be asked again after any answer."""
    handle = Handle("actor", is_asked=True)
    progress = (4, 8, 0.5, 16, BatchUsage(8))
    assert _progress_event(0, handle, (progress, 1)) == ShardProgress(0, 4, 8, 0.5, 16, BatchUsage(8))
    assert not handle.is_asked
    assert _progress_event(0, handle, (progress, 1)) == WorkerActive(0)
    assert _progress_event(0, handle, (progress, 1)) is None
    assert _progress_event(0, handle, (progress, 2)) == WorkerActive(0)
    assert _progress_event(0, handle, ((4, 9, 0.5, 16, None), 2)) == ShardProgress(0, 4, 9, 0.5, 16)


def asked(executor: RayExecutor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The workers that are asked for their progress now."""
    workers: list[int] = []
    monkeypatch.setattr(executor, "_expect", lambda worker, kind, reference: workers.append(worker))
    executor._next_ask = 0.0
    executor._ask_progress()
    return workers


def test_workers_that_load_or_sample_are_asked_for_their_progress(
    executor: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those that wait for a place or for work, nor those that have not answered yet."""
    options = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: None))
    actor = SimpleNamespace(progress=options)
    executor._handles = {
        0: Handle(actor),
        1: Handle(actor, node="a"),
        2: Handle(actor, node="a", is_ready=True),
        3: Handle(actor, node="a", is_ready=True, num_queued=1),
        4: Handle(actor, node="a", is_ready=True, num_queued=1, is_asked=True),
    }
    assert asked(executor, monkeypatch) == [1, 3]
    assert asked(executor, monkeypatch) == []


@pytest.mark.parametrize("num_workers", [1, 1000])
def test_many_workers_are_asked_less_often(
    executor: RayExecutor, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    monkeypatch.setattr(ray_executor, "time", SimpleNamespace(monotonic=lambda: 100.0))
    executor._handles = {number: Handle(None) for number in range(num_workers)}
    asked(executor, monkeypatch)
    assert executor._next_ask == 100.0 + max(ASK_SECONDS, num_workers / MAX_ASKS_PER_SECOND)


def test_an_actor_reports_every_shard_from_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is that of the shard in flight, heartbeats are counted, threads are those of the layout."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    host: Any = RayHost(0, 5)
    assert os.environ["OMP_NUM_THREADS"] == "5"
    seen = []

    def sample(shard: ShardSpec, attempt: int, report: Any, batch_limit: int) -> Any:
        seen.append(host.progress()[0])
        report(2, 0.5, 16)
        return lambda: f"shard {shard.number}, attempt {attempt}, limit {batch_limit}"

    host._host = SimpleNamespace(sample_shard=sample, usage=BatchUsage(2))
    for number in (4, 5):
        assert host.run_shard(ShardSpec(number=number, request=0, start=0, stop=4), 2, 7) == number
        assert host.progress()[0] == (number, 2, 0.5, 16, BatchUsage(2))
    assert seen == [(4, 0, 0.0, 0, None), (5, 0, 0.0, 0, None)]
    assert [host.outcome(), host.outcome()] == ["shard 4, attempt 2, limit 7", "shard 5, attempt 2, limit 7"]
    host._note_active()
    host._note_active()
    assert host.progress()[1] == 2


def test_an_actor_without_a_fork_server_builds_the_worker_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Its server may have ended."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    host: Any = RayHost(3, 1, 0, f"{tmp_path}/fork")
    assert host.load(lambda: "worker") == WorkerReady(3) and host._host._worker == "worker"


@pytest.mark.parametrize(
    ("address", "num_workers", "workers_per_gpu", "is_shared"),
    [(None, 2, 0, True), (None, 1, 0, False), (None, 2, 1, False), ("127.0.0.1:1", 2, 0, False)],
)
def test_imports_are_shared_by_several_workers_on_cpus_of_this_machine(
    address: str | None, num_workers: int, workers_per_gpu: int, is_shared: bool
) -> None:
    """A fork could not use a GPU if an import had touched it, and the server is on the driver's machine."""
    made: Any = RayExecutor(address=address, num_workers=num_workers, device="auto")
    made._layout = Layout(num_workers, threads=1, workers_per_gpu=workers_per_gpu)
    assert made._shares_imports() is is_shared


def test_an_outcome_that_is_asked_for_early_is_waited_for() -> None:
    """The call runs in a thread of its own, maybe before the shard was sampled."""
    host: Any = RayHost(0, 1)
    host._host = SimpleNamespace(sample_shard=lambda *_: lambda: "done")
    outcomes: list[str] = []
    waiting = threading.Thread(target=lambda: outcomes.append(host.outcome()), daemon=True)
    waiting.start()
    time.sleep(0.1)
    host.run_shard(ShardSpec(number=0, request=0, start=0, stop=1), 1, 0)
    waiting.join(10)
    assert outcomes == ["done"]

"""A Ray cluster whose machines come and go during a run: what only a real one can show."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.data.stores.journal import read_events
from engine.data.stores.opening import open_store
from engine.driver.executors import ray as ray_executor
from engine.driver.executors.ray import RayExecutor
from engine.driver.executors.ray_cluster import prepare_environment
from engine.driver.scheduling.messages import WorkerPlaced
from engine.errors import EXIT_OK, JobError
from engine.job.resources import ResourcesSpec
from tests.sleepy import Faults, Gates, Recorder, run_sleepy, wait_until


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray of one machine with one core."""
    prepare_environment(is_own=True)
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield started
    started.shutdown()


def events(output: Path, name: str) -> list[dict[str, Any]]:
    """The events of a run with this name."""
    return [event for event in read_events(open_store(str(output))) if event["event"] == name]


@pytest.mark.slow
def test_machines_that_join_are_used_and_those_that_leave_are_not_waited_for(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run without a number of workers begins with one; two more come with a machine, and go with it."""
    monkeypatch.setattr(ray_executor, "LOOK_SECONDS", 0.5)
    output, display, codes = tmp_path / "run", Recorder(), []
    executor = RayExecutor(address=cluster.address, num_workers=None, device="cpu")
    gates = Gates(tmp_path)

    def run() -> None:
        # The first shard is made at once; the run does not end before the gates are open.
        faults = Faults(gated=range(1, 16), gates=str(tmp_path))
        codes.append(run_sleepy(output, 16, executor, display=display, faults=faults).exit_code)

    running = threading.Thread(target=run)
    running.start()
    wait_until(lambda: output.exists() and events(output, "committed"), "something is committed")
    [begun] = events(output, "started")
    assert begun["workers"] == 1
    machine = cluster.add_node(num_cpus=2, labels={"zone": "b"})
    wait_until(lambda: len(gates.waiting()) == 3, "three workers work")
    gates.open(*gates.waiting())
    wait_until(lambda: {event["worker"] for event in events(output, "committed")} >= {0, 1, 2}, "three workers commit")
    wait_until(lambda: len(gates.waiting()) == 6, "they work on")
    assert executor.describe()["workers"] == 3
    check_placement(executor)
    cluster.remove_node(machine)
    wait_until(lambda: len(events(output, "replaced")) == 2, "both workers are given up")
    gates.open(*range(16))
    running.join(120)
    assert codes == [EXIT_OK] and not (output / "_state/quarantine").exists()
    lost = [event["message"] for event in events(output, "replaced")]
    assert len(lost) == 2 and all("node was lost" in message for message in lost)
    # Nobody waits for machines at the end of a run.
    assert not any("wait for cluster resources" in notice for notice in display.notices)


def check_placement(running: RayExecutor) -> None:
    """Labels select machines, and those to avoid get no worker; through the connection that this process has."""
    import ray

    ids = {node["Labels"].get("zone", "a"): node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def on(resources: ResourcesSpec) -> RayExecutor:
        made = RayExecutor(address="auto", num_workers=None, device="cpu", resources=resources)
        made._cluster = running._cluster
        return made

    with pytest.raises(JobError, match=r"^runtime\.resources\.label_selector: no machine .* zone c; there is b; leave"):
        on(ResourcesSpec(label_selector={"zone": "c"})).open(dict, 9)
    # All cores are taken.
    placed = on(ResourcesSpec(num_cpus=0))
    assert placed.open(dict, 9) == 3
    for avoided, expected in (("a", "b"), ("b", "a")):
        placed.avoid_nodes([ids[avoided]])
        assert place_worker(placed) == ids[expected]


def place_worker(executor: RayExecutor) -> str:
    """The machine that a worker gets."""
    executor.start_worker(executor._most_workers)
    while True:
        for event in executor.poll(5.0):
            if isinstance(event, WorkerPlaced):
                executor.stop_worker(event.worker)
                return event.node

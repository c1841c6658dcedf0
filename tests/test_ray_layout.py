"""How resources of a cluster are divided among workers."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.driver.executors import ray_actor
from engine.driver.executors.ray_actor import RayHost
from engine.driver.executors.ray_layout import (
    Layout,
    Machine,
    divide,
    lacking,
    machine_names,
    usable_cores,
    workers_that_fit,
)
from engine.errors import JobError
from engine.job.resources import ResourcesSpec


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "shards", "is_own", "expected"),
    [
        ([{"CPU": 16.0}], "auto", None, 99, True, Layout(16, 1, {"num_cpus": 1})),
        ([{"CPU": 64.0, "memory": 400e9}], "auto", None, 99, True, Layout(16, 1, {"num_cpus": 1})),
        (
            [{"CPU": 8.0, "memory": 7e9}, {"CPU": 2.0, "memory": 1e9}],
            "cpu",
            None,
            99,
            False,
            Layout(4, 1, {"num_cpus": 1}),
        ),
        ([{"CPU": 2.0}], "cpu", 4, 99, True, Layout(4, 1, {"num_cpus": 1})),
        ([{"CPU": 16.0}], "auto", None, 1, True, Layout(1, 1, {"num_cpus": 1})),
        ([{"CPU": 8.0}, {"CPU": 8.0}], "auto", None, 99, False, Layout(16, 1, {"num_cpus": 1})),
        ([{"CPU": 16.0, "GPU": 2.0}], "auto", None, 99, True, Layout(2, 8, {"num_gpus": 1, "num_cpus": 0}, 1)),
        ([{"CPU": 16.0, "GPU": 2.0}], "auto", 3, 99, True, Layout(3, 4, {"num_gpus": 0.5, "num_cpus": 0}, 2)),
        ([{"CPU": 16.0, "GPU": 2.0}], "cpu", None, 99, True, Layout(16, 1, {"num_cpus": 1})),
        ([{"CPU": 8.0}, {"CPU": 8.0}], "cpu", 1, 99, False, Layout(1, 1, {"num_cpus": 1})),
        ([{"CPU": 8.0}, {"CPU": 8.0}], "cpu", 3, 99, False, Layout(3, 1, {"num_cpus": 1})),
        ([{"CPU": 2.0}], "cpu", 3, 99, False, Layout(3, 1, {"num_cpus": 1})),
        ([{"CPU": 4.0}], "cuda", 8, 99, False, Layout(8, 0, {"num_gpus": 1, "num_cpus": 0}, 1)),
        ([{"CPU": 4.0}], "cuda", None, 99, False, Layout(1, 0, {"num_gpus": 1, "num_cpus": 0}, 1)),
        ([{"CPU": 16.0, "GPU": 2.0}], "auto", 5, 99, False, Layout(5, 0, {"num_gpus": 1, "num_cpus": 0}, 1)),
        # No node has room for a worker with a whole GPU.
        ([{"CPU": 2.0, "GPU": 0.5}, {"CPU": 2.0, "GPU": 0.5}], "auto", None, 9, False, Layout(4, 1, {"num_cpus": 1})),
    ],
)
def test_resources_are_divided(nodes, device, workers, shards, is_own, expected):
    """One worker a GPU, or a core as far as memory goes; a growing cluster is asked for GPUs that it lacks."""
    assert divide(nodes, device, workers, shards, is_own=is_own) == expected


def test_cores_are_counted_where_affinity_is_unknown(monkeypatch):
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity")
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("content", "expected"), [("150000 100000", 2), ("20000 100000", 1), ("max 100000", 8)])
def test_a_quota_of_the_container_limits_the_cores(monkeypatch, content, expected):
    """Rounded up to whole cores, at least one; without a quota, those of the affinity mask."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: content)
    assert usable_cores() == expected


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "expected"),
    [
        # Five workers on two GPUs: at most three share one.
        ([{"CPU": 16.0, "GPU": 2.0}], "cuda", 5, Layout(5, 2, {"num_gpus": 1 / 3, "num_cpus": 0}, 3)),
        # One worker for two GPUs does not get the threads of both.
        ([{"CPU": 16.0, "GPU": 2.0}], "cuda", 1, Layout(1, 8, {"num_gpus": 1, "num_cpus": 0}, 1)),
        ([{"CPU": 1.0, "GPU": 4.0}], "auto", None, Layout(4, 1, {"num_gpus": 1, "num_cpus": 0}, 1)),
        ([{}], "auto", None, Layout(1, 1, {"num_cpus": 1})),
    ],
)
def test_gpus_are_shared_on_this_machine_alone(nodes, device, workers, expected):
    """Threads are divided as if all GPUs were full; a node without resources still gets a worker."""
    assert divide(nodes, device, workers, 99, is_own=True) == expected


@pytest.mark.parametrize(
    ("resources", "cores", "expected"),
    [
        # The other twelve nodes of the cluster, with 16 cores and no GPU each, are of no use to this worker.
        ({"CPU": 16.0, "GPU": 1.0}, 16, 16),
        ({"CPU": 208.0, "GPU": 8.0}, 208, 26),
        # The container has fewer cores than Ray was told, or Ray was told of fewer, or of none.
        ({"CPU": 208.0, "GPU": 1.0}, 16, 16),
        ({"CPU": 8.0, "GPU": 1.0}, 64, 8),
        ({"CPU": 0.0, "GPU": 2.0}, 16, 8),
        ({"GPU": 4.0}, 2, 1),
        ({"CPU": 8.0, "GPU": 0.5}, 8, 8),
    ],
)
def test_a_worker_has_the_threads_of_its_node(monkeypatch, resources, cores, expected):
    """Whichever nodes there were at the start: a cluster may get its first GPU for this worker."""
    nodes = [{"NodeID": "other", "Resources": {"CPU": 99.0}}, {"NodeID": "here", "Resources": resources}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    monkeypatch.setattr(ray_actor, "usable_cores", lambda: cores)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    RayHost(0, threads=0, workers_per_gpu=1)
    assert os.environ["OMP_NUM_THREADS"] == str(expected)


def test_a_worker_without_a_gpu_sees_none(monkeypatch):
    """Ray leaves those of the node visible to an actor that has none: as many workers as cores would use them."""
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "0")
    RayHost(0, 1, workers_per_gpu=1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    RayHost(0, 1, workers_per_gpu=0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_gpu_that_is_not_there_is_refused():
    """On a cluster of our own none will come."""
    with pytest.raises(JobError, match="no GPU"):
        divide([{"CPU": 4.0}], "cuda", None, 9, is_own=True)


@pytest.mark.parametrize(
    ("nodes", "asked", "workers", "is_own", "expected"),
    [
        # Two share a GPU; the threads of the second kind are counted on the machine that a worker gets.
        ([{"CPU": 16.0, "GPU": 2.0}], {"num_gpus": 0.5}, None, True, (4, 4, {"num_gpus": 0.5, "num_cpus": 0}, 2)),
        ([{"CPU": 16.0, "GPU": 2.0}], {"num_gpus": 0.5}, None, False, (4, 0, {"num_gpus": 0.5, "num_cpus": 0}, 2)),
        ([{"CPU": 8.0, "GPU": 8.0}], {"num_gpus": 2}, None, False, (4, 0, {"num_gpus": 2, "num_cpus": 0}, 1)),
        ([{"CPU": 6.0, "GPU": 8.0}], {"num_cpus": 2}, None, False, (3, 2, {"num_gpus": 1, "num_cpus": 2}, 1)),
        # A cluster without GPUs is asked for one.
        ([{"CPU": 6.0}], {"num_gpus": 0.5}, None, False, (1, 0, {"num_gpus": 0.5, "num_cpus": 0}, 2)),
        # CPU nodes by choice, though there are GPUs.
        ([{"CPU": 8.0, "GPU": 8.0}], {"num_gpus": 0}, None, False, (8, 1, {"num_cpus": 1}, 0)),
        ([{"CPU": 9.0}, {"CPU": 3.0}], {"num_cpus": 2}, None, False, (5, 1, {"num_cpus": 2}, 0)),
        ([{"CPU": 9.0}], {"num_cpus": 2}, None, True, (4, 1, {"num_cpus": 1}, 0)),
        (
            [{"CPU": 9.0, "slot": 3.0}, {"CPU": 9.0}],
            {"custom": {"slot": 1}},
            None,
            False,
            (3, 1, {"num_cpus": 1, "resources": {"slot": 1}}, 0),
        ),
        ([{"CPU": 9.0}], {"num_cpus": 2}, 16, False, (16, 1, {"num_cpus": 2}, 0)),
    ],
)
def test_a_job_says_what_a_worker_takes(nodes, asked, workers, is_own, expected):
    """Workers that fit, or as many as are wanted of a cluster that may grow."""
    layout = divide(nodes, "auto", workers, 99, is_own=is_own, asked=ResourcesSpec(**asked))
    assert layout == Layout(*expected)


def test_this_machine_has_no_more_than_it_has():
    """Workers would wait for ever."""
    with pytest.raises(JobError, match=r"room for 4 workers that take num_gpus 0\.5, and 5 are wanted"):
        divide([{"CPU": 8.0, "GPU": 2.0}], "cuda", 5, 99, is_own=True, asked=ResourcesSpec(num_gpus=0.5))
    with pytest.raises(JobError, match=r"^runtime\.resources\.num_gpus: no GPU is visible here"):
        divide([{"CPU": 8.0}], "auto", 1, 99, is_own=True, asked=ResourcesSpec(num_gpus=0.5))


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"custom": {"a100": 1}}, "custom.a100: no machine of the cluster has 1, the most is 0; there is CPU, slot"),
        ({"custom": {"slot": 3}}, "custom.slot: no machine of the cluster has 3, the most is 2"),
        ({"num_cpus": 64}, "num_cpus: no machine of the cluster has 64 cores, the most is 8"),
        ({"label_selector": {"zone": "c"}}, "label_selector: no machine of the cluster has zone c; there is a, b"),
        ({"label_selector": {"spot": "true"}}, "there is none"),
        ({"label_selector": {"zone": "a", "kind": "x"}}, "has all of these labels"),
        ({"label_selector": {"zone": "in(b, c)"}, "custom": {"slot": 1}}, "custom.slot: no machine"),
        ({"label_selector": {"zone": "!a", "spot": "!true"}, "num_gpus": 1}, ""),
    ],
)
def test_what_no_machine_has_is_named_with_what_there_is(asked, text):
    """GPUs are waited for."""
    machines = [
        Machine("1", {"CPU": 8.0, "slot": 2.0, "node:10.0.0.1": 1.0, "memory": 1e9}, {"zone": "a"}),
        Machine("2", {"CPU": 2.0}, {"zone": "b", "kind": "x"}),
    ]
    problem = lacking(machines, ResourcesSpec(**asked))
    assert text in problem and bool(problem) == bool(text)


@pytest.mark.parametrize(
    ("peak", "total", "expected"),
    [(16, 80, 3), (40, 80, 1), (70, 80, 1), (0.1, 80, 16), (3, 24, 5), (0, 0, 1)],
)
def test_workers_share_a_gpu_by_what_one_of_them_used(peak, total, expected):
    """In GiB: with a margin for larger batches, and what each process holds besides."""
    assert workers_that_fit(int(peak * 2**30), int(total * 2**30)) == expected


def test_machines_have_the_names_of_their_hosts() -> None:
    """Several on one host are told apart; a node of which Ray says little has no name."""
    nodes = [
        {"NodeID": "a", "NodeManagerHostname": "one", "NodeManagerPort": 5},
        {"NodeID": "b", "NodeManagerHostname": "two", "NodeManagerPort": 5},
        {"NodeID": "c", "NodeManagerHostname": "two", "NodeManagerPort": 6},
        {"NodeID": "d", "NodeManagerHostname": "", "NodeManagerAddress": "10.0.0.4"},
        {"NodeID": "e"},
    ]
    assert machine_names(nodes) == {"a": "one", "b": "two:5", "c": "two:6", "d": "10.0.0.4", "e": ""}

"""How resources of a cluster are divided among workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.driver.executors.ray_layout import Layout, divide, usable_cores
from engine.errors import JobError


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
        ([{"CPU": 16.0, "GPU": 2.0}], "auto", None, 99, True, Layout(2, 8, {"num_gpus": 1, "num_cpus": 0})),
        ([{"CPU": 16.0, "GPU": 2.0}], "auto", 3, 99, True, Layout(3, 5, {"num_gpus": 0.5, "num_cpus": 0})),
        ([{"CPU": 16.0, "GPU": 2.0}], "cpu", None, 99, True, Layout(16, 1, {"num_cpus": 1})),
        ([{"CPU": 8.0}, {"CPU": 8.0}], "cpu", 1, 99, False, Layout(1, 1, {"num_cpus": 1})),
        ([{"CPU": 8.0}, {"CPU": 8.0}], "cpu", 3, 99, False, Layout(3, 1, {"num_cpus": 1})),
        ([{"CPU": 2.0}], "cpu", 3, 99, False, Layout(3, 1, {"num_cpus": 1})),
        ([{"CPU": 4.0}], "cuda", 8, 99, False, Layout(8, 1, {"num_gpus": 1, "num_cpus": 0})),
        ([{"CPU": 4.0}], "cuda", None, 99, False, Layout(1, 4, {"num_gpus": 1, "num_cpus": 0})),
        ([{"CPU": 16.0, "GPU": 2.0}], "auto", 5, 99, False, Layout(5, 3, {"num_gpus": 1, "num_cpus": 0})),
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
        ([{"CPU": 16.0, "GPU": 2.0}], "cuda", 5, Layout(5, 3, {"num_gpus": 1 / 3, "num_cpus": 0})),
        # One worker for two GPUs does not get the threads of both.
        ([{"CPU": 16.0, "GPU": 2.0}], "cuda", 1, Layout(1, 8, {"num_gpus": 1, "num_cpus": 0})),
        ([{"CPU": 1.0, "GPU": 4.0}], "auto", None, Layout(4, 1, {"num_gpus": 1, "num_cpus": 0})),
        ([{}], "auto", None, Layout(1, 1, {"num_cpus": 1})),
    ],
)
def test_gpus_are_shared_on_this_machine_alone(nodes, device, workers, expected):
    """Threads are divided by the larger of workers and GPUs; a node without resources still gets a worker."""
    assert divide(nodes, device, workers, 99, is_own=True) == expected


def test_a_gpu_that_is_not_there_is_refused():
    """On a cluster of our own none will come."""
    with pytest.raises(JobError, match="no GPU"):
        divide([{"CPU": 4.0}], "cuda", None, 9, is_own=True)

"""Workers that share a GPU: from what an executor states to the bytes that a worker may hold.

What a GPU with two workers would show by running out of memory: that each counts only its own part. CUDA's answers are
stated here; the rest is the code of a worker. The shares of actors come from a real Ray whose GPU is a number.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.driver.executors.base import ExecutorEvent
from engine.driver.executors.local import LocalExecutor
from engine.driver.executors.ray import RayExecutor
from engine.driver.executors.ray_actor import RayHost
from engine.driver.executors.ray_cluster import prepare_environment
from engine.driver.executors.ray_layout import divide, usable_cores
from engine.driver.scheduling.messages import UserFault, WorkerLost, WorkerReady
from engine.errors import EXIT_USER, JobError, RiskforgeError
from engine.generation import loading, worker
from engine.generation.batching import FIRST_BATCH, BatchSize, Peak
from engine.job.plan import ShardSpec
from engine.job.spec import RuntimeSpec
from engine.models import hardware
from engine.models.gpu_sharing import CONTEXT_BYTES, GpuShare, allowed_bytes, gpu_share, reachable_bytes, sharing_gpu
from engine.models.pipelines.stable_diffusion import StableDiffusion
from tests.sleepy import GATE_SECONDS
from tests.test_generator import make_generator
from tests.witness import Witness

GIB = 2**30
TOTAL = 139 * GIB


class Gpu:
    """CUDA's memory as torch reports it: what is free, what this process holds, and the limit that it was given."""

    def __init__(self, *, total: int = TOTAL, reserved: int = 0, others: int = 0) -> None:
        self.total, self.reserved, self.free = total, reserved, total - reserved - others
        self.fraction: float | None = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Gpu:
        """Let torch report it."""
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (self.free, self.total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: self.reserved)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", functools.partial(setattr, self, "fraction"))
        return self


@given(
    num_workers=st.integers(2, 16),
    total=st.integers(8 * GIB, 192 * GIB),
    data=st.data(),
)
def test_workers_together_never_hold_more_than_the_gpu_has(num_workers: int, total: int, data: st.DataObject) -> None:
    """Each counts what it may hold alone, whatever the others hold by then; and its process needs some besides."""
    allowed = allowed_bytes(total, 1 / num_workers)
    assert num_workers * (allowed + CONTEXT_BYTES) <= total or allowed == 0
    reserved = data.draw(st.integers(0, total))
    free = data.draw(st.integers(0, total - reserved))
    reachable = reachable_bytes(free, reserved, total, 1 / num_workers)
    assert reachable == min(allowed, free + reserved)
    assert reachable_bytes(free, reserved, total, 1.0) == free + reserved, "alone: all that is left"


def test_a_share_is_that_of_the_block_and_of_its_thread() -> None:
    """Without an executor the GPU is whole; a share does not outlive the construction of its worker."""
    assert gpu_share() == GpuShare(memory=1.0, owns_process=False)
    with pytest.raises(ZeroDivisionError), sharing_gpu(GpuShare(memory=0.25)):
        assert hardware.choose_hardware(RuntimeSpec(device="cpu")).memory_share == 0.25
        raise ZeroDivisionError
    assert hardware.choose_hardware(RuntimeSpec(device="cpu")).memory_share == 1.0


@pytest.mark.parametrize(
    ("has_gpu", "share", "is_refused"),
    [
        (True, GpuShare(memory=0.5), True),
        (True, GpuShare(memory=0.5, owns_process=True), False),
        (True, GpuShare(), False),
        (False, GpuShare(memory=0.5), False),
    ],
)
def test_threads_on_a_gpu_cannot_give_equal_bytes(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, share: GpuShare, is_refused: bool
) -> None:
    """While one of them scores, TF32 is off for all; refused by name, before a model is loaded."""
    spec = RuntimeSpec(deterministic=True, batch_size=8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with sharing_gpu(share):
        assert not hardware.choose_hardware(spec.model_copy(update={"deterministic": False})).deterministic
        if not is_refused:
            assert hardware.choose_hardware(spec).deterministic
            return
        with pytest.raises(JobError, match=r"^runtime\.workers: 2 threads .*; with deterministic use 1, or --executor"):
            worker.load_generator(SimpleNamespace(runtime=spec), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("share", "others", "expected"),
    [(1.0, 0, TOTAL), (1.0, 60 * GIB, 79 * GIB), (0.5, 0, TOTAL // 2 - GIB), (0.5, 100 * GIB, 39 * GIB)],
)
def test_a_worker_reaches_its_share_or_what_is_left_of_it(
    monkeypatch: pytest.MonkeyPatch, share: float, others: int, expected: int
) -> None:
    """Also where another program holds more than the rest."""
    Gpu(reserved=10 * GIB, others=others).install(monkeypatch)
    assert loading.reachable_memory(share) == expected


def test_two_workers_find_batches_that_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three gibibytes a sample and four of models, the second worker chose by the memory that the first had not
    yet taken; together they did not fit."""
    Gpu().install(monkeypatch)
    memory = loading.reachable_memory(0.5)
    sizes = [BatchSize(), BatchSize()]
    for size in sizes:
        for rows in (FIRST_BATCH, 2 * FIRST_BATCH):
            size.observe(Peak(rows, (4 + 3 * rows) * GIB), memory)
    assert sum((4 + 3 * size.size) * GIB + CONTEXT_BYTES for size in sizes) <= TOTAL


@pytest.mark.parametrize(("share", "expected"), [(1.0, 32), (0.5, 16)])
def test_a_generator_makes_batches_for_its_share(monkeypatch: pytest.MonkeyPatch, share: float, expected: int) -> None:
    """Of the same three gibibytes: after two batches of two sizes it knows what fits its share."""
    Gpu().install(monkeypatch)
    with sharing_gpu(GpuShare(memory=share)):
        generator, specs = make_generator(sampling={"num_inference_steps": 1})
    sample, rows = generator.sample, [0]

    def sampling(request: int, some: Any, *more: Any) -> Any:
        rows[0] = len(some)
        return sample(request, some, *more)

    monkeypatch.setattr(generator, "sample", sampling)
    monkeypatch.setattr(StableDiffusion, "rows", property(lambda self: None))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: (4 + 3 * rows[0]) * GIB)
    monkeypatch.setattr(hardware.Hardware, "is_cuda", property(lambda self: True))
    sizes = [len(generator.next_batch(0, (specs * 2)[:32])) for _ in range(5)]
    assert sizes == [FIRST_BATCH] * 2 + [2 * FIRST_BATCH] * 2 + [expected]


@pytest.mark.parametrize(
    ("share", "is_cuda", "limited"),
    [
        (GpuShare(memory=0.5, owns_process=True), True, True),
        (GpuShare(memory=0.5, owns_process=True), False, False),
        (GpuShare(memory=0.5), True, False),
        (GpuShare(owns_process=True), True, False),
    ],
)
def test_torch_enforces_the_share_of_a_process(
    monkeypatch: pytest.MonkeyPatch, share: GpuShare, is_cuda: bool, limited: bool
) -> None:
    """Before any model is loaded. Threads of one process cannot be told apart; a CPU has no share."""
    gpu = Gpu().install(monkeypatch)
    loaded: list[float | None] = []
    cpu = hardware.choose_hardware(RuntimeSpec(device="cpu"))
    monkeypatch.setattr(
        worker,
        "choose_hardware",
        lambda _: dataclasses.replace(cpu, device="cuda" if is_cuda else "cpu", memory_share=gpu_share().memory),
    )
    monkeypatch.setattr("engine.generation.generator.Generator", lambda *_: loaded.append(gpu.fraction))
    with sharing_gpu(share):
        worker.load_generator(SimpleNamespace(runtime=RuntimeSpec()), None)  # type: ignore[arg-type]
    assert loaded == [pytest.approx(0.5 - GIB / TOTAL) if limited else None]


def test_more_workers_than_a_gpu_has_memory_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the option that asked for them, not by a model that cannot be loaded."""
    Gpu(total=8 * GIB).install(monkeypatch)
    with pytest.raises(JobError, match=r"^runtime\.workers: 8 on a GPU of 8 GiB leave none .*; use fewer$"):
        loading.limit_memory(1 / 8)


def stated(events: list[ExecutorEvent]) -> list[Any]:
    """What workers that end with their share as a message have stated."""
    return [event.message for event in events if isinstance(event, UserFault)]


def state_share() -> Any:
    """A factory that ends with what it knows of its share, the GPUs that it sees, and its threads."""
    share = gpu_share()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    raise RiskforgeError(f"{share.memory:g} {share.owns_process} {gpus} {os.environ['OMP_NUM_THREADS']}")


def test_threads_of_a_process_share_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By those that there are: no more than shards."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    executor = LocalExecutor(4)
    assert executor.open(state_share, 2) == 2
    executor.start_worker(0)
    events: list[ExecutorEvent] = []
    while not stated(events):
        events += executor.poll(GATE_SECONDS)
    assert stated(events) == ["0.5 False 3 7"]
    executor.close()


def test_an_actor_states_its_share_and_owns_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a GPU, or a whole one."""
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "0")
    for workers_per_gpu, expected in ((4, "0.25 True 0 3"), (1, "1 True 0 3")):
        assert RayHost(0, 3, workers_per_gpu).load(state_share) == UserFault(expected, EXIT_USER)


def outcomes(executor: RayExecutor, *numbers: int) -> list[dict[str, Any]]:
    """What new workers of an executor end with."""
    for number in numbers:
        executor.start_worker(number)
    done: list[dict[str, Any]] = []
    while len(done) < len(numbers):
        for event in executor.poll(GATE_SECONDS):
            assert not isinstance(event, (WorkerLost, UserFault)), event
            if isinstance(event, WorkerReady):
                executor.submit(event.worker, ShardSpec(number=event.worker, request=0, start=0, stop=1), 1)
            elif hasattr(event, "outcome"):
                done.append(event.outcome)
    for number in numbers:
        executor.stop_worker(number)
    return done


def test_actors_on_a_gpu_of_this_machine_have_a_part_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two on one GPU: half of it each, by Ray and by what their factory is told; the machine's cores are divided."""
    prepare_environment(is_own=True)
    import ray

    monkeypatch.setattr(ray, "init", functools.partial(ray.init, num_gpus=1))
    monkeypatch.setattr("engine.driver.executors.ray_cluster.usable_cores", lambda: 6)
    executor = RayExecutor(address=None, num_workers=2, device="cuda")
    try:
        assert executor.open(Witness, 9) == 2
        assert executor.describe()["workers_per_gpu"] == 2
        half = {"assigned": 0.5, "share": GpuShare(memory=0.5, owns_process=True), "gpus": "0", "threads": "3"}
        assert outcomes(executor, 0, 1) == [half] * 2
        # As on a cluster that was joined: the actor asks Ray for its node, which has two cores for one GPU.
        executor._layout = divide(executor._nodes, "cuda", 1, 9, is_own=False)
        whole = {"assigned": 1.0, "share": GpuShare(owns_process=True), "threads": str(min(2, usable_cores()))}
        assert outcomes(executor, 2) == [half | whole]
        # A job for CPUs on the same machine.
        executor._layout = divide(executor._nodes, "cpu", 1, 9, is_own=True)
        none = {"assigned": 0.0, "share": GpuShare(owns_process=True), "gpus": "", "threads": "1"}
        assert outcomes(executor, 3) == [none] and "workers_per_gpu" not in executor.describe()
    finally:
        executor.close()

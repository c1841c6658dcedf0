"""Batches of the real generator: what overlaps, in which order results come, and what becomes of those that fail.

CUDA's failures are injected; models and scores are the zoo's.
"""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from typing import Any

import pytest
import torch

from engine.errors import EverySampleFailedError, JobError
from engine.generation import batches, batching, faults
from engine.generation.generator import Generator
from engine.generation.notices import Notices
from engine.generation.results import ImageBatch
from engine.job.plan import SampleSpec
from engine.job.records import SampleResult
from engine.models.pipelines.stable_diffusion import StableDiffusion
from tests.cuda_failures import CALLS, Failure
from tests.test_generator import failing_for, make_generator

Made = tuple[Generator, list[SampleSpec]]
# So long a test waits for another thread before it fails.
GATE_SECONDS = 60.0


@pytest.fixture(scope="module")
def loaded() -> Made:
    return make_generator(runtime={"batch_size": 8}, sampling={"num_inference_steps": 1, "guidance_scale": 2.0})


@pytest.fixture
def made(loaded: Made, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A generator that has made no batch, with batches of eight, and twenty samples."""
    # It takes longer than a batch; what is let go of must not wait for it.
    monkeypatch.setattr(faults.gc, "collect", lambda: 0)
    fresh = Generator.__new__(Generator)
    fresh.__dict__ |= loaded[0].__dict__ | {"notices": Notices()}
    fresh._begin_batches()
    return fresh, loaded[1]


def as_on_a_gpu(generator: Generator, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let the generator take this CPU for a GPU, with other settings of the hardware."""
    monkeypatch.setattr(StableDiffusion, "rows", property(lambda model: None))
    hardware = dataclasses.replace(generator._hardware, device="cuda", **changes)
    monkeypatch.setattr(generator, "_hardware", hardware)
    generator._begin_batches()


def make(generator: Generator, specs: list[SampleSpec]) -> list[SampleResult]:
    """All samples, of which none is lost, doubled or moved."""
    results = [result for batch in generator.batches(0, specs) for result in batch.results]
    assert [result.record["key"] for result in results] == [spec.key for spec in specs]
    return results


def statuses(results: list[SampleResult]) -> list[str]:
    return [result.record["status"] for result in results]


def sizes_of(results: list[SampleResult]) -> list[int]:
    """Rows of the batch that each sample was made in."""
    return [result.run["batch_size"] for result in results]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("decoder", "allocator"), ("decoder", "cublas"), ("decoder", "engine"), ("decoder", "int max"),
        ("network", "runtime"), ("network", "grid"), ("classifier", "cudnn"), ("classifier", "assertion"),
    ],
)  # fmt: skip
def test_a_size_that_fails_is_halved(made: Made, monkeypatch: pytest.MonkeyPatch, call: str, error: str) -> None:
    """Wherever it is raised, and whatever it looks like: no sample is lost, later batches are smaller, and a notice."""
    generator, specs = made
    seen = Failure(call=call, error=error, above=4).inject(monkeypatch.setattr)
    results = make(generator, specs)
    assert statuses(results) == ["ok"] * 20 and max(sizes_of(results)) == 4
    # Even batches of at most eight have seven; the next one may have been sampled before the first was scored.
    assert [size for size in seen if size > 4].count(7) <= (1 if call != "classifier" else 2)
    assert generator.batch_limit(0) == 4
    [notice, *more] = generator.notices.take()
    assert notice.startswith("requests.0: a batch of 7 samples failed (") and "with batches of 4" in notice
    assert len(more) <= 1


def test_memory_that_ran_out_behind_another_exception_counts_too(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of the job's may catch it and raise its own: that is no bad sample, though every one of them raises it."""
    generator, specs = made
    Failure(call="decoder", error="hip", above=0, is_hidden=True).inject(monkeypatch.setattr)
    with pytest.raises(JobError, match="a single sample does not fit the GPU's memory") as caught:
        make(generator, specs)
    assert not isinstance(caught.value, EverySampleFailedError)


@pytest.mark.parametrize(
    ("share", "remedy"), [(0.5, "on, fewer workers, or fewer models"), (1.0, "on, or fewer models")]
)
def test_a_sample_that_does_not_fit_a_part_of_a_gpu(
    made: Made, monkeypatch: pytest.MonkeyPatch, share: float, remedy: str
) -> None:
    """Whoever shares it can have more of it."""
    generator, specs = made
    as_on_a_gpu(generator, monkeypatch, memory_share=share)
    Failure(call="decoder", error="allocator", above=0).inject(monkeypatch.setattr)
    with pytest.raises(JobError, match=f"a single sample does not fit .* gradient_checkpointing {remedy}$"):
        make(generator, specs)


def test_memory_that_suffices_no_longer_is_of_the_machine(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches went through before: another machine has what this one lacks now, and the job is not wrong."""
    generator, specs = made
    Failure(call="decoder", error="cublas", at=range(2, 100)).inject(monkeypatch.setattr)
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED"):
        make(generator, specs)


def test_a_single_sample_is_tried_twice(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is smaller than it, and memory that others held may be free."""
    generator, specs = made
    seen = Failure(call="decoder", error="allocator", at=[1, 2]).inject(monkeypatch.setattr)
    assert statuses(make(generator, specs[:2])) == ["ok"] * 2 and seen == [2, 1, 1, 1]


def test_what_a_single_sample_raises_too_is_of_the_machine(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation: the exception comes out, for the shard to be tried elsewhere."""
    generator, specs = made
    Failure(call="decoder", error="engine", above=0).inject(monkeypatch.setattr)
    with pytest.raises(RuntimeError, match=r"^GET was unable to find an engine"):
        make(generator, specs)


@pytest.mark.parametrize("error", ["access", "launch"])
def test_a_broken_device_is_not_asked_again(made: Made, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    """Every call after it fails as well, and a size has nothing to do with it."""
    generator, specs = made
    seen = Failure(call="decoder", error=error, above=0).inject(monkeypatch.setattr)
    with pytest.raises(RuntimeError, match="CUDA error"):
        make(generator, specs)
    assert len(seen) == 1 and generator.batch_limit(0) == 0


def test_a_failure_that_comes_once_lowers_the_size_for_a_while(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second batch fails while the first one waits to be scored; after enough good batches the size is back."""
    generator, specs = made
    seen = Failure(call="decoder", error="allocator", at=[2]).inject(monkeypatch.setattr)
    monkeypatch.setattr(batching, "GOOD_BATCHES", 4)
    results = make(generator, specs)
    assert statuses(results) == ["ok"] * 20 and seen == [7, 7, 4, 3, 3, 3]
    assert generator.batch_limit(0) == 4
    limits = [generator.batch_limit(0) for _ in range(4) if make(generator, specs)]
    assert limits == [4, 6, 6, 0]
    assert seen[6:] == [4, 4, 4, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5, 7, 7, 6]


def test_a_bad_sample_is_found_by_halving(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails alone, and the size is not at fault."""
    generator, specs = made
    seen = Failure(call="network", error="int max").inject(monkeypatch.setattr)
    failing_for(generator, monkeypatch, {specs[1].index}, ValueError("x"))
    results = make(generator, specs[:8])
    wanted = ["failed" if spec.index == specs[1].index else "ok" for spec in specs[:8]]
    assert statuses(results) == wanted and generator.batch_limit(0) == 0 and not generator.notices.take()
    assert all("ValueError: x" in one.record["error_message"] for one in results if one.record["status"] == "failed")
    assert len(seen) < 2 * 2 * len(specs)


def test_a_bad_sample_and_a_size_at_once(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample fails alone; memory is at fault whatever its samples do."""
    generator, specs = made
    Failure(call="decoder", error="cublas", above=2).inject(monkeypatch.setattr)
    failing_for(generator, monkeypatch, {specs[0].index}, ValueError("x"))
    results = make(generator, specs[:8])
    assert statuses(results) == ["failed" if spec.index == specs[0].index else "ok" for spec in specs[:8]]
    assert generator.batch_limit(0) == 2


@pytest.mark.parametrize(
    ("call", "error"), [("decoder", "allocator"), ("network", "int max"), ("classifier", "engine")]
)
def test_nothing_of_a_failed_batch_is_held_while_its_parts_are_made(
    made: Made, monkeypatch: pytest.MonkeyPatch, call: str, error: str
) -> None:
    """Its latents, and what every call on the way was given, are gone at the first call of the next attempt."""
    generator, specs = made
    Failure(call=call, error=error, above=4).inject(monkeypatch.setattr)
    held: list[tuple[int, weakref.ref[torch.Tensor]]] = []
    alive: list[int] = []

    def watching(kind: type, name: str) -> None:
        method = getattr(kind, name)

        def watched(owner: Any, batch: torch.Tensor, *inputs: Any, **more: Any) -> Any:
            if name == "call_network" and len(batch) <= 2 * 4:
                alive.append(sum(reference() is not None for size, reference in held if size > 4))
            held.append((len(batch) // (2 if name == "call_network" else 1), weakref.ref(batch)))
            return method(owner, batch, *inputs, **more)

        monkeypatch.setattr(kind, name, watched)

    # Scoring takes what is on the CPU, and only 8-bit images of two batches.
    for kind, name, _ in list(CALLS.values())[:2]:
        watching(kind, name)
    gc.disable()
    try:
        [_] = generator.batches(0, specs[:8])
    finally:
        gc.enable()
    assert [size for size, _ in held if size > 4] and alive and not any(alive)


def test_the_place_of_an_exception_is_still_known(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames lose their tensors and keep their lines: the user's own file is named."""
    generator, specs = made
    failing_for(generator, monkeypatch, range(100), KeyError("x"))
    with pytest.raises(EverySampleFailedError, match=r"test_generator\.py, line \d+"):
        make(generator, specs[:4])


def test_memory_of_a_gpu_that_runs_out_on_a_cpu_ends_the_run(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factory may use a GPU that the job does not. No batch is smaller on a CPU: once this was an endless loop."""
    generator, specs = made
    calls = []

    def without_memory(*inputs: Any) -> Any:
        calls.append(inputs)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generator, "sample", without_memory)
    with pytest.raises(JobError, match=r"^runtime\.device: .* let the factories that the job names use the CPU"):
        make(generator, specs[:4])
    assert len(calls) == 1


def test_what_only_a_batch_raises_on_a_cpu_is_reported(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts have the same rows; the size decides bytes, and stays."""
    generator, specs = made
    specs = specs[:12]
    clean = make(generator, specs)
    sample = generator.sample

    def mixed(request: int, some: list[SampleSpec], *more: Any) -> Any:
        if len({spec.key for spec in some}) > 8:
            raise RuntimeError("too many prompts")
        return sample(request, some, *more)

    monkeypatch.setattr(generator, "sample", mixed)
    results = make(generator, specs)
    assert [result.image for result in results] == [result.image for result in clean]
    [notice] = generator.notices.take()
    assert "a batch of 12 samples failed (RuntimeError: too many prompts)" in notice and "the size stays" in notice
    assert generator.batch_limit(0) == 0


@pytest.mark.parametrize("error", ["int max", "engine"])
def test_a_size_that_decides_bytes_is_the_jobs(made: Made, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    """In deterministic mode the parts only find out which size would do; they are not filled up."""
    generator, specs = made
    as_on_a_gpu(generator, monkeypatch, deterministic=True)
    seen = Failure(call="decoder", error=error, above=4).inject(monkeypatch.setattr)
    with pytest.raises(JobError, match=r"^runtime\.batch_size: 8 samples at a time fail \(.* such as 3$"):
        make(generator, specs[:6])
    assert seen == [8, 6, 3, 3]


@pytest.mark.parametrize(("share", "remedy"), [(0.5, "4, or fewer workers"), (1.0, "4")])
def test_memory_that_does_not_hold_a_size_that_decides_bytes(
    made: Made, monkeypatch: pytest.MonkeyPatch, share: float, remedy: str
) -> None:
    """A smaller batch would have other bytes: nothing is tried."""
    generator, specs = made
    as_on_a_gpu(generator, monkeypatch, deterministic=True, memory_share=share)
    seen = Failure(call="decoder", error="cudnn", above=4).inject(monkeypatch.setattr)
    with pytest.raises(JobError, match=rf"8 samples do not fit .* such as {remedy}$"):
        make(generator, specs[:3])
    assert seen == [8]


def test_neighbours_of_a_bad_sample_keep_the_shape_that_decides_their_bytes(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In deterministic mode they are made once more in it."""
    generator, specs = made
    as_on_a_gpu(generator, monkeypatch, deterministic=True)
    clean = make(generator, specs[:5])
    bad = next(place for place, spec in enumerate(specs[:5]) if [one.index for one in specs[:5]].count(spec.index) == 1)
    failing_for(generator, monkeypatch, {specs[bad].index}, ValueError("x"))
    results = make(generator, specs[:5])
    assert statuses(results) == ["failed" if place == bad else "ok" for place in range(5)]
    assert [one.image for one in results if one.image] == [one.image for place, one in enumerate(clean) if place != bad]
    assert {result.run["batch_size"] for result in results if result.image} == {8}


def test_a_bad_sample_that_is_alone_in_such_a_shape(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of a shard may be one sample: it fails, and nothing is left to be made once more."""
    generator, specs = made
    as_on_a_gpu(generator, monkeypatch, deterministic=True)
    assert statuses(make(generator, specs[:1])) == ["ok"]
    failing_for(generator, monkeypatch, {specs[0].index}, ValueError("x"))
    assert statuses(make(generator, specs[:1])) == ["failed"]


def test_a_size_that_is_to_be_found_is_found_by_whole_batches(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is scored before the next one is sampled, as its peak decides; afterwards they overlap.

    The first batch of a shape shows how much the search for its convolutions takes, the second what the batch takes.
    """
    generator, specs = made
    job = generator._job
    runtime = job.runtime.model_copy(update={"batch_size": "auto"})
    monkeypatch.setattr(generator, "_job", job.model_copy(update={"runtime": runtime}))
    as_on_a_gpu(generator, monkeypatch)
    steps: list[str] = []
    sampled, score, rows = generator._sampled, generator._scorer.score, [0]

    def sampling(request: int, some: list[SampleSpec], num_rows: int) -> ImageBatch:
        steps.append(f"sample {num_rows}")
        rows[0] = num_rows
        return sampled(request, some, num_rows)

    def scoring(some: list[SampleSpec], *inputs: Any) -> Any:
        steps.append(f"score {len(some)}")
        return score(some, *inputs)

    monkeypatch.setattr(generator._loop, "_sample", sampling)
    monkeypatch.setattr(generator._scorer, "score", scoring)
    # A gibibyte for the models, one for each row, and a hundred for the search.
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: steps.append("reset"))
    monkeypatch.setattr(
        torch.cuda,
        "max_memory_allocated",
        lambda: (1 + rows[0] + (100 if steps.count(f"sample {rows[0]}") == 1 else 0)) * 2**30,
    )
    monkeypatch.setattr(batches, "reachable_memory", lambda *share: 24 * 2**30)
    for _ in range(3):
        make(generator, specs)
    sizes = [8, 8, 4, 16, 4, 16]
    assert steps == [*(step for size in sizes for step in ("reset", f"sample {size}", f"score {size}")), *whole(4)]
    steps.clear()
    make(generator, specs)
    assert steps == ["sample 10", "sample 10", "score 10", "score 10"]


def whole(size: int) -> list[str]:
    """The steps of a batch that is neither measured nor overlapped."""
    return [f"sample {size}", f"score {size}"]


def test_only_whole_batches_are_compiled(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in the one shape of the model; the parts of one that fails would each be compiled for themselves."""
    generator, specs = made
    as_on_a_gpu(generator, monkeypatch, compile=True)
    model, calls = generator._model(0), []
    network = model._network

    def fast(latents: torch.Tensor, *inputs: Any, **more: Any) -> Any:
        calls.append(len(latents) // 2)
        return network(latents, *inputs, **more)

    monkeypatch.setattr(model, "_fast_network", fast)
    results = make(generator, specs)
    assert set(calls) == {7} and set(sizes_of(results)) == {7}
    calls.clear()
    Failure(call="decoder", error="int max", above=4).inject(monkeypatch.setattr)
    results = make(generator, specs)
    assert set(calls) == {7, 4} and max(sizes_of(results)) == 4


def test_preprocessing_overlaps_the_sampling_of_the_next_batch(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other to have begun: one after the other they would wait in vain. Models run on one thread."""
    generator, specs = made
    monkeypatch.setattr(StableDiffusion, "rows", property(lambda model: None))
    begun, preprocessing = [threading.Event() for _ in range(4)], [threading.Event() for _ in range(4)]
    threads: dict[str, set[int]] = {"sample": set(), "preprocess": set(), "score": set()}
    sample, preprocess, score = generator.sample, generator._scorer.preprocess, generator._scorer.score
    numbers = {"sample": 0, "preprocess": 0}

    def sampling(*inputs: Any) -> Any:
        number, numbers["sample"] = numbers["sample"], numbers["sample"] + 1
        threads["sample"].add(threading.get_ident())
        begun[number].set()
        assert number == 0 or preprocessing[number - 1].wait(GATE_SECONDS)
        return sample(*inputs)

    def preparing(images: Any) -> Any:
        number, numbers["preprocess"] = numbers["preprocess"], numbers["preprocess"] + 1
        threads["preprocess"].add(threading.get_ident())
        preprocessing[number].set()
        assert number == 2 or begun[number + 1].wait(GATE_SECONDS)
        return preprocess(images)

    def scoring(*inputs: Any) -> Any:
        threads["score"].add(threading.get_ident())
        return score(*inputs)

    monkeypatch.setattr(generator, "sample", sampling)
    monkeypatch.setattr(generator._scorer, "preprocess", preparing)
    monkeypatch.setattr(generator._scorer, "score", scoring)
    assert statuses(make(generator, specs)) == ["ok"] * 20
    assert numbers == {"sample": 3, "preprocess": 3}
    assert threads["sample"] == threads["score"] == {threading.get_ident()}
    assert not threads["preprocess"] & threads["sample"]


def test_overlapping_changes_no_byte(made: Made) -> None:
    """On a CPU: files, records and order are those of batches made one after the other."""
    generator, specs = made
    overlapping = make(generator, specs)
    [first, second] = [generator.next_batch(0, specs[:16]), generator.next_batch(0, specs[16:])]
    assert [one.image for one in overlapping] == [one.image for one in first + second]
    assert [one.record for one in overlapping] == [one.record for one in first + second]


def test_no_more_than_two_batches_of_images_are_held(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the caller is slow: the third is sampled when the first one's results are taken."""
    generator, specs = made
    monkeypatch.setattr(StableDiffusion, "rows", property(lambda model: None))
    generator.limit_batches(0, 2)
    held: list[weakref.ref[ImageBatch]] = []
    most = 0
    sampled = generator._sampled

    def watched(*inputs: Any) -> ImageBatch:
        nonlocal most
        batch = sampled(*inputs)
        held.append(weakref.ref(batch))
        most = max(most, sum(reference() is not None for reference in held))
        return batch

    monkeypatch.setattr(generator._loop, "_sample", watched)
    for batch in generator.batches(0, specs):
        del batch
    assert len(held) == 10 and most == 2


@pytest.mark.parametrize("is_closed", [True, False])
def test_batches_that_nobody_wants_leave_no_thread(made: Made, is_closed: bool) -> None:
    """Whether the iterator is closed or dropped."""
    generator, specs = made
    before = set(threading.enumerate())
    iterator = generator.batches(0, specs)
    next(iterator)
    assert any(thread.name.startswith("preprocessing") for thread in set(threading.enumerate()) - before)
    if is_closed:
        iterator.close()
    del iterator
    assert set(threading.enumerate()) <= before


def test_an_exception_of_preprocessing_is_of_its_batch(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next batch is sampled by then, and keeps its results."""
    generator, specs = made
    monkeypatch.setattr(StableDiffusion, "rows", property(lambda model: None))
    make(generator, specs)
    preprocess, calls = generator._scorer.preprocess, []

    def failing(images: Any) -> Any:
        calls.append(len(images))
        if len(calls) == 1:
            raise ValueError("x")
        return preprocess(images)

    monkeypatch.setattr(generator._scorer, "preprocess", failing)
    results = make(generator, specs)
    assert statuses(results) == ["ok"] * 20 and sizes_of(results) == [4] * 4 + [3] * 3 + [7] * 7 + [3] * 6


def test_a_batch_takes_the_time_of_its_own_steps(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of its neighbours: sampling and scoring of each are counted once."""
    generator, specs = made
    monkeypatch.setattr(StableDiffusion, "rows", property(lambda model: None))
    now = [0.0]
    sample, score = generator.sample, generator._scorer.score

    def sampling(*inputs: Any) -> Any:
        now[0] += 10.0 ** (len(inputs[1]) - 6)
        return sample(*inputs)

    def scoring(*inputs: Any) -> Any:
        now[0] += 0.25
        return score(*inputs)

    monkeypatch.setattr(batches.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(generator, "sample", sampling)
    monkeypatch.setattr(generator._scorer, "score", scoring)
    assert [batch.seconds for batch in generator.batches(0, specs)] == [10.25, 10.25, 1.25]

"""What every sample of a first batch raises is the job's fault: exit code 2 and the cause, no other worker."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.driver.scheduling import scheduler
from engine.driver.scheduling.messages import Abort, Replaced, ShardError, ShardProgress, ShardRange, WorkerReady
from engine.errors import EverySampleFailedError, OutputError
from engine.generation import faults
from engine.generation.isolation import Failure, Isolation, failed_result
from engine.job.plan import build_plan
from tests.program_cases import riskforge
from tests.sleepy import make_job
from tests.test_generator import failing_for, make_generator

DIGESTS = {"diffusion": {"zoo:digits/stable-diffusion": ""}, "clip": "", "target": "", "transfer": [], "oracle": ""}


class ConnectTimeout(Exception):
    """As libraries for networks have it, outside of the tree of `OSError`."""


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


JOBS_FAULT = [
    ValueError("x"), KeyError("x"), TypeError("x"), ZeroDivisionError(), AssertionError(), IndexError("x"),
    AttributeError("x"), NotImplementedError(), RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    FileNotFoundError(2, "x"), PermissionError(13, "x"), RecursionError(), Exception("x"), StopIteration(),
    SystemExit(3),
]  # fmt: skip
MAY_PASS = [
    OSError(5, "I/O"), OSError(116, "stale"), OSError(28, "no space"), TimeoutError(), ConnectionResetError(),
    BrokenPipeError(), ConnectTimeout(), caused_by(ValueError("x"), TimeoutError()),
]  # fmt: skip
MACHINES_FAULT = [
    torch.AcceleratorError("x"), RuntimeError("CUDA error: x"), RuntimeError("HIP error: x"), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutputError("store"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made():
    return make_generator()


@pytest.fixture
def fresh(made, monkeypatch):
    """A generator that has made no batch yet."""
    monkeypatch.setattr(made[0]._isolation, "_proven", set())
    return made


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("error", JOBS_FAULT, ids=repr)
def test_any_exception_of_every_first_sample_is_the_jobs(fresh, monkeypatch, size, error):
    """The message has the request, the exception and what to do; a first batch of one is tried with other noise."""
    generator, specs = fresh
    failing_for(generator, monkeypatch, range(100), error)
    with pytest.raises(EverySampleFailedError) as caught:
        generator.next_batch(0, specs[:size])
    assert str(caught.value).startswith("requests.0: every sample of the first batch of 'a' failed: ")
    assert type(error).__name__ in str(caught.value) and "fix what the job names" in str(caught.value)


@pytest.mark.parametrize("error", [*MAY_PASS, *MACHINES_FAULT], ids=repr)
def test_what_may_pass_or_is_the_machines_is_not_the_jobs(fresh, monkeypatch, error):
    """Memory, devices, disks, networks and stores: another attempt may fare better, so the exception comes out."""
    generator, specs = fresh
    failing_for(generator, monkeypatch, range(100), error)
    with pytest.raises(type(error)) as caught:
        generator.next_batch(0, specs[:4])
    assert not isinstance(caught.value, EverySampleFailedError)


def test_a_bad_sample_is_not_the_jobs(fresh, monkeypatch):
    """One among others fails alone; so does one that is a batch by itself, as its sibling with other noise passes."""
    generator, specs = fresh
    failing_for(generator, monkeypatch, {specs[0].index}, ValueError("x"))
    statuses = [one.record["status"] for one in generator.next_batch(0, specs[:4])]
    assert statuses == ["failed" if spec.index == specs[0].index else "ok" for spec in specs[:4]]
    assert set(statuses) == {"failed", "ok"}
    monkeypatch.undo()
    generator._isolation._proven.clear()
    sample = generator.sample

    def raising(request, some, *more):
        if some[0].seed == specs[0].seed:
            raise ValueError("x")
        return sample(request, some, *more)

    monkeypatch.setattr(generator, "sample", raising)
    [result] = generator.next_batch(0, specs[:1])
    assert result.record["status"] == "failed" and result.record["error_message"] == "ValueError: x"


def test_a_bad_sample_that_is_a_batch_by_itself_fails_where_others_went_through():
    """The last batch of a shard may have one sample; nothing else is tried for it."""
    specs = [build_plan(make_job("out", 1), list("0123456789"), DIGESTS).requests[0].sample(0)]
    isolation = Isolation(["a"])
    isolation.went_through(0)
    parts = isolation.in_parts(0, specs, Failure(1, ValueError("x")), make_none)
    assert [one.record["error_message"] for one in parts.results] == ["ValueError: x"]
    assert parts.raised == {0} and parts.at_fault is None


def make_none(some):
    """For what must not be tried."""
    raise AssertionError(some)


@functools.cache
def all_specs():
    """Forty samples of a job."""
    request = build_plan(make_job("out", 4), list("0123456789"), DIGESTS).requests[0]
    return [request.sample(position) for position in range(40)]


def specs_of(count):
    """The first of them."""
    return all_specs()[:count]


class Model:
    """Makes batches that raise by their size and by their samples, and notes what it was asked for.

    Args:
        most: samples that a batch may have.
        bad: places of samples that raise.
    """

    def __init__(self, specs, *, most=1000, bad=(), error=None):
        self._most, self._bad = most, {specs[place].key for place in bad}
        self._error = error or RuntimeError("INT_MAX")
        self.asked = []

    def __call__(self, some):
        self.asked.append(len(some))
        if len(some) > self._most:
            raise self._error
        if self._bad & {spec.key for spec in some}:
            raise ValueError("bad")
        return [failed_result(spec, "made") for spec in some]


@settings(max_examples=60)
@given(
    num=st.integers(2, 40),
    most=st.integers(1, 40),
    bad=st.sets(st.integers(0, 39), max_size=3),
    is_memory=st.booleans(),
    is_filled_up=st.booleans(),
)
def test_samples_and_sizes_are_told_apart(num, most, bad, is_memory, is_filled_up):
    """Exactly the samples that raise alone fail; what is left of a size goes through; halving takes few attempts."""
    with pytest.MonkeyPatch.context() as patch:
        # It takes longer than everything else here.
        patch.setattr(faults.gc, "collect", lambda: 0)
        check_parts(num, most, bad, is_memory=is_memory, is_filled_up=is_filled_up)


def check_parts(num, most, bad, *, is_memory, is_filled_up):
    """One batch of so many samples, bad ones among them."""
    specs, isolation = specs_of(num), Isolation(["a"])
    isolation.went_through(0)
    bad = {place for place in bad if place < num} if len(bad) < num else set()
    error = torch.OutOfMemoryError("x") if is_memory else RuntimeError("INT_MAX")
    model = Model(specs, most=most, bad=bad, error=error)
    whole = isolation.attempt(lambda: model(specs))
    size = num + 7 if is_filled_up else num
    failure = Failure(size, whole if isinstance(whole, Exception) else error)
    if len(bad) == num:
        return
    parts = isolation.in_parts(0, specs, failure, model)
    messages = [result.record["error_message"] for result in parts.results]
    assert messages == ["ValueError: bad" if place in bad else "made" for place in range(num)]
    assert [result.record["key"] for result in parts.results] == [spec.key for spec in specs]
    assert parts.raised == bad and 1 <= parts.through <= num
    assert parts.through <= most or parts.at_fault is None or not bad
    if is_memory and num > most:
        assert parts.at_fault is not None and parts.through <= most
    if parts.at_fault is None:
        assert bad
    if num <= most:
        assert len(model.asked) <= 2 + 2 * (1 + len(bad)) * math.ceil(math.log2(num) + 1)


def test_a_batch_that_was_filled_up_is_tried_without_that_first():
    """Its samples alone may be few enough."""
    specs, isolation = specs_of(3), Isolation(["a"])
    isolation.went_through(0)
    model = Model(specs, most=4)
    parts = isolation.in_parts(0, specs, Failure(8, RuntimeError("INT_MAX")), model)
    assert model.asked == [3] and (parts.at_fault.size, parts.through) == (8, 3)


def test_a_size_that_failed_once_is_not_what_went_through():
    """One of two halves had too little memory, as somebody else had it for a moment: a smaller size is safe."""
    specs, isolation, model = specs_of(16), Isolation(["a"]), Model(specs_of(16))
    isolation.went_through(0)

    def make(some):
        if len(model.asked) == 0:
            model.asked.append(len(some))
            raise torch.OutOfMemoryError("x")
        return model(some)

    parts = isolation.in_parts(0, specs, Failure(16, torch.OutOfMemoryError("x")), make)
    assert model.asked == [8, 4, 4, 8] and (parts.at_fault.size, parts.through) == (16, 4)


def test_what_passed_by_itself_is_not_the_size():
    """A network or a disk failed a batch, and then no longer."""
    specs, isolation = specs_of(4), Isolation(["a"])
    isolation.went_through(0)
    assert isolation.in_parts(0, specs, Failure(4, TimeoutError()), Model(specs)).at_fault is None
    assert isolation.in_parts(0, specs, Failure(4, KeyError("x")), Model(specs)).at_fault is not None


def test_the_message_of_a_failed_sample_is_short_and_has_no_password():
    """It is stored with the run."""
    spec = build_plan(make_job("out", 1), list("0123456789"), DIGESTS).requests[0].sample(0)
    message = failed_result(spec, "no answer of https://user:secret@host/model " + "x" * 1000).record["error_message"]
    assert "secret" not in message and "https://***@host/model" in message and len(message) == 500


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("kind", ["values", "safety"])
def test_a_first_batch_without_images_is_not_the_jobs(fresh, monkeypatch, kind, size):
    """Samples that are not finite, or that the safety checker flags, are failed samples, all of them if need be."""
    generator, specs = fresh
    sample = generator.sample

    def spoiled(request, some, *more):
        images, health = sample(request, some, *more)
        return images * math.nan, health

    class Checker:
        def preprocess(self, images):
            return torch.zeros(len(images))

        def faults_of(self, pixels):
            return ["flagged"] * len(pixels)

    if kind == "values":
        monkeypatch.setattr(generator, "sample", spoiled)
    else:
        monkeypatch.setattr(generator._model(0), "safety_checker", Checker())
    results = generator.next_batch(0, specs[:size])
    assert {one.record["status"] for one in results} == {"failed"}


def test_the_scheduler_ends_the_run_for_a_request_that_never_worked():
    """The first such message ends it, with as many workers as there are; no worker is replaced."""
    ranges = [ShardRange(1, request=0), ShardRange(4, request=1)]
    state, actions = scheduler.start(bytes(5), 2, ranges=ranges)
    for worker in (0, 1):
        state, _ = scheduler.step(state, WorkerReady(worker))
    other = state.workers[1].queue[0]
    state, _ = scheduler.step(state, ShardProgress(0, 0, 1, batch_seconds=1.0))
    # Of the other request no batch went through, whatever this one did.
    ended, actions = scheduler.step(state, ShardError(1, other, "cause", every_sample=True))
    assert actions == [Abort("cause", user_fault=True)] and ended.is_over
    # Its own was measured elsewhere: the worker is at fault.
    state, actions = scheduler.step(state, ShardError(0, 0, "cause", every_sample=True))
    assert not any(isinstance(one, Abort) for one in actions) and state.strikes.get(0, ()) == ("cause",)


def test_the_scheduler_takes_a_request_with_images_for_sound():
    """Of a run that goes on it is known: a worker on a spoilt machine gets its shard taken away."""
    state, _ = scheduler.start(bytes(4), 1, proven=[0])
    state, _ = scheduler.step(state, WorkerReady(0))
    state, actions = scheduler.step(state, ShardError(0, 0, "cause", every_sample=True))
    assert not any(isinstance(one, (Abort, Replaced)) for one in actions) and len(state.strikes) == 1


CODE = """
import torch


def criterion():
    def distance(images, scene):
        # Two images are those of its check.
        if len(images) > 2:
            raise KeyError("no such colour")
        return images.square().mean((1, 2, 3))
    return distance


class Net(torch.nn.Module):
    def forward(self, images):
        # Pictures, in which neighbours are alike: not the images of its check.
        if 0 < (images[..., 1:] - images[..., :-1]).std() < images.std():
            raise ValueError("expected a mask")
        return torch.stack([images.mean((1, 2, 3)) * k for k in range(10)], 1)


def net():
    return Net(), dict(
        labels="zero one two three four five six seven eight nine".split(), image_size=32, mean=[0.5] * 3,
        std=[0.5] * 3,
    )
"""


def write_job(folder: Path, module: str = "broken_code", **changes: object) -> Path:
    (folder / f"{module}.py").write_text(CODE)
    job = {
        "name": "broken",
        "models": {
            "diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": "zoo:digits/classifier",
        },
        "requests": [{"name": "own", "method": "broken_code:criterion", "classes": [3], "count": 6}],
        "sampling": {"num_inference_steps": 6},
        "output": {"uri": "out", "samples_per_shard": 2},
    } | changes  # fmt: skip
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("executor", [("local", 2), ("ray", 1)], ids=str)
def test_a_criterion_that_always_raises_ends_the_run_with_its_cause(tmp_path, executor):
    """Through the command line: code 2, file and line of the user's code; nobody is replaced or put in quarantine."""
    write_job(tmp_path)
    kind, workers = executor
    where = ("--executor", kind, "--workers", workers)
    done = riskforge("run", "job.yaml", *where, folder=tmp_path, code=2)
    assert "requests.0: every sample of the first batch of 'own' failed: KeyError: 'no such colour'" in done.stderr
    assert "broken_code.py, line " in done.stderr
    assert "replaced" not in done.stderr and "retry" not in done.stderr and "quarantine" not in done.stderr
    assert not (tmp_path / "out/_state/quarantine").exists() and not (tmp_path / "out/_SUCCESS").exists()


def test_a_request_that_works_keeps_what_it_made(tmp_path, call):
    """The second of two requests is wrong: the shards of the first stay, and the corrected job goes on with them."""
    requests = [
        {"name": "plain", "method": "prompt", "classes": [3], "count": 2},
        {"name": "own", "method": "broken_second:criterion", "classes": [3], "count": 2},
    ]
    job = write_job(tmp_path, "broken_second", requests=requests, output={"uri": str(tmp_path / "out")})
    code, _, error = call("run", job, "--executor", "local")
    assert code == 2 and "requests.1: every sample of the first batch of 'own'" in error
    assert len(list((tmp_path / "out/_state/commits").iterdir())) == 1


def test_a_target_of_the_users_own_that_always_raises(tmp_path, call):
    """A factory's model that takes the images of its check and no others; a single sample is the first batch."""
    models = {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": "broken_target:net"}
    request = {"name": "plain", "method": "prompt", "classes": [3], "count": 1}
    output = {"uri": str(tmp_path / "out")}
    job = write_job(tmp_path, "broken_target", models=models, requests=[request], output=output)
    code, _, error = call("run", job, "--executor", "local")
    assert code == 2 and "every sample of the first batch of 'plain' failed: ValueError: expected a mask" in error

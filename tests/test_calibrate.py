"""Measurement of batches with a generator and a clock that are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engine.driver.checks import plan_job
from engine.errors import JobError
from engine.generation import calibrate
from engine.generation.calibrate import MAX_BATCH, measure
from engine.job.parsing import parse_job
from engine.job.records import SampleResult, failed_record
from tests.sleepy import make_job, make_result


class Clock:
    """Seconds that pass only when something takes time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """The time."""
        return self.now


class Generator:
    """Loads in 7 s, prepares a request in 2 s; a batch takes 10 s the first time, then 4 s."""

    device_name = "fake"

    def __init__(self, clock: Clock, failing: int = -1) -> None:
        self.clock = clock
        self.failing = failing
        self.batches: list[tuple[int, int]] = []
        clock.now += 7.0

    def prepare(self, request: int) -> None:
        """Take two seconds."""
        self.clock.now += 2.0

    def next_batch(self, request, specs):
        """At most eight samples, of which the first one is rejected."""
        self.clock.now += 4.0 if self.batches else 10.0
        self.batches.append((request, len(specs)))
        if request == self.failing:
            return [SampleResult(failed_record(spec, "no kernel"), b"", {}) for spec in specs[:8]]
        return [make_result(spec, 1, float(number > 0)) for number, spec in enumerate(specs[:8])]


@pytest.fixture
def job(tmp_path):
    """Two requests, of twenty samples and of more than a batch takes."""
    raw = make_job(tmp_path, 2).model_dump(mode="json", exclude_unset=True)
    [request] = raw["requests"]
    requests = [request | {"name": "a"}, request | {"name": "b", "count": MAX_BATCH}]
    return parse_job(raw | {"requests": requests, "runtime": {"device": "cpu"}})


@pytest.fixture
def generator(monkeypatch):
    """Replaces generator and clock; gives the list that the generator will be in."""
    made, clock, threads = [], Clock(), torch.get_num_threads()
    options = {}

    def make(job, plan) -> Generator:
        made.append(Generator(clock, **options))
        return made[-1]

    monkeypatch.setattr("engine.generation.generator.Generator", make)
    monkeypatch.setattr(calibrate, "time", SimpleNamespace(monotonic=clock.monotonic))
    yield SimpleNamespace(made=made, options=options)
    torch.set_num_threads(threads)


def test_the_first_batch_is_not_measured(job, generator):
    """It warms up, once for all requests; loading and preparing are counted apart from sampling."""
    measurement = measure(job, plan_job(job))
    assert generator.made[0].batches == [(0, 20), (0, 20), (1, MAX_BATCH)]
    assert measurement.seconds_per_sample == (0.5, 0.5)
    assert (measurement.load_seconds, measurement.device) == (7.0 + 2 * 2.0, "fake")


def test_yield_and_size_are_of_the_measured_batch(job, generator):
    """Bytes are of all samples made, also of those without a stored image."""
    measurement = measure(job, plan_job(job))
    assert (measurement.num_accepted, measurement.num_attempted) == ((7, 7), (8, 8))
    plan = plan_job(job)
    images = [make_result(plan.requests[0].sample(position), 1).image for position in range(1, 8)]
    assert measurement.bytes_per_sample[0] == sum(map(len, images)) / 8


def test_a_batch_that_fails_as_a_whole_is_an_error(job, generator):
    """With the request and the message of the first sample: a run would make nothing."""
    generator.options["failing"] = 1
    with pytest.raises(JobError, match=r"^requests\.1: all 8 samples .* a run would make none: no kernel$"):
        measure(job, plan_job(job))


def test_some_failed_samples_of_a_batch_are_measured(job, generator, monkeypatch):
    """They take time, too, and are none of the accepted ones."""
    batch = Generator.next_batch

    def with_a_failure(self, request, specs):
        results = batch(self, request, specs)
        return [SampleResult(failed_record(specs[0], "no kernel"), b"", {}), *results[1:]]

    monkeypatch.setattr(Generator, "next_batch", with_a_failure)
    measurement = measure(job, plan_job(job))
    assert (measurement.num_accepted, measurement.num_attempted) == ((7, 7), (8, 8))

"""Estimated cost of a job: attempts, shards, bytes and device-hours, by hand."""

from __future__ import annotations

import pytest

from engine.driver.checks import plan_job
from engine.driver.cost import BYTES_PER_PIXEL, BYTES_PER_RECORD, job_cost
from engine.generation.calibrate import Measurement
from tests.sleepy import make_job

# Pixels of an image of the digits pipeline.
NUM_PIXELS = 32 * 32


def measured(num_accepted: int, num_attempted: int = 8) -> Measurement:
    """A measured batch: half a second and 1000 bytes per sample, 90 s to load."""
    return Measurement(
        seconds_per_sample=(0.5,),
        bytes_per_sample=(1000.0,),
        num_accepted=(num_accepted,),
        num_attempted=(num_attempted,),
        load_seconds=90.0,
        device="cpu",
    )


def costs(tmp_path, num_accepted: int | None, **request):
    """The cost of twenty samples in shards of four."""
    job = make_job(tmp_path, 2, request=request)
    measurement = None if num_accepted is None else measured(num_accepted)
    cost = job_cost(job, plan_job(job), measurement)
    return cost, cost.requests[0]


def test_without_a_measurement_there_are_bytes_and_no_times(tmp_path):
    """Sizes are those of the pipeline's configuration."""
    cost, request = costs(tmp_path, None)
    assert (cost.num_samples, cost.num_shards, cost.device_hours) == (20, 5, None)
    assert (request.seconds, request.num_accepted, request.measured, request.hours_per_accepted) == (None,) * 4
    assert cost.num_bytes == request.num_bytes == round(20 * (NUM_PIXELS * BYTES_PER_PIXEL["png"] + BYTES_PER_RECORD))


def test_a_measured_batch_gives_device_hours(tmp_path):
    """The models are loaded once."""
    cost, request = costs(tmp_path, 8)
    assert (request.seconds, cost.device, cost.load_seconds) == (10.0, "cpu", 90.0)
    assert cost.device_hours == pytest.approx(100 / 3600) and request.num_bytes == 20 * (1000 + BYTES_PER_RECORD)
    # No rule: there is no yield to report.
    assert request.measured is None


RULE = {"classes": [3], "count": 20, "accept": {"is_error": True}, "max_attempts": "10x"}


def test_a_quota_takes_as_many_attempts_as_its_yield_requires(tmp_path):
    """Two of eight accepted: four attempts per sample, rounded up, in whole shards."""
    cost, request = costs(tmp_path, 2, **RULE)
    assert (request.num_samples, request.num_accepted, request.measured) == (80, 20, (2, 8))
    assert cost.num_shards == 20 and request.seconds == 40.0
    assert request.hours_per_accepted == pytest.approx(2 / 3600)
    _, request = costs(tmp_path, 3, **RULE)
    assert request.num_samples == 54 and request.num_shards == 14


@pytest.mark.parametrize(("num_accepted", "expected"), [(0, 0), (1, 10)])
def test_attempts_end_at_the_limit(tmp_path, num_accepted, expected):
    """Nothing accepted, or too little: as many attempts as are allowed; nothing accepted has no price."""
    _, request = costs(tmp_path, num_accepted, accept={"is_error": True}, max_attempts="4x")
    assert (request.num_samples, request.num_accepted) == (80, expected)
    assert (request.hours_per_accepted is None) == (num_accepted == 0)

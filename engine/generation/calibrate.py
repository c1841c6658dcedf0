"""Measurement of one batch of every request on this machine, from which the cost of a job is estimated."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from engine.errors import JobError
from engine.job.plan import Plan, RequestPlan
from engine.job.records import STATUS_FAILED, SampleResult
from engine.job.spec import JobSpec
from engine.models.hardware import choose_hardware, fix_threads

if TYPE_CHECKING:
    from engine.generation.generator import Generator

MAX_BATCH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Measured durations and sizes, one value for each request, by its number.

    Attributes:
        seconds_per_sample: sampling and scoring.
        bytes_per_sample: encoded images that are stored, those of starts and twins too.
        num_accepted, num_attempted: samples that the request's rule accepted, and all samples that were made.
        load_seconds: duration of loading all models.
        device: the device that was measured on.
    """

    seconds_per_sample: tuple[float, ...]
    bytes_per_sample: tuple[float, ...]
    num_accepted: tuple[int, ...]
    num_attempted: tuple[int, ...]
    load_seconds: float
    device: str


def measure(job: JobSpec, plan: Plan) -> Measurement:
    """Load the models of a job and measure a batch of every request, after one batch of warm-up.

    Raises:
        JobError: a model cannot be loaded, the hardware lacks what `runtime` asks for, or all samples of a batch fail.
    """
    from engine.generation.generator import Generator
    from engine.models.library_logging import quiet_libraries

    quiet_libraries()
    fix_threads(choose_hardware(job.runtime))
    started = time.monotonic()
    generator = Generator(job, plan)
    load_seconds = time.monotonic() - started
    timings: list[_Timing] = []
    for request in plan.requests:
        started = time.monotonic()
        generator.prepare(request.number)
        load_seconds += time.monotonic() - started
        if not timings:
            # The first batch is the warm-up.
            _measure_request(generator, request)
        timings.append(_measure_request(generator, request))
    return Measurement(
        seconds_per_sample=tuple(timing.seconds for timing in timings),
        bytes_per_sample=tuple(timing.num_bytes for timing in timings),
        num_accepted=tuple(timing.num_accepted for timing in timings),
        num_attempted=tuple(timing.num_attempted for timing in timings),
        load_seconds=load_seconds,
        device=generator.device_name,
    )


class _Timing(NamedTuple):
    """A measured batch; seconds and bytes are per sample."""

    seconds: float
    num_bytes: float
    num_accepted: int
    num_attempted: int


def _measure_request(generator: Generator, request: RequestPlan) -> _Timing:
    specs = [request.sample(position) for position in range(min(request.total, MAX_BATCH))]
    started = time.monotonic()
    results = generator.next_batch(request.number, specs)
    seconds = time.monotonic() - started
    num = len(results)
    if all(result.record["status"] == STATUS_FAILED for result in results):
        raise JobError(
            f"{request.where}: all {num} samples of the measured batch failed, so a run would make none:"
            f" {results[0].record['error_message']}"
        )
    num_accepted = sum(bool(result.record["accepted"]) for result in results)
    return _Timing(seconds / num, sum(map(_num_bytes, results)) / num, num_accepted, num)


def _num_bytes(result: SampleResult) -> int:
    """Bytes of the images that are stored of a sample."""
    return len(result.image) + sum(len(companion.image()) for companion in result.companions.values())

"""Cost of a job from a measured batch of every request, on the machine at hand."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.plan import Plan
from engine.spec import JobSpec

if TYPE_CHECKING:
    from engine.generator import Generator


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What was measured.

    Attributes:
        seconds_per_sample: of each request, sampling and scoring, by its number.
        bytes_per_sample: of each request, encoded images.
        load_seconds: loading all models.
        device: what it ran on.
    """

    seconds_per_sample: tuple[float, ...]
    bytes_per_sample: tuple[float, ...]
    load_seconds: float
    device: str


def measure(job: JobSpec, plan: Plan) -> Measurement:
    """Load the models of a job and time a batch of every request, after one batch to warm up.

    Raises:
        JobError: a model cannot be loaded or the hardware lacks what `runtime` asks for.
    """
    from engine.generator import Generator
    from engine.worker import quiet_libraries

    quiet_libraries()
    started = time.monotonic()
    generator = Generator(job, plan)
    load_seconds = time.monotonic() - started
    first = plan.requests[0]
    generator.next_batch(0, [first.sample(position) for position in range(min(first.total, 512))])
    timings = [_measure_request(generator, plan, request.number) for request in plan.requests]
    return Measurement(
        seconds_per_sample=tuple(seconds for seconds, _ in timings),
        bytes_per_sample=tuple(size for _, size in timings),
        load_seconds=load_seconds,
        device=generator.device_name,
    )


def _measure_request(generator: Generator, plan: Plan, number: int) -> tuple[float, float]:
    request = plan.requests[number]
    specs = [request.sample(position) for position in range(min(request.total, 512))]
    started = time.monotonic()
    results = generator.next_batch(number, specs)
    seconds = time.monotonic() - started
    sizes = [len(result.image) for result in results]
    return seconds / len(results), sum(sizes) / len(sizes)

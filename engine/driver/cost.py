"""What a job will cost: bytes from the models' configurations, time and money from a measured batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.job.plan import Plan, RequestPlan
from engine.job.spec import JobSpec
from engine.models.addresses import locate
from engine.models.configurations import read_config

if TYPE_CHECKING:
    from engine.generation.calibrate import Measurement

# Bytes a pixel of a photograph-like image, and bytes a sample of tar headers, metadata and parquet.
BYTES_PER_PIXEL = {"png": 1.7, "webp": 1.2, "jpg": 0.4}
BYTES_PER_RECORD = 4500
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCost:
    """A request in numbers.

    Attributes:
        num_samples: attempts: with quotas those that the measured yield asks for, up to the limit; without a
            measurement as many as are wanted, the fewest there can be.
        num_accepted: accepted samples that come of them, None where the yield is not known.
        measured: accepted samples and attempts of the measured batch, None without one.
        num_bytes: of its shards; None where the model's configuration is not on this machine.
        seconds: of one device; None without a measurement.
    """

    name: str
    num_samples: int
    num_shards: int
    num_bytes: int | None
    seconds: float | None
    num_accepted: int | None = None
    measured: tuple[int, int] | None = None

    @property
    def hours_per_accepted(self) -> float | None:
        """Hours of one device for each accepted sample, if measured."""
        if self.seconds is None or not self.num_accepted:
            return None
        return self.seconds / self.num_accepted / SECONDS_PER_HOUR


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A job in numbers.

    Attributes:
        load_seconds: to load the models, once for each worker.
        device: what was measured on; empty without a measurement.
    """

    requests: tuple[RequestCost, ...]
    load_seconds: float = 0.0
    device: str = ""

    @property
    def num_samples(self) -> int:
        """Samples of all requests."""
        return sum(request.num_samples for request in self.requests)

    @property
    def num_shards(self) -> int:
        """Shards of all requests."""
        return sum(request.num_shards for request in self.requests)

    @property
    def num_bytes(self) -> int | None:
        """Bytes of all requests, if known."""
        sizes = [request.num_bytes for request in self.requests if request.num_bytes is not None]
        return sum(sizes) if len(sizes) == len(self.requests) else None

    @property
    def device_hours(self) -> float | None:
        """Hours of one device, with one loading of the models, if measured."""
        if not self.device:
            return None
        return (self.load_seconds + sum(request.seconds or 0.0 for request in self.requests)) / SECONDS_PER_HOUR


def job_cost(job: JobSpec, plan: Plan, measurement: Measurement | None = None) -> Cost:
    """The cost of a plan, with time only where a batch was measured."""
    return Cost(
        requests=tuple(_request_cost(job, plan, request, measurement) for request in plan.requests),
        load_seconds=measurement.load_seconds if measurement else 0.0,
        device=measurement.device if measurement else "",
    )


def _request_cost(job: JobSpec, plan: Plan, request: RequestPlan, measurement: Measurement | None) -> RequestCost:
    image_bytes = measurement.bytes_per_sample[request.number] if measurement else image_size(job, request)
    measured = None
    if measurement:
        measured = (measurement.num_accepted[request.number], measurement.num_attempted[request.number])
    num_samples = _num_attempts(request, measured)
    return RequestCost(
        name=request.spec.name,
        num_samples=num_samples,
        num_shards=_num_shards(plan, request, num_samples, job.output.samples_per_shard),
        num_bytes=None if image_bytes is None else round(num_samples * (image_bytes + BYTES_PER_RECORD)),
        seconds=measurement.seconds_per_sample[request.number] * num_samples if measurement else None,
        num_accepted=None if measured is None else round(num_samples * measured[0] / measured[1]),
        measured=measured if request.spec.accept else None,
    )


def _num_attempts(request: RequestPlan, measured: tuple[int, int] | None) -> int:
    """Attempts that a request takes, as far as is known."""
    if not request.spec.has_quota or measured is None:
        return request.total
    accepted, attempted = measured
    return min(request.limit, -(-request.total * attempted // accepted)) if accepted else request.limit


def _num_shards(plan: Plan, request: RequestPlan, num_samples: int, samples_per_shard: int) -> int:
    """Shards that are planned, and with quotas those that are to be expected."""
    planned = [extent for extent in plan.extents if extent.request == request.number]
    more = num_samples - sum(extent.stop - extent.start for extent in planned)
    return sum(extent.num_shards for extent in planned) + max(0, -(-more // samples_per_shard))


def image_size(job: JobSpec, request: RequestPlan) -> float | None:
    """Estimated bytes of an image, from the size that the diffusion model makes; None if it is not on this machine."""
    folder = locate(request.spec.diffusion or job.models.diffusion).folder
    if folder is None:
        return None
    latent = read_config(folder / "unet" / "config.json").get("sample_size")
    levels = read_config(folder / "vae" / "config.json").get("block_out_channels")
    if not isinstance(latent, int) or not isinstance(levels, list):
        return None
    return (latent * 2 ** (len(levels) - 1)) ** 2 * BYTES_PER_PIXEL[job.output.image_format]

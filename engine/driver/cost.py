"""Estimated cost of a job: bytes from the models' configurations, time from a measured batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.data.run.companions import companions_of
from engine.job.plan import Plan, RequestPlan
from engine.job.spec import JobSpec, RequestSpec
from engine.models.addresses import locate
from engine.models.pipelines.lookup import request_image_size
from engine.models.pipelines.parts import has_configurations

if TYPE_CHECKING:
    from engine.generation.calibrate import Measurement

# Bytes per pixel of a photographic image; bytes per sample of tar headers, metadata and parquet.
BYTES_PER_PIXEL = {"png": 1.7, "webp": 1.2, "jpg": 0.4}
BYTES_PER_RECORD = 4500
SECONDS_PER_HOUR = 3600.0
# From here on the gradient of a decoder can cost more than all steps of the network.
LARGE_IMAGE_PIXELS = 256 * 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCost:
    """Estimated cost of a request.

    Attributes:
        num_samples: attempts: with quotas, as many as the measured yield requires, up to the limit; without a
            measurement, the number of samples wanted, which is the minimum.
        num_accepted: accepted samples among them; None if the yield is unknown.
        measured: accepted samples and attempts of the measured batch; None without a measurement or an accept rule.
        num_bytes: size of its shards; None if the model's configuration is not on this machine.
        seconds: time on one device; None without a measurement.
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
        """Device-hours per accepted sample; None without a measurement."""
        if self.seconds is None or not self.num_accepted:
            return None
        return self.seconds / self.num_accepted / SECONDS_PER_HOUR


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Estimated cost of a job.

    Attributes:
        load_seconds: duration of loading the models, once for each worker.
        device: the device that was measured on; empty without a measurement.
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
        """Bytes of all requests; None if unknown for one."""
        sizes = [request.num_bytes for request in self.requests if request.num_bytes is not None]
        return sum(sizes) if len(sizes) == len(self.requests) else None

    @property
    def device_hours(self) -> float | None:
        """Hours on one device, including loading the models once; None without a measurement."""
        if not self.device:
            return None
        return (self.load_seconds + sum(request.seconds or 0.0 for request in self.requests)) / SECONDS_PER_HOUR


def job_cost(job: JobSpec, plan: Plan, measurement: Measurement | None = None) -> Cost:
    """The estimated cost of a plan; times only with a measurement."""
    return Cost(
        requests=tuple(_request_cost(job, plan, request, measurement) for request in plan.requests),
        load_seconds=measurement.load_seconds if measurement else 0.0,
        device=measurement.device if measurement else "",
    )


def _request_cost(job: JobSpec, plan: Plan, request: RequestPlan, measurement: Measurement | None) -> RequestCost:
    image_bytes = measurement.bytes_per_sample[request.number] if measurement else stored_size(job, request)
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
    """Expected number of attempts of a request."""
    if not request.spec.has_quota or measured is None:
        return request.total
    accepted, attempted = measured
    return min(request.limit, -(-request.total * attempted // accepted)) if accepted else request.limit


def _num_shards(plan: Plan, request: RequestPlan, num_samples: int, samples_per_shard: int) -> int:
    """Planned shards, and with quotas also the expected ones."""
    planned = [extent for extent in plan.extents if extent.request == request.number]
    num_unplanned = num_samples - sum(extent.stop - extent.start for extent in planned)
    return sum(extent.num_shards for extent in planned) + max(0, -(-num_unplanned // samples_per_shard))


def image_size(job: JobSpec, request: RequestPlan) -> float | None:
    """Estimated bytes of an image, from the diffusion model's image size; None if the model is not on this machine."""
    num_pixels = _num_pixels(job, request.spec)
    return None if num_pixels is None else num_pixels * BYTES_PER_PIXEL[job.output.image_format]


def stored_size(job: JobSpec, request: RequestPlan) -> float | None:
    """As `image_size`, of all images that are stored of a sample: its own, the start and the twin."""
    one = image_size(job, request)
    return None if one is None else one * (1 + len(companions_of(request.spec)))


def _num_pixels(job: JobSpec, request: RequestSpec) -> int | None:
    """Pixels of an image; None if the model is not on this machine."""
    address = request.diffusion or job.models.diffusion
    folder = locate(address).folder
    if folder is None or not has_configurations(folder):
        return None
    height, width = request_image_size(job, request, folder, address)
    return height * width


def guides_through_large_decoder(job: JobSpec) -> bool:
    """Whether guidance differentiates the own decoder of a pipeline with large images, as far as it is here."""
    if job.models.guidance_decoder:
        return False
    guided = [request for request in job.requests if request.method_record.is_guided]
    return any((_num_pixels(job, request) or 0) >= LARGE_IMAGE_PIXELS for request in guided)

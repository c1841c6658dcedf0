"""The metrics of a run: what they are, and their values at a moment. Pure; an executor that can publishes them.

Names follow Prometheus's conventions, with base units. Counts are of the whole run, also of what earlier drivers
committed. They are gauges all the same, whose values are set: Ray's counters take what is added since, and count it
twice now and then where a process joins one cluster after another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from engine.driver.progress import RequestTally
from engine.driver.workers import RateValues, WorkerRow, count_states

GAUGE, HISTOGRAM = "gauge", "histogram"
# Values of a label; what is beyond is counted together, as `OTHER`.
MAX_REQUESTS = 100
MAX_KINDS = 20
# Quotas of classes; of more of them each request has one value, that of the class `ALL`.
MAX_QUOTAS = 200
# Workers with values of their own.
MAX_WORKERS = 200
MAX_LABEL_CHARS = 64
OTHER, ALL = "other", "all"
_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    Attributes:
        name: without the prefix of whoever exports it.
        kind: `GAUGE` or `HISTOGRAM`.
        labels: besides `run`.
        bounds: of a histogram's buckets.
    """

    name: str
    kind: str
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


class Reading(NamedTuple):
    """A value of a metric; of a histogram one observation.

    Attributes:
        labels: values of `Metric.labels`, in their order.
    """

    metric: str
    value: float
    labels: tuple[str, ...] = ()


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("riskforge_samples", GAUGE, "Samples in committed shards.", ("request", "status")),
        Metric("riskforge_accepted_samples", GAUGE, "Accepted samples in committed shards.", ("request",)),
        Metric(
            "riskforge_failed_samples",
            GAUGE,
            "Failed samples by the model output or exception at fault; 'earlier' are those of earlier drivers.",
            ("kind",),
        ),
        Metric("riskforge_worker_faults", GAUGE, "Workers that were lost or replaced.", ("kind",)),
        Metric("riskforge_planned_samples", GAUGE, "Samples in planned shards.", ("request",)),
        Metric("riskforge_quota_missing_samples", GAUGE, "Accepted samples that a quota lacks.", ("request", "class")),
        Metric("riskforge_samples_per_second", GAUGE, "Samples in the last minute, of any status."),
        Metric("riskforge_accepted_samples_per_second", GAUGE, "Accepted samples in the last ten minutes."),
        Metric("riskforge_sampling_time_ratio", GAUGE, "Share of the workers' time spent sampling and scoring."),
        Metric("riskforge_remaining_seconds", GAUGE, "Time left for the planned shards at the rate of now."),
        Metric("riskforge_shards", GAUGE, "Shards of the plan by state.", ("state",)),
        Metric("riskforge_workers", GAUGE, "Workers by state.", ("state",)),
        Metric("riskforge_batch_size_samples", GAUGE, "Samples of a worker's last batch.", ("machine", "worker")),
        Metric(
            "riskforge_gpu_memory_allocated_bytes",
            GAUGE,
            "Memory of its GPU that a worker holds.",
            ("machine", "worker"),
        ),
        Metric(
            "riskforge_gpu_memory_peak_bytes", GAUGE, "The most that a worker held of its GPU.", ("machine", "worker")
        ),
        Metric("riskforge_gpu_memory_total_bytes", GAUGE, "Memory of a worker's GPU.", ("machine", "worker")),
        Metric("riskforge_batch_duration_seconds", HISTOGRAM, "Time of a batch.", ("request",), _SECONDS),
        Metric(
            "riskforge_shard_duration_seconds",
            HISTOGRAM,
            "Time of a shard from its start to its commit.",
            ("request",),
            _SECONDS,
        ),
    )
}


@runtime_checkable
class MetricsPublisher(Protocol):
    """An executor that can publish metrics."""

    def serve_metrics(self, port: int) -> None:
        """Export them at a port of this machine; before workers are started."""
        ...

    def publish_metrics(self, run: str, readings: list[Reading]) -> None:
        """Publish the values of now: each replaces the one before, an observation of a histogram is added.

        Args:
            run: value of the label `run`.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What the values of all metrics but histograms are computed from.

    Attributes:
        requests: in the order of the plan.
        failures: failed samples of this driver by kind.
        num_earlier_failures: those of earlier drivers.
        missing: what quotas lack: number of the request, class, number.
        shards: by state.
        remaining_seconds: None if unknown.
    """

    requests: list[RequestTally]
    workers: Iterable[WorkerRow]
    failures: Mapping[str, int]
    num_earlier_failures: int
    worker_faults: Mapping[str, int]
    missing: list[tuple[int, str, int]] = field(default_factory=list)
    rates: RateValues = field(default_factory=RateValues)
    sampling_share: float | None = None
    shards: Mapping[str, int] = field(default_factory=dict)
    remaining_seconds: float | None = None


def run_readings(facts: RunFacts) -> list[Reading]:
    """The value of every metric that has one, histograms apart; at most some hundreds."""
    return [
        *_request_readings(facts),
        *_fault_readings(facts),
        *_optional("riskforge_samples_per_second", facts.rates.now),
        *_optional("riskforge_accepted_samples_per_second", facts.rates.accepted),
        *_optional("riskforge_sampling_time_ratio", facts.sampling_share),
        *_optional("riskforge_remaining_seconds", facts.remaining_seconds),
        *(Reading("riskforge_shards", number, (state,)) for state, number in facts.shards.items()),
        *(Reading("riskforge_workers", number, (state,)) for state, number in count_states(facts.workers).items()),
        *_worker_readings(facts.workers),
    ]


def request_label(number: int, name: str) -> str:
    """The value of the label `request`: the name of one of the first requests."""
    return label_text(name) if number < MAX_REQUESTS else OTHER


def label_text(text: str) -> str:
    """A label's value from a text of the user."""
    return text[:MAX_LABEL_CHARS]


def _optional(name: str, value: float | None) -> Iterator[Reading]:
    if value is not None:
        yield Reading(name, value)


def _request_readings(facts: RunFacts) -> list[Reading]:
    sums: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for number, row in enumerate(facts.requests):
        label = request_label(number, row.name)
        statuses = {"rejected": row.rejected, "failed": row.failed}
        statuses["ok"] = row.committed - sum(statuses.values())
        for status, count in statuses.items():
            sums["riskforge_samples", (label, status)] += count
        sums["riskforge_accepted_samples", (label,)] += row.accepted
        sums["riskforge_planned_samples", (label,)] += row.total
    for number, name, missing in facts.missing:
        label = request_label(number, facts.requests[number].name)
        sums["riskforge_quota_missing_samples", (label, label_text(name))] += missing
    return [Reading(name, value, labels) for (name, labels), value in sums.items()]


def _fault_readings(facts: RunFacts) -> Iterator[Reading]:
    kinds = Counter({"earlier": facts.num_earlier_failures})
    for place, (kind, number) in enumerate(facts.failures.items()):
        kinds[label_text(kind) if place < MAX_KINDS else OTHER] += number
    for kind, number in kinds.items():
        yield Reading("riskforge_failed_samples", number, (kind,))
    for kind, number in facts.worker_faults.items():
        yield Reading("riskforge_worker_faults", number, (kind,))


def _worker_readings(workers: Iterable[WorkerRow]) -> Iterator[Reading]:
    measured = [row for row in workers if row.usage is not None]
    for row in measured[:MAX_WORKERS]:
        labels, usage = (label_text(row.machine), str(row.number)), row.usage
        assert usage is not None
        yield Reading("riskforge_batch_size_samples", usage.size, labels)
        if usage.total_bytes:
            yield Reading("riskforge_gpu_memory_allocated_bytes", usage.allocated_bytes, labels)
            yield Reading("riskforge_gpu_memory_peak_bytes", usage.peak_bytes, labels)
            yield Reading("riskforge_gpu_memory_total_bytes", usage.total_bytes, labels)

"""Metrics through Ray: its agent on the driver's machine exports them to Prometheus, with the prefix `ray_`.

Without the packages of `ray[default]` there is no agent, and nothing is exported.
"""

from __future__ import annotations

import importlib.util
import socket
from typing import Any

from engine.driver.metrics import HISTOGRAM, METRICS, Metric, Reading
from engine.errors import JobError

# Those of `ray[default]` that Ray's agent needs to export anything.
PACKAGES = ("aiohttp", "aiohttp_cors", "opencensus", "opentelemetry", "prometheus_client")


class RayMetrics:
    """The metrics of the driver's process, made when they first have a value."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}

    def publish(self, run: str, readings: list[Reading]) -> None:
        """Publish values, as `MetricsPublisher.publish_metrics`."""
        for reading in readings:
            definition = METRICS[reading.metric]
            metric = self._metrics.get(reading.metric)
            if metric is None:
                metric = self._metrics[reading.metric] = _make(definition)
            tags = dict(zip(("run", *definition.labels), (run, *reading.labels), strict=True))
            if definition.kind == HISTOGRAM:
                metric.observe(reading.value, tags)
            else:
                metric.set(reading.value, tags)


def _make(definition: Metric) -> Any:
    from ray.util import metrics

    tag_keys = ("run", *definition.labels)
    if definition.kind == HISTOGRAM:
        return metrics.Histogram(definition.name, definition.text, list(definition.bounds), tag_keys)
    return metrics.Gauge(definition.name, definition.text, tag_keys)


def check_packages() -> None:
    """Refuse an export that Ray would leave out without a word.

    Raises:
        JobError: packages are missing.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise JobError(
            f"--metrics-port: Ray exports metrics with packages that are not installed ({', '.join(missing)}): run"
            " `pip install 'riskforge[cluster]'`, or omit it"
        )


def check_port(port: int) -> None:
    """Refuse a port that Ray's agent would not get, which it only writes into its log.

    Raises:
        JobError: it is in use, or not for this user.
    """
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise JobError(f"--metrics-port: port {port} cannot be opened ({error.strerror}); choose another") from error

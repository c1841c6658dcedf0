"""Metrics of a run: their names, their values, and how many there may be; the dashboard that shows them."""

from __future__ import annotations

import json
import re
import socket
from collections import Counter

import grafana_dashboard
import pytest

from engine.driver.metrics import (
    ALL,
    HISTOGRAM,
    MAX_KINDS,
    MAX_REQUESTS,
    MAX_WORKERS,
    METRICS,
    OTHER,
    RunFacts,
    request_label,
    run_readings,
)
from engine.driver.progress import RequestTally
from engine.driver.workers import WorkerRow
from engine.generation.usage import BatchUsage, failure_kind
from tests.conftest import REPOSITORY

UNITS = ("_seconds", "_bytes", "_ratio", "_samples", "_per_second")
# Things that are counted have no unit.
COUNTED = ("riskforge_shards", "riskforge_workers", "riskforge_worker_faults")


def test_names_follow_the_conventions_of_prometheus() -> None:
    """A prefix, base units, no `_total` or `_count` on what is no counter, labels that can be written."""
    for name, metric in METRICS.items():
        assert re.fullmatch(r"riskforge(_[a-z]+)+", name) and (name.endswith(UNITS) or name in COUNTED), name
        assert not name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert metric.text.endswith(".") and "run" not in metric.labels
        assert all(re.fullmatch(r"[a-z]+", label) for label in metric.labels)
        assert (metric.kind == HISTOGRAM) == bool(metric.bounds)
        assert list(metric.bounds) == sorted(set(metric.bounds))


def facts(num_requests: int = 1, num_workers: int = 0, **changes: object) -> RunFacts:
    """A run of requests with ten samples each: seven are there, of which one failed and two were rejected."""
    requests = [
        RequestTally(f"request {number}", total=10, committed=7, accepted=4, rejected=2, failed=1)
        for number in range(num_requests)
    ]
    usage = BatchUsage(8, 2, 3, 4)
    workers = [WorkerRow(number, 0.0, "host", usage=usage) for number in range(num_workers)]
    return RunFacts(
        **{
            "requests": requests,
            "workers": workers,
            "failures": {},
            "num_earlier_failures": 0,
            "worker_faults": {},
        }
        | changes  # type: ignore[arg-type]
    )


def test_many_requests_kinds_and_workers_have_few_series() -> None:
    """What is beyond the limits is counted together, and no sample is lost; further workers have no values."""
    kinds = {f"Error{number}": 1 for number in range(50)}
    missing = [(number, ALL, 3) for number in range(10_000)]
    readings = run_readings(facts(10_000, 1_000, failures=kinds, missing=missing))
    assert len({(reading.metric, reading.labels) for reading in readings}) == len(readings) < 2000
    sums: Counter[str] = Counter()
    for reading in readings:
        sums[reading.metric] += int(reading.value)
        assert len(reading.labels) == len(METRICS[reading.metric].labels)
    assert sums["riskforge_samples"] == 70_000 and sums["riskforge_accepted_samples"] == 40_000
    assert sums["riskforge_planned_samples"] == 100_000 and sums["riskforge_quota_missing_samples"] == 30_000
    assert sums["riskforge_failed_samples"] == 50
    [others] = [r.value for r in readings if r.metric == "riskforge_samples" and r.labels == (OTHER, "ok")]
    assert others == 4 * (10_000 - MAX_REQUESTS)
    assert sum(reading.metric == "riskforge_failed_samples" for reading in readings) == MAX_KINDS + 2
    assert sum(reading.metric == "riskforge_batch_size_samples" for reading in readings) == MAX_WORKERS
    assert request_label(MAX_REQUESTS, "name") == OTHER and len(request_label(0, "n" * 500)) == 64


def test_what_is_unknown_has_no_value() -> None:
    """A GPU that is not there, a rate that nothing was measured for; zero would be a lie."""
    workers = [WorkerRow(0, 0.0, "host", usage=BatchUsage(8)), WorkerRow(1, 0.0)]
    names = {reading.metric for reading in run_readings(facts(workers=workers))}
    assert "riskforge_batch_size_samples" in names
    assert not any("gpu" in name or name.endswith(("_per_second", "_ratio", "_remaining_seconds")) for name in names)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("target 'zoo:t' gives logits that are not finite, or too large for a softmax in float32", "not_finite"),
        ("oracle 'a: b' gives an image embedding that is not finite or has no direction", "not_finite"),
        ("ValueError: target: no", "ValueError"),
        ("KeyError: ", "KeyError"),
        ("something else", "other"),
        ("", "other"),
    ],
)
def test_failed_samples_have_few_kinds(message: str, kind: str) -> None:
    """The class of an exception, without its text."""
    assert failure_kind(message) == kind


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    """Each expression names metrics as Ray exports them; the file is what its program writes."""
    assert grafana_dashboard.main(["--check"]) == 0, "run `python tools/grafana_dashboard.py`"
    document = json.loads((REPOSITORY / "tools/grafana_dashboard.json").read_text(encoding="utf-8"))
    shown = set()
    for panel in document["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"\bray_(riskforge_\w+)", target["expr"])
            assert names and target["expr"].count("(") == target["expr"].count(")"), target
            shown |= {name.removesuffix("_bucket") for name in names}
    assert shown == METRICS.keys()
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in document["panels"]]
    assert len(set(places)) == len(places) and len({panel["id"] for panel in document["panels"]}) == len(places)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--executor", "local"], "--executor local exports no metrics"),
        (["--address", "127.0.0.1:1"], "`ray start --metrics-export-port`"),
        ([], "in use"),
    ],
)
def test_a_port_that_exports_nothing_is_refused(call, tmp_path, options: list[str], reason: str) -> None:
    """Before anything is started; Ray would write it into a log."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, error = call(
            "run", "jobs/quickstart.yaml", "--output", str(tmp_path / "run"), "--metrics-port", port, *options
        )
    assert code == 2 and error.startswith("error: --metrics-port: ") and reason in error
    assert not (tmp_path / "run").exists()

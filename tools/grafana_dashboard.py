"""Writes the Grafana dashboard of runs: `python tools/grafana_dashboard.py`; `--check` compares only.

Its expressions name metrics by the table in `engine.driver.metrics`, as Ray exports them. Ray adds a label for the
process: `max by` leaves it out, so that a driver that took over does not count twice.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from engine.driver.metrics import METRICS

PATH = Path(__file__).with_name("grafana_dashboard.json")
PREFIX = "ray_"
WIDTH, HEIGHT = 8, 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def query(metric: str, *labels: str, suffix: str = "") -> str:
    """The values of a metric of the chosen runs, by run and labels."""
    by = ", ".join(("run", *labels))
    assert metric in METRICS, metric
    assert set(labels) <= {*METRICS[metric].labels}, (metric, labels)
    return f'max by ({by}) ({PREFIX}{metric}{suffix}{{run=~"$run"}})'


def quantile(metric: str, share: float) -> str:
    """A quantile of a histogram over the last five minutes, by run and request."""
    assert metric in METRICS, metric
    rates = f'sum by (le, run, request) (rate({PREFIX}{metric}_bucket{{run=~"$run"}}[5m]))'
    return f"histogram_quantile({share}, {rates})"


def panel(title: str, *queries: tuple[str, str], unit: str = "short", kind: str = "timeseries") -> dict[str, Any]:
    """A panel.

    Args:
        queries: expressions with their legends.
        unit: as Grafana names it.
    """
    targets = [
        {"refId": chr(ord("A") + place), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
        for place, (expression, legend) in enumerate(queries)
    ]
    return {
        "title": title,
        "type": kind,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}} if kind == "timeseries" else {},
        "targets": targets,
    }


def panels() -> list[dict[str, Any]]:
    """All panels, in rows of three."""
    memory = [
        (query(f"riskforge_gpu_memory_{what}_bytes", "machine", "worker"), f"{what}, {{{{machine}}}} {{{{worker}}}}")
        for what in ("allocated", "peak", "total")
    ]
    made = query("riskforge_samples", "request", "status")
    planned = query("riskforge_planned_samples", "request")
    listed = [
        panel("Time left", (query("riskforge_remaining_seconds"), "{{run}}"), unit="s", kind="stat"),
        panel(
            "Done",
            (f"sum by (run) ({made}) / sum by (run) ({planned})", "{{run}}"),
            unit="percentunit",
            kind="stat",
        ),
        panel(
            "Time spent sampling and scoring",
            (query("riskforge_sampling_time_ratio"), "{{run}}"),
            unit="percentunit",
            kind="stat",
        ),
        panel(
            "Samples per second",
            (query("riskforge_samples_per_second"), "{{run}}"),
            (query("riskforge_accepted_samples_per_second"), "accepted, {{run}}"),
        ),
        panel("Samples by status", (made, "{{request}} {{status}}")),
        panel("Accepted samples", (query("riskforge_accepted_samples", "request"), "{{request}}")),
        panel(
            "Missing for quotas",
            (query("riskforge_quota_missing_samples", "request", "class"), "{{request}} {{class}}"),
        ),
        panel("Failed samples by kind", (query("riskforge_failed_samples", "kind"), "{{kind}}")),
        panel("Workers by state", (query("riskforge_workers", "state"), "{{state}}")),
        panel("Workers lost or replaced", (query("riskforge_worker_faults", "kind"), "{{kind}}")),
        panel("Shards by state", (query("riskforge_shards", "state"), "{{state}}")),
        panel(
            "Batch size",
            (query("riskforge_batch_size_samples", "machine", "worker"), "{{machine}} {{worker}}"),
        ),
        panel("GPU memory of workers", *memory, unit="bytes"),
        panel(
            "Time of a batch",
            (quantile("riskforge_batch_duration_seconds", 0.5), "median, {{request}}"),
            (quantile("riskforge_batch_duration_seconds", 0.95), "95 %, {{request}}"),
            unit="s",
        ),
        panel(
            "Time of a shard",
            (quantile("riskforge_shard_duration_seconds", 0.5), "median, {{request}}"),
            (quantile("riskforge_shard_duration_seconds", 0.95), "95 %, {{request}}"),
            unit="s",
        ),
    ]
    places = [(place % 3 * WIDTH, place // 3 * HEIGHT) for place in range(len(listed))]
    return [
        {"id": number, "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT}} | one
        for number, ((x, y), one) in enumerate(zip(places, listed, strict=True), start=1)
    ]


def dashboard() -> dict[str, Any]:
    """The document that Grafana imports."""
    runs = f"label_values({PREFIX}riskforge_workers, run)"
    return {
        "title": "Riskforge",
        "uid": "riskforge",
        "tags": ["riskforge"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                {
                    "name": "run",
                    "label": "Run",
                    "type": "query",
                    "datasource": SOURCE,
                    "definition": runs,
                    "query": {"query": runs, "refId": "runs"},
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                    "sort": 1,
                },
            ]
        },
        "panels": panels(),
    }


def main(arguments: list[str]) -> int:
    """Write the file, or compare it."""
    text = json.dumps(dashboard(), indent=1) + "\n"
    if "--check" not in arguments:
        PATH.write_text(text, encoding="utf-8")
    return int(PATH.read_text(encoding="utf-8") != text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

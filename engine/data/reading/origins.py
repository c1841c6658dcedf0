"""The runs that samples come from, through merged data sets too: their jobs, models and counts, for card and manifest.

Anybody may have written a manifest: what is not of its kind is left out, and a job that cannot be read is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from engine.data.run.stored_plan import StoredRun
from engine.errors import JobError
from engine.job.parsing import parse_job
from engine.job.spec import JobSpec

ORIGINS = "origins"
# Of a data set, at most.
MAX_ORIGINS = 1000
# What the card says of each request.
_COUNTS = ("requests", "quotas", "screening", "guidance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A run that samples come from.

    Attributes:
        models: by role, as in its manifest.
        job: as plain data; empty where it is not known.
        counts: those of its requests, as in its manifest.
    """

    uri: str
    name: str
    plan_digest: str
    models: dict[str, Any]
    job: dict[str, Any]
    counts: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """For a manifest."""
        return {name: getattr(self, name) for name in self.__slots__}

    def parsed_job(self) -> JobSpec | None:
        """Its job, or None where it is not known or of no version that is read."""
        if not self.job:
            return None
        # A rescored run's, or one of an earlier version: the output is not needed.
        with suppress(JobError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return parse_job(self.job | {"output": {"uri": "unknown"}})
        return None


def origin_of(uri: str, manifest: dict[str, Any], stored: StoredRun | None) -> Origin:
    """A run by its manifest, or by its plan files where it has none yet."""
    known: dict[str, Any] = {"uri": uri}
    if stored is not None:
        known |= {"name": str(stored.job["name"]), "plan_digest": stored.digest, "job": stored.job}
    return _origin(known | manifest | {"uri": uri})


def origins_of(manifest: dict[str, Any]) -> tuple[Origin, ...]:
    """The runs that a merged data set was made of; of one of an earlier version without their jobs."""
    listed = manifest.get(ORIGINS) or manifest.get("sources")
    entries = listed if isinstance(listed, list) else []
    return distinct(_origin(entry) for entry in entries[:MAX_ORIGINS] if isinstance(entry, dict))


def distinct(origins: Iterable[Origin]) -> tuple[Origin, ...]:
    """Each run once: the same plan and the same models are the same run, wherever it lies."""
    known: dict[str, Origin] = {}
    for origin in origins:
        known.setdefault(repr((origin.plan_digest or origin.uri, origin.name, origin.models)), origin)
    return tuple(known.values())[:MAX_ORIGINS]


def total_counts(origins: Sequence[Origin]) -> dict[str, Any]:
    """The counts of runs of one job together.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: they are such as no run writes.
    """
    if len(origins) == 1:
        return origins[0].counts
    total: dict[str, Any] = {name: {} for name in _COUNTS}
    for origin in origins:
        for name in ("requests", "guidance"):
            for request, counts in origin.counts[name].items():
                total[name].setdefault(request, Counter()).update(counts)
        for request, rows in origin.counts["screening"].items():
            total["screening"].setdefault(request, []).extend(rows)
        for request, rows in origin.counts["quotas"].items():
            missing = total["quotas"].setdefault(request, {})
            for row in rows:
                entry = missing.setdefault(row["class"], {"class": row["class"], "missing": 0})
                entry["missing"] += row["missing"]
    total["quotas"] = {request: list(rows.values()) for request, rows in total["quotas"].items()}
    return total


def _origin(raw: dict[str, Any]) -> Origin:
    counts = _mapping(raw.get("counts"))
    return Origin(
        uri=str(raw.get("uri", "")),
        name=str(raw.get("name", "")),
        plan_digest=str(raw.get("plan_digest", "")),
        models={role: model for role, model in _mapping(raw.get("models")).items() if isinstance(model, dict | list)},
        job=_mapping(raw.get("job")),
        counts={name: _mapping(counts.get(name)) for name in _COUNTS},
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

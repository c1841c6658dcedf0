"""The job of a row of the matrix: the study's job against other classifiers, or against none."""

from __future__ import annotations

from typing import Any

from engine.errors import JobError
from engine.job.parsing import parse_job
from engine.job.spec import JobSpec
from engine.studies.transfer.rows import Design, Row

_ENSEMBLE = "ensemble"
PROMPT = "prompt"


def row_job(job: JobSpec, design: Design, row: Row, count: int) -> JobSpec:
    """The job of a row: its members are the targets, all other classifiers of the study only score.

    Every guided request is sampled `count` times a class and context, from the noise that it has in all rows, and all
    samples count: a rule of acceptance would choose them by one of the columns. The unguided row has the same requests
    by their prompts alone.

    Raises:
        JobError: the job has no guided request, or is not valid with these classifiers.
    """
    raw = job.model_dump(mode="json")
    guided = [request for request in job.requests if request.method_record.is_guided]
    if not guided:
        raise JobError("requests: none is guided, so that nothing is made against a classifier; give one a method")
    dumped = {request["name"]: request for request in raw["requests"]}
    requests = [_request(dumped[request.name], row, count) for request in guided]
    return parse_job(
        raw
        | {
            "models": _models(job, design, row),
            "requests": requests,
            "guidance": _guidance(raw["guidance"], row),
        }
    )


def left_out_notes(job: JobSpec) -> list[str]:
    """What of a job its rows do not have, in words."""
    guided = [request for request in job.requests if request.method_record.is_guided]
    plain = len(job.requests) - len(guided)
    notes = []
    if plain:
        notes.append(
            f"{plain} unguided request{'s' * (plain > 1)} of the job {'are' if plain > 1 else 'is'} left out; the"
            " unguided row has the guided requests by their prompts alone"
        )
    if any(request.accept for request in guided):
        notes.append("rules of acceptance are left out: all samples count, whatever a classifier says of them")
    if any(request.fresh for request in guided):
        notes.append("`fresh` is left out: all rows have the same noise")
    if job.models.calibration:
        notes.append("models.calibration is left out: each classifier has its own temperature")
    return notes


def _models(job: JobSpec, design: Design, row: Row) -> dict[str, Any]:
    models = job.models
    members = row.members or design.targets[:1]
    first, *further = (design.classifiers[name] for name in members)
    oracles = models.all_oracles if row.members else job.independent_oracles
    transfer = [address for name, address in design.classifiers.items() if name not in members]
    raw = models.model_dump(mode="json") | {
        "target": first,
        "further_targets": further,
        "transfer": transfer,
        "oracle": None,
        "oracles": list(oracles),
        "calibration": None,
        "label_map": {
            address: entries
            for address, entries in design.label_map.items()
            if address in (*further, *transfer, *oracles)
        },
    }
    return raw if row.members else raw | {"guidance_decoder": None}


def _request(raw: dict[str, Any], row: Row, count: int) -> dict[str, Any]:
    kept = {
        **raw,
        "count": count,
        "accept": {},
        "max_attempts": None,
        "twin": False,
        "fresh": False,
        "seed_group": raw.get("seed_group") or raw["name"],
    }
    if not row.members:
        return kept | {"method": PROMPT, "guidance": {}}
    return kept | {"guidance": _guidance(raw["guidance"], row)}


def _guidance(raw: dict[str, Any], row: Row) -> dict[str, Any]:
    """Guidance of a job or a request; how several targets are weighed only where there are some."""
    if not row.members:
        return {}
    return raw if row.is_ensemble else {key: value for key, value in raw.items() if key != _ENSEMBLE}

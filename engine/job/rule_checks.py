"""Checks of `accept` against the rest of a job: names that no sample of it has a value of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.job.acceptance import SCORES, measuring_roles, rule_names, rule_problems
from engine.job.oracles import has_oracle
from engine.job.spec import RequestSpec
from engine.job.spec_messages import Location, Problem

_NO_ESTIMATE = (
    "is not known without an estimate fitted on people's answers; name one in models.validity (`riskforge prepare JOB"
    " --answers FILE` makes it), or use oracle_p_label_min"
)


def accept_problems(request: RequestSpec) -> list[Problem]:
    """What is wrong with the rule of a request, whatever the models of the job."""
    found = [(("accept", name) if name else ("accept",), text) for name, text in rule_problems(request.accept)]
    return found + _absent(request)


def model_problems(request: RequestSpec, models: Any) -> list[Problem]:
    """Names that are measured by a model that the job does not name.

    Args:
        models: of the raw job, which may be wrong in other parts.
    """
    named = models if isinstance(models, dict) else {}
    is_there = {"oracle": has_oracle(models), "judge": bool(named.get("judge"))}
    names = rule_names(request.accept)
    subject = "is of the {role}, and " if isinstance(request.accept, str) else ""
    found = [
        (name, f"{subject.format(role=role)}there is no {role}; name one in models.{role}")
        for name in names
        for role in measuring_roles(name)
        if not is_there.get(role, True)
    ]
    found += [("p_valid", _NO_ESTIMATE)] if "p_valid" in names and not named.get("validity") else []
    return [_placed(request, name, text) for name, text in found]


def _absent(request: RequestSpec) -> list[Problem]:
    """Names of what the samples of a request lack: a start, a twin, screening."""
    is_text = isinstance(request.accept, str)
    effect = "says nothing" if is_text else "no sample would be accepted"
    names = [name for name in rule_names(request.accept) if is_text or name in SCORES]
    return [
        _placed(request, name, f"{effect}, as {reason}")
        for name in names
        for prefix, reason in _lacking(request)
        if name.startswith(prefix)
    ]


def _lacking(request: RequestSpec) -> Iterator[tuple[str, str]]:
    """How the names begin that mean nothing, with reason and remedy."""
    if not request.used_start:
        at_one = " at strength 1" if request.start is not None else ""
        yield "start_", f"there is no start{at_one}; leave it out, or give `start`"
    if not request.twin:
        yield "twin_", "there is no twin; leave it out, or add twin: true"
    if not request.is_screened:
        yield "screened", "nothing screens samples; leave it out, or give an artefact in `conditioning`"


def asked_names(request: RequestSpec) -> list[tuple[Location, str]]:
    """The names that the rule of a request uses, each with its place: the key of a mapping, or the whole of a text."""
    is_text = isinstance(request.accept, str)
    return [(("accept",) if is_text else ("accept", name), name) for name in rule_names(request.accept)]


def _placed(request: RequestSpec, name: str, text: str) -> Problem:
    """A problem of a name at its place."""
    return (("accept",), f"'{name}' {text}") if isinstance(request.accept, str) else (("accept", name), text)

"""The fields of a job that may differ between the cells of a sweep, and which requests use them. No torch.

A field is a dotted path below a request: `guidance.risky.scale`, `sampling.guidance_scale`, `classes`. What the job
has once, such as its target, cannot differ between the requests of a run and is refused with what to do instead.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic
from pydantic import BaseModel

from engine.job.spec import ConditioningSpec, JobSpec, RequestSpec, StartSpec
from engine.job.spec_messages import nearest, shown
from engine.methods.presets import PresetParameters
from engine.methods.registry import METHODS, find_method
from engine.methods.sampling.spec import SamplingSpec

MAX_FIELDS = 10
MAX_VALUES = 400
_MAX_SHOWN_VALUE = 40

# What the sweep decides itself, or what would take the noise apart, with what to do instead.
_REFUSED = {
    "name": "names the cells after their values; leave it out",
    "count": "gives every cell as many samples: `--count N`",
    "max_attempts": "makes as many attempts in every cell, whatever is accepted: `--count N`",
    "seed_group": "gives all cells the same noise; leave it out",
    "fresh": "gives all cells the same noise; leave it out",
}
# Fields of a job that its requests share.
_SHARED = {
    "models.target": "targets are compared by `riskforge study transfer`",
    "models.transfer": "targets are compared by `riskforge study transfer`",
    "models.diffusion": "a request may have another one: sweep `diffusion`",
    "models": "make a sweep with each, by `--set job.models.FIELD=VALUE` and another output",
    "seed": "all cells have the same noise; make another sweep with `--set seed=N`",
    "name": "make another sweep",
    "output": "it does not change samples; give it once, by `--output FOLDER`",
    "runtime": "it does not change samples; give it once, in the job",
}
# Mappings whose keys are the user's own.
_OPEN = ("accept", "guidance.custom.parameters")


@functools.cache
def known_fields() -> tuple[str, ...]:
    """The dotted paths that a sweep may vary."""
    sections: dict[str, type[BaseModel]] = {
        "sampling": SamplingSpec,
        "conditioning": ConditioningSpec,
        "start": StartSpec,
    }
    sections |= {f"guidance.{method.name}": method.load_spec() for method in METHODS if method.is_guided}
    own = [name for name in RequestSpec.model_fields if name not in _REFUSED and name != "guidance"]
    inner = [f"{section}.{name}" for section, spec in sections.items() for name in spec.model_fields]
    return (*own, *(section for section in sections if "." in section), "guidance.ensemble", *inner)


def field_problems(fields: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """What is wrong with the fields of a sweep and their values, whatever the job."""
    for field, values in fields.items():
        if problem := _name_problem(field):
            yield f"{shown_field(field)}: {problem}"
        else:
            yield from (f"{field}: {problem}" for problem in _value_problems(values))
    for field in fields:
        yield from (
            f"{field}: is part of {other}, which is swept too; give one of the two"
            for other in fields
            if field.startswith(f"{other}.")
        )


def shown_field(field: str) -> str:
    """A field for a message, cut where it is long."""
    return field if re.fullmatch(r"[\w.-]{1,80}", field) else shown(field)


def _name_problem(field: str) -> str:
    known = known_fields()
    if field in known or any(field.startswith(f"{place}.") for place in _OPEN):
        return "" if all(field.split(".")) else "has an empty part between its points"
    if match := re.fullmatch(r"requests(?:\.\w+)?(?:\.(.+))?", field):
        return f"is of one request; give {match[1] or 'the field'} and choose requests by --request NAME"
    if field in _REFUSED:
        return f"a sweep {_REFUSED[field]}"
    for shared, remedy in _SHARED.items():
        if field == shared or field.startswith(f"{shared}."):
            return f"is the same for all requests of a run; {remedy}"
    return f"is no field of a request{_suggestion(field, known)}"


def _suggestion(field: str, known: Sequence[str]) -> str:
    """The known field that is meant: one with the same last part, else the nearest spelling."""
    last = field.rpartition(".")[2]
    if same := [name for name in known if name.rpartition(".")[2] == last]:
        return f"; did you mean {' or '.join(same[:4])}?"
    by_end: dict[str, list[str]] = {}
    for name in known:
        by_end.setdefault(name.rpartition(".")[2], []).append(name)
    if (text := nearest(field, list(known))) and "." in field:
        return text
    match = re.search(r"'([^']+)'", nearest(last, list(by_end)))
    return f"; did you mean {' or '.join(by_end[match[1]][:4])}?" if match else "; see docs/job-file.md"


def _value_problems(values: Sequence[Any]) -> Iterator[str]:
    if not values:
        yield "has no value; give one or more, such as 3,10,30"
    if len(values) > MAX_VALUES:
        yield f"has {len(values)} values; give {MAX_VALUES} or fewer"
        return
    seen: set[str] = set()
    for value in values:
        text = canonical(value)
        if text in seen:
            yield f"has the value {shown(value)} twice; give each once"
        seen.add(text)


def canonical(value: Any) -> str:
    """A text that is equal for equal values: 3 and 3.0 are, 1 and true are not."""
    return json.dumps(_as_floats(value), sort_keys=True, ensure_ascii=False)


def _as_floats(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    if isinstance(value, dict):
        return {key: _as_floats(inner) for key, inner in value.items()}
    return [_as_floats(inner) for inner in value] if isinstance(value, list | tuple) else value


def uses(request: Mapping[str, Any], field: str) -> bool:
    """Whether a raw request has use for a field, as far as its method and its sections show."""
    head, _, rest = field.partition(".")
    method = find_method(request.get("method"))
    if head == "guidance":
        if rest == "ensemble":
            return method is None or method.is_guided
        return method is None or rest.partition(".")[0] == method.name
    if head == "conditioning" and rest:
        given = request.get(head)
        is_screened = not isinstance(given, dict) or (given.get("screening") is not False and not given.get("images"))
        return isinstance(given, dict | str) and (is_screened or rest not in ("threshold", "max_draws"))
    if head == "start" and rest:
        return isinstance(request.get(head), dict)
    if head in ("classes", "boundary"):
        return request.get("boundary" if head == "classes" else "classes") is None
    return True


def steps_of_field(job: JobSpec, request: Mapping[str, Any], field: str) -> tuple[str, str]:
    """The step rule that a guidance field is for, and that of a raw request; both empty where any will do."""
    head, _, rest = field.partition(".")
    name, _, key = rest.partition(".")
    method = find_method(request.get("method"))
    if head != "guidance" or not key or method is None or not method.is_guided or name != method.name:
        return "", ""
    spec = method.load_spec()
    wanted = spec.BY_STEP.get(key, "") if issubclass(spec, PresetParameters) else ""
    try:
        parameters = job.parameters_of(RequestSpec.model_validate(request))
    except (pydantic.ValidationError, TypeError, AttributeError):
        # The check of the job says what is wrong.
        return "", ""
    return (wanted, str(getattr(parameters, "step", ""))) if wanted else ("", "")


def assign(request: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    """A raw request with another value of a field; a mapping of guidance or sampling is added to what is there."""
    return _assigned(request, field.split("."), value)


def _assigned(raw: Any, parts: list[str], value: Any) -> dict[str, Any]:
    head, *rest = parts
    base = dict(raw) if isinstance(raw, dict) else {}
    inner = base.get(head)
    if rest:
        inner = {"artefact": inner} if head == "conditioning" and isinstance(inner, str) else inner
        return base | {head: _assigned(inner, rest, value)}
    if isinstance(inner, dict) and isinstance(value, dict) and head not in ("conditioning", "start", "accept"):
        return base | {head: inner | value}
    return base | {head: value}


def value_text(value: Any) -> str:
    """A value as a table has it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {value_text(inner)}" for key, inner in value.items()) or "{}"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value)) or "[]"
    text = str(value)
    return text if len(text) <= _MAX_SHOWN_VALUE else f"{text[: _MAX_SHOWN_VALUE - 1]}…"

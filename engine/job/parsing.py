"""From a raw job, as read from YAML, to a `JobSpec`: every problem is collected before any model is loaded.

`parse_job` raises all problems of a job together, a line each; `apply_overrides` is the `--set` of the command line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pydantic
from pydantic import BaseModel

from engine.errors import JobError
from engine.job.label_maps import label_map_problems
from engine.job.oracles import floor_of, floor_problems, idle_floor, oracle_problems
from engine.job.rule_checks import accept_problems, asked_names, model_problems
from engine.job.spec import LIST_LIMITS, MAX_INDEX, ConditioningSpec, GuidanceSpec, JobSpec, RequestSpec, merge
from engine.job.spec_messages import Location, Problem, explain, location_of
from engine.job.strengths import Place, expand_strengths
from engine.job.targets import expand_targets, target_problems
from engine.methods.registry import find_method
from engine.methods.sampling.spec import SamplingSpec

# Entries of a list without a limit of its own, and keys of a mapping: counted before any of them is checked.
MAX_ENTRIES = 100_000
MAX_KEYS = 10_000
# Problems of a job that are listed.
MAX_PROBLEMS = 100

OVERRIDABLE: dict[str, type[BaseModel]] = {"sampling": SamplingSpec, "guidance": GuidanceSpec}


def job_schema() -> dict[str, Any]:
    """The JSON Schema of a job file."""
    return JobSpec.model_json_schema()


def parse_job(raw: Any) -> JobSpec:
    """Check a job as read from YAML.

    Raises:
        JobError: with every problem found, a line each.
    """
    if not isinstance(raw, dict):
        raise JobError(f"job: a mapping of keys is expected, not {type(raw).__name__}; see `riskforge schema`")
    if "study" in raw:
        raise JobError(f"study: a job with this key makes no run; it is for `riskforge study {_study(raw['study'])}`")
    if oversized := _oversized(raw, ()):
        raise JobError([f"{_path(where)}: {text}" for where, text in oversized[:MAX_PROBLEMS]])
    targets = expand_targets(raw)
    expanded = expand_strengths(targets.raw)
    job, found = _validate(JobSpec, expanded.raw, ())
    known = [where for where, _ in found]
    # Checks between fields run without the wrong ones; that these are absent is no new problem.
    found += [
        (where, text)
        for where, text in _between_fields(expanded.raw, expanded.places)
        if not any(where == other or _is_below(other, where) for other in known)
    ]
    in_file = ((_in_file(targets.location(where), expanded.places), text) for where, text in found)
    problems = [*targets.problems, *expanded.problems, *in_file]
    if problems:
        raise JobError(_limited(list(dict.fromkeys(f"{_path(where)}: {text}" for where, text in problems))))
    return job if len(expanded.places) == len(raw["requests"]) else job.placed([one.number for one in expanded.places])


def _in_file(where: Location, places: Sequence[Place]) -> Location:
    """The location in the job file of one in the job with its lists of strengths expanded."""
    match where:
        case ("requests", int(number), *inner) if number < len(places):
            return places[number].location(tuple(inner))
    return where


def _study(name: Any) -> str:
    """The name of a study, as a command has it."""
    return name if isinstance(name, str) and re.fullmatch(r"[a-z-]{1,30}", name) else "STUDY"


def _limited(lines: list[str]) -> list[str]:
    """The first of many lines, and the number of the others."""
    more = len(lines) - MAX_PROBLEMS
    return [*lines[:MAX_PROBLEMS], f"job: has {more} more problems like these"] if more > 0 else lines


def list_limit(key: object) -> int:
    """Entries that a list below a key of a job may have."""
    return LIST_LIMITS.get(key, MAX_ENTRIES) if isinstance(key, str) else MAX_ENTRIES


def _oversized(value: Any, where: Location) -> list[Problem]:
    """Lists and mappings with more entries than any job has use for; their entries are not checked."""
    if isinstance(value, dict):
        if len(value) > MAX_KEYS:
            return [(where, f"has {len(value)} keys; a mapping has {MAX_KEYS} at most")]
        return [problem for key, inner in value.items() for problem in _oversized(inner, (*where, _key(key)))]
    if isinstance(value, (list, tuple)):
        limit = list_limit(where[-1] if where else None)
        if len(value) > limit:
            return [(where, f"has {len(value)} entries; give {limit} or fewer")]
        nested = ((place, inner) for place, inner in enumerate(value) if isinstance(inner, (dict, list, tuple)))
        return [problem for place, inner in nested for problem in _oversized(inner, (*where, place))]
    return []


def _key(key: Any) -> str | int:
    return key if isinstance(key, (str, int)) else str(key)


def _between_fields(raw: dict[str, Any], places: Sequence[Place]) -> list[Problem]:
    """Problems between the fields of each request; also of a job that is wrong in other parts.

    Args:
        places: of the requests in the job file.
    """
    base = {section: _base(spec, raw.get(section)) for section, spec in OVERRIDABLE.items()}
    problems = _sampling_problems(base["sampling"], ("sampling",)) + _decoder_problems(raw)
    problems += target_problems(raw, is_guided=_has_guided(raw)) + _ensemble_problems(raw, raw, ())
    problems += oracle_problems(raw) + label_map_problems(raw, _mappable(raw))
    names: dict[str, int] = {}
    floors, asked = list[Location](), list[tuple[Location, str]]()
    requests = raw.get("requests")
    for number, item in enumerate(requests if isinstance(requests, list) else []):
        where: Location = ("requests", number)
        name = item.get("name") if isinstance(item, dict) else None
        if isinstance(name, str) and names.setdefault(name, number) != number:
            other, made = places[names[name]].number, "" if places[number].value is None else ", made of a strength,"
            problems.append(((*where, "name"), f"'{name}'{made} is also the name of request {other}; rename one"))
        request = _lenient(RequestSpec, item)
        if request is not None:
            problems += [((*where, *at), text) for at, text in _request_problems(request)]
            problems += [((*where, *at), text) for at, text in model_problems(request, raw.get("models"))]
            problems += _ensemble_problems(raw, item, where)
            problems += _override_problems(request, base, where)
            guidance = _guidance(request, base)
            if guidance is not None:
                problems += idle_floor(request, guidance, where)
                floors += floor_of(request, guidance, where)
            asked += [((*where, *at), name) for at, name in asked_names(request)]
    return problems + floor_problems(raw, floors, asked)


def _mappable(raw: dict[str, Any]) -> list[str]:
    """Addresses of a job whose models may have a label map, be they right or wrong otherwise."""
    models = raw.get("models")
    lists = (
        [models.get(name) for name in ("further_targets", "transfer", "oracles")] if isinstance(models, dict) else []
    )
    named = [address for entries in lists if isinstance(entries, list | tuple) for address in entries]
    named += [models["oracle"]] if isinstance(models, dict) and models.get("oracle") else []
    return [address for address in named if isinstance(address, str)]


def _guidance(request: RequestSpec, base: dict[str, dict[str, Any]]) -> Any:
    """The guidance of a request with its overrides; None with wrong parameters."""
    guidance, problems = _validate(GuidanceSpec, _overridden("guidance", base, request), ())
    return None if problems else guidance


def _decoder_problems(raw: dict[str, Any]) -> list[Problem]:
    models = raw.get("models")
    if not isinstance(models, dict) or not isinstance(models.get("guidance_decoder"), str) or _has_guided(raw):
        return []
    text = "no request is guided, so nothing would go through it; leave it out, or guide a request"
    return [(("models", "guidance_decoder"), text)]


def _has_guided(raw: dict[str, Any]) -> bool:
    """Whether any request is guided; a method that is misspelled may have been meant to guide."""
    requests = raw.get("requests")
    named = [item.get("method") for item in requests if isinstance(item, dict)] if isinstance(requests, list) else []
    return any(method is None or method.is_guided for method in map(find_method, named))


def _ensemble_problems(raw: dict[str, Any], part: dict[str, Any], where: Location) -> list[Problem]:
    """A choice of the worst of several targets in a job, or in a part of it, that has only one."""
    models, guidance = raw.get("models"), part.get("guidance")
    has_several = not isinstance(models, dict) or models.get("further_targets")
    if has_several or not isinstance(guidance, dict) or guidance.get("ensemble") != "worst":
        return []
    text = "has no effect with one target; leave it out, or give a list in models.target"
    return [((*where, "guidance", "ensemble"), text)]


def _override_problems(request: RequestSpec, base: dict[str, dict[str, Any]], where: Location) -> list[Problem]:
    problems: list[Problem] = []
    for section, spec in OVERRIDABLE.items():
        merged = _overridden(section, base, request)
        own = _validate(spec, merged, (*where, section))[1]
        if not own and section == "sampling" and request.sampling:
            own = _sampling_problems(merged, (*where, section))
        problems += own
    if not problems:
        num_steps = merge(base["sampling"], request.sampling)["num_inference_steps"]
        problems += [((*where, *at), text) for at, text in _start_problems(request, num_steps)]
    if not problems and request.method_record.is_guided:
        problems += _schedule_problems(request, base, where)
    return problems


def _overridden(section: str, base: dict[str, dict[str, Any]], request: RequestSpec) -> dict[str, Any]:
    """A section of a job with the overrides of a request."""
    override = getattr(request, section)
    return GuidanceSpec.overridden(base[section], override) if section == "guidance" else merge(base[section], override)


def _start_problems(request: RequestSpec, num_steps: int) -> list[Problem]:
    start = request.used_start
    if start is None or not start.strength or request.steps_taken(num_steps):
        return []
    least = math.ceil(10_000 / num_steps) / 10_000
    text = f"{start.strength} of {num_steps} steps is none; give {least:g} or more, or 0 for no step"
    return [(("start", "strength"), text)]


def _schedule_problems(request: RequestSpec, base: dict[str, dict[str, Any]], where: Location) -> list[Problem]:
    num_steps = merge(base["sampling"], request.sampling)["num_inference_steps"]
    guidance = GuidanceSpec.model_validate(_overridden("guidance", base, request))
    parameters = guidance.of(request.method_record)
    start, taken = request.used_start, request.steps_taken(num_steps)
    # Without steps there is the reconstruction, which no method changes.
    if not taken or any(parameters.is_guided(index, num_steps) for index in taken):
        return []
    if start is None:
        text = f"leaves none of {num_steps} steps guided; {parameters.schedule_remedy} or add steps"
    else:
        taken_text = f"all steps that strength {start.strength:g} takes, the last {len(taken)} of {num_steps}"
        text = f"leaves {taken_text}, unguided; {parameters.schedule_remedy}, add steps or raise the strength"
    return [((*where, "guidance", request.method_record.name), text)]


def _sampling_problems(sampling: dict[str, Any], where: Location) -> list[Problem]:
    problems: list[Problem] = []
    if sampling["rescale_betas_zero_snr"] and sampling["scheduler"] == "lms":
        text = "zero terminal SNR is not defined for lms; use ddim, euler or dpmsolver++"
        problems.append(((*where, "rescale_betas_zero_snr"), text))
    if sampling["use_karras_sigmas"] and sampling["scheduler"] == "ddim":
        text = "ddim has no sigmas to choose; leave it out, or use lms, euler or dpmsolver++"
        problems.append(((*where, "use_karras_sigmas"), text))
    return problems


def _base(spec: type[BaseModel], raw: Any) -> dict[str, Any]:
    checked = _lenient(spec, raw) if raw is not None else None
    return (checked or spec()).model_dump()


def _lenient(spec: type[BaseModel], raw: Any) -> Any:
    """The spec without its wrong values, or None where it is not valid without them."""
    if not isinstance(raw, dict):
        return None
    checked, problems = _validate(spec, raw, ())
    return checked or _validate(spec, _without(raw, [where for where, _ in problems]), ())[0]


def _request_problems(request: RequestSpec) -> list[Problem]:
    problems = _class_field_problems(request)
    if isinstance(request.classes, tuple) and len(set(request.classes)) != len(request.classes):
        problems.append((("classes",), f"{list(request.classes)} names a class twice; name each once"))
    if request.classes == ():
        problems.append((("classes",), "empty; give class names or `all`"))
    if len(set(request.contexts)) != len(request.contexts):
        problems.append((("contexts",), "a context is duplicated; name each once"))
    if request.count * len(request.contexts) > MAX_INDEX:
        problems.append(
            (("count",), f"{request.count} x {len(request.contexts)} contexts is above {MAX_INDEX} a class")
        )
    problems += accept_problems(request)
    problems += [(("max_attempts",), text) for text in _quota_problems(request)]
    problems += [(("conditioning", *at), text) for at, text in _conditioning_problems(request)]
    return problems + _twin_problems(request) + _template_problems(request)


def _twin_problems(request: RequestSpec) -> list[Problem]:
    """A twin that is the sample itself."""
    if request.twin and not request.method_record.is_guided:
        text = f"method '{request.method}' guides nothing, so that a sample is its own twin; leave it out"
        return [(("twin",), text)]
    return []


def _class_field_problems(request: RequestSpec) -> list[Problem]:
    """What is wrong with the choice between `classes` and `boundary`, by what the method takes, and with the latter."""
    taken, name = request.method_record.class_fields, request.method
    if request.boundary is None:
        if "classes" not in taken:
            return [(("boundary",), f"method '{name}' needs the classes between which to sample, two or more")]
        joint = " (or `boundary: [A, B]`)" if "boundary" in taken else ""
        missing: list[Problem] = [(("classes",), f"missing; give class names or `all`{joint}")]
        return missing if request.classes is None else []
    if "boundary" not in taken:
        return [(("boundary",), f"method '{name}' makes samples of single classes; give `classes`")]
    problems: list[Problem] = []
    if request.classes is not None:
        problems.append((("classes",), "give either `classes` or `boundary`, not both"))
    if len(set(request.boundary)) != len(request.boundary):
        problems.append((("boundary",), f"{list(request.boundary)} names a class twice; name each once"))
    if len(request.boundary) < 2:
        problems.append((("boundary",), f"{list(request.boundary)} has fewer than two classes; name two or more"))
    return problems


def _quota_problems(request: RequestSpec) -> list[str]:
    if request.max_attempts is None:
        return []
    if not request.accept:
        return ["has no effect without `accept`: every sample counts; leave it out"]
    wanted, limit = request.num_wanted, request.attempts_limit
    if limit < wanted:
        return [f"{request.max_attempts!r} is {limit} attempts a class, fewer than the {wanted} samples wanted of it"]
    if limit > MAX_INDEX:
        return [f"{request.max_attempts!r} is {limit} attempts a class, above {MAX_INDEX}"]
    return []


def _conditioning_problems(request: RequestSpec) -> list[Problem]:
    conditioning, problems = request.conditioning, list[Problem]()
    rule = request.accept
    if not isinstance(rule, str) and rule.get("screened") is True and not request.is_screened:
        problems.append(((), "no sample is screened without an artefact to screen by; `accept` would reject them all"))
    if conditioning is None:
        return problems
    if request.boundary is not None:
        problems.append(((), "the embeddings are of single classes; give `classes` in place of `boundary`"))
    if (conditioning.artefact is None) == (conditioning.images is None):
        problems.append(((), "give either `artefact` (class statistics) or `images` (to vary)"))
    elif conditioning.images is not None and conditioning.screening:
        problems.append((("screening",), "given images are not screened; leave it out, or give an artefact"))
    elif not conditioning.is_screened:
        problems += [
            ((name,), "has no effect without screening; leave it out") for name in _changed_screening(conditioning)
        ]
    return problems


def _changed_screening(conditioning: ConditioningSpec) -> list[str]:
    """The parameters of screening that are not at their defaults; a stored job has the defaults written out."""
    fields = ConditioningSpec.model_fields
    return [name for name in ("threshold", "max_draws") if getattr(conditioning, name) != fields[name].default]


def _template_problems(request: RequestSpec) -> list[Problem]:
    if request.prompt is None:
        return []
    fields = set(re.findall(r"\{([^{}]*)\}", request.prompt))
    if unknown := sorted(fields - {"class", "context"}):
        return [(("prompt",), f"unknown field {{{unknown[0]}}}; use {{class}} and {{context}}")]
    # Embeddings are of the class, whatever the text says.
    if "class" not in fields and request.boundary is None and request.conditioning is None:
        return [(("prompt",), "has no {class}, so every class would have the same prompt; add {class}")]
    return []


def _validate(spec: type[BaseModel], raw: dict[str, Any], where: Location) -> tuple[Any, list[Problem]]:
    try:
        return spec.model_validate(raw), []
    except pydantic.ValidationError as error:
        texts: dict[Location, str] = {}
        for item in error.errors(include_url=False)[: 2 * MAX_PROBLEMS]:
            location = location_of(item)
            texts.setdefault((*where, *location), explain(spec, item, location))
        # A list without its wrong items may be too short as well, which is no new problem.
        return None, [(at, text) for at, text in texts.items() if not any(_is_below(other, at) for other in texts)]


def _is_below(location: Location, above: Location) -> bool:
    return len(location) > len(above) and location[: len(above)] == above


def _path(location: Location) -> str:
    return ".".join(str(part) for part in location) or "job"


def _without(raw: Any, locations: list[Location]) -> Any:
    """A copy of `raw` without the values at `locations`."""
    heads = {location[0] for location in locations if len(location) == 1}
    rest: dict[str | int, list[Location]] = {}
    for location in locations:
        if len(location) > 1:
            rest.setdefault(location[0], []).append(location[1:])
    if isinstance(raw, dict):
        return {key: _without(value, rest.get(key, [])) for key, value in raw.items() if key not in heads}
    if isinstance(raw, list):
        return [_without(value, rest.get(place, [])) for place, value in enumerate(raw) if place not in heads]
    return raw


def apply_overrides(raw: dict[str, Any], overrides: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a copy of a raw job with `--set a.0.b=value` applied.

    Raises:
        JobError: a path leads through something that is not a mapping or a list, or past the end of a list.
    """
    problems: list[str] = []
    result: dict[str, Any] = _without(raw, [])
    for path, value in overrides:
        try:
            _assign(result, path.split("."), value)
        except (IndexError, ValueError, TypeError, AttributeError):
            problems.append(f"--set {path}: no such place in the job; paths look like requests.0.count")
    if problems:
        raise JobError(problems)
    return result


def _assign(raw: dict[str, Any], parts: list[str], value: Any) -> None:
    """Set the value at a path, with new mappings where they are missing.

    Raises:
        ValueError, IndexError, TypeError, AttributeError: a part is empty, or leads nowhere.
    """
    if not all(parts):
        raise ValueError(parts)
    current: Any = raw
    for part in parts[:-1]:
        if part == "conditioning" and isinstance(current.get(part), str):
            current[part] = {"artefact": current[part]}
        current = current[_place(part)] if isinstance(current, list) else current.setdefault(part, {})
    if isinstance(current, list):
        current[_place(parts[-1])] = value
    else:
        current[parts[-1]] = value


def _place(part: str) -> int:
    """Number of an item of a list.

    Raises:
        ValueError: the text is no such number, as -1 is not.
    """
    if not part.isdecimal():
        raise ValueError(part)
    return int(part)

"""Jobs drawn from the schema itself: a field that is added to a spec class is drawn without a change here."""

from __future__ import annotations

import copy
import datetime
import types
import typing
from pathlib import Path
from typing import Any

import annotated_types
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from engine.errors import JobError
from engine.job.acceptance import FLAGS, ORACLE, ORACLE_CONDITION, SCORES
from engine.job.parsing import parse_job
from engine.job.resources import ResourcesSpec
from engine.job.spec import GuidanceSpec, JobSpec, RequestSpec
from engine.methods.custom.spec import CustomGuidanceSpec
from engine.methods.sampling.spec import SamplingSpec

# Jobs of the repository that make a run; those of studies have a form of their own.
_JOBS = sorted((Path(__file__).parent.parent / "jobs").glob("*.yaml"))
STUDY_JOBS = [path for path in _JOBS if "\nstudy:" in f"\n{path.read_text()}"]
ENGINE_JOBS = [path for path in _JOBS if path not in STUDY_JOBS]
LABELS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
MAX_REPAIRS = 12
MAX_INT = 40

_NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,6}[a-z0-9])?", fullmatch=True)
_WORDS = st.text(st.characters(codec="utf-8"), max_size=8)
_COMPARISONS = st.sampled_from([">= 0", "< 3", "> 0.25", "<= 1e3"])
_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
              _WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_WORDS, inner, max_size=3)),
    max_leaves=4,
)  # fmt: skip


def raw_jobs() -> st.SearchStrategy[dict[str, Any]]:
    """Jobs as read from YAML that `parse_job` takes: every field of the schema now and then, at its default too."""
    return _mapping(JobSpec).map(_valid).filter(lambda raw: raw is not None)


def _valid(raw: dict[str, Any]) -> dict[str, Any] | None:
    """A job without what is refused in it; None where that does not help."""
    raw = copy.deepcopy(raw)
    for number, request in enumerate(raw["requests"]):
        request["name"] = f"r{number}-{request['name']}"[:60].rstrip("-")
        request.setdefault("classes", "all")
    models = raw["models"]
    # Maps are of models that the job has.
    mapped = [*models.get("transfer", ()), *models.get("oracles", ()), *models.get("further_targets", ())]
    models["label_map"] = dict(zip(mapped, models.get("label_map", {}).values(), strict=False))
    for _ in range(MAX_REPAIRS):
        try:
            parse_job(raw)
        except JobError as error:
            # The last first, each once: what is taken out of a list moves the ones behind it.
            for path in reversed(dict.fromkeys(problem.partition(": ")[0] for problem in error.problems)):
                _remove(raw, path.split("."))
        else:
            return raw
    return None


def _remove(raw: Any, path: list[str]) -> None:
    """Take away what a path leads to, or as much of it as there is; `classes` become all of them."""
    for part in path[:-1]:
        inner = raw[int(part)] if isinstance(raw, list) and part.isdigit() else raw.get(part)
        if not isinstance(inner, (dict, list)):
            raw.pop(part, None)
            return
        raw = inner
    last = path[-1]
    if last == "conditioning" and "boundary" in raw:
        raw.pop("boundary")
    elif last == "conditioning" and "screened" in raw.get("accept", {}) and isinstance(raw["accept"], dict):
        raw["accept"].pop("screened")
    elif path == ["runtime"]:
        raw["runtime"].pop("resources", None)
    elif last == "rescale_betas_zero_snr":
        raw["scheduler"] = "ddim"
    elif last == "strength":
        raw[last] = 1
    elif isinstance(raw, list):
        del raw[int(last)]
    elif last == "classes" and "boundary" not in raw:
        raw["classes"] = "all"
    elif last == "boundary" and last not in raw:
        raw["boundary"] = ["three", 8]
        raw.pop("classes", None)
    else:
        raw.pop(last, None)


def _mapping(spec: type[BaseModel], *, partial: bool = False) -> st.SearchStrategy[dict[str, Any]]:
    """Some fields of a spec class; those that are required always, but where `partial`."""
    fields = {name: _field(spec, name, field) for name, field in spec.model_fields.items()}
    required = {name for name, field in spec.model_fields.items() if field.is_required() or _is_section(field)}
    required -= set(fields) if partial else set()
    optional = {name: one for name, one in fields.items() if name not in required}
    return st.fixed_dictionaries({name: fields[name] for name in fields if name in required}, optional=optional)


def _is_section(field: FieldInfo) -> bool:
    """Whether a field has fields itself: drawn always, so that these are seen often enough."""
    return isinstance(field.default, BaseModel)


def _field(spec: type[BaseModel], name: str, field: FieldInfo) -> st.SearchStrategy[Any]:
    drawn = _drawn(spec, name, field)
    if field.is_required() or field.default_factory is not None or _is_section(field):
        return drawn
    # A stored job has the defaults written out.
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return st.one_of(st.just(default), drawn)


def _drawn(spec: type[BaseModel], name: str, field: FieldInfo) -> st.SearchStrategy[Any]:
    if spec is RequestSpec and name in _OF_REQUESTS:
        return _OF_REQUESTS[name]()
    if spec is CustomGuidanceSpec and name == "parameters":
        return st.dictionaries(st.sampled_from(["a", "b", "gewicht"]), _JSON, max_size=2)
    if name == "label_map":
        entries = st.dictionaries(_NAMES, st.one_of(st.none(), st.sampled_from(LABELS)), max_size=2)
        return st.dictionaries(_NAMES, entries, max_size=2)
    if name == "num_gpus":
        return st.sampled_from([None, "auto", 0.25, 0.5, 1, 2])
    if name == "custom" and spec is ResourcesSpec:
        return st.dictionaries(st.sampled_from(["a100", "gewicht", "ü"]), st.sampled_from([0.5, 1, 3]), max_size=2)
    if name == "label_selector":
        labels = st.sampled_from(["ray.io/zone", "spot"])
        return st.dictionaries(labels, st.sampled_from(["a", "!true", "in(a, b)"]), max_size=2)
    return _typed(field.annotation, list(field.metadata))


def _typed(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Values of a type with its limits."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        flat = [one for item in more for one in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return _typed(inner, [*metadata, *flat])
    if origin is typing.Literal:
        return st.sampled_from(typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return st.one_of([_typed(one, metadata) for one in typing.get_args(annotation)])
    if origin is tuple:
        return st.lists(_typed(typing.get_args(annotation)[0], []), min_size=1, max_size=3)
    if annotation is type(None):
        return st.none()
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _mapping(annotation)
    limits = {type(one).__name__: one for one in metadata if isinstance(one, annotated_types.BaseMetadata)}
    low = limits["Ge"].ge if "Ge" in limits else limits["Gt"].gt if "Gt" in limits else 0
    high = limits["Le"].le if "Le" in limits else limits["Lt"].lt if "Lt" in limits else MAX_INT
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(int(low), min(int(high) - ("Lt" in limits), int(low) + MAX_INT))
    if annotation is float:
        return st.floats(low, high, exclude_min="Gt" in limits, exclude_max="Lt" in limits)
    assert annotation is str, f"no strategy for {annotation}: add one"
    patterns = [one.pattern for one in metadata if getattr(one, "pattern", None)]
    if patterns:
        return st.from_regex(patterns[0].replace("^", "").replace("$", ""), fullmatch=True).filter(
            lambda t: len(t) < 60
        )
    return st.text(st.characters(codec="utf-8"), min_size=limits["MinLen"].min_length if "MinLen" in limits else 0,
                   max_size=12)  # fmt: skip


def rules() -> st.SearchStrategy[dict[str, Any]]:
    """Rules of acceptance as mappings, the empty one among them."""
    compared = st.one_of(_COMPARISONS, st.lists(_COMPARISONS, min_size=1, max_size=2))
    conditions = dict.fromkeys(FLAGS, st.booleans()) | {ORACLE_CONDITION: st.sampled_from(ORACLE)}
    conditions |= dict.fromkeys(SCORES, compared)
    return st.one_of(st.just({}), st.fixed_dictionaries({}, optional=conditions))


def as_text(rule: dict[str, Any]) -> str:
    """A rule that is a mapping as the text that means the same."""
    parts = []
    for name, wanted in rule.items():
        if name == ORACLE_CONDITION:
            parts.append("oracle_agrees" if wanted == "agrees" else "not oracle_agrees")
        elif isinstance(wanted, bool):
            parts.append(name if wanted else f"not {name}")
        else:
            parts += [f"{name} {bound}" for bound in ([wanted] if isinstance(wanted, str) else wanted)]
    return " and ".join(parts)


def _accepts() -> st.SearchStrategy[Any]:
    texts = st.sampled_from(["class_name in ['three'] or valid_failure", "not (0 < risk <= 2)", 'context == "ü"'])
    return st.one_of(rules(), rules().filter(bool).map(as_text), texts)


def _overrides(spec: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(st.just({}), _mapping(spec, partial=True))


def _guidance_overrides() -> st.SearchStrategy[dict[str, Any]]:
    parts = {
        name: _mapping(field.annotation, partial=True)
        for name, field in GuidanceSpec.model_fields.items()
        if isinstance(field.annotation, type)
    }
    return st.one_of(st.just({}), st.fixed_dictionaries({}, optional=parts))


def _conditionings() -> st.SearchStrategy[Any]:
    """Artefacts and given images, with what steers screening at its default or not."""
    field = RequestSpec.model_fields["conditioning"]
    both = _typed(field.annotation, [])
    artefact = both.map(lambda one: one and {**one, "artefact": "zoo:digits/conditioning", "images": None})
    images = both.map(lambda one: one and {**one, "artefact": None, "images": "digits:test"})
    screened = artefact.map(lambda one: one and {**one, "screening": True})
    screened = screened.filter(lambda one: one is not None)
    return st.one_of(st.just("zoo:digits/conditioning"), artefact, screened, images)


def _starts() -> st.SearchStrategy[Any]:
    """Without a start, and with one or several strengths, the whole and none among them."""
    strength = st.sampled_from([0, 0.3, 0.55, 0.875, 1])
    strengths = st.one_of(strength, st.lists(strength, min_size=1, max_size=2, unique=True))
    return st.one_of(st.none(), strengths.map(lambda value: {"images": "digits:test", "strength": value}))


_CLASSES = st.lists(st.sampled_from([*LABELS[:4], 7, 8]), min_size=1, max_size=3, unique=True)
_OF_REQUESTS = {
    "name": lambda: _NAMES,
    "method": lambda: st.sampled_from(["prompt", "boundary", "risky", "package.module:factory"]),
    "classes": lambda: st.one_of(st.just("all"), _CLASSES),
    "boundary": lambda: st.one_of(st.none(), st.lists(st.sampled_from(["three", 8, 5]), min_size=2, unique=True)),
    "prompt": lambda: st.sampled_from(["{class}", "a {class} in {context}", "{class} ü"]),
    "accept": _accepts,
    "max_attempts": lambda: st.one_of(st.integers(1, 400), st.sampled_from(["1x", "4x", "2.5x"])),
    "fresh": lambda: st.one_of(st.booleans(), st.dates(datetime.date(2020, 1, 1)).map(str)),
    "conditioning": _conditionings,
    "start": _starts,
    "sampling": lambda: _overrides(SamplingSpec),
    "guidance": _guidance_overrides,
}

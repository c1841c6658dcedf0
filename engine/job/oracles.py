"""Several oracles in a job file, `models.oracles: [A, B]`, what of a job needs one, and the one that guides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from engine.job.columns import DERIVED_NAMES, RECORD_COLUMNS
from engine.job.spec import GuidanceSpec, ModelsSpec, RequestSpec
from engine.job.spec_messages import Location, Problem, shown

_ORACLES: Location = ("models", "oracles")
# The parameters of methods that let the last oracle guide: as a floor, or as part of a criterion.
_FLOOR, _SEEN = "oracle_floor", "with_oracle"
_COLUMNS = {column.name for column in RECORD_COLUMNS if column.measured_by == "oracle"}
# What conditions call the verdict of the oracles that guide nothing.
_VERDICTS = {
    *_COLUMNS,
    *(column.alias for column in RECORD_COLUMNS if column.name in _COLUMNS),
    *(derived.name for derived in DERIVED_NAMES.values() if _COLUMNS & {*derived.needs}),
}


def has_oracle(models: Any) -> bool:
    """Whether the raw models of a job name an oracle, be they right or wrong otherwise."""
    return isinstance(models, dict) and bool(models.get("oracle") or models.get("oracles"))


def oracle_fields(models: ModelsSpec) -> Iterator[tuple[str, str]]:
    """Field of the job file and address of every oracle."""
    if models.oracle:
        yield "models.oracle", models.oracle
    for place, address in enumerate(models.oracles):
        yield f"models.oracles.{place}", address


def oracle_problems(raw: dict[str, Any]) -> list[Problem]:
    """Oracles that are named in both fields, or twice."""
    models = raw.get("models")
    listed = models.get("oracles") if isinstance(models, dict) else None
    if not isinstance(models, dict) or not isinstance(listed, list | tuple) or not listed:
        return []
    if models.get("oracle"):
        return [(_ORACLES, "is a list, and oracle is there too; name all of them in the list")]
    return [
        ((*_ORACLES, place), f"{shown(oracle)} is there twice; name each oracle once")
        for place, oracle in enumerate(listed)
        if isinstance(oracle, str) and oracle in listed[:place]
    ]


def floor_of(request: RequestSpec, guidance: GuidanceSpec, where: Location) -> list[Location]:
    """Where a job has the parameter by which its last oracle guides a request; nothing where it does not guide.

    Args:
        guidance: the job's with the overrides of the request.
        where: of the request.
    """
    method = request.method_record
    parameters = guidance.of(method)
    if not parameters.sees_oracle:
        return []
    field = _SEEN if hasattr(parameters, _SEEN) else _FLOOR
    own = request.guidance.get(method.name)
    inside = where if isinstance(own, dict) and field in own else ()
    return [(*inside, "guidance", method.name, field)]


def idle_floor(request: RequestSpec, guidance: GuidanceSpec, where: Location) -> list[Problem]:
    """The floor of an oracle that the step rule of a request does not keep to; arguments as of `floor_of`."""
    method = request.method_record
    parameters, own = guidance.of(method), request.guidance.get(method.name)
    if parameters.sees_oracle or getattr(parameters, _FLOOR, None) is None:
        return []
    inside = where if isinstance(own, dict) and own.keys() & {_FLOOR, "step"} else ()
    text = (
        f"has no effect with step: {parameters.step}, so that the label is not kept; use step: polyak, or set"  # type: ignore[attr-defined]
        f" {_FLOOR}: null"
    )
    return [((*inside, "guidance", method.name, _FLOOR), text)]


def floor_problems(
    raw: dict[str, Any], floors: Sequence[Location], asked: Sequence[tuple[Location, str]]
) -> list[Problem]:
    """Floors and criteria without the oracle that they need; conditions that ask the only oracle although it guides.

    Args:
        floors: from `floor_of`, of all requests.
        asked: of all requests, where a name of a condition is, and the name.
    """
    models = raw.get("models")
    if not floors or not isinstance(models, dict):
        return []
    if not has_oracle(models):
        uses = {_FLOOR: "whose probability it could bound", _SEEN: "that the criterion could see"}
        text = "there is no oracle {}; name one in models.oracle, or leave it out"
        return [(floor, text.format(uses[str(floor[-1])])) for floor in floors]
    if isinstance(models.get("oracles"), list | tuple) and len(models["oracles"]) > 1:
        return []
    text = (
        f"asks the only oracle, which {'.'.join(map(str, floors[0]))} lets guide, so that it is not independent; name a"
        " second oracle in models.oracles, the one that guides last"
    )
    # A text of conditions is one place for all of its names.
    found = [(place, text if place[-1] == name else f"'{name}' {text}") for place, name in asked if name in _VERDICTS]
    return found + ([(("models", "validity"), text)] if models.get("validity") else [])

"""A list of strengths in a job file: one request of each value, before the job is checked."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any, NamedTuple, TypeGuard

from engine.job.spec import MAX_NAME, MAX_REQUESTS, NAME_PATTERN
from engine.job.spec_messages import Location, Problem, number_as_text, shown

# Characters that a name gets at most.
MAX_SUFFIX = 24
_FIELD: Location = ("start", "strength")


class Place(NamedTuple):
    """Where a request comes from.

    Attributes:
        number: of the request in the job file.
        value: of the strength in its list, or None where there is no list.
    """

    number: int
    value: int | None = None

    def location(self, inner: Location) -> Location:
        """The location in the job file of a location in the request."""
        value = () if self.value is None or inner != _FIELD else (self.value,)
        return ("requests", self.number, *inner, *value)


class Expanded(NamedTuple):
    """A raw job whose strengths are single numbers.

    Attributes:
        places: of its requests, one each.
        problems: with lists, each with its location in the job file; such a list is replaced by one of its values.
    """

    raw: dict[str, Any]
    places: tuple[Place, ...]
    problems: list[Problem]


def expand_strengths(raw: dict[str, Any]) -> Expanded:
    """A raw job with one request of each value of a list of strengths, `NAME-s030` of 0.3, in one seed group.

    The job is not changed. What is no list, or lies in no request, is left for other checks.
    """
    requests = raw.get("requests")
    if not isinstance(requests, list):
        return Expanded(raw, (), [])
    expanded, places, problems = list[Any](), list[Place](), list[Problem]()
    for number, item in enumerate(requests):
        values = _list_of(item)
        if values is None:
            expanded.append(item)
            places.append(Place(number))
            continue
        own = _list_problems(values, item.get("name"))
        problems += [(Place(number).location(at), text) for at, text in own]
        if own:
            usable = [value for value in values if not _value_problem(value)]
            expanded.append(_with_strength(item, (usable or [1])[0]))
            places.append(Place(number))
        else:
            expanded += [_request(item, value) for value in values]
            places += [Place(number, place) for place in range(len(values))]
    if len(expanded) > MAX_REQUESTS >= len(requests):
        text = f"has {len(expanded)} entries with one for each strength of a list; give {MAX_REQUESTS} or fewer"
        return Expanded(raw | {"requests": expanded[:1]}, tuple(places[:1]), [(("requests",), text)])
    return Expanded(raw | {"requests": expanded}, tuple(places), problems)


def suffix_of(strength: float) -> str:
    """What the name of a request gets for a strength: its decimals, two or more, without the point: `-s030` of 0.3."""
    digits = format(abs(Decimal(repr(float(strength)))), "f")
    whole, _, decimals = digits.partition(".")
    return f"-s{whole}{decimals.ljust(2, '0')}"


def _list_of(item: Any) -> list[Any] | None:
    start = item.get("start") if isinstance(item, dict) else None
    strength = start.get("strength") if isinstance(start, dict) else None
    return strength if isinstance(strength, list) else None


def _list_problems(values: list[Any], name: Any) -> list[Problem]:
    """Problems of a list of strengths, with their locations in its request."""
    if not values:
        return [(_FIELD, "[] is empty; give a number from 0 to 1, or a list of some")]
    problems: list[Problem] = []
    seen: list[Any] = []
    for place, value in enumerate(values):
        problem = _value_problem(value)
        if not problem and value in seen:
            problem = f"{shown(value)} is there twice; name each strength once"
        seen += [] if problem else [value]
        if problem:
            problems.append(((*_FIELD, place), problem))
    longest = max((suffix_of(value) for value in seen), key=len, default="")
    if _is_name(name) and len(name) + len(longest) > MAX_NAME:
        text = f"'{name}' with {longest} for a strength has more characters than {MAX_NAME}"
        problems.append((("name",), f"{text}; give {MAX_NAME - len(longest)} or fewer"))
    return problems


def _value_problem(value: Any) -> str:
    """Why a value is no strength; empty where it is one."""
    if problem := number_as_text(value):
        return problem
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{shown(value)} is not a number; give one from 0 to 1"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{shown(value)} is not a finite number; give one from 0 to 1"
    if not 0 <= value <= 1:
        return f"{shown(value)} is {'below 0' if value < 0 else 'above 1'}; give a number from 0 to 1"
    if len(suffix_of(value)) > MAX_SUFFIX:
        return f"{shown(value)} has too many decimals for the name of a request; round it"
    return ""


def _is_name(name: Any) -> TypeGuard[str]:
    """Whether names can be made of a name; another is refused as it is."""
    return isinstance(name, str) and bool(re.fullmatch(NAME_PATTERN, name)) and len(name) <= MAX_NAME


def _request(item: dict[str, Any], strength: float) -> dict[str, Any]:
    """The request of one value."""
    name = item.get("name")
    request = _with_strength(item, strength)
    if not _is_name(name):
        return request
    group = item.get("seed_group")
    return request | {"name": name + suffix_of(strength), "seed_group": name if group is None else group}


def _with_strength(item: dict[str, Any], strength: float) -> dict[str, Any]:
    return item | {"start": item["start"] | {"strength": strength}}

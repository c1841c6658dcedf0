"""Messages for a wrong job in the terms of a job file: from pydantic's errors, with the nearest spelling of names."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import BaseModel

from engine.terminal import redacted

Location = tuple[str | int, ...]
# Where something in a job is wrong, and what.
Problem = tuple[Location, str]

STOCHASTIC_SCHEDULERS = ("ddpm", "euler_ancestral", "euler-ancestral", "dpmsolver_sde", "sde")

_KEYED = ("extra_forbidden", "missing")


def location_of(item: Any) -> Location:
    """Location of a pydantic error in the job."""
    # The key itself may have the name of a member of a union.
    return (*_location(item["loc"][:-1]), item["loc"][-1]) if item["type"] in _KEYED else _location(item["loc"])


def _location(loc: Location) -> Location:
    """The keys of the job file only: pydantic adds the members of unions to its locations."""
    noise = re.compile(
        r"^(\[key\]$|literal\[|tuple\[|constrained-|function-|int$|str$|float$|bool$|dict$|dict\[|list$)"
    )
    return tuple(part for part in loc if isinstance(part, int) or not noise.match(part))


def explain(root: type[BaseModel], item: Any, location: Location) -> str:
    """What is wrong with a key or value, and the remedy.

    Args:
        root: the class that was validated.
        item: of the errors of a `pydantic.ValidationError`.
        location: of the error, below `root`.
    """
    kind, value = item["type"], shown(item.get("input"))
    key = str(location[-1]) if location else ""
    if kind == "extra_forbidden":
        return "unknown key" + (nearest(key, list(_fields_at(root, location[:-1]))) or _owners(root, location))
    if kind == "invalid_key":
        return "a key must be text; put it in quotes if it is meant so"
    if kind == "missing":
        return "missing; this key is required"
    if location[:2] == ("models", "label_map") or location == ("label_map",):
        return str(item["msg"]).removeprefix("Value error, ")
    if key == "accept":
        wrong = "is nothing, not" if item["input"] in (None, "") else "is neither"
        return f"{value} {wrong} a condition, such as 'is_error and risk >= 1', nor a mapping of conditions"
    if key == "conditioning":
        return f"{value} is neither the address of an artefact nor a mapping with `artefact` or `images`"
    if key == "start":
        return f"{value} is not a mapping with `images` and `strength`"
    if key == "max_attempts":
        return f"{value} is neither a number of attempts a class, such as 400, nor a multiple of `count`, such as 4x"
    if kind in ("int_type", "float_type") and (problem := number_as_text(item["input"])):
        return problem
    if kind == "literal_error" and (key != "classes" or isinstance(item["input"], str)):
        if key == "scheduler" and item["input"] in STOCHASTIC_SCHEDULERS:
            deterministic = item["ctx"]["expected"].replace(", 'lcm'", "")
            return f"{value} draws noise at every step; use a deterministic one: {deterministic}"
        choices = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        return f"{value} is not one of {', '.join(choices)}" + nearest(str(item["input"]), choices)
    if item["loc"][-1:] == ("[key]",):
        return f"{value} cannot be the name of an argument; use letters, digits and underscores"
    if kind == "string_pattern_mismatch" and key in ("name", "seed_group"):
        return f"{value} may hold only a-z, 0-9 and inner hyphens"
    if kind == "string_pattern_mismatch" and key == "token":
        return f"{value} has spaces; give one word, such as <thing>"
    return f"{value} {_expected(kind, key, item)}"


def _expected(kind: str, key: str, item: Any) -> str:
    """What is wrong with a value and which values are accepted, in the terms of a job file."""
    limits, given = item.get("ctx", {}), item.get("input")
    if kind in _LIMITS:
        wrong, wanted, name = _LIMITS[kind]
        limit = int(limits[name]) if limits[name] == int(limits[name]) else limits[name]
        return f"{wrong} {limit}; {wanted.format(limit)}"
    if key == "classes" and not isinstance(given, str):
        return "names no classes; give a list of names or indices, such as [three, 8], or `all`"
    if given is None or given == "":
        return f"is nothing; give {_KINDS.get(kind, 'a value')}, or leave the key out"
    if kind in _KINDS:
        return f"is not {_KINDS[kind]}" + ("; put it in quotes if it is meant so" if kind == "string_type" else "")
    if kind == "string_pattern_mismatch" and (choices := re.fullmatch(r"\^\(([a-z|]+)\)\$", limits["pattern"])):
        return f"is not one of {choices[1].replace('|', ', ')}" + nearest(str(given), choices[1].split("|"))
    reason = item["msg"].removeprefix("Value error, ")
    return f"cannot be used: {reason[0].lower()}{reason[1:]}"


# By pydantic's type of error: what is wrong, what is accepted, and the key of the limit in the error's context.
_LIMITS = {
    "greater_than_equal": ("is below", "give {} or more", "ge"),
    "greater_than": ("is not above", "give more than {}", "gt"),
    "less_than_equal": ("is above", "give {} or less", "le"),
    "less_than": ("is not below", "give less than {}", "lt"),
    "string_too_long": ("has more characters than", "give {} or fewer", "max_length"),
    "string_too_short": ("has fewer characters than", "give {} or more", "min_length"),
    "too_short": ("has fewer entries than", "give {} or more", "min_length"),
    "too_long": ("has more entries than", "give {} or fewer", "max_length"),
}
_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing_size": "a whole number of a size that is used",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list, such as [a, b]",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "invalid-json-value": "text, a number, true or false, or a list or mapping of these",
}


def number_as_text(value: Any) -> str:
    """What is wrong with a number that YAML has read as text; empty for everything else."""
    try:
        is_number = isinstance(value, str) and bool(float(value))
    except ValueError:
        return ""
    remedy = "write it with its digits, such as 1000000 or 0.001"
    return f"{shown(value)} is text to YAML, not a number; {remedy}" if is_number else ""


def nearest(word: str, choices: list[str]) -> str:
    """`; did you mean 'X'?` for the choice spelled most like `word`, or nothing."""
    match = difflib.get_close_matches(word.lower(), [choice.lower() for choice in choices], n=1, cutoff=0.6)
    original = [choice for choice in choices if match and choice.lower() == match[0]]
    return f"; did you mean '{original[0]}'?" if original else ""


def _owners(root: type[BaseModel], location: Location) -> str:
    """`; it is a key of X` for the mappings next to an unknown key that have it, or nothing."""
    *place, key = location
    owners = [name for name in _fields_at(root, tuple(place)) if key in _fields_at(root, (*place, name))]
    return f"; it is a key of {' and '.join(owners)}: write {owners[0]}: {{{key}: ...}}" if owners else ""


def _fields_at(root: type[BaseModel], location: Location) -> dict[str, Any]:
    """Fields of the spec class at a location."""
    current: Any = root
    for part in location:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        members = [annotation, *getattr(annotation, "__args__", ())]
        current = next((kind for kind in members if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if current is None:
            return {}
    return dict(current.model_fields)


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    try:
        text = redacted(repr(value))
    except ValueError:
        # Python refuses to print a number of more than 4300 digits.
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."

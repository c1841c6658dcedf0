"""Acceptance: the rule of a request that says, sample by sample, which images are kept.

A rule is a mapping of conditions that must all hold: `{is_error: true, oracle: agrees, conformity: ">= 0.2"}`.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from engine.job.columns import BY_NAME, ENTRY_SCORES, Role, columns_with, entry_scores_with

# Conditions by the kind of their values: true or false, one of `ORACLE`, a comparison.
FLAGS = tuple(column.name for column in columns_with(Role.ACCEPTS) if column.type == "bool")
ORACLE_CONDITION = BY_NAME["oracle_class"].alias
SCORES = (
    *(column.name for column in columns_with(Role.ACCEPTS) if column.type == "float"),
    *entry_scores_with(Role.ACCEPTS),
)
ORACLE = ("agrees", "disagrees")
# The schema version from which on `is_error: true` asks of a joint prompt for a prediction outside its subset.
ERRORS_OUTSIDE_SINCE = 3
_COMPARISON = re.compile(r"\s*(<=|>=|<|>)\s*(\S+)\s*")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def rule_problems(rule: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with a rule: pairs of condition and explanation."""
    problems = []
    for name, wanted in rule.items():
        if name in FLAGS:
            wrong = None if isinstance(wanted, bool) else f"{wanted!r} is not true or false"
        elif name == ORACLE_CONDITION:
            wrong = None if wanted in ORACLE else f"{wanted!r} is not one of {', '.join(ORACLE)}"
        elif name in SCORES:
            wrong = _comparison_problem(wanted)
        else:
            wrong = f"unknown condition; use {', '.join((*FLAGS, ORACLE_CONDITION, *SCORES))}"
        if wrong:
            problems.append((name, wrong))
    return problems


def is_accepted(
    rule: Mapping[str, Any],
    record: Mapping[str, Any],
    subset: tuple[int, ...],
    schema_version: int = ERRORS_OUTSIDE_SINCE,
) -> bool:
    """Whether every condition of a checked rule holds for a record; none on a score that it does not have does.

    Args:
        record: complete scores.
        subset: the classes of the prompt; the target errs, and the oracle disagrees, where it predicts none of them.
        schema_version: of the run. Before 3 a joint sample was an error wherever the target predicted another class
            than the closest one; a run continues by the rule that it began with.
    """
    is_joint = len(subset) > 1 and schema_version >= ERRORS_OUTSIDE_SINCE
    return all(_holds(name, wanted, record, subset, is_joint) for name, wanted in rule.items())


def _holds(name: str, wanted: Any, record: Mapping[str, Any], subset: tuple[int, ...], is_joint: bool) -> bool:
    if name == "is_error" and is_joint:
        return (record["predicted_class"] not in subset) == wanted
    if name in FLAGS:
        return bool(record[name] == wanted)
    if name == ORACLE_CONDITION:
        return (record["oracle_class"] in subset) == (wanted == "agrees")
    value = _score(name, record)
    is_known = name not in BY_NAME or BY_NAME[name].is_known(value)
    return is_known and all(compare(value, bound) for compare, bound in _comparisons(wanted))


def _score(name: str, record: Mapping[str, Any]) -> float:
    """The score that a condition compares; of entries, that of the first one."""
    if entry := ENTRY_SCORES.get(name):
        return float(record[entry.column.name][0][entry.part.name])
    return float(record[name])


def _comparisons(wanted: str | list[str]) -> list[tuple[Callable[[float, float], bool], float]]:
    """The comparisons of a condition: one, or several that must all hold."""
    comparisons = []
    for text in [wanted] if isinstance(wanted, str) else wanted:
        match = _COMPARISON.fullmatch(text)
        assert match is not None, "rules are checked when the job is read"
        comparisons.append((_COMPARE[match[1]], float(match[2])))
    return comparisons


def _comparison_problem(wanted: Any) -> str | None:
    texts = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(texts, (list, tuple)) or not texts:
        return f"{wanted!r} is not a comparison; write it as '>= 0.2'"
    for text in texts:
        match = _COMPARISON.fullmatch(text) if isinstance(text, str) else None
        if match is None or not _is_number(match[2]):
            return f"{text!r} is not a comparison; write it as '>= 0.2'"
    return None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False

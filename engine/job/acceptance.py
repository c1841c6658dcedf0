"""Acceptance: the rule of a request that says, sample by sample, which images are kept.

A rule is a text in the language of conditions (`engine.job.conditions`), `"is_error and conformity >= 0.2"`, or a
mapping of conditions that must all hold, `{is_error: true, oracle: agrees, conformity: ">= 0.2"}`. Both become the same
tree, which is evaluated on a record; a rule that is unknown accepts nothing.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from engine.job.columns import (
    BY_NAME,
    DERIVED_NAMES,
    ENTRY_SCORES,
    MEASURED,
    MIN_ORACLE_P_LABEL,
    MIN_P_VALID,
    RECORD_COLUMNS,
    RUN_COLUMNS,
    SURPLUS,
    UNKNOWN,
    Column,
    Role,
    columns_with,
    entry_scores_with,
)
from engine.job.conditions import (
    FLAG,
    LIST_REFUSAL,
    NUMBER,
    TEXT,
    Comparison,
    ConditionError,
    Junction,
    Literal,
    Name,
    NameType,
    Node,
    Not,
    evaluate,
    names_of,
    parse_condition,
)

# A checked rule; an empty mapping is none.
Rule = Mapping[str, Any] | str

# Conditions of a mapping by the kind of their values: true or false, one of `ORACLE`, a comparison.
FLAGS = tuple(column.name for column in columns_with(Role.ACCEPTS) if column.type == "bool")
ORACLE_CONDITION = BY_NAME["oracle_class"].alias
SCORES = (
    *(column.name for column in columns_with(Role.ACCEPTS) if column.type == "float"),
    *entry_scores_with(Role.ACCEPTS),
)
ORACLE = ("agrees", "disagrees")
# The schema version from which on `is_error` asks of a joint prompt for a prediction outside its subset.
ERRORS_OUTSIDE_SINCE = 3
_COMPARISON = re.compile(r"\s*(<=|>=|<|>)\s*(\S+)\s*")

# Names that a rule cannot use, and why not: what they say is only known later.
LATER = {
    "status": "says whether the rule accepted the sample, and is known only after it",
    "accepted": "says whether the rule accepted the sample, and is known only after it",
    "error_message": "is of failed samples, which no rule sees",
    SURPLUS.name: "is known only when the run is closed; filter by it when reading",
    "human_agreement": "is known only when people have answered, after the run; filter by it when reading",
} | {column.name: "depends on how the run went; a rule must give the same on every machine" for column in RUN_COLUMNS}
# Names that are unknown where models did not score an image.
_OF_MODELS = MEASURED | DERIVED_NAMES.keys()
# Categories of Unicode that a text can only have within quotes, as escapes: control characters and halves of pairs.
_ODD = ("Cc", "Cs")
_KINDS = {"int": NUMBER, "float": NUMBER, "bool": FLAG, "str": TEXT}


def _type_of(column: Column) -> NameType:
    refusal = LIST_REFUSAL if column.is_list else LATER.get(column.name, "")
    return NameType(_KINDS.get(column.type, TEXT), column.type == "int", refusal)


# The names of rules as texts.
NAMES: dict[str, NameType] = {
    **{column.name: _type_of(column) for column in RECORD_COLUMNS},
    **{name: NameType(derived.kind, refusal=LATER.get(name, "")) for name, derived in DERIVED_NAMES.items()},
}
NAMES |= {name: NameType(NUMBER, refusal=refusal) for name, refusal in LATER.items() if name not in NAMES}


def rule_problems(rule: Rule) -> list[tuple[str, str]]:
    """What is wrong with a rule: pairs of condition and explanation; of a text the condition is empty."""
    if isinstance(rule, str):
        return [("", text) for text in _text_problems(rule)]
    problems = []
    for name, wanted in rule.items():
        if name in FLAGS:
            wrong = None if isinstance(wanted, bool) else f"{wanted!r} is not true or false"
        elif name == ORACLE_CONDITION:
            wrong = None if wanted in ORACLE else f"{wanted!r} is not one of {', '.join(ORACLE)}"
        elif name in SCORES:
            wrong = _comparison_problem(wanted)
        else:
            wrong = _unknown_condition(name, wanted)
        if wrong:
            problems.append((name, wrong))
    return problems


def rule_names(rule: Rule) -> tuple[str, ...]:
    """The names that a rule uses, of a mapping its keys; none of a text that is not of the language."""
    if isinstance(rule, str):
        return () if rule_problems(rule) else names_of(_parsed(rule))
    return tuple(rule)


def measuring_roles(name: str) -> frozenset[str]:
    """The roles of the models that measure what a condition compares; empty for an unknown one."""
    if name == ORACLE_CONDITION:
        return frozenset({"oracle"})
    needed = DERIVED_NAMES[name].needs if name in DERIVED_NAMES else (name,)
    return frozenset(BY_NAME[column].measured_by for column in needed if column in MEASURED)


def is_accepted(
    rule: Rule,
    record: Mapping[str, Any],
    subset: tuple[int, ...],
    schema_version: int = ERRORS_OUTSIDE_SINCE,
) -> bool:
    """Whether a checked rule holds for a record; where a score that it needs is unknown it does not.

    Args:
        record: complete scores.
        subset: the classes of the prompt; the target errs, and the oracle disagrees, where it predicts none of them.
        schema_version: of the run. Before 3 a joint sample was an error wherever the target predicted another class
            than the closest one; a run continues by the rule that it began with.
    """
    asks_outside = schema_version >= ERRORS_OUTSIDE_SINCE
    return evaluate(_tree(rule), lambda name: _value(name, record, subset, asks_outside=asks_outside)) is True


# Values of names ------------------------------------------------------------------------------------------------------


def _value(name: str, record: Mapping[str, Any], subset: tuple[int, ...], *, asks_outside: bool) -> Any:
    """What a name stands for; None where it is unknown, as in filters."""
    if name in _OF_MODELS and not record.get("scored", True):
        return None
    if name == "is_error" and asks_outside:
        name = "target_errs"
    if name in DERIVED_NAMES:
        return _derived(name, record, subset)
    return record[name] if BY_NAME[name].is_known(record[name]) else None


def _derived(name: str, record: Mapping[str, Any], subset: tuple[int, ...]) -> Any:
    if entry := ENTRY_SCORES.get(name):
        entries = record[entry.column.name]
        return entries[0][entry.part.name] if entries else None
    match name:
        case "target_errs":
            return record["predicted_class"] not in subset if len(subset) > 1 else record["is_error"]
        case "oracle_agrees":
            return record["oracle_class"] in subset
        case "valid_failure":
            return _derived("target_errs", record, subset) and _derived("oracle_agrees", record, subset)
        case "label_is_valid":
            return label_is_valid(record["p_valid"], record["oracle_p_label_min"])
    raise KeyError(name)


def label_is_valid(estimate: float, least: float) -> bool | None:
    """Whether a label is strictly valid: by `p_valid` where there is an estimate, else by the oracles.

    Args:
        estimate: `p_valid`, the estimated share of people who would give the label; `UNKNOWN` without a fit.
        least: `oracle_p_label_min`, the least probability of the label; `UNKNOWN` without an oracle.

    Returns:
        None where both are unknown.
    """
    if estimate != UNKNOWN:
        return estimate >= MIN_P_VALID
    return None if least == UNKNOWN else least >= MIN_ORACLE_P_LABEL


# Rules as trees -------------------------------------------------------------------------------------------------------


def _tree(rule: Rule) -> Node:
    """The tree of a checked rule; each is made once in a process."""
    if isinstance(rule, str):
        return _parsed(rule)
    conditions = ((name, wanted if isinstance(wanted, str | bool) else tuple(wanted)) for name, wanted in rule.items())
    return _joined(tuple(conditions))


@functools.lru_cache
def _parsed(text: str) -> Node:
    return parse_condition(text, NAMES)


@functools.lru_cache
def _joined(conditions: tuple[tuple[str, Any], ...]) -> Node:
    """The tree of a mapping."""
    return Junction(tuple(node for name, wanted in conditions for node in _conditions(name, wanted)))


def _conditions(name: str, wanted: str | bool | tuple[str, ...]) -> Iterator[Node]:
    """A condition of a mapping: one part, or a comparison for each bound."""
    if name in FLAGS:
        yield _flag(name, is_wanted=wanted is True)
    elif name == ORACLE_CONDITION:
        yield _flag("oracle_agrees", is_wanted=wanted == "agrees")
    elif not isinstance(wanted, bool):
        for text in [wanted] if isinstance(wanted, str) else wanted:
            match = _COMPARISON.fullmatch(text)
            assert match is not None, "rules are checked when the job is read"
            yield Comparison(Name(name, NAMES[name]), match[1], Literal(float(match[2])))


def _flag(name: str, *, is_wanted: bool) -> Node:
    flag = Name(name, NAMES[name])
    return flag if is_wanted else Not(flag)


# Checks ---------------------------------------------------------------------------------------------------------------


def _text_problems(text: str) -> Iterator[str]:
    if odd := next((char for char in text if unicodedata.category(char) in _ODD and char not in "\n\t"), ""):
        yield f"it has the control character {odd!r}; leave it out, or write it so within quotes"
        return
    try:
        tree = _parsed(text)
    except ConditionError as error:
        yield str(error)
        return
    yield from dict.fromkeys(_comparisons_with_unknown(tree))


def _comparisons_with_unknown(root: Node) -> Iterator[str]:
    """Comparisons by == or != with the value that says that a score was not measured: they are unknown, or decided."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        waiting += reversed(node.parts)
        if not isinstance(node, Comparison) or node.sign not in ("==", "!="):
            continue
        for one, other in ((node.left, node.right), (node.right, node.left)):
            if not isinstance(one, Name) or one.name not in BY_NAME or not isinstance(other, Literal):
                continue
            if not BY_NAME[one.name].is_known(other.value):
                yield (
                    f"'{one.name} {node.sign} {other.value:g}' compares with the value that stands for unknown, of"
                    " which no condition holds; leave it out: a sample whose rule is unknown is not accepted"
                )


def _unknown_condition(name: str, wanted: Any) -> str:
    """What is wrong with a key that is no condition of a mapping."""
    if name not in NAMES or NAMES[name].refusal:
        return f"unknown condition; use {', '.join((*FLAGS, ORACLE_CONDITION, *SCORES))}"
    kind = NAMES[name].kind
    text = {NUMBER: f"{name} >= 1", TEXT: f"{name} == 'a'"}.get(kind, f"not {name}" if wanted is False else name)
    return f'a mapping has no such condition; write the rule as a text, such as accept: "{text}"'


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

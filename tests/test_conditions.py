"""The language of conditions: one grammar, and two evaluations of it that agree, on records and in Arrow."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.reading.filters import Vocabulary, compile_filter
from engine.data.run.outcomes import asked_classes
from engine.data.run.schema import arrow_schema
from engine.errors import JobError
from engine.job.acceptance import LATER, NAMES, is_accepted, measuring_roles, rule_names
from engine.job.columns import BY_NAME, DERIVED_NAMES, RECORD_COLUMNS, SCHEMA_VERSION, SURPLUS
from engine.job.conditions import (
    FLAG,
    MAX_DEPTH,
    NUMBER,
    TEXT,
    Arithmetic,
    ConditionError,
    evaluate,
    names_of,
    parse_condition,
    parse_number,
)
from tests.job_cases import as_text, rules

_FLOATS = st.sampled_from([-1.0, -0.0, 0.0, 0.3, 0.5, 0.9, 0.99, 1.0, 2.0, 3.0, 1e-9])
_INTS = st.integers(-1, 3)
_TEXTS = st.sampled_from(["", "red", "a'b", "ü", "zero"])
# A seed is too large for a float of 32 bits.
_OF_TYPES = {"float": _FLOATS, "int": st.one_of(_INTS, st.just(2**52 + 1)), "bool": st.booleans(), "str": _TEXTS}
_USABLE = {kind: [name for name, one in NAMES.items() if one.kind == kind and not one.refusal]
           for kind in (NUMBER, TEXT, FLAG)}  # fmt: skip


@st.composite
def _rows(draw: st.DrawFn) -> dict[str, Any]:
    """A row of metadata.parquet: of one class or of a joint prompt, scored or not, with all that is optional or not."""
    row = {column.name: draw(_OF_TYPES[column.type]) for column in RECORD_COLUMNS if not column.is_list}
    classes = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True))
    code = "mix" if len(classes) > 1 else f"{classes[0]:03d}"
    row |= {column.name: [] for column in RECORD_COLUMNS if column.is_list}
    row |= {
        "key": f"demo-000-{code}-{draw(st.integers(0, 9)):08d}",
        "class_index": classes[0],
        "kldb_classes": classes if len(classes) > 1 else [classes[0], (classes[0] + 1) % 4],
        "is_error": row["predicted_class"] != classes[0],
        "status": "ok" if row["scored"] else "failed",
        "method": "prompt",
        SURPLUS.name: False,
    }
    if draw(st.booleans()):
        row["judge"] = [{"model": "j", "conformity": draw(_FLOATS), "conformity_margin": draw(_FLOATS)}]
    return row


_LITERALS = st.one_of(_INTS.map(str), _FLOATS.map(repr), st.sampled_from(["4503599627370497", "1e6", "- 2"]))
_NUMBERS = st.one_of(st.sampled_from(_USABLE[NUMBER]), _LITERALS, st.sampled_from(_USABLE[NUMBER]).map("-{}".format))
_STRINGS = st.one_of(st.sampled_from(_USABLE[TEXT]), _TEXTS.map(repr))
_SIGNS = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
_EQUALS = st.sampled_from(["==", "!="])
_IN = st.sampled_from(["in", "not in"])
_ATOMS = st.one_of(
    st.sampled_from([*_USABLE[FLAG], "True", "False"]),
    st.builds("{} {} {}".format, _NUMBERS, _SIGNS, _NUMBERS),
    st.builds("{} {} {} {} {}".format, _NUMBERS, _SIGNS, _NUMBERS, _SIGNS, _NUMBERS),
    st.builds("{} {} {}".format, _STRINGS, _SIGNS, _STRINGS),
    st.builds("{} {} {}".format, st.sampled_from(_USABLE[FLAG]), _EQUALS, st.sampled_from(["True", "screened"])),
    st.builds("{} {} {}".format, _NUMBERS, _IN, st.lists(st.one_of(_INTS, _FLOATS), max_size=3)),
    st.builds("{} {} {}".format, _STRINGS, _IN, st.lists(_TEXTS, max_size=3)),
    st.builds("{} {} [True]".format, st.sampled_from(_USABLE[FLAG]), _IN),
)
_CONDITIONS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.builds("not ({})".format, inner),
        st.builds("({}) {} ({})".format, inner, st.sampled_from(["and", "or", "=="]), inner),
        st.builds("({}) and ({}) and ({})".format, inner, inner, inner),
    ),
    max_leaves=6,
)


@functools.cache
def _vocabulary() -> Vocabulary:
    return Vocabulary(arrow_schema(surplus=True, version=SCHEMA_VERSION), lambda: 3)


def _selected(rows: list[dict[str, Any]], condition: str) -> list[bool]:
    """For each row whether Arrow selects it."""
    schema = arrow_schema(surplus=True, version=SCHEMA_VERSION)
    table = pa.Table.from_pylist([row | {"sha256": str(place)} for place, row in enumerate(rows)], schema)
    kept = set(table.filter(compile_filter(condition, _vocabulary()))["sha256"].to_pylist())
    return [str(place) in kept for place in range(len(rows))]


@settings(max_examples=100)
@given(rows=st.lists(_rows(), min_size=4, max_size=12), condition=_CONDITIONS)
def test_a_rule_accepts_what_a_filter_selects(rows: list[dict[str, Any]], condition: str) -> None:
    """Any text on any rows, with unknown values in any place; a joint sample's errors by the column, and outside."""
    asked = [asked_classes(row) for row in rows]
    of_column = [is_accepted(condition, row, classes, 2) for row, classes in zip(rows, asked, strict=True)]
    assert of_column == _selected(rows, condition)
    outside = [is_accepted(condition, row, classes) for row, classes in zip(rows, asked, strict=True)]
    assert outside == _selected(rows, condition.replace("is_error", "target_errs"))


@settings(max_examples=5)
@given(rows=st.lists(_rows(), min_size=12, max_size=12))
def test_every_name_has_one_value_in_rules_and_filters(rows: list[dict[str, Any]]) -> None:
    """Also unknown where it is unknown: neither the condition nor its opposite holds."""
    wanted = {NUMBER: "0.5 <= {}", TEXT: "{} == 'red'", FLAG: "{}"}
    for name in sorted({*_USABLE[NUMBER], *_USABLE[TEXT], *_USABLE[FLAG]} - {"is_error"}):
        for condition in (wanted[NAMES[name].kind].format(name), f"not ({wanted[NAMES[name].kind].format(name)})"):
            accepted = [is_accepted(condition, row, asked_classes(row)) for row in rows]
            assert accepted == _selected(rows, condition), condition


# Mappings -------------------------------------------------------------------------------------------------------------


def _held(rule: dict[str, Any], record: dict[str, Any], subset: tuple[int, ...], version: int) -> bool:
    """Mappings as they were evaluated before there were texts, condition by condition."""
    signs = {"<": float.__lt__, "<=": float.__le__, ">": float.__gt__, ">=": float.__ge__}
    for name, wanted in rule.items():
        if name == "is_error" and len(subset) > 1 and version >= 3:
            holds = (record["predicted_class"] not in subset) == wanted
        elif isinstance(wanted, bool):
            holds = record[name] == wanted
        elif name == "oracle":
            holds = (record["oracle_class"] in subset) == (wanted == "agrees")
        else:
            of_judge = name.startswith("judge_")
            value = record["judge"][0][name.removeprefix("judge_")] if of_judge else record[name]
            bounds = [bound.split() for bound in ([wanted] if isinstance(wanted, str) else wanted)]
            is_known = of_judge or value != -1 or not BY_NAME[name].is_optional
            holds = is_known and all(signs[sign](value, float(bound)) for sign, bound in bounds)
        if not holds:
            return False
    return True


@settings(max_examples=100)
@given(row=_rows(), rule=rules(), version=st.sampled_from([1, 2, 3, SCHEMA_VERSION]))
def test_a_mapping_means_its_text_and_what_it_meant_before(
    row: dict[str, Any], rule: dict[str, Any], version: int
) -> None:
    judge = row["judge"] or [{"model": "j", "conformity": 0.3, "conformity_margin": 0.1}]
    record, subset = row | {"scored": True, "status": "", "judge": judge}, asked_classes(row)
    expected = _held(rule, record, subset, version)
    assert is_accepted(rule, record, subset, version) is expected
    assert not rule or is_accepted(as_text(rule), record, subset, version) is expected


# Parsing --------------------------------------------------------------------------------------------------------------


def test_every_name_can_be_used_or_says_why_not() -> None:
    """Columns, derived names and what is only known later; a later column cannot be forgotten."""
    known = {*BY_NAME, *DERIVED_NAMES, "human_agreement"}
    assert set(NAMES) == known
    refused = {name for name, one in NAMES.items() if one.refusal}
    assert refused == {*LATER, *(column.name for column in RECORD_COLUMNS if column.is_list)}
    for name in refused:
        with pytest.raises(ConditionError, match=f"'{name}' (is|says|depends)"):
            parse_condition(f"{name} == 1", NAMES)


def test_names_are_listed_in_the_order_of_the_text() -> None:
    text = "risk > 1 and (not is_error or 0 < -kldb < risk) and class_name in ['a'] and screened == oracle_agrees"
    assert rule_names(text) == ("risk", "is_error", "kldb", "class_name", "screened", "oracle_agrees")
    assert names_of(parse_number("risk + 2 * (kldb - is_error)", NAMES)) == ("risk", "kldb", "is_error")
    assert rule_names({"is_error": True, "oracle": "agrees"}) == ("is_error", "oracle")
    assert rule_names("rsik > 1") == ()


def test_roles_are_those_of_the_columns_that_a_name_needs() -> None:
    expected = {
        "risk": {"target"}, "valid_failure": {"target", "oracle"}, "oracle": {"oracle"}, "label_is_valid": {"oracle"},
        "p_valid": {"oracle"}, "judge_conformity": {"judge"}, "twin_psnr_db": {"pixels"}, "context": set(),
    }  # fmt: skip
    assert {name: set(measuring_roles(name)) for name in expected} == expected


@pytest.mark.parametrize("piece", ["not {}", "-{} > 0", "({} or is_error)", "({}) == is_error"])
def test_a_text_is_nested_no_deeper_than_every_walk_can_go(piece: str) -> None:
    """The limit is the language's own, so that a worker deep in its calls reads what the command line read."""

    def nested(depth: int) -> str:
        inner = "risk" if piece.startswith("-") else "is_error"
        if piece.startswith("-"):
            return "-" * depth + inner + " > 0"
        for _ in range(depth):
            inner = piece.format(inner)
        return inner

    deep = next(depth for depth in itertools.count(150) if _is_refused(nested(depth + 1)))
    assert MAX_DEPTH - 5 <= deep <= MAX_DEPTH
    tree = parse_condition(nested(deep), NAMES)
    assert _at_depth(300, lambda: evaluate(tree, lambda name: 1.0 if name == "risk" else True)) in (True, False)
    compile_filter(nested(deep), _vocabulary())


def _is_refused(text: str) -> bool:
    try:
        parse_condition(text, NAMES)
    except ConditionError as error:
        assert "nested too deep" in str(error) or "too many nested parentheses" in str(error)
        return True
    return False


def _at_depth(calls: int, function: Any) -> Any:
    return function() if not calls else _at_depth(calls - 1, function)


def test_arithmetic_has_no_place_in_a_condition() -> None:
    with pytest.raises(ConditionError, match="'risk \\+ 1' is not of this language"):
        parse_condition("risk + 1 > 2", NAMES)
    tree = parse_number("risk + 1", NAMES)
    assert isinstance(tree, Arithmetic)
    with pytest.raises(TypeError, match="Arithmetic has no place in a condition"):
        evaluate(tree, lambda name: 1.0)


def test_whole_numbers_are_compared_with_others_exactly_enough() -> None:
    """Arrow itself would take a number that is written out for a float of 32 bits, and fail on a seed."""
    rows = [{"seed": seed} for seed in (5, 2**30 + 1, 2**53 - 1)]
    table = pa.Table.from_pylist(rows)
    words = Vocabulary(arrow_schema(surplus=True, version=SCHEMA_VERSION), lambda: 0)
    for text in ("seed > 1.5", "seed > 1e6", "1e6 < seed", "seed >= 1073741825.0", "seed in [5.0, 1.5]"):
        wanted = [row["seed"] for row in rows if eval(text, {}, row)]
        assert table.filter(compile_filter(text, words))["seed"].to_pylist() == wanted
    with pytest.raises(JobError, match="too large"):
        compile_filter("seed > 1e999", words)

"""The filter language: a condition on columns, as text, compiled to an Arrow expression that parquet readers push down.

    risk > 2 and 0.25 < conformity <= 0.9 and oracle_agrees and class_name in ["three", "eight"]

It is the grammar of Python, of which only what is listed in `docs/reading.md` is let through; nothing is evaluated.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.data.run.outcomes import (
    element,
    is_scored_expression,
    label_is_valid_expression,
    predicts_asked_expression,
    target_errs_expression,
)
from engine.errors import JobError
from engine.job.columns import BY_NAME, DERIVED_NAMES, ENTRY_SCORES, MEASURED, NO_CLASS, UNKNOWN, EntryScore
from engine.job.spec_messages import nearest

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.compute import Expression

NUMBER, TEXT, FLAG = "number", "text", "flag"
_EXAMPLES = {NUMBER: "1 + risk", FLAG: "risk > 2 and oracle_agrees"}
MAX_CHARS = 100_000
MAX_PARTS = 500
_MAX_SHOWN = 60
_INT64 = 2**63
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}  # fmt: skip


def _divide(left: Expression, right: Expression) -> Expression:
    """By zero it is infinite, or not a number; Arrow's own `/` would fail for all rows."""
    import pyarrow.compute as pc

    return pc.divide(left, right)


_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: _divide,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Term:
    """A part of a condition with its kind; `value` is set for literals alone."""

    expression: Expression
    kind: str
    is_integer: bool = False
    value: Any = None


class Vocabulary:
    """The names that an expression may use.

    What a model measured is unknown of rows that were not scored, whatever number is stored there; so is an optional
    score of those that lack it.

    Args:
        schema: of the metadata.
        max_subset: largest number of classes of a joint prompt; asked for where a derived name needs it.
    """

    def __init__(self, schema: pa.Schema, max_subset: Callable[[], int]) -> None:
        self._schema = schema
        self._max_subset = max_subset
        self.names = [*schema.names, *(name for name in DERIVED_NAMES if _can_derive(name, schema))]

    def term(self, name: str, *, is_guarded: bool = True) -> Term | None:
        """The term of a column or derived name; None for a column that is a list.

        Args:
            is_guarded: whether it is unknown where it was not measured; else it is what is stored.

        Raises:
            KeyError: there is no such name.
        """
        import pyarrow.compute as pc

        term = self._plain_term(name)
        if term is None or not is_guarded or (name in self._schema.names and name not in MEASURED):
            return term
        measured = self.is_scored
        if name in self._schema.names and BY_NAME[name].is_optional:
            measured = measured & (term.expression != BY_NAME[name].empty)
        if name == "label_is_valid":
            measured = measured & ~((pc.field("p_valid") == UNKNOWN) & (pc.field("oracle_p_label_min") == UNKNOWN))
        return replace(term, expression=_known_where(measured, term.expression))

    @property
    def is_scored(self) -> Expression:
        """Whether models scored a row."""
        return is_scored_expression(self._schema.names)

    def _plain_term(self, name: str) -> Term | None:
        import pyarrow as pa
        import pyarrow.compute as pc

        if name == "scored" and name in self._schema.names:
            return Term(self.is_scored, FLAG)
        if name in self._schema.names:
            kind = _kind_of(self._schema.field(name).type)
            is_integer = pa.types.is_integer(self._schema.field(name).type)
            return Term(pc.field(name), kind, is_integer) if kind else None
        if name not in self.names:
            raise KeyError(name)
        if name in ENTRY_SCORES:
            return Term(_entry_score(self._schema, ENTRY_SCORES[name]), NUMBER)
        errs = target_errs_expression(self._max_subset())
        agrees = predicts_asked_expression("oracle_class", self._max_subset()) & (pc.field("oracle_class") != NO_CLASS)
        if name == "label_is_valid":
            return Term(label_is_valid_expression(), FLAG)
        return Term({"target_errs": errs, "oracle_agrees": agrees, "valid_failure": errs & agrees}[name], FLAG)


def _known_where(condition: Expression, expression: Expression) -> Expression:
    """An expression that is unknown where a condition does not hold."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.if_else(condition, expression, pa.scalar(None))


def compile_filter(text: str, vocabulary: Vocabulary, option: str = "filter") -> Expression:
    """The condition as an Arrow expression.

    Args:
        option: what the user gave the text by, for messages.

    Raises:
        JobError: the text is not of the language, or names what is not there; the message gives the place.
    """
    exact = _Compiler(text, vocabulary, option, has_arithmetic=False).compiled(FLAG).expression
    # Whatever passes with unknown parts passes with any value in their place, so the second changes nothing; and
    # readers of parquet see through it, by the statistics of a column, that no row of a group passes.
    plain = _Compiler(text, vocabulary, option, has_arithmetic=False, is_guarded=False).compiled(FLAG).expression
    return exact & plain


def compile_number(text: str, vocabulary: Vocabulary, option: str) -> Expression:
    """A number for each row, as an Arrow expression of doubles: columns, `+ - * /`, and conditions as 0 or 1.

    Raises:
        JobError: as `compile_filter`.
    """
    import pyarrow as pa

    compiler = _Compiler(text, vocabulary, option, has_arithmetic=True)
    return compiler.compiled(NUMBER).expression.cast(pa.float64())


class _Compiler:
    """Walks the syntax tree of one text; every method gives the term of a node or raises with its place."""

    def __init__(
        self, text: str, vocabulary: Vocabulary, option: str, *, has_arithmetic: bool, is_guarded: bool = True
    ) -> None:
        self._text = text
        self._is_guarded = is_guarded
        self._vocabulary = vocabulary
        self._option = option
        self._has_arithmetic = has_arithmetic
        self._num_parts = 0

    def compiled(self, wanted: str) -> Term:
        if len(self._text) > MAX_CHARS:
            raise self._refusal(None, f"it has {len(self._text)} characters; up to {MAX_CHARS} are read")
        try:
            root = ast.parse(self._text.strip(), mode="eval").body
            term = self._term(root)
        except SyntaxError as error:
            place = "" if error.offset is None else f"at character {error.offset}: "
            raise self._refusal(None, f"{place}{error.msg}; write such as {_EXAMPLES[wanted]}") from None
        except (ValueError, MemoryError, RecursionError):
            what = "it cannot be read: a character that no text has, a huge number, or nested too deep"
            raise self._refusal(None, what) from None
        if wanted == NUMBER and term.kind == FLAG:
            return _as_number(term)
        if term.kind != wanted:
            hint = "a condition is needed, such as risk > 2" if wanted == FLAG else "a number is needed"
            raise self._refusal(root, f"is a {term.kind}; {hint}")
        return term

    def _term(self, node: ast.expr) -> Term:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise self._refusal(node, f"is one part too many; up to {MAX_PARTS} are read (a list counts as one)")
        match node:
            case ast.Constant():
                return self._literal(node)
            case ast.Name():
                return self._name(node)
            case ast.BoolOp():
                join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
                parts = [self._flag(operand).expression for operand in node.values]
                return Term(functools.reduce(join, parts), FLAG)
            case ast.UnaryOp(op=ast.Not()):
                return Term(~self._flag(node.operand).expression, FLAG)
            case ast.UnaryOp(op=ast.USub()):
                return self._negative(node)
            case ast.Compare():
                return self._comparison(node)
            case ast.BinOp() if self._has_arithmetic and type(node.op) in _ARITHMETIC:
                left, right = (_as_double(self._number(operand)) for operand in (node.left, node.right))
                return Term(_ARITHMETIC[type(node.op)](left, right), NUMBER)
        more = ", + - * /" if self._has_arithmetic else ""
        raise self._refusal(
            node, f"is not of this language: comparisons, and, or, not, in [...], columns, texts, numbers{more}"
        )

    def _name(self, node: ast.Name) -> Term:
        try:
            term = self._vocabulary.term(node.id, is_guarded=self._is_guarded)
        except KeyError:
            hint = nearest(node.id, [*self._vocabulary.names, "True", "False"])
            others = hint or f"; the columns are {', '.join(self._vocabulary.names)}"
            raise self._refusal(node, f"is not a column{others}") from None
        if term is None:
            raise self._refusal(node, "is a column of lists, which cannot be compared")
        return term

    def _literal(self, node: ast.Constant) -> Term:
        import pyarrow.compute as pc

        value = node.value
        if isinstance(value, bool):
            return Term(pc.scalar(value), FLAG, value=value)
        if isinstance(value, str):
            if not _is_unicode(value):
                raise self._refusal(node, "is not a text in Unicode")
            return Term(pc.scalar(value), TEXT, value=value)
        if isinstance(value, int | float):
            return self._number_literal(node, value)
        raise self._refusal(node, "is neither a number nor a text nor True or False")

    def _number_literal(self, node: ast.expr, value: float) -> Term:
        import pyarrow.compute as pc

        if isinstance(value, int) and not -_INT64 <= value < _INT64:
            try:
                value = float(value)
            except OverflowError:
                value = math.inf
        if not math.isfinite(value):
            raise self._refusal(node, "is too large for a number")
        return Term(pc.scalar(value), NUMBER, isinstance(value, int), value)

    def _negative(self, node: ast.UnaryOp) -> Term:
        import pyarrow.compute as pc

        if isinstance(node.operand, ast.Constant) and isinstance(node.operand.value, int | float):
            return self._number_literal(node, -node.operand.value)
        inner = self._number(node.operand)
        return Term(pc.negate(inner.expression), NUMBER, inner.is_integer)

    def _flag(self, node: ast.expr) -> Term:
        term = self._term(node)
        if term.kind != FLAG:
            raise self._refusal(node, f"is a {term.kind}; compare it, as in risk > 2")
        return term

    def _number(self, node: ast.expr) -> Term:
        term = self._term(node)
        if term.kind == FLAG and self._has_arithmetic:
            return _as_number(term)
        if term.kind != NUMBER:
            raise self._refusal(node, f"is a {term.kind}; a number is needed")
        return term

    def _comparison(self, node: ast.Compare) -> Term:
        parts = []
        left_node, left = node.left, self._term(node.left)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn):
                parts.append(self._membership(left_node, left, right_node, is_negated=isinstance(op, ast.NotIn)))
                break
            if type(op) not in _COMPARE:
                raise self._refusal(node, "compares by `is`; use ==")
            right = self._term(right_node)
            self._check_kinds(node, left, right, op)
            parts.append(_COMPARE[type(op)](left.expression, right.expression))
            left_node, left = right_node, right
        if len(parts) < len(node.ops):
            raise self._refusal(node, "compares on after `in`; join the two with `and`")
        return Term(functools.reduce(operator.and_, parts), FLAG)

    def _check_kinds(self, node: ast.Compare, left: Term, right: Term, op: ast.cmpop) -> None:
        if left.kind != right.kind:
            raise self._refusal(node, f"compares a {left.kind} with a {right.kind}")
        if left.kind == FLAG and not isinstance(op, ast.Eq | ast.NotEq):
            raise self._refusal(node, "orders flags; they are equal or not")

    def _membership(self, node: ast.expr, left: Term, choices: ast.expr, *, is_negated: bool) -> Expression:
        import pyarrow as pa

        if not isinstance(choices, ast.List | ast.Tuple | ast.Set):
            raise self._refusal(choices, "is not a list; write it as [1, 2]")
        terms = [self._choice(choice, left) for choice in choices.elts]
        values = [term.value for term in terms]
        if left.kind == NUMBER:
            whole = left.is_integer and all(term.is_integer for term in terms)
            kind = pa.int64() if whole else pa.float64()
            member = left.expression.cast(kind).isin(pa.array(values, kind))
        else:
            member = left.expression.isin(pa.array(values, pa.bool_() if left.kind == FLAG else pa.string()))
        if self._is_guarded:
            # What is not known is neither in a list nor outside of it.
            member = _known_where(left.expression.is_valid(), member)
        return ~member if is_negated else member

    def _choice(self, node: ast.expr, left: Term) -> Term:
        if isinstance(node, ast.Constant):
            term = self._literal(node)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            term = self._negative(node)
        else:
            raise self._refusal(node, "is not a number or text; a list holds nothing else")
        if term.kind != left.kind:
            raise self._refusal(node, f"is a {term.kind} in a list for a {left.kind}")
        return term

    def _refusal(self, node: ast.expr | None, what: str) -> JobError:
        text = _short(self._text)
        if node is None:
            return JobError(f"{self._option} {text}: {what}")
        stripped = self._text.strip()
        lead = len(self._text) - len(self._text.lstrip())
        line = stripped.splitlines()[node.lineno - 1] if stripped else ""
        place = lead + len(line.encode()[: node.col_offset].decode(errors="replace")) + 1
        part = _short(ast.get_source_segment(stripped, node) or "")
        return JobError(f"{self._option} {text}: at character {place}: {part} {what}")


def _kind_of(kind: pa.DataType) -> str:
    import pyarrow as pa

    if pa.types.is_boolean(kind):
        return FLAG
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return NUMBER
    return TEXT if pa.types.is_string(kind) or pa.types.is_large_string(kind) else ""


def _can_derive(name: str, schema: pa.Schema) -> bool:
    """Whether a derived name's columns are there, and none has its name."""
    return name not in schema.names and set(DERIVED_NAMES[name].needs) <= set(schema.names)


def _entry_score(schema: pa.Schema, entry: EntryScore) -> Expression:
    """A score of the first entry of a list column."""
    import pyarrow.compute as pc

    place = schema.field(entry.column.name).type.value_type.get_field_index(entry.part.name)
    return pc.struct_field(element(pc.field(entry.column.name), 0), [place])


def _as_number(flag: Term) -> Term:
    import pyarrow as pa

    return Term(flag.expression.cast(pa.float64()), NUMBER)


def _as_double(term: Term) -> Expression:
    import pyarrow as pa

    return term.expression.cast(pa.float64())


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "...")

"""Filters: a condition on columns, as text, compiled to an Arrow expression that parquet readers push down.

The language is that of `engine.job.conditions`; what is here translates its trees.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
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
from engine.job.conditions import (
    COMPARE,
    FLAG,
    LIST_REFUSAL,
    NUMBER,
    TEXT,
    Arithmetic,
    AsNumber,
    Comparison,
    ConditionError,
    Junction,
    Literal,
    Membership,
    Name,
    NameType,
    Negative,
    Node,
    Not,
    parse_condition,
    parse_number,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.compute import Expression


def _divide(left: Expression, right: Expression) -> Expression:
    """By zero it is infinite, or not a number; Arrow's own `/` would fail for all rows."""
    import pyarrow.compute as pc

    return pc.divide(left, right)


_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": _divide,
}  # fmt: skip


class Vocabulary:
    """The names that an expression may use.

    What a model measured is unknown of rows that were not scored, whatever number is stored there; so is an optional
    score of those that lack it.

    Attributes:
        types: of each name what it stands for: columns, then derived names.

    Args:
        schema: of the metadata.
        max_subset: largest number of classes of a joint prompt; asked for where a derived name needs it.
        agreements: share of raters who say the label, by key; asked for in the same way.
    """

    def __init__(
        self, schema: pa.Schema, max_subset: Callable[[], int], agreements: Callable[[], Mapping[str, float]] = dict
    ) -> None:
        self._schema = schema
        self._max_subset = max_subset
        self._agreements = agreements
        self.types: dict[str, NameType] = {field.name: _type_of(field.type) for field in schema}
        self.types |= {
            name: NameType(derived.kind) for name, derived in DERIVED_NAMES.items() if _can_derive(name, schema)
        }

    @property
    def names(self) -> list[str]:
        """Columns and derived names."""
        return list(self.types)

    def expression(self, name: str, *, is_guarded: bool = True) -> Expression:
        """The values of a name.

        Args:
            is_guarded: whether it is unknown where it was not measured; else it is what is stored.
        """
        import pyarrow.compute as pc

        plain = self._plain(name)
        if name == "human_agreement" and name not in self._schema.names:
            return plain
        if not is_guarded or (name in self._schema.names and name not in MEASURED):
            return plain
        measured = self.is_scored
        if name in self._schema.names and BY_NAME[name].is_optional:
            measured = measured & (plain != BY_NAME[name].empty)
        if name == "label_is_valid":
            measured = measured & ~((pc.field("p_valid") == UNKNOWN) & (pc.field("oracle_p_label_min") == UNKNOWN))
        return _known_where(measured, plain)

    @property
    def is_scored(self) -> Expression:
        """Whether models scored a row."""
        return is_scored_expression(self._schema.names)

    def _plain(self, name: str) -> Expression:
        import pyarrow.compute as pc

        if name == "scored" and name in self._schema.names:
            return self.is_scored
        if name in self._schema.names:
            return pc.field(name)
        if name in ENTRY_SCORES:
            return _entry_score(self._schema, ENTRY_SCORES[name])
        if name == "label_is_valid":
            return label_is_valid_expression()
        if name == "human_agreement":
            return _by_key(self._agreements())
        errs = target_errs_expression(self._max_subset())
        agrees = predicts_asked_expression("oracle_class", self._max_subset()) & (pc.field("oracle_class") != NO_CLASS)
        return {"target_errs": errs, "oracle_agrees": agrees, "valid_failure": errs & agrees}[name]


def _by_key(values: Mapping[str, float]) -> Expression:
    """A number by the key of a row, unknown of other keys; there are few different numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    keys: dict[float, list[str]] = {}
    for key, value in values.items():
        keys.setdefault(value, []).append(key)
    joined = pc.scalar(pa.scalar(None, pa.float64()))
    for value, some in sorted(keys.items()):
        joined = pc.if_else(pc.field("key").isin(pa.array(some, pa.string())), pc.scalar(value), joined)
    return joined


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
    root = _parsed(parse_condition, text, vocabulary, option)
    # Whatever passes with unknown parts passes with any value in their place, so the second changes nothing; and
    # readers of parquet see through it, by the statistics of a column, that no row of a group passes.
    return _Translation(vocabulary).of(root) & _Translation(vocabulary, is_guarded=False).of(root)


def compile_number(text: str, vocabulary: Vocabulary, option: str) -> Expression:
    """A number for each row, as an Arrow expression of doubles: columns, `+ - * /`, and conditions as 0 or 1.

    Raises:
        JobError: as `compile_filter`.
    """
    return _as_double(_Translation(vocabulary).of(_parsed(parse_number, text, vocabulary, option)))


def _parsed(
    parse: Callable[[str, Mapping[str, NameType]], Node], text: str, vocabulary: Vocabulary, option: str
) -> Node:
    try:
        return parse(text, vocabulary.types)
    except ConditionError as error:
        raise JobError(f"{option} {error}") from None


class _Translation:
    """From the nodes of a tree to Arrow expressions."""

    def __init__(self, vocabulary: Vocabulary, *, is_guarded: bool = True) -> None:
        self._vocabulary = vocabulary
        self._is_guarded = is_guarded

    def of(self, node: Node) -> Expression:
        import pyarrow.compute as pc

        match node:
            case Literal():
                return pc.scalar(node.value)
            case Name():
                return self._vocabulary.expression(node.name, is_guarded=self._is_guarded)
            case Not():
                return ~self.of(node.operand)
            case Junction():
                return functools.reduce(operator.and_ if node.is_and else operator.or_, map(self.of, node.operands))
            case Comparison():
                return self._comparison(node)
            case Membership():
                return self._membership(node)
            case Negative():
                return pc.negate(self.of(node.operand))
            case Arithmetic():
                return _ARITHMETIC[node.sign](_as_double(self.of(node.left)), _as_double(self.of(node.right)))
            case AsNumber():
                return _as_double(self.of(node.operand))
        raise TypeError(type(node).__name__)

    def _comparison(self, node: Comparison) -> Expression:
        is_mixed = node.left.kind == NUMBER and node.left.is_integer != node.right.is_integer
        left, right = ((self._double(part) if is_mixed else self.of(part)) for part in (node.left, node.right))
        return COMPARE[node.sign](left, right)

    def _double(self, node: Node) -> Expression:
        """A number that is compared with a double; Arrow itself would compare some as floats of 32 bits."""
        import pyarrow.compute as pc

        if isinstance(node, Literal):
            return pc.scalar(float(node.value))
        # Not a conversion of columns of doubles, through which readers of parquet would not see.
        return _as_double(self.of(node), is_exact=False) if node.is_integer else self.of(node)

    def _membership(self, node: Membership) -> Expression:
        import pyarrow as pa

        operand, values = self.of(node.operand), node.values
        if node.operand.kind == NUMBER:
            kind = pa.int64() if node.is_whole else pa.float64()
            # Arrow looks up bits, by which the two zeros differ.
            zeros = (0.0, -0.0) if 0 in values and not node.is_whole else ()
            member = operand.cast(kind).isin(pa.array([*values, *zeros], kind))
        else:
            member = operand.isin(pa.array(values, pa.bool_() if node.operand.kind == FLAG else pa.string()))
        if self._is_guarded:
            # What is not known is neither in a list nor outside of it.
            member = _known_where(operand.is_valid(), member)
        return ~member if node.is_negated else member


def _type_of(kind: pa.DataType) -> NameType:
    """What a column stands for."""
    import pyarrow as pa

    if pa.types.is_boolean(kind):
        return NameType(FLAG)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return NameType(NUMBER, pa.types.is_integer(kind))
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return NameType(TEXT, refusal="" if is_text else LIST_REFUSAL)


def _can_derive(name: str, schema: pa.Schema) -> bool:
    """Whether a derived name's columns are there, and none has its name."""
    return name not in schema.names and set(DERIVED_NAMES[name].needs) <= set(schema.names)


def _entry_score(schema: pa.Schema, entry: EntryScore) -> Expression:
    """A score of the first entry of a list column."""
    import pyarrow.compute as pc

    place = schema.field(entry.column.name).type.value_type.get_field_index(entry.part.name)
    return pc.struct_field(element(pc.field(entry.column.name), 0), [place])


def _as_double(expression: Expression, *, is_exact: bool = True) -> Expression:
    """A number as a double; where it has to be exact, whole numbers beyond 2^53 are an error."""
    import pyarrow as pa

    return expression.cast(pa.float64(), safe=is_exact)

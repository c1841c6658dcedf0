"""The language of conditions on a sample, as text: filters of rows, and rules of acceptance.

    risk > 2 and 0.25 < conformity <= 0.9 and oracle_agrees and class_name in ["three", "eight"]

It is the grammar of Python, of which only what is listed in `docs/reading.md` is let through. A text is parsed into a
small typed tree. `evaluate` gives its value for one record; `engine.data.reading.filters` translates it to Arrow.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.job.spec_messages import nearest
from engine.terminal import redacted

NUMBER, TEXT, FLAG = "number", "text", "flag"
_EXAMPLES = {NUMBER: "1 + risk", FLAG: "risk > 2 and oracle_agrees"}
MAX_CHARS = 100_000
MAX_PARTS = 500
# Far enough below Python's limit of nested calls for every walk over a tree, whoever starts it.
MAX_DEPTH = 200
_MAX_SHOWN = 60
# Of a name that stands for a list.
LIST_REFUSAL = "is a column of lists, which cannot be compared"
_INT64 = 2**63
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_COMPARE_SIGNS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
}  # fmt: skip
_ARITHMETIC_SIGNS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


class ConditionError(Exception):
    """A text is not of the language; the message quotes it, with the place where it can be given."""


class NameType(NamedTuple):
    """What a name stands for.

    Attributes:
        kind: NUMBER, TEXT or FLAG.
        refusal: why it cannot be used, following the name in a sentence; empty where it can.
    """

    kind: str
    is_integer: bool = False
    refusal: str = ""


class Node:
    """A part of a parsed text."""

    __slots__ = ()

    @property
    def kind(self) -> str:
        """NUMBER, TEXT or FLAG."""
        return FLAG

    @property
    def is_integer(self) -> bool:
        """Whether it is a number without fraction."""
        return False

    @property
    def parts(self) -> tuple[Node, ...]:
        """The nodes that it joins."""
        return ()


@dataclass(frozen=True, slots=True)
class Literal(Node):
    """A value that is written out: a number, a text, or True or False."""

    value: float | str

    @property
    def kind(self) -> str:
        return FLAG if isinstance(self.value, bool) else TEXT if isinstance(self.value, str) else NUMBER

    @property
    def is_integer(self) -> bool:
        return type(self.value) is int


@dataclass(frozen=True, slots=True)
class Name(Node):
    """A column or a derived name."""

    name: str
    type: NameType

    @property
    def kind(self) -> str:
        return self.type.kind

    @property
    def is_integer(self) -> bool:
        return self.type.is_integer


@dataclass(frozen=True, slots=True)
class Not(Node):
    """The opposite of a condition."""

    operand: Node

    @property
    def parts(self) -> tuple[Node, ...]:
        return (self.operand,)


@dataclass(frozen=True, slots=True)
class Junction(Node):
    """Conditions of which all hold, or any."""

    operands: tuple[Node, ...]
    is_and: bool = True

    @property
    def parts(self) -> tuple[Node, ...]:
        return self.operands


@dataclass(frozen=True, slots=True)
class Comparison(Node):
    """Two numbers, texts or flags compared; the sign is a key of `COMPARE`."""

    left: Node
    sign: str
    right: Node

    @property
    def parts(self) -> tuple[Node, ...]:
        return (self.left, self.right)


@dataclass(frozen=True, slots=True)
class Membership(Node):
    """Whether a value is one of a list.

    Attributes:
        values: as the operand is compared with them: all of its kind, whole numbers only where both sides are.
    """

    operand: Node
    values: tuple[float | str, ...]
    is_negated: bool

    @property
    def is_whole(self) -> bool:
        """Whether whole numbers are compared."""
        return self.operand.is_integer and all(type(value) is int for value in self.values)

    @property
    def parts(self) -> tuple[Node, ...]:
        return (self.operand,)


@dataclass(frozen=True, slots=True)
class Negative(Node):
    """A number with the other sign."""

    operand: Node

    @property
    def kind(self) -> str:
        return NUMBER

    @property
    def is_integer(self) -> bool:
        return self.operand.is_integer

    @property
    def parts(self) -> tuple[Node, ...]:
        return (self.operand,)


@dataclass(frozen=True, slots=True)
class Arithmetic(Node):
    """Sum, difference, product or quotient of two numbers; conditions have none."""

    left: Node
    sign: str
    right: Node

    @property
    def kind(self) -> str:
        return NUMBER

    @property
    def parts(self) -> tuple[Node, ...]:
        return (self.left, self.right)


@dataclass(frozen=True, slots=True)
class AsNumber(Node):
    """A flag as 0 or 1; conditions have none."""

    operand: Node

    @property
    def kind(self) -> str:
        return NUMBER

    @property
    def parts(self) -> tuple[Node, ...]:
        return (self.operand,)


def names_of(root: Node) -> tuple[str, ...]:
    """The names that a tree uses, each once, in the order of the text."""
    names, waiting = dict[str, None](), [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Name):
            names[node.name] = None
        waiting += reversed(node.parts)
    return tuple(names)


# Values --------------------------------------------------------------------------------------------------------------


def evaluate(node: Node, value_of: Callable[[str], Any]) -> Any:
    """The value of a condition, or of a part of it, by Kleene's logic: None is unknown.

    Args:
        value_of: the value of a name; None where it is unknown.
    """
    match node:
        case Literal():
            return node.value
        case Name():
            return value_of(node.name)
        case Not():
            inner = evaluate(node.operand, value_of)
            return None if inner is None else not inner
        case Junction():
            return _joined(node, value_of)
        case Comparison():
            left, right = evaluate(node.left, value_of), evaluate(node.right, value_of)
            return None if left is None or right is None else _compared(node, left, right)
        case Membership():
            value = evaluate(node.operand, value_of)
            return None if value is None else (value in node.values) != node.is_negated
        case Negative():
            value = evaluate(node.operand, value_of)
            return None if value is None else -value
    raise TypeError(f"{type(node).__name__} has no place in a condition")


def _joined(node: Junction, value_of: Callable[[str], Any]) -> bool | None:
    """One part decides: a false one of those that must all hold, a true one of those of which any must."""
    decides, joined = not node.is_and, node.is_and
    unknown = False
    for operand in node.operands:
        value = evaluate(operand, value_of)
        if value is decides:
            return decides
        unknown = unknown or value is None
    return None if unknown else joined


def _compared(node: Comparison, left: Any, right: Any) -> bool:
    if node.left.kind == NUMBER and node.left.is_integer != node.right.is_integer:
        # As in Arrow, where one of them is a double.
        left, right = float(left), float(right)
    return bool(COMPARE[node.sign](left, right))


# Texts ---------------------------------------------------------------------------------------------------------------


def parse_condition(text: str, names: Mapping[str, NameType]) -> Node:
    """The tree of a condition.

    Raises:
        ConditionError: the text is not of the language, or uses a name that is not there.
    """
    return _Parser(text, names, has_arithmetic=False).parsed(FLAG)


def parse_number(text: str, names: Mapping[str, NameType]) -> Node:
    """The tree of a number for each row: columns, `+ - * /`, and conditions as 0 or 1.

    Raises:
        ConditionError: as `parse_condition`.
    """
    return _Parser(text, names, has_arithmetic=True).parsed(NUMBER)


class _Parser:
    """Walks the syntax tree of one text; every method gives the node of a part or raises with its place."""

    def __init__(self, text: str, names: Mapping[str, NameType], *, has_arithmetic: bool) -> None:
        self._text = text
        self._names = names
        self._has_arithmetic = has_arithmetic
        self._num_parts = 0
        self._depth = 0

    def parsed(self, wanted: str) -> Node:
        if len(self._text) > MAX_CHARS:
            raise self._refusal(None, f"it has {len(self._text)} characters; up to {MAX_CHARS} are read")
        if not self._text.strip():
            raise self._refusal(None, f"it is empty; write such as {_EXAMPLES[wanted]}")
        try:
            root = ast.parse(self._text.strip(), mode="eval").body
            node = self._node(root)
        except SyntaxError as error:
            # Without an offset where the text ends too early; counted from 1, without the leading spaces.
            lead = len(self._text) - len(self._text.lstrip())
            place = f"at character {lead + error.offset}" if error.offset else "at its end"
            raise self._refusal(None, f"{place}: {error.msg}; write such as {_EXAMPLES[wanted]}") from None
        except (ValueError, MemoryError, RecursionError):
            what = "it cannot be read: a character that no text has, a huge number, or nested too deep"
            raise self._refusal(None, what) from None
        if wanted == NUMBER and node.kind == FLAG:
            return AsNumber(node)
        if node.kind != wanted:
            hint = "a condition is needed, such as risk > 2" if wanted == FLAG else "a number is needed"
            raise self._refusal(root, f"is a {node.kind}; {hint}")
        return node

    def _node(self, part: ast.expr) -> Node:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise self._refusal(part, f"is one part too many; up to {MAX_PARTS} are read (a list counts as one)")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise RecursionError
        node = self._node_of(part)
        self._depth -= 1
        return node

    def _node_of(self, part: ast.expr) -> Node:
        match part:
            case ast.Constant():
                return self._literal(part)
            case ast.Name():
                return self._name(part)
            case ast.BoolOp():
                operands = tuple(map(self._flag, part.values))
                return Junction(operands, is_and=isinstance(part.op, ast.And))
            case ast.UnaryOp(op=ast.Not()):
                return Not(self._flag(part.operand))
            case ast.UnaryOp(op=ast.USub()):
                return self._negative(part)
            case ast.Compare():
                return self._comparison(part)
            case ast.BinOp() if self._has_arithmetic and type(part.op) in _ARITHMETIC_SIGNS:
                left, right = map(self._number, (part.left, part.right))
                return Arithmetic(left, _ARITHMETIC_SIGNS[type(part.op)], right)
        more = ", + - * /" if self._has_arithmetic else ""
        raise self._refusal(
            part, f"is not of this language: comparisons, and, or, not, in [...], columns, texts, numbers{more}"
        )

    def _name(self, part: ast.Name) -> Node:
        known = self._names.get(part.id)
        if known is None:
            usable = [name for name, about in self._names.items() if not about.refusal]
            hint = nearest(part.id, [*usable, "True", "False"])
            raise self._refusal(part, f"is not a column{hint or '; the columns are ' + ', '.join(usable)}")
        if known.refusal:
            raise self._refusal(part, known.refusal)
        return Name(part.id, known)

    def _literal(self, part: ast.Constant) -> Literal:
        value = part.value
        if isinstance(value, bool):
            return Literal(value)
        if isinstance(value, str):
            if not _is_unicode(value):
                raise self._refusal(part, "is not a text in Unicode")
            return Literal(value)
        if isinstance(value, int | float):
            return self._number_literal(part, value)
        raise self._refusal(part, "is neither a number nor a text nor True or False")

    def _number_literal(self, part: ast.expr, value: float) -> Literal:
        if isinstance(value, int) and not -_INT64 <= value < _INT64:
            try:
                value = float(value)
            except OverflowError:
                value = math.inf
        if not math.isfinite(value):
            raise self._refusal(part, "is too large for a number")
        return Literal(value)

    def _negative(self, part: ast.UnaryOp) -> Node:
        if isinstance(part.operand, ast.Constant) and isinstance(part.operand.value, int | float):
            return self._number_literal(part, -part.operand.value)
        return Negative(self._number(part.operand))

    def _flag(self, part: ast.expr) -> Node:
        node = self._node(part)
        if node.kind != FLAG:
            raise self._refusal(part, f"is a {node.kind}; compare it, as in risk > 2")
        return node

    def _number(self, part: ast.expr) -> Node:
        node = self._node(part)
        if node.kind == FLAG and self._has_arithmetic:
            return AsNumber(node)
        if node.kind != NUMBER:
            raise self._refusal(part, f"is a {node.kind}; a number is needed")
        return node

    def _comparison(self, part: ast.Compare) -> Node:
        compared: list[Node] = []
        left_part, left = part.left, self._node(part.left)
        for op, right_part in zip(part.ops, part.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn):
                compared.append(self._membership(left_part, left, right_part, is_negated=isinstance(op, ast.NotIn)))
                break
            if type(op) not in _COMPARE_SIGNS:
                raise self._refusal(part, "compares by `is`; use ==")
            right = self._node(right_part)
            self._check_kinds(part, left, right, op)
            compared.append(Comparison(left, _COMPARE_SIGNS[type(op)], right))
            left_part, left = right_part, right
        if len(compared) < len(part.ops):
            raise self._refusal(part, "compares on after `in`; join the two with `and`")
        return compared[0] if len(compared) == 1 else Junction(tuple(compared))

    def _check_kinds(self, part: ast.Compare, left: Node, right: Node, op: ast.cmpop) -> None:
        if left.kind != right.kind:
            raise self._refusal(part, f"compares a {left.kind} with a {right.kind}")
        if left.kind == FLAG and not isinstance(op, ast.Eq | ast.NotEq):
            raise self._refusal(part, "orders flags; they are equal or not")

    def _membership(self, part: ast.expr, left: Node, choices: ast.expr, *, is_negated: bool) -> Node:
        if not isinstance(choices, ast.List | ast.Tuple | ast.Set):
            raise self._refusal(choices, "is not a list; write it as [1, 2]")
        literals = [self._choice(choice, left) for choice in choices.elts]
        is_whole = left.is_integer and all(literal.is_integer for literal in literals)
        is_double = left.kind == NUMBER and not is_whole
        values = tuple(float(literal.value) if is_double else literal.value for literal in literals)
        return Membership(left, values, is_negated)

    def _choice(self, part: ast.expr, left: Node) -> Literal:
        node: Node | None = None
        if isinstance(part, ast.Constant):
            node = self._literal(part)
        elif isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.USub) and isinstance(part.operand, ast.Constant):
            node = self._negative(part)
        if not isinstance(node, Literal):
            raise self._refusal(part, "is not a number or text; a list holds nothing else")
        if node.kind != left.kind:
            raise self._refusal(part, f"is a {node.kind} in a list for a {left.kind}")
        return node

    def _refusal(self, part: ast.expr | None, what: str) -> ConditionError:
        text = _short(self._text)
        if part is None:
            return ConditionError(f"{text}: {what}")
        stripped = self._text.strip()
        lead = len(self._text) - len(self._text.lstrip())
        line = stripped.splitlines()[part.lineno - 1] if stripped else ""
        place = lead + len(line.encode()[: part.col_offset].decode(errors="replace")) + 1
        quoted = _short(ast.get_source_segment(stripped, part) or "")
        return ConditionError(f"{text}: at character {place}: {quoted} {what}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(text: str) -> str:
    # Before it is cut: an address without its `@` is not known for one that has a password.
    text = redacted(text)
    return repr(text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "...")

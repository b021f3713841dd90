"""Filters as SQL conditions, for a backend that does not read SQL: parsed, checked against the columns, simplified.

The subset is that of docs/server.md: comparisons of a column with a value, IN, BETWEEN, LIKE, IS NULL, NOT, AND, OR
and parentheses. A condition on a missing value is neither true nor false (SQL's three-valued logic), nor is its
negation: `simplified` moves NOT down to the comparisons, after which a row matches if and only if every comparison that
makes it match is true.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from search_r3.errors import InputError

Value = str | int | float | bool
Operator = Literal["=", "!=", "<", "<=", ">", ">="]
OPPOSITE: dict[Operator, Operator] = {"=": "!=", "!=": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
MIRRORED: dict[Operator, Operator] = {"=": "=", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
OPERATORS: dict[str, Operator] = {
    "=": "=", "==": "=", "!=": "!=", "<>": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">=",
}  # fmt: skip
"""Signs, and what they mean."""
TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^']|'')*')|(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)
    |(?P<quoted>`[^`]*`)|(?P<word>[A-Za-z_][A-Za-z0-9_]*)|(?P<sign><>|!=|<=|>=|==|[=<>(),+-]))""",
    re.VERBOSE,
)
TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "integer": (int,),
    "number": (int, float),
    "true/false": (bool,),
}
DEEPEST = 50  # parentheses in each other


@dataclass(frozen=True)
class Comparison:
    """A column compared with a value of its type."""

    column: str
    operator: Operator
    value: Value


@dataclass(frozen=True)
class OneOf:
    """`column [NOT] IN (values)`."""

    column: str
    values: tuple[Value, ...]
    negated: bool = False


@dataclass(frozen=True)
class Like:
    """`column [NOT] LIKE pattern`, with % for any characters and _ for one."""

    column: str
    pattern: str
    negated: bool = False


@dataclass(frozen=True)
class IsNull:
    """`column IS [NOT] NULL`."""

    column: str
    negated: bool = False


@dataclass(frozen=True)
class Not:
    """The negation of a condition."""

    condition: Condition


@dataclass(frozen=True)
class Joined:
    """Conditions joined by "AND" or "OR"."""

    word: Literal["AND", "OR"]
    conditions: tuple[Condition, ...]


Condition = Comparison | OneOf | Like | IsNull | Not | Joined


def parse_condition(where: str, columns: Mapping[str, str]) -> Condition:
    """The condition that `where` states.

    Args:
        columns: column name -> "text", "integer", "number" or "true/false".

    Raises:
        InputError: it is no such condition, or a column is unknown or compared with a value of another type.
    """
    parser = _Parser(where, columns)
    condition = parser.joined("OR")
    parser.end()
    return condition


def simplified(condition: Condition, negated: bool = False) -> Condition:
    """The same condition (its negation if `negated`) without `Not`."""
    if isinstance(condition, Not):
        return simplified(condition.condition, not negated)
    if isinstance(condition, Joined):
        word = condition.word if not negated else ("OR" if condition.word == "AND" else "AND")
        return Joined(word, tuple(simplified(part, negated) for part in condition.conditions))
    if not negated:
        return condition
    if isinstance(condition, Comparison):
        return replace(condition, operator=OPPOSITE[condition.operator])
    return replace(condition, negated=not condition.negated)


class _Parser:
    """Recursive descent over the tokens of one condition."""

    def __init__(self, where: str, columns: Mapping[str, str]) -> None:
        self._where, self._columns = where, columns
        self._tokens: list[tuple[str, str]] = []
        self._next = self._depth = 0
        position = 0
        while where[position:].strip():
            found = TOKEN.match(where, position)
            if found is None:
                raise self._error(f"{where[position:].strip()[:20]!r} is not understood")
            self._tokens.append((str(found.lastgroup), found[str(found.lastgroup)]))
            position = found.end()

    def _error(self, reason: str) -> InputError:
        listed = ", ".join(f"{name} ({kind})" for name, kind in self._columns.items())
        return InputError(
            f"the filter {self._where!r} cannot be used ({reason}); columns: {listed}; text goes in single quotes, as "
            "in title = 'Guide'; conditions are comparisons, IN, BETWEEN, LIKE and IS NULL, joined by AND, OR and NOT"
        )

    def end(self) -> None:
        if self._next < len(self._tokens):
            raise self._error(f"{self._tokens[self._next][1]!r} is not expected there")

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._next] if self._next < len(self._tokens) else ("end", "its end")

    def _take(self, *words: str) -> bool:
        """Take the next token if it is one of these words or signs."""
        kind, text = self._peek()
        taken = kind in ("word", "sign") and text.upper() in words
        self._next += taken
        return taken

    def _expect(self, *words: str) -> None:
        if not self._take(*words):
            raise self._error(f"{' or '.join(words)} is expected instead of {self._peek()[1]!r}")

    def joined(self, word: Literal["AND", "OR"]) -> Condition:
        parts = [self._operand(word)]
        while self._take(word):
            parts.append(self._operand(word))
        return parts[0] if len(parts) == 1 else Joined(word, tuple(parts))

    def _operand(self, word: str) -> Condition:
        return self.joined("AND") if word == "OR" else self._negation()

    def _negation(self) -> Condition:
        self._depth += 1
        if self._depth > DEEPEST:
            raise self._error("too many parentheses")
        try:
            if self._take("NOT"):
                return Not(self._negation())
            if self._take("("):
                inside = self.joined("OR")
                self._expect(")")
                return inside
            return self._predicate()
        finally:
            self._depth -= 1

    def _predicate(self) -> Condition:
        if (value := self._value()) is not None:
            operator = self._operator()
            column = self._column()
            return self._comparison(column, MIRRORED[operator], value)
        column = self._column()
        if self._take("IS"):
            negated = self._take("NOT")
            self._expect("NULL")
            return IsNull(column, negated)
        negated = self._take("NOT")
        if self._take("IN"):
            return OneOf(column, self._list(column), negated)
        if self._take("LIKE"):
            return Like(column, self._pattern(column), negated)
        if self._take("BETWEEN"):
            least = self._required(column)
            self._expect("AND")
            both = Joined("AND", (Comparison(column, ">=", least), Comparison(column, "<=", self._required(column))))
            return Not(both) if negated else both
        if negated:
            raise self._error(f"IN, LIKE or BETWEEN is expected instead of {self._peek()[1]!r}")
        if self._columns[column] == "true/false" and self._peek()[1].upper() in ("AND", "OR", ")", "ITS END"):
            return Comparison(column, "=", True)
        return self._comparison(column, self._operator(), self._required(column))

    def _operator(self) -> Operator:
        for sign, operator in OPERATORS.items():
            if self._take(sign):
                return operator
        raise self._error(f"a comparison is expected instead of {self._peek()[1]!r}")

    def _column(self) -> str:
        kind, text = self._peek()
        name = text.lower() if kind == "word" else text[1:-1] if kind == "quoted" else ""
        if name not in self._columns:
            raise self._error(f"there is no column {text!r}" if name else f"a column is expected instead of {text!r}")
        self._next += 1
        return name

    def _value(self) -> Value | None:
        """The value that follows, or None (with nothing taken) if none does."""
        start = self._next
        sign = -1 if self._take("-") else 1
        if sign == 1:
            self._take("+")
        kind, text = self._peek()
        if kind == "number":
            self._next += 1
            return sign * (int(text) if text.isdigit() else float(text))
        if self._next == start and kind == "text":
            self._next += 1
            return text[1:-1].replace("''", "'")
        if self._next == start and kind == "word" and text.upper() in ("TRUE", "FALSE") and text not in self._columns:
            self._next += 1
            return text.upper() == "TRUE"
        self._next = start
        return None

    def _required(self, column: str) -> Value:
        value = self._value()
        if value is None:
            raise self._error(f"a value is expected instead of {self._peek()[1]!r}")
        return self._fitting(column, value)

    def _fitting(self, column: str, value: Value) -> Value:
        """The value, if it has the column's type."""
        kind = self._columns[column]
        if type(value) not in TYPES[kind]:
            raise self._error(f"{column} is {kind}, and is compared with {value!r}")
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise self._error(f"{value} has more than 64 bits")
        return value

    def _comparison(self, column: str, operator: Operator, value: Value) -> Comparison:
        value = self._fitting(column, value)
        if type(value) is bool and operator not in ("=", "!="):
            raise self._error(f"{column} is true/false, which has no order")
        return Comparison(column, operator, value)

    def _list(self, column: str) -> tuple[Value, ...]:
        self._expect("(")
        values = [self._required(column)]
        while self._take(","):
            values.append(self._required(column))
        self._expect(")")
        return tuple(values)

    def _pattern(self, column: str) -> str:
        pattern = self._required(column)
        if not isinstance(pattern, str):
            raise self._error(f"{column} is not text, which LIKE is for")
        return pattern

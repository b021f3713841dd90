"""Filters in Milvus's own language, with the meaning that they have in SQL.

Metadata are keys of one JSON field. What a condition on a missing key means depends on the operator and on the server
(`not in` has been seen to hold for it, which would delete the row); so every condition says itself that the key is
there. Milvus Lite 3.2.2 refuses `in` for a key of JSON.
"""

from __future__ import annotations

from collections.abc import Collection

from search_r3.errors import InputError
from search_r3.index.backends.sql_condition import Comparison, Condition, IsNull, Joined, Like, OneOf, Value, simplified

METADATA_FIELD = "metadata"
"""The JSON field with the values of the metadata columns; a column without a value is no key of it."""
SIGN = {"=": "==", "!=": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def milvus_filter(condition: Condition, fields: Collection[str]) -> str:
    """`condition` as an expression; columns other than the collection's own `fields` are keys of the metadata.

    Raises:
        InputError: a pattern has a backslash, which Milvus reads as an escape and SQL does not.
    """
    return _expression(simplified(condition), fields)


def literal(value: Value) -> str:
    """A value as Milvus writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(ESCAPES.get(character, character) for character in value) + '"'
    return repr(value)


def _expression(condition: Condition, fields: Collection[str]) -> str:
    if isinstance(condition, Joined):
        parts = (f"({_expression(part, fields)})" for part in condition.conditions)
        return f" {condition.word.lower()} ".join(parts)
    assert isinstance(condition, Comparison | OneOf | Like | IsNull)  # `simplified` leaves no other
    own = condition.column in fields
    name = condition.column if own else f"{METADATA_FIELD}[{literal(condition.column)}]"
    if isinstance(condition, IsNull):
        if own:  # has a value in every row
            return f'id {"!=" if condition.negated else "=="} ""'
        return f"exists {name}" if condition.negated else f"not (exists {name})"
    test = _test(condition, name)
    return test if own else f"exists {name} and {test}"


def _test(condition: Comparison | OneOf | Like, name: str) -> str:
    if isinstance(condition, Comparison):
        return f"{name} {SIGN[condition.operator]} {literal(condition.value)}"
    if isinstance(condition, OneOf):
        test = f"({' or '.join(f'{name} == {literal(value)}' for value in condition.values)})"
    else:
        if "\\" in condition.pattern:
            raise InputError(f"the pattern {condition.pattern!r} has a backslash, which LIKE cannot find in Milvus")
        test = f"{name} like {literal(condition.pattern)}"
    return f"not ({test})" if condition.negated else test

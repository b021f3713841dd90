"""The filters (`where`) of a search over HTTP: SQL conditions that are always valid and call no functions."""

from __future__ import annotations

import re

from search_r3.errors import InputError

MAX_FILTER_CHARACTERS = 2000
_SQL_WORDS = (
    "all and any as asc between by case cast create cross current delete desc distinct drop else end except "
    "exists false fetch for from full group having in inner insert intersect interval into is join left like "
    "limit natural not null offset on or order outer right select set some table then to true union unique update "
    "using values when where with"
)
RESERVED = frozenset(_SQL_WORDS.split())


def filter_pattern(columns: dict[str, str]) -> str:
    """The accepted filters over these columns, as one regular expression.

    Comparisons of a column with a value of its type, IN, LIKE, IS NULL and NOT, joined by AND and OR, with parentheses
    at most one level deep. Columns whose names have other characters or are SQL keywords cannot be used.

    Args:
        columns: column name -> type: text, integer, number or true/false.
    """
    text, whole, number = "'([^'\\u0000-\\u001f]|'')*'", "-?[0-9]{1,18}", "-?[0-9]{1,15}([.][0-9]{1,10})?"
    comparisons_of = {
        "text": f" *(=|!=|<>|<=|>=|<|>) *{text}| (NOT )?LIKE {text}| (NOT )?IN \\({text}(, *{text})*\\)",
        "integer": f" *(=|!=|<>|<=|>=|<|>) *{whole}| (NOT )?IN \\({whole}(, *{whole})*\\)",
        "number": f" *(=|!=|<>|<=|>=|<|>) *{number}| (NOT )?IN \\({number}(, *{number})*\\)",
        "true/false": " *(=|!=) *(true|false)",
    }
    usable = [name for name in columns if re.fullmatch("[a-z][a-z0-9_]*", name) and name not in RESERVED]
    conditions = []
    for kind, comparisons in comparisons_of.items():
        names = [name for name in usable if columns[name] == kind]
        if names:
            conditions.append(f"({'|'.join(names)})({comparisons}| IS (NOT )?NULL)")
    simple = f"(NOT )?({'|'.join(conditions)})"
    joined = f"{simple}( (AND|OR) {simple})*"
    term = f"({simple}|(NOT )?\\({joined}\\))"
    return f"^{term}( (AND|OR) {term})*$"


def check_filter(where: str, columns: dict[str, str]) -> str:
    """Return `where` if `filter_pattern` allows it; otherwise raise an InputError that says what is allowed."""
    if not re.search(filter_pattern(columns).replace("$", "\\Z"), where):
        names = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
        raise InputError(
            "this server does not accept the filter: compare columns with values of their type (= != < > <= >= "
            "IN LIKE IS NULL), joined by AND, OR and NOT in capitals, as in title = 'Guide' AND start_line > 10; "
            f"columns: {names}"
        )
    return where

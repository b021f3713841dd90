"""Parsing a request's body into its type, or an ApiError 400 that names the invalid field and what is expected.

Python's C parser blocks all other threads while it runs: milliseconds for the longest text, but more than a second for
a body of millions of small values. Such bodies are parsed in Python, about 50 times slower, so that other threads can
run, and parsing stops at a limit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from json.scanner import py_make_scanner  # type: ignore[attr-defined]  # typeshed leaves it out
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from search_r3.server.errors import ApiError

Body = TypeVar("Body")
EXACT = 2.0**53  # whole numbers up to this are exact as floats
FEW_VALUES = 150_000
"""The C parser takes about ten milliseconds for a body of at most this many values (such as any of 200 kB)."""
MOST_VALUES = 500_000
"""Maximum number of texts, numbers, lists and objects in a body: more than the limits on texts and tokens allow."""
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(body: bytes | bytearray, shape: TypeAdapter[Body], most: int = MOST_VALUES) -> Body:
    """Parse JSON into a `shape`; a bytearray is cleared in the process, as it may be large.

    Raises:
        ApiError: 400 if the body is not JSON or not a `shape`; 413 if it is long and has more than `most` values.
    """
    value = _decoded(body, most)
    try:
        return shape.validate_python(value)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False)[0]) from error


def count_marks(body: bytes | bytearray) -> int:
    """An upper bound of the number of values in the body, computed quickly."""
    return sum(body.count(mark) for mark in b",[{")


def _decoded(body: bytes | bytearray, most: int) -> Any:
    many = count_marks(body) > FEW_VALUES
    surrogates = SURROGATE.search(body) is not None
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body is not UTF-8 (byte {error.start}); send JSON in UTF-8", "invalid_json"
        ) from error
    if isinstance(body, bytearray):
        body.clear()
    try:
        value = (_Counting(most) if many else _PLAIN).decode(text)
        if surrogates:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ApiError(
            400, "the body contains half of a surrogate pair (\\uD800 to \\uDFFF), which is not text", "invalid_text"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "it has a value that is not valid JSON"
        raise ApiError(400, f"the body is not JSON: {reason[:200]}", "invalid_json") from error
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _number(written: str) -> int | float:
    """In JSON Schema and JavaScript, 5 and 5.0 are the same number."""
    value = float(written)
    return int(value) if value.is_integer() and abs(value) < EXACT else value


_PLAIN = json.JSONDecoder(parse_float=_number, parse_constant=_no_constant)


class _Counting(json.JSONDecoder):
    """The standard library's pure Python decoder, for one body; raises ApiError 413 beyond `most` values."""

    def __init__(self, most: int) -> None:
        super().__init__(parse_float=_number, parse_int=int, parse_constant=_no_constant)
        self._seen, self._most = 0, most
        names = ("parse_object", "parse_array", "parse_string", "parse_float", "parse_int")
        for name in names:
            setattr(self, name, self._counted(getattr(self, name)))
        self.scan_once = py_make_scanner(self)

    def _counted(self, take: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any) -> Any:
            self._seen += 1
            if self._seen > self._most:
                message = f"the body has over {self._most:,} values; send several requests"
                raise ApiError(413, message, "body_too_large")
            return take(*given)

        return counting


EXPECTED = {
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "bool_type": "expected true or false",
    "list_type": "expected a list",
    "model_type": "expected an object",
    "dict_type": "expected an object",
    "string_pattern_mismatch": "empty; give at least one visible character",  # `VISIBLE` is the only pattern
    "string_too_long": "over {max_length:,} characters; shorten it",
    "too_long": "over {max_length:,} entries; give fewer",
    "string_too_short": "empty; give at least one character",
    "too_short": "empty; give at least one entry",
}
"""Messages for pydantic's error types; pydantic's own messages are about Python."""


def validation_error(error: Mapping[str, Any]) -> ApiError:
    """One of pydantic's errors in OpenAI's form. Names in brackets in its location are alternatives, not fields."""
    kind, location = error["type"], list(error["loc"])
    unknown = [location.pop()] if kind == "extra_forbidden" else []  # any name, even one with brackets
    location = [part for part in location if isinstance(part, int) or "[" not in part]
    param = ".".join(map(str, location + unknown))[:200] or None
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown field {param!a}; see /docs for the fields", "unknown_field", param=param)
    if kind == "missing":
        return ApiError(400, f"the field {param!a} is missing", "missing_field", param=param)
    known = EXPECTED.get(kind)
    message = known.format(**error.get("ctx", {})) if known else error["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param + ': ' if param else ''}{message}", "invalid_value", param=param)

"""JSON that is readable in a diff: one line per field, but a row of numbers or texts on one line."""

from __future__ import annotations

import json
from typing import Any


def as_json(record: Any) -> str:
    """`record`, anything that JSON can hold, indented by two spaces per level, with a newline at the end."""
    return _text(json.loads(json.dumps(record)), "") + "\n"  # read again: keys are texts then, tuples lists


def _text(value: Any, indent: str) -> str:
    inner = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(key, ensure_ascii=False)}: {_text(below, inner)}" for key, below in value.items()]
        return "{\n" + ",\n".join(inner + line for line in lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + ",\n".join(inner + _text(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)

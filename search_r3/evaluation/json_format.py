"""JSON that is readable in a diff: one line per field, with lists of numbers or strings on one line."""

from __future__ import annotations

import json
from typing import Any


def as_json(record: Any) -> str:
    """`record` as JSON, indented by two spaces per level, with a newline at the end."""
    return _text(json.loads(json.dumps(record)), "") + "\n"  # makes keys strings, tuples lists


def _text(value: Any, indent: str) -> str:
    inner = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(key, ensure_ascii=False)}: {_text(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(inner + line for line in lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + ",\n".join(inner + _text(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)

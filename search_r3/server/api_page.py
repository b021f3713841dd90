"""The page at /docs: an OpenAPI description for people, with fields in plain words, examples, and forms to try it.

`templates/api.html.j2` makes HTML of it. The page loads its style and script from this server only.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pprint import pformat
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

Json = Mapping[str, Any]
PLURALS = {
    "text": "texts",
    "number": "numbers",
    "whole number": "whole numbers",
    "true or false": "true or false",
    "token id": "token ids",
    "any value": "any values",
}
TYPES = {
    "string": "text",
    "number": "number",
    "integer": "whole number",
    "boolean": "true or false",
    "null": "null",
    "object": "object",
}
NAMED = {"TokenId": "token id", "Filter": "text (a condition)"}
"""Kinds of values by the name of their schema, where the schema says less."""
CHANGES = ("delete", "put", "patch")
WRITES = "/v1/documents"
"""A POST to this path changes the index."""


@dataclass(frozen=True)
class Field:
    """A row of a table of fields: what values it takes, its default as JSON ("" if there is none), and its meaning."""

    name: str
    required: bool
    kind: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Fields:
    """A table of fields with its title ("" if it is the only one)."""

    title: str
    rows: tuple[Field, ...]


@dataclass(frozen=True)
class Example:
    """A request as a curl command and as Python; `body` is its JSON, "" if it has none."""

    name: str
    body: str
    curl: str
    python: str


@dataclass(frozen=True)
class Operation:
    """One endpoint.

    Attributes:
        anchor: its id in the page.
        parameters: (name, "path" or "query", example) of its parameters.
        changes: whether a request changes the index.
        answers: status -> meaning.
        answer: an example of a successful response's body as JSON, "" if there is none.
    """

    anchor: str
    verb: str
    path: str
    summary: str
    description: str
    parameters: tuple[tuple[str, str, str], ...]
    fields: tuple[Fields, ...]
    examples: tuple[Example, ...]
    changes: bool
    answers: dict[str, str]
    answer: str


def render(description: Json, base: str) -> str:
    """The page for an OpenAPI description; `base` is the server's address, for the examples."""
    has_key = "securitySchemes" in description["components"]
    return (
        _templates()
        .get_template("api.html.j2")
        .render(info=description["info"], base=base, has_key=has_key, operations=operations(description, base))
    )


def operations(description: Json, base: str) -> list[Operation]:
    """The endpoints of a description, in its order."""
    schemas = description["components"]["schemas"]
    return [
        _operation(verb, path, operation, schemas, base)
        for path, by_verb in description["paths"].items()
        for verb, operation in by_verb.items()
    ]


def _operation(verb: str, path: str, operation: Json, schemas: Json, base: str) -> Operation:
    parameters = operation.get("parameters", [])
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    examples = {"": body["example"]} if "example" in body else {
        name: one["value"] for name, one in body.get("examples", {}).items()
    }  # fmt: skip
    shown = tuple((p["name"], p["in"], str(p.get("example", p["schema"].get("default", "")))) for p in parameters)
    url = base + path
    for name, _, value in (one for one in shown if one[1] == "path"):
        url = url.replace(f"{{{name}}}", value or name.upper())
    secured = bool(operation.get("security"))
    success = next((status for status in operation["responses"] if status.startswith("2")), "")
    answer = operation["responses"].get(success, {}).get("content", {}).get("application/json", {}).get("schema", {})
    return Operation(
        anchor=operation["operationId"],
        verb=verb,
        path=path,
        summary=operation["summary"],
        description=operation.get("description", ""),
        parameters=shown,
        fields=_tables(parameters, body.get("schema", {}), schemas),
        examples=tuple(
            Example(name, _pretty(value), _curl(verb, url, secured, value), _python(verb, url, secured, value))
            for name, value in (examples or {"": None}).items()
        ),
        changes=verb in CHANGES or (verb == "post" and path == WRITES),
        answers={status: one["description"] for status, one in sorted(operation["responses"].items())},
        answer=_pretty(resolved(answer, schemas).get("example")),
    )


def _tables(parameters: Sequence[Json], schema: Json, schemas: Json) -> tuple[Fields, ...]:
    """The parameters and the body's fields; one table for each form that the body may have."""
    tables = []
    if parameters:
        rows = [(p["name"], p["schema"] | _said(p), p["required"]) for p in parameters]
        tables.append(Fields("", _rows(rows, schemas)))
    choices = schema.get("anyOf", [schema] if schema else [])
    for choice in choices:
        form = resolved(choice, schemas)
        needed = form.get("required", ())
        rows = [(name, field, name in needed) for name, field in form["properties"].items()]
        title = form.get("description", "").split(". ")[0].rstrip(".").rpartition(" for ")[2]
        tables.append(Fields(f"For {title}" if len(choices) > 1 else "", _rows(rows, schemas)))
    return tuple(tables)


def _said(parameter: Json) -> dict[str, str]:
    return {"description": parameter["description"]} if "description" in parameter else {}


def _rows(fields: Sequence[tuple[str, Json, bool]], schemas: Json) -> tuple[Field, ...]:
    ordered = sorted(fields, key=lambda field: not field[2])
    return tuple(
        Field(
            name,
            required,
            kind(field, schemas),
            json.dumps(field["default"]) if field.get("default") not in (None, "") else "",
            resolved(field, schemas).get("description", ""),
        )
        for name, field, required in ordered
    )


def resolved(schema: Json, schemas: Json) -> Json:
    """A schema with its reference, if it has one, resolved."""
    return schemas[schema["$ref"].rsplit("/", 1)[1]] | schema if "$ref" in schema else schema


def kind(schema: Json, schemas: Json) -> str:
    """The values that a schema allows, in plain words: "text or list of texts", "whole number from 1 to 1,000"."""
    name = schema.get("$ref", "").rsplit("/", 1)[-1]
    if name in NAMED:
        return NAMED[name]
    schema = resolved(schema, schemas)
    constants = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if constants:
        return _either([json.dumps(one) for one in constants])
    choices = schema.get("anyOf", schema.get("oneOf"))
    if choices:
        kinds = [kind(choice, schemas) for choice in choices if resolved(choice, schemas).get("type") != "null"]
        return _either(list(dict.fromkeys(kinds)))
    if schema.get("type") == "array":
        return f"list of {_plural(kind(schema.get('items', {}), schemas))}"
    if "properties" in schema:
        return f"object of {', '.join(schema['properties'])}"
    words = TYPES.get(schema.get("type", ""), "any value")
    low, high = schema.get("minimum"), schema.get("maximum")
    if high is not None and low == high:
        return f"{words}, only {low:,}"
    if high is not None and low is not None:
        return f"{words} from {low:,} to {high:,}"
    return words + (f" from {low:,}" if low is not None else "")


def _plural(words: str) -> str:
    head, _, rest = words.partition(" from ")
    if head.startswith("list of "):
        return f"lists of {head.removeprefix('list of ')}"
    return PLURALS.get(head, head) + (f" from {rest}" if rest else "")


def _either(kinds: Sequence[str]) -> str:
    return kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} or {kinds[-1]}"


def _curl(verb: str, url: str, secured: bool, body: Any) -> str:
    parts = ["curl" + (f" -X {verb.upper()}" if verb not in ("get", "post") else "") + f" {shlex.quote(url)}"]
    parts += ["-H 'Authorization: Bearer KEY'"] if secured else []
    if body is not None:
        parts += ["-H 'Content-Type: application/json'", f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"]
    return " \\\n  ".join(parts)


def _python(verb: str, url: str, secured: bool, body: Any) -> str:
    arguments = [repr(url)]
    if body is not None:
        arguments.append("json=" + pformat(body, sort_dicts=False, width=80).replace("\n", "\n    "))
    if secured:
        arguments.append("headers={'Authorization': 'Bearer KEY'}")
    inner = f"\n    {f',{chr(10)}    '.join(arguments)},\n" if len(arguments) > 1 else arguments[0]
    return f"import requests\n\nanswer = requests.{verb}({inner})\nanswer.raise_for_status()\nprint(answer.json())"


def _pretty(value: Any) -> str:
    """JSON with an indent, and short lists of numbers in one line; "" for None."""
    if value is None:
        return ""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return re.sub(r"\[\s+((?:-?[\d.e-]+,?\s+)+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def code_words(text: str) -> Markup:
    """Escaped text, with what stands between backticks as code."""
    parts = [escape(part) for part in text.split("`")]
    if len(parts) % 2 == 0:  # a backtick without its partner
        return escape(text)
    return Markup("".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts)))


@functools.cache
def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("search_r3.server"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["code_words"] = code_words
    return templates

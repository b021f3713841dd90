"""The description as one page of plain HTML, for people: no script, nothing fetched from anywhere."""

from __future__ import annotations

import json
from html import escape
from typing import Any

STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}
section{border-top:1px solid var(--line);margin-top:2rem;padding-top:.5rem}
code,pre{font:14px/1.45 ui-monospace,monospace}pre{background:var(--soft);padding:.7rem;overflow-x:auto}
td,th{text-align:left;vertical-align:top;padding:.15rem 1rem .15rem 0}.verb{text-transform:uppercase;font-weight:700}
"""


def render(description: dict[str, Any], base: str) -> str:
    """The page for an OpenAPI description; `base` is the server's address, for the examples."""
    schemas = description["components"]["schemas"]
    secured = "securitySchemes" in description["components"]
    info = description["info"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(info['title'])} API</title><style>{STYLE}</style>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])} "
        "For programs: <a href=openapi.json>openapi.json</a>.</p>"
    ]
    for path, operations in description["paths"].items():
        parts += [_section(path, verb, operation, schemas, base, secured) for verb, operation in operations.items()]
    return "".join(parts)


def _section(path: str, verb: str, operation: dict[str, Any], schemas: dict[str, Any], base: str, keys: bool) -> str:
    out = [f"<section><h2><span class=verb>{verb}</span> <code>{escape(path)}</code></h2>"]
    out.append(f"<p><b>{escape(operation['summary'])}.</b> {escape(operation.get('description', ''))}</p>")
    fields = [(p["name"], p["schema"], p["required"]) for p in operation.get("parameters", [])]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    for choice in body.get("schema", {}).get("anyOf", [body["schema"]] if body else []):
        schema = schemas[choice["$ref"].rsplit("/", 1)[1]]
        fields += [(n, s, n in schema["required"]) for n, s in schema["properties"].items()]
    rows = dict.fromkeys(
        f"<tr><td><code>{escape(name)}</code>{'' if needed else ' (optional)'}<td>{escape(_kind(schema))}"
        for name, schema, needed in fields
    )
    if rows:
        out.append(f"<table><tr><th>Field<th>Value{''.join(rows)}</table>")
    examples = [body["example"]] if "example" in body else [e["value"] for e in body.get("examples", {}).values()]
    for example in examples:
        key = " -H 'Authorization: Bearer KEY'" if keys else ""
        command = f"curl {base}{path}{key} -H 'Content-Type: application/json' \\\n  -d '{json.dumps(example)}'"
        out.append(f"<pre>{escape(command)}</pre>")
    answers = (f"<tr><td>{status}<td>{escape(r['description'])}" for status, r in operation["responses"].items())
    out.append(f"<table><tr><th>Status<th>Meaning{''.join(answers)}</table></section>")
    return "".join(out)


def _kind(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        kind = schema["$ref"].rsplit("/", 1)[1]
    elif "const" in schema:
        kind = json.dumps(schema["const"])
    elif "enum" in schema:
        kind = ", ".join(json.dumps(value) for value in schema["enum"])
    elif "anyOf" in schema:
        kind = " or ".join(_kind(choice) for choice in schema["anyOf"])
    elif schema.get("type") == "array":
        kind = f"list of {_kind(schema.get('items', {}))}"
    else:
        kind = " or ".join(schema["type"]) if isinstance(schema.get("type"), list) else schema.get("type", "any")
        if "maximum" in schema:
            kind += f" from {schema['minimum']:,} to {schema['maximum']:,}"
    default = f"; default {json.dumps(schema['default'])}" if "default" in schema else ""
    about = f": {schema['description']}" if "description" in schema else ""
    return kind + default + about

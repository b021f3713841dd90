"""/openapi.json, and /docs: the same for people, as one page of plain HTML without external resources."""

from __future__ import annotations

import asyncio
import json
from html import escape
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from search_r3.server.routing import get, to_json

router = APIRouter()
STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}
section{border-top:1px solid var(--line);margin-top:2rem;padding-top:.5rem}
code,pre{font:14px/1.45 ui-monospace,monospace}pre{background:var(--soft);padding:.7rem;overflow-x:auto}
td,th{text-align:left;vertical-align:top;padding:.15rem 1rem .15rem 0}.verb{text-transform:uppercase;font-weight:700}
"""


@get(router, "/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> Response:
    return to_json(await asyncio.to_thread(request.app.openapi))


@get(router, "/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    description = await asyncio.to_thread(request.app.openapi)
    return HTMLResponse(render(description, str(request.base_url).rstrip("/")))


def render(description: dict[str, Any], base: str) -> str:
    """The page for an OpenAPI description; `base` is the server's address, for the examples."""
    info, schemas = description["info"], description["components"]["schemas"]
    key = " -H 'Authorization: Bearer KEY'" if "securitySchemes" in description["components"] else ""
    sections = [
        _section(verb, path, operation, schemas, f"curl {base}{path}{key} -H 'Content-Type: application/json'")
        for path, operations in description["paths"].items()
        for verb, operation in operations.items()
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(info['title'])} API</title><style>{STYLE}</style>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])} "
        f"For programs: <a href=openapi.json>openapi.json</a>.</p>{''.join(sections)}"
    )


def _section(verb: str, path: str, operation: dict[str, Any], schemas: dict[str, Any], curl: str) -> str:
    fields = [(p["name"], p["schema"], p["required"]) for p in operation.get("parameters", [])]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    for choice in body.get("schema", {}).get("anyOf", [body["schema"]] if body else []):
        schema = _resolved(choice, schemas)
        fields += [(name, field, name in schema["required"]) for name, field in schema["properties"].items()]
    rows = dict.fromkeys(
        f"<tr><td><code>{escape(name)}</code>{'' if needed else ' (optional)'}<td>{escape(_values(field, schemas))}"
        for name, field, needed in sorted(fields, key=lambda field: not field[2])
    )
    examples = [body["example"]] if "example" in body else [e["value"] for e in body.get("examples", {}).values()]
    commands = (escape(f"{curl} \\\n  -d '{json.dumps(example)}'") for example in examples)
    answers = (f"<tr><td>{status}<td>{escape(r['description'])}" for status, r in operation["responses"].items())
    return (
        f"<section><h2><span class=verb>{verb}</span> <code>{escape(path)}</code></h2>"
        f"<p><b>{escape(operation['summary'])}.</b> {escape(operation.get('description', ''))}</p>"
        + (f"<table><tr><th>Field<th>Value{''.join(rows)}</table>" if rows else "")
        + "".join(f"<pre>{command}</pre>" for command in commands)
        + f"<table><tr><th>Status<th>Meaning{''.join(answers)}</table></section>"
    )


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """A schema with its reference, if it has one, resolved."""
    return schemas[schema["$ref"].rsplit("/", 1)[1]] | schema if "$ref" in schema else schema


def _values(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """A short description of a field's values."""
    schema = _resolved(schema, schemas)
    if constants := schema.get("enum", [schema["const"]] if "const" in schema else []):
        kind = ", ".join(map(json.dumps, constants))
    elif choices := schema.get("anyOf", schema.get("oneOf")):
        kind = " or ".join(_values(choice, schemas) for choice in choices)
    elif schema.get("type") == "array":
        kind = f"list of {_values(schema['items'], schemas)}"
    elif "properties" in schema:
        kind = f"object of {', '.join(schema['properties'])}"
    else:
        kind = schema.get("type", "any")
        if "maximum" in schema:
            kind += f" from {schema['minimum']:,} to {schema['maximum']:,}"
    default = f"; default {json.dumps(schema['default'])}" if "default" in schema else ""
    return kind + default + (f": {schema['description']}" if "description" in schema else "")

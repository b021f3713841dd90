"""The OpenAPI description: every route with every status it can answer, so that a tester finds nothing undocumented."""

from __future__ import annotations

from typing import Any

from search_r3 import __version__
from search_r3.index.search import MAX_QUERY_CHARACTERS
from search_r3.server.openapi_schemas import components, ref
from search_r3.server.routes.documents import MAX_PAGE, PAGE
from search_r3.server.schemas import MAX_ID_CHARACTERS
from search_r3.server.service import Service

Operation = dict[str, Any]
ABOUT = {
    400: "Something in the request is wrong; `param` says where.",
    401: "No API key, or one that is not known.",
    404: "There is no such model, or no index.",
    408: "The body did not arrive in time.",
    409: "It conflicts with what the index holds, or another build is writing.",
    413: "The body, or its texts together, are over the server's limit.",
    415: "The body is not application/json, or it is compressed.",
    429: "Too many requests are in hand; come back after Retry-After seconds.",
    500: "An error of ours; it was logged.",
    503: "Loading, shutting down, too busy to begin in time, or the index cannot be searched now.",
    504: "Begun, but not done in time.",
}
WORK = (400, 408, 413, 415, 429, 500, 503, 504)
QUESTION = "How do I read a file line by line?"


ALIVE = {"200": {"description": "It lives", "content": {"application/json": {"schema": ref("Alive")}}}}


def describe(service: Service) -> dict[str, Any]:
    """The whole description, for what is served now."""
    loaded = service.known
    with_index = loaded is None or loaded.index is not None
    keys = bool(service.config.api_keys)
    model = "MODEL" if loaded is None else loaded.model.name
    paths: dict[str, dict[str, Operation]] = {
        "/v1/embeddings": {"post": _embeddings(keys, model)},
        "/v1/models": {"get": _get("listModels", "The model that is served", "Models", keys, (503,))},
        "/v1/models/{model}": {"get": _one_model(keys, model)},
    }
    if with_index:
        paths["/v1/search"] = {"post": _search(keys)}
        paths["/v1/documents"] = {"get": _list_documents(keys)}
        if service.config.writable:
            paths["/v1/documents"]["post"] = _add_documents(keys)
            paths["/v1/documents/{document}"] = {"delete": _delete_document(keys)}
    paths["/health"] = {"get": _health("health", "Whether requests are taken and can be answered")}
    paths["/readyz"] = {"get": _health("readyz", "The same as /health, by Kubernetes' name")}
    paths["/livez"] = {"get": _operation("livez", "That the process lives", "", False, ALIVE)}
    paths["/metrics"] = {"get": _metrics()}
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Search-R3",
            "version": __version__,
            "description": "Embeddings as OpenAI's clients ask for them, and search that reasons before it embeds.",
        },
        "paths": paths,
        "components": {"schemas": components(service.config, loaded)},
    }
    if keys:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return described


def _json(name: str, **more: Any) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": ref(name), **more}}}


def _responses(statuses: tuple[int, ...], keys: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for status in sorted({*statuses, *((401,) if keys else ())}):
        found[str(status)] = {"description": ABOUT[status], **_json("Error")}
        if status in (409, 429, 503):
            found[str(status)]["headers"] = _retry_after(required=status != 409)  # a conflict may be there to stay
    return found


def _retry_after(required: bool) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1}
    return {"Retry-After": {"description": "seconds", "required": required, "schema": schema}}


def _operation(name: str, summary: str, description: str, keys: bool, responses: dict[str, Any]) -> Operation:
    operation: Operation = {"operationId": name, "summary": summary, "responses": responses}
    if description:
        operation["description"] = description
    if keys:
        operation["security"] = [{"key": []}]
    return operation


def _get(name: str, summary: str, schema: str, keys: bool, statuses: tuple[int, ...]) -> Operation:
    return _operation(
        name, summary, "", keys, {"200": {"description": "OK", **_json(schema)}, **_responses(statuses, keys)}
    )


def _embeddings(keys: bool, model: str) -> Operation:
    operation = _operation(
        "createEmbeddings",
        "Embed documents or queries",
        "OpenAI's endpoint. Texts are embedded as documents unless `input_type` is `query`; only queries can be "
        "reasoned about. A text is read up to 512 tokens; `usage.truncated_texts` counts those that were longer.",
        keys,
        {"200": {"description": "One unit vector a text", **_json("Embeddings")}, **_responses((*WORK, 404), keys)},
    )
    examples = {
        "documents": {"value": {"model": model, "input": ["Paris is the capital of France."]}},
        "reasoned query": {"value": {"model": model, "input": QUESTION, "input_type": "query", "reasoning": 8}},
    }
    schema = {"anyOf": [ref("DocumentEmbeddings"), ref("QueryEmbeddings")]}
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": schema, "examples": examples}},
    }
    return operation


def _search(keys: bool) -> Operation:
    ok = {
        "description": "The hits, best first. With `stream`, events: `reasoning` (pieces of text), then `result` or "
        "`error`.",
        "content": {
            "application/json": {"schema": ref("SearchResult")},
            "text/event-stream": {"schema": ref("Event")},
        },
    }
    operation = _operation(
        "search",
        "Search the index",
        f"The model reasons about the query (of at most {MAX_QUERY_CHARACTERS:,} characters) and embeds it, unless "
        "`reasoning` is false or the mode is `text`.",
        keys,
        {"200": ok, **_responses((*WORK, 404), keys)},
    )
    example = {"query": QUESTION, "k": 3, "reasoning": 8}
    operation["requestBody"] = {"required": True, **_json("Search", example=example)}
    return operation


def _list_documents(keys: bool) -> Operation:
    operation = _get(
        "listDocuments",
        "Ids of the documents in the index, in order",
        "Documents",
        keys,
        (400, 404, 429, 500, 503, 504),
    )
    operation["parameters"] = [
        {
            "name": "limit",
            "in": "query",
            "required": False,
            "schema": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": PAGE},
        },
        {
            "name": "after",
            "in": "query",
            "required": False,
            "description": "the last id of the page before",
            "schema": {"type": "string", "minLength": 1, "maxLength": MAX_ID_CHARACTERS},
        },
    ]
    return operation


def _add_documents(keys: bool) -> Operation:
    operation = _operation(
        "addDocuments",
        "Add documents to the index, or replace them",
        "All are written, or none. A document whose id is in the index already is replaced.",
        keys,
        {
            "201": {"description": "Written; a search finds them", **_json("Added")},
            **_responses((*WORK, 404, 409), keys),
        },
    )
    example = {"documents": [{"id": "licence", "title": "Licence", "text": "It is under Apache-2.0."}]}
    operation["requestBody"] = {"required": True, **_json("AddDocuments", example=example)}
    return operation


def _delete_document(keys: bool) -> Operation:
    operation = _operation(
        "deleteDocument",
        "Delete a document with all of its chunks",
        "",
        keys,
        {
            "200": {"description": "Gone; no search finds it", **_json("Deleted")},
            **_responses((404, 409, 429, 500, 503, 504), keys),
        },
    )
    operation["parameters"] = [
        {"name": "document", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    ]
    return operation


def _one_model(keys: bool, model: str) -> Operation:
    operation = _get("getModel", "One model", "Model", keys, (404, 503))
    operation["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}, "example": model}
    ]
    return operation


def _health(name: str, summary: str) -> Operation:
    unready = {"description": "Not yet, no longer, or the index cannot be searched now", **_json("Health")}
    responses = {
        "200": {"description": "Requests are taken and can be answered", **_json("Health")},
        "503": {**unready, "headers": _retry_after(required=True)},
    }
    return _operation(name, summary, "", False, responses)


def _metrics() -> Operation:
    ok = {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return _operation("metrics", "Figures for Prometheus", "", False, {"200": ok})

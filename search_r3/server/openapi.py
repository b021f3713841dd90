"""The OpenAPI description: FastAPI's, completed with what is known only at run time.

That is the server's limits, its model's vocabulary and sizes, its index's columns, and whether it has keys. So whatever
the description allows is accepted, except for rules that JSON Schema cannot express (the total of tokens, repeated ids
of documents, options that contradict each other), whose violations are answered by 413 or 409.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from search_r3 import __version__
from search_r3.model.text_limit import TextLimit
from search_r3.model.tokenization import special_ids
from search_r3.server import response_schemas, schemas
from search_r3.server.keys import Keys
from search_r3.server.routing import SCHEMAS, error_response
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded
from search_r3.server.where_filter import filter_pattern

OPEN = ("/health", "/readyz", "/livez", "/metrics")
"""Paths that need no key."""
READ_BY_HANDLERS: tuple[tuple[type[BaseModel], JsonSchemaMode], ...] = (
    (schemas.DocumentEmbeddings, "validation"),
    (schemas.QueryEmbeddings, "validation"),
    (schemas.SearchRequest, "validation"),
    (schemas.RerankRequest, "validation"),
    (schemas.TeiEmbedRequest, "validation"),
    (schemas.TeiRerankRequest, "validation"),
    (schemas.DocumentsRequest, "validation"),
    (response_schemas.Error, "serialization"),
    (response_schemas.Event, "serialization"),
)
"""Bodies that are not among FastAPI's parameters and responses."""


def custom_openapi(app: FastAPI) -> dict[str, Any]:
    """The description of the application as it is served now."""
    config, loaded = app.state.service.config, app.state.service.known
    if app.openapi_schema is None:
        app.openapi_schema = _described_by_fastapi(app)
    described = deepcopy(app.openapi_schema)
    if config.root_path:
        described["servers"] = [{"url": config.root_path}]
    components, paths = described["components"], described["paths"]
    named = components["schemas"]
    for name, limits in _limits(config, loaded).items():
        named[name] |= limits
    if loaded is not None:
        _name_model(paths, loaded.model.name)
        if not loaded.indexes:
            for path in [path for path in paths if path.startswith(("/v1/search", "/v1/documents", "/v1/index"))]:
                del paths[path]
    if config.api_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for operations in (paths[path] for path in paths if path not in OPEN):
            for operation in operations.values():
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = error_response(401)
        _add_limits_of_keys(paths, Keys(config.api_keys))
    return described


def _add_limits_of_keys(paths: dict[str, Any], keys: Keys) -> None:
    for path, operations in paths.items():
        for verb, operation in operations.items():
            if keys.limited and path not in OPEN:
                operation["responses"]["429"] = error_response(429)
            if keys.read_only and path.startswith("/v1/documents") and verb != "get":
                operation["responses"]["403"] = error_response(403)


def _described_by_fastapi(app: FastAPI) -> dict[str, Any]:
    described = get_openapi(title=app.title, version=__version__, description=app.description, routes=app.routes)
    named = described["components"]["schemas"]
    named |= models_json_schema(READ_BY_HANDLERS, ref_template=SCHEMAS + "{model}")[1]["$defs"]
    for unused in ("HTTPValidationError", "ValidationError"):  # for FastAPI's status 422; `app` answers 400
        named.pop(unused, None)
    for operations in described["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    return described


def _limits(config: ServerConfig, loaded: Loaded | None) -> dict[str, dict[str, Any]]:
    """Additions to the schemas of types that `schemas` names."""
    many = {"maxItems": config.max_items}
    limits: dict[str, dict[str, Any]] = dict.fromkeys(
        ("Texts", "QueryTexts", "ReasoningTexts", "TokenLists", "NewDocuments", "RerankDocuments"), many
    )
    limits["Reasoning"] = _reasoning(config, loaded)
    limits["TruncateTokens"] = {"maximum": TextLimit.of(config.max_tokens).tokens}
    if loaded is None:
        return limits
    if not loaded.reading:
        limits["Read"] = {"maximum": 0}
    if loaded.reranker is None:
        limits["Rerank"] = {"maximum": 0}
    limits["RerankModelName"] = {"const": loaded.reranker_name}
    special = special_ids(loaded.model.tokenizer)
    usable = [token for token in range(len(loaded.model.tokenizer)) if token not in special]
    limits["TokenId"] = {"minimum": usable[0], "maximum": usable[-1]}
    if refused := sorted(token for token in special if usable[0] < token < usable[-1]):
        limits["TokenId"]["not"] = {"enum": refused}
    limits["ModelName"] = {"const": loaded.model.name}
    limits["Dimensions"] = {"enum": list(loaded.dimensions)}
    if loaded.indexes:
        limits["IndexName"] = {"enum": list(loaded.indexes)}
        limits["Filter"] = {"pattern": filter_pattern(_shared_columns(loaded))}
    return limits


def _shared_columns(loaded: Loaded) -> dict[str, str]:
    """The columns that every index has with the same type, so that each accepts a filter over them."""
    first, *others = (index.columns for index in loaded.indexes.values())
    return {name: kind for name, kind in first.items() if all(columns.get(name) == kind for columns in others)}


def _reasoning(config: ServerConfig, loaded: Loaded | None) -> dict[str, Any]:
    choices: list[dict[str, Any]] = [
        {"type": "boolean", "description": f"true is a budget of {config.reasoning_tokens} tokens"},
        {"type": "integer", "minimum": 0, "maximum": config.max_reasoning_tokens, "description": "a budget in tokens"},
    ]
    if loaded is None or loaded.adaptive:
        choices.append({"const": "auto", "description": "reason if the model's rule expects it to help"})
    if loaded is None or loaded.latent:
        choices.append({"const": "latent", "description": "think in a few steps without words"})
    return {"anyOf": choices}


def _name_model(paths: dict[str, Any], name: str) -> None:
    """Put the served model's name into the examples."""
    for example in paths["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["examples"].values():
        example["value"]["model"] = name
    paths["/v1/models/{model}"]["get"]["parameters"][0]["example"] = name

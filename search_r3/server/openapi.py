"""The OpenAPI description: FastAPI's own, completed by what is known only at run time.

That is the limits of the server, the vocabulary and sizes of its model, the columns of its index, and whether it has
keys. So what the description allows is accepted. What JSON Schema cannot say (tokens in all, a document's id that
comes twice) is answered by 409 or 413.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from search_r3 import __version__
from search_r3.model.tokenization import special_ids
from search_r3.server import schemas
from search_r3.server.routing import SCHEMAS, error_response
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded
from search_r3.server.where_filter import filter_pattern

READ_BY_HANDLERS: tuple[tuple[type[BaseModel], JsonSchemaMode], ...] = (
    (schemas.DocumentEmbeddings, "validation"),
    (schemas.QueryEmbeddings, "validation"),
    (schemas.SearchRequest, "validation"),
    (schemas.DocumentsRequest, "validation"),
    (schemas.Error, "serialization"),
    (schemas.Event, "serialization"),
)
"""Bodies that FastAPI does not see among its own parameters and responses."""


def custom_openapi(app: FastAPI) -> dict[str, Any]:
    """The description of the application, for what it serves now."""
    config, loaded = app.state.service.config, app.state.service.known
    if app.openapi_schema is None:
        app.openapi_schema = _described_by_fastapi(app)
    described = deepcopy(app.openapi_schema)
    components, paths = described["components"], described["paths"]
    named = components["schemas"]
    for name, limits in _limits(config, loaded).items():
        named[name] |= limits
    if loaded is not None:
        _name_model(paths, loaded.model.name)
        if loaded.index is None:
            for path in [path for path in paths if path.startswith(("/v1/search", "/v1/documents"))]:
                del paths[path]
    if config.api_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for operations in (paths[path] for path in paths if path.startswith("/v1/")):
            for operation in operations.values():
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = error_response(401)
    return described


def _described_by_fastapi(app: FastAPI) -> dict[str, Any]:
    described = get_openapi(title=app.title, version=__version__, description=app.description, routes=app.routes)
    named = described["components"]["schemas"]
    named |= models_json_schema(READ_BY_HANDLERS, ref_template=SCHEMAS + "{model}")[1]["$defs"]
    for unused in ("HTTPValidationError", "ValidationError"):  # of FastAPI's own 422; `app` answers 400
        named.pop(unused, None)
    for operations in described["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    return described


def _limits(config: ServerConfig, loaded: Loaded | None) -> dict[str, dict[str, Any]]:
    """What completes the schemas of the types that `schemas` names."""
    many = {"maxItems": config.max_items}
    found: dict[str, dict[str, Any]] = dict.fromkeys(("Texts", "QueryTexts", "TokenLists", "NewDocuments"), many)
    found["Reasoning"] = _reasoning(config, loaded)
    if loaded is None:
        return found
    special = special_ids(loaded.model.tokenizer)
    usable = [token for token in range(len(loaded.model.tokenizer)) if token not in special]
    found["TokenId"] = {"minimum": usable[0], "maximum": usable[-1]}
    if refused := sorted(token for token in special if usable[0] < token < usable[-1]):
        found["TokenId"]["not"] = {"enum": refused}
    found["ModelName"] = {"const": loaded.model.name}
    found["Dimensions"] = {"enum": list(loaded.dimensions)}
    if loaded.index is not None:
        found["Filter"] = {"pattern": filter_pattern(loaded.index.columns)}
    return found


def _reasoning(config: ServerConfig, loaded: Loaded | None) -> dict[str, Any]:
    choices: list[dict[str, Any]] = [
        {"type": "boolean", "description": f"true is a budget of {config.reasoning_tokens} tokens"},
        {"type": "integer", "minimum": 0, "maximum": config.max_reasoning_tokens, "description": "a budget in tokens"},
    ]
    if loaded is None or loaded.adaptive:
        choices.append({"const": "auto", "description": "reason where the model's rule expects it to help"})
    return {"anyOf": choices}


def _name_model(paths: dict[str, Any], name: str) -> None:
    """The name of the model that is served, in the examples."""
    for example in paths["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["examples"].values():
        example["value"]["model"] = name
    paths["/v1/models/{model}"]["get"]["parameters"][0]["example"] = name

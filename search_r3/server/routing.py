"""What all routes share: routers, the service, JSON responses, and descriptions for FastAPI.

A handler reads its body with `request_body.read` rather than as a FastAPI parameter: FastAPI would read all of it into
memory, and parse it in the event loop, before checking the key, the queue or any other limit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import orjson
from fastapi import APIRouter, Depends
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from search_r3.server.service import Service

SCHEMAS = "#/components/schemas/"
STATUSES = {
    400: "The request is invalid; `param` says where.",
    401: "Missing or unknown API key.",
    403: "The API key may only read.",
    404: "There is no such model, document or index, or no index at all.",
    408: "The body did not arrive in time.",
    409: "It conflicts with the index, or another process is writing to it.",
    413: "The body, or its texts together, are over the server's limit.",
    415: "The body is not application/json, or it is compressed.",
    429: "Too many requests are in flight; retry after Retry-After seconds.",
    500: "Internal server error, which was logged.",
    503: "Loading, shutting down, too busy to begin in time, or the index is unavailable.",
    504: "Begun, but not finished in time.",
}
WITH_BODY = (400, 408, 413, 415, 429, 500, 503, 504)
"""Statuses of a route that reads a body and runs the model."""


def service_of(request: Request) -> Service:
    """The service of the application that received the request."""
    return request.app.state.service


async def _check_key(request: Request) -> None:
    service_of(request).keys.check(request.headers.get("authorization"))


async def _check_writing_key(request: Request) -> None:
    service_of(request).keys.check(request.headers.get("authorization"), write=True)


def v1_router() -> APIRouter:
    """A router for routes below /v1, which need an API key if the server has any."""
    return keyed_router("/v1")


def keyed_router(prefix: str, *, write: bool = False) -> APIRouter:
    """A router for routes below `prefix`, which need an API key if the server has any; with `write`, one that may
    change the index."""
    return APIRouter(prefix=prefix, dependencies=[Depends(_check_writing_key if write else _check_key)])


def get(router: APIRouter, path: str, **options: Any) -> Callable[[Any], Any]:
    """`router.get`, which also adds HEAD without describing it."""

    def add(handler: Any) -> Any:
        router.head(path, include_in_schema=False)(handler)
        return router.get(path, **options)(handler)

    return add


def to_json(value: Any, status: int = 200) -> Response:
    """A JSON response; NumPy float32 values are written so that they read back exactly."""
    try:
        body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:  # an integer over 64 bits in an index's metadata
        body = json.dumps(value).encode()
    return Response(body, status, media_type="application/json")


def takes(*models: type[BaseModel], **content: Any) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is one of `models`.

    Args:
        models: must be among `openapi.READ_BY_HANDLERS`.
        content: `example` or `examples`.
    """
    references = [{"$ref": SCHEMAS + model.__name__} for model in models]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, **content}}}}


def answers(
    model: type[BaseModel], description: str, *errors: int, status: int = 200, **more: Any
) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: `model` for `status`, the error form for `errors`; `more` is added to the former."""
    success: dict[int | str, dict[str, Any]] = {status: {"model": model, "description": description, **more}}
    return success | {error: error_response(error) for error in sorted(errors)}


def error_response(status: int) -> dict[str, Any]:
    """The description of an error."""
    schema = {"$ref": SCHEMAS + "Error"}
    response: dict[str, Any] = {"description": STATUSES[status], "content": {"application/json": {"schema": schema}}}
    if status in (409, 429, 503):
        response["headers"] = retry_after(required=status != 409)  # not every conflict can be solved by waiting
    return response


def retry_after(required: bool) -> dict[str, Any]:
    """The description of the header Retry-After."""
    schema = {"type": "integer", "minimum": 1}
    return {"Retry-After": {"description": "seconds", "required": required, "schema": schema}}

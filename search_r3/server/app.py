"""The application: routes, errors in one form, a log line and figures for every request, the page at /.

Everything unexpected ends here as a 500 that says nothing of the inside; uvicorn never sees an exception.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from fastapi import Depends, FastAPI
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from search_r3.errors import InputError
from search_r3.server.errors import ApiError, from_input_error
from search_r3.server.logs import log
from search_r3.server.metrics import CONTENT_TYPE
from search_r3.server.openapi import describe
from search_r3.server.request_body import HungUp
from search_r3.server.routes import documents, embeddings
from search_r3.server.routes import search as search_route
from search_r3.server.routes.docs_page import render
from search_r3.server.routes.embeddings import check_model, model_record, to_json
from search_r3.server.routes.web_page import add_page
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded, Service

GET = ["GET", "HEAD"]
CLOSED_REQUEST = 499
"""nginx's status for a client that went away; only the log and the figures see it."""


class AnyText(StringConvertor):
    """The rest of a path, line ends included: Starlette's own `path` stops at them, but an id may have them."""

    regex = r"[\s\S]*"


register_url_convertor("any_text", AnyText())


def create_app(
    config: ServerConfig, load: Callable[[], Loaded], on_failure: Callable[[], None] = lambda: None
) -> FastAPI:
    """The ASGI application.

    Args:
        config: limits and keys.
        load: gives what is served; called in a thread at startup.
        on_failure: called if that fails.

    The application's `state.service` is its `Service`.
    """
    service = Service(config, load, on_failure)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close, config.grace)

    app = FastAPI(
        title="Search-R3", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan, redirect_slashes=False
    )
    app.state.service = service
    _add_v1(app, service)
    _add_rest(app, service)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(InputError, _input_error)
    app.add_exception_handler(HungUp, lambda *_: Response(status_code=CLOSED_REQUEST))
    app.add_middleware(Observed, service=service)
    return app


def _add_v1(app: FastAPI, service: Service) -> None:
    async def key_checked(request: Request) -> None:
        service.keys.check(request.headers.get("authorization"))

    guard: dict[str, Any] = {"dependencies": [Depends(key_checked)], "response_model": None}

    @app.post("/v1/embeddings", **guard)
    async def create_embeddings(request: Request) -> Response:
        return await embeddings.create_embeddings(request, service)

    @app.api_route("/v1/models", methods=GET, **guard)
    async def list_models() -> Response:
        return to_json({"object": "list", "data": [model_record(service.loaded)]})

    @app.api_route("/v1/models/{model:path}", methods=GET, **guard)
    async def get_model(model: str) -> Response:
        check_model(model, service.loaded)
        return to_json(model_record(service.loaded))

    @app.post("/v1/search", **guard)
    async def search(request: Request) -> Response:
        return await search_route.search(request, service)

    @app.api_route("/v1/documents", methods=GET, **guard)
    async def list_documents(request: Request) -> Response:
        return await documents.list_documents(request, service)

    if service.config.writable:

        @app.post("/v1/documents", **guard)
        async def add_documents(request: Request) -> Response:
            return await documents.add_documents(request, service)

        @app.delete("/v1/documents/{document:any_text}", **guard)
        async def delete_document(request: Request, document: str) -> Response:
            return await documents.delete_document(request, service, document)


def _add_rest(app: FastAPI, service: Service) -> None:
    @app.api_route("/readyz", methods=GET, response_model=None)
    @app.api_route("/health", methods=GET, response_model=None)
    async def health(request: Request) -> Response:
        known = service.known
        status, reason = service.health()
        allowed = service.keys.allow(request.headers.get("authorization"))  # a reason may name paths and models
        record = {
            "status": status,
            "reason": reason if allowed else None,
            "model": known.model.name if known else None,
            "index": known is not None and known.index is not None,
            "in_hand": service.in_hand,
        }
        answer = to_json(record, 200 if status == "ready" else 503)
        answer.headers["Cache-Control"] = "no-store"
        if answer.status_code == 503:
            answer.headers["Retry-After"] = "2"
        return answer

    @app.api_route("/livez", methods=GET, response_model=None)
    async def livez() -> Response:
        return to_json({"status": "alive"})

    @app.api_route("/metrics", methods=GET, response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    @app.api_route("/openapi.json", methods=GET, response_model=None)
    async def openapi() -> Response:
        return to_json(await asyncio.to_thread(describe, service))

    @app.api_route("/docs", methods=GET, response_model=None)
    async def docs(request: Request) -> Response:
        description = await asyncio.to_thread(describe, service)
        return HTMLResponse(render(description, str(request.base_url).rstrip("/")))

    add_page(app)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _input_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, InputError)
    return from_input_error(error).response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, and what a page's files may raise."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        methods = _methods(request)
        message = f"{request.method} is not possible on {path[:100]!a}; {', '.join(methods)} is"
        response = ApiError(405, message, "method_not_allowed").response()
        response.headers["Allow"] = ", ".join(methods)
        return response
    if error.status_code == 404:
        return ApiError(404, f"there is nothing at {path[:100]!a}; see /docs", "not_found").response()
    return ApiError(error.status_code, HTTPStatus(error.status_code).phrase, "http_error").response()


def _methods(request: Request) -> list[str]:
    """Every method that some route has for this path."""
    found: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", None) or {"GET", "HEAD"}
    return sorted(found)


class Observed:
    """Outermost: counts, times and logs every request, and answers what nobody else has caught.

    The log has the route, never the query string, the body, or a header.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, identifier, status = time.perf_counter(), uuid.uuid4().hex[:16], 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identifier.encode())]
            await send(message)

        error: BaseException | None = None
        try:
            await self.app(scope, receive, watched)
        except Exception as caught:
            error = caught
            if not status:
                answer = ApiError(500, f"something went wrong here; it was logged as {identifier}", "internal")
                await answer.response()(scope, receive, watched)
        except asyncio.CancelledError:  # a shutdown that would wait no longer; nothing is outside to be told
            if not status:
                answer = ApiError(503, "the server is shutting down; try again later", "not_ready_stopping")
                await answer.response()(scope, receive, watched)
        finally:
            self.service.bodies.release(scope)
            self._note(scope, identifier, status, time.perf_counter() - started, error)
            del error  # it holds this frame

    def _note(self, scope: Scope, identifier: str, status: int, seconds: float, error: BaseException | None) -> None:
        route = getattr(scope.get("route"), "path", "other")
        state = scope.get("state", {})
        if state.get("hung_up"):
            status = CLOSED_REQUEST
        self.service.metrics.requests.labels(route, str(status)).inc()
        self.service.metrics.seconds.labels(route).observe(seconds)
        level = logging.ERROR if status >= 500 and status != 503 else logging.INFO
        fields = {"id": identifier, "method": scope["method"][:16], "route": route, "status": status}
        if "items" in state:
            fields["items"] = state["items"]
        log("request", level, error, **fields, ms=round(seconds * 1e3, 1))

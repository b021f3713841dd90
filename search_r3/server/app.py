"""The application: routes, errors in one form, and a log line and metrics for every request.

Unexpected errors become a 500 that reveals no internals; uvicorn never sees an exception.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from search_r3.errors import InputError
from search_r3.server.errors import ApiError, from_input_error
from search_r3.server.logs import log
from search_r3.server.openapi import custom_openapi
from search_r3.server.parsing import validation_error
from search_r3.server.request_body import ClientDisconnected
from search_r3.server.request_identity import RequestIdentity
from search_r3.server.routes import docs_page, documents, embeddings, health, models, rerank, search, tei, web_page
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded, Service
from search_r3.server.tracing import Span

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that disconnected; it appears only in the log and the metrics."""


def create_app(
    config: ServerConfig, load: Callable[[], Loaded], on_failure: Callable[[], None] = lambda: None
) -> FastAPI:
    """The ASGI application.

    Args:
        config: limits and keys.
        load: returns what is served; called in a thread at startup.
        on_failure: called if that fails.

    The application's `state.service` is its `Service`.
    """
    service = Service(config, load, on_failure)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close, service.config.grace)

    routers = [embeddings.router, search.router, rerank.router, rerank.v2_router, models.router, documents.router]
    if config.writable:
        routers.append(documents.changes_router)
    routers += [tei.router, health.router, docs_page.router, web_page.router]
    app = FastAPI(
        title="Search-R3",
        description="Embeddings as OpenAI's clients ask for them, and search that reasons before it embeds.",
        routes=[route for router in routers for route in router.routes],
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    app.openapi = partial(custom_openapi, app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(InputError, _input_error)
    app.add_exception_handler(RequestValidationError, _parameter_error)
    app.add_exception_handler(ClientDisconnected, lambda *_: Response(status_code=CLIENT_CLOSED_REQUEST))
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID", "traceparent"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    app.add_middleware(ObservabilityMiddleware, service=service)
    return app


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _input_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, InputError)
    return from_input_error(error).response()


async def _parameter_error(_: Request, error: Exception) -> Response:
    """An invalid query or path parameter; `parsing` validates bodies."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"][1:]))[:100]  # without "query"
    if first["type"] == "extra_forbidden":
        message = f"unknown parameter {name!a}; see /docs for the parameters"
        return ApiError(400, message, "unknown_parameter", param=name).response()
    return validation_error({**first, "loc": (name,)}).response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        methods = _methods(request)
        message = f"{request.method} is not allowed for {path[:100]!a}; allowed: {', '.join(methods)}"
        response = ApiError(405, message, "method_not_allowed").response()
        response.headers["Allow"] = ", ".join(methods)
        return response
    if error.status_code == 404:
        return ApiError(404, f"there is nothing at {path[:100]!a}; see /docs", "not_found").response()
    return ApiError(error.status_code, HTTPStatus(error.status_code).phrase, "http_error").response()


def _methods(request: Request) -> list[str]:
    """All methods that routes allow for this path."""
    methods: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= getattr(route, "methods", None) or {"GET", "HEAD"}
    return sorted(methods)


class ObservabilityMiddleware:
    """The outermost middleware: counts, times and logs every request, and answers uncaught errors.

    The log contains the route and the request's identity, but never the query string, the body, or another header.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if root_path := self.service.config.root_path:
            scope["root_path"] = root_path
        identity = RequestIdentity.of(scope["headers"])
        with self.service.tracing.request(identity.traceparent) as span:
            await self._answer(scope, receive, send, identity, span)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, identity: RequestIdentity, span: Span) -> None:
        started, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity.id.encode())]
                if self.service.status in ("terminating", "stopping"):
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        error: BaseException | None = None
        try:
            await (self.app if _has_path(scope) else _to_prefix)(scope, receive, watched)
        except Exception as caught:
            error = caught
            if not status:
                answer = ApiError(500, f"internal server error, logged as {identity.id}", "internal")
                await answer.response()(scope, receive, watched)
        except asyncio.CancelledError:  # the shutdown grace period ended
            self.service.dropped = True
            if not status:
                answer = ApiError(503, "the server is shutting down; try again later", "not_ready_stopping")
                await answer.response()(scope, receive, watched)
        finally:
            self.service.bodies.release(scope)
            self._note(scope, identity, status, time.perf_counter() - started, error, span)
            del error  # its traceback refers to this frame

    def _note(
        self,
        scope: Scope,
        identity: RequestIdentity,
        status: int,
        seconds: float,
        error: BaseException | None,
        span: Span,
    ) -> None:
        route = getattr(scope.get("route"), "path", "other")
        state = scope.get("state", {})
        if state.get("client_disconnected"):
            status = CLIENT_CLOSED_REQUEST
        self.service.metrics.requests.labels(route, str(status)).inc()
        self.service.metrics.seconds.labels(route).observe(seconds)
        level = logging.ERROR if status >= 500 and status != 503 else logging.INFO
        method = scope["method"][:16]
        span.answered(method, route, status)
        span.set(request_id=identity.id)
        fields: dict[str, Any] = (
            identity.fields() | span.fields() | {"method": method, "route": route, "status": status}
        )
        if "items" in state:
            fields["items"] = state["items"]
        fields |= {name: state[name] for name in ("truncated", "split") if state.get(name)}  # texts
        log("request", level, error, **fields, ms=round(seconds * 1e3, 1))


def _has_path(scope: Scope) -> bool:
    """Whether there is more in the path than `--root-path`; the page's relative links need the slash behind it."""
    return not scope.get("root_path") or scope["path"] != scope["root_path"]


async def _to_prefix(scope: Scope, receive: Receive, send: Send) -> None:
    query = scope["query_string"].decode("latin-1")
    where = f"{scope['root_path']}/{'?' + query if query else ''}"
    await RedirectResponse(where, 308)(scope, receive, send)

"""Reading a request's body within the server's limits, and waiting for an answer while the client is connected.

Problems with a request become an ApiError: 408 too slow, 413 too large, 415 unsupported type, 400 anything else. Long
work is done in threads, with a separate one for large requests so that small ones do not wait behind them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

from pydantic import TypeAdapter
from starlette.requests import ClientDisconnect, Request

from search_r3.server.errors import ApiError
from search_r3.server.parsing import MOST_VALUES, count_marks, parse
from search_r3.server.service import Service

Body = TypeVar("Body")
T = TypeVar("T")
LARGE = 200_000  # bytes or characters; parsing more would delay other requests by milliseconds
FEW_MARKS = 5_000  # of values in a body; so would validating more


class ClientDisconnected(Exception):
    """The client has disconnected."""


async def read(request: Request, service: Service, shape: TypeAdapter[Body]) -> Body:
    """The request's body as a `shape`. Raises ApiError, or ClientDisconnected."""
    body = await _read_bytes(request, service)
    if len(body) <= LARGE and count_marks(body) <= FEW_MARKS:
        return parse(body, shape)
    most = max(MOST_VALUES, 2 * service.config.max_request_tokens)
    return await in_thread(request, service, pool_for(service, len(body)), lambda _: parse(body, shape, most))


def pool_for(service: Service, size: int) -> Executor:
    """The thread pool for a body or texts of `size` bytes or characters; large ones are processed one at a time."""
    return service.bulk if size > LARGE else service.tokenizing


async def in_thread(request: Request, service: Service, pool: Executor, job: Callable[[Callable[[], None]], T]) -> T:
    """Run `job` in a thread and return its result. If the client disconnects, it ends before its next step.

    Args:
        pool: runs the job.
        job: gets a function to call between its steps, which raises ClientDisconnected if the job should end.

    Raises:
        ApiError, ClientDisconnected: see `until_done`; and whatever `job` raises.
    """
    begun, ended = threading.Event(), threading.Event()

    def check() -> None:
        if ended.is_set():
            raise ClientDisconnected

    def run() -> T:
        check()
        begun.set()
        return job(check)

    loop = asyncio.get_running_loop()
    return await until_done(request, service, loop.run_in_executor(pool, run), begun.is_set, ended.set)


async def _read_bytes(request: Request, service: Service) -> bytearray:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the body as Content-Type: application/json", "unsupported_media_type")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "send the body without a Content-Encoding", "unsupported_encoding")
    limit = service.config.max_body
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(service.config.body_timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
                if len(body) > LARGE:
                    service.bodies.hold(request.scope, len(body))
    except TimeoutError as error:
        seconds = service.config.body_timeout
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds", "body_timeout") from error
    except ClientDisconnect as error:
        raise ClientDisconnected from error
    return body


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is over the limit of {limit:,} bytes; send fewer texts", "body_too_large")


async def disconnected(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def until_done(
    request: Request,
    service: Service,
    future: asyncio.Future[T],
    begun: Callable[[], bool],
    cancel: Callable[[], Any] = lambda: None,
) -> T:
    """Wait for the result of `future` until the client disconnects or the timeout passes; then it is cancelled.

    The caller must not keep a reference to `future`: its error would refer to itself through the frames of its
    traceback, and keep the whole request in memory.

    Args:
        begun: returns whether the work has begun.
        cancel: called before `future` is cancelled.

    Raises:
        ApiError: 503 (not begun) or 504 (begun) after the server's timeout.
        ClientDisconnected: the client has disconnected.
    """
    gone = asyncio.ensure_future(disconnected(request))
    either: set[asyncio.Future[Any]] = {future, gone}
    try:
        await asyncio.wait(either, timeout=service.config.timeout, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        if gone.done():
            service.metrics.dropped.labels("disconnected").inc()
            raise ClientDisconnected
        raise timed_out(service, begun())
    finally:
        gone.cancel()
        if not future.done():
            cancel()
            future.cancel()
            future.add_done_callback(lambda f: f.cancelled() or f.exception())  # else asyncio logs the error
        del future, either, begun, cancel


def timed_out(service: Service, begun: bool) -> ApiError:
    """The error for a request that has waited too long."""
    service.metrics.dropped.labels("timeout").inc()
    seconds = f"{service.config.timeout:g} seconds"
    if begun:
        return ApiError(504, f"no answer within {seconds}; send fewer texts, or a smaller budget", "timeout")
    message = f"the server is too busy: the request was not begun within {seconds}; try again later"
    return ApiError(503, message, "busy", retry_after=service.retry_after())

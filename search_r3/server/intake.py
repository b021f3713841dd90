"""Requests in: a body within its limits, JSON, the right shape; and waiting for an answer while the client is there.

What is wrong with a request becomes an ApiError: 408 too slow, 413 too large, 415 another type, 400 all else.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from search_r3.server.errors import ApiError
from search_r3.server.service import Service

Body = TypeVar("Body", bound=BaseModel)
T = TypeVar("T")
LARGE = 200_000  # bytes; parsing more would keep the others waiting for milliseconds
EXACT = 2.0**53  # whole numbers up to here are exact as floats
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class HungUp(Exception):
    """Nobody is there to be answered."""


async def read(request: Request, service: Service, shape: type[Body]) -> Body:
    """The request's body as a `shape`. Raises ApiError, or HungUp."""
    body = await _read_bytes(request, service)
    if len(body) <= LARGE:
        return parse(body, shape)
    return await asyncio.get_running_loop().run_in_executor(service.tokenizing, parse, body, shape)


def parse(body: bytes, shape: type[Body]) -> Body:
    """JSON as a `shape`. Raises ApiError 400 that names the first field that is wrong."""
    try:
        value = json.loads(body.decode("utf-8"), parse_float=_number, parse_constant=_no_constant)
        if SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ApiError(
            400, "the body holds half of a surrogate pair (\\uD800 to \\uDFFF), which is no text", "invalid_text"
        ) from error
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body is not UTF-8 (byte {error.start}); send JSON in UTF-8", "invalid_json"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "a value that JSON does not have"
        raise ApiError(400, f"the body is not JSON: {reason[:200]}", "invalid_json") from error
    try:
        return shape.model_validate(value)
    except ValidationError as error:
        raise _explain(error) from error


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _number(written: str) -> int | float:
    """JSON Schema, and JavaScript, see no difference between 5 and 5.0."""
    value = float(written)
    return int(value) if value.is_integer() and abs(value) < EXACT else value


def _explain(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    places = [str(part) for part in first["loc"] if isinstance(part, int) or "[" not in part]
    param = ".".join(places)[:200] or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"there is no field {param!a}; see /docs for those there are", "unknown_field", param=param
        )
    if first["type"] == "missing":
        return ApiError(400, f"the field {param!a} is missing", "missing_field", param=param)
    return ApiError(400, f"{param + ': ' if param else ''}{message}", "invalid_value", param=param)


async def _read_bytes(request: Request, service: Service) -> bytes:
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
    except TimeoutError as error:
        seconds = service.config.body_timeout
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds", "body_timeout") from error
    except ClientDisconnect as error:
        raise HungUp from error
    return bytes(body)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is over the limit of {limit:,} bytes; send fewer texts", "body_too_large")


async def hang_up(request: Request) -> None:
    """Return when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def until_done(
    request: Request, service: Service, future: asyncio.Future[T], cancel: Callable[[], Any], begun: Callable[[], bool]
) -> T:
    """The result of `future`, as long as the client is there and the time is not over; else it is cancelled.

    Raises:
        ApiError: 503 (not begun) or 504 (begun) after the server's timeout.
        HungUp: the client went away.
    """
    gone = asyncio.ensure_future(hang_up(request))
    either: set[asyncio.Future[Any]] = {future, gone}
    try:
        await asyncio.wait(either, timeout=service.config.timeout, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        if gone.done():
            service.metrics.dropped.labels("hung up").inc()
            raise HungUp
        raise timed_out(service, begun())
    finally:
        gone.cancel()
        if not future.done():
            cancel()
            future.add_done_callback(lambda f: f.cancelled() or f.exception())  # nobody else will look at it


def timed_out(service: Service, begun: bool) -> ApiError:
    """What to tell one who has waited too long."""
    service.metrics.dropped.labels("timeout").inc()
    seconds = f"{service.config.timeout:g} seconds"
    if begun:
        return ApiError(504, f"no answer within {seconds}; send fewer texts, or a smaller budget", "timeout")
    message = f"the server is too busy: the request was not begun within {seconds}; try again later"
    return ApiError(503, message, "busy", retry_after=service.retry_after())

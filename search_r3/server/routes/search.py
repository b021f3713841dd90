"""POST /v1/search: an index's hits for a query, optionally with the reasoning as server-sent events.

Events (https://html.spec.whatwg.org/multipage/server-sent-events.html): any number of `reasoning` {"text": piece}, then
`result` (the same as without streaming) or `error` (in OpenAI's form). Comments keep the connection open.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from search_r3.errors import InputError
from search_r3.index.index_handle import IndexHandle
from search_r3.index.results.reranked import rerank_hits
from search_r3.index.run_search import MAX_QUERY_CHARACTERS, check_given, check_reasoning_words
from search_r3.index.run_search import SearchResult as Found
from search_r3.model.text_limit import TextTooLong, TooLong
from search_r3.rerankers.base import TooManyTokens
from search_r3.server.batching.batcher import BatcherClosed
from search_r3.server.batching.queued_encoder import QueuedEncoder
from search_r3.server.errors import ApiError, from_input_error
from search_r3.server.logs import log
from search_r3.server.request_body import ClientDisconnected, disconnected, read, timed_out, until_done
from search_r3.server.response_schemas import SearchResult
from search_r3.server.routing import SCHEMAS, WITH_BODY, answers, service_of, takes, to_json, v1_router
from search_r3.server.schemas import SEARCH, SearchRequest
from search_r3.server.service import Service
from search_r3.server.where_filter import check_filter

router = v1_router()
KEEP_ALIVE = 10.0
"""Seconds of silence after which a comment is sent."""
ANSWERS = answers(
    SearchResult,
    "The hits, best first. With `stream`, events: `reasoning` (pieces of text), then `result` or `error`.",
    *WITH_BODY,
    404,
    409,
    content={"text/event-stream": {"schema": {"$ref": SCHEMAS + "Event"}}},
)


@router.post(
    "/search",
    operation_id="search",
    summary="Search the index",
    description=f"The model reasons about the query (of at most {MAX_QUERY_CHARACTERS:,} characters) and embeds it, "
    "unless `reasoning` is false or the mode is `text`. With `read` it first reads the hits of a direct search.",
    responses=ANSWERS,
    openapi_extra=takes(SearchRequest, example={"query": "How do I read a file line by line?", "k": 3, "reasoning": 8}),
)
async def search(request: Request) -> Response:
    service = service_of(request)
    service.enter()
    streaming = False
    try:
        body = await read(request, service, SEARCH)
        index = service.index(body.index)
        budget = service.reasoning_budget(body.reasoning)
        _check_given(body, budget)
        service.check_read(body.read)
        service.check_rerank(body.rerank, body.k)
        request.state.items = 1
        if body.where is not None:
            await _check_filter(service, index, body.where)
        run = service.tracing.carried(partial(_search, service, index, body, budget))
        if body.stream:
            streaming = True
            return EventStream(request, service, run, service.too_long(body.too_long))
        encoder, loop = service.encoder(too_long=service.too_long(body.too_long)), asyncio.get_running_loop()
        result = await until_done(
            request,
            service,
            loop.run_in_executor(service.threads, run, encoder),
            lambda: encoder.begun,
            encoder.cancel,
        )
        request.state.truncated = encoder.truncated_texts
        return to_json(result)
    finally:
        if not streaming:  # a stream calls it when it ends
            service.leave()


def _search(
    service: Service, index: IndexHandle, body: SearchRequest, budget: int | None, encoder: QueuedEncoder
) -> dict[str, Any]:
    with service.tracing.span("search", mode=body.mode, k=body.k, read=body.read, rerank=body.rerank) as span:
        found = _found(service, index, body, budget, encoder)
        span.set(hits=len(found["hits"]))
        return found


def _found(
    service: Service, index: IndexHandle, body: SearchRequest, budget: int | None, encoder: QueuedEncoder
) -> dict[str, Any]:
    """Search, and turn errors into ApiError."""
    if body.mode == "text":
        encoder.begin()
    try:
        result = index.search(
            body.query,
            encoder,
            k=body.rerank or body.k,
            mode=body.mode,
            reasoning=_reasoning(body, budget),
            max_reasoning_tokens=budget or 0,
            reasoning_text=body.reasoning_text,
            where=body.where,
            vector_weight=body.vector_weight,
            fusion=body.fusion,
            reasoning_words=body.reasoning_words,
            read=body.read,
            hops=body.hops if body.read else 1,
            explained=body.explain,
        )
        if body.rerank:
            result = _reranked(service, result, body.k, encoder)
    except TextTooLong as error:
        raise from_input_error(error, param="query") from error
    except InputError as error:
        raise from_input_error(error) from error
    except BatcherClosed as error:
        raise ApiError(503, "the server is shutting down; try again later", "not_ready_stopping") from error
    prompt, written = encoder.prompt_tokens, encoder.reasoning_tokens
    usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    usage["truncated_texts"] = encoder.truncated_texts
    named = {"index": service.index_name(body.index), "model": encoder.name}
    return result.to_dict() | named | {"usage": usage, "remembered_ms": encoder.remembered_ms}


def _reranked(service: Service, result: Found, k: int, encoder: QueuedEncoder) -> Found:
    reranker = service.loaded.reranker
    assert reranker is not None  # see `Service.check_rerank`
    most = service.config.max_request_tokens
    try:
        return rerank_hits(result, reranker, k, total_tokens=most, between=encoder.step)
    except TooManyTokens as error:
        raise ApiError(413, str(error), "too_many_tokens", param="rerank") from error


def _reasoning(body: SearchRequest, budget: int | None) -> Any:
    """The index's option `reasoning`."""
    return body.reasoning if body.reasoning in ("auto", "latent") else budget is not None


def _check_given(body: SearchRequest, budget: int | None) -> None:
    try:
        check_given(body.reasoning_text, _reasoning(body, budget), body.mode)
    except InputError as error:
        raise ApiError(409, str(error), "conflict", param="reasoning_text") from error
    try:
        check_reasoning_words(body.reasoning_words, _reasoning(body, budget), body.reasoning_text, body.mode)
    except InputError as error:
        raise ApiError(409, str(error), "conflict", param="reasoning_words") from error


async def _check_filter(service: Service, index: IndexHandle, where: str) -> None:
    def check() -> None:
        check_filter(where, index.columns)

    try:
        await asyncio.get_running_loop().run_in_executor(service.tokenizing, check)
    except InputError as error:
        raise from_input_error(error, 400, "invalid_filter", "where") from error


class EventStream(Response):
    """A search whose reasoning is streamed. If the client disconnects, both the stream and the search end."""

    media_type = "text/event-stream"

    def __init__(
        self, request: Request, service: Service, run: Callable[[QueuedEncoder], dict[str, Any]], too_long: TooLong
    ) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.request, self.service, self.run, self.too_long = request, service, run, too_long

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str] = asyncio.Queue()

        def on_text(piece: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        encoder = self.service.encoder(on_text, self.too_long)
        future = loop.run_in_executor(self.service.threads, self.run, encoder)
        gone = asyncio.ensure_future(disconnected(self.request))
        deadline = loop.time() + self.service.config.timeout
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while not future.done():
                piece = asyncio.ensure_future(pieces.get())
                wait = min(KEEP_ALIVE, max(0.0, deadline - loop.time()))
                either: set[asyncio.Future[Any]] = {piece, future, gone}
                await asyncio.wait(either, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                if piece.done():
                    await _send(send, "reasoning", {"text": piece.result()})
                    continue
                piece.cancel()
                if gone.done():
                    self.service.metrics.dropped.labels("disconnected").inc()
                    raise ClientDisconnected
                if not future.done():
                    if loop.time() >= deadline:
                        raise timed_out(self.service, encoder.begun)
                    await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
            while not pieces.empty():
                await _send(send, "reasoning", {"text": pieces.get_nowait()})
            self.request.state.truncated = encoder.truncated_texts
            await _send(send, "result", future.result())
        except ApiError as error:
            await _send(send, "error", error.record())
        except (ClientDisconnected, OSError):
            self.request.state.client_disconnected = True
            return
        except Exception as error:
            log("search failed", 40, error)
            await _send(send, "error", ApiError(500, "internal server error, which was logged", "internal").record())
        finally:
            gone.cancel()
            encoder.cancel()
            if not future.done():
                future.cancel()
                future.add_done_callback(lambda f: f.cancelled() or f.exception())
            del future  # see `until_done`
            self.service.leave()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, event: str, data: dict[str, Any]) -> None:
    body = f"event: {event}\ndata: {json.dumps(data, allow_nan=False, default=str)}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})

"""POST /v1/rerank, as Cohere's and Jina's clients expect it, and /v2/rerank, where Cohere's ClientV2 posts.

https://docs.cohere.com/reference/rerank, https://api.jina.ai/redoc#tag/rerank. A cross-encoder scores the documents
(`search-r3 serve --reranker`); without one, the served model's embeddings do, and the answer's `kind` says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from search_r3.errors import InputError
from search_r3.model.text_limit import TextLimit, TooLong, read_texts
from search_r3.rerankers.base import ReadingLimit, Scores, TooManyTokens
from search_r3.rerankers.embedding_reranker import EmbeddingReranker
from search_r3.server.batching.batcher import BatcherClosed
from search_r3.server.batching.queued_encoder import QueuedEncoder
from search_r3.server.errors import ApiError, from_input_error
from search_r3.server.request_body import read, until_done
from search_r3.server.response_schemas import Reranking
from search_r3.server.routing import WITH_BODY, answers, keyed_router, service_of, takes, to_json, v1_router
from search_r3.server.schemas import RERANK, RerankDocument, RerankRequest
from search_r3.server.service import Service

router, v2_router = v1_router(), keyed_router("/v2")
DESCRIPTION: dict[str, Any] = {
    "description": "Cohere's and Jina's endpoint. The server's cross-encoder reads the query beside each document; a "
    "server without one gives the cosine of query and document by its embedding model (the query is reasoned about), "
    "and `kind` is then `embeddings`.",
    "responses": answers(Reranking, "The documents' places and scores, best first", *WITH_BODY, 404),
    "openapi_extra": takes(
        RerankRequest,
        example={
            "query": "When does the train leave?",
            "documents": ["Bread needs flour.", "The train to Vienna leaves at nine."],
            "top_n": 1,
        },
    ),
}


@v2_router.post("/rerank", operation_id="rerankV2", summary="The same, where Cohere's ClientV2 posts", **DESCRIPTION)
@router.post("/rerank", operation_id="rerank", summary="Put documents in order for a query", **DESCRIPTION)
async def rerank(request: Request) -> Response:
    service = service_of(request)
    with service.inside():
        body = await read(request, service, RERANK)
        loaded = service.loaded
        loaded.check_reranker_name(body.model)
        texts = [one if isinstance(one, str) else one.text for one in body.documents]
        limit = ReadingLimit(body.max_tokens_per_doc, service.config.max_request_tokens)
        scores = await score(request, service, body.query, texts, limit, "documents")
        results = [
            {"index": i, "relevance_score": float(scores.relevance[i])} | _returned(body, i)
            for i in scores.best(body.top_n)
        ]
        usage = {"prompt_tokens": scores.tokens, "completion_tokens": 0, "total_tokens": scores.tokens}
        kind = "embeddings" if loaded.reranker is None else loaded.reranker.kind
        found = {"object": "list", "model": loaded.reranker_name, "kind": kind, "results": results, "usage": usage}
        return to_json(found)


async def score(
    request: Request, service: Service, query: str, texts: Sequence[str], limit: ReadingLimit, param: str
) -> Scores:
    """The scores of `texts`, computed in a thread while the client is connected.

    Args:
        param: the field of the request that has the texts, for errors.

    Raises:
        ApiError: 400 or 413 if there are too many texts or tokens; 503 or 504 after the server's timeout.
        ClientDisconnected: the client has disconnected.
    """
    if len(texts) > (most := service.config.max_items):
        message = f"{param} has {len(texts):,} texts, the limit is {most:,}; send several requests"
        raise ApiError(400, message, "too_many_items", param=param)
    request.state.items = len(texts)
    encoder = service.encoder()
    run = service.tracing.carried(partial(_traced, service, encoder, query, texts, limit))
    future = asyncio.get_running_loop().run_in_executor(service.threads, run)
    try:
        return await until_done(request, service, future, lambda: encoder.begun, encoder.cancel)
    except TooManyTokens as error:
        raise ApiError(413, str(error), "too_many_tokens", param=param) from error
    except InputError as error:
        raise from_input_error(error, param=param) from error
    except BatcherClosed as error:
        raise ApiError(503, "the server is shutting down; try again later", "not_ready_stopping") from error
    finally:
        del future  # see `until_done`


def _traced(service: Service, encoder: QueuedEncoder, query: str, texts: Sequence[str], limit: ReadingLimit) -> Scores:
    with service.tracing.span("rerank", texts=len(texts)) as span:
        scores = _score(service, encoder, query, texts, limit)
        span.set(prompt_tokens=scores.tokens)
        return scores


def _score(service: Service, encoder: QueuedEncoder, query: str, texts: Sequence[str], limit: ReadingLimit) -> Scores:
    reranker = service.loaded.reranker
    if reranker is None:
        return _by_embeddings(service, encoder, query, texts, limit)
    scores = reranker.score(query, texts, limit=limit, between=encoder.step)
    service.metrics.tokens.labels("reranked").inc(scores.tokens)
    return scores


def _by_embeddings(
    service: Service, encoder: QueuedEncoder, query: str, texts: Sequence[str], limit: ReadingLimit
) -> Scores:
    """The cosines by the served model. Queue and cancellation are the encoder's; the tokens are counted first."""
    most = service.limit.tokens
    tokens = min(limit.document_tokens or most, most)

    def between(read: int) -> None:
        if encoder.cancelled:
            raise CancelledError
        if limit.total_tokens is not None and read > limit.total_tokens:
            message = f"the documents have over {limit.total_tokens:,} tokens, the limit; send several requests"
            raise TooManyTokens(message)

    too_long: TooLong = "truncate" if limit.truncate else "error"
    read_texts(service.loaded.model, texts, TextLimit(tokens, too_long), between, limit.total_tokens)
    budget = service.config.reasoning_tokens
    reranker = EmbeddingReranker(encoder, reasoning=budget > 0, max_reasoning_tokens=budget)
    scores = reranker.score(query, texts, limit=ReadingLimit(tokens))
    return Scores(scores.relevance, scores.raw, encoder.prompt_tokens)


def _returned(body: RerankRequest, i: int) -> dict[str, Any]:
    if not body.return_documents:
        return {}
    document = body.documents[i]
    return {"document": document.model_dump() if isinstance(document, RerankDocument) else {"text": document}}

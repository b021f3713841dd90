"""POST /v1/embeddings, as OpenAI's clients expect it.

https://platform.openai.com/docs/api-reference/embeddings, extended by `input_type` and `reasoning`. A client that sends
neither gets deterministic embeddings of documents, which are what clients embed most and what indexes contain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from search_r3.errors import InputError
from search_r3.index.encoder_protocol import document_spaces
from search_r3.model.text_limit import ReadTexts, TextLimit, mean_of_parts, read_texts
from search_r3.model.tokenization import Text, Tokens
from search_r3.server.batching.batcher import BatcherClosed, Embedded, EmbeddingJob, Kind
from search_r3.server.batching.queued_encoder import given_traces
from search_r3.server.embedding_types import written
from search_r3.server.errors import ApiError, from_input_error
from search_r3.server.request_body import in_thread, pool_for, read, until_done
from search_r3.server.response_schemas import Embeddings
from search_r3.server.routing import WITH_BODY, answers, service_of, takes, to_json, v1_router
from search_r3.server.schemas import EMBEDDINGS, DocumentEmbeddings, QueryEmbeddings
from search_r3.server.service import Loaded, Service

router = v1_router()
OVERSIZED = 20_000
"""A request with a text of more characters or token ids than this is oversized: see `EmbeddingJob`."""
EXAMPLES = {
    "documents": {"value": {"model": "MODEL", "input": ["Paris is the capital of France."]}},
    "query with reasoning": {
        "value": {
            "model": "MODEL",
            "input": "How do I read a file line by line?",
            "input_type": "query",
            "reasoning": 8,
        }
    },
}


@router.post(
    "/embeddings",
    operation_id="createEmbeddings",
    summary="Embed documents or queries",
    description="OpenAI's endpoint. Texts are embedded as documents unless `input_type` is `query`; only queries can "
    "be reasoned about. `usage.truncated_texts` counts texts with more tokens than the server reads of one (512 by "
    "default); `too_long` says what happens to them.",
    responses=answers(Embeddings, "One unit vector per text", *WITH_BODY, 404, 409),
    openapi_extra=takes(DocumentEmbeddings, QueryEmbeddings, examples=EXAMPLES),
)
async def create_embeddings(request: Request) -> Response:
    service = service_of(request)
    with service.inside():
        body = await read(request, service, EMBEDDINGS)
        name = service.loaded.model.name
        service.loaded.check_name(body.model)
        write = _writer(body)
        vectors, usage = await embed(request, service, body)
        data = [{"object": "embedding", "index": i, "embedding": write(vector)} for i, vector in enumerate(vectors)]
        return to_json({"object": "list", "data": data, "model": name, "usage": usage})


async def embed(
    request: Request, service: Service, body: DocumentEmbeddings | QueryEmbeddings
) -> tuple[list[np.ndarray], dict[str, int]]:
    """The unit vectors that `body` asks for, float32 (dimensions,) each, and the usage. Raises ApiError."""
    loaded = service.loaded
    dimensions = _dimensions(body.dimensions, loaded)
    budget = service.reasoning_budget(body.reasoning)
    given, limit = _given(body), _limit(body, service)
    items = cast(list[str] | list[list[int]], body.input)
    oversized = limit.too_long != "split" and max((len(item) for item in items), default=0) > OVERSIZED
    tokenized, traces = await _tokens(request, items, given, limit, service, queries=body.input_type == "query")
    del items, given
    body.input = []  # the texts may be large, and are no longer needed
    service.bodies.release(request.scope)
    texts = tokenized.rows
    request.state.items = len(tokenized.parts)
    request.state.truncated, request.state.split = tokenized.truncated, tokenized.split
    if body.input_type != "query":
        embedded = await _embed(request, service, "document", texts, oversized=oversized)
    elif traces:
        embedded = await _embed(request, service, "given", texts, oversized=oversized, traces=traces)
    elif budget is None:
        kind: Kind = "latent" if body.reasoning == "latent" else "query"
        embedded = await _embed(request, service, kind, texts, oversized=oversized)
    elif body.reasoning == "auto":
        embedded = await _embed_by_rule(request, service, texts, budget)
    else:
        embedded = await _embed(request, service, "reasoned", texts, budget, oversized=oversized)
    prompt = tokenized.tokens + sum(map(len, traces))
    written = sum(one.num_tokens for one in embedded)
    usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    usage |= {"truncated_texts": tokenized.truncated, "split_texts": tokenized.split}
    return [_shortened(one.vector, dimensions) for one in _joined(embedded, tokenized)], usage


def _writer(body: DocumentEmbeddings | QueryEmbeddings) -> Callable[[np.ndarray], Any]:
    """What writes an embedding in the types that are asked for. Raises ApiError: 409 if two fields name them.

    OpenAI's client sends an `encoding_format` of its own, so float and base64 are no contradiction.
    """
    kind, kinds = body.encoding_format or "float", body.embedding_types
    if kinds is None:
        return lambda vector: written(vector, kind)
    if kind not in ("float", "base64"):
        message = "encoding_format and embedding_types both name the type of the embeddings; send one of them"
        raise ApiError(409, message, "conflict", param="embedding_types")
    return lambda vector: {one: written(vector, one) for one in kinds}


def _given(body: DocumentEmbeddings | QueryEmbeddings) -> list[str]:
    """The given reasoning of each query; none if there is none. Raises ApiError: 409 if it does not fit the request."""
    if not isinstance(body, QueryEmbeddings) or body.reasoning_text is None:
        return []
    given = [body.reasoning_text] if isinstance(body.reasoning_text, str) else body.reasoning_text
    if len(given) != len(body.input):
        message = f"reasoning_text has {len(given):,} texts for {len(body.input):,} queries; give one for each"
        raise ApiError(409, message, "conflict", param="reasoning_text")
    if not (body.reasoning is None or isinstance(body.reasoning, bool)):
        message = "reasoning_text is read in place of the model's reasoning; set reasoning to true, or omit it"
        raise ApiError(409, message, "conflict", param="reasoning")
    return given


def _limit(body: DocumentEmbeddings | QueryEmbeddings, service: Service) -> TextLimit:
    """How much of each text is read. Raises ApiError: 409 if several fields say so, 400 if one asks for too much."""
    ways = {"too_long": body.too_long, "truncate": body.truncate, "truncate_prompt_tokens": body.truncate_prompt_tokens}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        message = f"{' and '.join(given)} all say what happens to a long text; send one of them"
        raise ApiError(409, message, "conflict", param=given[1])
    tokens, too_long = service.limit.tokens, body.too_long
    if body.truncate is not None:
        too_long = "truncate" if body.truncate else "error"
    if (asked := body.truncate_prompt_tokens) is not None:
        if asked > tokens:
            message = f"truncate_prompt_tokens is {asked:,}; this server reads {tokens:,} tokens of a text at most"
            raise ApiError(400, message, "invalid_value", param="truncate_prompt_tokens")
        tokens, too_long = tokens if asked < 0 else asked, "truncate"
    chosen = service.too_long(too_long, document=body.input_type != "query")
    return TextLimit(tokens, chosen, body.truncation_side or "right")


async def _embed(
    request: Request,
    service: Service,
    kind: Kind,
    texts: Sequence[Tokens],
    budget: int = 0,
    oversized: bool = False,
    traces: Sequence[tuple[int, ...]] = (),
) -> list[Embedded]:
    job = EmbeddingJob(kind, texts, budget, oversized=oversized, traces=traces)
    with service.tracing.span("encode", kind=kind, texts=len(texts)) as span:
        try:
            service.batcher.submit(job)
        except BatcherClosed as error:
            raise ApiError(503, "the server is shutting down; try again later", "not_ready_stopping") from error
        embedded = await until_done(request, service, asyncio.wrap_future(job.future), lambda: job.begun)
        span.set(prompt_tokens=job.tokens, reasoning_tokens=sum(one.num_tokens for one in embedded))
        return embedded


async def _embed_by_rule(request: Request, service: Service, texts: Sequence[Tokens], budget: int) -> list[Embedded]:
    """Direct embeddings, replaced by reasoned ones if the adaptive rule says so by the cosines in the index."""
    embedded = await _embed(request, service, "query", texts)
    loop = asyncio.get_running_loop()
    chosen = await loop.run_in_executor(service.threads, _worth_reasoning, service, embedded)
    if chosen:
        reasoned = await _embed(request, service, "reasoned", [texts[i] for i in chosen], budget)
        for i, one in zip(chosen, reasoned, strict=True):
            embedded[i] = one
    return embedded


class _FixedEncoder:
    """An encoder that returns a given embedding for any query."""

    def __init__(self, model: Any, vector: np.ndarray) -> None:
        self.name, self.dimension, self.contract_hash = model.name, model.dimension, model.contract_hash
        self.document_spaces = document_spaces(model)
        self._vector = vector

    def encode_query(self, texts: Any, **_: Any) -> np.ndarray:
        return self._vector[None]


def _worth_reasoning(service: Service, direct: list[Embedded]) -> list[int]:
    """Which of the queries the model's adaptive rule would reason about."""
    model, index = service.loaded.model, service.index()
    rule = model.adaptive_rule
    assert rule is not None  # see `Service.reasoning_budget`
    chosen = []
    for i, one in enumerate(direct):
        encoder: Any = _FixedEncoder(model, one.vector)
        result = index.search("auto", encoder, k=rule.depth, mode="vector", reasoning=False)
        if result.hits and bool(rule.decide([[hit.score for hit in result.hits]])[0]):
            chosen.append(i)
    return chosen


async def _tokens(
    request: Request,
    items: list[str] | list[list[int]],
    given: list[str],
    limit: TextLimit,
    service: Service,
    *,
    queries: bool,
) -> tuple[ReadTexts, list[tuple[int, ...]]]:
    """Each item's tokens within the limit, and each given reasoning's tokens."""
    config = service.config
    if len(items) > config.max_items:
        message = f"the input has {len(items):,} items, the limit is {config.max_items:,}; send several requests"
        raise ApiError(400, message, "too_many_items", param="input")
    texts: list[Text] = [item if isinstance(item, str) else Tokens(tuple(item)) for item in items]
    model = service.loaded.model

    def tokenize(check: Callable[[], None]) -> tuple[ReadTexts, list[tuple[int, ...]]]:
        traces = given_traces(model, given)
        read = sum(map(len, traces))

        def between(tokens: int) -> None:
            check()
            if read + tokens > config.max_request_tokens:
                message = f"the input has over {config.max_request_tokens:,} tokens, the limit; send several requests"
                raise ApiError(413, message, "too_many_tokens", param="input")

        return read_texts(model, texts, limit, between, config.max_request_tokens, queries=queries), traces

    size = sum(len(item) for item in items) + sum(map(len, given))
    try:
        return await in_thread(request, service, pool_for(service, size), tokenize)
    except InputError as error:
        raise from_input_error(error, param="input") from error


def _joined(embedded: list[Embedded], read: ReadTexts) -> list[Embedded]:
    """The answers for whole texts, from those for their parts."""
    if not read.split:
        return embedded
    joined, start = [], 0
    for count in read.parts:
        answers, rows = embedded[start : start + count], read.rows[start : start + count]
        if count == 1:
            joined += answers
        else:
            vectors_ND = np.stack([one.vector for one in answers])
            joined.append(Embedded(mean_of_parts(vectors_ND, [len(row.ids) for row in rows])))
        start += count
    return joined


def _dimensions(asked: int | None, loaded: Loaded) -> int:
    if asked is None:
        return loaded.model.dimension
    if asked not in loaded.dimensions:
        known = ", ".join(map(str, loaded.dimensions))
        message = f"dimensions is {asked}; {loaded.model.name} was trained for {known}, and others would be arbitrary"
        raise ApiError(400, message[:500], "unsupported_dimensions", param="dimensions")
    return asked


def _shortened(vector: np.ndarray, dimensions: int) -> np.ndarray:
    """A unit vector cut to `dimensions`, as little-endian float32."""
    short = np.ascontiguousarray(vector[:dimensions], dtype="<f4")
    if dimensions < len(vector):
        short = short / max(float(np.linalg.norm(short)), 1e-12)
    return short.astype("<f4", copy=False)

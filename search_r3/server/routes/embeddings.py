"""POST /v1/embeddings and GET /v1/models, as OpenAI's clients expect them.

https://platform.openai.com/docs/api-reference/embeddings. Beyond it: `input_type` and `reasoning`. A client that says
neither gets documents' embeddings, the same way every time: what is embedded most, and what an index holds.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from search_r3.errors import InputError
from search_r3.model.tokenization import Text, Tokens
from search_r3.server.batching.batcher import Closed, Embedded, Work
from search_r3.server.batching.queued_encoder import cut_tokens
from search_r3.server.errors import ApiError
from search_r3.server.request_body import in_thread, pool_for, read, until_done
from search_r3.server.schemas import EmbeddingRequest
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded, Service


def to_json(value: Any, status: int = 200) -> Response:
    """A JSON answer; numpy's float32 are written so that they are read back exactly."""
    try:
        body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:  # an integer over 64 bits in an index's metadata
        body = json.dumps(value).encode()
    return Response(body, status, media_type="application/json")


def budget_of(reasoning: bool | int | str | None, config: ServerConfig, adaptive: bool) -> int | None:
    """Tokens to reason at most, None for not at all; for "auto" what it is where it reasons. Raises ApiError 400."""
    if reasoning == "auto" and isinstance(reasoning, str):
        if not adaptive:
            raise ApiError(
                400,
                'reasoning "auto" decides by the cosines of a search: it needs a server with an index, and a model '
                "that keeps a rule (search-r3 study fits it); say true, false or a number of tokens",
                "no_adaptive_rule",
                param="reasoning",
            )
        return config.reasoning_tokens
    if reasoning is None or reasoning is False:
        return None
    if reasoning is True:
        return config.reasoning_tokens
    if int(reasoning) > config.max_reasoning_tokens:
        limit = config.max_reasoning_tokens
        raise ApiError(
            400, f"reasoning is {reasoning} tokens, the limit is {limit}", "budget_too_large", param="reasoning"
        )
    return int(reasoning)


async def create_embeddings(request: Request, service: Service) -> Response:
    """Answer POST /v1/embeddings."""
    with service.inside():
        body = await read(request, service, EmbeddingRequest)
        loaded = service.loaded
        check_model(body.model, loaded)
        dimensions = _dimensions(body.dimensions, loaded)
        budget = budget_of(body.reasoning, service.config, loaded.adaptive)
        texts, cut = await _tokens(request, body, service)
        body.input = []  # the texts may be large, and are needed no more
        service.bodies.release(request.scope)
        request.state.items = len(texts)
        job = _Job(request, service, texts)
        if body.input_type != "query":
            answers = await job.run("document")
        elif budget is None:
            answers = await job.run("query")
        elif body.reasoning == "auto" and isinstance(body.reasoning, str):
            answers = await job.run_auto(budget)
        else:
            answers = await job.run("reasoned", budget)
        return to_json(_answer(body, answers, dimensions, sum(len(text.ids) for text in texts), cut, loaded))


def check_model(name: str, loaded: Loaded) -> None:
    """Raise ApiError 404 for a model that is not served."""
    if name != loaded.model.name:
        message = f"the model {name[:100]!a} is not served here; this server has {loaded.model.name!a}"
        raise ApiError(404, message, "model_not_found", param="model")


def model_record(loaded: Loaded) -> dict[str, Any]:
    """One entry of GET /v1/models: OpenAI's fields, and what a vector of this model is."""
    return {
        "id": loaded.model.name,
        "object": "model",
        "created": 0,
        "owned_by": "search-r3",
        "dimension": loaded.model.dimension,
        "dimensions": list(loaded.dimensions),
        "contract_hash": loaded.model.contract_hash,
        "adaptive": loaded.adaptive,
    }


@dataclass
class _Job:
    """One request's texts on their way through the batcher."""

    request: Request
    service: Service
    texts: list[Tokens]

    async def run(self, kind: Any, budget: int = 0, texts: list[Tokens] | None = None) -> list[Embedded]:
        work = Work(kind, self.texts if texts is None else texts, budget)
        try:
            self.service.batcher.submit(work)
        except Closed as error:
            raise ApiError(503, "the server is shutting down; try again later", "not_ready_stopping") from error
        return await until_done(self.request, self.service, asyncio.wrap_future(work.future), lambda: work.begun)

    async def run_auto(self, budget: int) -> list[Embedded]:
        """Direct embeddings; where the rule says so by their cosines in the index, reasoned ones in their place."""
        answers = await self.run("query")
        loop = asyncio.get_running_loop()
        chosen = await loop.run_in_executor(self.service.threads, _worth_reasoning, self.service, answers)
        if chosen:
            reasoned = await self.run("reasoned", budget, [self.texts[i] for i in chosen])
            for i, answer in zip(chosen, reasoned, strict=True):
                answers[i] = answer
        return answers


class _Given:
    """An encoder that has its query's embedding already."""

    def __init__(self, model: Any, vector: np.ndarray) -> None:
        self.name, self.dimension, self.contract_hash = model.name, model.dimension, model.contract_hash
        self._vector = vector

    def encode_query(self, texts: Any, **_: Any) -> np.ndarray:
        return self._vector[None]


def _worth_reasoning(service: Service, answers: list[Embedded]) -> list[int]:
    model, index = service.loaded.model, service.index
    rule = model.adaptive_rule
    assert rule is not None  # `budget_of` has seen to it
    chosen = []
    for i, answer in enumerate(answers):
        encoder: Any = _Given(model, answer.vector)
        found = index.search("auto", encoder, k=rule.depth, mode="vector", reasoning=False)
        if found.hits and bool(rule.decide([[hit.score for hit in found.hits]])[0]):
            chosen.append(i)
    return chosen


async def _tokens(request: Request, body: EmbeddingRequest, service: Service) -> tuple[list[Tokens], int]:
    config = service.config
    if len(body.input) > config.max_items:
        message = f"the input has {len(body.input):,} items, the limit is {config.max_items:,}; send several requests"
        raise ApiError(400, message, "too_many_items", param="input")
    texts: list[Text] = [item if isinstance(item, str) else Tokens(tuple(item)) for item in body.input]
    tokenizer = service.loaded.model.tokenizer

    def tokenize(check: Callable[[], None]) -> tuple[list[Tokens], int]:
        def between(tokens: int) -> None:
            check()
            if tokens > config.max_tokens:
                message = f"the input has over {config.max_tokens:,} tokens, the limit; send several requests"
                raise ApiError(413, message, "too_many_tokens", param="input")

        return cut_tokens(tokenizer, texts, service.max_length, between)

    size = sum(len(item) for item in body.input)
    try:
        return await in_thread(request, service, pool_for(service, size), tokenize)
    except InputError as error:
        raise ApiError(400, str(error), "invalid_value", param="input") from error


def _dimensions(asked: int | None, loaded: Loaded) -> int:
    if asked is None:
        return loaded.model.dimension
    if asked not in loaded.dimensions:
        known = ", ".join(map(str, loaded.dimensions))
        message = f"dimensions is {asked}; {loaded.model.name} was trained for {known}, and others would be arbitrary"
        raise ApiError(400, message[:500], "unsupported_dimensions", param="dimensions")
    return asked


def _answer(
    body: EmbeddingRequest, answers: list[Embedded], dimensions: int, prompt: int, cut: int, loaded: Loaded
) -> dict[str, Any]:
    data = []
    for i, answer in enumerate(answers):
        vector = np.ascontiguousarray(answer.vector[:dimensions], dtype="<f4")
        if dimensions < len(answer.vector):
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        value: Any = vector.astype("<f4", copy=False)
        if body.encoding_format == "base64":
            value = base64.b64encode(value.tobytes()).decode()
        data.append({"object": "embedding", "index": i, "embedding": value})
    written = sum(answer.num_tokens for answer in answers)
    usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    return {"object": "list", "data": data, "model": loaded.model.name, "usage": usage | {"truncated_texts": cut}}

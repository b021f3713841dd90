"""The routes of Text Embeddings Inference (TEI), for its clients: /embed, / (the same), /rerank and /info.

https://huggingface.github.io/text-embeddings-inference/. `huggingface_hub.InferenceClient(model=URL)` posts to the URL
as it is given, hence the route /. TEI's /health and /metrics are among the others. Errors have this server's form.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from search_r3 import __version__
from search_r3.rerankers.base import ReadingLimit
from search_r3.server.errors import ApiError
from search_r3.server.request_body import read
from search_r3.server.response_schemas import TeiEmbeddings, TeiInfo, TeiRanks
from search_r3.server.routes.embeddings import embed
from search_r3.server.routes.rerank import score
from search_r3.server.routing import WITH_BODY, answers, get, keyed_router, service_of, takes, to_json
from search_r3.server.schemas import (
    TEI_EMBED,
    TEI_RERANK,
    DocumentEmbeddings,
    QueryEmbeddings,
    TeiEmbedRequest,
    TeiRerankRequest,
)

router = keyed_router("")
EMBED: dict[str, Any] = {
    "description": "Text Embeddings Inference's endpoint: a list of vectors, also for a single text. The texts are "
    "embedded as documents, or with the prompt_name `query` as queries, without reasoning; /v1/embeddings can do more.",
    "responses": answers(TeiEmbeddings, "One unit vector for each text", *WITH_BODY, 409),
    "openapi_extra": takes(TeiEmbedRequest, example={"inputs": ["Paris is the capital of France."]}),
}


@router.post("/", include_in_schema=False, **EMBED)  # where Hugging Face's InferenceClient posts; GET is the page
@router.post("/embed", operation_id="teiEmbed", summary="Embed texts, for TEI's clients", **EMBED)
async def tei_embed(request: Request) -> Response:
    service = service_of(request)
    with service.inside():
        body = await read(request, service, TEI_EMBED)
        kind: type[DocumentEmbeddings] | type[QueryEmbeddings]
        kind = QueryEmbeddings if body.prompt_name == "query" else DocumentEmbeddings
        asked = kind.model_construct(
            model=service.loaded.model.name,
            input=body.inputs,
            input_type="query" if body.prompt_name == "query" else "document",
            dimensions=body.dimensions,
            truncate=body.truncate,
            truncation_side=body.truncation_direction and body.truncation_direction.lower(),
        )
        body.inputs = []
        try:
            vectors, _ = await embed(request, service, asked)
        except ApiError as error:
            error.param = "inputs" if error.param == "input" else error.param
            raise
        return to_json(vectors)


@router.post(
    "/rerank",
    operation_id="teiRerank",
    summary="Put texts in order, for TEI's clients",
    description="Text Embeddings Inference's endpoint. What scores is described at /v1/rerank.",
    responses=answers(TeiRanks, "The texts' places and scores, best first", *WITH_BODY),
    openapi_extra=takes(
        TeiRerankRequest,
        example={"query": "When does the train leave?", "texts": ["Bread needs flour.", "The train leaves at nine."]},
    ),
)
async def tei_rerank(request: Request) -> Response:
    service = service_of(request)
    with service.inside():
        body = await read(request, service, TEI_RERANK)
        truncate = service.config.too_long != "error" if body.truncate is None else body.truncate
        limit = ReadingLimit(None, service.config.max_request_tokens, truncate)
        scores = await score(request, service, body.query, body.texts, limit, "texts")
        values = scores.raw if body.raw_scores else scores.relevance
        ranks = [
            {"index": i, "score": float(values[i])} | ({"text": body.texts[i]} if body.return_text else {})
            for i in scores.best()
        ]
        return to_json(ranks)


@get(
    router,
    "/info",
    operation_id="teiInfo",
    summary="The model and the limits, for TEI's clients",
    responses=answers(TeiInfo, "OK", 503),
)
async def tei_info(request: Request) -> Response:
    service = service_of(request)
    loaded, config = service.loaded, service.config
    record = {
        "model_id": loaded.model.name,
        "model_sha": None,
        "model_dtype": loaded.model.dtype,
        "model_type": {"embedding": {"pooling": "last_token"}},
        "max_concurrent_requests": config.queue,
        "max_input_length": service.limit.tokens,
        "max_batch_tokens": config.max_request_tokens,
        "max_client_batch_size": config.max_items,
        "auto_truncate": config.too_long != "error",
        "version": __version__,
        "reranker_id": loaded.reranker_name,
    }
    return to_json(record)

"""GET /v1/models: the served model, in the form that OpenAI's clients expect."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from search_r3.server.response_schemas import Model, Models
from search_r3.server.routing import answers, get, service_of, to_json, v1_router
from search_r3.server.service import Loaded

router = v1_router()


@get(
    router,
    "/models",
    operation_id="listModels",
    summary="The served model",
    responses=answers(Models, "OK", 503),
)
async def list_models(request: Request) -> Response:
    return to_json({"object": "list", "data": [_record(service_of(request).loaded)]})


@get(
    router,
    "/models/{model:path}",
    operation_id="getModel",
    summary="One model",
    responses=answers(Model, "OK", 404, 503),
)
async def get_model(request: Request, model: str) -> Response:
    loaded = service_of(request).loaded
    loaded.check_name(model)
    return to_json(_record(loaded))


def _record(loaded: Loaded) -> dict[str, Any]:
    return {
        "id": loaded.model.name,
        "object": "model",
        "created": 0,
        "owned_by": "search-r3",
        "dimension": loaded.model.dimension,
        "dimensions": list(loaded.dimensions),
        "contract_hash": loaded.model.contract_hash,
        "adaptive": loaded.adaptive,
        "latent": loaded.latent,
        "reading": loaded.reading,
        "reranker": loaded.reranker_name,
        "reranker_kind": "embeddings" if loaded.reranker is None else loaded.reranker.kind,
    }

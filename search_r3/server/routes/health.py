"""Probes and metrics: /health, /readyz, /livez and /metrics. They need no key and do no work."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from search_r3.server.metrics import CONTENT_TYPE
from search_r3.server.response_schemas import Alive, Health
from search_r3.server.routing import answers, get, retry_after, service_of, to_json

router = APIRouter()


def _health(summary: str, name: str) -> dict[str, Any]:
    unready = {"model": Health, "description": "Loading, stopping, or the index is unavailable"}
    responses = answers(Health, "Requests are accepted and can be answered")
    responses[503] = {**unready, "headers": retry_after(required=True)}
    return {"operation_id": name, "summary": summary, "responses": responses}


@get(router, "/health", **_health("Whether requests are accepted and can be answered", "health"))
@get(router, "/readyz", **_health("The same as /health, under Kubernetes' name", "readyz"))
async def health(request: Request) -> Response:
    service = service_of(request)
    known = service.known
    status, reason = service.health()
    allowed = service.keys.allow(request.headers.get("authorization"))  # a reason may name paths and models
    record = {
        "status": status,
        "reason": reason if allowed else None,
        "model": known.model.name if known else None,
        "index": known is not None and bool(known.indexes),
        "in_flight": service.in_flight,
    }
    answer = to_json(record, 200 if status == "ready" else 503)
    answer.headers["Cache-Control"] = "no-store"
    if answer.status_code == 503:
        answer.headers["Retry-After"] = "2"
    return answer


@get(
    router,
    "/livez",
    operation_id="livez",
    summary="Whether the process is alive",
    responses=answers(Alive, "It is alive"),
)
async def livez() -> Response:
    return to_json({"status": "alive"})


@get(
    router,
    "/metrics",
    operation_id="metrics",
    summary="Metrics for Prometheus",
    response_class=PlainTextResponse,
    response_description="Prometheus' text format",
)
async def metrics(request: Request) -> Response:
    return Response(service_of(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE})

"""/openapi.json, and /docs: the same for people (`api_page`), with the headers of the web page."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from search_r3.server.api_page import render
from search_r3.server.routes.web_page import HEADERS, TYPES
from search_r3.server.routing import get, to_json

router = APIRouter()


@get(router, "/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> Response:
    return to_json(await asyncio.to_thread(request.app.openapi))


@get(router, "/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    base = str(request.base_url).rstrip("/")
    page = await asyncio.to_thread(lambda: render(request.app.openapi(), base))
    return Response(page, headers={**HEADERS, "Content-Type": TYPES[".html"]})

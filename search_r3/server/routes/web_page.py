"""The web page at /: the files of the folder `page`, with headers that forbid browsers to run anything else.

Content-Security-Policy (https://www.w3.org/TR/CSP3/): scripts, styles and connections may only use this server, and
none are inline, so that markup in a document stays text even if the page had a bug.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from search_r3.server.routing import get

PAGE = Path(__file__).parents[1] / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


router = APIRouter()


def _sender(file: Path) -> Callable[[Request], Awaitable[Response]]:
    body, kind = file.read_bytes(), TYPES[file.suffix]

    async def send(_: Request) -> Response:
        return Response(body, headers={**HEADERS, "Content-Type": kind})

    return send


for _file in sorted(PAGE.iterdir()):  # index.html is at /; no other files are served
    if _file.suffix in TYPES:
        get(router, "/" if _file.name == "index.html" else f"/{_file.name}", include_in_schema=False)(_sender(_file))

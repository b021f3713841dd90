"""The web page at /: the files of the folder `page`, sent with headers that let a browser run nothing else.

Content-Security-Policy (https://www.w3.org/TR/CSP3/): scripts, styles and connections are this server's own, and none
is inline, so that a document that holds markup stays text even if the page had a mistake.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

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


def add_page(app: FastAPI) -> None:
    """A route for each file of the page; index.html is at /. No other path is looked up on the disk."""
    for file in sorted(PAGE.iterdir()):
        if file.suffix in TYPES:
            path = "/" if file.name == "index.html" else f"/{file.name}"
            app.add_api_route(path, _sender(file), methods=["GET", "HEAD"], response_model=None)


def _sender(file: Path) -> Callable[[Request], Awaitable[Response]]:
    body, kind = file.read_bytes(), TYPES[file.suffix]

    async def send(_: Request) -> Response:
        return Response(body, headers={**HEADERS, "Content-Type": kind})

    return send

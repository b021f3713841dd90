"""An index as tools for agents over HTTP: the Model Context Protocol's streamable HTTP transport, at /mcp.

https://modelcontextprotocol.io/specification/2025-06-18/basic/transports. Each request stands for itself (no sessions)
and is answered with JSON, so a restart loses nothing. Requests whose Host or Origin is foreign are refused, as the
specification requires: a page in a browser on this machine could otherwise search the index by DNS rebinding.
"""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from search_r3.errors import InputError
from search_r3.integrations.mcp_server import IndexServer
from search_r3.optional import optional_imports
from search_r3.server.keys import ApiKey, Keys

with optional_imports("mcp", "agents' access by MCP"):
    import uvicorn
    from mcp.server.transport_security import TransportSecuritySettings
    from starlette.datastructures import Headers
    from starlette.types import ASGIApp, Receive, Scope, Send

from search_r3.server.errors import ApiError

PATH = "/mcp"
MAX_BODY = 1_000_000
"""Bytes of a request's body; a query has at most 100,000 characters."""
GRACE = 10
"""Seconds that a shutdown waits for requests in flight."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5}|:\*)?")
ORIGIN = re.compile(r"https?://" + HOST.pattern)


def security(host: str, hosts: Sequence[str] = (), origins: Sequence[str] = ()) -> TransportSecuritySettings:
    """Which Host and Origin headers are accepted: those of this machine if it listens on loopback, and those given.

    Args:
        host: the address that it listens on.
        hosts: further names by which it is reached, "search.example.org" or with a port; ":*" is any port.
        origins: origins of web pages that may use it, "https://agents.example.org".

    Raises:
        InputError: a name is not one, or it listens on a network and no name was given.
    """
    for name, pattern, example in ((hosts, HOST, "search.example.org"), (origins, ORIGIN, "https://example.org")):
        for one in name:
            if not pattern.fullmatch(one):
                raise InputError(
                    f"{one!r} is not allowed here; give a name such as {example}, with a port if it has one"
                )
    own = LOOPBACK if host in ("127.0.0.1", "localhost", "::1") else ()
    if not own and not hosts:
        raise InputError(
            f"--host {host} is reached from elsewhere, where any name may lead to it: name the ones that clients use, "
            "as in --allow-host search.example.org"
        )
    return TransportSecuritySettings(
        enable_dns_rebinding_protection=True,  # which the library turns off by itself for other hosts than these
        allowed_hosts=[*own, *(f"{name}:*" for name in own), *hosts],
        allowed_origins=[*(f"http://{name}:*" for name in own), *(f"http://{name}" for name in own), *origins],
    )


def make_app(server: IndexServer, allowed: TransportSecuritySettings, keys: Sequence[str | ApiKey] = ()) -> ASGIApp:
    """The ASGI application, with the tools of `server` at /mcp.

    Args:
        allowed: what `security` gave.
        keys: API keys, of which a request must have one (`Authorization: Bearer KEY`); without any, none is needed.
    """
    app = server.streamable_http_app(
        streamable_http_path=PATH,
        json_response=True,
        stateless_http=True,
        max_request_body_size=MAX_BODY,
        transport_security=allowed,
    )
    return _WithKeys(app, Keys(keys))


class _WithKeys:
    """Answers requests without an accepted key with 401, before their body is read."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._keys.check(Headers(scope=scope).get("authorization"))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Server(uvicorn.Server):
    """uvicorn's server, which ends by itself at a signal: its own handler raises the signal again afterwards."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.force_exit or self.should_exit
        self.should_exit = True


def serve_http(app: ASGIApp, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; requests in flight are finished first. The socket is closed at the end."""
    options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
    server = _Server(uvicorn.Config(app, timeout_graceful_shutdown=GRACE, **options))
    try:
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
    finally:
        listening.close()


def print_address(url: str) -> None:
    """Print on stderr how an agent's program is configured."""
    configured = json.dumps({"mcpServers": {"notes": {"type": "http", "url": url + PATH}}})
    print(f"MCP: {url}{PATH}   Ctrl-C stops.\n{configured}", file=sys.stderr, flush=True)

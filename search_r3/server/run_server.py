"""Running the application: uvicorn, a socket with clear errors, and graceful shutdown."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn

from search_r3.errors import InputError
from search_r3.server.app import create_app
from search_r3.server.logs import log, log_to
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded, Service


class Server(uvicorn.Server):
    """uvicorn's server, which tells the service immediately when a signal to stop arrives."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Accept no new requests; finish those in flight."""
        self.service.stop_taking()
        super().handle_exit(sig, frame)


def make_server(config: ServerConfig, load: Callable[[], Loaded], **uvicorn_options: Any) -> Server:
    """A server to be started with `run(sockets=[...])`. It stops if loading fails."""
    holder: list[Server] = []

    def end() -> None:
        for server in holder:
            server.should_exit = True

    app = create_app(config, load, end)
    options: dict[str, Any] = {
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": max(1, round(config.grace)),
        "timeout_keep_alive": 30,
    }
    logging.getLogger("uvicorn.access").disabled = True  # it would log query strings
    server = Server(uvicorn.Config(app, **options | uvicorn_options), app.state.service)
    holder.append(server)
    return server


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises InputError if the address is unknown, in use, or forbidden."""
    if not 0 <= port <= 65_535:
        raise InputError(f"port is {port}; expected 0 (any free port) to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error
    bound.listen(2048)
    return bound


def serve(
    host: str,
    port: int,
    config: ServerConfig,
    load: Callable[[], Loaded],
    *,
    json_log: bool = True,
    on_listening: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until a signal (SIGTERM, Ctrl-C) stops it; requests in flight are finished first.

    Args:
        json_log: log JSON lines rather than lines for people.
        on_listening: called with the server's address once it accepts connections; the model may still be loading.

    Raises:
        InputError: the server cannot listen on the address.
        Exception: what `load` raised.
    """
    bound = listen(host, port)
    log_to(json_lines=json_log)
    server = make_server(config, load)
    address, real_port = bound.getsockname()[:2]
    url = f"http://{f'[{address}]' if ':' in address else address}:{real_port}"
    if json_log:
        log("listening", url=url)
    on_listening(url)
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again after it has shut down
        server.run(sockets=[bound])
    if server.service.status == "failed":
        raise server.service.failure or RuntimeError("the model could not be loaded; see the log")

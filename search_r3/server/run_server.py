"""Running the application: uvicorn, its socket, what signals do, and a graceful end.

SIGTERM: a pause in which the server is not ready but still answers, so that a load balancer turns to others; then new
requests get 503 and those in flight are finished. SIGINT (Ctrl-C) leaves out the pause. SIGHUP reads keys and settings
again.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn

from search_r3.errors import InputError
from search_r3.server.app import create_app
from search_r3.server.listening import Listening
from search_r3.server.logs import log, log_to
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded, Service
from search_r3.server.tracing import NO_TRACES, Tracing


class Server(uvicorn.Server):
    """uvicorn's server with our meaning of signals.

    A handler only sets what `on_tick`, which uvicorn calls ten times a second, acts on: it may interrupt any line, one
    that writes to the log included. uvicorn's own handler would also raise the signal again after the end, and the
    process would end by it instead of with an exit code.

    Args:
        config: uvicorn's.
        service: what is served.
        reread: returns the configuration as it is now in the files that it came from.
    """

    def __init__(self, config: uvicorn.Config, service: Service, reread: Callable[[], ServerConfig]) -> None:
        super().__init__(config)
        self.service, self._reread = service, reread
        self._stop_at: float | None = None
        self._reload = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the pause or, without one or at a second signal, the shutdown; Ctrl-C then cuts requests off."""
        if self.should_exit:
            self.force_exit = self.force_exit or sig == signal.SIGINT
            return
        first = self._stop_at is None
        pause = self.service.config.pause if first and sig == signal.SIGTERM and self.service.status == "ready" else 0.0
        self._stop_at = time.monotonic() + pause
        if pause:
            self.service.announce_end()
        else:
            self._end()

    def ask_reload(self, *_: Any) -> None:
        """Read the configuration again at the next tick; the handler of SIGHUP."""
        self._reload = True

    async def on_tick(self, counter: int) -> bool:
        """Do what the signals asked for; whether the server is to shut down."""
        if self._reload:
            self._reload = False
            self._read_again()
        if self._stop_at is not None and time.monotonic() >= self._stop_at and not self.should_exit:
            self._end()
        return await super().on_tick(counter)

    def _end(self) -> None:
        self.service.stop_taking()
        self.should_exit = True

    def _read_again(self) -> None:
        try:
            config = self._reread()
        except InputError as error:
            log("settings refused; the former ones are kept", logging.ERROR, reason=str(error))
            return
        changed = self.service.reconfigure(config)
        self.config.timeout_graceful_shutdown = _whole_seconds(config.grace)
        log("settings read again", changed=changed, keys=len(config.api_keys))


def make_server(
    config: ServerConfig,
    load: Callable[[], Loaded],
    reread: Callable[[], ServerConfig] | None = None,
    tracing: Tracing = NO_TRACES,
    **uvicorn_options: Any,
) -> Server:
    """A server to be started with `run(sockets=[...])`. It stops if loading fails; `reread` is for SIGHUP."""
    holder: list[Server] = []

    def end() -> None:
        for server in holder:
            server.should_exit = True

    app = create_app(config, load, end)
    app.state.service.tracing = tracing
    options: dict[str, Any] = {
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": _whole_seconds(config.grace),
        "timeout_keep_alive": 30,
    }
    logging.getLogger("uvicorn.access").disabled = True  # it would log query strings
    server = Server(uvicorn.Config(app, **options | uvicorn_options), app.state.service, reread or (lambda: config))
    holder.append(server)
    return server


def _whole_seconds(grace: float) -> int:
    return max(1, round(grace))


def serve(
    listening: Listening,
    config: ServerConfig,
    load: Callable[[], Loaded],
    *,
    reread: Callable[[], ServerConfig] | None = None,
    json_log: bool = True,
    tracing: Tracing = NO_TRACES,
    on_listening: Callable[[str], None] = lambda url: None,
) -> bool:
    """Serve until a signal (SIGTERM, Ctrl-C) stops it; requests in flight are finished first.

    Args:
        listening: the socket, which is closed at the end.
        reread: returns the configuration anew at SIGHUP. Without it, and with a log for people, which is one on a
            terminal, SIGHUP ends the process as usual: the terminal was closed.
        json_log: log JSON lines rather than lines for people.
        tracing: records spans; closed at the end.
        on_listening: called with the server's address once it accepts connections; the model may still be loading.

    Returns:
        Whether all accepted requests were answered.

    Raises:
        Exception: what `load` raised.
    """
    log_to(json_lines=json_log)
    server = make_server(config, load, reread, tracing)
    if json_log:
        log("listening", url=listening.url)
    hang_up = getattr(signal, "SIGHUP", None)
    on_main_thread = threading.current_thread() is threading.main_thread()
    if reread is not None and hang_up is not None and on_main_thread and not sys.stderr.isatty():
        signal.signal(hang_up, server.ask_reload)
    on_listening(listening.url)
    try:
        with suppress(KeyboardInterrupt):  # Ctrl-C before uvicorn's handlers are there
            server.run(sockets=[listening.socket])
    finally:
        listening.close()
        tracing.close()
    if server.service.status == "failed":
        raise server.service.failure or RuntimeError("the model could not be loaded; see the log")
    return not server.service.dropped

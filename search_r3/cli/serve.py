"""`search-r3 serve`: serves a model, and optionally indexes, over HTTP."""

from __future__ import annotations

import os
import sys
import webbrowser
from contextlib import ExitStack
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote

import typer

from search_r3.cli.options import (
    AUTO,
    Budget,
    Device,
    Dtype,
    DtypeOption,
    EngineOption,
    Model,
    expand_home,
    given_options,
    load,
    load_reranker,
    silence_transformers,
)
from search_r3.cli.process import collect_garbage_as_usual
from search_r3.errors import InputError
from search_r3.optional import optional_imports

if TYPE_CHECKING:
    from search_r3.index.search_index import SearchIndex
    from search_r3.server.service import Loaded

KEY_VARIABLE = "SEARCH_R3_API_KEY"


class Batching(StrEnum):
    """`ServerConfig.batching`, whose module needs the server's packages."""

    continuous = "continuous"
    static = "static"


class TooLongText(Enum):
    """`ServerConfig.too_long`; no StrEnum, since strings have a method `split`."""

    error = "error"
    truncate = "truncate"
    split = "split"


TOO_LONG_HELP = (
    "What happens to a longer text, unless its request says so: error refuses it; truncate reads its first tokens and "
    "counts it; split embeds a document in parts."
)


class LogFormat(StrEnum):
    """The form of the server's log."""

    auto = "auto"
    text = "text"
    json = "json"


def serve(
    context: typer.Context,
    index: Annotated[
        list[str] | None,
        typer.Argument(
            callback=expand_home,
            help="The index's folder to search, or several of one model, the first of which is the default; without "
            "any, only embeddings are served.",
        ),
    ] = None,
    named: Annotated[
        list[str] | None,
        typer.Option(
            "--index", metavar="NAME=INDEX", help="A further index, under another name than its folder's. Repeatable."
        ),
    ] = None,
    model: Model = None,
    reranker: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A sentence-transformers CrossEncoder for /v1/rerank, and for searches that ask for it: a folder "
            "or hub id. Without it, /v1/rerank compares embeddings.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 listens on all networks, so set API keys then.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    uds: Annotated[
        Path | None,
        typer.Option(
            readable=False, callback=expand_home, help="Listen on a unix socket at this path instead of a port."
        ),
    ] = None,
    root_path: Annotated[
        str, typer.Option(help="The prefix below which a proxy serves it, such as /search; the proxy may remove it.")
    ] = "",
    settings: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            callback=expand_home,
            help="YAML file with limits and times (max_items ... max_budget); SIGHUP reads it and the keys again.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            callback=expand_home,
            help="File with one key per line, perhaps followed by `read` (no changes) and a rate such as 60/minute; "
            f"the variable {KEY_VARIABLE} adds others.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="The origin of a page that may use it, as in https://app.example.org. Repeatable."),
    ] = None,
    writable: Annotated[bool, typer.Option("--writable", help="Let clients add documents to the index.")] = False,
    max_items: Annotated[int, typer.Option(min=1, help="Most texts per request.")] = 2048,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens that are read of one text, up to the model's context (512 by default)."),
    ] = None,
    too_long: Annotated[TooLongText, typer.Option(help=TOO_LONG_HELP)] = TooLongText.truncate,
    max_request_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens per request, for all texts together.")
    ] = 300_000,
    max_body: Annotated[int, typer.Option(min=1, help="Most bytes per request.")] = 16_000_000,
    queue: Annotated[int, typer.Option(min=1, help="Most requests in flight; further ones get status 429.")] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds until a request times out.")] = 300.0,
    pause: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds after SIGTERM in which it is not ready but still answers; then it shuts down."
        ),
    ] = 0.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that a shutdown waits for accepted requests.")] = 30.0,
    budget: Budget = 32,
    max_budget: Annotated[int, typer.Option(min=0, help="The largest budget that a request may ask for.")] = 256,
    cache: Annotated[int, typer.Option(min=0, help="Number of reasoned queries that are cached.")] = 10_000,
    batching: Annotated[
        Batching, typer.Option(help="continuous: reasoned queries join and leave between tokens; static: in batches.")
    ] = Batching.continuous,
    slots: Annotated[int, typer.Option(min=1, help="Number of reasoned queries that are decoded together.")] = 32,
    log_format: Annotated[
        LogFormat, typer.Option(help="The log on standard error; auto is text on a terminal, otherwise JSON lines.")
    ] = LogFormat.auto,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Send OpenTelemetry traces to this collector (OTLP over HTTP), such as http://localhost:4318; by "
            "default to OTEL_EXPORTER_OTLP_ENDPOINT, if that is set.",
        ),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the search page in your browser.")] = False,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    engine: EngineOption = AUTO,
) -> None:
    """Serve a search page, search on an index, and OpenAI-compatible embeddings over HTTP.

    It listens immediately; /health returns 200 once it is ready. / is the search page, /docs describes the API,
    /metrics is for Prometheus. Ctrl-C or SIGTERM finishes the requests in flight and stops; the exit code is then 0, or
    1 if requests had to be cut off. The log has no user texts.

    \b
    Example:  search-r3 serve notes-index --open
    Example:  search-r3 serve notes-index docs-index --index mail=~/indexes/mail-2026
    Next:     curl localhost:8000/v1/search -H 'Content-Type: application/json' -d '{"query": "your question"}'
    """
    silence_transformers()
    with optional_imports("server", "the server"):
        from search_r3.server.keys import read_keys
        from search_r3.server.listening import listen, listen_unix
        from search_r3.server.named_indexes import name_paths
        from search_r3.server.run_server import serve as run
        from search_r3.server.running import announced
        from search_r3.server.server_config import ServerConfig
        from search_r3.server.service import Loaded
        from search_r3.server.settings_file import read_settings
        from search_r3.server.tracing import open_tracing_or_say
    from search_r3.index.search_index import SearchIndex

    given = given_options(context)
    if uds is not None and not given.isdisjoint(("host", "port", "open_page")):
        raise InputError("--uds replaces --host and --port, and no browser can open it; give one or the other")
    options: dict[str, Any] = {
        "max_items": max_items,
        "max_request_tokens": max_request_tokens,
        "max_body": max_body,
        "queue": queue,
        "timeout": timeout,
        "pause": pause,
        "grace": grace,
        "reasoning_tokens": budget,
        "max_reasoning_tokens": max_budget,
    }

    def read_config() -> ServerConfig:
        from_file = {} if settings is None else read_settings(settings, given)
        limits = options | from_file
        limits["max_reasoning_tokens"] = max(limits["reasoning_tokens"], limits["max_reasoning_tokens"])
        return ServerConfig(
            api_keys=read_keys(api_key_file, os.environ.get(KEY_VARIABLE)),
            writable=writable,
            cors_origins=tuple(cors_origin or ()),
            root_path=root_path,
            max_tokens=max_tokens,
            too_long=too_long.value,
            cache=cache,
            batching="static" if batching is Batching.static else "continuous",
            slots=slots,
            **limits,
        )

    config = read_config()
    paths = {name: expand_home(path) for name, path in name_paths(index or (), named or ()).items()}
    opened = {name: SearchIndex.open(path) for name, path in paths.items()}
    name = model or _model_of(next(iter(opened.values()), None))

    def start() -> Loaded:
        loaded = Loaded.of(load(name, device, dtype, engine), opened, load_reranker(reranker, device))
        collect_garbage_as_usual()
        return loaded

    as_json = log_format is LogFormat.json or (log_format is LogFormat.auto and not sys.stderr.isatty())

    tracing, untraced = open_tracing_or_say(otlp_endpoint)

    def greet(url: str) -> None:
        untraced()
        if not as_json:
            print_addresses(url, name, bool(opened))
        if open_page and not webbrowser.open(f"{url}/"):
            print("no browser was found; open the address yourself", file=sys.stderr)

    listening = listen(host, port) if uds is None else listen_unix(uds)
    with ExitStack() as announcing:
        for served_as, one in opened.items():
            if uds is None and isinstance(one.path, Path):
                announcing.enter_context(announced(one.path, listening.url, served_as))
        clean = run(listening, config, start, reread=read_config, json_log=as_json, tracing=tracing, on_listening=greet)
    if not as_json:
        print("Stopped." if clean else "Stopped; requests that were not finished were cut off.", file=sys.stderr)
    if not clean:
        raise typer.Exit(1)


def _model_of(index: SearchIndex | None) -> str:
    """The model that an index was made with; the default one without an index."""
    from search_r3.model.model_info import model_of_index
    from search_r3.model.resolve import default_model

    if index is None:
        return default_model()
    return model_of_index(index.info.model_name, index.info.model_source, index.path)


def print_addresses(url: str, model: str, has_index: bool) -> None:
    """Print on stderr where a server at `url` is found; without an index it has no search page."""
    if url.startswith("http+unix:"):
        print(f"Listening on {unquote(url.removeprefix('http+unix://'))}   Ctrl-C stops.", file=sys.stderr)
    else:
        page = f"Search page: {url}/   " if has_index else ""
        print(f"{page}API: {url}/docs   Ctrl-C stops.", file=sys.stderr)
    print(f"Loading {model} ...", file=sys.stderr, flush=True)

"""`search-r3 mcp`: an index as tools for agents, over standard input and output or over HTTP."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from search_r3.cli.index_maintenance import Index
from search_r3.cli.options import (
    Budget,
    Device,
    Dtype,
    DtypeOption,
    HopsOption,
    Model,
    ReadOption,
    Reasoning,
    ReasoningOption,
    expand_home,
    given_options,
    silence_transformers,
)
from search_r3.cli.serve import KEY_VARIABLE
from search_r3.errors import InputError

HTTP_OPTIONS = ("host", "port", "api_key_file", "allow_host", "allow_origin")


def mcp(
    context: typer.Context,
    index: Index,
    model: Model = None,
    reasoning: ReasoningOption = Reasoning.on,
    budget: Budget = 32,
    read: ReadOption = 0,
    hops: HopsOption = 1,
    http: Annotated[bool, typer.Option("--http", help="Serve agents over HTTP, at http://HOST:PORT/mcp.")] = False,
    host: Annotated[
        str, typer.Option(help="With --http: the address to listen on; other than loopback, it needs --allow-host.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="With --http: the port to listen on; 0 takes a free one.")
    ] = 8001,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            callback=expand_home,
            help=f"With --http: a file with one key per line; the variable {KEY_VARIABLE} adds others.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="With --http: a name by which clients reach it, as in search.example.org:443. Repeatable."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="With --http: a web page's origin, as in https://agents.example.org. Repeatable."),
    ] = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Let agents search an index: a Model Context Protocol server with the tools `search`, `get` and `status`.

    On standard input and output the agent's program starts this command; it is usually configured in a JSON file as
    below, and the server ends when the program closes the connection. With --http it serves until Ctrl-C or SIGTERM;
    requests that come under another name of the host, or from a page of another site, are refused.

    \b
    Example:  search-r3 mcp notes-index --http
    Next:     {"mcpServers": {"notes": {"command": "search-r3", "args": ["mcp", "/path/to/notes-index"]}}}
    """
    silence_transformers()
    from search_r3.integrations.index_searcher import LazyIndexSearcher

    if not http:
        if given := sorted(given_options(context).intersection(HTTP_OPTIONS)):
            raise InputError(f"--{given[0].replace('_', '-')} is for --http; give that too")
        if sys.stdin.isatty():
            raise InputError(_not_for_terminals(index))
    thinking: dict[str, Any] = {
        "reasoning": reasoning.chosen(None), "max_reasoning_tokens": budget, "read": read, "hops": hops
    }  # fmt: skip
    searcher = LazyIndexSearcher(index, model, device=device, dtype=dtype.value)
    if not http:
        from search_r3.integrations.mcp_server import serve_stdio

        serve_stdio(searcher, **thinking)
        return
    from search_r3.integrations.mcp_http import make_app, print_address, security, serve_http
    from search_r3.integrations.mcp_server import IndexServer
    from search_r3.server.keys import read_keys
    from search_r3.server.listening import listen

    allowed = security(host, allow_host or (), allow_origin or ())
    keys = read_keys(api_key_file, os.environ.get(KEY_VARIABLE))
    listening = listen(host, port)
    print_address(listening.url)
    serve_http(make_app(IndexServer(searcher, load=True, **thinking), allowed, keys), listening.socket)


def _not_for_terminals(index: str) -> str:
    from search_r3.index.storage.location import location_of

    location = location_of(index)
    shown = os.path.abspath(location) if isinstance(location, Path) else location
    return (
        "standard input is a terminal, but an agent's program must start this command; configure it to run "
        f"search-r3 mcp {shlex.quote(str(shown))}, or serve over HTTP with --http"
    )

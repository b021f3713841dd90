"""`search-r3 ask`: one command from a folder to an answer, which keeps an index of the folder in the cache."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from search_r3.cli.index import FastDtypeOption, load_fast
from search_r3.cli.live import check_options, open_terminal, search_live
from search_r3.cli.options import (
    AUTO,
    EXIT_NOTHING_FOUND,
    Budget,
    Device,
    Dtype,
    EngineOption,
    Json,
    Model,
    Reasoning,
    ReasoningOption,
    expand_home,
    print_json,
    print_progress,
    silence_transformers,
)
from search_r3.cli.process import let_idle_threads_sleep
from search_r3.cli.serve import KEY_VARIABLE
from search_r3.progress import on_terminal

if TYPE_CHECKING:
    from search_r3.index.cached_index import CachedIndex
    from search_r3.index.run_search import SearchOptions, SearchResult
    from search_r3.model.searchr3 import SearchR3
    from search_r3.server.running import RunningServer

CONNECT_SECONDS = 2.0
"""Seconds that a running server has to accept a connection."""
ANSWER_SECONDS = 300.0


class Stopwatch:
    """Milliseconds of the parts of a command, in their order."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block as part `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] = round((time.perf_counter() - started) * 1e3, 1)

    def total(self) -> dict[str, float]:
        """The parts and, as "total", the time since this was made."""
        return {**self.parts, "total": round((time.perf_counter() - self._started) * 1e3, 1)}


def ask(
    path: Annotated[
        str, typer.Argument(callback=expand_home, help="A folder of text files, a BEIR folder, or a file.")
    ],
    question: Annotated[
        str | None,
        typer.Argument(
            help="What to ask, in quotes; put text that begins with a dash after --. Without it, you search while you "
            "type, with a preview."
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=1000, help="How many results.")] = 5,
    reasoning: ReasoningOption = Reasoning.on,
    budget: Budget = 32,
    model: Model = None,
    device: Device = None,
    dtype: FastDtypeOption = Dtype.auto,
    engine: EngineOption = AUTO,
    as_json: Json = False,
) -> None:
    """Ask a folder a question: index it the first time, bring its index up to date if files changed, and search it.

    The index is kept in the cache folder (SEARCH_R3_CACHE, by default ~/.cache/search-r3), one for each folder and
    model. If a server runs for that index, it answers, and no model is loaded: the last line names the command
    that starts one. The times of all parts are printed too. Exit code 1 means that nothing was found, or chosen.

    \b
    Example:  search-r3 ask ~/notes "where did we decide on the license"
    Next:     search-r3 index PATH --into FOLDER for an index of your own, with filters and several sources
    """
    check_options(question is None, question, json=as_json)
    silence_transformers()
    let_idle_threads_sleep()
    from search_r3.index.cached_index import CachedIndex
    from search_r3.model.resolve import default_model
    from search_r3.server.running import running_server

    watch = Stopwatch()
    name = model or default_model()
    with watch.part("files"):
        kept = CachedIndex.of(path, name)
        current = kept.up_to_date
    if question is None:
        loading = name, device, dtype, engine
        _ask_live(kept, current, loading, watch, k=k, reasoning=reasoning, budget=budget)
        return
    server = running_server(kept.folder) if current else None
    url, result = None, None
    if server is not None:
        with watch.part("server"):
            result = ask_server(server, question, k=k, reasoning=reasoning, budget=budget)
        url = None if result is None else server.url
    if result is None:
        loading = name, device, dtype, engine
        result = _answer(kept, current, question, loading, watch, k=k, reasoning=reasoning, budget=budget)
    if as_json:
        print_json(result.to_dict() | {"index": str(kept.folder), "server": url, "timings_ms": watch.total()})
        return
    _print(kept, result, watch, url)


def _ask_live(
    kept: CachedIndex,
    current: bool,
    loading: tuple[str, str | None, Dtype, str],
    watch: Stopwatch,
    *,
    k: int,
    reasoning: Reasoning,
    budget: int,
) -> None:
    """Bring the index up to date unless it is `current`, and search it while the user types."""
    from search_r3.index.search_index import SearchIndex

    open_terminal()  # before minutes of indexing
    model = None if current else _load_and_update(kept, loading, watch)

    def load() -> SearchR3:
        loaded = model or load_fast(*loading)
        reasoning.chosen(loaded)
        return loaded

    options: SearchOptions = {"k": k, "reasoning": reasoning.chosen(None), "max_reasoning_tokens": budget}
    search_live(SearchIndex.open_snapshot(kept.folder), load, "", kept.find_file, **options)


def _load_and_update(kept: CachedIndex, loading: tuple[str, str | None, Dtype, str], watch: Stopwatch) -> SearchR3:
    """Load the model and bring the index up to date with it."""
    if on_terminal():
        print_progress(f"indexing {kept.source.path}: loading the model ...")
    with watch.part("model"):
        model = load_fast(*loading)
    _update(kept, model, watch)
    return model


def _answer(
    kept: CachedIndex,
    current: bool,
    question: str,
    loading: tuple[str, str | None, Dtype, str],
    watch: Stopwatch,
    *,
    k: int,
    reasoning: Reasoning,
    budget: int,
) -> SearchResult:
    """Load the model, bring the index up to date with it unless it is `current`, and search."""
    from search_r3.index.index_info import ModelMismatch
    from search_r3.index.search_index import SearchIndex

    if current:
        with watch.part("model"):
            model = load_fast(*loading)
    else:
        model = _load_and_update(kept, loading, watch)

    def search() -> SearchResult:
        chosen = reasoning.chosen(model)
        with watch.part("search"):
            opened = SearchIndex.open_snapshot(kept.folder)
            return opened.search(question, model, k=k, reasoning=chosen, max_reasoning_tokens=budget, explained=True)

    try:
        return search()
    except ModelMismatch:
        _update(kept, model, watch)
        return search()


def _update(kept: CachedIndex, model: SearchR3, watch: Stopwatch) -> None:
    """Bring the index up to date; it is made again if the model's name has come to mean another model."""
    from search_r3.index.build.build_index import build_index
    from search_r3.index.index_info import ModelMismatch
    from search_r3.model.resolve import cache_written

    kept.source.may_be_empty = kept.folder.is_dir()
    with watch.part("index"), cache_written():
        kept.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            report = build_index(kept.folder, kept.source, model, progress=print_progress)
        except ModelMismatch:
            shutil.rmtree(kept.folder)
            report = build_index(kept.folder, kept.source, model, progress=print_progress)
        kept.completed()
    if on_terminal():
        counts = ", ".join(f"{getattr(report, what):,} {what}" for what in ("added", "updated", "removed"))
        print_progress(f"{report.documents:,} documents in {report.chunks:,} chunks: {counts}")


def ask_server(
    server: RunningServer, question: str, *, k: int, reasoning: Reasoning, budget: int
) -> SearchResult | None:
    """The answer of `server`; None if it gives none (it is busy, still loads, or wants another key)."""
    from search_r3.index.run_search import SearchResult

    thought = budget if reasoning is Reasoning.on else reasoning.chosen(None)
    asked = {"query": question, "index": server.index, "k": k, "reasoning": thought, "explain": True}
    headers = {"Content-Type": "application/json"}
    key = os.environ.get(KEY_VARIABLE, "").partition(",")[0].strip()
    if key:
        headers["Authorization"] = f"Bearer {key}"
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=CONNECT_SECONDS)
    try:
        connection.connect()
        connection.sock.settimeout(ANSWER_SECONDS)
        connection.request("POST", "/v1/search", json.dumps(asked).encode(), headers)
        answer = connection.getresponse()
        if answer.status != http.HTTPStatus.OK:
            return None
        record: dict[str, Any] = json.loads(answer.read())
        return SearchResult.from_dict(record)
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None
    finally:
        connection.close()


def _print(kept: CachedIndex, result: SearchResult, watch: Stopwatch, url: str | None) -> None:
    from search_r3.index.results.terminal_page import print_result

    print_result(result, find_file=kept.find_file)
    parts = ", ".join(f"{name} {_time(ms)}" for name, ms in watch.total().items())
    print_progress(f"timed: {parts}")
    if url is None and on_terminal():
        print_progress(f"to load the model only once: search-r3 serve {shlex.quote(str(kept.folder))}")
    if not result.hits:
        raise typer.Exit(EXIT_NOTHING_FOUND)


def _time(milliseconds: float) -> str:
    return f"{milliseconds:,.0f} ms" if milliseconds < 1e3 else f"{milliseconds / 1e3:,.1f} s"

"""`search-r3 search`: finds documents in an index, and prints them, their files, or JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search_r3.cli.index_maintenance import Index
from search_r3.cli.live import check_options, search_live
from search_r3.cli.options import (
    AUTO,
    EXIT_NOTHING_FOUND,
    Budget,
    Device,
    Dtype,
    DtypeOption,
    EngineOption,
    HopsOption,
    Json,
    ReadOption,
    Reasoning,
    ReasoningOption,
    load,
    load_reranker,
    print_json,
    silence_transformers,
)
from search_r3.cli.process import let_idle_threads_sleep
from search_r3.cli.writer import WriterOption, refuse_both, write_reasoning
from search_r3.errors import InputError
from search_r3.rank_fusion import VECTOR_WEIGHT

if TYPE_CHECKING:
    from search_r3.index.run_search import SearchOptions, SearchResult
    from search_r3.index.search_index import SearchIndex
    from search_r3.index.storage.location import Remote
    from search_r3.model.searchr3 import SearchR3


class Mode(StrEnum):
    """How an index is searched."""

    hybrid = "hybrid"
    vector = "vector"
    text = "text"


class FusionMethod(StrEnum):
    """How a hybrid search fuses its lists."""

    linear = "linear"
    dbsf = "dbsf"
    rsf = "rsf"
    rrf = "rrf"


class TooLongQuery(StrEnum):
    """What happens to a query that is over the limit."""

    error = "error"
    truncate = "truncate"


def search(
    index: Index,
    query: Annotated[
        str | None,
        typer.Argument(
            help='What to search for, in quotes; "-" reads it from standard input; put text that begins with a dash '
            "after --."
        ),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive", "-i", help="Search while you type, with a preview; Enter prints the place of a hit."
        ),
    ] = False,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=1000, help="How many results.")] = 5,
    mode: Annotated[Mode, typer.Option(help="vector: by meaning; text: by words; hybrid: both, fused.")] = Mode.hybrid,
    vector_weight: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Weight of the vectors in a hybrid search; the words get the rest. By default as `search-r3 tune` "
            f"stored it with the index, else {VECTOR_WEIGHT}.",
        ),
    ] = None,
    fusion: Annotated[
        FusionMethod | None,
        typer.Option(
            help="How a hybrid search fuses its lists: linear adds scores by their distance from the best in standard "
            "deviations; dbsf and rsf are distribution-based and relative score fusion; rrf is reciprocal rank fusion, "
            "without a weight. By default as tuned, else linear."
        ),
    ] = None,
    reasoning_words: Annotated[
        bool | None,
        typer.Option(
            "--reasoning-words/--no-reasoning-words",
            help="Search for the words of the reasoning too, in a hybrid search. By default as tuned, else no.",
        ),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(help="Only chunks for which this SQL condition holds: \"lang = 'en' AND year > 2020\"."),
    ] = None,
    reasoning: ReasoningOption = Reasoning.on,
    budget: Budget = 32,
    reasoning_text: Annotated[
        str | None,
        typer.Option(help="Your own reasoning about the query, which the model reads in place of its own."),
    ] = None,
    writer: WriterOption = None,
    read: ReadOption = 0,
    hops: HopsOption = 1,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of the query that are read, up to the model's context (512 by default)."),
    ] = None,
    too_long: Annotated[
        TooLongQuery,
        typer.Option(help="What happens to a longer query: error refuses it; truncate reads its first tokens."),
    ] = TooLongQuery.truncate,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare the query with all vectors, even if there is an approximate index.")
    ] = False,
    chunks: Annotated[
        bool, typer.Option("--chunks", help="List every chunk, not only the best one of each document.")
    ] = False,
    rerank: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Let --reranker read the first N results, and show its best ones."),
    ] = None,
    reranker: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="A sentence-transformers CrossEncoder: a folder, or a hub id. It needs --rerank."
        ),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(
            help="Leave out results whose score is lower: the cosine (mode vector), BM25's score (text), from 0 to 1 "
            "relative to the best ones (hybrid), or the reranker's relevance, 0 to 1."
        ),
    ] = None,
    files: Annotated[
        bool, typer.Option("--files", help="Print only the results' files, one a line, each once, best first.")
    ] = False,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="SEARCH_R3_INDEX_CACHE",
            help="Of an index on object storage, search a copy in this folder; a new version is copied first.",
        ),
    ] = None,
    cache_size: Annotated[
        float, typer.Option(min=0.001, metavar="GB", help="Most gigabytes of all copies in --cache-dir together.")
    ] = 10.0,
    model: Annotated[str | None, typer.Option(help="The index's model, if its name is unknown here.")] = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    engine: EngineOption = AUTO,
    as_json: Json = False,
) -> None:
    """Search an index. Shows what the model read, its reasoning, then the results with their locations.

    The query must be embedded by the model that made the index; other models are refused. Mode text needs no model.
    Each result has the cosine of its meaning and the score of its words (BM25), and with --rerank the relevance that
    the cross-encoder gives it. Exit code 1 means that nothing was found, or with --interactive that nothing was chosen.

    \b
    Example:  search-r3 search notes-index "which license did we choose" --where "path LIKE '%.md'"
    Next:     compare with --no-reasoning and with --mode text; search while you type with --interactive
    """
    check_options(
        interactive, query, json=as_json, files=files, writer=writer, rerank=rerank, reranker=reranker,
        min_score=min_score,
    )  # fmt: skip
    silence_transformers()
    let_idle_threads_sleep()
    from search_r3.index.index_handle import damage_explained
    from search_r3.index.results.reranked import rerank_hits
    from search_r3.index.run_search import check_given, check_reasoning_words, check_where
    from search_r3.model.model_info import model_of_index

    check_reranking(rerank, reranker, k)
    if files and as_json:
        raise InputError("--files and --json are two forms of the output; give one")
    opened = open_index(index, cache_dir, cache_size, mode is not Mode.text)
    with damage_explained(index):  # before a model is loaded
        check_where(opened, where)
        refuse_both(writer, reasoning_text)
        thinks = True if reasoning is Reasoning.on else reasoning.value
        check_given(writer or reasoning_text, thinks, mode.value)
        check_reasoning_words(reasoning_words, thinks, writer or reasoning_text, mode.value)
        if mode is not Mode.vector:
            opened.backend.check_text()
    options: SearchOptions = {
        "k": rerank or k,
        "mode": mode.value,
        "reasoning": reasoning.chosen(None),
        "max_reasoning_tokens": budget,
        "reasoning_text": reasoning_text,
        "where": where,
        "exact": exact,
        "chunks": chunks,
        "vector_weight": vector_weight,
        "fusion": None if fusion is None else fusion.value,
        "reasoning_words": reasoning_words,
        "read": read,
        "hops": hops,
        "explained": not as_json,
    }

    def load_reader() -> Any:
        name = model or model_of_index(opened.info.model_name, opened.info.model_source, index)
        loaded = load(name, device, dtype, engine)
        reasoning.chosen(loaded)  # it may have no such mode
        return limit_queries(loaded, max_tokens, too_long, budget)

    by_meaning = mode is not Mode.text
    if interactive or query is None:
        search_live(opened, load_reader if by_meaning else None, query or "", opened.find_file, **options)
        return
    if query == "-":
        query = sys.stdin.buffer.read().decode("utf-8-sig", "replace")
    reader = load_reader() if by_meaning else None
    reads_hits = load_reranker(reranker, device)
    cost: dict[str, Any] = {}
    if writer is not None:
        (options["reasoning_text"],), cost["writer"] = write_reasoning(writer, [query], device, dtype)
    with damage_explained(index):
        result = opened.search(query, reader, **options)
    if reads_hits is not None:
        result = rerank_hits(result, reads_hits, k)
    _warn(opened, reader)
    if as_json:
        if reader is not None:
            cost["usage"] = {"prompt_tokens": reader.tokens, "truncated_texts": int(reader.truncated)}
        print_json(_above(result, min_score).to_dict() | cost)
    else:
        _print(result, opened, min_score, files=files, filtered=bool(where and where.strip()))


def open_index(index: str, cache_dir: Path | None, gigabytes: float, with_model: bool) -> SearchIndex:
    """The index, opened; of one on object storage with `cache_dir` a copy of its newest version, made if need be.

    Args:
        with_model: a model will be loaded; while object storage answers, torch is imported for it.
    """
    from search_r3.index.search_index import SearchIndex
    from search_r3.index.storage.deadline import in_thread
    from search_r3.index.storage.location import Remote, location_of

    location = location_of(index)
    if not isinstance(location, Remote):
        return SearchIndex.open_snapshot(index)
    opening = in_thread(lambda: _open_remote(location, cache_dir, gigabytes), inside=False)
    if with_model:
        import torch  # noqa: F401  # a second or more
    return opening(None)


def _open_remote(location: Remote, cache_dir: Path | None, gigabytes: float) -> SearchIndex:
    from search_r3.index.local_copies import GB, LocalCopies
    from search_r3.index.search_index import SearchIndex

    if cache_dir is None:
        return SearchIndex.open_snapshot(location)
    return LocalCopies(cache_dir, gigabytes * GB).open(location)


def _warn(opened: SearchIndex, reader: Any) -> None:
    if not opened.complete:
        print("warning: this index was never finished; run its `search-r3 index` command again", file=sys.stderr)
    if reader is not None and reader.truncated:
        print(f"warning: the query is long; only its first {reader.tokens:,} tokens were read", file=sys.stderr)


def _above(result: SearchResult, min_score: float | None) -> SearchResult:
    """The result without hits whose score is below `min_score`."""
    if min_score is None:
        return result
    return result.chosen([i for i, hit in enumerate(result.hits) if hit.score >= min_score])


def _print(result: SearchResult, opened: SearchIndex, min_score: float | None, *, files: bool, filtered: bool) -> None:
    """Print hits or their files; the exit code says whether there are any."""
    from search_r3.index.results.terminal_page import print_result

    kept = _above(result, min_score)
    if files:
        print_files(kept, opened.find_file)
    elif result.hits and not kept.hits:
        best = max(hit.score for hit in result.hits)
        print(f"nothing found: the best score is {best:.3g}, below --min-score {min_score:g}")
    else:
        print_result(kept, find_file=opened.find_file, filtered=filtered)
    if not kept.hits:
        raise typer.Exit(EXIT_NOTHING_FOUND)


def print_files(result: SearchResult, find_file: Callable[[str], Path | None]) -> None:
    """Print the files of a result's hits, each once. A file that is not found on this machine is printed as the index
    names it; a hit that is from no file is left out."""
    for path in dict.fromkeys(hit.path for hit in result.hits if hit.path):
        print(find_file(path) or path)


def check_reranking(rerank: int | None, reranker: str | None, k: int) -> None:
    """Raise InputError if only one of `--rerank` and `--reranker` is given, or fewer hits than are to be shown."""
    from search_r3.index.results.reranked import check_rerank

    if rerank is None and reranker is None:
        return
    if rerank is None or reranker is None:
        raise InputError("--rerank N says how many results the model of --reranker MODEL reads; give both")
    check_rerank(rerank, k)


def limit_queries(model: SearchR3, max_tokens: int | None, too_long: TooLongQuery, budget: int) -> Any:
    """The model, as a search uses it, whose queries are read within the limit (`LimitedQueries`).

    Raises:
        InputError: `max_tokens` is more than the model's context leaves.
    """
    from search_r3.model.text_limit import LimitedQueries, TextLimit, check_room

    if max_tokens is not None:
        check_room(model, max_tokens, budget, "--max-tokens")
    return LimitedQueries(model, TextLimit.of(max_tokens, too_long.value))

"""The application and its commands, each a thin function with a help text that teaches.

Heavy libraries are imported inside the commands that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search_r3 import __version__
from search_r3.cli.adapt import adapt
from search_r3.cli.ask import ask
from search_r3.cli.data import data_app
from search_r3.cli.data_fresh import data_fresh
from search_r3.cli.data_read import data_read
from search_r3.cli.data_teacher import data_embed_teacher, data_select
from search_r3.cli.evaluate import evaluate, tables
from search_r3.cli.export import export, mcp, pull, push
from search_r3.cli.grouped_help import GroupedHelp
from search_r3.cli.index import index
from search_r3.cli.index_backup import backup, restore
from search_r3.cli.index_maintenance import Index, compact, delete
from search_r3.cli.options import (
    AUTO,
    EXIT_NOTHING_FOUND,
    SETTINGS,
    Budget,
    Device,
    Dtype,
    DtypeOption,
    EngineOption,
    HopsOption,
    Json,
    Model,
    ReadOption,
    Reasoning,
    ReasoningCommand,
    ReasoningOption,
    load,
    print_json,
    silence_transformers,
)
from search_r3.cli.process import let_idle_threads_sleep
from search_r3.cli.report import report
from search_r3.cli.rollouts import rollouts
from search_r3.cli.serve import serve
from search_r3.cli.study import study
from search_r3.cli.train import plot, train_app
from search_r3.cli.writer import WriterOption, refuse_both, write_reasoning
from search_r3.rank_fusion import VECTOR_WEIGHT

if TYPE_CHECKING:
    from search_r3.model.searchr3 import SearchR3

EXIT_DIFFERENT = 1
"""Exit code of `models --check`: the model does not reproduce its golden vectors."""
app = typer.Typer(
    help="""Search that reasons before it embeds: train, index, search and evaluate.

    \b
    Start here:      search-r3 demo
    Your own files:  search-r3 ask ~/notes "where did we decide on the license"
    In two steps:    search-r3 index ~/notes --into notes-index
                     search-r3 search notes-index "where did we decide on the license"
    Your own model:  search-r3 data build RECIPE pairs.jsonl
                     search-r3 train sft CONFIG

    Every command has a --help with an example. Wrong input gives one line that starts with "error:" and exit code 2.
    """,
    cls=GroupedHelp,
    **SETTINGS,
)


class Mode(StrEnum):
    """How an index is searched."""

    hybrid = "hybrid"
    vector = "vector"
    text = "text"


class TooLongQuery(StrEnum):
    """What happens to a query that is over the limit."""

    error = "error"
    truncate = "truncate"


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"search-r3 {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def demo(model: Model = None) -> None:
    """Index Python's standard library, and answer five questions with and without reasoning.

    The index is kept in the cache folder (SEARCH_R3_CACHE, by default ~/.cache/search-r3): the first run takes a few
    minutes on two CPU cores, the next starts at once, and an interrupted run resumes where it stopped.

    \b
    Example:  search-r3 demo --model smollm2-135m
    Next:     the page ends with the commands for your own questions and files.
    """
    silence_transformers()
    from search_r3.demo import run_demo

    run_demo(model)


def search(
    index: Index,
    query: Annotated[
        str,
        typer.Argument(
            help='What to search for, in quotes; "-" reads it from standard input; put text that begins with a dash '
            "after --."
        ),
    ],
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=1000, help="How many results.")] = 5,
    mode: Annotated[Mode, typer.Option(help="vector: by meaning; text: by words; hybrid: both, fused.")] = Mode.hybrid,
    vector_weight: Annotated[
        float,
        typer.Option(min=0, max=1, help="Weight of the vectors in a hybrid search; the words get the rest."),
    ] = VECTOR_WEIGHT,
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
    model: Annotated[str | None, typer.Option(help="The index's model, if its name is unknown here.")] = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    engine: EngineOption = AUTO,
    as_json: Json = False,
) -> None:
    """Search an index. Shows what the model read, its reasoning, then the results with their locations.

    The query must be embedded by the model that made the index; other models are refused. Mode text needs no model.
    Each result has the cosine of its meaning and the score of its words (BM25). Exit code 1 means that nothing was
    found.

    \b
    Example:  search-r3 search notes-index "which license did we choose" --where "path LIKE '%.md'"
    Next:     compare with --no-reasoning and with --mode text
    """
    silence_transformers()
    let_idle_threads_sleep()
    from search_r3.index.index_handle import damage_explained
    from search_r3.index.results.terminal_page import print_result
    from search_r3.index.run_search import check_given, check_where
    from search_r3.index.search_index import SearchIndex
    from search_r3.model.model_info import model_of_index

    opened = SearchIndex.open_snapshot(index)
    with damage_explained(index):  # before a model is loaded
        check_where(opened, where)
        refuse_both(writer, reasoning_text)
        check_given(writer or reasoning_text, True if reasoning is Reasoning.on else reasoning.value, mode.value)
        if mode is not Mode.vector:
            opened.backend.check_text()
    if query == "-":
        query = sys.stdin.buffer.read().decode("utf-8-sig", "replace")
    loaded = None
    if mode is not Mode.text:
        name = model or model_of_index(opened.info.model_name, opened.info.model_source, index)
        loaded = load(name, device, dtype, engine)
    reader = None if loaded is None else limit_queries(loaded, max_tokens, too_long, budget)
    cost: dict[str, Any] | None = None
    if writer is not None:
        (reasoning_text,), cost = write_reasoning(writer, [query], device, dtype)
    with damage_explained(index):
        result = opened.search(
            query,
            reader,
            k=k,
            mode=mode.value,
            reasoning=reasoning.chosen(loaded),
            max_reasoning_tokens=budget,
            reasoning_text=reasoning_text,
            where=where,
            exact=exact,
            chunks=chunks,
            vector_weight=vector_weight,
            read=read,
            hops=hops,
            explained=not as_json,
        )
    if not opened.complete:
        print("warning: this index was never finished; run its `search-r3 index` command again", file=sys.stderr)
    if reader is not None and reader.truncated:
        print(f"warning: the query is long; only its first {reader.tokens:,} tokens were read", file=sys.stderr)
    if as_json:
        more: dict[str, Any] = {} if cost is None else {"writer": cost}
        if reader is not None:
            more["usage"] = {"prompt_tokens": reader.tokens, "truncated_texts": int(reader.truncated)}
        print_json(result.to_dict() | more)
    else:
        print_result(result, find_file=opened.find_file, filtered=bool(where and where.strip()))
        if not result.hits:
            raise typer.Exit(EXIT_NOTHING_FOUND)


def limit_queries(model: SearchR3, max_tokens: int | None, too_long: TooLongQuery, budget: int) -> Any:
    """The model, as a search uses it, whose queries are read within the limit (`LimitedQueries`).

    Raises:
        InputError: `max_tokens` is more than the model's context leaves.
    """
    from search_r3.model.text_limit import LimitedQueries, TextLimit, check_room

    if max_tokens is not None:
        check_room(model, max_tokens, budget, "--max-tokens")
    return LimitedQueries(model, TextLimit.of(max_tokens, too_long.value))


def card(
    adapter: Annotated[Path, typer.Argument(readable=False, help="An adapter's folder; its README.md is written.")],
    run: Annotated[
        Path,
        typer.Option(help="The folder that documents its training; with --keep, the run's files are copied there."),
    ],
    keep: Annotated[Path | None, typer.Option(help="First copy this run's config, log and curves to --run.")] = None,
    manifest: Annotated[
        list[Path] | None,
        typer.Option(help="With --keep: the manifest of its training pairs, then that of `data select`. Repeatable."),
    ] = None,
    command: Annotated[str, typer.Option(help="With --keep: the command that trained it.")] = "search-r3 train sft",
    output: Annotated[Path, typer.Option(help="The folder of results with the metrics for the card.")] = Path(
        "results"
    ),
) -> None:
    """Write an adapter's model card from its training run and its results.

    \b
    Example:  search-r3 card models/NAME --run results/training/NAME
    Next:     search-r3 tables, which regenerates all cards after every evaluation
    """
    from search_r3.evaluation.publish.model_card import keep_run, write_card

    if keep is not None:
        keep_run(keep, run, manifest or (), command, adapter)
    print(write_card(adapter, run, output))


def models(
    check: Annotated[
        str | None, typer.Option(help="Embed this model's golden texts and compare the result with its golden vectors.")
    ] = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.float32,
    engine: EngineOption = AUTO,
    as_json: Json = False,
) -> None:
    """List the base models and adapters that can be used by name, with size, license and contract hash.

    Two embeddings can be compared only if their models' contract hashes are equal. With --check, exit code 1 means that
    the model no longer gives the embeddings it had when it was saved.

    \b
    Example:  search-r3 models --check smollm2-135m
    Next:     search-r3 index PATH --into FOLDER --model NAME
    """
    silence_transformers()
    from search_r3.model import model_info

    if check is None:
        known = model_info.known_models()
        print(json.dumps(known, indent=2) if as_json else model_info.as_table(known))
        return
    golden = model_info.check_golden(check, device, dtype.value, engine)
    if as_json:
        print_json(golden)
    else:
        verdict = "as saved" if golden["ok"] else "NOT as saved: another base, a broken engine, or damaged files"
        print(f"{golden['name']}: cosine distance {golden['distance']:.1e}, limit {golden['limit']:.0e}: {verdict}")
    if not golden["ok"]:
        raise typer.Exit(EXIT_DIFFERENT)


app.add_typer(train_app, name="train")
app.add_typer(data_app, name="data")
for name, data_command in (("read", data_read), ("fresh", data_fresh), ("embed-teacher", data_embed_teacher),
                           ("select", data_select)):  # fmt: skip
    data_app.command(name)(data_command)
COMMANDS = (adapt, ask, plot, study, serve, report, rollouts, export, push, pull, mcp, demo, index, delete, compact,
            backup, restore, search, evaluate, tables, card, models)  # fmt: skip
for command in COMMANDS:
    app.command(cls=ReasoningCommand if command in (ask, mcp, search) else None)(command)

"""The commands: one thin function each, with a help text that teaches.

Heavy libraries are imported inside the commands that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from search_r3 import __version__
from search_r3.cli import data_fresh, data_teach  # noqa: F401  # their commands join data_app
from search_r3.cli.data import data_app
from search_r3.cli.evaluate import evaluate, tables
from search_r3.cli.export import export, mcp, pull, push
from search_r3.cli.index import (
    DUPLICATES_REMOVED,
    FULL_TEXT_REBUILT,
    Index,
    ask_to_prune,
    check_target,
    compact,
    delete,
    parse_type_options,
    show_info,
    tell_what_was_left,
)
from search_r3.cli.index_ray import Ray, Workers, index_on_ray
from search_r3.cli.options import (
    AUTO,
    SETTINGS,
    Budget,
    Device,
    Dtype,
    DtypeOption,
    EngineOption,
    Json,
    Model,
    Reasoning,
    ReasoningCommand,
    ReasoningOption,
    expand_home,
    hush,
    load,
    print_json,
)
from search_r3.cli.process import let_idle_threads_sleep
from search_r3.cli.report import report
from search_r3.cli.rollouts import rollouts
from search_r3.cli.serve import serve
from search_r3.cli.study import study
from search_r3.cli.train import plot, train_app
from search_r3.errors import InputError
from search_r3.rank_fusion import VECTOR_WEIGHT

EXIT_DIFFERENT = 1
"""`models --check`: the model does not give the embeddings it was saved with."""
app = typer.Typer(
    help="""Search that reasons before it embeds: train, index, search and evaluate.

    \b
    Start here:      search-r3 demo
    Your own files:  search-r3 index ~/notes --into notes-index
                     search-r3 search notes-index "where did we decide on the licence"
    Your own model:  search-r3 data build RECIPE pairs.jsonl
                     search-r3 train sft CONFIG

    Every command has a --help with an example. Wrong input gives one line that starts with "error:" and exit code 2.
    """,
    **SETTINGS,
)
app.add_typer(train_app, name="train")
app.add_typer(data_app, name="data")
app.command()(plot)
app.command()(study)
app.command()(serve)
app.command()(report)
app.command()(rollouts)
for sharing in (export, push, pull):
    app.command()(sharing)
app.command(cls=ReasoningCommand)(mcp)


class Mode(StrEnum):
    """How an index is searched."""

    hybrid = "hybrid"
    vector = "vector"
    text = "text"


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"search-r3 {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(model: Model = None) -> None:
    """Index Python's standard library, ask five questions with and without reasoning, and show it all.

    The index is kept in the cache folder (SEARCH_R3_CACHE, by default ~/.cache/search-r3): the first run takes a few
    minutes on two CPU cores, the next starts at once, and an interrupted one goes on where it stopped.

    \b
    Example:  search-r3 demo --model smollm2-135m
    Next:     the page ends with the commands for your own questions and files.
    """
    hush()
    from search_r3.demo import run_demo

    run_demo(model)


@app.command()
def index(
    path: Annotated[
        str,
        typer.Argument(
            callback=expand_home,
            help="A folder of text files, a BEIR folder, or a file; with --info, an index's folder.",
        ),
    ],
    into: Annotated[
        str | None, typer.Option(callback=expand_home, help="The index's folder; by default NAME.index here.")
    ] = None,
    model: Model = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a chunk with its title (512 by default).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most texts in one pass; by default only the tokens are limited.")
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in one pass; lower it if memory runs out.")
    ] = 16384,
    commit_every: Annotated[
        int | None, typer.Option(min=1, help="Chunks per commit; by default what ten seconds give, 256 to 8,192.")
    ] = None,
    delimiter: Annotated[
        str | None,
        typer.Option(help="What a CSV file is split at, where it is not found out: a character, tab or semicolon."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The name of the source that PATH is, wherever it lies; by default its absolute path. A run replaces "
            "and removes only documents of its own source.",
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the documents that PATH no longer has.")] = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Remove the documents that PATH no longer has, however many; without it, more than a tenth of the "
            "source are removed only if you say yes on a terminal.",
        ),
    ] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Replace documents of other sources that have the same ids.")
    ] = False,
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            metavar="FIELD=TYPE",
            help="The type of a field: text, integer, number or true/false. A column of another type is converted. "
            "Repeatable.",
        ),
    ] = None,
    ray: Ray = None,
    workers: Workers = 2,
    info: Annotated[bool, typer.Option("--info", help="Only show what the index PATH is, and its recall.")] = False,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    engine: EngineOption = AUTO,
    as_json: Json = False,
) -> None:
    """Make a folder, JSONL, CSV or BEIR corpus searchable, or bring its index up to date.

    Only what changed is embedded again, and only what came from PATH before is removed. It may be stopped at any time:
    the same command goes on where it stopped. A JSONL line, or a CSV header, needs "id" and "text", may have a "title";
    every other field can be filtered on in a search. The corpus may be larger than memory. From 100,000 chunks on, an
    approximate index is built and its recall measured.

    An index may hold several sources. Exit code 1 means that documents were left out, as another source has their ids.

    \b
    Example:  search-r3 index ~/notes --into notes-index
    Next:     search-r3 search notes-index "your question"
    """
    hush()
    from search_r3.index.build import build_index
    from search_r3.index.readers import open_source, sample_queries
    from search_r3.index.table import SearchIndex
    from search_r3.model.resolve import default_model

    if info:
        show_info(SearchIndex.open(path), as_json)
        return
    if keep and prune:
        raise InputError("--keep and --prune say the opposite; give one of them")
    documents = open_source(path, delimiter=delimiter)
    documents.may_be_empty = prune
    target = into or f"{Path(path).resolve().stem}.index"
    check_target(target, documents, source, named=into is not None)
    given: dict[str, Any] = {
        "batch_size": batch_size,
        "batch_tokens": batch_tokens,
        "max_length": max_length,
        "prune": not keep,
        "source": source,
        "take_over": take_over,
        "may_prune": None if prune else ask_to_prune,
        "types": parse_type_options(types),
    }
    name = model or default_model()
    if ray is not None:
        loading = (device, dtype.value, engine)
        report = index_on_ray(target, documents, name, ray, workers, loading, **given)
    else:
        loaded = load(name, device, dtype, engine)
        queries = sample_queries(documents)
        report = build_index(target, documents, loaded, commit_every=commit_every, queries=queries, **given)
    made = SearchIndex.open(target)
    if as_json:
        print_json({"index": target, "model": made.info.model_name, **asdict(report)})
    else:
        counts = ", ".join(f"{getattr(report, n):,} {n}" for n in ("added", "updated", "unchanged", "removed"))
        if report.truncated:
            chunks = "1 chunk is" if report.truncated == 1 else f"{report.truncated:,} chunks are"
            print(f"warning: {chunks} longer than the model reads; the end is found only by its words", file=sys.stderr)
        print(f"{target}: {report.documents:,} documents in {report.chunks:,} chunks: {counts}; {report.seconds:.1f} s")
        if report.full_text_rebuilt:
            print(FULL_TEXT_REBUILT)
        if report.duplicates_removed:
            print(DUPLICATES_REMOVED.format(report.duplicates_removed))
        if made.approximate:
            print(f"approximate index: {made.approximate}")
        print(f'to search it: search-r3 search {shlex.quote(target)} "your question"')
    tell_what_was_left(target, report, as_json)


app.command()(delete)
app.command()(compact)


@app.command(cls=ReasoningCommand)
def search(
    index: Index,
    query: Annotated[
        str,
        typer.Argument(
            help='What you look for, in quotes; "-" reads it from standard input; put text that begins with a dash '
            "after --."
        ),
    ],
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=1000, help="How many results.")] = 5,
    mode: Annotated[Mode, typer.Option(help="vector: by meaning; text: by words; hybrid: both, fused.")] = Mode.hybrid,
    vector_weight: Annotated[
        float,
        typer.Option(min=0, max=1, help="How much the vectors count in a hybrid search; the words count the rest."),
    ] = VECTOR_WEIGHT,
    where: Annotated[
        str | None,
        typer.Option(help="Only chunks for which this SQL condition holds: \"lang = 'en' AND year > 2020\"."),
    ] = None,
    reasoning: ReasoningOption = Reasoning.on,
    budget: Budget = 32,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare with every vector, though there is an approximate index.")
    ] = False,
    chunks: Annotated[
        bool, typer.Option("--chunks", help="Every chunk by itself, not only the best of each document.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="The index's model, where it has no name that is known here.")
    ] = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    engine: EngineOption = AUTO,
    as_json: Json = False,
) -> None:
    """Search an index. Shows what the model thought, then the results with the place where they stand.

    The query must be embedded by the model that made the index; another one is refused. Mode text needs no model.

    \b
    Example:  search-r3 search notes-index "which licence did we choose" --where "path LIKE '%.md'"
    Next:     try --no-reasoning, and --mode text, to see what each is good for
    """
    hush()
    let_idle_threads_sleep()
    from search_r3.index.live_handle import damage_explained
    from search_r3.index.search import check_where
    from search_r3.index.table import SearchIndex
    from search_r3.index.terminal_page import print_result
    from search_r3.model.model_info import model_of_index

    opened = SearchIndex.open_snapshot(index)
    with damage_explained(index):
        check_where(opened, where)  # before a model is loaded
    if query == "-":
        query = sys.stdin.buffer.read().decode("utf-8-sig", "replace")
    loaded = (
        None
        if mode is Mode.text
        else load(
            model or model_of_index(opened.info.model_name, opened.info.model_source, index),
            device,
            dtype,
            engine,
        )
    )
    with damage_explained(index):
        found = opened.search(
            query,
            loaded,
            k=k,
            mode=mode.value,
            reasoning=reasoning.chosen(loaded),
            max_reasoning_tokens=budget,
            where=where,
            exact=exact,
            chunks=chunks,
            vector_weight=vector_weight,
        )
    if not opened.complete:
        print("warning: this index was never finished; run its `search-r3 index` command again", file=sys.stderr)
    if as_json:
        print_json(found.to_dict())
    else:
        print_result(found)


app.command()(evaluate)
app.command()(tables)


@app.command()
def card(
    adapter: Annotated[Path, typer.Argument(readable=False, help="An adapter's folder; its README.md is written.")],
    run: Annotated[Path, typer.Option(help="What documents its training; with --keep, the run's folder goes there.")],
    keep: Annotated[Path | None, typer.Option(help="First copy this run's config, log and curves to --run.")] = None,
    manifest: Annotated[
        list[Path] | None,
        typer.Option(help="With --keep: the manifest of the pairs it saw; then that of `data select`. Repeatable."),
    ] = None,
    command: Annotated[str, typer.Option(help="With --keep: the command that trained it.")] = "search-r3 train sft",
    output: Annotated[Path, typer.Option(help="The folder of results whose metrics go into the card.")] = Path(
        "results"
    ),
) -> None:
    """Write an adapter's model card from the run that trained it and the results that measured it.

    \b
    Example:  search-r3 card models/NAME --run results/training/NAME
    Next:     search-r3 tables, which makes all cards again after every evaluation
    """
    from search_r3.evaluation.publish.model_card import keep_run, write_card

    if keep is not None:
        keep_run(keep, run, manifest or (), command, adapter)
    print(write_card(adapter, run, output))


@app.command()
def models(
    check: Annotated[
        str | None, typer.Option(help="Embed this model's golden texts and compare with the vectors stored in it.")
    ] = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.float32,
    engine: EngineOption = AUTO,
    as_json: Json = False,
) -> None:
    """List the base models and adapters that can be used by name, with size, licence and contract hash.

    Two embeddings can be compared only if their models' contract hashes are equal. With --check, exit code 1 means that
    the model does not give the embeddings it gave when it was saved.

    \b
    Example:  search-r3 models --check smollm2-135m
    Next:     search-r3 index PATH --into FOLDER --model NAME
    """
    hush()
    from search_r3.model import model_info

    if check is None:
        found = model_info.known_models()
        print(json.dumps(found, indent=2) if as_json else model_info.as_table(found))
        return
    golden = model_info.check_golden(check, device, dtype.value, engine)
    if as_json:
        print_json(golden)
    else:
        verdict = "as it should be" if golden["ok"] else "NOT as saved: another base, a broken engine, or damaged files"
        print(f"{golden['name']}: cosine distance {golden['distance']:.1e}, limit {golden['limit']:.0e}: {verdict}")
    if not golden["ok"]:
        raise typer.Exit(EXIT_DIFFERENT)

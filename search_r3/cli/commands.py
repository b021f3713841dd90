"""The application and its commands, each a thin function with a help text that teaches.

Heavy libraries are imported inside the commands that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from search_r3 import __version__
from search_r3.cli.adapt import adapt
from search_r3.cli.ask import ask
from search_r3.cli.data import data_app
from search_r3.cli.data_fresh import data_fresh
from search_r3.cli.data_query_normalizer import data_query_normalizer
from search_r3.cli.data_read import data_read
from search_r3.cli.data_teacher import data_embed_teacher, data_select
from search_r3.cli.encode import encode
from search_r3.cli.evaluate import evaluate, tables
from search_r3.cli.export import export, pull, push
from search_r3.cli.grouped_help import GroupedHelp
from search_r3.cli.index import index
from search_r3.cli.index_backup import backup, restore
from search_r3.cli.index_maintenance import compact, delete
from search_r3.cli.mcp import mcp
from search_r3.cli.mteb import mteb
from search_r3.cli.options import (
    AUTO,
    SETTINGS,
    Device,
    Dtype,
    DtypeOption,
    EngineOption,
    Json,
    Model,
    ReasoningCommand,
    print_json,
    silence_transformers,
)
from search_r3.cli.report import report
from search_r3.cli.rollouts import rollouts
from search_r3.cli.search import search
from search_r3.cli.serve import serve
from search_r3.cli.study import study
from search_r3.cli.train import plot, train_app
from search_r3.cli.tune import tune

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
for name, data_command in (("read", data_read), ("query-normalizer", data_query_normalizer), ("fresh", data_fresh),
                           ("embed-teacher", data_embed_teacher), ("select", data_select)):  # fmt: skip
    data_app.command(name)(data_command)
COMMANDS = (adapt, ask, tune, plot, study, serve, encode, report, rollouts, export, push, pull, mcp, demo, index,
            delete, compact, backup, restore, search, evaluate, mteb, tables, card, models)  # fmt: skip
for command in COMMANDS:
    app.command(cls=ReasoningCommand if command in (ask, mcp, search, tune) else None)(command)

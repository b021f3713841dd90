"""Shared by the commands: settings, options that several commands take, loading a model, and output."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from search_r3.cli.process import let_idle_threads_sleep
from search_r3.files import expand_user
from search_r3.model.engines.registry import AUTO, ENGINES, FASTEST, FASTEST_ENGINES, engine_spec
from search_r3.model.reading import MAX_PASSAGES

if TYPE_CHECKING:
    from search_r3.model.searchr3 import SearchR3
    from search_r3.rerankers.cross_encoder import CrossEncoderReranker

SETTINGS: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "add_completion": False,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 100},
}


class Dtype(StrEnum):
    """The data type of a model's weights and computations."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Reasoning(StrEnum):
    """Whether a model reasons about a query; auto applies the model's rule, latent reasons without words."""

    on = "on"
    off = "off"
    auto = "auto"
    latent = "latent"

    def chosen(self, model: SearchR3 | None) -> bool | Literal["auto", "latent"]:
        """The value for the library. Raises InputError for auto or latent if `model` has no rule or no such mode."""
        if self is Reasoning.auto and model is not None:
            from search_r3.model.adaptive_reasoning import rule_of

            rule_of(model)
        if self is Reasoning.latent:
            if model is not None:
                from search_r3.model.latent_steps import check_latent

                check_latent(model)
            return "latent"
        return "auto" if self is Reasoning.auto else self is Reasoning.on


class ReasoningCommand(TyperCommand):
    """A command with `--reasoning` without a value (on) and `--no-reasoning` (off) besides `--reasoning=VALUE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spelled_out = []
        options = args[: args.index("--")] if "--" in args else args
        for word in options:
            if word.startswith("-h") and word != "-h":  # text, not options; it would be parsed as -h and show the help
                ctx.fail(f"No such option: {word}")
        for word, following in zip(options, [*options[1:], ""], strict=True):
            bare = word == "--reasoning" and following not in set(Reasoning)
            spelled_out.append("--reasoning=on" if bare else "--reasoning=off" if word == "--no-reasoning" else word)
        return super().parse_args(ctx, spelled_out + args[len(options) :])


def expand_home(value: Any) -> Any:
    """A callback for a path or a list of paths: expands `~` at the beginning to the user's home folder.

    Raises:
        InputError: the user has no home folder.
    """
    if isinstance(value, list):
        return [expand_home(one) for one in value]
    return type(value)(str(expand_user(value))) if value is not None and str(value).startswith("~") else value


Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default a GPU if there is one.")]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="auto is float32 on a CPU, bfloat16 on a GPU. bfloat16 is faster on CPUs with AMX or AVX-512 BF16."
    ),
]


def _prepare_for(engine: str) -> str:
    if engine == FASTEST or engine_spec(engine).busy_threads:
        let_idle_threads_sleep()
    return engine


EngineOption = Annotated[
    str,
    typer.Option(
        callback=_prepare_for,
        metavar="|".join([AUTO, FASTEST, *ENGINES, "PLUGIN"]),
        help="; ".join(f"{engine.name}: {engine.summary}" for engine in ENGINES.values())
        + f"; auto is torch; fastest is the first of {', '.join(FASTEST_ENGINES)} that runs the model on this CPU. "
        "Other packages may add engines.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="A name from `search-r3 models`, a model folder, or a hub id. By default the adapter that comes with the "
        "package."
    ),
]
ReasoningOption = Annotated[
    Reasoning,
    typer.Option(
        help="Let the model reason about the query before it embeds it; auto: only if its rule expects this to "
        "help; latent: in a few steps without words, if the model was trained for this. "
        "--no-reasoning is off."
    ),
]
ReadOption = Annotated[
    int,
    typer.Option(
        min=0, max=MAX_PASSAGES, help="Embed the query again with the first N hits, if the model was trained to read."
    ),
]
HopsOption = Annotated[
    int, typer.Option(min=1, max=2, help="With --read: 2 reads, searches, and reads again before the last search.")
]
Budget = Annotated[int, typer.Option(min=0, help="At most N reasoning tokens, without the embed token.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts in one pass; lower it if memory runs out.")]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Tokens kept of each document (512 by default).")]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of BEIR data sets; by default SEARCH_R3_DATA, else data in the cache folder."),
]
IgnoreIdenticalIds = Annotated[
    bool,
    typer.Option(
        "--ignore-identical-ids",
        help="Ignore documents with the query's own id, as MTEB does for ArguAna and Quora.",
    ),
]
Dataset = Annotated[str, typer.Option(help="A data set's name or BEIR folder; NAME.small is a fixed part.")]
Split = Annotated[str | None, typer.Option(help="The split of the judgments; by default the data set's test split.")]
TrainingPairs = Annotated[
    Path, typer.Argument(readable=False, help="Training pairs (JSONL), as `data build` writes them.")
]
KeyVariable = Annotated[str, typer.Option(help="The environment variable that holds the endpoint's key.")]
API_KEY_VARIABLE = "OPENAI_API_KEY"
EXIT_NOTHING_FOUND = 1
"""Exit code of `search` and `ask` without hits, as grep's; with --json it is 0."""
NoKey = Annotated[bool, typer.Option("--no-key", help="The endpoint needs no key.")]
BudgetTokens = Annotated[int | None, typer.Option(min=1, help="Stop before this many tokens are used.")]
AllowMissing = Annotated[
    bool,
    typer.Option(
        "--allow-missing", help="Evaluate even if judged documents are missing from the corpus; every table notes this."
    ),
]


def given_options(context: typer.Context) -> set[str]:
    """The names of the parameters that the command line sets."""
    return {name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}


def load(name: str, device: str | None, dtype: Dtype, engine: str = AUTO) -> SearchR3:
    from search_r3.model.searchr3 import SearchR3

    return SearchR3.from_pretrained(name, device=device, dtype=dtype.value, engine=engine)


def silence_transformers() -> None:
    """Silence the messages of transformers without importing it, as not every command needs it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()


def print_progress(line: str) -> None:
    """Print a line on stderr immediately: the progress of a long command."""
    print(line, file=sys.stderr, flush=True)


def print_counted(what: str, done: int, total: int) -> None:
    """Report the progress of a long command on stderr, such as "10 of 200 queries"."""
    print_progress(f"{done:,} of {total:,} {what}")


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


def load_reranker(name: str | None, device: str | None) -> CrossEncoderReranker | None:
    """The cross-encoder of `--reranker`, if there is one. Raises InputError if it cannot be loaded."""
    if name is None:
        return None
    from search_r3.rerankers.cross_encoder import CrossEncoderReranker

    return CrossEncoderReranker(name, device)

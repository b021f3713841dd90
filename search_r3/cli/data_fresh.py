"""`search-r3 data fresh`: a test set of documents that no model has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from search_r3.cli.options import (
    API_KEY_VARIABLE,
    BatchSize,
    BudgetTokens,
    Device,
    Json,
    KeyVariable,
    NoKey,
    print_json,
    print_progress,
    silence_transformers,
)
from search_r3.errors import InputError


def data_fresh(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE | PACKAGE...",
            help="A recipe in YAML, or packages: wheels, source archives, folders, names of installed packages.",
        ),
    ],
    into: Annotated[Path, typer.Option(help="The BEIR folder to write.")],
    released_after: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="Refuse earlier releases; 2026-01-01 by default.")
    ] = None,
    allow_unknown_date: Annotated[
        bool | None,
        typer.Option("--allow-unknown-date", help="Accept packages whose release date is not known."),
    ] = None,
    index: Annotated[bool, typer.Option(help="Ask pip's package index when each file was uploaded.")] = True,
    committee: Annotated[
        list[str] | None,
        typer.Option(help="A retriever that checks questions, named as in evaluate --system. Repeatable."),
    ] = None,
    top: Annotated[
        int | None, typer.Option(help="Keep a question if any of these ranks its document among the first N.")
    ] = None,
    questions: Annotated[int | None, typer.Option(help="At most N questions for each package.")] = None,
    documents: Annotated[int | None, typer.Option(help="At most N documents of each package.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random choices.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Let an LLM write the questions: an OpenAI-compatible endpoint's base URL.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The LLM's name at the endpoint.")] = None,
    key_variable: KeyVariable = API_KEY_VARIABLE,
    no_key: NoKey = False,
    budget_tokens: BudgetTokens = None,
    batch_size: BatchSize = 32,
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a data set that was made from other inputs.")] = False,
    as_json: Json = False,
) -> None:
    """Make a test set from recently released packages, so that no model can have learned its documents.

    Documents are sections of READMEs and documentation, and modules, classes and functions without the words of their
    questions. Questions come from headings and docstrings, or from an LLM. A question is kept if any retriever of the
    committee finds its document; documents of dropped questions stay as distractors. manifest.json lists every package
    with its date, SHA-256 and license, and what was dropped and why. Archives are read without unpacking them, and
    nothing in them is run.

    \b
    Example:  search-r3 data fresh configs/data/fresh-2026.yaml --into build/fresh-2026
    Example:  search-r3 data fresh mypackage-1.0-py3-none-any.whl docs/ --into build/mine --allow-unknown-date
    Next:     search-r3 evaluate --dataset build/fresh-2026 --system bm25
    """
    from search_r3.data.fresh.fresh_config import read_config
    from search_r3.data.fresh.fresh_dataset import build_fresh
    from search_r3.data.fresh.release import index_lookup
    from search_r3.data.mining.scorers import Scorer, open_scorer
    from search_r3.data.synthesis.writers import Budget

    changes = {
        "released_after": released_after,
        "allow_unknown_date": allow_unknown_date,
        "committee": committee or None,
        "top": top,
        "questions_per_package": questions,
        "documents_per_package": documents,
        "seed": seed,
    }
    config = read_config(inputs, changes)

    def opened(name: str) -> Scorer:
        if name != "bm25":
            silence_transformers()
        return open_scorer(name, device=device, batch_size=batch_size)

    manifest = build_fresh(
        config,
        into,
        lookup=index_lookup(print_progress) if index else lambda name: None,
        open_scorer=opened,
        writer=_writer(endpoint, model, None if no_key else key_variable),
        budget=Budget(budget_tokens),
        force=force,
        report=print_progress,
    )
    if as_json:
        print_json(manifest)
    else:
        _print(manifest, into)


def _writer(endpoint: str | None, model: str | None, key_variable: str | None) -> Any:
    if (endpoint is None) != (model is None):
        raise InputError("give both --endpoint URL and --model NAME, or neither")
    if endpoint is None or model is None:
        return None
    from search_r3.data.synthesis.endpoint_writer import EndpointSettings, EndpointWriter

    return EndpointWriter(EndpointSettings(endpoint, model, key_variable))


def _print(manifest: dict[str, Any], into: Path) -> None:
    for package in manifest["packages"]:
        counts = f"{sum(package['documents'].values()):>6,} {sum(package['questions'].values()):>5,}"
        about = f"{package['released'] or 'date unknown'}, {package['license']}"
        print(f"{counts}  {package['name']} {package['version'] or '?'}, {about}")
    trip = manifest["round_trip"]
    only_one = ", ".join(f"{name} {counts['kept_that_it_alone_finds']}" for name, counts in trip["committee"].items())
    print(f"{manifest['documents']:>6,} {manifest['questions']:>5,}  documents and questions in {into}")
    print(f"of {trip['checked']:,} questions checked, {trip['found_by_none']:,} were found by no retriever")
    print(f"kept questions that only one retriever finds: {only_one}")

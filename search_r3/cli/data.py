"""Commands for training pairs: `data build`, `data mine`, `data reason`, `data synthesize`.

Heavy libraries are imported inside the commands that need them, so that `--help` answers at once.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search_r3.cli.options import (
    API_KEY_VARIABLE,
    SETTINGS,
    BatchSize,
    Budget,
    BudgetTokens,
    DataRoot,
    Device,
    Dtype,
    DtypeOption,
    Json,
    KeyVariable,
    MaxLength,
    NoKey,
    TrainingPairs,
    load,
    print_counted,
    print_json,
    print_progress,
    silence_transformers,
)
from search_r3.errors import InputError

if TYPE_CHECKING:
    from search_r3.data.synthesis.writers import Writer

data_app = typer.Typer(
    help="Make training data: pairs from a recipe, hard negatives, and reasoning traces.", **SETTINGS
)


class ReasoningWriter(StrEnum):
    """How reasoning traces for training are written."""

    words = "words"
    opening = "opening"
    model = "model"


@data_app.command("build")
def data_build(
    recipe: Annotated[
        Path,
        typer.Argument(readable=False, help="A recipe in YAML; the source checkout's configs/data/ holds examples."),
    ],
    output: Annotated[Path, typer.Argument(help="The JSONL file to write, one training pair per line.")],
    data: DataRoot = None,
    seed: Annotated[int | None, typer.Option(help="Seed to use instead of the recipe's.")] = None,
    as_json: Json = False,
) -> None:
    """Build training pairs from docstrings, titles, dictionaries, manuals and your own pairs, according to a recipe.

    The same recipe, seed and package versions give the same file. If the recipe says so, duplicates and overlaps with
    evaluation sets are removed. OUTPUT.manifest.json lists the sources, what was dropped and why, and the licenses.
    An interrupted build resumes after its last finished source (kept in OUTPUT.partial until the end). Damaged input
    (bad UTF-8, binary, HTML, lines over 10 MB) is refused with its line; `damaged: skip` in the recipe skips and counts
    it.

    \b
    Example:  search-r3 data build configs/data/first.yaml pairs.jsonl
    Next:     search-r3 data mine pairs.jsonl mined.jsonl; data reason; train sft with OUTPUT under `pairs`
    """
    from search_r3.data.recipe import build_pairs

    _print_built(build_pairs(recipe, output, data, seed, print_progress), output, as_json)


@data_app.command("mine")
def data_mine(
    pairs: TrainingPairs,
    output: Annotated[Path, typer.Argument(help="The JSONL file to write: the same pairs, with negatives.")],
    by: Annotated[
        str, typer.Option(help="bm25, all-minilm-l6-v2, st:NAME (sentence-transformers), or a SearchR3 model.")
    ] = "bm25",
    teacher: Annotated[
        str | None,
        typer.Option(help="A second scorer, named like --by: candidates that it scores too high are dropped."),
    ] = None,
    corpus: Annotated[
        list[str] | None, typer.Option(help="A data set whose documents are also candidates. Repeatable.")
    ] = None,
    per_pair: Annotated[int, typer.Option(min=1, help="At most N new negatives for each pair.")] = 4,
    range_max: Annotated[int, typer.Option(min=1, help="The lowest rank from which negatives are taken.")] = 100,
    range_min: Annotated[int, typer.Option(min=0, help="Skip this many of the best ranks.")] = 0,
    margin: Annotated[
        float | None, typer.Option(min=0, help="Keep only candidates that score at least this much below the positive.")
    ] = None,
    share: Annotated[
        float,
        typer.Option(min=0, max=1, help="Keep only scores up to this fraction of the positive's; 0 turns this off."),
    ] = 0.95,
    teacher_share: Annotated[float, typer.Option(min=0, max=1, help="The same for the teacher's scores.")] = 0.95,
    near: Annotated[
        float,
        typer.Option(min=0, max=1, help="Texts that share at least this fraction of the positive's words are copies."),
    ] = 0.85,
    same_source: Annotated[
        bool,
        typer.Option("--same-source", help="Only documents of the pair's kind or data set: functions for docstrings."),
    ] = False,
    sample: Annotated[
        bool, typer.Option("--sample", help="Choose among passing candidates at random, not the highest first.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed for --sample.")] = 0,
    data: DataRoot = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Mine hard negatives: documents of other pairs that rank high for a query but do not answer it.

    Existing negatives are kept, so a second retriever can add more. If interrupted, the same command resumes.
    OUTPUT.manifest.json says how many candidates each check dropped.

    \b
    Example:  search-r3 data mine pairs.jsonl mined.jsonl --by bm25 --teacher all-minilm-l6-v2 --share 0
    Before:   search-r3 data build RECIPE pairs.jsonl
    Next:     search-r3 train sft CONFIG, with OUTPUT under `pairs`
    """
    silence_transformers()
    from search_r3.data.mining.hard_negatives import MineSettings, mine_negatives
    from search_r3.data.mining.scorers import open_scorer

    settings = MineSettings(
        per_pair, range_max, range_min, margin, share or None, teacher_share, near, same_source, sample, seed
    )
    loading: dict[str, Any] = {
        "device": device,
        "dtype": dtype.value,
        "batch_size": batch_size,
        "max_length": max_length,
    }
    manifest = mine_negatives(
        pairs,
        output,
        open_scorer(by, **loading),
        settings,
        corpora=corpus or (),
        data_root=data,
        teacher=open_scorer(teacher, **loading) if teacher else None,
        report=print_counted,
    )
    _print_mined(manifest, output, per_pair, as_json)


@data_app.command("reason")
def data_reason(
    pairs: TrainingPairs,
    output: Annotated[Path, typer.Argument(help="The JSONL file to write: the same pairs, with reasoning traces.")],
    by: Annotated[
        ReasoningWriter,
        typer.Option(help="words: terms of the answer; opening: its first words; model: the best sample."),
    ] = ReasoningWriter.words,
    scorer: Annotated[
        str | None,
        typer.Option(help="With words: keep only terms that raise the answer's rank by bm25, or a model."),
    ] = "bm25",
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many pairs; the rest are copied unchanged.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Traces sampled for each query; the most useful one is kept.")
    ] = 4,
    budget: Budget = 24,
    seed: int = 0,
    model: Annotated[str, typer.Option(help="The model that writes the traces.")] = "smollm2-135m",
    batch_size: BatchSize = 128,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Write short reasoning traces for training: from words of the answer, or by a model.

    For 20,000 pairs, `--by words` takes a minute and `--by opening` a second. `--by model` samples several traces for
    each query and keeps the most useful one, if any is useful; if interrupted, the same command resumes.

    \b
    Example:  search-r3 data reason pairs.jsonl reasoned.jsonl --by model --limit 2000
    Next:     search-r3 train sft CONFIG, with OUTPUT under `pairs`
    """
    silence_transformers()
    if by is ReasoningWriter.opening:
        from search_r3.data.reasoning.answer_openings import add_openings

        counts = add_openings(pairs, output, limit=limit)
    elif by is ReasoningWriter.words:
        from search_r3.data.mining.scorers import open_scorer
        from search_r3.data.reasoning.salient_terms import add_salient

        opened = open_scorer(scorer, device=device, dtype=dtype.value, batch_size=batch_size) if scorer else None
        counts = add_salient(pairs, output, limit=limit, scorer=opened, report=print_counted)
    else:
        from search_r3.data.reasoning.self_reasoning_pairs import add_self_reasoning

        counts = add_self_reasoning(
            pairs,
            output,
            load(model, device, dtype),
            limit=limit,
            samples=samples,
            max_tokens=budget,
            seed=seed,
            batch_size=batch_size,
            report=lambda done, total: print_counted("queries reasoned about", done, total),
        )
    _print_counts(counts, output, as_json)


@data_app.command("synthesize")
def data_synthesize(
    source: Annotated[
        str, typer.Argument(help="A BEIR data set (name or folder), documents (JSONL: id, title, text), or pairs.")
    ],
    output: Annotated[Path, typer.Argument(help="The JSONL file to write, one training pair per line.")],
    endpoint: Annotated[
        str | None, typer.Option(help="Base URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name at the endpoint.")] = None,
    local: Annotated[
        str | None, typer.Option(help="Use a local model as the writer instead: a name, a folder or a hub id.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="keywords, question, claim or description; all by default. Repeatable.")
    ] = None,
    per_document: Annotated[int, typer.Option(min=1, help="Queries to ask for, per document.")] = 1,
    negatives: Annotated[int, typer.Option(min=0, help="Hard negatives to ask for, per kept query.")] = 1,
    reasoning: Annotated[bool, typer.Option("--reasoning", help="Also ask for reasoning traces for training.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many documents, drawn with the seed.")] = None,
    by: Annotated[
        str, typer.Option(help="The retriever for the checks: bm25, all-minilm-l6-v2, st:NAME, or a SearchR3 model.")
    ] = "bm25",
    top_k: Annotated[int, typer.Option(min=1, help="Keep a query if its document is among the first N.")] = 3,
    max_chars: Annotated[int, typer.Option(min=100, help="Characters of a document shown to the writer.")] = 4000,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Sampling temperature; 0 is greedy.")] = 0.7,
    thinking_tokens: Annotated[
        int, typer.Option(min=0, help="Extra tokens for each answer, for models that think first.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed for the choice and order of documents and the kinds of queries.")] = 0,
    key_variable: KeyVariable = API_KEY_VARIABLE,
    no_key: NoKey = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent calls.")] = 8,
    timeout: Annotated[float, typer.Option(help="Time limit of a call in seconds.")] = 120.0,
    retries: Annotated[int, typer.Option(min=0, help="Retries when the endpoint is busy.")] = 5,
    budget_tokens: BudgetTokens = None,
    budget_cost: Annotated[
        float | None, typer.Option(min=0, help="Stop before this cost is reached; needs prices.")
    ] = None,
    price_in: Annotated[float | None, typer.Option(min=0, help="Price per million input tokens.")] = None,
    price_out: Annotated[float | None, typer.Option(min=0, help="Price per million output tokens.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Call no model, write nothing: show prompts, calls, tokens and cost.")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="For --dry-run: count tokens with this model's tokenizer, not as characters / 4.")
    ] = None,
    data: DataRoot = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Let a language model write queries and hard negatives for documents, and keep those that a retriever confirms.

    A query is kept if a search with it finds its document, a negative if it ranks below the document. After an
    interruption or an exhausted budget, the same command resumes. OUTPUT.manifest.json counts what was dropped and why.
    The key is read from the environment only.

    \b
    Example:  search-r3 data synthesize scifact written.jsonl --endpoint URL --model NAME --limit 500
    Before:   the same with --dry-run, which shows the prompts and the cost
    Next:     search-r3 data mine written.jsonl mined.jsonl; train sft with OUTPUT under `pairs`
    """
    from search_r3.data.mining.scorers import open_scorer
    from search_r3.data.synthesis.pipeline import synthesize
    from search_r3.data.synthesis.synthesis_plan import SynthesisSettings, plan
    from search_r3.data.synthesis.writers import Budget, token_counter

    if dry_run or local or by != "bm25":
        silence_transformers()
    settings = SynthesisSettings(
        kinds=tuple(kind) if kind else SynthesisSettings().kinds,
        per_document=per_document,
        negatives=negatives,
        reasoning=reasoning,
        limit=limit,
        top_k=top_k,
        max_chars=max_chars,
        thinking_tokens=thinking_tokens,
        seed=seed,
    )
    budget = Budget(budget_tokens, budget_cost, price_in, price_out)
    if dry_run:
        counter = token_counter(tokenizer) if tokenizer else None
        _print_plan(plan(source, settings, budget, data_root=data, count=counter), as_json)
        return
    if (endpoint is None) == (local is None) or (endpoint is None) != (model is None):
        raise InputError("no writer given; pass --endpoint URL with --model NAME, or --local NAME")
    writer: Writer
    if endpoint and model:
        key = None if no_key else key_variable
        writer = _endpoint_writer(endpoint, model, key, concurrency, timeout, retries, temperature)
    else:
        writer = _local_writer(str(local), device, dtype, temperature, seed, batch_size)
    scorer = open_scorer(by, device=device, dtype=dtype.value)
    manifest = synthesize(source, output, writer, scorer, settings, budget=budget, data_root=data, report=print_counted)
    _print_written(manifest, output, as_json)


def _endpoint_writer(
    url: str, model: str, key_variable: str | None, concurrency: int, timeout: float, retries: int, temperature: float
) -> Writer:
    from search_r3.data.synthesis.endpoint_writer import EndpointSettings, EndpointWriter

    return EndpointWriter(
        EndpointSettings(url, model, key_variable, concurrency, timeout, retries, temperature=temperature)
    )


def _local_writer(
    name: str, device: str | None, dtype: Dtype, temperature: float, seed: int, batch_size: int
) -> Writer:
    from search_r3.data.synthesis.writers import LocalWriter

    return LocalWriter(load(name, device, dtype), temperature=temperature, seed=seed, batch_size=batch_size)


def _print_built(manifest: dict[str, Any], output: Path, as_json: bool) -> None:
    if as_json:
        print_json(manifest)
        return
    for source in manifest["sources"]:
        origin = source.get("dataset") or source.get("path") or ", ".join(source.get("packages_read", {}))
        print(f"{source['count']:>8,}  {source['kind']} {origin}{' (missing)' if 'missing' in source else ''}")
    for reason, count in manifest.get("cleaning", {}).get("dropped", {}).items():
        print(f"{-count:>8,}  {reason}")
    print(f"{manifest['count']:>8,}  pairs in {output}; what was dropped, and why: {output}.manifest.json")


def _print_mined(manifest: dict[str, Any], output: Path, per_pair: int, as_json: bool) -> None:
    if as_json:
        print_json(manifest)
        return
    print(f"{output}: {manifest['negatives']:,} negatives for {manifest['pairs']:,} pairs")
    print(f"  {manifest['pairs_with_all']:,} pairs have all {per_pair}, {manifest['pairs_with_none']:,} have none")
    print(f"  the positive ranks first for {manifest['positive_first']:,}")
    for guard, count in manifest["dropped"].items():
        print(f"  {count:,} candidates dropped: {guard}")


def _print_counts(counts: dict[str, int], output: Path, as_json: bool) -> None:
    if as_json:
        print_json(counts)
    else:
        print(f"{output}: {counts['pairs']:,} pairs; reasoning for {counts['kept']:,} of {counts['asked']:,}")


def _print_plan(planned: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(planned)
        return
    for example in planned["examples"]:
        for prompt in example["prompts"]:
            print(f"--- document {example['id']}, at most {prompt['max_tokens']} tokens of reply")
            print(f"[system] {prompt['system']}\n[user] {prompt['user']}\n")
    tokens = planned["tokens"]
    print(f"{planned['documents']:,} of {planned['of']:,} documents, at most {planned['calls']:,} calls")
    print(f"about {tokens['input']:,} tokens in (by {planned['counted_by']}), at most {tokens['output']:,} out")
    cost = planned["cost"]
    print("cost: unknown; give --price-in and --price-out" if cost is None else f"cost: about {cost:,.4f} at most")
    if not planned["within_budget"]:
        print("this exceeds the budget: the run may stop before all documents are done")
    print("nothing was sent and nothing was written")


def _print_written(manifest: dict[str, Any], output: Path, as_json: bool) -> None:
    if as_json:
        print_json(manifest)
        return
    asked, usage = manifest["queries_asked"], manifest["usage"]
    print(f"{output}: {manifest['pairs']:,} pairs of {asked:,} queries asked for, {manifest['negatives']:,} negatives")
    for reason, count in manifest["dropped"].items():
        print(f"  {count:,} dropped, {reason}")
    cost = "" if manifest["cost"] is None else f"; cost {manifest['cost']:,.4f}"
    print(f"  {usage['calls']:,} calls, {usage['input']:,} tokens in, {usage['output']:,} out{cost}")
    if manifest["stopped"]:
        done, wanted = manifest["documents"], manifest["documents_asked_for"]
        print(f"the budget ended after {done:,} of {wanted:,} documents; the same command with a larger one resumes")

"""`evaluate` measures systems on judged data; `tables` generates tables and model cards from the results."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from search_r3.cli.options import (
    AllowMissing,
    BatchSize,
    Budget,
    DataRoot,
    Device,
    Dtype,
    DtypeOption,
    EngineOption,
    IgnoreIdenticalIds,
    Json,
    MaxLength,
    Split,
    given_options,
    print_json,
    print_progress,
    silence_transformers,
)
from search_r3.cli.writer import WriterOption, open_reasoning_writer
from search_r3.errors import InputError
from search_r3.model.engines.registry import AUTO

EXIT_FAILED = 1
"""Exit code: a part of a suite failed, or a file differs from the results."""
IN_THE_SUITE = {
    "dataset": "datasets",
    "system": "systems",
    "mode": "modes",
    "queries": "queries",
    "split": "split",
    "budget": "budget",
    "max_length": "max_length",
    "batch_size": "batch_size",
    "dtype": "dtype",
    "engine": "engine",
    "allow_missing": "allow_missing",
    "ignore_identical_ids": "ignore_identical_ids",
}
"""Options that a suite's file sets, and its keys for them."""


def evaluate(
    context: typer.Context,
    suite: Annotated[
        Path | None,
        typer.Argument(
            readable=False,
            help="A suite in YAML, instead of the options; the source checkout's configs/suites/ holds examples.",
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="A data set's name, a BEIR folder, ir_datasets:NAME, mteb:TASK, hf:OWNER/NAME or nanobeir:NAME "
            "(fetched once); nanobeir is all of NanoBEIR, NAME.small a fixed part. Repeatable."
        ),
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(
            help="bm25, all-minilm-l6-v2, st:MODEL (sentence-transformers), endpoint:MODEL@URL (OpenAI-compatible), a "
            "YAML file that describes either, a SearchR3 model, or index:PLACE, an index of the data set's documents; "
            "LABEL=SPEC names it. Repeatable."
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="Reasoning off, on, latent or given (reasoning.jsonl of the data set; control given.shuffled: another "
            "query's) or written (by --writer); or reading the first hits: read, read+on, read-2 (two hops), and its "
            "controls read.shuffled, read.empty, read.rocchio. off and on by default. Repeatable."
        ),
    ] = None,
    writer: WriterOption = None,
    queries: Annotated[
        list[str] | None,
        typer.Option(
            help="How queries are written: original (the default), upper, lower, title, typos, keywords or "
            "no_punctuation. Repeatable."
        ),
    ] = None,
    split: Split = None,
    budget: Budget = 32,
    max_length: MaxLength = None,
    batch_size: BatchSize = 32,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    engine: EngineOption = AUTO,
    data: DataRoot = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder for runs/ and metrics/; by default results, or that of the suite.")
    ] = None,
    allow_missing: AllowMissing = False,
    ignore_identical_ids: IgnoreIdenticalIds = False,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Change one key of the suite: dtype=float32. Repeatable.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Evaluate again even if results exist.")] = False,
    price: Annotated[
        float | None, typer.Option(min=0, help="Price per million tokens at an endpoint, to show the cost of a run.")
    ] = None,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="Send over a million tokens, or a file's token_limit, without asking."),
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Rewrite the tables of README.md and docs/results.md from all results.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure nDCG@10, MRR@10 and recall@100 on judged data, in comparison with BM25 and all-MiniLM-L6-v2.

    Each pair of data set and system gets a TREC run and a metrics file; existing ones are not computed again, so
    the same command resumes an interrupted evaluation. Embeddings are cached. The key of an endpoint is read from
    OPENAI_API_KEY, and what will be sent is reported first (docs/evaluation.md). A suite runs many systems, data sets
    and studies; failures in it are reported at the end, with exit code 1, and do not stop the rest.

    \b
    Example:  search-r3 evaluate --dataset cosqa --system bm25 --system smollm2-135m --mode off
    Suites:   search-r3 evaluate configs/suites/sample.yaml
    Next:     search-r3 tables
    """
    silence_transformers()
    from search_r3.data.io.find_dataset import available_datasets
    from search_r3.data.query_variants import ORIGINAL
    from search_r3.evaluation.baselines.external_models import CostApproval
    from search_r3.evaluation.publish.tables import records_markdown
    from search_r3.evaluation.suite import MODES
    from search_r3.evaluation.suite import evaluate as run
    from search_r3.model.resolve import default_model

    if suite is not None:
        if writer is not None:
            raise InputError("--writer needs --system: a suite has no mode written")
        if yes or price is not None:
            raise InputError(
                "--yes and --price need --system: for a suite, set token_limit and price in the system's file"
            )
        _refuse_options(context, suite)
        _run_suite(suite, override or [], output, data, device, force, table, as_json)
        return
    if override:
        raise InputError(f"--set {override[0]} changes a key of a suite, but no suite was given")
    if not dataset and not table:
        names = ", ".join(available_datasets(data)) or "none; point --data at a folder of BEIR data sets"
        raise InputError(f"name a data set with --dataset; available: {names}")
    folder = output or Path("results")
    records: list[dict[str, Any]] = []
    if dataset:
        records = run(
            dataset,
            system or ["bm25", "all-minilm-l6-v2", default_model()],
            folder,
            split,
            modes=mode or (MODES if writer is None else (*MODES, "written")),
            queries=queries or (ORIGINAL,),
            max_length=max_length,
            max_reasoning_tokens=budget,
            batch_size=batch_size,
            device=device,
            dtype=dtype.value,
            engine=engine,
            data_root=data,
            force=force,
            allow_missing=allow_missing,
            ignore_identical_ids=ignore_identical_ids,
            writer=None if writer is None else open_reasoning_writer(writer, device, dtype),
            approval=CostApproval(
                yes, price, _ask if sys.stdin.isatty() and sys.stderr.isatty() else None, print_progress
            ),
            report=print_progress,
        )
    if table:
        _rewrite_tables(folder, data)
    if as_json:
        print_json(records)
    elif records:
        print(records_markdown(records))


def tables(
    files: Annotated[
        list[Path] | None,
        typer.Argument(readable=False, help="Markdown files with tables; by default README.md and docs/results.md."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing: show what differs, with exit code 1 if anything does.")
    ] = False,
    output: Annotated[Path, typer.Option(help="The folder of results.")] = Path("results"),
    models: Annotated[Path, typer.Option(help="The folder of adapters, for their cards.")] = Path("models"),
    cards: Annotated[bool, typer.Option(help="Also generate the adapters' model cards.")] = True,
    data: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Regenerate all tables of results in the documentation, and all model cards, from the run files.

    A table is between a line such as `<!-- table: results -->` and a line `<!-- /table -->`; the text between them is
    replaced. Kinds of table: results, summary (one measure), queries (with changed queries) and study (with
    dataset=NAME system=NAME). Measures are recomputed from the runs if the data set is available; otherwise those in
    results/metrics are used, and listed.

    \b
    Example:  search-r3 tables --check
    Before:   search-r3 evaluate SUITE
    Next:     git diff README.md docs/results.md
    """
    from search_r3.evaluation.publish.markdown_blocks import regenerate_all

    result = regenerate_all(files or None, output, models if cards else None, data)
    if not check:
        result.write()
    for problem in result.check.problems:
        print(f"problem: {problem}", file=sys.stderr)
    if result.check.unchecked:
        listed = ", ".join(result.check.unchecked)
        print(f"not recomputed, as the data are missing: {listed}", file=sys.stderr)
    if as_json:
        print_json(
            {
                "changed": [str(file.path) for file in result.changed],
                "unchanged": [str(file.path) for file in result.files if not file.changed],
                "problems": result.check.problems,
                "unchecked": result.check.unchecked,
            }
        )
    else:
        for file in result.files:
            if check and file.changed:
                print(file.diff())
            else:
                print(f"{file.path}: " + ("rewritten" if file.changed else "up to date"))
    if result.check.problems or (check and result.changed):
        raise typer.Exit(EXIT_FAILED)


def _run_suite(
    suite: Path,
    overrides: list[str],
    output: Path | None,
    data: Path | None,
    device: str | None,
    force: bool,
    table: bool,
    as_json: bool,
) -> None:
    from search_r3.config import load_config
    from search_r3.evaluation.suite_config import SuitePlan, run_suite

    plan = load_config(suite, SuitePlan, overrides)
    plan.output = output or plan.output
    outcome = run_suite(plan, device=device, data_root=data, force=force, report=print_progress)
    for failure in outcome.failures:
        if not isinstance(failure.error, InputError):  # a bug, so it keeps its traceback
            traceback.print_exception(failure.error)
    if table and outcome.records:
        _rewrite_tables(plan.output, data)
    if as_json:
        print_json({"suite": str(suite), **outcome.to_dict()})
    else:
        print(outcome.summary())
    if outcome.failures:
        raise typer.Exit(EXIT_FAILED)


def _refuse_options(context: typer.Context, suite: Path) -> None:
    """Raise InputError for options that the suite's file sets."""
    given = given_options(context)
    for name, key in IN_THE_SUITE.items():
        if name in given:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} does not work with a suite: set it in {suite}, or use --set {key}=VALUE")


def _rewrite_tables(output: Path, data: Path | None) -> None:
    from search_r3.evaluation.publish.markdown_blocks import regenerate_all

    result = regenerate_all(None, output, None, data)
    result.write()
    for file in result.files:
        print_progress(f"{file.path}: the tables " + ("were rewritten" if file.changed else "are up to date"))
    for problem in result.check.problems:
        print_progress(f"warning: {problem}")


def _ask(question: str) -> bool:
    return typer.confirm(question, err=True)

"""`search-r3 study`: every control of one model on one data set, with significance tests, costs and examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search_r3.cli.options import (
    AllowMissing,
    BatchSize,
    Budget,
    DataRoot,
    Dataset,
    Device,
    Dtype,
    DtypeOption,
    EngineOption,
    IgnoreIdenticalIds,
    Json,
    MaxLength,
    Model,
    Split,
    print_json,
    print_progress,
    silence_transformers,
)
from search_r3.errors import InputError
from search_r3.model.engines.registry import AUTO


def study(
    dataset: Dataset,
    system: Model = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this mode, besides off and on: empty, shuffled, repeat, bm25+reasoning, off+bm25, on-8, ... "
            "Repeatable; all by default. Existing results stay part of the study."
        ),
    ] = None,
    budget: Budget = 32,
    budgets: Annotated[str, typer.Option(help="The budgets of the curve, separated by commas.")] = "0,4,8,16,32,64",
    samples: Annotated[
        int, typer.Option(min=2, help="Sampled reasoning traces for each query, for the two modes that fuse them.")
    ] = 4,
    temperature: Annotated[float, typer.Option(help="Sampling temperature of these traces.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the samples and of the mode shuffled.")] = 0,
    sample: Annotated[
        bool, typer.Option("--sample", help="Use the data set's fixed part of 50 queries and 500 documents.")
    ] = False,
    latency: Annotated[int, typer.Option(min=0, help="Queries timed for each budget; 0 skips timing.")] = 32,
    dev: Annotated[
        int, typer.Option(min=0, help="Fit the rule of mode auto on at most N dev queries (cosqa, scifact).")
    ] = 200,
    adaptive: Annotated[bool, typer.Option(help="Fit that rule and run mode auto.")] = True,
    split: Split = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 32,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    engine: EngineOption = AUTO,
    data: DataRoot = None,
    output: Annotated[Path, typer.Option(help="The folder for runs/, metrics/ and studies/.")] = Path("results"),
    allow_missing: AllowMissing = False,
    ignore_identical_ids: IgnoreIdenticalIds = False,
    force: Annotated[bool, typer.Option("--force", help="Run again even if results exist.")] = False,
    as_json: Json = False,
) -> None:
    """Ask whether it is the reasoning that helps: run the controls, test the differences, show wins and losses.

    Each control gets a TREC run, like off and on. Reasoning traces are written once and cached;
    finished parts are skipped, so the same command resumes an interrupted study.

    \b
    Example:  search-r3 study --dataset cosqa --system models/NAME --max-length 128
    Before:   search-r3 evaluate --dataset cosqa --system models/NAME --max-length 128
    Next:     read results/studies/cosqa/NAME.json: examples, per-query scores, the curve of mode auto
    """
    silence_transformers()
    from search_r3.evaluation.records import SMALL
    from search_r3.evaluation.study.controls import ControlConfig
    from search_r3.evaluation.study.study import StudyConfig, run_study
    from search_r3.evaluation.study.study_table import study_markdown
    from search_r3.model.resolve import default_model

    config = StudyConfig(
        controls=control,
        modes=ControlConfig(budget, _budgets(budgets), samples, temperature, seed),
        adaptive=adaptive,
        dev_queries=dev,
        latency_queries=latency,
        max_length=max_length,
        batch_size=batch_size,
        device=device,
        dtype=dtype.value,
        engine=engine,
        force=force,
        allow_missing=allow_missing,
        ignore_identical_ids=ignore_identical_ids,
    )
    record = run_study(
        dataset.removesuffix(SMALL) + SMALL if sample else dataset,
        system or default_model(),
        output,
        split,
        config,
        data_root=data,
        report=print_progress,
    )
    if as_json:
        print_json(record)
    else:
        print(study_markdown(record))


def _budgets(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"--budgets {text}: expected whole numbers separated by commas, such as 0,8,32")
    return tuple(map(int, parts))

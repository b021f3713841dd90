"""`search-r3 mteb`: MTEB evaluates a model on its tasks and writes its own result files, ready to be submitted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search_r3.cli.options import (
    BatchSize,
    Budget,
    Device,
    Dtype,
    DtypeOption,
    Json,
    MaxLength,
    Model,
    expand_home,
    print_json,
    silence_transformers,
)


def mteb(
    tasks: Annotated[list[str], typer.Argument(help="MTEB's names of tasks, such as SciFact.")],
    into: Annotated[
        Path,
        typer.Option(readable=False, callback=expand_home, help="MTEB's cache folder; the files are below results."),
    ] = Path("results/mteb"),
    model: Model = None,
    reasoning: Annotated[bool, typer.Option(help="Reason about queries before they are embedded.")] = True,
    budget: Budget = 32,
    max_length: MaxLength = None,
    training: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            callback=expand_home,
            help="The folder that documents the model's training (`search-r3 card --run`): the files then say what "
            "it was trained on.",
        ),
    ] = None,
    batch_size: BatchSize = 32,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    force: Annotated[bool, typer.Option("--force", help="Evaluate finished tasks again.")] = False,
    as_json: Json = False,
) -> None:
    """Let MTEB evaluate a model on its tasks and write its result files.

    Finished tasks are kept, so the same command resumes an interrupted run. The first use of a task requires a network.
    For comparisons with other systems on the same data, `search-r3 evaluate --dataset mteb:TASK` measures them side by
    side.

    \b
    Example:  search-r3 mteb SciFact CosQA --into results/mteb
    Next:     submit the files as docs/evaluation.md says
    """
    silence_transformers()
    from search_r3.evaluation.baselines.mteb_encoder import SearchR3Encoder
    from search_r3.evaluation.baselines.mteb_results import mteb_tasks, write_mteb_results
    from search_r3.model.resolve import default_model

    found = mteb_tasks(tasks)  # before the model is loaded
    encoder = SearchR3Encoder(
        model or default_model(),
        device=device,
        reasoning=reasoning,
        max_reasoning_tokens=budget,
        max_length=max_length,
        dtype=dtype.value,
        batch_size=batch_size,
        training=training,
    )
    scores = write_mteb_results(encoder, found, into, overwrite=force)
    if as_json:
        print_json([{**score._asdict(), "file": str(score.file)} for score in scores])
        return
    for score in scores:
        print(f"{score.task}: {score.measure} {score.value:.4f}, {score.file}")

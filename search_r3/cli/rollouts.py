"""`search-r3 rollouts`: rewards of a model's sampled reasoning before and after training, each in its own corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search_r3.cli.options import (
    BatchSize,
    Budget,
    DataRoot,
    Dataset,
    Device,
    Dtype,
    DtypeOption,
    IgnoreIdenticalIds,
    Json,
    print_json,
    print_progress,
    silence_transformers,
)
from search_r3.errors import InputError


def rollouts(
    before: Annotated[
        str, typer.Option(help="A SearchR3 model: a name, a folder or a hub id; LABEL=SPEC names it in the results.")
    ],
    dataset: Dataset,
    after: Annotated[str | None, typer.Option(help="A model to compare with it, on the same queries.")] = None,
    split: Annotated[str, typer.Option(help="Split of the queries; scifact's dev are held-out train claims.")] = "dev",
    samples: Annotated[int, typer.Option(min=1, help="Sampled reasoning traces for each query.")] = 6,
    budget: Budget = 24,
    temperature: Annotated[float, typer.Option(help="Sampling temperature, above 0.")] = 1.0,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Number of ranks that the rewards consider.")] = 10,
    queries: Annotated[int | None, typer.Option(min=1, help="At most this many queries, a fixed choice.")] = None,
    documents: Annotated[
        str, typer.Option(help="At most this many documents, including the judged ones; all uses the whole corpus.")
    ] = "all",
    max_length: Annotated[int, typer.Option(min=1, help="Tokens kept of each document.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples and of the bootstrap.")] = 0,
    batch_size: BatchSize = 32,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    data: DataRoot = None,
    output: Annotated[Path, typer.Option(help="The folder for rollouts/.")] = Path("results"),
    ignore_identical_ids: IgnoreIdenticalIds = False,
    force: Annotated[bool, typer.Option("--force", help="Measure again even if results exist.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the rewards of a model's sampled reasoning traces, in a corpus that this model encoded in full.

    The greedy trace and the direct embedding are measured too. With --after, the two models are compared on the same
    queries, with a bootstrap interval and a paired randomization test. Models that already have results are skipped;
    embeddings are shared with `search-r3 evaluate`.

    \b
    Example:  search-r3 rollouts --dataset scifact --before models/SFT --after runs/grpo/best
    Before:   search-r3 train grpo CONFIG
    Next:     read results/rollouts/scifact.dev/: metrics and all traces of each model, and the comparison
    """
    silence_transformers()
    from search_r3.evaluation.rollouts.reasoning_rewards import rewards_markdown
    from search_r3.evaluation.rollouts.rollout_measurement import RolloutConfig, measure_rollouts

    record = measure_rollouts(
        dataset,
        split,
        before,
        after,
        output,
        RolloutConfig(samples, budget, temperature, k, seed, batch_size),
        queries=queries,
        documents=_limit(documents),
        max_length=max_length,
        device=device,
        dtype=dtype.value,
        data_root=data,
        ignore_identical_ids=ignore_identical_ids,
        force=force,
        report=print_progress,
    )
    if as_json:
        print_json(record)
    else:
        print(rewards_markdown(record))


def _limit(text: str) -> int | None:
    if text == "all":
        return None
    if not (text.isdecimal() and text.isascii()) or int(text) < 1:
        raise InputError(f"--documents {text}: expected a whole number from 1, or all")
    return int(text)

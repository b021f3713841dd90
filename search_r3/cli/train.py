"""Commands for training: `train sft` (stage 1), `train grpo` (stage 2), and `plot`, which draws their logs.

Heavy libraries are imported inside the commands that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search_r3.cli.options import (
    SETTINGS,
    DataRoot,
    Device,
    Dtype,
    DtypeOption,
    Json,
    print_json,
    print_progress,
    silence_transformers,
)
from search_r3.cli.train_dry_run import DryBase, DryGpus, DryRun, show_dry_run
from search_r3.errors import InputError

if TYPE_CHECKING:
    from search_r3.data.beir import BeirDataset

train_app = typer.Typer(
    help="Train a model: `train sft` is stage 1 (supervised, contrastive), `train grpo` stage 2 (reinforcement); "
    "`train average` makes one adapter of several.",
    **SETTINGS,
)
Override = Annotated[
    list[str] | None, typer.Option("--set", help="Change one key of the recipe: section.key=value. Repeatable.")
]
Resume = Annotated[bool, typer.Option(help="Resume from the run folder's newest checkpoint; --no-resume starts over.")]


@train_app.command("sft")
def train_sft_command(
    config: Annotated[
        Path, typer.Argument(readable=False, help="A recipe in YAML; the source checkout's configs/ holds examples.")
    ],
    override: Override = None,
    resume: Resume = True,
    dry_run: DryRun = False,
    base: DryBase = None,
    gpus: DryGpus = 1,
    as_json: Json = False,
) -> None:
    """Train stage 1: the model learns to embed texts, directly and after reasoning.

    Ctrl-C finishes the step, writes a checkpoint and stops; the same command resumes from it. The run folder holds
    log.jsonl, the checkpoints and the best adapter.

    \b
    Example:  search-r3 train sft configs/sft/first.yaml --set loop.steps=200
    Before:   search-r3 data build RECIPE pairs.jsonl; train sft CONFIG --dry-run
    Next:     search-r3 evaluate --dataset cosqa --system RUN/adapter
    """
    silence_transformers()
    if dry_run:
        show_dry_run("sft", config, override, base, gpus, as_json)
        return
    from search_r3.training.sft.sft_task import train_sft

    _run(train_sft, config, override, resume, as_json, dataset="cosqa")


@train_app.command("grpo")
def train_grpo_command(
    config: Annotated[
        Path,
        typer.Argument(readable=False, help="A recipe in YAML; the source checkout's configs/grpo/ holds examples."),
    ],
    override: Override = None,
    resume: Resume = True,
    dry_run: DryRun = False,
    base: DryBase = None,
    gpus: DryGpus = 1,
    as_json: Json = False,
) -> None:
    """Train stage 2: reinforcement learning of reasoning and embedding together, on a corpus that the model re-encodes.

    It starts from a stage 1 adapter, which remains the reference. Ctrl-C finishes the step, writes a checkpoint and
    stops; the same command resumes from it, with the corpus as it was. The run folder holds log.jsonl, rollouts.jsonl
    (reasoning traces with their rewards, before and after), the checkpoints and the best adapter.

    \b
    Example:  search-r3 train grpo configs/grpo/cpu.yaml --set adapter=runs/sft-cpu/adapter
    Before:   search-r3 train sft CONFIG; train grpo CONFIG --dry-run
    Next:     search-r3 plot RUN; search-r3 evaluate --dataset scifact --system RUN/best
    """
    silence_transformers()
    if dry_run:
        show_dry_run("grpo", config, override, base, gpus, as_json)
        return
    from search_r3.training.grpo.grpo_task import train_grpo

    _run(train_grpo, config, override, resume, as_json, dataset="scifact")


@train_app.command("average")
def train_average_command(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Two or more adapters of one base: folders or names.")
    ],
    into: Annotated[Path, typer.Option(help="The new adapter's folder, which must not exist.")],
    weights: Annotated[
        str | None,
        typer.Option(
            help="How much each counts, in their order: 2,1. They are divided by their sum; equal by default."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="The average's rank: by default the largest of theirs; it is exact at their sum."),
    ] = None,
    query_normalizer: Annotated[
        Path | None,
        typer.Option(help="A file made by data query-normalizer for the new adapter. With it, one adapter is enough."),
    ] = None,
    reading_passages: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10,
            help="Passages that a search with the new adapter reads by default; one adapter is enough too.",
        ),
    ] = None,
    dev: Annotated[
        list[str] | None,
        typer.Option(help="Compare all on this dev pool, as a recipe's `dev` names it: cosqa. Repeatable."),
    ] = None,
    queries: Annotated[int, typer.Option(min=1, help="Queries of each pool, at most.")] = 200,
    documents: Annotated[int, typer.Option(min=1, help="Documents of each pool.")] = 1000,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens kept of each document of the pools.")] = 256,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    data: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Average adapters that were trained from one base with different seeds or data mixtures.

    Averages the adapters' weight updates exactly, then truncates them to the given rank. The result is a new model:
    indexes made with the inputs must be rebuilt. With --dev, nDCG@10 without reasoning of each adapter and of the
    average shows which is best (docs/stage1.md). The inputs are not changed.

    \b
    Example:  search-r3 train average runs/seed-0/best runs/seed-1/best --into runs/average --dev cosqa --dev scifact
    Before:   search-r3 train sft CONFIG --set loop.seed=1
    Next:     search-r3 evaluate --dataset cosqa --system runs/average
    """
    silence_transformers()
    from search_r3.data.dev_pools import dev_pool
    from search_r3.training.lora.average import average_adapters

    shares = None if weights is None else _numbers(weights)
    pools = [dev_pool(name, data, queries, documents) for name in dict.fromkeys(dev or ())]
    made = average_adapters(adapters, into, shares, rank, query_normalizer, reading_passages)
    systems = [*adapters, str(into)]
    figures = [_direct_figures(name, pools, max_length, device, dtype) for name in systems] if pools else []
    means = [sum(found.values()) / len(found) for found in figures]
    best = systems[means.index(max(means))] if pools else None
    if as_json:
        compared = dict(zip(systems, figures, strict=False))
        made_of = dict(zip(adapters, made.weights, strict=True))
        print_json(
            {"adapter": str(into), "weights": made_of, "rank": made.rank, "full_rank": made.full_rank}
            | {"kept": made.kept, "dev": compared, "best": best}
        )
        return
    print(f"adapter: {into} (rank {made.rank} of {made.full_rank}, {made.kept:.1%} of the average's squared norm)")
    if pools:
        print("  ".join([*(f"{pool.name:>14}" for pool in pools), f"{'mean':>8}", "nDCG@10 without reasoning"]))
        for name, found, mean in zip(systems, figures, means, strict=True):
            print("  ".join([*(f"{value:14.4f}" for value in found.values()), f"{mean:8.4f}", name]))
        print(f"best on dev: {best}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--weights {text}: expected numbers with commas between, one for each adapter: 2,1") from None


def _direct_figures(
    name: str, pools: Sequence[BeirDataset], max_length: int, device: str | None, dtype: Dtype
) -> dict[str, float]:
    """nDCG@10 of a model on each pool, by its name."""
    from search_r3.cli.options import load
    from search_r3.training.dev_evaluation import direct_ndcg

    model, found = load(name, device, dtype), {}
    for pool in pools:
        found[pool.name] = direct_ndcg(model, pool, max_length)
        print_progress(f"{name}: {pool.name} {found[pool.name]:.4f}")
    return found


def _run(
    train: Callable[[Path, list[str], bool], Path],
    config: Path,
    override: list[str] | None,
    resume: bool,
    as_json: bool,
    dataset: str,
) -> None:
    """Train, and print where the adapter is and what to do next; `dataset` is used in the suggested evaluation."""
    from search_r3.training.distributed.sharding import end_processes
    from search_r3.training.distributed.watchdog import end_if_lost

    failed = True
    try:
        folder = train(config, override or [], resume)
        failed = False
    except SystemExit:  # after a signal, as all processes
        failed = False
        raise
    except RuntimeError as error:
        end_if_lost(error)
        raise
    finally:
        end_processes(failed)
    if os.environ.get("RANK", "0") != "0":  # only the first of several processes prints
        return
    if as_json:
        print_json({"adapter": str(folder)})
    else:
        name = shlex.quote(str(folder))
        print(f"adapter: {folder}")
        print(f"to measure it:     search-r3 evaluate --dataset {dataset} --system {name}")
        print(f"to search with it: search-r3 index PATH --into FOLDER --model {name}")


def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", readable=False, help="Training runs' folders, or their log.jsonl.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The image to write; by default curves.png in the run's folder, or compare.png."),
    ] = None,
    dark: Annotated[bool, typer.Option("--dark", help="Draw on a dark ground.")] = False,
) -> None:
    """Draw a training run's curves: reward or loss, dev metrics with their intervals, KL, and all others.

    It works while the run goes on. The best step and the steps after which the run was resumed are marked.

    Several runs are compared in one picture, with one panel per metric and one line per run, named after its folder.

    \b
    Example:  search-r3 plot runs/sft-first
    Example:  search-r3 plot runs/with-teacher runs/without --output teacher.png
    Next:     search-r3 evaluate --dataset cosqa --system RUN/adapter
    """
    from search_r3.training.plot import plot_runs

    print(plot_runs(runs, output, dark=dark))

"""Training on the command line: `train sft` (stage 1), `train grpo` (stage 2), and `plot`, which draws either's log.

Heavy libraries are imported inside the commands that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from search_r3.cli.options import SETTINGS, Json, print_json, silence_transformers
from search_r3.cli.train_dry_run import DryBase, DryGpus, DryRun, show_dry_run

train_app = typer.Typer(
    help="Train a model: `train sft` is stage 1 (supervised, contrastive), `train grpo` stage 2 (reinforcement).",
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
    """Train stage 1: the model learns to embed, directly and after reasoning.

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

    Starts from a stage 1 adapter, which stays the reference. Ctrl-C finishes the step, writes a checkpoint and stops;
    the same command resumes from it, with the corpus as it was. The run folder holds log.jsonl, rollouts.jsonl
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


def _run(
    train: Callable[[Path, list[str], bool], Path],
    config: Path,
    override: list[str] | None,
    resume: bool,
    as_json: bool,
    dataset: str,
) -> None:
    """Train, and print where the adapter is and what to do with it; `dataset` is that of the suggested evaluation."""
    from search_r3.training.distributed.sharding import end_processes

    try:
        folder = train(config, override or [], resume)
    finally:
        end_processes()
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
        typer.Option(help="The image to write; curves.png in the run's folder, or compare.png beside several."),
    ] = None,
) -> None:
    """Draw a training run's curves: dev metrics, loss terms, accuracy, gradient norm, speed. Works while it runs.

    Several runs are compared in one picture, a panel for each metric and a line for each run, named by its folder.

    \b
    Example:  search-r3 plot runs/sft-first
    Example:  search-r3 plot runs/with-teacher runs/without --output teacher.png
    Next:     search-r3 evaluate --dataset cosqa --system RUN/adapter
    """
    from search_r3.training.plot import plot_runs

    print(plot_runs(runs, output))

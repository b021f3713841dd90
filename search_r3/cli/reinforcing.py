"""Stage 2 on the command line: `train grpo`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from search_r3.cli.dry_running import DryBase, DryGpus, DryRun, show_dry_run
from search_r3.cli.options import Json, hush, print_json
from search_r3.cli.training import train_app


@train_app.command("grpo")
def train_grpo(
    config: Annotated[Path, typer.Argument(readable=False, help="A recipe in YAML; configs/grpo/ holds examples.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Change one key of the recipe: section.key=value. Repeatable.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the run folder's newest checkpoint; --no-resume starts from nothing.")
    ] = True,
    dry_run: DryRun = False,
    base: DryBase = None,
    gpus: DryGpus = 1,
    as_json: Json = False,
) -> None:
    """Train stage 2: reinforce the reasoning and the embedding together, in a corpus that moves with the model.

    Starts from a stage 1 adapter, which stays the reference. Ctrl-C finishes the step, writes a checkpoint and stops;
    the same command goes on from there, with the corpus as it was. The run folder holds log.jsonl, rollouts.jsonl
    (analyses with their rewards, before and after), the checkpoints and the best adapter.

    \b
    Example:  search-r3 train grpo configs/grpo/cpu.yaml --set adapter=runs/sft-cpu/adapter
    Before:   search-r3 train sft CONFIG; train grpo CONFIG --dry-run
    Next:     search-r3 plot RUN; search-r3 evaluate --dataset scifact --system RUN/best
    """
    hush()
    if dry_run:
        show_dry_run("grpo", config, override or [], base, gpus, as_json)
        return
    from search_r3.training import grpo

    folder = grpo.train_grpo(config, override or [], resume)
    if as_json:
        print_json({"adapter": str(folder)})
    else:
        print(f"adapter: {folder}")
        print(f"to measure it:     search-r3 evaluate --dataset scifact --system {shlex.quote(str(folder))}")
        print(f"to search with it: search-r3 index PATH --into FOLDER --model {shlex.quote(str(folder))}")

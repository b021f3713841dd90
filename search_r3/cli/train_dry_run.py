"""`train sft --dry-run` and `train grpo --dry-run`: options, and the report as text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from search_r3.cli.options import print_json

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Do not train: run one step of a random two-layer model, and report what the run would need."
    ),
]
DryBase = Annotated[str | None, typer.Option("--base", help="For --dry-run: a model to use instead of the recipe's.")]
DryGpus = Annotated[int, typer.Option("--gpus", min=1, help="For --dry-run: the number of GPUs.")]
PARTS = {
    "weights": "weights (float32, adapter included)",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "casts": "bf16 copies of frozen matrices",
    "logits": "logits and their losses",
    "live_copy": "merged copy that samples and encodes",
    "cache": "keys and values of the sampling",
    "environment": "environment's matrix",
}


def show_dry_run(
    stage: Literal["sft", "grpo"], config: Path, override: list[str] | None, base: str | None, gpus: int, as_json: bool
) -> None:
    """Do the dry run and print its report."""
    from search_r3.training.planning.dry_run import dry_run

    report = dry_run(stage, config, override or [], base=base, gpus=gpus)
    if as_json:
        print_json(report)
    else:
        _print(report)


def _print(report: dict[str, Any]) -> None:
    parameters, memory, step, trial = (report[name] for name in ("parameters", "memory", "step", "trial_step"))
    print(f"{report['base']}: {parameters['total']:,} parameters, {parameters['trainable']:,} trained in addition")
    print(f"a step of {report['gpus']} GPU(s): at most {step['tokens']:,} tokens in {step['rows']:,} rows", end="")
    print(f", {step['rollouts']:,} rollouts" if step["rollouts"] else "")
    print("memory of one GPU, GB (not all in use at the same time):")
    for name, description in PARTS.items():
        if memory[name]:
            print(f"{memory[name] / 1e9:>9.2f}  {description}")
    print(f"{memory['peak'] / 1e9:>9.2f}  at the peak", end="")
    cached, uncached = memory["with_activation_checkpointing"] / 1e9, memory["without_activation_checkpointing"] / 1e9
    print(f" ({cached:.2f} with activation_checkpointing, {uncached:.2f} without)")
    if report["host"]:
        print(f"{report['host'] / 1e9:>9.2f}  in host memory, for the graph")
    print(
        f"trial: one step of {trial['layers']} random layers on {trial['device']}, {trial['rows']} rows: "
        f"{trial['seconds']:.1f} s, loss {trial['loss']:.3f}"
    )
    measured, formula = trial["measured"] / 1e9, trial["formula"] / 1e9
    print(f"       it used {measured:.2f} GB in addition to the weights; the formula gives {formula:.2f}")
    if report["tokenizer"] != "its own":
        print("       with a placeholder tokenizer of the same size: the model's own is not available offline")
    for warning in report["warnings"]:
        print(f"warning: {warning}")

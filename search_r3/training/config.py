"""Training configuration as dataclasses, and the current names of keys of earlier versions.

One recipe is one YAML file; `--set loop.steps=10` overrides a key of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from search_r3 import config
from search_r3.config import Config, at_least, require
from search_r3.hints import refuse_unknown

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
"""What `loop.report_to` can name."""
RENAMED_KEYS: dict[str, dict[str, str]] = {
    "SFTConfig": {
        "start_from": "init_adapter",
        "pairs_per_step": "global_batch_size",
        "batch_of": "batch_sampler",
        "max_analysis_tokens": "max_reasoning_tokens",
        "reasoning_share": "reasoning_ratio",
        "sample_share": "self_reasoning_ratio",
        "samples_from": "self_reasoning_start_step",
        "samples_every": "self_reasoning_refresh_steps",
        "sample_temperature": "self_reasoning_temperature",
        "memory": "cross_batch_memory_size",
        "gradient_cache": "activation_checkpointing",
        "rows_per_chunk": "mini_batch_size",
    },
    "LossWeights": {"distil": "distillation"},
    "GRPOConfig": {
        "group_size": "num_generations",
        "epochs": "num_iterations",
        "minibatches": "num_mini_batches",
        "from_rank": "min_positive_rank",
        "to_rank": "max_positive_rank",
        "rollouts_per_batch": "generation_batch_size",
        "resamples": "max_resample_rounds",
        "gauge_every": "staleness_eval_every",
        "gauge_queries": "staleness_eval_queries",
        "gauge_rows": "staleness_eval_rows",
        "samples": "num_completions_to_log",
        "samples_every": "log_completions_every",
        "gradient_cache": "activation_checkpointing",
        "rows_per_chunk": "mini_batch_size",
    },
}
"""Renamed keys: dataclass -> old name -> current name."""
SPLIT_KEYS: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "GRPOConfig": {
        "advantage": {
            "standard": {"advantage_estimator": "grpo", "scale_rewards": "group"},
            "dr_grpo": {"advantage_estimator": "grpo", "scale_rewards": "none"},
            "leave_one_out": {"advantage_estimator": "rloo", "scale_rewards": "none"},
        },
    },
    "EnvironmentConfig": {"margin": {"": {"rewards": "[{name: margin_rank, delta: MARGIN}]"}}},
}
"""Keys that were split: dataclass -> old name -> old value -> the keys and values that replace it."""


@dataclass
class LoopConfig:
    """How the training loop runs: length, optimizer, schedule, checkpoints, log."""

    steps: int = 1000
    """Optimizer steps in the whole run."""
    learning_rate: float = 3e-4
    """AdamW's peak learning rate."""
    warmup_steps: int = 10
    """Steps over which the rate rises linearly to its peak; a value of `steps` or more makes the whole run warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up, over the rest of `steps`."""
    min_lr_ratio: float = 0.1
    """The final rate as a fraction of the peak, in [0, 1]; "constant" ignores it."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, applied to every trainable parameter."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moments, each in [0, 1)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off (the norm is still logged)."""
    seed: int = 0
    """Everything random in step s is a function of (seed, s, process)."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """"auto" is bf16 where the hardware is fast at it (a GPU with bf16, a CPU with AMX or AVX-512 BF16), else no."""
    gradient_accumulation: int = 1
    """Batches whose gradients are averaged before one optimizer step."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0 writes one only at the end and when stopped."""
    keep_checkpoints: int = 2
    """Number of checkpoints kept, the newest ones, at least 1; a run resumes from the second newest if the newest is
    damaged."""
    evaluate_every: int = 100
    """Steps between evaluations on the dev set, the first before training; 0 never evaluates."""
    evaluate_first: bool = True
    """Also evaluate before the first step."""
    patience: int = 0
    """Stop after this many evaluations in a row without an improvement of the best metric; 0 never stops."""
    stop_on_collapse: bool = False
    """End a run of stage 2 early if its policy collapses: entropy, length or the spread of rewards within groups fall
    far below what they were at the start. Without it, a warning is printed. `best/` keeps the best adapter."""
    ema: float = 0.0
    """Decay of an exponential moving average of the trained weights, in [0, 1), which is evaluated and saved instead of
    them; the decay is lower at first: min(ema, (1 + step) / (10 + step)). 0: no average."""
    log_every: int = 1
    """Steps between two records in log.jsonl."""
    report_to: str | list[str] = "auto"
    """Trackers that get the figures of log.jsonl as well: tensorboard, wandb, trackio or mlflow, or a list of these;
    "auto" is TensorBoard if it is installed, "all" those that are installed, "none" none."""
    project: str = "search-r3"
    """The project in W&B and Trackio, the experiment in MLflow."""
    run_name: str | None = None
    """The run's name in its trackers; null is the name of its folder."""
    time_limit_minutes: float | None = None
    """Stop after this many minutes, with a checkpoint to resume from; the schedule is unaffected. Each start of the run
    has the whole limit."""

    def __post_init__(self) -> None:
        at_least(
            self, steps=1, warmup_steps=0, weight_decay=0, max_grad_norm=0, seed=0, gradient_accumulation=1,
            checkpoint_every=0, keep_checkpoints=1, evaluate_every=0, patience=0, log_every=1,
        )  # fmt: skip
        require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "above 0")
        schedules = ("cosine", "linear", "constant")
        require(self.schedule in schedules, "schedule", self.schedule, "one of " + ", ".join(schedules))
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "from 0 to 1")
        self.betas = (self.betas[0], self.betas[1])
        require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers from 0 to below 1")
        precisions = ("auto", "no", "bf16")
        require(self.mixed_precision in precisions, "mixed_precision", self.mixed_precision, "auto, no or bf16")
        require(
            not self.patience or self.evaluate_every > 0,
            "evaluate_every",
            self.evaluate_every,
            "1 or more where patience is above 0, as patience counts evaluations",
        )
        require(0 <= self.ema < 1, "ema", self.ema, "from 0 to below 1")
        named = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        alone = named in (["auto"], ["all"], ["none"])
        refuse_unknown(() if alone else named, TRACKERS, "report_to", "tracker")
        require(bool(self.project.strip()), "project", self.project, "a name")
        limit = self.time_limit_minutes
        require(limit is None or limit > 0, "time_limit_minutes", limit, "above 0, or null for no limit")


@dataclass
class LoraSettings:
    """The LoRA adapter that is trained on top of the frozen base (arXiv 2106.09685)."""

    rank: int = 16
    """Rank r of the update."""
    alpha: float = 32
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1); 0 keeps the first GRPO ratio at 1."""
    target_modules: str | list[str] = "all-linear"
    """PEFT's target_modules: "all-linear", a regular expression that matches full module names, or the last parts of
    names as a list (or separated by commas: q_proj,v_proj)."""

    frozen_layers: int = 0
    """Number of lowest layers whose adapter weights are not trained, nor is the embed token's row, so that no gradient
    is computed below: a third of the layers saves a sixth of a step's time. 0 trains all."""

    def __post_init__(self) -> None:
        at_least(self, rank=1, frozen_layers=0)
        require(0 < self.alpha < math.inf, "alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "from 0 to below 1")
        require(bool(self.target_modules), "target_modules", self.target_modules, '"all-linear" or module names')


def load_config(path: str | Path, cls: type[Config], overrides: Iterable[str] = ()) -> Config:
    """`search_r3.config.load_config`, with an error that gives the current name of a key from an earlier version."""
    return config.load_config(path, cls, overrides, _replaced)


def with_present_keys(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The flat settings of an older run ("section.key" -> value), renamed to the keys of `now` where those differ."""
    renamed: dict[str, Any] = {}
    for key, value in before.items():
        section, dot, name = key.rpartition(".")
        written = [{new: value} for table in RENAMED_KEYS.values() if (new := table.get(name))]
        written += [choices.get(str(value), {}) for table in SPLIT_KEYS.values() if (choices := table.get(name))]
        settings = ({f"{section}{dot}{new}": item for new, item in words.items()} for words in written)
        present = next((words for words in settings if words and words.keys() <= now.keys()), None)
        renamed |= {key: value} if key in now or present is None else present
    return renamed


def _replaced(cls: str, prefix: str, name: str, value: Any) -> str | None:
    """Advice for a key from an earlier version; None if no earlier version had that key."""
    if new := RENAMED_KEYS.get(cls, {}).get(name):
        return f'the key "{prefix}{name}" is now called {prefix}{new}; rename it'
    if choices := SPLIT_KEYS.get(cls, {}).get(name):
        words = choices.get(str(value)) or next(iter(choices.values()))
        written = ", ".join(f"{prefix}{new}: {item}" for new, item in words.items())
        return (
            f'the key "{prefix}{name}" is now split into {" and ".join(prefix + new for new in words)}; write {written}'
        )
    return None

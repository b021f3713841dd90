"""Stage 2 on a tiny model: a stage 1 adapter trained for seconds, sixteen letters to find, recipes and tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from search_r3.data.pairs import TrainingPair, write_pairs
from search_r3.training.config import LoopConfig, LoraSettings
from search_r3.training.grpo.dataset import load_rl_dataset
from search_r3.training.grpo.grpo_config import GRPOConfig, QuerySet, Source
from search_r3.training.grpo.grpo_task import GRPOTask, load_stage_one
from search_r3.training.sft.sft_task import train_sft

WORDS = [
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"),
    *("iota", "kappa", "lamda", "mu", "nu", "xi", "omicron", "pi"),
]


def some_pairs(n: int = 32) -> list[TrainingPair]:
    return [
        TrainingPair(
            id=f"p{i}",
            query=f"what is {WORDS[i % 16]} {i // 16}",
            positive=f"{WORDS[i % 16]} {i // 16} is the letter number {i}",
            negatives=(f"{WORDS[(i + 1) % 16]} is another letter {i}",),
            reasoning=f"letter {WORDS[i % 16]}" if i % 2 else "a letter",
            source="greek",
        )
        for i in range(n)
    ]


def train_stage_one(tiny_model: Path, folder: Path, steps: int = 100) -> Path:
    """An adapter whose model ends most reasoning traces by itself, and finds some letters."""
    write_pairs(folder / "pairs.jsonl", some_pairs())
    recipe = {
        "pairs": [str(folder / "pairs.jsonl")], "output": str(folder / "stage1"), "base": str(tiny_model),
        "global_batch_size": 8, "reasoning_ratio": 1.0, "dev": [], "lora": {"rank": 8},
        "weights": {"sft": 2.0, "kl": 0.0, "infonce": 0.3},
        "loop": {"steps": steps, "learning_rate": 0.03, "warmup_steps": 3, "evaluate_every": 0, "checkpoint_every": 0,
                 "mixed_precision": "no"},
    }  # fmt: skip
    (folder / "sft.yaml").write_text(json.dumps(recipe))
    return train_sft(folder / "sft.yaml")


def settings(stage_one: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A recipe's values."""
    pairs = str(stage_one.parents[1] / "pairs.jsonl")
    values: dict[str, Any] = {
        "adapter": str(stage_one),
        "queries": [{"pairs": pairs, "hold_out_modulus": 5}],
        "corpus": [{"pairs": pairs}],
        "output": str(output),
        "queries_per_step": 3,
        "num_generations": 4,
        "max_reasoning_tokens": 6,
        "dev": [],
        "staleness_eval_every": 2,
        "staleness_eval_queries": 4,
        "log_completions_every": 2,
        "num_completions_to_log": 3,
        "lora": {"rank": 3, "alpha": 6},
        "environment": {"refresh": {"budget": 12}, "candidates": 4, "k": 3, "graph_width": 4, "graph_links": 2},
        "loop": {
            "steps": 6, "learning_rate": 0.01, "warmup_steps": 1, "checkpoint_every": 2, "evaluate_every": 3,
            "mixed_precision": "no",
        },
    }  # fmt: skip
    return values | changes


def write_recipe(stage_one: Path, path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(settings(stage_one, path.parent / "run", **changes)))
    return path


def task_of(adapter: Path, output: Path, engine: Any = None, **changes: Any) -> GRPOTask:
    values = settings(adapter, output) | {"loop": LoopConfig(seed=3), "lora": LoraSettings(rank=3, alpha=6)} | changes
    values["queries"] = [QuerySet(**part) for part in values["queries"]]
    values["corpus"] = [Source(**part) for part in values["corpus"]]
    if isinstance(values["environment"], dict):
        from search_r3.environment.environment_config import EnvironmentConfig

        values["environment"] = EnvironmentConfig(**values["environment"])
    config = GRPOConfig(**values)
    checkpoint, first = load_stage_one(str(adapter))
    torch.manual_seed(config.loop.seed)
    return GRPOTask(config, checkpoint, first, load_rl_dataset(config), engine)


def optimizer_of(task: GRPOTask, rate: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad], lr=rate)


def no_backward(loss: torch.Tensor) -> None:
    """In place of the backward pass, where only a step's loss and figures matter."""

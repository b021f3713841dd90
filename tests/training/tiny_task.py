"""A tiny task for the loop's tests: a model of 50 numbers whose loss shows any slip in order or random state.

Run as a script, this file is the victim: it trains, forks and is killed away from pytest's process.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from search_r3.training import run_checkpoint as checkpoints
from search_r3.training.config import LoopConfig
from search_r3.training.distributed.sharding import end_processes
from search_r3.training.loop import run_training

Batch = dict[str, torch.Tensor]
STEPS = 12
KILLS = (("batch", 2), ("batch", 7), ("evaluate", 8), ("checkpoint", 8), ("rename", 8), ("save", STEPS))
"""Where a victim dies: (the moment, the step). Checkpoints are made after 4, 8 and 12 steps, evaluations also at 0."""


class TinyTask:
    """Fits a random teacher, with dropout and numpy noise, so that any slip in the random state shows in the loss."""

    def __init__(self, *, draws_in_evaluate: int = 0, die: tuple[str, int] | None = None, bad_step: int = -1) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))
        self.module[0].bias.requires_grad_(False)  # type: ignore[index]
        self.draws_in_evaluate, self.die, self.bad_step = draws_in_evaluate, die, bad_step
        self.steps_seen = torch.zeros(1)
        self.batches: list[int] = []
        self.stop_with: int | None = None

    def kill_at(self, moment: str, step: int) -> None:
        if self.die == (moment, step):
            os.kill(os.getpid(), signal.SIGKILL)

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        self.kill_at("batch", step)
        self.batches.append(step)
        if self.stop_with is not None and step == 5:
            os.kill(os.getpid(), self.stop_with)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 4, generator=generator)
        return {"x": x, "y": x.sum(1, keepdim=True) + (math.nan if step == self.bad_step else 0)}

    def training_step(
        self, module: nn.Module, batch: Batch, backward: Callable[[torch.Tensor], None]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        loss, figures = self.compute_loss(module, batch)
        backward(loss)
        return loss, figures

    def compute_loss(self, module: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        noise = random.random() + float(np.random.rand())
        loss = (module(batch["x"]).float() - batch["y"] - 0.01 * noise).square().mean()
        self.steps_seen += 1
        return loss, {"noise": noise, "tokens": 6.0}

    def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
        assert not module.training
        self.kill_at("evaluate", step)
        random.random()
        np.random.rand(self.draws_in_evaluate + 1)
        torch.randn(self.draws_in_evaluate + 1)
        x = torch.ones(3, 4)
        return {"accuracy": -(module(x) - x.sum(1, keepdim=True)).abs().mean().item()}

    def state_dict(self) -> dict[str, Any]:
        self.kill_at("checkpoint", int(self.steps_seen))
        return {"seen": {"tensor": self.steps_seen}, "note": ["é", 1, 0.5, None, True]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["note"] == ["é", 1, 0.5, None, True]
        self.steps_seen = state["seen"]["tensor"]

    def save(self, folder: Path) -> None:
        assert list(folder.iterdir()) == []
        if int(self.steps_seen) == STEPS:
            self.kill_at("save", STEPS)
        save_file(self.module.state_dict(), folder / "adapter.safetensors")


class HalfTask(TinyTask):
    """Each process takes its share of the batch; no dropout or noise, which differ between processes."""

    def __init__(self) -> None:
        super().__init__()
        self.module[1].p = 0.0  # type: ignore[index, assignment]

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        return {name: value.chunk(world)[rank] for name, value in super().batch(step).items()}

    def compute_loss(self, module: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        return (module(batch["x"]) - batch["y"]).square().mean(), {"tokens": float(len(batch["x"]))}


def config(**changes: Any) -> LoopConfig:
    settings: dict[str, Any] = {
        "steps": STEPS, "learning_rate": 0.02, "warmup_steps": 3, "checkpoint_every": 4, "evaluate_every": 4,
        "mixed_precision": "no",
    }  # fmt: skip
    return LoopConfig(**(settings | changes))


def train(output: Path, task: TinyTask | None = None, **changes: Any) -> Path:
    return run_training(task or TinyTask(), config(**changes), output, best_metric="accuracy")


def log(output: Path, *, timeless: bool = True) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    if timeless:
        for record in records:
            for name in ("seconds", "tokens_per_second", "memory_gib"):
                record.pop(name, None)
    return records


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in log(output) if "loss" in record]


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "adapter.safetensors"), load_file(other / "adapter.safetensors")
    return all(torch.equal(a[name], b[name]) for name in a)


def quiet_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def main_kill(folder: Path) -> None:
    import torch._dynamo  # the optimiser and the report import these on first use: once here, not in every child
    import torch.utils.tensorboard  # noqa: F401

    def child(output: Path, task: TinyTask) -> int:
        process = os.fork()
        if process == 0:
            code = 1
            try:
                if task.die and task.die[0] == "rename":  # dies with a half-written checkpoint in the scratch folder
                    real = checkpoints.save_file
                    task_step = task.die[1]

                    def half(tensors: dict, path: Path) -> None:
                        real(tensors, path)
                        if int(task.steps_seen) == task_step and path.name == "optimizer.safetensors":
                            os.kill(os.getpid(), signal.SIGKILL)

                    checkpoints.save_file = half  # type: ignore[assignment]
                train(output, task)
                code = 0
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    for moment, step in KILLS:
        output = folder / f"{moment}-{step}"
        assert child(output, TinyTask(die=(moment, step))) == -signal.SIGKILL
        (folder / f"{moment}-{step}.before").write_text(
            json.dumps([path.name for path in sorted((output / "checkpoints").glob("*"))])
        )
        with open(output / "log.jsonl", "a") as handle:
            handle.write('{"step": 99, "lo')
        assert child(output, TinyTask()) == 0


def main_ddp(folder: Path) -> None:
    try:
        train(folder, HalfTask())
    finally:
        end_processes()


if __name__ == "__main__":
    {"kill": main_kill, "ddp": main_ddp}[sys.argv[1]](Path(sys.argv[2]))

"""The moving average of the weights: its formula, where it stands in, that training never sees it, and resuming."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_task import TinyTask, config, log, losses, same_weights, train
from torch import nn

from search_r3.errors import InputError
from search_r3.training import run_checkpoint as checkpoints
from search_r3.training.loop import run_training
from search_r3.training.run_checkpoint import trainable
from search_r3.training.weight_average import WeightAverage

EMA = 0.6  # from step 13 on; before, the warm-up of the average counts: both are in a run of 20 steps
STEPS = 20


class WatchedTask(TinyTask):
    """Keeps the trainable weights that each training step and each evaluation sees."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.trained: list[dict[str, torch.Tensor]] = []
        self.evaluated: dict[int, dict[str, torch.Tensor]] = {}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in trainable(self.module).items()}

    def training_step(
        self, module: nn.Module, batch: dict[str, torch.Tensor], backward: Callable[[torch.Tensor], None]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        self.trained.append(self.weights())
        return super().training_step(module, batch, backward)

    def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
        self.evaluated[step] = self.weights()
        return super().evaluate(module, step)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, WatchedTask]:
    output, task = tmp_path_factory.mktemp("ema") / "run", WatchedTask()
    train(output, task, steps=STEPS, ema=EMA)
    return output, task


def by_the_formula(weights: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The average after each step, in float64, written out."""
    found = [{name: value.double() for name, value in weights[0].items()}]
    for step, now in enumerate(weights[1:], start=1):
        decay = min(EMA, (1 + step) / (10 + step))
        found.append({n: decay * a + (1 - decay) * now[n].double() for n, a in found[-1].items()})
    return found


def test_what_is_evaluated_and_saved_is_the_average_by_the_formula(averaged):
    output, task = averaged
    last = checkpoints.read_checkpoint(output / "checkpoints" / f"step-{STEPS:06d}").weights
    expected = by_the_formula([*task.trained, last])
    for step, found in task.evaluated.items():
        for name, value in found.items():
            torch.testing.assert_close(value.double(), expected[step][name], rtol=1e-6, atol=1e-7)
    saved = load_file(output / "adapter" / "adapter.safetensors")
    for name, value in expected[-1].items():
        torch.testing.assert_close(saved[name].double(), value, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(saved[name], last[name]) for name in last)


def test_training_is_the_same_with_and_without_an_average(averaged, tmp_path):
    train(tmp_path, steps=STEPS)
    assert losses(averaged[0]) == losses(tmp_path)
    one, other = (checkpoints.read_checkpoint(p / "checkpoints" / f"step-{STEPS:06d}") for p in (averaged[0], tmp_path))
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in other.weights)
    assert not other.average
    assert not (tmp_path / "checkpoints" / f"step-{STEPS:06d}" / "average.safetensors").exists()


def test_the_best_adapter_is_the_average_that_was_evaluated(averaged):
    output, task = averaged
    figures = {record["step"]: record["dev"]["accuracy"] for record in log(output) if "dev" in record}
    best = max(figures, key=lambda step: figures[step])
    saved = load_file(output / "best" / "adapter.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in task.evaluated[best].items())


def test_a_stopped_run_goes_on_to_the_same_average(averaged, tmp_path):
    for limit in (1e-9, 1e-9, None):
        train(tmp_path, steps=STEPS, ema=EMA, time_limit_minutes=limit)
    assert log(tmp_path) == log(averaged[0])
    for name in ("adapter", "best"):
        assert same_weights(tmp_path / name, averaged[0] / name)


def test_the_weights_are_put_back_when_an_evaluation_fails():
    module = nn.Linear(3, 2)
    average = WeightAverage(module, trainable(module), 0.5)
    with torch.no_grad():
        module.weight += 1
    before = module.weight.detach().clone()
    with average.applied():
        assert torch.equal(module.weight, average.values["weight"])
    with contextlib.suppress(RuntimeError), average.applied():
        raise RuntimeError
    assert torch.equal(module.weight, before)


def test_weights_of_bfloat16_are_averaged_in_float32():
    module = nn.Linear(1, 1, bias=False).bfloat16()
    average = WeightAverage(module, trainable(module), 0.999)
    with torch.no_grad():
        module.weight.fill_(1.0)
        average.values["weight"].fill_(1.0)
        module.weight.fill_(1.0078125)  # the next number of bfloat16
        for step in range(10_000, 10_010):
            average.update(step)
    assert average.values["weight"].item() == pytest.approx(1 + 0.0078125 * (1 - 0.999**10), rel=1e-6)


def test_another_decay_is_refused_and_a_run_of_a_version_without_the_key_goes_on(tmp_path):
    train(tmp_path, steps=4)
    with pytest.raises(InputError, match=r"started with loop\.ema = 0\.0, but now it is 0\.9"):
        train(tmp_path, steps=4, ema=0.9)
    path = tmp_path / "config.json"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"ema"' not in line))
    train(tmp_path, steps=4)
    path.unlink()
    (tmp_path / "finished.json").unlink()
    with pytest.raises(InputError, match=r"has no average of these weights; .*loop\.ema to 0"):
        train(tmp_path, steps=4, ema=0.9)


def test_a_checkpoint_whose_average_is_lost_is_damaged(tmp_path, capsys):
    train(tmp_path, steps=8, ema=EMA)
    (tmp_path / "checkpoints" / "step-000008" / "average.safetensors").unlink()
    (tmp_path / "finished.json").unlink()
    run_training(TinyTask(), config(steps=8, ema=EMA), tmp_path, best_metric="accuracy")
    assert "renamed to damaged-step-000008" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(bad):
    with pytest.raises(InputError, match=r"ema.*from 0 to below 1"):
        config(ema=bad)

"""The training loop with a tiny model: the curve, what must not disturb it, what it refuses, what it logs."""

from __future__ import annotations

import json
import random
import signal
import socket
import sys
from itertools import pairwise

import numpy as np
import pytest
import tiny_task
import torch
from processes import start
from safetensors.torch import load_file
from tiny_task import STEPS, Batch, HalfTask, TinyTask, config, log, losses, quiet_environment, train
from torch import nn

from search_r3.errors import InputError
from search_r3.training import run_checkpoint as checkpoints
from search_r3.training.config import LoopConfig
from search_r3.training.loop import run_training
from search_r3.training.precision import resolve_mixed_precision
from search_r3.training.schedule import learning_rate_at, seed_step


def test_the_curve_is_the_one_plain_adamw_gives(whole):
    task = TinyTask()
    parameters = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)
    expected = []
    task.module.train()
    for step in range(STEPS):
        seed_step(0, step, 0)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, config())
        loss, _ = task.compute_loss(task.module, task.batch(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert losses(whole) == expected
    saved = load_file(whole / "adapter" / "adapter.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in task.module.state_dict().items())


def test_evaluation_never_disturbs_training(whole, tmp_path):
    train(tmp_path / "none", evaluate_every=0)
    train(tmp_path / "every", TinyTask(draws_in_evaluate=5), evaluate_every=1)
    assert losses(tmp_path / "none") == losses(tmp_path / "every") == losses(whole)
    assert [record["step"] for record in log(tmp_path / "every") if "dev" in record] == list(range(STEPS + 1))


def test_another_seed_gives_another_curve(whole, tmp_path):
    train(tmp_path, seed=1)
    assert losses(tmp_path) != losses(whole)


def test_random_states_differ_between_steps_and_processes():
    draws = set()
    for seed, step, process in [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]:
        seed_step(seed, step, process)
        draws.add((random.random(), float(np.random.rand()), torch.rand(1).item()))
    assert len({draw[0] for draw in draws}) == len({draw[1] for draw in draws}) == len({draw[2] for draw in draws}) == 4


def test_best_is_the_adapter_with_the_greatest_dev_figure_also_over_a_stop(tmp_path):
    class Falling(TinyTask):
        def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
            return {"accuracy": {0: 0.1, 4: 0.9, 8: 0.3, 12: 0.2}[step]}

    task = Falling()
    task.stop_with = signal.SIGTERM  # in step 6
    with pytest.raises(SystemExit):
        train(tmp_path, task, keep_checkpoints=9)
    train(tmp_path, Falling(), keep_checkpoints=9)
    state = checkpoints.read_checkpoint(tmp_path / "checkpoints" / "step-000004")
    best = load_file(tmp_path / "best" / "adapter.safetensors")
    assert all(torch.equal(best[name], value) for name, value in state.weights.items())
    finished = json.loads((tmp_path / "finished.json").read_text())
    assert finished == {"step": 12, "best": 0.9, "why": "all steps are done"}


def test_an_unknown_best_metric_is_named_before_any_training(tmp_path):
    task = TinyTask()
    with pytest.raises(InputError, match="no validation metric is called ndcg; there are accuracy"):
        run_training(task, config(), tmp_path, best_metric="ndcg")
    assert task.batches == []


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    from filelock import FileLock

    with (
        FileLock(tmp_path / ".lock", is_singleton=False),
        pytest.raises(InputError, match="another process is training in"),
    ):
        train(tmp_path)


def test_a_model_with_nothing_to_train_is_refused(tmp_path):
    task = TinyTask()
    task.module.requires_grad_(False)
    with pytest.raises(InputError, match="no trainable parameter"):
        train(tmp_path, task)


def test_accumulating_two_batches_is_one_step_on_their_mean_gradient(tmp_path):
    class Plain(TinyTask):
        def __init__(self, merged: bool) -> None:
            super().__init__()
            self.module[1].p = 0.0  # type: ignore[index, assignment]
            self.merged = merged

        def batch(self, step: int) -> dict[str, torch.Tensor]:
            if not self.merged:
                return super().batch(step)
            a, b = super().batch(2 * step), super().batch(2 * step + 1)
            return {name: torch.cat([a[name], b[name]]) for name in a}

        def compute_loss(self, module: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
            return (module(batch["x"]) - batch["y"]).square().mean(), {"tokens": float(len(batch["x"])), "one": 1.0}

    task = Plain(merged=False)
    train(tmp_path / "two", task, gradient_accumulation=2)
    train(tmp_path / "one", Plain(merged=True))
    assert task.batches == list(range(2 * STEPS))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    two, one = ([record["grad_norm"] for record in log(tmp_path / name) if "loss" in record] for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-4)  # AdamW itself is blind to the gradient's scale
    first = log(tmp_path / "two")[1]
    assert (first["tokens"], first["terms"]) == (12.0, {"one": 1.0})


def test_the_log_tells_every_figure_of_a_step(whole):
    record = next(record for record in log(whole, timeless=False) if record.get("step") == 3 and "loss" in record)
    names = {"step", "loss", "terms", "lr", "grad_norm", "seconds", "tokens", "tokens_per_second", "memory_gib"}
    assert set(record) == names
    assert record["lr"] == learning_rate_at(2, config()) == 0.02
    assert record["tokens_per_second"] == pytest.approx(6 / record["seconds"])
    assert [record["step"] for record in log(whole) if "dev" in record] == [0, 4, 8, 12]


def test_log_every_thins_the_log_but_keeps_the_last_step(tmp_path):
    train(tmp_path, log_every=5, evaluate_every=0)
    assert [record["step"] for record in log(tmp_path)] == [5, 10, 12]


def test_bf16_runs_the_forward_pass_under_autocast_and_keeps_weights_in_fp32(tmp_path):
    seen = []

    class Watching(TinyTask):
        def compute_loss(self, module: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
            seen.append(module(batch["x"]).dtype)
            return super().compute_loss(module, batch)

    train(tmp_path, Watching(), steps=2, mixed_precision="bf16")
    assert set(seen) == {torch.bfloat16}
    assert load_file(tmp_path / "adapter" / "adapter.safetensors")["0.weight"].dtype == torch.float32
    assert resolve_mixed_precision("no", torch.device("cpu")) == "no"
    assert resolve_mixed_precision("auto", torch.device("cpu")) in ("no", "bf16")
    assert resolve_mixed_precision("auto", torch.device("meta")) == "no"


def test_the_schedule_rises_to_the_peak_and_falls_to_its_floor():
    cosine = LoopConfig(steps=110, warmup_steps=10, learning_rate=1.0, min_lr_ratio=0.1)
    rates = [learning_rate_at(step, cosine) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[10:]))
    linear = LoopConfig(steps=110, warmup_steps=10, learning_rate=1.0, min_lr_ratio=0.0, schedule="linear")
    assert [learning_rate_at(step, linear) for step in (10, 35, 60, 110)] == pytest.approx([1.0, 0.75, 0.5, 0.0])
    constant = LoopConfig(steps=110, warmup_steps=0, learning_rate=2.0, schedule="constant")
    assert {learning_rate_at(step, constant) for step in range(110)} == {2.0}
    assert learning_rate_at(4, LoopConfig(steps=5, warmup_steps=10, learning_rate=1.0)) == 0.5


@pytest.mark.parametrize("peer", ["cosine", "linear"])
def test_the_schedule_is_the_fields_own(peer):
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    make = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}[peer]
    ours = LoopConfig(steps=30, warmup_steps=5, learning_rate=0.3, min_lr_ratio=0.0, schedule=peer)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = make(optimizer, 5, 30)
    for step in range(30):
        if step >= 5:  # transformers starts its warm-up at a rate of 0, we at peak / warmup
            assert learning_rate_at(step, ours) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


@pytest.mark.slow
def test_two_processes_train_as_one_with_their_batches_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, tiny_task.__file__, "ddp", tmp_path / "two"]
    environment = quiet_environment() | group
    with (
        start(command, env=environment | {"RANK": "0", "LOCAL_RANK": "0"}) as first,
        start(command, env=environment | {"RANK": "1", "LOCAL_RANK": "1"}) as second,
    ):
        train(tmp_path / "one", HalfTask())
        assert [process.wait(100) for process in (first, second)] == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert all(record["tokens"] == 6.0 for record in log(tmp_path / "two") if "tokens" in record)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2


class Constant(TinyTask):
    """The loss does not depend on the weights, but for the steps in `useful` (1-based)."""

    useful: tuple[int, ...] = ()

    def compute_loss(self, module: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        loss, figures = super().compute_loss(module, batch)
        return (loss if int(self.steps_seen) in self.useful else 0.0 * loss), figures


def test_a_run_that_learned_nothing_says_so_while_it_runs_and_does_not_end_as_a_success(tmp_path, capsys):
    with pytest.raises(InputError, match="nothing was learned: the gradient is 0"):
        train(tmp_path, Constant())
    shown = capsys.readouterr().err
    assert "warning: step 10: the last 10 steps had nothing to learn from: the gradient is 0" in shown
    assert (tmp_path / "adapter").is_dir()  # nothing is lost: it is the adapter that the run began with
    with pytest.raises(InputError, match="nothing was learned"):  # nor does the same command succeed later
        train(tmp_path, Constant())


def test_a_short_run_that_learned_nothing_warns_at_its_last_step(tmp_path, capsys):
    with pytest.raises(InputError, match="nothing was learned"):
        run_training(Constant(), config(steps=2), tmp_path)
    assert "warning: step 2: the last 2 steps had nothing to learn from" in capsys.readouterr().err


def test_one_step_with_a_gradient_is_enough_also_over_a_stop(tmp_path):
    task = Constant()
    task.useful, task.stop_with = (3,), signal.SIGTERM  # stopped in step 6
    with pytest.raises(SystemExit):
        train(tmp_path, task)
    assert train(tmp_path, Constant()) == tmp_path / "adapter"

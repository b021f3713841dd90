"""The training loop with a tiny model: what matters is that a run killed anywhere ends as if it never had been.

Run as a script, this file is the victim: `python test_loop.py` trains, forks and kills, away from pytest's process.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from search_r3.errors import InputError
from search_r3.training import checkpoint as checkpoints
from search_r3.training.config import LoopConfig
from search_r3.training.loop import learning_rate_at, resolve_mixed_precision, run_training, seed_step

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

    def loss(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
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
            for name in ("seconds", "tokens_per_second"):
                record.pop(name, None)
    return records


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in log(output) if "loss" in record]


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "adapter.safetensors"), load_file(other / "adapter.safetensors")
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never killed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train(output) == output / "adapter"
    return output


def quiet_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


# --- killed and resumed


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a kill, each killed with SIGKILL in a forked process and then run again."""
    folder = tmp_path_factory.mktemp("victims")
    subprocess.run(
        [sys.executable, __file__, "kill", str(folder)], check=True, env=quiet_environment(), capture_output=True
    )
    return folder


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


@pytest.mark.parametrize(("moment", "step"), KILLS)
def test_a_killed_run_goes_on_to_the_same_log_weights_and_best(victims, whole, moment, step):
    output = victims / f"{moment}-{step}"
    assert log(output) == log(whole)
    assert same_weights(output / "adapter", whole / "adapter")
    assert same_weights(output / "best", whole / "best")
    assert [path.name for path in sorted((output / "checkpoints").iterdir())] == ["step-000008", "step-000012"]
    assert (output / "finished.json").read_text() == (whole / "finished.json").read_text()


def test_a_half_written_checkpoint_is_never_taken_for_one(victims):
    before = json.loads((victims / "rename-8.before").read_text())
    assert "step-000004" in before
    assert "step-000008" not in before
    assert any(name.startswith(".step-000008") for name in before)


def test_the_curve_is_the_one_plain_adamw_gives(whole):
    task = TinyTask()
    parameters = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)
    expected = []
    task.module.train()
    for step in range(STEPS):
        seed_step(0, step, 0)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, config())
        loss, _ = task.loss(task.module, task.batch(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert losses(whole) == expected
    saved = load_file(whole / "adapter" / "adapter.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in task.module.state_dict().items())


def test_running_a_finished_run_again_trains_nothing(whole):
    task, before = TinyTask(), (whole / "log.jsonl").read_bytes()
    assert train(whole, task) == whole / "adapter"
    assert task.batches == []
    assert (whole / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_finishes_the_step_and_says_how_to_go_on(whole, tmp_path, capsys, number):
    task, before = TinyTask(), signal.getsignal(number)
    task.stop_with = number
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, task)
    assert stopped.value.code == 128 + number
    assert f"stopped by {number.name} after step 6 of 12" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    assert (tmp_path / "checkpoints" / "step-000006").is_dir()
    train(tmp_path)
    assert log(tmp_path) == log(whole)
    assert same_weights(tmp_path / "adapter", whole / "adapter")


def test_a_time_limit_stops_early_with_an_adapter_and_the_schedule_of_the_whole_run(whole, tmp_path, capsys):
    assert train(tmp_path, time_limit_minutes=1e-9) == tmp_path / "adapter"
    assert "time limit is over after step 1 of 12" in capsys.readouterr().err
    assert (tmp_path / "adapter" / "adapter.safetensors").exists()
    assert not (tmp_path / "finished.json").exists()
    train(tmp_path)
    assert log(tmp_path) == log(whole)


# --- checkpoints


def test_checkpoints_hold_trainable_parameters_only_and_no_pickle(whole):
    folder = whole / "checkpoints" / "step-000012"
    assert sorted(load_file(folder / "weights.safetensors")) == ["0.weight", "3.bias", "3.weight"]
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_old_checkpoints_go_only_after_the_new_one_stands(tmp_path, monkeypatch):
    train(tmp_path, steps=8)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    state = checkpoints.read_checkpoint(tmp_path / "checkpoints" / "step-000008")
    state.step = 9
    monkeypatch.setattr(checkpoints, "save_file", full_disk)
    with pytest.raises(InputError, match="the disk is full"):
        checkpoints.write_checkpoint(tmp_path, state, keep=1)
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [4, 8]
    monkeypatch.undo()
    checkpoints.write_checkpoint(tmp_path, state, keep=1)
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [9]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(whole, tmp_path, capsys):
    with pytest.raises(InputError):
        train(tmp_path, TinyTask(bad_step=10))
    weights = tmp_path / "checkpoints" / "step-000008" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    train(tmp_path)
    assert "set aside as damaged-step-000008" in capsys.readouterr().err
    assert log(tmp_path) == log(whole)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path):
    train(tmp_path, steps=4)
    (tmp_path / "checkpoints" / "step-000004" / "state.json").write_text("{")
    with pytest.raises(InputError, match="none of the 1 checkpoints"):
        train(tmp_path, steps=4)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(tmp_path, steps=4, evaluate_every=0)
    (tmp_path / "finished.json").unlink()
    task = TinyTask()
    task.module = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 1))
    with pytest.raises(InputError, match="does not fit this model"):
        train(tmp_path, task, steps=4, evaluate_every=0)


@pytest.mark.parametrize("value", [object(), {1: 2}, math.nan])
def test_a_task_state_that_json_would_change_is_refused(value):
    with pytest.raises(TypeError):
        checkpoints._pack({"value": value}, {})


# --- what must not disturb it


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


def test_best_is_the_adapter_with_the_greatest_dev_figure(tmp_path):
    class Rising(TinyTask):
        def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
            return {"accuracy": {0: 0.1, 4: 0.9, 8: 0.3, 12: 0.2}[step]}

    train(tmp_path, Rising(), keep_checkpoints=9)
    state = checkpoints.read_checkpoint(tmp_path / "checkpoints" / "step-000004")
    best = load_file(tmp_path / "best" / "adapter.safetensors")
    assert all(torch.equal(best[name], value) for name, value in state.weights.items())
    assert json.loads((tmp_path / "finished.json").read_text()) == {"step": 12, "best": 0.9}


def test_an_unknown_best_metric_is_named_before_any_training(tmp_path):
    task = TinyTask()
    with pytest.raises(InputError, match="no dev figure is called ndcg; there are accuracy"):
        run_training(task, config(), tmp_path, best_metric="ndcg")
    assert task.batches == []


# --- refusals


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(whole, tmp_path, bad):
    task = TinyTask(bad_step=6 if bad == "loss" else -1)
    if bad == "gradient":
        plain = task.loss

        def loss(module: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
            value, metrics = plain(module, batch)
            zero = module[0].weight.sum() * 0  # type: ignore[index]
            return value + (zero.abs().sqrt() if int(task.steps_seen) == 7 else 0), metrics  # d sqrt(0) = inf * 0

        task.loss = loss  # type: ignore[method-assign]
    with pytest.raises(InputError, match=f"the {bad}.* is nan at step 7; .*learning_rate"):
        train(tmp_path, task)
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [4]
    train(tmp_path)
    assert log(tmp_path) == log(whole)


def test_resuming_with_another_configuration_is_refused_by_key(whole, tmp_path):
    def start(describe: dict[str, Any], **changes: Any) -> None:
        run_training(TinyTask(), config(**changes), tmp_path, describe=describe)

    start({"data": {"pairs": "a.jsonl"}}, steps=4)
    with pytest.raises(InputError, match=r"begun with data\.pairs = 'a.jsonl', but now it is 'b.jsonl'"):
        start({"data": {"pairs": "b.jsonl"}}, steps=4)
    with pytest.raises(InputError, match=r"begun with loop\.learning_rate = 0\.02, but now it is 0.1"):
        start({"data": {"pairs": "a.jsonl"}}, steps=4, learning_rate=0.1)
    with pytest.raises(InputError, match=r"begun with loop\.steps = 4"):
        start({"data": {"pairs": "a.jsonl"}}, steps=8)
    start({"data": {"pairs": "a.jsonl"}}, steps=4, checkpoint_every=1, log_every=2, time_limit_minutes=9.0)


def test_a_constant_schedule_may_be_prolonged(tmp_path):
    train(tmp_path / "two", steps=5, schedule="constant")
    train(tmp_path / "two", steps=9, schedule="constant")
    train(tmp_path / "one", steps=9, schedule="constant")
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    assert same_weights(tmp_path / "two" / "adapter", tmp_path / "one" / "adapter")


def test_starting_over_removes_the_old_run_and_nothing_else(tmp_path):
    train(tmp_path, seed=1)
    (tmp_path / "mine.txt").write_text("keep")
    run_training(TinyTask(), config(steps=3), tmp_path, resume=False)
    assert [record["step"] for record in log(tmp_path) if "loss" in record] == [1, 2, 3]
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [3]
    assert not (tmp_path / "best").exists()
    assert (tmp_path / "mine.txt").exists()


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


# --- accumulation, precision, schedule, log


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

        def loss(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            return (module(batch["x"]) - batch["y"]).square().mean(), {"tokens": float(len(batch["x"])), "one": 1.0}

    task = Plain(merged=False)
    train(tmp_path / "two", task, gradient_accumulation=2)
    train(tmp_path / "one", Plain(merged=True))
    assert task.batches == list(range(2 * STEPS))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    first = log(tmp_path / "two")[1]
    assert (first["tokens"], first["terms"]) == (12.0, {"one": 1.0})


def test_the_log_tells_every_figure_of_a_step(whole):
    record = next(record for record in log(whole, timeless=False) if record.get("step") == 3 and "loss" in record)
    assert set(record) == {"step", "loss", "terms", "lr", "grad_norm", "seconds", "tokens", "tokens_per_second"}
    assert record["lr"] == learning_rate_at(2, config()) == 0.02
    assert record["tokens_per_second"] == pytest.approx(6 / record["seconds"])
    assert [record["step"] for record in log(whole) if "dev" in record] == [0, 4, 8, 12]


def test_log_every_thins_the_log_but_keeps_the_last_step(tmp_path):
    train(tmp_path, log_every=5, evaluate_every=0)
    assert [record["step"] for record in log(tmp_path)] == [5, 10, 12]


def test_bf16_runs_the_forward_pass_under_autocast_and_keeps_weights_in_fp32(tmp_path):
    seen = []

    class Watching(TinyTask):
        def loss(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            seen.append(module(batch["x"]).dtype)
            return super().loss(module, batch)

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


# --- several processes


class HalfTask(TinyTask):
    """Each process takes its share of the batch; no dropout or noise, which differ between processes."""

    def __init__(self) -> None:
        super().__init__()
        self.module[1].p = 0.0  # type: ignore[index, assignment]

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        return {name: value.chunk(world)[rank] for name, value in super().batch(step).items()}

    def loss(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return (module(batch["x"]) - batch["y"]).square().mean(), {"tokens": float(len(batch["x"]))}


def main_ddp(folder: Path) -> None:
    train(folder, HalfTask())


def test_two_processes_train_as_one_with_their_batches_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "ddp", str(tmp_path / "two")],
            env=quiet_environment() | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    train(tmp_path / "one", HalfTask())
    for process in processes:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors.decode()[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert all(record["tokens"] == 6.0 for record in log(tmp_path / "two") if "tokens" in record)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2


if __name__ == "__main__":
    {"kill": main_kill, "ddp": main_ddp}[sys.argv[1]](Path(sys.argv[2]))

"""A run that is killed or stopped anywhere, and started again, ends as if nothing had happened."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
from processes import run
from tiny_task import KILLS, TinyTask, config, log, losses, quiet_environment, same_weights, train
from torch import nn

from search_r3.errors import InputError
from search_r3.training import run_checkpoint as checkpoints
from search_r3.training.loop import run_training


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a kill, each killed with SIGKILL in a forked process and then run again."""
    folder = tmp_path_factory.mktemp("victims")
    run([sys.executable, tiny_task.__file__, "kill", folder], env=quiet_environment())
    return folder


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
    assert "time limit is reached after step 1 of 12" in capsys.readouterr().err
    assert (tmp_path / "adapter" / "adapter.safetensors").exists()
    assert not (tmp_path / "finished.json").exists()
    train(tmp_path)
    assert log(tmp_path) == log(whole)


def test_resuming_with_another_configuration_is_refused_by_key(whole, tmp_path):
    def start(describe: dict[str, Any], **changes: Any) -> None:
        run_training(TinyTask(), config(**changes), tmp_path, describe=describe)

    start({"data": {"pairs": "a.jsonl"}}, steps=4)
    with pytest.raises(InputError, match=r"started with data\.pairs = 'a.jsonl', but now it is 'b.jsonl'"):
        start({"data": {"pairs": "b.jsonl"}}, steps=4)
    with pytest.raises(InputError, match=r"started with loop\.learning_rate = 0\.02, but now it is 0.1"):
        start({"data": {"pairs": "a.jsonl"}}, steps=4, learning_rate=0.1)
    with pytest.raises(InputError, match=r"started with loop\.steps = 4"):
        start({"data": {"pairs": "a.jsonl"}}, steps=8)
    start({"data": {"pairs": "a.jsonl"}}, steps=4, checkpoint_every=1, log_every=2, time_limit_minutes=9.0)


def test_a_run_that_was_begun_before_a_key_existed_had_its_default(tmp_path):
    def start(describe: dict[str, Any]) -> None:
        run_training(
            TinyTask(), config(steps=4), tmp_path, describe=describe, defaults={"loss": "infonce", "w": {"a": 0}}
        )

    start({"data": "a.jsonl"})
    written = json.loads((tmp_path / "config.json").read_text())
    del written["loop"]["ema"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match=r"started with loss = 'infonce', but now it is 'lambda'"):
        start({"data": "a.jsonl", "loss": "lambda", "w": {"a": 0}})
    with pytest.raises(InputError, match=r"started with w\.a = 0, but now it is 1"):
        start({"data": "a.jsonl", "loss": "infonce", "w": {"a": 1}})
    start({"data": "a.jsonl", "loss": "infonce", "w": {"a": 0}})


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


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(whole, tmp_path, bad):
    task = TinyTask(bad_step=6 if bad == "loss" else -1)
    if bad == "gradient":
        plain = task.compute_loss

        def loss(module: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
            value, metrics = plain(module, batch)
            zero = module[0].weight.sum() * 0  # type: ignore[index]
            return value + (zero.abs().sqrt() if int(task.steps_seen) == 7 else 0), metrics  # d sqrt(0) = inf * 0

        task.compute_loss = loss  # type: ignore[method-assign]
    with pytest.raises(InputError, match=f"the {bad}.* is nan at step 7; .*learning_rate"):
        train(tmp_path, task)
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [4]
    train(tmp_path)
    assert log(tmp_path) == log(whole)

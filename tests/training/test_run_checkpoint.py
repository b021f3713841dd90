"""Checkpoints: what is in them, when old ones go, and what happens when one is damaged or does not fit."""

from __future__ import annotations

import json
import math

import pytest
from safetensors.torch import load_file
from tiny_task import TinyTask, log, train
from torch import nn

from search_r3.errors import InputError
from search_r3.training import run_checkpoint as checkpoints


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
    assert "renamed to damaged-step-000008" in capsys.readouterr().err
    assert log(tmp_path) == log(whole)


def test_a_checkpoint_of_format_1_is_read_under_the_present_names(tmp_path):
    train(tmp_path, steps=8)
    path = tmp_path / "checkpoints" / "step-000008"
    now = checkpoints.read_checkpoint(path)
    facts = json.loads((path / "state.json").read_text())
    task = facts.pop("task")
    facts |= {"format": 1, "fruitless": 3, "task": task | {"own": {"block": 2}, "memory": {}}}
    del facts["evals_without_improvement"]
    (path / "state.json").write_text(json.dumps(facts))
    before = checkpoints.read_checkpoint(path)
    assert before.evals_without_improvement == 3
    assert before.task == now.task | {"self_reasoning": {"block": 2}, "cross_batch_memory": {}}
    (path / "state.json").write_text(json.dumps(facts | {"format": 3}))
    with pytest.raises(InputError, match="has format 3, this version reads 2; update search-r3"):
        checkpoints.read_checkpoint(path)


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

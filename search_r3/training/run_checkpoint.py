"""A training run's state on disk: what a killed run needs to resume exactly as if it had not been killed.

Each checkpoint is a folder that is written under a temporary name and then renamed. Trainable weights and AdamW's
moments are in safetensors, the rest is JSON, so that loading never runs code (no pickle). Random states are
deliberately absent: see `schedule.seed_step`.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from search_r3.errors import InputError
from search_r3.files import atomic_path
from search_r3.training.distributed.sharding import copy_into, full_tensor, shard_like

FORMAT = 2
_TENSOR = "__tensor__"  # stands for a tensor in the JSON of the task's state
TASK_KEYS_1 = {"own": "self_reasoning", "memory": "cross_batch_memory"}
"""Keys of a task's state that were renamed since format 1: old -> new."""


@dataclass
class TrainingState:
    """The state of a run after `step` finished steps."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """`parameter name/moment name` -> tensor"""
    task: dict[str, Any]
    best: float | None
    """The best validation metric so far, if the run keeps a best adapter."""
    evals_without_improvement: int = 0
    """Number of evaluations since the best one. Like `best`, it excludes the evaluation at `step`, which a resumed run
    repeats."""
    learned: bool = True
    """Whether any step so far had something to learn from (see `learning_signal`)."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """The moving average of the weights (see `weight_average`); {} if the run keeps none."""


def write_checkpoint(output: Path, state: TrainingState, keep: int) -> Path:
    """Write the checkpoint `output/checkpoints/step-NNNNNN`; when it is complete, remove all but the newest `keep`.

    Raises:
        InputError: the disk is full or not writable; older checkpoints are untouched.
        TypeError: the task's state contains something that is neither JSON nor a tensor.
    """
    target = _folder(output) / f"step-{state.step:06d}"
    tensors: dict[str, Tensor] = {}
    record = {"format": FORMAT, "step": state.step, "best": state.best}
    record |= {"evals_without_improvement": state.evals_without_improvement, "learned": state.learned}
    record |= {"averaged": True} if state.average else {}
    record["task"] = _pack(state.task, tensors)
    text = json.dumps(record, indent=1)
    with atomic_path(target) as scratch:
        scratch.mkdir()
        save_file(state.weights, scratch / "weights.safetensors")
        save_file(state.optimizer, scratch / "optimizer.safetensors")
        save_file(tensors, scratch / "task.safetensors")
        if state.average:
            save_file(state.average, scratch / "average.safetensors")
        (scratch / "state.json").write_text(text, encoding="utf-8")
    for _, path in list_checkpoints(output)[:-keep]:
        gone = path.with_name(f".{path.name}.old")  # renamed first, so that a kill leaves no incomplete checkpoint
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    return target


def read_checkpoint(path: Path) -> TrainingState:
    """Read a checkpoint into CPU tensors.

    Raises:
        InputError: a file is missing or damaged, or was written by a newer version.
    """
    try:
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
        weights = load_file(path / "weights.safetensors")
        optimizer = load_file(path / "optimizer.safetensors")
        task = _unpack(record["task"], load_file(path / "task.safetensors"))
        average = load_file(path / "average.safetensors") if record.get("averaged") else {}
        version, step, best = record["format"], record["step"], record["best"]
        if version == 1:
            record, task = _from_format_1(record, task)
        evals, learned = record.get("evals_without_improvement", 0), record.get("learned", True)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the checkpoint {path} cannot be read ({type(error).__name__}: {error})") from error
    if version not in (1, FORMAT):
        raise InputError(f"the checkpoint {path} has format {version}, this version reads {FORMAT}; update search-r3")
    return TrainingState(step, weights, optimizer, task, best, evals, learned, average)


def newest_checkpoint(output: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest readable checkpoint, or None.

    Damaged checkpoints are renamed with a warning; leftovers of crashes are removed.

    Raises:
        InputError: there are checkpoints, but none can be read.
    """
    checkpoints = list_checkpoints(output)
    for leftover in _folder(output).glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for _, path in reversed(checkpoints):
        try:
            read_checkpoint(path)
        except InputError as error:
            renamed = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            path.rename(renamed)
            warn(f"{error}; it was renamed to {renamed.name}")
        else:
            return path
    if checkpoints:
        raise InputError(
            f"none of the {len(checkpoints)} checkpoints in {_folder(output)} can be read; "
            "choose another output folder, or start over without resuming"
        )
    return None


def read_finished(output: Path) -> dict[str, Any]:
    """The content of the run's `finished.json`; {} if the run is not finished."""
    path = output / "finished.json"
    if not (path.exists() and (output / "adapter").is_dir()):
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def list_checkpoints(output: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint, oldest first; damaged and partly written ones are left out."""
    checkpoints = []
    for path in _folder(output).glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            checkpoints.append((int(match[1]), path))
    return sorted(checkpoints)


def collect(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Unsharded CPU copies of the trainable weights and of the optimizer's moments, by parameter name.

    A collective if the model is sharded.
    """
    weights, moments = {}, {}
    for name, parameter in parameters.items():
        weights[name] = full_tensor(parameter.detach()).to("cpu", copy=True).contiguous()
        for moment, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}/{moment}"] = full_tensor(value).detach().to("cpu", copy=True).contiguous()
    return weights, moments


def restore(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
    """Restore weights and moments bit for bit; in a sharded model, each process restores its shard.

    Raises:
        InputError: the checkpoint's parameters differ from the model's (another adapter rank, another base model).
    """
    mismatch = sorted(set(parameters) ^ set(state.weights)) or [
        name for name, parameter in parameters.items() if parameter.shape != state.weights[name].shape
    ]
    if mismatch:
        raise InputError(
            f"the checkpoint of step {state.step} does not fit this model ({mismatch[0]} and {len(mismatch) - 1} other "
            "parameters differ); use the model and adapter settings of that run, or another output folder"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            copy_into(parameter, state.weights[name])
    for key, value in state.optimizer.items():
        name, moment = key.rsplit("/", 1)
        parameter = parameters[name]
        # AdamW keeps its step count on the CPU, and its moments where the parameter is.
        optimizer.state[parameter][moment] = (
            value.to("cpu", copy=True) if moment == "step" else shard_like(value, parameter)
        )


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _from_format_1(record: dict[str, Any], task: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record and the task's state of format 1 with today's names."""
    record = record | {"evals_without_improvement": record.get("fruitless", 0)}
    return record, {TASK_KEYS_1.get(key, key): value for key, value in task.items()}


def _folder(output: Path) -> Path:
    return output / "checkpoints"


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: key}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"a task's state needs text as keys, got {key!r}: JSON would change it")
        return {key: _pack(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(item, tensors) for item in value]
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise TypeError(f"a task's state may contain tensors, finite numbers, text, lists and dicts, got {value!r}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _unpack(item, tensors) for key, item in value.items()}
    return [_unpack(item, tensors) for item in value] if isinstance(value, list) else value

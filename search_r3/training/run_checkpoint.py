"""A training run's state on disk: what a killed run needs to resume exactly as if it had not been killed.

One folder per checkpoint, written under another name and renamed: trainable weights and AdamW's moments in
safetensors, the rest in JSON, so loading one never runs code (no pickle). Random states are absent on purpose: see
`schedule.seed_step`.
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
_TENSOR = "__tensor__"  # marks the place of a tensor in the JSON of the task's state
TASK_KEYS_1 = {"own": "self_reasoning", "memory": "cross_batch_memory"}
"""Parts of a task's state by their names in format 1 and now."""


@dataclass
class TrainingState:
    """Everything after `step` finished steps."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """`parameter name/moment name` -> tensor"""
    task: dict[str, Any]
    best: float | None
    """The best validation figure so far, if the run keeps a best adapter."""
    evals_without_improvement: int = 0
    """Evaluations in a row without a better one. Like `best`, without the evaluation at `step`, which a resumed run
    repeats."""
    learned: bool = True
    """Whether any step so far had something to learn from (see `learning_signal`)."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """The moving average of the weights (see `weight_average`); {} if the run keeps none."""


def write_checkpoint(output: Path, state: TrainingState, keep: int) -> Path:
    """Write `output/checkpoints/step-000100`, and only once it is complete, remove all but the newest `keep`.

    Raises:
        InputError: the disk is full or not writable; the older checkpoints are untouched.
        TypeError: the task's state holds something that is neither JSON nor a tensor.
    """
    target = _folder(output) / f"step-{state.step:06d}"
    tensors: dict[str, Tensor] = {}
    facts = {"format": FORMAT, "step": state.step, "best": state.best}
    facts |= {"evals_without_improvement": state.evals_without_improvement, "learned": state.learned}
    facts |= {"averaged": True} if state.average else {}
    facts["task"] = _pack(state.task, tensors)
    text = json.dumps(facts, indent=1)
    with atomic_path(target) as scratch:
        scratch.mkdir()
        save_file(state.weights, scratch / "weights.safetensors")
        save_file(state.optimizer, scratch / "optimizer.safetensors")
        save_file(tensors, scratch / "task.safetensors")
        if state.average:
            save_file(state.average, scratch / "average.safetensors")
        (scratch / "state.json").write_text(text, encoding="utf-8")
    for _, path in list_checkpoints(output)[:-keep]:
        gone = path.with_name(f".{path.name}.old")  # renamed first: a kill then leaves no incomplete one under its name
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    return target


def read_checkpoint(path: Path) -> TrainingState:
    """Read one checkpoint to CPU tensors.

    Raises:
        InputError: a file is missing or damaged, or a newer version wrote it.
    """
    try:
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
        weights = load_file(path / "weights.safetensors")
        optimizer = load_file(path / "optimizer.safetensors")
        task = _unpack(facts["task"], load_file(path / "task.safetensors"))
        average = load_file(path / "average.safetensors") if facts.get("averaged") else {}
        version, step, best = facts["format"], facts["step"], facts["best"]
        if version == 1:
            facts, task = _from_format_1(facts, task)
        evals, learned = facts.get("evals_without_improvement", 0), facts.get("learned", True)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the checkpoint {path} cannot be read ({type(error).__name__}: {error})") from error
    if version not in (1, FORMAT):
        raise InputError(f"the checkpoint {path} has format {version}, this version reads {FORMAT}; update search-r3")
    return TrainingState(step, weights, optimizer, task, best, evals, learned, average)


def newest_checkpoint(output: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that can be read; damaged ones are renamed with a warning, leftovers of crashes removed.

    Raises:
        InputError: there are checkpoints, but none can be read.
    """
    found = list_checkpoints(output)
    for leftover in _folder(output).glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for _, path in reversed(found):
        try:
            read_checkpoint(path)
        except InputError as error:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            warn(f"{error}; it is renamed to {aside.name}")
        else:
            return path
    if found:
        raise InputError(
            f"none of the {len(found)} checkpoints in {_folder(output)} can be read; choose another output folder, "
            "or start over without resuming"
        )
    return None


def read_finished(output: Path) -> dict[str, Any]:
    """The content of the run's `finished.json`; {} if the run is not finished."""
    path = output / "finished.json"
    if not (path.exists() and (output / "adapter").is_dir()):
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def list_checkpoints(output: Path) -> list[tuple[int, Path]]:
    """(step, folder), oldest first, without scratch folders of a killed write and damaged checkpoints."""
    found = []
    for path in _folder(output).glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def collect(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies on the CPU of the trainable weights and of the optimizer's moments, by parameter name.

    Unsharded; for a sharded model this is a collective.
    """
    weights, moments = {}, {}
    for name, parameter in parameters.items():
        weights[name] = full_tensor(parameter.detach()).to("cpu", copy=True).contiguous()
        for moment, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}/{moment}"] = full_tensor(value).detach().to("cpu", copy=True).contiguous()
    return weights, moments


def restore(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
    """Restore weights and moments, bit for bit; of a sharded model, each process its shard.

    Raises:
        InputError: the checkpoint has other parameters (another adapter rank, another base model).
    """
    mismatch = sorted(set(parameters) ^ set(state.weights)) or [
        name for name, parameter in parameters.items() if parameter.shape != state.weights[name].shape
    ]
    if mismatch:
        raise InputError(
            f"the checkpoint of step {state.step} does not fit this model ({mismatch[0]} and {len(mismatch) - 1} other "
            "parameters differ); use the model and adapter settings it was trained with, or another output folder"
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


def _from_format_1(facts: dict[str, Any], task: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The present names of what an earlier version wrote."""
    facts = facts | {"evals_without_improvement": facts.get("fruitless", 0)}
    return facts, {TASK_KEYS_1.get(key, key): value for key, value in task.items()}


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
    raise TypeError(f"a task's state holds tensors, finite numbers, text, lists and dicts, got {value!r}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _unpack(item, tensors) for key, item in value.items()}
    return [_unpack(item, tensors) for item in value] if isinstance(value, list) else value

"""The one training loop: a task says what a batch and its loss are, the loop does all the rest on accelerate.

It leaves out on purpose: callbacks, data loaders (a task's batch is a function of the step), gradient scalers (bf16
needs none) and DeepSpeed. Over several processes it trains with DDP, or with FSDP2 where the launcher asks for it.

A run that is killed at any moment and started again with the same command goes on from its last checkpoint and writes
the same log as a run that was never killed, because nothing depends on what happened before but the checkpoint:
batches and random states are functions of (seed, step, process). The same to the last bit wherever torch's kernels
are deterministic, as they are on a CPU.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from filelock import FileLock, Timeout
from torch import Tensor, nn

from search_r3.errors import InputError
from search_r3.files import atomic_path, atomic_write_text, remove_leftovers
from search_r3.training.config import LoopConfig, to_dict, with_present_keys
from search_r3.training.distributed.sharding import settings_of, shard, start_processes, whole
from search_r3.training.grpo.learning_signal import LearningSignal
from search_r3.training.run_checkpoint import (
    TrainingState,
    collect,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    read_finished,
    restore,
    trainable,
    write_checkpoint,
)
from search_r3.training.training_log import Report, truncate_log

FREE_KEYS = frozenset(
    f"loop.{name}"
    for name in (
        *("checkpoint_every", "keep_checkpoints", "evaluate_every", "evaluate_first", "log_every"),
        *("patience", "time_limit_minutes"),
    )
) | {"trained_on"}
"""What may change between two starts of one run: none of it alters a weight (what was trained on has its own hash)."""


class Task(Protocol):
    """What is trained."""

    module: nn.Module
    """Its trainable parameters are optimised. The loop moves it to the process's device."""

    def batch(self, step: int) -> Any:
        """The batch number `step`, or this process's part of it: a pure function of (seed, step, rank).

        With gradient accumulation, the numbers count micro-batches. Tensors in it are moved to the device.
        """

    def loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """The scalar to minimise and figures to log, the same keys at every step and on every process.

        `module` is the wrapped module: run the forward pass through it. bf16 autocast is on if configured.
        A figure called "tokens" is summed (and gives tokens per second); the others are averaged.
        """

    def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
        """Dev figures after `step` steps, or {}. `module` is the bare module, in eval mode, under no_grad.

        Every process calls it, with the same random state; the main process's figures count.
        """

    def state_dict(self) -> dict[str, Any]:
        """What the task needs beyond the weights to go on: tensors and JSON values; {} if nothing.

        Every process calls it; the main process's is kept.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def save(self, folder: Path) -> None:
        """Write the trained adapter into `folder`, which exists and is empty. Only the main process calls it.

        Where the module has a `whole_model`, every process has called that, and its weights are up to date.
        """


def learning_rate_at(step: int, config: LoopConfig) -> float:
    """The rate of the optimiser step with 0-based index `step`.

    A linear warm-up that reaches the peak at its last step; then, with x in [0, 1) the share of the rest that is done,
    peak * (m + (1 - m) * fall(x)), where m = min_lr_ratio and fall is (1 + cos(pi x)) / 2, 1 - x, or constantly 1.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    fall = {"cosine": (1 + math.cos(math.pi * share)) / 2, "linear": 1 - share, "constant": 1.0}[config.schedule]
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fall)


def resolve_mixed_precision(setting: str, device: torch.device) -> str:
    """ "auto" -> "bf16" where the hardware is fast at it: a GPU with bf16, a CPU with AMX tiles; else "no"."""
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return "bf16" if device.type == "cpu" and amx is not None and amx() else "no"


def seed_step(seed: int, step: int, process: int) -> None:
    """Set python's, numpy's and torch's random states (all devices) as a function of (seed, step, process).

    So there is no random state to save: a resumed run has it, and nothing between two steps can disturb it.
    """
    words = np.random.SeedSequence([seed, step, process]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


def run_training(
    task: Task,
    config: LoopConfig,
    output: Path,
    *,
    resume: bool = True,
    best_metric: str | None = None,
    describe: dict[str, Any] | None = None,
) -> Path:
    """Train `task.module` and write `output/adapter`; go on from the last checkpoint if the run was begun before.

    In `output`: `adapter/` (final), `best/` (best dev figure so far), `checkpoints/`, `log.jsonl`, `config.json`,
    `finished.json` (once all steps are done or `patience` is over: it says which) and `tensorboard/` (if installed).
    A task may have `nothing_to_learn`, see `learning_signal`.

    Args:
        resume: False removes what an earlier run wrote to `output`, and starts over.
        best_metric: the dev figure (greater is better) by which `output/best` is kept and `config.patience` decides.
        describe: the rest of the run's configuration, JSON values; resuming with another one is refused.

    Returns:
        `output/adapter`. After `time_limit_minutes` it holds the adapter so far, and the same command goes on. A run
        that `patience` stopped is finished: only more patience goes on with it.

    Raises:
        InputError: the run in `output` has another configuration, another process writes there, nothing is trainable,
            the loss or gradient is not finite (the last checkpoint stays good), there is patience but no dev figure to
            judge by, the disk is full, or the run is over and no step of it had anything to learn from.
        SystemExit: after SIGINT or SIGTERM (code 128 + signal), when the step is finished and a checkpoint written.
    """
    output, begun = Path(output), time.monotonic()
    accelerator = start_processes()
    sharded = settings_of(accelerator)
    main, process, device = accelerator.is_main_process, accelerator.process_index, accelerator.device
    bf16 = resolve_mixed_precision(config.mixed_precision, device) == "bf16"
    if not trainable(task.module):
        raise InputError("the model has no trainable parameter; attach an adapter, or unfreeze some weights")
    if config.patience and best_metric is None:
        raise InputError(_nothing_to_judge_by(config.patience))

    with ExitStack() as stack:
        checkpoint: Path | None = None
        done: str | None = None
        if main:
            stack.enter_context(_only_run_in(output))
            if not resume:
                _clear(output)
            remove_leftovers(*(output / name for name in _WRITTEN))
            checkpoint = newest_checkpoint(output, warn=partial(print, file=sys.stderr))
            _check_same_run(output, {**(describe or {}), "loop": to_dict(config)}, accelerator, bool(checkpoint))
            done = None if checkpoint is None else _why_finished(output, config)
            if done is None:
                truncate_log(output / "log.jsonl", _step_of(checkpoint))
                (output / "finished.json").unlink(missing_ok=True)  # of fewer steps, or less patience
        checkpoint, done = broadcast_object_list([checkpoint, done])
        if done is not None:
            if main:
                print(f"{done}: {output / 'adapter'}", file=sys.stderr)
            if failure := read_finished(output).get("failure"):
                raise InputError(failure)
            return output / "adapter"

        module = shard(task.module, accelerator, sharded) if sharded else accelerator.prepare_model(task.module)
        parameters = trainable(task.module)
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        step, best, fruitless, learned = 0, None, 0, False
        if checkpoint is not None:
            state = read_checkpoint(checkpoint)
            restore(parameters, optimizer, state)
            task.load_state_dict(state.task)
            step, best, fruitless, learned = state.step, state.best, state.fruitless, state.learned

        report = stack.enter_context(
            Report(
                output, steps=config.steps, start=step, log_every=config.log_every, headline=best_metric, active=main
            )
        )
        if checkpoint is not None:
            report.say(f"going on from {checkpoint.name}")
        signals = stack.enter_context(_StopSignals())
        learning = LearningSignal(task, report.say, learned)

        def keep_state(best: float | None, fruitless: int) -> None:
            state = TrainingState(step, *collect(parameters, optimizer), task.state_dict(), best, fruitless)
            state.learned = learning.learned
            if main:
                report.sync()
                write_checkpoint(output, state, config.keep_checkpoints)

        stopped: str | None = None  # why patience ended the run before its last step
        while True:
            finished = step >= config.steps

            # Dev figures, the first before any training and the last after all of it.
            measured = step % (config.evaluate_every or 1) == 0 and (step > 0 or config.evaluate_first)
            if config.evaluate_every and (measured or finished):
                started = time.perf_counter()
                seed_step(config.seed, step, 0)
                task.module.eval()
                with torch.no_grad(), _autocast(device, bf16):
                    figures = {name: float(value) for name, value in task.evaluate(task.module, step).items()}
                (figures,) = broadcast_object_list([figures])  # all processes must stop, or none
                before = best, fruitless
                if best_metric and figures:
                    if best_metric not in figures:
                        raise InputError(f"no dev figure is called {best_metric}; there are {', '.join(figures)}")
                    better = best is None or figures[best_metric] > best
                    best, fruitless = (figures[best_metric], 0) if better else (best, fruitless + 1)
                    if better:
                        _save_adapter(accelerator, task, output / "best")
                elif config.patience:
                    raise InputError(_nothing_to_judge_by(config.patience))
                if 0 < config.patience <= fruitless and not finished:
                    stopped = f"{fruitless} dev evaluations in a row brought no better {best_metric} than {best:.4f}"
                report.dev(step, figures, time.perf_counter() - started, stopped)

            if stopped and not any(number == step for number, _ in list_checkpoints(output)):
                keep_state(*before)  # a resumed run measures this step again, so it is kept as before that
            if finished or stopped:
                break

            # One optimiser step: gradients of the micro-batches are averaged, over processes by DDP.
            started = time.perf_counter()
            seed_step(config.seed, step, process)
            rate = learning_rate_at(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            module.train()
            figures = {"loss": 0.0}
            for micro in range(config.gradient_accumulation):
                batch = send_to_device(task.batch(step * config.gradient_accumulation + micro), device)
                last = micro == config.gradient_accumulation - 1
                with nullcontext() if last else accelerator.no_sync(module):
                    with _autocast(device, bf16):
                        loss, metrics = task.loss(module, batch)
                    accelerator.backward(loss / config.gradient_accumulation)
                figures["loss"] += loss.item() / config.gradient_accumulation
                for name, value in metrics.items():
                    share = 1 if name == "tokens" else config.gradient_accumulation
                    figures[name] = figures.get(name, 0.0) + float(value) / share
            limit = config.max_grad_norm or math.inf
            grad_norm = whole(torch.nn.utils.clip_grad_norm_(parameters.values(), limit)).item()
            late = config.time_limit_minutes is not None and time.monotonic() - begun > 60 * config.time_limit_minutes
            figures |= {"_signal": float(signals.received), "_late": float(late)}
            figures = _mean_over_processes(accelerator, figures)
            stop_signal, late = math.ceil(figures.pop("_signal")), figures.pop("_late") > 0
            if not (math.isfinite(figures["loss"]) and math.isfinite(grad_norm)):
                raise InputError(_not_finite(step + 1, figures["loss"], grad_norm, output))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            learning.step(step, step == config.steps, grad_norm, figures)

            seconds = time.perf_counter() - started
            record: dict[str, Any] = {"step": step, "loss": figures.pop("loss")}
            if "tokens" in figures:
                record["tokens"] = figures.pop("tokens") * accelerator.num_processes
                record["tokens_per_second"] = record["tokens"] / seconds
            report.step(record | {"terms": figures, "lr": rate, "grad_norm": grad_norm, "seconds": seconds})

            due = step == config.steps or (config.checkpoint_every and step % config.checkpoint_every == 0)
            if due or stop_signal or late:
                keep_state(best, fruitless)
            if stop_signal:
                accelerator.wait_for_everyone()
                name = signal.Signals(signals.received).name if signals.received else "a signal to another process"
                report.say(f"stopped by {name} after step {step} of {config.steps}; {_HOW_TO_RESUME}")
                raise SystemExit(128 + (signals.received or signal.SIGTERM))
            if late and step < config.steps:
                report.say(f"the time limit is over after step {step} of {config.steps}; {_HOW_TO_RESUME}")
                break

        _save_adapter(accelerator, task, output / "adapter")
        if main and (stopped or step >= config.steps):
            facts = {"step": step, "best": best, "why": stopped or "all steps are done"}
            facts |= {"patience": config.patience} if stopped else {}
            facts |= {"failure": learning.failure} if learning.failure else {}
            atomic_write_text(output / "finished.json", json.dumps(facts) + "\n")
        accelerator.wait_for_everyone()
        if (stopped or step >= config.steps) and (failure := learning.failure):
            raise InputError(failure)
    return output / "adapter"


_WRITTEN = ("adapter", "best", "config.json", "log.jsonl", "finished.json")
_HOW_TO_RESUME = "a checkpoint is written: run the same command again to go on"


def _autocast(device: torch.device, enabled: bool) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=torch.bfloat16) if enabled else nullcontext()


def _mean_over_processes(accelerator: Accelerator, figures: dict[str, float]) -> dict[str, float]:
    if accelerator.num_processes == 1:
        return figures
    values = torch.tensor(list(figures.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(figures, accelerator.reduce(values, reduction="mean").tolist(), strict=True))


def _save_adapter(accelerator: Accelerator, task: Task, folder: Path) -> None:
    if hasattr(task.module, "whole_model"):
        task.module.whole_model()  # type: ignore[operator]
    if accelerator.is_main_process:
        with atomic_path(folder) as scratch:
            scratch.mkdir()
            task.save(scratch)


def _not_finite(step: int, loss: float, grad_norm: float, output: Path) -> str:
    what = f"the gradient's norm is {grad_norm}" if math.isfinite(loss) else f"the loss is {loss}"
    good = [path for _, path in list_checkpoints(output)]
    return (
        f"{what} at step {step}; the run stopped before the weights took it"
        + (f" and {good[-1]} is good" if good else "")
        + ". Try a lower loop.learning_rate or longer loop.warmup_steps in a new folder"
    )


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))


@contextmanager
def _only_run_in(output: Path) -> Iterator[None]:
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise InputError(f"another process is training in {output}; wait for it or choose another folder") from None
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}; choose a folder you may write to") from error
    try:
        yield
    finally:
        lock.release()


def _clear(output: Path) -> None:
    for name in ("checkpoints", "best", "adapter", "tensorboard"):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("log.jsonl", "config.json", "finished.json"):
        (output / name).unlink(missing_ok=True)


def _check_same_run(output: Path, described: dict[str, Any], accelerator: Accelerator, begun: bool) -> None:
    """Refuse to go on with another configuration than the run was begun with; then write down this one."""
    now = json.loads(json.dumps({**described, "processes": accelerator.num_processes}))
    path = output / "config.json"
    if begun and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        new = _flat(now)
        old = with_present_keys(_flat(before), new)
        free = FREE_KEYS | ({"loop.steps"} if old.get("loop.schedule") == "constant" else set())
        for key in sorted(set(old) | set(new)):
            if key not in free and old.get(key) != new.get(key):
                raise InputError(
                    f"the run in {output} was begun with {key} = {old.get(key)!r}, but now it is {new.get(key)!r}; "
                    "change it back, choose another output folder, or start over without resuming"
                )
    atomic_write_text(path, json.dumps(now, indent=1) + "\n")


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _why_finished(output: Path, config: LoopConfig) -> str | None:
    """What to tell who starts a finished run again; None if there is something left to do."""
    if not (facts := read_finished(output)):
        return None
    if facts["step"] >= config.steps:
        return f"all {config.steps} steps are done already"
    if 0 < config.patience <= facts.get("patience", 0):
        early = f"stopped early already, after step {facts['step']} of {config.steps}"
        return f"{early}: {facts['why']} (more loop.patience would go on)"
    return None


def _nothing_to_judge_by(patience: int) -> str:
    return (
        f"loop.patience is {patience}, but there is no dev figure to judge by: give the run a dev set, or set it to 0"
    )


class _StopSignals:
    """Notes the first SIGINT or SIGTERM, so that the loop can finish its step; a second one acts at once."""

    received = 0

    def __enter__(self) -> _StopSignals:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # python allows handlers only there
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()

"""The training loop of both stages: a task defines batches, training step and validation; the loop does the rest.

It reads from top to bottom: `run_training` prepares a run, takes its steps, and finishes it. It runs on accelerate:
over several processes with DDP, or with FSDP2 if the launcher requests it. Deliberately left out: callbacks, data
loaders (a task's batch is a function of the step), gradient scalers (bf16 needs none) and DeepSpeed.

A run that is killed at any moment and started again with the same command resumes from its last checkpoint and writes
the same log as a run that was never killed, because everything, batches and random states included, is a function of
the checkpoint and of (seed, step, process). The logs are equal to the last bit wherever torch's kernels are
deterministic, as they are on a CPU.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from torch import Tensor, nn

from search_r3.config import default_values, to_dict
from search_r3.errors import InputError
from search_r3.files import atomic_path, atomic_write_text
from search_r3.training.config import LoopConfig
from search_r3.training.distributed.sharding import fsdp_plugin, full_tensor, shard, start_processes
from search_r3.training.distributed.watchdog import limited_step
from search_r3.training.learning_signal import LearningSignal
from search_r3.training.precision import autocast, resolve_mixed_precision
from search_r3.training.run_checkpoint import (
    TrainingState,
    collect,
    list_checkpoints,
    read_checkpoint,
    read_finished,
    restore,
    trainable,
    write_checkpoint,
)
from search_r3.training.run_folder import flat_settings, open_run, run_lock
from search_r3.training.schedule import learning_rate_at, seed_step
from search_r3.training.stop_signals import StopSignals
from search_r3.training.trackers import Trackers, check_installed, tracker_names
from search_r3.training.training_log import Report
from search_r3.training.weight_average import WeightAverage

HOW_TO_RESUME = "a checkpoint is written: run the same command again to resume"


class Task(Protocol):
    """What the loop trains: a module with its batches, loss, validation and state."""

    module: nn.Module
    """The module whose trainable parameters are optimized. The loop moves it to the process's device."""

    def batch(self, step: int) -> Any:
        """Batch number `step`, or this process's share of it: a pure function of (seed, step, rank).

        With gradient accumulation, `step` counts micro-batches. The batch's tensors are moved to the device.
        """

    def training_step(
        self, module: nn.Module, batch: Any, backward: Callable[[Tensor], None]
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of a batch and call `backward(loss)` once; the loop then takes the optimizer step.

        `module` is the wrapped module: run the forward pass through it. bf16 autocast, if configured, covers the
        forward pass only. Returns the loss, a scalar, and metrics to log: the same keys at every step and process.
        A metric called "tokens" is summed (and gives tokens per second); the others are averaged.
        """

    def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
        """Validation metrics after `step` steps, or {}. `module` is the unwrapped module, in eval mode, under no_grad.

        Every process calls it with the same random state; the main process's metrics are used.
        """

    def state_dict(self) -> dict[str, Any]:
        """What the task needs to resume, besides the weights: tensors and JSON values; {} if nothing.

        Every process calls it; the main process's state is saved.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def save(self, folder: Path) -> None:
        """Write the trained adapter into `folder`, which exists and is empty. Only the main process calls it.

        If the module has an `unsharded_model`, every process has called it just before.
        """


@dataclass
class Run:
    """A run in progress: what the functions of this module share, and how far the run is."""

    task: Task
    config: LoopConfig
    output: Path
    best_metric: str | None
    accelerator: Accelerator
    module: nn.Module
    """The task's module as DDP or FSDP wraps it."""
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    """The moving average of the weights, if the configuration asks for one."""
    bf16: bool
    report: Report
    signals: StopSignals
    learning: LearningSignal
    deadline: float
    """When the time limit is reached, by `time.monotonic`."""
    step: int
    """Finished optimizer steps."""
    best: float | None
    """The best validation metric so far."""
    evals_without_improvement: int
    """Number of evaluations since the best one."""
    steps_of_start: int = 0
    """Steps finished since the run was started or resumed."""
    stop_signal: bool = False
    """Whether a process has received SIGINT or SIGTERM."""
    out_of_time: bool = False
    stop_reason: str | None = None
    """Why `patience` or `stop_on_collapse` ended the run early; None if neither did."""
    collapsed: str | None = None
    """Why the task says that what it trains has collapsed; None if it does not."""

    @property
    def complete(self) -> bool:
        """Whether the run needs no further step: all are done, or it was ended early."""
        return self.step >= self.config.steps or self.stop_reason is not None

    def averaged(self) -> AbstractContextManager[None]:
        """The module with the weights that are evaluated and saved: their moving average, if there is one."""
        return nullcontext() if self.average is None else self.average.applied()


def run_training(
    task: Task,
    config: LoopConfig,
    output: Path,
    *,
    resume: bool = True,
    best_metric: str | None = None,
    describe: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
) -> Path:
    """Train `task.module` and write `output/adapter`; resume from the last checkpoint if there is one.

    Written to `output`: `adapter/` (final), `best/` (best validation metric so far), `checkpoints/`, `log.jsonl`,
    `config.json`, `finished.json` (written when all steps are done or `patience` is exhausted, with the reason) and
    what the trackers of `report_to` write (by default `tensorboard/`, if it is installed). A task may have a method
    `nothing_to_learn`, see `learning_signal`, and a method `collapsed(metrics) -> str | None`, which gets a step's
    metrics over all processes (None when a run starts or resumes) and says why what it trains has collapsed.

    Args:
        resume: False removes what an earlier run wrote to `output` and starts over.
        best_metric: the validation metric (greater is better) that decides `output/best` and `config.patience`.
        describe: the rest of the run's configuration, JSON values; a run resumes only with the same one.
        defaults: defaults of keys in `describe`, for a run that was started before a key existed.

    Returns:
        `output/adapter`. After `time_limit_minutes` it holds the adapter so far, and the same command resumes. A run
        that `patience` stopped is finished: only a larger patience continues it.

    Raises:
        InputError: the run in `output` has another configuration; another process writes there; the module has no
            trainable parameter; the loss or the gradient is not finite (the last checkpoint remains valid);
            `patience` is set without a validation metric; the disk is full; or the run has ended and no step had
            anything to learn from.
        SystemExit: after SIGINT or SIGTERM (code 128 + signal), once the step is finished and a checkpoint is written.
    """
    output = Path(output)
    with ExitStack() as stack:
        run = prepare_run(stack, task, config, output, resume, best_metric, describe or {}, defaults or {})
        if run is not None:
            train_steps(run)
            finish_run(run)
    return output / "adapter"


def prepare_run(
    stack: ExitStack,
    task: Task,
    config: LoopConfig,
    output: Path,
    resume: bool,
    best_metric: str | None,
    describe: dict[str, Any],
    defaults: dict[str, Any],
) -> Run | None:
    """Lock the run's folder, and set up the model, optimizer and log from the newest checkpoint.

    Args:
        stack: closes the lock, the log and the signal handlers when the run ends.

    Returns:
        None if the run has already finished.
    """
    begun = time.monotonic()
    accelerator = start_processes()
    plugin, device = fsdp_plugin(accelerator), accelerator.device
    if not trainable(task.module):
        raise InputError("the model has no trainable parameter; attach an adapter, or unfreeze some weights")
    if config.patience and best_metric is None:
        raise InputError(_missing_validation_set(config.patience))
    check_installed(config.report_to)

    checkpoint: Path | None = None
    finished: str | None = None
    settings = {**describe, "loop": to_dict(config), "processes": accelerator.num_processes}
    if accelerator.is_main_process:
        stack.enter_context(run_lock(output))
        defaults = {**defaults, "loop": default_values(LoopConfig)}
        checkpoint, finished = open_run(output, settings, config, resume, defaults)
    checkpoint, finished = broadcast_object_list([checkpoint, finished])
    if finished is not None:
        if accelerator.is_main_process:
            print(f"{finished}: {output / 'adapter'}", file=sys.stderr)
        if failure := read_finished(output).get("failure"):
            raise InputError(failure)
        return None

    module = shard(task.module, accelerator, plugin) if plugin else accelerator.prepare_model(task.module)
    parameters = trainable(task.module)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    average = WeightAverage(task.module, parameters, config.ema) if config.ema else None
    state = None
    if checkpoint is not None:
        state = read_checkpoint(checkpoint)
        restore(parameters, optimizer, state)
        if average is not None:
            average.load_state_dict(state.average)
        task.load_state_dict(state.task)
    report = stack.enter_context(
        Report(
            output, steps=config.steps, start=state.step if state else 0, log_every=config.log_every,
            headline=best_metric, active=accelerator.is_main_process,
            trackers=_trackers(config, output, settings, state.step if state else 0),
        )
    )  # fmt: skip
    if checkpoint is not None:
        report.say(f"resuming from {checkpoint.name}")
    return Run(
        task=task,
        config=config,
        output=output,
        best_metric=best_metric,
        accelerator=accelerator,
        module=module,
        parameters=parameters,
        optimizer=optimizer,
        average=average,
        bf16=resolve_mixed_precision(config.mixed_precision, device) == "bf16",
        report=report,
        signals=stack.enter_context(StopSignals()),
        learning=LearningSignal(task, report.say, state.learned if state else False),
        deadline=math.inf if config.time_limit_minutes is None else begun + 60 * config.time_limit_minutes,
        step=state.step if state else 0,
        best=state.best if state else None,
        evals_without_improvement=state.evals_without_improvement if state else 0,
    )


def train_steps(run: Run) -> None:
    """Take optimizer steps until the run is complete or the time limit is reached."""
    _watch_for_collapse(run, None)
    while True:
        evaluate_and_checkpoint(run)
        if run.complete or run.out_of_time:
            break
        optimizer_step(run)


@limited_step()
def optimizer_step(run: Run) -> None:
    """One optimizer step: gradients are averaged over the micro-batches here, and over processes by DDP or FSDP."""
    config, accelerator, task = run.config, run.accelerator, run.task
    started = time.perf_counter()
    seed_step(config.seed, run.step, accelerator.process_index)
    rate = learning_rate_at(run.step, config)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.module.train()

    def backward(loss: Tensor) -> None:
        with torch.autocast(accelerator.device.type, enabled=False):
            accelerator.backward(loss / config.gradient_accumulation)

    metrics = {"loss": 0.0}
    for micro in range(config.gradient_accumulation):
        batch = send_to_device(task.batch(run.step * config.gradient_accumulation + micro), accelerator.device)
        last = micro == config.gradient_accumulation - 1
        with nullcontext() if last else accelerator.no_sync(run.module), autocast(accelerator.device, run.bf16):
            loss, micro_metrics = task.training_step(run.module, batch, backward)
        metrics["loss"] += loss.item() / config.gradient_accumulation
        for name, value in micro_metrics.items():
            share = 1 if name == "tokens" else config.gradient_accumulation
            metrics[name] = metrics.get(name, 0.0) + float(value) / share
    limit = config.max_grad_norm or math.inf
    grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(run.parameters.values(), limit)).item()
    metrics |= {"_signal": float(run.signals.received), "_late": float(time.monotonic() > run.deadline)}
    metrics = _mean_over_processes(accelerator, metrics)  # either all processes stop or none does
    run.stop_signal, run.out_of_time = metrics.pop("_signal") > 0, metrics.pop("_late") > 0
    if not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)):
        raise InputError(_not_finite(run.step + 1, metrics["loss"], grad_norm, run.output))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    if run.average is not None:
        run.average.update(run.step)
    run.steps_of_start += 1
    run.learning.step(run.step, run.step == config.steps, grad_norm, metrics)
    _watch_for_collapse(run, metrics)

    seconds = time.perf_counter() - started
    record: dict[str, Any] = {"step": run.step, "loss": metrics.pop("loss")}
    if "tokens" in metrics:
        record["tokens"] = metrics.pop("tokens") * accelerator.num_processes
        record["tokens_per_second"] = record["tokens"] / seconds
    run.report.step(record | {"terms": metrics, "lr": rate, "grad_norm": grad_norm, "seconds": seconds})


def _watch_for_collapse(run: Run, metrics: dict[str, float] | None) -> None:
    """Warn when a task says that its run has collapsed, and end the run if it is configured to."""
    before, run.collapsed = run.collapsed, getattr(run.task, "collapsed", lambda metrics: None)(metrics)
    if run.collapsed is not None and before is None:
        run.report.say(f"warning: step {run.step}: {run.collapsed}")
    if run.collapsed is not None and run.config.stop_on_collapse and run.step < run.config.steps:
        run.stop_reason = run.collapsed
        best = "; best/ holds the best adapter" if run.best is not None else ""
        run.report.say(f"stopped after step {run.step} of {run.config.steps}, as loop.stop_on_collapse is set{best}")


def evaluate_and_checkpoint(run: Run) -> None:
    """Do what is due after `run.step` steps: first the checkpoint, then validation. Step 0 is before any training.

    Raises:
        SystemExit: a process received a signal; the checkpoint has been written.
    """
    config, step, last = run.config, run.step, run.step >= run.config.steps
    if run.steps_of_start:
        due = last or run.stop_reason or (config.checkpoint_every and step % config.checkpoint_every == 0)
        if due or run.stop_signal or run.out_of_time:
            save_checkpoint(run, run.best, run.evals_without_improvement)
        if run.stop_signal:
            run.accelerator.wait_for_everyone()
            received = run.signals.received
            name = signal.Signals(received).name if received else "a signal to another process"
            run.report.say(f"stopped by {name} after step {step} of {config.steps}; {HOW_TO_RESUME}")
            raise SystemExit(128 + (received or signal.SIGTERM))
        if run.out_of_time and not last:
            run.report.say(f"the time limit is reached after step {step} of {config.steps}; {HOW_TO_RESUME}")
            return
    if config.evaluate_every and (last or (step % config.evaluate_every == 0 and (step > 0 or config.evaluate_first))):
        validate(run, last)


def validate(run: Run, last: bool) -> None:
    """Log the task's validation metrics, keep the best adapter, and decide whether `patience` ends the run."""
    config, best, evals = run.config, run.best, run.evals_without_improvement
    started = time.perf_counter()
    seed_step(config.seed, run.step, 0)
    run.task.module.eval()
    with run.averaged(), torch.no_grad(), autocast(run.accelerator.device, run.bf16):
        metrics = {name: float(value) for name, value in run.task.evaluate(run.task.module, run.step).items()}
    (metrics,) = broadcast_object_list([metrics])  # either all processes stop or none does
    if run.best_metric and metrics:
        if run.best_metric not in metrics:
            raise InputError(f"no validation metric is called {run.best_metric}; there are {', '.join(metrics)}")
        value = metrics[run.best_metric]
        if best is None or value > best:
            run.best, run.evals_without_improvement = value, 0
            _save_adapter(run, run.output / "best")
        else:
            run.evals_without_improvement += 1
    elif config.patience:
        raise InputError(_missing_validation_set(config.patience))
    if 0 < config.patience <= run.evals_without_improvement and not last:
        run.stop_reason = (
            f"{run.evals_without_improvement} evaluations in a row did not improve {run.best_metric} beyond "
            f"{run.best:.4f}"
        )
    run.report.dev(run.step, metrics, time.perf_counter() - started, run.stop_reason)
    if run.stop_reason and not any(number == run.step for number, _ in list_checkpoints(run.output)):
        save_checkpoint(run, best, evals)  # as before this evaluation: a resumed run repeats it


def save_checkpoint(run: Run, best: float | None, evals_without_improvement: int) -> None:
    """Write the run's state after `run.step` steps."""
    weights, moments = collect(run.parameters, run.optimizer)
    state = TrainingState(run.step, weights, moments, run.task.state_dict(), best, evals_without_improvement)
    state.learned = run.learning.learned
    state.average = {} if run.average is None else run.average.state_dict()
    if run.accelerator.is_main_process:
        run.report.sync()
        write_checkpoint(run.output, state, run.config.keep_checkpoints)


def finish_run(run: Run) -> None:
    """Write the adapter and, if the run is complete, `finished.json`.

    Raises:
        InputError: the run is complete, and no step had anything to learn from.
    """
    _save_adapter(run, run.output / "adapter")
    failure = run.learning.failure if run.complete else None
    if run.accelerator.is_main_process and run.complete:
        record = {"step": run.step, "best": run.best, "why": run.stop_reason or "all steps are done"}
        if run.stop_reason is not None:
            collapsed = run.stop_reason == run.collapsed
            record |= {"collapsed": True} if collapsed else {"patience": run.config.patience}
        record |= {"failure": failure} if failure else {}
        atomic_write_text(run.output / "finished.json", json.dumps(record) + "\n")
    run.accelerator.wait_for_everyone()
    if failure:
        raise InputError(failure)


def _trackers(config: LoopConfig, output: Path, settings: dict[str, Any], start: int) -> Trackers:
    return Trackers(
        tracker_names(config.report_to),
        output,
        project=config.project,
        run_name=config.run_name or output.resolve().name,
        settings=flat_settings(settings),
        start=start,
    )


def _mean_over_processes(accelerator: Accelerator, metrics: dict[str, float]) -> dict[str, float]:
    if accelerator.num_processes == 1:
        return metrics
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(metrics, accelerator.reduce(values, reduction="mean").tolist(), strict=True))


def _save_adapter(run: Run, folder: Path) -> None:
    with run.averaged():
        if hasattr(run.task.module, "unsharded_model"):
            run.task.module.unsharded_model()  # type: ignore[operator]
        if run.accelerator.is_main_process:
            with atomic_path(folder) as scratch:
                scratch.mkdir()
                run.task.save(scratch)


def _not_finite(step: int, loss: float, grad_norm: float, output: Path) -> str:
    problem = f"the gradient's norm is {grad_norm}" if math.isfinite(loss) else f"the loss is {loss}"
    checkpoints = [path for _, path in list_checkpoints(output)]
    return (
        f"{problem} at step {step}; the run stopped before the optimizer step"
        + (f", and {checkpoints[-1]} is valid" if checkpoints else "")
        + ". Try a lower loop.learning_rate or longer loop.warmup_steps in a new folder"
    )


def _missing_validation_set(patience: int) -> str:
    return f"loop.patience is {patience}, but the run has no validation metric: give it a dev set, or set it to 0"

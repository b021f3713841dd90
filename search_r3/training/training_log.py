"""The output of a training run: log.jsonl, its trackers, and a progress bar or plain lines.

One JSON object per line: `{"step", "loss", "terms", "lr", "grad_norm", "seconds", "memory_gib", ...}` after a step, and
`{"step", "dev", "seconds"}` for an evaluation after that many steps, with "stopped" if it ended the run early.
Only the main process reports. Trackers get the same numbers as the log, as `train/NAME` and `dev/NAME`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from search_r3.files import atomic_write_text
from search_r3.progress import make_bar, on_terminal
from search_r3.training.trackers import Trackers

try:
    import resource
except ImportError:  # not available on Windows
    resource = None  # type: ignore[assignment]

PLAIN_LINES = 20
"""Approximate number of progress lines that a run prints when there is no terminal for a progress bar."""


def truncate_log(path: Path, step: int) -> None:
    """Drop the records that a killed run wrote after its checkpoint at `step`, and incomplete lines.

    The dev metrics of `step` itself are dropped too: the evaluation follows the checkpoint, and a resumed run repeats
    it.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().decode("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            keep = record["step"] < step or (record["step"] == step and "dev" not in record)
        except (ValueError, KeyError, TypeError):
            continue
        if keep:
            kept.append(line + "\n")
    atomic_write_text(path, "".join(kept))


def peak_memory_gib() -> float:
    """The peak memory of this process so far, in GiB: tensors on the GPU if it uses one, else resident memory."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (30 if sys.platform == "darwin" else 20)  # bytes on macOS, KiB elsewhere


class Report:
    """Writes the log and shows the progress of a run, as a context manager. With `active=False`, as on all processes
    but the main one, its methods do nothing.
    """

    def __init__(
        self,
        output: Path,
        *,
        steps: int,
        start: int,
        log_every: int,
        headline: str | None,
        active: bool,
        trackers: Trackers | None = None,
    ) -> None:
        self._output, self._steps, self._start, self._log_every = output, steps, start, log_every
        self._headline = headline  # the dev metric shown in the bar; None shows the first
        self._active = active
        self._log: TextIO | None = None
        self._trackers = trackers if active else None
        self._bar: Any = None
        self._dev: dict[str, float] = {}

    def __enter__(self) -> Report:
        if self._active:
            if self._trackers is not None:
                self._trackers.open()
            self._log = open(self._output / "log.jsonl", "a", encoding="utf-8")
            if on_terminal():
                from rich.progress import TextColumn

                self._bar = make_bar(TextColumn("{task.fields[metrics]}", markup=False))
                self._task = self._bar.add_task("training", total=self._steps, completed=self._start, metrics="")
                self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._log is not None:
            self._log.close()
        if self._trackers is not None:
            self._tell(self._trackers.close())

    def say(self, text: str) -> None:
        """Print a line above the progress bar, or to stderr without one."""
        if self._active:
            (self._bar.console.print if self._bar is not None else _to_stderr)(text)

    def step(self, record: dict[str, Any]) -> None:
        """Report a finished optimizer step."""
        if not self._active:
            return
        step = record["step"]
        if step % self._log_every == 0 or step == self._steps:
            record = {**record, "memory_gib": peak_memory_gib()}
            self._write(record)
            top = {name: value for name, value in record.items() if name not in ("step", "terms")}
            self._scalars("train", {**record["terms"], **top}, step)
        metrics = f"loss {record['loss']:.4f}" + "".join(f" · {name} {self._dev[name]:.4f}" for name in self._dev)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=metrics)
        elif step % max(1, self._steps // PLAIN_LINES) == 0 or step in (self._start + 1, self._steps):
            _to_stderr(f"step {step}/{self._steps}  {metrics}  lr {record['lr']:.2e}  {record['seconds']:.2f} s/step")

    def dev(self, step: int, metrics: dict[str, float], seconds: float, stopped: str | None = None) -> None:
        """Report the dev metrics after `step` finished steps and, if they end the run early, why (`stopped`)."""
        if not self._active or not metrics:
            return
        name = self._headline if self._headline in metrics else next(iter(metrics))
        self._dev = {name: metrics[name]}
        self._write({"step": step, "dev": metrics, "seconds": seconds} | ({"stopped": stopped} if stopped else {}))
        self._scalars("dev", {**metrics, "seconds": seconds}, step)
        self.say(f"step {step}  dev: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        if stopped:
            self.say(f"stopped early after step {step} of {self._steps}: {stopped}")

    def sync(self) -> None:
        """Flush the log to disk before a checkpoint is written, so that it is never older than the checkpoint."""
        if self._log is not None:
            os.fsync(self._log.fileno())

    def _write(self, record: dict[str, Any]) -> None:
        assert self._log is not None
        self._log.write(json.dumps(record) + "\n")
        self._log.flush()

    def _scalars(self, group: str, values: dict[str, float], step: int) -> None:
        if self._trackers is not None:
            self._tell(self._trackers.log(group, values, step))

    def _tell(self, lines: list[str]) -> None:
        for line in lines:
            self.say(line)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

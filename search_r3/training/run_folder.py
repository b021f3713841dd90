"""The folder of a training run: locked by one process, and resumed only with the settings it was started with."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from search_r3.errors import InputError
from search_r3.files import atomic_write_text, remove_leftovers
from search_r3.training.config import LoopConfig, with_present_keys
from search_r3.training.run_checkpoint import newest_checkpoint, read_finished
from search_r3.training.trackers import RUNS_FILE
from search_r3.training.training_log import truncate_log

FREE_KEYS = frozenset(
    f"loop.{name}"
    for name in (
        "checkpoint_every",
        "keep_checkpoints",
        "evaluate_every",
        "evaluate_first",
        "log_every",
        "report_to",
        "project",
        "run_name",
        "patience",
        "stop_on_collapse",
        "time_limit_minutes",
    )
) | {"trained_on", "processes"}
"""Settings that may differ when a run is resumed, because they change no weight (the training data have a hash)."""
WRITTEN = ("adapter", "best", "config.json", "log.jsonl", "finished.json", RUNS_FILE)
"""What a run writes, apart from its checkpoints and the trackers' own files."""


@contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """A context that holds the folder's lock; the folder is created if it does not exist.

    Raises:
        InputError: another process holds the lock, or the folder is not writable.
    """
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


def open_run(
    output: Path, settings: dict[str, Any], config: LoopConfig, resume: bool, defaults: dict[str, Any] | None = None
) -> tuple[Path | None, str | None]:
    """Prepare a locked folder for a run with these settings.

    Args:
        settings: the whole configuration as JSON values, which is written to `config.json`.
        resume: False removes what an earlier run wrote.
        defaults: defaults of keys in `settings`; a run that was started before a key existed had its default.

    Returns:
        The newest checkpoint, or None; and, if the run is finished, the reason why nothing is left to do.

    Raises:
        InputError: the run in the folder has other settings, or none of its checkpoints can be read.
    """
    if not resume:
        _clear(output)
    remove_leftovers(*(output / name for name in WRITTEN))
    checkpoint = newest_checkpoint(output, warn=partial(print, file=sys.stderr))
    _check_same_run(output, settings, defaults or {}, begun=checkpoint is not None)
    finished = None if checkpoint is None else finished_reason(output, config)
    if finished is None:
        truncate_log(output / "log.jsonl", 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-")))
        (output / "finished.json").unlink(missing_ok=True)  # it was written for fewer steps, or less patience
    return checkpoint, finished


def finished_reason(output: Path, config: LoopConfig) -> str | None:
    """Why a run needs no further step; None if it needs one."""
    if not (record := read_finished(output)):
        return None
    if record["step"] >= config.steps:
        return f"all {config.steps} steps are already done"
    if 0 < config.patience <= record.get("patience", 0):
        early = f"already stopped early, after step {record['step']} of {config.steps}"
        return f"{early}: {record['why']} (a larger loop.patience continues the run)"
    if config.stop_on_collapse and record.get("collapsed"):
        early = f"already stopped early, after step {record['step']} of {config.steps}"
        return f"{early}: {record['why']} (loop.stop_on_collapse: false continues the run)"
    return None


def _clear(output: Path) -> None:
    for name in ("checkpoints", "best", "adapter", "tensorboard"):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("log.jsonl", "config.json", "finished.json", RUNS_FILE):
        (output / name).unlink(missing_ok=True)


def _check_same_run(output: Path, settings: dict[str, Any], defaults: dict[str, Any], begun: bool) -> None:
    """Check that a run continues with the settings it was started with, then write them."""
    now = json.loads(json.dumps(settings))
    path = output / "config.json"
    if begun and path.exists():
        new = flat_settings(now)
        begun_with = with_present_keys(flat_settings(json.loads(path.read_text(encoding="utf-8"))), new)
        # A version without a key behaved as the key's default does.
        known = {key: value for key, value in flat_settings(json.loads(json.dumps(defaults))).items() if key in new}
        old = known | begun_with
        free = FREE_KEYS | ({"loop.steps"} if old.get("loop.schedule") == "constant" else set())
        for key in sorted(set(old) | set(new)):
            if key not in free and old.get(key) != new.get(key):
                raise InputError(
                    f"the run in {output} was started with {key} = {old.get(key)!r}, but now it is {new.get(key)!r}; "
                    "change it back, choose another output folder, or start over without resuming"
                )
    atomic_write_text(path, json.dumps(now, indent=1) + "\n")


def flat_settings(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as "section.key" -> value."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

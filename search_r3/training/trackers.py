"""Trackers of a training run (TensorBoard, Weights & Biases, Trackio, MLflow) through accelerate's tracking API.

A resumed run continues its run in the tracker, whose id is kept in the run's folder. A tracker that cannot start ends
the run before its first step; one that fails later is left out with a warning, as no training should end for it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from search_r3.errors import InputError, first_line
from search_r3.files import atomic_write_text
from search_r3.optional import optional_imports
from search_r3.training.config import TRACKERS

RUNS_FILE = "trackers.json"
"""The ids of a run in its trackers, in the run's folder."""
TENSORBOARD_FOLDER = "tensorboard"
_TITLES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "trackio": "Trackio", "mlflow": "MLflow"}
_ADVICE = {
    "wandb": "log in with `wandb login`, set WANDB_MODE=offline",
    "mlflow": "check MLFLOW_TRACKING_URI",
}


def tracker_names(report_to: str | Iterable[str]) -> list[str]:
    """The trackers that `loop.report_to` names: "auto" is TensorBoard if it is installed, "all" those that are
    installed, "none" none.
    """
    named = [report_to] if isinstance(report_to, str) else list(report_to)
    if named == ["auto"]:
        return [name for name in ("tensorboard",) if _installed(name)]
    if named == ["all"]:
        return [name for name in TRACKERS if _installed(name)]
    return [] if named == ["none"] else list(dict.fromkeys(named))


def check_installed(report_to: str | Iterable[str]) -> None:
    """Check that the packages of the trackers are installed.

    Raises:
        InputError: one is not; the message says how to install it.
    """
    for name in tracker_names(report_to):
        if not _installed(name):
            with optional_imports(name, f"loop.report_to: {name}"):
                raise ModuleNotFoundError(name=name)


class Trackers:
    """The trackers of one run; without names its methods do nothing.

    Args:
        names: of `TRACKERS`.
        output: the run's folder, in which TensorBoard and W&B write, and the ids are kept.
        project: the project in W&B and Trackio, the experiment in MLflow.
        run_name: the run's name there.
        settings: the run's configuration, flat ("loop.steps" -> 1000); TensorBoard does not get it.
        start: finished steps of a run that is resumed, else 0.
    """

    def __init__(
        self,
        names: Iterable[str],
        output: Path,
        *,
        project: str,
        run_name: str,
        settings: Mapping[str, Any],
        start: int,
    ) -> None:
        self._names, self._output, self._start = list(names), output, start
        self._project, self._run_name, self._settings = project, run_name, settings
        self._open: dict[str, Any] = {}

    def open(self) -> None:
        """Start all trackers.

        Raises:
            InputError: one cannot start, or its package is missing; those before it are closed.
        """
        known = self._known_runs() if self._start else {}
        try:
            for name in self._names:
                self._open[name] = self._started(name, known)
        except BaseException:
            self.close()
            raise

    def close(self) -> list[str]:
        """End all trackers; returns a line for each that fails to."""
        lines = [self._failure(name, tracker.finish) for name, tracker in list(self._open.items())]
        self._open = {}
        return [line for line in lines if line]

    def log(self, group: str, values: Mapping[str, float], step: int) -> list[str]:
        """Send values as "GROUP/NAME"; returns a line for each tracker that fails, which then gets nothing more."""
        lines = []
        for name, tracker in list(self._open.items()):
            named = {f"{group}/{key}": value for key, value in values.items()}
            if name == "mlflow":
                named = {_mlflow_name(key): value for key, value in named.items()}
            lines.append(self._failure(name, tracker.log, named, step))
        return [line for line in lines if line]

    def _failure(self, name: str, call: Callable[..., None], *arguments: Any) -> str | None:
        try:
            call(*arguments)
        except Exception as error:
            self._open.pop(name, None)
            problem = first_line(error)
            return f"warning: {_TITLES[name]} failed and gets nothing more of this run: {problem}"
        return None

    def _started(self, name: str, known: dict[str, str]) -> Any:
        run = known.get(name) or (secrets.token_hex(4) if name == "wandb" else None)
        with optional_imports(name, f"loop.report_to: {name}"):
            try:
                tracker = self._tracker(name, run)
                tracker.start()
                if name != "tensorboard" and name not in known:
                    tracker.store_init_configuration({key: _plain(value) for key, value in self._settings.items()})
            except ImportError:
                raise
            except Exception as error:
                advice = f"{_ADVICE[name]}, " if name in _ADVICE else ""
                raise InputError(
                    f"{_TITLES[name]} cannot start: {first_line(error)}; {advice}or leave it out of loop.report_to"
                ) from error
        if name != "tensorboard":
            named = {
                "mlflow": lambda run: run.info.run_id,
                "trackio": lambda run: run.name,
                "wandb": lambda run: run.id,
            }
            self._keep(name, str(named[name](tracker.tracker)))
        return tracker

    def _tracker(self, name: str, run: str | None) -> Any:
        from accelerate import tracking

        resumed = self._start > 0
        if name == "tensorboard":
            purge = self._start + 1 if resumed else 0
            return tracking.TensorBoardTracker(TENSORBOARD_FOLDER, str(self._output), purge_step=purge)
        if name == "wandb":
            return tracking.WandBTracker(
                self._project, name=self._run_name, id=run, resume="allow", dir=str(self._output)
            )
        if name == "trackio":
            how = "allow" if resumed else "never"
            return tracking.TrackioTracker(self._project, name=run or self._run_name, resume=how)
        return tracking.MLflowTracker(self._project, run_id=run, run_name=self._run_name)

    def _known_runs(self) -> dict[str, str]:
        try:
            return dict(json.loads((self._output / RUNS_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def _keep(self, name: str, run: str) -> None:
        known = self._known_runs() | {name: run}
        atomic_write_text(self._output / RUNS_FILE, json.dumps(known) + "\n")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _mlflow_name(name: str) -> str:
    """MLflow allows letters, digits and _-. :/ in names; as in mteb's results, ndcg@10 becomes ndcg_at_10."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))

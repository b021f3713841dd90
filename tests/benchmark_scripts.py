"""The scripts of benchmarks/ as modules of a test: imported afresh, and forgotten afterwards."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@contextmanager
def fresh_benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Names such as "common" are benchmarks/common.py inside, and no module of another test."""
    names = [path.stem for path in FOLDER.glob("*.py")]
    monkeypatch.syspath_prepend(FOLDER)
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


@contextmanager
def benchmark_scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """What imports a script by its name, workers run in this process: the real ones only import everything again."""
    with fresh_benchmarks(monkeypatch):
        worker = importlib.import_module("common").Worker

        def start(self: Any, script: str, spec: dict[str, Any], checkout: Path | None = None) -> None:
            module = importlib.import_module(Path(script).stem)
            self.loaded, self.ask = module.load(module.Spec(**json.loads(json.dumps(spec))))

        monkeypatch.setattr(worker, "__init__", start)
        monkeypatch.setattr(worker, "ready", lambda self: self.loaded)
        monkeypatch.setattr(worker, "close", lambda self: None)
        yield importlib.import_module


@contextmanager
def benchmark_script(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/NAME.py, as by `benchmark_scripts`."""
    with benchmark_scripts(monkeypatch) as scripts:
        yield scripts(name)

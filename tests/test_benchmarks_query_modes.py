"""The benchmark of query modes: every mode that the model has is timed, at both batch sizes, against the direct one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from benchmark_scripts import benchmark_script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with benchmark_script("query_modes", monkeypatch) as module:
        yield module


def test_the_modes_that_the_model_has_are_timed_and_the_others_named(
    script: ModuleType, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "tiny_model", lambda *_: tiny_model)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["query_modes.py", "--tiny", "--rounds", "2", "--budget", "2", "--json", str(out)])
    script.main()
    figures = json.loads(out.read_text())["figures"]
    assert list(figures["batches"]) == ["1", "32"]
    for found in figures["batches"].values():
        assert list(found) == ["off", "on"]
        assert found["off"]["ratio"] == 1
        assert found["on"]["ratio"] > 1
    assert figures["left_out"] == ["latent", "read", "read+on"]

"""The benchmarks of object storage and of killed Ray builds, small: they run, and what they count is right."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from benchmark_scripts import FOLDER, fresh_benchmarks
from processes import run

pytest.importorskip("lancedb")
pytest.importorskip("moto.server", reason="moto is not installed: pip install 'search-r3[dev]'")

SECONDS = 600.0
"""A cluster of three nodes takes a while to start, three times over."""


def figures_of(script: str, output: Path, *arguments: str) -> dict:
    command = [sys.executable, str(FOLDER / script), *arguments, "--json", str(output)]
    run(command, env=os.environ | {"PYTHONPATH": str(FOLDER.parent)}, seconds=SECONDS)
    return json.loads(output.read_text())["figures"]


def test_requests_are_sequential_if_they_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh_benchmarks(monkeypatch):
        from storage_search import sequential
    assert sequential([]) == 0
    assert sequential([[0.0, 1.0], [0.1, 3.0], [0.2, 1.2], [0.9, 2.0]]) == 1
    assert sequential([[5.0, 6.0], [0.0, 1.0], [1.0, 2.0], [1.5, 2.5], [2.1, 4.0]]) == 4
    assert sequential([[0.0, 0.0], [1.0, 2.0]]) == 2, "one that was never answered"


@pytest.mark.nightly
def test_a_search_of_a_small_index_waits_for_few_requests(tmp_path: Path) -> None:
    figures = figures_of("storage_search.py", tmp_path / "found.json", "--rows", "60", "--rounds", "1")
    ours = figures["ours"]
    assert ours["command"]["sequential_requests"] <= 4
    assert ours["copy there"]["requests"] == 1
    assert ours["folder"]["requests"] == 0


@pytest.mark.nightly
def test_trials_of_failing_storage_find_nothing_wrong(tmp_path: Path) -> None:
    output = tmp_path / "trials.json"
    figures = figures_of("storage_trials.py", output, "--trials", "1", "--faults", "503", "gone")
    assert (figures["trials"], figures["trials_with_something_wrong"]) == (2, 0)
    log = output.with_suffix(".jsonl").read_text()
    figures_of("storage_trials.py", output, "--trials", "1", "--faults", "503", "gone")
    assert output.with_suffix(".jsonl").read_text() == log, "nothing is done twice"


@pytest.mark.nightly
@pytest.mark.timeout(SECONDS + 60)
def test_a_killed_driver_worker_and_node_cost_one_part_a_worker(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'search-r3[ray]'")
    figures = figures_of("kill_ray.py", tmp_path / "kills.json", "--kills", "3", "--rows", "240")
    assert figures["kills_by_kind"] == {"driver": 1, "worker": 1, "node": 1}
    assert figures["kills_with_something_wrong"] == 0
    assert figures["most_encoded_again"] <= figures["allowed_again"]

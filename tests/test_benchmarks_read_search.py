"""The benchmark of searches that read: every way is timed, with the passages and hops that it is named for."""

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
    with benchmark_script("read_search", monkeypatch) as module:
        yield module


def test_every_way_is_timed_against_the_direct_search(
    script: ModuleType,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []
    search = script.SearchIndex.search

    def counted(index, question, model, **options):
        asked.append((options.get("read", 0), options.get("hops", 1), model.reading.passages))
        return search(index, question, model, **options)

    monkeypatch.setattr(script.SearchIndex, "search", counted)
    monkeypatch.setattr(script, "tiny_model", lambda *_: tiny_model)
    (tmp_path / "questions.txt").write_text("one question\n\nanother\n")
    out = tmp_path / "out.json"
    command = ["read_search.py", "--tiny", "--rounds", "2", "--passages", "3", "--budget", "2", "--json", out]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--queries", str(tmp_path / "questions.txt")])
    script.main()
    figures = json.loads(out.read_text())["figures"]
    assert list(figures["ways"]) == ["direct", "read", "read-2", "on", "read+on"]
    assert figures["ways"]["direct"]["ratio"] == 1
    assert all(way["p50_ms"] > 0 for way in figures["ways"].values())
    assert (figures["questions"], figures["passages"]) == (2, 3)
    assert set(asked) == {(0, 1, 3), (3, 1, 3), (3, 2, 3)}
    assert len(asked) == 5 * 2 * 3  # untimed once, then two rounds
    assert "ratio" in capsys.readouterr().out

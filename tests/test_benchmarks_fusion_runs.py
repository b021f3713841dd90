"""The benchmark of fused runs: its figures are those of the fused lists, and the weight by query never sees its set."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_scripts import benchmark_script

from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.evaluation.runs import write_run
from search_r3.metrics import run_ndcg
from search_r3.rank_fusion import fuse

COUNT = 24
NEAR = {str(i): {str((i + shift) % COUNT): 1 - shift / 10 for shift in range(6)} for i in range(COUNT)}
WORDS = {str(i): {str((i + 3 * shift) % COUNT): 9.0 - shift for shift in range(1, 5)} for i in range(COUNT)}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with benchmark_script("fusion_runs", monkeypatch) as module:
        yield module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    corpus = {str(i): Document(str(i), "", f"document {i}") for i in range(COUNT)}
    queries = {str(i): f"question {i}" for i in range(COUNT)}
    for name, splits in (("cosqa", ("dev", "test")), ("nfcorpus", ("dev",))):
        for split in splits:
            dataset = BeirDataset(name, corpus, queries, {query: {query: 1} for query in queries})
            write_beir(tmp_path / "data" / name, dataset, split)
    for place in ("cosqa.dev", "nfcorpus.dev", "cosqa"):
        write_run(tmp_path / "runs" / place / "v.trec.gz", NEAR, "v")
        write_run(tmp_path / "runs" / place / "bm25.trec.gz", WORDS, "bm25")
    return tmp_path


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> dict[str, Any]:
    command = ["fusion_runs.py", "--data", str(folder / "data"), "--runs", str(folder / "runs"), "--vectors", "v",
               "--json", str(folder / "out.json"), *more]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    return json.loads((folder / "out.json").read_text())["figures"]["datasets"]


def test_figures_are_those_of_the_fused_lists(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(script, monkeypatch, folder, "--sets", "cosqa", "nfcorpus")
    assert found["cosqa"]["vectors"] == 1
    fused = {query: dict(fuse("dbsf", NEAR[query], WORDS[query], 0.4)) for query in NEAR}
    expected = run_ndcg(fused, {query: {query: 1} for query in NEAR})
    assert found["cosqa"]["dbsf 0.4"] == pytest.approx(sum(expected.values()) / COUNT, abs=1e-3)
    assert found["mean"]["rsf 0.8"] == pytest.approx(found["cosqa"]["rsf 0.8"])
    assert any(column.startswith("linear 0.") and column.endswith("± 0.2") for column in found["cosqa"])
    assert "| rrf | " in capsys.readouterr().out


def test_test_queries_are_scored_with_the_weight_in_use_alone(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    found = run(script, monkeypatch, folder, "--sets", "cosqa", "--test")
    assert set(found["cosqa"]) == {"vectors", "words", "rrf", "linear 0.65", "dbsf 0.65", "rsf 0.65"}

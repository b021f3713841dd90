"""The benchmark of the index on a few hundred rows: they lie as real ones do, and every system finds the same."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from benchmark_scripts import benchmark_script, fresh_benchmarks


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with benchmark_script("index", monkeypatch) as module:
        yield module


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, model: Path, folder: Path, *more: str) -> dict[str, Any]:
    fixed = ["--tiny", "--model", model, "--work", folder / "work", "--cache", folder, "--json", folder / "out.json"]
    fixed += [
        "--packages",
        "json",
        "logging",
        "email",
        "asyncio",
        "unittest",
        "--longest",
        "60",
        "--threads",
        "1",
        *more,
    ]
    monkeypatch.delenv("SEARCH_R3_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["index.py", *map(str, fixed)])
    script.main()
    return json.loads((folder / "out.json").read_text())


@pytest.mark.nightly
def test_ours_reaches_its_recall_and_a_second_run_measures_nothing_again(
    script: ModuleType, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systems = ["ours"]
    systems += [name for name, needs in (("faiss-ivf", "faiss"), ("hnswlib", "hnswlib")) if _installed(needs)]
    report = run(script, monkeypatch, tiny_model, tmp_path, "--systems", *systems)
    figures = report["figures"]
    assert figures["rows"] == 1500
    assert figures["commits"]
    quantiles = figures["distances"]
    assert quantiles["made_nearest"][2] == pytest.approx(quantiles["real_nearest"][2], rel=0.3)
    for name in systems:
        one = figures["systems"][name]
        assert one["recall_at_10"] >= 0.95, name
        assert one["bytes"] > 0
        assert one["p50_ms"] <= one["p95_ms"]
    ours = figures["systems"]["ours"]["approximate"]
    assert ours["rows"] == 1500
    assert set(ours["recall_of"]) == {"rows", "queries"}

    monkeypatch.setattr(script, "run", lambda *a: pytest.fail("measured again"))
    monkeypatch.setattr(script, "prepare", lambda *a: pytest.fail("made again"))
    assert run(script, monkeypatch, tiny_model, tmp_path, "--systems", *systems)["figures"] == figures


def test_rows_are_the_same_every_time_and_as_far_apart_as_the_real_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with fresh_benchmarks(monkeypatch):
        rows_of = importlib.import_module("index_rows")
        rng = np.random.default_rng(0)
        topics = rng.standard_normal((12, 24))
        real = rows_of.unit(topics[rng.integers(0, 12, 200)] + 0.5 * rng.standard_normal((200, 24)))
        rows = rows_of.Rows(real, 3000, seed=1)
        assert np.array_equal(rows.block(0, 200), real)
        assert np.array_equal(rows.block(150, 900), rows.block(0, 900)[150:])
        rows_of.write_rows(rows, tmp_path / "rows.npy")
        written = np.load(tmp_path / "rows.npy")
        assert np.array_equal(written, rows.block(0, 3000))
        assert np.allclose(np.linalg.norm(written, axis=1), 1, atol=1e-5)
        found = rows_of.likeness(rows, tmp_path / "rows.npy")
        assert found["made_nearest"][2] == pytest.approx(found["real_nearest"][2], rel=0.2)
        cosines, ids = rows_of.nearest(written[:5], rows_of.on_disk(tmp_path / "rows.npy", 700), 3)
        scores = written[:5] @ written.T
        assert np.allclose(cosines, -np.sort(-scores, axis=1)[:, :3], atol=1e-6)
        assert (ids[:, 0] == np.arange(5)).all()


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None

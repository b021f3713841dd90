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


def test_an_exact_search_with_a_filter_finds_the_nearest_of_the_rows_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh_benchmarks(monkeypatch):
        rows_of, spec = importlib.import_module("index_rows"), importlib.import_module("index_spec")
        rows = rows_of.unit(np.random.default_rng(0).standard_normal((2000, 8)))
        parts = spec.filter_value(np.arange(2000))
        assert [spec.filter_value(number) for number in range(50)] == parts[:50].tolist()
        assert 0.05 < np.mean(parts < 10) < 0.15
        _, found = rows_of.nearest(
            rows[:5], rows_of.in_memory(rows), 3, lambda numbers: spec.filter_value(numbers) < 10
        )
        kept = np.flatnonzero(parts < 10)
        assert np.array_equal(found, kept[np.argsort(-(rows[:5] @ rows[kept].T), axis=1)[:, :3]])


def test_texts_are_sentences_each_once_and_cut_where_the_encoder_would(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from search_r3 import SearchR3

    with fresh_benchmarks(monkeypatch):
        texts_of = importlib.import_module("index_texts")
        (tmp_path / "a.txt").write_text(PROSE)
        (tmp_path / "b.md").write_text("The kettle is on the stove.\n")
        (tmp_path / "data.bin").write_bytes(b"\0\1")
        texts, counts = texts_of.read_texts([("documents", tmp_path)])
        assert sorted(texts) == [
            "It has been there since the early morning of the day before yesterday.",
            "The kettle is on the stove.",
        ]
        assert counts == {"documents": 2}
        tokenizer = SearchR3.from_pretrained(tiny_model).tokenizer
        short, cut = texts_of.cut(tokenizer, texts, 6, 10)
        assert cut >= 1
        for text, whole in zip(short, texts, strict=True):
            assert whole.startswith(text)
            assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= 6


def test_an_encoder_that_was_stopped_goes_on_with_the_next_part(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(
        "\n\n".join(f"The kettle of house {n} is on the stove." for n in range(25))
    )
    (tmp_path / "data" / "set").mkdir(parents=True)
    (tmp_path / "data" / "set" / "queries.jsonl").write_text('{"_id": "1", "text": "where is the kettle"}\n')
    into = tmp_path / "rows"
    given = ["index_encode.py", into, "--from", f"documents={tmp_path / 'texts'}", "--questions", tmp_path / "data"]
    given += ["--model", tiny_model, "--engine", "torch", "--part", 10]
    with benchmark_script("index_encode", monkeypatch) as encoder:
        monkeypatch.setattr(sys, "argv", [*map(str, given), "--parts", "1"])
        encoder.main()
        assert sorted(path.name for path in into.glob("*.npy")) == ["questions.npy", "rows-0000.npy"]
        before = (into / "rows-0000.npy").stat().st_mtime_ns
        (tmp_path / "texts" / "a.txt").write_text("Other words, which come too late to be read.")
        monkeypatch.setattr(sys, "argv", [*map(str, given)])
        encoder.main()
        assert [len(np.load(path)) for path in sorted(into.glob("rows-*.npy"))] == [10, 10, 5]
        assert (into / "rows-0000.npy").stat().st_mtime_ns == before
        monkeypatch.setattr(sys, "argv", [*map(str, given), "--longest", "7"])
        with pytest.raises(SystemExit, match="begun with another"):
            encoder.main()


PROSE = """
The kettle is on the stove. It has been there since the early morning
of the day before yesterday.

    0x1f 12  44 | 5  7 8
    0x2f 13  45 | 5  7 9 .
"""


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None

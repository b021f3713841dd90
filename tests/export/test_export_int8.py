"""An int8 export brings the engine's matrices along, and --engine reaches index and search."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")
from search_r3 import SearchR3
from search_r3.cli import main
from search_r3.model.engines.int8 import int8_engine, int8_weights

TEXTS = ["Bread needs flour, water and yeast.", "def mean(values):\n    return sum(values) / len(values)"]


def test_an_export_starts_at_once_and_keeps_the_contract(
    tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "exported"
    assert main(["export", str(tiny_adapter), str(out), "--format", "int8", "--json"]) == 0
    assert int8_weights.INT8_FILE in json.loads(capsys.readouterr().out)["files"]
    monkeypatch.setattr(int8_engine, "quantize_model", lambda *_: pytest.fail("it was there already"))
    model = SearchR3.from_pretrained(out, engine="int8")
    plain = SearchR3.from_pretrained(tiny_adapter, device="cpu")
    assert model.contract_hash == plain.contract_hash
    assert (1 - (model.encode_document(TEXTS) * plain.encode_document(TEXTS)).sum(1)).max() < 0.01
    assert not list((tmp_path / "cache").glob("int8/*"))
    assert main(["models", "--check", str(out), "--engine", "int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["limit"] == 0.01


def test_both_sides_of_a_query_adapter_are_exported_and_run(
    tiny_adapter: Path, save_query_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    adapter, out = save_query_adapter(tiny_adapter, tmp_path / "queries"), tmp_path / "exported"
    assert main(["export", str(adapter), str(out), "--format", "int8"]) == 0
    plain = SearchR3.from_pretrained(tiny_adapter, engine="int8")
    queries = SearchR3.from_pretrained(adapter, device="cpu")
    monkeypatch.setattr(int8_engine, "quantize_model", lambda *_: pytest.fail("it was there already"))
    model = SearchR3.from_pretrained(out, engine="int8")
    assert np.array_equal(model.encode_document(TEXTS), plain.encode_document(TEXTS))
    found, expected = (one.encode_query(TEXTS, reasoning=False) for one in (model, queries))
    assert (1 - (found * expected).sum(1)).max() < 0.02
    assert len(model.reason(TEXTS)) == len(TEXTS)


def test_an_index_of_one_engine_is_searched_by_the_other(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"id": str(n), "text": text}) for n, text in enumerate(TEXTS)]
    Path("documents.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(["index", "documents.jsonl", "--model", str(tiny_model), "--engine", "torch"]) == 0
    capsys.readouterr()
    scores = {}
    for engine in ("torch", "int8"):
        asked = ["search", "documents.index", "bread", "--mode", "vector", "--no-reasoning", "--json"]
        assert main([*asked, "--engine", engine]) == 0
        found = json.loads(capsys.readouterr().out)["hits"]
        scores[engine] = {line["id"]: line["score"] for line in found}
    assert scores["int8"].keys() == scores["torch"].keys()
    different = [abs(scores["int8"][name] - scores["torch"][name]) for name in scores["torch"]]
    assert 0 < np.max(different) < 0.05

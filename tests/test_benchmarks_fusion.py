"""The benchmark of fusion on a few documents: it fuses as a hybrid search does."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_scripts import benchmark_script

from search_r3 import SearchR3
from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.evaluation.runs import write_run
from search_r3.metrics import run_ndcg

THINGS = ("bread", "a train to Vienna", "a violin", "aspirin", "a river", "a file", "a list", "rain", "wool", "iron")
LONG = " ".join(f"word{i}" for i in range(400))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with benchmark_script("fusion", monkeypatch) as module:
        yield module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """BEIR folders "cosqa" and "scifact", whose queries name one of ten things; a document is longer than a chunk."""
    corpus = {
        str(i): Document(str(i), "", f"How to care for {thing}, part one of two.") for i, thing in enumerate(THINGS)
    }
    corpus["10"] = Document("10", "Words", LONG)
    queries = {str(i): f"what about {thing}" for i, thing in enumerate(THINGS)}
    qrels = {query: {query: 1} for query in queries}
    for name, splits in (("cosqa", ("dev", "test")), ("scifact", ("train", "test"))):
        for split in splits:
            write_beir(tmp_path / "data" / name, BeirDataset(name, corpus, queries, qrels), split)
    return tmp_path / "data"


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, data: Path, *more: object) -> dict[str, Any]:
    out = data.parent / "out.json"
    arguments = ["fusion.py", "--data", data, "--json", out, "--work", data.parent / "work", *more]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    script.main()
    return json.loads(out.read_text())["figures"]


def test_dev_queries_are_fused_as_a_hybrid_search_fuses_them(
    script: ModuleType,
    tiny_model: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = run(script, monkeypatch, data, "--model", tiny_model, "--datasets", "cosqa", "scifact")
    assert figures["datasets"]["cosqa"]["queries"] == 10
    assert figures["datasets"]["scifact"]["queries"] == 2  # 0 and 8
    assert figures["datasets"]["cosqa"] | {"documents": 11, "chunks": 13} == figures["datasets"]["cosqa"]
    assert figures["datasets"]["cosqa"]["words"] == 1

    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| | words | vectors | rrf | 0.5 | 0.6 | 0.65 | 0.7 | 0.8 |"
    assert [line.split(" | ")[0] for line in table[2:6]] == [
        "| cosqa", "| scifact", "| mean", "| least gain over the better of the two",
    ]  # fmt: skip

    model = script.FirstTokens(SearchR3.from_pretrained(tiny_model, device="cpu"), 128)
    index = script.SearchIndex.open(data.parent / "work" / f"{model.name}.128" / "cosqa")
    for settings, column in (
        ({"fusion": "rrf"}, "rrf"), ({"vector_weight": 0.5}, "0.5"), ({"vector_weight": 0.8}, "0.8"),
    ):  # fmt: skip
        found = {
            str(i): index.search(f"what about {thing}", model, k=10, reasoning=False, **settings).hits
            for i, thing in enumerate(THINGS)
        }
        ranked = {query: {hit.document: 1 / rank for rank, hit in enumerate(hits, 1)} for query, hits in found.items()}
        expected = run_ndcg(ranked, {query: {query: 1} for query in found})
        assert figures["datasets"]["cosqa"][column] == pytest.approx(sum(expected.values()) / 10, abs=1e-3)


def test_a_document_is_embedded_by_its_first_tokens(script: ModuleType, tiny_model: Path) -> None:
    model = SearchR3.from_pretrained(tiny_model, device="cpu")
    rows = script.FirstTokens(model, 5).encode_document([LONG, "A longer text about trains"], max_length=512)
    assert (rows == model.encode_document([LONG, "A longer text about trains"], max_length=5)).all()


def test_held_out_queries_are_those_of_the_datas_readme(script: ModuleType) -> None:
    assert [q for q in map(str, range(100)) if script.DEV["scifact"][1](q)] == [str(q) for q in range(0, 100, 8)]
    for name in ("strategyqa", "entailmentbank"):
        split, taken = script.DEV[name]
        assert split == "train"
        assert [taken(q) for q in ("a", "b", "q7")] == [zlib.crc32(q.encode()) % 8 == 0 for q in ("a", "b", "q7")]


def test_test_queries_are_those_of_committed_runs_and_need_no_model(
    script: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.SearchR3, "from_pretrained", lambda *a, **b: pytest.fail("a model was loaded"))
    runs = data.parent / "runs"
    worst = {str(i): {str((i + shift) % 10): 1.0 - shift / 10 for shift in range(1, 11)} for i in range(10)}
    best = {str(i): {str(i): 1.0} for i in range(10)}
    write_run(runs / "cosqa" / f"{script.VECTORS}.trec.gz", worst, "vectors")
    write_run(runs / "cosqa" / "bm25.trec.gz", best, "bm25")
    figures = run(script, monkeypatch, data, "--test", "--datasets", "cosqa", "--runs", runs)["datasets"]["cosqa"]
    assert (figures["words"], figures["bm25s"]) == (1, 1)
    assert figures["vectors"] < 0.3
    assert figures["vectors"] < figures["rrf"] <= 1
    assert capsys.readouterr().out.startswith("| | vectors | words | rrf | 0.65 | bm25s | bm25s rrf | bm25s 0.65 |")


def test_a_rehearsal_writes_no_result(
    script: ModuleType,
    tiny_model: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("common.write_report", lambda *a, **b: pytest.fail("written"))
    command = ["fusion.py", "--data", data, "--model", tiny_model, "--tiny", "--queries", "2", "--datasets", "cosqa"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    script.main()
    assert "nothing written" in capsys.readouterr().out


def test_an_unknown_data_set_is_named(script: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='unknown data set "cosqua"; did you mean "cosqa"'):
        run(script, monkeypatch, data, "--datasets", "cosqua")

"""The comparison on whole dev sets: which queries it has, its figures and p-value, and that nothing is done twice."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from benchmark_scripts import benchmark_script

from search_r3 import SearchR3
from search_r3.data.beir import BeirDataset, Document, write_beir

THINGS = ("bread", "a train to Vienna", "a violin", "aspirin", "a river", "a file", "a list", "rain", "wool", "iron")
HELD_OUT = [str(i) for i in range(200) if zlib.crc32(str(i).encode()) % 8 == 0][:4]
SPLITS = {"cosqa": "dev", "nfcorpus": "dev", "scifact": "train", "hotpotqa_more": "train", "entailmentbank": "train",
          "strategyqa": "train"}  # fmt: skip


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with benchmark_script("dev_sets", monkeypatch) as module:
        yield module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The six sets, ten documents each; of the train splits, some queries are held out and some are not."""
    for name, split in SPLITS.items():
        corpus = {str(i): Document(str(i), name, f"How to care for {thing}.") for i, thing in enumerate(THINGS)}
        ids = {"dev": ["0", "1", "2"], "train": ["8", "16", "3", *HELD_OUT]}[split]
        queries = {i: f"what about {THINGS[int(i) % 10]}" for i in ids}
        qrels = {i: {str(int(i) % 10): 1} for i in ids}
        write_beir(tmp_path / "data" / name, BeirDataset(name, corpus, queries, qrels), split)
    return tmp_path / "data"


@pytest.fixture
def run(script: ModuleType, data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(*arguments: object) -> dict[str, Any]:
        places = ["--data", data, "--work", tmp_path / "work", "--cache", tmp_path / "cache"]
        script.main([*map(str, [*arguments, *places, "--json", tmp_path / "o.json", "--device", "cpu"])])
        return json.loads((tmp_path / "o.json").read_text())["figures"]

    return run


def test_two_adapters_of_runs_and_bm25_are_compared_on_the_held_out_queries_of_six_sets(
    run: Callable[..., dict[str, Any]],
    save_adapter: Callable[..., Path],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapters = [save_adapter(tiny_model, tmp_path / name / "best", seed) for name, seed in (("one", 1), ("two", 2))]
    figures = run(*adapters, "bm25")
    shown = capsys.readouterr()
    assert figures["queries"]["cosqa.dev"] == 3
    numbers = {i for i in ("8", "16", "3", *HELD_OUT) if int(i) % 8 == 0}
    assert figures["queries"]["scifact.dev"] == len(numbers)
    hashed = {i for i in ("8", "16", "3", *HELD_OUT) if zlib.crc32(i.encode()) % 8 == 0}
    assert figures["queries"]["strategyqa.dev"] == len(hashed) < 7
    assert list(figures["systems"]) == ["one-best.off", "two-best.off", "bm25"]
    first, second, words = figures["systems"].values()
    assert first["difference"] == 0
    assert first["p"] == 1
    assert second["difference"] == pytest.approx(second["mean"] - first["mean"], abs=1e-3)
    assert words["mean"] == 1  # each thing has words of its own
    assert words["p"] < 0.05
    assert shown.out.splitlines()[4].startswith("bm25")  # the best mean first
    before = (tmp_path / "o.json").read_text()
    assert run(*adapters, "bm25") == figures
    assert capsys.readouterr().err.count("(already there)") == 18
    assert json.loads(before)["benchmark"] == "dev_sets"


def test_an_interrupted_comparison_goes_on_without_embedding_anything_twice(
    run: Callable[..., dict[str, Any]], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[str] = []
    plain = SearchR3.encode_document

    def counted(self: SearchR3, texts: list[str], **options: Any) -> np.ndarray:
        if embedded and not again:
            raise KeyboardInterrupt
        embedded.extend(texts)
        return plain(self, texts, **options)

    again = False
    monkeypatch.setattr(SearchR3, "encode_document", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, "--sets", "cosqa", "scifact")
    again = True
    run(tiny_model, "--sets", "cosqa", "scifact")
    assert len(embedded) == len(set(embedded)) == 2 * len(THINGS)


def test_each_set_weighs_the_same_however_many_queries_it_has(script: ModuleType) -> None:
    row = script.equally_weighed([np.array([0.1, 0.3]), np.array([-0.4] * 6)])
    assert row.mean() == pytest.approx((0.2 - 0.4) / 2)
    assert len(row) == 8


def test_systems_of_one_name_and_unknown_sets_are_refused(run: Callable[..., dict[str, Any]], tiny_model: Path) -> None:
    with pytest.raises(SystemExit, match="two systems have one name"):
        run("bm25", "bm25")
    with pytest.raises(ValueError, match="nothing"):
        run("bm25", "--sets", "nothing")

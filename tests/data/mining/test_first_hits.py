"""`data read`: each query gets the first hits of its own source's corpus, whether they answer it or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search_r3.cli import main
from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.data.mining import first_hits as module
from search_r3.data.mining.first_hits import add_first_hits, corpus_tag, first_hits
from search_r3.data.mining.scorers import bm25_scorer
from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs
from search_r3.errors import InputError

PAIRS = [
    TrainingPair("a", "aspirin heart attack", "Aspirin lowers the risk of a heart attack.", source="queries:toy/train"),
    TrainingPair("b", "aspirin bleeding", "Aspirin raises the risk of bleeding.", source="titles:toy"),
    TrainingPair("c", "heart surgery", "Surgery on the heart needs a pump.", source="queries:toy/train"),
    TrainingPair("d", "sort aspirin", "def sort(aspirin): heart attack", source="docstrings:x"),
    TrainingPair("e", "nothing in common", "Yeast makes bread rise.", source="queries:other"),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    return tmp_path / "pairs.jsonl"


def test_the_corpus_of_a_source_is_that_of_its_data_set_or_package_or_else_its_kind() -> None:
    tags = [corpus_tag(name) for name in ("queries:scifact/train", "docstrings:torch", "titles", "")]
    assert tags == ["scifact", "torch", "titles", ""]


def test_hits_are_the_best_of_their_corpus_and_none_that_shares_no_word() -> None:
    scores_N, own = np.array([9.0, 0.0, 2.0, 5.0, 2.0], dtype=np.float32), np.array([1, 2, 3, 4])
    assert first_hits(scores_N, own, 3, True) == [3, 2, 4]
    assert first_hits(scores_N, own, 9, True) == [3, 2, 4]
    assert first_hits(scores_N, own, 9, False) == [3, 2, 4, 1]


def test_every_pair_gets_the_hits_of_its_own_corpus_answers_among_them(source: Path, tmp_path: Path) -> None:
    manifest = add_first_hits(source, tmp_path / "read.jsonl", bm25_scorer(), 2)
    found = {pair.id: pair for pair in read_pairs(tmp_path / "read.jsonl")}
    assert found["a"].passages[0] == PAIRS[0].positive
    assert set(found["a"].passages) <= {pair.positive for pair in PAIRS[:3]}  # not the docstring, which has the words
    assert found["d"].passages == (PAIRS[3].positive,)
    assert found["e"].passages == ()
    assert all(pair.positive == PAIRS[i].positive for i, pair in enumerate(found.values()))
    assert (manifest["pairs"], manifest["pairs_with_none"], manifest["pairs_with_an_answer"]) == (5, 1, 4)
    assert manifest["passages"] == sum(len(pair.passages) for pair in found.values())
    assert json.loads((tmp_path / "read.jsonl.manifest.json").read_text()) == manifest
    assert not (tmp_path / "read.jsonl.partial").exists()


def test_a_data_set_s_documents_are_searched_for_its_own_queries_only(source: Path, tmp_path: Path) -> None:
    text = "heart attack aspirin aspirin"
    write_beir(
        tmp_path / "data/toy", BeirDataset("toy", {"1": Document("1", "", text)}, {"q": "x"}, {"q": {"1": 1}}), "test"
    )
    add_first_hits(source, tmp_path / "read.jsonl", bm25_scorer(), 3, corpora=["toy"], data_root=tmp_path / "data")
    found = {pair.id: pair.passages for pair in read_pairs(tmp_path / "read.jsonl")}
    assert text in found["a"]
    assert text not in found["d"]


def test_an_interrupted_run_resumes_and_gives_the_same_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_first_hits(source, tmp_path / "whole.jsonl", bm25_scorer(), 2)
    monkeypatch.setattr(module, "BLOCK", 2)
    scorer: Any = bm25_scorer()
    asked: list[str] = []
    score = scorer.score

    def failing(queries: list[str]) -> np.ndarray:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.extend(queries)
        return score(queries)

    scorer.score = failing
    with pytest.raises(KeyboardInterrupt):
        add_first_hits(source, tmp_path / "read.jsonl", scorer, 2)
    add_first_hits(source, tmp_path / "read.jsonl", bm25_scorer(), 2)
    assert (tmp_path / "read.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_cannot_be_read_is_refused_in_a_line(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="passages must be 1 or more, got 0"):
        add_first_hits(source, tmp_path / "x.jsonl", bm25_scorer(), 0)
    write_pairs(tmp_path / "none.jsonl", PAIRS[4:])
    with pytest.raises(InputError, match="no query has a hit"):
        add_first_hits(tmp_path / "none.jsonl", tmp_path / "x.jsonl", bm25_scorer())


def test_the_command_says_how_much_it_found(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "read", str(source), str(tmp_path / "read.jsonl"), "--passages", "2"]) == 0
    assert "an answer is among those of 4 pairs" in capsys.readouterr().out

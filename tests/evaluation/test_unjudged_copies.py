"""Copies of a relevant document that nobody judged are counted and named, and change no measure."""

from __future__ import annotations

from pathlib import Path

from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.evaluation.publish.tables import results_markdown
from search_r3.evaluation.records import unjudged_copies
from search_r3.evaluation.remarks import remarks
from search_r3.evaluation.suite import evaluate


def dataset(qrels: dict[str, dict[str, int]]) -> BeirDataset:
    texts = {
        "tides": ("Tides", "The moon moves the sea."),
        "tides2": ("", "tides  the MOON moves the sea.\n"),
        "tides3": ("Tides", "The moon moves the sea."),
        "bread": ("", "Yeast makes bread rise."),
        "bread2": ("", "Yeast makes bread rise."),
        "empty": ("", ""),
        "empty2": ("", " "),
        "list": ("", "A list in Python."),
    }
    corpus = {name: Document(name, title, text) for name, (title, text) in texts.items()}
    queries = {"q1": "what moves the sea", "q2": "why does bread rise", "q3": "moon"}
    return BeirDataset("copied", corpus, queries, qrels)


def test_copies_without_a_judgment_are_named_with_what_they_copy() -> None:
    found = unjudged_copies(dataset({"q1": {"tides": 1}, "q2": {"bread": 2, "bread2": 1}, "q3": {"tides2": 1}}))
    assert found == {
        "num_unjudged_copies": 3,
        "num_queries_with_unjudged_copies": 2,
        "unjudged_copies": ["tides2 of tides", "tides3 of tides", "tides of tides2"],
    }
    assert unjudged_copies(dataset({"q1": {"tides": 1}}), most=1)["unjudged_copies"] == ["tides2 of tides"]


def test_judged_copies_and_empty_texts_are_none() -> None:
    """A copy that is judged not relevant is the judges' word; all empty documents are alike, and never found."""
    assert unjudged_copies(dataset({"q1": {"tides": 1, "tides2": 0, "tides3": 0}})) == {}
    assert unjudged_copies(dataset({"q1": {"tides": 0}, "q2": {"empty": 1, "gone": 1}, "q3": {"list": 1}})) == {}


def test_an_evaluation_says_so_and_measures_as_before(tmp_path: Path) -> None:
    write_beir(tmp_path / "copied", dataset({"q2": {"bread2": 1}}), "test")
    write_beir(tmp_path / "judged", dataset({"q2": {"bread2": 1, "bread": 0}}), "test")
    records = evaluate(["copied", "judged"], ["bm25"], tmp_path / "r", data_root=tmp_path, use_cache=False)
    copied, judged = records
    assert copied["measures"] == judged["measures"]
    assert remarks(copied)[-1] == (
        "1 documents are copies of a relevant document (bread of bread2) without a judgment, and count as not "
        "relevant, for 1 queries"
    )
    assert not any("copies" in line for line in remarks(judged))
    note = "Copies of relevant documents without a judgment, which count as not relevant: 1 of copied."
    assert note in results_markdown([copied])
    assert "Copies" not in results_markdown([judged])

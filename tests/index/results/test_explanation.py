"""A search explains its hits: marked words, weak hits, equal passages, and words that occur nowhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from search_r3.index import SearchIndex, SourceDocument, build_index
from search_r3.index.backends.index_backend import FloorRecord, RelevanceFloor
from search_r3.index.backends.lance.floor_record import read_floor
from search_r3.index.build import relevance_floor

LICENSE = "The package is under the Apache License."
DOCUMENTS = [
    *(SourceDocument(f"{name}/readme.md", name, LICENSE, path=f"{name}/readme.md", kind="text") for name in "abcde"),
    SourceDocument("bread", "Baking", "Bread needs flour, water and yeast. Knead the dough."),
    SourceDocument("train", "Trains", "The train to Vienna leaves at nine."),
]


@pytest.fixture
def index(tmp_path: Path, model) -> SearchIndex:
    build_index(tmp_path / "an.index", DOCUMENTS, model, progress=False)
    return SearchIndex.open(tmp_path / "an.index")


def test_passages_with_the_same_text_are_one_hit_that_names_the_others(index, model) -> None:
    plain = index.search("which license", model, k=4, reasoning=False)
    assert plain.explanation is None
    assert "explanation" not in plain.to_dict()
    assert [hit.text for hit in plain.hits] == [LICENSE] * 4
    found = index.search("which license", model, k=3, reasoning=False, explained=True)
    assert [hit.text for hit in found.hits].count(LICENSE) == 1
    assert len(found.hits) == 3
    same = found.explanation.hits[0].same
    assert {found.hits[0].document, *(one.document for one in same)} == {f"{name}/readme.md" for name in "abcde"}
    assert found.hits[0].document == "a/readme.md"  # the first by id, in every search
    assert [one.path for one in same] == [f"{name}/readme.md" for name in "bcde"]


def test_words_of_the_question_and_of_the_reasoning_are_marked_apart(index, model) -> None:
    def reason(texts, **_):
        made = type(model).reason(model, texts)
        for one in made:
            one.text = "flour, yeast, bread"
        return made

    model.reason = reason
    found = index.search("bread kneaded", model, mode="vector", k=1, explained=True)
    hit, about = found.hits[0], found.explanation.hits[0]
    marked = [(hit.text[start:end], kind) for start, end, kind in about.marks]
    assert marked == [
        ("Bread", "question"), ("flour", "reasoning"), ("yeast", "reasoning"), ("Knead", "question"),
    ]  # fmt: skip
    assert [(hit.snippet[start:end], kind) for start, end, kind in about.snippet_marks] == marked
    assert hit.text[slice(*about.snippet_span)] == hit.snippet


def test_words_that_occur_nowhere_are_named(index, model) -> None:
    found = index.search("which zxqv licence for the dough", model, reasoning=False, explained=True)
    assert found.explanation.missing_words == ["zxqv"]  # "license" is the same word
    assert index.search("the dough", model, reasoning=False, explained=True).explanation.missing_words == []


def test_a_hit_no_closer_than_unrelated_questions_is_weak_unless_it_has_the_words(index, model, monkeypatch) -> None:
    monkeypatch.setattr(type(index.backend), "relevance_floor", RelevanceFloor(2.0, 3.0))  # above every cosine
    gibberish = index.search("zxqv wvut", model, reasoning=False, explained=True)
    assert gibberish.hits
    assert all(about.weak for about in gibberish.explanation.hits)
    assert gibberish.explanation.floor == 3.0  # of unknown words
    found = index.search("train to Vienna", model, reasoning=False, explained=True)
    assert not found.explanation.hits[0].weak
    assert found.explanation.floor == 2.0
    monkeypatch.setattr(type(index.backend), "relevance_floor", None)
    assert not any(about.weak for about in index.search("zxqv", model, explained=True).explanation.hits)


def test_a_model_whose_queries_the_floor_was_not_measured_with_has_no_weak_hits(index, model, monkeypatch) -> None:
    for contract, weak in ((model.contract_hash, True), ("", True), ("that of another query adapter", False)):
        record = FloorRecord(RelevanceFloor(2.0, 3.0), 5, contract)
        assert FloorRecord.from_json(record.to_json()) == record
        monkeypatch.setattr(type(index.backend), "floor_record", record)
        about = index.search("zxqv wvut", model, reasoning=False, explained=True).explanation
        assert all(hit.weak is weak for hit in about.hits)
        assert (about.floor is not None) is weak


def test_a_search_by_words_has_no_weak_hits(index, monkeypatch) -> None:
    monkeypatch.setattr(type(index.backend), "relevance_floor", RelevanceFloor(2.0, 3.0))
    found = index.search("train somewhere", None, mode="text", explained=True)
    assert [about.weak for about in found.explanation.hits] == [False]
    assert found.explanation.floor is None
    assert found.explanation.missing_words == ["somewhere"]


def test_a_build_measures_the_floor_and_again_when_the_index_has_grown(tmp_path: Path, model, monkeypatch) -> None:
    asked = []

    def measure(backend, encoder):
        asked.append(backend.count())
        return RelevanceFloor(0.25, 0.5)

    monkeypatch.setattr(relevance_floor, "measure_floor", measure)
    documents = [SourceDocument(str(number), "", f"text {number}") for number in range(30)]
    for count in (20, 20, 21, 30):
        build_index(tmp_path / "an.index", documents[:count], model, progress=False)
    assert asked == [20, 30]
    opened = SearchIndex.open(tmp_path / "an.index")
    assert opened.backend.relevance_floor == RelevanceFloor(0.25, 0.5)
    assert (read_floor(opened.table).rows, read_floor(opened.table).contract_hash) == (30, model.contract_hash)
    assert SearchIndex.open_snapshot(tmp_path / "an.index").backend.relevance_floor == RelevanceFloor(0.25, 0.5)


def test_the_floor_is_above_most_unrelated_questions_and_some_may_be_related(index, model) -> None:
    floor = relevance_floor.measure_floor(index.backend, model)
    vectors = np.asarray(model.encode_query(list(relevance_floor.QUESTIONS)))
    best = [index.backend.search(vector, 1)[0][1] for vector in vectors]
    assert np.median(best) < floor.questions
    assert np.mean(np.array(best) <= floor.questions) > 0.7
    values = [0.5, 0.52, 0.48, 0.51, 0.49, 0.9, 0.95]
    assert relevance_floor._upper(values) < 0.6

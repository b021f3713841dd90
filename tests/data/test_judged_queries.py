"""Judged queries and clicks by documents' ids, their held-out part, and near copies that are left out."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.data.judged_queries import JudgedQuery, read_excluded_queries, read_judged_queries, split_queries
from search_r3.data.mining.word_overlap import near_twins, word_set
from search_r3.errors import InputError


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestReading:
    def test_judgments_with_and_without_grades(self, tmp_path: Path) -> None:
        file = write(
            tmp_path / "q.jsonl",
            {"id": 7, "query": "which fee", "relevant": ["a", {"id": "b", "grade": 3}]},
            {"query": " which licence ", "relevant": ["c"]},
            {"query": "which fee", "relevant": [{"id": "a", "grade": 2}]},
        )
        assert read_judged_queries(file) == [
            JudgedQuery("7", "which fee", {"a": 2.0, "b": 3.0}),
            JudgedQuery("which licence", "which licence", {"c": 1.0}),
        ]

    def test_clicks_of_one_query_add_up(self, tmp_path: Path) -> None:
        file = write(
            tmp_path / "clicks.jsonl", {"query": "fee", "clicked": ["a", 5]}, {"query": "fee", "clicked": ["a", "a"]}
        )
        assert read_judged_queries(file) == [JudgedQuery("fee", "fee", {"a": 3, "5": 1})]

    def test_a_beir_folder_is_read_without_its_corpus(self, tmp_path: Path) -> None:
        corpus = {"d": Document("d", "", "text"), "e": Document("e", "", "more")}
        queries = {"1": "one", "2": "two", "3": "three"}
        judged = {"1": {"d": 2, "e": 0}, "2": {"e": 0}}
        write_beir(tmp_path / "set", BeirDataset("set", corpus, queries, judged), "train")
        (tmp_path / "set" / "corpus.jsonl").unlink()
        assert read_judged_queries(tmp_path / "set") == [JudgedQuery("1", "one", {"d": 2.0})]
        with pytest.raises(InputError, match='has no split "test"; splits there: train'):
            read_judged_queries(tmp_path / "set", "test")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"query": "x"}, 'line 1: give either "relevant" or "clicked"'),
            ({"query": "x", "relevant": ["a"], "clicked": ["a"]}, "give either"),
            ({"query": "", "clicked": ["a"]}, 'the field "query" is empty'),
            ({"query": "x", "clicked": []}, "at least one id"),
            ({"query": "x", "clicked": "a"}, "must be a list"),
            ({"query": "x", "clicked": [None]}, "must hold ids"),
            ({"query": "x", "relevant": [{"id": "a", "grade": 0}]}, '"grade" must be a number above 0, got 0'),
            ({"query": "x", "relevant": [{"grade": 1}]}, "must hold ids"),
            ({"query": "x", "relevant": ["a"], "positve": 1}, "positve"),
        ],
    )
    def test_a_broken_line_is_named(self, tmp_path: Path, row: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_judged_queries(write(tmp_path / "q.jsonl", row))

    def test_texts_of_excluded_queries(self, tmp_path: Path) -> None:
        trained = write(tmp_path / "trained.jsonl", {"query": "zero", "clicked": ["a"]})
        other = write(tmp_path / "x.jsonl", {"query": "one"}, {"text": "two"})
        assert read_excluded_queries(trained, "train", [other]) == ["one", "two"]
        assert read_excluded_queries(trained, "train") == []

    def test_queries_of_other_splits_are_excluded_and_those_trained_on_are_not(self, tmp_path: Path) -> None:
        corpus = {"d": Document("d", "", "text")}
        for name in ("set", "other"):
            queries = {"1": f"{name} one", "2": f"{name} two", "3": f"{name} three"}
            for split, chosen in (("train", "12"), ("dev", "2"), ("test", "3")):
                dataset = BeirDataset(name, corpus, queries, {i: {"d": 1} for i in chosen})
                write_beir(tmp_path / name, dataset, split)
        folder = tmp_path / "set"
        assert read_excluded_queries(folder, "train") == ["set three"]
        assert read_excluded_queries(folder, "train", [folder]) == ["set three"]
        assert read_excluded_queries(folder, "train", [tmp_path / "other"]) == [
            "set three", "other one", "other two", "other three",
        ]  # fmt: skip


QUERIES = [JudgedQuery(f"q{i}", f"word{i} other{i} third{i}", {f"d{i}": 1.0}) for i in range(40)]


class TestSplit:
    def test_every_query_whose_crc_divides_is_held_out_and_the_rest_trained_on(self) -> None:
        split = split_queries(QUERIES, {f"d{i}" for i in range(40)}, 4)
        assert [query.id for query in split.held_out] == [f"q{i}" for i in range(40) if not zlib.crc32(b"q%d" % i) % 4]
        assert {query.id for query in split.train} == {f"q{i}" for i in range(40)} - {q.id for q in split.held_out}
        assert (split.near_copies, split.without_documents, split.unknown_documents) == (0, 0, 0)

    def test_near_copies_of_held_out_and_excluded_queries_are_left_out_and_counted(self) -> None:
        plain = split_queries(QUERIES, {f"d{i}" for i in range(40)}, 4)
        held, trained = plain.held_out[0], plain.train[0]
        copy = JudgedQuery("copy2", f"{held.text}!", {"d0": 1.0})
        assert zlib.crc32(b"copy2") % 4
        split = split_queries([*QUERIES, copy], {f"d{i}" for i in range(40)}, 4, [trained.text.upper()])
        assert split.near_copies == 2
        assert {query.id for query in plain.train} - {query.id for query in split.train} == {trained.id}
        assert "copy2" not in {query.id for query in split.train}

    def test_documents_that_the_index_lacks_are_counted(self) -> None:
        queries = [*QUERIES, JudgedQuery("lost", "a lost one", {"x": 1.0, "y": 1.0})]
        split = split_queries(queries, {f"d{i}" for i in range(30)}, 4)
        assert (split.without_documents, split.unknown_documents) == (11, 12)

    def test_too_few_are_refused(self) -> None:
        with pytest.raises(InputError, match="0 of 40 queries have a relevant document in the index"):
            split_queries(QUERIES, {"nothing"}, 4)


def test_near_twins_are_those_that_all_comparisons_find() -> None:
    words = ["fee", "port", "ship", "anchor", "rope", "sail", "mast", "deck", "keel", "bow"]
    texts = [" ".join(words[i % 10 : i % 10 + 2 + i % 4] + words[: i % 3]) for i in range(60)] + ["", "unseen words"]
    others = [" ".join(words[(3 * i) % 10 :][: 2 + i % 5]) for i in range(20)]
    for share in (0.5, 0.6, 1.0):
        expected = []
        for text in texts:
            mine = word_set(text)
            overlaps = [len(mine & word_set(other)) / max(1, len(mine | word_set(other))) for other in others]
            expected.append(max(overlaps) >= share)
        assert near_twins(texts, others, share) == expected
        assert any(expected)
        assert not all(expected)

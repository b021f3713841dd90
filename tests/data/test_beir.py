"""BEIR folders: what is read, and that every broken line is refused with its file, line and field."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from search_r3.data.beir import BeirDataset, Document, load_beir, small, write_beir
from search_r3.data.io.jsonl import read_jsonl
from search_r3.errors import InputError

CORPUS = [
    {"_id": "d1", "title": "Rivers", "text": "The Volga is long."},
    {"_id": "d2", "title": "", "text": "Bread needs yeast."},
    {"_id": "d3", "text": "No title here."},
]
QUERIES = [{"_id": "q1", "text": "longest river"}, {"_id": "q2", "text": "baking"}, {"_id": "q3", "text": "unjudged"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td2\t-1\n"


def write_folder(folder: Path, corpus=CORPUS, queries=QUERIES, qrels=QRELS) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8")
    return folder


def test_a_folder_is_read_in_order_with_grades_of_any_sign(tmp_path):
    dataset = load_beir(write_folder(tmp_path / "toy"), "test")
    assert dataset.name == "toy"
    assert list(dataset.corpus) == ["d1", "d2", "d3"]
    assert dataset.queries == {"q1": "longest river", "q2": "baking"}
    assert dataset.qrels == {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": -1}}


def test_without_a_split_every_query_stays_and_all_judgments_are_joined(tmp_path):
    folder = write_folder(tmp_path / "toy")
    (folder / "qrels" / "dev.tsv").write_text("q3\td3\t1\n", encoding="utf-8")
    dataset = load_beir(folder)
    assert list(dataset.queries) == ["q1", "q2", "q3"]
    assert dataset.qrels["q3"] == {"d3": 1}
    assert dataset.qrels["q1"] == {"d1": 2, "d2": 0}


def test_full_text_joins_title_and_text():
    assert Document("a", "Title", "Text.").full_text == "Title Text."
    assert Document("a", "", " Text. ").full_text == "Text."


def test_byte_order_mark_windows_line_ends_and_blank_lines_are_harmless(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"_id": "1"}\r\n\r\n{"_id": "2"}\r\n')
    assert list(read_jsonl(path)) == [(1, {"_id": "1"}), (3, {"_id": "2"})]


BROKEN_CORPUS = {
    "broken JSON": ('{"_id": "d9", "text": ', ["line 4", "not valid JSON"]),
    "not an object": ("[1, 2]", ["line 4", "a list"]),
    "NaN": ('{"_id": "d9", "text": "a", "x": NaN}', ["line 4", "NaN"]),
    "absurd nesting": ("[" * 100_000, ["line 4", "not valid JSON"]),
    "missing id": ('{"text": "a"}', ["line 4", '"_id"', "missing"]),
    "fraction as id": ('{"_id": 7.5, "text": "a"}', ["line 4", '"_id"', "got 7.5"]),
    "space in id": ('{"_id": "d 9", "text": "a"}', ["line 4", '"_id"', "white space"]),
    "missing text": ('{"_id": "d9", "title": "t"}', ["line 4", '"text"', "missing"]),
    "null text": ('{"_id": "d9", "text": null}', ["line 4", '"text"', "null"]),
    "list as title": ('{"_id": "d9", "title": [], "text": "a"}', ["line 4", '"title"', "a list"]),
    "duplicate": ('{"_id": "d1", "text": "again"}', ["line 4", '"d1"', "line 1"]),
    "half a surrogate pair": ('{"_id": "d9", "text": "a \\ud800"}', ["line 4", '"text"', "surrogate"]),
}


@pytest.mark.parametrize(("line", "expected"), BROKEN_CORPUS.values(), ids=BROKEN_CORPUS.keys())
def test_a_broken_corpus_line_is_refused_by_file_line_and_field(tmp_path, line, expected):
    folder = write_folder(tmp_path / "toy", corpus=[*CORPUS, line])
    with pytest.raises(InputError) as caught:
        load_beir(folder, "test")
    for part in ["corpus.jsonl", *expected]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_document_is_kept_with_a_warning_that_names_it(tmp_path):
    folder = write_folder(tmp_path / "toy", corpus=[*CORPUS, {"_id": "d4", "title": " ", "text": ""}])
    with pytest.warns(UserWarning, match=r'1 of 4 documents .*first: "d4" in line 4'):
        assert load_beir(folder, "test").corpus["d4"].full_text == ""


def test_a_corpus_of_nothing_but_empty_documents_is_refused(tmp_path):
    folder = write_folder(tmp_path / "toy", corpus=[{"_id": "d1", "text": ""}], qrels="q1\td1\t1\n")
    with pytest.raises(InputError, match="every document has an empty"):
        load_beir(folder, "test")


def test_bad_utf8_names_the_line_and_byte(tmp_path):
    folder = write_folder(tmp_path / "toy")
    with open(folder / "queries.jsonl", "ab") as handle:
        handle.write(b'{"_id": "q9", "text": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"queries\.jsonl, line 4: not UTF-8 text \(byte 0xe9 at column 27"):
        load_beir(folder, "test")


def test_an_empty_query_is_refused(tmp_path):
    folder = write_folder(tmp_path / "toy", queries=[*QUERIES, {"_id": "q9", "text": "  "}])
    with pytest.raises(InputError, match=r'queries\.jsonl, line 4: the field "text" is empty'):
        load_beir(folder, "test")


BROKEN_QRELS = {
    "two columns": ("q1\td1", "got 2"),
    "spaces": ("q1 d1 1", "got 1"),
    "a fraction": ("q1\td1\t0.5", "'0.5'"),
    "NaN": ("q1\td1\tnan", "'nan'"),
    "unknown query": ("q8\td1\t1", '"q8" is not in queries'),
    "unknown document": ("q1\td8\t1", '"d8" is not in corpus'),
    "two grades": ("q1\td1\t1", "already judged 2 in line 2"),
}


@pytest.mark.parametrize(("line", "expected"), BROKEN_QRELS.values(), ids=BROKEN_QRELS.keys())
def test_a_broken_judgment_is_refused(tmp_path, line, expected):
    folder = write_folder(tmp_path / "toy", qrels=QRELS + line + "\n")
    with pytest.raises(InputError) as caught:
        load_beir(folder, "test")
    assert "test.tsv, line 5" in str(caught.value)
    assert expected in str(caught.value)


def test_an_unknown_split_lists_those_there_are(tmp_path):
    with pytest.raises(InputError, match=r'no split "dev".*: test'):
        load_beir(write_folder(tmp_path / "toy"), "dev")


def test_judgments_of_documents_that_are_not_there_are_kept_only_for_who_asks(tmp_path):
    folder = write_folder(tmp_path / "toy", qrels=QRELS + "q1\td8\t1\n")
    with pytest.raises(InputError, match="--allow-missing"):
        load_beir(folder, "test")
    assert load_beir(folder, "test", allow_missing=True).qrels["q1"] == {"d1": 2, "d2": 0, "d8": 1}
    assert load_beir(folder, allow_missing=True).corpus.keys() == {"d1", "d2", "d3"}


def test_missing_places_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        load_beir(tmp_path / "nowhere")
    folder = write_folder(tmp_path / "toy")
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(InputError, match=r"corpus\.jsonl does not exist"):
        load_beir(folder)
    with pytest.raises(InputError, match="is a file"):
        load_beir(folder / "queries.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    folder = write_folder(tmp_path / "toy")
    (folder / "corpus.jsonl").chmod(0)
    with pytest.raises(InputError, match=r"corpus\.jsonl may not be read"):
        load_beir(folder)


def test_what_is_written_reads_back_the_same(tmp_path):
    corpus = {"a": Document("a", "Ünï", "テキスト"), "b": Document("b", "", "line\u2028separator")}
    dataset = BeirDataset("copy", corpus, {"q": "what?"}, {"q": {"a": 3, "b": 0}})
    write_beir(tmp_path / "copy", dataset, "train")
    assert load_beir(tmp_path / "copy", "train") == dataset


def make_dataset(queries: int = 20, documents: int = 100) -> BeirDataset:
    corpus = {f"d{i}": Document(f"d{i}", "", f"text {i}") for i in range(documents)}
    qrels = {f"q{i}": {f"d{i}": 1, f"d{i + 1}": 0} for i in range(queries)}
    return BeirDataset("toy", corpus, {f"q{i}": f"query {i}" for i in range(queries)}, qrels)


def test_the_small_part_keeps_every_judged_document_and_is_always_the_same():
    dataset = make_dataset()
    part = small(dataset, queries=5, documents=30)
    assert part.name == "toy.small"
    assert (len(part.queries), len(part.corpus)) == (5, 30)
    assert {d for judged in part.qrels.values() for d in judged} <= set(part.corpus)
    shuffled = BeirDataset("toy", dict(reversed(dataset.corpus.items())), dataset.queries, dataset.qrels)
    assert set(small(shuffled, queries=5, documents=30).corpus) == set(part.corpus)
    assert set(small(dataset, queries=5, documents=30, seed=1).queries) != set(part.queries)


def test_the_small_part_leaves_out_queries_with_no_relevant_document():
    dataset = make_dataset(queries=3)
    dataset.qrels["q0"] = {"d0": 0}
    assert set(small(dataset, queries=3, documents=10).queries) == {"q1", "q2"}

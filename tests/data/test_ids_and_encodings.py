"""One rule for ids and one for encodings, whichever reader meets them: a data set, an index, pairs, runs, recipes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from search_r3.data.beir import load_beir
from search_r3.data.io.jsonl import read_jsonl
from search_r3.data.pairs import read_pairs
from search_r3.data.recipe import read_recipe
from search_r3.data.sources.pair_files import own_pairs
from search_r3.data.sources.registry import SOURCES
from search_r3.data.synthesis.source_documents import read_collection
from search_r3.errors import InputError
from search_r3.evaluation.baselines.external_models import parse_external_model
from search_r3.evaluation.runs import read_gzip_lines, read_run, write_jsonl_gzip
from search_r3.evaluation.suite_config import SuitePlan
from search_r3.index.readers.path_source import open_source
from search_r3.server.keys import ApiKey, read_keys
from search_r3.training.config import load_config

BOM = b"\xef\xbb\xbf"
LARGE = 2**70
"""More than a float, or SQL, can hold."""


def beir(folder: Path, document: Any, query: Any, key: str = "_id") -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(json.dumps({key: document, "text": "Yeast makes bread rise."}) + "\n")
    (folder / "queries.jsonl").write_text(json.dumps({key: query, "text": "why does bread rise"}) + "\n")
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{query}\t{document}\t1\n")
    return folder


def pairs(path: Path, identity: Any) -> Path:
    path.write_text(json.dumps({"id": identity, "query": "why does bread rise", "positive": "Yeast."}) + "\n")
    return path


@pytest.mark.parametrize("number", [0, 7, -3, LARGE])
@pytest.mark.parametrize("key", ["_id", "id"])
def test_a_whole_number_is_the_id_of_its_digits_everywhere(tmp_path: Path, number: int, key: str) -> None:
    folder = beir(tmp_path / "set", number, 10 + number, key)
    dataset = load_beir(folder, "test")
    assert dataset.qrels == {str(10 + number): {str(number): 1}}
    assert list(dataset.corpus) == [str(number)]
    assert list(dataset.queries) == [str(10 + number)]
    for source in (folder, folder / "corpus.jsonl"):
        assert [document.id for document in open_source(source)] == [str(number)]
    for path in (folder, folder / "corpus.jsonl"):
        assert [document.id for document in read_collection(path).documents] == [str(number)]
    assert [pair.id for pair in read_pairs(pairs(tmp_path / "pairs.jsonl", number))] == [str(number)]


@pytest.mark.parametrize(
    ("identity", "shown"), [(1.0, "1.0"), (True, "true"), (None, "null"), ([7], r"\[7\]"), ({}, "{}")]
)
def test_any_other_value_is_no_id_anywhere(tmp_path: Path, identity: Any, shown: str) -> None:
    folder = beir(tmp_path / "set", identity, "q1")
    readers = [
        lambda: load_beir(folder, "test"),
        lambda: list(open_source(folder)),
        lambda: list(open_source(folder / "corpus.jsonl")),
        lambda: read_collection(folder / "corpus.jsonl"),
        lambda: read_pairs(pairs(tmp_path / "pairs.jsonl", identity)),
    ]
    for read in readers:
        with pytest.raises(InputError, match=f"line 1: .*must be a string or a whole number, got {shown}; put it in"):
            read()


def test_a_number_and_its_digits_are_one_id(tmp_path: Path) -> None:
    folder = beir(tmp_path / "set", 7, "q1")
    with open(folder / "corpus.jsonl", "a") as handle:
        handle.write('{"_id": "7", "text": "the same id again"}\n')
    with pytest.raises(InputError, match='line 2: the _id "7" was already used in line 1'):
        load_beir(folder, "test")
    with pytest.raises(InputError, match='line 2: the id "7" was already used on line 1'):
        list(open_source(folder))


def test_judgments_name_a_beir_folders_documents_by_underscore_id_wherever_both_stand(tmp_path: Path) -> None:
    folder = beir(tmp_path / "set", "d1", "q1")
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "id": 99, "text": "Yeast."}\n')
    assert list(load_beir(folder, "test").corpus) == ["d1"]
    assert [document.id for document in open_source(folder)] == ["d1"]


# ---------------------------------------------------------------------------------------------------------- encodings


READERS: dict[str, tuple[str, Any, Any]] = {
    "run": ("q1 Q0 d1 1 0.5 bm25\n", read_run, {"q1": {"d1": 0.5}}),
    "jsonl": ('{"a": 1}\n', lambda path: list(read_jsonl(path)), [(1, {"a": 1})]),
    "pairs.jsonl": (
        '{"id": "a", "query": "q", "positive": "p"}\n',
        lambda path: [(pair.id, pair.query) for pair in read_pairs(path)],
        [("a", "q")],
    ),
    "own.jsonl": (
        '{"query": "q", "positive": "p"}\n',
        lambda path: [pair.query for pair in own_pairs(str(path), license="CC0").pairs],
        ["q"],
    ),
    "own.csv": (
        "query,positive\nq,p\n",
        lambda path: [pair.query for pair in own_pairs(str(path), license="CC0").pairs],
        ["q"],
    ),
    "own.tsv": (
        "query\tpositive\nq\tp\n",
        lambda path: [pair.query for pair in own_pairs(str(path), license="CC0").pairs],
        ["q"],
    ),
    "documents.csv": ("id,text\na,b\n", lambda path: [d.id for d in open_source(path)], ["a"]),
    "documents.tsv": ("id\ttext\na\tb\n", lambda path: [d.id for d in open_source(path)], ["a"]),
    "documents.jsonl": ('{"id": "a", "text": "b"}\n', lambda path: [d.id for d in open_source(path)], ["a"]),
    "notes.md": ("# Title\n", lambda path: [d.text for d in open_source(path)], ["# Title\n"]),
    "suite.yaml": (
        "systems: [bm25]\ndatasets: [scifact]\n",
        lambda path: load_config(path, SuitePlan).systems,
        ["bm25"],
    ),
    "recipe.yaml": (
        "seed: 3\nsources: [{kind: titles, dataset: scifact}]\n",
        lambda path: read_recipe(path, SOURCES)["seed"],
        3,
    ),
    "system.yaml": ("model: m\nquery_prompt: q\n", lambda path: parse_external_model(str(path)).model, "m"),
    "keys": ("secret\n", lambda path: read_keys(path, None), (ApiKey("secret"),)),
}


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str) -> None:
    text, read, expected = READERS[name]
    path = tmp_path / name
    path.write_bytes(BOM + text.encode())
    assert read(path) == expected
    path.write_bytes(BOM + text.replace("\n", "\r\n").encode())
    if name != "notes.md":
        assert read(path) == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "latin-1"])
@pytest.mark.parametrize("name", READERS)
def test_another_encoding_is_refused_in_one_line_that_says_what_to_do(tmp_path: Path, name: str, encoding: str) -> None:
    text, read, _ = READERS[name]
    path = tmp_path / name
    # UTF-16 without a mark, as some programs write it, is distinguished from UTF-8 by its NUL bytes.
    path.write_bytes(text.replace("q", "é").replace("b", "ü").replace("m", "ö").replace("T", "Ä").encode(encoding))
    if encoding == "latin-1" and path.read_bytes().isascii():
        path.write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError) as caught:
        read(path)
    said = str(caught.value)
    assert "\n" not in said
    assert str(path) in said or path.name in said
    expected = {"utf-16": "UTF-16 text", "utf-32": "UTF-32 text"}.get(encoding, "UTF-8")
    assert expected in said or (name == "notes.md" and "a binary file" in said)


def test_a_byte_order_mark_in_judgments_and_queries(tmp_path: Path) -> None:
    folder = beir(tmp_path / "set", "d1", "q1")
    for file in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        (folder / file).write_bytes(BOM + (folder / file).read_bytes())
    assert load_beir(folder, "test").qrels == {"q1": {"d1": 1}}
    (folder / "qrels/test.tsv").write_bytes(BOM + b"q1\td1\t2\n")  # no header: the mark would join the first id
    assert load_beir(folder, "test").qrels == {"q1": {"d1": 2}}
    (folder / "qrels/test.tsv").write_bytes("q1\td1\t1\n".encode("utf-16"))
    with pytest.raises(InputError, match=r"test\.tsv, line 1: UTF-16 text, expected UTF-8; save the file as UTF-8"):
        load_beir(folder, "test")


def test_a_packed_run_may_begin_with_a_byte_order_mark_and_have_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.trec.gz"
    path.write_bytes(gzip.compress(BOM + b"q1 Q0 d1 1 0.5 bm25\r\nq1 Q0 d2 2 0.25 bm25\r\n"))
    assert read_run(path) == {"q1": {"d1": 0.5, "d2": 0.25}}


def test_what_was_written_holds_any_line_separator_that_unicode_knows(tmp_path: Path) -> None:
    records = [{"qid": "q1", "text": "one\u2028two\x85three\x0bfour"}, {"qid": "q2", "text": ""}]
    write_jsonl_gzip(tmp_path / "a.jsonl.gz", records)
    assert [json.loads(line) for line in read_gzip_lines(tmp_path / "a.jsonl.gz")] == records

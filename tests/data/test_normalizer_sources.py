"""What a query normalizer is learned from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from search_r3.cli.commands import app
from search_r3.data.normalizer_sources import learn_query_normalizer
from search_r3.data.sources import dictionaries
from search_r3.errors import InputError
from search_r3.model.query_normalizer import QueryNormalizer

SYNSET = "09100000 15 n 02 Lake_Geneva 0 lake 0 000 | a lake in the Alps\n"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "mini"
    (folder / "qrels").mkdir(parents=True)
    documents = [
        {"_id": "1", "title": "Genghis Khan", "text": "He ruled. Of Genghis Khan little is known."},
        {"_id": "2", "title": "Horses", "text": "The horses were fast, and horses ate grass."},
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "Was Attila the Hun known to Attila the Hun?"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t1\n")
    return folder


def test_documents_and_titles_are_read_and_queries_are_not(dataset: Path) -> None:
    made = learn_query_normalizer([dataset])
    assert made("was genghis khan or attila fond of horses") == "Was Genghis Khan or attila fond of horses"
    assert made.sources == ["mini"]


def test_wordnet_adds_its_names(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in dictionaries.PARTS:
        (tmp_path / f"data.{part}").write_text("  1 This software\n" + (SYNSET if part == "noun" else ""))
    monkeypatch.setattr(dictionaries, "WORDNET", tmp_path)
    made = learn_query_normalizer([dataset], wordnet=True)
    assert made("horses near lake geneva") == "Horses near Lake Geneva"
    assert made.sources == ["mini", "names of wordnet"]


def test_the_command_writes_a_file_that_loads(dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "cases.json"
    result = CliRunner().invoke(app, ["data", "query-normalizer", str(output), str(dataset), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["sha256"] == QueryNormalizer.load(output).hash


def test_the_command_replaces_another_query_normalizer_and_nothing_else(dataset: Path, tmp_path: Path) -> None:
    def run(output: Path) -> str:
        result = CliRunner().invoke(app, ["data", "query-normalizer", str(output), str(dataset)])
        return "" if result.exit_code == 0 else str(result.exception)

    corpus = (dataset / "corpus.jsonl").read_text()
    assert "exists and is no query normalizer" in run(dataset / "corpus.jsonl")
    assert "is a folder; name a file" in run(dataset)
    assert (dataset / "corpus.jsonl").read_text() == corpus
    assert sorted(path.name for path in dataset.iterdir()) == ["corpus.jsonl", "qrels", "queries.jsonl"]
    checkpoint = tmp_path / "adapter"
    checkpoint.mkdir()
    for name in ("search_r3.json", "query_normalizer.json"):
        (checkpoint / name).write_text("{}")
    assert "belongs to a checkpoint" in run(checkpoint / "query_normalizer.json")
    assert [run(tmp_path / "words.json"), run(tmp_path / "words.json")] == ["", ""]


def test_positives_of_training_pairs_are_read_by_kind(dataset: Path, tmp_path: Path) -> None:
    pairs = [
        {"id": str(i), "query": "q", "positive": f"a note on {name}, and {name} again", "source": source}
        for i, (name, source) in enumerate([("Samsung", "debian:packages"), ("Porsche", "docstrings:numpy")])
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    made = learn_query_normalizer([dataset], pairs=file, kinds=["debian"])
    assert made("samsung and porsche") == "Samsung and porsche"
    assert {"samsung", "porsche"} <= made.spelling.known
    assert made.sources == ["mini", "training pairs", "debian"]
    with pytest.raises(InputError, match="no pair of kind 'man'"):
        learn_query_normalizer([dataset], pairs=file, kinds=["man"])
    with pytest.raises(InputError, match="there are no training pairs, so none of kind 'man'"):
        learn_query_normalizer([dataset], kinds=["man"])


def test_an_unknown_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        learn_query_normalizer(["nowhere"], data_root=tmp_path)

"""What a query normalizer is learned from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from search_r3.cli.commands import app
from search_r3.data.normalizer_sources import learn_query_normalizer, read_word_list
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
    (checkpoint / "query_normalizer.json").unlink()  # nor is it given one that its contract does not name
    assert "belongs to a checkpoint" in run(checkpoint / "query_normalizer.json")
    assert run(checkpoint / "words.json") == ""
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


def test_word_lists_are_known_words(dataset: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("Solana 12\n\npolars\nuptimed\t3.5\n", encoding="utf-8")
    output, more = tmp_path / "words.json", tmp_path / "more.json"
    run = CliRunner().invoke
    assert run(app, ["data", "query-normalizer", str(output), str(dataset), "--word-list", str(words)]).exit_code == 0
    learned = QueryNormalizer.load(output)
    assert {"solana", "polars", "uptimed"} <= learned.spelling.known
    assert learned.sources[-1] == "words of words.txt"
    words.write_text("canva\n")
    command = ["data", "query-normalizer", str(more), "--extend", str(output), "--word-list", str(words)]
    assert run(app, command).exit_code == 0
    extended = QueryNormalizer.load(more)
    assert extended.spelling.known == learned.spelling.known | {"canva"}
    assert extended.truecaser.to_record() == learned.truecaser.to_record()


@pytest.mark.parametrize(
    ("text", "message"),
    [("one two three", r"line 1: 'one two three' is not a word"), ("a 1\nb -1", "line 2"), ("a nan", "line 1"),
     ("", "no word of 4 to 45 letters"), ("python,3\npolars,2\n", "not a comma"), ("\0\0\0\0", "no word")],
)  # fmt: skip
def test_a_damaged_word_list_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_word_list(tmp_path / "words.txt")
    with pytest.raises(InputError, match="cannot be read"):
        read_word_list(tmp_path / "missing.txt")


def test_words_that_come_twice_are_counted_together_whatever_the_system_that_wrote_the_list(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_bytes(b"\xef\xbb\xbfpython 3\r\npolars\r\n\r\npython\t4 \r\n")
    assert read_word_list(tmp_path / "words.txt") == {"python": 7, "polars": 0}


def test_a_word_list_is_read_before_documents(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.txt"):
        learn_query_normalizer(["nowhere"], word_lists=[tmp_path / "missing.txt"], data_root=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "name at least one CORPUS"), (["--extend", "x.json"], "--extend needs"),
     (["scifact", "--extend", "x.json", "--word-list", "w"], "--extend takes word lists alone")],
)  # fmt: skip
def test_what_is_read_must_be_named(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["data", "query-normalizer", str(tmp_path / "words.json"), *options])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs
from search_r3.data.reasoning import self_reasoning_pairs
from search_r3.data.reasoning.salient_terms import add_salient, write_salient
from search_r3.data.reasoning.self_reasoning_pairs import add_self_reasoning, best, rarity, tidy, words
from search_r3.errors import InputError

PAIRS = [
    TrainingPair("a", "risk of migraine", "Headache and migraine patients suffer from anxiety and depression."),
    TrainingPair(
        "b", "read a file", "def read_lines(path):\n    with open(path) as handle:\n        return handle.readlines()"
    ),
    TrainingPair("c", "prime numbers", "A sieve finds primes: Eratosthenes crossed out multiples."),
]


@dataclass
class Draft:
    text: str
    forced: bool = False


class Writer:
    """Stands for a model: its first sample is useless, its second names a word of the document."""

    def __init__(self) -> None:
        self.useful = {"risk of migraine": "headache", "read a file": "readlines", "prime numbers": "nothing new"}
        self.asked: list[str] = []

    def reason(self, texts: list[str], **_: Any) -> list[Draft]:
        self.asked += texts
        return [Draft("well, well" if i % 2 == 0 else self.useful[text]) for i, text in enumerate(texts)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    return tmp_path / "pairs.jsonl"


def test_the_sample_that_names_the_answer_s_words_is_kept_and_a_useless_one_is_not(source: Path) -> None:
    output = source.with_name("out.jsonl")
    counts = add_self_reasoning(source, output, Writer(), samples=2)
    assert [pair.reasoning for pair in read_pairs(output)] == ["headache", "readlines", None]
    assert counts == {"pairs": 3, "asked": 3, "kept": 2}


def test_only_the_first_pairs_are_asked_for(source: Path) -> None:
    writer = Writer()
    add_self_reasoning(source, source.with_name("out.jsonl"), writer, samples=2, limit=1)
    assert writer.asked == ["risk of migraine"] * 2


def test_an_interrupted_run_goes_on_behind_the_last_whole_block(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_reasoning_pairs, "BLOCK", 1)
    output = source.with_name("out.jsonl")

    class Dying(Writer):
        def reason(self, texts: list[str], **options: Any) -> list[Draft]:
            if len(self.asked) == 4:
                raise KeyboardInterrupt
            return super().reason(texts, **options)

    with pytest.raises(KeyboardInterrupt):
        add_self_reasoning(source, output, Dying(), samples=2)
    partial = Path(f"{output}.partial")
    partial.write_text(partial.read_text() + '{"id": "c", "anal')  # and the power went while a line was written
    writer = Writer()
    add_self_reasoning(source, output, writer, samples=2)
    assert writer.asked == ["prime numbers"] * 2
    assert [pair.reasoning for pair in read_pairs(output)] == ["headache", "readlines", None]
    assert not partial.exists()


def test_the_rest_of_another_run_is_refused(source: Path) -> None:
    output = source.with_name("out.jsonl")
    Path(f"{output}.partial").write_text(
        "".join(json.dumps({"id": i, "reasoning": None}) + "\n" for i in ("x", "y", "z"))
    )
    with pytest.raises(InputError, match="belongs to other pairs"):
        add_self_reasoning(source, output, Writer(), samples=2)


def test_rare_words_weigh_more_than_common_ones() -> None:
    weight = rarity(["cat dog", "cat bird", "cat fish"])
    assert weight["cat"] == 0 < weight["dog"]
    assert best(TrainingPair("x", "pet", "cat dog"), ["cat", "dog"], weight) == "dog"
    assert best(TrainingPair("x", "dog", "cat dog"), ["cat", "dog"], weight) is None  # the query said it already


def test_identifiers_are_split_into_words() -> None:
    assert words("readLines read_text HTTPServer of") == {"read", "lines", "text", "http", "server"}


def test_a_trace_that_was_cut_off_ends_with_its_last_sentence() -> None:
    assert tidy("One whole sentence. And one that", cut_off=True) == "One whole sentence."
    assert tidy("Short. But then it goes on and on and", cut_off=True) == "Short. But then it goes on and on and"
    assert tidy(" two\n lines ", cut_off=False) == "two lines"


def test_salient_traces_name_the_query_s_concept_and_the_answer_s_terms() -> None:
    first = write_salient(PAIRS)[0].reasoning
    assert first is not None
    concept, _, terms = first.partition(": ")
    assert set(concept.split()) <= {"risk", "migraine"}
    assert {"headache", "anxiety"} & set(terms.replace(";", ",").replace("related: ", "").split(", "))
    assert "migraine" not in terms


def test_salient_traces_are_the_same_every_time_and_leave_written_ones_alone() -> None:
    from dataclasses import replace

    pairs = [replace(PAIRS[0], reasoning="mine"), *PAIRS[1:]]
    once = write_salient(pairs, first=2)
    assert once == write_salient(pairs, first=2)
    assert once[0].reasoning == "mine"
    assert once[1].reasoning
    assert once[2].reasoning is None


def test_a_document_that_says_nothing_new_gets_no_reasoning(tmp_path: Path) -> None:
    write_pairs(
        tmp_path / "in.jsonl", [TrainingPair("a", "alpha beta", "beta alpha"), TrainingPair("b", "x", "the of")]
    )
    counts = add_salient(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert counts == {"pairs": 2, "asked": 2, "kept": 0}

"""Reasoning traces that say how the answer begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from search_r3.cli import main
from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs
from search_r3.data.reasoning.answer_openings import MAX_CHARS, opening


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("def relu(input: Tensor, inplace: bool = False) -> Tensor:\n    return input", "def relu(input, inplace)"),
        ("    @cached\n    def size(self):\n        return 3", "def size"),
        ("class Empty(Exception):\n    pass", "class Empty(Exception)"),
        ("async def fetch(url, *, timeout=3):\n    ...", "def fetch(url, timeout)"),
        ("Obesity is common. It raises the risk of diabetes.", "Obesity is common"),
        ("Two\nlines of one sentence, and no more", "Two lines of one sentence, and no more"),
        ("", None),
        ("Word.", None),
    ],
)
def test_the_opening_is_a_signature_or_the_first_sentence(document: str, expected: str | None) -> None:
    assert opening(document) == expected


def test_a_sentence_that_says_no_more_than_the_query_is_passed_over() -> None:
    document = "Obesity in mice. Fat mice ate less of the new food."
    assert opening(document, "obesity in mice") == "Fat mice ate less of the new food"
    assert opening("Obesity in mice.", "Obesity in mice") is None


def test_a_long_opening_is_cut_at_a_word_and_a_cut_list_stays_open() -> None:
    text = opening("antidisestablishmentarianism " * 9)
    assert text is not None
    assert len(text) <= MAX_CHARS
    assert set(text.split()) == {"antidisestablishmentarianism"}
    names = ", ".join(f"argument_{i}" for i in range(20))
    cut = opening(f"def many({names}):\n    pass")
    assert cut is not None
    assert len(cut) <= MAX_CHARS
    assert not cut.endswith(")")
    assert cut.startswith("def many(argument_0, argument_1")


def test_the_command_writes_openings_and_keeps_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pairs = [
        TrainingPair("a", "delete a tree", "def rmtree(path):\n    ...", source="docstrings"),
        TrainingPair("b", "fat mice", "Obesity is common.", reasoning="obese: rodents", source="titles"),
        TrainingPair("c", "left alone", "It was left alone here.", source="titles"),
    ]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    output = tmp_path / "out.jsonl"
    assert main(["data", "reason", str(tmp_path / "pairs.jsonl"), str(output), "--by", "opening", "--limit", "2"]) == 0
    assert [pair.reasoning for pair in read_pairs(output)] == ["def rmtree(path)", "obese: rodents", None]
    assert "2" in capsys.readouterr().out

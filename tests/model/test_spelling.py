"""Typos in queries: corrected by frequent words of documents, and nothing else is touched."""

from __future__ import annotations

import time

import pytest

from search_r3.model.spelling import LETTERS, RATIO, SEEN, WORDS, SpellingCorrector

SPELLING = SpellingCorrector(["python", "delete", "folder", "folded", "don't", "emperor"], ["polars", "pythons"])


@pytest.mark.parametrize("typed", ["pyhton", "pyton", "pytthon", "pythom", "pythonn", "pytho", "pythun"])
def test_a_word_at_one_edits_distance_is_corrected(typed: str) -> None:
    assert SPELLING(f"a {typed}, (typed)") == "a python, (typed)"


@pytest.mark.parametrize(
    "query",
    ["ython", "pythonk", "pytqon", "pyhtno", "polars", "pythons", "fold", "pyhton3", "pyhton_x", "pyhton.foldr()",
     "foldèr", "ポーランド", "", "PyHton is", "an acronym PYHTON here", "https://pyhton",
     "pyhto\u0301n", "n\u0303pyhton", "py\u00adhton", "show --pyhton"],
)  # fmt: skip
def test_anything_else_stays(query: str) -> None:
    assert SPELLING(query) == query


def test_words_keep_their_case() -> None:
    assert SPELLING("Pyhton is") == "Python is"
    assert SPELLING("Python Folds The Folder of DeleTE Foldre") == "Python Folds The Folder of DeleTE Folder"
    assert SPELLING("DELETE THE FOLDRE NOW") == "DELETE THE FOLDER NOW"


def test_slips_of_the_fingers_come_before_other_vowels_and_then_frequent_words_before_rare_ones() -> None:
    spelling = SpellingCorrector(["delta", "delete", "deleted", "folder", "folded"])
    assert spelling.corrected("delte") == "delete"
    assert spelling.corrected("delti") == "delta"
    assert spelling.corrected("deltz") == "delta"
    assert spelling.corrected("foldee") == "folder"


def test_short_words_are_corrected_by_a_swap_to_a_common_one_alone() -> None:
    spelling = SpellingCorrector(["what", "with", *map(str, range(600)), "rare"])
    typed = "waht wht whst wiht rrae raer awht"
    assert spelling(typed) == "what wht whst with rrae raer awht"


def test_words_of_a_list_are_known_unless_a_correction_is_far_more_frequent() -> None:
    spelling = SPELLING.with_words({"Pyhton": 1, "pythn": 2, "python": RATIO * 2, "foldee": 0, "naïve": 1, "cat": 1})
    assert spelling.corrected("pyhton") == "python"
    assert spelling.corrected("pythn") == "pythn"
    assert spelling.corrected("foldee") == "foldee"
    assert spelling.known - SPELLING.known == {"pythn", "foldee"}
    assert list(spelling.rank) == list(SPELLING.rank)


def test_the_frequencies_of_a_words_spellings_in_a_list_are_added_up() -> None:
    spelling = SPELLING.with_words({"Python": RATIO, "pyhton": 1, "PYTHON": 1, "python": 0})
    assert spelling.corrected("pyhton") == "python"


def test_a_word_of_a_list_that_is_too_long_to_be_corrected_takes_no_time() -> None:
    started = time.thread_time()
    assert SPELLING.with_words({"a" * 30_000: 1.0}).known == SPELLING.known
    assert time.thread_time() - started < 1


def test_punctuation_and_spaces_stay() -> None:
    assert SPELLING("  'delte'\tfoldr-emperro?\n") == "  'delete'\tfolder-emperor?\n"


def test_what_is_frequent_is_a_correction_and_what_is_rare_is_only_known() -> None:
    learned = SpellingCorrector.learn(
        ["The python's delete_folder(), Python", "a rareword"] * 2 + ["python"] * (SEEN - 4)
    )
    assert learned.corrected("pyhton") == "python"
    assert learned.corrected("rarewodr") == "rarewodr"
    assert learned.corrected("delete") == "delete"
    assert "rareword" in learned.known
    assert all(len(word) >= LETTERS for word in learned.known)


def test_a_text_too_long_to_be_typed_stays() -> None:
    assert SPELLING(" ".join(["pyhton"] * WORDS)).split() == ["python"] * WORDS
    text = " ".join(["pyhton"] * (WORDS + 1))
    assert SPELLING(text) == text


def test_its_record_gives_it_back() -> None:
    loaded = SpellingCorrector.from_record(SPELLING.to_record())
    assert (list(loaded.rank), loaded.known) == (list(SPELLING.rank), SPELLING.known)


def test_a_sequence_of_many_letters_takes_no_time() -> None:
    text = "acgt" * 12_500
    started = time.thread_time()
    assert SPELLING(text) == text
    assert time.thread_time() - started < 1

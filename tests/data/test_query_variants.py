"""Noisy queries: what each kind changes and leaves, and that all systems get the same ones."""

from __future__ import annotations

import re

import numpy as np
import pytest

from search_r3.data.query_variants import (
    NEIGHBORS,
    ORIGINAL,
    STOP_WORDS,
    VARIANTS,
    check_kinds,
    check_shares,
    draw_variants,
    keywords,
    lower,
    no_punctuation,
    title,
    typos,
    upper,
    vary,
)
from search_r3.errors import InputError

QUESTION = "Would the author of 'Emma' remember the results of a slow function, please?"
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (upper, "WHO WROTE DON'T LOOK NOW, STRASSE NO. 5?"),
        (lower, "who wrote don't look now, straße no. 5?"),
        (title, "Who Wrote Don't Look Now, Straße No. 5?"),
        (no_punctuation, "Who wrote Don't Look Now Straße no 5"),
        (keywords, "wrote Look Straße 5"),
    ],
)
def test_a_text_in_other_form(variant, expected):
    assert variant("Who wrote Don't Look Now, Straße no. 5?", RNG) == expected


def test_title_case_keeps_acronyms_and_identifiers():
    assert title("what does NASA say of numpy.linalg and iPhones", RNG) == (
        "What Does NASA Say Of Numpy.Linalg And IPhones"
    )


@pytest.mark.parametrize("text", ["what is it?", "?!", "the", "…"])
def test_a_query_of_stop_words_or_punctuation_alone_never_becomes_empty(text):
    assert keywords(text, RNG).strip()
    assert no_punctuation(text, RNG).strip()


def test_keywords_and_punctuation_keep_what_names_are_made_of():
    assert keywords("How do I use C++ and C# with functools.lru_cache?", RNG) == "use C++ C# functools.lru_cache"


def distance(a: str, b: str) -> int:
    """Levenshtein's distance where a swap of two neighbors counts as one (restricted Damerau)."""
    table = {(-1, -1): 0}
    for i in range(len(a)):
        table[i, -1] = i + 1
    for j in range(len(b)):
        table[-1, j] = j + 1
    for i in range(len(a)):
        for j in range(len(b)):
            found = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i] != b[j]))
            if i and j and a[i] == b[j - 1] and a[i - 1] == b[j]:
                found = min(found, table[i - 2, j - 2] + 1)
            table[i, j] = found
    return table[len(a) - 1, len(b) - 1]


def test_a_typo_is_one_edit_of_a_long_word_behind_its_first_letter():
    kinds = set()
    for seed in range(300):
        changed = typos(QUESTION, np.random.default_rng(seed))
        before, after = re.findall(r"\w+", QUESTION), re.findall(r"\w+", changed)
        assert len(before) == len(after)
        differing = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert differing, "every query with a long word has a typo"
        for a, b in differing:
            assert len(a) >= 4
            assert a[0] == b[0]
            assert distance(a, b) == 1
            kinds.add("swapped" if sorted(a) == sorted(b) else len(b) - len(a))
        assert re.sub(r"\w+", "", changed) == re.sub(r"\w+", "", QUESTION)
    assert kinds == {"swapped", -1, 0, 1}  # and 0 is another letter


def test_about_three_of_ten_longer_words_get_a_typo():
    text = " ".join(["remember"] * 2000)
    changed = typos(text, np.random.default_rng(1)).split()
    assert 0.26 < np.mean([word != "remember" for word in changed]) < 0.34


def test_a_replaced_letter_is_a_neighbor_on_the_keyboard_and_keeps_its_case():
    assert set(NEIGHBORS["g"]) == set("fhtyvb")
    assert set(NEIGHBORS["q"]) == set("wa")
    for seed in range(200):
        (word,) = typos("GGGGGG", np.random.default_rng(seed)).split()
        if len(word) == 6 and word != "GGGGGG":
            (other,) = set(word) - {"G"}
            assert other.lower() in NEIGHBORS["g"]
            assert other.isupper()


@pytest.mark.parametrize("text", ["the cat", "MAX_LENGTH x1234 snake_case_name", "法国的首都是什么", "ما هي عاصمة"])
def test_short_words_identifiers_and_scripts_without_case_get_no_typo(text):
    assert typos(text, np.random.default_rng(0)) == text


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_variant_depends_on_the_text_the_kind_and_the_seed_alone(kind):
    assert vary(QUESTION, kind, 3) == vary(QUESTION, kind, 3)
    assert vary(QUESTION, kind) != QUESTION
    assert vary(QUESTION, ORIGINAL) == QUESTION
    assert len({vary(QUESTION, "typos", seed) for seed in range(20)}) > 10


def test_kinds_are_drawn_with_their_shares():
    texts = ["Remember the results"] * 4000
    found = draw_variants(texts, {"upper": 0.25, "lower": 0.5}, np.random.default_rng(0))
    counts = [found.count(text) / len(texts) for text in ("REMEMBER THE RESULTS", "remember the results", None)]
    assert np.allclose(counts, [0.25, 0.5, 0.25], atol=0.03)
    assert draw_variants(texts, {"upper": 1.0}, np.random.default_rng(0)) == ["REMEMBER THE RESULTS"] * 4000
    assert draw_variants(texts[:3], {}, np.random.default_rng(0)) == [None] * 3


def test_wrong_kinds_and_shares_are_refused_in_a_line():
    with pytest.raises(InputError, match=r'queries: unknown kind of query "uper"; did you mean "upper"\?'):
        check_kinds(["uper"])
    with pytest.raises(InputError, match=r'query_variants: unknown kind "type"'):
        check_shares({"type": 0.1}, "query_variants")
    with pytest.raises(InputError, match=r"query_variants.upper must be a share from 0 to 1, got -0.1"):
        check_shares({"upper": -0.1}, "query_variants")
    with pytest.raises(InputError, match=r"query_variants: the shares are 1.1 together"):
        check_shares({"upper": 0.6, "lower": 0.5}, "query_variants")


def test_stop_words_are_words_in_lower_case():
    assert all(word == word.lower() and word.replace("'", "").isalpha() for word in STOP_WORDS)

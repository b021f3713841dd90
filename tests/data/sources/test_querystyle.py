"""Docstrings become queries: markup goes, what is no query is refused, and the style is that of a search box."""

from __future__ import annotations

import random

import pytest

from search_r3.data.sources.querystyle import as_name_query, as_web_query, base_verb, first_sentence, name_words


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the *absolute* path. More text.", "Return the absolute path."),
        ("\n    Parse a date,\n    e.g. one of ISO form.\n\n    Then more.", "Parse a date, e.g. one of ISO form."),
        ("Build a :class:`~a.b.Config` from ``path``.", "Build a Config from path."),
        ("Load [`~models.Bert`] from the hub\n\nArgs:\n    x: y", "Load Bert from the hub"),
        ("fill(a, value) -> Tensor\n\nFills the array with a value.", "Fills the array with a value."),
        ("Count the words in a text\n    :param text: the text", "Count the words in a text"),
        ("This function computes the mean of rows.", "Computes the mean of rows."),
        ("Helper function to download all files", "Download all files"),
    ],
)
def test_the_first_sentence_is_read_without_its_markup(docstring, expected):
    assert first_sentence(docstring) == expected


@pytest.mark.parametrize(
    "docstring",
    [
        "Do it.",
        "Deprecated: use the other function now.",
        "For internal use by the class only.",
        "Computes :math:`\\sum_i x_i^2` of the input.",
        "x (`int` of shape `(n, m)`):\n    The input of the layer.",
        "См. документацию этого модуля здесь.",
        "Args:\n    x: the value to use",
        "See the documentation of the parent.",
        "> > > a + b == c + d",
    ],
)
def test_what_is_no_query_is_refused(docstring):
    assert first_sentence(docstring) is None


def test_web_queries_are_short_and_lower_case_and_the_same_for_the_same_seed():
    sentence = "Returns True if the Path given is an absolute one (on any system), False otherwise."
    queries = {as_web_query(sentence, random.Random(seed)) for seed in range(40)}
    assert queries == {as_web_query(sentence, random.Random(seed)) for seed in range(40)}
    assert len(queries) > 5
    assert any("check if path" in query for query in queries)
    for query in queries:
        assert "false" not in query
        assert "system" not in query
        assert "returns" not in query
        assert not query.endswith(".")


def test_how_to_is_only_put_before_a_verb():
    asked = [as_web_query("Number of open files.", random.Random(seed)) for seed in range(60)]
    assert not any("how to" in query for query in asked)
    asked = [as_web_query("Opens the file for reading.", random.Random(seed)) for seed in range(60)]
    assert any(query.startswith("how to open ") and query.endswith(" in python") for query in asked)


def test_a_long_sentence_is_cut_at_a_clause():
    sentence = (
        "Split the rows of a table into groups of equal size so that each of the workers gets its own part of it."
    )
    words = as_web_query(sentence, random.Random(3)).replace("how to ", "").split()
    assert 4 <= len(words) <= 14


def test_names_become_words_and_a_name_that_says_nothing_becomes_no_query():
    assert name_words("parse_dateString") == ["parse", "date", "string"]
    assert name_words("HTTPServerError") == ["http", "server", "error"]
    query = as_name_query("parse_date_string", [], "Parse a date string.", random.Random(0))
    assert query is not None
    assert "parse date string" in query
    assert as_name_query("_f", ["x"], "Parse a date string.", random.Random(0)) is None
    assert as_name_query("xkcd_qrs_fgh", [], "Parse a date string.", random.Random(0)) is None


@pytest.mark.parametrize(
    ("word", "verb"), [("Applies", "apply"), ("Pushes", "push"), ("computes", "compute"), ("Class", None)]
)
def test_third_person_verbs_are_brought_to_their_base(word, verb):
    assert base_verb(word) == verb

"""Training pairs on disk: what is written reads back, what is broken is named."""

from __future__ import annotations

import json

import pytest

from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs
from search_r3.errors import InputError

GOOD = {"id": "a", "query": "what?", "positive": "that"}


def test_what_is_written_reads_back_the_same(tmp_path):
    pairs = [
        TrainingPair("a", "what?", "that"),
        TrainingPair("b", "où?", "là", ("ici", "ailleurs"), "think of places", "hand"),
        TrainingPair("c", "who?", "she", ("nobody",), positives=(("he", 1.0), ("they", 0.5)), grade=2.0),
        TrainingPair("d", "when?", "then", passages=("now", "then")),
    ]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs


def test_a_pair_of_one_positive_is_written_as_before_and_further_ones_with_their_grades(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [TrainingPair("a", "q", "p", source="x"), TrainingPair("b", "q", "p", positives=(("r", 2.0),))])
    plain, graded = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert plain == {"id": "a", "query": "q", "positive": "p", "source": "x"}
    assert graded == {"id": "b", "query": "q", "positive": "p", "positives": [{"text": "r", "grade": 2.0}]}
    assert read_pairs(path)[1].relevant == {"p": 1.0, "r": 2.0}


def test_a_grade_that_is_not_given_is_one(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({**GOOD, "positives": [{"text": "this"}]}), encoding="utf-8")
    assert read_pairs(path)[0].relevant == {"that": 1.0, "this": 1.0}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"query": " "}, '"query" is empty'),
        ({"positive": None}, '"positive" must be a string, got null'),
        ({"id": 3.5}, '"id" must be a string or a whole number, got 3.5'),
        ({"id": "first"}, 'id "first" was already used in line 1'),
        ({"negatives": "text"}, '"negatives" must be a list'),
        ({"negatives": ["x", ""]}, '"negatives" must be a list of texts, none empty'),
        ({"negatives": ["that"]}, "contains the positive itself"),
        ({"reasoning": 4}, '"reasoning" must be a string'),
        ({"analysis": "a"}, '"analysis" is now called "reasoning"; rename the key'),
        ({"grade": 0}, '"grade" must be a number above 0, got 0'),
        ({"grade": True}, '"grade" must be a number above 0, got True'),
        ({"positives": ["x"]}, '"positives" must be a list of {"text": ..., "grade": ...}'),
        ({"positives": [{"text": ""}]}, '"positives" must hold texts, none empty'),
        ({"positives": [{"text": "x", "grade": "2"}]}, 'positives: the field "grade" must be a number above 0'),
        ({"positives": [{"text": "x", "score": 2}]}, 'positives: unknown field "score"'),
        ({"positives": [{"text": "that"}]}, "\"positives\" names 'that' a second time"),
        ({"positives": [{"text": "x"}], "negatives": ["x"]}, "\"negatives\" contains 'x', a positive"),
        ({"postive": "x"}, 'unknown field "postive"; did you mean "positive"?'),
    ],
)
def test_a_broken_line_is_refused_by_line_and_field(tmp_path, change, expected):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [{**GOOD, "id": "first"}, {**GOOD, **change}])), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_pairs(path)
    assert "pairs.jsonl, line 2" in str(caught.value)
    assert expected in str(caught.value)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(InputError, match="holds no training pair"):
        read_pairs(tmp_path / "pairs.jsonl")


def test_rows_kept_by_an_earlier_version_have_no_passages():
    pair = TrainingPair("a", "q", "p", passages=("x",))
    assert TrainingPair.from_row(pair.as_row()) == pair
    assert TrainingPair.from_row(pair.as_row()[:8]) == TrainingPair("a", "q", "p")


def test_missing_pairs_name_the_commands_that_make_them(tmp_path):
    with pytest.raises(
        InputError, match=r"a\.jsonl does not exist; `search-r3 data build RECIPE .*`search-r3 data reason"
    ):
        read_pairs(tmp_path / "a.jsonl")

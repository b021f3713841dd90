"""Questions made from the sentences of articles: who, what, when and where, each with its short answer."""

from __future__ import annotations

import pytest

from search_r3.data.beir import BeirDataset, Document
from search_r3.data.sources.generated_questions import question_pairs
from search_r3.errors import InputError

ARTICLES = {
    "1": ("Ann Lee (actress)", "Ann Lee (born March 3, 1970) is an American actress from Boston. She won the Tony "
          "Award for Best Actress in 1999. She also sings. Her brother is a poet from Ohio."),
    "2": ("Hot Rod (magazine)", "Hot Rod is a monthly American car magazine. It was first published in January 1948 by "
          "Robert Petersen. It is based in Los Angeles, California."),
    "3": ("Lucy Crown", "Lucy Crown is a novel by American author Irwin Shaw. The story begins in Paris."),
    "4": ("Nothing", "An article whose text begins with other words than its title, such as this one."),
}  # fmt: skip
DATASET = BeirDataset("toy", {key: Document(key, *article) for key, article in ARTICLES.items()}, {}, {})


def found(per_document: int = 9) -> dict[str, str]:
    pairs, _ = question_pairs(DATASET, per_document=per_document)
    return {pair.query.rstrip("?").lower(): pair.positive for pair in pairs}


def test_sentences_about_the_subject_become_questions_with_short_answers():
    assert found() == {
        "when was ann lee born": "March 3, 1970",
        "who is an american actress from boston": "Ann Lee",
        "who won the tony award for best actress in 1999": "Ann Lee",
        "what is a monthly american car magazine": "Hot Rod",
        "when was hot rod published": "January 1948",
        "what was first published in january 1948 by robert petersen": "Hot Rod",
        "where is hot rod based": "Los Angeles, California",
        "what is based in los angeles, california": "Hot Rod",
        "what is a novel by american author irwin shaw": "Lucy Crown",
    }


def test_half_of_the_questions_are_lower_case():
    articles = {
        str(i): Document(str(i), f"Place {i}", f"Place {i} is a town in the county of Kent {i}.") for i in range(200)
    }
    pairs, dropped = question_pairs(BeirDataset("towns", articles, {}, {}))
    lower = sum(pair.query == pair.query.lower() for pair in pairs)
    assert 70 < lower < 130
    assert all(pair.query.endswith("?") for pair in pairs if pair.query != pair.query.lower())
    assert {pair.source for pair in pairs} == {"questions:towns"}
    assert not dropped


def test_what_gives_no_question_and_what_is_asked_twice_is_counted():
    twice = BeirDataset("toy", {"1": DATASET.corpus["3"], "2": DATASET.corpus["3"], "4": DATASET.corpus["4"]}, {}, {})
    pairs, dropped = question_pairs(twice)
    assert len(pairs) == 1
    assert dropped == {"duplicate question": 1, "no question": 1}
    assert len(found(per_document=1)) == 3
    with pytest.raises(InputError, match="per_document must be 1 or more, got 0"):
        question_pairs(DATASET, per_document=0)

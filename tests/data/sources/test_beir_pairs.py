"""Pairs out of BEIR folders: titles, claims taken from abstracts, and judged queries."""

from __future__ import annotations

import pytest

from search_r3.data.beir import BeirDataset, Document
from search_r3.data.sources.beir_pairs import (
    as_claim,
    cloze_pairs,
    is_held_out,
    query_pairs,
    split_sentences,
    title_pairs,
)
from search_r3.errors import InputError

ABSTRACT = (
    "BACKGROUND The role of sleep is debated. We recruited 20 mice from two labs. "
    "These results suggest that sleep promotes the removal of waste from the brain. "
    "In mice, waste removal is driven by slow waves during deep sleep. More work is under way in our group."
)
DATASET = BeirDataset(
    "toy",
    {
        "1": Document("1", "Sleep clears the brain.", ABSTRACT),
        "2": Document("2", "Errata", ABSTRACT),
        "3": Document("3", "A study of very little", "Too short."),
    },
    {"7": "Sleep cleans.", "8": "Held out.", "9": "Nothing is relevant."},
    {"7": {"1": 1, "2": 1, "3": 0}, "8": {"1": 1}, "9": {"2": -1}},
)


def test_titles_ask_for_their_texts():
    pairs, dropped = title_pairs(DATASET)
    assert [(pair.query, pair.positive) for pair in pairs] == [("Sleep clears the brain", ABSTRACT)]
    assert dropped == {"short title": 1, "short text": 1}


def test_a_claim_is_taken_out_of_its_text():
    pairs, dropped = cloze_pairs(DATASET, per_document=1)
    assert pairs[0].query == "Sleep promotes the removal of waste from the brain."
    assert "removal of waste from the brain" not in pairs[0].positive
    assert pairs[0].positive.startswith("Sleep clears the brain. BACKGROUND The role")
    assert dropped["no claim-like sentence"] >= 1
    two, _ = cloze_pairs(DATASET, per_document=2)
    assert two[0] == pairs[0]
    assert two[1].query in {
        "The role of sleep is debated.",
        "In mice, waste removal is driven by slow waves during deep sleep.",
    }
    with pytest.raises(InputError, match="must be 1 or more"):
        cloze_pairs(DATASET, per_document=0)


@pytest.mark.parametrize(
    ("sentence", "claim"),
    [
        ("We found that p53 inhibits growth of liver tumours (P<0.01).", "P53 inhibits growth of liver tumours."),
        ("CONCLUSIONS: Aspirin reduces the risk of colon cancer.", "Aspirin reduces the risk of colon cancer."),
        ("However, statins reduce the risk of heart attack.", "Statins reduce the risk of heart attack."),
        ("It reduces the risk of colon cancer in mice.", None),
        ("We enrolled 20 patients in two hospitals of the city.", None),
        ("Is aspirin able to reduce the risk of cancer?", None),
        ("Short claims are bad.", None),
    ],
)
def test_claims_stand_on_their_own(sentence, claim):
    assert as_claim(sentence) == claim


def test_abbreviations_do_not_end_a_sentence():
    assert split_sentences("Seen in E. Coli, e.g. Here, by Smith et al. Twice. Then no more.") == [
        "Seen in E. Coli, e.g. Here, by Smith et al. Twice.",
        "Then no more.",
    ]


def test_every_relevant_document_is_a_pair_and_the_dev_queries_are_held_out():
    pairs, dropped = query_pairs(DATASET, split="train", hold_out_modulus=8)
    assert [pair.id for pair in pairs] == ["query:toy:train:7:1", "query:toy:train:7:2"]
    assert pairs[0].positive == "Sleep clears the brain. " + ABSTRACT
    assert dropped == {"held out for dev": 1, "judged not relevant": 2}
    named = BeirDataset("toy", DATASET.corpus, {"q7": "x"}, {"q7": {"1": 1}})
    with pytest.raises(InputError, match='"q7" is not a whole number'):
        query_pairs(named, split="train", hold_out_modulus=8)


def test_a_negated_twin_of_a_dev_query_is_not_trained_on():
    queries = {
        "8": "Sleep increases the removal of waste.",
        "9": "Sleep lowers the removal of waste.",
        "7": "Mice run.",
    }
    dataset = BeirDataset("toy", DATASET.corpus, queries, {i: {"1": 1} for i in queries})
    pairs, dropped = query_pairs(dataset, split="train", hold_out_modulus=8)
    assert [pair.query for pair in pairs] == ["Mice run."]
    assert dropped == {"held out for dev": 1, "near copy of a held-out query": 1}


GRADED = BeirDataset(
    "toy",
    {str(i): Document(str(i), "", f"text {i}") for i in range(9)} | {"9": Document("9", "", "text 8")},
    {"a": "which texts?", "b": "one text"},
    {"a": {"1": 1, "2": 2, "3": 0, "4": 1, "5": 2, "8": 1, "9": 1}, "b": {"7": 1}},
)


def test_a_graded_pair_has_every_relevant_document_the_best_first():
    pairs, dropped = query_pairs(GRADED, split="train", graded=True)
    assert [pair.id for pair in pairs] == ["query:toy:train:a", "query:toy:train:b"]
    first = pairs[0]
    assert first.relevant == {f"text {i}": grade for i, grade in ((1, 1), (2, 2), (4, 1), (5, 2), (8, 1))}
    assert [first.grade, *(grade for _, grade in first.positives)] == [2, 2, 1, 1, 1]
    assert (pairs[1].positive, pairs[1].positives, pairs[1].grade) == ("text 7", (), 1)
    assert dropped == {"judged not relevant": 1}


def test_the_highest_grades_stay_where_there_are_too_many_documents():
    pairs, dropped = query_pairs(GRADED, split="train", graded=True, max_positives=3)
    assert sorted(pairs[0].relevant.values()) == [1, 2, 2]
    assert dropped["over max_positives"] == 2
    judged = dict(reversed(GRADED.qrels["a"].items()))
    other = BeirDataset("toy", GRADED.corpus, GRADED.queries, {"a": judged, "b": {}})
    assert query_pairs(other, split="train", graded=True, max_positives=3)[0] == pairs[:1]  # whatever the files' order


def test_a_query_s_reasoning_is_that_of_its_pairs():
    pairs, _ = query_pairs(GRADED, split="train", reasoning={"a": "look at the numbers"})
    assert {pair.reasoning for pair in pairs if pair.query == "which texts?"} == {"look at the numbers"}
    assert [pair.reasoning for pair in pairs if pair.query == "one text"] == [None]


def test_any_id_can_be_held_out_by_its_checksum():
    held = {name for name in ("2bc9c4f9c19c167187f2", "Mercury_SC_401371", "7") if is_held_out(name, 3, "crc32")}
    assert held == {"2bc9c4f9c19c167187f2", "7"}  # zlib.crc32: 2024836080, 2437578647, 1790921346
    pairs, dropped = query_pairs(GRADED, split="train", hold_out_modulus=1, hold_out="crc32")
    assert (pairs, dropped) == ([], {"held out for dev": 2})
    with pytest.raises(InputError, match='unknown value "crc"'):
        query_pairs(GRADED, split="train", hold_out_modulus=8, hold_out="crc")

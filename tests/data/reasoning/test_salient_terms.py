from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from search_r3.data.mining.scorers import open_scorer
from search_r3.data.pairs import TrainingPair
from search_r3.data.reasoning.salient_terms import MAX_CHARS, best_drafts, salient, write_drafts, write_salient
from search_r3.data.sources.thesaurus import Sense, Thesaurus

PAIRS = [
    TrainingPair("a", "delete a folder", "shutil rmtree removes a directory tree with all files"),
    TrainingPair("b", "delete a file", "os remove unlinks one file from disk"),
    TrainingPair("c", "folder listing", "os listdir names the entries of a directory"),
    TrainingPair("d", "random number", "random randint draws an integer in a range"),
]


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    """Files as wndb(5WN) has them, with two senses of "folder" of which the second stands first in the data."""
    license = "  1 This software\n"
    rare = "00000100 06 n 01 folder 0 000 | a small book"
    offset_rare = len(license)
    common = (
        f'{offset_rare + len(rare) + 1:08d} 06 n 02 folder 0 directory 0 000 | a place for files; "she made a folder"'
    )
    (tmp_path / "data.noun").write_text(license + rare + "\n" + common + "\n")
    offset = offset_rare + len(rare) + 1
    (tmp_path / "index.noun").write_text(license + f"folder n 2 1 ~ 2 1 {offset:08d} {offset_rare:08d}  \n")
    for part in ("verb", "adj"):
        (tmp_path / f"data.{part}").write_text(license)
        (tmp_path / f"index.{part}").write_text(license)
    return tmp_path


def test_a_word_s_first_sense_is_looked_up(wordnet: Path) -> None:
    assert Thesaurus.found(wordnet)
    thesaurus = Thesaurus(wordnet)
    assert thesaurus.look_up("folder") == Sense(("directory",), "a place for files")
    assert thesaurus.look_up("sonnet") is None
    assert not Thesaurus.found(wordnet / "nowhere")


def test_a_trace_is_kept_only_if_it_raises_the_answer() -> None:
    scorer = open_scorer("bm25")
    helpful, harmful = "folder: rmtree, directory", "folder: listdir, entries, names"
    kept = best_drafts(PAIRS, {0: [harmful, helpful], 3: ["number: randint, listdir, entries, names, listdir"]}, scorer)
    assert kept == {0: helpful}


def test_of_helpful_drafts_the_first_that_raises_it_highest_is_taken() -> None:
    class FixedScorer:
        zero_is_no_match = False

        def prepare(self, documents: list[str], folder: Path, report: object = None) -> None:
            pass

        def score(self, queries: list[str]) -> np.ndarray:
            by_last = {"folder": [0.1, 0.5, 0.4, 0], "second": [0.45, 0.5, 0.4, 0], "first": [0.6, 0.5, 0, 0]}
            by_last |= {"wider": [0.9, 0.1, 0, 0]}
            return np.array([by_last[query.split()[-1]] for query in queries])

    assert best_drafts(PAIRS, {0: ["second", "first", "wider"]}, FixedScorer()) == {0: "first"}
    assert best_drafts(PAIRS, {0: ["second"]}, FixedScorer()) == {0: "second"}


def test_terms_do_not_repeat_one_another_or_the_query() -> None:
    own = Counter({"protein": 3, "proteins": 2, "folding": 2, "folds": 1, "kinase": 1, "stores": 1})
    weight = dict.fromkeys(own, 1.0)
    found = salient("how do kinases store energy", own, [], weight, 5)
    assert found == ["protein", "folding", "folds"]  # not proteins, kinase or stores


def test_drafts_are_short_and_name_synonyms_and_a_definition(wordnet: Path) -> None:
    named = [
        "extraordinarily-long-term",
        "another-extremely-long-term",
        "third-remarkably-long-term",
        "fourth",
        "fifth",
    ]
    drafts = write_drafts("delete a folder", named, {"folder": 2.0, "delete": 1.0}, Thesaurus(wordnet))
    assert len(drafts) == 3
    assert all(len(draft) <= MAX_CHARS for draft in drafts)
    assert "; also directory" in drafts[1]
    assert drafts[2].startswith("folder (a place for files): ")
    assert write_drafts("delete a folder", [], {}, None) == []


def test_pairs_without_a_helpful_draft_keep_none() -> None:
    scored_pairs = write_salient(PAIRS, scorer=open_scorer("bm25"))
    plain = write_salient(PAIRS)
    assert [pair.id for pair in scored_pairs] == [pair.id for pair in PAIRS]
    assert sum(pair.reasoning is not None for pair in scored_pairs) <= sum(pair.reasoning is not None for pair in plain)

"""Cleaning: copies and what overlaps an evaluation set go, the rest stays, and the report says which went and why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.data.mining.decontamination import (
    DecontaminateSettings,
    DeduplicateSettings,
    Dropped,
    EvaluationSet,
    decontaminate,
    deduplicate,
    jaccard_of_hashes,
    read_cleaning,
    shingles,
    signature,
)
from search_r3.data.pairs import TrainingPair, read_pairs
from search_r3.data.recipe import build_pairs
from search_r3.errors import InputError

WORDS = [f"w{i}" for i in range(60)]
TEXT = " ".join(WORDS)
NEARLY = " ".join([*WORDS[:-1], "other"])  # 57 of 59 word triples in common
OTHER = " ".join(reversed(WORDS))  # the same words, no triple in common


def pair(name: str, query: str, positive: str, source: str = "titles:toy") -> TrainingPair:
    return TrainingPair(name, query, positive, source=source)


def kept(pairs: list[TrainingPair], **settings) -> tuple[str, Dropped]:
    dropped = Dropped()
    return "".join(p.id for p in deduplicate(pairs, DeduplicateSettings(**settings), dropped)), dropped


def test_a_pair_that_comes_again_in_other_case_and_spacing_is_dropped() -> None:
    names, dropped = kept([pair("a", "Read a file", TEXT), pair("b", "read  a file\n", TEXT.upper())])
    assert names == "a"
    assert dropped.counts == {"exact duplicate": 1}
    assert dropped.examples["exact duplicate"] == [{"id": "b", "query": "read  a file\n", "because": "copy of a"}]


def test_the_same_document_with_another_query_is_another_pair_unless_positives_alone_count() -> None:
    pairs = [pair("a", "read a file", TEXT), pair("b", "sort a list", TEXT), pair("c", "sort a list", NEARLY)]
    assert kept(pairs)[0] == "ab"
    names, dropped = kept(pairs, by="positive")
    assert names == "a"
    assert dropped.counts == {"exact duplicate": 1, "near duplicate": 1}


def test_near_copies_are_texts_with_almost_all_word_triples_in_common() -> None:
    query = "read a file"
    pairs = [pair("a", query, TEXT), pair("b", query, NEARLY), pair("c", query, OTHER)]
    names, dropped = kept(pairs)
    assert names == "ac"
    assert dropped.by_source == {"titles:toy": {"near duplicate": 1}}
    assert kept(pairs, near=0.99)[0] == "abc"


def test_a_chain_of_small_changes_keeps_a_link_that_is_far_from_the_first() -> None:
    chain = [" ".join(WORDS[i : i + 30]) for i in (0, 2, 4)]  # neighbors share 26 of 30 triples, the ends 24 of 32
    assert kept([pair(name, "query", text) for name, text in zip("abc", chain, strict=True)])[0] == "ac"


def test_short_texts_and_texts_without_a_word_are_compared_too() -> None:
    pairs = [pair("a", "q", "yes"), pair("b", "q", "no"), pair("c", "q", "+++"), pair("d", "q", "---")]
    assert kept(pairs)[0] == "abcd"
    assert kept([pair("a", "q", "yes, it is"), pair("b", "q", "yes it is")])[0] == "a"
    assert kept([])[0] == ""


def test_signatures_agree_as_often_as_texts_are_similar() -> None:
    rng = np.random.default_rng(0)
    vocabulary = [f"v{i}" for i in range(5000)]
    for overlap in (0.2, 0.5, 0.9):
        agreements, similarities = [], []
        for _ in range(20):
            chosen = rng.permutation(vocabulary)[:200]
            cut = int(200 * overlap)
            a = shingles(" ".join(chosen[:150]))
            b = shingles(" ".join([*chosen[: min(cut, 150)], *chosen[150 : 300 - cut]]))
            similarities.append(jaccard_of_hashes(a, b))
            agreements.append((signature(a) == signature(b)).mean())
        assert np.mean(agreements) == pytest.approx(np.mean(similarities), abs=0.03)


def test_a_hash_is_the_same_on_every_machine() -> None:
    assert shingles("one two three").tolist() == [7274879177180986167]
    assert signature(shingles("one two three"))[:2].tolist() == [1175700527, 3263793639]


# ---------------------------------------------------------------------------------------------------- contamination

QUERY = "does aspirin lower the risk of a second heart attack in men"
ABSTRACT = "Low doses of aspirin were given to men after a first heart attack and followed for ten long years"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    corpus = {"1": Document("1", "Aspirin", ABSTRACT), "2": Document("2", "", "Short.")}
    queries = {"1": QUERY, "2": "sort a list python", "3": "sleep", "4": "what is the best way to learn to swim fast"}
    qrels = {"1": {"1": 1}, "2": {"2": 1}, "3": {"2": 1}}
    write_beir(tmp_path / "toy", BeirDataset("toy", corpus, queries, qrels), "test")
    write_beir(tmp_path / "toy", BeirDataset("toy", corpus, queries, {"4": {"2": 1}}), "train")
    return tmp_path


def clean_of(root: Path, pairs: list[TrainingPair], **settings) -> tuple[str, Dropped]:
    dropped = Dropped()
    against = settings.pop("against", (EvaluationSet("toy", documents=settings.pop("documents", False)),))
    out = decontaminate(pairs, DecontaminateSettings(against, **settings), dropped, root)
    return "".join(p.id for p in out), dropped


def test_eight_words_in_a_row_of_a_test_query_are_too_many(root: Path) -> None:
    pairs = [
        pair("a", "We ask: Does aspirin lower the risk of a second stroke?", "x"),  # nine in common
        pair("b", "aspirin lower the risk of a second stroke", "x"),  # seven
        pair("c", "in men attack heart second a of risk the lower aspirin does", "x"),
    ]
    names, dropped = clean_of(root, pairs)
    assert names == "bc"
    assert dropped.counts == {"query of toy/test": 1}
    assert dropped.examples["query of toy/test"][0]["because"] == "does aspirin lower the risk of a second"
    assert clean_of(root, pairs, ngram=7)[0] == "c"


def test_a_short_test_query_counts_whole_and_a_very_short_one_only_alone(root: Path) -> None:
    pairs = [
        pair("a", "how to sort a list python 3", "x"),
        pair("b", "sort a list in python", "x"),
        pair("c", "Sleep", "x"),
        pair("d", "why we sleep", "x"),
    ]
    assert clean_of(root, pairs)[0] == "bd"


def test_only_the_named_split_and_its_held_out_queries_count(root: Path) -> None:
    pairs = [
        pair("a", "what is the best way to learn to swim fast", "x"),
        pair("b", QUERY, "x"),
        pair("c", "sleep", "x"),
    ]
    assert clean_of(root, pairs)[0] == "a"
    assert clean_of(root, pairs, against=(EvaluationSet("toy", "train"),))[0] == "bc"
    held = (EvaluationSet("toy", hold_out_modulus=3),)
    assert clean_of(root, pairs, against=held)[0] == "ab"
    with pytest.raises(InputError, match=r"toy/train has no query left"):
        clean_of(root, pairs, against=(EvaluationSet("toy", "train", hold_out_modulus=3),))


def test_judged_documents_count_where_the_rule_says_so(root: Path) -> None:
    pairs = [
        pair("a", "q", "Aspirin " + ABSTRACT),
        pair("b", "q", "In a long report: " + ABSTRACT + " " + TEXT),  # holds the document whole
        pair("c", "q", " ".join(ABSTRACT.split()[:10]) + " " + TEXT),  # its first half, in another text
        pair("d", "q", "Short."),  # too few words to say
        pair("e", "q", " ".join(ABSTRACT.split()[:14])),  # a part of it, and nothing else
    ]
    assert clean_of(root, pairs)[0] == "abcde"
    names, dropped = clean_of(root, pairs, documents=True)
    assert names == "cd"
    assert dropped.counts == {"judged document of toy/test": 3}
    assert clean_of(root, pairs, documents=True, document_share=0.2)[0] == "d"


def test_a_further_positive_counts_as_the_positive_does(root: Path) -> None:
    graded = replace(pair("a", "q", "Short."), positives=(("Other.", 1.0), ("Aspirin " + ABSTRACT, 1.0)))
    names, dropped = clean_of(root, [graded, pair("b", "q", "Short.")], documents=True)
    assert names == "b"
    assert dropped.counts == {"judged document of toy/test": 1}


def test_queries_held_out_by_their_checksum_count(root: Path) -> None:
    pairs = [pair("a", QUERY, "x"), pair("b", "sleep", "x"), pair("c", "sort a list python", "x")]
    held = (EvaluationSet("toy", hold_out_modulus=7, hold_out="crc32"),)
    assert (
        clean_of(root, pairs, against=held)[0] == "ab"
    )  # of the ids 1, 2 and 3, only the checksum of 2 is divisible by 7


# ------------------------------------------------------------------------------------------------------- in a recipe

RECIPE = """
sources:
  - {kind: queries, dataset: toy, split: train}
  - {kind: titles, dataset: mine}
"""
CLEANED = (
    RECIPE
    + """
decontaminate: {against: [{dataset: toy, split: test, documents: true}]}
deduplicate: {near: 0.8}
"""
)


@pytest.fixture
def sources(root: Path) -> Path:
    texts = {"1": ("A title of four", TEXT), "2": ("Does aspirin lower the risk of a second attack", TEXT)}
    texts |= {
        "3": ("A title  of FOUR words", NEARLY),
        "5": ("One more title", "Really: " + ABSTRACT),
    }
    texts["6"] = ("Does aspirin lower risk of a second attack", TEXT)  # clean, and a copy of 2, which is not
    corpus = {i: Document(i, *text) for i, text in texts.items()}
    write_beir(root / "mine", BeirDataset("mine", corpus, {"q": "x"}, {"q": {"1": 1}}), "test")
    return root


def test_a_recipe_cleans_and_its_manifest_says_what_went(sources: Path) -> None:
    recipe = sources / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    plain = build_pairs(recipe, sources / "plain.jsonl", sources)
    assert "cleaning" not in plain
    recipe.write_text(CLEANED, encoding="utf-8")
    manifest = build_pairs(recipe, sources / "out.jsonl", sources)
    assert {p.id for p in read_pairs(sources / "out.jsonl")} == {"query:toy:train:4:2", "title:mine:1", "title:mine:6"}
    assert manifest["count"] == 3
    cleaning = manifest["cleaning"]
    assert cleaning["dropped"] == {
        "judged document of toy/test": 1,
        "near duplicate": 1,
        "query of toy/test": 1,
    }
    assert cleaning["by_source"] == {"titles:mine": cleaning["dropped"]}
    assert json.loads((sources / "out.jsonl.manifest.json").read_text(encoding="utf-8")) == manifest
    build_pairs(recipe, sources / "again.jsonl", sources)
    assert (sources / "again.jsonl").read_bytes() == (sources / "out.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("deduplicate: {nere: 0.8}", "recipe.yaml, deduplicate: unknown key nere; did you mean near?"),
        ("deduplicate: {near: 0.1}", "near must be a number from 0.5 to 1, got 0.1"),
        ("deduplicate: {by: pairs}", "by must be one of pair, positive (did you mean pair?), got 'pairs'"),
        ("deduplicate: no", "must be a mapping (key: value), got False"),
        ("decontaminate: {ngram: 8}", '"against" must be a list of evaluation sets'),
        ("decontaminate: {against: toy}", '"against" must be a list of evaluation sets'),
        ("decontaminate: {against: [{dataset: toy}], ngram: 1}", '"ngram" must be a whole number from 2'),
        ("decontaminate: {against: [{dataset: toy, splt: x}]}", "against 1: unknown key splt; did you mean split?"),
        ("decontaminate: {against: [{split: test}]}", "against 1: dataset is missing"),
        ("decontaminate: {against: [{dataset: toy, documents: 1}]}", "documents must be true or false, got 1"),
        ("decontaminate: {against: [{dataset: toy, split: dev}]}", 'no split "dev"'),
        ("decontaminate: {against: [{dataset: none}]}", 'no data set "none"'),
    ],
)
def test_a_wrong_cleaning_is_refused(sources: Path, more: str, expected: str) -> None:
    (sources / "recipe.yaml").write_text(RECIPE + more + "\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        build_pairs(sources / "recipe.yaml", sources / "out.jsonl", sources)
    assert expected in str(caught.value)
    assert not (sources / "out.jsonl").exists()


def test_true_means_the_defaults_and_nothing_means_nothing() -> None:
    assert read_cleaning({"deduplicate": True}, "here") == (None, DeduplicateSettings(0.8, "pair"))
    against, copies = read_cleaning({"decontaminate": {"against": [{"dataset": "toy"}]}}, "here")
    assert copies is None
    assert against == DecontaminateSettings((EvaluationSet("toy", "test", False, None),), 8, 0.5)


def test_a_cleaning_that_leaves_nothing_is_refused(sources: Path) -> None:
    source, against = "{kind: queries, dataset: toy, split: train}", "{dataset: toy, split: train}"
    (sources / "recipe.yaml").write_text(f"sources: [{source}]\ndecontaminate: {{against: [{against}]}}")
    with pytest.raises(InputError, match=r"cleaning leaves no pair.*query of toy/train"):
        build_pairs(sources / "recipe.yaml", sources / "out.jsonl", sources)

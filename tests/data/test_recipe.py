"""Recipes: the same bytes on every run, an honest manifest, and clear refusals."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import yaml

from search_r3.data.beir import BeirDataset, Document, load_beir, write_beir
from search_r3.data.dev_pools import POOLS
from search_r3.data.mining.decontamination import read_cleaning
from search_r3.data.mining.word_overlap import normalize
from search_r3.data.pairs import read_pairs
from search_r3.data.recipe import build_pairs, read_recipe
from search_r3.data.sources.beir_pairs import is_held_out
from search_r3.data.sources.registry import SOURCES
from search_r3.errors import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs/data"
DATA = Path(os.environ.get("SEARCH_R3_DATA", "no data sets"))

RECIPE = """
seed: 5
sources:
  - {kind: docstrings, packages: [json, no_such_package_here], optional: true, limit: 4, min_body_lines: 1}
  - {kind: titles, dataset: toy}
  - {kind: cloze, dataset: toy}
  - {kind: queries, dataset: toy, split: train, hold_out_modulus: 2}
"""
TEXT = "Sleep promotes the removal of waste from the brain of mice. " + "Many words follow here in this text. " * 4


@pytest.fixture
def root(tmp_path):
    corpus = {str(i): Document(str(i), f"Title number {i} here", f"{TEXT} Number {i}.") for i in range(4)}
    queries = {str(i): f"question {i}" for i in range(4)}
    write_beir(tmp_path / "data/toy", BeirDataset("toy", corpus, queries, {i: {i: 1} for i in queries}), "train")
    (tmp_path / "data/toy/SOURCE.txt").write_text("Made up.\nlicense: CC0\n", encoding="utf-8")
    return tmp_path


def build(root, recipe=RECIPE, output="out.jsonl", **options):
    (root / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return build_pairs(root / "recipe.yaml", root / output, root / "data", **options)


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(root):
    first = build(root, output="a.jsonl")
    again = build(root, output="b.jsonl")
    assert (root / "a.jsonl").read_bytes() == (root / "b.jsonl").read_bytes()
    assert first["sha256"] == again["sha256"] == hashlib.sha256((root / "a.jsonl").read_bytes()).hexdigest()
    assert build(root, output="c.jsonl", seed=6)["sha256"] != first["sha256"]


def test_the_sources_are_shuffled_by_the_seed(root):
    titles = "sources: [{kind: titles, dataset: toy}]"
    orders = set()
    for seed in range(6):
        build(root, titles, seed=seed)
        orders.add(tuple(pair.id for pair in read_pairs(root / "out.jsonl")))
    assert len(orders) > 2
    assert all(set(order) == {f"title:toy:{i}" for i in range(4)} for order in orders)


def test_the_manifest_says_what_went_in_and_what_did_not(root):
    manifest = build(root)
    assert manifest == json.loads((root / "out.jsonl.manifest.json").read_text(encoding="utf-8"))
    pairs = read_pairs(root / "out.jsonl")
    assert manifest["count"] == len(pairs) == sum(source["count"] for source in manifest["sources"])
    code, titles, cloze, queries = manifest["sources"]
    assert code["count"] == 4
    assert code["packages_missing"] == ["no_such_package_here"]
    assert code["dropped"]["over the limit"] > 0
    assert (titles["count"], cloze["count"], queries["count"]) == (4, 1, 2)
    assert queries["dropped"] == {"held out for dev": 2}
    assert titles["license"] == "license: CC0"
    assert {pair.source for pair in pairs} >= {"docstrings:json", "titles:toy", "cloze:toy", "queries:toy/train"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{kind: title, dataset: toy}", 'unknown kind "title"; did you mean "titles"?'),
        ("{kind: titles, datset: toy}", 'unknown key "datset"; did you mean "dataset"?'),
        ("{kind: titles}", '"dataset" is missing'),
        ("{kind: titles, dataset: toi}", 'did you mean "toy"?'),
        ("{kind: titles, dataset: toy, limit: 0}", '"limit" must be a whole number from 1, got 0'),
        ("{kind: docstrings, packages: [no_such_package_here]}", "is not installed"),
        ("{kind: docstrings, web_share: 0.7, name_share: 0.6}", "shares must be between 0 and 1"),
        ("{kind: queries, dataset: toy, split: test}", "for evaluation only"),
        ("{kind: queries, dataset: toy, split: dev}", 'no split "dev"'),
        ("{kind: queries, dataset: toy, split: train, hold_out_modulus: 1}", "it yields no pair"),
        ("{kind: queries, dataset: toy, split: train, hold_out: crc32}", '"hold_out" needs "hold_out_modulus"'),
        ("{kind: queries, dataset: toy, split: train, hold_out: crc, hold_out_modulus: 8}", 'did you mean "crc32"?'),
        ("{kind: queries, dataset: toy, split: train, max_positives: 2}", '"max_positives" needs "graded: true"'),
        ("{kind: queries, dataset: toy, split: train, graded: 1}", '"graded" must be true or false, got 1'),
        ("{kind: queries, dataset: toy, split: train, reasoning: true}", "reasoning.jsonl"),
        ("titles", 'expected a mapping with "kind"'),
    ],
)
def test_a_wrong_source_is_refused_by_its_number(root, source, expected):
    with pytest.raises(InputError) as caught:
        build(root, f"sources:\n  - {{kind: titles, dataset: toy}}\n  - {source}\n")
    assert "recipe.yaml, source 2" in str(caught.value)
    assert expected in str(caught.value)
    assert not (root / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("sources: [", "not valid YAML"),
        ("- a", "must contain a mapping"),
        ("sources: []", "at least one source"),
        ("source: []", 'unknown key "source"; did you mean "sources"?'),
        ("seed: x\nsources: [{kind: titles, dataset: toy}]", '"seed" must be a whole number'),
    ],
)
def test_a_wrong_recipe_is_refused(root, recipe, expected):
    with pytest.raises(InputError, match=r"recipe\.yaml") as caught:
        build(root, recipe)
    assert expected in str(caught.value)


REASONING = [
    {"_id": "0", "split": "train", "reasoning": "first  think", "answer": "yes"},
    {"_id": "1", "split": "train", "reasoning": "", "answer": "no"},
    {"_id": "2", "split": "dev", "reasoning": "never to be learned", "answer": "no"},
]
GRADED = "{kind: queries, dataset: toy, split: train, graded: true, max_positives: 2, reasoning: true}"


def test_graded_queries_bring_their_documents_and_the_reasoning_of_their_own_split(root):
    (root / "data/toy/qrels/train.tsv").write_text("0\t0\t1\n0\t1\t2\n0\t2\t1\n1\t1\t1\n2\t2\t1\n")
    (root / "data/toy/reasoning.jsonl").write_text("\n".join(map(json.dumps, REASONING)), encoding="utf-8")
    manifest = build(root, f"sources: [{GRADED}]")
    pairs = {pair.query: pair for pair in read_pairs(root / "out.jsonl")}
    assert {query: pair.reasoning for query, pair in pairs.items()} == {
        "question 0": "first think", "question 1": None, "question 2": None,
    }  # fmt: skip
    assert sorted(pairs["question 0"].relevant.values()) == [1, 2]
    assert pairs["question 0"].positive.endswith("Number 1.")
    assert manifest["sources"][0]["dropped"] == {"over max_positives": 1}
    assert manifest["sources"][0]["inputs"]["files"] == 5  # corpus, queries, qrels, SOURCE.txt, reasoning


def test_an_interrupted_build_keeps_grades_and_further_positives(root):
    (root / "data/toy/qrels/train.tsv").write_text("0\t0\t1\n0\t1\t2\n1\t1\t1\n")
    recipe = "sources: [{kind: queries, dataset: toy, split: train, graded: true}]\ndeduplicate: true"
    build(root, recipe, "whole.jsonl")

    def stop(line):
        if line.startswith("writing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(root, recipe, report=stop)
    said = []
    build(root, recipe, report=said.append)
    assert any("finished before" in line for line in said)
    assert (root / "out.jsonl").read_bytes() == (root / "whole.jsonl").read_bytes()


def test_a_data_set_without_reasoning_for_the_split_is_refused(root):
    (root / "data/toy/reasoning.jsonl").write_text(json.dumps(REASONING[2]), encoding="utf-8")
    with pytest.raises(InputError, match='has no reasoning for the split "train"'):
        build(root, f"sources: [{GRADED}]")


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(InputError, match="no configuration file at"):
        build_pairs(tmp_path / "none.yaml", tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    "path", sorted(set(CONFIGS.glob("*.yaml")) - set(CONFIGS.glob("fresh-*.yaml"))), ids=lambda path: path.stem
)
def test_the_recipes_that_we_ship_are_valid(path):
    assert read_recipe(path, SOURCES)["sources"]


def cleaned_of(recipe):
    against, copies = read_cleaning(read_recipe(CONFIGS / f"{recipe}.yaml", SOURCES), recipe)
    assert against is not None
    assert copies is not None
    return against.against


def test_stage_1_is_cleaned_of_every_set_that_we_evaluate_on():
    assert {(one.dataset, one.split) for one in cleaned_of("stage1")} == {
        *((name, "test") for name in ("scifact", "cosqa", "mkqa/en", "s2_search", "cranfield", "cisi")),
        *(("hotpotqa", "dev"), ("cosqa", "dev"), ("scifact", "train")),
    }


def test_the_direct_embedder_is_cleaned_of_every_test_and_of_every_dev_set():
    """Also of the dev splits that count as test, and of the train queries that choose a checkpoint."""
    sets = {(one.dataset, one.split): one for one in cleaned_of("direct")}
    assert set(sets) == {
        *((name, "test") for name in ("scifact", "cosqa", "mkqa/en", "s2_search", "cranfield", "cisi", "nfcorpus")),
        *((name, "dev") for name in ("hotpotqa", "hotpotqa_more", "entailmentbank", "strategyqa")),
        *((kind, split) for kind, (split, _, _) in POOLS.items()),
    }
    sources = read_recipe(CONFIGS / "direct.yaml", SOURCES)["sources"]
    for kind, (split, modulus, rule) in POOLS.items():
        held = sets[kind, split]
        assert (held.hold_out_modulus, held.hold_out if modulus else "") == (modulus, rule)
        for source in sources:
            if source["kind"] == "queries" and source["dataset"] == kind:
                assert source["split"] == "train"
                assert (source.get("hold_out_modulus"), source.get("hold_out", "number" if modulus else "")) == (
                    modulus, rule,
                )  # fmt: skip


@pytest.mark.skipif(not (DATA / "strategyqa").is_dir(), reason="needs the real data sets, in SEARCH_R3_DATA")
def test_no_query_of_a_test_or_dev_set_is_left_among_the_real_ones(tmp_path):
    """Sources of real questions, cleaned as direct.yaml is: nothing that is evaluated on is trained on."""
    recipe = read_recipe(CONFIGS / "direct.yaml", SOURCES)
    recipe["sources"] = [
        source for source in recipe["sources"] if source["kind"] == "queries" and source["dataset"] != "medquad"
    ]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    manifest = build_pairs(tmp_path / "recipe.yaml", tmp_path / "out.jsonl", DATA)
    pairs = read_pairs(tmp_path / "out.jsonl")
    asked = {normalize(pair.query) for pair in pairs}
    for one in cleaned_of("direct"):
        dataset = load_beir(DATA / one.dataset, one.split)
        for identity, text in dataset.queries.items():
            if one.hold_out_modulus is None or is_held_out(identity, one.hold_out_modulus, one.hold_out):
                assert normalize(text) not in asked, (one.dataset, one.split, text)
    of = {
        name: [pair for pair in pairs if name in pair.source] for name in ("strategyqa", "entailmentbank", "nfcorpus")
    }
    assert all(len(found) > 500 for found in of.values())
    assert sum(len(pair.relevant) for pair in of["nfcorpus"]) > 20 * len(of["nfcorpus"])
    assert all(pair.reasoning for pair in of["strategyqa"][:50])
    held = next(source for source in manifest["sources"] if source["dataset"] == "strategyqa")
    assert held["dropped"]["held out for dev"] > 200

"""Recipes: the same bytes on every run, an honest manifest, and clear refusals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.data.mining.decontamination import read_cleaning
from search_r3.data.pairs import read_pairs
from search_r3.data.recipe import build_pairs, read_recipe
from search_r3.data.sources.registry import SOURCES
from search_r3.errors import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs/data"

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
        ("{kind: titles, dataset: toy, limit: 0}", '"limit" must be a whole number from 1, found 0'),
        ("{kind: docstrings, packages: [no_such_package_here]}", "is not installed"),
        ("{kind: docstrings, web_share: 0.7, name_share: 0.6}", "shares must be between 0 and 1"),
        ("{kind: queries, dataset: toy, split: test}", "for evaluation only"),
        ("{kind: queries, dataset: toy, split: dev}", 'no split "dev"'),
        ("{kind: queries, dataset: toy, split: train, hold_out_modulus: 1}", "it yields no pair"),
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


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(InputError, match="no configuration file at"):
        build_pairs(tmp_path / "none.yaml", tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    "path", sorted(set(CONFIGS.glob("*.yaml")) - set(CONFIGS.glob("fresh-*.yaml"))), ids=lambda path: path.stem
)
def test_the_recipes_that_we_ship_are_valid(path):
    assert read_recipe(path, SOURCES)["sources"]


def test_stage_1_is_cleaned_of_every_set_that_we_evaluate_on():
    against, copies = read_cleaning(read_recipe(CONFIGS / "stage1.yaml", SOURCES), "stage1")
    assert against is not None
    assert copies is not None
    assert {(one.dataset, one.split) for one in against.against} == {
        *((name, "test") for name in ("scifact", "cosqa", "mkqa/en", "s2_search", "cranfield", "cisi")),
        *(("hotpotqa", "dev"), ("cosqa", "dev"), ("scifact", "train")),
    }

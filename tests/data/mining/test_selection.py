from __future__ import annotations

import json
from pathlib import Path

import pytest

from search_r3.data.mining.scorers import open_scorer
from search_r3.data.mining.selection import select_pairs
from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs
from search_r3.errors import InputError

ANIMALS = ["aardvark", "bonobo", "caracal", "dingo", "echidna", "fossa", "gibbon", "hyena"]
PAIRS = [
    *(
        TrainingPair(f"a{i}", f"where lives the {name}", f"{name} lives here", source="animals:zoo")
        for i, name in enumerate(ANIMALS)
    ),
    TrainingPair("vague", "it does things", "hyena gibbon fossa", source="animals:zoo"),
    *(TrainingPair(f"c{i}", f"call {i}", f"def call_{i}(): pass", source=f"code:lib{i % 2}") for i in range(6)),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    return tmp_path / "pairs.jsonl"


def test_so_many_of_each_kind_are_taken_whatever_their_order_in_the_file(source: Path, tmp_path: Path) -> None:
    manifest = select_pairs(source, tmp_path / "out.jsonl", {"animals": 3, "code": 2})
    chosen = {pair.id for pair in read_pairs(tmp_path / "out.jsonl")}
    assert manifest["by_kind"] == {"animals": 3, "code": 2}
    write_pairs(source, PAIRS[::-1])
    select_pairs(source, tmp_path / "again.jsonl", {"animals": 3, "code": 2})
    assert {pair.id for pair in read_pairs(tmp_path / "again.jsonl")} == chosen
    select_pairs(source, tmp_path / "other.jsonl", {"animals": 3, "code": 2}, seed=1)
    assert {pair.id for pair in read_pairs(tmp_path / "other.jsonl")} != chosen


def test_a_source_may_be_named_within_its_kind(source: Path, tmp_path: Path) -> None:
    select_pairs(source, tmp_path / "out.jsonl", {"code:lib0": 3, "code": 1})
    sources = [pair.source for pair in read_pairs(tmp_path / "out.jsonl")]
    assert sorted(sources) == ["code:lib0"] * 3 + ["code:lib1"]


def test_a_query_that_does_not_find_its_document_is_dropped(source: Path, tmp_path: Path) -> None:
    manifest = select_pairs(source, tmp_path / "out.jsonl", {"animals": 9}, scorer=open_scorer("bm25"), top=1)
    assert {pair.id for pair in read_pairs(tmp_path / "out.jsonl")} == {f"a{i}" for i in range(8)}
    assert manifest["dropped"] == {"not found again": 1, "of a kind not asked for": 6}
    assert not (tmp_path / "out.jsonl.partial").exists()
    written = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert written == json.loads(json.dumps(manifest))


def test_one_of_several_positives_is_enough(tmp_path: Path) -> None:
    """A pair whose further positive is found again is kept, with all its fields."""
    found = TrainingPair(
        "g", "where lives the hyena", "it is in Africa", positives=(("where the hyena lives", 2.0),), grade=3.0,
        reasoning="think of an animal", source="graded:zoo",
    )  # fmt: skip
    others = [
        TrainingPair(f"o{i}", f"{name} food", f"{name} eats", source="graded:zoo") for i, name in enumerate(ANIMALS)
    ]
    lost = TrainingPair("l", "fossa food", "nothing of it", positives=(("nor here", 1.0),), source="graded:zoo")
    write_pairs(tmp_path / "in.jsonl", [found, *others, lost])
    select_pairs(tmp_path / "in.jsonl", tmp_path / "out.jsonl", {}, scorer=open_scorer("bm25"), top=1)
    kept = {pair.id: pair for pair in read_pairs(tmp_path / "out.jsonl")}
    assert kept["g"] == found
    assert "l" not in kept


@pytest.mark.parametrize(("counts", "message"), [({"cars": 1}, "cars=1"), ({"code": 0}, "code=0")])
def test_wrong_counts_are_named(counts: dict[str, int], message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        select_pairs(source, tmp_path / "out.jsonl", counts)


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    write_pairs(tmp_path / "p.jsonl", [PAIRS[8], TrainingPair("x", "zebra", "stripes")])
    with pytest.raises(InputError, match="no pair is left"):
        select_pairs(tmp_path / "p.jsonl", tmp_path / "out.jsonl", {}, scorer=open_scorer("bm25"), top=1)

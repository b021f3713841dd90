"""Pairs from Hugging Face data sets: local Parquet and JSON Lines files, and names of the hub, streamed or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from search_r3.data.io.line_reader import MissingSource
from search_r3.data.pairs import TrainingPair
from search_r3.data.recipe import build_pairs
from search_r3.data.sources.hf_pairs import hf_pairs
from search_r3.errors import InputError

datasets = pytest.importorskip("datasets")
ROWS = [
    {"anchor": " first ", "answer": "an answer", "bad": ["x", "y", "x"]},
    {"anchor": "second", "answer": "another", "bad": None},
    {"anchor": "second", "answer": "another", "bad": []},
    {"anchor": "third", "answer": "more", "bad": ["z"]},
]
COLUMNS: dict[str, Any] = {"query": "anchor", "positive": "answer", "negatives": ["bad"]}
EXPECTED = [
    TrainingPair("datasets:mine:1", "first", "an answer", ("x", "y"), source="datasets:mine"),
    TrainingPair("datasets:mine:2", "second", "another", source="datasets:mine"),
    TrainingPair("datasets:mine:4", "third", "more", ("z",), source="datasets:mine"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("search_r3.data.sources.hf_pairs.commit_of", lambda path, revision: "abc123")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub with one data set, someone/mine, whose split train has `ROWS`; the list gets what is asked for."""
    asked: list[dict[str, Any]] = []

    def load_dataset(path: str, name: str | None = None, **options: Any) -> dict[str, Any]:
        asked.append({"path": path, "name": name, **options})
        if path != "someone/mine":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")

        def rows() -> Iterator[dict[str, Any]]:
            for number, row in enumerate(ROWS):
                asked[-1]["read"] = number + 1
                yield row

        return {"train": datasets.IterableDataset.from_generator(rows), "test": []}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def write(path: Path) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_local_file_is_read_without_a_copy_of_it(tmp_path: Path, suffix: str) -> None:
    built = hf_pairs(str(write(tmp_path / f"mine.{suffix}")), license="CC0", **COLUMNS)
    assert built.pairs == EXPECTED
    assert built.dropped == {"duplicate": 1}
    assert built.origin == {"license": "CC0"}
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_name_of_the_hub_and_its_commit(hub: list[dict[str, Any]]) -> None:
    built = hf_pairs("someone/mine", license="MIT", subset="en", revision="v1", **COLUMNS)
    assert built.pairs == EXPECTED
    assert built.origin == {"license": "MIT", "commit": "abc123"}
    assert hub[0].items() >= {"name": "en", "revision": "v1", "streaming": False}.items()


def test_streaming_reads_the_first_rows_only(hub: list[dict[str, Any]]) -> None:
    built = hf_pairs("someone/mine", license="MIT", streaming=True, rows=2, **COLUMNS)
    assert built.pairs == EXPECTED[:2]
    assert hub[0]["streaming"] is True
    assert hub[0]["read"] == 2


def test_a_recipe_takes_it_and_its_manifest_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.parquet")
    source = {"kind": "datasets", "path": str(path), "license": "CC0", **COLUMNS}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"sources": [source]}))
    manifest = build_pairs(tmp_path / "recipe.yaml", tmp_path / "pairs.jsonl")
    assert manifest["count"] == 3
    (entry,) = manifest["sources"]
    assert entry["by_source"] == {"datasets:mine": 3}
    assert (entry["inputs"]["files"], entry["inputs"]["bytes"]) == (1, path.stat().st_size)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"sources": [source, source]}))
    with pytest.raises(InputError, match=r'source 2 \(datasets\): source 1 is also called "mine"'):
        build_pairs(tmp_path / "recipe.yaml", tmp_path / "pairs.jsonl")


def test_what_cannot_be_read_is_one_line(tmp_path: Path, hub: list[dict[str, Any]]) -> None:
    with pytest.raises(MissingSource, match=r"nobody/none cannot be read as a data set: Dataset 'nobody/none' doesn't"):
        hf_pairs("nobody/none", license="MIT")
    with pytest.raises(InputError, match='someone/mine: unknown split "dev"; known: train, test'):
        hf_pairs("someone/mine", license="MIT", split="dev")
    with pytest.raises(InputError, match='the split "test" is for evaluation only'):
        hf_pairs("someone/mine", license="MIT", split="test")
    with pytest.raises(InputError, match='someone/mine: unknown column "query"; known: anchor, answer, bad'):
        hf_pairs("someone/mine", license="MIT")
    (tmp_path / "notes.txt").write_text("no table")
    with pytest.raises(InputError, match="expected files of one kind"):
        hf_pairs(str(tmp_path / "notes.txt"), license="MIT")


def test_rows_without_a_pair_are_counted_if_that_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"query": "q", "positive": " "}\n{"query": "q", "positive": "p"}\n')
    built = hf_pairs(str(tmp_path / "mine.jsonl"), license="CC0", damaged="skip")
    assert [pair.id for pair in built.pairs] == ["datasets:mine:2"]
    assert built.dropped == {"damaged: no pair": 1}
    with pytest.raises(InputError, match=r"mine\.jsonl, row 1: .*must contain a text"):
        hf_pairs(str(tmp_path / "mine.jsonl"), license="CC0")


def test_without_the_package_the_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"kind: datasets needs the package datasets; .*'search-r3\[datasets\]'"):
        hf_pairs("someone/mine", license="MIT")

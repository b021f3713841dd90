"""Data sets by name: below the data root, by a path, or a line that says which there are. Fetching: `test_remote`."""

from __future__ import annotations

import pytest

from search_r3.data.beir import BeirDataset, Document, load_beir, write_beir
from search_r3.data.io.find_dataset import find_dataset
from search_r3.errors import InputError


def test_a_data_set_is_found_by_path_by_root_and_by_variable(tmp_path, monkeypatch):
    root = tmp_path / "root"
    for name in ("scifact", "mkqa/en"):
        write_beir(
            root / name, BeirDataset(name, {"d": Document("d", "", "Bread.")}, {"q": "bread"}, {"q": {"d": 1}}), "test"
        )
    assert find_dataset(root / "scifact") == root / "scifact"
    assert find_dataset("mkqa/en", root) == root / "mkqa/en"
    monkeypatch.setenv("SEARCH_R3_DATA", str(root))
    assert find_dataset("scifact") == root / "scifact"
    assert load_beir(find_dataset("mkqa/en"), "test").name == "mkqa/en"
    with pytest.raises(InputError, match=r'did you mean "scifact"\? there are: mkqa/en, scifact'):
        find_dataset("sci-fact")


def test_a_root_without_data_sets_says_how_to_give_one(tmp_path):
    with pytest.raises(InputError, match="SEARCH_R3_DATA"):
        find_dataset("scifact", tmp_path)

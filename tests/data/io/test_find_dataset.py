"""Data sets by name: below the data root, by a path, or a line that says which there are. Fetching: `test_remote`."""

from __future__ import annotations

import pytest

from search_r3.data.beir import BeirDataset, Document, load_beir, resolve_root, write_beir
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


def test_without_a_root_data_sets_are_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("SEARCH_R3_DATA", raising=False)
    monkeypatch.delenv("SEARCH_R3_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert resolve_root() == tmp_path / "search-r3" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_root() == tmp_path / "home" / ".cache" / "search-r3" / "data"
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    assert resolve_root() == tmp_path / "cache" / "data"
    assert resolve_root(tmp_path) == tmp_path
    with pytest.raises(InputError, match="SEARCH_R3_DATA"):
        find_dataset("scifact")


def test_a_root_without_data_sets_says_how_to_give_one(tmp_path):
    with pytest.raises(InputError, match="SEARCH_R3_DATA"):
        find_dataset("scifact", tmp_path)

"""Copies of indexes on object storage: made once for each version, and never larger than the bound."""

from __future__ import annotations

import json
import shutil
import uuid

import pytest
from storage_faults import storage

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, build_index
from search_r3.index.local_copies import LOCK, LocalCopies, newest_version
from search_r3.index.storage.location import Remote

pytestmark = pytest.mark.slow

DOCUMENTS = [SourceDocument(f"d{number}", "", f"text number {number} of water") for number in range(30)]


@pytest.fixture
def place(s3) -> Remote:
    return Remote(f"s3://bucket/copies/{uuid.uuid4().hex}")


def copies(folder) -> list[str]:
    return sorted(item.name for item in folder.iterdir() if item.name != LOCK)


def test_a_version_is_copied_once_and_a_new_one_takes_its_place(place, model, tmp_path):
    build_index(place, DOCUMENTS, model)
    cache = LocalCopies(tmp_path / "cache", 1e9)
    first = cache.newest(place)
    assert len(SearchIndex.open(first)) == 30
    marked = first / "marked"
    marked.touch()
    assert cache.newest(place) == first
    assert marked.exists()
    build_index(place, [*DOCUMENTS, SourceDocument("new", "", "a new one")], model)
    assert newest_version(place)[0] == SearchIndex.open(place).table.version
    second = cache.newest(place)
    assert len(SearchIndex.open(second)) == 31
    assert copies(tmp_path / "cache") == [second.name]


def test_a_copy_is_opened_in_advance_but_only_searched_if_it_is_the_newest(place, model, tmp_path, monkeypatch):
    build_index(place, DOCUMENTS, model)
    cache, opened, snapshot = LocalCopies(tmp_path / "cache", 1e9), [], SearchIndex.open_snapshot
    first = cache.newest(place)

    def noted(path):
        opened.append(path)
        return snapshot(path)

    monkeypatch.setattr(SearchIndex, "open_snapshot", noted)
    index = cache.open(place)
    assert (len(index), index.path, opened) == (30, place, [first])
    build_index(place, [*DOCUMENTS, SourceDocument("new", "", "a new one")], model)
    assert len(cache.open(place)) == 31
    assert opened[1:] == [first, cache.newest(place)]
    shutil.rmtree(cache.newest(place) / "chunks.lance")
    with pytest.raises(InputError, match="not a search-r3 index"):
        cache.open(place)


def test_all_copies_together_stay_within_the_bound(place, model, tmp_path):
    other = Remote(f"{place}-other")
    for index in (place, other):
        build_index(index, DOCUMENTS, model)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "notes.txt").write_text("somebody's")
    first = LocalCopies(tmp_path / "cache", 1e9).newest(place)
    size = sum(file.stat().st_size for file in first.rglob("*") if file.is_file())
    second = LocalCopies(tmp_path / "cache", 1.5 * size).newest(other)
    assert copies(tmp_path / "cache") == sorted([second.name, "notes.txt"])
    with pytest.raises(InputError, match=r"more than the cache may have .* raise --cache-size"):
        LocalCopies(tmp_path / "cache", 1000).newest(place)
    assert second.is_dir()
    with pytest.raises(InputError, match="is not a search-r3 index"):
        LocalCopies(tmp_path / "cache", 1e9).newest(Remote(f"{place}-none"))


def test_a_search_of_a_copy_finds_the_same_by_one_request(place, model, s3, s3_server, tmp_path, capsys):
    build_index(place, DOCUMENTS, model)
    search = ["search", place, "water 7", "--mode", "text", "--json"]
    assert main(search) == 0
    expected = json.loads(capsys.readouterr().out)["hits"]
    with storage(s3_server) as counted:
        s3.setenv("AWS_ENDPOINT_URL", counted.url)
        for requests in (None, 1):
            counted.requests.clear()
            assert main([*search, "--cache-dir", str(tmp_path / "cache")]) == 0
            assert json.loads(capsys.readouterr().out)["hits"] == expected
            assert requests in (None, len(counted.requests))
        counted.fault = "gone"
        assert main([*search, "--cache-dir", str(tmp_path / "cache")]) == 2
        assert capsys.readouterr().err.startswith(f"error: {place}: ")


def test_an_index_in_a_folder_is_not_copied(model, tmp_path, capsys):
    build_index(tmp_path / "index", DOCUMENTS, model)
    search = ["search", str(tmp_path / "index"), "water", "--mode", "text", "--cache-dir", str(tmp_path / "cache")]
    assert main(search) == 0
    assert not (tmp_path / "cache").exists()

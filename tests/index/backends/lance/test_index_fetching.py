"""A small index on object storage is read whole, by two lists of requests; a large one is searched where it is."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from storage_faults import storage

from search_r3.index import SearchIndex, SourceDocument, build_index
from search_r3.index.backends.lance import fetching
from search_r3.index.backends.lance.fetching import fetch, fetch_small, needed_files, version_of
from search_r3.index.maintenance import delete_documents
from search_r3.index.storage.location import Remote, StorageError

pytestmark = pytest.mark.slow

DOCUMENTS = [SourceDocument(f"d{number}", "", f"text number {number} of water") for number in range(30)]


@pytest.fixture
def place(s3) -> Remote:
    return Remote(f"s3://bucket/fetching/{uuid.uuid4().hex}")


def found(index, model) -> list[tuple[str, float]]:
    hits = index.search("number 7 of water", model, reasoning=False, k=30).hits
    return [(hit.id, round(hit.score, 6)) for hit in hits]


def test_manifests_are_called_by_their_versions():
    assert version_of("_versions/18446744073709551605.manifest") == 10
    assert version_of("_versions/7.manifest") == 7
    assert version_of("data/7.lance") is None


def test_a_small_index_is_read_by_few_requests_and_a_large_one_where_it_is(place, model, s3, s3_server):
    build_index(place, DOCUMENTS, model)
    delete_documents(place, ["d3"])
    expected = found(SearchIndex.open(place), model)
    assert len(expected) == 29
    with storage(s3_server) as counted:
        s3.setenv("AWS_ENDPOINT_URL", counted.url)
        small = SearchIndex.open_snapshot(place)
        assert small.backend.table.fetched is not None
        requests = len(counted.requests)
        assert found(small, model) == expected
        assert len(counted.requests) == requests, "all of it is here"
        s3.setattr(fetching, "SMALL_BYTES", 1000)
        large = SearchIndex.open_snapshot(place)
        assert large.backend.table.fetched is None
        assert found(large, model) == expected
        s3.setattr(fetching, "SMALL_BYTES", 16_000_000)
        s3.setattr(fetching, "SMALL_FILES", 3)
        assert SearchIndex.open_snapshot(place).backend.table.fetched is None
        folder = Path(small.backend.table.fetched.name)
        assert folder.is_dir()
        del small
    assert not folder.exists()


def test_the_newest_version_of_a_small_index_is_fetched_anew(place, model):
    build_index(place, DOCUMENTS, model)
    index = SearchIndex.open_snapshot(place)
    build_index(place, [*DOCUMENTS, SourceDocument("new", "", "a new one")], model)
    assert len(index) == 30
    assert len(index.latest()) == 31


def test_what_lacks_a_file_is_left_to_lance(place, model, s3):
    """As when a file was removed between the list of names and the reading."""
    build_index(place, DOCUMENTS, model)
    listed = list(fetching._list(fetching.open_objects(place), "chunks"))
    for start in ("data/", "_indices/"):
        s3.setattr(fetching, "_list", lambda *_, start=start: iter(i for i in listed if not i[0].startswith(start)))
        assert fetch_small(place, "chunks") is None
    s3.setattr(fetching, "open_objects", lambda *_, **__: (_ for _ in ()).throw(ImportError("no obstore")))
    assert fetch_small(place, "chunks") is None
    assert len(SearchIndex.open_snapshot(place)) == 30


def test_storage_that_fails_is_one_line(place, model, s3, s3_server):
    build_index(place, DOCUMENTS, model)
    with storage(s3_server) as bad:
        s3.setenv("AWS_ENDPOINT_URL", bad.url)
        s3.setenv("SEARCH_R3_STORAGE_TIMEOUT", "0.3")
        bad.fault, bad.after = "503", 1
        with pytest.raises(StorageError, match=f"^{place}: [^\n]+$"):
            fetch_small(Remote(str(place)), "chunks")


def test_a_copy_has_the_files_of_its_version_in_pieces_of_any_size(place, model, s3, tmp_path):
    build_index(place, DOCUMENTS, model)
    older = SearchIndex.open(place).table.version
    build_index(place, [*DOCUMENTS, SourceDocument("new", "", "a new one")], model)
    s3.setattr(fetching, "PIECE", 1000)
    for name, count in (("older", 30), ("newest", 31)):
        version = older if name == "older" else SearchIndex.open(place).table.version
        fetch(place, "chunks", needed_files(place, "chunks", version), tmp_path / name)
        copy = SearchIndex.open(tmp_path / name)
        assert (len(copy), copy.table.version, copy.complete) == (count, version, True)
    assert found(copy, model) == found(SearchIndex.open(place), model)

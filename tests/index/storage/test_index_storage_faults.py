"""Storage that never answers, answers with errors, or goes away in the middle: one line, in time, nothing lost."""

from __future__ import annotations

import time
import uuid

import pytest
from nightly import nightly
from storage_faults import storage

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, build_index
from search_r3.index.maintenance import compact_index, delete_documents
from search_r3.index.storage import lease
from search_r3.index.storage.location import PATIENCE, WRITING_PATIENCE, Remote, StorageError, describe_failure

pytestmark = pytest.mark.slow

DOCUMENTS = [SourceDocument(f"d{number}", "", f"text number {number} of water") for number in range(30)]


@pytest.fixture
def bad_storage(s3, s3_server):
    with storage(s3_server) as found:
        s3.setenv("AWS_ENDPOINT_URL", found.url)
        s3.setenv("SEARCH_R3_STORAGE_TIMEOUT", "0.3")
        s3.setattr(lease, "SECONDS", 2.0)  # of one that could not be given back
        yield found


@pytest.fixture
def place():
    return f"s3://bucket/faults/{uuid.uuid4().hex}"


def refused(bad_storage, capsys, place: str, *arguments: str) -> None:
    started = time.monotonic()
    assert main(list(arguments)) == 2
    assert time.monotonic() - started < 30
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {place}: ")
    assert bad_storage.url in lines[0] or "the endpoint" in lines[0]


@pytest.mark.parametrize("fault", ["500", *nightly("silent", "half", "403", "503", "gone")])
def test_a_search_ends_in_time_with_one_line(bad_storage, place, model, capsys, fault):
    build_index(place, DOCUMENTS, model)
    bad_storage.fault = fault
    refused(bad_storage, capsys, place, "search", place, "water", "--mode", "text")
    with pytest.raises(StorageError):
        build_index(place, DOCUMENTS, model)
    bad_storage.fault = "none"
    index = SearchIndex.open(place)
    bad_storage.fault = fault
    with pytest.raises(StorageError):  # not a filter that does not parse
        index.search("water", None, mode="text", where="title = 'x'")


def test_slow_storage_only_takes_longer_and_wrong_keys_are_named(bad_storage, place, model, capsys):
    build_index(place, DOCUMENTS, model)
    bad_storage.delay = 0.05
    assert main(["search", place, "water 7", "--mode", "text", "--json"]) == 0
    capsys.readouterr()
    bad_storage.fault = "403"
    assert main(["search", place, "water", "--mode", "text"]) == 2
    assert "refuses these credentials; check the keys" in capsys.readouterr().err


def test_every_command_ends_in_time_with_one_line(bad_storage, place, model, capsys):
    build_index(place, DOCUMENTS, model)
    bad_storage.fault = "503"
    for command in (["index", "--info", place], ["delete", place, "d1"], ["compact", place]):
        refused(bad_storage, capsys, place, *command)


@pytest.mark.parametrize(
    ("after", "fault"),
    [
        (6, "gone"),
        *nightly((2, "503"), (12, "silent"), (20, "gone"), (35, "503")),
    ],
)
def test_a_build_during_which_storage_fails_is_one_line_and_can_be_repeated(bad_storage, place, model, fault, after):
    bad_storage.fault, bad_storage.after = fault, after
    with pytest.raises(StorageError, match=f"^{place}: [^\n]+$"):
        build_index(place, DOCUMENTS, model, commit_every=5)
    bad_storage.fault = "none"
    report = build_index(place, DOCUMENTS, model, commit_every=5, wait=10)
    index = SearchIndex.open(place)
    assert (len(index), index.describe()["duplicate_ids"], index.complete) == (30, 0, True)
    assert report.chunks == 30
    assert {hit.id for hit in index.search("water", None, mode="text", k=30).hits} == {d.id for d in DOCUMENTS}


@pytest.mark.parametrize(
    ("after", "change"),
    [
        *nightly((1, compact_index)),
        (9, compact_index),
        (14, lambda place: delete_documents(place, ["d1"])),
    ],
    ids=["compact-1", "compact-9", "delete-14"],
)
def test_a_change_during_which_storage_fails_is_one_line_and_can_be_repeated(bad_storage, place, model, change, after):
    build_index(place, DOCUMENTS, model)
    bad_storage.fault, bad_storage.after = "gone", after
    with pytest.raises(StorageError):
        change(place)
    bad_storage.fault = "none"
    assert len(SearchIndex.open(place)) in (29, 30)
    build_index(place, DOCUMENTS, model, wait=10)
    index = SearchIndex.open(place)
    assert (len(index), index.describe()["duplicate_ids"], index.complete) == (30, 0, True)


def test_deadlines_are_the_users_where_given(s3):
    place = Remote("s3://bucket/x")
    assert place.options == PATIENCE
    assert place.for_writing().options == WRITING_PATIENCE
    given = Remote("s3://bucket/x", {"read_timeout": "9s", "aws_region": "there"})
    assert given.options == PATIENCE | given.given
    assert given.for_writing().options == WRITING_PATIENCE | given.given
    s3.setenv("SEARCH_R3_STORAGE_TIMEOUT", "12.5")
    assert Remote("s3://bucket/x").options["read_timeout"] == "12500ms"
    for wrong in ("soon", "0", "-3", "nan", "inf"):
        s3.setenv("SEARCH_R3_STORAGE_TIMEOUT", wrong)
        with pytest.raises(InputError, match="SEARCH_R3_STORAGE_TIMEOUT is"):
            Remote("s3://bucket/x")


@pytest.mark.parametrize(("uri", "variable"), [("gs://bucket/x", "GOOGLE_"), ("az://bucket/x", "AZURE_STORAGE_")])
def test_the_variables_that_are_named_are_those_of_the_storage(uri, variable):
    line = describe_failure(Remote(uri), "Generic MicrosoftAzure error: MissingAccount")
    assert variable in line

"""An index on object storage: a local server that speaks S3 (moto's), reached as a user reaches theirs."""

from __future__ import annotations

import pickle
import socket
from pathlib import Path

import pytest

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, build_index
from search_r3.index.storage.location import PATIENCE, Remote, describe_failure, location_of

pytestmark = pytest.mark.slow

DOCUMENTS = [
    SourceDocument("bread", "Bread", "flour water salt and yeast baked in an oven", {"year": 1900}),
    SourceDocument("violin", "Violin", "a wooden instrument with four strings played with a bow", {"year": 1550}),
    SourceDocument("river", "River", "water that flows from the hills to the sea", {"kind": "landscape"}),
]


def test_an_index_on_object_storage_is_built_searched_and_updated_as_in_a_folder(s3, model, tmp_path):
    location = "s3://bucket/corpora/first"
    made = build_index(location, DOCUMENTS, model)
    assert (made.added, made.embedded) == (3, 3)
    build_index(tmp_path / "folder", DOCUMENTS, model)
    there, here = SearchIndex.open(location), SearchIndex.open(tmp_path / "folder")
    assert there.complete
    assert str(there.path) == location
    assert {**vars(there.info), "created": ""} == {**vars(here.info), "created": ""}
    for mode in ("vector", "text", "hybrid"):
        found = [index.search("an instrument with strings", model, mode=mode).hits for index in (there, here)]
        assert found[0] == found[1]
        assert found[0][0].id == "violin"
    assert [hit.id for hit in there.search("water", model, where="kind = 'landscape'").hits] == ["river"]

    later = [DOCUMENTS[0], SourceDocument("violin", "Violin", "a viola is larger than a violin"), *DOCUMENTS[2:]]
    again = build_index(location, later, model)
    assert (again.unchanged, again.updated, again.embedded) == (2, 1, 1)
    assert (
        SearchIndex.open(location).search("viola", model, mode="text").hits[0].text == "a viola is larger than a violin"
    )
    assert not list(tmp_path.glob("s3*")), "nothing was taken for a folder"


def test_credentials_may_be_storage_options_and_are_never_shown(s3_server, s3, model):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        s3.delenv(name)
    options = {"aws_access_key_id": "key", "aws_secret_access_key": "hush-hush", "aws_endpoint": s3_server}
    location = Remote("s3://bucket/corpora/options", options)
    assert build_index(location, DOCUMENTS, model).added == 3
    index = SearchIndex.open(location)
    assert len(index) == 3
    assert "hush-hush" not in f"{location} {location!r} {index!r} {index.describe()}"
    assert pickle.loads(pickle.dumps(location)).options == PATIENCE | options, "a worker gets them too"


def one_line(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_wrong_bucket_missing_keys_and_a_dead_endpoint_are_one_line_each(s3, capsys, model):
    search = ["search", "s3://bucket/corpora/none", "water", "--mode", "text"]
    assert "s3://bucket/corpora/none is not a search-r3 index" in one_line(capsys, *search)
    wrong = ["search", "s3://elsewhere/index", "water", "--mode", "text"]
    assert "there is no bucket elsewhere; check the name" in one_line(capsys, *wrong)
    with pytest.raises(InputError, match="there is no bucket elsewhere"):
        build_index("s3://elsewhere/index", DOCUMENTS, model)
    with s3.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        assert "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in one_line(capsys, *search)
    with s3.context() as patch:
        patch.delenv("AWS_ALLOW_HTTP")
        assert "is plain http; set AWS_ALLOW_HTTP=true" in one_line(capsys, *search)
    with socket.socket() as taken:  # bound but not listening: nobody answers there
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with s3.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            patch.setenv("SEARCH_R3_STORAGE_TIMEOUT", "1")  # fewer retries
            line = one_line(capsys, *search)
    assert f"http://127.0.0.1:{port} cannot be reached; check AWS_ENDPOINT_URL and the network" in line


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ("status: 403, body: Some(<Code>AccessDenied</Code>", "refuses these credentials"),
        ("inner: Status { status: 301 Moved Permanently", "is in another region; set AWS_REGION"),
        (
            "kind: Timeout, source: ... uri: Some(https://s3.example.org/bucket?x=1)",
            "https://s3.example.org does not answer",
        ),
        ("lance error: corrupt file", None),
        (
            "LanceError(IO): Generic S3 error: Error performing list request: Error performing GET http://127.0.0.1:1/"
            f"bucket?list-type=2&prefix={'x' * 300} in 4.001198522s - HTTP error: error sending request",
            "http://127.0.0.1:1 does not answer",
        ),
    ],
)
def test_what_a_server_answers_is_told_in_the_users_words(answer, line):
    told = describe_failure(Remote("s3://bucket/index"), answer)
    assert told is None if line is None else line in told


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("s3://bucket/index/", Remote("s3://bucket/index")),
        (Path("s3://bucket/index"), Remote("s3://bucket/index")),  # a Path keeps one slash of the two
        ("notes-index", Path("notes-index")),
        (Path("a:/b"), Path("a:/b")),
        ("s3", Path("s3")),
    ],
)
def test_a_place_is_what_it_looks_like(given, meant):
    assert location_of(given) == meant
    assert type(location_of(given)) is type(meant)


@pytest.mark.parametrize("wrong", ["http://host/index", "s3://bucket", "s3:///index", "ftp://x/y"])
def test_other_places_are_refused_by_name(wrong):
    with pytest.raises(InputError, match=wrong):
        SearchIndex.open(wrong)

"""Documents replaced and deleted by their ids, files put together, and two processes on one index."""

import os
import re
import sys
import textwrap
import time
from datetime import timedelta

import pytest
from processes import start

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.index import (
    SearchIndex,
    SourceDocument,
    UnknownDocument,
    build_index,
    compact_index,
    delete_documents,
    maintain_index,
    update_documents,
)
from search_r3.index.build.build_index import ONE_COMMIT
from search_r3.index.index_info import ModelMismatch
from search_r3.index.maintenance import delete_each

LONG = "\n\n".join(" ".join(f"{name}{i}" for i in range(110)) for name in ("alpha", "beta", "gamma"))


@pytest.fixture
def path(tmp_path, model):
    documents = [SourceDocument(f"d{i}", "", f"text number{i}") for i in range(6)]
    build_index(tmp_path / "index", [*documents, SourceDocument("long", "", LONG, kind="text")], model)
    return tmp_path / "index"


def ids(path):
    found = SearchIndex.open(path).table.search().select(["id"]).to_arrow()["id"].to_pylist()
    assert len(set(found)) == len(found)
    return set(found)


def test_deleted_documents_are_gone_with_all_of_their_chunks(path, model):
    assert {"long#1", "long#2", "long#3"} <= ids(path)
    assert delete_documents(path, ["long", "d2", "d2"]).chunks == 4
    assert ids(path) == {"d0", "d1", "d3", "d4", "d5"}
    index = SearchIndex.open(path)
    assert index.complete
    for mode in ("vector", "text"):
        assert all(hit.document != "long" for hit in index.search("alpha1 beta2", model, mode=mode, k=10).hits)


def test_an_index_of_another_model_than_the_one_meant_is_left_as_it_is(path, tmp_path, model, make_model):
    ours, version = SearchIndex.open(path).info, SearchIndex.open(path).table.version
    build_index(tmp_path / "other", [SourceDocument("a", "", "a text")], make_model("other", "b" * 64), progress=False)
    theirs = SearchIndex.open(tmp_path / "other").info
    with pytest.raises(ModelMismatch, match=r"not with other .*nothing was changed"):
        delete_each(path, ["d1"], expected_info=theirs)
    with pytest.raises(ModelMismatch):
        maintain_index(path, always=True, expected_info=theirs)
    assert SearchIndex.open(path).table.version == version
    assert delete_each(path, ["d1", "none"], expected_info=ours) == {"d1": 1}
    maintain_index(path, always=True, expected_info=ours)


def test_what_is_changed_at_once_is_whole_though_the_end_never_came(path, model, monkeypatch):
    def killed(*_, **__):
        raise RuntimeError("killed")

    added = [SourceDocument(f"new{i}", "", f"newcomer{i}") for i in range(600)]  # more than one window
    for at_once in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr("search_r3.index.build.build_run.compact", killed)  # behind the commit, before the end
            with pytest.raises(RuntimeError, match="killed"):
                build_index(path, added, model, prune=False, commit_every=ONE_COMMIT if at_once else None)
        index = SearchIndex.open(path)
        assert index.complete is at_once
        assert {"new0", "new599"} <= ids(path)
        assert index.search("newcomer599", model, mode="text", k=1).hits[0].document == "new599"
        added = [SourceDocument(f"new{i}", "", f"newcomer{i} again") for i in range(600)]
    build_index(path, added, model, prune=False, commit_every=ONE_COMMIT)
    assert not SearchIndex.open(path).complete  # one commit more does not tell whether anything is missing
    build_index(path, added, model, prune=False)
    assert SearchIndex.open(path).complete


def test_an_unknown_id_deletes_nothing(path):
    before = ids(path)
    with pytest.raises(UnknownDocument, match=r'no document "nix" and 1 others; nothing was deleted'):
        delete_documents(path, ["d1", "nix", "it's"])
    with pytest.raises(InputError, match="no ids"):
        delete_documents(path, [])
    assert ids(path) == before


def test_a_document_that_is_given_again_replaces_all_of_its_chunks_in_one_commit(path, model):
    index = SearchIndex.open(path)
    shorter = LONG.rsplit("\n\n", 1)[0] + " end"
    report = update_documents(path, [SourceDocument("long", "", shorter, kind="text")], model)
    assert (report.unchanged, report.updated, report.added, report.removed) == (0, 2, 0, 1)  # its source is "api" now
    assert ids(path) == {"long#1", "long#2", *(f"d{i}" for i in range(6))}
    versions = []
    for version in range(index.table.version + 1, SearchIndex.open(path).table.version + 1):
        index.table.checkout(version)
        versions.append(sorted(row["id"] for row in index.table.search().to_list() if row["document"] == "long"))
    assert ["long#1", "long#2"] in versions
    assert all(chunks in (["long#1", "long#2"], ["long#1", "long#2", "long#3"]) for chunks in versions)
    with pytest.raises(InputError, match="does not exist"):
        update_documents(path.with_name("nix"), [], model)


def test_a_document_may_have_the_id_of_anothers_chunk(path, model):
    """What was the third chunk of "long" becomes a document of its own, in either order."""
    two = SourceDocument("long", "", LONG.rsplit("\n\n", 1)[0], kind="text")
    three = SourceDocument("long#3", "", "gamma alone")
    for order in ([two, three], [three, two]):
        build_index(path, order, model, commit_every=1)
        assert ids(path) == {"long#1", "long#2", "long#3#1"}
        assert SearchIndex.open(path).search("gamma alone", model, mode="text").hits[0].document == "long#3"
        build_index(path, [SourceDocument("long", "", LONG, kind="text")], model)


def test_a_compaction_puts_files_together_and_changes_no_result(path, model):
    for number in range(5):
        update_documents(path, [SourceDocument(f"new{number}", "", f"more words {number}")], model)
    delete_documents(path, ["d0"])
    before = SearchIndex.open(path).search("words number3", model, mode="vector").hits
    done = compact_index(path, keep=timedelta(milliseconds=1))
    assert done.files_after == 1
    assert 0 < done.bytes_after < done.bytes_before
    index = SearchIndex.open(path)
    assert index.search("words number3", model, mode="vector").hits == before
    assert index.complete
    assert len(index) == 13


def test_the_commands_delete_and_compact(path, capsys):
    assert main(["delete", str(path), "d1", "long"]) == 0
    assert "2 documents removed, 4 chunks" in capsys.readouterr().out
    assert main(["delete", str(path), "d1"]) == 2
    assert capsys.readouterr().err.startswith(f'error: {path} has no document "d1"; nothing')
    assert main(["compact", str(path)]) == 0
    assert "files of rows became 1" in capsys.readouterr().out
    assert main(["compact", str(path.with_name("nix"))]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["index", "--info", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "5 documents in 5 chunks, complete" in shown
    assert "exact search" in shown


def test_hits_are_documents_by_their_best_chunk_unless_chunks_are_asked_for(path, model):
    index = SearchIndex.open(path)
    query = " ".join(f"{name}{i}" for name in ("alpha", "beta", "gamma") for i in range(110))
    for mode in ("vector", "hybrid", "text"):
        hits = index.search(query, model, mode=mode, k=3, reasoning=False, chunks=True).hits
        assert [hit.document for hit in hits] == ["long"] * 3
        grouped = index.search(query, model, mode=mode, k=3, reasoning=False).hits
        assert grouped[0] == hits[0]
        assert len({hit.document for hit in grouped}) == len(grouped) == (1 if mode == "text" else 3)


def test_one_document_cannot_take_all_the_places(tmp_path, model):
    """More chunks of one document are near than the first look at the table takes."""
    big = SourceDocument("big", "", "\n\n".join(f"near {'pad ' * 150}{i}" for i in range(150)), kind="text")
    others = [SourceDocument(f"far{i}", "", "near other words entirely") for i in range(3)]
    build_index(tmp_path / "i", [big, *others], model)
    for mode in ("vector", "hybrid"):
        hits = SearchIndex.open(tmp_path / "i").search("near pad", model, mode=mode, k=4, reasoning=False).hits
        assert [hit.document for hit in hits] == ["big", "far0", "far1", "far2"]


def test_a_second_process_is_refused_with_the_first_ones_number_and_a_dead_one_blocks_nobody(path, model):
    code = """
        import sys, time
        sys.path.insert(0, sys.argv[2])
        from conftest import FakeEncoder
        from search_r3.index import SourceDocument, build_index
        def endless():
            yield SourceDocument("first", "", "one")
            print("reading", flush=True)
            time.sleep(120)
        build_index(sys.argv[1], endless(), FakeEncoder(), prune=False)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path), os.path.dirname(__file__)]
    with start(command) as other:
        other.line("^reading$")
        for change in (
            lambda: build_index(path, [SourceDocument("x", "", "y")], model),
            lambda: delete_documents(path, ["d1"]),
            lambda: compact_index(path),
        ):
            with pytest.raises(InputError, match="another build is writing") as error:
                change()
            assert re.search(rf"\(process {other.pid}, since \d{{4}}-", str(error.value))
        assert len(ids(path)) == 9  # reading goes on
        other.kill()
    begun = time.monotonic()
    assert delete_documents(path, ["d1"]).chunks == 1
    assert time.monotonic() - begun < 30
    assert not (path / ".build.pid").exists()

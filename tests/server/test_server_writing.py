"""Changes that come side by side: one commit for those that wait, each answered for itself."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
from serving_tools import running

from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, UnknownDocument, build_index
from search_r3.index.backends.lance import compaction, durable
from search_r3.index.backends.lance.durable import DiskError
from search_r3.index.index_handle import IndexHandle
from search_r3.server import index_writer
from search_r3.server.index_writer import Change, IndexWriter
from search_r3.server.service import Loaded


class Words:
    """An encoder of two dimensions."""

    name, source, dimension, contract_hash, cancelled, begun = "words", "", 2, "b" * 64, False, False

    def __init__(self):
        self.encoded = []

    def encode_document(self, texts, **_):
        self.encoded += list(texts)
        return np.array([[1.0, 1 + len(text)] for text in texts], dtype=np.float32)


@pytest.fixture
def index(tmp_path):
    held = [SourceDocument(f"held{i}", "", f"held {i}", {"year": 2000 + i}) for i in range(5)]
    build_index(tmp_path / "index", held, Words(), progress=False)
    return IndexHandle(tmp_path / "index")


@contextmanager
def first_commit_waits(monkeypatch):
    """The first commit begins, and goes on when `gate` is set; `sizes` are the documents of each."""
    gate, begun, sizes, build = threading.Event(), threading.Event(), [], index_writer.update_documents

    def slow(path, documents, *args, **options):
        sizes.append(len(documents))
        begun.set()
        assert gate.wait(60)
        return build(path, documents, *args, **options)

    monkeypatch.setattr(index_writer, "update_documents", slow)
    yield SimpleNamespace(gate=gate, begun=begun, sizes=sizes)
    gate.set()


def names(index):
    return set(SearchIndex.open(index.path).table.search().select(["document"]).to_arrow()["document"].to_pylist())


def changed(index, changes, before_gate=lambda: None, monkeypatch=None):
    """What each of `changes` (a function of a writer) returned or raised, all begun while a first commit waits."""

    async def all_of_them():
        with closing(IndexWriter(16)) as writer, first_commit_waits(monkeypatch) as held:
            first = asyncio.ensure_future(add(index, SourceDocument("first", "", "x"))(writer))
            await asyncio.to_thread(held.begun.wait, 60)
            others = []
            for change in changes:
                others.append(asyncio.ensure_future(change(writer)))
                await until(lambda: len(writer._waiting) == len(others) or others[-1].done())
            before_gate()
            held.gate.set()
            found = await asyncio.wait_for(asyncio.gather(first, *others, return_exceptions=True), 120)
            await asyncio.wait_for(writer._task, 60)
            writer._idle.cancel()
            return found[1:], held.sizes

    async def until(true):
        deadline = time.monotonic() + 60
        while not true():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.005)

    return asyncio.run(all_of_them())


def add(index, *documents, encoder=None):
    return lambda writer: writer.commit(index, Change(list(documents), encoder or Words()))


def delete(index, identifier):
    return lambda writer: writer.commit(index, Change(deleted=identifier))


def test_changes_that_wait_go_together_and_a_wrong_one_fails_alone(index, monkeypatch):
    long = "\n\n".join("word " * 150 for _ in range(3))
    changes = [add(index, SourceDocument(f"d{i}", "", f"text {i}", {"size": i})) for i in range(5)]
    changes.append(add(index, SourceDocument("wrong", "", "text", {"size": "large"})))  # fits the index as it was
    changes.append(add(index, SourceDocument("long", "", long, kind="text")))
    found, sizes = changed(index, changes, monkeypatch=monkeypatch)
    assert found[:5] == [1] * 5
    assert isinstance(found[5], InputError)
    assert "size" in str(found[5])
    assert found[6] > 1
    assert sizes[:2] == [1, 7]
    assert names(index) == {f"held{i}" for i in range(5)} | {f"d{i}" for i in range(5)} | {"first", "long"}
    assert SearchIndex.open(index.path).complete


@pytest.mark.parametrize("rebuilt", [True, False])
def test_a_rebuilt_full_text_index_is_logged(index, monkeypatch, rebuilt):
    lines = []
    monkeypatch.setattr(index_writer, "log", lambda event, *args, **fields: lines.append(event))
    monkeypatch.setattr(index_writer, "maintain_index", lambda path, **options: rebuilt)
    assert changed(index, [], monkeypatch=monkeypatch)[0] == []
    assert set(lines) == ({"full text rebuilt"} if rebuilt else set())


def test_the_later_of_two_changes_of_one_document_is_what_stays(index, monkeypatch):
    changes = [
        add(index, SourceDocument("d", "", "older")),
        add(index, SourceDocument("d", "", "newer")),
        delete(index, "held1"),
        delete(index, "nix"),
        delete(index, "held2"),
        add(index, SourceDocument("held1", "", "back again")),
    ]
    found, sizes = changed(index, changes, monkeypatch=monkeypatch)
    assert found[:3] + found[4:] == [1] * 5
    assert isinstance(found[3], UnknownDocument)
    assert sizes == [1, 1, 1, 1]
    rows = SearchIndex.open(index.path).table.search().select(["document", "r3_content"]).to_list()
    texts = {row["document"]: row["r3_content"] for row in rows}
    assert (texts["d"], texts["held1"], "held2" in texts) == ("newer", "back again", False)


def test_what_a_client_no_longer_waits_for_is_not_written(index, monkeypatch):
    gone = Words()
    changes = [add(index, SourceDocument("gone", "", "x y"), encoder=gone), add(index, SourceDocument("d", "", "z"))]
    found, _ = changed(index, changes, lambda: setattr(gone, "cancelled", True), monkeypatch)
    assert isinstance(found[0], asyncio.CancelledError)
    assert found[1] == 1
    assert "gone" not in names(index)


def test_a_disk_that_fails_fails_every_change_of_the_commit(index, monkeypatch):
    sync, update, broken = durable._sync, index_writer.update_documents, []

    def failing(name, place):
        if broken:
            raise broken.pop()  # once, as Linux reports a page that could not be written
        sync(name, place)

    def break_together(path, documents, *args, **options):
        if len(documents) == 2:
            broken.append(DiskError("the disk does not take what was written"))
        return update(path, documents, *args, **options)

    monkeypatch.setattr(durable, "_sync", failing)
    monkeypatch.setattr(index_writer, "update_documents", break_together)
    changes = [add(index, SourceDocument(f"d{i}", "", f"text {i}")) for i in range(2)]
    found, sizes = changed(index, changes, monkeypatch=monkeypatch)
    assert [type(error) for error in found] == [DiskError, DiskError]
    assert sizes == [1, 2]  # nothing is tried again by itself
    assert not broken


def test_embedding_is_done_before_the_index_is_held_and_what_is_known_is_not_embedded(index, monkeypatch):
    one, other = Words(), Words()
    changes = [add(index, SourceDocument("same", "", "held 3"), encoder=one),
               add(index, SourceDocument("new", "", "new text"), encoder=other)]  # fmt: skip

    def embedded():
        assert (one.encoded, other.encoded) == ([], ["new text"])

    changed(index, changes, embedded, monkeypatch)
    assert (one.encoded, other.encoded) == ([], ["new text"])


def test_clients_side_by_side_are_all_answered_and_all_is_there(tiny, make_index):
    index = make_index()
    before = index.table.version
    with running(lambda: Loaded.of(tiny, index), writable=True) as server, ThreadPoolExecutor(8) as clients:

        def post(i):
            document = {"id": f"d{i}", "text": f"side by side {i}", "metadata": {"year": "x" if i == 7 else i}}
            return server.post("/v1/documents", {"documents": [document]}).status

        def both(i):
            status = post(i)
            if i % 4 == 0:
                return status, server.ask("DELETE", f"/v1/documents/d{i}").status
            return status, None

        answers = list(clients.map(both, range(40)))
        assert answers == [(409 if i == 7 else 201, 200 if i % 4 == 0 else None) for i in range(40)]
        listed = server.ask("GET", "/v1/documents?limit=100").json
        assert {d["id"] for d in listed["data"]} == {"bread", "zug", "train"} | {
            f"d{i}" for i in range(40) if i % 4 and i != 7
        }
    after = SearchIndex.open(index.path)
    assert after.complete
    assert after.table.version < before + 80


def test_metadata_that_does_not_fit_names_the_command_for_the_server(tiny, make_index):
    with running(lambda: Loaded.of(tiny, make_index()), writable=True) as server:
        document = {"id": "new", "text": "a new text", "metadata": {"year": "soon"}}
        answer = server.post("/v1/documents", {"documents": [document]})
        assert (answer.status, answer.error["code"], answer.error["param"]) == (409, "conflict", "documents")
        assert answer.error["message"] == (
            "document \"new\": the metadata field year is text ('soon'), but elsewhere it is integer; correct it, or "
            "make the column text on the server: search-r3 index SOURCE --into INDEX --type year=text"
        )


FIGURES = ",".join(f"{i * 0.4817 % 1:.4f},{12.903 + i:.3f}" for i in range(90))


def test_a_posted_text_of_many_tokens_becomes_chunks_that_the_model_reads_whole(tiny, make_index):
    index = make_index()
    assert len(FIGURES.split()) < 320  # by words it is one chunk
    assert tiny.count_tokens([FIGURES])[0] > 512
    with running(lambda: Loaded.of(tiny, index), writable=True) as server:
        answer = server.post("/v1/documents", {"documents": [{"id": "figures", "text": FIGURES}]})
        assert answer.status == 201
    rows = SearchIndex.open(index.path).table.search().where("document = 'figures'").select(["r3_content"]).to_list()
    assert answer.json["chunks"] == len(rows) > 1
    assert max(tiny.count_tokens([row["r3_content"] for row in rows])) <= 512
    assert sum(len(row["r3_content"].strip()) for row in rows) == len(FIGURES)


def test_old_versions_go_when_a_server_is_idle(tiny, make_index, monkeypatch):
    index = make_index()
    monkeypatch.setattr(index_writer, "KEEP_VERSIONS", timedelta(seconds=0.5))
    monkeypatch.setattr(compaction, "KEEP_VERSIONS", timedelta(seconds=1))
    with running(lambda: Loaded.of(tiny, index), writable=True) as server:
        for i in range(4):
            assert server.post("/v1/documents", {"documents": [{"id": f"d{i}", "text": "x"}]}).status == 201
        deadline = time.monotonic() + 60
        left = 0
        while not 0 < left <= 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            with suppress(RuntimeError):  # a version that goes while they are listed
                left = len(SearchIndex.open(index.path).table.list_versions())
        assert server.post("/v1/search", {"query": "x", "mode": "text"}).status == 200

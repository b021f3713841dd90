"""An index in Milvus: searches, filters and fusion mean what they mean in LanceDB, and a new build takes over at once.

Milvus Lite stands for a server. What it does otherwise than one would think has a test each.
"""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from processes import run

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.hybrid_fusion import HybridFusion
from search_r3.index import SearchIndex, SourceDocument, build_index, delete_documents, delete_source
from search_r3.index.backends.lance.table_rows import make_row
from search_r3.index.backends.milvus import milvus_backend
from search_r3.index.backends.milvus.connection import LITE_MEMORY, seconds_of
from search_r3.index.backends.milvus.filters import milvus_filter
from search_r3.index.backends.milvus.search_words import search_words
from search_r3.index.backends.sql_condition import parse_condition
from search_r3.index.chunking.chunker import Chunk
from search_r3.index.index_handle import IndexHandle
from search_r3.index.index_info import IndexInfo, ModelMismatch
from search_r3.index.maintenance import keep_fusion
from search_r3.index.storage.location import CollectionUri, StorageError, location_of

DOCUMENTS = [
    SourceDocument("bread", "Bread", "flour water salt and yeast baked in an oven", {"year": 1900, "kind": "food"}),
    SourceDocument(
        "violin", "Violin", "an instrument with four strings", {"year": 1550, "kind": 'it\'s "old"', "old": True}
    ),
    SourceDocument("river", "River", "water that flows from the hills to the sea", {"kind": "landscape", "old": False}),
    SourceDocument("sea", "", "salt water and water again", {"year": 5, "depth": 3688.5}),
    SourceDocument("zug", "Zug", "der Zug nach Wien faehrt um neun", {"kind": "Ünï", "depth": 5}),
    SourceDocument("文", "", "我们在东京大学学习计算机科学。", {"year": 2021}),
]
CONDITIONS = [
    "year = 5", "year != 5", "year <> 1900", "year < 1900", "year >= 1550", "1550 < year", "year = -5",
    "year IN (5, 1900)", "year NOT IN (5)", "NOT year IN (5)", "NOT (year = 5)", "NOT year = 5 AND kind = 'food'",
    "year IS NULL", "year IS NOT NULL", "NOT (year IS NULL)", "NOT (year > 5 OR kind = 'landscape')",
    "year BETWEEN 5 AND 1900", "year NOT BETWEEN 5 AND 1900", "depth > 5", "depth = 5", "depth >= 3688.5",
    "depth < 6.5",
    "kind = 'food' OR year = 5 AND depth > 1", "(kind = 'food' OR year = 5) AND depth > 1",
    "kind LIKE 'f%'", "kind LIKE '%d%'", "kind NOT LIKE 'f%'", "kind LIKE '_ood'", "kind LIKE 'F%'", "kind LIKE 'Ü%'",
    "kind = 'it''s \"old\"'", "kind != 'food'", "kind > 'g'", "old = true", "old != true", "old = false", "NOT old",
    "old", "title = 'Bread'", "title = ''", "title != 'Bread'", "title IS NULL", "title IS NOT NULL", "id = 'sea'",
    "document IN ('sea', 'river')", "start_line >= 0", "TITLE = 'Bread'", "`year` = 5",
]  # fmt: skip


@pytest.fixture(scope="module")
def both(milvus_folder, shared_model, tmp_path_factory) -> tuple[SearchIndex, SearchIndex]:
    """The same documents in Milvus and in LanceDB."""
    places = f"milvus://{milvus_folder}/both", tmp_path_factory.mktemp("both") / "lance"
    for place in places:
        build_index(place, DOCUMENTS, shared_model)
    return SearchIndex.open(places[0]), SearchIndex.open(places[1])


@pytest.mark.parametrize("where", CONDITIONS)
def test_a_filter_means_what_it_means_in_lancedb(both, shared_model, where: str) -> None:
    found = [{hit.id for hit in index.search("water", shared_model, mode="vector", where=where).hits} for index in both]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("yeer = 5", "there is no column 'yeer'"),
        ("year = 'five'", "year is integer, and is compared with 'five'"),
        ("year = 5.5", "year is integer, and is compared with 5.5"),
        ("kind = 5", "kind is text"),
        ("old > true", "has no order"),
        ("year LIKE '1%'", "compared with '1%'"),
        ("year =", "a value is expected instead of 'its end'"),
        ("year = 5)", "')' is not expected"),
        ("year = 5; DROP TABLE x", "is not understood"),
        ("(" * 60 + "year = 5", "too many parentheses"),
        ("lower(kind) = 'food'", "there is no column 'lower'"),
        ("year = 99999999999999999999", "more than 64 bits"),
        ("", "a column is expected instead of 'its end'"),
    ],
)
def test_a_filter_that_cannot_be_used_is_one_line(both, where: str, words: str) -> None:
    with pytest.raises(InputError, match=r"columns: id \(text\)") as caught:
        both[0].backend.check_filter(where)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_filter_cannot_break_out_of_its_literal() -> None:
    condition = parse_condition("kind = 'a\" or id != \"\\\n'", {"kind": "text"})
    expression = 'exists metadata["kind"] and metadata["kind"] == "a\\" or id != \\"\\\\\\n"'
    assert milvus_filter(condition, ("id",)) == expression
    with pytest.raises(InputError, match="backslash"):
        milvus_filter(parse_condition(r"kind LIKE 'a\%'", {"kind": "text"}), ())


def test_searches_give_the_same_hits_as_lancedb(both, shared_model) -> None:
    for query in ("water", "salt water from the sea", "an instrument", "Zug", "ovens"):
        vector = [index.search(query, shared_model, mode="vector").hits for index in both]
        cosines = [{hit.id: hit.scores["vector"] for hit in hits} for hits in vector]
        assert vector[0][0].id == vector[1][0].id
        assert cosines[0] == pytest.approx(cosines[1], abs=1e-6)
        hybrid = [index.search(query, shared_model, mode="hybrid", k=3).hits for index in both]
        assert hybrid[0][0].id == hybrid[1][0].id
        text = [{hit.id for hit in index.search(query, shared_model, mode="text").hits} for index in both]
        assert text[0] >= text[1], "Milvus also finds words with other endings"


def test_words_score_above_zero_and_the_best_is_first(both, shared_model) -> None:
    """Milvus Lite returns BM25 as distances below 0, the best lowest."""
    hits = both[0].search("water", shared_model, mode="text").hits
    assert hits[0].id == "sea"
    scores = [hit.scores["text"] for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] > 0


def test_a_chinese_word_inside_a_sentence_is_found(both, shared_model) -> None:
    """Milvus's default analyzer takes the whole sentence for one word."""
    for query in ("东京", "计算机", "学"):
        assert [hit.id for hit in both[0].search(query, shared_model, mode="text").hits] == ["文"]
    assert both[0].search("北京", shared_model, mode="text").hits[0].scores["text"] > 0  # one character in common
    assert both[0].search("?!", shared_model, mode="text").hits == []


def test_words_survive_any_analyzer() -> None:
    words = search_words("Trains, naïve u0f; snake_case 東京 café 3.5")
    assert all(word.isascii() and word.isalnum() and word == word.lower() for word in words)
    assert search_words("cafe\u0301") == search_words("café") == search_words("CAFE")
    assert len(set(search_words("u0f")) & set(search_words("ǰ"))) == 0
    assert search_words("東京") == [f"u0{ord('東'):x}", f"u0{ord('京'):x}", f"u0{ord('東'):x}x{ord('京'):x}"]


def test_the_relevance_floor_is_that_of_lancedb_and_marks_the_same_hits_as_weak(both, shared_model) -> None:
    floors = [index.backend.relevance_floor for index in both]
    assert floors[0] is not None
    assert asdict(floors[0]) == pytest.approx(asdict(floors[1]), abs=1e-4)
    for query in ("zxqv wvut", "water from the hills", "how is cheese aged"):
        found = [
            index.search(query, shared_model, mode="vector", k=6, reasoning=False, explained=True) for index in both
        ]
        weak = [
            {hit.id: about.weak for hit, about in zip(one.hits, one.explanation.hits, strict=True)} for one in found
        ]
        assert weak[0] == weak[1]
        assert found[0].explanation.floor == pytest.approx(found[1].explanation.floor, abs=1e-4)


def test_floor_and_tuned_fusion_outlast_changes_and_exchanges(milvus: str, model, make_model) -> None:
    build_index(milvus, DOCUMENTS, model)
    first = SearchIndex.open(milvus).backend.floor_record
    assert first is not None
    assert first.rows == len(DOCUMENTS)
    tuned = HybridFusion("rsf", 0.2, contract_hash=model.contract_hash)
    keep_fusion(milvus, tuned)
    more = [SourceDocument(f"more{i}", "", f"stone {i}") for i in range(6)]
    build_index(milvus, [*DOCUMENTS, *more], model)
    index = SearchIndex.open(milvus)
    assert (index.backend.tuned_fusion, index.backend.floor_record.rows) == (tuned, 12)
    assert index.columns["year"] == "integer"
    hits = [index.search("salt water", model, **how).hits for how in ({}, {"fusion": "rsf", "vector_weight": 0.2})]
    assert hits[0] == hits[1]
    build_index(milvus, more, model, exchange=True)
    index = SearchIndex.open(milvus)
    assert (index.backend.tuned_fusion, index.backend.floor_record.rows) == (tuned, 6)
    keep_fusion(milvus, None)
    assert SearchIndex.open(milvus).backend.tuned_fusion is None


def test_updates_and_deletions(milvus: str, model) -> None:
    build_index(milvus, DOCUMENTS, model)
    count = len(model.encoded)
    changed = [SourceDocument("bread", "Bread", "rye and water"), *DOCUMENTS[1:5]]
    report = build_index(milvus, changed, model, source="documents")
    assert (report.updated, report.unchanged, report.removed, report.embedded) == (1, 4, 1, 1)
    assert len(model.encoded) == count + 1
    index = SearchIndex.open(milvus)
    assert index.search("rye", model, mode="text").hits[0].id == "bread"
    assert len(index) == 5
    delete_documents(milvus, ["sea"])
    assert delete_source(milvus, "documents").chunks == 4
    assert len(SearchIndex.open(milvus)) == 0


def test_ids_with_quotes_mean_only_themselves(milvus: str, model, monkeypatch) -> None:
    """pymilvus writes keys into filters as they are: `x' or ...` would delete other rows, and a quote breaks paging."""
    monkeypatch.setattr(milvus_backend, "IDS_AT_ONCE", 2)
    ids = ["it's.md", 'say "hi".md', "back\\slash", "a'] or id != ['", '" or id != "', "ünï/ö.md", "100%"]
    build_index(milvus, [SourceDocument(name, "", f"whales {number}") for number, name in enumerate(ids)], model)
    index = SearchIndex.open(milvus)
    assert {row["id"] for row in index.backend.rows()} == set(ids)
    assert index.vectors(ids).shape == (len(ids), model.dimension)
    index.backend.delete(["a'] or id != ['", "unknown"])
    assert {row["id"] for row in index.backend.rows()} == set(ids) - {"a'] or id != ['"}
    delete_documents(milvus, ['" or id != "', "it's.md"])
    assert len(SearchIndex.open(milvus)) == len(ids) - 3
    assert [hit.id for hit in index.search("whales", model, where="id = 'say \"hi\".md'").hits] == ['say "hi".md']


def test_the_contract_is_checked_whenever_it_is_opened(milvus: str, model, make_model) -> None:
    build_index(milvus, DOCUMENTS, model)
    other = make_model(contract_hash="b" * 64)
    with pytest.raises(ModelMismatch, match=r"was made with fake \(contract aaaaaaaaaaaa\)"):
        build_index(milvus, DOCUMENTS, other)
    with pytest.raises(ModelMismatch):
        SearchIndex.open(milvus).check_model(other)
    with pytest.raises(ModelMismatch):
        SearchIndex.open(milvus).search("water", other)


def test_no_search_fails_or_mixes_two_builds_while_one_is_exchanged(milvus: str, model) -> None:
    """Two handles, as two servers have, search in threads while three builds take over one after the other."""

    def build(number: int) -> list[SourceDocument]:
        return [SourceDocument(f"d{i}", "", f"water of build{number} number{i}") for i in range(12)]

    build_index(milvus, build(0), model)
    handles = [IndexHandle(milvus, every=0.05) for _ in range(2)]
    ended, answers, errors = threading.Event(), [list[set[str]](), list[set[str]]()], list[Exception]()

    def search(number: int) -> None:
        while not ended.is_set():
            try:
                hits = handles[number].search("water", model, k=12).hits
            except Exception as error:
                errors.append(error)
                return
            assert len(hits) == 12
            answers[number].append({hit.text.split()[2] for hit in hits})

    threads = [threading.Thread(target=search, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in (1, 2, 3):
            build_index(milvus, build(number), model, exchange=True)
    finally:
        ended.set()
        for thread in threads:
            thread.join(60)
    assert not errors
    assert all(len(words) == 1 for seen in answers for words in seen), "each answer is from one build"
    for handle in handles:
        handle.check()
        assert {hit.text.split()[2] for hit in handle.search("water", model).hits} == {"build3"}
    backend = SearchIndex.open(milvus).backend
    name = CollectionUri(milvus).name
    left = [one for one in backend._client.list_collections() if one.startswith(f"{name}_")]
    assert len(left) == 2, "the one in use and its predecessor"


def test_an_exchange_that_fails_changes_nothing(milvus: str, model) -> None:
    build_index(milvus, DOCUMENTS, model)
    model.fail_after = len(model.encoded) + 3
    with pytest.raises(RuntimeError, match="out of memory"):
        build_index(milvus, [SourceDocument("new", "", "all new"), *DOCUMENTS], model, exchange=True)
    model.fail_after = None
    assert {hit.id for hit in SearchIndex.open(milvus).search("water", model, k=100).hits} == {d.id for d in DOCUMENTS}


def test_what_is_too_long_for_milvus_is_one_line(milvus: str, model) -> None:
    """Milvus Lite counts characters and a server bytes: we count bytes, before anything is written."""
    with pytest.raises(InputError, match=r"long: its metadata has 80,\d+ bytes, and Milvus holds at most 65,535"):
        build_index(milvus, [SourceDocument("long", "", "text", {"note": "ü" * 40_000})], model)


def test_a_request_that_takes_too_long_is_repeated_in_halves(milvus: str, model, monkeypatch) -> None:
    from pymilvus.exceptions import MilvusException

    backend = milvus_backend.MilvusBackend.create(CollectionUri(milvus), IndexInfo.of(model))
    chunks = [Chunk(f"d{number}", f"d{number}", "", "text", {}, "", 1, 1) for number in range(200)]
    rows, vectors = [make_row(chunk, None, "", "") for chunk in chunks], model.encode_document(["text"] * 200)
    upsert = backend._client.upsert
    sizes: list[int] = []
    most = 100

    def busy(name: str, entities: list, **options) -> object:
        sizes.append(len(entities))
        if len(entities) > most:
            raise MilvusException(message="<_InactiveRpcError: StatusCode.DEADLINE_EXCEEDED, Deadline Exceeded>")
        return upsert(name, entities, **options)

    monkeypatch.setattr(backend._client, "upsert", busy)
    backend.add(rows, vectors)
    assert (sizes, backend.count()) == ([200, 100, 100], 200)
    sizes, most = [], 0
    monkeypatch.setenv("SEARCH_R3_STORAGE_DEADLINE", "7")
    with pytest.raises(StorageError, match=r"lite\.db did not answer within 7 s; .* SEARCH_R3_STORAGE_DEADLINE"):
        backend.add(rows, vectors)
    assert sizes == [200, 100, 50]


def test_a_request_has_more_time_where_no_server_works(monkeypatch) -> None:
    monkeypatch.delenv("SEARCH_R3_STORAGE_DEADLINE", raising=False)
    lite, server = CollectionUri("milvus://notes.db/notes"), CollectionUri("milvus://host.db/team/notes")
    assert (seconds_of(lite), seconds_of(server)) == (300.0, 30.0)
    monkeypatch.setenv("SEARCH_R3_STORAGE_DEADLINE", "7s")
    assert (seconds_of(lite), seconds_of(server)) == (7.0, 7.0)


def test_rows_do_not_stay_where_every_search_reads_them_one_by_one(tmp_path: Path) -> None:
    pytest.importorskip("milvus_lite")
    program = (
        "from search_r3.index.backends.milvus.connection import connect\n"
        "from search_r3.index.storage.location import CollectionUri\n"
        f"connect(CollectionUri('milvus://{tmp_path}/own.db/notes'))\n"
        "from milvus_lite.constants import MEMTABLE_MEMORY_LIMIT\n"
        "print(MEMTABLE_MEMORY_LIMIT)"
    )
    assert int(run([sys.executable, "-c", program]).stdout) == LITE_MEMORY


def test_vectors_and_rows_are_read_back_exactly(both, shared_model) -> None:
    ids = [document.id for document in DOCUMENTS]
    assert np.allclose(both[0].vectors(ids), both[1].vectors(ids), atol=1e-7)
    rows = [{row["id"]: row for row in index.backend.rows()} for index in both]
    assert rows[0] == rows[1]
    with pytest.raises(KeyError):
        both[0].vectors(["unknown"])
    assert both[0].columns == both[1].columns
    assert both[0].list_documents() == both[1].list_documents()


def test_addresses_are_read() -> None:
    lite = location_of("milvus:///var/lib/x.db/notes")
    assert isinstance(lite, CollectionUri)
    assert (lite.server, lite.database, lite.name) == ("/var/lib/x.db", "", "notes")
    server = CollectionUri("milvus://host:19530/team/notes/")
    assert (server.server, server.database, server.name) == ("http://host:19530", "team", "notes")
    assert CollectionUri("milvus+tls://host/notes").server == "https://host"
    for wrong in ("milvus://notes", "milvus://host:1/two words", "milvus://", "milvus://host:1/"):
        with pytest.raises(InputError, match="give a server and the name of a collection"):
            location_of(wrong)


def test_what_is_wrong_is_one_line(milvus: str, model, tmp_path: Path, capsys, tiny_model) -> None:
    build_index(milvus, DOCUMENTS, model)
    folder = milvus.removeprefix("milvus://").rpartition("/")[0]
    (tmp_path / "a.md").write_text("text")
    for arguments, words in [
        (["search", f"milvus://{folder}/none", "x", "--mode", "text"], "does not exist; make it first"),
        (["search", "milvus://127.0.0.1:9/none", "x", "--mode", "text"], "cannot be reached"),
        (["index", str(tmp_path), "--into", str(tmp_path / "i"), "--exchange"], "does not support --exchange"),
        (["index", str(tmp_path), "--into", str(tmp_path / "i"), "--backend", "milvus"], "is not in Milvus"),
        (["backup", milvus, str(tmp_path / "copy")], "is in Milvus, which has backups of its own"),
        (["compact", milvus], "does not support compaction"),
    ]:
        assert main([*arguments, *(["--model", str(tiny_model)] if arguments[0] == "index" else [])]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1, error
        assert words in error[0]
    program = "from search_r3.index import SearchIndex\nSearchIndex.open({!r})"
    second = run([sys.executable, "-c", program.format(milvus)], check=False)
    assert "one process at a time may" in second.stderr.splitlines()[-1]


def test_a_collection_is_loaded_when_another_process_opens_it(tmp_path: Path, model) -> None:
    """Milvus Lite forgets which collections are loaded: a search after a restart would fail."""
    pytest.importorskip("milvus_lite")
    address = f"milvus://{tmp_path}/own.db/notes"
    program = (
        "import sys; sys.path[:0] = {paths!r}\n"
        "from conftest import FakeEncoder\n"
        "from search_r3.index import SearchIndex, SourceDocument, build_index\n"
        "{action}"
    )
    build = f"build_index({address!r}, [SourceDocument('a', '', 'whales')], FakeEncoder())"
    search = f"print(SearchIndex.open({address!r}).search('whales', FakeEncoder(), mode='text').hits[0].id)"
    paths = [str(Path(__file__).parents[1])]
    for action in (build, search):
        command = [sys.executable, "-c", program.format(paths=paths, action=action)]
        done = run(command)
    assert done.stdout.strip() == "a"


def test_the_command_line(milvus: str, tmp_path: Path, tiny_model, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    Path("notes/a.md").write_text("The train to Vienna leaves at nine.")
    model = ["--model", str(tiny_model)]
    assert main(["index", "notes", "--into", milvus, *model]) == 0
    assert main(["search", milvus, "train", "--no-reasoning", *model]) == 0
    assert "a.md" in capsys.readouterr().out
    Path("notes/b.md").write_text("The ship to Rhodes leaves at noon.")
    assert main(["index", "notes", "--into", milvus, "--exchange", *model]) == 0
    capsys.readouterr()
    assert main(["index", "--info", milvus, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["documents"], about["backend"], about["full_text"]) == (2, "milvus", "current")
    assert main(["delete", milvus, "a.md"]) == 0
    assert len(SearchIndex.open(milvus)) == 1

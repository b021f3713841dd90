"""/v1/search and /v1/documents: the index's own answers, the reasoning in order, and filters that cannot do harm."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from urllib.parse import quote

import jsonschema_rs
import numpy as np
import pytest
from serving_tools import Held, Running, eventually, pausing, running

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.index.build.build_index import build_index
from search_r3.index.readers.path_source import open_source
from search_r3.index.run_search import check_where
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument
from search_r3.model.adaptive_reasoning import ADAPTIVE_FILE, ALWAYS, NEVER, AdaptiveRule
from search_r3.prompts import latent_conversation, reading_conversation
from search_r3.server.service import Loaded
from search_r3.server.where_filter import check_filter, filter_pattern

COLUMNS = {
    "title": "text",
    "start_line": "integer",
    "year": "number",
    "old": "true/false",
    "we-ird": "text",
    "order": "text",
}


def test_reasoning_that_is_remembered_says_what_it_once_took(served: Running) -> None:
    body = {"query": "a question that no other test asks", "reasoning": 3}
    first, again = (served.post("/v1/search", body).json for _ in range(2))
    assert first["remembered_ms"] is None
    assert again["remembered_ms"] > 0
    assert again["reasoning"] == first["reasoning"]


def test_a_search_is_explained_if_it_is_asked_for(served: Running) -> None:
    found = served.post("/v1/search", {"query": "train to zxqv", "explain": True, "reasoning": False}).json
    about = found["explanation"]
    assert about["missing_words"] == ["zxqv"]
    assert len(about["hits"]) == len(found["hits"])
    hit, one = next((hit, one) for hit, one in zip(found["hits"], about["hits"], strict=True) if hit["id"] == "train")
    assert [hit["text"][start:end] for start, end, whose in one["marks"] if whose == "question"] == ["train"]


@pytest.mark.parametrize("reasoning", [False, 4])
def test_what_was_embedded_in_place_of_the_query_is_in_the_answer(
    served: Running, monkeypatch: pytest.MonkeyPatch, reasoning: bool | int
) -> None:
    monkeypatch.setattr(SearchR3, "normalize_query", lambda self, text: text.replace("trian", "train"))
    body = {"query": "the trian", "reasoning": reasoning}
    found = served.post("/v1/search", body).json
    assert (found["query"], found["normalized_query"]) == ("the trian", "the train")
    assert served.post("/v1/search", body | {"query": "the train"}).json["normalized_query"] is None
    assert served.post("/v1/search", body | {"mode": "text", "reasoning": False}).json["normalized_query"] is None


@pytest.mark.parametrize("reasoning", [True, False, 4])
@pytest.mark.parametrize("mode", ["hybrid", "vector", "text"])
def test_a_search_is_the_indexs_own(served: Running, tiny: SearchR3, mode: str, reasoning: bool | int) -> None:
    body = {"query": "train to Vienna", "mode": mode, "reasoning": reasoning, "k": 2}
    found = served.post("/v1/search", body).json
    budget = {"reasoning": False} if reasoning is False else {"max_reasoning_tokens": 32 if reasoning is True else 4}
    expected = served.service.index().search("train to Vienna", tiny, mode=mode, k=2, **budget).to_dict()
    expected = json.loads(json.dumps(expected))
    for changing in ("timings",):
        found.pop(changing), expected.pop(changing)
    assert (found.pop("index"), found.pop("model")) == ("small.index", tiny.name)
    found.pop("remembered_ms")
    usage = found.pop("usage")
    trace = expected["reasoning"]
    assert usage["completion_tokens"] == (trace["num_tokens"] if trace else 0)
    assert (usage["prompt_tokens"] > 0) == (mode != "text")
    for hit, wanted in zip(found["hits"], expected["hits"], strict=True):
        assert hit.pop("score") == pytest.approx(wanted.pop("score"), abs=1e-5)
        assert hit.pop("scores") == pytest.approx(wanted.pop("scores"), abs=1e-5)
    assert found == expected


def test_the_reasoning_is_streamed_before_the_result_and_is_the_results(served: Running) -> None:
    body = {"query": "where does the stream begin", "reasoning": 24, "stream": True}
    events = served.post("/v1/search", body).events
    names = [name for name, _ in events]
    assert names[-1] == "result"
    assert set(names[:-1]) == {"reasoning"}
    assert len(names) > 3
    result = events[-1][1]
    assert "".join(data["text"] for _, data in events[:-1]) == result["reasoning"]["text"]
    again = served.post("/v1/search", body).events  # from the cache, in one piece
    assert [name for name, _ in again] == ["reasoning", "result"]
    assert again[-1][1]["hits"] == result["hits"]
    direct = served.post("/v1/search", body | {"reasoning": False}).events
    assert [name for name, _ in direct] == ["result"]
    assert direct[0][1]["reasoning"] is None


@pytest.mark.parametrize("batching", ["continuous", "static"])
def test_pieces_come_while_the_model_still_writes(tiny: SearchR3, make_index, batching: str) -> None:
    def after(token: int) -> None:
        if held.armed and len(held.passes) == 0:
            held._hold("token", [token])

    index, held = make_index(), pausing(tiny, after)
    with running(lambda: Loaded.of(held, index), batching=batching) as server:
        held.armed = True
        connection = server.open_post("/v1/search", {"query": "stream", "reasoning": 8, "stream": True})
        received = b""
        while b"event: reasoning" not in received:
            received += connection.recv(65536)
        assert b"event: result" not in received  # the model waits behind its first token
        held.gate.set()
        while b"event: result" not in received:
            more = connection.recv(65536)
            assert more, received
            received += more
        connection.close()


def test_auto_reasons_where_the_rule_says(make_tiny_model, tmp_path, served: Running) -> None:
    folder = make_tiny_model(tmp_path / "tiny-llama")
    tiny = SearchR3.from_pretrained(folder, device="cpu")
    index = served.service.index()
    zeros = (0.0,) * 4
    for threshold, reasons in ((ALWAYS, True), (NEVER, False)):
        rule = AdaptiveRule(tiny.contract_hash, zeros, zeros, (1.0,) * 4, 0.0, threshold)
        rule.save(folder / ADAPTIVE_FILE)
        model = SearchR3.from_pretrained(folder, device="cpu")
        with running(lambda model=model: Loaded.of(model, index), reasoning_tokens=4) as server:
            found = server.post("/v1/search", {"query": "train", "reasoning": "auto"}).json
            assert (found["reasoning"] is not None) == reasons
            more = {"input_type": "query", "reasoning": "auto"}
            embedded = server.embed(["train", "bread"], **more).json
            assert (embedded["usage"]["completion_tokens"] > 0) == reasons
            expected = model.encode_query(["train", "bread"], reasoning=reasons, max_reasoning_tokens=4)
            vectors = np.array([e["embedding"] for e in embedded["data"]], dtype=np.float32)
            np.testing.assert_allclose(vectors, expected, atol=2e-6)
    assert served.post("/v1/search", {"query": "x", "reasoning": "auto"}).error["code"] == "no_adaptive_rule"


def test_latent_steps_where_the_model_has_them(served: Running, tiny: SearchR3, tmp_path: Path) -> None:
    prompts = replace(tiny.contract.prompts, latent=latent_conversation(2))
    model = SearchR3(replace(tiny.checkpoint, contract=replace(tiny.contract, prompts=prompts)))
    build_index(tmp_path / "index", [SourceDocument("bread", "", "Bread needs yeast.")], model, progress=False)
    index = SearchIndex.open(tmp_path / "index")
    with running(lambda: Loaded.of(model, index)) as server:
        assert server.ask("GET", "/v1/models").json["data"][0]["latent"] is True
        found = server.post("/v1/search", {"query": "yeast", "reasoning": "latent", "mode": "vector"}).json
        expected = index.search("yeast", model, mode="vector", reasoning="latent")
        assert found["hits"][0]["score"] == pytest.approx(expected.hits[0].score, abs=1e-5)
        assert found["reasoning"] is None
        embedded = server.embed(["train", "bread"], input_type="query", reasoning="latent").json
        vectors = np.array([e["embedding"] for e in embedded["data"]], dtype=np.float32)
        np.testing.assert_allclose(vectors, model.encode_query(["train", "bread"], reasoning="latent"), atol=2e-6)
        assert embedded["usage"]["completion_tokens"] == 0
    assert served.ask("GET", "/v1/models").json["data"][0]["latent"] is False
    assert served.post("/v1/search", {"query": "x", "reasoning": "latent"}).error["code"] == "no_latent_mode"
    refused = served.embed(["x"], input_type="query", reasoning="latent")
    assert (refused.status, refused.error["code"]) == (400, "no_latent_mode")


@pytest.mark.parametrize("batching", ["continuous", "static"])
def test_a_search_that_reads_is_the_indexs_own(served: Running, tiny: SearchR3, tmp_path: Path, batching: str) -> None:
    prompts = replace(tiny.contract.prompts, reading=reading_conversation(2, 4))
    model = SearchR3(replace(tiny.checkpoint, contract=replace(tiny.contract, prompts=prompts)))
    documents = [SourceDocument(str(i), "", f"{word} needs yeast.") for i, word in enumerate(["Bread", "Beer", "Wine"])]
    build_index(tmp_path / "index", documents, model, progress=False)
    index = SearchIndex.open(tmp_path / "index")
    with running(lambda: Loaded.of(model, index), batching=batching) as server:
        assert server.ask("GET", "/v1/models").json["data"][0]["reading"] == 2
        for reasoning, hops in ((False, 1), (4, 1), (False, 2)):
            body = {"query": "yeast", "reasoning": reasoning, "mode": "vector", "read": 2, "hops": hops}
            found = server.post("/v1/search", body).json
            more = {"reasoning": False} if reasoning is False else {"max_reasoning_tokens": reasoning}
            expected = index.search("yeast", model, mode="vector", read=2, hops=hops, **more)
            assert found["read"] == [asdict(passage) for passage in expected.read]
            assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in expected.hits]
            assert found["hits"][0]["score"] == pytest.approx(expected.hits[0].score, abs=1e-5)
            assert (found["reasoning"] or {}).get("text") == (expected.reasoning and expected.reasoning.text)
        assert server.post("/v1/search", {"query": "yeast", "hops": 2, "reasoning": False}).json["read"] == []
        assert server.post("/v1/search", {"query": "yeast", "read": 11}).status == 400
    assert served.ask("GET", "/v1/models").json["data"][0]["reading"] == 0
    refused = served.post("/v1/search", {"query": "x", "read": 1})
    assert (refused.status, refused.error["code"], refused.error["param"]) == (400, "no_reading_mode", "read")


@pytest.mark.parametrize(
    "where",
    [
        "lang = 'en'",
        "lang='it''s' OR year>2020",
        "(lang = 'de' OR NOT year IS NULL) AND start_line = 1",
        "title NOT LIKE '%\\'",
        "lang IN ('a', 'b') AND NOT (year NOT IN (1,-25) OR old != true)",
        "old IS NOT NULL AND year < 999999999999999",
    ],
)
def test_every_filter_that_is_let_through_is_one_the_index_understands(served: Running, where: str) -> None:
    index = served.service.index()
    assert check_where(index.index, check_filter(where, index.columns)) == where
    for mode in ("hybrid", "text"):
        answer = served.post("/v1/search", {"query": "train", "where": where, "mode": mode, "reasoning": False})
        assert answer.status == 200
    schema = served.server.config.app.openapi()["components"]["schemas"]["Filter"]
    assert jsonschema_rs.validator_for(schema).is_valid(where)


@pytest.mark.parametrize(
    "where",
    ["", "title", "title = 1", "year = 'x'", "nope = 1", "title = 'a'; DROP TABLE x", "title = 'a' -- ", "1 = 1",
     "title = 'a' and year = 1", "regexp_match(title, 'a')", "title = 'a'\n", "((title = 'a'))",
     "start_line < 1.5", "we-ird = 'x'", "order = 'x'"],
)  # fmt: skip
def test_other_filters_are_refused_with_the_columns(where: str) -> None:
    with pytest.raises(InputError, match=r"columns: title \(text\)"):
        check_filter(where, COLUMNS)
    pattern = filter_pattern(COLUMNS)
    assert where.endswith("\n") or not jsonschema_rs.validator_for({"pattern": pattern}).is_valid(where)


@pytest.mark.parametrize(
    ("change", "param"),
    [({"query": " "}, "query"), ({"query": "x" * 100_001}, "query"), ({"k": 0}, "k"), ({"k": 1001}, "k"),
     ({"k": "5"}, "k"), ({"k": True}, "k"), ({"mode": "magic"}, "mode"), ({"stream": 1}, "stream"),
     ({"where": "x"}, "where"), ({"where": "x" * 3000}, "where"), ({"reasoning": 1000}, "reasoning"),
     ({"page": 2}, "page")],
)  # fmt: skip
def test_bad_searches_are_400_before_anything_is_streamed(served: Running, change: dict, param: str) -> None:
    answer = served.post("/v1/search", {"query": "x", "stream": True} | change)
    assert (answer.status, answer.headers["content-type"]) == (400, "application/json")
    assert answer.error["param"] == param


def test_documents_are_listed_in_pages(served: Running) -> None:
    first = served.ask("GET", "/v1/documents?limit=2").json
    assert [d["id"] for d in first["data"]] == ["bread", "train"]
    assert (first["total"], first["has_more"]) == (3, True)
    second = served.ask("GET", "/v1/documents?limit=2&after=train").json
    assert ([d["id"] for d in second["data"]], second["has_more"]) == (["zug"], False)
    for bad in ("limit=0", "limit=x", "limit=1001", "limit=1&limit=2", "page=1", "after="):
        assert served.ask("GET", f"/v1/documents?{bad}").error["code"] in ("invalid_value", "unknown_parameter")
    assert "not 'x'" in served.ask("GET", "/v1/documents?limit=x").error["message"]


def test_only_a_writable_server_takes_documents(served: Running) -> None:
    answer = served.post("/v1/documents", {"documents": [{"id": "x", "text": "y"}]})
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


def test_added_documents_are_found_at_once_and_all_or_none_are(tiny: SearchR3, make_index) -> None:
    index = make_index()
    with running(lambda: Loaded.of(tiny, index), writable=True) as server:
        new = {"id": "cat", "text": "Cats purr.\0", "title": "Pets", "metadata": {"year": 2024, "colour": "red"}}
        answer = server.post("/v1/documents", {"documents": [new, {"id": "long", "text": "word. " * 700}]})
        assert answer.status == 201
        assert [d["id"] for d in answer.json["data"]] == ["cat", "long"]
        assert answer.json["chunks"] > 2
        found = server.post("/v1/search", {"query": "purr", "mode": "text", "where": "colour = 'red'"}).json
        assert [hit["id"] for hit in found["hits"]] == ["cat"]
        before = server.ask("GET", "/v1/documents").json
        assert before["total"] == 5
        for documents, message in [
            ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "is used twice"),
            ([{"id": "a", "text": "x", "metadata": {"year": "new"}}], "year is text"),
        ]:
            answer = server.post("/v1/documents", {"documents": documents})
            assert (answer.status, message in answer.error["message"]) == (409, True)
        for document in [{"id": "a", "text": " "}, {"id": "", "text": "x"},
                         {"id": "a", "text": "x", "metadata": {"Year": 1}},
                         {"id": "a", "text": "x", "metadata": {"year": None}}]:  # fmt: skip
            assert server.post("/v1/documents", {"documents": [document]}).status == 400
        assert server.ask("GET", "/v1/documents").json == before
        assert index.complete


def test_posted_documents_survive_a_run_of_the_indexs_folder(tiny: SearchR3, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in ("a.md", "b.md"):
        (notes / name).write_text(f"This is {name}.")
    build_index(tmp_path / "x.index", open_source(notes), tiny, progress=False)
    with running(lambda: Loaded.of(tiny, SearchIndex.open(tmp_path / "x.index")), writable=True) as server:
        posted = [
            {"id": "cat", "text": "Cats purr.", "metadata": {"n": 12345}},
            {"id": "b.md", "text": "Better words."},
        ]
        assert server.post("/v1/documents", {"documents": posted}).status == 201
        (notes / "a.md").unlink()
        (notes / "c.md").write_text("This is c.md.")
        report = build_index(tmp_path / "x.index", open_source(notes), tiny, progress=False, wait=60)
        assert (report.added, report.removed, [left.path for left in report.conflicts]) == (1, 1, ["b.md"])
        listed = lambda: [one["id"] for one in server.ask("GET", "/v1/documents").json["data"]]  # noqa: E731
        eventually(lambda: listed() == ["b.md", "c.md", "cat"])  # the server looks every second
        found = server.post("/v1/search", {"query": "better purr", "mode": "text", "where": "n = 12345"}).json["hits"]
        assert [hit["id"] for hit in found] == ["cat"]
        assert server.post("/v1/search", {"query": "better", "mode": "text"}).json["hits"][0]["id"] == "b.md"


def test_documents_are_replaced_and_deleted_with_all_of_their_chunks(tiny: SearchR3, make_index) -> None:
    index = make_index()
    with running(lambda: Loaded.of(tiny, index), writable=True) as server:
        assert server.post("/v1/documents", {"documents": [{"id": "a/b:c", "text": "word. " * 700}]}).status == 201
        chunks = len(SearchIndex.open(index.path))
        answer = server.post("/v1/documents", {"documents": [{"id": "a/b:c", "text": "purr"}]})
        assert (answer.status, answer.json["chunks"]) == (201, 1)
        assert len(SearchIndex.open(index.path)) < chunks
        assert server.ask("GET", "/v1/documents").json["total"] == 4
        for mode in ("text", "vector"):
            found = server.post("/v1/search", {"query": "word purr", "mode": mode, "reasoning": False}).json["hits"]
            assert [hit["text"] for hit in found if hit["document"] == "a/b:c"] == ["purr"]
        gone = server.ask("DELETE", "/v1/documents/a/b%3Ac")
        assert gone.json == {"object": "document", "id": "a/b:c", "deleted": True, "chunks": 1}
        assert server.post("/v1/search", {"query": "purr", "mode": "text"}).json["hits"] == []
        again = server.ask("DELETE", "/v1/documents/a/b%3Ac")
        assert (again.status, again.error["code"]) == (404, "document_not_found")
        assert server.ask("GET", "/v1/documents").json["total"] == 3
        assert SearchIndex.open(index.path).complete


def test_a_client_that_hangs_up_while_documents_are_embedded_adds_nothing(tiny: SearchR3, make_index) -> None:
    index, held = make_index(), Held(tiny)
    with running(lambda: Loaded.of(held, index), writable=True) as server:
        held.armed = True
        connection = server.open_post("/v1/documents", {"documents": [{"id": "gone", "text": "never mind"}]})
        eventually(lambda: held.passes == [("document", 1)])
        connection.close()
        eventually(lambda: server.service.in_flight == 0)
        held.gate.set()
        assert server.ask("GET", "/v1/documents").json["total"] == 3
        assert index.complete


IDS = ["p#1", "two words", "Übersicht 2.md", "-x", "a/b?c=d&e", "日本", "100%25", "'quoted'", "a\nb", "x" * 1000]


def test_ids_are_those_that_files_may_have(tiny: SearchR3, make_index, tmp_path: Path) -> None:
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps({"id": one, "text": "from a file"}) + "\n" for one in IDS))
    index = make_index()
    build_index(index.path, open_source(file), tiny)
    with running(lambda: Loaded.of(tiny, index), writable=True) as server:
        for one in IDS:
            posted = server.post("/v1/documents", {"documents": [{"id": one, "text": "posted"}]})
            assert (posted.status, posted.json["data"]) == (201, [{"object": "document", "id": one}])
            at = f"/v1/documents?limit=1000&after={quote(one, safe='')}"
            assert one not in {shown["id"] for shown in server.ask("GET", at).json["data"]}
        assert server.ask("GET", "/v1/documents").json["total"] == 3 + len(IDS)
        for one in IDS:
            gone = server.ask("DELETE", f"/v1/documents/{quote(one, safe='')}")
            assert (gone.status, gone.json["id"], gone.json["chunks"]) == (200, one, 1)


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"id": " \t"}, "id", "empty; give at least one visible character"),
        ({"id": "x" * 4097}, "id", "over 4,096 characters; shorten it"),
        ({"text": "x" * 1_000_001}, "text", "over 1,000,000 characters; shorten it"),
        ({"title": "x" * 1001}, "title", "over 1,000 characters; shorten it"),
        ({"metadata": {f"f{i}": 1 for i in range(51)}}, "metadata", "over 50 entries; give fewer"),
        ({"metadata": {"Year": 1}}, "metadata.Year", "the field 'Year' is not allowed"),
    ],
)
def test_what_is_wrong_with_a_document_is_said_plainly(
    tiny: SearchR3, make_index, change: dict, param: str, message: str
) -> None:
    with running(lambda: Loaded.of(tiny, make_index()), writable=True) as server:
        answer = server.post("/v1/documents", {"documents": [{"id": "x", "text": "y"} | change]})
        assert (answer.status, answer.error["code"]) == (400, "invalid_value")
        assert answer.error["param"] == f"documents.0.{param}"
        assert answer.error["message"].startswith(f"documents.0.{param}: {message}")
        for body, name, most in (({"query": "x" * 100_001}, "query", "100,000"),
                                 ({"query": "x", "where": "x" * 2001}, "where", "2,000")):  # fmt: skip
            answer = server.post("/v1/search", body)
            assert answer.error["message"] == f"{name}: over {most} characters; shorten it"


@pytest.mark.parametrize("words", ["the railway to Austria <|embed_token|>", ""])
@pytest.mark.parametrize("stream", [False, True])
def test_own_words_take_the_place_of_the_models(served: Running, tiny: SearchR3, words: str, stream: bool) -> None:
    answer = served.post("/v1/search", {"query": "train to Vienna", "reasoning_text": words, "stream": stream})
    if stream:
        assert [name for name, _ in answer.events] == ["result"], "nothing is generated"
    found = answer.events[-1][1] if stream else answer.json
    expected = served.service.index().search("train to Vienna", tiny, reasoning_text=words)
    assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in expected.hits]
    assert [hit["score"] for hit in found["hits"]] == pytest.approx([hit.score for hit in expected.hits], abs=1e-5)
    tokens = tiny.count_tokens([words])[0]
    assert found["reasoning"] == {"text": words, "num_tokens": tokens, "forced": False}
    prompt = tiny.count_tokens(["train to Vienna"])[0] + tokens
    assert found["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 0,
        "total_tokens": prompt,
        "truncated_texts": 0,
    }


@pytest.mark.parametrize("options", [{"reasoning": False}, {"mode": "text"}])
def test_own_words_that_nothing_would_read_are_a_conflict(served: Running, options: dict) -> None:
    answer = served.post("/v1/search", {"query": "train", "reasoning_text": "railway"} | options)
    assert (answer.status, answer.error["param"]) == (409, "reasoning_text")


@pytest.mark.parametrize("options", [{"fusion": "dbsf", "vector_weight": 0.2}, {"fusion": "rrf"}, {"vector_weight": 0}])
def test_a_request_may_say_how_its_lists_are_fused(served: Running, tiny: SearchR3, options: dict) -> None:
    found = served.post("/v1/search", {"query": "train to Vienna", "reasoning": False} | options).json["hits"]
    expected = served.service.index().search("train to Vienna", tiny, reasoning=False, **options).hits
    assert [hit["id"] for hit in found] == [hit.id for hit in expected]
    assert [hit["score"] for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-5)


@pytest.mark.parametrize("options", [{"reasoning": False}, {"mode": "vector"}])
def test_words_of_a_reasoning_that_there_is_none_of_are_a_conflict(served: Running, options: dict) -> None:
    answer = served.post("/v1/search", {"query": "train", "reasoning_words": True} | options)
    assert (answer.status, answer.error["param"]) == (409, "reasoning_words")
    wrong = served.post("/v1/search", {"query": "train", "fusion": "sum"})
    assert (wrong.status, wrong.error["param"]) == (400, "fusion")

"""A file of requests in OpenAI's batch format: answered as by the server, in order, resumed after an interruption."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search_r3 import InputError, SearchR3
from search_r3.server import batch_file
from search_r3.server.batch_file import answer_batch
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded

CONFIG = ServerConfig(max_items=3, queue=128)


def line(name: str, url: str = "/v1/embeddings", **body: Any) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body}) + "\n"


def embeddings(tiny: SearchR3, count: int) -> str:
    return "".join(line(f"r{n}", model=tiny.name, input=[f"text {n}", "another"]) for n in range(count))


def test_requests_are_answered_as_by_the_server_and_in_order(tiny: SearchR3, tmp_path: Path) -> None:
    file, out = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    more = line("query", model=tiny.name, input="x", input_type="query", encoding_format="base64")
    more += line("many", model=tiny.name, input=["x"] * 4) + "\n" + line("unknown", model=tiny.name, input="x", top=1)
    more += line("ranked", "/v1/rerank", query="x", documents=["x", "y"])
    file.write_text(embeddings(tiny, 70) + more)
    seen: list[int] = []
    report = answer_batch(file, out, lambda: Loaded.of(tiny), CONFIG, seen.append)
    assert (report.requests, report.resumed, report.failed) == (74, 0, 2)
    assert sum(seen) == 74
    answers = [json.loads(one) for one in out.read_text().splitlines()]
    assert [one["custom_id"] for one in answers[:70]] == [f"r{n}" for n in range(70)]
    assert all(set(one) == {"id", "custom_id", "response", "error"} for one in answers)
    expected = tiny.encode_document(["text 5", "another"], show_progress_bar=False)
    found = [one["embedding"] for one in answers[5]["response"]["body"]["data"]]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    query, many, unknown, ranked = (one["response"] for one in answers[70:])
    vector = np.frombuffer(base64.b64decode(query["body"]["data"][0]["embedding"]), dtype="<f4")
    np.testing.assert_allclose(vector, tiny.encode_query(["x"], reasoning=False)[0], atol=1e-5)
    assert (many["status_code"], many["body"]["error"]["code"]) == (400, "too_many_items")
    assert unknown["body"]["error"]["code"] == "unknown_field"
    assert {one["index"] for one in ranked["body"]["results"]} == {0, 1}


def test_an_interrupted_run_goes_on(tiny: SearchR3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out, part = tmp_path / "requests.jsonl", tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    file.write_text(embeddings(tiny, 5))
    answer_batch(file, tmp_path / "whole.jsonl", lambda: Loaded.of(tiny), CONFIG)
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:2]) + lines[2][:30])  # as a kill leaves it
    asked: list[str] = []
    plain = batch_file._answer

    async def counted(app: Any, request: Any) -> Any:
        asked.append(request.custom_id)
        return await plain(app, request)

    monkeypatch.setattr(batch_file, "_answer", counted)
    report = answer_batch(file, out, lambda: Loaded.of(tiny), CONFIG)
    assert (report.requests, report.resumed, report.failed) == (5, 2, 0)
    assert asked == ["r2", "r3", "r4"]
    assert not part.exists()
    names = [json.loads(one)["custom_id"] for one in out.read_text().splitlines()]
    assert names == [f"r{n}" for n in range(5)]
    with pytest.raises(InputError, match="exists; remove it"):
        answer_batch(file, out, lambda: Loaded.of(tiny), CONFIG)
    part.write_bytes(lines[0].replace(b'"r0"', b'"other"'))
    out.unlink()
    with pytest.raises(InputError, match="answers to other requests"):
        answer_batch(file, out, lambda: Loaded.of(tiny), CONFIG)


def test_embeddings_as_parquet(tiny: SearchR3, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    file, out = tmp_path / "requests.jsonl", tmp_path / "out.parquet"
    file.write_text(embeddings(tiny, 2) + line("wrong", model="other", input="x"))
    answer_batch(file, out, lambda: Loaded.of(tiny), CONFIG)
    rows = pq.read_table(out).to_pylist()
    assert [(row["custom_id"], row["index"]) for row in rows] == [
        ("r0", 0), ("r0", 1), ("r1", 0), ("r1", 1), ("wrong", None)
    ]  # fmt: skip
    expected = tiny.encode_document(["text 1"], show_progress_bar=False)[0]
    np.testing.assert_allclose(rows[2]["embedding"], expected, atol=1e-5)
    assert rows[4]["embedding"] is None
    assert "is not served here" in rows[4]["error"]
    assert not (tmp_path / "out.parquet.part").exists()


@pytest.mark.parametrize(
    ("request_line", "message"),
    [
        (line("ranked", "/v1/rerank", query="x", documents=["x"]), "but 'ranked' asks for /v1/rerank; use a .jsonl"),
        (line("typed", input="x", embedding_types=["int8"]), "but 'typed' has embedding_types; encoding_format names"),
    ],
)
def test_what_does_not_fit_into_parquet_is_named_before_a_model_is_loaded(
    tmp_path: Path, request_line: str, message: str
) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(line("first", input="x") + request_line)

    def load() -> Loaded:
        raise AssertionError("loaded")

    with pytest.raises(InputError) as caught:
        answer_batch(file, tmp_path / "out.parquet", load, CONFIG)
    assert message in str(caught.value)
    assert not (tmp_path / "out.parquet.part").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 has no custom_id"),
        ('{"custom_id": "a"}', "line 1: method and url must be POST and one of /v1/embeddings, /v1/rerank"),
        ('{"custom_id": "a", "url": "/v1/search", "body": {}}', "line 1: method and url must be"),
        ('{"custom_id": "a", "url": "/v1/embeddings", "body": []}', "line 1 has no body"),
        (line("a", x=1) + line("a", x=1), "line 2: the custom_id 'a' occurs twice"),
    ],
)
def test_a_line_that_is_no_request_is_named_before_a_model_is_loaded(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(text)

    def load() -> Loaded:
        raise AssertionError("loaded")

    with pytest.raises(InputError) as caught:
        answer_batch(file, tmp_path / "out.jsonl", load, CONFIG)
    assert message in str(caught.value)
    with pytest.raises(InputError, match="give a JSONL file of requests"):
        answer_batch(tmp_path / "missing", tmp_path / "out.jsonl", load, CONFIG)


def test_a_model_that_cannot_be_loaded_is_the_error(tmp_path: Path) -> None:
    def load() -> Loaded:
        raise InputError("no such model")

    (tmp_path / "requests.jsonl").write_text(line("a", input="x"))
    with pytest.raises(InputError, match="no such model"):
        answer_batch(tmp_path / "requests.jsonl", tmp_path / "out.jsonl", load, CONFIG)

"""A writer of any size: its words are cached by query, its cost is counted, and a search embeds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from endpoint_server import EndpointServer, completion, error

from search_r3 import SearchR3
from search_r3.cli import main
from search_r3.data.reasoning.reasoning_writer import INSTRUCTION, MAX_TOKENS, ReasoningWriter, open_writer
from search_r3.errors import InputError
from search_r3.index.build.build_index import build_index
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument


def about(request, number=0):
    user = request["messages"][1]["content"]
    return completion(f"<think>hm</think>\nAbout\n {user.removeprefix('Query: ')}")


def test_replies_are_cached_by_query_and_the_cost_is_that_of_new_ones(tmp_path: Path) -> None:
    with EndpointServer(about) as sent:
        spec = f"endpoint:big@{sent.url}"
        writer = ReasoningWriter(open_writer(spec), tmp_path)
        first = writer.write(["a", "b", "a"])
        assert first.texts == ["About a", "About b", "About a"]
        assert (first.cached, first.tokens_read, first.tokens_written) == (0, 200, 40)
        request = sent.requests[0]
        assert request["messages"][0]["content"] == INSTRUCTION
        assert (request["model"], request["max_tokens"], request["temperature"]) == ("big", MAX_TOKENS, 0.0)
        again = ReasoningWriter(open_writer(spec), tmp_path).write(["b", "c"])
        assert again.texts == ["About b", "About c"]
        assert (again.cached, again.tokens_read, len(sent.requests)) == (1, 100, 3)
        assert "writer big: 1 of 2 queries written, 100 tokens read and 20 written, " in again.line
        assert ReasoningWriter(open_writer(f"endpoint:other@{sent.url}"), tmp_path).write(["b"]).cached == 0


def test_what_was_written_before_a_failure_is_kept(tmp_path: Path) -> None:
    def half(request, number=0):
        return error(400, "no") if "bad" in request["messages"][1]["content"] else about(request)

    with EndpointServer(half) as sent:
        writer = ReasoningWriter(open_writer(f"endpoint:big@{sent.url}"), tmp_path)
        with pytest.raises(InputError, match="big wrote nothing about 'bad', refused by the endpoint"):
            writer.write(["good", "bad"])
        assert writer.write(["good"]).cached == 1


def test_a_wrong_writer_is_refused() -> None:
    with pytest.raises(InputError, match="expected endpoint:MODEL@URL"):
        open_writer("endpoint:")
    with pytest.raises(InputError):
        open_writer("no-such-model")


def test_a_local_model_writes_and_a_search_embeds_its_words(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    model = SearchR3.from_pretrained(tiny_model, device="cpu")
    texts = ("Bread needs yeast.", "The train to Vienna leaves at nine.", "Files are read line by line.")
    build_index(tmp_path / "i", [SourceDocument(str(n), "", text) for n, text in enumerate(texts)], model)
    command = ["search", str(tmp_path / "i"), "train", "--model", str(tiny_model), "--json", "--device", "cpu"]
    assert main([*command, "--writer", str(tiny_model)]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "1 of 1 queries written" in err
    assert found["writer"]["tokens_written"] > 0
    words = found["reasoning"]["text"]
    expected = SearchIndex.open(tmp_path / "i").search("train", model, reasoning_text=words)
    assert [hit["score"] for hit in found["hits"]] == pytest.approx([hit.score for hit in expected.hits][:5], abs=1e-5)
    assert main([*command, "--writer", str(tiny_model)]) == 0
    assert json.loads(capsys.readouterr().out)["writer"]["cached"] == 1
    assert main([*command, "--writer", "x", "--reasoning-text", "y"]) == 2
    assert main([*command, "--writer", "x", "--no-reasoning"]) == 2

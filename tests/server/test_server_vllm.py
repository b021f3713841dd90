"""A server on engine vllm: reasoned queries are vLLM's own batch, and each gets what the torch engine gives it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_tools import running
from vllm_stand_in import StandInVllm

from search_r3 import SearchR3
from search_r3.index.search_index import SearchIndex
from search_r3.server.service import Loaded

QUERIES = ["when does the train leave", "bread", "Zug nach Wien"]


@pytest.mark.parametrize("batching", ["continuous", "static"])
def test_it_embeds_and_searches_as_on_engine_torch(
    batching: Any,
    tiny: SearchR3,
    tiny_model: Path,
    make_index: Callable[[], SearchIndex],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path))
    vllm = StandInVllm(side_by_side=2, chunk=32).install(monkeypatch)

    def load() -> Loaded:
        return Loaded.of(SearchR3.from_pretrained(tiny_model, engine="vllm", device="cpu"), make_index())

    with running(load, batching=batching) as server:
        answer = server.embed(QUERIES, input_type="query", reasoning=5)
        assert answer.status == 200, answer.body
        reasoned = tiny.reason(QUERIES, max_reasoning_tokens=5)
        for item, expected in zip(answer.json["data"], reasoned, strict=True):
            assert np.abs(np.array(item["embedding"]) - expected.embedding).max() < 1e-5
        assert answer.json["usage"]["completion_tokens"] == sum(one.num_tokens for one in reasoned)
        body = {"query": "the train to Vienna", "reasoning": 4, "stream": True}
        events = server.post("/v1/search", body).events
        result, expected = events[-1][1], tiny.reason([body["query"]], max_reasoning_tokens=4)[0]
        assert events[-1][0] == "result"
        assert "".join(data["text"] for _, data in events[:-1]) == result["reasoning"]["text"] == expected.text
        assert vllm.engine.seen
        assert not vllm.engine.has_unfinished_requests()

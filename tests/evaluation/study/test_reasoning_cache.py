"""ReasoningTraces are written once, come back as they were, and go on where a writing was interrupted."""

from __future__ import annotations

import numpy as np
import pytest

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.evaluation.study.reasoning_cache import ReasoningCache

QUERIES = [
    "does aspirin prevent a heart attack",
    "why does bread rise",
    "what moves the sea",
    "Paris",
    "mean of values",
]
IDS = [f"q{i}" for i in range(len(QUERIES))]


class Counting:
    """A model that counts the queries it reasons about, and can fail."""

    def __init__(self, model: SearchR3) -> None:
        self.model, self.contract_hash, self.dtype = model, model.contract_hash, model.dtype
        self.asked: list[str] = []
        self.fail_after = 10**9

    def reason(self, texts, **settings):
        if len(self.asked) + len(texts) > self.fail_after:
            raise KeyboardInterrupt
        self.asked += texts
        return self.model.reason(texts, **settings)


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return SearchR3.from_pretrained(tiny_model, device="cpu")


def test_what_comes_back_is_what_the_model_wrote_and_it_writes_once(tiny, tmp_path):
    cache, model = ReasoningCache(tmp_path, shard_size=2), Counting(tiny)
    first = cache.traces(model, IDS, QUERIES, budget=6)
    again = cache.traces(model, IDS, QUERIES, budget=6)
    assert model.asked == QUERIES
    expected = tiny.reason(QUERIES, max_reasoning_tokens=6)
    for found in (first, again):
        assert found.texts == [r.text for r in expected]
        assert found.token_ids == [r.reasoning_ids for r in expected]
        assert found.forced == [r.forced for r in expected]
        assert np.abs(found.rows - np.stack([r.embedding for r in expected])).max() < 1e-5
    assert again.seconds == pytest.approx(first.seconds, abs=0.01)
    assert np.abs(tiny.encode_with_reasoning(QUERIES, again.token_ids) - again.rows).max() < 1e-5


def test_everything_that_decides_a_trace_is_in_its_key(tiny, tmp_path):
    cache, model = ReasoningCache(tmp_path), Counting(tiny)

    def asked(ids=IDS, queries=QUERIES, **settings):
        before = len(model.asked)
        cache.traces(model, ids, queries, **{"budget": 4, **settings})
        return len(model.asked) - before

    assert asked() == 5
    assert asked(seed=3) == 0  # greedy: the seed decides nothing
    assert asked(budget=5) == 5
    assert asked(temperature=1.0) == 5
    assert asked(temperature=1.0, seed=1) == 5
    assert asked(temperature=1.0, seed=1) == 0
    assert asked(temperature=1.0, seed=1, batch_size=2) == 5
    assert asked(queries=[*QUERIES[:4], "another"]) == 5
    model.contract_hash = "b" * 64
    assert asked() == 5


def test_samples_of_two_seeds_and_of_two_shards_differ(tiny, tmp_path):
    cache = ReasoningCache(tmp_path, shard_size=1)
    settings = {"budget": 12, "temperature": 1.0}
    one = cache.traces(tiny, ["a", "b"], ["Paris", "Paris"], seed=0, **settings)
    two = cache.traces(tiny, ["a", "b"], ["Paris", "Paris"], seed=1, **settings)
    assert one.token_ids[0] != two.token_ids[0]
    assert one.token_ids[0] != one.token_ids[1]


def test_an_interrupted_writing_goes_on_and_a_damaged_shard_is_written_again(tiny, tmp_path):
    cache, model = ReasoningCache(tmp_path, shard_size=2), Counting(tiny)
    model.fail_after = 3
    with pytest.raises(KeyboardInterrupt):
        cache.traces(model, IDS, QUERIES, budget=4)
    model.fail_after = 10**9
    whole = cache.traces(model, IDS, QUERIES, budget=4)
    assert model.asked == QUERIES
    shard = sorted(tmp_path.rglob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    assert cache.traces(model, IDS, QUERIES, budget=4).texts == whole.texts
    assert model.asked == [*QUERIES, *QUERIES[2:4]]


def test_no_queries_are_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="no queries"):
        ReasoningCache(tmp_path).traces(tiny, [], [], budget=4)

"""The batcher: what waits is done together, kinds take turns, and one bad text spoils nobody else's answer."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from serving_tools import eventually

from search_r3.model.tokenization import Tokens
from search_r3.server.batching.batcher import BatcherClosed, Embedded, EmbeddingJob
from search_r3.server.batching.query_cache import QueryCache
from search_r3.server.batching.static_batching import StaticBatcher
from search_r3.server.errors import ApiError
from search_r3.server.metrics import Metrics
from search_r3.server.server_config import ServerConfig


class FakeModel:
    """A vector for each text is (its first token, its length); token 666 breaks a pass, 999 gives NaN."""

    contract_hash = "c"
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))

    def __init__(self) -> None:
        import threading

        self.gate = threading.Event()
        self.gate.set()
        self.passes: list[tuple[str, list[int]]] = []

    def _do(self, kind, texts):
        self.passes.append((kind, [text.ids[0] for text in texts]))
        assert self.gate.wait(60)
        if any(666 in text.ids for text in texts):
            raise RuntimeError("broken")
        return np.array([[np.nan if 999 in t.ids else t.ids[0], len(t.ids)] for t in texts], dtype=np.float32)

    def encode_document(self, texts, **_):
        return self._do("document", texts)

    def encode_query(self, texts, *, reasoning, **_):
        assert reasoning is False
        return self._do("query", texts)

    def reason(self, texts, *, max_reasoning_tokens, on_token, **_):
        vectors = self._do(f"reasoned {sorted(set(max_reasoning_tokens))}", texts)
        for row in range(len(texts)):
            for token in b"hm":
                on_token(row, token)
        return [SimpleNamespace(text="hm", embedding=v, num_tokens=2, forced=False) for v in vectors]


def work(kind: str, *firsts: int, length: int = 1, **more) -> EmbeddingJob:
    return EmbeddingJob(kind, [Tokens((first,) + (1,) * (length - 1)) for first in firsts], **more)  # type: ignore[arg-type]


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def batcher(model: FakeModel) -> Iterator[StaticBatcher]:
    config = ServerConfig(batch_texts=4, batch_tokens=40)
    found = StaticBatcher(model, config, QueryCache(10), Metrics())
    yield found
    model.gate.set()
    found.close(5)


def blocked(model: FakeModel, batcher: StaticBatcher) -> EmbeddingJob:
    """A pass that runs until the gate opens, so that what is submitted now gathers."""
    model.gate.clear()
    first = work("query", 0)
    batcher.submit(first)
    eventually(lambda: len(model.passes) == 1)
    return first


def firsts(done: EmbeddingJob) -> list[float]:
    return [float(answer.vector[0]) for answer in done.future.result(10)]


def test_waiting_requests_share_passes_and_kinds_take_turns(model: FakeModel, batcher: StaticBatcher) -> None:
    blocked(model, batcher)
    many, few = work("document", *range(10, 16)), work("document", 20)
    asked = [work("query", 30), work("query", 31), work("reasoned", 40, budget=5), work("reasoned", 41, budget=6)]
    for one in (many, few, *asked):
        batcher.submit(one)
    assert batcher.waiting() == (11, 11)
    model.gate.set()
    assert firsts(many) == [10, 11, 12, 13, 14, 15]
    assert [firsts(one) for one in (few, *asked)] == [[20], [30], [31], [40], [41]]
    assert model.passes[1:] == [
        ("document", [10, 20, 11, 12]),  # one of each request in turn, four a pass
        ("query", [30, 31]),
        ("reasoned [5, 6]", [40, 41]),
        ("document", [13, 14, 15]),
    ]


def test_a_pass_holds_so_many_tokens_but_a_long_text_goes_alone(model: FakeModel, batcher: StaticBatcher) -> None:
    blocked(model, batcher)
    done = work("document", 10, 11, 12, length=18), work("document", 20, length=500)
    for one in done:
        batcher.submit(one)
    model.gate.set()
    assert [firsts(one) for one in done] == [[10, 11, 12], [20]]
    assert [passed for _, passed in model.passes[1:]] == [[10, 11], [12], [20]]


def test_short_texts_go_before_long_ones_that_wait(model: FakeModel, batcher: StaticBatcher) -> None:
    blocked(model, batcher)
    long, short = [work("document", i, length=40) for i in (1, 2, 3)], work("document", 4, 5, 6, 7, length=10)
    for one in (*long, short):
        batcher.submit(one)
    model.gate.set()
    short.future.result(60)
    assert next(firsts for kind, firsts in model.passes if kind == "document") == [4, 5, 6]
    for one in long:
        one.future.result(60)


def test_a_long_text_does_not_wait_for_ever(model: FakeModel, batcher: StaticBatcher) -> None:
    blocked(model, batcher)
    long = work("document", 99, length=40)
    batcher.submit(long)
    model.gate.set()
    for i in range(100):  # one short text after the other, so that there is always one that would end first
        short = [work("document", i, length=10) for _ in range(2)]
        for one in short:
            batcher.submit(one)
        short[0].future.result(60)
        if long.future.done():
            break
    assert long.future.done()
    assert i < 20


def test_cancelled_work_is_not_done(model: FakeModel, batcher: StaticBatcher) -> None:
    blocked(model, batcher)
    gone, stays = work("document", 10, 11), work("document", 20)
    batcher.submit(gone), batcher.submit(stays)
    gone.future.cancel()
    assert batcher.waiting() == (1, 1)
    model.gate.set()
    assert firsts(stays) == [20]
    assert model.passes[1:] == [("document", [20])]
    assert not gone.begun


def test_what_breaks_a_pass_breaks_only_its_own_request(model: FakeModel, batcher: StaticBatcher) -> None:
    blocked(model, batcher)
    good, bad, nan = work("document", 10, 11), work("document", 666), work("document", 999)
    for one in (good, bad, nan):
        batcher.submit(one)
    model.gate.set()
    assert firsts(good) == [10, 11]
    with pytest.raises(RuntimeError, match="broken"):
        bad.future.result(10)
    with pytest.raises(ApiError, match="no usable embedding for text 0"):
        nan.future.result(10)


def test_the_same_question_is_thought_about_once(model: FakeModel, batcher: StaticBatcher) -> None:
    blocked(model, batcher)
    told: list[list[str]] = [[], [], []]
    asked = [work("reasoned", 50, 50, budget=5, on_text=told[i].append) for i in range(2)]
    for one in asked:
        batcher.submit(one)
    model.gate.set()
    assert [firsts(one) for one in asked] == [[50, 50], [50, 50]]
    later = work("reasoned", 50, budget=5, on_text=told[2].append)
    batcher.submit(later)
    assert later.future.done()  # from the cache, at once
    assert model.passes[1:] == [("reasoned [5]", [50])]
    assert told == [["h", "m"], ["h", "m"], ["hm"]]
    other = work("reasoned", 50, budget=6)
    batcher.submit(other)
    assert firsts(other) == [50]
    assert model.passes[-1] == ("reasoned [6]", [50])


def test_closing_finishes_and_then_refuses(model: FakeModel, batcher: StaticBatcher) -> None:
    first, later = blocked(model, batcher), work("document", 10)
    batcher.submit(later)
    assert batcher.close(0.05) is False  # still blocked: what waits is given up
    with pytest.raises(ApiError, match="shutting down"):
        later.future.result(1)
    with pytest.raises(BatcherClosed):
        batcher.submit(work("query", 1))
    model.gate.set()
    assert firsts(first) == [0]


def test_the_cache_forgets_what_was_not_asked_for_longest() -> None:
    cache = QueryCache(2)
    answers = [Embedded(np.ones(1)) for _ in range(3)]
    keys = [("c", (i,), 1) for i in range(3)]
    cache.put(keys[0], answers[0]), cache.put(keys[1], answers[1])
    assert cache.get(keys[0]) is answers[0]
    cache.put(keys[2], answers[2])
    assert [cache.get(key) is not None for key in keys] == [True, False, True]
    assert cache.get(("other contract", (0,), 1)) is None
    none = QueryCache(0)
    none.put(keys[0], answers[0])
    assert len(none) == 0


def test_oversized_jobs_have_a_tenth_of_the_tokens_while_others_wait(model: FakeModel, batcher: StaticBatcher) -> None:
    """And all of them when nobody else waits; one text at a time, so that who comes then waits for one only."""
    blocked(model, batcher)
    oversized = [work("document", 90 + i, length=10, oversized=True) for i in range(3)]
    others = work("document", *range(10, 34), length=10)
    for one in (*oversized, others):
        batcher.submit(one)
    model.gate.set()
    assert firsts(others) == [*range(10, 34)]
    assert [firsts(one) for one in oversized] == [[90], [91], [92]]
    passes = [texts for _, texts in model.passes[1:]]
    four = [[*range(first, first + 4)] for first in range(10, 34, 4)]
    assert passes == [*four[:3], [90], *four[3:5], [91], four[5], [92]]  # 4 of 40 tokens a pass are theirs


def test_an_oversized_text_longer_than_its_jobs_share_can_grow_does_not_wait_for_ever(
    model: FakeModel, batcher: StaticBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search_r3.server.batching.static_batching.OVERSIZED_CREDIT", 8)
    blocked(model, batcher)
    oversized, others = work("document", 90, length=10, oversized=True), work("document", *range(10, 26), length=10)
    for one in (oversized, others):
        batcher.submit(one)
    model.gate.set()
    assert (firsts(oversized), firsts(others)) == ([90], [*range(10, 26)])
    passes = [texts for _, texts in model.passes[1:]]
    assert passes.index([90]) == 2  # after two passes of 4 tokens of credit each

"""Continuous batching: queries at different tokens share a step, and each gets what it would get alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from serving_tools import eventually, pausing, running

from search_r3 import SearchR3
from search_r3.model.concurrent_reasoning import concurrent_reasoning_of
from search_r3.model.tokenization import Tokens, encode_as_text
from search_r3.server.batching.batcher import Batcher, BatcherClosed, EmbeddingJob
from search_r3.server.batching.continuous import ContinuousBatcher
from search_r3.server.batching.query_cache import QueryCache
from search_r3.server.batching.static_batching import StaticBatcher
from search_r3.server.errors import ApiError
from search_r3.server.metrics import Metrics, Rate
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded, make_batcher


class FakeSlots:
    """A query (first, n) writes n letters; 666 cannot join, 777 breaks the step of its second letter, 999 gives NaN."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[tuple[int, ...], int]] = {}
        self.written: dict[int, int] = {}
        self.steps: list[list[int]] = []  # the first tokens of those in each step
        self.allowed = threading.Semaphore(10_000)
        self.before_step: Callable[[], None] = lambda: None
        self._next = 0

    def __len__(self) -> int:
        return len(self.rows)

    def join(self, texts: Sequence[Tokens], budgets: Sequence[int]) -> list[int]:
        if any(666 in text.ids for text in texts):
            raise RuntimeError("cannot join")
        handles = list(range(self._next, self._next + len(texts)))
        self._next += len(texts)
        for handle, text, budget in zip(handles, texts, budgets, strict=True):
            self.rows[handle], self.written[handle] = (text.ids, budget), 0
        return handles

    def step(self) -> list[Any]:
        assert self.allowed.acquire(timeout=60)
        self.before_step()
        self.steps.append([ids[0] for ids, _ in self.rows.values()])
        out = []
        for handle, (ids, budget) in list(self.rows.items()):
            count = self.written[handle]
            if ids[0] == 777 and count == 1:
                raise RuntimeError("cannot go on")
            if count == min(ids[1], budget):
                vector = np.array([np.nan if ids[0] == 999 else ids[0], count], dtype=np.float32)
                done = SimpleNamespace(text="abcdefghij"[:count], embedding=vector, num_tokens=count, forced=False)
                out.append(SimpleNamespace(handle=handle, token=None, reasoned=done))
                del self.rows[handle]
            else:
                self.written[handle] += 1
                out.append(SimpleNamespace(handle=handle, token=ord("a") + count, reasoned=None))
        return out

    def leave(self, handles: Sequence[int]) -> None:
        for handle in handles:
            self.rows.pop(handle, None)

    def clear(self) -> None:
        self.rows.clear()


class FakeModel:
    """Documents and direct queries, with what a pass calls before it ends."""

    contract_hash = "c"
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))

    def __init__(self) -> None:
        self.passes: list[tuple[str, int]] = []
        self.in_pass: Callable[[], None] = lambda: None

    def _do(self, kind: str, texts: Sequence[Tokens]) -> np.ndarray:
        self.passes.append((kind, len(texts)))
        self.in_pass()
        return np.array([[text.ids[0], 1] for text in texts], dtype=np.float32)

    def encode_document(self, texts: Sequence[Tokens], **_: Any) -> np.ndarray:
        return self._do("document", texts)

    def encode_query(self, texts: Sequence[Tokens], **_: Any) -> np.ndarray:
        return self._do("query", texts)


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A batcher over the fakes; its writing waits until it is let on."""

    def __init__(self, **settings: Any) -> None:
        self.model, self.slots, self.clock, self.metrics = FakeModel(), FakeSlots(), Clock(), Metrics()
        config = ServerConfig(**{"slots": 4, "batch_texts": 4, "batch_tokens": 40, "shared_tokens": 10, **settings})
        model: Any = self.model
        self.batcher = ContinuousBatcher(model, self.slots, config, QueryCache(10), self.metrics, self.clock)

    def hold(self) -> None:
        """No step from now on, but those that are allowed."""
        self.slots.allowed = threading.Semaphore(0)

    def allow(self, steps: int = 10_000) -> None:
        self.slots.allowed.release(steps)

    def ask(self, first: int, count: int, budget: int = 100, **more: Any) -> EmbeddingJob:
        """Submit a query that writes so many letters."""
        work = EmbeddingJob("reasoned", [Tokens((first, count))], budget, **more)
        self.batcher.submit(work)
        return work

    def pages(self, count: int, length: int = 5) -> EmbeddingJob:
        """Submit so many documents."""
        work = EmbeddingJob("document", [Tokens((i + 1,) * length) for i in range(count)])
        self.batcher.submit(work)
        return work

    def metric(self, name: str) -> float:
        lines = self.metrics.render().decode().splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).split()[1])


@pytest.fixture
def bench() -> Iterator[Bench]:
    found = Bench()
    yield found
    found.allow()
    assert found.batcher.close(5)


def text_of(work: EmbeddingJob) -> str | None:
    return work.future.result(10)[0].reasoning


def test_a_query_joins_those_under_way_and_leaves_before_them(bench: Bench) -> None:
    bench.hold()
    long = bench.ask(1, 8)
    bench.allow(3)
    eventually(lambda: len(bench.slots.steps) == 3)
    short = bench.ask(2, 1, budget=7)
    bench.allow(3)
    assert text_of(short) == "a"
    assert not long.future.done()
    bench.allow()
    assert text_of(long) == "abcdefgh"
    # Eight letters and the embedding; the other one's letter and embedding are in the same steps.
    assert len(bench.slots.steps) == 9
    assert sum(2 in step for step in bench.slots.steps) == 2


def test_a_query_that_finds_all_slots_taken_waits_for_the_first_that_ends(bench: Bench) -> None:
    bench.hold()
    first = [bench.ask(i, 2 + 3 * (i > 0)) for i in range(4)]
    eventually(lambda: bench.metric("search_r3_slots_in_use") == 4)
    late = bench.ask(9, 1)
    assert bench.batcher.waiting() == (1, 2)
    assert not late.begun
    assert bench.metric("search_r3_slots") == 4
    bench.allow()
    assert text_of(late) == "a"
    assert [text_of(work) for work in first] == ["ab", "abcde", "abcde", "abcde"]
    taken = [step for step in bench.slots.steps if 9 in step]
    assert 0 not in taken[0]
    assert max(map(len, bench.slots.steps)) == 4
    assert bench.metric("search_r3_slots_in_use") == 0
    assert bench.metric('search_r3_tokens_total{kind="reasoning"}') == 18
    assert bench.metric("search_r3_reasoning_tokens_per_second") == pytest.approx(1.8)


def test_a_cancelled_query_frees_its_slot_at_once() -> None:
    bench = Bench(slots=1)
    bench.hold()
    gone, next_one = bench.ask(1, 9), bench.ask(2, 1)
    bench.allow(2)
    eventually(lambda: len(bench.slots.steps) == 2)
    gone.future.cancel()
    bench.allow()
    assert text_of(next_one) == "a"
    assert [step[0] for step in bench.slots.steps].count(1) <= 3  # the step that was under way is the last
    assert bench.batcher.close(5)


def test_what_fails_fails_for_the_one_who_asked_it_alone(bench: Bench) -> None:
    bench.hold()
    told: list[str] = []
    good = [bench.ask(1, 5, on_text=told.append), bench.ask(2, 2)]
    bad = [bench.ask(666, 1), bench.ask(777, 3), bench.ask(999, 1)]
    after = bench.ask(3, 3)
    bench.allow()
    assert [text_of(work) for work in (*good, after)] == ["abcde", "ab", "abc"]
    for work, (kind, message) in zip(
        bad, [(RuntimeError, "cannot join"), (RuntimeError, "cannot go on"), (ApiError, "no usable embedding")],
        strict=True,
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            work.future.result(10)
    assert "".join(told) == "abcde"  # written twice, told once


def test_a_listener_that_fails_fails_alone(bench: Bench) -> None:
    def broken(piece: str) -> None:
        raise ValueError("gone")

    bench.hold()
    bad, good = bench.ask(1, 5, on_text=broken), bench.ask(2, 5)
    bench.allow()
    assert text_of(good) == "abcde"
    with pytest.raises(ValueError, match="gone"):
        bad.future.result(10)


def test_who_asks_what_is_being_written_shares_it(bench: Bench) -> None:
    bench.hold()
    told: list[list[str]] = [[], [], []]
    first = bench.ask(1, 4, on_text=told[0].append)
    bench.allow(2)
    eventually(lambda: told[0] == ["a", "b"])
    second = bench.ask(1, 4, on_text=told[1].append)
    first.future.cancel()  # the one who came later still waits
    bench.allow()
    assert text_of(second) == "abcd"
    assert all(step == [1] for step in bench.slots.steps)
    assert len(bench.slots.steps) == 5
    assert "".join(told[1]) == "abcd"
    third = bench.ask(1, 4, on_text=told[2].append)
    assert third.future.done()  # from the cache
    assert told[2] == ["abcd"]
    other = bench.ask(1, 4, budget=2)  # another budget is another question
    assert text_of(other) == "ab"


def test_documents_and_reasoning_share_the_time() -> None:
    bench = Bench()
    bench.hold()
    order: list[str] = []

    def step() -> None:
        bench.clock.now += 0.1
        order.append("s")

    def one_pass() -> None:
        bench.clock.now += 0.35
        order.append("P")

    bench.slots.before_step, bench.model.in_pass = step, one_pass
    query = bench.ask(1, 10)
    eventually(lambda: len(bench.slots) == 1)
    pages = bench.pages(8)  # of 5 tokens: while a query is written two are in a pass, alone four
    bench.allow()
    assert text_of(query) == "abcdefghij"
    assert len(pages.future.result(10)) == 8
    assert [count for _, count in bench.model.passes] == [2, 2, 2, 2]
    # A pass of 0.35 s is followed by as long of writing, which four steps are.
    assert "".join(order) == "sPssssPssssPssP"
    assert bench.batcher.close(5)


def test_passes_are_as_large_as_they_may_be_when_nothing_is_written(bench: Bench) -> None:
    started, go = threading.Event(), threading.Event()
    bench.model.in_pass = lambda: (started.set(), go.wait(60))  # type: ignore[assignment,return-value]
    first = bench.pages(1)
    assert started.wait(60)
    rest = bench.pages(8)
    go.set()
    assert len(first.future.result(10) + rest.future.result(10)) == 9
    assert [count for _, count in bench.model.passes] == [1, 4, 4]


def test_closing_finishes_what_was_accepted_and_then_refuses() -> None:
    bench = Bench(slots=1)
    bench.hold()
    asked = [bench.ask(1, 3), bench.ask(2, 3)]
    pages = bench.pages(3)
    bench.allow()
    assert bench.batcher.close(10)
    assert [text_of(work) for work in asked] == ["abc", "abc"]
    assert len(pages.future.result(0)) == 3
    with pytest.raises(BatcherClosed):
        bench.ask(3, 1)


def test_closing_without_time_gives_up_what_is_being_written() -> None:
    bench = Bench(slots=1)
    bench.hold()
    asked = [bench.ask(1, 3), bench.ask(2, 3)]
    eventually(lambda: asked[0].begun)
    threading.Timer(0.3, bench.allow, [1]).start()
    assert bench.batcher.close(0.05) is False
    for work in asked:
        with pytest.raises(ApiError, match="shutting down"):
            work.future.result(5)


def test_a_rate_forgets() -> None:
    clock = Clock()
    rate = Rate(10.0, clock)
    rate.add(30)
    clock.now = 5.0
    rate.add(20)
    assert rate.value() == 5.0
    clock.now = 11.0
    assert rate.value() == 2.0


TEXTS = ["bread", "how does the train move", "Wien", "a much longer question " * 6, "why is the sky blue?", "x"]


def test_every_answer_is_the_static_one(tiny: SearchR3) -> None:
    """Mixed kinds, budgets and times of arrival over a real model: texts the same, embeddings to 1e-4."""
    rows = [Tokens(tuple(ids)) for ids in encode_as_text(tiny.tokenizer, TEXTS)]
    random = np.random.default_rng(0)
    orders = []
    for _ in range(24):
        kind = random.choice(["reasoned", "reasoned", "document", "query"])
        texts = [rows[i] for i in random.integers(len(rows), size=random.integers(1, 4))]
        orders.append((str(kind), texts, int(random.choice([0, 3, 9, 24])) if kind == "reasoned" else 0))

    def answers(batching: str) -> list[Any]:
        config = ServerConfig(batching=batching, slots=5, shared_tokens=20, cache=0)  # type: ignore[arg-type]
        batcher: Batcher = make_batcher(tiny, config, QueryCache(0), Metrics())
        assert isinstance(batcher, ContinuousBatcher) == (batching == "continuous")
        works, told = [], []
        for kind, texts, budget in orders:
            pieces: list[str] = []
            works.append(EmbeddingJob(kind, texts, budget, pieces.append if kind == "reasoned" else None))  # type: ignore[arg-type]
            told.append(pieces)
            batcher.submit(works[-1])
            if batching == "continuous" and len(works) % 5 == 0:
                eventually(lambda done=works[-5]: done.future.done())  # others are under way when the next come
        assert batcher.close(60)
        for work, pieces in zip(works, told, strict=True):
            assert "".join(pieces) == (work.future.result(0)[0].reasoning or "")
        return [work.future.result(0) for work in works]

    for found, expected in zip(answers("continuous"), answers("static"), strict=True):
        for a, b in zip(found, expected, strict=True):
            assert (a.reasoning, a.num_tokens, a.forced) == (b.reasoning, b.num_tokens, b.forced)
            assert np.abs(a.vector - b.vector).max() < 1e-4


def test_what_is_reasoned_is_what_reason_gives(tiny: SearchR3) -> None:
    slots = concurrent_reasoning_of(tiny)
    assert slots is not None
    expected = tiny.reason(TEXTS[:3], max_reasoning_tokens=6)
    handles = slots.join(TEXTS[:3], [6, 6, 6])
    found: dict[int, Any] = {}
    while len(slots):
        found.update({step.handle: step.reasoned for step in slots.step() if step.reasoned is not None})
    for handle, one in zip(handles, expected, strict=True):
        assert (found[handle].text, found[handle].token_ids) == (one.text, one.token_ids)
        assert found[handle].reasoning_ids == one.reasoning_ids


def test_a_model_without_slots_is_served_in_static_batches() -> None:
    batcher = make_batcher(FakeModel(), ServerConfig(), QueryCache(0), Metrics())
    assert type(batcher) is StaticBatcher
    assert batcher.close(5)


def test_a_full_server_sends_away_and_a_client_that_hangs_up_makes_room(tiny: SearchR3) -> None:
    gate, told = threading.Event(), []

    def after(token: int) -> None:
        if armed:
            told.append(token)
            assert gate.wait(30)

    armed = False
    more = {"input_type": "query", "reasoning": 200}
    with running(lambda: Loaded.of(pausing(tiny, after)), queue=2, slots=1) as server:  # type: ignore[arg-type]
        armed = True
        gone = server.open_embed("first", **more)
        eventually(lambda: len(told) == 1)
        waits = server.open_embed("second", input_type="query", reasoning=1)
        eventually(lambda: server.service.in_flight == 2)
        refused = server.embed("third", **more)
        assert (refused.status, refused.error["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        gone.close()
        eventually(lambda: server.service.in_flight == 1)
        gate.set()
        assert b"200 OK" in waits.recv(1000)  # the one slot is free again
        waits.close()
        assert len(told) < 10
        metrics = server.ask("GET", "/metrics").body.decode()
        assert "search_r3_slots 1.0" in metrics
        assert "search_r3_slots_in_use" in metrics

"""A row that joins others under way writes what it writes alone, whoever joins or leaves beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from token_rows import token_rows

from search_r3 import SearchR3
from search_r3.model.engines import llama_forward, torch_engine
from search_r3.model.engines.base import Generation
from search_r3.model.engines.continuous_batching import KEPT, MAX_GAP, ContinuousBatch
from search_r3.model.engines.torch_engine import TorchEngine

PREFIX = [5, 60, 7, 80, 9]
CLOSE = 1e-5


@pytest.fixture(params=["llama", "transformers"])
def engine(tiny_model: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TorchEngine:
    """The engine over each of the two sessions; a row's own state decides when it ends, so that rows end apart."""
    if request.param == "transformers":
        monkeypatch.setattr(torch_engine, "merge_projections", lambda model: None)
    engine = SearchR3.from_pretrained(tiny_model, device="cpu").engine
    real: Any = engine.head

    def head(state_BD: torch.Tensor) -> torch.Tensor:
        logits_BV = real(state_BD).clone()
        logits_BV[:, :10] = -1e4
        logits_BV[state_BD[:, 0] > 1.2, engine.embed_id] = 1e4
        logits_BV[state_BD[:, 1] > 1.6, int(engine.stop_ids[0])] = 2e4
        # The fifth likeliest token instead of the first: a random model's first is the same for ever.
        fifth_B = logits_BV.topk(5).indices[:, 4]
        plain_B = logits_BV.amax(-1) < 1e3
        logits_BV[plain_B, fifth_B[plain_B]] = 1e3
        return logits_BV

    engine.head = head
    return engine


@pytest.fixture
def rows() -> list[list[int]]:
    """Sixteen rows of mixed lengths, no special token among them."""
    return token_rows(3, 9, 1, 27, 4, 4, 14, 2, 40, 6, 8, 11, 70, 5, 1, 20)


def alone(engine: TorchEngine, row: list[int], budget: int) -> Generation:
    return engine.generate(PREFIX, [row], max_new_tokens=budget)[0]


def drive(slots: ContinuousBatch, waiting: list[tuple[int, list[int], int]]) -> tuple[dict[int, Generation], list[int]]:
    """Let each row of `waiting` (step, row, budget) join before its step; returns what each gave, and rows a step."""
    waiting = [(step, *rest, place) for place, (step, *rest) in enumerate(waiting)]
    places: dict[int, int] = {}
    written: dict[int, list[int]] = {}
    done: dict[int, Generation] = {}
    sizes: list[int] = []
    while waiting or len(slots):
        now = [one for one in waiting if one[0] <= len(sizes)]
        waiting = [one for one in waiting if one[0] > len(sizes)]
        if now:
            handles = slots.join([row for _, row, _, _ in now], [budget for _, _, budget, _ in now])
            places.update(zip(handles, [place for *_, place in now], strict=True))
        sizes.append(len(slots))
        for step in slots.step():
            place = places[step.handle]
            if step.token is not None:
                written.setdefault(place, []).append(step.token)
            else:
                assert step.done is not None
                assert step.done.token_ids == written.get(place, [])
                done[place] = step.done
    return done, sizes


def assert_same(found: Generation, expected: Generation) -> None:
    assert found.token_ids == expected.token_ids
    assert (found.forced, found.ended) == (expected.forced, expected.ended)
    assert np.abs(found.embedding - expected.embedding).max() < CLOSE
    assert found.embedding.dtype == np.float32


def test_rows_that_join_and_end_at_different_steps_give_what_they_give_alone(engine: TorchEngine, rows) -> None:
    random = np.random.default_rng(1)
    budgets = [int(random.choice([0, 1, 5, 12, 30, 60])) for _ in rows]
    joins = [int(step) for step in random.integers(0, 40, size=len(rows))]
    expected = [alone(engine, row, budget) for row, budget in zip(rows, budgets, strict=True)]
    assert len({len(one.token_ids) for one in expected}) > 5  # they end at steps of their own,
    assert {one.forced for one in expected} == {True, False}  # some by themselves
    found, sizes = drive(engine.continuous_batch(PREFIX), list(zip(joins, rows, budgets, strict=True)))
    assert max(sizes) > 3
    assert len(found) == len(rows)
    for place, one in enumerate(expected):
        assert_same(found[place], one)


def test_the_embedding_is_the_state_of_one_plain_pass(engine: TorchEngine, rows) -> None:
    found, _ = drive(engine.continuous_batch(PREFIX), [(i, row, 6) for i, row in enumerate(rows)])
    for place, row in enumerate(rows):
        ids = PREFIX + row + found[place].token_ids + [engine.embed_id]
        with torch.inference_mode():
            state_D = engine.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        expected = torch.nn.functional.normalize(state_D, dim=-1).numpy()
        assert np.abs(found[place].embedding - expected).max() < CLOSE


def test_who_leaves_early_changes_nobody_else(engine: TorchEngine, rows) -> None:
    slots = engine.continuous_batch(PREFIX)
    handles = slots.join(rows[:6], [40] * 6)
    for _ in range(3):
        slots.step()
    under_way = [row.handle for row in slots._rows]
    slots.leave([handles[0], handles[4], 12345])
    assert len(slots) == len(set(under_way) - {handles[0], handles[4]})
    handles += slots.join(rows[6:9], [40] * 3)
    done = {}
    while len(slots):
        done.update({step.handle: step.done for step in slots.step() if step.done is not None})
    assert handles[0] not in done
    for handle, row in zip(handles, rows, strict=False):
        if handle in done:
            assert_same(done[handle], alone(engine, row, 40))
    assert len(done) > 3


def test_columns_stay_as_few_as_the_rows_need(engine: TorchEngine, rows) -> None:
    """Somebody is always under way, so the cache is never empty; it must not grow for ever."""
    slots, widest = engine.continuous_batch(PREFIX), 0
    short = [row for row in rows if len(row) < 12]
    for step in range(4 * MAX_GAP):
        if step % 5 == 0:
            slots.join([short[step % len(short)]], [15])
        slots.step()
        widest = max(widest, slots.columns)
    assert slots.columns > 0
    assert widest <= len(PREFIX) + 12 + 15 + 1 + MAX_GAP + 1
    while len(slots):
        slots.step()
    assert slots.columns == 0
    slots.join(rows[: KEPT + 1], [1] * (KEPT + 1))
    while len(slots):
        slots.step()
    assert slots._cache == []  # the memory of so many is let go


def test_a_row_that_cannot_join_leaves_the_others_to_begin_again(engine: TorchEngine, rows, monkeypatch) -> None:
    slots = engine.continuous_batch(PREFIX)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no memory")

    start = slots._begin_session
    monkeypatch.setattr(slots, "_begin_session", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        slots.join(rows[1:3], [5, 5])
    assert len(slots) == 0
    monkeypatch.setattr(slots, "_begin_session", start)
    slots.join(rows[:1], [25])
    slots.step()
    monkeypatch.setattr(slots, "_prompts", broken)
    with pytest.raises(RuntimeError, match="no memory"):  # in `join`, or where it would have been in the same pass
        slots.step() if slots.join(rows[1:3], [5, 5]) else None
    slots.clear()
    monkeypatch.undo()
    assert len(slots) == 0
    found, _ = drive(slots, [(0, rows[0], 25)])
    assert_same(found[0], alone(engine, rows[0], 25))


def test_prompts_share_the_pass_of_those_under_way(engine: TorchEngine, rows, monkeypatch) -> None:
    passes: list[list[tuple[int, ...]]] = []
    real = llama_forward.feed_together

    def counted(parts: Any) -> Any:
        passes.append([tuple(part.ids_BL.shape) for part in parts])
        return real(parts)

    monkeypatch.setattr(llama_forward, "feed_together", counted)
    slots = engine.continuous_batch(PREFIX)
    slots.join([rows[3], rows[9]], [9, 9])
    handles = slots.join([rows[0], rows[1]], [9, 9])
    slots.leave([*slots.join([rows[2]], [9]), handles[1]])  # before they were prefilled
    assert len(slots) == 3
    slots.step()
    expected = [[(2, 1), (1, 3)]] if type(slots._session).__name__ == "LlamaSession" else []
    assert passes == expected
    assert slots._rows[-1].handle == handles[0]
    found = {}
    while len(slots):
        found.update({step.handle: step.done for step in slots.step() if step.done is not None})
    assert_same(found[handles[0]], alone(engine, rows[0], 9))


def test_who_was_to_join_is_continued_though_the_others_left(engine: TorchEngine, rows) -> None:
    slots = engine.continuous_batch(PREFIX)
    first = slots.join(rows[:1], [9])
    slots.step()
    (late,) = slots.join(rows[1:2], [9])
    slots.leave(first)
    found = {}
    while len(slots):
        found.update({step.handle: step.done for step in slots.step() if step.done is not None})
    assert_same(found[late], alone(engine, rows[1], 9))


def test_the_prefix_is_run_once(engine: TorchEngine, rows, monkeypatch) -> None:
    opened: list[int] = []
    real = engine._session
    monkeypatch.setattr(engine, "_session", lambda *given, **more: opened.append(given[1]) or real(*given, **more))
    slots = ContinuousBatch(
        PREFIX, start=engine._start, open_session=real, head=engine.head, device=engine.model.device,
        embed_id=engine.embed_id, stop_ids=engine.stop_ids, vocab_size=engine.vocab_size,
    )  # fmt: skip
    slots.join(rows[:3], [3] * 3)
    slots.join(rows[3:5], [3] * 2)
    slots.step()
    in_place = type(slots._session).__name__ == "LlamaSession"
    # The prefix, what every slot begins with; and where that is of no use, a prefill for each time that rows joined.
    assert opened == ([1, 1] if in_place else [1, 1, 3, 2])

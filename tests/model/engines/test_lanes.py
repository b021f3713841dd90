"""Rows dealt out to lanes write what they write in one lane, and are told of under the names that `join` gave them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3 import SearchR3
from search_r3.model.engines.lanes import Lanes
from search_r3.model.engines.slots import Slots

PREFIX = [5, 60, 7, 80, 9]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Any:
    engine: Any = SearchR3.from_pretrained(tiny_model, device="cpu").engine
    real = engine.head

    def head(state_BD: torch.Tensor) -> torch.Tensor:
        """A row's own state decides when it ends, so that rows end apart."""
        logits_BV = real(state_BD).clone()
        logits_BV[state_BD[:, 0] > 1.0, engine.embed_id] = 1e4
        return logits_BV

    engine.head = head
    return engine


@pytest.fixture
def lanes(engine: Any) -> Iterator[Lanes]:
    with ThreadPoolExecutor(3) as threads:
        yield Lanes(lambda: engine.slots(PREFIX), 3, threads)


@pytest.fixture
def rows() -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(10, 390, size=n).tolist() for n in (3, 9, 1, 27, 4, 4, 14, 2, 11, 5)]


def finish(slots: Any, found: dict[int, Any]) -> None:
    for _ in range(200):
        if not len(slots):
            return
        for step in slots.step():
            if step.done is not None:
                assert step.handle not in found
                found[step.handle] = step.done
    raise AssertionError("rows are left")


def test_rows_write_what_they_write_in_one_lane(engine: Any, lanes: Lanes, rows: list[list[int]]) -> None:
    given: list[dict[int, Any]] = []
    for slots in (engine.slots(PREFIX), lanes):
        found: dict[int, Any] = {}
        handles = slots.join(rows[:6], [9, 0, 4, 9, 9, 2])
        for _ in range(2):
            found |= {step.handle: step.done for step in slots.step() if step.done is not None}
        handles += slots.join(rows[6:], [9] * 4)
        finish(slots, found)
        assert sorted(found) == sorted(handles)
        given.append({place: found[handle] for place, handle in enumerate(handles)})
    for place, one in given[0].items():
        assert one.token_ids == given[1][place].token_ids
        assert one.forced == given[1][place].forced
        assert np.allclose(one.embedding, given[1][place].embedding, atol=1e-5)


def test_rows_go_where_the_fewest_are(lanes: Lanes, rows: list[list[int]]) -> None:
    lanes.join(rows[:4], [50] * 4)
    assert sorted(map(len, lanes._joining)) == [1, 1, 2]
    lanes.join(rows[4:6], [50] * 2)
    assert list(map(len, lanes._joining)) == [2, 2, 2]


def test_who_leaves_is_gone_before_and_after_the_first_step(lanes: Lanes, rows: list[list[int]]) -> None:
    handles = lanes.join(rows[:6], [30] * 6)
    lanes.leave([handles[0], 12345])
    ended = {step.handle for step in lanes.step() if step.done is not None}
    lanes.leave(handles[1:3])
    assert len(lanes) == 3 - len(ended & set(handles[3:]))
    found: dict[int, Any] = {}
    finish(lanes, found)
    assert not set(found) & set(handles[:3])


def test_after_an_error_one_can_clear_and_begin_again(
    engine: Any, lanes: Lanes, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes.join(rows[:3], [3] * 3)
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "step", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lanes.step()
    lanes.clear()
    assert len(lanes) == 0
    assert lanes.step() == []
    found: dict[int, Any] = {}
    handles = lanes.join(rows[:3], [3] * 3)
    finish(lanes, found)
    assert sorted(found) == handles

"""One pass writes the reasoning and embeds it; a row's result never depends on the rows beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from token_rows import token_rows

from search_r3 import SearchR3
from search_r3.model.engines import torch_engine
from search_r3.model.engines.base import Generation
from search_r3.model.engines.torch_engine import TorchEngine

PREFIX = [5, 60, 7, 80, 9]
CLOSE = 1e-5


@pytest.fixture(params=["llama", "transformers"])
def engine(tiny_model: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TorchEngine:
    """The engine over each of the two sessions."""
    if request.param == "transformers":
        monkeypatch.setattr(torch_engine, "merge_projections", lambda model: None)
    return SearchR3.from_pretrained(tiny_model, device="cpu").engine


@pytest.fixture
def rows() -> list[list[int]]:
    """Twelve rows of mixed lengths, no special token among them."""
    return token_rows(3, 9, 1, 27, 4, 4, 14, 2, 40, 6, 8, 11)


def at_last_token(engine: TorchEngine, ids: Sequence[int]) -> np.ndarray:
    """The independent way: one plain forward pass over all the ids, no cache, no padding."""
    with torch.inference_mode():
        state_D = engine.model.model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(state_D, dim=-1).numpy()


def generate(engine: TorchEngine, rows: list[list[int]], **changes: Any) -> list[Generation]:
    settings: dict[str, Any] = {"max_new_tokens": 10, "temperature": 0.0, "seed": 0, "batch_size": 32}
    return engine.generate(PREFIX, rows, **settings | changes)


def make_rows_stop_early(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a row's own state decide when it emits the embed token or ends its turn, so that rows stop apart.

    Returns a list that fills with the number of rows at each step.
    """
    sizes: list[int] = []

    def choose(state_BD: torch.Tensor, temperature: float, generator: Any) -> torch.Tensor:
        sizes.append(len(state_BD))
        next_B = engine.head(state_BD)[:, 10:390].topk(5).indices[:, 4] + 10
        next_B = torch.where(state_BD[:, 0] > 1.2, engine.embed_id, next_B)
        return torch.where(state_BD[:, 1] > 1.6, engine.stop_ids[0], next_B)

    monkeypatch.setattr(engine, "_choose", choose)
    return sizes


def in_latent_steps(engine: TorchEngine, ids: Sequence[int], steps: int) -> np.ndarray:
    """The independent way: at each step one plain forward pass over everything, no cache, no padding."""
    table_VD = engine.model.get_input_embeddings().weight[: engine.vocab_size]
    with torch.inference_mode():
        inputs_TD = table_VD[torch.tensor(list(ids))]
        for _ in range(steps):
            logits_V = engine.model(inputs_embeds=inputs_TD[None]).logits[0, -1, : engine.vocab_size]
            inputs_TD = torch.cat([inputs_TD, logits_V.softmax(-1)[None] @ table_VD])
        states_TD = engine.model.model(inputs_embeds=inputs_TD[None]).last_hidden_state[0]
    return torch.nn.functional.normalize(states_TD[-steps:].mean(0), dim=-1).numpy()


class TestLatentSteps:
    @pytest.mark.parametrize("steps", [1, 3])
    def test_the_embedding_is_the_mean_of_the_states_at_the_soft_tokens(
        self, engine: TorchEngine, rows: list[list[int]], steps: int
    ) -> None:
        found = engine.embed_latent(PREFIX, rows, steps)
        expected = np.stack([in_latent_steps(engine, PREFIX + row, steps) for row in rows])
        assert np.abs(found - expected).max() < CLOSE
        assert found.dtype == np.float32
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < CLOSE

    @pytest.mark.parametrize("size", [2, 5, 32])
    def test_it_does_not_depend_on_the_batch(self, engine: TorchEngine, rows: list[list[int]], size: int) -> None:
        alone = engine.embed_latent(PREFIX, rows, 3, 1)
        assert np.abs(engine.embed_latent(PREFIX, rows, 3, size) - alone).max() < CLOSE
        assert np.abs(engine.embed_latent(PREFIX, rows[::-1], 3, size)[::-1] - alone).max() < CLOSE

    def test_a_first_step_that_is_sure_of_a_token_feeds_that_token(
        self, engine: TorchEngine, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine, "head", lambda state_BD: 1e4 * torch.nn.functional.one_hot(
            torch.full((len(state_BD),), engine.embed_id), engine.vocab_size + 3
        ).float())  # fmt: skip
        expected = engine.embed(PREFIX, [[*row, engine.embed_id] for row in rows])
        assert np.abs(engine.embed_latent(PREFIX, rows, 1) - expected).max() < CLOSE

    def test_without_a_prefix_and_with_progress(self, engine: TorchEngine, rows: list[list[int]]) -> None:
        done: list[int] = []
        found = engine.embed_latent([], rows, 2, 5, done.append)
        assert np.abs(found[3] - in_latent_steps(engine, rows[3], 2)).max() < CLOSE
        assert sum(done) == len(rows)


class TestEmbed:
    def test_it_is_the_state_at_the_last_token(self, engine: TorchEngine, rows: list[list[int]]) -> None:
        found = engine.embed(PREFIX, rows)
        expected = np.stack([at_last_token(engine, PREFIX + row) for row in rows])
        assert np.abs(found - expected).max() < CLOSE

    @pytest.mark.parametrize("size", [1, 2, 5, 32])
    def test_it_does_not_depend_on_the_batch(self, engine: TorchEngine, rows: list[list[int]], size: int) -> None:
        assert np.abs(engine.embed(PREFIX, rows, size) - engine.embed(PREFIX, rows, 1)).max() < CLOSE

    def test_without_a_prefix(self, engine: TorchEngine, rows: list[list[int]]) -> None:
        expected = np.stack([at_last_token(engine, row) for row in rows])
        assert np.abs(engine.embed([], rows) - expected).max() < CLOSE

    def test_rows_are_float32_and_of_unit_length(self, engine: TorchEngine, rows: list[list[int]]) -> None:
        found = engine.embed(PREFIX, rows)
        assert found.dtype == np.float32
        assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)

    def test_no_rows(self, engine: TorchEngine) -> None:
        assert engine.embed(PREFIX, []).shape == (0, engine.dimension)

    def test_a_prefix_is_run_again_when_the_weights_have_changed(
        self, engine: TorchEngine, rows: list[list[int]]
    ) -> None:
        engine.embed(PREFIX, rows)
        with torch.no_grad():
            engine.model.model.layers[0].self_attn.v_proj.weight.mul_(2.0)
        expected = np.stack([at_last_token(engine, PREFIX + row) for row in rows])
        assert np.abs(engine.embed(PREFIX, rows) - expected).max() < CLOSE

    def test_progress_counts_every_row_once(self, engine: TorchEngine, rows: list[list[int]]) -> None:
        seen: list[int] = []
        engine.embed(PREFIX, rows, 5, seen.append)
        assert sum(seen) == len(rows)


class TestGenerate:
    @pytest.mark.parametrize("size", [1, 3, 32])
    def test_the_embedding_is_the_state_at_the_token_that_was_fed(
        self, engine: TorchEngine, rows: list[list[int]], size: int
    ) -> None:
        for row, found in zip(rows, generate(engine, rows, batch_size=size), strict=True):
            ids = [*PREFIX, *row, *found.token_ids, engine.embed_id]
            assert np.abs(found.embedding - at_last_token(engine, ids)).max() < CLOSE

    def test_greedy_writes_what_transformers_generate_writes(self, engine: TorchEngine, rows: list[list[int]]) -> None:
        for row, found in zip(rows, generate(engine, rows), strict=True):
            ids = torch.tensor([PREFIX + row])
            stops = [engine.embed_id, *engine.stop_ids.tolist()]
            written = engine.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=10,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=2,
            )[0, ids.shape[1] :].tolist()
            assert found.token_ids == [t for t in written if t not in stops]

    def test_rows_that_stop_at_different_steps_equal_rows_run_alone(
        self, engine: TorchEngine, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = make_rows_stop_early(engine, monkeypatch)
        alone = [generate(engine, [row])[0] for row in rows]
        lengths = {len(g.token_ids) for g in alone}
        assert len(lengths) >= 4, "the rows must stop at different steps for this test to mean anything"
        del sizes[:]
        together = generate(engine, rows)
        assert sizes[0] == len(rows)
        assert sizes[-1] < len(rows), "finished rows must leave the batch"
        assert {g.forced for g in alone} == {True, False}
        for one, other in zip(alone, together, strict=True):
            assert (one.token_ids, one.forced) == (other.token_ids, other.forced)
            assert np.abs(one.embedding - other.embedding).max() < CLOSE

    def test_a_row_is_forced_when_it_ends_its_turn_or_its_budget_without_the_token(
        self, engine: TorchEngine, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop = int(engine.stop_ids[0])
        script: Iterator[list[int]] = iter([[engine.embed_id, 20, 20, 20], [99, 21, stop, 21], [99, 22, 99, 22]])
        script_of_last = [engine.embed_id, 23]

        def choose(state_BD: torch.Tensor, temperature: float, generator: Any) -> torch.Tensor:
            answer = next(script, None)
            if answer is not None and len(state_BD) < len(answer):
                answer = answer[1::2]  # rows 0 and 2 have left
            if answer is None:
                answer = script_of_last
            return torch.tensor(answer)

        monkeypatch.setattr(engine, "_choose", choose)
        same_length = [row[:1] for row in rows[:4]]
        found = generate(engine, same_length, max_new_tokens=3)
        assert [g.token_ids for g in found] == [[], [20, 21, 22], [20], [20, 21, 22]]
        assert [g.forced for g in found] == [False, False, True, True]
        for row, g in zip(same_length, found, strict=True):
            ids = [*PREFIX, *row, *g.token_ids, engine.embed_id]
            assert np.abs(g.embedding - at_last_token(engine, ids)).max() < CLOSE

    def test_at_budget_zero_the_token_follows_at_once(self, engine: TorchEngine, rows: list[list[int]]) -> None:
        for row, found in zip(rows, generate(engine, rows, max_new_tokens=0), strict=True):
            assert found.token_ids == []
            assert found.forced
            assert np.abs(found.embedding - at_last_token(engine, [*PREFIX, *row, engine.embed_id])).max() < CLOSE

    @pytest.mark.parametrize("samples", [1, 2])
    def test_each_row_may_have_a_budget_of_its_own(
        self, engine: TorchEngine, rows: list[list[int]], samples: int
    ) -> None:
        budgets = [i % 4 * 2 for i in range(len(rows))]
        alone = [g for row, own in zip(rows, budgets, strict=True) for g in generate(engine, [row], max_new_tokens=own)]
        together = generate(engine, rows, max_new_tokens=budgets, samples=samples, batch_size=6)
        assert {len(g.token_ids) for g in alone} >= {0, 2, 4, 6}
        for place, found in enumerate(together):
            one = alone[place // samples]
            assert (found.token_ids, found.forced) == (one.token_ids, one.forced)
            assert np.abs(found.embedding - one.embedding).max() < CLOSE

    @pytest.mark.parametrize("temperature", [0.0, 5.0])
    def test_padding_ids_are_never_written(
        self, engine: TorchEngine, rows: list[list[int]], temperature: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = engine.head

        def tempting(state_BD: torch.Tensor) -> torch.Tensor:
            logits_BV = plain(state_BD).clone()
            logits_BV[:, engine.vocab_size :] = 1e4
            return logits_BV

        monkeypatch.setattr(engine, "head", tempting)
        assert plain.weight.shape[0] > engine.vocab_size
        found = generate(engine, rows, temperature=temperature)
        assert any(g.token_ids for g in found)
        assert max(t for g in found for t in g.token_ids) < engine.vocab_size

    def test_sampling_is_decided_by_the_seed(self, engine: TorchEngine, rows: list[list[int]]) -> None:
        first = [g.token_ids for g in generate(engine, rows, temperature=1.0, seed=3)]
        assert [g.token_ids for g in generate(engine, rows, temperature=1.0, seed=3)] == first
        assert [g.token_ids for g in generate(engine, rows, temperature=1.0, seed=4)] != first

    def test_sampling_follows_the_models_own_distribution(self, engine: TorchEngine) -> None:
        row = [30, 31, 32]
        found = generate(engine, [row] * 4000, max_new_tokens=1, temperature=1.0, batch_size=4000)
        counts = np.zeros(engine.vocab_size)
        for g in found:
            first = g.token_ids[0] if g.token_ids else engine.embed_id if not g.forced else int(engine.stop_ids[0])
            counts[first] += 1 / len(found)
        with torch.inference_mode():
            logits_V = engine.model(input_ids=torch.tensor([PREFIX + row])).logits[0, -1, : engine.vocab_size]
        expected = torch.softmax(logits_V, -1).numpy()
        # The expected total variation of 4,000 draws over 401 outcomes is below 0.5 sqrt(401 / 4000) = 0.16.
        assert 0.5 * np.abs(counts - expected).sum() < 0.16

    def test_no_rows(self, engine: TorchEngine) -> None:
        assert generate(engine, []) == []


def test_samples_of_a_row_share_its_prefill_and_are_what_the_row_alone_would_write(
    engine: TorchEngine, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_rows_stop_early(engine, monkeypatch)  # greedy, so that each sample of a row must be the same
    alone = generate(engine, rows)
    fed: list[tuple[int, int]] = []
    start = engine._start

    def watched(*given: Any, **more: Any) -> Any:
        session = start(*given, **more)
        feed = session.feed
        session.feed = lambda ids, *rest: (fed.append(tuple(ids.shape)), feed(ids, *rest))[1]  # type: ignore[method-assign, func-returns-value]
        return session

    monkeypatch.setattr(engine, "_start", watched)
    samples = generate(engine, rows, samples=3, batch_size=36)
    assert fed[0] == (12, 40)  # one prefill of 12 rows
    assert fed[1] == (36, 1)
    assert len(samples) == 36
    for i, one in enumerate(alone):
        for sample in samples[3 * i : 3 * i + 3]:
            assert (sample.token_ids, sample.forced, sample.ended) == (one.token_ids, one.forced, one.ended)
            np.testing.assert_allclose(sample.embedding, one.embedding, atol=CLOSE)


def test_samples_of_a_row_differ_and_keep_to_their_row_in_any_batch(engine: TorchEngine, rows: list[list[int]]) -> None:
    for batch_size in (2, 12, 64):
        samples = generate(engine, rows, samples=4, temperature=1.0, batch_size=batch_size)
        assert len({tuple(sample.token_ids) for sample in samples}) > 40
        for i, sample in enumerate(samples):
            ids = [*PREFIX, *rows[i // 4], *sample.token_ids, engine.embed_id]
            np.testing.assert_allclose(sample.embedding, at_last_token(engine, ids), atol=CLOSE)


def test_the_token_that_ended_a_turn_is_reported(engine: TorchEngine, rows: list[list[int]], monkeypatch: Any) -> None:
    make_rows_stop_early(engine, monkeypatch)
    found = generate(engine, rows)
    assert {g.ended for g in found} == {None, engine.stop_ids[0].item()}
    assert all(g.forced for g in found if g.ended is not None)
    assert any(g.forced and g.ended is None for g in found)  # out of budget

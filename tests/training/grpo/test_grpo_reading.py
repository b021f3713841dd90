"""Stage 2 with `reading_ratio`: some rollouts read the first hits of a direct search before they reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_grpo import settings, task_of

from search_r3.errors import InputError
from search_r3.model.reading import reading_turns
from search_r3.prompts import with_reading
from search_r3.training.grpo.dataset import load_rl_dataset
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.grpo_task import GRPOTask, load_stage_one
from search_r3.training.grpo.rollout import Group
from search_r3.training.grpo.rollout_engines import query_rows


def reading_task(stage_one: Path, output: Path, ratio: float) -> GRPOTask:
    """A task whose adapter reads two passages of five tokens."""
    config = replace(task_of(stage_one, output).config, reading_ratio=ratio)
    checkpoint, first = load_stage_one(str(stage_one))
    prompts = with_reading(checkpoint.contract.prompts, 2, 5)
    checkpoint = replace(checkpoint, contract=replace(checkpoint.contract, prompts=prompts))
    torch.manual_seed(config.loop.seed)
    return GRPOTask(config, checkpoint, first, load_rl_dataset(config))


def groups_of(task: GRPOTask, queries: list[int]) -> tuple[list[Group], Any, Any]:
    encoder = task.live.encoder.sync()
    environment = task.live.open(encoder)
    task.engine.sync(encoder)
    return task.collector.sample(task.engine, encoder, environment.corpus, queries, 0, 0), encoder, environment.corpus


def test_some_groups_read_the_first_hits_of_their_direct_embedding_and_the_others_stay_the_same(
    stage_one: Path, tmp_path: Path
) -> None:
    task = reading_task(stage_one, tmp_path, 0.5)
    queries = list(range(12))
    groups, encoder, corpus = groups_of(task, queries)
    plain, *_ = groups_of(reading_task(stage_one, tmp_path, 0.0), queries)
    assert 0 < sum(group.reads for group in groups) < len(groups)
    assert not any(group.reads for group in plain)
    for group, other in zip(groups, plain, strict=True):
        text = group.query.text
        assert np.array_equal(group.direct_embedding, other.direct_embedding)
        if not group.reads:
            assert [rollout.token_ids for rollout in group.rollouts] == [r.token_ids for r in other.rollouts]
            continue
        hits = corpus.search(group.direct_embedding[None], 2)[1][0].tolist()
        (turn,) = reading_turns(encoder, [text], [[task.dataset.documents[row] for row in hits]])
        (expected,) = query_rows(encoder, [turn], task.config.max_query_tokens)
        assert all(rollout.prompt_ids == expected for rollout in group.rollouts)
        first = group.rollouts[0]
        embedding = encoder.encode_with_reasoning([turn], [first.token_ids])[0]
        assert np.abs(first.embedding - embedding).max() < 1e-4


def test_a_step_trains_on_rollouts_that_read(stage_one: Path, tmp_path: Path) -> None:
    task = reading_task(stage_one, tmp_path, 1.0)
    loss, _ = task.training_step(task.module, 0, torch.Tensor.backward)
    assert torch.isfinite(loss)
    assert task.rollouts is not None
    marker = reading_turns(task.live.encoder.sync(), ["x"], [["y"]])[0].ids[1:-1]
    assert all(set(marker) <= set(rollout.prompt_ids) for rollout in task.rollouts.rollouts)
    assert any(weight.grad is not None and weight.grad.any() for weight in task.module.parameters())


def test_an_adapter_that_was_not_trained_to_read_is_refused(stage_one: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no reading mode; train it with that key in stage 1"):
        task_of(stage_one, tmp_path, reading_ratio=0.5)
    values = settings(stage_one, tmp_path)
    with pytest.raises(InputError, match="reading_ratio must be from 0 to 1"):
        GRPOConfig(**values | {"reading_ratio": 2.0, "loop": task_of(stage_one, tmp_path).config.loop})

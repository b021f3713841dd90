from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from tiny_grpo import no_backward, optimizer_of, some_pairs, task_of, write_recipe

from search_r3 import SearchR3
from search_r3.cli import main
from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.environment.reward_protocol import RankedRollouts, Reward
from search_r3.environment.reward_terms import WeightedRewards
from search_r3.environment.rewards import REWARDS
from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.training import dev_evaluation
from search_r3.training.config import LoopConfig, load_config
from search_r3.training.grpo import grpo_task
from search_r3.training.grpo.dataset import QueryOrder, load_rl_dataset
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.grpo_task import GRPOTask, train_grpo
from search_r3.training.grpo.log_probs import compute_log_probs
from search_r3.training.grpo.rollout import IGNORE_INDEX, Rollout, RolloutBatch
from search_r3.training.grpo.rollout_engines import EngineRollouts


class AlwaysEmitting(EngineRollouts):
    """Its rollouts count as ended by the embed token, so that none of them earns the missing token's reward."""

    def sample(self, *args: Any, **more: Any) -> list[Rollout]:
        found = super().sample(*args, **more)
        for rollout in found:
            rollout.forced, rollout.ended = False, None
        return found


def rewarded(task: GRPOTask, reward: Reward) -> None:
    """Let the task's rollouts earn `reward` in place of what the recipe says."""
    environment = task.live.open(task.live.encoder.sync())
    environment.reward = WeightedRewards([("of the test", 1.0, reward)])


def by_number(reward: Callable[[int], float]) -> Reward:
    """A reward of a rollout's number in its batch (direct embeddings come last)."""
    return lambda rollouts: [float(reward(i)) for i in range(len(rollouts.texts))]


def sampled(task: GRPOTask, step: int = 0) -> RolloutBatch:
    """The rollouts that a step trains on."""
    task.training_step(task.module, step, no_backward)
    assert task.rollouts is not None
    return task.rollouts


def gradients(task: GRPOTask, step: int = 0) -> dict[str, torch.Tensor]:
    task.module.zero_grad()
    task.training_step(task.module, step, torch.Tensor.backward)
    return {name: p.grad.clone() for name, p in task.module.named_parameters() if p.requires_grad}


@pytest.fixture
def task(stage_one: Path, tmp_path: Path) -> GRPOTask:
    return task_of(stage_one, tmp_path)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_learnable_reward_is_learned(stage_one: Path, tmp_path: Path) -> None:
    task = task_of(stage_one, tmp_path, contrastive_weight=0.0, beta=0.0, queries_per_step=4, num_generations=8)
    rewarded(task, lambda rollouts: [sum(token % 2 for token in ids) / 6 for ids in rollouts.token_ids])
    optimizer, curve = optimizer_of(task, 0.01), []
    for step in range(50):
        _, figures = task.training_step(task.module, task.batch(step), torch.Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(figures["reward"])
        assert figures["ratio"] == 1.0
    assert np.mean(curve[-5:]) > np.mean(curve[:5]) + 0.1


@pytest.mark.slow
def test_training_in_the_corpus_raises_the_reward(stage_one: Path, tmp_path: Path) -> None:
    task = task_of(stage_one, tmp_path, contrastive_weight=1.0, queries_per_step=6)
    before = task.evaluate(task.module, 0)["live.reward"]
    optimizer, curve = optimizer_of(task, 0.01), []
    for step in range(64):
        _, figures = task.training_step(task.module, task.batch(step), torch.Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(figures["reward"])
    assert np.mean(curve[-5:]) > np.mean(curve[:5]) + 0.2
    assert set(task.evaluate(task.module, 40)) == {"live.reward", "live.dcg", "live.reward_direct", "live.gain"}
    assert 0 <= before <= 1


def test_the_untrained_adapter_is_the_reference_and_the_first_ratio_is_one(task: GRPOTask) -> None:
    _, figures = task.training_step(task.module, 0, no_backward)
    assert figures["kl_reference"] == pytest.approx(0, abs=1e-6)
    assert figures["ratio"] == 1.0
    with torch.no_grad():
        for parameter in task.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    assert task.training_step(task.module, 0, no_backward)[1]["kl_reference"] > 1e-3  # of the same rollouts


def test_the_policy_loss_is_of_what_was_sampled_and_only_of_that(task: GRPOTask) -> None:
    embed = task.embed_id
    for rollout in sampled(task).rollouts:
        ids, known = rollout.sampled_ids(embed)
        assert rollout.input_ids(embed)[-rollout.length :] == [*rollout.token_ids, embed]
        assert rollout.input_ids(embed).count(embed) == 1  # nothing comes after it
        assert ids[:-1] == rollout.token_ids
        assert known[:-1] == [True] * len(rollout.token_ids)
        assert known[-1] == (not rollout.forced or rollout.ended is not None)
        if known[-1]:
            assert ids[-1] == (rollout.ended if rollout.forced else embed)


def test_a_forced_token_has_no_part_in_the_policy_loss(stage_one: Path, tmp_path: Path) -> None:
    task = task_of(stage_one, tmp_path, contrastive_weight=0.0, max_reasoning_tokens=1)
    rewarded(task, by_number(lambda i: i % 3))
    rollouts = sampled(task).rollouts
    cut = [rollout for rollout in rollouts if rollout.forced and rollout.ended is None]
    assert cut  # some were out of budget
    assert all(rollout.sampled_ids(task.embed_id)[1] == [True, False] for rollout in cut if rollout.token_ids)
    masked = gradients(task)
    for rollout in cut:
        rollout.forced = False
    unmasked = gradients(task)
    assert any((masked[name] - unmasked[name]).abs().max() > 1e-4 for name in masked)  # it would have mattered


def test_the_policy_learns_that_an_end_of_turn_misses_the_token(stage_one: Path, tmp_path: Path) -> None:
    task = task_of(stage_one, tmp_path, contrastive_weight=0.0)
    eos = task.checkpoint.tokenizer.eos_token_id

    class Ending(EngineRollouts):
        def sample(self, *args: Any, **more: Any) -> Any:
            found = super().sample(*args, **more)
            for rollout in found[1::2]:
                rollout.token_ids, rollout.forced, rollout.ended = rollout.token_ids[:1], True, eos
            return found

    task.engine = Ending()
    task.training_step(task.module, 0, lambda loss: None)
    assert task.rollouts is not None
    ended = task.rollouts.rollouts[1::2]
    assert [rollout.sampled_ids(task.embed_id)[0][-1] for rollout in ended] == [eos] * 6
    assert any(rollout.advantage < 0 for rollout in ended)
    assert {rollout.target for rollout in ended} == {IGNORE_INDEX}  # forced: no contrastive term
    before = _log_prob_of_end(task, ended)
    for rollout in task.rollouts.rollouts[::2]:
        rollout.advantage = 0.0  # what the others teach of the same words
    task.training_step(task.module, 0, torch.Tensor.backward)
    optimizer_of(task, 0.003).step()
    assert _log_prob_of_end(task, ended) < before


def _log_prob_of_end(task: GRPOTask, rollouts: list[Rollout]) -> float:
    worse = [rollout for rollout in rollouts if rollout.advantage < 0]
    with torch.no_grad():
        found = compute_log_probs(task.policy, task.prefix, task.embed_id, worse, task.config, first=True)
    return float(torch.stack([row[one.length - 1] for row, one in zip(found.new_RT, worse, strict=True)]).mean())


def test_padding_ids_are_no_part_of_the_policy(task: GRPOTask) -> None:
    before = gradients(task)
    weight = task.policy.causal_lm.get_output_embeddings()
    while hasattr(weight, "token_adapter"):  # below what PEFT has put around it
        weight = weight.original_module
    weight = weight.weight
    vocabulary = len(task.checkpoint.tokenizer)
    assert weight.shape[0] > vocabulary
    with torch.no_grad():
        weight[vocabulary:] = 5.0  # would take most of the probability
    after = gradients(task)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, atol=1e-6, rtol=1e-4)


def test_log_probabilities_are_divided_by_the_sampling_temperature(stage_one: Path, tmp_path: Path) -> None:
    entropies = {}
    for temperature in (0.5, 1.0):
        task = task_of(stage_one, tmp_path, temperature=temperature)
        entropies[temperature] = task.training_step(task.module, task.batch(0), no_backward)[1]["entropy"]
    assert entropies[0.5] < 0.7 * entropies[1.0]


def test_the_contrastive_term_is_infonce_against_the_refreshed_documents(stage_one: Path, tmp_path: Path) -> None:
    task = task_of(stage_one, tmp_path, contrastive_weight=0.5, beta=0.0)
    loss, figures = task.training_step(task.module, 0, no_backward)
    batch = sampled(task)
    assert loss.item() == pytest.approx(figures["policy"] + 0.5 * figures["contrastive"], rel=1e-5)
    assert not batch.candidate_CD.requires_grad
    assert task.live.environment is not None
    queries = [task.dataset.train[i] for i in task.training_queries.order.batch(0)]
    rows = sorted({row for query in queries for row in query.grades} | set(range(len(task.dataset.documents))))
    vectors = task.live.environment.corpus.vectors(rows)
    for line, rollout in enumerate(batch.rollouts):
        if rollout.target != IGNORE_INDEX:
            positive = queries[line // 4].positive
            torch.testing.assert_close(batch.candidate_CD[rollout.target], vectors[rows.index(positive)])
            assert rollout.target not in rollout.false_negatives
    forced = [rollout.forced for rollout in batch.rollouts]
    assert any(forced)
    assert forced == [rollout.target == IGNORE_INDEX for rollout in batch.rollouts]  # the token was not sampled there


def test_short_reasoning_earns_what_a_missing_token_earns(stage_one: Path, tmp_path: Path) -> None:
    task = task_of(stage_one, tmp_path, min_reasoning_tokens=2, contrastive_weight=0.5)
    rollouts = sampled(task).rollouts
    missing = task.config.environment.missing_token_reward
    short = [len(rollout.token_ids) < 2 or rollout.forced for rollout in rollouts]
    assert any(len(rollout.token_ids) == 1 and not rollout.forced for rollout in rollouts)
    assert not all(short)
    assert [rollout.reward == missing for rollout in rollouts] == short
    assert [rollout.target == IGNORE_INDEX for rollout in rollouts] == short


def test_a_second_positive_is_no_negative(stage_one: Path, tmp_path: Path) -> None:
    task = task_of(stage_one, tmp_path)
    for query in task.dataset.train:
        query.grades[(query.positive + 2) % len(task.dataset.documents)] = 0.5
    assert [len(rollout.false_negatives) for rollout in sampled(task).rollouts] == [1] * 12


@pytest.mark.parametrize("kind", ["keep", "drop"])
def test_groups_without_variance(kind: str, stage_one: Path, tmp_path: Path) -> None:
    task = task_of(stage_one, tmp_path, AlwaysEmitting(), zero_variance=kind, contrastive_weight=0.0, beta=0.04)
    rewarded(task, by_number(lambda i: 0.5 if i < 8 else i % 2))  # the first two groups
    found = task.training_step(task.module, 0, no_backward)[1]
    batch = sampled(task)
    assert batch.metrics["zero_variance"] == pytest.approx(2 / 3)
    trained = [rollout.in_policy_loss for rollout in batch.rollouts]
    assert trained == ([True] * 12 if kind == "keep" else [False] * 8 + [True] * 4)
    assert {rollout.advantage for rollout in batch.rollouts[:8]} == {0.0}
    assert found["trained_rollouts"] == (12 if kind == "keep" else 4)


def test_groups_without_variance_are_replaced_by_other_queries(stage_one: Path, tmp_path: Path) -> None:
    task = task_of(
        stage_one, tmp_path, AlwaysEmitting(), zero_variance="resample", max_resample_rounds=3, staleness_eval_every=0
    )
    rounds: list[int] = []

    def reward(rollouts: RankedRollouts) -> list[float]:
        rounds.append(len(rollouts.texts))
        equal = {1: 8, 2: 8}.get(len(rounds), 0)  # of the first two rounds, the first two groups
        return [0.5 if i < equal else float(i % 2) for i in range(len(rollouts.texts))]

    rewarded(task, reward)
    batch = sampled(task)
    assert rounds == [15, 10, 10]  # 3 queries, then 2 that miss, each with 4 rollouts and the direct embedding
    assert all(rollout.in_policy_loss for rollout in batch.rollouts)
    assert batch.metrics["zero_variance"] == pytest.approx(2 / 3)  # as they were sampled at first
    assert batch.metrics["resampled"] == 2
    assert [rollout.index for rollout in batch.rollouts] == list(range(12))


def test_the_entropy_floor_is_part_of_the_loss_and_pulls_the_entropy_up(stage_one: Path, tmp_path: Path) -> None:
    task = task_of(
        stage_one, tmp_path, AlwaysEmitting(), contrastive_weight=0.0, beta=0.0, entropy_floor=9.0, entropy_weight=2.0
    )
    rewarded(task, lambda rollouts: [0.5] * len(rollouts.texts))  # no group has variance: only the floor has a gradient
    optimizer, lacks = optimizer_of(task, 0.01), []
    for step in (0, 1, 2, 0):  # at the end the queries of the first step again
        loss, metrics = task.training_step(task.module, step, torch.Tensor.backward)
        assert loss.item() == pytest.approx(2.0 * metrics["entropy_lack"])
        optimizer.step()
        optimizer.zero_grad()
        lacks.append(metrics["entropy_lack"])
    assert lacks[-1] < lacks[0]


def test_all_groups_dropped_gives_a_step_of_zero_through_every_weight(stage_one: Path, tmp_path: Path) -> None:
    task = task_of(stage_one, tmp_path, AlwaysEmitting(), contrastive_weight=0.0)
    rewarded(task, by_number(lambda i: 1.0))
    found = gradients(task)
    assert len(found) == sum(p.requires_grad for p in task.module.parameters())
    assert all(gradient.abs().max() == 0 for gradient in found.values())


def test_several_steps_of_a_batch_move_the_ratio_and_see_each_rollout_once_an_iteration(
    stage_one: Path, tmp_path: Path
) -> None:
    task = task_of(stage_one, tmp_path, num_iterations=2, num_mini_batches=2, contrastive_weight=0.0)
    rewarded(task, by_number(lambda i: i % 2))
    optimizer, ratios, numbers = optimizer_of(task, 0.02), [], []
    for step in range(8):
        _, figures = task.training_step(task.module, step, torch.Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()
        assert task.rollouts is not None
        numbers.append(task.rollouts.generation_index)
        ratios.append(figures["ratio"])
    assert numbers == [0] * 4 + [1] * 4
    assert ratios[0] == ratios[4] == 1.0
    assert all(abs(ratio - 1) > 1e-4 for ratio in ratios[1:4])
    assert task.rollouts is not None
    for iteration in (0, 1):
        parts = [task.rollouts.mini_batch(2 * iteration + part, 2, task.config.loop.seed)[0] for part in (0, 1)]
        assert sorted(rollout.index for part in parts for rollout in part) == list(range(12))
    with pytest.raises(RuntimeError, match="never sampled"):
        task.training_step(task.module, 9 + 4, no_backward)


def test_the_saved_adapter_is_the_trained_policy_on_the_original_base(stage_one: Path, tmp_path: Path) -> None:
    folder = train_grpo(write_recipe(stage_one, tmp_path / "recipe.yaml"))
    model = SearchR3.from_pretrained(folder, device="cpu", dtype="float32")
    first = SearchR3.from_pretrained(stage_one, device="cpu", dtype="float32")
    assert model.contract.base_weights == first.contract.base_weights
    assert model.contract_hash != first.contract_hash
    distance = model.check_golden()
    assert distance is not None
    assert distance < 1e-5
    texts = [pair.positive for pair in some_pairs()]
    assert abs(model.encode_document(texts) - first.encode_document(texts)).max() > 0.01
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    terms = next(record["terms"] for record in records if record.get("step") == 6 and "loss" in record)
    assert {
        *("reward", "reward_q10", "reward_q50", "reward_q90", "dcg_scaled", "dcg_scaled_high", "dcg", "dcg_high"),
        *("group_std", "zero_variance", "length", "emission", "entropy", "kl_reference", "clip_low", "clip_high"),
        *("ratio", "mean_age", "staleness_recall", "staleness_error", "refreshed", "direct", "gain", "contrastive"),
    } <= set(terms)
    assert all(math.isfinite(value) for value in terms.values())
    shown = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert [(r["step"], r["query"]) for r in shown if r.get("dev")] == [
        (step, query) for step in (0, 3, 6) for query in [r["query"] for r in shown if r.get("dev")][:3]
    ]
    assert {r["step"] for r in shown if not r.get("dev")} == {1, 3, 5}
    assert all(r["rank"] >= 1 and "text" in r and "reward" in r for r in shown)


def test_held_out_queries_and_those_of_dev_pools_are_never_trained_on(task: GRPOTask) -> None:
    dataset = task.dataset
    held = {query.text for query in dataset.held_out}
    assert held
    assert not held & {query.text for query in dataset.train}
    assert len(held) + len(dataset.train) == 32
    never = {dataset.train[0].text, dataset.train[1].text}
    assert never.isdisjoint(query.text for query in load_rl_dataset(task.config, never).train)


def test_only_queries_of_the_wanted_ranks_are_trained_on_and_a_resumed_run_keeps_them(
    stage_one: Path, tmp_path: Path
) -> None:
    task = task_of(
        stage_one,
        tmp_path,
        min_positive_rank=2,
        max_positive_rank=6,
        queries_per_step=2,
        loop=LoopConfig(seed=3, mixed_precision="no"),
    )
    task.live.open(task.live.encoder.sync())
    assert task.training_queries.kept
    assert len(task.training_queries.kept) < len(task.dataset.train)
    queries = task.dataset.train
    encoder = SearchR3.from_pretrained(stage_one, dtype="float32")  # before its first step, stage 2 is stage 1
    cosine_QN = torch.from_numpy(
        encoder.encode_query([query.text for query in queries], reasoning=False)
        @ encoder.encode_document(task.dataset.documents, max_length=task.config.max_document_tokens).T
    )
    ahead = [
        (cosine_QN[line] > cosine_QN[line, query.positive] - slack).sum()
        for line, query in enumerate(queries)
        for slack in (1e-5, -1e-5)  # documents that tie up to rounding rank before or after
    ]
    ranks = [(int(high), int(low) + 1) for high, low in zip(ahead[::2], ahead[1::2], strict=True)]
    surely = {number for number, rank in enumerate(ranks) if min(rank) >= 2 and max(rank) <= 6}
    perhaps = {number for number, rank in enumerate(ranks) if max(rank) >= 2 and min(rank) <= 6}
    assert surely
    assert surely <= set(task.training_queries.kept) <= perhaps
    assert len(perhaps) < len(queries)
    assert {query.id for query in task.training_queries.queries} == {
        queries[number].id for number in task.training_queries.kept
    }
    again = task_of(
        stage_one,
        tmp_path,
        min_positive_rank=2,
        max_positive_rank=6,
        queries_per_step=2,
        loop=LoopConfig(seed=3, mixed_precision="no"),
    )
    again.load_state_dict(task.state_dict())
    assert [q.id for q in again.training_queries.queries] == [q.id for q in task.training_queries.queries]
    assert again.training_queries.order.batch(7) == task.training_queries.order.batch(7)


def test_the_order_of_queries_is_a_function_of_the_seed_and_the_number() -> None:
    order, again = QueryOrder(20, 6, 7), QueryOrder(20, 6, 7)
    again.batch(5)
    seen = [i for number in range(order.per_epoch) for i in order.batch(number)]
    assert len(seen) == len(set(seen)) == 18
    assert [order.batch(4), order.batch(0)] == [again.batch(4), again.batch(0)]
    assert order.batch(0) != order.batch(order.per_epoch)
    with pytest.raises(InputError, match="too few for a batch of 30"):
        QueryOrder(20, 30, 0)


def beir_set(folder: Path, positives: bool = True) -> Path:
    pairs = some_pairs(16)
    corpus = {pair.id: Document(pair.id, "", pair.positive) for pair in pairs}
    queries = {str(i): pair.query for i, pair in enumerate(pairs)}
    qrels = {str(i): {pair.id: 1} for i, pair in enumerate(pairs)}
    write_beir(folder, BeirDataset("greek", corpus, queries, qrels), "train")
    return folder


def test_a_beir_set_holds_out_by_its_ids_and_documents_are_cut_to_the_positives_first(
    stage_one: Path, tmp_path: Path
) -> None:
    folder = beir_set(tmp_path / "greek")
    task = task_of(
        stage_one, tmp_path, queries=[{"beir": str(folder), "hold_out_modulus": 4, "limit": 6}],
        corpus=[{"beir": str(folder)}, {"pairs": str(stage_one.parents[1] / "pairs.jsonl")}], max_documents=20,
    )  # fmt: skip
    assert {query.id.rsplit("/")[-1] for query in task.dataset.held_out} == {"0", "4", "8", "12"}
    assert len(task.dataset.train) == 6
    by_hash = task_of(
        stage_one, tmp_path, queries=[{"beir": str(folder), "hold_out_modulus": 4, "hold_out": "crc32"}],
        corpus=[{"beir": str(folder)}],
    )  # fmt: skip
    held_out = {query.id.rsplit("/")[-1] for query in by_hash.dataset.held_out}
    assert held_out == {str(i) for i in range(16) if zlib.crc32(str(i).encode()) % 4 == 0}
    assert len(task.dataset.documents) == 20
    for query in (*task.dataset.train, *task.dataset.held_out):
        assert task.dataset.documents[query.positive].startswith(query.text.removeprefix("what is "))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 1}, "num_generations must be 2 or more"),
        ({"queries": []}, "queries is empty"),
        ({"corpus": []}, "corpus is empty"),
        ({"queries": [{"beir": "scifact", "split": "test"}]}, "only training splits"),
        ({"queries": [{"beir": "hotpotqa", "split": "dev"}]}, "only training splits"),
        ({"queries": [{}]}, "either beir: NAME or pairs: FILE"),
        ({"staleness_eval_every": 5, "queries": [{"pairs": "PAIRS"}]}, "staleness_eval_every needs held-out queries"),
        ({"max_documents": 3}, "raise it"),
        ({"queries_per_step": 99}, "too few for a batch of 99"),
        ({"lora": {"rank": 2, "dropout": 0.1}}, "lora.dropout must be 0"),
        ({"loop": {"steps": 1, "gradient_accumulation": 2}}, "use activation_checkpointing to save memory"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"loss_type": "ppo"}, "loss_type"),
        ({"epsilon_low": 2}, "epsilon_low"),
        ({"num_mini_batches": 13}, "num_mini_batches"),
        ({"environment": {"reward": "dgc"}}, "there is no reward"),
        ({"environment": {"length_weight": 0.1, "length_free": 6}}, "length_free must be below"),
        ({"num_generation": 3}, "did you mean num_generations"),
        ({"adapter": "BASE"}, "has no contract"),
        ({"corpus": [{"beir": "BEIR"}]}, "answered by a document that is not in the corpus"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(
    changes: dict[str, Any], message: str, stage_one: Path, tiny_model: Path, tmp_path: Path
) -> None:
    text = (
        json.dumps(changes).replace("BASE", str(tiny_model)).replace("PAIRS", str(stage_one.parents[1] / "pairs.jsonl"))
    )
    text = text.replace("BEIR", str(beir_set(tmp_path / "greek")))
    recipe = write_recipe(stage_one, tmp_path / "recipe.yaml", **json.loads(text))
    with pytest.raises(InputError, match=message) as refused:
        train_grpo(recipe)
    assert "\n" not in str(refused.value)


def test_a_merged_model_is_no_adapter(stage_one: Path, tmp_path: Path) -> None:
    SearchR3.from_pretrained(stage_one, device="cpu").save_pretrained(tmp_path / "merged")
    assert checkpoints.read_record(tmp_path / "merged")["kind"] == "merged"  # type: ignore[index]
    with pytest.raises(InputError, match="give the stage 1 adapter"):
        train_grpo(write_recipe(stage_one, tmp_path / "recipe.yaml", adapter=str(tmp_path / "merged")))


def work(rank: int, stage_one: str, folder: str) -> None:
    """Two steps of two processes, one of which has only groups without variance."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for kind in ("drop", "resample"):
        task = task_of(
            Path(stage_one),
            Path(folder),
            AlwaysEmitting(),
            contrastive_weight=0.0,
            zero_variance=kind,
            num_iterations=2,
            queries_per_step=2,
        )
        rewarded(task, by_number(lambda i: 1.0 if rank == 1 else i % 2))
        module = torch.nn.parallel.DistributedDataParallel(task.module, broadcast_buffers=False)
        optimizer = optimizer_of(task)
        for step in range(3):
            _, figures = task.training_step(module, step, torch.Tensor.backward)
            assert task.rollouts is not None
            assert any(rollout.in_policy_loss for rollout in task.rollouts.rollouts) == (rank == 0)
            optimizer.step()
            optimizer.zero_grad()
        assert task.live.environment is not None
        rows, weight = (
            task.live.environment.corpus.vectors(torch.arange(40)),
            next(iter(p for p in optimizer.param_groups[0]["params"])),
        )
        for value in (rows, weight.detach()):
            both = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(both, value.contiguous())
            assert torch.equal(*both)  # one corpus, one policy
        names = [None, None]
        dist.all_gather_object(names, sorted(figures))
        assert names[0] == names[1]
        assert len(task.state_dict()["rollouts"]) == 2  # between a batch's steps: those of all processes
    (Path(folder) / f"done-{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.nightly
@pytest.mark.slow
def test_a_process_with_nothing_to_learn_from_joins_in(stage_one: Path, tmp_path: Path) -> None:
    run_processes(work, str(stage_one), str(tmp_path))
    assert (tmp_path / "done-0").exists()
    assert (tmp_path / "done-1").exists()


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_recipes_that_we_ship_are_valid(name: str) -> None:
    config = load_config(Path(__file__).parents[3] / "configs" / "grpo" / f"{name}.yaml", GRPOConfig)
    assert config.num_generations == {"cpu": 6, "gpu": 8}[name]
    assert config.max_reasoning_tokens == {"cpu": 24, "gpu": 32}[name]
    assert all(part.hold_out_modulus == 8 for part in config.queries if part.beir == "scifact")


def test_the_command_trains_and_tells_mistakes_in_one_line(
    stage_one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(stage_one, tmp_path / "recipe.yaml")
    assert main(["train", "grpo", str(recipe), "--set", "loop.steps=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"adapter": str(tmp_path / "run" / "adapter")}
    assert main(["train", "grpo", str(recipe), "--set", "num_generations=1"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "num_generations must be 2 or more" in lines[0]


@pytest.mark.parametrize("weight", [0.0, 0.1], ids=["policy alone", "with the contrastive term"])
@pytest.mark.parametrize("kind", ["drop", "keep", "resample"])
def test_equal_rewards_are_reported_and_do_not_end_as_a_success(
    kind: str,
    weight: float,
    stage_one: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(REWARDS, "equal", lambda rollouts: [0.5] * len(rollouts.texts))
    monkeypatch.setattr(grpo_task, "EngineRollouts", AlwaysEmitting)
    changes = {"staleness_eval_every": 0, "zero_variance": kind, "contrastive_weight": weight}
    changes["environment"] = {"reward": "equal"}
    recipe = write_recipe(stage_one, tmp_path / "recipe.yaml", **changes)
    assert main(["train", "grpo", str(recipe), "--set", "loop.steps=2"]) == 2
    said = capsys.readouterr()
    assert "warning: step 2: the last 2 steps had nothing to learn from: each query's rollouts all earned" in said.err
    assert said.err.strip().splitlines()[-1].startswith("error: nothing was learned: each query's rollouts all earned")
    assert "adapter:" not in said.out


def test_dev_pools_choose_the_best_and_are_not_trained_on(
    stage_one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = some_pairs()[:6]
    corpus = {pair.id: Document(pair.id, "", pair.positive) for pair in pairs}
    pool = BeirDataset("greek.dev", corpus, {p.id: p.query for p in pairs[:3]}, {p.id: {p.id: 1} for p in pairs[:3]})
    monkeypatch.setattr(dev_evaluation, "dev_pool", lambda *_: pool)
    seen: list[Any] = []
    read = grpo_task.load_rl_dataset
    monkeypatch.setattr(grpo_task, "load_rl_dataset", lambda *args: (seen.append(read(*args)), seen[-1])[1])
    train_grpo(write_recipe(stage_one, tmp_path / "recipe.yaml", dev=["greek"]))
    assert {pair.query for pair in pairs[:3]}.isdisjoint(query.text for query in seen[0].train)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    dev = [record["dev"] for record in records if "dev" in record]
    assert {"ndcg@10.off", "ndcg@10.on", "greek.dev.off", "greek.dev.emission", "live.reward"} <= set(dev[0])
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert finished["best"] == max(figures["ndcg@10.on"] for figures in dev)
    SearchR3.from_pretrained(tmp_path / "run" / "best", device="cpu")

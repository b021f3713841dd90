"""RetrievalEnvironment: rewards on the fresh corpus, refreshed where rollouts touched it; its staleness; resuming."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from search_r3.environment import rewards
from search_r3.environment.environment_config import EnvironmentConfig
from search_r3.environment.live_corpus import LiveCorpus
from search_r3.environment.retrieval import RetrievalEnvironment
from search_r3.errors import InputError
from search_r3.training.config import load_config
from search_r3.training.run_checkpoint import TrainingState, read_checkpoint, write_checkpoint

ROWS, DIMENSION = 60, 8
GRADES = [{3: 1, 40: 2}, {7: 1}, {13: 0, 11: 1, 12: 1}]
QUERY_R = [0, 0, 1, 1, 2, 2]


def unit(rows: int, seed: int) -> torch.Tensor:
    matrix = torch.randn(rows, DIMENSION, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(matrix, dim=1)


START, DRIFT = unit(ROWS, 0), unit(ROWS, 1)


def weights(step: int) -> torch.Tensor:
    """The whole corpus as the weights of `step` encode it."""
    return torch.nn.functional.normalize(START + 0.3 * step * DRIFT, dim=1)


class Encoder:
    """Encodes rows as the weights of a step do, and remembers what it was asked for."""

    def __init__(self, step: int) -> None:
        self.vectors, self.asked = weights(step), []

    def __call__(self, rows: np.ndarray) -> torch.Tensor:
        self.asked.append(rows.tolist())
        return self.vectors[rows]


def environment(**settings) -> RetrievalEnvironment:
    return RetrievalEnvironment(LiveCorpus.from_vectors(START), EnvironmentConfig(**settings), seed=5)


def grade_matrix() -> torch.Tensor:
    matrix = torch.zeros(len(GRADES), ROWS)
    for query, grades in enumerate(GRADES):
        for row, grade in grades.items():
            matrix[query, row] = grade
    return matrix


# Near some positives, near none, and near a judged irrelevant row: rewards from 0 to nearly 1.
ROLLOUTS = torch.nn.functional.normalize(START[[3, 40, 7, 20, 11, 13]] + 0.5 * unit(6, 2), dim=1)
EMITTED = torch.ones(6, dtype=torch.bool)
EVERYTHING = {"policy": "full", "every": 1}


@pytest.mark.parametrize("name", ["dcg_scaled", "dcg", "margin_rank"])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_rewards_are_those_of_the_whole_corpus_on_fresh_vectors(name, k):
    terms = {"rewards": [{"name": name, "delta": 0.1}]} if name == "margin_rank" else {"reward": name}
    env = environment(**terms, k=k, refresh=EVERYTHING)
    scores = env.score(ROLLOUTS, QUERY_R, GRADES, Encoder(2), 2, emitted_R=EMITTED)
    cosines, grades = ROLLOUTS @ weights(2).T, grade_matrix()[QUERY_R]
    extra = {"delta": 0.1} if name == "margin_rank" else {}
    formula = {"dcg_scaled": rewards.dcg_scaled, "dcg": rewards.ndcg, "margin_rank": rewards.margin_rank}[name]
    expected = formula(cosines, grades, k=k, **extra)
    assert torch.allclose(scores.rewards_R, expected, atol=1e-5)
    assert expected.unique().numel() > 1
    assert torch.equal(scores.unshaped_R, scores.rewards_R)
    assert torch.allclose(scores.ndcg_R, rewards.ndcg(cosines, grades, k=k), atol=1e-5)
    best = cosines.argsort(dim=1, descending=True)[:, : min(k, 10)]
    assert torch.equal(scores.rows_RK[:, : min(k, 10)], best)
    assert torch.allclose(scores.cosines_RK[:, : min(k, 10)], cosines.gather(1, best), atol=1e-5)
    assert scores.direct_B is None


@pytest.mark.parametrize("k", [1, 10])
def test_log_rank_sees_ranks_in_the_whole_corpus_whatever_the_cutoff(k):
    env = environment(reward="log_rank", k=k, refresh=EVERYTHING)
    direct = torch.nn.functional.normalize(START[[3, 30, 12]] + unit(3, 3), dim=1)
    scores = env.score(ROLLOUTS, QUERY_R, GRADES, Encoder(2), 2, emitted_R=EMITTED, direct_BD=direct)
    grades = grade_matrix()
    expected = rewards.log_rank(ROLLOUTS @ weights(2).T, grades[QUERY_R])
    assert torch.allclose(scores.rewards_R, expected, atol=1e-5)
    assert torch.allclose(scores.direct_B, rewards.log_rank(direct @ weights(2).T, grades), atol=1e-5)
    assert ((expected > 0.05) & (expected < 0.6)).any(), "some positives rank below the cutoff"


def test_only_the_chosen_rows_are_encoded_and_they_are_used():
    env = environment(candidates=3, refresh={"budget": 12})
    encoder = Encoder(4)
    scores = env.score(ROLLOUTS, QUERY_R, GRADES, encoder, 4, emitted_R=EMITTED)
    assert encoder.asked == [scores.refreshed.tolist()]
    assert set(scores.refreshed[:5].tolist()) == {3, 40, 7, 11, 12}  # the positives, not the judged irrelevant one
    assert len(scores.refreshed) == 12
    mixed = START.clone()
    mixed[scores.refreshed] = weights(4)[scores.refreshed]
    assert torch.equal(env.corpus.vectors(range(ROWS)), mixed)
    assert (env.corpus.steps_N == 4).nonzero()[:, 0].tolist() == sorted(scores.refreshed.tolist())
    expected = rewards.dcg_scaled(ROLLOUTS @ mixed.T, grade_matrix()[QUERY_R])
    assert torch.allclose(scores.rewards_R, expected, atol=1e-5)
    assert set(scores.seconds) == {"search", "choose", "encode", "update", "relink", "rank"}
    # The graph follows: its cosines are those of the vectors as they are now.
    row, place = np.nonzero(env.graph.ids_NM >= 0)
    true = (mixed @ mixed.T).numpy()[row, env.graph.ids_NM[row, place]]
    assert env.graph.cosines_NM[row, place] == pytest.approx(true, abs=1e-5)
    again = env.score(ROLLOUTS, QUERY_R, GRADES, encoder, 4, emitted_R=EMITTED)  # a second look refreshes other rows
    assert not set(again.refreshed.tolist()) & set(scores.refreshed.tolist())


def test_without_refresh_nothing_is_encoded_and_there_is_no_graph():
    env = environment(refresh={"policy": "none"})
    scores = env.score(ROLLOUTS, QUERY_R, GRADES, Encoder(4), 4, emitted_R=EMITTED)
    assert env.graph is None
    assert scores.refreshed.tolist() == []
    assert torch.allclose(scores.rewards_R, rewards.dcg_scaled(ROLLOUTS @ START.T, grade_matrix()[QUERY_R]), atol=1e-5)


def test_gain_length_and_the_missing_token_shape_the_reward_in_that_order():
    direct = torch.nn.functional.normalize(START[[3, 30, 12]] + unit(3, 3), dim=1)
    env = environment(gain_weight=0.5, length_weight=0.1, length_free=2, refresh=EVERYTHING)
    emitted = torch.tensor([True, True, True, True, True, False])
    scores = env.score(
        ROLLOUTS, QUERY_R, GRADES, Encoder(1), 1,
        emitted_R=emitted, token_ids=[[1] * n for n in (0, 2, 7, 12, 12, 12)], token_budget=12, direct_BD=direct,
    )  # fmt: skip
    plain = rewards.dcg_scaled(ROLLOUTS @ weights(1).T, grade_matrix()[QUERY_R])
    base = rewards.dcg_scaled(direct @ weights(1).T, grade_matrix())
    assert torch.allclose(scores.unshaped_R, plain, atol=1e-5)
    assert torch.allclose(scores.direct_B, base, atol=1e-5)
    cost = torch.tensor([0.0, 0.0, 0.05, 0.1, 0.1, 0.1])
    gain = (plain - base[QUERY_R]).clamp(min=0)
    assert (gain[:5] > 0.05).any()
    assert (gain[:5] == 0).any()
    expected = plain + 0.5 * gain - cost
    expected[5] = -0.5
    assert torch.allclose(scores.rewards_R, expected, atol=1e-5)


def test_direct_embeddings_alone_change_no_reward():
    env, other = environment(refresh=EVERYTHING), environment(refresh=EVERYTHING)
    plain = env.score(ROLLOUTS, QUERY_R, GRADES, Encoder(1), 1, emitted_R=EMITTED)
    with_direct = other.score(ROLLOUTS, QUERY_R, GRADES, Encoder(1), 1, emitted_R=EMITTED, direct_BD=unit(3, 3))
    assert torch.equal(plain.rewards_R, with_direct.rewards_R)
    assert torch.equal(plain.rows_RK, with_direct.rows_RK)


def test_a_resumed_environment_goes_on_as_if_it_had_not_stopped(tmp_path):
    config = EnvironmentConfig(candidates=3, refresh={"policy": "random", "budget": 9})
    for refresh in ({"budget": 9}, {"policy": "random", "budget": 9}):
        config = EnvironmentConfig(candidates=3, refresh=refresh)
        env = RetrievalEnvironment(LiveCorpus.from_vectors(START), config, seed=5)
        env.score(ROLLOUTS, QUERY_R, GRADES, Encoder(1), 1, emitted_R=EMITTED)
        state = TrainingState(1, {}, {}, {"environment": env.state_dict()}, None)
        path = write_checkpoint(tmp_path / str(refresh.get("policy")), state, keep=1)
        back = RetrievalEnvironment(LiveCorpus.from_vectors(START), config, seed=5)
        back.load_state_dict(read_checkpoint(path).task["environment"])
        for step in (2, 3):
            one = env.score(unit(6, step), QUERY_R, GRADES, Encoder(step), step, emitted_R=EMITTED)
            two = back.score(unit(6, step), QUERY_R, GRADES, Encoder(step), step, emitted_R=EMITTED)
            assert one.refreshed.tolist() == two.refreshed.tolist()
            assert torch.equal(one.rewards_R, two.rewards_R)
        assert torch.equal(env.corpus.vectors(range(ROWS)), back.corpus.vectors(range(ROWS)))
    with pytest.raises(InputError, match="refresh settings"):
        environment().load_state_dict(env.state_dict())


def test_the_staleness_is_that_of_the_pool_and_changes_nothing():
    env = environment(k=5, refresh={"policy": "full", "every": 4})
    encoder, queries = Encoder(3), unit(3, 9)
    found = env.evaluate_staleness(queries, GRADES, encoder, 3, top=ROWS, random_rows=0)  # the pool is everything
    assert encoder.asked == [list(range(ROWS))]
    stale, fresh, grades = queries @ START.T, queries @ weights(3).T, grade_matrix()
    tops = [
        (set(s), set(f)) for s, f in zip(stale.topk(5).indices.tolist(), fresh.topk(5).indices.tolist(), strict=True)
    ]
    assert found.pooled_recall == pytest.approx(np.mean([len(s & f) / 5 for s, f in tops]))
    error = (rewards.dcg_scaled(stale, grades, k=5) - rewards.dcg_scaled(fresh, grades, k=5)).abs().mean()
    assert found.pooled_reward_error == pytest.approx(float(error), abs=1e-5)
    assert found.mean_age == 3.0
    assert torch.equal(env.corpus.vectors(range(ROWS)), START)
    part = Encoder(3)
    env.evaluate_staleness(queries, GRADES, part, 3, top=2, random_rows=10)
    assert {3, 40, 7, 11, 12} <= set(part.asked[0])
    assert 15 <= len(part.asked[0]) <= 21
    env.score(ROLLOUTS, QUERY_R, GRADES, Encoder(4), 4, emitted_R=EMITTED)
    after = env.evaluate_staleness(queries, GRADES, Encoder(4), 4)
    assert (after.pooled_recall, after.mean_age) == (1.0, 0.0)
    assert after.pooled_reward_error == pytest.approx(0.0, abs=1e-6)


def test_a_broken_encoder_leaves_the_corpus_and_the_graph_as_they_were():
    env = environment()
    before = env.graph.ids_NM.copy()
    with pytest.raises(ValueError, match="norm nan"):
        env.score(
            ROLLOUTS, QUERY_R, GRADES, lambda rows: torch.full((len(rows), DIMENSION), math.nan), 1, emitted_R=EMITTED
        )
    assert torch.equal(env.corpus.vectors(range(ROWS)), START)
    assert (env.graph.ids_NM == before).all()


def test_what_does_not_fit_is_refused_before_anything_is_encoded():
    def refuse(rows):
        raise AssertionError("encoded")

    def score(env, **change):
        given = {"embeddings_RD": ROLLOUTS, "query_R": QUERY_R, "grades_B": GRADES, "emitted_R": EMITTED} | change
        return env.score(encode=refuse, step=1, **given)

    for change, words in (
        ({"query_R": QUERY_R[:5]}, "6 embeddings but 5 query numbers"),
        ({"query_R": [0, 0, 1, 1, 2, 3]}, "no row 3|no query 3"),
        ({"grades_B": [{99: 1}, {7: 1}, {11: 1}]}, "no row 99"),
        ({"embeddings_RD": ROLLOUTS * 2}, "unit rows"),
    ):
        with pytest.raises(ValueError, match=words):
            score(environment(), **change)
    with pytest.raises(ValueError, match="direct_BD"):
        score(environment(gain_weight=1.0))
    with pytest.raises(ValueError, match="token_ids"):
        score(environment(length_weight=0.1))
    for wrong, words in (
        ({"reward": "dcg_scale"}, "did you mean 'dcg_scaled'"),
        ({"k": 0}, "k must be"),
        ({"candidates": 0}, "candidates must be"),
        ({"gain_weight": -1.0}, "gain_weight must be"),
        ({"rewards": [{"name": "margin_rank", "delta": 2.0}]}, "reward margin_rank: delta must be"),
        ({"rewards": [{"name": "margin_rank", "delt": 0.1}]}, "no parameter 'delt'; did you mean 'delta'"),
        ({"rewards": [{"name": "dcg", "delta": 0.1}]}, "no parameter 'delta' .it has none."),
        ({"rewards": [{"name": "dcg", "weight": "much"}]}, "weight must be a finite number"),
        ({"rewards": [{"weight": 1.0}]}, "needs a name"),
        ({"reward": "dcg", "rewards": [{"name": "dcg"}]}, "not both"),
        ({"refresh": {"policy": "none", "budget": 64}}, "no parameter 'budget' .it has none."),
        ({"missing_token_reward": 0.0}, "missing_token_reward must be below"),
        ({"length_weight": 0.6}, "missing_token_reward must be below"),
        ({"length_free": -1}, "length_free must be"),
        ({"graph_links": 20}, "graph_links must be"),
    ):
        with pytest.raises(InputError, match=words):
            EnvironmentConfig(**wrong)


def test_a_recipe_may_hold_the_settings_and_a_misspelt_policy_stops_it(tmp_path):
    recipe = tmp_path / "grpo.yaml"
    recipe.write_text(
        "rewards:\n- {name: dcg}\n- {name: margin_rank, weight: 0.5, delta: 0.1}\nrefresh: {policy: random}\n"
    )
    config = load_config(recipe, EnvironmentConfig)
    assert config == EnvironmentConfig(
        rewards=[{"name": "dcg"}, {"name": "margin_rank", "weight": 0.5, "delta": 0.1}],
        refresh={"policy": "random", "budget": 256},
    )
    with pytest.raises(InputError, match=r"grpo.yaml: there is no refresh policy 'randon'; did you mean 'random'"):
        load_config(recipe, EnvironmentConfig, ["refresh.policy=randon"])
    with pytest.raises(InputError, match=r'key "margin" is .* write rewards: \[{name: margin_rank, delta: MARGIN}\]'):
        load_config(recipe, EnvironmentConfig, ["margin=0.1"])
    with pytest.raises(InputError, match="no parameter 'candidate_neighbours'; did you mean 'candidate_neighbors'"):
        load_config(recipe, EnvironmentConfig, ["refresh={candidate_neighbours: true}"])

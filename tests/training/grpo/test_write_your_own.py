"""The pages "Write your own reward" and "... refresh policy" are true: their code, installed as a package, trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from plugin_package import install_plugin
from tiny_grpo import no_backward, task_of, write_recipe

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.training.grpo.grpo_task import train_grpo

PAGES = Path(__file__).parents[3] / "docs" / "write-your-own"
SMALL: dict[str, Any] = {"candidates": 4, "k": 3, "graph_width": 4, "graph_links": 2}
TWO_STEPS = ["loop.steps=2", "loop.evaluate_every=0"]


def install_page(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the package that a page shows."""
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    toml, code = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("toml", "python"))
    entries = toml.replace('project.entry-points."', "").replace('"]', "]").replace('"', "")
    entries = re.sub(r"my_package\.\w+", "MODULE", entries)
    install_plugin(folder / "site", monkeypatch, "my-package", entries, code)


def test_rewards_of_another_package_with_parameters_train(
    stage_one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_page("reward", tmp_path, monkeypatch)
    terms = [{"name": "reciprocal_rank", "floor": 0.4}, {"name": "brevity", "weight": 0.25, "limit": 2}]
    changes = {"environment": SMALL | {"rewards": terms}, "log_completions_every": 1, "num_completions_to_log": 99}
    train_grpo(write_recipe(stage_one, tmp_path / "recipe.yaml", **changes), TWO_STEPS)
    shown = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert {record["step"] for record in shown} == {1, 2}
    ranks = {max(0.4, 1 / rank) for rank in range(1, 50)}
    possible = [-0.5, *ranks, *(rank + 0.25 for rank in ranks)]
    assert all(min(abs(record["reward"] - value) for value in possible) < 1e-3 for record in shown)
    assert len({record["reward"] for record in shown}) > 2

    task = task_of(stage_one, tmp_path, environment=SMALL | {"rewards": terms})
    task.training_step(task.module, 0, no_backward)
    assert task.rollouts is not None
    for rollout in task.rollouts.rollouts:
        brief = 0.25 * (0 < len(rollout.token_ids) <= 2)
        assert rollout.reward == -0.5 if rollout.forced else rollout.reward - brief >= 0.4 - 1e-6


def test_held_out_queries_are_validated_with_the_reward_of_another_package(
    stage_one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_page("reward", tmp_path, monkeypatch)
    terms = [{"name": "brevity", "limit": 2}]
    changes = {"environment": SMALL | {"rewards": terms}, "staleness_eval_queries": 6, "num_completions_to_log": 6}
    train_grpo(write_recipe(stage_one, tmp_path / "recipe.yaml", **changes), ["loop.steps=3"])
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    shown = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    dev = {record["step"]: record["dev"] for record in records if "dev" in record}
    assert dev.keys() == {0, 3}
    held_out = task_of(stage_one, tmp_path, **changes).live.held_out
    for step, figures in dev.items():
        rewards = [record["reward"] for record in shown if record.get("dev") and record["step"] == step]
        assert len(rewards) == len(held_out)
        assert set(rewards) <= {0.0, 1.0}
        assert figures["live.reward"] == pytest.approx(sum(rewards) / len(rewards))
        assert figures["live.reward_direct"] == 0.0  # there is no reasoning to be brief
    encoder = SearchR3.from_pretrained(stage_one, device="cpu", dtype="float32")  # the model before the first step
    brief = [0 < r.num_tokens <= 2 for r in encoder.reason([query.text for query in held_out], max_reasoning_tokens=6)]
    assert dev[0]["live.reward"] == pytest.approx(sum(brief) / len(brief))
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert finished["best"] == max(figures["live.reward"] for figures in dev.values())  # it chooses the best adapter


def test_a_wrong_reward_of_another_package_is_one_line(
    stage_one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_page("reward", tmp_path, monkeypatch)
    for terms, message in (
        ([{"name": "brevety"}], "there is no reward 'brevety'; did you mean 'brevity'"),
        ([{"name": "brevity", "limits": 2}], "reward brevity has no parameter 'limits'; did you mean 'limit'"),
        ([{"name": "brevity", "limit": "two"}], "reward brevity: limit must be int, got 'two'"),
        ([{"name": "reciprocal_rank", "floor": None}], "reciprocal_rank: floor must be float"),
    ):
        recipe = write_recipe(stage_one, tmp_path / "recipe.yaml", environment={"rewards": terms})
        with pytest.raises(InputError, match=message) as refused:
            train_grpo(recipe)
        assert "\n" not in str(refused.value)
    code = "def short(rollouts):\n    return [1.0]\n"
    install_plugin(tmp_path / "other", monkeypatch, "other", "[search_r3.rewards]\nshort = MODULE:short\n", code)
    recipe = write_recipe(stage_one, tmp_path / "recipe.yaml", environment={"reward": "short"})
    with pytest.raises(InputError, match="reward short must return one finite number for each of the 15 rollouts"):
        train_grpo(recipe, [*TWO_STEPS, "staleness_eval_every=0"])


def test_a_refresh_policy_of_another_package_trains(
    stage_one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_page("refresh-policy", tmp_path, monkeypatch)
    changes = {"environment": SMALL | {"refresh": {"policy": "oldest", "budget": 7}}}
    train_grpo(write_recipe(stage_one, tmp_path / "recipe.yaml", **changes), TWO_STEPS)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    refreshed = [record["terms"]["refreshed"] for record in records if "terms" in record]
    assert refreshed == [0.0, 7.0]  # all were fresh at the first step
    described = json.loads((tmp_path / "run" / "config.json").read_text())["environment"]["refresh"]
    assert described == {"policy": "oldest", "budget": 7}
    task = task_of(stage_one, tmp_path, **changes)
    environment = task.live.open(task.live.encoder.sync())
    assert environment.graph is None  # it needs none

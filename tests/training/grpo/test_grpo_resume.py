"""A stage 2 run that is killed at any step and started again writes the same log, rollouts and adapter."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from nightly import nightly
from processes import run_processes
from tiny_grpo import task_of, write_recipe

from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.training.grpo.grpo_task import GRPOTask, train_grpo


def curve(run: Path) -> list[Any]:
    """The log without what takes time."""
    found = []
    for line in (run / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        terms = {name: value for name, value in record.get("terms", {}).items() if not name.startswith("seconds_")}
        found.append((record["step"], record.get("loss"), record.get("grad_norm"), terms, record.get("dev")))
    return found


def dying_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    original = GRPOTask.training_step

    def training_step(self: GRPOTask, module: Any, asked: int, backward: Any) -> Any:
        found = original(self, module, asked, backward)  # killed after sampling: what it wrote must be taken back
        if asked == step:
            raise RuntimeError("killed")
        return found

    monkeypatch.setattr(GRPOTask, "training_step", training_step)
    return lambda: monkeypatch.setattr(GRPOTask, "training_step", original)


PLAIN: dict[str, Any] = {}
ROUNDS: dict[str, Any] = {"num_iterations": 2, "num_mini_batches": 2, "zero_variance": "resample"}


@pytest.fixture(scope="module", params=["a step a round", "four steps a round"])
def whole(request: pytest.FixtureRequest, stage_one: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The settings of a run, and the run that was never killed."""
    changes = PLAIN if request.param == "a step a round" else ROUNDS
    folder = tmp_path_factory.mktemp("whole")
    train_grpo(write_recipe(stage_one, folder / "recipe.yaml", **changes))
    return changes, folder / "run"


@pytest.mark.parametrize("step", [3, *nightly(1, 4, 5)])
def test_a_killed_run_goes_on_with_the_same_curve(
    step: int, whole: Any, stage_one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, expected = whole
    recipe = write_recipe(stage_one, tmp_path / "recipe.yaml", **changes)
    revive = dying_at(step, monkeypatch)
    with pytest.raises(RuntimeError, match="killed"):
        train_grpo(recipe)
    revive()
    train_grpo(recipe)
    assert curve(tmp_path / "run") == curve(expected)
    assert (tmp_path / "run" / "rollouts.jsonl").read_text() == (expected / "rollouts.jsonl").read_text()
    weights = [(run / "adapter" / checkpoints.ADAPTER_FILE).read_bytes() for run in (tmp_path / "run", expected)]
    assert weights[0] == weights[1]


def test_the_environment_comes_back_with_its_versions_and_its_graph(stage_one: Path, tmp_path: Path) -> None:
    task = task_of(stage_one, tmp_path)
    optimizer = torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad], lr=0.01)
    for step in range(3):
        task.training_step(task.module, task.batch(step), torch.Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()
    assert task.live.environment is not None
    assert int(task.live.environment.corpus.versions_N.max()) > 1
    again = task_of(stage_one, tmp_path)
    again.load_state_dict(task.state_dict())
    assert again.live.environment is not None
    rows = torch.arange(len(task.live.environment.corpus))
    assert torch.equal(again.live.environment.corpus.vectors(rows), task.live.environment.corpus.vectors(rows))
    assert torch.equal(again.live.environment.corpus.versions_N, task.live.environment.corpus.versions_N)
    assert torch.equal(again.live.environment.corpus.steps_N, task.live.environment.corpus.steps_N)
    assert task.live.environment.graph is not None
    assert again.live.environment.graph is not None
    assert (again.live.environment.graph.ids_NM == task.live.environment.graph.ids_NM).all()
    assert again.live.staleness == task.live.staleness


def test_another_corpus_or_recipe_is_not_gone_on_with(stage_one: Path, tmp_path: Path) -> None:
    recipe = write_recipe(stage_one, tmp_path / "recipe.yaml", loop={"steps": 2, "mixed_precision": "no"})
    train_grpo(recipe, ["loop.steps=1", "loop.schedule=constant"])
    with pytest.raises(InputError, match="started with num_generations = 4, but now it is 3"):
        train_grpo(recipe, ["num_generations=3", "loop.schedule=constant"])
    with pytest.raises(InputError, match="started with dataset_sha256"):
        train_grpo(recipe, ["loop.steps=1", "loop.schedule=constant", f"queries={json.dumps(_limited(recipe))}"])


def _limited(recipe: Path) -> list[dict[str, Any]]:
    return [part | {"limit": 8} for part in json.loads(recipe.read_text())["queries"]]


@pytest.mark.parametrize(
    "refresh",
    [
        {"policy": "random", "budget": 5},
        *nightly({"policy": "full", "every": 2}, {"policy": "none"}),
    ],
)
def test_other_refresh_policies_train_and_resume_too(refresh: Any, stage_one: Path, tmp_path: Path) -> None:
    environment = {"refresh": refresh}
    recipe = write_recipe(stage_one, tmp_path / "recipe.yaml", environment=environment)
    loop = ["loop.schedule=constant", "loop.learning_rate=0.01"]
    train_grpo(recipe, ["loop.steps=2", *loop])
    train_grpo(recipe, ["loop.steps=4", *loop])
    assert [step for step, loss, *_ in curve(tmp_path / "run") if loss is not None] == [1, 2, 3, 4]


def test_starting_over_forgets_the_old_rollouts(stage_one: Path, tmp_path: Path) -> None:
    recipe = write_recipe(stage_one, tmp_path / "recipe.yaml")
    train_grpo(recipe, ["loop.steps=2"])
    before = (tmp_path / "run" / "rollouts.jsonl").read_text()
    train_grpo(recipe, ["loop.steps=2"], resume=False)
    assert (tmp_path / "run" / "rollouts.jsonl").read_text() == before


def two(rank: int, port: int, stage_one: str, folder: str) -> None:
    """One of two processes of a launcher: a whole run, one that dies within a batch's steps, and that one again."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    root = Path(folder)
    recipes = {name: root / name / "recipe.yaml" for name in ("whole", "killed")}
    changes = ROUNDS | {"queries_per_step": 2, "loop": LOOP}
    processes = Accelerator(mixed_precision="no")
    if rank == 0:
        for path in recipes.values():
            path.parent.mkdir()
            write_recipe(Path(stage_one), path, **changes)
    processes.wait_for_everyone()
    train_grpo(recipes["whole"])
    patch = pytest.MonkeyPatch()
    revive = dying_at(3, patch)
    with pytest.raises(RuntimeError, match="killed"):
        train_grpo(recipes["killed"])
    revive()
    processes.wait_for_everyone()
    train_grpo(recipes["killed"])
    if rank == 0:
        assert curve(root / "killed" / "run") == curve(root / "whole" / "run")
        assert len(curve(root / "whole" / "run")) == 5 + 2  # steps, and evaluations of the first and the last
        (root / "done").touch()


LOOP = {
    "steps": 5, "learning_rate": 0.01, "warmup_steps": 1, "checkpoint_every": 1, "evaluate_every": 100,
    "mixed_precision": "no",
}  # fmt: skip


@pytest.mark.nightly
@pytest.mark.slow
def test_two_processes_resume_inside_of_a_round(stage_one: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_processes(two, port, str(stage_one), str(tmp_path))
    assert (tmp_path / "done").exists()

"""One recipe, one loss: 12 steps of both stages by two processes, DDP and FSDP2, follow those of a single process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import run, run_processes
from safetensors.torch import load_file
from tiny_grpo import some_pairs, write_recipe
from torch.nn.parallel import DistributedDataParallel

from search_r3.data.pairs import write_pairs
from search_r3.errors import InputError
from search_r3.training.distributed.sharding import end_processes, fsdp_plugin
from search_r3.training.grpo.grpo_task import GRPOTask, train_grpo
from search_r3.training.sft.sft_task import SFTTask, train_sft

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120, func_only=True)]  # the runs by one process come on top

STEPS = 12
LOOP = {
    "steps": STEPS, "learning_rate": 0.003, "warmup_steps": 3, "checkpoint_every": 0, "evaluate_every": 0,
    "mixed_precision": "no",
}  # fmt: skip
SFT = {
    "plain": {  # 9: an odd rest
        "global_batch_size": 9, "negatives_per_pair": 1, "cross_batch_memory_size": 16, "matryoshka": [32, 16],
        "loop": LOOP | {"ema": 0.5},
    },
    "cached": {
        "activation_checkpointing": True, "mini_batch_size": 2, "self_reasoning_ratio": 0.5,
        "self_reasoning_start_step": 4, "self_reasoning_refresh_steps": 4,
        "reasoning_ratio": 0.2, "global_batch_size": 5,
    },
}  # fmt: skip
GRPO: dict[str, dict[str, Any]] = {
    "plain": {"queries_per_step": 5, "zero_variance": "drop", "loss_type": "dapo", "beta": 0.05},
    "rounds": {
        "queries_per_step": 3, "num_mini_batches": 2, "num_iterations": 2, "zero_variance": "resample",
        "loss_type": "grpo", "activation_checkpointing": True, "mini_batch_size": 3, "shard_corpus": True,
        "loop": LOOP | {"learning_rate": 0.001, "ema": 0.5},
    },
}  # fmt: skip
STRATEGIES = ("ddp", "fsdp2")
NAMES = {"sft": tuple(SFT), "grpo": tuple(GRPO)}
KILLED = {"sft": "plain", "grpo": "rounds"}
ACCELERATE = Path(__file__).parents[2] / "configs" / "accelerate"
BFLOAT16 = ("base_dtype=bfloat16", "loop.mixed_precision=auto", "loop.steps=2")
DIES_AT, KEPT = 7, 5
"""The step at which a run is killed, and the last checkpoint before."""


def write_sft(model: str, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(folder / "pairs.jsonl", some_pairs())
    recipe = {
        "pairs": [str(folder / "pairs.jsonl")], "output": str(folder / "run"), "base": model, "dev": [],
        "lora": {"rank": 3}, "weights": {"sft": 0.5, "kl": 0.3, "infonce": 1.0, "triplet": 0.3}, "loop": LOOP,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe | SFT[name]))
    return folder / "recipe.yaml"


@contextmanager
def strategy(name: str) -> Iterator[None]:
    """What `accelerate launch` says of it in the environment."""
    said = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if name == "fsdp2" else {}
    os.environ |= said
    try:
        yield
    finally:
        for key in said:
            del os.environ[key]


def join(rank: int, port: int, processes: int = 2) -> None:
    """What the launcher tells each process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def write_grpo(stage_one: Path, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    changes = {"staleness_eval_every": 0, "log_completions_every": 10, "loop": LOOP | {"learning_rate": 0.001}}
    return write_recipe(stage_one, folder / "recipe.yaml", **changes | GRPO[name])


def in_two(rank: int, port: int, how: str, stage: str, model: str, stage_one: str, folder: str) -> None:
    """Every configuration of a stage, by one of two processes; and once a run that is killed on the way and goes on."""
    join(rank, port)
    task, train = (SFTTask, train_sft) if stage == "sft" else (GRPOTask, train_grpo)

    def write(name: str) -> Path:
        place = Path(folder) / f"recipe-{rank}"
        return write_sft(model, place, name) if stage == "sft" else write_grpo(Path(stage_one), place, name)

    with strategy(how):
        for name in NAMES[stage]:
            train(write(name), [f"output={folder}/{stage}-{name}/run"])
        if stage == "sft":  # a mixed unit: bfloat16 and float32
            train(write("cached"), [f"output={folder}/bfloat16/run", *BFLOAT16])
        recipe, wanted = write(KILLED[stage]), [f"output={folder}/killed/run", f"loop.checkpoint_every={KEPT}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task, "batch", dying(task.batch))
            with pytest.raises(RuntimeError, match="killed"):
                train(recipe, wanted)
        train(recipe, wanted)
    end_processes()


def in_some(rank: int, port: int, processes: int, stage: str, recipe: str, dies_at: int | None) -> None:
    """A run by one of `processes`, which goes on where others stopped, and may be killed."""
    join(rank, port, processes)
    task, train = (SFTTask, train_sft) if stage == "sft" else (GRPOTask, train_grpo)
    with pytest.MonkeyPatch.context() as patch:
        if dies_at is None:
            train(recipe, [f"loop.checkpoint_every={KEPT}"])
        else:
            patch.setattr(task, "batch", dying(task.batch, dies_at))
            with pytest.raises(RuntimeError, match="killed"):
                train(recipe, [f"loop.checkpoint_every={KEPT}"])
    end_processes()


def dying(batch: Any, dies_at: int = DIES_AT) -> Any:
    def until(self: Any, step: int) -> Any:
        if step == dies_at:
            raise RuntimeError("killed")
        return batch(self, step)

    return until


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_course(one: Path, other: Path) -> None:
    first, second = records(one), records(other)
    assert len(first) == len(second) == STEPS
    for a, b in zip(first, second, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2, abs=1e-3)
        timeless, others = (
            {name: value for name, value in record["terms"].items() if not name.startswith("seconds")}
            for record in (a, b)
        )
        assert others == pytest.approx(timeless, abs=2e-3)
    assert first[-1]["loss"] != pytest.approx(first[0]["loss"], rel=0.05)  # it learns
    weights, others = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        torch.testing.assert_close(others[key].float(), value.float(), atol=3e-3, rtol=2e-2)  # written in bfloat16


@pytest.fixture(scope="module")
def alone(tiny_model: Path, stage_one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every configuration by one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name in SFT:
        train_sft(write_sft(str(tiny_model), folder / f"sft-{name}", name))
    for name in GRPO:
        train_grpo(write_grpo(stage_one, folder / f"grpo-{name}", name))
    train_sft(write_sft(str(tiny_model), folder / "bfloat16", "cached"), BFLOAT16)
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("stage", NAMES)
@pytest.mark.parametrize("how", STRATEGIES)
def test_two_processes_follow_one_and_go_on_after_a_kill(
    how: str, stage: str, alone: Path, tiny_model: Path, stage_one: Path, tmp_path: Path
) -> None:
    run_processes(in_two, free_port(), how, stage, str(tiny_model), str(stage_one), str(tmp_path))
    for name in NAMES[stage]:
        assert_same_course(alone / f"{stage}-{name}" / "run", tmp_path / f"{stage}-{name}" / "run")
    whole, killed = (records(tmp_path / name / "run") for name in (f"{stage}-{KILLED[stage]}", "killed"))
    assert [record["loss"] for record in whole] == [record["loss"] for record in killed]
    runs = (tmp_path / f"{stage}-{KILLED[stage]}" / "run", tmp_path / "killed" / "run")
    saved, resumed = ((run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs)
    assert saved == resumed  # the moving average of the weights
    if stage == "sft":
        half, halves = (
            [record["loss"] for record in records(folder / "bfloat16" / "run")] for folder in (alone, tmp_path)
        )
        assert halves == pytest.approx(half, rel=0.02)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", NAMES)
def test_two_then_one_then_three_processes_train_one_run(
    stage: str, alone: Path, tiny_model: Path, stage_one: Path, tmp_path: Path
) -> None:
    name = KILLED[stage]
    recipe = write_sft(str(tiny_model), tmp_path, name) if stage == "sft" else write_grpo(stage_one, tmp_path, name)
    for processes, dies_at in ((2, 6), (1, 11), (3, None)):  # after the checkpoints of steps 5 and 10
        run_processes(in_some, free_port(), processes, stage, str(recipe), dies_at, processes=processes)
    assert_same_course(alone / f"{stage}-{name}" / "run", tmp_path / "run")


def end_after_an_error(rank: int, folder: str) -> None:
    """What DDP leaves behind is freed before its process group is, also where an error still holds it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=1)
    modules: list[weakref.ref[Any]] = []
    left: list[bool] = []

    def fail() -> None:
        module = DistributedDataParallel(torch.nn.Linear(2, 2))
        modules.append(weakref.ref(module))
        raise RuntimeError("killed")

    def destroy() -> None:
        left.append(modules[0]() is not None)

    def run_and_end() -> None:
        try:
            fail()
        finally:
            end_processes(failed=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "destroy_process_group", destroy)
        with pytest.raises(RuntimeError, match="killed"):
            run_and_end()
    assert left == [False]


def test_modules_are_freed_before_their_process_group(tmp_path: Path) -> None:
    run_processes(end_after_an_error, str(tmp_path), processes=1)


def test_a_batch_that_cannot_be_shared_out_is_refused(tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("search_r3.training.distributed.collectives.world_size", lambda group=None: 6)
    with pytest.raises(InputError, match="global_batch_size is 5, too few for 6 processes"):
        train_sft(write_sft(str(tiny_model), tmp_path, "cached"))


def test_other_kinds_of_sharding_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = SimpleNamespace(distributed_type=SimpleNamespace(value="MULTI_GPU"), num_processes=2, state=None)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert fsdp_plugin(launched) is None  # type: ignore[arg-type]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(InputError, match="set fsdp_version: 2"):
        fsdp_plugin(launched)  # type: ignore[arg-type]
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(InputError, match="fsdp_offload_params: false"):
        fsdp_plugin(launched)  # type: ignore[arg-type]
    launched.distributed_type.value = "DEEPSPEED"
    with pytest.raises(InputError, match="launch it with DDP or FSDP2"):
        fsdp_plugin(launched)  # type: ignore[arg-type]
    launched.num_processes, launched.distributed_type.value = 1, "NO"
    assert fsdp_plugin(launched) is None  # type: ignore[arg-type]


def launch(recipe: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of stage 1, in an environment that tells nothing of CPUs or GPUs."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port()), *options]
    env = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    train = ["-m", "search_r3", "train", "sft", str(recipe), "--set", "loop.steps=2"]
    return run([*command, *train], env=env, check=False, seconds=300)


@pytest.mark.nightly
@pytest.mark.timeout(320, func_only=True)
@pytest.mark.parametrize("name", ["ddp-2", "fsdp2-8"])
def test_a_committed_configuration_starts_two_processes_on_cpus_too(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = write_sft(str(tiny_model), tmp_path, "cached")
    done = launch(recipe, "--config_file", str(ACCELERATE / f"{name}.yaml"), "--num_processes", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2
    assert len(records(tmp_path / "run")) == 2
    assert done.stdout.count("adapter: ") == 1


@pytest.mark.nightly
@pytest.mark.timeout(320, func_only=True)
def test_one_process_where_accelerate_was_asked_for_two_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    done = launch(write_sft(str(tiny_model), tmp_path, "cached"), "--cpu", "--num_processes", "2", "--quiet")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "was asked for several processes but started one" in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_launchers_configurations_are_ones_that_accelerate_reads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == int(path.stem.rpartition("-")[2])
    assert config.distributed_type.value == ("FSDP" if path.stem.startswith("fsdp") else "MULTI_GPU")
    if path.stem.startswith("fsdp"):
        assert config.fsdp_config["fsdp_version"] == 2

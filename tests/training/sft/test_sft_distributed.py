"""Two gloo processes share stage 1's batch: their mean gradient is that of one process, every term included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from search_r3.data.pairs import TrainingPair
from search_r3.model import checkpoint as checkpoints
from search_r3.training.config import LoopConfig, LoraSettings
from search_r3.training.distributed import collectives
from search_r3.training.sft.sft_config import LossWeights, SFTConfig
from search_r3.training.sft.sft_task import SFTTask

pytestmark = pytest.mark.slow

LETTERS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
PAIRS = [
    TrainingPair(f"p{i}", f"what is {name}", f"{name} is the letter number {i}", (f"{name} is no letter",), f"a {name}")
    for i, name in enumerate(LETTERS)
]
PAIRS[6] = TrainingPair("p6", PAIRS[1].query, PAIRS[6].positive, PAIRS[6].negatives, "b")  # answers another's query
BEHIND = ([], [4], [0, 3, 7])
"""Pairs that are trained behind an analysis too: of a single one, one process has no row."""
GRADED = [
    replace(pair, positives=tuple((f"{pair.positive} {n}", float(n + 1)) for n in range(i % 3)), grade=2.0)
    for i, pair in enumerate(PAIRS)
]
RANKINGS: tuple[dict[str, Any], ...] = (
    {"ranking_loss": "multi_positive", "positives_per_pair": 3},  # an odd number of documents
    {"ranking_loss": "lambda", "positives_per_pair": 2},
    {"ranking_loss": "approx_ndcg", "positives_per_pair": 3, "symmetric": False},
)
CASES: list[tuple[list[int], dict[str, Any]]] = [(behind, {}) for behind in BEHIND] + [
    ([0, 3, 7], ranking) for ranking in RANKINGS
]


def gradients(model: str, behind: list[int], ranking: dict[str, Any]) -> tuple[float, list[torch.Tensor]]:
    """The loss of the second of two steps, and its gradients."""
    torch.manual_seed(0)
    pairs = GRADED if ranking else PAIRS
    config = SFTConfig(
        pairs=["-"],
        output="-",
        global_batch_size=len(PAIRS),
        negatives_per_pair=1,
        cross_batch_memory_size=16,
        matryoshka=[32, 16],
        dev=[],
        weights=LossWeights(sft=0.1, kl=0.1, infonce=1.0, triplet=0.5, self_teaching=0.5),
        query_variants={"upper": 0.3, "typos": 0.2},
        lora=LoraSettings(rank=4),
        loop=LoopConfig(mixed_precision="no"),
        **ranking,
    )
    task = SFTTask(config, checkpoints.load_base(model, dtype=torch.float32), pairs)
    with torch.no_grad():
        for parameter in task.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    plan: Any = lambda step: (pairs, behind, [False] * len(behind))  # noqa: E731
    task.collator._plan = plan  # type: ignore[method-assign]
    task.compute_loss(task.module, task.batch(0))
    loss, _ = task.compute_loss(task.module, task.batch(1))
    loss.backward()
    found = [parameter.grad for parameter in task.module.parameters() if parameter.grad is not None]
    return loss.item(), found


def work(rank: int, folder: str, model: str) -> None:
    torch.set_num_threads(1)
    whole = [gradients(model, *case) for case in CASES]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    assert collectives.world_size() == 2
    for case, (value, expected) in zip(CASES, whole, strict=True):
        loss, found = gradients(model, *case)
        mean = torch.tensor(loss) / 2
        dist.all_reduce(mean)
        assert mean.item() == pytest.approx(value, rel=1e-5)
        assert len(found) == len(expected)
        for gradient, alone in zip(found, expected, strict=True):
            dist.all_reduce(gradient)  # what DDP does, and then divides
            assert torch.allclose(gradient / 2, alone, atol=1e-5, rtol=1e-4)
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tiny_model: Path, tmp_path: Path) -> None:
    run_processes(work, str(tmp_path), str(tiny_model))

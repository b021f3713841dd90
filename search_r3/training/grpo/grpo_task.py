"""Stage 2 as a task of the training loop: its state, its dev figures and its checkpoints around `step.grpo_step`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from search_r3.config import default_values, to_dict
from search_r3.data.dev_pools import dev_pool
from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.model.checkpoint import Checkpoint
from search_r3.model.resolve import resolve
from search_r3.model.searchr3 import SearchR3
from search_r3.prompts import render
from search_r3.training.config import load_config
from search_r3.training.dev_evaluation import dev_figures
from search_r3.training.distributed import collectives
from search_r3.training.distributed.sharding import start_processes
from search_r3.training.grpo.collector import RolloutCollector
from search_r3.training.grpo.dataset import RLDataset, TrainingQueries, load_rl_dataset
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.live_environment import ROLLOUTS_FILE, LiveEnvironment
from search_r3.training.grpo.live_validation import live_figures
from search_r3.training.grpo.rollout import RolloutBatch
from search_r3.training.grpo.rollout_engines import EngineRollouts, RolloutEngine
from search_r3.training.grpo.step import grpo_step
from search_r3.training.loop import run_training
from search_r3.training.lora.concatenation import ConcatenatedAdapter
from search_r3.training.lora.live_encoder import LiveEncoder
from search_r3.training.lora.policy import Policy, add_lora
from search_r3.training.precision import resolve_attention
from search_r3.training.training_log import truncate_log

FORMAT = 2


class GRPOTask:
    """Stage 2 as the loop sees it.

    Args:
        config: the recipe.
        checkpoint: the stage 1 adapter merged into its base, in float32, without a new adapter yet.
        first: the stage 1 adapter's folder; its weights become part of what is saved.
        dataset: see `load_rl_dataset`.
        engine: samples rollouts; by default the recipe's.
    """

    def __init__(
        self,
        config: GRPOConfig,
        checkpoint: Checkpoint,
        first: Path,
        dataset: RLDataset,
        engine: RolloutEngine | None = None,
    ) -> None:
        if config.staleness_eval_every and not dataset.held_out:
            raise InputError(
                "staleness_eval_every needs held-out queries: set hold_out_modulus in a query set, or "
                "staleness_eval_every to 0"
            )
        self.config, self.checkpoint, self.dataset = config, checkpoint, dataset
        self.rank, self.processes = collectives.rank(), collectives.world_size()
        if config.queries_per_step < self.processes:
            raise InputError(
                f"queries_per_step is {config.queries_per_step}, too few for {self.processes} processes, which share "
                "the batch"
            )
        model = add_lora(checkpoint, config.lora)
        self.embed_id = checkpoint.contract.embed_token_id
        self.policy = Policy(
            model,
            self.embed_id,
            vocab_size=len(checkpoint.tokenizer),
            mini_batch_size=config.mini_batch_size,
            activation_checkpointing=config.activation_checkpointing,
        )
        self.module: nn.Module = self.policy
        self.saved = ConcatenatedAdapter(first, model)
        self.prefix: Sequence[int] = render(
            checkpoint.contract.prompts.reasoning, checkpoint.tokenizer, give_answer=False
        ).prefix
        if engine is None:
            merged = Path(config.output) / f"merged-{self.rank}"
            engine = EngineRollouts(config.engine, config.generation_batch_size, merged)
        self.engine = engine
        self.training_queries = TrainingQueries(dataset.train, config.queries_per_step, config.loop.seed)
        self.collector = RolloutCollector(config, self.training_queries, dataset.documents)
        encoder = LiveEncoder(self.policy, checkpoint, config.loop.mixed_precision)
        self.live = LiveEnvironment(config, dataset, self.training_queries, encoder)
        self.rollouts: RolloutBatch | None = None
        self.rollouts_of_all: list[dict[str, Any]] = []
        self.steps_done = 0
        self.pools = [
            dev_pool(name, config.data_root, config.dev_queries, config.dev_documents, 0) for name in config.dev
        ]

    def batch(self, step: int) -> int:
        """The step's number: the step samples its rollouts itself, with the weights of then."""
        return step

    def training_step(
        self, module: nn.Module, batch: int, backward: Callable[[Tensor], None]
    ) -> tuple[Tensor, dict[str, float]]:
        """The gradients of step `batch`, its loss and its figures: see `step.grpo_step`."""
        loss, figures = grpo_step(self, module, batch, backward)
        self.steps_done = batch + 1
        return loss, figures

    def nothing_to_learn(self, figures: dict[str, float]) -> str | None:
        """See `learning_signal`: whether no query's rollouts earned different rewards."""
        if figures["trained_rollouts"] > 0 and (self.config.zero_variance != "keep" or figures["zero_variance"] < 1):
            return None
        return (
            f"each query's rollouts all earned the same reward (mean {figures['reward']:.3f}); try harder queries "
            "(min_positive_rank), a larger num_generations, a higher temperature or another environment.reward"
        )

    def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
        """`dev_figures` of each pool and their mean, and the held-out queries' reward in the live corpus."""
        with torch.autocast(next(module.parameters()).device.type, enabled=False):  # cosines and the graph are float32
            return self._evaluate(step)

    def _evaluate(self, step: int) -> dict[str, float]:
        config, encoder = self.config, self.live.encoder.sync()
        environment = self.live.open(encoder)
        figures: dict[str, float] = {}
        for pool in self.pools:
            found = dev_figures(encoder, pool, config.max_document_tokens, config.max_reasoning_tokens)
            figures |= {f"{pool.name}.{key}": value for key, value in found.items()}
        for mode in ("off", "on"):
            if self.pools:
                figures[f"ndcg@10.{mode}"] = float(np.mean([figures[f"{pool.name}.{mode}"] for pool in self.pools]))
        if queries := self.live.held_out:
            live, records = live_figures(encoder, environment, queries, config)
            figures |= live
            self.live.write_rollouts({"step": step, "dev": True} | record for record in records)
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The environment (vectors, versions, graph) and, between the steps of a batch, all processes' rollouts."""
        within = self.steps_done % self.config.steps_per_generation != 0
        return {
            "format": FORMAT,
            "step": self.steps_done,
            **self.live.state_dict(),
            "kept": self.training_queries.kept,
            "rollouts": self.rollouts_of_all if within else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            InputError: the state is of another corpus, or of another version of Search-R3.
        """
        if state["format"] != FORMAT:
            raise InputError(
                f"the run's state has format {state['format']}, this version reads {FORMAT}: continue the run with the "
                "version that began it, or start over without resuming"
            )
        self.steps_done = int(state["step"])
        self.training_queries.keep(state["kept"])
        self.rollouts_of_all = state["rollouts"]
        self.rollouts = RolloutBatch.from_state(state["rollouts"][self.rank]) if state["rollouts"] else None
        self.live.load_state_dict(state)
        if self.rank == 0:
            truncate_log(Path(self.config.output) / ROLLOUTS_FILE, self.steps_done)

    def save(self, folder: Path) -> None:
        """Write stage 1's adapter and this one as one adapter of the original base, and its contract."""
        self.saved.model = self.policy.saved_model
        checkpoints.save_adapter(self.saved, self.checkpoint.contract, folder)


def load_stage_one(name: str) -> tuple[Checkpoint, Path]:
    """A stage 1 adapter merged into its base in float32, and its folder.

    Raises:
        InputError: no adapter of that name, or one without a contract.
    """
    folder = resolve(name)
    record = checkpoints.read_record(folder)
    if record is None:
        raise InputError(
            f"{name} has no contract ({checkpoints.CONTRACT_FILE}), so it is no stage 1 adapter; give the `adapter` "
            "folder of a run of search-r3 train sft"
        )
    if record["kind"] != "adapter":
        raise InputError(f"{name} is a {record['kind']} model; give the stage 1 adapter that it was made from")
    return checkpoints.load(name, dtype=torch.float32), folder


def train_grpo(recipe: str | Path, overrides: Sequence[str] = (), resume: bool = True) -> Path:
    """Train stage 2 from a YAML recipe; returns the adapter's folder, with golden vectors; it has been loaded once.

    Raises:
        InputError: anything wrong with the recipe, the adapter, the queries, the corpus or the disk.
    """
    config = load_config(recipe, GRPOConfig, overrides)
    start_processes()
    checkpoint, first = load_stage_one(config.adapter)
    pools = [dev_pool(name, config.data_root, config.dev_queries, config.dev_documents, 0) for name in config.dev]
    dataset = load_rl_dataset(config, {text for pool in pools for text in pool.queries.values()})
    checkpoint.model.set_attn_implementation(resolve_attention(config.attention))
    torch.manual_seed(config.loop.seed)  # the adapter's own initialization
    task = GRPOTask(config, checkpoint, first, dataset)
    free = ("output", "data_root", "queries", "corpus", "loop", "activation_checkpointing", "mini_batch_size",
            "adapter", "shard_corpus")  # fmt: skip
    describe = {key: value for key, value in to_dict(config).items() if key not in free} | {
        "dataset_sha256": dataset.sha256,
        "adapter_contract": checkpoint.contract.hash,
        "trained_on": [source.trained_on for source in config.queries],
    }
    best = "ndcg@10.on" if config.dev else ("live.reward" if dataset.held_out else None)
    folder = run_training(
        task,
        config.loop,
        Path(config.output),
        resume=resume,
        best_metric=best,
        describe=describe,
        defaults=default_values(GRPOConfig),
    )
    if task.rank == 0 and (folder / checkpoints.CONTRACT_FILE).is_file():
        SearchR3.from_pretrained(folder, device="cpu").write_golden(folder)
    return folder

"""Stage 2 as a task of the training loop: the state, dev metrics and checkpoints around `step.grpo_step`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.model.checkpoint import Checkpoint
from search_r3.model.resolve import resolve
from search_r3.prompts import render
from search_r3.training.config import load_config
from search_r3.training.dev_evaluation import dev_metrics, load_dev_pools
from search_r3.training.distributed import collectives
from search_r3.training.distributed.sharding import start_processes
from search_r3.training.grpo.collapse import CollapseDetector
from search_r3.training.grpo.collector import RolloutCollector
from search_r3.training.grpo.dataset import RLDataset, TrainingQueries, load_rl_dataset
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.grpo.live_environment import ROLLOUTS_FILE, LiveEnvironment
from search_r3.training.grpo.live_validation import live_metrics
from search_r3.training.grpo.replay import ReplayBuffer
from search_r3.training.grpo.rollout import RolloutBatch
from search_r3.training.grpo.rollout_engines import EngineRollouts, RolloutEngine
from search_r3.training.grpo.step import grpo_step
from search_r3.training.lora.concatenation import ConcatenatedAdapter
from search_r3.training.lora.live_encoder import LiveEncoder
from search_r3.training.lora.policy import Policy, add_lora, freeze_lowest_layers
from search_r3.training.precision import resolve_attention
from search_r3.training.stage import train_stage
from search_r3.training.training_log import truncate_log

FORMAT = 2


class GRPOTask:
    """Stage 2 as the loop sees it.

    From a query adapter it trains a query adapter: documents are encoded once, by their own model, and never again.

    Args:
        config: the recipe.
        checkpoint: the stage 1 adapter merged into its base, in float32, without a new adapter yet.
        first: the stage 1 adapter's folder; the saved adapter includes its weights.
        dataset: see `load_rl_dataset`.
        engine: samples the rollouts; by default, the engine that the recipe names.
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
        if config.reading_ratio and checkpoint.contract.prompts.reading is None:
            raise InputError(
                f"reading_ratio is set, but {config.adapter} has no reading mode; train it with that key in stage 1"
            )
        self.config, self.checkpoint, self.dataset = config, checkpoint, dataset
        self.rank, self.processes = collectives.rank(), collectives.world_size()
        if config.queries_per_step < self.processes:
            raise InputError(
                f"queries_per_step is {config.queries_per_step}, too few for {self.processes} processes, which share "
                "the batch"
            )
        model = add_lora(checkpoint, config.lora)
        freeze_lowest_layers(model, config.lora.frozen_layers)
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
        self.replay: ReplayBuffer | None = None
        if config.zero_variance == "replay":
            self.replay = ReplayBuffer(config.replay_buffer, config.loop.seed)
        self.collapse = CollapseDetector()
        self.steps_done = 0
        self.pools = load_dev_pools(config)

    def batch(self, step: int) -> int:
        """The step's number: `grpo_step` samples the rollouts itself, with the weights of that moment."""
        return step

    def training_step(
        self, module: nn.Module, batch: int, backward: Callable[[Tensor], None]
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the gradients of step number `batch`; returns its loss and metrics (see `step.grpo_step`)."""
        loss, metrics = grpo_step(self, module, batch, backward)
        self.steps_done = batch + 1
        return loss, metrics

    def nothing_to_learn(self, metrics: dict[str, float]) -> str | None:
        """Why a step had nothing to learn from (see `learning_signal`): all rewards were equal within each group."""
        if metrics["trained_rollouts"] > 0 and (self.config.zero_variance != "keep" or metrics["zero_variance"] < 1):
            return None
        return (
            f"each query's rollouts all earned the same reward (mean {metrics['reward']:.3f}); try harder queries "
            "(min_positive_rank), a larger num_generations, a higher temperature or another environment.reward"
        )

    def collapsed(self, metrics: dict[str, float] | None) -> str | None:
        """Why the policy has collapsed, after a step with these metrics or (None) so far; see `collapse`."""
        return self.collapse.reason if metrics is None else self.collapse.step(metrics)

    def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
        """`dev_metrics` of the recipe's dev pools, and the reward of the held-out queries in the live corpus."""
        with torch.autocast(next(module.parameters()).device.type, enabled=False):  # cosines and the graph are float32
            return self._evaluate(step)

    def _evaluate(self, step: int) -> dict[str, float]:
        config, encoder = self.config, self.live.encoder.sync()
        environment = self.live.open(encoder)
        metrics = dev_metrics(encoder, self.pools, config.max_document_tokens, config.max_reasoning_tokens)
        if queries := self.live.held_out:
            live, records = live_metrics(encoder, environment, queries, config)
            metrics |= live
            self.live.write_rollouts({"step": step, "dev": True} | record for record in records)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The environment (vectors, versions, graph) and, between the steps of a batch, all processes' rollouts."""
        within = self.steps_done % self.config.steps_per_generation != 0
        return {
            "format": FORMAT,
            "step": self.steps_done,
            **self.live.state_dict(),
            "kept": self.training_queries.kept,
            "rollouts": self.rollouts_of_all if within else [],
            "replay": [] if self.replay is None else collectives.all_gather_object(self.replay.state_dict()),
            "collapse": self.collapse.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            InputError: the state belongs to another corpus, or to another version of Search-R3.
        """
        if state["format"] != FORMAT:
            raise InputError(
                f"the run's state has format {state['format']}, this version reads {FORMAT}: continue the run with the "
                "version that began it, or start over without resuming"
            )
        self.steps_done = int(state["step"])
        self.training_queries.keep(state["kept"])
        self.rollouts_of_all, self.rollouts = state["rollouts"], None
        if state["rollouts"]:
            self.rollouts = RolloutBatch.share(state["rollouts"], self.rank, self.processes)
            if len(state["rollouts"]) != self.processes:
                self.rollouts_of_all = collectives.all_gather_object(self.rollouts.state_dict())
        if self.replay is not None and state.get("replay"):
            self.replay.load_share(state["replay"], self.rank, self.processes)
        if "collapse" in state:  # older runs have none
            self.collapse.load_state_dict(state["collapse"])
        self.live.load_state_dict(state)
        if self.rank == 0:
            truncate_log(Path(self.config.output) / ROLLOUTS_FILE, self.steps_done)

    def save(self, folder: Path) -> None:
        """Write stage 1's adapter and this one as one adapter of the original base, and its contract."""
        self.saved.model = self.policy.saved_model
        embeds = self.checkpoint.documents
        documents = None if embeds is None else (embeds.name, embeds.source)
        checkpoints.save_adapter(
            self.saved, self.checkpoint.contract, folder, documents, self.checkpoint.query_normalizer
        )


def load_stage_one(name: str) -> tuple[Checkpoint, Path]:
    """A stage 1 adapter merged into its base in float32, and its folder.

    Raises:
        InputError: no adapter of that name, or one without a contract.
    """
    folder = resolve(name)
    record = checkpoints.read_record(folder)
    if record is None:
        raise InputError(
            f"{name} has no contract ({checkpoints.CONTRACT_FILE}), so it is not a stage 1 adapter; give the `adapter` "
            "folder of a run of search-r3 train sft"
        )
    if record["kind"] not in checkpoints.ADAPTER_KINDS:
        raise InputError(f"{name} is a {record['kind']} model; give the stage 1 adapter that it was made from")
    return checkpoints.load(name, dtype=torch.float32), folder


def train_grpo(recipe: str | Path, overrides: Sequence[str] = (), resume: bool = True) -> Path:
    """Train stage 2 from a YAML recipe; returns the adapter's folder, with golden vectors.

    Raises:
        InputError: the recipe, the adapter, the queries, the corpus or the disk has a problem.
    """
    config = load_config(recipe, GRPOConfig, overrides)
    start_processes()
    checkpoint, first = load_stage_one(config.adapter)
    dev_queries = {text for pool in load_dev_pools(config) for text in pool.queries.values()}
    dataset = load_rl_dataset(config, dev_queries)
    checkpoint.model.set_attn_implementation(resolve_attention(config.attention))
    torch.manual_seed(config.loop.seed)  # for the initialization of the new adapter
    task = GRPOTask(config, checkpoint, first, dataset)
    return train_stage(
        task,
        config,
        resume=resume,
        best_metric="ndcg@10.on" if config.dev else ("live.reward" if dataset.held_out else None),
        ignored=("output", "data_root", "queries", "corpus", "loop", "activation_checkpointing", "mini_batch_size",
                 "adapter", "shard_corpus"),
        identity={
            "dataset_sha256": dataset.sha256,
            "adapter_contract": checkpoint.contract.hash,
            "trained_on": [source.trained_on for source in config.queries],
        },
    )  # fmt: skip

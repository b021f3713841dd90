"""A stage 2 recipe: every key of `search-r3 train grpo`, its meaning and its default."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from search_r3.environment.environment_config import EnvironmentConfig
from search_r3.errors import InputError
from search_r3.model.engines.registry import training_engine
from search_r3.training.config import LoopConfig, LoraSettings
from search_r3.training.grpo.policy_gradient import AdvantageEstimator, LossType, ScaleRewards


@dataclass
class Source:
    """Documents of the environment: from one of the two."""

    beir: str | None = None
    """A BEIR data set: a name below the data root, or a folder."""
    pairs: str | None = None
    """A JSONL file of training pairs: their positives and negatives."""

    def __post_init__(self) -> None:
        if (self.beir is None) == (self.pairs is None):
            raise InputError("a source is either beir: NAME or pairs: FILE; give one of them")

    @property
    def name(self) -> str:
        """Its name in messages."""
        return str(self.beir or self.pairs)


@dataclass
class QuerySet(Source):
    """Queries with known answers to train on."""

    split: str = "train"
    """The split of a BEIR set; only training splits are taken."""
    hold_out_modulus: int = 0
    """Hold out every so many-th query, for evaluation only: int(id) % modulus == 0 of a BEIR set (scifact: 8), a hash
    of the query of pairs; 0 holds out none."""
    limit: int | None = None
    """The most training queries, chosen by a hash of their ids."""

    @property
    def trained_on(self) -> dict[str, str]:
        """Its entry in a model card: {"dataset", "split"} of a BEIR set, {"pairs"} of a file (its name alone)."""
        return {"dataset": Path(self.beir).name, "split": self.split} if self.beir else {"pairs": Path(self.name).name}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.split.startswith("train"):
            raise InputError(f"split {self.split!r} of {self.name}: only training splits may be trained on")
        if self.hold_out_modulus < 0 or self.hold_out_modulus == 1:
            raise InputError(f"hold_out_modulus must be 0, or 2 or more, not {self.hold_out_modulus}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit must be 1 or more, not {self.limit}")


@dataclass
class GRPOConfig:
    """A stage 2 recipe."""

    adapter: str
    """The stage 1 adapter to start from: a name in `models/` or a folder. It is also the reference policy."""
    queries: list[QuerySet]
    """The queries to train on."""
    corpus: list[Source]
    """The environment's documents; every query's positives must be among them."""
    output: str
    """The run's folder: log, rollouts, checkpoints, and at the end `adapter/`."""
    max_documents: int | None = None
    """The most documents of the environment: the positives of all queries, then others chosen by a hash."""
    min_positive_rank: int = 1
    """Train only on queries whose direct embedding, when the run begins, ranks its best positive here or deeper: 2
    leaves out the queries that need no reasoning, whose rollouts differ in cosine alone."""
    max_positive_rank: int | None = None
    """And only on those that rank it here or higher: a positive that lies far deeper is rarely found by any rollout."""
    queries_per_step: int = 8
    """Queries of a batch, over all processes."""
    num_generations: int = 8
    """Rollouts for each query: the group that advantages compare (TRL's key)."""
    max_reasoning_tokens: int = 32
    """The longest reasoning trace, in tokens; the embed token comes on top."""
    min_reasoning_tokens: int = 0
    """A shorter trace earns the reward of a missing embed token. Where reasoning adds little, the policy otherwise
    learns to write what the direct conversation says ("The embedding is") and nothing else."""
    max_query_tokens: int = 48
    """Tokens kept of a query."""
    max_document_tokens: int = 128
    """Tokens kept of a document."""
    temperature: float = 1.0
    """Of sampling, and so of the policy whose log-probabilities are trained."""
    engine: str = "torch"
    """The engine that samples: torch, or vllm, which needs a GPU and the extra of that name; or another package's."""
    generation_batch_size: int = 64
    """Rollouts that the torch engine generates at once."""
    loss_type: LossType = "dapo"
    """How tokens are averaged: over each rollout first ("grpo"), all alike ("dapo"), or by a constant ("dr_grpo")."""
    advantage_estimator: AdvantageEstimator = "grpo"
    """The baseline subtracted from a reward: the mean of its group ("grpo"), or of the group's others ("rloo")."""
    scale_rewards: ScaleRewards = "group"
    """Divide advantages by the standard deviation of the group ("group") or not ("none", as Dr. GRPO does)."""
    epsilon_low: float = 0.2
    """The ratio is clipped below 1 - this."""
    epsilon_high: float = 0.28
    """The ratio is clipped above 1 + this: higher, so that rare good tokens may grow (DAPO's clip-higher)."""
    beta: float = 0.02
    """Weight of the KL to the stage 1 policy; 0 saves the reference's forward pass."""
    unbiased_kl: bool = False
    """Multiply the KL estimate by the ratio, for an unbiased gradient (arXiv 2512.02556)."""
    num_iterations: int = 1
    """Passes over a batch of rollouts. The ratio leaves 1 from the second optimizer step of a batch on."""
    num_mini_batches: int = 1
    """Optimizer steps of a pass; `loop.steps` counts optimizer steps."""
    zero_variance: Literal["keep", "drop", "resample"] = "drop"
    """Groups whose rewards are all equal: kept with an advantage of 0, left out of the policy loss and the KL, or
    replaced by groups of other queries for at most `max_resample_rounds` rounds, then left out."""
    max_resample_rounds: int = 2
    """Further rounds of sampling for zero_variance: resample."""
    contrastive_weight: float = 0.1
    """Weight of InfoNCE between the rollouts' embeddings and the documents refreshed at this step; 0 leaves it out."""
    contrastive_temperature: float = 0.03
    """InfoNCE's temperature."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    """Rewards, their shaping, and which documents are re-encoded."""
    corpus_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the corpus's matrix; "auto" is float32 on a CPU, bfloat16 on a GPU."""
    shard_corpus: bool = False
    """Over several processes, each holds a slice of the matrix instead of all of it: for millions of documents."""
    staleness_eval_every: int = 25
    """Steps between two evaluations of how stale the corpus is, on held-out queries; 0 never evaluates it."""
    staleness_eval_queries: int = 64
    """Held-out queries of the staleness evaluation and of the dev reward."""
    staleness_eval_rows: int = 1000
    """Random documents that the staleness evaluation re-encodes, beside its queries' live top 100."""
    dev: list[str] = field(default_factory=lambda: ["cosqa", "scifact"])
    """Dev pools whose mean nDCG@10 with reasoning chooses the best adapter; without any, the dev reward does."""
    data_root: str | None = None
    """The folder of the data sets; by default SEARCH_R3_DATA."""
    dev_queries: int = 100
    """Queries of each dev pool."""
    dev_documents: int = 400
    """Documents of each dev pool."""
    num_completions_to_log: int = 8
    """Rollouts written to rollouts.jsonl each time, and dev queries whose reasoning is written at each evaluation."""
    log_completions_every: int = 10
    """Steps between two writings of training rollouts to rollouts.jsonl; 0 writes none."""
    mini_batch_size: int = 32
    """Rows of one backbone call."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass, one mini-batch at a time: memory for one, a third more work."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """"auto": eager on a CPU (its fused backward pass is slower there), sdpa on a GPU."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The new adapter on top of stage 1's; saved with it as one, whose rank is the sum."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(learning_rate=2e-5))
    """The training loop."""

    @property
    def steps_per_generation(self) -> int:
        """Optimizer steps that one batch of rollouts serves (TRL's name)."""
        return self.num_iterations * self.num_mini_batches

    def __post_init__(self) -> None:
        if not self.queries:
            raise InputError("queries is empty: name at least one set to train on")
        training_engine(self.engine)
        if not self.corpus:
            raise InputError("corpus is empty: name the documents that queries are to find")
        if self.num_generations < 2:
            raise InputError(
                f"num_generations must be 2 or more, not {self.num_generations}: an advantage compares the rollouts of "
                "a group"
            )
        for name in _COUNTS:
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in _COUNTS_OR_NONE:
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("temperature", "contrastive_temperature", "epsilon_low", "epsilon_high"):
            self._require(name, math.isfinite(getattr(self, name)) and getattr(self, name) > 0, "above 0")
        for name in ("beta", "contrastive_weight"):
            self._require(name, math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, "0 or more")
        self._require("epsilon_low", self.epsilon_low <= 1, "at most 1", ": a ratio is never below 0")
        self._require("max_documents", self.max_documents is None or self.max_documents >= 2, "2 or more")
        self._check_together()

    def _check_together(self) -> None:
        """The limits that keys set for each other."""
        deepest, budget = self.max_positive_rank, self.max_reasoning_tokens
        least = f"min_positive_rank ({self.min_positive_rank}) or more"
        self._require("max_positive_rank", deepest is None or deepest >= self.min_positive_rank, least)
        at_most = f"at most max_reasoning_tokens ({budget})"
        self._require("min_reasoning_tokens", self.min_reasoning_tokens <= budget, at_most)
        rollouts = self.queries_per_step * self.num_generations
        self._require("num_mini_batches", self.num_mini_batches <= rollouts, "at most the rollouts of a step")
        if self.lora.dropout:
            raise InputError(f"lora.dropout must be 0, not {self.lora.dropout}: the first ratio of a batch must be 1")
        if self.loop.gradient_accumulation != 1:
            raise InputError("loop.gradient_accumulation must be 1: use activation_checkpointing to save memory")
        if self.environment.length_weight and self.environment.length_free >= budget:
            raise InputError(
                f"environment.length_free must be below max_reasoning_tokens ({budget}), "
                f"not {self.environment.length_free}"
            )

    def _require(self, name: str, holds: bool, expected: str, why: str = "") -> None:
        if not holds:
            raise InputError(f"{name} must be {expected}, not {getattr(self, name)}{why}")


_COUNTS = (
    "min_positive_rank", "queries_per_step", "max_reasoning_tokens", "max_query_tokens", "max_document_tokens",
    "num_iterations", "num_mini_batches", "generation_batch_size", "mini_batch_size", "staleness_eval_queries",
    "dev_queries", "dev_documents",
)  # fmt: skip
_COUNTS_OR_NONE = (
    "min_reasoning_tokens", "max_resample_rounds", "staleness_eval_every", "staleness_eval_rows",
    "num_completions_to_log", "log_completions_every",
)  # fmt: skip

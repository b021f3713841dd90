"""A stage 2 recipe: every key of `search-r3 train grpo`, its meaning and its default."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from search_r3.config import at_least, require
from search_r3.environment.environment_config import EnvironmentConfig
from search_r3.errors import InputError
from search_r3.model.engines.registry import training_engine
from search_r3.training.config import LoopConfig, LoraSettings
from search_r3.training.grpo.policy_gradient import AdvantageEstimator, LossType, ScaleRewards


@dataclass
class Source:
    """Documents of the environment, from a BEIR data set or from a file of training pairs."""

    beir: str | None = None
    """A BEIR data set: a name below the data root, or a folder."""
    pairs: str | None = None
    """A JSONL file of training pairs, whose positives and negatives are the documents."""

    def __post_init__(self) -> None:
        if (self.beir is None) == (self.pairs is None):
            raise InputError("a source is either beir: NAME or pairs: FILE; give exactly one of them")

    @property
    def name(self) -> str:
        """Its name in messages."""
        return str(self.beir or self.pairs)


@dataclass
class QuerySet(Source):
    """Queries with known answers to train on."""

    split: str = "train"
    """The split of a BEIR set; only training splits are accepted."""
    hold_out_modulus: int = 0
    """Hold out every n-th query for evaluation: in a BEIR set, those that `hold_out` chooses; of pairs, those whose
    query's hash is divisible by n. 0 holds out none."""
    hold_out: Literal["number", "crc32"] = "number"
    """How queries of a BEIR set are held out: int(id) % n == 0 ("number"; scifact: 8), or the CRC-32 of the id, which
    holds out the dev queries of hotpotqa_more, entailmentbank and strategyqa with n = 8."""
    limit: int | None = None
    """Maximum number of training queries, chosen by a hash of their ids."""

    @property
    def trained_on(self) -> dict[str, str]:
        """Its entry in a model card: {"dataset", "split"} for a BEIR set, {"pairs"} with the file's name for a file."""
        return {"dataset": Path(self.beir).name, "split": self.split} if self.beir else {"pairs": Path(self.name).name}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.split.startswith("train"):
            raise InputError(f"split {self.split!r} of {self.name}: only training splits may be trained on")
        modulus = self.hold_out_modulus
        require(modulus == 0 or modulus >= 2, "hold_out_modulus", modulus, "0, or 2 or more")
        at_least(self, limit=1)


@dataclass
class GRPOConfig:
    """A stage 2 recipe."""

    adapter: str
    """The stage 1 adapter to start from, a name in `models/` or a folder. It is also the reference policy. From a query
    adapter, a query adapter is trained: documents are encoded once, and never refreshed."""
    queries: list[QuerySet]
    """The queries to train on."""
    corpus: list[Source]
    """The environment's documents; every query's positives must be among them."""
    output: str
    """The run's folder: log, rollouts, checkpoints, and at the end `adapter/`."""
    max_documents: int | None = None
    """Maximum number of documents: the positives of all queries, then others chosen by a hash."""
    min_positive_rank: int = 1
    """Train only on queries whose direct embedding, at the start of the run, ranks the best positive at this rank or
    lower. 2 leaves out queries that need no reasoning, whose rollouts differ only in their cosines."""
    max_positive_rank: int | None = None
    """Train only on queries that rank it at this rank or higher: rollouts rarely find a positive that ranks far
    lower."""
    queries_per_step: int = 8
    """Queries per batch of rollouts, over all processes."""
    num_generations: int = 8
    """Rollouts per query: the group within which advantages are computed (TRL's key)."""
    max_reasoning_tokens: int = 32
    """Maximum length of a reasoning trace in tokens, without the embed token."""
    reading_ratio: float = 0.0
    """Fraction of the queries whose rollouts first read the hits of a direct search in the live corpus, as many as the
    adapter was trained to read in stage 1. The reward of the direct embedding, with which the rollouts' is compared,
    reads nothing."""
    min_reasoning_tokens: int = 0
    """A shorter trace gets the reward for a missing embed token. Otherwise, where reasoning adds little, the policy
    learns to write only what the direct conversation says ("The embedding is")."""
    max_query_tokens: int = 48
    """Queries are truncated to this many tokens."""
    max_document_tokens: int = 128
    """Documents are truncated to this many tokens."""
    temperature: float = 1.0
    """Sampling temperature, and that of the policy whose log-probabilities are trained."""
    engine: str = "torch"
    """The engine that samples: torch, vllm (which needs a GPU and the extra of that name), or an engine of a plugin."""
    generation_batch_size: int = 64
    """Number of rollouts that the torch engine generates at once."""
    loss_type: LossType = "dapo"
    """How the loss is averaged over tokens: first over each rollout ("grpo"), over all tokens equally ("dapo"), or
    divided by a constant ("dr_grpo")."""
    advantage_estimator: AdvantageEstimator = "grpo"
    """The baseline subtracted from a reward: the mean of its group ("grpo"), or of the other rollouts of the group
    ("rloo")."""
    scale_rewards: ScaleRewards = "group"
    """Divide advantages by the standard deviation of the group ("group") or not ("none", as Dr. GRPO does)."""
    epsilon_low: float = 0.2
    """Lower clip bound: the ratio is clipped at 1 - epsilon_low."""
    epsilon_high: float = 0.28
    """Upper clip bound: the ratio is clipped at 1 + epsilon_high. Larger than epsilon_low, so that rare good tokens can
    become likelier (DAPO's clip-higher)."""
    beta: float = 0.02
    """Weight of the KL to the stage 1 policy; 0 skips the reference's forward pass."""
    unbiased_kl: bool = False
    """Multiply the KL estimate by the ratio, for an unbiased gradient (arXiv 2512.02556)."""
    entropy_floor: float = 0.0
    """Mean entropy of the policy, in nats per sampled token, below which the loss pulls it up; 0 turns it off. Against
    a policy that always writes the same, so that the rewards of its groups no longer differ."""
    entropy_weight: float = 0.1
    """Weight in the loss of what the entropy lacks to `entropy_floor`."""
    num_iterations: int = 1
    """Passes over a batch of rollouts. From the second optimizer step of a batch on, the ratio differs from 1."""
    num_mini_batches: int = 1
    """Parts into which a pass splits the batch of rollouts, with one optimizer step each (PPO's mini-batches; not the
    rows of `mini_batch_size`). `loop.steps` counts optimizer steps."""
    zero_variance: Literal["keep", "drop", "resample", "replay"] = "drop"
    """What happens to groups whose rewards are all equal: "keep" trains on them with an advantage of 0; "drop" leaves
    them out of the policy loss and the KL; "resample" replaces them by groups of other queries, in at most
    `max_resample_rounds` rounds, and drops the rest; "replay" replaces them by earlier groups, each at most once."""
    max_resample_rounds: int = 2
    """Maximum number of additional sampling rounds for zero_variance: resample."""
    replay_buffer: int = 32
    """Number of the newest groups with variance that zero_variance: replay can draw from, on each process; it prefers
    those whose rewards differ most."""
    contrastive_weight: float = 0.1
    """Weight of InfoNCE between the rollouts' embeddings and the documents refreshed at this step; 0 turns it off."""
    contrastive_temperature: float = 0.03
    """Temperature of InfoNCE."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    """Rewards, their shaping, and which documents are re-encoded."""
    corpus_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the corpus's matrix; "auto" is float32 on a CPU, bfloat16 on a GPU."""
    shard_corpus: bool = False
    """With several processes, keep one slice of the matrix on each instead of a copy: for millions of documents."""
    staleness_eval_every: int = 25
    """Steps between two staleness evaluations of the corpus, on held-out queries; 0 never evaluates it."""
    staleness_eval_queries: int = 64
    """Number of held-out queries used for the staleness evaluation and the dev reward."""
    staleness_eval_rows: int = 1000
    """Random documents that the staleness evaluation re-encodes, in addition to its queries' live top 100."""
    dev: list[str] = field(default_factory=lambda: ["cosqa", "scifact"])
    """Dev pools whose mean nDCG@10 with reasoning chooses the best adapter; without dev pools, the dev reward does. See
    stage 1 for their names."""
    data_root: str | None = None
    """The folder of the data sets; by default, the environment variable SEARCH_R3_DATA."""
    dev_queries: int = 100
    """Queries of each dev pool."""
    dev_documents: int = 400
    """Documents of each dev pool."""
    num_completions_to_log: int = 8
    """Number of rollouts written to rollouts.jsonl each time, and of dev traces written at each evaluation."""
    log_completions_every: int = 10
    """Write training rollouts to rollouts.jsonl every this many steps; 0 writes none."""
    mini_batch_size: int = 32
    """Rows per forward pass of the backbone; it affects memory and speed, not the loss."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass, one mini-batch at a time: less memory for a third more
    computation."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """"auto": eager on a CPU (its fused backward pass is slower there), sdpa on a GPU."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The new adapter, trained on top of stage 1's; the two are saved as one adapter whose rank is the sum."""
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
        per_query = self.num_generations
        require(per_query >= 2, "num_generations", per_query, "2 or more", ": advantages compare a group's rollouts")
        at_least(
            self, min_positive_rank=1, queries_per_step=1, max_reasoning_tokens=1, max_query_tokens=1,
            max_document_tokens=1, num_iterations=1, num_mini_batches=1, generation_batch_size=1, mini_batch_size=1,
            staleness_eval_queries=1, dev_queries=1, dev_documents=1, min_reasoning_tokens=0, max_resample_rounds=0,
            staleness_eval_every=0, staleness_eval_rows=0, num_completions_to_log=0, log_completions_every=0,
            beta=0, contrastive_weight=0, max_documents=2, entropy_floor=0, entropy_weight=0,
            replay_buffer=1,
        )  # fmt: skip
        require(0 <= self.reading_ratio <= 1, "reading_ratio", self.reading_ratio, "from 0 to 1")
        for name in ("temperature", "contrastive_temperature", "epsilon_low", "epsilon_high"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0")
        require(self.epsilon_low <= 1, "epsilon_low", self.epsilon_low, "at most 1", ": a ratio is never below 0")
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Check keys against each other."""
        lowest, budget = self.max_positive_rank, self.max_reasoning_tokens
        expected = f"min_positive_rank ({self.min_positive_rank}) or more"
        require(lowest is None or lowest >= self.min_positive_rank, "max_positive_rank", lowest, expected)
        expected = f"at most max_reasoning_tokens ({budget})"
        require(self.min_reasoning_tokens <= budget, "min_reasoning_tokens", self.min_reasoning_tokens, expected)
        rollouts, parts = self.queries_per_step * self.num_generations, self.num_mini_batches
        require(parts <= rollouts, "num_mini_batches", parts, f"at most the {rollouts} rollouts of a batch")
        dropout = self.lora.dropout
        require(not dropout, "lora.dropout", dropout, "0", ": the first ratio of a batch must be 1")
        accumulation = self.loop.gradient_accumulation
        why = "; use activation_checkpointing to save memory"
        require(accumulation == 1, "loop.gradient_accumulation", accumulation, "1", why)
        free = self.environment.length_free
        fits = not self.environment.length_weight or free < budget
        require(fits, "environment.length_free", free, f"below max_reasoning_tokens ({budget})")

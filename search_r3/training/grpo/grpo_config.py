"""A stage 2 recipe: every key that `search-r3 train grpo` knows, with what it means and its default."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from search_r3.environment.retrieval import EnvironmentConfig
from search_r3.errors import InputError
from search_r3.training.config import LoopConfig, LoraSettings
from search_r3.training.grpo.policy_gradient import AdvantageKind, LossType


@dataclass
class Source:
    """Documents of the environment: one of the two."""

    beir: str | None = None
    """A BEIR data set: a name below the data root, or a folder."""
    pairs: str | None = None
    """A JSONL file of training pairs: their positives and negatives."""

    def __post_init__(self) -> None:
        if (self.beir is None) == (self.pairs is None):
            raise InputError("a source is either beir: NAME or pairs: FILE; give one of them")

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return str(self.beir or self.pairs)


@dataclass
class QuerySet(Source):
    """Queries with known answers to train on."""

    split: str = "train"
    """The split of a BEIR set; only training splits are taken."""
    hold_out_modulus: int = 0
    """Every so many-th query is never trained on and serves as dev: int(id) % modulus == 0 of a BEIR set (scifact: 8),
    a hash of the query of pairs; 0 holds out none."""
    limit: int | None = None
    """Only so many training queries, drawn by a hash of their ids."""

    @property
    def trained_on(self) -> dict[str, str]:
        """What a model card says of it: {"dataset", "split"} of a BEIR set, {"pairs"} of a file (its name alone)."""
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
    """The stage 1 adapter to start from: a name in `models/` or a folder; it is also the reference."""
    queries: list[QuerySet]
    """What is trained on."""
    corpus: list[Source]
    """The environment's documents; every query's positives must be among them."""
    output: str
    """The run's folder: log, rollouts, checkpoints, and at the end `adapter/`."""
    max_documents: int | None = None
    """Documents of the environment, at most: the positives of all queries, then others drawn by a hash."""
    from_rank: int = 1
    """Only queries whose direct embedding finds its best positive at this rank or deeper when the run begins are
    trained on: 2 leaves out those that need no reasoning, whose rollouts differ in cosine alone."""
    to_rank: int | None = None
    """And at this rank or higher: what lies far deeper is rarely found by any rollout."""
    queries_per_step: int = 8
    """Queries of a batch, which all processes share."""
    group_size: int = 8
    """Rollouts of a query."""
    max_reasoning_tokens: int = 32
    """The longest analysis; the embed token comes on top."""
    min_reasoning_tokens: int = 0
    """A shorter one is no analysis and earns what a missing token earns: where analyses add little, the policy
    otherwise learns to say what the direct conversation says ("The embedding is") and nothing else."""
    max_query_tokens: int = 48
    """Tokens kept of a query."""
    max_document_tokens: int = 128
    """Tokens kept of a document."""
    temperature: float = 1.0
    """Of sampling, and so of the policy whose log-probabilities are trained."""
    engine: Literal["torch", "vllm"] = "torch"
    """Who samples. vllm needs a GPU and the extra of that name."""
    rollouts_per_batch: int = 64
    """Rollouts that the torch engine writes side by side."""
    loss_type: LossType = "dapo"
    """How tokens are averaged: over each rollout first ("grpo"), all alike ("dapo"), or by a constant ("dr_grpo")."""
    advantage: AdvantageKind = "standard"
    """What a group's rewards become: standardised, centred ("dr_grpo"), or against the others ("leave_one_out")."""
    epsilon_low: float = 0.2
    """The ratio is cut below 1 - this."""
    epsilon_high: float = 0.28
    """The ratio is cut above 1 + this: higher, so that rare good tokens may grow (DAPO's clip-higher)."""
    beta: float = 0.02
    """Weight of the KL to the stage 1 policy; 0 saves the reference's forward pass."""
    unbiased_kl: bool = False
    """Multiply the KL estimate by the ratio, for an unbiased gradient (arXiv 2512.02556)."""
    epochs: int = 1
    """Passes over a batch of rollouts. The ratio leaves 1 from the second optimiser step of a batch on."""
    minibatches: int = 1
    """Optimiser steps of a pass; `loop.steps` counts optimiser steps."""
    zero_variance: Literal["keep", "drop", "resample"] = "drop"
    """Groups whose rewards are all equal: kept with an advantage of 0, left out of the policy loss and the KL, or
    replaced by other queries' groups as long as `resamples` lasts, then left out."""
    resamples: int = 2
    """Further rounds of sampling for zero_variance: resample."""
    contrastive_weight: float = 0.1
    """Weight of InfoNCE between the rollouts' embeddings and the documents refreshed at this step; 0 leaves it out."""
    contrastive_temperature: float = 0.03
    """InfoNCE's tau."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    """Reward, shaping, and which documents are re-encoded."""
    corpus_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the corpus's matrix; "auto" is float32 on a CPU, bfloat16 on a GPU."""
    shard_corpus: bool = False
    """Over several processes, each holds a slice of the matrix instead of all of it: for millions of documents."""
    gauge_every: int = 25
    """Steps between two measures of how stale the corpus is, on held-out queries; 0 never measures."""
    gauge_queries: int = 64
    """Held-out queries of the gauge and of the dev reward."""
    gauge_rows: int = 1000
    """Random documents that the gauge re-encodes, beside its queries' live top 100."""
    dev: list[str] = field(default_factory=lambda: ["cosqa", "scifact"])
    """Dev pools that choose the best adapter, by their mean nDCG@10 with reasoning; none: by the dev reward."""
    data_root: str | None = None
    """Where the data sets stand; SEARCH_R3_DATA otherwise."""
    dev_queries: int = 100
    """Queries of each dev pool."""
    dev_documents: int = 400
    """Documents of each dev pool."""
    samples: int = 8
    """Rollouts written to rollouts.jsonl each time, and dev queries whose analysis is written before, during, after."""
    samples_every: int = 10
    """Steps between two samples of training rollouts; 0 writes none."""
    mini_batch_size: int = 32
    """Rows of one backbone call."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass, a chunk at a time: memory for one chunk, a third more work."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """"auto": eager on a CPU (its fused backward pass is slower there), sdpa on a GPU."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The new adapter on top of stage 1's; saved with it as one, whose rank is the sum."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(learning_rate=2e-5))
    """The training loop."""

    @property
    def steps_per_round(self) -> int:
        """Optimiser steps that one batch of rollouts serves."""
        return self.epochs * self.minibatches

    def __post_init__(self) -> None:
        if not self.queries:
            raise InputError("queries is empty: name at least one set to train on")
        if not self.corpus:
            raise InputError("corpus is empty: name the documents that queries are to find")
        if self.group_size < 2:
            raise InputError(f"group_size must be 2 or more, not {self.group_size}: a rollout is judged by its group")
        at_least = dict.fromkeys(
            ("from_rank", "queries_per_step", "max_reasoning_tokens", "max_query_tokens", "max_document_tokens",
             "epochs", "minibatches", "rollouts_per_batch", "mini_batch_size", "gauge_queries", "dev_queries",
             "dev_documents"), 1
        )  # fmt: skip
        none_at_least = ("min_reasoning_tokens", "resamples", "gauge_every", "gauge_rows", "samples", "samples_every")
        at_least |= dict.fromkeys(none_at_least, 0)
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} must be {least} or more, not {getattr(self, name)}")
        if self.min_reasoning_tokens > self.max_reasoning_tokens:
            raise InputError(
                f"min_reasoning_tokens must be at most max_reasoning_tokens ({self.max_reasoning_tokens}), "
                f"not {self.min_reasoning_tokens}"
            )
        if self.to_rank is not None and self.to_rank < self.from_rank:
            raise InputError(f"to_rank must be from_rank ({self.from_rank}) or more, not {self.to_rank}")
        if self.max_documents is not None and self.max_documents < 2:
            raise InputError(f"max_documents must be 2 or more, not {self.max_documents}")
        for name in ("temperature", "contrastive_temperature", "epsilon_low", "epsilon_high"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.epsilon_low > 1:
            raise InputError(f"epsilon_low must be at most 1, not {self.epsilon_low}: a ratio is never below 0")
        for name in ("beta", "contrastive_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.minibatches > self.queries_per_step * self.group_size:
            raise InputError(f"minibatches must be at most the rollouts of a step, not {self.minibatches}")
        if self.lora.dropout:
            raise InputError(f"lora.dropout must be 0, not {self.lora.dropout}: the first ratio of a batch must be 1")
        if self.loop.gradient_accumulation != 1:
            raise InputError("loop.gradient_accumulation must be 1: activation_checkpointing saves memory here")
        if self.environment.length_weight and self.environment.length_free >= self.max_reasoning_tokens:
            raise InputError(
                f"environment.length_free must be below max_reasoning_tokens ({self.max_reasoning_tokens}), "
                f"not {self.environment.length_free}"
            )

"""The formulas behind docs/scale.md: what a corpus, a model and a price make in GPU-hours, bytes and money.

Every number that goes in is a field of `Plan`, with what it is and whether it was measured here or is assumed. A matrix
of N parameters costs 2 N floating-point operations for each token forward (Kaplan et al. 2020, arXiv 2001.08361, 2.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from search_r3.errors import InputError

HOUR, TB, GB = 3600.0, 1e12, 1e9


@dataclass(frozen=True)
class Model:
    """A decoder's sizes, as its config.json has them."""

    layers: int
    hidden: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def matrices(self) -> int:
        """N: parameters that a token is multiplied with, without embeddings and head: no logits are needed."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.width)

    @property
    def parameters(self) -> int:
        """All parameters but norms and biases."""
        return self.matrices + (1 if self.tied else 2) * self.vocabulary * self.hidden

    def forward(self, tokens: float, length: float) -> float:
        """FLOPs of `tokens` tokens in rows of `length`: 2 N each, and attention over half of the row on average."""
        return tokens * (2 * self.matrices + 4 * self.layers * self.heads * self.head_size * length / 2)


MODELS = {
    "smollm2-135m": Model(30, 576, 1536, 9, 3, 64, 49_152, True),
    "qwen2.5-1.5b": Model(28, 1536, 8960, 12, 2, 128, 151_936, True),
    "qwen2.5-7b": Model(28, 3584, 18_944, 28, 4, 128, 152_064, False),
}


@dataclass(frozen=True)
class Plan:
    """What goes in. "Assumed": put in your own; "measured": by a benchmark of this repository."""

    model: str = "qwen2.5-7b"
    """One of MODELS."""
    documents: float = 100e6
    """How many (the question)."""
    chunks_per_document: float = 1.0
    """Assumed: records of at most 320 words stay whole; long documents give more."""
    tokens: float = 200.0
    """Of a chunk. Assumed; the mean of SciFact is 265, of CoSQA's code 74 (results/benchmarks/encode.json)."""
    prompt_tokens: float = 10.0
    """Behind each text, up to the embed token. The prefix before it is the same for all and is run once."""
    text_bytes: float = 900.0
    """Of a chunk: assumed 4.5 bytes a token."""
    gpus: int = 64
    """For encoding (the question)."""
    peak_tflops: float = 989.0
    """Of a GPU, dense bf16: NVIDIA's figure for an H100 SXM."""
    mfu: float = 0.4
    """Share of the peak that a forward pass reaches. Assumed: we have measured no GPU."""
    bandwidth_tb: float = 3.35
    """Of a GPU's memory, TB/s: NVIDIA's figure for an H100 SXM."""
    bandwidth_share: float = 0.6
    """Share of it that decoding reaches. Assumed."""
    gpu_dollars_hour: float = 3.0
    """Of one H100, rented. Assumed, November 2026."""
    storage_dollars_tb_month: float = 23.0
    """S3 Standard, list price of us-east-1. Assumed, November 2026."""
    read_documents_second: float = 10_000.0
    """That the driver reads, cuts, hashes and spools, on one core. Assumed; without the spool 22,000 were measured."""
    stored_share: float = 0.72
    """Bytes of a row beside its vector for each byte of text, which is compressed. Measured."""
    index_share: float = 0.22
    """Bytes of the full-text index for each byte of text. Measured."""
    cpu_tflops: float = 0.5
    """Of the machine that builds the approximate index, float32. Assumed: 16 cores."""
    query_tokens: float = 100.0
    """Of a query with its conversation. Assumed."""
    reasoning_tokens: float = 32.0
    """Tokens of reasoning for a query: the default budget."""
    query_batch: int = 32
    """Queries decoded together by the server. Assumed."""
    train_gpus: int = 8
    """For both stages."""
    train_mfu: float = 0.3
    """Assumed: small matrices of LoRA and rows of unequal length cost."""
    sft_steps: int = 800
    """configs/sft/qwen2.5-7b.yaml on 8 GPUs."""
    sft_pairs: int = 512
    """Of a step, all GPUs together: the same recipe."""
    sft_pair_tokens: float = 500.0
    """Of a query, a positive and a negative, their conversations with them. Assumed."""
    grpo_steps: int = 1000
    """configs/grpo/qwen2.5-7b.yaml."""
    grpo_queries: int = 64
    """Of a step, all GPUs together: the same recipe."""
    grpo_group: int = 8
    """Rollouts of a query: the same recipe."""
    grpo_rollout_tokens: float = 150.0
    """Query, conversation and reasoning. Assumed."""
    grpo_new_tokens: float = 48.0
    """Sampled: the same recipe."""
    grpo_refreshed: int = 256
    """Documents encoded again at each step: the same recipe."""

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise InputError(f'model is "{self.model}"; choose one of: {", ".join(MODELS)}')
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "model" and not (math.isfinite(value) and value > 0):
                raise InputError(f"{field.name} is {value}; it must be a number above 0")
        for name in ("mfu", "bandwidth_share", "train_mfu"):
            if getattr(self, name) > 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share, at most 1")

    @property
    def chunks(self) -> float:
        """Rows of the table."""
        return self.documents * self.chunks_per_document

    @property
    def sizes(self) -> Model:
        """The model's."""
        return MODELS[self.model]


def encoding(plan: Plan) -> dict[str, float]:
    """FLOPs, GPU-hours, hours and dollars of embedding the corpus, and what reading it takes."""
    length = plan.tokens + plan.prompt_tokens
    flops = plan.sizes.forward(plan.chunks * length, length)
    gpu_hours = flops / (plan.peak_tflops * 1e12 * plan.mfu) / HOUR
    return {
        "flops": flops,
        "gpu_hours": gpu_hours,
        "hours": gpu_hours / plan.gpus,
        "dollars": gpu_hours * plan.gpu_dollars_hour,
        "chunks_per_gpu_second": plan.chunks / (gpu_hours * HOUR),
        "read_hours": plan.documents / plan.read_documents_second / HOUR,
    }


def vectors(plan: Plan) -> dict[str, float]:
    """Bytes of all vectors, by how they are kept."""
    dimension = plan.sizes.hidden
    each = {
        "float32": 4 * dimension,
        "bfloat16": 2 * dimension,
        "int8": dimension + 4,  # and a scale
        "PQ, one byte for 8 dimensions": dimension / 8,
        "RaBitQ, one bit a dimension": dimension / 8 + 8,  # and two float32 factors
    }
    return {name: size * plan.chunks for name, size in each.items()}


def table(plan: Plan) -> dict[str, float]:
    """Bytes of the LanceDB table and what they cost a month. The table keeps float32."""
    parts = {
        "vectors, float32": vectors(plan)["float32"],
        "text, ids, hashes": plan.stored_share * plan.text_bytes * plan.chunks,
        "full-text index": plan.index_share * plan.text_bytes * plan.chunks,
        "approximate index": vectors(plan)["RaBitQ, one bit a dimension"],
    }
    total = sum(parts.values())
    return parts | {"total": total, "dollars_month": total / TB * plan.storage_dollars_tb_month}


def approximate(plan: Plan) -> dict[str, float]:
    """The approximate index: sqrt(rows) partitions, each row compared with every center once, in 2 D FLOPs."""
    partitions = round(math.sqrt(plan.chunks))
    flops = plan.chunks * partitions * 2 * plan.sizes.hidden
    return {"partitions": partitions, "flops": flops, "hours": flops / (plan.cpu_tflops * 1e12) / HOUR}


def serving(plan: Plan) -> dict[str, float]:
    """One GPU that reasons about queries: a prefill bound by FLOPs, then a step a token, bound by reading weights."""
    model, batch = plan.sizes, plan.query_batch
    prefill = model.forward(batch * plan.query_tokens, plan.query_tokens) / (plan.peak_tflops * 1e12 * plan.mfu)
    step = 2 * (model.parameters) / (plan.bandwidth_tb * 1e12 * plan.bandwidth_share)
    direct, reasoned = prefill + step, prefill + (plan.reasoning_tokens + 1) * step
    return {
        "weights_bytes": 2 * model.parameters,
        "direct_seconds": direct,
        "reasoned_seconds": reasoned,
        "direct_per_second": batch / direct,
        "reasoned_per_second": batch / reasoned,
        "dollars_per_million_reasoned": 1e6 / (batch / reasoned) / HOUR * plan.gpu_dollars_hour,
    }


SFT_PASSES = 4
"""Forward passes' worth of a step's tokens: once without gradients (the cache), once with, once back through the frozen
matrices (they need no gradients of their own), and once of the base for the KL."""
GRPO_PASSES = 3
"""The rollouts' forward pass, the one back, and the reference's."""


def training(plan: Plan) -> dict[str, dict[str, float]]:
    """Both stages: FLOPs of a step, hours and dollars. What is not FLOPs (loading, checkpoints, dev sets) is not in."""
    model, rate = plan.sizes, plan.peak_tflops * 1e12 * plan.train_mfu * plan.train_gpus
    pair = plan.sft_pair_tokens / 3
    sft = SFT_PASSES * model.forward(plan.sft_pairs * plan.sft_pair_tokens, pair)
    rollouts = plan.grpo_queries * plan.grpo_group
    judged = GRPO_PASSES * model.forward(rollouts * plan.grpo_rollout_tokens, plan.grpo_rollout_tokens)
    length = plan.tokens + plan.prompt_tokens
    refreshed = model.forward(plan.grpo_refreshed * length, length)
    sampling = plan.grpo_new_tokens * 2 * model.parameters / (plan.bandwidth_tb * 1e12 * plan.bandwidth_share)
    out = {
        "stage 1": {"flops": sft, "step_seconds": sft / rate, "steps": plan.sft_steps},
        "stage 2": {
            "flops": judged + refreshed,
            "step_seconds": (judged + refreshed) / rate + sampling,
            "steps": plan.grpo_steps,
        },
    }
    for stage in out.values():
        stage["hours"] = stage["step_seconds"] * stage["steps"] / HOUR
        stage["dollars"] = stage["hours"] * plan.train_gpus * plan.gpu_dollars_hour
    return out

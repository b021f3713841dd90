"""A stage 1 recipe: every key that `search-r3 train sft` knows, with what it means and its default."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from search_r3.errors import InputError
from search_r3.training.config import LoopConfig, LoraSettings


@dataclass
class LossWeights:
    """How much each term counts. The paper sums them unweighted; these are our choice (method.md, [O])."""

    sft: float = 0.1
    """Cross-entropy on the assistant's turn: the format, and where the token goes."""
    kl: float = 0.1
    """KL(tuned || base) on the same positions, without those that predict the embed token."""
    infonce: float = 1.0
    """In-batch contrastive loss with explicit hard negatives."""
    triplet: float = 0.0
    """Margin loss against the hardest candidate."""
    distil: float = 0.0
    """KL to a teacher's distribution over the candidates (needs `teacher`)."""

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if not value >= 0:
                raise InputError(f"weights.{name} must be 0 or more, not {value}")


@dataclass
class SFTConfig:
    """A stage 1 recipe."""

    pairs: list[str]
    """JSONL files of training pairs, as `search-r3 data build` writes them."""
    output: str
    """The run's folder: log, checkpoints, and at the end `adapter/`."""
    base: str = "smollm2-135m"
    """Base model: a bundled name, a folder, or a hub id."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen base; the adapter, the residual stream and the optimiser stay float32. bfloat16 is half the memory
    and no copies of matrices under bf16 autocast, which it needs; what a float32 base has beyond bf16 is lost."""
    start_from: str | None = None
    """An adapter to go on training from, instead of a new one."""
    pairs_per_step: int = 32
    """Pairs of a batch, which all processes share; each other pair's document is a negative."""
    negatives_per_pair: int = 0
    """Explicit hard negatives taken from each pair."""
    batch_of: Literal["source", "kind", "any", "topic"] = "source"
    """What a batch is drawn from, so that its negatives are alike and harder: one source ("docstrings:numpy"), one kind
    of source ("docstrings"), any pairs, or one topic of a kind by the teacher's rows (the hardest)."""
    topic_batches: int = 6
    """Batches that a topic holds at most."""
    source_weights: dict[str, float] = field(default_factory=dict)
    """How often an epoch goes through a source (a kind, if `batch_of` is kind or topic): 1.0 where none is given."""
    length_bucket: int = 1
    """Batches that are sorted by length together, so that less is padded; 1 leaves them in random order."""
    max_query_tokens: int = 48
    """Tokens kept of a query."""
    max_document_tokens: int = 128
    """Tokens kept of a document while training."""
    max_analysis_tokens: int = 32
    """Tokens kept of an analysis."""
    reasoning_share: float = 0.5
    """Share of a batch's pairs that are also trained behind an analysis, if they have one."""
    sample_share: float = 0.0
    """Share of those whose analysis is the model's own, sampled anew as it learns. The contrastive terms are computed
    behind it; nothing of it is taught, but that the embed token follows where the budget cut it off. (Taught after
    every sample, the token comes earlier each time: analyses shrank to 6 tokens.)"""
    samples_from: int = 50
    """First step with own samples: before, the model does not know how to write one."""
    samples_every: int = 50
    """Steps between two samplings."""
    sample_temperature: float = 0.7
    """0 samples greedily, as searching does."""
    temperature: float = 0.03
    """InfoNCE's tau."""
    symmetric: bool = True
    """Also classify the query among the batch's queries, given the document."""
    margin: float = 0.15
    """The triplet loss's theta."""
    memory: int = 0
    """Documents of earlier steps that serve as further negatives (cross-batch memory); they cost nothing."""
    teacher: str | None = None
    """Teacher rows of all texts, as `search-r3 data teach` writes them."""
    teacher_temperature: float = 0.05
    """The softmax over the teacher's cosines."""
    matryoshka: list[int] = field(default_factory=list)
    """Dimensions that InfoNCE is also computed at, so that embeddings may be cut there; e.g. [576, 256, 128]."""
    weights: LossWeights = field(default_factory=LossWeights)
    """The four terms' weights."""
    gradient_cache: bool = False
    """Compute activations again in the backward pass, a chunk at a time: memory for one chunk, a third more work."""
    rows_per_chunk: int = 32
    """Rows of one backbone call."""
    attention: str = "auto"
    """"eager", "sdpa", or "auto": eager on a CPU (its fused backward pass is slower there), sdpa on a GPU."""
    dev: list[str] = field(default_factory=lambda: ["cosqa", "scifact"])
    """Dev pools that choose the best adapter; the first metric is their mean nDCG@10 without reasoning."""
    data_root: str | None = None
    """Where the dev sets stand; SEARCH_R3_DATA otherwise."""
    dev_queries: int = 100
    """Queries of each dev pool."""
    dev_documents: int = 400
    """Documents of each dev pool."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The adapter."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """The training loop."""

    def __post_init__(self) -> None:
        if self.pairs_per_step < 2:
            raise InputError(f"pairs_per_step must be 2 or more, not {self.pairs_per_step}: InfoNCE needs negatives")
        if not 0 <= self.reasoning_share <= 1:
            raise InputError(f"reasoning_share must be in 0..1, not {self.reasoning_share}")
        if not self.temperature > 0:
            raise InputError(f"temperature must be above 0, not {self.temperature}")
        if not 0 <= self.sample_share <= 1:
            raise InputError(f"sample_share must be in 0..1, not {self.sample_share}")
        for name, least in (
            ("samples_from", 0),
            ("samples_every", 1),
            ("memory", 0),
            ("length_bucket", 1),
            ("topic_batches", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be {least} or more, not {getattr(self, name)}")
        if not (self.teacher_temperature > 0 and self.sample_temperature >= 0):
            raise InputError("teacher_temperature must be above 0, and sample_temperature 0 or more")
        if self.weights.distil and not self.teacher:
            raise InputError("weights.distil needs a teacher: name the file that search-r3 data teach wrote")
        if self.batch_of == "topic" and not self.teacher:
            raise InputError("batch_of: topic needs a teacher: name the file that search-r3 data teach wrote")
        if self.matryoshka and (min(self.matryoshka) < 1 or len(set(self.matryoshka)) < len(self.matryoshka)):
            raise InputError(f"matryoshka must be different dimensions from 1, not {self.matryoshka}")
        if self.rows_per_chunk < 1:
            raise InputError(f"rows_per_chunk must be 1 or more, not {self.rows_per_chunk}")
        if self.attention not in ("auto", "eager", "sdpa"):
            raise InputError(f"attention must be auto, eager or sdpa, not {self.attention!r}")
        if self.base_dtype == "bfloat16" and self.loop.mixed_precision != "bf16":
            if self.loop.mixed_precision == "no":
                raise InputError("base_dtype: bfloat16 needs loop.mixed_precision bf16 (or auto), not no")
            self.loop = replace(self.loop, mixed_precision="bf16")
        if self.loop.patience and not self.dev:
            raise InputError(
                f"loop.patience is {self.loop.patience}, but dev is empty: name a dev pool, or set it to 0"
            )
        if not self.pairs:
            raise InputError("pairs is empty: name at least one JSONL file of training pairs")

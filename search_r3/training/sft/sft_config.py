"""A stage 1 recipe: every key that `search-r3 train sft` knows, with what it means and its default."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from search_r3.data.query_variants import CASE_VARIANTS, check_shares
from search_r3.errors import InputError
from search_r3.training.config import LoopConfig, LoraSettings


@dataclass
class LossWeights:
    """How much each term counts. The paper's loss is the unweighted sum of the first four (arXiv 2510.07048, section
    3); these weights, and the further terms, are our choice.
    """

    sft: float = 0.1
    """Cross-entropy on the assistant's turn: the format, and where the embed token goes."""
    kl: float = 0.1
    """KL(tuned || base) on the same positions, without those that predict the embed token."""
    infonce: float = 1.0
    """In-batch contrastive loss with explicit hard negatives."""
    triplet: float = 0.0
    """Margin loss against the hardest candidate."""
    distillation: float = 0.0
    """KL to a teacher's distribution over the candidates (needs `teacher`)."""
    self_teaching: float = 0.0
    """KL from the distribution over the candidates of a query as `query_variants` writes it to that of the query as it
    is, which gets no gradient from this term (arXiv 2204.00716)."""
    view_distillation: float = 0.0
    """KL from the distribution over the candidates of the direct embedding, and of that in latent steps, to that of the
    same query with its given reasoning, which gets no gradient from this term (LaSER, arXiv 2603.01425). Pairs without
    reasoning, and traces that the model generated itself, are left out."""
    in_batch_lm: float = 0.0
    """Predicts some queries' tokens from documents of the batch, weighted by the softmax of their cosines (ElicitR's
    regularizer), so that what is similar is what explains the query."""

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
    """The dtype of the frozen base; the adapter, the residual stream and the optimizer stay float32. bfloat16 halves
    the base's memory and saves the bf16 copies of its matrices. It requires bf16 autocast; precision of a float32 base
    beyond bfloat16 is lost."""
    init_adapter: str | None = None
    """An adapter to continue training from, instead of a new one."""
    global_batch_size: int = 32
    """Pairs of a batch, over all processes together; the documents of the other pairs are negatives."""
    negatives_per_pair: int = 0
    """Explicit hard negatives taken from each pair."""
    positives_per_pair: int = 1
    """Documents of each pair that answer its query: its positive, then others drawn from its `positives` at each step,
    where it has some. Use more than 1 with another `ranking_loss` than infonce, which masks them for their query."""
    ranking_loss: Literal["infonce", "multi_positive", "lambda", "approx_ndcg"] = "infonce"
    """What the term `weights.infonce` computes over the candidates: "infonce" has one target for each query and masks
    its other positives; "multi_positive" has all positives as targets, weighted by their grades (arXiv 2004.11362);
    "lambda" is LambdaLoss (NDCG-Loss2++) and "approx_ndcg" ApproxNDCG, both over the grades."""
    batch_sampler: Literal["source", "kind", "any", "topic"] = "source"
    """What a batch is drawn from, so that its negatives are similar and harder: one source ("docstrings:numpy"), one
    kind of source ("docstrings"), any pairs, or one topic of a kind by the teacher's embeddings (the hardest)."""
    topic_batches: int = 6
    """The most batches that a topic holds."""
    source_weights: dict[str, float] = field(default_factory=dict)
    """How often an epoch goes through a source (a kind, if `batch_sampler` is kind or topic): 1.0 unless given."""
    length_bucket: int = 1
    """Batches that are sorted by length together, so that less is padded; 1 leaves them in random order."""
    max_query_tokens: int = 48
    """Queries are truncated to this many tokens."""
    max_document_tokens: int = 128
    """Documents are truncated to this many tokens while training."""
    max_reasoning_tokens: int = 32
    """Reasoning is truncated to this many tokens."""
    reasoning_ratio: float = 0.5
    """Fraction of a batch's pairs that are also trained with reasoning, if they have any."""
    self_reasoning_ratio: float = 0.0
    """Fraction of those whose reasoning the model has generated itself, and generates again as it learns. The
    contrastive terms are computed after it; none of its tokens are training targets, except the embed token where the
    limit cut the reasoning off. (With the embed token as a target after every trace, it comes earlier each time:
    traces shrank to 6 tokens.)"""
    self_reasoning_start_step: int = 50
    """First step with self-generated reasoning: before, the model has not learned to write any."""
    self_reasoning_refresh_steps: int = 50
    """Steps after which the reasoning is generated again."""
    self_reasoning_temperature: float = 0.7
    """0 decodes greedily, as searching does."""
    query_variants: dict[str, float] = field(default_factory=dict)
    """Shares of a batch's queries that are written otherwise, as people type them: {lower: 0.1, upper: 0.05, title:
    0.02, typos: 0.15, keywords: 0.05, no_punctuation: 0.05}; none by default. They take the originals' places, unless
    `weights.self_teaching` is above 0: then they are embedded beside the originals, for that term alone."""
    document_variants: dict[str, float] = field(default_factory=dict)
    """The same of a batch's documents, in other case alone: {upper: 0.02}. They take the originals' places."""
    fold_capitals: bool | None = None
    """Bring queries and documents that are all in capitals to ordinary case before they are embedded, in training and
    ever after: part of the adapter's contract. null: as `init_adapter` does, and a new adapter does not."""
    latent_steps: int = 0
    """Soft tokens of a third way to embed queries, `reasoning="latent"` (LaSER, arXiv 2603.01425), which is then
    trained too and written into the adapter's contract; 3 is LaSER's. 0: the adapter has no such mode."""
    latent_ratio: float = 0.5
    """Fraction of a batch's pairs that are also trained in latent steps. Up to `reasoning_ratio`, those with reasoning
    are among them, so that `weights.view_distillation` can teach them."""
    temperature: float = 0.03
    """InfoNCE's tau."""
    symmetric: bool = True
    """Also classify the query among the batch's queries, given the document."""
    margin: float = 0.15
    """The triplet loss's theta."""
    cross_batch_memory_size: int = 0
    """Documents of earlier steps that serve as further negatives (arXiv 1912.06798); they need no forward pass."""
    teacher: str | None = None
    """The teacher's embeddings of all texts, as `search-r3 data embed-teacher` writes them."""
    teacher_temperature: float = 0.05
    """Temperature of the softmax over the teacher's cosines."""
    view_temperature: float = 0.03
    """Temperature of both softmaxes of `weights.view_distillation`."""
    in_batch_lm_queries: int = 4
    """Queries of a batch that `weights.in_batch_lm` predicts."""
    in_batch_lm_documents: int = 4
    """Documents from which each of them is predicted: its own and others of the batch. Each is one more row."""
    matryoshka: list[int] = field(default_factory=list)
    """Dimensions at which InfoNCE is computed too, so that embeddings may be truncated there: [576, 256, 128]."""
    weights: LossWeights = field(default_factory=LossWeights)
    """The weights of the terms."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass, one mini-batch at a time: less memory, a third more computation."""
    mini_batch_size: int = 32
    """Rows of one forward pass through the backbone; it changes memory and speed, not the loss."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """"auto": eager on a CPU (where sdpa's backward pass is slower), sdpa on a GPU."""
    dev: list[str] = field(default_factory=lambda: ["cosqa", "scifact"])
    """Dev pools that choose the best adapter, by their mean nDCG@10 without reasoning."""
    data_root: str | None = None
    """The folder of the dev sets; SEARCH_R3_DATA otherwise."""
    dev_queries: int = 100
    """Queries of each dev pool."""
    dev_documents: int = 400
    """Documents of each dev pool."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The adapter."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """The training loop."""

    def __post_init__(self) -> None:
        if not self.pairs:
            raise InputError("pairs is empty: name at least one JSONL file of training pairs")
        self._check_numbers()
        self._check_teacher()
        check_shares(self.query_variants, "query_variants")
        check_shares(self.document_variants, "document_variants", CASE_VARIANTS)
        if self.weights.self_teaching and not any(self.query_variants.values()):
            raise InputError("weights.self_teaching needs changed queries: set query_variants, such as {typos: 0.3}")
        self._check_views()
        if self.base_dtype == "bfloat16" and self.loop.mixed_precision != "bf16":
            if self.loop.mixed_precision == "no":
                raise InputError("base_dtype: bfloat16 needs loop.mixed_precision bf16 (or auto), not no")
            self.loop = replace(self.loop, mixed_precision="bf16")
        if self.loop.patience and not self.dev:
            raise InputError(
                f"loop.patience is {self.loop.patience}, but dev is empty: name a dev pool, or set it to 0"
            )

    def _check_numbers(self) -> None:
        if self.global_batch_size < 2:
            raise InputError(
                f"global_batch_size must be 2 or more, not {self.global_batch_size}: InfoNCE needs negatives"
            )
        at_least = {
            "positives_per_pair": 1, "mini_batch_size": 1, "length_bucket": 1, "topic_batches": 1,
            "self_reasoning_start_step": 0, "self_reasoning_refresh_steps": 1, "self_reasoning_temperature": 0,
            "cross_batch_memory_size": 0, "latent_steps": 0, "in_batch_lm_queries": 1, "in_batch_lm_documents": 2,
        }  # fmt: skip
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise InputError(f"{name} must be {least} or more, not {getattr(self, name)}")
        for name in ("reasoning_ratio", "self_reasoning_ratio", "latent_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be in 0..1, not {getattr(self, name)}")
        for name in ("temperature", "teacher_temperature", "view_temperature"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.matryoshka and (min(self.matryoshka) < 1 or len(set(self.matryoshka)) < len(self.matryoshka)):
            raise InputError(f"matryoshka must be different dimensions of 1 or more, not {self.matryoshka}")
        if self.attention not in ("auto", "eager", "sdpa"):
            raise InputError(f"attention must be auto, eager or sdpa, not {self.attention!r}")

    def _check_views(self) -> None:
        if self.latent_steps and not self.latent_ratio:
            raise InputError("latent_steps is set, but latent_ratio is 0: no pair would be trained in latent steps")
        if not self.weights.view_distillation:
            return
        if not (self.reasoning_ratio > 0 and self.self_reasoning_ratio < 1):
            raise InputError(
                "weights.view_distillation learns from pairs' given reasoning: set reasoning_ratio above 0 and "
                "self_reasoning_ratio below 1"
            )

    def _check_teacher(self) -> None:
        if self.teacher:
            return
        for key, needed in (
            ("weights.distillation", self.weights.distillation > 0),
            ("batch_sampler: topic", self.batch_sampler == "topic"),
        ):
            if needed:
                raise InputError(f"{key} needs a teacher: name the file that search-r3 data embed-teacher wrote")

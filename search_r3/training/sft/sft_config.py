"""A stage 1 recipe: every key of `search-r3 train sft`, its meaning and its default."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from search_r3.config import at_least, require
from search_r3.data.query_variants import CASE_VARIANTS, check_shares
from search_r3.errors import InputError
from search_r3.model.engines.registry import engine_spec
from search_r3.model.reading import MAX_PASSAGES
from search_r3.training.config import LoopConfig, LoraSettings

READING_SHARES = ("reading_dropped", "reading_shuffled", "reading_without_positive")
"""The keys for changes of what is read, which exclude each other."""


@dataclass
class LossWeights:
    """The weight of each term of the loss. The paper sums the first four unweighted (arXiv 2510.07048, section 3);
    these weights, and the further terms, are our choice.
    """

    sft: float = 0.1
    """Cross-entropy on the assistant's turn: it teaches the format, and where the embed token goes."""
    kl: float = 0.1
    """KL(tuned || base) at the same positions, except those that predict the embed token."""
    infonce: float = 1.0
    """In-batch contrastive loss with explicit hard negatives."""
    triplet: float = 0.0
    """Margin loss against the hardest candidate."""
    distillation: float = 0.0
    """KL to a teacher's distribution over the candidates (needs `teacher`)."""
    self_teaching: float = 0.0
    """KL between two distributions over a query's candidates: that of the query as changed by `query_variants`, and
    that of the original query, which gets no gradient from this term (arXiv 2204.00716)."""
    view_distillation: float = 0.0
    """KL between two distributions over a query's candidates: that of its direct embedding (and of its latent one), and
    that of its embedding with given reasoning, which gets no gradient from this term (LaSER, arXiv 2603.01425). Pairs
    without reasoning or with self-generated reasoning are left out."""
    trust: float = 1.0
    """KL between two distributions over a query's candidates: that of its embedding with false reasoning
    (`shuffled_reasoning_ratio`, `empty_reasoning_ratio`), and that of its direct embedding, which gets no gradient from
    this term."""
    in_batch_lm: float = 0.0
    """Prediction of some queries' tokens from documents of the batch, weighted by the softmax of their cosines
    (ElicitR's regularizer), so that the documents that explain a query become similar to it."""

    def __post_init__(self) -> None:
        at_least(self, **dict.fromkeys(self.__dict__, 0))


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
    documents: Literal["trained", "fixed"] = "trained"
    """"fixed": documents are embedded once, by `init_adapter`, and are all negatives of every query in every step; only
    queries are trained. The result is a query adapter, which searches the indexes of `init_adapter` as they are."""
    corpora: list[str] = field(default_factory=list)
    """With `documents: fixed`, data sets (names or BEIR folders) whose documents are negatives as well; those of the
    pairs always are."""
    documents_engine: str = "torch"
    """With `documents: fixed`, the engine that embeds them: torch, in the precision of training, or int8, which is
    faster on CPUs with VNNI or AMX (docs/engines.md)."""
    global_batch_size: int = 32
    """Pairs per batch, over all processes; each pair's negatives are the documents of the other pairs."""
    negatives_per_pair: int = 0
    """Number of explicit hard negatives used from each pair."""
    positives_per_pair: int = 1
    """Number of documents per pair that answer its query: its positive, and others drawn from its `positives` at each
    step, if it has any. Above 1, use a `ranking_loss` other than infonce, which masks them for their query."""
    ranking_loss: Literal["infonce", "multi_positive", "lambda", "approx_ndcg"] = "infonce"
    """The loss that `weights.infonce` weights, over the candidates: "infonce" has one target per query and masks
    its other positives; "multi_positive" has all positives as targets, weighted by their grades (arXiv 2004.11362);
    "lambda" is LambdaLoss (NDCG-Loss2++) and "approx_ndcg" ApproxNDCG, both over the grades."""
    batch_sampler: Literal["source", "kind", "any", "topic"] = "source"
    """Which pairs share a batch; the more similar they are, the harder its negatives. "source": one source
    ("docstrings:numpy"); "kind": one kind of source ("docstrings"); "any": all pairs; "topic": one topic within a kind,
    by the teacher's embeddings (the hardest)."""
    topic_batches: int = 6
    """Maximum size of a topic, in batches."""
    source_weights: dict[str, float] = field(default_factory=dict)
    """How many times an epoch goes through a source (a kind, if `batch_sampler` is kind or topic); 1.0 by default."""
    length_bucket: int = 1
    """Number of batches whose pairs are sorted by length together, to reduce padding; 1 turns bucketing off."""
    max_query_tokens: int = 48
    """Queries are truncated to this many tokens."""
    max_document_tokens: int = 128
    """Documents are truncated to this many tokens during training."""
    max_reasoning_tokens: int = 32
    """Reasoning is truncated to this many tokens."""
    reasoning_ratio: float = 0.5
    """Fraction of a batch's pairs that are also trained with reasoning, where they have any."""
    self_reasoning_ratio: float = 0.0
    """Fraction of the pairs with reasoning whose reasoning is generated by the model itself, and regenerated as it
    learns. The contrastive terms use the embedding after it; its tokens are not training targets, except the embed
    token where the token limit cut the reasoning off. (As a target after every trace, the embed token moved ever
    earlier: traces shrank to 6 tokens.)"""
    shuffled_reasoning_ratio: float = 0.0
    """Fraction of the pairs with reasoning that get the reasoning of another query of the batch instead. They learn to
    rank as without (`weights.trust`), so that words are trusted only as far as they are true; its tokens are no
    training targets."""
    empty_reasoning_ratio: float = 0.0
    """Fraction of the pairs with reasoning that get none before the embed token; trained likewise."""
    self_reasoning_start_step: int = 50
    """First step with self-generated reasoning: before it, the model has not yet learned to write any."""
    self_reasoning_refresh_steps: int = 50
    """Steps between two generations of the reasoning."""
    self_reasoning_temperature: float = 0.7
    """Sampling temperature of self-generated reasoning; 0 decodes greedily, as search does."""
    query_variants: dict[str, float] = field(default_factory=dict)
    """Fractions of a batch's queries that are perturbed: {lower: 0.1, upper: 0.05, title: 0.02,
    typos: 0.15, keywords: 0.05, no_punctuation: 0.05}; none by default. They replace the originals, unless
    `weights.self_teaching` is above 0: then they are embedded in addition, for that term only."""
    query_normalizer: str | None = None
    """A file made by `search-r3 data query-normalizer`, by which typos in queries are corrected and queries in one case
    get the usual case of their words; kept in the adapter. None keeps that of `init_adapter`, if it has one."""
    document_variants: dict[str, float] = field(default_factory=dict)
    """Fractions of a batch's documents whose case is changed: {upper: 0.02}. They replace the originals."""
    fold_capitals: bool | None = None
    """Convert queries and documents that are entirely in capitals to ordinary case before they are embedded, in
    training and from then on: part of the adapter's contract. null: as in `init_adapter`; a new adapter does not."""
    latent_steps: int = 0
    """Number of soft tokens of a third way to embed queries, `reasoning="latent"` (LaSER, arXiv 2603.01425), which is
    then trained too and recorded in the adapter's contract; LaSER uses 3. 0: the adapter has no such mode."""
    latent_ratio: float = 0.5
    """Fraction of a batch's pairs that are also trained in latent mode. They include those with reasoning, up to
    `reasoning_ratio`, so that `weights.view_distillation` can teach them."""
    reading_ratio: float = 0.0
    """Fraction of a batch's pairs that are also trained in the reading conversation, where a query is followed by its
    first hits, if it has any (`search-r3 data read` adds them). The conversation is recorded in the adapter's contract.
    0: the adapter has no such mode."""
    reading_passages: int = 4
    """Passages that are read with a query, in training and by default in a search; at most 10."""
    reading_passage_tokens: int = 48
    """Tokens that are read of each passage."""
    reading_reasoning_ratio: float = 0.5
    """Fraction of the pairs with reasoning whose reasoning follows passages, if they have any and `reading_ratio` is
    above 0."""
    reading_dropped: float = 0.1
    """Fraction of the rows with passages that read fewer: the first ones, perhaps none."""
    reading_shuffled: float = 0.1
    """Fraction of them that read another query's passages."""
    reading_without_positive: float = 0.2
    """Fraction of them from whose passages those that answer the query are left out, so that the embedding looks past a
    bad first search."""
    temperature: float = 0.03
    """Temperature of InfoNCE (tau)."""
    symmetric: bool = True
    """Also compute InfoNCE from documents to queries, and average the two."""
    margin: float = 0.15
    """Margin of the triplet loss (theta)."""
    cross_batch_memory_size: int = 0
    """Number of documents of earlier steps used as additional negatives without a forward pass (arXiv 1912.06798)."""
    cross_batch_memory_prefill: bool = False
    """Fill the memory before the first step with that many documents of the pairs, embedded with the initial weights:
    hard negatives from the start. Use it with `init_adapter`, since an untrained model's embeddings say little."""
    teacher: str | None = None
    """File with the teacher's embeddings of all texts, written by `search-r3 data embed-teacher`."""
    teacher_temperature: float = 0.05
    """Temperature of the softmax over the teacher's cosines."""
    guide_margin: float | None = None
    """With a teacher: a document whose teacher's cosine with the query exceeds that of the query's positive minus this
    margin is not used as its negative, since it may answer it too (GISTEmbed, arXiv 2402.16829). null: every document
    that is not known to answer the query is a negative."""
    view_temperature: float = 0.03
    """Temperature of both softmaxes of `weights.view_distillation`."""
    in_batch_lm_queries: int = 4
    """Queries of a batch that `weights.in_batch_lm` predicts."""
    in_batch_lm_documents: int = 4
    """Documents from which each of them is predicted: its own and others of the batch. Each is one more row."""
    matryoshka: list[int] = field(default_factory=list)
    """Dimensions at which InfoNCE is computed, so that embeddings can be truncated to them: [576, 256, 128]."""
    weights: LossWeights = field(default_factory=LossWeights)
    """The weights of the terms."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass, one mini-batch at a time: less memory for a third more
    computation."""
    mini_batch_size: int = 32
    """Rows per forward pass of the backbone; it affects memory and speed, not the loss."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """"auto": eager on a CPU (where sdpa's backward pass is slower), sdpa on a GPU."""
    dev: list[str] = field(default_factory=lambda: ["cosqa", "scifact"])
    """Dev pools that choose the best adapter, by their mean nDCG@10 without reasoning: cosqa, nfcorpus, scifact,
    hotpotqa_more, entailmentbank, strategyqa; or nanobeir:NAME, or nanobeir for all of NanoBEIR (fetched on first use;
    its queries are test queries of BEIR, so report no BEIR measures of an adapter chosen by them)."""
    data_root: str | None = None
    """The folder of the dev sets; by default, the environment variable SEARCH_R3_DATA."""
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
        self._check_documents()
        if self.base_dtype == "bfloat16" and self.loop.mixed_precision != "bf16":
            if self.loop.mixed_precision == "no":
                raise InputError("base_dtype: bfloat16 needs loop.mixed_precision bf16 (or auto), not no")
            self.loop = replace(self.loop, mixed_precision="bf16")
        if self.loop.patience and not self.dev:
            raise InputError(
                f"loop.patience is {self.loop.patience}, but dev is empty: name a dev pool, or set it to 0"
            )

    def _check_numbers(self) -> None:
        size = self.global_batch_size
        require(size >= 2, "global_batch_size", size, "2 or more", ": InfoNCE needs negatives")
        at_least(
            self, positives_per_pair=1, mini_batch_size=1, length_bucket=1, topic_batches=1,
            self_reasoning_start_step=0, self_reasoning_refresh_steps=1, self_reasoning_temperature=0,
            cross_batch_memory_size=0, latent_steps=0, in_batch_lm_queries=1, in_batch_lm_documents=2,
            reading_passages=1, reading_passage_tokens=1,
        )  # fmt: skip
        false = self.shuffled_reasoning_ratio + self.empty_reasoning_ratio
        expected = "from 0 to 1 together with empty_reasoning_ratio"
        require(false <= 1, "shuffled_reasoning_ratio", self.shuffled_reasoning_ratio, expected)
        for name in ("shuffled_reasoning_ratio", "empty_reasoning_ratio", "reasoning_ratio", "self_reasoning_ratio",
                     "latent_ratio", "reading_ratio", "reading_reasoning_ratio", *READING_SHARES):  # fmt: skip
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        for name in ("temperature", "teacher_temperature", "view_temperature"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        if self.cross_batch_memory_prefill and not self.cross_batch_memory_size:
            raise InputError("cross_batch_memory_prefill fills the memory: set cross_batch_memory_size above 0")
        margin = self.guide_margin
        require(margin is None or -2 < margin < 2, "guide_margin", margin, "between -2 and 2, or null")
        dims = self.matryoshka
        different = not dims or (min(dims) >= 1 and len(set(dims)) == len(dims))
        require(different, "matryoshka", dims, "different dimensions of 1 or more")
        require(self.attention in ("auto", "eager", "sdpa"), "attention", self.attention, "auto, eager or sdpa")

    def _check_views(self) -> None:
        require(self.reading_passages <= MAX_PASSAGES, "reading_passages", self.reading_passages, "at most 10")
        shares = sum(getattr(self, name) for name in READING_SHARES)
        require(shares <= 1, " + ".join(READING_SHARES), shares, "at most 1", ": each is a fraction of the same rows")
        if self.latent_steps and not self.latent_ratio:
            raise InputError("latent_steps is set, but latent_ratio is 0: no pair would be trained in latent mode")
        if not self.weights.view_distillation:
            return
        if not (self.reasoning_ratio > 0 and self.self_reasoning_ratio < 1):
            raise InputError(
                "weights.view_distillation learns from pairs' given reasoning: set reasoning_ratio above 0 and "
                "self_reasoning_ratio below 1"
            )

    def _check_documents(self) -> None:
        if self.documents == "trained":
            if self.corpora:
                raise InputError("corpora are the negatives of documents: fixed; set that too, or remove them")
            if self.documents_engine != "torch":
                raise InputError("documents_engine embeds documents: fixed; set that too, or remove it")
            return
        engine_spec(self.documents_engine).check()
        if not self.init_adapter:
            raise InputError("documents: fixed needs init_adapter, the adapter that embeds the documents")
        weights = self.weights
        for key, value in (
            ("cross_batch_memory_size", self.cross_batch_memory_size),
            ("document_variants", any(self.document_variants.values())),
            ("weights.in_batch_lm", weights.in_batch_lm),
            ("weights.distillation", weights.distillation),
            ("guide_margin", self.guide_margin is not None),
        ):
            if value:
                raise InputError(f"documents: fixed compares all documents as they are, without {key}; remove that key")

    def _check_teacher(self) -> None:
        if self.teacher:
            return
        for key, needed in (
            ("weights.distillation", self.weights.distillation > 0),
            ("guide_margin", self.guide_margin is not None),
            ("batch_sampler: topic", self.batch_sampler == "topic"),
        ):
            if needed:
                raise InputError(f"{key} needs a teacher: name the file that search-r3 data embed-teacher wrote")

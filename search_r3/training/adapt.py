"""Adapts queries to an index as it stands: a query adapter trained on judged queries against the index's own vectors.

Either a linear map of the queries' embeddings, which is fitted in seconds (`adapt_linear`), or the weights that embed
them (`adapt_lora`). Every vector of the index is compared with every query in each step; of a document's chunks the
nearest counts, as in a search. Held-out queries decide which step is kept, and whether it is better than the model that
it began with.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from search_r3 import metrics
from search_r3.config import at_least, require
from search_r3.data.judged_queries import JudgedQuery, QuerySplit
from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs
from search_r3.errors import InputError
from search_r3.files import atomic_write_text
from search_r3.model import checkpoint as checkpoints
from search_r3.model.checkpoint import Checkpoint, save_projected
from search_r3.model.latent_steps import has_latent
from search_r3.model.searchr3 import SearchR3
from search_r3.ranking import graded_ranking, top_k
from search_r3.training.config import LoopConfig
from search_r3.training.linear_adapter import (
    Documents,
    LinearSettings,
    ModeSettings,
    WordScores,
    fit_projection,
    targets,
)
from search_r3.training.precision import resolve_attention
from search_r3.training.sft.contrastive import document_key
from search_r3.training.sft.fixed_documents import FixedDocuments
from search_r3.training.sft.sft_config import LossWeights, SFTConfig
from search_r3.training.sft.sft_task import SFTTask
from search_r3.training.stage import train_stage

BLOCK = 64
"""Queries whose scores of all documents are held at once."""
MAX_QUERY_TOKENS = 128
"""Queries are cut at this many tokens in training; a search reads more."""
MEASURES = ("ndcg@10", "recall@10", "recall@100")
WITHOUT_REASONING = "off"
"""The mode by which adapters are compared."""


@dataclass(frozen=True)
class AdaptSettings(ModeSettings):
    """How long and how fast queries are adapted."""

    steps: int = 240
    """Optimizer steps."""
    batch_size: int = 16
    """Queries per step."""
    learning_rate: float = 2e-4
    """AdamW's peak learning rate."""
    temperature: float = 0.03
    """Temperature of the softmax over the index."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, steps=1, batch_size=2)
        require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "above 0 and finite")
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "above 0 and finite")


class IndexedVectors:
    """The vectors of an index, sorted by document.

    Args:
        documents: the document of each row; the chunks of one share it.
        vector_ND: the rows' vectors, float; normalized here.
        texts: the rows' texts, which a model that reads is shown.
    """

    def __init__(self, documents: Sequence[str], vector_ND: np.ndarray, texts: Sequence[str] | None = None) -> None:
        if not len(documents):
            raise InputError("the index is empty; index documents first")
        order = sorted(range(len(documents)), key=lambda row: documents[row])
        self.row_documents = [documents[row] for row in order]
        self.texts = None if texts is None else [texts[row] for row in order]
        sorted_ND = np.asarray(vector_ND, dtype=np.float32)[order]
        norm_N1 = np.linalg.norm(sorted_ND, axis=1, keepdims=True)
        self.vector_ND = sorted_ND / np.maximum(norm_N1, 1e-12)
        same = [a != b for a, b in zip(self.row_documents, ["", *self.row_documents[:-1]], strict=True)]
        self.starts = np.flatnonzero([True, *same[1:]])
        self.column_of = {self.row_documents[start]: column for column, start in enumerate(self.starts)}

    @property
    def sha256(self) -> str:
        """SHA-256 of ids and vectors."""
        digest = hashlib.sha256(json.dumps(self.row_documents).encode())
        digest.update(np.ascontiguousarray(self.vector_ND).data)
        return digest.hexdigest()

    def scores(self, query_QD: np.ndarray) -> np.ndarray:
        """The cosine of each query with each document's nearest chunk, float32 (Q, documents)."""
        return np.maximum.reduceat(query_QD @ self.vector_ND.T, self.starts, axis=1)

    def first_hits(self, query_QD: np.ndarray, k: int) -> list[list[str]]:
        """For each query, the nearest chunk of each of its first `k` documents, as text."""
        assert self.texts is not None
        ends = [*self.starts[1:], len(self.row_documents)]
        found: list[list[str]] = []
        for query_D in query_QD:
            score_N = self.vector_ND @ query_D
            best = top_k(np.maximum.reduceat(score_N, self.starts)[None], k)[1][0]
            rows = [self.starts[column] + score_N[self.starts[column] : ends[column]].argmax() for column in best]
            found.append([self.texts[row] for row in rows])
        return found

    def measure(self, query_QD: np.ndarray, queries: Sequence[JudgedQuery]) -> dict[str, np.ndarray]:
        """nDCG@10, recall@10 and recall@100 of each query, (Q,) float64 each; of graded relevance as trec_eval."""
        parts: list[np.ndarray] = []
        for start in range(0, len(queries), BLOCK):
            some = queries[start : start + BLOCK]
            score_QM = self.scores(query_QD[start : start + BLOCK])
            grade_QM = np.zeros(score_QM.shape)
            for line, query in enumerate(some):
                grade_QM[line, [self.column_of[name] for name in query.relevant]] = list(query.relevant.values())
            hit_QK = np.take_along_axis(grade_QM, graded_ranking(score_QM, grade_QM)[:, :100], axis=1) > 0
            relevant_Q = (grade_QM > 0).sum(1)
            recall = [hit_QK[:, :k].sum(1) / relevant_Q for k in (10, 100)]
            parts.append(np.stack([metrics.ndcg(score_QM, grade_QM, 10), *recall]))
        return dict(zip(MEASURES, np.concatenate(parts, axis=1), strict=True))


@dataclass(frozen=True)
class Adaptation:
    """What adapting gave, on the held-out queries.

    Attributes:
        folder: the query adapter of the best step, in the run's folder.
        before, after: mode ("off", "on", and "latent" and "read" if the model has them) -> measure -> its mean.
        better, worse: queries whose nDCG@10 without reasoning rose and fell.
    """

    folder: Path
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]
    better: int
    worse: int

    @property
    def gain(self) -> float:
        """By how much nDCG@10 without reasoning rose."""
        return self.after[WITHOUT_REASONING]["ndcg@10"] - self.before[WITHOUT_REASONING]["ndcg@10"]


class AdaptTask(SFTTask):
    """Stage 1 with an index's vectors as its documents, validated on held-out queries over the whole index."""

    def __init__(
        self,
        config: SFTConfig,
        checkpoint: Checkpoint,
        pairs: Sequence[TrainingPair],
        fixed: FixedDocuments,
        index: IndexedVectors,
        held_out: Sequence[JudgedQuery],
    ) -> None:
        super().__init__(config, checkpoint, pairs, fixed)
        self.index, self.held_out = index, held_out

    def evaluate(self, module: nn.Module, step: int) -> dict[str, float]:
        """The means of `IndexedVectors.measure` without reasoning."""
        query_QD = embed_queries(self._encoder(), self.held_out)
        values = self.index.measure(query_QD, self.held_out)
        return {f"{name}.{WITHOUT_REASONING}": float(of_query.mean()) for name, of_query in values.items()}


def adapt_linear(
    model: str,
    index: IndexedVectors,
    split: QuerySplit,
    run: Path,
    settings: LinearSettings,
    load: Callable[[str], SearchR3],
    words: WordScores | None = None,
    resume: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Adaptation:
    """Fit a query projection to an index.

    Args:
        model: an adapter of the index's document space, or a query adapter, whose projection, if any, it follows.
        run: a folder for the query adapter, and for the reasoning that was written, which another run takes from it.
        load, say: see `adapt_lora`.
        words: a search of the index by words, whose fusion with the vectors is the teacher; None for none.
        resume: False writes the reasoning again.

    Raises:
        InputError: the model is no adapter, or no projection was better on the held-out queries than none is.
    """
    begun = load(model)
    refuse_base(begun)
    say(f"measuring {begun.name} on {len(split.held_out):,} held-out queries")
    held_QD = embed_queries(begun, split.held_out)
    before = measure(begun, index, split.held_out, settings, held_QD)
    say("embedding the queries: some with the model's own reasoning")
    pairs = _training_pairs(begun, index, split.train, run, settings, resume)
    row_RD, query_of = _rows(begun, pairs)
    by_words = None if words is None else words([query.text for query in split.train])
    direct_QD = row_RD[: len(split.train)]
    target_of = [
        target
        for start in range(0, len(split.train), BLOCK)
        for target in targets(
            index.scores(direct_QD[start : start + BLOCK]),
            split.train[start : start + BLOCK],
            index.column_of,
            None if by_words is None else by_words[start : start + BLOCK],
            settings,
        )
    ]
    say(f"fitting a linear map to {len(row_RD):,} embeddings")
    needed = np.unique(np.concatenate([target.columns for target in target_of]))
    fitted = fit_projection(
        row_RD,
        [target_of[query] for query in query_of],
        Documents(index.vector_ND, index.starts, needed, settings.seed),
        lambda projection: float(index.measure(projection(held_QD), split.held_out)["ndcg@10"].mean()),
        settings,
    )
    _check_gain(model, split, float(before[WITHOUT_REASONING]["ndcg@10"].mean()), fitted.ndcg)
    folder = run / "linear"  # beside the checkpoints of a LoRA run
    shutil.rmtree(folder, ignore_errors=True)
    save_projected(begun.checkpoint.path, fitted.projection.after(begun.checkpoint.query_projection), folder)
    del begun
    return _measured(folder, index, split, settings, before, load, say)


def refuse_base(model: SearchR3) -> None:
    """Raise InputError for what has no adapter that a query adapter could begin with."""
    record = checkpoints.read_record(Path(model.checkpoint.path))
    if record is None or record["kind"] not in checkpoints.ADAPTER_KINDS:
        what = (
            "a base model; train an adapter, or use --method lora"
            if record is None
            else ("a merged model; give the adapter that it was made from")
        )
        raise InputError(f"{model.name} is {what}")


def _rows(model: SearchR3, pairs: Sequence[TrainingPair]) -> tuple[np.ndarray, list[int]]:
    """Embeddings of the queries, first all without reasoning, then some in other modes, (R, D); and whose each is."""
    texts = [pair.query for pair in pairs]
    options: dict[str, Any] = {"batch_size": 64, "show_progress_bar": False}
    parts, query_of = [model.encode_query(texts, reasoning=False, **options)], list(range(len(pairs)))
    some = [number for number, pair in enumerate(pairs) if pair.reasoning or pair.passages]
    reasoned = [number for number in some if pairs[number].reasoning]
    if reasoned:
        traces = [pairs[number].reasoning or "" for number in reasoned]
        parts.append(model.encode_with_reasoning([texts[number] for number in reasoned], traces, **options))
        query_of += reasoned
    if some and has_latent(model):
        parts.append(model.encode_query([texts[number] for number in some], reasoning="latent", **options))
        query_of += some
    reading = [number for number in some if pairs[number].passages]
    if reading:
        passages = [pairs[number].passages for number in reading]
        shown = [texts[number] for number in reading]
        parts.append(model.encode_query(shown, passages=passages, reasoning=False, **options))
        query_of += reading
    return np.concatenate(parts), query_of


def adapt_lora(
    model: str,
    index: IndexedVectors,
    split: QuerySplit,
    run: Path,
    settings: AdaptSettings,
    load: Callable[[str], SearchR3],
    resume: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Adaptation:
    """Train the weights of a query adapter for an index.

    Args:
        model: an adapter of the index's document space, or a query adapter, which is trained further.
        run: the run's folder; a run that was killed resumes from it.
        load: loads a model for measuring, `SearchR3.from_pretrained` with options.
        resume: False starts over.
        say: called with a line before each part that takes a while.

    Raises:
        InputError: the model is no adapter, the run was begun with other settings, queries or vectors, or no step was
            better on the held-out queries than the model is.
    """
    begun = load(model)
    say(f"measuring {begun.name} on {len(split.held_out):,} held-out queries")
    before = measure(begun, index, split.held_out, settings)
    say("preparing the queries: some with the model's own reasoning")
    pairs = _training_pairs(begun, index, split.train, run, settings, resume)
    config = _config(model, run, settings, pairs, begun)
    del begun  # its memory is needed
    checkpoint = checkpoints.load(model, dtype=torch.float32, merge=False)
    if checkpoint.contract.adapter_weights and not hasattr(checkpoint.model, "peft_config"):
        raise InputError(f"{model} is a merged model; give the adapter that it was made from")
    of_documents = checkpoint.documents or checkpoint
    checkpoint.documents = None
    keys = np.array([document_key(name) for name in index.row_documents], dtype=np.int64)
    fixed = FixedDocuments(index.vector_ND, keys, (of_documents.name, of_documents.source))
    checkpoint.model.set_attn_implementation(resolve_attention(config.attention))
    torch.manual_seed(settings.seed)
    train_stage(
        AdaptTask(config, checkpoint, pairs, fixed, index, split.held_out),
        config,
        resume=resume,
        best_metric=f"ndcg@10.{WITHOUT_REASONING}",
        ignored=("output", "pairs", "init_adapter", "loop"),
        identity={
            "base_contract": checkpoint.contract.hash,
            "index_sha256": index.sha256,
            "queries_sha256": _sha256([*split.train, *split.held_out]),
            "mode_ratio": settings.mode_ratio,
        },
    )
    del checkpoint
    found = _measured(run / "best", index, split, settings, before, load, say)
    _check_gain(model, split, found.before[WITHOUT_REASONING]["ndcg@10"], found.after[WITHOUT_REASONING]["ndcg@10"])
    return found


def _measured(
    folder: Path,
    index: IndexedVectors,
    split: QuerySplit,
    settings: ModeSettings,
    before: dict[str, dict[str, np.ndarray]],
    load: Callable[[str], SearchR3],
    say: Callable[[str], None],
) -> Adaptation:
    """Write the golden vectors of the query adapter in `folder`, and measure it."""
    say("measuring the adapter of the best step")
    SearchR3.from_pretrained(folder, device="cpu").write_golden(folder)  # in float32
    after = measure(load(str(folder)), index, split.held_out, settings)
    rise_Q = after[WITHOUT_REASONING]["ndcg@10"] - before[WITHOUT_REASONING]["ndcg@10"]
    return Adaptation(folder, _means(before), _means(after), int((rise_Q > 1e-9).sum()), int((rise_Q < -1e-9).sum()))


def _check_gain(model: str, split: QuerySplit, before: float, after: float) -> None:
    if after <= before:
        raise InputError(
            f"no step was better on the {len(split.held_out)} held-out queries than {model} (nDCG@10 {before:.4f}, at "
            f"best {after:.4f}), so nothing is saved; give more queries, or try a lower learning rate"
        )


def embed_queries(model: Any, queries: Sequence[JudgedQuery]) -> np.ndarray:
    """The queries' embeddings without reasoning, float32 (Q, D)."""
    return model.encode_query([query.text for query in queries], reasoning=False, show_progress_bar=False)


def measure(
    model: SearchR3,
    index: IndexedVectors,
    queries: Sequence[JudgedQuery],
    settings: ModeSettings,
    direct_QD: np.ndarray | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """`IndexedVectors.measure` of each mode of the model: "off", "on", "latent", and "read" with its first hits.

    `direct_QD` are the queries' embeddings without reasoning, if they are there.
    """
    direct_QD = embed_queries(model, queries) if direct_QD is None else direct_QD
    texts = [query.text for query in queries]
    modes = {WITHOUT_REASONING: direct_QD}
    reasoned = model.reason(
        texts, max_reasoning_tokens=settings.max_reasoning_tokens, batch_size=64, show_progress_bar=False
    )
    modes["on"] = np.stack([one.embedding for one in reasoned])
    if has_latent(model):
        modes["latent"] = model.encode_query(texts, reasoning="latent", show_progress_bar=False)
    if model.reading is not None and index.texts is not None:
        passages = index.first_hits(direct_QD, model.reading.passages)
        modes["read"] = model.encode_query(texts, passages=passages, reasoning=False, show_progress_bar=False)
    return {mode: index.measure(query_QD, queries) for mode, query_QD in modes.items()}


def _training_pairs(
    model: SearchR3,
    index: IndexedVectors,
    queries: Sequence[JudgedQuery],
    run: Path,
    settings: ModeSettings,
    resume: bool,
) -> list[TrainingPair]:
    """A pair per query, with its documents' ids for texts; some with the model's reasoning and first hits.

    They are kept in the run's folder, since writing reasoning takes time.
    """
    file, about_file = run / "queries.jsonl", run / "queries.about.json"
    about = json.dumps([model.contract_hash, _sha256(queries), index.sha256, settings.mode_ratio, settings.seed])
    if resume and file.is_file() and about_file.is_file() and about_file.read_text(encoding="utf-8") == about:
        return read_pairs(file)
    pairs = [_pair(number, query) for number, query in enumerate(queries)]
    draw_Q = np.random.default_rng(settings.seed).random(len(queries))
    some = [pair for pair, draw in zip(pairs, draw_Q, strict=True) if draw < settings.mode_ratio]
    if some:
        texts = [pair.query for pair in some]
        reasoned = model.reason(texts, max_reasoning_tokens=settings.max_reasoning_tokens, batch_size=64)
        for pair, trace in zip(some, reasoned, strict=True):
            pairs[int(pair.id)] = replace(pair, reasoning=trace.text or None)
        if model.reading is not None and index.texts is not None:
            direct_QD = model.encode_query(texts, reasoning=False, show_progress_bar=False)
            hits = index.first_hits(direct_QD, model.reading.passages)
            for pair, passages in zip(some, hits, strict=True):
                pairs[int(pair.id)] = replace(pairs[int(pair.id)], passages=tuple(passages))
    write_pairs(file, pairs)
    atomic_write_text(about_file, about)
    return pairs


def _pair(number: int, query: JudgedQuery) -> TrainingPair:
    (first, grade), *further = sorted(query.relevant.items(), key=lambda item: (-item[1], item[0]))
    return TrainingPair(str(number), query.text, first, positives=tuple(further), grade=grade)


def _config(
    model: str, run: Path, settings: AdaptSettings, pairs: Sequence[TrainingPair], begun: SearchR3
) -> SFTConfig:
    steps = settings.steps
    read = begun.reading if any(pair.passages for pair in pairs) else None
    config = SFTConfig(
        pairs=["-"],
        output=str(run),
        init_adapter=model,
        documents="fixed",
        global_batch_size=min(settings.batch_size, len(pairs)),
        ranking_loss="multi_positive",
        symmetric=False,
        batch_sampler="any",
        max_query_tokens=MAX_QUERY_TOKENS,
        max_reasoning_tokens=settings.max_reasoning_tokens,
        reasoning_ratio=1.0,  # of those that have reasoning
        latent_steps=begun.latent_steps if settings.mode_ratio else 0,
        latent_ratio=settings.mode_ratio or 0.5,
        temperature=settings.temperature,
        weights=LossWeights(sft=0.1 if settings.mode_ratio else 0.0, kl=0.0),
        dev=[],
        loop=LoopConfig(
            steps=steps,
            learning_rate=settings.learning_rate,
            warmup_steps=min(20, steps // 5),
            checkpoint_every=25,
            evaluate_every=max(1, steps // 8),
            seed=settings.seed,
        ),
    )
    if read is None:
        return config
    return replace(
        config,
        reading_ratio=1.0,  # of those that have passages
        reading_passages=read.passages,
        reading_passage_tokens=read.passage_tokens,
        reading_without_positive=0.0,  # the pairs name documents by their ids
    )


def _means(values: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    return {mode: {name: float(of.mean()) for name, of in by_name.items()} for mode, by_name in values.items()}


def _sha256(queries: Sequence[JudgedQuery]) -> str:
    rows = [[query.text, sorted(query.relevant.items())] for query in queries]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

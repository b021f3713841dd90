"""The controls for "reasoning helps": other text before the embed token, reasoning given to other systems, fusion.

Each control is a further mode of a SearchR3 model, besides off and on, and gives an ordinary run. `empty`, `shuffled`
and `repeat` test whether the content of the reasoning matters (as in LREM's ablation, arXiv 2510.14321); query
rewriting (`BASELINE+reasoning`) tests whether an ordinary retriever gains as much from the reasoning as text; the fused
modes show what is left to gain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import InputError
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.runs import drop_identical_ids
from search_r3.evaluation.shuffling import derangement
from search_r3.evaluation.study.fusion_controls import RRF_K, fuse_rows, fuse_runs
from search_r3.evaluation.study.reasoning_cache import ReasoningCache, ReasoningTraces
from search_r3.evaluation.suite import ResultPaths, paths
from search_r3.evaluation.systems import BASELINES, Answers, SearchR3System, System, as_run, open_systems
from search_r3.retrievers.dense import exact_search

BUDGETS = (0, 4, 8, 16, 32, 64)
MODE_DESCRIPTIONS = {
    "off": "the query embedded directly",
    "on": "with its own reasoning",
    "empty": "the reasoning conversation with empty reasoning",
    "shuffled": "with another query's reasoning",
    "repeat": "with the query repeated as its reasoning",
    "bm25+reasoning": "BM25 on the query with the reasoning as plain text",
    "all-minilm-l6-v2+reasoning": "all-MiniLM-L6-v2 on the query with the reasoning as plain text",
    "off+bm25": "off and BM25, fused by rank",
    "on+bm25": "on and BM25, fused by rank",
    "off+on-mean": "off and on, mean embedding",
    "off+on-rrf": "off and on, fused by rank",
    "samples-mean": "several sampled reasoning traces, mean embedding",
    "samples-rrf": "several sampled reasoning traces, fused by rank",
}
"""All modes except those of the budget curve, in the order of the table, with their descriptions."""


@dataclass(frozen=True)
class ControlConfig:
    """Settings of a study's modes."""

    budget: int = 32
    """Maximum number of tokens in a reasoning trace, for `on` and every control that uses its reasoning."""
    budgets: tuple[int, ...] = BUDGETS
    """The points of the budget curve: 0 is `empty`, `budget` is `on`, and the others are modes `on-4`, `on-8`, ..."""
    samples: int = 4
    """Reasoning traces for each query in `samples-mean` and `samples-rrf`."""
    temperature: float = 1.0
    """Sampling temperature; 1 is the model's own distribution."""
    seed: int = 0
    """Seed of the samples and of the assignment of other queries' reasoning."""

    def __post_init__(self) -> None:
        for name, value, least in (("budget", self.budget, 1), ("samples", self.samples, 2)):
            if value < least:
                raise InputError(f"{name} is {value}; expected at least {least}")
        if any(b < 0 for b in self.budgets) or len(set(self.budgets)) != len(self.budgets):
            raise InputError(f"budgets {list(self.budgets)}: expected distinct numbers of 0 or more, such as 0,8,32")
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}; expected more than 0, or all samples are the same")

    @property
    def modes(self) -> list[str]:
        """All modes of a study: off, on, the controls, and one for each further budget of the curve."""
        return [
            *MODE_DESCRIPTIONS,
            *(mode for mode in map(self.mode_of_budget, sorted(self.budgets)) if mode not in MODE_DESCRIPTIONS),
        ]

    def mode_of_budget(self, budget: int) -> str:
        """The mode of a point on the budget curve."""
        return "on" if budget == self.budget else "empty" if budget == 0 else f"on-{budget}"


class StudyContext:
    """State shared by all modes of one model on one data set (document embeddings, reasoning traces, baselines), each
    computed once.

    Args:
        system: the model in any mode; its settings (length limit, batch size) apply to all modes.
        name: the model's name in results; a mode's system is called NAME.MODE.
        documents, queries: id -> text, none blank.
        depth: documents kept per query.
        embeddings, reasoning_cache: the caches of both; without `embeddings`, nothing is cached.
        ignore_identical_ids: ignore documents with the query's own id, also before rankings are fused.
    """

    def __init__(
        self,
        system: SearchR3System,
        name: str,
        documents: Mapping[str, str],
        queries: Mapping[str, str],
        config: ControlConfig,
        *,
        depth: int,
        embeddings: EmbeddingCache | None,
        reasoning_cache: ReasoningCache,
        ignore_identical_ids: bool = False,
    ) -> None:
        self.system, self.model, self.name, self.config = system, system.model, name, config
        self.documents, self.queries, self.depth = documents, queries, depth
        self.ignore_identical_ids = ignore_identical_ids
        self.embeddings, self.reasoning_cache = embeddings, reasoning_cache
        self._rows: tuple[np.ndarray, float] | None = None
        self._direct: tuple[np.ndarray, float] | None = None
        self._answers: dict[str, Answers] = {}
        self._baselines: dict[str, System] = {}

    @property
    def document_rows(self) -> np.ndarray:
        """The documents' embeddings, float32 (N, D)."""
        return self._documents()[0]

    @property
    def direct_rows(self) -> np.ndarray:
        """The queries embedded directly, float32 (Q, D)."""
        return self._embed_directly()[0]

    def share_documents(self, other: StudyContext) -> None:
        """Use the document embeddings of another context with the same model and documents."""
        self._rows = other._documents()

    def traces(self, budget: int | None = None, sample: int | None = None) -> ReasoningTraces:
        """The queries' reasoning traces with this budget (None: the study's): greedy, or one of the samples."""
        config = self.config
        sampling: dict[str, Any] = {}
        if sample is not None:
            sampling = {"temperature": config.temperature, "seed": config.seed + sample}
        return self.reasoning_cache.traces(
            self.model,
            list(self.queries),
            list(self.queries.values()),
            budget=config.budget if budget is None else budget,
            batch_size=self.system.batch_size,
            show_progress=self.system.show_progress,
            **sampling,
        )

    def baseline(self, name: str) -> System:
        """BM25 or all-MiniLM-L6-v2, loaded once."""
        if name not in self._baselines:
            self._baselines[name] = open_systems(
                name,
                device=self.system.device,
                batch_size=self.system.batch_size,
                show_progress=self.system.show_progress,
            )[0]
        return self._baselines[name]

    def answers(self, mode: str) -> Answers:
        """The run of a mode, or of a baseline by its name."""
        if mode not in self._answers:
            self._answers[mode] = self._answer(mode)
        return self._answers[mode]

    def identity(self, mode: str) -> dict[str, Any]:
        """Everything that determines a mode's ranking, except the data."""
        config = self.config
        identity: dict[str, Any] = {**self.system.document_identity, "mode": mode}
        if mode not in ("off", "empty", "off+bm25"):
            identity["max_reasoning_tokens"] = int(mode[3:]) if mode.startswith("on-") else config.budget
        if mode == "shuffled":
            identity["seed"] = config.seed
        if mode.startswith("samples"):
            identity |= {
                "samples": config.samples,
                "temperature": config.temperature,
                "seed": config.seed,
                "batch_size": self.system.batch_size,
            }
        if mode.endswith(("rrf", "+bm25")):
            identity["rrf_k"] = RRF_K
        for baseline in BASELINES:
            if baseline in mode.split("+"):
                identity["baseline"] = self.baseline(baseline).identity
        return identity

    def _answer(self, mode: str) -> Answers:
        if mode in BASELINES:
            return self._by_baseline(mode, self.queries)
        if mode == "off":
            return self._search(*self._embed_directly())
        if mode == "on" or mode.startswith("on-"):
            traces = self.traces(None if mode == "on" else int(mode[3:]))
            return self._search(traces.rows, traces.seconds, self._records(traces))
        if mode == "empty":
            return self._with_reasoning([""] * len(self.queries))
        if mode == "repeat":
            return self._with_reasoning(list(self.queries.values()))
        if mode == "shuffled":
            traces, order = self.traces(), derangement(len(self.queries), self.config.seed)
            reasoning = [traces.token_ids[i] for i in order]
            return self._with_reasoning(reasoning, self._records(traces, order), traces.seconds)
        if mode.endswith("+reasoning"):
            return self._rewritten(mode.removesuffix("+reasoning"))
        if mode in ("off+bm25", "on+bm25", "off+on-rrf"):
            first, second = mode.removesuffix("-rrf").split("+")
            return self._fused([self.answers(first), self.answers(second)])
        if mode == "off+on-mean":
            traces, (direct, seconds) = self.traces(), self._embed_directly()
            return self._search(fuse_rows([direct, traces.rows]), seconds + traces.seconds)
        if mode in ("samples-mean", "samples-rrf"):
            samples = [self.traces(sample=i) for i in range(self.config.samples)]
            if mode == "samples-mean":
                return self._search(fuse_rows([one.rows for one in samples]), sum(one.seconds for one in samples))
            return self._fused([self._search(one.rows, one.seconds) for one in samples])
        raise InputError(f"unknown control {mode!r}; choose from: {', '.join(self.config.modes)}")

    def _documents(self) -> tuple[np.ndarray, float]:
        if self._rows is None:
            self._rows = self.system.document_rows(self.documents, self.embeddings)
        return self._rows

    def _embed_directly(self) -> tuple[np.ndarray, float]:
        if self._direct is None:
            self._direct = _timed(
                lambda: self.model.encode_query(
                    list(self.queries.values()),
                    reasoning=False,
                    batch_size=self.system.batch_size,
                    show_progress_bar=self.system.show_progress,
                )
            )
        return self._direct

    def _with_reasoning(
        self, reasoning: Sequence[Any], records: list[dict[str, Any]] | None = None, before: float = 0.0
    ) -> Answers:
        rows, seconds = _timed(
            lambda: self.model.encode_with_reasoning(
                list(self.queries.values()),
                reasoning,
                max_reasoning_tokens=self.config.budget,
                batch_size=self.system.batch_size,
                show_progress_bar=self.system.show_progress,
            )
        )
        return self._search(rows, seconds + before, records)

    def _search(
        self, rows_QD: np.ndarray, query_seconds: float, records: list[dict[str, Any]] | None = None
    ) -> Answers:
        documents_ND, document_seconds = self._documents()
        scores, indices = exact_search(rows_QD, documents_ND, self.depth + self.ignore_identical_ids)
        run = as_run(list(self.queries), list(self.documents), scores, indices)
        return self._without_own_ids(Answers(run, document_seconds, query_seconds, records))

    def _by_baseline(self, name: str, queries: Mapping[str, str]) -> Answers:
        depth = self.depth + self.ignore_identical_ids
        return self._without_own_ids(self.baseline(name).answer(self.documents, queries, depth, self.embeddings))

    def _without_own_ids(self, answers: Answers) -> Answers:
        """The answers without documents that have the query's own id, if these are ignored."""
        if not self.ignore_identical_ids:
            return answers
        return replace(answers, run=drop_identical_ids(answers.run, self.depth))

    def _rewritten(self, baseline: str) -> Answers:
        traces = self.traces()
        texts = zip(self.queries.items(), traces.texts, strict=True)
        queries = {qid: f"{query} {reasoning}".strip() for (qid, query), reasoning in texts}
        answers = self._by_baseline(baseline, queries)
        return Answers(answers.run, answers.document_seconds, answers.query_seconds + traces.seconds)

    def _fused(self, parts: list[Answers]) -> Answers:
        run = fuse_runs([part.run for part in parts], self.depth)
        return Answers(
            {qid: run[qid] for qid in self.queries if qid in run},
            max(part.document_seconds for part in parts),
            sum(part.query_seconds for part in parts),
        )

    def _records(self, traces: ReasoningTraces, order: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """One record per query, as `search-r3 evaluate` writes them; with `order`, also whose reasoning it was."""
        qids = list(self.queries)
        return [
            {
                "qid": qid,
                "text": traces.texts[i],
                "num_tokens": len(traces.token_ids[i]),
                "forced": traces.forced[i],
                **({} if order is None else {"from": qids[i]}),
            }
            for qid, i in zip(qids, order or range(len(qids)), strict=True)
        ]


class ControlSystem:
    """One mode of a study as a `System`, so that it is run, measured, recorded and skipped like any other system."""

    def __init__(self, context: StudyContext, mode: str) -> None:
        self.context, self.mode = context, mode
        self.name = f"{context.name}.{mode}"
        self.device = context.system.device

    @property
    def identity(self) -> dict[str, Any]:
        return self.context.identity(self.mode)

    def answer(
        self, documents: Mapping[str, str], queries: Mapping[str, str], k: int, cache: EmbeddingCache | None
    ) -> Answers:
        """The context's answers. Raises ValueError unless documents and queries are those of the context."""
        if queries.keys() != self.context.queries.keys() or documents.keys() != self.context.documents.keys():
            raise ValueError("this control was called with texts that are not its study's")
        return self.context.answers(self.mode)


def study_path(output: str | Path, dataset: str, system: str) -> Path:
    """Path of the study file for a model and data set."""
    return Path(output) / "studies" / dataset / f"{system}.json"


def mode_paths(output: str | Path, dataset: str, system: str, mode: str) -> ResultPaths:
    """The files of a mode. `off` and `on` use those of `search-r3 evaluate`; the record of a control is stored with the
    study, so that tables of results do not include it."""
    usual = paths(output, dataset, f"{system}.{mode}")
    if mode in ("off", "on"):
        return usual
    metrics = study_path(output, dataset, system).with_suffix("") / f"{mode}.json"
    return ResultPaths(usual.run, usual.reasoning, metrics)


def _timed(encode: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    started = time.perf_counter()
    return encode(), time.perf_counter() - started

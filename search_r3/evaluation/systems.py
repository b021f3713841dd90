"""Systems by name, as on the command line: BM25, sentence-transformers models, endpoints' models, and SearchR3.

A SearchR3 model is one system per mode: `NAME.off` embeds the query directly, `NAME.on` reasons first, `NAME.latent`
reasons in latent steps, and `reading_modes` has those that read the first hits. A length limit truncates the documents
of SearchR3 only; other systems read documents up to their own limit, so truncation never favors SearchR3.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from search_r3.errors import InputError
from search_r3.evaluation.baselines.endpoint_model import EndpointEncoder, PendingTexts
from search_r3.evaluation.baselines.external_models import (
    FILE_ENDINGS,
    CostApproval,
    ExternalModelConfig,
    parse_external_model,
)
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.given_reasoning import GIVEN_MODES, GivenReasoning
from search_r3.evaluation.reading_modes import READING_MODES, check_mode, embed_queries, mode_identity
from search_r3.files import expand_user
from search_r3.model.engines.registry import TORCH
from search_r3.retrievers.bm25 import BM25Retriever
from search_r3.retrievers.dense import BUNDLED, SentenceTransformerRetriever, exact_search

MODES = ("off", "on")
"""The modes that are run by default."""
ALL_MODES = (*MODES, "latent", *GIVEN_MODES, *READING_MODES)
WITH_WORDS = ("on", "read+on")
"""The modes in which the model writes reasoning."""
BASELINES = ("bm25", "all-minilm-l6-v2")
"""The names of the two baseline systems."""


@dataclass
class Answers:
    """The results of a system.

    Attributes:
        run: query id -> document id -> score.
        document_seconds: time to index or encode the documents, possibly in an earlier run (embeddings may be cached).
        query_seconds: time to encode all queries, reasoning included; for BM25, to search them.
        reasoning: for modes with words, one record per query: qid, text, num_tokens, forced; `read` are the ids of the
            documents that were read before, `from` the query to which given reasoning belongs.
    """

    run: dict[str, dict[str, float]]
    document_seconds: float
    query_seconds: float
    reasoning: list[dict[str, Any]] | None = None


class System(Protocol):
    """A retrieval system under evaluation, one column in the tables of results."""

    name: str
    device: str

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the ranking, except the data; contains `max_length` (None: no limit)."""
        ...

    def answer(
        self, documents: Mapping[str, str], queries: Mapping[str, str], k: int, cache: EmbeddingCache | None
    ) -> Answers:
        """Rank `documents` (id -> full text, none blank) for each of `queries` (id -> text): the exact top k."""
        ...


class BM25System:
    """BM25; documents that share no term with a query are not part of its ranking."""

    name = "bm25"
    device = "cpu"

    def __init__(self) -> None:
        self.retriever = BM25Retriever()

    @property
    def identity(self) -> dict[str, Any]:
        return {**self.retriever.identity, "dtype": "float32", "max_length": None}

    def answer(
        self, documents: Mapping[str, str], queries: Mapping[str, str], k: int, cache: EmbeddingCache | None
    ) -> Answers:
        started = time.perf_counter()
        self.retriever.index(list(documents.values()))
        indexed = time.perf_counter()
        scores, indices = self.retriever.search(list(queries.values()), k)
        finished = time.perf_counter()
        run = as_run(list(queries), list(documents), scores, indices, above=0.0)
        return Answers(run, indexed - started, finished - indexed)


class SentenceTransformerSystem:
    """A sentence-transformers model at its own length limit."""

    def __init__(self, retriever: SentenceTransformerRetriever, name: str, show_progress: bool | None = None) -> None:
        self.retriever = retriever
        self.name = name
        self.device = retriever.device
        self.show_progress = show_progress

    @property
    def identity(self) -> dict[str, Any]:
        return dict(self.retriever.identity)

    def answer(
        self, documents: Mapping[str, str], queries: Mapping[str, str], k: int, cache: EmbeddingCache | None
    ) -> Answers:
        identity = {name: value for name, value in self.identity.items() if name != "query_prompt"}
        rows_ND, seconds = _document_rows(self, self.retriever.encode_document, documents, identity, cache)
        started = time.perf_counter()
        rows_QD = self.retriever.encode_query(list(queries.values()))
        query_seconds = time.perf_counter() - started
        scores, indices = exact_search(rows_QD, rows_ND, k)
        return Answers(as_run(list(queries), list(documents), scores, indices), seconds, query_seconds)


class EndpointSystem:
    """A model behind an OpenAI-compatible endpoint; embeddings of documents and queries are both cached."""

    device = "endpoint"

    def __init__(self, encoder: EndpointEncoder, name: str, show_progress: bool | None = None) -> None:
        self.encoder = encoder
        self.name = name
        self.show_progress = show_progress

    @property
    def identity(self) -> dict[str, Any]:
        return self.encoder.identity

    def answer(
        self, documents: Mapping[str, str], queries: Mapping[str, str], k: int, cache: EmbeddingCache | None
    ) -> Answers:
        document_work = self.encoder.plan(list(documents.values()), "document", cache)
        query_work = self.encoder.plan(list(queries.values()), "query", cache)
        self.encoder.approve(self.name, [document_work, query_work])
        rows_ND, document_seconds = self._run(document_work, "documents", cache)
        rows_QD, query_seconds = self._run(query_work, "queries", cache)
        scores, indices = exact_search(rows_QD, rows_ND, k)
        return Answers(as_run(list(queries), list(documents), scores, indices), document_seconds, query_seconds)

    def _run(self, work: PendingTexts, what: str, cache: EmbeddingCache | None) -> tuple[np.ndarray, float]:
        return self.encoder.run(work, cache, label=f"{self.name}: {what}", show_progress=self.show_progress)


class SearchR3System:
    """A SearchR3 model (or any object with its methods) in one mode.

    Attributes:
        given: in `GIVEN_MODES`, the reasoning of the data set (`with_reasoning`); else None.
    """

    given: GivenReasoning | None = None

    def __init__(
        self,
        model: Any,
        name: str,
        mode: str,
        *,
        max_length: int | None = None,
        max_reasoning_tokens: int = 32,
        batch_size: int = 32,
        show_progress: bool | None = None,
    ) -> None:
        self.model = model
        self.name = f"{name}.{mode}"
        self.mode = mode
        self.max_length = max_length if max_length is not None else _default_document_tokens()
        self.max_reasoning_tokens = max_reasoning_tokens
        self.batch_size = batch_size
        self.show_progress = show_progress
        engine_model = getattr(getattr(model, "checkpoint", None), "model", None)
        self.device = str(getattr(engine_model, "device", "cpu"))

    @property
    def identity(self) -> dict[str, Any]:
        identity = {**self.document_identity, "contract_hash": self.model.contract_hash, "mode": self.mode}
        if self.mode in READING_MODES:
            identity |= mode_identity(self.model, self.mode)
        if self.given is not None:
            identity |= self.given.identity(self.mode)
        return identity | ({"max_reasoning_tokens": self.max_reasoning_tokens} if self.mode in WITH_WORDS else {})

    @property
    def needs_reasoning(self) -> bool:
        """Whether its mode embeds queries with a data set's reasoning, which it does not have yet."""
        return self.mode in GIVEN_MODES and self.given is None

    def with_reasoning(self, given: GivenReasoning) -> SearchR3System:
        """The system for a data set with this reasoning; it shares the model."""
        bound = copy.copy(self)
        bound.given = given
        return bound

    @property
    def is_control(self) -> bool:
        """Whether this mode only serves to explain another one, so that tables of results leave it out."""
        return "." in self.mode

    @property
    def document_identity(self) -> dict[str, Any]:
        """Everything that determines a document's embedding; of a query adapter, the model of its documents."""
        documents = getattr(self.model, "documents_contract", None)
        identity = {
            "contract_hash": self.model.contract_hash if documents is None else documents.hash,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "max_length": self.max_length,
        }
        spec = getattr(self.model, "engine_spec", TORCH)
        return identity | ({} if spec is TORCH else {"engine": spec.name})

    def document_rows(self, documents: Mapping[str, str], cache: EmbeddingCache | None) -> tuple[np.ndarray, float]:
        """Embeddings of `documents`, float32 (N, D), the same for every mode; and the time they took, in seconds."""

        def encode(texts: list[str]) -> np.ndarray:
            return self.model.encode_document(
                texts, batch_size=self.batch_size, show_progress_bar=False, max_length=self.max_length
            )

        return _document_rows(self, encode, documents, self.document_identity, cache)

    def answer(
        self, documents: Mapping[str, str], queries: Mapping[str, str], k: int, cache: EmbeddingCache | None
    ) -> Answers:
        rows_ND, seconds = self.document_rows(documents, cache)
        started = time.perf_counter()
        texts, reasoned, read, reasoning = list(queries.values()), None, None, None
        settings: dict[str, Any] = {"batch_size": self.batch_size, "show_progress_bar": self.show_progress}
        if self.mode in READING_MODES:
            found = embed_queries(
                self.model, self.mode, texts, list(documents.values()), rows_ND,
                max_reasoning_tokens=self.max_reasoning_tokens, **settings,
            )  # fmt: skip
            rows_QD, reasoned, read = found.rows_QD, found.reasoned, found.hits_QK
        elif self.mode in GIVEN_MODES:
            if self.given is None:
                raise ValueError(f"mode {self.mode} before with_reasoning: it embeds a data set's reasoning")
            reasoning = self.given.traces(self.mode, list(queries), self.model.count_tokens)
            words = [record["text"] for record in reasoning]
            rows_QD = self.model.encode_query(texts, reasoning_text=words, **settings)
        elif self.mode == "on":
            reasoned = self.model.reason(texts, max_reasoning_tokens=self.max_reasoning_tokens, **settings)
            rows_QD = np.stack([r.embedding for r in reasoned])
        else:
            latent: Any = "latent" if self.mode == "latent" else False
            rows_QD = self.model.encode_query(texts, reasoning=latent, **settings)
        query_seconds = time.perf_counter() - started
        scores, indices = exact_search(rows_QD, rows_ND, k)
        if reasoned is not None:
            reasoning = _records(list(queries), reasoned, list(documents), read)
        return Answers(as_run(list(queries), list(documents), scores, indices), seconds, query_seconds, reasoning)


def _records(
    query_ids: Sequence[str], reasoned: Sequence[Any], document_ids: Sequence[str], read_QK: np.ndarray | None
) -> list[dict[str, Any]]:
    """See `Answers.reasoning`."""
    records: list[dict[str, Any]] = [
        {"qid": qid, "text": r.text, "num_tokens": r.num_tokens, "forced": r.forced}
        for qid, r in zip(query_ids, reasoned, strict=True)
    ]
    for record, hits in zip(records, () if read_QK is None else read_QK, strict=False):
        record["read"] = [document_ids[n] for n in hits]
    return records


def open_systems(
    spec: str,
    *,
    modes: Sequence[str] = MODES,
    max_length: int | None = None,
    max_reasoning_tokens: int = 32,
    batch_size: int = 32,
    device: str | None = None,
    dtype: str = "auto",
    engine: str = "auto",
    show_progress: bool | None = None,
    approval: CostApproval | None = None,
) -> list[System]:
    """The systems that a name stands for, with the model loaded once.

    Args:
        spec: "bm25"; "all-minilm-l6-v2"; "st:NAME_OR_PATH" for any sentence-transformers model; "endpoint:MODEL@URL"
            for one behind an OpenAI-compatible endpoint; a YAML file that describes either (see `ExternalModelConfig`);
            else a SearchR3 model: a bundled name, a folder or a hub id. "LABEL=SPEC" names it in the results.
        modes: any of `ALL_MODES`, for a SearchR3 model; other systems have no modes. The systems of `GIVEN_MODES` need
            the reasoning of a data set (`SearchR3System.with_reasoning`).
        max_length: tokens kept of each document by a SearchR3 model (512 by default).
        engine: what runs a SearchR3 model (see `SearchR3.from_pretrained`); others have no engines.
        approval: who approves the cost of an endpoint; without it, nothing above the limit is sent.

    Raises:
        InputError: a name or mode is unknown, a model has no latent or reading mode, or a package is not installed.
    """
    check_modes(modes)
    if max_length is not None and max_length < 1:
        raise InputError(f"max_length is {max_length}; expected at least 1 token")
    label, source = split_label(spec)
    if source == "bm25":
        bm25 = BM25System()
        bm25.name = label or bm25.name
        return [bm25]
    external = ExternalModelConfig(model=source) if source in BUNDLED else parse_external_model(source)
    if external is not None:
        if source.endswith(FILE_ENDINGS):
            label = label or clean_name(Path(source).stem)
        if external.endpoint is not None:
            encoder = EndpointEncoder(external, approval, batch_size)
            return [EndpointSystem(encoder, label or clean_name(Path(external.model).name), show_progress)]
        retriever = SentenceTransformerRetriever(
            external.model,
            device=device,
            batch_size=batch_size,
            query_prompt=external.query_prompt,
            document_prompt=external.document_prompt,
        )
        return [SentenceTransformerSystem(retriever, label or clean_name(retriever.name), show_progress)]
    from search_r3.model.searchr3 import SearchR3

    model = SearchR3.from_pretrained(source, device=device, dtype=dtype, engine=engine)
    if "latent" in modes:
        from search_r3.model.latent_steps import check_latent

        check_latent(model)
    for mode in modes:
        check_mode(model, mode)
    settings: dict[str, Any] = {
        "max_length": max_length,
        "max_reasoning_tokens": max_reasoning_tokens,
        "batch_size": batch_size,
        "show_progress": show_progress,
    }
    name = label or model_name(source)
    return [SearchR3System(model, name, mode, **settings) for mode in modes]


def check_spec(spec: str) -> None:
    """Raise InputError for a name unknown to `open_systems` or an endpoint without a key; loads, fetches and sends
    nothing."""
    from search_r3.model.resolve import check_name

    source = split_label(spec)[1]
    if source == "bm25" or source in BUNDLED:
        return
    external = parse_external_model(source)
    if external is None:
        check_name(source)
    elif external.endpoint is not None:
        external.read_key()


def model_name(source: str) -> str:
    """A SearchR3 model's name in results: an adapter's folder name; `search-r3-NAME-base` for an untrained base."""
    from search_r3.model.checkpoint import read_record
    from search_r3.model.resolve import resolve

    folder = resolve(source)
    if read_record(folder) is not None:
        return clean_name(folder.resolve().name)
    return clean_name(f"search-r3-{expand_user(source).resolve().name.lower()}-base")


def check_modes(modes: Sequence[str]) -> None:
    """Raise InputError unless `modes` are some of `ALL_MODES`."""
    for mode in modes:
        if mode not in ALL_MODES:
            raise InputError(f"unknown mode {mode!r}; choose from: {', '.join(ALL_MODES)}")
    if not modes:
        raise InputError(f"no mode given; choose from: {', '.join(ALL_MODES)}")


def split_label(spec: str) -> tuple[str | None, str]:
    """("mine", "runs/x") for "mine=runs/x", (None, spec) without a label; a path may contain "="."""
    label, equals, source = spec.partition("=")
    if not equals or "/" in label or ":" in label:
        return None, spec
    if not source or clean_name(label) != label:
        raise InputError(f"bad system {spec!r}; expected LABEL=SPEC with a label of letters, digits, dot, _ and -")
    return label, source


def clean_name(name: str) -> str:
    """The name of a system in run files: letters, digits, dot, _ and -."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _default_document_tokens() -> int:
    from search_r3.model.searchr3 import DEFAULT_DOCUMENT_TOKENS

    return DEFAULT_DOCUMENT_TOKENS


def _document_rows(
    system: Any, encode: Any, documents: Mapping[str, str], identity: Mapping[str, Any], cache: EmbeddingCache | None
) -> tuple[np.ndarray, float]:
    texts = list(documents.values())
    if cache is None:
        started = time.perf_counter()
        return encode(texts), time.perf_counter() - started
    encoded = cache.encode(
        encode,
        list(documents),
        texts,
        {**identity, "side": "document"},
        label=f"{system.name}: documents",
        show_progress=system.show_progress,
    )
    return encoded.rows, encoded.seconds


def as_run(
    query_ids: Sequence[str],
    document_ids: Sequence[str],
    scores_QK: np.ndarray,
    indices_QK: np.ndarray,
    above: float = -np.inf,
) -> dict[str, dict[str, float]]:
    """The scores and document indices of a search, both (Q, K), as a run; only scores greater than `above`."""

    def row(q: int) -> Iterator[tuple[str, float]]:
        for score, index in zip(scores_QK[q], indices_QK[q], strict=True):
            if score > above:
                yield document_ids[index], float(score)

    return {qid: dict(row(q)) for q, qid in enumerate(query_ids)}

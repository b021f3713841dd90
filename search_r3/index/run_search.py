"""Searching an index: cosine over the vectors, BM25 over the words, and the two fused (`search_r3.rank_fusion`).

The backend provides the ranked lists (`search_r3.index.backends.index_backend`). Equal scores are ordered by id, so a
repeated search gives the same list. A document is one hit, represented by its best chunk, unless chunks are asked for.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypedDict, cast, get_args

import numpy as np

from search_r3.errors import InputError
from search_r3.index.backends.index_backend import IndexBackend, Row, Scored
from search_r3.index.encoder_protocol import Encoder, ReadsReasoning
from search_r3.index.results.query_words import composed, without_stop_words
from search_r3.index.results.snippets import make_snippet
from search_r3.index.row_keys import CONTENT, METADATA
from search_r3.index.source_document import Scalar
from search_r3.model.reasoned import REASONING_TEXT_TOKENS, check_reasoning_text
from search_r3.rank_fusion import fuse_scores, reciprocal_rank_fusion

Mode = Literal["hybrid", "vector", "text"]
Fusion = Literal["linear", "rrf"]

POOL = 100  # a hybrid search fuses at least this many rows of each list
MAX_HITS = 1_000
MAX_POOL = 20_000  # most chunks fetched to find k documents; if a few documents have that many, fewer than k are found
MAX_QUERY_CHARACTERS = 100_000


class SearchOptions(TypedDict, total=False):
    """The options of `SearchIndex.search` (described there, with their defaults), for callers that forward them."""

    k: int
    mode: Mode
    reasoning: bool | Literal["auto", "latent"]
    max_reasoning_tokens: int
    reasoning_text: str | None
    where: str | None
    exact: bool
    chunks: bool
    vector_weight: float
    fusion: Fusion


class Searched(Protocol):
    """The part of `SearchIndex` that a search uses."""

    @property
    def backend(self) -> IndexBackend: ...
    def check_model(self, model: Encoder) -> None: ...


@dataclass(frozen=True)
class Hit:
    """One chunk found.

    Attributes:
        score: what the hits are ordered by: cosine (vector), BM25 (text), or both fused (hybrid). With
            `fusion="linear"` it lies between 0 and 1; 1 is the best row of both lists.
        ranks, scores: the chunk's rank (from 1) and score in each list that contains it: "vector", "text".
        highlights: (start, end) positions within `snippet`.
        snippet_line: the line of the file where the snippet begins.
    """

    id: str
    document: str
    title: str
    text: str
    snippet: str
    highlights: list[tuple[int, int]]
    snippet_line: int
    score: float
    metadata: dict[str, Scalar]
    path: str
    start_line: int
    end_line: int
    ranks: dict[str, int]
    scores: dict[str, float]


@dataclass(frozen=True)
class ReasoningTrace:
    """What the model wrote before it embedded the query, or was given to read (`reasoning_text`).

    Attributes:
        num_tokens: tokens of it that the model wrote or read.
        forced: whether it was cut off at the budget; a given one, at 512 tokens.
    """

    text: str
    num_tokens: int
    forced: bool


@dataclass(frozen=True)
class Timings:
    """Milliseconds: `reason_ms` for reasoning and embedding the query, `search_ms` for everything after that."""

    reason_ms: float
    search_ms: float


@dataclass(frozen=True)
class SearchResult:
    """The hits, best first, and how they were found."""

    query: str
    mode: Mode
    hits: list[Hit]
    reasoning: ReasoningTrace | None
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def run_search(
    index: Searched,
    query: str,
    model: Encoder | None,
    *,
    k: int,
    mode: Mode,
    reasoning: bool | Literal["auto", "latent"],
    max_reasoning_tokens: int,
    reasoning_text: str | None,
    where: str | None,
    exact: bool,
    chunks: bool,
    vector_weight: float,
    fusion: Fusion,
) -> SearchResult:
    """Find the `k` best documents for `query`, each by its best chunk; `SearchIndex.search` describes the options.

    Args:
        index: an opened index pinned at its version, as the search reads it several times.
    """
    query = _checked_query(query)
    _check_options(k, mode, vector_weight, fusion)
    check_given(reasoning_text, reasoning, mode)
    backend = index.backend
    where = check_where(index, where)
    if mode != "vector":
        backend.check_text()
    started = time.perf_counter()
    vector: np.ndarray | None = None
    trace: ReasoningTrace | None = None
    if mode != "text":
        if model is None:
            raise InputError(f'mode "{mode}" needs a model to embed the query; give one, or search with mode "text"')
        index.check_model(model)
        if reasoning_text is not None:
            vector, trace = _embed_given(query, reasoning_text, model)
        elif reasoning == "auto":
            vector, trace = _embed_by_rule(query, model, max_reasoning_tokens, backend, where, exact)
        else:
            vector, trace = _embed(query, model, reasoning, max_reasoning_tokens)
    embedded = time.perf_counter()
    pool = max(POOL, 2 * k) if mode == "hybrid" else k
    while True:
        lists: dict[str, list[Scored]] = {}
        if vector is not None:
            lists["vector"] = backend.search(vector, pool, where, exact)
        if mode != "vector":
            lists["text"] = backend.search_text(without_stop_words(query), pool, where)
        order = _order(lists, fusion, vector_weight)
        order = order if chunks else _first_of_each_document(order)
        if len(order) >= k or pool >= MAX_POOL or all(len(ranking) < pool for ranking in lists.values()):
            break
        pool *= 4  # a few documents filled the lists
    hits = [_hit(row, query, score, ranks, scores) for row, score, ranks, scores in order[:k]]
    done = time.perf_counter()
    timings = Timings(round((embedded - started) * 1e3, 2), round((done - embedded) * 1e3, 2))
    return SearchResult(query, mode, hits, trace, timings)


def check_where(index: Searched, where: str | None) -> str | None:
    """The filter in the form that the index understands; None if it is blank.

    Raises:
        InputError: it does not parse, names an unknown column or is not a condition (the message lists the columns), or
            the index does not support filters.
    """
    return None if where is None or not where.strip() else index.backend.check_filter(where)


def _checked_query(query: str) -> str:
    if not isinstance(query, str) or not query.strip():
        raise InputError("the query is empty; give some words")
    if len(query) > MAX_QUERY_CHARACTERS:
        raise InputError(f"the query has {len(query):,} characters, the limit is {MAX_QUERY_CHARACTERS:,}; shorten it")
    return composed(query.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")).strip()


def _check_options(k: int, mode: str, vector_weight: float, fusion: str) -> None:
    for name, value, kind in (("mode", mode, Mode), ("fusion", fusion, Fusion)):
        if value not in get_args(kind):
            raise InputError(f'{name} is "{value}"; choose one of: {", ".join(get_args(kind))}')
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_HITS:
        raise InputError(f"k is {k}; give a whole number from 1 to {MAX_HITS:,}")
    number = isinstance(vector_weight, (int, float)) and not isinstance(vector_weight, bool)
    if not number or not 0 <= vector_weight <= 1:
        raise InputError(f"vector_weight is {vector_weight!r}; give a number from 0 (words only) to 1 (vectors only)")


def _embed(
    query: str, model: Encoder, reasoning: bool | Literal["auto", "latent"], max_reasoning_tokens: int
) -> tuple[np.ndarray, ReasoningTrace | None]:
    trace = None
    if reasoning is True:
        reasoned = model.reason([query], max_reasoning_tokens=max_reasoning_tokens)[0]
        trace = ReasoningTrace(reasoned.text, int(reasoned.num_tokens), bool(reasoned.forced))
        vector = np.asarray(reasoned.embedding, dtype=np.float32).reshape(-1)
    else:
        rows = model.encode_query([query], reasoning=reasoning, max_reasoning_tokens=max_reasoning_tokens)
        vector = np.asarray(rows, dtype=np.float32).reshape(-1)
    return _usable(vector, model), trace


def _embed_by_rule(
    query: str, model: Encoder, max_reasoning_tokens: int, backend: IndexBackend, where: str | None, exact: bool
) -> tuple[np.ndarray, ReasoningTrace | None]:
    """Embed directly, and again after reasoning if the model's rule expects from the cosines that it helps."""
    rule = getattr(model, "adaptive_rule", None)
    if rule is None:
        return _embed(query, model, "auto", max_reasoning_tokens)
    vector, trace = _embed(query, model, False, max_reasoning_tokens)
    cosines = [cosine for _, cosine in backend.search(vector, rule.depth, where, exact)]
    if not cosines or not bool(rule.decide([cosines])[0]):
        return vector, trace
    return _embed(query, model, True, max_reasoning_tokens)


def check_given(reasoning_text: str | None, reasoning: object, mode: str) -> None:
    """Raise InputError if `reasoning_text` is no string, or contradicts another option of the search."""
    if reasoning_text is None:
        return
    if not isinstance(reasoning_text, str):
        raise InputError(f"reasoning_text must be a string, got a {type(reasoning_text).__name__}")
    if mode == "text":
        raise InputError('reasoning_text is read by the model, which mode "text" does not use; search with "hybrid"')
    check_reasoning_text(reasoning)


def _embed_given(query: str, reasoning_text: str, model: Encoder) -> tuple[np.ndarray, ReasoningTrace]:
    """The embedding behind given words, and these words as the trace."""
    if not hasattr(model, "encode_with_reasoning"):
        raise InputError(f"the model {model.name} cannot read reasoning_text; search without it")
    reader = cast(ReadsReasoning, model)
    rows = reader.encode_with_reasoning([query], [reasoning_text], max_reasoning_tokens=REASONING_TEXT_TOKENS)
    tokens = reader.count_tokens([reasoning_text])[0]
    trace = ReasoningTrace(reasoning_text, min(tokens, REASONING_TEXT_TOKENS), tokens > REASONING_TEXT_TOKENS)
    return _usable(np.asarray(rows, dtype=np.float32).reshape(-1), model), trace


def _usable(vector: np.ndarray, model: Encoder) -> np.ndarray:
    if vector.shape != (model.dimension,) or not np.isfinite(vector).all() or not vector.any():
        raise InputError(f"the model {model.name} returned no usable embedding for this query; check the checkpoint")
    return vector


Ordered = tuple[Row, float, dict[str, int], dict[str, float]]  # row, score, ranks, scores


def _order(lists: dict[str, list[Scored]], fusion: Fusion, vector_weight: float) -> list[Ordered]:
    """The rows of all lists, best first."""
    rows = {row["id"]: row for ranking in lists.values() for row, _ in ranking}
    ranks = {name: {row["id"]: rank for rank, (row, _) in enumerate(ranking, 1)} for name, ranking in lists.items()}
    scores = {name: {row["id"]: float(score) for row, score in ranking} for name, ranking in lists.items()}
    if len(lists) == 1:
        order = list(next(iter(scores.values())).items())
    elif fusion == "linear":
        order = fuse_scores(scores["vector"], scores["text"], vector_weight)
    else:
        order = reciprocal_rank_fusion([[row["id"] for row, _ in ranking] for ranking in lists.values()])
    return [
        (
            rows[identifier],
            score,
            {name: ranks[name][identifier] for name in lists if identifier in ranks[name]},
            {name: scores[name][identifier] for name in lists if identifier in scores[name]},
        )
        for identifier, score in order
    ]


def _first_of_each_document(order: list[Ordered]) -> list[Ordered]:
    best: dict[str, Ordered] = {}
    for entry in order:
        best.setdefault(entry[0]["document"], entry)
    return list(best.values())


def _hit(row: Row, query: str, score: float, ranks: dict[str, int], scores: dict[str, float]) -> Hit:
    title = row["title"]
    text = row[CONTENT][len(title) + 1 :] if title else row[CONTENT]
    snippet = make_snippet(text, query)
    start, end = row["start_line"], row["end_line"]
    return Hit(
        id=row["id"],
        document=row["document"],
        title=title,
        text=text,
        snippet=snippet.text,
        highlights=snippet.highlights,
        snippet_line=min(end, start + text.count("\n", 0, snippet.offset)),
        score=score,
        metadata=json.loads(row[METADATA]),
        path=row["path"],
        start_line=start,
        end_line=end,
        ranks=ranks,
        scores=scores,
    )

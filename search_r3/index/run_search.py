"""Searching an index: cosine over the vectors, BM25 over the words, and the two fused (`search_r3.rank_fusion`).

The backend provides the ranked lists (`search_r3.index.backends.index_backend`). Equal scores are ordered by id, so a
repeated search gives the same list. A document is one hit, represented by its best chunk, unless chunks are asked for.

With `read`, the query is embedded directly and searched with, then embedded again together with the first hits
(`search_r3.model.reading`), and the hits are those of that embedding.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol, TypedDict, cast, get_args

import numpy as np

from search_r3.errors import InputError
from search_r3.hybrid_fusion import DEFAULT_FUSION, HybridFusion
from search_r3.index.backends.index_backend import IndexBackend, Row
from search_r3.index.encoder_protocol import Encoder, ReadsReasoning
from search_r3.index.results.explanation import Explanation, Found, explain
from search_r3.index.results.markup import markup_of
from search_r3.index.results.query_words import composed, corrections
from search_r3.index.results.snippets import Snippet, make_snippet
from search_r3.index.row_keys import CONTENT, METADATA
from search_r3.index.row_ranking import Mode, RowRanking, text_of
from search_r3.index.source_document import Scalar
from search_r3.model.reading import check_count, check_reading
from search_r3.model.reasoned import REASONING_TEXT_TOKENS, check_reasoning_text
from search_r3.rank_fusion import VECTOR_WEIGHT, Fusion

MAX_HITS = 1_000
MAX_QUERY_CHARACTERS = 100_000
MAX_HOPS = 2


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
    vector_weight: float | None
    fusion: Fusion | None
    reasoning_words: bool | None
    read: int
    hops: int
    explained: bool


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
class ReadPassage:
    """A chunk of the index that the query was embedded together with.

    Attributes:
        text: the part that the model read, its title first.
        hop: 1 if the direct search found it, 2 if the first search with passages did.
    """

    id: str
    document: str
    title: str
    text: str
    path: str
    start_line: int
    hop: int


@dataclass(frozen=True)
class Timings:
    """Milliseconds: `reason_ms` for reasoning and embedding the query (with `read`, also for the searches that found
    what is read), `search_ms` for everything after that."""

    reason_ms: float
    search_ms: float


@dataclass(frozen=True)
class SearchResult:
    """The hits, best first, and how they were found.

    Attributes:
        normalized_query: what the model embedded in place of `query`, with typos corrected and case restored; None if
            it embedded `query` itself, or nothing. Words are searched for as they are in `query`, and as corrected.
    """

    query: str
    mode: Mode
    hits: list[Hit]
    reasoning: ReasoningTrace | None
    timings: Timings
    read: list[ReadPassage] = field(default_factory=list)
    explanation: Explanation | None = None
    normalized_query: str | None = None

    @property
    def corrected_query(self) -> str | None:
        """`normalized_query` if it has other letters than `query`; case alone is nothing to tell people."""
        normalized = self.normalized_query
        return None if normalized is None or normalized.casefold() == self.query.casefold() else normalized

    def chosen(self, positions: Sequence[int]) -> SearchResult:
        """The result with the hits at these positions only, in this order, and their explanations."""
        explanation = self.explanation
        if explanation is not None:
            explanation = replace(explanation, hits=[explanation.hits[i] for i in positions])
        return replace(self, hits=[self.hits[i] for i in positions], explanation=explanation)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; without an explanation if there is none."""
        found = asdict(self)
        if self.explanation is None:
            del found["explanation"]
        return found

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> SearchResult:
        """The result of which `to_dict`, perhaps as JSON and with further fields, gave `record`.

        Raises:
            KeyError, TypeError: it is no such record.
        """
        trace, about = record["reasoning"], record.get("explanation")
        return cls(
            record["query"],
            record["mode"],
            [Hit(**hit) for hit in record["hits"]],
            None if trace is None else ReasoningTrace(**trace),
            Timings(**record["timings"]),
            [ReadPassage(**passage) for passage in record["read"]],
            None if about is None else Explanation.from_dict(about),
            record.get("normalized_query"),  # servers of older versions do not send it
        )


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
    vector_weight: float | None,
    fusion: Fusion | None,
    reasoning_words: bool | None,
    read: int,
    hops: int,
    explained: bool,
) -> SearchResult:
    """Find the `k` best documents for `query`, each by its best chunk; `SearchIndex.search` describes the options.

    Args:
        index: an opened index pinned at its version, as the search reads it several times.
    """
    query = _checked_query(query)
    _check_options(k, mode, vector_weight, fusion)
    check_reasoning_words(reasoning_words, reasoning, reasoning_text, mode)
    check_given(reasoning_text, reasoning, mode)
    _check_read(read, hops, mode, reasoning)
    backend = index.backend
    where = check_where(index, where)
    if mode != "vector":
        backend.check_text()
    started = time.perf_counter()
    hybrid = choose_fusion(backend, model, fusion, vector_weight) if mode == "hybrid" else DEFAULT_FUSION
    with_words = reasoning_words or (reasoning_words is None and hybrid.reasoning_words)
    ranking = RowRanking(backend, query, mode, where, exact, chunks, hybrid)
    embedded: _Embedded | None = None
    normalized: str | None = None
    if mode != "text":
        if model is None:
            raise InputError(f'mode "{mode}" needs a model to embed the query; give one, or search with mode "text"')
        index.check_model(model)
        if read:
            check_reading(model)
        thinking = _Thinking(reasoning, max_reasoning_tokens, reasoning_text)
        normalized = _normalized(query, model)
        ranking = replace(ranking, corrections=corrections(query, normalized or query))
        if not with_words:
            ranking.begin(k)
        embedded = _embed_query(ranking, model, thinking, read, hops)
    done_embedding = time.perf_counter()
    if with_words:
        ranking = ranking.with_reasoning("" if embedded is None or embedded.trace is None else embedded.trace.text)
    equal: dict[str, list[Row]] | None = {} if explained else None
    order = ranking.best(None if embedded is None else embedded.vector, k, equal)
    snippets = [_snippet(row, ranking.words) for row, *_ in order]
    hits = [_hit(*found, snippet) for found, snippet in zip(order, snippets, strict=True)]
    trace = None if embedded is None else embedded.trace
    explanation = None
    if equal is not None:
        found = [
            Found(hit.text, snippet, hit.scores, equal.get(hit.id, ()))
            for hit, snippet in zip(hits, snippets, strict=True)
        ]
        words = "" if trace is None else trace.text
        floor = backend.floor_record
        comparable = model is not None and (floor is None or floor.holds_for(model.contract_hash))
        explanation = explain(backend, query, words, found, by_meaning=mode != "text" and comparable)
    done = time.perf_counter()
    timings = Timings(round((done_embedding - started) * 1e3, 2), round((done - done_embedding) * 1e3, 2))
    passages = [] if embedded is None else embedded.read
    return SearchResult(query, mode, hits, trace, timings, passages, explanation, normalized)


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


def choose_fusion(
    backend: IndexBackend, model: Encoder | None, method: Fusion | None, weight: float | None
) -> HybridFusion:
    """The fusion that is asked for; else the one that was tuned for this index and model, if there is one."""
    if method is None and weight is None:
        tuned = backend.tuned_fusion
        if tuned is not None and model is not None and tuned.contract_hash in ("", model.contract_hash):
            return tuned
    return HybridFusion(method or DEFAULT_FUSION.method, VECTOR_WEIGHT if weight is None else weight)


def _check_options(k: int, mode: str, vector_weight: float | None, fusion: str | None) -> None:
    for name, value, kind in (("mode", mode, Mode), ("fusion", fusion, Fusion)):
        if value not in get_args(kind) and not (name == "fusion" and value is None):
            raise InputError(f'{name} is "{value}"; choose one of: {", ".join(get_args(kind))}')
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_HITS:
        raise InputError(f"k is {k}; give a whole number from 1 to {MAX_HITS:,}")
    number = isinstance(vector_weight, (int, float)) and not isinstance(vector_weight, bool)
    if vector_weight is not None and not (number and 0 <= vector_weight <= 1):
        raise InputError(f"vector_weight is {vector_weight!r}; give a number from 0 (words only) to 1 (vectors only)")


def check_reasoning_words(
    reasoning_words: bool | None, reasoning: bool | str, reasoning_text: str | None, mode: str
) -> None:
    """Raise InputError if there would be no words of a reasoning to search for."""
    if not reasoning_words:
        return
    if mode != "hybrid":
        raise InputError(f'reasoning_words adds words to a hybrid search, and mode is "{mode}"; search with "hybrid"')
    if reasoning_text is None and reasoning not in (True, "auto"):
        raise InputError("reasoning_words needs reasoning in words; search with reasoning on or auto")


def check_given(reasoning_text: str | None, reasoning: object, mode: str) -> None:
    """Raise InputError if `reasoning_text` is no string, or contradicts another option of the search."""
    if reasoning_text is None:
        return
    if not isinstance(reasoning_text, str):
        raise InputError(f"reasoning_text must be a string, got a {type(reasoning_text).__name__}")
    if mode == "text":
        raise InputError('reasoning_text is read by the model, which mode "text" does not use; search with "hybrid"')
    check_reasoning_text(reasoning)


def _check_read(read: int, hops: int, mode: str, reasoning: bool | str) -> None:
    check_count(read, "read")
    if isinstance(hops, bool) or not isinstance(hops, int) or not 1 <= hops <= MAX_HOPS:
        raise InputError(f"hops is {hops!r}; give 1 or {MAX_HOPS}")
    if hops > 1 and not read:
        raise InputError(f"hops is {hops}, but nothing is read; set read to the number of passages")
    if read and mode != "text" and reasoning == "latent":
        raise InputError('reasoning="latent" reads no passages; search with reasoning on or off, or with read=0')


@dataclass(frozen=True)
class _Thinking:
    """What comes between the query (with what was read) and the embed token; the options of `SearchIndex.search`."""

    reasoning: bool | Literal["auto", "latent"]
    max_reasoning_tokens: int
    reasoning_text: str | None = None

    @property
    def direct(self) -> _Thinking:
        """Nothing."""
        return replace(self, reasoning=False, reasoning_text=None)


@dataclass(frozen=True)
class _Embedded:
    """A query's vector, and how it came about."""

    vector: np.ndarray
    trace: ReasoningTrace | None = None
    read: list[ReadPassage] = field(default_factory=list)


def _embed_query(ranking: RowRanking, model: Encoder, thinking: _Thinking, read: int, hops: int) -> _Embedded:
    """Embed the query as the options of a search say."""
    query = ranking.query
    direct: _Embedded | None = None
    rule = getattr(model, "adaptive_rule", None) if thinking.reasoning == "auto" else None
    if rule is not None or read:
        direct = _embed(query, model, thinking.direct)
        if rule is not None:
            found = ranking.backend.search(direct.vector, rule.depth, ranking.where, ranking.exact)
            reasons = bool(found) and bool(rule.decide([[cosine for _, cosine in found]])[0])
            thinking = replace(thinking, reasoning=reasons)
    if read and direct is not None:
        return _read_and_embed(ranking, model, direct, thinking, read, hops)
    if direct is None or thinking.reasoning:
        return _embed(query, model, thinking)
    return direct


def _normalized(query: str, model: Encoder) -> str | None:
    """What the model embeds in place of `query`; None if it is `query` itself."""
    normalize = getattr(model, "normalize_query", None)
    normalized: str = query if normalize is None else normalize(query)
    return None if normalized == query else normalized


def _read_and_embed(
    ranking: RowRanking, model: Encoder, direct: _Embedded, thinking: _Thinking, read: int, hops: int
) -> _Embedded:
    """Embed the query with the first `read` hits of its direct embedding, then perhaps with those of that embedding;
    only the last embedding is reasoned about."""
    embedded, passages = direct, []
    for hop in range(1, hops + 1):
        rows = [row for row, *_ in ranking.best(embedded.vector, read, {})]  # no text twice
        if not rows:  # the filter matches nothing
            return embedded
        texts = [row[CONTENT] for row in rows]
        embedded = _embed(ranking.query, model, thinking if hop == hops else thinking.direct, texts)
        passages += _read_passages(rows, _what_is_read(model, texts), hop)
    return replace(embedded, read=passages)


def _embed(query: str, model: Encoder, thinking: _Thinking, passages: list[str] | None = None) -> _Embedded:
    more: dict[str, Any] = {} if passages is None else {"passages": [passages]}
    budget, trace = thinking.max_reasoning_tokens, None
    if thinking.reasoning_text is not None:
        rows, trace = _embed_given(query, thinking.reasoning_text, model, more)
    elif thinking.reasoning is True:
        reasoned = model.reason([query], max_reasoning_tokens=budget, **more)[0]
        trace = ReasoningTrace(reasoned.text, int(reasoned.num_tokens), bool(reasoned.forced))
        rows = reasoned.embedding
    else:
        rows = model.encode_query([query], reasoning=thinking.reasoning, max_reasoning_tokens=budget, **more)
    vector = np.asarray(rows, dtype=np.float32).reshape(-1)
    if vector.shape != (model.dimension,) or not np.isfinite(vector).all() or not vector.any():
        raise InputError(f"the model {model.name} returned no usable embedding for this query; check the checkpoint")
    return _Embedded(vector, trace)


def _embed_given(query: str, text: str, model: Encoder, more: dict[str, Any]) -> tuple[np.ndarray, ReasoningTrace]:
    """The embedding behind given words, and these words as the trace."""
    if not hasattr(model, "encode_with_reasoning"):
        raise InputError(f"the model {model.name} cannot read reasoning_text; search without it")
    reader = cast(ReadsReasoning, model)
    rows = reader.encode_with_reasoning([query], [text], max_reasoning_tokens=REASONING_TEXT_TOKENS, **more)
    tokens = reader.count_tokens([text])[0]
    return rows, ReasoningTrace(text, min(tokens, REASONING_TEXT_TOKENS), tokens > REASONING_TEXT_TOKENS)


def _what_is_read(model: Encoder, texts: list[str]) -> list[str]:
    cut = getattr(model, "what_is_read", None)
    return texts if cut is None else cut(texts)


def _read_passages(rows: list[Row], texts: list[str], hop: int) -> list[ReadPassage]:
    return [
        ReadPassage(row["id"], row["document"], row["title"], text, row["path"], row["start_line"], hop)
        for row, text in zip(rows, texts, strict=True)
    ]


def _snippet(row: Row, query: str) -> Snippet:
    return make_snippet(text_of(row), query, title=row["title"], markup=markup_of(row["path"]))


def _hit(row: Row, score: float, ranks: dict[str, int], scores: dict[str, float], snippet: Snippet) -> Hit:
    text, start, end = text_of(row), row["start_line"], row["end_line"]
    return Hit(
        id=row["id"],
        document=row["document"],
        title=row["title"],
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

"""Searching an index: cosine over the vectors, BM25 over the words, and the two fused (`search_r3.rank_fusion`).

The vectors are searched exactly, or by the index's approximate index where it has one that was measured good. Equal
scores are ordered by id, so the same search gives the same list.
A document's chunks are one hit, the best of them, unless one asks for chunks.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from search_r3.errors import InputError
from search_r3.index.approximate import TIES as FEW_TIES
from search_r3.index.approximate import Approximate, probing
from search_r3.index.encoder_protocol import Encoder
from search_r3.index.query_words import composed, without_stop_words
from search_r3.index.snippets import make_snippet
from search_r3.index.source_document import Scalar
from search_r3.index.storage import brief, failed_storage, files_lost
from search_r3.index.table_columns import CONTENT, METADATA, VECTOR
from search_r3.rank_fusion import VECTOR_WEIGHT, fuse_scores, reciprocal_rank_fusion

Mode = Literal["hybrid", "vector", "text"]
Fusion = Literal["linear", "rrf"]

POOL = 100  # a hybrid search fuses at least this many of each list
TIES = 50  # fetched beyond the cut, so that among equals there the ids decide, not the order on disk
MAX_HITS = 1_000
MAX_POOL = 20_000  # chunks looked through for k documents; then a few of very many chunks may be all that is found
EXACT_MATCHES = 20_000  # rows; where a filter leaves fewer, they are all compared: a few milliseconds
MAX_QUERY_CHARACTERS = 100_000
FIELDS = ["id", "document", "title", "path", "start_line", "end_line", CONTENT, METADATA]
QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`")
LEAST = re.compile(QUOTED.pattern + rf"|(?P<least>(?<![\w.])-\s*{2**63}(?![\w.]))")
NO_INTEGER = re.compile(r"Received literal \w+\((.*)\) and could not convert to literal of type 'Int64'")


class Searched(Protocol):
    """What a search asks of an index; `SearchIndex` has it."""

    @property
    def table(self) -> Any: ...
    @property
    def columns(self) -> dict[str, str]: ...
    @property
    def approximate(self) -> Approximate | None: ...
    def check_model(self, model: Encoder) -> None: ...
    def check_full_text(self) -> None: ...


@dataclass(frozen=True)
class Hit:
    """One chunk found. `score` is what the list is ordered by: cosine (vector), BM25 (text) or both fused (hybrid).

    Fused by scores (`fusion="linear"`) it is between 0 and 1, which is the best of both lists.

    `ranks` and `scores` hold the chunk's place (from 1) and score in each list it was in: "vector", "text".
    `highlights` are (start, end) within `snippet`; `snippet_line` is the line of the file where the snippet begins.
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
    """What the model wrote before it embedded the query; `forced` if it was cut off at the budget."""

    text: str
    num_tokens: int
    forced: bool


@dataclass(frozen=True)
class Timings:
    """Milliseconds: `reason_ms` for reasoning and embedding the query, `search_ms` for everything after."""

    reason_ms: float
    search_ms: float


@dataclass(frozen=True)
class SearchResult:
    """Hits, best first, and how they came about."""

    query: str
    mode: Mode
    hits: list[Hit]
    reasoning: ReasoningTrace | None
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def search_index(
    index: Searched,
    query: str,
    model: Encoder | None,
    *,
    k: int = 10,
    mode: Mode = "hybrid",
    reasoning: bool | Literal["auto"] = True,
    max_reasoning_tokens: int = 32,
    where: str | None = None,
    exact: bool = False,
    chunks: bool = False,
    vector_weight: float = VECTOR_WEIGHT,
    fusion: Fusion = "linear",
) -> SearchResult:
    """Find the `k` best documents for `query`, each by its best chunk.

    Args:
        index: an opened index that stays at its version: the search reads it several times.
        query: plain words; quotes, operators and brackets mean nothing special.
        model: a model of the index's contract; may be None for mode "text", which needs none.
        k: how many hits, 1 to 1,000.
        mode: "vector" (meaning), "text" (words) or "hybrid" (both).
        reasoning: let the model think before it embeds the query. With "auto" it thinks where its rule
            (`model.adaptive_rule`, see search_r3.model.adaptive_reasoning) expects that to help, by the cosines of a
            direct search; `reasoning` of the result tells whether it did.
        max_reasoning_tokens: how much it may think.
        where: an SQL condition on metadata, `language = 'en' AND year > 2020`; applied before the search, so that `k`
            hits come back where there are as many. The columns are in `index.columns`.
        exact: compare the query with every vector, though the index has an approximate index.
        chunks: every chunk is a hit of its own, so a document may come several times.
        vector_weight: how much the vectors count in a hybrid search, 0 to 1; the words count the rest.
        fusion: how a hybrid search fuses its lists: "linear" adds weighted, normalized scores (`fuse_scores`), "rrf" is
            reciprocal rank fusion, which takes no weight.

    Raises:
        InputError: the query is empty or too long, an option is wrong, the model is not the index's, or words are to
            be looked for in an index without full text.
    """
    query = _checked_query(query)
    _check_options(k, mode, vector_weight, fusion)
    where = check_where(index, where)
    nearest = None if exact or mode == "text" else index.approximate
    if nearest is not None and where is not None and _few(index, where):
        nearest = None
    if mode != "vector":
        index.check_full_text()
    started = time.perf_counter()
    vector: np.ndarray | None = None
    trace: ReasoningTrace | None = None
    if mode != "text":
        if model is None:
            raise InputError(f'mode "{mode}" needs a model to embed the query; give one, or search with mode "text"')
        index.check_model(model)
        if reasoning == "auto" and (rule := getattr(model, "adaptive_rule", None)) is not None:
            vector, trace = _embed(query, model, False, max_reasoning_tokens)
            cosines = [row["score"] for row in _by_vector(index, vector, rule.depth, where, nearest)]
            reasoning = bool(cosines) and bool(rule.decide([cosines])[0])
        if vector is None or reasoning:
            vector, trace = _embed(query, model, reasoning, max_reasoning_tokens)
    embedded = time.perf_counter()
    pool = max(POOL, 2 * k) if mode == "hybrid" else k
    while True:
        lists: dict[str, list[dict[str, Any]]] = {}
        if vector is not None:
            lists["vector"] = _by_vector(index, vector, pool, where, nearest)
        if mode != "vector":
            lists["text"] = _by_text(index, query, pool, where)
        order = _order(lists, fusion, vector_weight)
        order = order if chunks else _first_of_each_document(order)
        if len(order) >= k or pool >= MAX_POOL or all(len(found) < pool for found in lists.values()):
            break
        pool *= 4  # a few documents had all the places
    hits = [_hit(row, query, score, ranks, scores) for row, score, ranks, scores in order[:k]]
    done = time.perf_counter()
    timings = Timings(round((embedded - started) * 1e3, 2), round((done - embedded) * 1e3, 2))
    return SearchResult(query, mode, hits, trace, timings)


def check_where(index: Searched, where: str | None) -> str | None:
    """The filter as the table understands it; None where it is blank.

    SQL reads the least 64-bit integer as minus a number that is none, so that is written as a difference.

    Raises:
        InputError: it does not parse, names an unknown column, or is no condition. The message lists the columns.
    """
    if where is None or not where.strip():
        return None
    columns = ", ".join(f"{name} ({kind})" for name, kind in index.columns.items())
    help_line = f"columns: {columns}; text goes in single quotes, as in title = 'Guide'"
    if ";" in QUOTED.sub("", where):
        raise InputError(f"the filter {where!r} holds a semicolon: give one condition; {help_line}")
    given = where
    where = LEAST.sub(lambda found: f"({1 - 2**63} - 1)" if found["least"] else found[0], given)
    try:
        index.table.search().where(where).select(["id"]).limit(1).to_arrow()
    except (ValueError, RuntimeError, OSError) as error:
        if failed_storage(error) or files_lost(error):
            raise
        reason = brief(error).split(". Valid fields")[0].replace("SELECT 1 FROM t WHERE ", "")
        if (found := NO_INTEGER.search(reason)) is not None:
            reason = f"a column of 64-bit integers is compared with {found[1]}"
        raise InputError(f"the filter {given!r} cannot be used ({reason}); {help_line}") from error
    return where


def _few(index: Searched, where: str) -> bool:
    """Whether the filter leaves so few rows that all can be compared; or fails, as the search will say."""
    try:
        return bool(index.table.count_rows(where) <= EXACT_MATCHES)
    except (ValueError, RuntimeError, OSError):
        return True


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
    query: str, model: Encoder, reasoning: bool | Literal["auto"], max_reasoning_tokens: int
) -> tuple[np.ndarray, ReasoningTrace | None]:
    trace = None
    if reasoning is True:
        reasoned = model.reason([query], max_reasoning_tokens=max_reasoning_tokens)[0]
        trace = ReasoningTrace(reasoned.text, int(reasoned.num_tokens), bool(reasoned.forced))
        vector = np.asarray(reasoned.embedding, dtype=np.float32).reshape(-1)
    else:
        rows = model.encode_query([query], reasoning=reasoning, max_reasoning_tokens=max_reasoning_tokens)
        vector = np.asarray(rows, dtype=np.float32).reshape(-1)
    if vector.shape != (model.dimension,) or not np.isfinite(vector).all() or not vector.any():
        raise InputError(f"the model {model.name} gave no usable embedding for this query; check the checkpoint")
    return vector, trace


def _by_vector(
    index: Searched, vector: np.ndarray, count: int, where: str | None, nearest: Approximate | None
) -> list[dict[str, Any]]:
    """The nearest by cosine: exactly, or through the approximate index, whose candidates are scored exactly."""
    ties = TIES if nearest is None else FEW_TIES

    def found(beyond: bool) -> list[dict[str, Any]]:
        search = index.table.search(vector, vector_column_name=VECTOR, query_type="vector").distance_type("cosine")
        probed = probing(search, nearest, beyond)
        return _rows(probed, count, ties, where, "_distance", lambda distance: 1.0 - distance)

    rows = found(beyond=where is not None)
    if len(rows) < count and where is None and nearest is not None and nearest.used:  # those partitions hold no more
        rows = found(beyond=True)
    return rows


def _by_text(index: Searched, query: str, count: int, where: str | None) -> list[dict[str, Any]]:
    """Any of the words may match. A MatchQuery has no syntax, unlike a string given to LanceDB."""
    search = index.table.search(match_query(index.table, without_stop_words(query)), query_type="fts")
    return _rows(search, count, TIES, where, "_score", lambda score: score)


def match_query(table: Any, words: str) -> Any:
    """A full-text query that any of `words` may match, as `table` (LanceDB's or a snapshot) takes it."""
    if hasattr(table, "match_query"):
        return table.match_query(words, CONTENT)
    from lancedb.query import MatchQuery

    return MatchQuery(words, CONTENT)  # type: ignore[call-arg]  # pydantic's defaults


def _rows(
    search: Any, count: int, ties: int, where: str | None, column: str, score: Callable[[float], float]
) -> list[dict[str, Any]]:
    if where is not None:
        search = search.where(where, prefilter=True)
    try:
        rows = search.select([*FIELDS, column]).limit(count + ties).to_list()
    except (ValueError, RuntimeError, OSError) as error:
        if where is None or failed_storage(error) or files_lost(error):
            raise
        raise InputError(f"the filter {where!r} fails on some rows ({brief(error)}); change it") from error
    for row in rows:
        row["score"] = score(row[column])
    return sorted(rows, key=lambda row: (-row["score"], row["id"]))[:count]


Ordered = tuple[dict[str, Any], float, dict[str, int], dict[str, float]]  # row, score, ranks, scores


def _order(lists: dict[str, list[dict[str, Any]]], fusion: Fusion, vector_weight: float) -> list[Ordered]:
    """The rows of all lists, best first."""
    rows = {row["id"]: row for ranking in lists.values() for row in ranking}
    ranks = {name: {row["id"]: rank for rank, row in enumerate(ranking, 1)} for name, ranking in lists.items()}
    scores = {name: {row["id"]: float(row["score"]) for row in ranking} for name, ranking in lists.items()}
    if len(lists) == 1:
        order = list(next(iter(scores.values())).items())
    elif fusion == "linear":
        order = fuse_scores(scores["vector"], scores["text"], vector_weight)
    else:
        order = reciprocal_rank_fusion([[row["id"] for row in ranking] for ranking in lists.values()])
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


def _hit(row: dict[str, Any], query: str, score: float, ranks: dict[str, int], scores: dict[str, float]) -> Hit:
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

"""The modes in which a query is embedded with the first hits of its direct search, and their controls.

`read` reads them, `read+on` reasons after them, and `read-2` reads those of the search by `read` (a second hop). The
controls show whether their content matters (another query's hits, none) and whether a model must read them: Rocchio's
feedback averages the same documents' embeddings (Rocchio 1971; for dense vectors Li et al., arXiv 2108.11044).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search_r3.evaluation.shuffling import derangement
from search_r3.model.reading import check_reading
from search_r3.retrievers.dense import exact_search

READING_MODES = {
    "read": "with the first hits of the direct search",
    "read+on": "with the first hits, then its own reasoning",
    "read-2": "with the first hits of the search by read",
    "read.shuffled": "with another query's first hits",
    "read.empty": "the reading conversation without passages",
    "read.rocchio": "the mean of the direct embedding and those of its first hits",
}
"""The modes with their descriptions; those with a dot are controls."""
FEEDBACK_PASSAGES = 4
"""Hits averaged by `read.rocchio` for a model that cannot read: as many as other models usually read."""
SEED = 0
"""Seed of the assignment of other queries' hits."""


@dataclass(frozen=True)
class ReadQueries:
    """The queries of a data set in one mode.

    Attributes:
        rows_QD: their embeddings, float32 unit rows.
        hits_QK: the documents that were read, by row number; none of them in `read.empty`.
        reasoned: the reasoning after them, in `read+on`.
    """

    rows_QD: np.ndarray
    hits_QK: np.ndarray
    reasoned: Sequence[Any] | None = None


def check_mode(model: Any, mode: str) -> None:
    """Raise InputError if `mode` needs a model that was trained to read, and this one was not."""
    if mode in READING_MODES and mode != "read.rocchio":
        check_reading(model)


def passages_read(model: Any) -> int:
    """The number of passages that a model reads; `FEEDBACK_PASSAGES` if it cannot."""
    reading = getattr(model, "reading", None)
    return FEEDBACK_PASSAGES if reading is None else reading.passages


def mode_identity(model: Any, mode: str) -> dict[str, Any]:
    """What determines the ranking in a reading mode, besides the model and its reasoning."""
    return {"passages": passages_read(model)} | ({"seed": SEED} if mode == "read.shuffled" else {})


def rocchio(query_QD: np.ndarray, hits_QKD: np.ndarray) -> np.ndarray:
    """The mean of each query and its K hits, (Q, D) unit rows; the query unchanged if it has none.

    This is Rocchio's formula without irrelevant documents, each hit weighted as the query.
    """
    mean_QD = query_QD + hits_QKD.sum(1)
    return np.asarray(mean_QD / np.linalg.norm(mean_QD, axis=1, keepdims=True), dtype=np.float32)


def embed_queries(
    model: Any,
    mode: str,
    texts: Sequence[str],
    documents: Sequence[str],
    rows_ND: np.ndarray,
    *,
    max_reasoning_tokens: int,
    batch_size: int,
    show_progress_bar: bool | None,
) -> ReadQueries:
    """Embed queries in one of `READING_MODES`.

    Args:
        documents, rows_ND: the corpus's full texts, and their embeddings.

    Raises:
        InputError: the model was not trained to read, or `read.shuffled` has only one query.
    """
    count = 0 if mode == "read.empty" else min(passages_read(model), len(documents))
    settings: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}

    def hits_of(rows_QD: np.ndarray) -> np.ndarray:
        return exact_search(rows_QD, rows_ND, count)[1]

    def read(hits_QK: np.ndarray) -> ReadQueries:
        passages = [[documents[n] for n in row] for row in hits_QK]
        if mode == "read+on":
            reasoned = model.reason(texts, passages=passages, max_reasoning_tokens=max_reasoning_tokens, **settings)
            return ReadQueries(np.stack([one.embedding for one in reasoned]), hits_QK, reasoned)
        return ReadQueries(model.encode_query(texts, passages=passages, reasoning=False, **settings), hits_QK)

    if mode == "read.empty":
        return read(np.empty((len(texts), 0), dtype=np.int64))
    direct_QD = model.encode_query(texts, reasoning=False, **settings)
    hits_QK = hits_of(direct_QD)
    if mode == "read.rocchio":
        return ReadQueries(rocchio(direct_QD, rows_ND[hits_QK]), hits_QK)
    if mode == "read.shuffled":
        return read(hits_QK[derangement(len(texts), SEED)])
    found = read(hits_QK)
    return read(hits_of(found.rows_QD)) if mode == "read-2" else found

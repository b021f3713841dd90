"""Scorers for mining hard negatives: BM25, a sentence-transformers model, or a SearchR3 checkpoint, as full score
matrices.

Mining compares candidates with the positive's own score, so a scorer scores *every* document for a query. Dense rows
are written to files of `CHUNK` documents as they are computed, so that an interrupted run does not encode them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from search_r3.data.mining.teacher import SUFFIX, TeacherRows
from search_r3.errors import InputError
from search_r3.files import atomic_path

CHUNK = 1024
"""Documents whose rows are written to disk together."""

Report = Callable[[str, int, int], None]
"""Called with (what is being done, number done, total)."""


class Scorer(Protocol):
    """Prepares the documents once, then scores all of them for each query."""

    name: str
    zero_is_no_match: bool
    """Whether a score of 0 means that query and document share nothing."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines a score."""
        ...

    def prepare(self, documents: list[str], folder: Path, report: Report | None = None) -> None:
        """Prepare `documents`; expensive results are stored in `folder` and reused."""
        ...

    def score(self, queries: list[str]) -> np.ndarray:
        """(Q, N) float32; higher is more similar."""
        ...


def bm25_scorer() -> Scorer:
    """BM25 scores of all documents; 0 if no word is shared.

    Raises:
        InputError: the package bm25s is missing.
    """
    from search_r3.retrievers.bm25 import BM25Retriever  # imported here, since training may run without the retrievers

    class BM25Scorer(BM25Retriever):
        zero_is_no_match = True

        def prepare(self, documents: list[str], folder: Path, report: Report | None = None) -> None:
            self.index(documents)

        def score(self, queries: list[str]) -> np.ndarray:
            tokens = self._bm25s.tokenize(queries, stopwords=self.stopwords, show_progress=False, return_ids=False)
            return np.stack([self._scores(words) for words in tokens])

    return BM25Scorer()


class DenseScorer:
    """Inner products of unit rows.

    Args:
        name: for the record.
        identity: everything that determines a row.
        encode_document, encode_query: texts -> (n, dim) float32 unit rows.
    """

    zero_is_no_match = False

    def __init__(
        self,
        name: str,
        identity: dict[str, Any],
        encode_document: Callable[[list[str]], np.ndarray],
        encode_query: Callable[[list[str]], np.ndarray],
    ) -> None:
        self.name = name
        self._identity = identity
        self.encode_document, self.encode_query = encode_document, encode_query
        self._documents_ND: np.ndarray | None = None

    @property
    def identity(self) -> dict[str, Any]:
        return self._identity

    def prepare(self, documents: list[str], folder: Path, report: Report | None = None) -> None:
        chunks = []
        for start in range(0, len(documents), CHUNK):
            path = folder / f"{start:08d}.npy"
            if path.is_file():
                chunks.append(np.load(path))
            else:
                rows = np.asarray(self.encode_document(documents[start : start + CHUNK]), dtype=np.float32)
                with atomic_path(path) as scratch, open(scratch, "wb") as handle:
                    np.save(handle, rows)
                chunks.append(rows)
            if report:
                report(f"documents encoded by {self.name}", min(start + CHUNK, len(documents)), len(documents))
        self._documents_ND = np.concatenate(chunks)

    def score(self, queries: list[str]) -> np.ndarray:
        assert self._documents_ND is not None, "call prepare first"
        return np.asarray(self.encode_query(queries) @ self._documents_ND.T, dtype=np.float32)


def open_scorer(
    spec: str,
    *,
    device: str | None = None,
    dtype: str = "auto",
    batch_size: int = 32,
    max_length: int | None = None,
) -> Scorer:
    """The scorer called `spec`, named as `search-r3 evaluate --system` names systems.

    Args:
        spec: "bm25"; "all-minilm-l6-v2"; "st:NAME_OR_PATH" for any sentence-transformers model; a file of rows that
            `data embed-teacher` wrote (NAME.rows.safetensors, see `teacher`); else a SearchR3 model:
            a bundled name, a folder or a hub id. It embeds queries directly, without reasoning.
        max_length: cut documents at this many tokens (512 by default for SearchR3; another encoder's own limit).

    Raises:
        InputError: the name is unknown, or a package is missing.
    """
    if max_length is not None and max_length < 1:
        raise InputError(f"max_length is {max_length}; expected at least 1 token")
    if spec == "bm25":
        return bm25_scorer()
    if spec.endswith(SUFFIX):
        return TeacherRows(spec)
    from search_r3.retrievers.dense import BUNDLED, SentenceTransformerRetriever

    if spec in BUNDLED or spec.startswith("st:"):
        name = spec.removeprefix("st:")
        encoder = SentenceTransformerRetriever(name, device=device, max_length=max_length, batch_size=batch_size)
        return DenseScorer(encoder.name, encoder.identity, encoder.encode_document, encoder.encode_query)
    from search_r3.model.searchr3 import SearchR3

    return searchr3_scorer(SearchR3.from_pretrained(spec, device=device, dtype=dtype), batch_size, max_length)


def searchr3_scorer(model: Any, batch_size: int = 32, max_length: int | None = None) -> DenseScorer:
    """A SearchR3 model's direct embeddings; `model` may be anything with its methods."""

    def encode_document(texts: Sequence[str]) -> np.ndarray:
        return model.encode_document(texts, batch_size=batch_size, max_length=max_length, show_progress_bar=False)

    def encode_query(texts: Sequence[str]) -> np.ndarray:
        return model.encode_query(texts, reasoning=False, batch_size=batch_size, show_progress_bar=False)

    identity = {
        "retriever": "search-r3",
        "contract_hash": model.contract_hash,
        "dtype": getattr(model, "dtype", None),
        "max_length": max_length,
        "mode": "off",
    }
    return DenseScorer(model.name, identity, encode_document, encode_query)

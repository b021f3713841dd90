"""`SearchIndex`: an index that is opened for reading, whichever backend stores it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from heapq import nsmallest
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from search_r3.errors import InputError
from search_r3.index.backends.backend_registry import open_backend
from search_r3.index.backends.index_backend import IndexBackend, Matrix
from search_r3.index.encoder_protocol import Encoder
from search_r3.index.index_info import ApproximateIndex, FullText, IndexInfo
from search_r3.index.index_sources import SourceCount, find_file
from search_r3.index.run_search import Mode, SearchResult, run_search
from search_r3.index.storage.location import location_of, storage_errors
from search_r3.index.stored_document import StoredDocument, stored_document
from search_r3.rank_fusion import Fusion

T = TypeVar("T")


@dataclass(frozen=True)
class ListedDocument:
    """A document of an index, with the title and path of its first chunk."""

    id: str
    title: str
    path: str


@dataclass(frozen=True)
class DocumentPage:
    """Some of an index's documents, by id; `total` is the number of all documents, `has_more` whether others follow."""

    documents: list[ListedDocument]
    total: int
    has_more: bool


class SearchIndex:
    """An index opened for reading: `SearchIndex.open(path)`. `build_index` creates and updates it."""

    def __init__(self, path: Path | str, backend: IndexBackend) -> None:
        self.path = path
        self.backend = backend

    @classmethod
    def open_snapshot(cls, path: str | Path) -> SearchIndex:
        """Open the newest version of the index at `path` for a few searches, faster than `open`: without LanceDB.

        Raises:
            InputError: as for `open`.
        """
        location = location_of(path)
        return cls(location, open_backend(location, snapshot=True))

    @classmethod
    def open(cls, path: str | Path, *, follow: bool = True) -> SearchIndex:
        """Open the index in the folder `path`, or at a URI such as "s3://bucket/index", with the backend that made it.

        Args:
            follow: pick up other writers' commits within two seconds; otherwise the index stays at the version that was
                opened. Only LanceDB follows.

        Raises:
            InputError: there is no such folder, it is not an index, the index is damaged, or a newer search-r3 made it.
        """
        location = location_of(path)
        return cls(location, open_backend(location, follow=follow))

    def with_display_path(self, path: Path | str) -> SearchIndex:
        """Return this index, called `path` in messages, such as a symbolic link to it."""
        self.path = self.backend.path = path
        return self

    def reopened(self) -> SearchIndex:
        """The newest version of whatever is now at this index's path, as a separate object that stays at that version
        and shares LanceDB's caches.

        Raises:
            InputError: as for `open`.
        """
        return self._again(self.backend.reopened())

    def latest(self) -> SearchIndex:
        """This index at its newest version; may be the same object. Raises InputError as `open` does."""
        latest = self.backend.latest()
        return self if latest is self.backend else self._again(latest)

    def _again(self, backend: IndexBackend | None) -> SearchIndex:
        if backend is None:
            raise InputError(f"{self.path} is not a search-r3 index; give the folder that build_index wrote")
        return SearchIndex(self.path, backend).with_display_path(self.path)

    def pinned(self) -> SearchIndex:
        """The index fixed at its current version, for reads that belong together: it does not see later commits. An
        index that was opened without following is returned as it is."""
        pinned = self.backend.pinned()
        return self if pinned is self.backend else SearchIndex(self.path, pinned)

    def __len__(self) -> int:
        """The number of chunks."""
        return self.backend.count()

    def __repr__(self) -> str:
        return f"SearchIndex({str(self.path)!r}, {len(self)} chunks, model {self.info.model_name!r})"

    @property
    def info(self) -> IndexInfo:
        """What the index was made with."""
        return self.backend.info

    @property
    def table(self) -> Any:
        """The LanceDB table. Raises InputError for an index of another backend."""
        if "streaming" not in self.backend.capabilities:
            raise InputError(f"{self.path} is an index of the backend {self.backend.name!r}: it has no LanceDB table")
        return self.backend.table

    @property
    def complete(self) -> bool:
        """Whether the last build ran to its end; if not, run it again, and it resumes where it stopped."""
        return self.backend.complete

    def unchanged(self) -> bool:
        """Whether the index is still the one that was opened, rather than another one that replaced it."""
        try:
            return self.backend.current_info().identity == self.info.identity
        except InputError:
            return False

    @property
    def columns(self) -> dict[str, str]:
        """The columns that a filter may name, with "text", "integer", "number" or "true/false"."""
        return self.backend.columns

    @property
    def sources(self) -> list[SourceCount]:
        """The sources of the documents, by name; in an index of format 1 the source is "unknown"."""
        return self.backend.sources()

    def find_file(self, path: str) -> Path | None:
        """The file on this machine that a hit's `path` names, or None if there is none or it is not recorded where."""
        return find_file(path, self.backend.read_sources().values())

    @property
    def approximate(self) -> ApproximateIndex | None:
        """The approximate index with its measured recall, or None if vectors are searched exactly."""
        return self.backend.approximate

    @property
    def full_text(self) -> FullText:
        """The state of the full-text index: "current"; "outdated" (by a version that left out words: searches work, and
        the next build or compaction rebuilds it); "missing" (the first build was interrupted); or "none" (the backend
        has no text search)."""
        return self.backend.full_text

    def describe(self) -> dict[str, Any]:
        """A description of the index as JSON-ready values; `duplicate_ids` counts ids that more than one row has."""
        with storage_errors(self.path):
            duplicates = self.following(lambda index: index.backend.count_duplicate_ids())
            sources = self.following(lambda index: index.sources)
        return {
            "path": str(self.path),
            "chunks": len(self),
            "documents": sum(source.documents for source in sources),
            "duplicate_ids": duplicates,
            "complete": self.complete,
            "columns": self.columns,
            "sources": [asdict(source) for source in sources],
            "approximate": approximate.to_dict() if (approximate := self.approximate) else None,
            "full_text": self.full_text,
            "fusion": asdict(tuned) if (tuned := self.backend.tuned_fusion) else None,
            "backend": self.backend.name,
            **asdict(self.info),
        }

    def list_documents(self, limit: int = 100, after: str = "") -> DocumentPage:
        """The first `limit` documents by id whose ids come after `after`."""

        def read(index: SearchIndex) -> dict[str, ListedDocument]:
            first: dict[str, ListedDocument] = {}
            for identifier, title, path in index.backend.listed():
                if identifier not in first:
                    first[identifier] = ListedDocument(identifier, title, path)
            return first

        with storage_errors(self.path):
            documents = self.following(read)
        later = [identifier for identifier in documents if identifier > after] if after else list(documents)
        shown = nsmallest(limit, later)
        return DocumentPage([documents[identifier] for identifier in shown], len(documents), len(later) > len(shown))

    def document(
        self,
        identifier: str,
        start_line: int | None = None,
        end_line: int | None = None,
        max_characters: int | None = None,
    ) -> StoredDocument:
        """A document or one of its passages, whole or by lines; `stored_document` describes the arguments.

        Raises:
            InputError: nothing has this id, or it has no such lines.
        """
        with storage_errors(self.path):
            return self.following(
                lambda index: stored_document(index.backend, identifier, start_line, end_line, max_characters)
            )

    def vectors(self, ids: Sequence[str]) -> np.ndarray:
        """The vectors of the chunks of these ids, float32 (ids, dimension). Raises KeyError for an unknown id."""
        with storage_errors(self.path):
            return self.following(lambda index: index.backend.vectors(ids))

    def matrix(self, texts: bool = False) -> Matrix:
        """Every chunk's document and vector, in any order; with `texts` also what was embedded."""
        with storage_errors(self.path):
            return self.following(lambda index: index.backend.matrix(texts))

    def check_model(self, model: Encoder) -> None:
        """Refuse a model whose embeddings are not in the same space as the index's.

        Raises:
            ModelMismatch: the contract hashes differ; both models are named.
        """
        self.backend.current_info().check_model(model, self.path)

    def search(
        self,
        query: str,
        model: Encoder | None,
        *,
        k: int = 10,
        mode: Mode = "hybrid",
        reasoning: bool | Literal["auto", "latent"] = True,
        max_reasoning_tokens: int = 32,
        reasoning_text: str | None = None,
        where: str | None = None,
        exact: bool = False,
        chunks: bool = False,
        vector_weight: float | None = None,
        fusion: Fusion | None = None,
        reasoning_words: bool | None = None,
        read: int = 0,
        hops: int = 1,
        explained: bool = False,
    ) -> SearchResult:
        """Find the `k` best documents of one version of the index for `query`, each by its best chunk.

        Args:
            query: plain words; quotes, operators and brackets mean nothing special.
            model: a model of the index's contract; may be None for mode "text", which needs none.
            k: how many hits, 1 to 1,000.
            mode: "vector" (meaning), "text" (words) or "hybrid" (both).
            reasoning: let the model reason before it embeds the query. With "auto" it reasons if its rule
                (`model.adaptive_rule`, see search_r3.model.adaptive_reasoning) predicts from the cosines of a direct
                search that this helps; the result's `reasoning` says whether it did. "latent" thinks in a few steps
                without words, if the model can.
            max_reasoning_tokens: maximum number of reasoning tokens.
            reasoning_text: reasoning about the query in your own words, which the model reads in place of its own (see
                `SearchR3.encode_query`); full text still searches for the query's words only.
            where: an SQL condition on metadata, `language = 'en' AND year > 2020`; applied before the search, so that
                `k` hits are returned if that many match. `columns` lists the columns that it may name.
            exact: compare the query with every vector, even if there is an approximate index.
            chunks: make every chunk a separate hit, so a document may occur several times.
            vector_weight: the weight of the vectors in a hybrid search, 0 to 1; the words have the remaining weight.
            fusion: how a hybrid search fuses its lists (`search_r3.rank_fusion`): "linear" adds weighted scores,
                normalized by their deviation from the best; "dbsf" (distribution-based) and "rsf" (relative score
                fusion) normalize otherwise; "rrf" is reciprocal rank fusion, which has no weights. Without `fusion` and
                `vector_weight` it is what `search-r3 tune` stored with the index for this model, else "linear" with
                a weight of 0.65.
            reasoning_words: in a hybrid search, search for the words of the reasoning too. None: as was tuned, else
                no.
            read: embed the query again together with the first so many hits of a direct search, 0 to 10, if the model
                was trained to read; `model.reading.passages` is the number that it was trained with. The reasoning
                follows them. The result's `read` lists them. Mode "text" reads nothing.
            hops: 2 reads, searches, and reads again before the last search.
            explained: also explain the hits (`SearchResult.explanation`): words marked in their texts, weak hits, words
                that occur nowhere. Passages with the same text become one hit, which names the others.

        Raises:
            InputError: the query is empty or too long, an option is invalid or contradicts another one, the model is
                not the index's or cannot read (`reasoning_text`, `read`), the full-text index that a text search needs
                is missing, or the backend does not support text search or filters.
        """
        with storage_errors(self.path):
            return self.following(
                lambda index: run_search(
                    index,
                    query,
                    model,
                    k=k,
                    mode=mode,
                    reasoning=reasoning,
                    max_reasoning_tokens=max_reasoning_tokens,
                    reasoning_text=reasoning_text,
                    where=where,
                    exact=exact,
                    chunks=chunks,
                    vector_weight=vector_weight,
                    fusion=fusion,
                    reasoning_words=reasoning_words,
                    read=read,
                    hops=hops,
                    explained=explained,
                )
            )

    def following(self, read: Callable[[SearchIndex], T]) -> T:
        """Return `read(self.pinned())`; if files of its version were removed meanwhile, read the latest version.

        `compact_index` with `keep=timedelta(0)` removes files of readers that have not seen the latest version yet.
        """
        index = self.pinned()
        try:
            return read(index)
        except (OSError, RuntimeError, ValueError) as error:
            if not self.backend.files_replaced(error):
                raise
            newest = None
            with suppress(InputError):  # it is missing or unreadable
                newest = index.reopened()
            if newest is None or newest.info.identity != index.info.identity:  # another index replaced it
                raise
            return read(newest)

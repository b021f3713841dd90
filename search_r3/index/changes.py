"""What a corpus changes in an index, found window by window: which rows are new, which changed, which texts are new.

A window is a few hundred chunks of whole documents. Only what the window needs is looked up in the table, so neither
the corpus nor the index has to fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from search_r3.errors import InputError
from search_r3.index.chunking import Chunk, chunk_document
from search_r3.index.columns import CONTENT, ROW_HASH, TEXT_HASH, VECTOR, missing_columns, quoted
from search_r3.index.ledger import Ledger
from search_r3.index.readers import SourceDocument
from search_r3.index.rows import make_row, where_from
from search_r3.index.token_limit import TokenLimit

AT_ONCE = 1000  # ids in one SQL condition


@dataclass
class Window:
    """The changes of some documents. `rows` are new or changed; `stale` are ids of chunks that they no longer have.

    Attributes:
        rows: as they will stand in the table, without vectors.
        fresh: none of the rows' ids is in the table.
        columns: metadata columns that the table lacks.
        held: vectors that the index has already, by the hash of their text.
        texts: what must be embedded, by its hash, and `names`: the chunk that it is first the text of.
        vectors: (rows, dimension) float32, once they are known.
        documents, unchanged, updated: counts.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    fresh: bool = True
    columns: dict[str, pa.DataType] = field(default_factory=dict)
    held: dict[str, np.ndarray] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    vectors: np.ndarray | None = None
    documents: int = 0
    unchanged: int = 0
    updated: int = 0


class Changes:
    """Finds the changes of one run, against the index as it was when the run began.

    Args:
        before: the table, held at that version; None where there is none.
        schema: the table's.
        max_length: tokens a text is cut to; part of what makes a text the same.
        tokens: the limit that chunks are measured with; None does not measure them.
    """

    def __init__(
        self, before: Any | None, schema: pa.Schema, max_length: int | None, tokens: TokenLimit | None = None
    ) -> None:
        self._before, self._schema, self.max_length, self._tokens = before, schema, max_length, tokens
        self.seen, self.removed, self._documents = Ledger(), Ledger(), Ledger()

    def windows(self, documents: Iterable[SourceDocument], count: int) -> Iterator[Window]:
        """Windows of at least `count` chunks, of whole documents, but for the last.

        Raises:
            InputError: an id comes twice, or the metadata's types do not go together.
        """
        chunks: list[Chunk] = []
        held = 0
        for document in documents:
            found = chunk_document(document, tokens=self._tokens)
            place = where_from(found[0])
            if (first := self._documents.first(document.id, place)) is not None:
                raise InputError(f'the id "{document.id}" comes twice: at {first} and at {place}; give each its own')
            chunks.extend(found)
            held += 1
            if len(chunks) >= count:
                yield self._window(chunks, held)
                chunks, held = [], 0
        if held:
            yield self._window(chunks, held)

    def gone(self) -> Iterator[list[str]]:
        """Ids that the index had and the corpus no longer has, in lists, after all windows."""
        if self._before is None:
            return
        for batch in self._before.search().select(["id"]).to_batches():
            ids = self.removed.missing(self.seen.missing(batch["id"].to_pylist()))
            if ids:
                yield ids

    def close(self) -> None:
        """Let go of what was noted."""
        self.seen.close()
        self.removed.close()
        self._documents.close()

    def _window(self, chunks: list[Chunk], documents: int) -> Window:
        window = Window(documents=documents)
        rows = {}
        for chunk in chunks:
            self.seen.first(chunk.id, "")
            rows[chunk.id] = make_row(chunk, self.max_length)
        hash_of = self._held_rows(window, rows)
        window.rows = [row for row in rows.values() if hash_of.get(row["id"]) != row[ROW_HASH]]
        window.updated = sum(row["id"] in hash_of for row in window.rows)
        window.unchanged = len(rows) - len(window.rows)
        window.fresh = not window.updated
        window.columns = missing_columns(self._schema, window.rows)
        for name, kind in window.columns.items():
            self._schema = self._schema.append(pa.field(name, kind))
        window.held = self._held_vectors(window.rows)
        for row in window.rows:
            if row[TEXT_HASH] not in window.held and row[TEXT_HASH] not in window.texts:
                window.texts[row[TEXT_HASH]] = row[CONTENT].strip()
                window.names.append(row["id"])
        return window

    def _held_rows(self, window: Window, rows: dict[str, dict[str, Any]]) -> dict[str, str]:
        """Id -> row hash of those of `rows` that the index has; what else it has of their documents is stale."""
        if self._before is None:
            return {}
        hash_of: dict[str, str] = {}
        for column, values in (("document", {row["document"] for row in rows.values()}), ("id", set(rows))):
            for some in _parts(values - hash_of.keys() if column == "id" else values):
                found = self._before.search().where(f"{column} IN ({quoted(some)})").select(["id", ROW_HASH]).to_arrow()
                hash_of.update(zip(found["id"].to_pylist(), found[ROW_HASH].to_pylist(), strict=True))
        others = [identifier for identifier in hash_of if identifier not in rows]
        for identifier in others:
            del hash_of[identifier]
        window.stale = self.seen.missing(others)  # an id seen before has gone over to another document
        for identifier in window.stale:
            self.removed.first(identifier, "")
        return hash_of

    def _held_vectors(self, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        held: dict[str, np.ndarray] = {}
        if self._before is None:
            return held
        for some in _parts({row[TEXT_HASH] for row in rows}):
            found = (
                self._before.search()
                .where(f"{TEXT_HASH} IN ({quoted(some)})")
                .select([TEXT_HASH, VECTOR])
                .to_arrow()
                .combine_chunks()
            )
            if len(found):
                vectors = found[VECTOR].combine_chunks().flatten().to_numpy().reshape(len(found), -1)
                held.update(zip(found[TEXT_HASH].to_pylist(), vectors, strict=True))
        return held


def _parts(values: set[str]) -> Iterator[list[str]]:
    ordered = sorted(values)
    for start in range(0, len(ordered), AT_ONCE):
        yield ordered[start : start + AT_ONCE]

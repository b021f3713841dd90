"""What a corpus changes in an index, found window by window: which rows are new, which changed, which texts are new.

A window is a few hundred chunks of whole documents. Only what the window needs is looked up in the table, so neither
the corpus nor the index has to fit into memory.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from search_r3.errors import InputError
from search_r3.index.build_report import Removal
from search_r3.index.chunking.chunker import Chunk, chunk_document
from search_r3.index.chunking.token_limit import TokenLimit
from search_r3.index.index_sources import API, Scope
from search_r3.index.row_keys import CONTENT, METADATA, ROW_HASH, SOURCE, TEXT_HASH
from search_r3.index.seen_ids import SeenIds
from search_r3.index.source_document import Skipped, SourceDocument
from search_r3.index.table.conversion import delete_command, first_inexact
from search_r3.index.table.lance_backend import LanceBackend
from search_r3.index.table.table_columns import ColumnTypes
from search_r3.index.table.table_rows import make_row

SAME = ("title", CONTENT, METADATA)
"""Columns in which the chunks of two sources' documents of one id may not differ."""


@dataclass
class Window:
    """The changes of some documents. `rows` are new or changed; `stale` are ids of chunks that they no longer have.

    Attributes:
        rows: as they will stand in the table, without vectors.
        fresh: none of the rows' ids is in the table.
        columns: metadata columns that the table lacks.
        widened: columns of integers that must hold other numbers.
        held: vectors that the index has already, by the hash of their text.
        texts: what must be embedded, by its hash, and `names`: the chunk that it is first the text of.
        vectors: (rows, dimension) float32, once they are known.
        documents, unchanged, updated: counts.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    fresh: bool = True
    columns: dict[str, pa.DataType] = field(default_factory=dict)
    widened: set[str] = field(default_factory=set)
    held: dict[str, np.ndarray] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    vectors: np.ndarray | None = None
    documents: int = 0
    unchanged: int = 0
    updated: int = 0


@dataclass(frozen=True, slots=True)
class _Held:
    """A row that the index has."""

    document: str
    row_hash: str
    source: str | None = None


class Changes:
    """Finds the changes of one run, against the index as it was when the run began.

    Args:
        before: the index, pinned at that version; None if there is none yet.
        types: of its metadata columns; brought up to date with what is new.
        max_length: tokens a text is cut to; part of what makes a text the same.
        scope: the source of the documents, and what belongs to it.
        tokens: the limit that chunks are measured with; None does not measure them.

    Attributes:
        conflicts: documents that were left out, as another source has their ids.
    """

    def __init__(
        self,
        before: LanceBackend | None,
        types: ColumnTypes,
        max_length: int | None,
        scope: Scope,
        tokens: TokenLimit | None = None,
    ) -> None:
        self._before, self._types, self.max_length, self._scope = before, types, max_length, scope
        self._tokens = tokens
        self.seen, self.removed, self._documents = SeenIds(), SeenIds(), SeenIds()
        self.conflicts: list[Skipped] = []
        self._skipped: list[Skipped] = []

    def windows(self, documents: Iterable[SourceDocument], count: int) -> Iterator[Window]:
        """Windows of at least `count` chunks, of whole documents, but for the last.

        Raises:
            InputError: an id comes twice, or the metadata's types do not go together.
        """
        self._types.misfits = getattr(documents, "misfits", {})
        self._skipped = getattr(documents, "skipped", [])
        waiting: list[tuple[SourceDocument, list[Chunk]]] = []
        held = 0
        for document in self._scope.documents(documents):
            if (first := self._documents.add(document.id, document.place)) is not None:
                raise InputError(
                    f'the id "{document.id}" comes twice: at {first} and at {document.place}; give each its own'
                )
            waiting.append((document, chunk_document(document, tokens=self._tokens)))
            held += len(waiting[-1][1])
            if held >= count:
                yield self._window(waiting)
                waiting, held = [], 0
        if waiting:
            yield self._window(waiting)

    def gone(self, lost: bool = True) -> Iterator[list[str]]:
        """After all windows, the ids of chunks that the source no longer has, in lists.

        Args:
            lost: False only gives those of documents that are in the index under another id now.
        """
        for rows in self._gone() if lost or self._scope.absorbed else ():
            if ids := [identifier for identifier, _, moved in rows if lost or moved]:
                yield ids

    def removal(self) -> Removal:
        """How much `gone` would lose."""
        documents, chunks = SeenIds(), 0
        for rows in self._gone():
            for _, document, moved in rows:
                if not moved:
                    chunks += 1
                    documents.add(document)
        had = self._before.count_of_sources(self._scope.own) if self._before is not None and chunks else 0
        removal = Removal(chunks, len(documents), had)
        documents.close()
        return removal

    def _gone(self) -> Iterator[list[tuple[str, str, bool]]]:
        """Rows of the source that no window had: id, document, and whether that document has another id now.

        Those of what could not be read are not among them, nor those whose new id another source has.
        """
        if self._before is None or self._scope.part is None:
            return
        unread = {self._scope.start + skipped.path for skipped in self._skipped if skipped.unread}
        left_out = {conflict.path for conflict in self.conflicts}
        for rows in self._before.rows_of_sources(self._scope.own, self._scope.part, ["id", "document", SOURCE]):
            row_of = {identifier: (document, source) for identifier, document, source in rows}
            now = {
                identifier: self._scope.moved_to(source=row_of[identifier][1], document=row_of[identifier][0])
                for identifier in self.removed.missing(self.seen.missing(identifier for identifier, _, _ in rows))
            }
            if left_out:  # their new ids are another source's: what they are called now is not in the index
                now = {one: name for one, name in now.items() if name not in left_out}
            if unread:
                now = {one: name for one, name in now.items() if not lies_in(name or row_of[one][0], unread)}
            absent = set(self._documents.missing({name for name in now.values() if name is not None}))
            yield [(one, row_of[one][0], name is not None and name not in absent) for one, name in now.items()]

    def close(self) -> None:
        """Free the ids that were seen."""
        for ids in (self.seen, self.removed, self._documents):
            ids.close()

    def _window(self, given: list[tuple[SourceDocument, list[Chunk]]]) -> Window:
        window = Window(documents=len(given))
        rows: dict[str, dict[str, Any]] = {}
        for document, chunks in given:
            for chunk in chunks:
                self.seen.add(chunk.id)
                rows[chunk.id] = make_row(chunk, self.max_length, self._scope.record.name, document.place)
        held = self._held_rows(rows)
        if not self._scope.take_over:
            self._leave_to_others(window, rows, held)
        window.stale = self.seen.missing(identifier for identifier in held if identifier not in rows)
        for identifier in window.stale:  # not those seen before: they have gone over to another document
            self.removed.add(identifier)
        window.rows = [row for row in rows.values() if not _is_held(row, held.get(row["id"]))]
        window.updated = sum(row["id"] in held for row in window.rows)
        window.unchanged += len(rows) - len(window.rows)
        window.fresh = not window.updated
        self._fit(window)
        if self._before is not None:
            window.held = self._before.vectors_where(TEXT_HASH, sorted({row[TEXT_HASH] for row in window.rows}))
        for row in window.rows:
            if row[TEXT_HASH] not in window.held and row[TEXT_HASH] not in window.texts:
                window.texts[row[TEXT_HASH]] = row[CONTENT].strip()
                window.names.append(row["id"])
        return window

    def _held_rows(self, rows: dict[str, dict[str, Any]]) -> dict[str, _Held]:
        """What the index has under the ids of `rows`, and of their documents."""
        held: dict[str, _Held] = {}
        if self._before is None:
            return held
        columns = ["id", "document", ROW_HASH, SOURCE]
        for column, values in (("document", {row["document"] for row in rows.values()}), ("id", set(rows))):
            wanted = sorted(values - held.keys() if column == "id" else values)
            for identifier, *rest in self._before.rows_where(column, wanted, columns):
                row = _Held(*rest)
                held[identifier] = self._one_of(held.get(identifier, row), row)
        return held

    def _one_of(self, one: _Held, other: _Held) -> _Held:
        """What stands for two rows of one id: where they differ, a row without a hash, which is always written again
        (`merge_insert` replaces both), and of another source if one of them is."""
        if one == other:
            return one
        source = one.source if one.source not in {None, *self._scope.own} else other.source
        return _Held(one.document, "", source)

    def _leave_to_others(self, window: Window, rows: dict[str, dict[str, Any]], held: dict[str, _Held]) -> None:
        """Take the documents out of `rows` and `held` whose ids another source has; those that differ in text, title or
        metadata are conflicts, wherever they stand."""
        own = {None, *self._scope.own}
        owner: dict[str, str | None] = {}
        for identifier, there in held.items():
            if there.source not in own:
                owner[rows[identifier]["document"] if identifier in rows else there.document] = there.source
        theirs = self._contents(owner)
        for document, source in owner.items():
            given = {
                name: tuple(row[column] for column in SAME) for name, row in rows.items() if row["document"] == document
            }
            for identifier in given:
                del rows[identifier]
            for identifier in given.keys() | {name for name, there in held.items() if there.document == document}:
                held.pop(identifier, None)
            if given == theirs.get(document):
                window.unchanged += len(given)
            else:
                window.documents -= 1
                self.conflicts.append(Skipped(document, _conflict(source)))

    def _contents(self, documents: Iterable[str]) -> dict[str, dict[str, tuple[str, ...]]]:
        """What the index has of these documents: document -> chunk -> its values of `SAME`."""
        contents: dict[str, dict[str, tuple[str, ...]]] = {}
        if self._before is None:
            return contents
        for identifier, document, *values in self._before.rows_where(
            "document", sorted(set(documents)), ["id", "document", *SAME]
        ):
            contents.setdefault(document, {})[identifier] = tuple(values)
        return contents

    def _fit(self, window: Window) -> None:
        """Find the columns that the table lacks for the window's rows, and those that must be widened."""
        window.columns, window.widened = self._types.fit(window.rows)
        if self._before is None:
            return
        for name in window.widened.intersection(self._before.table.schema.names):
            replaced = {row["id"] for row in window.rows}.union(window.stale)
            if (inexact := first_inexact(self._before.table, name, replaced)) is not None:
                document, value = inexact
                remove = f"remove it if the index's value is out of date ({delete_command(document)}), "
                raise self._types.not_widened(name, f'document "{document}" of the index', value, remove)


def lies_in(document: str, places: Container[str]) -> bool:
    """Whether a document's id is one of `places`, or begins with one of them as a folder."""
    ends = [place for place, character in enumerate(document) if character == "/"]
    return document in places or any(document[:end] in places for end in ends)


def _is_held(row: dict[str, Any], held: _Held | None) -> bool:
    return held is not None and (held.row_hash, held.source) == (row[ROW_HASH], row[SOURCE])


def _conflict(source: str | None) -> str:
    """Why a document is left out whose id the source has."""
    reason = f'the source "{source}" has a document of this id; --take-over replaces it'
    return reason if source == API else f'{reason}, --source "{source}" says that this is the same source'

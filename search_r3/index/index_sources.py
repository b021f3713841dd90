"""Where the rows of an index come from. Each row names its source; a run replaces and removes only what is its own.

A source is a folder, a file, or documents that were handed over ("api": posted to a server). What an index knows of
its sources (where each was read, what stands in front of its ids) is kept in the metadata of the column `document`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from search_r3.errors import InputError
from search_r3.index.readers.path_source import PathSource, would_read
from search_r3.index.source_document import SourceDocument

API = "api"
"""The source of documents that were posted to a server, or given to `update_documents` without another one."""
DOCUMENTS = "documents"
"""The source of documents that were given to `build_index` as objects, without another one."""
UNKNOWN = "unknown"
"""What rows are called that an index of format 1 had: it did not keep their source."""
SAMPLE = 20
"""Files of a new folder that are looked up in a source that is gone: whether it is the same one at another place."""
FOLDERS = {"folder", "file"}
"""Kinds of sources whose documents are called by their place in a folder."""


@dataclass(frozen=True)
class SourceRecord:
    """What an index keeps of a source.

    Attributes:
        name: what its rows say: the absolute path, unless the user gave a name.
        kind: "folder", "file", "jsonl", "csv", "beir", or "documents" where they were handed over.
        root: the absolute path where it was read last; "" for what was handed over.
        prefix: stands in front of the ids of a folder's or a file's documents.
        unfinished: the last run that should have brought all of it was interrupted.
    """

    name: str
    kind: str = DOCUMENTS
    root: str = ""
    prefix: str = ""
    unfinished: bool = False


@dataclass(frozen=True)
class SourceCount(SourceRecord):
    """A source, and how much of it the index has."""

    documents: int = 0
    chunks: int = 0


@dataclass(frozen=True)
class Absorbed:
    """A source inside the folder that is read now: its ids begin with `old`, and are now to begin with `new`."""

    name: str
    old: str
    new: str


@dataclass(frozen=True)
class Scope:
    """What a run brings and may replace and remove.

    Attributes:
        record: the source, as it is to be kept.
        known: whether the index had it, or a part of it.
        base: where in the source the documents stand: "" or a path that ends in "/".
        part: ids of the documents that may be removed begin with this; None: nothing may, for a single file.
        absorbed: sources that lie inside this one, and become part of it.
        take_over: whether documents of other sources may be replaced.
    """

    record: SourceRecord
    known: bool = False
    base: str = ""
    part: str | None = ""
    absorbed: tuple[Absorbed, ...] = ()
    take_over: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is all of the source, and not a part."""
        return self.part is not None and not self.base

    @property
    def own(self) -> list[str]:
        """Names of the sources whose rows belong to this one."""
        return [self.record.name, *(held.name for held in self.absorbed)]

    @property
    def start(self) -> str:
        """What the ids of a folder's or a file's documents get in front of their names."""
        return self.record.prefix + self.base if self.record.kind in FOLDERS else ""

    def documents(self, given: Iterable[SourceDocument]) -> Iterable[SourceDocument]:
        """`given` under the ids that they have in the index."""
        start = self.start
        if not isinstance(given, PathSource) or not start:
            return given
        return (
            replace(document, id=start + document.id, path=start + document.path, title=self.base + document.title)
            for document in given
        )

    def allow_empty(self, documents: PathSource, index: Path | str) -> bool:
        """Have `documents` know what it means if there are none; returns whether that is allowed."""
        documents.may_be_empty &= self.known and self.part is not None
        documents.if_empty = ""
        if self.known and self.part is not None:
            which = f"search-r3 delete {shlex.quote(str(index))} --source {shlex.quote(self.record.name)}"
            documents.if_empty = f"; to remove what the index has of it: {which if self.whole else 'give --prune'}"
        return documents.may_be_empty

    def moved_to(self, source: str | None, document: str) -> str | None:
        """The id that a document of an absorbed source has now; None for documents of this one."""
        for held in self.absorbed:
            if held.name == source and document.startswith(held.old):
                return held.new + document[len(held.old) :]
        return None


class DocumentLookup(Protocol):
    """What `Sources` asks of an index about its documents."""

    def has_document(self, document: str, source: str | None = None) -> bool:
        """Whether a document has this id; with `source`, whether it also belongs to that source."""
        ...

    def has_prefix(self, prefix: str) -> bool:
        """Whether a document's id begins with `prefix`."""
        ...

    def read_sources(self) -> dict[str, SourceRecord]:
        """The sources that the index has recorded, by name."""
        ...


@dataclass(frozen=True)
class Sources:
    """The sources of an index, by name. `lookup` is that index, or None for a new one."""

    records: dict[str, SourceRecord] = field(default_factory=dict)
    lookup: DocumentLookup | None = None

    @classmethod
    def of(cls, index: DocumentLookup | None) -> Sources:
        """The sources of `index`; none for a new one."""
        return cls() if index is None else cls(index.read_sources(), index)

    def scope(self, documents: Any, name: str | None, where: Path | str, take_over: bool = False) -> Scope:
        """What `documents`, usually a `PathSource`, are to the index in `where` under the name `name`, if one is given.

        Raises:
            InputError: the name cannot be used for them, or they seem to be a source that was moved.
        """
        if name is not None and (not name.strip() or name == UNKNOWN):
            raise InputError(f'the source\'s name is "{name}"; give another name')
        if not isinstance(documents, PathSource):
            record = SourceRecord(name or DOCUMENTS)
            held = self.records.get(record.name)
            return Scope(held or record, held is not None, take_over=take_over)
        if name == API:
            raise InputError(f'the source "{API}" is of documents that were posted to a server; give another name')
        root, kind = root_of(documents), documents.kind
        same = next((held for held in self.records.values() if held.root == str(root)), None)
        around = self._around(root) if kind in FOLDERS and same is None else None
        scope = self._named(name, same, around, root, where) if name else self._unnamed(same, around, root, kind, where)
        if scope.base or scope.part is None:
            return replace(scope, take_over=take_over)
        record = replace(scope.record, root=str(root), kind=kind)
        inside = tuple(self._inside(record)) if kind == "folder" else ()
        if not scope.known and kind in FOLDERS:
            record = replace(record, prefix=self._prefix(record, {held.name for held in inside}))
        absorbed = tuple(_absorbed(held, record) for held in inside)
        return replace(scope, record=record, known=scope.known or bool(inside), absorbed=absorbed, take_over=take_over)

    def _named(
        self, name: str, same: SourceRecord | None, around: SourceRecord | None, root: Path, where: Path | str
    ) -> Scope:
        held = self.records.get(name)
        if same is not None and same.name != name:
            raise InputError(f'{root} is the source "{same.name}" of {where} already; leave --source out')
        if around is not None and around.name != name:
            raise InputError(f'{root} lies inside the source "{around.name}" of {where}; leave --source out')
        if around is not None:
            return _part(around, root)
        return Scope(held, True) if held else Scope(SourceRecord(name))

    def _unnamed(
        self, same: SourceRecord | None, around: SourceRecord | None, root: Path, kind: str, where: Path | str
    ) -> Scope:
        if same is not None:
            return Scope(same, True)
        if around is not None:
            return _part(around, root)
        for held in self.records.values():
            if held.kind == kind and not os.path.exists(held.root) and self._may_have_become(held, root):
                raise InputError(
                    f'{where} holds the source "{held.name}", and {held.root} is not on this machine: if {root} is '
                    f'what became of it, give --source "{held.name}"; if it is another one, name it: --source NAME'
                )
        return Scope(SourceRecord(str(root)))

    def _may_have_become(self, held: SourceRecord, root: Path) -> bool:
        """Whether `root` has the name of a source that is gone, or at least half of its first files are in it."""
        if Path(held.root).name == root.name:
            return True
        if held.kind != "folder":
            return False
        walk = (Path(folder, name) for folder, _, names in os.walk(root) for name in sorted(names))
        first = islice((file for file in walk if would_read(root, file, folder=False)), SAMPLE)
        ids = [held.prefix + file.relative_to(root).as_posix() for file in first]
        known = 0 if self.lookup is None else sum(self.lookup.has_document(one, held.name) for one in ids)
        return known > 0 and 2 * known >= len(ids)

    def _around(self, root: Path) -> SourceRecord | None:
        """The innermost folder of the index that reads `root` too."""
        found = [
            held
            for held in self.records.values()
            if held.kind == "folder" and root.is_relative_to(held.root) and would_read(Path(held.root), root)
        ]
        return max(found, key=lambda held: len(held.root), default=None)

    def _inside(self, record: SourceRecord) -> Iterator[SourceRecord]:
        root = Path(record.root)
        for held in self.records.values():
            if held.kind in FOLDERS and held.name != record.name and held.root != record.root:
                place = Path(held.root)
                if place.is_relative_to(root) and would_read(root, place, folder=held.kind == "folder"):
                    yield held

    def _prefix(self, record: SourceRecord, inside: set[str]) -> str:
        """What the ids of a new folder or file begin with: nothing for an index's first folder, and for a file whose
        name is free; else the folder's name, with as many of its parents as it takes to be another than all others."""
        others = [held for held in self.records.values() if held.name not in inside]
        root = Path(record.root)
        if record.kind == "file":
            if self.lookup is None or not self.lookup.has_document(root.name):
                return ""
            root = root.parent
        elif not any(held.kind == "folder" for held in others):
            return ""
        elif record.name != record.root:
            root = Path(record.name)
        parts = [part for part in root.parts if part not in ("/", "\\", root.anchor)] or [record.kind]
        candidates = ["/".join(parts[-length:]) + "/" for length in range(1, len(parts) + 1)]
        candidates += [f"{parts[-1]}-{number}/" for number in range(2, 1000)]
        taken = {held.prefix for held in others}
        free = (start for start in candidates if start not in taken)
        return next(start for start in free if self.lookup is None or not self.lookup.has_prefix(start))


def root_of(source: PathSource) -> Path:
    """The absolute path of what a source reads. A file that is a link is itself, not what it leads to."""
    path = source.path.parent if source.kind == "beir" else source.path
    return path.parent.resolve() / path.name if source.kind == "file" else path.resolve()


def _part(around: SourceRecord, root: Path) -> Scope:
    """A folder or a file inside the source `around`."""
    inner = root.relative_to(around.root)
    if root.is_dir():
        base = f"{inner.as_posix()}/"
        return Scope(around, True, base, around.prefix + base)
    base = f"{inner.parent.as_posix()}/" if inner.parent.parts else ""
    return Scope(around, True, base, None)


def _absorbed(held: SourceRecord, record: SourceRecord) -> Absorbed:
    inner = Path(held.root).relative_to(record.root)
    inner = inner if held.kind == "folder" else inner.parent
    return Absorbed(held.name, held.prefix, record.prefix + (f"{inner.as_posix()}/" if inner.parts else ""))

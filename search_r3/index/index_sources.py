"""The sources of an index. Each row names its source, and a run replaces and removes only rows of its own source.

A source is a folder, a file, or documents passed as objects ("api": posted to a server). What an index knows of its
sources (where each was read, the prefix of its ids) is stored in the metadata of the column `document`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from search_r3.errors import InputError
from search_r3.index.readers.file_filter import FileFilter
from search_r3.index.readers.path_source import PathSource, would_read
from search_r3.index.source_document import SourceDocument

API = "api"
"""The source of documents that were posted to a server, or given to `update_documents` without a source."""
DOCUMENTS = "documents"
"""The source of documents that were given to `build_index` as objects without a source."""
UNKNOWN = "unknown"
"""Source name for rows from format 1 indexes, which did not record a source."""
SAMPLE = 20
"""Files of a new folder to look up in a source that is gone, to see whether it was moved."""
FOLDERS = {"folder", "file"}
"""Kinds of sources whose documents are named after their paths."""


@dataclass(frozen=True)
class SourceRecord:
    """What an index records of a source.

    Attributes:
        name: the name in its rows: the absolute path, unless the user gave another name.
        kind: "folder", "file", "jsonl", "csv", "beir", or "documents" for documents passed as objects.
        root: the absolute path where it was last read; "" for documents passed as objects.
        prefix: prefix of the ids of a folder's or a file's documents.
        unfinished: the last run that was to read all of it was interrupted.
    """

    name: str
    kind: str = DOCUMENTS
    root: str = ""
    prefix: str = ""
    unfinished: bool = False


@dataclass(frozen=True)
class SourceCount(SourceRecord):
    """A source, and how many of its documents and chunks the index has."""

    documents: int = 0
    chunks: int = 0


@dataclass(frozen=True)
class Absorbed:
    """A source inside the folder being read, whose id prefix changes from `old` to `new`."""

    name: str
    old: str
    new: str


@dataclass(frozen=True)
class Scope:
    """The documents a run provides, and which rows it may replace or remove.

    Attributes:
        record: the source as it will be recorded.
        known: whether the index has the source, or part of it, already.
        base: the documents' folder within the source: "" or a path that ends in "/".
        part: prefix of the ids that may be removed; None for a single file, which removes nothing.
        absorbed: sources inside this one that become part of it.
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
        """Whether it is the whole source rather than a part of it."""
        return self.part is not None and not self.base

    @property
    def own(self) -> list[str]:
        """Names of the sources whose rows belong to this one."""
        return [self.record.name, *(source.name for source in self.absorbed)]

    @property
    def start(self) -> str:
        """The prefix that the ids of a folder's or a file's documents get."""
        return self.record.prefix + self.base if self.record.kind in FOLDERS else ""

    def documents(self, given: Iterable[SourceDocument]) -> Iterable[SourceDocument]:
        """The `given` documents under the ids that they have in the index."""
        start = self.start
        if not isinstance(given, PathSource) or not start:
            return given
        return (
            replace(document, id=start + document.id, path=start + document.path, title=self.base + document.title)
            for document in given
        )

    def allow_empty(self, documents: PathSource, index: Path | str) -> bool:
        """Set what happens if `documents` has none; returns whether that is allowed."""
        documents.may_be_empty &= self.known and self.part is not None
        documents.if_empty = ""
        if self.known and self.part is not None:
            which = f"search-r3 delete {shlex.quote(str(index))} --source {shlex.quote(self.record.name)}"
            documents.if_empty = f"; to remove what the index has of it: {which if self.whole else 'give --prune'}"
        return documents.may_be_empty

    def moved_to(self, source: str | None, document: str) -> str | None:
        """The new id of a document of an absorbed source; None for this source's documents."""
        for absorbed in self.absorbed:
            if absorbed.name == source and document.startswith(absorbed.old):
                return absorbed.new + document[len(absorbed.old) :]
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
        """The scope of `documents`, usually a `PathSource`.

        Args:
            name: the source's name, if the user gave one.
            where: the index, for messages.

        Raises:
            InputError: the name cannot be used for them, or they seem to be a source that was moved.
        """
        if name is not None and (not name.strip() or name == UNKNOWN):
            raise InputError(f'the source\'s name is "{name}"; give another name')
        if not isinstance(documents, PathSource):
            record = SourceRecord(name or DOCUMENTS)
            source = self.records.get(record.name)
            return Scope(source or record, source is not None, take_over=take_over)
        if name == API:
            raise InputError(f'the source "{API}" is reserved for documents posted to a server; give another name')
        root, kind = root_of(documents), documents.kind
        same = next((source for source in self.records.values() if source.root == str(root)), None)
        around = self._around(root) if kind in FOLDERS and same is None else None
        scope = self._named(name, same, around, root, where) if name else self._unnamed(same, around, root, kind, where)
        if scope.base or scope.part is None:
            return replace(scope, take_over=take_over)
        record = replace(scope.record, root=str(root), kind=kind)
        inside = tuple(self._inside(record)) if kind == "folder" else ()
        if not scope.known and kind in FOLDERS:
            record = replace(record, prefix=self._prefix(record, {source.name for source in inside}))
        absorbed = tuple(_absorbed(source, record) for source in inside)
        return replace(scope, record=record, known=scope.known or bool(inside), absorbed=absorbed, take_over=take_over)

    def _named(
        self, name: str, same: SourceRecord | None, around: SourceRecord | None, root: Path, where: Path | str
    ) -> Scope:
        source = self.records.get(name)
        if same is not None and same.name != name:
            raise InputError(f'{root} is already the source "{same.name}" of {where}; omit --source')
        if around is not None and around.name != name:
            raise InputError(f'{root} lies inside the source "{around.name}" of {where}; omit --source')
        if around is not None:
            return _part(around, root)
        return Scope(source, True) if source else Scope(SourceRecord(name))

    def _unnamed(
        self, same: SourceRecord | None, around: SourceRecord | None, root: Path, kind: str, where: Path | str
    ) -> Scope:
        if same is not None:
            return Scope(same, True)
        if around is not None:
            return _part(around, root)
        for source in self.records.values():
            if source.kind == kind and not os.path.exists(source.root) and self._may_have_become(source, root):
                raise InputError(
                    f'{where} has the source "{source.name}", and {source.root} is not on this machine: if {root} is '
                    f'the same source at a new path, pass --source "{source.name}"; otherwise give it a new name: '
                    "--source NAME"
                )
        return Scope(SourceRecord(str(root)))

    def _may_have_become(self, source: SourceRecord, root: Path) -> bool:
        """Whether `root` has the same name as a source that is gone, or at least half of its first files were in it."""
        if Path(source.root).name == root.name:
            return True
        if source.kind != "folder":
            return False
        walk = (Path(folder, name) for folder, _, names in os.walk(root) for name in sorted(names))
        chosen = FileFilter(root)
        first = islice((file for file in walk if would_read(root, file, False, chosen)), SAMPLE)
        ids = [source.prefix + file.relative_to(root).as_posix() for file in first]
        known = 0 if self.lookup is None else sum(self.lookup.has_document(one, source.name) for one in ids)
        return known > 0 and 2 * known >= len(ids)

    def _around(self, root: Path) -> SourceRecord | None:
        """The innermost indexed folder that includes `root`."""
        folders = [
            source
            for source in self.records.values()
            if source.kind == "folder" and root.is_relative_to(source.root) and would_read(Path(source.root), root)
        ]
        return max(folders, key=lambda source: len(source.root), default=None)

    def _inside(self, record: SourceRecord) -> Iterator[SourceRecord]:
        root = Path(record.root)
        chosen = FileFilter(root)
        for source in self.records.values():
            if source.kind in FOLDERS and source.name != record.name and source.root != record.root:
                inner = Path(source.root)
                if inner.is_relative_to(root) and would_read(root, inner, source.kind == "folder", chosen):
                    yield source

    def _prefix(self, record: SourceRecord, inside: set[str]) -> str:
        """The id prefix of a new folder or file: none for an index's first folder and for a file whose name is free;
        otherwise the folder's name, with as many parent folders as needed to be unique."""
        others = [source for source in self.records.values() if source.name not in inside]
        root = Path(record.root)
        if record.kind == "file":
            if self.lookup is None or not self.lookup.has_document(root.name):
                return ""
            root = root.parent
        elif not any(source.kind == "folder" for source in others):
            return ""
        elif record.name != record.root:
            root = Path(record.name)
        parts = [part for part in root.parts if part not in ("/", "\\", root.anchor)] or [record.kind]
        candidates = ["/".join(parts[-length:]) + "/" for length in range(1, len(parts) + 1)]
        candidates += [f"{parts[-1]}-{number}/" for number in range(2, 1000)]
        taken = {source.prefix for source in others}
        free = (start for start in candidates if start not in taken)
        return next(start for start in free if self.lookup is None or not self.lookup.has_prefix(start))


def root_of(source: PathSource) -> Path:
    """The absolute path of what a source reads. A file that is a symbolic link is not resolved."""
    path = source.path.parent if source.kind == "beir" else source.path
    return path.parent.resolve() / path.name if source.kind == "file" else path.resolve()


def find_file(path: str, sources: Iterable[SourceRecord]) -> Path | None:
    """The file on this machine that a chunk's `path` names, or None: it is elsewhere by now, or was never a file."""
    for source in sources:
        if source.kind in FOLDERS and source.root and path.startswith(source.prefix):
            root = Path(source.root)
            file = (root if source.kind == "folder" else root.parent) / path[len(source.prefix) :]
            with suppress(OSError, ValueError):  # a name that is too long, or has a null character
                if file.is_file():
                    return file
    return None


def _part(around: SourceRecord, root: Path) -> Scope:
    """A folder or a file inside the source `around`."""
    inner = root.relative_to(around.root)
    if root.is_dir():
        base = f"{inner.as_posix()}/"
        return Scope(around, True, base, around.prefix + base)
    base = f"{inner.parent.as_posix()}/" if inner.parent.parts else ""
    return Scope(around, True, base, None)


def _absorbed(source: SourceRecord, record: SourceRecord) -> Absorbed:
    inner = Path(source.root).relative_to(record.root)
    inner = inner if source.kind == "folder" else inner.parent
    return Absorbed(source.name, source.prefix, record.prefix + (f"{inner.as_posix()}/" if inner.parts else ""))

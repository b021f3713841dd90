"""Documents to write training pairs for: a BEIR corpus, a JSONL of documents, or the positives of training pairs.

Duplicate texts become one document, so that a search can tell all documents apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from search_r3.data.beir import Document, load_beir
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.io.jsonl import id_field, read_jsonl, string_field
from search_r3.data.mining.word_overlap import normalize
from search_r3.data.pairs import read_pairs
from search_r3.errors import InputError


@dataclass(frozen=True, slots=True)
class Collection:
    """Distinct documents with text, in the source's order.

    Attributes:
        name: the data set's name, or the file name without its suffix; never a path.
        documents: with unique ids.
        skipped: number of empty and duplicate documents.
        queries: normalized queries that the source already contains.
    """

    name: str
    documents: list[Document]
    skipped: int
    queries: frozenset[str] = frozenset()

    @property
    def sha256(self) -> str:
        """SHA-256 of all ids, titles and texts in order."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update("\0".join((document.id, document.title, document.text, "")).encode())
        return digest.hexdigest()


def read_collection(source: str | Path, data_root: str | Path | None = None) -> Collection:
    """Read the documents of a BEIR data set (a name or a folder), of a JSONL of documents, or of training pairs.

    A JSONL line with "query" and "positive" is a training pair; otherwise "id" (or "_id") and "text" are required,
    "title" is optional, and other fields are ignored.

    Raises:
        InputError: there is no such source, a line is broken (file, line and field are named), or no document has text.
    """
    path = Path(source)
    if not path.is_file():
        folder = find_dataset(source, data_root)
        dataset = load_beir(folder)
        name = dataset.name
        return _distinct(name, dataset.corpus.values(), str(folder), dataset.queries.values())
    first = next((value for _, value in read_jsonl(path)), None)
    if first is None:
        raise InputError(f'{path} is empty; expected one JSON object per line with "id" and "text"')
    if "query" in first and "positive" in first:
        pairs = read_pairs(path)
        return _distinct(
            path.stem, (Document(p.id, "", p.positive) for p in pairs), str(path), (p.query for p in pairs)
        )
    return _distinct(path.stem, _read_documents(path), str(path))


def _read_documents(path: Path) -> list[Document]:
    documents: list[Document] = []
    seen: dict[str, int] = {}
    for number, value in read_jsonl(path):
        key, identity = id_field(value, path, number, ("id", "_id"))
        if identity in seen:
            raise InputError(
                f'{path}, line {number}: the {key} "{identity}" was already used in line {seen[identity]}; '
                "ids are unique"
            )
        seen[identity] = number
        title = string_field(value, "title", path, number, default="")
        documents.append(Document(identity, title, string_field(value, "text", path, number)))
    return documents


def _distinct(name: str, documents: Iterable[Document], where: str, queries: Iterable[str] = ()) -> Collection:
    kept: dict[str, Document] = {}
    total = 0
    for document in documents:
        total += 1
        text = normalize(document.full_text)
        if document.text.strip():  # a title alone is not enough for a question
            kept.setdefault(text, document)
    if not kept:
        raise InputError(f'{where}: no document has any text; fill the field "text"')
    return Collection(name, list(kept.values()), total - len(kept), frozenset(normalize(query) for query in queries))

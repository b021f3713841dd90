"""What an index contains, for a person who has not seen it yet: its size, its folders and kinds of files, and headings
that can be asked about.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search_r3.index.search_index import SearchIndex

MOST_LISTED = 200_000
"""Chunks up to which titles and paths are read; above, an overview has only the sizes."""
MOST_FOLDERS, MOST_TYPES, HEADINGS = 12, 8, 3
HEADING_WORDS = range(4, 11)
QUESTION = re.compile(r"\?$|^(how|when|where|which|why)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Counted:
    """A folder ("docs/") or a suffix (".md"), and the number of documents that have it."""

    name: str
    documents: int


@dataclass(frozen=True)
class Overview:
    """An index in brief.

    Attributes:
        created: when it was made, UTC in ISO 8601.
        documents: number of documents, or None where they were not counted.
        folders: the outermost folders that differ, most documents first; none if all documents share one.
        types: suffixes of the files, most documents first; none if all have the same.
        headings: headings of three documents that can be asked about; the same for the same documents.
    """

    name: str
    created: str
    chunks: int
    documents: int | None = None
    folders: tuple[Counted, ...] = ()
    types: tuple[Counted, ...] = ()
    headings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def overview_of(index: SearchIndex) -> Overview:
    """The overview of an index. Reads all titles and paths of up to 200,000 chunks."""
    name, chunks = PurePosixPath(str(index.path)).name, len(index)
    if chunks > MOST_LISTED:
        return Overview(name, index.info.created, chunks)
    titles: list[tuple[str, str]] = []
    path_of: dict[str, str] = {}
    for document, title, path in index.backend.listed():
        titles.append((document, title))
        path_of.setdefault(document, path)
    return Overview(
        name,
        index.info.created,
        chunks,
        len(path_of),
        _counted(_folders(path_of.values()), MOST_FOLDERS),
        _counted((PurePosixPath(path).suffix.lower() for path in path_of.values()), MOST_TYPES),
        choose_headings(titles),
    )


def choose_headings(titles: Iterable[tuple[str, str]], count: int = HEADINGS) -> tuple[str, ...]:
    """`count` headings of different documents, from (document, title of a chunk): questions first.

    A title is a path of headings ("Guide > Install"); the last one counts if it has 4 to 10 words and is not a path.
    """
    found: dict[str, str] = {}
    for document, title in titles:
        heading = re.sub(r"[`*_]", "", title.rsplit(" > ", 1)[-1]).strip()
        if len(heading.split()) in HEADING_WORDS and "/" not in heading and heading[0].isalpha():
            found.setdefault(heading, document)

    def order(heading: str) -> tuple[bool, bytes]:
        return not QUESTION.search(heading), hashlib.blake2b(heading.encode()).digest()

    chosen: dict[str, str] = {}  # document -> heading
    for heading in sorted(found, key=order):
        chosen.setdefault(found[heading], heading)
    return tuple(chosen.values())[:count]


def _folders(paths: Iterable[str]) -> list[str]:
    """For each path, the first folder below those that all paths share; "" for a file that is in no such folder."""
    parts = [PurePosixPath(path).parts[:-1] for path in paths]
    shared = 0
    while parts and all(len(one) > shared for one in parts) and len({one[shared] for one in parts}) == 1:
        shared += 1
    return ["/".join(one[: shared + 1]) + "/" if len(one) > shared else "" for one in parts]


def _counted(names: Iterable[str], most: int) -> tuple[Counted, ...]:
    counts = Counter(names)
    if len(counts) < 2:
        return ()
    ordered = sorted((name for name in counts if name), key=lambda name: (-counts[name], name))
    return tuple(Counted(name, counts[name]) for name in ordered[:most])

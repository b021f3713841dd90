"""Remembers what documents were cut into, so that an unchanged document is recognized without cutting it again.

Cutting a document is a pure function, and takes most of the time of a run that finds nothing changed. For each document
that made several chunks, the digest of its rows is kept under the digest of the document. If the rows that the index
has of it have the same digest, they are what cutting it would give. So the cache can be lost, be old, or be shared by
several indexes; it only saves time, and its errors are ignored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from search_r3.index.source_document import SourceDocument
from search_r3.model.resolve import optional_cache_dir

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16
MOST_DOCUMENTS = 2_000_000
"""Older half of them is dropped when there are more: some 100 MB."""
WAIT = 1.0
"""Seconds to wait for another process's write."""


class Cut(NamedTuple):
    """What a document was cut into: the digest of its rows, and their number."""

    digest: bytes
    chunks: int


class ChunkingCache:
    """Document digest -> `Cut`, in an SQLite file of the cache folder. Not safe for concurrent use by threads.

    Args:
        file: where it is kept; None remembers nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self._db: sqlite3.Connection | None = None
        if file is None:
            return
        try:
            self._db = _opened(file)
        except sqlite3.DatabaseError as error:
            logger.info("%s is made anew: %s", file, error)
            with suppress(OSError, sqlite3.Error):
                file.unlink(missing_ok=True)
                self._db = _opened(file)
        except (OSError, sqlite3.Error) as error:
            logger.info("what documents are cut into is not kept: %s", error)

    @classmethod
    def of(cls, contract_hash: str, max_length: int | None) -> ChunkingCache:
        """The cache for chunks of a build with this `max_length`, measured by the model of this contract."""
        folder = optional_cache_dir()
        if folder is None:
            return cls(None)
        key = hashlib.sha256(json.dumps([contract_hash, max_length, _code(), sys.version]).encode()).hexdigest()[:16]
        return cls(folder / "chunking" / f"{key}.sqlite")

    def get(self, key: bytes) -> Cut | None:
        """What the document with this `document_digest` was cut into, if that is known."""
        if self._db is None:
            return None
        try:
            found = self._db.execute("SELECT digest, chunks FROM cut WHERE document = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        return Cut(*found) if found else None

    def put(self, cuts: Iterable[tuple[bytes, Cut]]) -> None:
        """Remember what documents were cut into, by their `document_digest`."""
        if self._db is None:
            return
        try:
            with self._db:
                self._db.executemany(
                    "INSERT OR REPLACE INTO cut (document, digest, chunks) VALUES (?, ?, ?)",
                    [(key, cut.digest, cut.chunks) for key, cut in cuts],
                )
        except sqlite3.Error as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _give_up(self, error: sqlite3.Error) -> None:
        logger.info("what documents are cut into is not kept any more: %s", error)
        self.close()


def document_digest(document: SourceDocument) -> bytes:
    """A digest of all of a document that its rows depend on."""
    about = [
        document.id, document.title, document.metadata, document.path, document.line, document.kind,
        [(heading.line, heading.level, heading.title) for heading in document.headings],
        [(page.line, page.number, page.field) for page in document.pages],
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    digest.update(document.text.encode("utf-8", "surrogatepass"))
    return digest.digest()[:DIGEST_BYTES]


def rows_digest(rows: Iterable[tuple[str, str]]) -> bytes:
    """A digest of a document's rows, given as (id, row hash) in any order."""
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).digest()[:DIGEST_BYTES]


def _opened(file: Path) -> sqlite3.Connection:
    file.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(file, timeout=WAIT, check_same_thread=False)
    db.execute("PRAGMA synchronous = OFF")
    db.execute(
        "CREATE TABLE IF NOT EXISTS cut (number INTEGER PRIMARY KEY, document BLOB UNIQUE, digest BLOB, chunks INTEGER)"
    )
    if db.execute("SELECT count(*) FROM cut").fetchone()[0] > MOST_DOCUMENTS:
        with db:
            db.execute("DELETE FROM cut WHERE number < (SELECT avg(number) FROM cut)")
    return db


@cache
def _code() -> str:
    """A digest of the code that makes rows of documents: all of the index's, as that is hard to tell apart."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()

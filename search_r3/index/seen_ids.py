"""Which ids a run has seen, and where: on disk once there are many, so that a corpus of any size fits.

An unnamed SQLite database lives in SQLite's page cache and spills into a temporary file when that is full; it vanishes
with the process, however that ends (https://sqlite.org/inmemorydb.html, "Temporary Databases").
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from search_r3.errors import InputError

CACHE_KIB = 32 * 1024
AT_ONCE = 500  # every SQLite build allows this many parameters in a statement


class SeenIds:
    """Ids, each with the place where it was first seen. Not safe for concurrent use."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("CREATE TABLE seen (id BLOB PRIMARY KEY, place TEXT) WITHOUT ROWID")
        self._db.execute("BEGIN")
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, identifier: str, place: str = "") -> str | None:
        """Add `identifier`; returns None if it is new, else the place where it was first seen.

        Raises:
            InputError: the ids need a temporary file, but none can be written.
        """
        key = _key(identifier)
        try:
            inserted = self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, place))
        except sqlite3.OperationalError as error:
            raise InputError(
                f"over {self._count:,} ids need a temporary file, which cannot be written ({error}); set TMPDIR to a "
                "folder with space that you may write to"
            ) from error
        if inserted.rowcount:
            self._count += 1
            return None
        return self._db.execute("SELECT place FROM seen WHERE id = ?", (key,)).fetchone()[0]

    def missing(self, identifiers: Iterable[str]) -> list[str]:
        """The `identifiers` that were never added, in order."""
        wanted = list(identifiers)
        out: list[str] = []
        for start in range(0, len(wanted), AT_ONCE):
            some = wanted[start : start + AT_ONCE]
            marks = ", ".join("?" * len(some))
            seen = {row[0] for row in self._db.execute(f"SELECT id FROM seen WHERE id IN ({marks})", _keys(some))}
            out.extend(identifier for identifier in some if _key(identifier) not in seen)
        return out

    def close(self) -> None:
        """Release the memory and the temporary file."""
        self._db.close()


def _keys(identifiers: list[str]) -> list[bytes]:
    return [_key(identifier) for identifier in identifiers]


def _key(identifier: str) -> bytes:
    return identifier.encode("utf-8", "surrogatepass")

"""Which ids a run has seen, and where: on disk once they are many, so that a corpus of any size fits.

A private SQLite database without a name lives in SQLite's page cache and spills into a temporary file when that is
full; it goes away with the process, however that ends (https://sqlite.org/inmemorydb.html, "Temporary Databases").
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from search_r3.errors import InputError

CACHE_KIB = 32 * 1024
AT_ONCE = 500  # SQLite allows so many parameters of one statement everywhere


class SeenIds:
    """Ids with the place where each was seen first. One thread at a time."""

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
        """Add `identifier`; None if it is new, else the place where it was seen first.

        Raises:
            InputError: the ids need a temporary file, and none can be written.
        """
        key = _key(identifier)
        try:
            done = self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, place))
        except sqlite3.OperationalError as error:
            raise InputError(
                f"over {self._count:,} ids need a temporary file, which cannot be written ({error}); set TMPDIR to a "
                "folder with space that you may write to"
            ) from error
        if done.rowcount:
            self._count += 1
            return None
        return self._db.execute("SELECT place FROM seen WHERE id = ?", (key,)).fetchone()[0]

    def missing(self, identifiers: Iterable[str]) -> list[str]:
        """Those of `identifiers` that were never added, in their order."""
        wanted = list(identifiers)
        out: list[str] = []
        for start in range(0, len(wanted), AT_ONCE):
            some = wanted[start : start + AT_ONCE]
            marks = ", ".join("?" * len(some))
            seen = {row[0] for row in self._db.execute(f"SELECT id FROM seen WHERE id IN ({marks})", _keys(some))}
            out.extend(identifier for identifier in some if _key(identifier) not in seen)
        return out

    def close(self) -> None:
        """Let go of the memory and the file."""
        self._db.close()


def _keys(identifiers: list[str]) -> list[bytes]:
    return [_key(identifier) for identifier in identifiers]


def _key(identifier: str) -> bytes:
    return identifier.encode("utf-8", "surrogatepass")

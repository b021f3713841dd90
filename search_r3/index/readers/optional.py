"""Libraries of the extra `files`, without which some formats are not read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from search_r3.index.readers.document_reader import UnreadableFile


@contextmanager
def needs(library: str) -> Iterator[None]:
    """Around the import of a library: if it is not installed, the file stays unread, and the reason says what to do."""
    try:
        yield
    except ImportError:
        raise UnreadableFile(f"{library} is not installed; run pip install 'search-r3[files]'", unread=True) from None

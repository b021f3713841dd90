"""Where a passage is, as people write it: "notes.md:12", "report.pdf, page 12", "talk.pptx, slide 3"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from search_r3.index.readers import record_readers
from search_r3.index.source_document import Scalar

PAGE_FIELDS = ("page", "slide", "cell")
"""Metadata fields with the number of the part of a file in which a chunk begins."""
RECORD_SUFFIXES = tuple(suffix for reader in record_readers.READERS for suffix in reader.suffixes)
"""Files of records, in which a field "page" is the user's own."""


def place_of(path: str, line: int, metadata: Mapping[str, Scalar]) -> str:
    """The file with the line, or, where it has no lines, with the page; only the file if neither is known."""
    if line > 0:
        return f"{path}:{line}"
    if PurePosixPath(path).suffix.lower() in RECORD_SUFFIXES:
        return path
    numbers = ((field, metadata.get(field)) for field in PAGE_FIELDS)
    return next((f"{path}, {field} {number}" for field, number in numbers if type(number) is int), path)

"""The output of document readers, which the index takes: a document as the user has it, and what was skipped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Scalar = str | int | float | bool
Kind = Literal["record", "markdown", "rst", "python", "code", "text"]
"""How a document is cut into chunks (`index/chunking`): a record stays whole up to 320 words, the others are
cut at headings, functions or paragraphs."""


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """One document as the user has it.

    Attributes:
        id: unique within its source.
        title: embedded in front of the text of its chunks; may be empty.
        metadata: fields to filter on in a search.
        path: its file, relative to the source.
        line: line of the file where the text starts, from 1; 0 for a record of JSONL or CSV, whose text is a single
            string.
        record: line of the file that has such a record. Only for messages: it is not indexed, as inserting a line above
            would change it.
    """

    id: str
    title: str
    text: str
    metadata: dict[str, Scalar] = field(default_factory=dict)
    path: str = ""
    line: int = 1
    kind: Kind = "record"
    record: int = 0

    @property
    def place(self) -> str:
        """Its file and line, for messages ("docs.jsonl line 7"), or its id if it did not come from a file."""
        return f"{self.path} line {self.record or self.line}" if self.path else f'document "{self.id}"'


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that a reader left out.

    Attributes:
        path: what was left out, with the line for records.
        reason: why.
        unread: it exists but could not be read or listed now, so what was indexed of it before is kept.
    """

    path: str
    reason: str
    unread: bool = False

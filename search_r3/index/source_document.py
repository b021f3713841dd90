"""One document as the user has it, and what a reader left out: what every document reader gives and the index takes."""

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
        path: of its file, relative to the source.
        line: where in the file the text starts, from 1; 0 for a record of JSONL or CSV, whose text is a string on one
            line.
        record: the line of the file on which such a record is. For messages only: it is not part of what is indexed,
            as a line that is inserted above changes it.
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
        """Its file and line, for messages: "docs.jsonl line 7"; or its id if it did not come from a file."""
        return f"{self.path} line {self.record or self.line}" if self.path else f'document "{self.id}"'


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that a reader left out: `path` (with the line, for records) and why.

    `unread`: it exists but could not be read now, or is a folder that could not be listed. What was indexed of it
    before is kept.
    """

    path: str
    reason: str
    unread: bool = False

"""The output of document readers, which the index takes: a document as the user has it, and what was skipped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Scalar = str | int | float | bool
Kind = Literal["record", "markdown", "rst", "python", "code", "text"]
"""How a document is cut into chunks (`index/chunking`): a record stays whole up to 320 words, the others are
cut at headings, functions or paragraphs."""


@dataclass(frozen=True, slots=True)
class Heading:
    """A line of a document's text, from 0, that is a heading; the outermost `level` is 1."""

    line: int
    level: int
    title: str


@dataclass(frozen=True, slots=True)
class Page:
    """A page, from its line in the document's text, from 0, to the next page.

    Attributes:
        field: the metadata field that has its number: "page", "slide" or "cell".
    """

    line: int
    number: int
    field: str = "page"


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """One document as the user has it.

    Attributes:
        id: unique within its source.
        title: embedded in front of the text of its chunks; may be empty.
        metadata: fields to filter on in a search.
        path: its file, relative to the source.
        line: line of the file where the text starts, from 1; 0 where lines of the text are not lines of the file: for a
            record of JSONL or CSV, whose text is a single string, and for PDF and the like.
        record: line of the file that has such a record. Only for messages: it is not indexed, as inserting a line above
            would change it.
        headings: its headings in order, where `kind` does not tell them.
        pages: its pages in order. Each chunk gets the number of the page on which it begins as a metadata field.
    """

    id: str
    title: str
    text: str
    metadata: dict[str, Scalar] = field(default_factory=dict)
    path: str = ""
    line: int = 1
    kind: Kind = "record"
    record: int = 0
    headings: tuple[Heading, ...] = ()
    pages: tuple[Page, ...] = ()

    @property
    def place(self) -> str:
        """Its file and line, for messages ("docs.jsonl line 7"), or its id if it did not come from a file."""
        if not self.path:
            return f'document "{self.id}"'
        line = self.record or self.line
        return f"{self.path} line {line}" if line else self.path


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

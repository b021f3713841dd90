"""Jupyter notebooks: the cells, without their outputs (nbformat 3 and 4, which are JSON).

Read with the standard library: nbformat would check and convert them, which a search does not need.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from search_r3.index.readers.document_reader import DocumentReader, SourceFile, UnreadableFile
from search_r3.index.source_document import Heading, Page, SourceDocument

HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$")
FENCE = re.compile(r" {0,3}(```|~~~)")


class NotebookReader(DocumentReader):
    """A notebook as one document: text and code in order, titled by the headings of its Markdown cells. Chunks have the
    number of the cell in which they begin, counted from 1 with empty ones."""

    suffixes = (".ipynb",)
    size_factor = 5  # outputs are pictures

    def read(self, file: SourceFile) -> Iterator[SourceDocument]:
        text = file.text()
        try:
            notebook = json.loads(text)
            sheets = [notebook] if "cells" in notebook else notebook["worksheets"]
            cells = [cell for sheet in sheets for cell in sheet["cells"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UnreadableFile("not a notebook: no JSON with cells") from None
        lines: list[str] = []
        headings: list[Heading] = []
        pages: list[Page] = []
        for number, cell in enumerate(cells, start=1):
            kind, source = _cell(cell)
            if not source.strip():
                continue
            lines += [""] if lines else []
            pages.append(Page(len(lines), number, "cell"))
            own = source.strip("\n").split("\n")
            if kind == "markdown":
                headings += _headings(own, len(lines))
            lines += own
        if not lines:
            raise UnreadableFile("a notebook without text")
        yield file.document("\n".join(lines), line=0, headings=headings, pages=pages)


def _cell(cell: Any) -> tuple[str, str]:
    """A cell's type and text; a heading cell of nbformat 3 becomes Markdown."""
    if not isinstance(cell, dict):
        return "", ""
    source = cell.get("source", cell.get("input", ""))
    text = "".join(map(str, source)) if isinstance(source, list) else str(source)
    if cell.get("cell_type") == "heading":
        return "markdown", f"{'#' * int(cell.get('level', 1))} {text}"
    return str(cell.get("cell_type")), text.replace("\r\n", "\n")


def _headings(lines: list[str], start: int) -> Iterator[Heading]:
    fenced = False
    for number, line in enumerate(lines):
        fenced ^= FENCE.match(line) is not None
        if not fenced and (found := HEADING.match(line)) and found[2]:
            yield Heading(start + number, len(found[1]), found[2])

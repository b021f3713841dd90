"""DOCX and PPTX, read with python-docx and python-pptx, the libraries that most Python programs use for them."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from typing import Any

from search_r3.index.readers.document_reader import DocumentReader, SourceFile, UnreadableFile
from search_r3.index.readers.optional import needs
from search_r3.index.readers.zip_files import open_zip
from search_r3.index.source_document import Heading, Page, Scalar, SourceDocument

HEADING_STYLE = re.compile(r"heading ([1-9])", re.IGNORECASE)


class DocxReader(DocumentReader):
    """Word documents: paragraphs and tables in order, titled by their heading styles. Pages are not in such a file."""

    suffixes = (".docx", ".docm")
    size_factor = 20

    def read(self, file: SourceFile) -> Iterator[SourceDocument]:
        with needs("python-docx"):
            import docx
        data = io.BytesIO(file.data())
        open_zip(data, "a DOCX file").close()
        try:
            document = docx.Document(data)
        except (KeyError, ValueError, zipfile.BadZipFile, SyntaxError) as error:
            raise UnreadableFile(f"a damaged DOCX file ({error})") from None
        lines: list[str] = []
        headings: list[Heading] = []
        for text, level in _blocks(document):
            if level:
                headings.append(Heading(len(lines), level, text))
            lines += [*text.split("\n"), ""]
        if not lines:
            raise UnreadableFile("a DOCX file without text")
        title, metadata = _about(document.core_properties)
        yield file.document("\n".join(lines[:-1]), title=title, metadata=metadata, line=0, headings=headings)


class PptxReader(DocumentReader):
    """Slides: the texts of each, from top to bottom, its tables and notes. Chunks have the number of their slide."""

    suffixes = (".pptx", ".pptm")
    size_factor = 20

    def read(self, file: SourceFile) -> Iterator[SourceDocument]:
        with needs("python-pptx"):
            import pptx
        data = io.BytesIO(file.data())
        open_zip(data, "a PPTX file").close()
        try:
            slides = pptx.Presentation(data)
        except (KeyError, ValueError, zipfile.BadZipFile, SyntaxError) as error:
            raise UnreadableFile(f"a damaged PPTX file ({error})") from None
        lines: list[str] = []
        headings: list[Heading] = []
        pages: list[Page] = []
        for number, slide in enumerate(slides.slides, start=1):
            name, parts = _slide(slide)
            if not name and not parts:
                continue
            pages.append(Page(len(lines), number, "slide"))
            if name:
                headings.append(Heading(len(lines), 1, name))
            for part in [name, *parts] if name else parts:
                lines += [*part.split("\n"), ""]
        if not lines:
            raise UnreadableFile("a PPTX file without text")
        title, metadata = _about(slides.core_properties)
        text = "\n".join(lines[:-1])
        yield file.document(text, title=title, metadata=metadata, line=0, headings=headings, pages=pages)


def _about(properties: Any) -> tuple[str, dict[str, Scalar]]:
    title, author = (properties.title or "").strip(), (properties.author or "").strip()
    generated = {"python-docx", "PowerPoint Presentation", "Word Document"}
    return "" if title in generated else title, {"author": author} if author and author not in generated else {}


def _blocks(document: Any) -> Iterator[tuple[str, int]]:
    """(text, level of heading or 0) of each paragraph and table, in order."""
    for block in document.iter_inner_content():
        if hasattr(block, "rows"):
            if rows := [row for row in map(_table_row, block.rows) if row]:
                yield "\n".join(rows), 0
        elif text := block.text.strip():
            level = _level(block)
            yield (" ".join(text.split()), level) if level else (text, 0)


def _level(paragraph: Any) -> int:
    style = paragraph.style
    while style is not None:  # a style of the user's own is based on a heading's
        if found := HEADING_STYLE.fullmatch(style.name or ""):
            return int(found[1])
        style = style.base_style
    return 0


def _table_row(row: Any) -> str:
    """The texts of a row's cells; a merged cell once."""
    cells: list[str] = []
    last = None
    for cell in row.cells:
        if cell._tc is not last and (text := " ".join(cell.text.split())):
            cells.append(text)
        last = cell._tc
    return "  ".join(cells)


def _slide(slide: Any) -> tuple[str, list[str]]:
    """A slide's title and its other texts."""
    title = slide.shapes.title
    name = " ".join(title.text_frame.text.split()) if title is not None else ""
    others = [shape for shape in _shapes(slide.shapes) if title is None or shape.shape_id != title.shape_id]
    parts = list(filter(None, map(_shape_text, sorted(others, key=lambda one: (one.top or 0, one.left or 0)))))
    if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
        parts += filter(None, [slide.notes_slide.notes_text_frame.text.replace("\v", "\n").strip()])
    return name, parts


def _shapes(shapes: Any) -> Iterator[Any]:
    for shape in shapes:
        if hasattr(shape, "shapes"):
            yield from _shapes(shape.shapes)
        else:
            yield shape


def _shape_text(shape: Any) -> str:
    if getattr(shape, "has_table", False) and shape.has_table:
        return "\n".join("  ".join(" ".join(cell.text.split()) for cell in row.cells) for row in shape.table.rows)
    return shape.text_frame.text.replace("\v", "\n").strip() if shape.has_text_frame else ""

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

WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
PARAGRAPH, TABLE, ROW, CELL, TEXT_BOX = (f"{WORD}{name}" for name in ("p", "tbl", "tr", "tc", "txbxContent"))
FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
"""Repeats a text box for old programs."""
TEXTS = {f"{WORD}t", "{http://schemas.openxmlformats.org/officeDocument/2006/math}t"}
MARKS = {f"{WORD}tab": "\t", f"{WORD}br": "\n", f"{WORD}cr": "\n", f"{WORD}noBreakHyphen": "-"}
WRAPPERS = {f"{WORD}{name}" for name in ("sdt", "sdtContent", "customXml", "ins", "moveTo")}
UNSHOWN = {f"{WORD}{name}" for name in ("pPr", "rPr", "sdtPr", "del", "moveFrom", "txbxContent")} | {FALLBACK}
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
    """(text, level of heading or 0) of each paragraph and table, in order; the paragraphs of a text box follow the one
    that holds it."""
    from docx.text.paragraph import Paragraph

    for element in _block_elements(document.element.body):
        if element.tag == TABLE:
            if rows := [row for row in map(_table_row, _children(element, ROW)) if row]:
                yield "\n".join(rows), 0
        elif text := _text(element).strip():
            level = _level(Paragraph(element, document))
            yield (" ".join(text.split()), level) if level else (text, 0)


def _block_elements(parent: Any) -> Iterator[Any]:
    """Paragraphs and tables; after a paragraph those of its text boxes."""
    for child in _children(parent, PARAGRAPH, TABLE):
        yield child
        for box in child.iter(TEXT_BOX) if child.tag == PARAGRAPH else ():
            if next(box.iterancestors(FALLBACK), None) is None:
                yield from _block_elements(box)


def _children(parent: Any, *tags: str) -> Iterator[Any]:
    """The children of these kinds, also those in content controls and in insertions that are tracked."""
    for child in parent.iterchildren():
        if child.tag in tags:
            yield child
        elif child.tag in WRAPPERS:
            yield from _children(child, *tags)


def _text(element: Any) -> str:
    """The text of a paragraph as it is shown: with insertions that are tracked, without deletions.

    python-docx's `Paragraph.text` has only the runs and links that stand directly in the paragraph.
    """
    parts: list[str] = []
    for child in element.iterchildren():
        if child.tag in TEXTS:
            parts.append(child.text or "")
        elif child.tag in MARKS:
            parts.append(MARKS[child.tag] if child.get(f"{WORD}type") in {None, "textWrapping"} else "")
        elif child.tag not in UNSHOWN:
            parts.append(_text(child))
    return "".join(parts)


def _level(paragraph: Any) -> int:
    style = paragraph.style
    while style is not None:  # a style of the user's own is based on a heading's
        if found := HEADING_STYLE.fullmatch(style.name or ""):
            return int(found[1])
        style = style.base_style
    return 0


def _table_row(row: Any) -> str:
    """The texts of a row's cells, of tables in them too; of merged cells only the first has any."""
    cells = [" ".join(" ".join(map(_text, cell.iter(PARAGRAPH))).split()) for cell in _children(row, CELL)]
    return "  ".join(filter(None, cells))


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
        rows = ([" ".join(cell.text.split()) for cell in row.cells] for row in shape.table.rows)
        return "\n".join("  ".join(filter(None, cells)) for cells in rows if any(cells))
    return shape.text_frame.text.replace("\v", "\n").strip() if shape.has_text_frame else ""

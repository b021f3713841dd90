"""PDF, read with pypdfium2 (PDFium): pages, the outline's headings, and the values of forms.

PDFium gives characters with their places, which `pdf_layout` puts in reading order: the text that it gives, as that of
pypdf, is in drawing order.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

from search_r3.index.readers.document_reader import DocumentReader, SourceFile, UnreadableFile
from search_r3.index.readers.optional import needs
from search_r3.index.readers.pdf_layout import Character, page_text
from search_r3.index.source_document import Heading, Page, Scalar, SourceDocument

PDFIUM = threading.Lock()
"""PDFium is not safe for threads."""
REPEATED = 3
"""Pages that a running head is on, at least, and more than half of them."""
NOT_NAMES = re.compile(r"untitled|\(?anonymous\)?|\(?unspecified\)?|unknown", re.IGNORECASE)
NOT_TITLES = re.compile(
    NOT_NAMES.pattern + r"|microsoft \w+ - .*|.*\.(docx?|pptx?|tex|dvi|indd|pdf|html?)", re.IGNORECASE
)
MADE_UP = 1  # FPDFText_IsGenerated: a space or a line break that is not in the file


class PdfReader(DocumentReader):
    """PDF. Chunks have the number of their page; titles are paths of the outline's entries."""

    suffixes = (".pdf",)
    size_factor = 20

    def read(self, file: SourceFile) -> Iterator[SourceDocument]:
        with needs("pypdfium2"):
            import pypdfium2
        data = file.data()
        with PDFIUM:
            try:
                document = pypdfium2.PdfDocument(data)
            except pypdfium2.PdfiumError as error:
                raise UnreadableFile(_why(str(error))) from None
            try:
                found = _read(document, file)
            except pypdfium2.PdfiumError as error:
                raise UnreadableFile(f"a damaged PDF ({error})") from None
            finally:
                document.close()
        yield found


def _why(message: str) -> str:
    if "password" in message.lower():
        return "an encrypted PDF, which needs a password; save it without one"
    return "a damaged PDF, or not a PDF at all"


def _read(document: Any, file: SourceFile) -> SourceDocument:
    from pypdfium2 import PdfiumError

    if document.get_formtype():
        document.init_forms()
    texts: list[str] = []
    for number in range(len(document)):
        try:
            texts.append(_page_text(document, document[number]))
        except PdfiumError:
            texts.append("")
    _drop_running_heads(texts)
    if not any(texts):
        raise UnreadableFile("a PDF without text: scanned pages need OCR first (such as ocrmypdf)")
    text, pages = "", []
    for number, one in enumerate(texts, start=1):
        if one:
            text = f"{text}\n\n{one}" if text else one
            pages.append(Page(text.count("\n") - one.count("\n"), number))
    about = document.get_metadata_dict(skip_empty=True)
    title = about.get("Title", "").strip()
    author = about.get("Author", "").strip()
    metadata: dict[str, Scalar] = {"author": author} if author and not NOT_NAMES.fullmatch(author) else {}
    return file.document(
        text,
        title="" if NOT_TITLES.fullmatch(title) else title,
        metadata=metadata,
        line=0,
        headings=_headings(document, text.split("\n"), pages),
        pages=pages,
    )


def _page_text(document: Any, page: Any) -> str:
    text = page_text(_characters(page))
    values = "\n".join(_form_values(document, page)) if document.formenv is not None else ""
    return f"{text}\n\n{values}".strip()


def _characters(page: Any) -> Iterator[Character]:
    """The characters of a page in drawing order, with their boxes as if the page were not turned."""
    import pypdfium2.raw as pdfium

    textpage = page.get_textpage()
    turned = page.get_rotation()
    box = pdfium.FS_RECTF()
    for index in range(pdfium.FPDFText_CountChars(textpage)):
        code = pdfium.FPDFText_GetUnicode(textpage, index)
        text = chr(code) if 0 < code < 0x110000 and not 0xD800 <= code < 0xE000 else ""
        if not text:
            continue
        made_up = text.isspace() and pdfium.FPDFText_IsGenerated(textpage, index) == MADE_UP
        if made_up or not pdfium.FPDFText_GetLooseCharBox(textpage, index, box):
            yield Character(text, None)
        else:
            yield Character(text, _turned((box.left, box.bottom, box.right, box.top), turned))


def _turned(box: tuple[float, float, float, float], degrees: int) -> tuple[float, float, float, float]:
    """A box as the reader of a page sees it that is shown turned clockwise."""
    left, bottom, right, top = box
    if degrees == 90:
        return bottom, -right, top, -left
    if degrees == 180:
        return -right, -top, -left, -bottom
    return (-top, left, -bottom, right) if degrees == 270 else box


def _form_values(document: Any, page: Any) -> Iterator[str]:
    """ "name: value" for each filled field of a form: values are not part of a page's text."""
    import pypdfium2.raw as pdfium

    form = document.formenv
    for index in range(pdfium.FPDFPage_GetAnnotCount(page)):
        annotation = pdfium.FPDFPage_GetAnnot(page, index)
        try:
            if pdfium.FPDFAnnot_GetSubtype(annotation) != pdfium.FPDF_ANNOT_WIDGET:
                continue
            value = _string(pdfium.FPDFAnnot_GetFormFieldValue, form, annotation)
            if value and value != "Off":
                name = _string(pdfium.FPDFAnnot_GetFormFieldAlternateName, form, annotation)
                yield f"{name or _string(pdfium.FPDFAnnot_GetFormFieldName, form, annotation)}: {value}"
        finally:
            pdfium.FPDFPage_CloseAnnot(annotation)


def _string(function: Any, form: Any, annotation: Any) -> str:
    """What a function of PDFium writes as UTF-16 into a buffer whose size it says."""
    size = function(form, annotation, None, 0)
    buffer = (ctypes.c_ushort * (size // 2 + 1))()
    function(form, annotation, buffer, size)
    return bytes(buffer)[:size].decode("utf-16-le", "replace").rstrip("\0").strip()


def _drop_running_heads(texts: list[str]) -> None:
    """Remove the first and last paragraphs that most pages have, but for their page numbers."""
    for place in (0, -1):
        ends = [re.sub(r"\d+", "0", text.split("\n\n")[place]) for text in texts]
        counts = Counter(ends)
        for number, (text, end) in enumerate(zip(texts, ends, strict=True)):
            if end and counts[end] >= REPEATED and 2 * counts[end] > len(texts):
                parts = text.split("\n\n")
                del parts[place]
                texts[number] = "\n\n".join(parts)


def _headings(document: Any, lines: list[str], pages: list[Page]) -> Iterator[Heading]:
    """The entries of the outline that stand as lines on their pages."""
    start_of = {page.number: page.line for page in pages}
    ends = [page.line for page in pages[1:]] + [len(lines)]
    end_of = {page.number: end for page, end in zip(pages, ends, strict=True)}
    after = 0
    for entry in document.get_toc():
        target = entry.get_dest()
        number = target.get_index() if target is not None else None
        title = " ".join(entry.get_title().split())
        if number is None or number + 1 not in start_of or not title:
            continue
        for line in range(max(after, start_of[number + 1]), end_of[number + 1]):
            shown = " ".join(lines[line].split())
            if shown and len(shown) <= len(title) + 12 and shown.casefold().endswith(title.casefold()):
                yield Heading(line, entry.level + 1, title)
                after = line + 1
                break

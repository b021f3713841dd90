"""EPUB: a ZIP file with a list of its chapters, which are XHTML (EPUB 3.3, W3C).

The list is read with the standard library, the chapters as HTML: EbookLib is under the AGPL, which our license cannot
require of its users.
"""

from __future__ import annotations

import io
import posixpath
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import unquote
from xml.etree import ElementTree

from search_r3.index.readers.document_reader import DocumentReader, SourceFile, UnreadableFile
from search_r3.index.readers.html_reader import decoded, link_share, read_html
from search_r3.index.readers.zip_files import open_zip
from search_r3.index.source_document import Heading, Scalar, SourceDocument

CONTAINER = "META-INF/container.xml"
READ = {"application/xhtml+xml", "text/html"}
CONTENTS_LINKS = 0.9
"""A page with the table of contents is left out if more of its text than this is links: Sphinx has an introduction
there."""


class EpubReader(DocumentReader):
    """A book as one document: its chapters in reading order, with their headings."""

    suffixes = (".epub",)
    size_factor = 20

    def read(self, file: SourceFile) -> Iterator[SourceDocument]:
        with open_zip(io.BytesIO(file.data()), "an EPUB") as book:
            if "META-INF/encryption.xml" in book.namelist() and "META-INF/rights.xml" in book.namelist():
                raise UnreadableFile("an encrypted EPUB")
            try:
                yield _read(book, file)
            except (KeyError, ElementTree.ParseError, zipfile.BadZipFile) as error:
                raise UnreadableFile(f"a damaged EPUB ({error})") from None


def _read(book: zipfile.ZipFile, file: SourceFile) -> SourceDocument:
    root = ElementTree.fromstring(book.read(CONTAINER)).find(".//{*}rootfile")
    if root is None:
        raise UnreadableFile(f"a damaged EPUB ({CONTAINER} names no book)")
    place = root.attrib["full-path"]
    package = ElementTree.fromstring(book.read(place))
    items = {item.attrib["id"]: item for item in package.iterfind("{*}manifest/{*}item")}
    lines: list[str] = []
    headings: list[Heading] = []
    contents = _contents_pages(package)
    read: set[str] = set()
    for reference in package.iterfind("{*}spine/{*}itemref"):
        item = items.get(reference.attrib["idref"])
        if item is None or item.get("media-type") not in READ or "nav" in item.get("properties", "").split():
            continue
        href = unquote(item.attrib["href"].partition("#")[0])  # some list each section of a chapter as "file#section"
        if href in read:
            continue
        read.add(href)
        name = posixpath.normpath(posixpath.join(posixpath.dirname(place), href))
        markup = decoded(book.read(name))
        if href in contents and link_share(markup) > CONTENTS_LINKS:
            continue
        chapter = read_html(markup, whole=True)
        if chapter.text:
            lines += [""] if lines else []
            headings += [replace(heading, line=heading.line + len(lines)) for heading in chapter.headings]
            lines += chapter.text.split("\n")
    if not lines:
        raise UnreadableFile("an EPUB without text")
    metadata: dict[str, Scalar] = {}
    for name, field in (("creator", "author"), ("language", "language")):
        if values := [(one.text or "").strip() for one in package.iterfind(f"{{*}}metadata/{{*}}{name}")]:
            metadata[field] = ", ".join(values)
    title = (package.findtext("{*}metadata/{*}title") or "").strip()
    return file.document("\n".join(lines), title=title, metadata=metadata, line=0, headings=headings)


def _contents_pages(package: ElementTree.Element) -> set[str]:
    """The pages with the table of contents, as EPUB 2 names them; EPUB 3 marks them in the manifest."""
    references = package.iterfind("{*}guide/{*}reference[@type='toc']")
    return {unquote(one.get("href", "").partition("#")[0]) for one in references}

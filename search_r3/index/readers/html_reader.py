"""HTML, read with selectolax (Lexbor): the main text as blocks, with its headings, without what every page has.

selectolax parses as browsers do. Its own `text()` puts nothing between blocks and holds scripts and styles, so the
tree is walked here. trafilatura keeps only what looks like an article (None for a fragment of one element), and a
search needs all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from search_r3.files import wide_encoding
from search_r3.index.readers.document_reader import DocumentReader, SourceFile, UnreadableFile
from search_r3.index.readers.optional import needs
from search_r3.index.source_document import Heading, Scalar, SourceDocument

NOT_TEXT = frozenset(
    [
        "script",
        "style",
        "noscript",
        "template",
        "svg",
        "math",
        "canvas",
        "iframe",
        "object",
        "embed",
        "head",
        "input",
        "select",
        "button",
        "textarea",
        "dialog",
    ]
)
BOILERPLATE = frozenset(["nav", "footer", "aside"])
ROLES = frozenset(["navigation", "banner", "contentinfo", "complementary", "search"])
BLOCKS = frozenset(
    [
        "address",
        "article",
        "blockquote",
        "body",
        "caption",
        "center",
        "dd",
        "details",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "header",
        "hr",
        "html",
        "legend",
        "li",
        "main",
        "menu",
        "nav",
        "ol",
        "p",
        "pre",
        "search",
        "section",
        "summary",
        "table",
        "tbody",
        "td",
        "tfoot",
        "th",
        "thead",
        "tr",
        "ul",
    ]
)
LEVELS = {"h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6}
LISTED = frozenset(["li", "dd", "dt", "tr"])
"""Blocks that follow each other without an empty line."""
ROWS = LISTED | frozenset(["tbody", "thead", "tfoot"])
CHARSET = re.compile(rb"<meta[^>]{,200}charset\s*=\s*[\"']?\s*([\w-]+)", re.IGNORECASE)
SPACE = re.compile(r"[ \t\r\n\f\u00a0]+")
DEEPEST = 400
"""Nesting below which a tree is not walked: no page that people write is as deep."""


class HtmlReader(DocumentReader):
    """HTML: the text of the page, without menus, scripts and styles. Titles are paths of headings."""

    suffixes = (".html", ".htm", ".xhtml")
    size_factor = 2

    def read(self, file: SourceFile) -> Iterator[SourceDocument]:
        page = read_html(decoded(file.data()))
        if not page.text:
            raise UnreadableFile("no text in it: a page that scripts fill" if page.scripted else "no text in it")
        yield file.document(page.text, title=page.title, metadata=page.metadata, line=0, headings=page.headings)


@dataclass
class HtmlText:
    """What an HTML page says.

    Attributes:
        text: its blocks, with an empty line between them; list items and table rows follow each other.
        headings: the lines of `text` that are headings.
        scripted: whether it has scripts.
    """

    title: str = ""
    text: str = ""
    headings: list[Heading] = field(default_factory=list)
    metadata: dict[str, Scalar] = field(default_factory=dict)
    scripted: bool = False


def read_html(markup: str, whole: bool = False) -> HtmlText:
    """The text and headings of a page, or of a fragment of one.

    Args:
        whole: keep what is usually the same on every page (`nav`, `footer`, `aside`), for mails and books.

    Raises:
        UnreadableFile: selectolax is not installed.
    """
    with needs("selectolax"):
        from selectolax.lexbor import LexborHTMLParser
    tree = LexborHTMLParser(markup)
    page = HtmlText(scripted=tree.css_first("script") is not None)
    title = tree.css_first("head > title")
    if title is not None:
        page.title = _squeezed(title.text())
    for tag in tree.css("head > meta[name]"):
        name, content = (tag.attributes.get("name") or "").lower(), _squeezed(tag.attributes.get("content") or "")
        if name in {"author", "description"} and content:
            page.metadata[name] = content
    walk = _Walk(whole)
    main = [] if whole else tree.css("main, [role=main]")
    for node in main if len(main) == 1 else filter(None, [tree.body or tree.root]):
        walk.block(node, 0)
    if not walk.lines and main and tree.body is not None:
        walk.block(tree.body, 0)
    walk.end_line()
    page.text, page.headings = "\n".join(walk.lines), walk.headings
    return page


def link_share(markup: str) -> float:
    """How much of a page's text is in links, 0 to 1."""
    from selectolax.lexbor import LexborHTMLParser

    body = LexborHTMLParser(markup).body
    if body is None:
        return 0.0
    letters = ["".join(node.text().split()) for node in (body, *body.css("a[href]"))]
    return sum(map(len, letters[1:])) / max(1, len(letters[0]))


def decoded(data: bytes) -> str:
    """The text of an HTML file: by its byte order mark, as UTF-8, by its `meta charset`, or as Windows-1252.

    Raises:
        UnreadableFile: it has bytes that text does not have.
    """
    if (encoding := wide_encoding(data)) is not None:
        return data.decode(encoding, "replace")
    if b"\0" in data[:1024]:
        raise UnreadableFile("a binary file")
    named = CHARSET.search(data[:2048])
    for name in ("utf-8-sig", *([named[1].decode("ascii")] if named else [])):
        try:
            return data.decode(name)
        except (UnicodeDecodeError, LookupError):
            continue
    return data.decode("cp1252", "replace")


class _Walk:
    """Collects the lines of a tree."""

    def __init__(self, whole: bool) -> None:
        self.whole = whole
        self.lines: list[str] = []
        self.headings: list[Heading] = []
        self.pending = ""
        self.tight = False
        self.in_heading = False

    def block(self, node: Any, depth: int) -> None:
        """Walk the children of `node`."""
        child = node.child
        while child is not None:
            self._node(child, depth)
            child = child.next

    def end_line(self, tight: bool = False) -> None:
        """End the current block; it follows the one before without an empty line if both are `tight`."""
        text = _squeezed(self.pending)
        self.pending = ""
        if text:
            if self.lines and not (tight and self.tight):
                self.lines.append("")
            self.lines.append(text)
            self.tight = tight

    def _node(self, node: Any, depth: int) -> None:
        tag = node.tag
        if tag == "-text":
            self.pending += node.text_content or ""
        elif tag == "br":
            self.pending += " "
        elif tag == "pre" and not self.in_heading:
            self._preformatted(node)
        elif tag in LEVELS and not self.in_heading:
            self._heading(node, tag)
        elif depth < DEEPEST and not tag.startswith(("-", "!", "_")) and self._is_read(node, tag):
            if tag in {"td", "th"}:
                self.block(node, depth + 1)
                self.pending += "  "
            elif tag in BLOCKS and not self.in_heading:
                self.end_line()
                self.tight &= tag in ROWS
                self.block(node, depth + 1)
                self.end_line(tag in LISTED)
                self.tight &= tag in ROWS
            else:
                self.block(node, depth + 1)

    def _is_read(self, node: Any, tag: str) -> bool:
        if tag in NOT_TEXT:
            return False
        attributes = node.attributes
        if "hidden" in attributes or attributes.get("aria-hidden") == "true":
            return False
        return self.whole or not (tag in BOILERPLATE or (attributes.get("role") or "") in ROLES)

    def _heading(self, node: Any, tag: str) -> None:
        self.end_line()
        self.in_heading = True
        self.block(node, DEEPEST - 20)
        self.in_heading = False
        title = _squeezed(self.pending).removesuffix("¶").strip()
        self.pending = title
        self.end_line()
        if title:
            self.headings.append(Heading(len(self.lines) - 1, LEVELS[tag], title))

    def _preformatted(self, node: Any) -> None:
        """Code keeps its lines and indents."""
        self.end_line()
        lines = (node.text() or "").strip("\n").splitlines()
        if any(line.strip() for line in lines):
            self.lines += ["", *lines] if self.lines else lines
            self.tight = False


def _squeezed(text: str) -> str:
    return SPACE.sub(" ", text).strip()

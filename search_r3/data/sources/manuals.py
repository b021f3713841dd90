"""Manuals: the sections of manual pages (roff, man(7)) and of Sphinx pages such as Python's documentation (HTML).

A section's heading, with its page's name, asks for the section's text; a manual page's one-line description asks for
its DESCRIPTION. Pages in mdoc(7), few on Linux, are left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from search_r3.data.io.line_reader import MissingSource, is_html_page
from search_r3.data.pairs import TrainingPair
from search_r3.data.sources.records import BuiltPairs, Records, clip, without_generic
from search_r3.data.sources.roff import plain_sections

MAN = Path("/usr/share/man")
PYDOC_LICENSE = "PSF-2.0 (examples and recipes also 0BSD)"
MIN_SECTION_WORDS = 20
NO_PROSE = re.compile(
    r"name|synopsis|library|attributes|history|authors?|copyright|colophon|standards|versions|bugs|see also"
    r"|conforming to|reporting bugs|c library/kernel differences",
    re.IGNORECASE,
)
"""Sections of manual pages that answer no question."""
NO_PAGE = re.compile(r"(^|/)(genindex.*|search|contents|modindex|py-modindex|bugs|copyright|license|changelog)\.html$")
_NUMBER = re.compile(r"^\d+(\.\d+)*\.\s+")
_LICENSE = re.compile(r"SPDX-License-Identifier:\s*(.+?)\s*$", re.MULTILINE)


def man_pairs(
    path: str | None = None, *, any_license: bool = False, damaged: str = "refuse", max_chars: int = 1200
) -> BuiltPairs:
    """Sections of the manual pages in a folder's man1 to man9, in the order of their paths.

    Args:
        path: the folder that holds man1, man2, ...
        any_license: also pages that name no license (an SPDX identifier in a comment).
        damaged: "refuse" or "skip" pages that are no text.
        max_chars: where sections are cut.

    Raises:
        MissingSource: there is no page.
        InputError: a page is damaged and not to be skipped.
    """
    files = man_files(path)
    folder = files[0].parent.parent
    records = Records(damaged, folder, html_allowed=True)
    licenses: Counter[str] = Counter()
    pairs: list[TrainingPair] = []
    for file in files:
        name = file.relative_to(folder).as_posix()
        page = records.file(file, name)
        if page is None:
            continue
        if is_html_page(page[:1000].encode()):
            records.fault(name, "HTML", "an HTML page, expected roff")
            continue
        found = _LICENSE.search(page)
        if page.startswith(".so "):
            records.dropped["another name of a page"] += 1
        elif re.search(r"^\.Sh ", page, re.MULTILINE):
            records.dropped["mdoc page"] += 1
        elif not found and not any_license:
            records.dropped["page that names no license"] += 1
        else:
            licenses[found[1] if found else "not named in the page"] += 1
            pairs += _of_page(name.removesuffix(".gz"), plain_sections(page), max_chars, records.dropped)
    origin = {"license": "; ".join(sorted(licenses)), "pages": sum(licenses.values())}
    return records.built(without_generic(pairs, records.dropped), origin)


def man_files(path: str | None = None) -> list[Path]:
    """The files that `man_pairs` reads, in its order.

    Raises:
        MissingSource: there is none.
    """
    folder = Path(path) if path else MAN
    files = sorted(file for file in folder.glob("man[1-9]*/*") if file.is_file() and not file.is_symlink())
    if not files:
        raise MissingSource(f"no manual page in {folder}; install manpages-dev, or give the folder of man1 with path")
    return files


def pydoc_pairs(
    path: str, *, license: str = PYDOC_LICENSE, damaged: str = "refuse", max_chars: int = 1200
) -> BuiltPairs:
    """Sections of the HTML pages that Sphinx made, below a folder, in the order of their paths.

    Args:
        path: the folder, such as /usr/share/doc/python3.11/html.
        license: for the manifest; Python's own by default.
        damaged: "refuse" or "skip" pages that are no text.
        max_chars: where sections are cut.

    Raises:
        MissingSource: there is no page.
        InputError: a page is damaged and not to be skipped.
    """
    folder = Path(path)
    files = pydoc_files(path)
    records = Records(damaged, folder, html_allowed=True)
    pairs: list[TrainingPair] = []
    for file in files:
        name = file.relative_to(folder).as_posix()
        page = records.file(file, name)
        if page is None:
            continue
        parser = _Sections()
        parser.feed(page)
        parser.close()
        found = [(_NUMBER.sub("", heading), text) for heading, text in parser.found]
        for number, (heading, text) in enumerate(found):
            if not heading or len(text.split()) < MIN_SECTION_WORDS:
                records.dropped["short section"] += 1
                continue
            query = heading if number == 0 else f"{found[0][0].split(' — ')[0]}: {heading}"
            identity = f"pydoc:{name.removesuffix('.html')}:{number}"
            pairs.append(TrainingPair(identity, query, clip(text, max_chars), source="pydoc:python"))
    return records.built(without_generic(pairs, records.dropped), {"license": license, "pages": len(files)})


def pydoc_files(path: str) -> list[Path]:
    """The files that `pydoc_pairs` reads, in its order: no index, no page of Sphinx's own.

    Raises:
        MissingSource: there is no HTML page.
    """
    folder = Path(path)
    files = sorted(file for file in folder.rglob("*.html") if file.is_file())
    if not files:
        raise MissingSource(f"no HTML page below {folder}; install python3.11-doc, or fix path")
    names = ((file, file.relative_to(folder)) for file in files)
    return [
        file
        for file, name in names
        if not NO_PAGE.search(name.as_posix()) and not any(part.startswith("_") for part in name.parts)
    ]


def _of_page(
    name: str, sections: list[tuple[str, str]], max_chars: int, dropped: Counter[str]
) -> Iterator[TrainingPair]:
    """A page's pairs: what its NAME says -> DESCRIPTION, "name: heading" -> the other sections."""
    said = next((text for heading, text in sections if heading.casefold() == "name"), "")
    names, _, purpose = " ".join(said.split()).partition(" - ")
    page = names.split(",")[0].strip() or name.rsplit("/", 1)[-1].split(".")[0]
    for number, (heading, text) in enumerate(sections):
        if NO_PROSE.fullmatch(heading):
            continue
        if len(text.split()) < MIN_SECTION_WORDS:
            dropped["short section"] += 1
            continue
        described = heading.casefold() == "description" and purpose
        query = purpose if described else f"{page}: {heading.lower() if heading.isupper() else heading}"
        yield TrainingPair(f"man:{name}:{number}", query, clip(text, max_chars), source=f"man:{name.split('/')[0]}")


class _Sections(HTMLParser):
    """Collects (heading, own text) of each <section>, without the text of sections inside it, in the page's order."""

    BLOCKS = re.compile("p|dt|dd|li|pre|tr|h[1-6]|div|table|ul|ol|dl|blockquote|br")
    HIDDEN = ("script", "style")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[tuple[list[str], list[str]]] = []
        self.open: list[int] = []
        self.in_heading = False
        self.hidden = 0
        self.in_link = False

    @property
    def found(self) -> list[tuple[str, str]]:
        return [(" ".join("".join(heading).split()), _paragraphs("".join(text))) for heading, text in self.parts]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "section":
            self.open.append(len(self.parts))
            self.parts.append(([], []))
        elif tag in self.HIDDEN:
            self.hidden += 1
        elif tag == "a" and "headerlink" in (dict(attributes).get("class") or ""):
            self.in_link = True  # the pilcrow behind a heading
        elif re.fullmatch("h[1-6]", tag) and self.open and not self.parts[self.open[-1]][0]:
            self.in_heading = True
        elif self.BLOCKS.fullmatch(tag) and self.open:
            self.parts[self.open[-1]][1].append("\n\n" if tag != "pre" else "\n\n\v")

    def handle_endtag(self, tag: str) -> None:
        if tag == "section" and self.open:
            self.open.pop()
        elif tag in self.HIDDEN:
            self.hidden = max(0, self.hidden - 1)
        elif tag == "a":
            self.in_link = False
        elif re.fullmatch("h[1-6]", tag):
            self.in_heading = False
        elif self.BLOCKS.fullmatch(tag) and self.open:
            self.parts[self.open[-1]][1].append("\n\n")

    def handle_data(self, data: str) -> None:
        if self.open and not self.hidden and not self.in_link:
            heading, text = self.parts[self.open[-1]]
            (heading if self.in_heading else text).append(data)


def _paragraphs(text: str) -> str:
    """One line a paragraph; what stood in <pre> (marked by \\v) keeps its lines."""
    blocks = []
    for block in re.split(r"\n\n+(?=\v)|(?<!\v)\n\n+", text):
        kept = block.strip("\n").rstrip() if block.startswith("\v") else " ".join(block.split())
        if kept.strip("\v\n "):
            blocks.append(kept.replace("\v", ""))
    return "\n".join(blocks)

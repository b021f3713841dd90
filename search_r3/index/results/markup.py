"""Text without its markup, for snippets: Markdown and reStructuredText about as a reader sees them, without rules."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Literal

Markup = Literal["markdown", "rst", "text", "none"]
SUFFIXES: dict[str, Markup] = {
    ".md": "markdown", ".markdown": "markdown", ".mdx": "markdown", ".rst": "rst", ".txt": "text", "": "text",
}  # fmt: skip
"""Suffix of a file -> its markup; other files, such as source code, and records have none."""
HEADING = re.compile(r"[ ]{0,3}#{1,6}[ \t]+(.*?)[ \t#]*")
_RULE = r"^[ \t]*(?:[-=~^*_+#\"'][ \t]*){3,}$\n?"
_MARKDOWN = (
    r"<!--.*?-->",
    r"^[ \t]*(?:```|~~~).*$\n?",
    r"^[ \t]*\|?[ \t]*:?-{2,}:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$\n?",  # the line below a table's head
    r"^[ ]{0,3}#{1,6}[ \t]+",
    r"^[ \t]*>[ \t]?",
    r"^[ \t]*\|[ \t]*",
    r"[ \t]*\|[ \t]*$",
    r"!?\[(?=[^\]\n]*\]\()",
    r"(?<=\w)\]\([^)\n]*\)",
    r"(?<=[`.!?)\"'])\]\([^)\n]*\)",
    r"</?[a-zA-Z][^>\n]{0,200}>",
    r"`+",
    r"(?<![\w*])\*{1,3}(?=[^\s*])",
    r"(?<=[^\s*])\*{1,3}(?![\w*])",
)
_RST = (r"``", r":[\w:+-]+:(?=`)", r"`(?=[^`\n]*`_*)", r"(?<=\w)`_*", r"^[ \t]*\.\.[ ]+[\w-]+::.*$\n?")
_REMOVED: dict[Markup, re.Pattern[str]] = {
    "markdown": re.compile("|".join((_RULE, *_MARKDOWN)), re.MULTILINE),
    "rst": re.compile("|".join((_RULE, *_RST)), re.MULTILINE),
    "text": re.compile(_RULE, re.MULTILINE),
}


def markup_of(path: str) -> Markup:
    """The markup of the file with this path; "none" for a record without one."""
    return SUFFIXES.get(PurePosixPath(path).suffix.lower(), "none") if path else "none"


def kept_characters(text: str, markup: Markup) -> list[int]:
    """The positions of the characters of `text` that are left without its markup and without empty lines."""
    pattern = _REMOVED.get(markup)
    if pattern is None:
        return list(range(len(text)))
    keep = bytearray(b"\1") * len(text)
    for match in pattern.finditer(text):
        keep[match.start() : match.end()] = bytes(match.end() - match.start())
    kept = [position for position in range(len(text)) if keep[position]]
    lines_without_text = re.compile(r"\n(?=[ \t]*(?:\n|$))")
    shown = "".join(text[position] for position in kept)
    for match in reversed(list(lines_without_text.finditer(shown))):
        del kept[match.start()]
    return kept


def repeats_title(line: str, title: str) -> bool:
    """Whether a line is a heading that the chunk's title has already."""
    heading = HEADING.fullmatch(line.strip("\n"))
    return heading is not None and bool(heading[1].strip()) and heading[1].strip() in title

"""The structure of a document: a tree of sections over its lines, from headings (Markdown, by markdown-it-py;
reStructuredText) or from functions and classes (Python).

Sections are contiguous, so by construction no line is lost.
"""

from __future__ import annotations

import ast
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from search_r3.index.source_document import SourceDocument

LONGEST_HEADING = 1000  # characters of a title; the text keeps the whole heading
BANNER_LINES = 8  # a longer comment that is set apart from the code below it is separate text
RST_LINE = re.compile(r"([=\-`:'\"~^_*+#<>.])\1+[ \t]*")


@dataclass(slots=True, eq=False)
class Section:
    """Lines [start, end) of a document and the sections inside it.

    Attributes:
        title: the path of headings down to it, or "file Class.method".
        body: the first line below its heading; `start` if it has none.
    """

    title: str
    start: int
    end: int
    body: int
    children: list[Section] = field(default_factory=list)


def outline(document: SourceDocument, lines: list[str]) -> Section:
    """The tree of sections over all of `lines`, by the document's own headings or those of its kind; a single section
    for kinds without headings or definitions."""
    if document.headings:
        given = ((heading.line, heading.line + 1, heading.level, heading.title) for heading in document.headings)
        return _heading_tree(given, document.title, len(lines))
    if document.kind == "markdown":
        return _heading_tree(_markdown_headings(lines), document.title, len(lines))
    if document.kind == "rst":
        return _heading_tree(_rst_headings(lines), document.title, len(lines))
    if document.kind == "python":
        return _python_tree(document.title, lines)
    return Section(document.title, 0, len(lines), 0)


# ----------------------------------------------------------------------------------------------------------- headings


def _markdown_headings(lines: list[str]) -> Iterator[tuple[int, int, int, str]]:
    """(first line, line below it, level, title) of each heading outside lists, quotations, code, HTML and front matter.

    In CommonMark, the last line of a paragraph or table above a line of "---" is a heading; here it is not.
    """
    start = 0
    if lines and lines[0].strip() == "---" and "---" in (line.strip() for line in lines[1:100]):
        start = next(i for i, line in enumerate(lines[1:100], start=1) if line.strip() == "---") + 1
    tokens = _markdown_parser().parse("\n".join(lines[start:]))
    for token, inline in itertools.pairwise(tokens):
        if token.type != "heading_open" or token.level > 0 or token.map is None:
            continue
        first, end = start + token.map[0], start + token.map[1]
        if token.markup in "=-" and (end - first != 2 or _is_rule(lines[first], lines[first + 1])):
            continue
        yield first, end, int(token.tag[1:]), inline.content.strip()


@cache
def _markdown_parser() -> Any:
    """A parser of CommonMark's blocks that does not interpret the text inside paragraphs and headings."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").disable("inline").disable("reference")


def _is_rule(text: str, under: str) -> bool:
    """Whether the line below a line of text is a rule or part of a table rather than the underline of a heading."""
    return under.strip() == "-" or "|" in text


def _rst_headings(lines: list[str]) -> Iterator[tuple[int, int, int, str]]:
    """reStructuredText ranks its headings by the order in which their underlines (and overlines) first appear."""
    levels: dict[tuple[str, bool], int] = {}
    for number in range(1, len(lines)):
        title, under = lines[number - 1], RST_LINE.fullmatch(lines[number])
        if not under or not title.strip() or RST_LINE.fullmatch(title):
            continue
        if len(lines[number].rstrip()) < min(len(title.rstrip()), 4):
            continue
        above = lines[number - 2] if number >= 2 else ""
        over = bool(RST_LINE.fullmatch(above)) and above[0] == under[1]
        if not over and (above.strip() or title[0].isspace()):
            continue  # the last line of a paragraph, table or quotation; only a title with an overline may be indented
        level = levels.setdefault((under[1], over), len(levels) + 1)
        yield number - 1 - over, number + 1, level, title.strip()


def _heading_tree(headings: Iterable[tuple[int, int, int, str]], title: str, end: int) -> Section:
    root = Section(title, 0, end, 0)
    stack: list[tuple[int, Section, str]] = [(0, root, "")]
    for line, body, level, heading in headings:
        name = heading if len(heading) <= LONGEST_HEADING else heading[:LONGEST_HEADING] + "…"
        while stack[-1][0] >= level:
            stack.pop()[1].end = line
        path = " > ".join(part for part in (stack[-1][2], name) if part)
        section = Section(path or title, line, end, body)
        stack[-1][1].children.append(section)
        stack.append((level, section, path))
    return root


# ------------------------------------------------------------------------------------------------------------- Python


def _python_tree(title: str, lines: list[str]) -> Section:
    root = Section(title, 0, len(lines), 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about the user's code do not concern us
            module = ast.parse("\n".join(lines))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return root
    _add_definitions(root, module.body, 0, "", lines)
    return root


def _add_definitions(section: Section, body: list[ast.stmt], floor: int, prefix: str, lines: list[str]) -> None:
    """Sections for the functions and classes of `body`, and for the statements between two of them, end to end.

    `floor` is the first line that is free: nothing may start above it.
    """
    definitions: list[tuple[int, str, ast.stmt]] = []
    for statement in body:
        start, name = statement.lineno - 1, ""
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            start = min([start, *(decorator.lineno - 1 for decorator in statement.decorator_list)])
            name = statement.name
        start = _with_comments(start, floor, statement.col_offset, lines)
        if start >= floor and (name or (definitions and definitions[-1][1])):
            definitions.append((start, name, statement))
        floor = statement.end_lineno or statement.lineno
    file = section.title if not prefix else section.title.rsplit(" ", 1)[0]
    for position, (start, name, statement) in enumerate(definitions):
        end = definitions[position + 1][0] if position + 1 < len(definitions) else section.end
        child = Section(f"{file} {prefix}{name}" if name else section.title, start, end, start)
        section.children.append(child)
        if isinstance(statement, ast.ClassDef):
            _add_definitions(child, statement.body, statement.lineno, f"{prefix}{name}.", lines)


def _with_comments(start: int, floor: int, indent: int, lines: list[str]) -> int:
    """The first line of the comments that belong to the statement at line `start`: those directly above it, and a
    short banner that blank lines set apart, if it is indented like the statement."""
    touching = start
    while touching > floor and lines[touching - 1].lstrip().startswith("#"):
        touching -= 1
    first = touching
    for number in range(touching - 1, floor - 1, -1):
        text = lines[number].lstrip()
        if text.startswith("#") and len(lines[number]) - len(text) == indent:
            first = number
        elif text:
            break
    return first if touching - first <= BANNER_LINES else touching

"""Documents cut into chunks where their structure allows: headings, functions, paragraphs, and only then sentences.

A document is a tree of sections over its lines. A section that fits the target size stays whole; a larger one is cut
into its own text and its children. Sections lie end to end, so by construction no text is lost.
"""

from __future__ import annotations

import ast
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from search_r3.index.readers import Scalar, SourceDocument

TARGET_WORDS = 160
MAX_WORDS = 320
BYTES_PER_WORD = 6  # an English word with its space
STEP = 60  # characters; where to cut what has no space at all

FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*")
SETEXT = re.compile(r" {0,3}(=+|-{2,})[ \t]*")
NO_SETEXT = re.compile(r"\s*([-*+>|]|\d+[.)])(\s|$)|\s{4}|.*\|")  # lists, quotes, tables, code: not a heading's text
RST_LINE = re.compile(r"([=\-`:'\"~^_*+#<>.])\1+[ \t]*")
SENTENCE = re.compile(r"(?<=[.!?])['\")\]]*\s+|(?<=[。！？])|\n(?=\s*[-*+] |\s*\d+[.)] )")
LINE = re.compile(r"\n")
WORD = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document, the unit that is embedded and found. Lines count from 1 and include both ends."""

    id: str
    document: str
    title: str
    text: str
    metadata: dict[str, Scalar]
    path: str
    start_line: int
    end_line: int


@dataclass(slots=True)
class Section:
    """Lines [start, end) of a document and the sections inside it; `title` is the path of headings down to it."""

    title: str
    start: int
    end: int
    children: list[Section] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Piece:
    """Text with the 0-based lines [start, end) that it came from."""

    text: str
    start: int
    end: int


def size(text: str) -> int:
    """Words, or UTF-8 bytes / 6 where that is more: source code and Chinese have few spaces but many tokens."""
    words = text.split()
    return max(len(words), sum(len(word.encode("utf-8", "replace")) for word in words) // BYTES_PER_WORD)


def chunk_document(
    document: SourceDocument, *, target_words: int = TARGET_WORDS, max_words: int = MAX_WORDS
) -> list[Chunk]:
    """Cut one document; the chunks' texts, in order, hold all of its text but blank lines.

    A document that needs one chunk gives it its own id; otherwise chunks are `id#1`, `id#2`, ... Records (JSONL, CSV,
    BEIR) are kept whole up to `max_words`, since there the user has decided what one document is.

    Args:
        target_words: sections and paragraphs are put together up to this size.
        max_words: nothing is larger than this; a longer paragraph is cut between sentences, code between lines.
    """
    lines = document.text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    whole = size(document.text) <= (max_words if document.kind == "record" else target_words)
    root = Section(document.title, 0, len(lines)) if whole else _outline(document, lines)
    if whole:
        cuts = [(root.title, Piece("\n".join(lines), 0, len(lines)))]
    else:
        cuts = list(_cut(root, lines, document.kind in {"python", "code"}, target_words, max_words))
    chunks: list[Chunk] = []
    for number, (title, piece) in enumerate(cuts, start=1):
        kept = piece.text.split("\n")
        first = next((i for i, line in enumerate(kept) if line.strip()), 0)
        last = next((i for i in range(len(kept) - 1, -1, -1) if kept[i].strip()), 0)
        start, end = document.line + piece.start + first, document.line + piece.start + last
        if document.kind == "record":  # lines inside a JSON string or a CSV cell are not lines of the file
            start = end = document.line
        identifier = document.id if len(cuts) == 1 else f"{document.id}#{number}"
        text = "\n".join(kept[first : last + 1])
        chunks.append(Chunk(identifier, document.id, title.strip(), text, document.metadata, document.path, start, end))
    return chunks


def _outline(document: SourceDocument, lines: list[str]) -> Section:
    if document.kind == "markdown":
        return _heading_tree(_markdown_headings(lines), document.title, len(lines))
    if document.kind == "rst":
        return _heading_tree(_rst_headings(lines), document.title, len(lines))
    if document.kind == "python":
        return _python_tree(document.title, lines)
    return Section(document.title, 0, len(lines))


# -------------------------------------------------------------------------------------------------------- structure


def _markdown_headings(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    """(line, level, title) of each heading outside fenced code and front matter."""
    fence, start = "", 0
    if lines and lines[0].strip() == "---" and "---" in (line.strip() for line in lines[1:100]):
        start = next(i for i, line in enumerate(lines[1:100], start=1) if line.strip() == "---") + 1
    for number in range(start, len(lines)):
        line = lines[number]
        mark = FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and line.strip() == mark[1]:
                fence = ""
        elif mark:
            fence = mark[1]
        elif heading := ATX.fullmatch(line):
            yield number, len(heading[1]), (heading[2] or "").strip()
        elif (
            number > start
            and (under := SETEXT.fullmatch(line))
            and lines[number - 1].strip()
            and not ATX.fullmatch(lines[number - 1])
            and not NO_SETEXT.match(lines[number - 1])
            and (number - 1 == start or not lines[number - 2].strip())
        ):
            yield number - 1, 1 if under[1][0] == "=" else 2, lines[number - 1].strip()


def _rst_headings(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    """reStructuredText ranks its headings by the order in which their underlines (and overlines) first appear."""
    levels: dict[tuple[str, bool], int] = {}
    for number in range(1, len(lines)):
        title, under = lines[number - 1], RST_LINE.fullmatch(lines[number])
        if not under or not title.strip() or title[0].isspace() or RST_LINE.fullmatch(title):
            continue
        if len(lines[number].rstrip()) < min(len(title.rstrip()), 4):
            continue
        above = lines[number - 2] if number >= 2 else ""
        over = bool(RST_LINE.fullmatch(above)) and above[0] == under[1]
        if not over and above.strip():
            continue  # the last line of a paragraph, or a table
        level = levels.setdefault((under[1], over), len(levels) + 1)
        yield number - 1 - over, level, title.strip()


def _heading_tree(headings: Iterable[tuple[int, int, str]], title: str, end: int) -> Section:
    root = Section(title, 0, end)
    stack: list[tuple[int, Section, str]] = [(0, root, "")]
    for line, level, name in headings:
        while stack[-1][0] >= level:
            stack.pop()[1].end = line
        path = f"{stack[-1][2]} > {name}" if stack[-1][2] else name
        section = Section(path or title, line, end)
        stack[-1][1].children.append(section)
        stack.append((level, section, path))
    return root


def _python_tree(title: str, lines: list[str]) -> Section:
    root = Section(title, 0, len(lines))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a user's "\d" is none of our business
            module = ast.parse("\n".join(lines))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return root
    _add_definitions(root, module.body, 0, "", lines)
    return root


def _add_definitions(section: Section, body: list[ast.stmt], floor: int, prefix: str, lines: list[str]) -> None:
    """Sections for the functions and classes of `body`, and for the statements between two of them, end to end.

    `floor` is the first line that is free: nothing may start above it.
    """
    found: list[tuple[int, str, ast.stmt]] = []
    for statement in body:
        start, name = statement.lineno - 1, ""
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            start = min([start, *(decorator.lineno - 1 for decorator in statement.decorator_list)])
            name = statement.name
        while start > floor and lines[start - 1].lstrip().startswith("#"):
            start -= 1  # the comment above belongs to what it describes
        if start >= floor and (name or (found and found[-1][1])):
            found.append((start, name, statement))
        floor = statement.end_lineno or statement.lineno
    file = section.title if not prefix else section.title.rsplit(" ", 1)[0]
    for position, (start, name, statement) in enumerate(found):
        end = found[position + 1][0] if position + 1 < len(found) else section.end
        child = Section(f"{file} {prefix}{name}" if name else section.title, start, end)
        section.children.append(child)
        if isinstance(statement, ast.ClassDef):
            _add_definitions(child, statement.body, statement.lineno, f"{prefix}{name}.", lines)


# ------------------------------------------------------------------------------------------------------------- size


def _cut(section: Section, lines: list[str], code: bool, target: int, limit: int) -> Iterator[tuple[str, Piece]]:
    whole = Piece("\n".join(lines[section.start : section.end]), section.start, section.end)
    if not whole.text.strip():
        return
    if size(whole.text) <= target:
        yield section.title, whole
        return
    own_end = section.children[0].start if section.children else section.end
    blocks = list(_blocks(lines, section.start, own_end))
    for piece in _pack(blocks, code, target, limit):
        yield section.title, piece
    for child in section.children:
        yield from _cut(child, lines, code, target, limit)


def _blocks(lines: list[str], start: int, end: int) -> Iterator[Piece]:
    """Runs of lines between blank lines; fenced code is one block."""
    first, fence = start, ""
    for number in range(start, end):
        mark = FENCE.match(lines[number])
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence):
            fence = ""
        if not fence and not lines[number].strip():
            if number > first:
                yield Piece("\n".join(lines[first:number]), first, number)
            first = number + 1
    if first < end:
        yield Piece("\n".join(lines[first:end]), first, end)


def _pack(blocks: list[Piece], code: bool, target: int, limit: int) -> Iterator[Piece]:
    """Blocks put together up to `target`, those over `limit` split; what is split is not joined to its neighbours."""
    held: list[Piece] = []
    for block in blocks:
        if held and size(_joined(held).text) + size(block.text) > target:
            yield _joined(held)
            held = []
        if size(block.text) > limit:
            if held:
                yield _joined(held)
                held = []
            yield from _split(block, [LINE, WORD] if code else [SENTENCE, LINE, WORD], target, limit)
        else:
            held.append(block)
    if held:
        yield _joined(held)


def _joined(blocks: list[Piece]) -> Piece:
    """Blocks as one piece, with as many line breaks between two as the file has, so that lines can be counted."""
    text = blocks[0].text
    for before, after in itertools.pairwise(blocks):
        text += "\n" * (after.start - before.end + 1) + after.text
    return Piece(text, blocks[0].start, blocks[-1].end)


def _split(block: Piece, separators: list[re.Pattern[str]], target: int, limit: int) -> Iterator[Piece]:
    """Cut a long block at the first separator that gives parts under `limit`; characters where none does."""
    if separators:
        ends = [match.end() for match in separators[0].finditer(block.text)]
    else:
        ends = list(range(STEP, len(block.text), STEP))
    start, position = 0, 0
    for end in [*ends, len(block.text)]:
        if position > start and size(block.text[start:end]) > target:
            yield from _fit(block, start, position, separators, target, limit)
            start = position
        position = end
    yield from _fit(block, start, len(block.text), separators, target, limit)


def _fit(
    block: Piece, start: int, end: int, separators: list[re.Pattern[str]], target: int, limit: int
) -> Iterator[Piece]:
    text = block.text[start:end]
    if not text.strip():
        return
    first = block.start + block.text.count("\n", 0, start)
    piece = Piece(text, first, first + text.count("\n") + 1)
    if size(text) > limit and separators:
        yield from _split(piece, separators[1:], target, limit)
    else:
        yield piece

"""Cutting documents into chunks where their structure allows: headings, functions, paragraphs, and only then sentences.

A document is a tree of sections over its lines (`outline`). A section that fits the target size stays whole; a larger
one is cut into its own text and its children. A heading stays with the text below it, and text that is too long for the
model is split (`text_splitting`). Sections are contiguous, so by construction no text is lost.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from search_r3.index.chunking.chunk_ids import chunk_id
from search_r3.index.chunking.chunk_titles import short_path, split_title
from search_r3.index.chunking.outline import Section, outline
from search_r3.index.chunking.text_splitting import (
    CLOSING_WORDS,
    CODE,
    PROSE,
    Piece,
    Separators,
    closes,
    measured,
    size,
    size_of,
    split_by_tokens,
    split_by_words,
    trimmed,
)
from search_r3.index.chunking.token_limit import TokenLimit
from search_r3.index.results.query_words import composed
from search_r3.index.source_document import Scalar, SourceDocument

TARGET_WORDS = 160
MAX_WORDS = 320
SHORT = 1 / 4  # of the target size; a shorter text joins its neighbor, which it would otherwise outrank by its title
HEADING_WORDS = 12  # a line with at most this many words that does not end like a sentence introduces what follows
COMMENT_WORDS = 40  # a longer comment is separate text
UNMARKED_WEIGHT = 4  # lines that only look like headings count more, as they may be a list
OPENINGS = (":", "{", "(", "[", "：")

FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
COMMENT = re.compile(r"\s*(#[^\w\[]|#$|//|--|;|%|/\*|\*|<!--)")
ANCHOR = re.compile(r"\s*(<a\s[^<>]*>(</a>)?|<!--[^>]*-->|@\w+(\([^()]*\))?|#?\[[\[\w][^\[\]]*\]{1,2})\s*")
OPENING = re.compile(r"\s*(<\w[^<>]{,60}>\s*$|(`{3,}|~{3,})[^`]{,60}$)")
ITEM = re.compile(r"\s*[-*+>|•](\s|$)")
SENTENCE_END = re.compile(r"[.!…。！;,；，]['\")\]*_]*$")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document: the unit that is embedded and found. Lines count from 1, both ends included."""

    id: str
    document: str
    title: str
    text: str
    metadata: dict[str, Scalar]
    path: str
    start_line: int
    end_line: int


@dataclass(frozen=True, slots=True)
class Lines:
    """A document's lines, the numbers of its heading lines, whether it is code, and the `target` size in words."""

    lines: list[str]
    headings: set[int]
    code: bool
    target: int


@dataclass(frozen=True, slots=True)
class Block:
    """Lines that stay together if possible.

    Attributes:
        heads: whether they only introduce what follows.
        heading: whether they do so by markup rather than by appearance.
        tails: whether they only close or separate.
    """

    section: Section
    piece: Piece
    heads: bool = False
    tails: bool = False
    heading: bool = False


def chunk_document(
    document: SourceDocument,
    *,
    target_words: int = TARGET_WORDS,
    max_words: int = MAX_WORDS,
    tokens: TokenLimit | None = None,
) -> list[Chunk]:
    """Cut one document into chunks. In order, they contain all of its text except blank lines, in composed form (NFC).

    Chunk ids are unique whatever the documents' ids are (see `chunk_ids`). Records (JSONL, CSV, BEIR) stay whole up to
    `max_words` and the token limit, since the user has decided there what one document is.

    A chunk's title is the path of headings down to it. In a document with several chunks, a title may have half of the
    token limit: the rest of a record's title becomes the beginning of its text, and a path of headings that would make
    its chunk too long loses its outer headings.

    Args:
        target_words: sections and paragraphs are merged up to this size.
        max_words: maximum size; a longer paragraph is cut between sentences, code between lines.
        tokens: the limit for a chunk's "title text"; None ignores tokens.
    """
    if "\r" in document.text:
        document = replace(document, text=document.text.replace("\r\n", "\n").replace("\r", "\n"))
    document = replace(document, title=composed(document.title), text=composed(document.text))
    pieces = list(_pieces(document, target_words, max_words, tokens))
    chunks: list[Chunk] = []
    for number, (title, piece) in enumerate(pieces, start=1):
        text, above, below = trimmed(piece.text)
        start, end = document.line + piece.start + above, document.line + piece.end - 1 - below
        if document.kind == "record" or not document.line:  # lines of a JSON string or a PDF are not lines of the file
            start = end = document.line
        name = chunk_id(document.id, number, len(pieces))
        metadata = document.metadata | _page_of(document, piece.start + above)
        chunks.append(Chunk(name, document.id, title, text, metadata, document.path, start, end))
    return chunks


def _page_of(document: SourceDocument, line: int) -> dict[str, Scalar]:
    """The metadata field with the number of the page that has this line of the text; none without pages."""
    after = bisect.bisect_right(document.pages, line, key=lambda page: page.line)
    return {document.pages[after - 1].field: document.pages[after - 1].number} if after else {}


def content_of(title: str, text: str) -> str:
    """The text of a chunk that is embedded."""
    return f"{title} {text}" if title else text


def _pieces(
    document: SourceDocument, target: int, limit: int, tokens: TokenLimit | None
) -> Iterator[tuple[str, Piece]]:
    """The document's pieces in order, each with its title."""
    title, text = document.title.strip(), document.text
    record = document.kind == "record"
    whole = size(text) <= (limit if record else target)
    heading = _first_heading(document) if whole else ""
    if whole and tokens:
        whole = not tokens.exceeded([content_of(heading or title, text.strip("\n"))])[0]
    if tokens and record and not whole:
        title, rest = split_title(title, tokens)
        text = f"{rest}\n{text}" if rest else text
    lines = text.split("\n")
    if whole:
        yield heading or title, Piece(text, 0, len(lines))
        return
    separators = CODE if document.kind in {"python", "code"} else PROSE
    root = outline(replace(document, title=title, text=text), lines)
    source = Lines(lines, _heading_lines(root), separators is CODE, target)
    blocks = itertools.groupby(_glued(_blocks(root, source), target), lambda block: block.section)
    cut = [
        (section.title.strip(), piece) for section, group in blocks for piece in _pack(group, separators, target, limit)
    ]
    if tokens is None:
        yield from cut
        return
    over = tokens.exceeded([content_of(name, trimmed(piece.text)[0]) for name, piece in cut])
    for (name, piece), too_long in zip(cut, over, strict=True):
        if too_long:
            name = short_path(name, tokens)
            for part in split_by_tokens(piece, content_of(name, ""), separators, tokens):
                yield name, part
        else:
            yield name, piece


def _first_heading(document: SourceDocument) -> str:
    """The heading that a document begins with, if it has no other title than its path; "" if there is none."""
    if document.title != composed(document.path) or not (document.headings or document.kind in ("markdown", "rst")):
        return ""
    lines = document.text.split("\n")
    sections = outline(document, lines).children
    begins = bool(sections) and not any(line.strip() for line in lines[: sections[0].start])
    return sections[0].title.strip() if begins else ""


# ------------------------------------------------------------------------------------------------------------- blocks


def _blocks(section: Section, source: Lines) -> Iterator[Block]:
    """The blocks of a section: one if it is small, else its own paragraphs followed by its children's blocks."""
    whole = _piece(section.start, section.end, source)
    if not whole.text.strip():
        return
    if size(whole.text) <= source.target:
        only = _only_headings(_filled(section.start, section.end, source), source)
        yield Block(section, whole, heads=only, heading=only)
        return
    own_end = section.children[0].start if section.children else section.end
    for start, end in _runs(source.lines, section.start, own_end):
        filled = _filled(start, end, source)
        if _only_headings(filled, source):
            yield Block(section, _piece(start, end, source), heads=True, heading=True)
        else:
            lines = [source.lines[number] for number in filled]
            tails = all(map(closes, lines)) and size("\n".join(lines)) <= CLOSING_WORDS
            heads = not tails and not source.headings.intersection(filled) and _introduces(lines, source.code)
            yield Block(section, _piece(start, end, source), heads, tails)
    for child in section.children:
        yield from _blocks(child, source)


def _runs(lines: list[str], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of lines between blank lines, as [start, end); fenced code stays in one run."""
    first, fence = start, ""
    for number in range(start, end):
        mark = FENCE.match(lines[number])
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence):
            fence = ""
        if not fence and not lines[number].strip():
            if number > first:
                yield first, number
            first = number + 1
    if any(line.strip() for line in lines[first:end]):
        yield first, end


def _only_headings(filled: list[int], source: Lines) -> bool:
    bare = all(number in source.headings or closes(source.lines[number]) for number in filled)
    return bare and not source.headings.isdisjoint(filled)


def _introduces(lines: list[str], code: bool) -> bool:
    """Whether lines only introduce what follows: a heading without markup, an anchor, a comment above code."""
    if all(ANCHOR.fullmatch(line) for line in lines):
        return True
    if code and all(COMMENT.match(line) for line in lines):
        return size("\n".join(lines)) <= COMMENT_WORDS
    words = [line.rstrip() for line in lines if not closes(line)]
    if len(words) != 1 or size(words[0]) > HEADING_WORDS:
        return False
    return words[0].endswith(OPENINGS) or not (code or ITEM.match(words[0]) or SENTENCE_END.search(words[0]))


def _piece(start: int, end: int, source: Lines) -> Piece:
    body = start
    while body < end and (body in source.headings or _opens(source.lines[body])):
        body += 1
    text = "\n".join(source.lines[start:end])
    return Piece(text, start, end, _lead(text, len("\n".join(source.lines[start:body])) + 1, source.target))


def _opens(line: str) -> bool:
    return closes(line) or OPENING.match(line) is not None or line.rstrip().endswith(OPENINGS)


def _lead(text: str, length: int, target: int) -> int:
    """`length` if that many characters are a heading at one end of `text`; 0 if they are all of it or too long."""
    return length if 1 < length < len(text) and size(text[:length]) <= target // 2 else 0


def _filled(start: int, end: int, source: Lines) -> list[int]:
    return [number for number in range(start, end) if source.lines[number].strip()]


def _heading_lines(section: Section) -> set[int]:
    own = set(range(section.start, section.body))
    return own.union(*map(_heading_lines, section.children))


# ------------------------------------------------------------------------------------------------------------ joining


def _glued(blocks: Iterable[Block], target: int) -> Iterator[Block]:
    """Merge blocks with the headings above and the closing marks below them, so that those are never alone."""
    group: list[Block] = []
    heads: list[Block] = []
    for block in blocks:
        if block.heads:
            heads.append(block)
        elif block.tails and (group or heads):
            (heads or group).append(block)
        else:
            if group:
                yield _merged(group, target)
            free, kept = _nearest(heads, target)
            yield from free
            group, heads = [*kept, block], []
    if group and heads and _words(heads) <= target:  # at the end of the document, headings join the text above
        last = _merged(group, target)
        both = _joined([last.piece, *(head.piece for head in heads)])
        tail = _lead(both.text[::-1], len(both.text) - len(last.piece.text), target)
        yield Block(last.section, replace(both, tail=tail))
        return
    if group:
        yield _merged(group, target)
    yield from _evenly(heads, target)


def _nearest(heads: list[Block], target: int) -> tuple[list[Block], list[Block]]:
    """Split headings into those too far from the text that follows, and those merged with it: at least the last."""
    count, weight = 0, 0
    for head in reversed(heads):
        weight += size(head.piece.text) * (1 if head.heading else UNMARKED_WEIGHT)
        if count and weight > target:
            break
        count += 1
    free, kept = heads[: len(heads) - count], heads[len(heads) - count :]
    if all(head.heading for head in free) and _words(free) <= target // 2:
        return [], heads
    return _evenly(free, target), kept


def _evenly(heads: list[Block], target: int) -> list[Block]:
    """Merge headings of several sections without text between them into a few blocks of about equal size."""
    if len({id(head.section) for head in heads}) < 2:
        return heads
    total = _words(heads)
    goal = total / max(1, -(-total // target))
    out: list[Block] = []
    group: list[Block] = []
    done = 0
    for head in heads:
        group.append(head)
        done += size(head.piece.text)
        if done >= goal * (len(out) + 1):
            out.append(_merged(group, target))
            group = []
    return [*out, _merged(group, target)] if group else out


def _words(blocks: list[Block]) -> int:
    return sum(size(block.piece.text) for block in blocks)


def _merged(group: list[Block], target: int) -> Block:
    """Merge neighbors into one block, in the section of the block that has text."""
    if len(group) == 1:
        return group[0]
    position = next((i for i, block in enumerate(group) if not block.heads and not block.tails), 0)
    main = group[position]
    piece = _joined([block.piece for block in group])
    before = len(_joined([block.piece for block in group[: position + 1]]).text) - len(main.piece.text)
    return Block(main.section, replace(piece, lead=_lead(piece.text, before + main.piece.lead, target)))


def _pack(blocks: Iterable[Block], separators: Separators, target: int, limit: int) -> Iterator[Piece]:
    """Merge blocks up to `target` words, or up to `limit` if one would be short; split blocks larger than `limit`."""
    short = target * SHORT if separators is PROSE else 0
    pending: list[Piece] = []
    done: list[Piece] = []  # at most one, which a short remainder may join
    words = length = done_words = done_length = 0  # `measured` of both
    for block in blocks:
        more_words, more_length = measured(block.piece.text)
        before, more = size_of(words, length), size_of(more_words, more_length)
        if pending and before >= short and before + more > target:
            yield from done
            done, done_words, done_length = [_joined(pending)], words, length
            pending, words, length, before = [], 0, 0, 0
        pending.append(block.piece)
        words, length = words + more_words, length + more_length
        if before + more > limit:
            yield from done
            yield from split_by_words(_joined(pending), separators, target, limit)
            done, pending, words, length = [], [], 0, 0
    fits = size_of(done_words + words, done_length + length) <= limit
    if done and pending and size_of(words, length) < short and fits:
        done, pending = [_joined(done + pending)], []
    yield from done
    if pending:
        yield _joined(pending)


def _joined(pieces: list[Piece]) -> Piece:
    """Join pieces with as many line breaks between them as in the file, so that line numbers stay right."""
    texts = [pieces[0].text]
    for before, after in itertools.pairwise(pieces):
        texts += ["\n" * (after.start - before.end + 1), after.text]
    return Piece("".join(texts), pieces[0].start, pieces[-1].end, pieces[0].lead, pieces[-1].tail)

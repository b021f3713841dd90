"""Splitting text that is too long for one chunk: between sentences, lines or words, and only then inside text without
any spaces.

Pieces are limited both in words, as people count them, and in the model's tokens. A heading at the beginning and
closing marks at the end are never cut off from their text.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from search_r3.index.chunking.token_limit import TokenLimit

BYTES_PER_WORD = 6  # of an English word with its space
STEP = 60  # characters between possible cuts in text without spaces
CLOSING_WORDS = 8  # longer text does more than close what is above it

SENTENCE = re.compile(r"(?<=[.!?])['\")\]]*\s+|(?<=[。！？])|\n(?=\s*[-*+] |\s*\d+[.)] )")
LINE = re.compile(r"\n")
WORD = re.compile(r"\s+")
MARK = re.compile(r"(?<=[,;|}\])>、，；：])")
PROSE, CODE = (SENTENCE, LINE, WORD, MARK), (LINE, WORD, MARK)
SLACK = 1.05  # how much more room parts have than their text needs on average
CLOSING_CHARACTERS = 80  # of a line
CLOSING = re.compile(r"(</[^<>]*>\W*|end\w*[;.]?|fi|done|esac|#endif.*|[\W_]*)", re.IGNORECASE)
JOINING = frozenset("\u200c\u200d\ufe0e\ufe0f")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text, and the 0-based lines [start, end) that it came from.

    Its first `lead` and last `tail` characters are headings, which are not cut off from the text between them.
    """

    text: str
    start: int
    end: int
    lead: int = 0
    tail: int = 0


Separators = Sequence[re.Pattern[str]]


def measured(text: str) -> tuple[int, int]:
    """Number of words, and their UTF-8 bytes. Those of texts joined by white space add up."""
    words = text.split()
    return len(words), len("".join(words).encode("utf-8", "replace"))


def size_of(words: int, length: int) -> int:
    """Number of words, or UTF-8 bytes / 6 if that is more: source code and Chinese have few spaces but many tokens."""
    return max(words, length // BYTES_PER_WORD)


def size(text: str) -> int:
    """`size_of` a text."""
    return size_of(*measured(text))


def trimmed(text: str) -> tuple[str, int, int]:
    """The text without blank lines at its ends, and how many of those there were at the beginning and at the end."""
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if line.strip()), 0)
    last = next((i for i in range(len(lines) - 1, -1, -1) if lines[i].strip()), 0)
    return "\n".join(lines[first : last + 1]), first, len(lines) - 1 - last


def closes(line: str) -> bool:
    """Whether a line only closes what is above it, or separates: a closing tag or brace, a fence, a rule."""
    line = line.strip()
    return len(line) <= CLOSING_CHARACTERS and CLOSING.fullmatch(line) is not None


def split_by_words(piece: Piece, separators: Separators, target: int, limit: int) -> Iterator[Piece]:
    """Cut a piece at the first separator that gives parts of at most `limit` words, or between characters if none does.

    Parts are filled up to `target` words. Together, in order, they are the piece's text.
    """
    text = piece.text
    start, position = 0, 0
    for end in [*_cuts(piece, separators, STEP), len(text)]:
        if position > start and size(text[start:end]) > target:
            yield from _fitted(_part(piece, start, position), separators, target, limit)
            start = position
        position = end
    yield from _fitted(_part(piece, start, len(text)), separators, target, limit)


def _fitted(piece: Piece, separators: Separators, target: int, limit: int) -> Iterator[Piece]:
    if not piece.text.strip():
        return
    if size(piece.text) > limit and separators:
        yield from split_by_words(piece, separators[1:], target, limit)
    else:
        yield piece


def split_by_tokens(piece: Piece, prefix: str, separators: Separators, tokens: TokenLimit) -> Iterator[Piece]:
    """Cut a piece into parts of about equal length that stay within the token limit, with `prefix` before each.

    A single character that exceeds the limit stays as it is.
    """
    if not piece.text.strip():
        return
    if not tokens.exceeded([(prefix + trimmed(piece.text)[0]).strip()])[0]:
        yield piece
        return
    ends = _cuts(piece, separators, max(1, len(piece.text) // 16))
    if not ends:
        if separators:
            yield from split_by_tokens(piece, prefix, separators[1:], tokens)
        elif piece.lead or piece.tail:
            yield from split_by_tokens(replace(piece, lead=0, tail=0), prefix, PROSE, tokens)
        else:
            yield piece
        return
    for start, end, whole in _shares(piece.text, ends, prefix, tokens):
        part = _part(piece, start, end)
        yield from split_by_tokens(part, prefix, separators if whole else separators[1:], tokens)


def _shares(text: str, ends: list[int], prefix: str, tokens: TokenLimit) -> Iterator[tuple[int, int, bool]]:
    """Group the segments that end at `ends` into at least two groups with about equal numbers of tokens.

    Yields:
        (start, end, whether the group has several segments); a single segment may be too long.
    """
    bounds = [0, *ends, len(text)]
    counts = tokens.count([text[a:b] for a, b in itertools.pairwise(bounds)])
    room = max(1, tokens.limit - tokens.count([prefix])[0])
    goal = sum(counts) / max(2, math.ceil(sum(counts) / room * SLACK))
    starts, filled, done = [0], 0, 0
    for number, count in enumerate(counts):
        if number > starts[-1] and (filled + count > room or done + count / 2 > goal * len(starts)):
            starts.append(number)
            filled = 0
        filled += count
        done += count
    if len(starts) == 1:  # parts may have fewer tokens than the whole
        starts.append(len(counts) - 1)
    for start, end in itertools.pairwise([*starts, len(counts)]):
        yield bounds[start], bounds[end], end > start + 1


def _cuts(piece: Piece, separators: Separators, step: int) -> list[int]:
    """Where the piece may be cut: at the first separator or, without separators, every `step` characters."""
    text, last = piece.text, min(_closing(piece.text), len(piece.text) - piece.tail)
    if separators:
        return [match.end() for match in separators[0].finditer(text) if piece.lead < match.end() < last]
    ends = (_whole_character(text, end) for end in range(step, len(text), step))
    return [end for end in dict.fromkeys(ends) if piece.lead < end < last]


def _closing(text: str) -> int:
    """The start of the final lines that only close what is above them; the text's length if there are none."""
    position = len(text)
    while position > 0 and len(text) - position <= CLOSING_WORDS * CLOSING_CHARACTERS:
        start = text.rfind("\n", 0, position - 1) + 1
        if not closes(text[start:position]):
            break
        position = start
    return position if position > 0 and size(text[position:]) <= CLOSING_WORDS else len(text)


def _whole_character(text: str, end: int) -> int:
    """`end`, moved back so that no accent, vowel sign or joined emoji is separated from its character."""
    first = end
    while end > 1 and (_joins(text[end]) or text[end - 1] == "\u200d"):
        end -= 1
        if first - end > STEP:
            return first
    return end


def _joins(character: str) -> bool:
    return (
        character in JOINING
        or "\U0001f3fb" <= character <= "\U0001f3ff"  # skin tones
        or unicodedata.category(character)[0] == "M"
    )


def _part(piece: Piece, start: int, end: int) -> Piece:
    text = piece.text[start:end]
    first = piece.start + piece.text.count("\n", 0, start)
    lead, tail = max(0, piece.lead - start), max(0, piece.tail - (len(piece.text) - end))
    return Piece(text, first, first + text.count("\n") + 1, lead, tail)

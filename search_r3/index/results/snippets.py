"""Snippets: the sentences of a chunk that match a query best, and the positions of its words in them."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from search_r3.index.results.markup import Markup, kept_characters, repeats_title
from search_r3.index.results.word_marks import Match, Span, find_matches, joined, query_terms

SNIPPET_CHARACTERS = 240
SENTENCE = re.compile(r"[^\n]*?(?:[.!?](?=\s)|[。！？]|\n|$)")


@dataclass(frozen=True)
class Snippet:
    """Part of a chunk's text.

    Attributes:
        text: what is shown: `chunk_text[offset:end]` without markup.
        offset, end: its place in the chunk's text.
        highlights: (start, end) of the query's words within `text`.
        matches: all matches of the query's words in the chunk's text.
        kept: the place of each character of `text` in the chunk's text.
    """

    text: str
    offset: int
    end: int
    highlights: list[Span]
    matches: list[Match]
    kept: list[int]

    def shown(self, spans: Sequence[Span]) -> list[Span]:
        """Spans of the chunk's text as (start, end) within `text`; what is not shown is left out."""
        return _shown_spans(spans, self.kept)


def make_snippet(
    text: str, query: str, length: int = SNIPPET_CHARACTERS, *, title: str = "", markup: Markup = "none"
) -> Snippet:
    """The run of whole sentences or lines, up to `length` characters, that has the most of the query's words.

    Words match as in `word_marks`: "Indexing" finds "indexed", and British finds American spelling. Among equally good
    runs the first wins; without any match, the snippet is the beginning of the text. A sentence longer than `length` is
    cut around its first match. A heading that repeats the end of `title` does not begin a snippet.
    """
    matches = find_matches(text, query_terms(query))
    start, end = _narrowed(text, *_best_run(text, matches, length, title, markup), matches, length)
    while start < end and text[start].isspace():
        start += 1
    end = start + len(text[start:end].rstrip())
    kept = [start + position for position in kept_characters(text[start:end], markup)]
    while kept and text[kept[0]].isspace():
        del kept[0]
    while kept and text[kept[-1]].isspace():
        del kept[-1]
    shown = "".join(text[position] for position in kept)
    return Snippet(shown, start, end, _shown_spans(joined(text, matches), kept), matches, kept)


def _best_run(text: str, matches: Sequence[Match], length: int, title: str, markup: Markup) -> Span:
    """The best run of sentences or lines that have text besides markup."""
    spans = [match.span() for match in SENTENCE.finditer(text) if match.group().strip()]
    if markup != "none":
        told = [span for span in spans if not repeats_title(text[slice(*span)], title)]
        spans = [span for span in told if kept_characters(text[slice(*span)].strip(), markup)] or told or spans
    best, best_key = (0, 0), (-1, -1, 0)
    last = 0
    for first in range(len(spans)):
        last = max(last, first)
        while last + 1 < len(spans) and spans[last + 1][1] - spans[first][0] <= length:
            last += 1
        start, end = spans[first][0], spans[last][1]
        inside = [term for begin, stop, term in matches if begin >= start and stop <= end]
        key = (len(set(inside)), len(inside), -start)
        if key > best_key:
            best, best_key = (start, end), key
    return best


def _shown_spans(spans: Sequence[Span], kept: Sequence[int]) -> list[Span]:
    """`spans` of a text as positions among its `kept` characters; what is not kept is left out."""
    shown = [(bisect_left(kept, start), bisect_left(kept, end)) for start, end in spans]
    return [(start, end) for start, end in shown if start < end]


def _narrowed(text: str, start: int, end: int, matches: Sequence[Match], length: int) -> Span:
    """Shorten a span to `length` characters, cut at spaces, with a quarter of them before its first match."""
    if end - start <= length:
        return start, end
    first = next((begin for begin, stop, _ in matches if begin >= start and stop <= end), start)
    left = max(start, min(first - length // 4, end - length))
    right = min(end, left + length)
    if left > start and (space := re.search(r"\s", text[left:first])):
        left += space.end()
    gap = max(text.rfind(" ", left, right), text.rfind("\n", left, right))
    if right < end and gap > left + length // 2:
        right = gap
    return left, right

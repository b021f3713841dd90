"""Snippets: the sentences of a chunk that match a query best, and the positions of its words in them."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from search_r3.index.results.query_words import WORD, has_no_spaces, without_stop_words

SNIPPET_CHARACTERS = 240
MAX_TERMS = 200  # of a very long query, only this many different words are used
SPAN = re.compile(r"[^\n]*?(?:[.!?](?=\s)|[。！？]|\n|$)")


@dataclass(frozen=True)
class Snippet:
    """`text` is chunk_text[offset : offset + len(text)]; `highlights` are (start, end) within `text`."""

    text: str
    offset: int
    highlights: list[tuple[int, int]]


def make_snippet(text: str, query: str, length: int = SNIPPET_CHARACTERS) -> Snippet:
    """The run of whole sentences or lines, up to `length` characters, that has the most of the query's words.

    Words match regardless of case, accents and English endings ("Indexing" finds "indexed"). Among equally good runs
    the first wins; without any match, the snippet is the beginning of the text. A sentence longer than `length` is cut
    around its first match.
    """
    terms = query_terms(query)
    matches = _matches(text, terms)
    spans = [match.span() for match in SPAN.finditer(text) if match.group().strip()]
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
    start, end = _narrowed(text, *best, matches, length)
    while start < end and text[start].isspace():
        start += 1
    chosen = text[start:end].rstrip()
    end = start + len(chosen)
    return Snippet(chosen, start, _joined(matches, start, end))


def query_terms(query: str) -> set[str]:
    """The words that a text search looks for, normalized, without stop words unless there are no others.

    In scripts without spaces, pairs of characters stand in for words, as usual.
    """
    words: dict[str, None] = {}
    for match in WORD.finditer(without_stop_words(query)):
        words[_plain(match.group())] = None
        if len(words) >= MAX_TERMS:
            break
    terms: set[str] = set()
    for word in words:
        if not has_no_spaces(word):
            terms.add(_comparable(word))
        else:
            terms.update([word] if len(word) < 2 else (word[i : i + 2] for i in range(len(word) - 1)))
    return terms


def _matches(text: str, terms: set[str]) -> list[tuple[int, int, str]]:
    """(start, end, term) of every match, in order; those in scripts without spaces may overlap."""
    matches: list[tuple[int, int, str]] = []
    unspaced = "|".join(re.escape(term) for term in sorted(terms, key=len, reverse=True) if has_no_spaces(term))
    inside = re.compile(f"(?=({unspaced}))") if unspaced else None
    for match in WORD.finditer(text):
        word = match.group()
        if not word.isascii() and has_no_spaces(word):
            pairs = inside.finditer(word) if inside else ()
            matches.extend((match.start() + pair.start(1), match.start() + pair.end(1), pair[1]) for pair in pairs)
        elif (stem := _comparable(word)) in terms:
            matches.append((match.start(), match.end(), stem))
    return matches


def _joined(matches: list[tuple[int, int, str]], start: int, end: int) -> list[tuple[int, int]]:
    """The parts of [start, end) that matches cover, relative to `start`; adjacent matches are merged."""
    joined: list[tuple[int, int]] = []
    for first, last, _ in matches:
        first, last = max(first, start) - start, min(last, end) - start
        if first >= last:
            continue
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((first, last))
    return joined


@lru_cache(maxsize=50_000)
def _comparable(word: str) -> str:
    return _stem(_plain(word))


def _plain(word: str) -> str:
    if word.isascii():
        return word.lower()
    if has_no_spaces(word):
        return word
    return "".join(c for c in unicodedata.normalize("NFKD", word.casefold()) if not unicodedata.combining(c))


def _stem(word: str) -> str:
    for ending in ("ings", "ing", "edly", "ies", "ed", "es", "s", "ly", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def _narrowed(text: str, start: int, end: int, matches: list[tuple[int, int, str]], length: int) -> tuple[int, int]:
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

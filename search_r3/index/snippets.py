"""The few sentences of a chunk that a reader should see for a query, and where its words stand in them."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

SNIPPET_CHARACTERS = 240
MAX_TERMS = 200  # of a very long query, the first so many different words
WORD = re.compile(r"[^\W_]+")  # snake_case is several words
SPAN = re.compile(r"[^\n]*?(?:[.!?](?=\s)|[。！？]|\n|$)")
# What says nothing about a text's subject: articles, pronouns, auxiliaries, question words.
STOP_WORD_LIST = (
    "a an and any are as at be been but by can could did do does for from had has have how i if in into is it its "
    "me my no not of on or our should so than that the their them then there these they this to was we were what when "
    "where which who why will with would you your"
)
STOP_WORDS = frozenset(STOP_WORD_LIST.split())


@dataclass(frozen=True)
class Snippet:
    """`text` is chunk_text[offset : offset + len(text)]; `highlights` are (start, end) within `text`."""

    text: str
    offset: int
    highlights: list[tuple[int, int]]


def make_snippet(text: str, query: str, length: int = SNIPPET_CHARACTERS) -> Snippet:
    """The run of whole sentences or lines, up to `length` characters, with most of the query's words.

    Words match regardless of case, accents and English endings ("Indexing" finds "indexed"). Among equals the earlier
    run wins; without any match it is the beginning. A sentence longer than `length` is cut around its first match.
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
    return Snippet(chosen, start, [(a - start, b - start) for a, b, _ in matches if a >= start and b <= end])


def query_terms(query: str) -> set[str]:
    """The query's words in comparable form; words that say nothing are left out unless there are no others.

    Of scripts without spaces it is every two characters, the usual stand-in for words.
    """
    words: dict[str, None] = {}
    for match in WORD.finditer(query):
        words[_plain(match.group())] = None
        if len(words) >= MAX_TERMS:
            break
    telling = [word for word in words if word not in STOP_WORDS] or list(words)
    terms: set[str] = set()
    for word in telling:
        unspaced = _has_no_spaces(word) and len(word) > 2
        terms.update((word[i : i + 2] for i in range(len(word) - 1)) if unspaced else [_stem(word)])
    return terms


def _matches(text: str, terms: set[str]) -> list[tuple[int, int, str]]:
    found = []
    unspaced = [re.escape(term) for term in sorted(terms, key=lambda term: (-len(term), term)) if _has_no_spaces(term)]
    inside = re.compile("|".join(unspaced)) if unspaced else None
    for match in WORD.finditer(text):
        stem = _stem(_plain(match.group()))
        if stem in terms:
            found.append((match.start(), match.end(), stem))
        elif inside and _has_no_spaces(stem):
            places = inside.finditer(match.group())
            found.extend(
                (match.start() + place.start(), match.start() + place.end(), place.group()) for place in places
            )
    return found


def _has_no_spaces(term: str) -> bool:
    """Chinese, Japanese and Thai write their words without spaces between them."""
    return any("\u0e00" <= character <= "\u0e7f" or "\u3040" <= character <= "\u9fff" for character in term)


def _plain(word: str) -> str:
    if word.isascii():
        return word.lower()
    return "".join(c for c in unicodedata.normalize("NFKD", word.casefold()) if not unicodedata.combining(c))


def _stem(word: str) -> str:
    for ending in ("ings", "ing", "edly", "ies", "ed", "es", "s", "ly", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def _narrowed(text: str, start: int, end: int, matches: list[tuple[int, int, str]], length: int) -> tuple[int, int]:
    """Cut a span that is too long to `length` characters, a quarter of them before its first match, at spaces."""
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

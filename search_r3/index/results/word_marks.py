"""Where the words of a query occur in a text: regardless of case, accents, English endings and British or American
spelling, and as whole words in scripts without spaces.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

from search_r3.index.results.query_words import WORD, has_no_spaces, without_stop_words

MAX_TERMS = 200  # of a very long query, only this many different words are used
Match = tuple[int, int, str]
"""Start, end and term of a word that matches."""
Span = tuple[int, int]
_SPELLING = (
    (re.compile(r"(?<=\w{3})is(?=(e|ed|es|er|ers|ing|ation|ations)$)"), "iz"),
    (re.compile(r"(?<=\w{3})our(?=(s|ed|ing|al|ite)?$)"), "or"),
    (re.compile(r"(?<=\w)enc(?=(e|es|ed|ing)$)"), "ens"),
    (re.compile(r"(?<=\w{2}t)re(?=s?$)"), "er"),
    (re.compile(r"(?<=\w{2})ogue(?=s?$)"), "og"),
)
"""British spellings as American ones. Words that this misspells are misspelled on both sides."""
_HIRAGANA = re.compile("[\u3040-\u309f]+")
_SCRIPTS = ("\u3040-\u309f", "\u30a0-\u30ff\uff66-\uff9f", "\u3400-\u9fff\uf900-\ufaff")  # Hiragana, Katakana, Han
_SAME_SCRIPT = re.compile("|".join(f"[{script}]{{3}}" for script in _SCRIPTS))


def query_terms(query: str) -> set[str]:
    """The words that a text search looks for, normalized, without stop words unless there are no others.

    In scripts without spaces, pairs of characters stand in for words, as usual; pairs of Hiragana, which are mostly
    endings and particles, count only if there are no others.
    """
    words: dict[str, None] = {}
    for match in WORD.finditer(without_stop_words(query)):
        words[_plain(match.group())] = None
        if len(words) >= MAX_TERMS:
            break
    terms: set[str] = set()
    for word in words:
        if not has_no_spaces(word):
            terms.add(comparable(word))
        else:
            terms.update([word] if len(word) < 2 else (word[i : i + 2] for i in range(len(word) - 1)))
    contents = {term for term in terms if not _HIRAGANA.fullmatch(term)}
    return contents or terms


def find_matches(text: str, terms: set[str]) -> list[Match]:
    """Every match of `terms`, in order; those in scripts without spaces may overlap."""
    matches: list[Match] = []
    unspaced = "|".join(re.escape(term) for term in sorted(terms, key=len, reverse=True) if has_no_spaces(term))
    inside = re.compile(f"(?=({unspaced}))") if unspaced else None
    for match in WORD.finditer(text):
        word = match.group()
        if not word.isascii() and has_no_spaces(word):
            pairs = inside.finditer(word) if inside else ()
            matches.extend((match.start() + pair.start(1), match.start() + pair.end(1), pair[1]) for pair in pairs)
        elif (stem := comparable(word)) in terms:
            matches.append((match.start(), match.end(), stem))
    return matches


def joined(text: str, matches: Iterable[Match]) -> list[Span]:
    """The parts of `text` that matches cover: adjacent ones are merged, and so are those around a single character of
    the same script without spaces (a hole in a word)."""
    spans: list[Span] = []
    for first, last, _ in matches:
        if spans and (first <= spans[-1][1] or _is_hole(text, spans[-1][1], first)):
            spans[-1] = spans[-1][0], max(spans[-1][1], last)
        else:
            spans.append((first, last))
    return spans


def _is_hole(text: str, end: int, start: int) -> bool:
    return start == end + 1 and bool(_SAME_SCRIPT.fullmatch(text[end - 1 : start + 1]))


@lru_cache(maxsize=50_000)
def comparable(word: str) -> str:
    """The form of a word by which it is compared: lower case, without accents and endings, in American spelling."""
    plain = _plain(word)
    if plain.isascii():
        for british, american in _SPELLING:
            plain = british.sub(american, plain)
    stem = _stem(plain)
    return stem[:-1] if stem.endswith("ll") and len(stem) > 3 else stem


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

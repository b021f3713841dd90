"""Queries typed in one case, given the capitals that their words have in ordinary text: truecasing.

People type "who was genghis khan" or "WHO WAS GENGHIS KHAN" for documents that say "Genghis Khan". A subword tokenizer
cuts the three differently, and lower case alone cost 0.05 of nDCG@10 on questions about names (LOG.md). A query adapter
can correct this without a change to documents: its query normalizer (`search_r3.model.query_normalizer`) may have a
`Truecaser`, which is learned from text (Lita et al. 2003, "tRuEcasIng"). Queries in mixed case are not touched.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from search_r3.model.capitals import is_all_capitals

SEEN = 2
"""Times that a word must be seen outside names for these occurrences to decide, instead of all."""
UNIGRAM_SHARE = 0.5
"""The share of a word's occurrences that its most frequent spelling must exceed to be used everywhere."""
BIGRAM_SHARE = 0.7
"""The same beside a given other word, of which far fewer occurrences are seen."""
TITLE_WORDS = 4
"""Minimum number of words of a query in title case: fewer may be a name."""
_SMALL_IN_NAMES = frozenset(("a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "or", "the", "to"))
"""Words that have no capital inside a name; the first one has."""
_TOKEN = re.compile(r"\S+")
_WORD = re.compile(r"(?<![^\W_])(?=[^\W_]*[^\W\d_])[^\W_]+(?:['’][^\W_]+)?")
"""Letters and digits with at least one letter before an apostrophe: "genghis", "p53", "don't". The first condition is
for speed: without it, a number of n digits would be read n times."""
MARKS = "\u00ad\u0300-\u036f"
"""The soft hyphen and the accents of decomposed letters, as a range of a regular expression."""
_RUN = rf"[^\W_]+(?:[{MARKS}]+[^\W_]*)*"
_WORD_OF_QUERY = re.compile(rf"(?<![^\W_])(?<![{MARKS}])(?=[^\W_]*[^\W\d_]){_RUN}(?:['’]{_RUN})?")
"""The same with `MARKS` inside, which documents seldom have and people type on some machines."""
CODE = re.compile(r"[_\\/@#<>=*^|~`{}]|\w[.:(]+\w|\w\(|^--[^\W\d]")
"""What is in no word of prose, or begins an option ("--max-tokens"): such tokens keep their case."""
_SENTENCE = re.compile(r"(?:\w\w\.|[!?])['\"’”)]?\s+['\"‘“(]?$")
"""What stands before the first word of another sentence, but not "e.g. "."""
_BREAKS = re.compile(r"[.!?:;|(\[\"“”\n-]")
"""What a word may stand behind with a capital that is not its own."""


class Truecaser:
    """The usual case of words, learned from text.

    Args:
        words: lower-case word -> its usual spelling, if that is another.
        after: (lower-case word before, lower-case word) -> the spelling behind that word, if that is not the usual one.
        before: (lower-case word, lower-case word behind it) -> the same in front of another word.
    """

    def __init__(
        self, words: dict[str, str], after: dict[tuple[str, str], str], before: dict[tuple[str, str], str]
    ) -> None:
        self.words, self.after, self.before = words, after, before

    def __call__(self, query: str) -> str:
        """`query` with the usual case of its words if it is in one case (`in_one_case`), else `query` itself.

        The first word of each sentence gets a capital. Words with underscores or other signs of code keep their case.
        """
        if not in_one_case(query):
            return query
        places = [match for token in _TOKEN.finditer(query) if not CODE.search(token[0]) for match in _words_in(token)]
        lowered = [_key(query[start:end]) for start, end in places]
        pieces, at = [], 0
        for i, (start, end) in enumerate(places):
            left = lowered[i - 1] if i and _adjacent(query, places[i - 1][1], start) else ""
            right = lowered[i + 1] if i + 1 < len(places) and _adjacent(query, end, places[i + 1][0]) else ""
            spelled = self.spelling(lowered[i], left, right)
            if len(spelled) != end - start:  # "İ" has two characters in lower case
                continue
            if "’" in query[start:end]:
                spelled = spelled.replace("'", "’")
            begins = start == 0 or _SENTENCE.search(query, max(0, start - 10), start) is not None
            pieces += [query[at:start], spelled[:1].title() + spelled[1:] if begins else spelled]
            at = end
        return "".join([*pieces, query[at:]])

    def spelling(self, word: str, left: str = "", right: str = "") -> str:
        """The case of a lower-case word between two others ("" for none), apostrophes straight; that of "khan's" is
        that of "khan" if nothing else is known."""
        spelled = self.after.get((left, word)) or self.before.get((word, right)) or self.words.get(word)
        if spelled is None and word.endswith("'s"):
            return self.spelling(word[:-2], left) + word[-2:]
        return spelled or word

    @classmethod
    def learn(cls, texts: Iterable[str], titles: Iterable[str] = (), names: Iterable[str] = ()) -> Truecaser:
        """Count the spellings of every word, beside every other word, and alone: in no name of several words, so that
        "New York City" says nothing about "city".

        Args:
            texts: prose, of which no word counts that begins a sentence or a quotation.
            titles: titles of documents, of which every word counts.
            names: names of a lexicon.
        """
        words: dict[str, Counter[str]] = {}
        alone: dict[str, Counter[str]] = {}
        after: dict[tuple[str, str], Counter[str]] = {}
        before: dict[tuple[str, str], Counter[str]] = {}
        whole = itertools.chain(((text, True) for text in texts), ((text, False) for text in (*titles, *names)))
        for text, is_prose in whole:
            for seen in _occurrences(text, is_prose):
                words.setdefault(seen.lowered, Counter())[seen.word] += 1
                if is_prose and not seen.in_name:
                    alone.setdefault(seen.lowered, Counter())[seen.word] += 1
                if seen.left:
                    after.setdefault((seen.left, seen.lowered), Counter())[seen.word] += 1
                if seen.right:
                    before.setdefault((seen.lowered, seen.right), Counter())[seen.word] += 1
        spelled = _usual(words, UNIGRAM_SHARE) | _usual(alone, UNIGRAM_SHARE, SEEN)
        usual = {word: spelling for word, spelling in spelled.items() if spelling != word}
        behind, ahead = _usual(after, BIGRAM_SHARE), _usual(before, BIGRAM_SHARE)
        return cls(
            usual,
            {pair: spelling for pair, spelling in behind.items() if spelling != usual.get(pair[1], pair[1])},
            {pair: spelling for pair, spelling in ahead.items() if spelling != usual.get(pair[0], pair[0])},
        )

    def to_record(self) -> dict[str, Any]:
        """The spellings as JSON values, for `from_record`."""
        return {
            "words": sorted(self.words.values()),
            "after": sorted(f"{left} {spelling}" for (left, _), spelling in self.after.items()),
            "before": sorted(f"{spelling} {right}" for (_, right), spelling in self.before.items()),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Truecaser:
        """What `to_record` gave. Raises KeyError, TypeError or ValueError if it is damaged."""
        pairs = {name: [line.split(" ") for line in list_of_strings(record, name)] for name in ("after", "before")}
        return cls(
            {spelling.lower(): spelling for spelling in list_of_strings(record, "words")},
            {(left, spelling.lower()): spelling for left, spelling in pairs["after"]},
            {(spelling.lower(), right): spelling for spelling, right in pairs["before"]},
        )


def list_of_strings(record: dict[str, Any], name: str) -> list[str]:
    """The list at a key of a JSON object. Raises KeyError or ValueError if it is missing or another value."""
    value = record[name]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name} is no list of texts")
    return value


def in_one_case(query: str) -> bool:
    """Whether the case of a query says nothing about its words: it has letters and none of them is a capital, or it is
    all in capitals (`capitals.is_all_capitals`), or every word of it begins with a capital, "of" and "the" too."""
    if query == query.lower():
        return query != query.upper()
    if is_all_capitals(query):
        return True
    words = _WORD_OF_QUERY.findall(query)
    return (
        len(words) >= TITLE_WORDS
        and all(word[0] != word[0].lower() for word in words)
        and any(word.lower() in _SMALL_IN_NAMES for word in words[1:])
    )


def _key(word: str) -> str:
    """A word as the tables have it: in lower case, its apostrophe straight."""
    return word.lower().replace("’", "'")


def _words_in(token: re.Match[str]) -> list[tuple[int, int]]:
    return [(token.start() + word.start(), token.start() + word.end()) for word in _WORD_OF_QUERY.finditer(token[0])]


def _adjacent(text: str, end: int, start: int) -> bool:
    return not text[end:start].strip()


def _usual(counts: dict[Any, Counter[str]], share: float, seen: int = 1) -> dict[Any, str]:
    """The most frequent spelling of each key that is seen often enough, where it is frequent enough."""
    usual = {}
    for key, spellings in counts.items():
        total = spellings.total()
        if total >= seen:
            spelling = min(spellings, key=lambda one: (-spellings[one], one))
            if spellings[spelling] > share * total:
                usual[key] = spelling
    return usual


class _Occurrence(NamedTuple):
    word: str
    lowered: str
    left: str
    """The lower-case word before it, "" for none."""
    right: str
    in_name: bool
    """It has a capital, and so has a word beside it."""


def _occurrences(text: str, is_prose: bool) -> Iterator[_Occurrence]:
    """The words of a text whose case is their own: of prose, not those that begin a sentence or a quotation."""
    found = list(_WORD.finditer(text))
    lowered = [_key(match[0]) for match in found]
    between = [text[: found[0].start()]] if found else []
    between += [text[a.end() : b.start()] for a, b in itertools.pairwise(found)]
    begins = [is_prose and (i == 0 or _BREAKS.search(gap) is not None) for i, gap in enumerate(between)]
    adjacent = [i > 0 and not gap.strip() for i, gap in enumerate(between)] + [False]
    capital = [match[0].lower() != match[0] for match in found]
    for i, match in enumerate(found):
        if not begins[i]:
            named = (adjacent[i] and capital[i - 1] and not begins[i - 1]) or (adjacent[i + 1] and capital[i + 1])
            left, right = lowered[i - 1] if adjacent[i] else "", lowered[i + 1] if adjacent[i + 1] else ""
            yield _Occurrence(match[0].replace("’", "'"), lowered[i], left, right, capital[i] and named)

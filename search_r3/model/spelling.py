"""Typos in queries, corrected by words that documents have.

A subword tokenizer cuts a misspelled word into other pieces than the word, and training with misspelled queries repairs
little of what that costs (LOG.md). A query adapter's contract may therefore name a `SpellingCorrector`, learned from
text (Norvig, "How to write a spelling corrector"): a word that no text has becomes a frequent one at one edit's
distance. Queries alone are corrected, so indexes stay valid.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from string import ascii_lowercase
from typing import Any

from search_r3.model.keyboard import NEIGHBORS
from search_r3.model.truecasing import CODE, MARKS, in_one_case

LETTERS = 5
"""Minimum number of letters of a word that may be corrected: short ones have too many neighbors."""
SEEN = 5
"""Times that a word must be seen to be a correction; to be left alone, once is enough."""
WORDS = 64
"""Maximum number of words of a query that is corrected: a longer text was hardly typed into a search field."""
LONGEST = 45
"""Maximum number of letters of a word that may be corrected. A longer one is a sequence or a key, and as it has a
neighbor for each letter, a long one would take minutes."""
_VOWELS = "aeiou"
_TOKEN = re.compile(r"\S+")
_WORD = re.compile(rf"(?<![^\W_])(?<![{MARKS}])[a-zA-Z]+(?![^\W_]|[{MARKS}])")
"""A word of ASCII letters alone, no part of "p53" or "naïve", decomposed or not."""


class SpellingCorrector:
    """Words that documents have, by which those of queries are corrected.

    Args:
        frequent: words in lower case that a misspelled one may become, the most frequent first.
        known: further words in lower case, which are too rare to be a correction but are no misspellings.
    """

    def __init__(self, frequent: Sequence[str], known: Iterable[str] = ()) -> None:
        self.rank = {word: place for place, word in enumerate(frequent)}
        self.known = frozenset(known)

    def __call__(self, query: str) -> str:
        """`query` with its misspelled words corrected; a query of more than `WORDS` words stays as it is.

        Words keep their case. Those with signs of code, digits, letters beyond ASCII or a case of their own ("NumPy",
        an acronym in an ordinary sentence) stay.
        """
        tokens = list(_TOKEN.finditer(query))
        if len(tokens) > WORDS:
            return query
        any_case = in_one_case(query)
        pieces, at = [], 0
        for token in tokens:
            if CODE.search(token[0]):
                continue
            for word in _WORD.finditer(query, token.start(), token.end()):
                if word[0].islower() or word[0][1:].islower() or any_case:
                    pieces += [query[at : word.start()], _in_case_of(word[0], self.corrected(word[0].lower()))]
                    at = word.end()
        return "".join([*pieces, query[at:]])

    def corrected(self, word: str) -> str:
        """The correction of a word of ASCII letters in lower case; the word itself if it is known, has fewer than
        `LETTERS` or more than `LONGEST`, or has no neighbor. The first letter always stays.

        Slips of the fingers come first: two letters swapped, one left out, one doubled, or a key beside the right one
        (Zhuang and Zuccon, arXiv 2204.00716). Then one vowel for another. Among these, the most frequent word. Other
        edits are left alone: they make new names ("uptimed", "websocketd") more often than typos.
        """
        if not LETTERS <= len(word) <= LONGEST or word in self.rank or word in self.known:
            return word
        for neighbors in (_slips(word), _other_vowels(word)):
            found = [neighbor for neighbor in neighbors if neighbor in self.rank]
            if found:
                return min(found, key=self.rank.__getitem__)
        return word

    @classmethod
    def learn(cls, texts: Iterable[str]) -> SpellingCorrector:
        """Count the words of texts, parts of identifiers among them."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(word for word in re.findall(r"[a-z]+", text.lower()) if len(word) >= LETTERS - 1)
        frequent = sorted((word for word in counts if counts[word] >= SEEN), key=lambda word: (-counts[word], word))
        return cls(frequent, (word for word in counts if counts[word] < SEEN and len(word) >= LETTERS))

    def to_record(self) -> dict[str, Any]:
        """The words as JSON values, for `from_record`."""
        return {"frequent": " ".join(self.rank), "known": " ".join(sorted(self.known))}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> SpellingCorrector:
        """What `to_record` gave. Raises KeyError or AttributeError if it is damaged."""
        return cls(record["frequent"].split(), record["known"].split())


def _slips(word: str) -> Iterator[str]:
    for i in range(1, len(word)):
        left, right = word[:i], word[i:]
        if right[0] == left[-1]:
            yield left + right[1:]
        if len(right) > 1:
            yield left + right[1] + right[0] + right[2:]
        for letter in NEIGHBORS[right[0]]:
            yield left + letter + right[1:]
        for letter in ascii_lowercase:
            yield left + letter + right
    for letter in ascii_lowercase:
        yield word + letter


def _other_vowels(word: str) -> Iterator[str]:
    for i in range(1, len(word)):
        if word[i] in _VOWELS:
            for letter in _VOWELS:
                yield word[:i] + letter + word[i + 1 :]


def _in_case_of(typed: str, corrected: str) -> str:
    if typed.isupper():
        return corrected.upper()
    return corrected.title() if typed[0].isupper() else corrected

"""Typos in queries, corrected by words that documents have.

A subword tokenizer cuts a misspelled word into other pieces than the word, and training with misspelled queries repairs
little of what that costs (LOG.md). A query adapter's contract may therefore name a `SpellingCorrector`, learned from
text (Norvig, "How to write a spelling corrector"): a word that no text has becomes a frequent one at one edit's
distance. Queries alone are corrected, so indexes stay valid.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from string import ascii_lowercase
from typing import Any

from search_r3.model.keyboard import NEIGHBORS
from search_r3.model.truecasing import CODE, MARKS, in_one_case

LETTERS = 5
"""Minimum number of letters of a word that may be corrected: short ones have too many neighbors."""
SHORT = 4
"""The same for words with two letters swapped that make one of the `COMMON` most frequent words ("waht")."""
COMMON = 500
RATIO = 100
"""A word of a word list is a misspelling if a correction of it is more than this many times as frequent in that list:
lists that count what people write have "recieve" too."""
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
                typed, lowered = word[0], word[0].lower()
                corrected = self.corrected(lowered)
                if corrected == lowered or not (any_case or typed[1:].islower()):
                    continue
                pieces += [query[at : word.start()], _in_case_of(typed, corrected)]
                at = word.end()
        return "".join([*pieces, query[at:]])

    def corrected(self, word: str) -> str:
        """The correction of a word of ASCII letters in lower case; the word itself if it is known, has fewer than
        `LETTERS` (but see `SHORT`) or more than `LONGEST`, or has no neighbor. The first letter always stays.

        Slips of the fingers come first: two letters swapped, one left out, one doubled, or a key beside the right one
        (Zhuang and Zuccon, arXiv 2204.00716). Then one vowel for another. Among these, the most frequent word. Other
        edits are left alone: they make new names ("uptimed", "websocketd") more often than typos.
        """
        if not SHORT <= len(word) <= LONGEST or word in self.rank or word in self.known:
            return word
        return next(self._corrections(word), word)

    def _corrections(self, word: str) -> Iterator[str]:
        """What a word may be a misspelling of, known or not, the most likely first."""
        if len(word) < LETTERS:
            found = (swapped for swapped in _swaps(word) if self.rank.get(swapped, COMMON) < COMMON)
            yield from sorted(found, key=self.rank.__getitem__)
            return
        for neighbors in (_slips(word), _other_vowels(word)):
            yield from sorted({one for one in neighbors if one in self.rank}, key=self.rank.__getitem__)

    def with_words(self, frequencies: Mapping[str, float]) -> SpellingCorrector:
        """A corrector that knows the words of a list too, except those that are likely misspellings (`RATIO`).

        Args:
            frequencies: word -> how often it is seen, in any unit; 0 for a word that is known whatever the others are.
                Its spellings with other capitals count together, and words that are never corrected do not count
                (`is_correctable`).
        """
        added: dict[str, float] = {}
        for word, frequency in frequencies.items():
            if is_correctable(word):
                added[word.lower()] = added.get(word.lower(), 0) + frequency

        def is_misspelling(word: str) -> bool:
            most = added[word] * RATIO
            return most > 0 and any(added.get(one, 0) > most for one in self._corrections(word))

        known = {word for word in added if word not in self.rank and not is_misspelling(word)}
        return SpellingCorrector(list(self.rank), self.known | known)

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


def is_correctable(word: str) -> bool:
    """Whether a word is of such letters, and so many, that a corrector may change it if it does not know it."""
    return SHORT <= len(word) <= LONGEST and word.isascii() and word.isalpha()


def _swaps(word: str) -> Iterator[str]:
    for i in range(1, len(word) - 1):
        yield word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def _slips(word: str) -> Iterator[str]:
    yield from _swaps(word)
    for i in range(1, len(word)):
        left, right = word[:i], word[i:]
        if right[0] == left[-1]:
            yield left + right[1:]
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

"""The words by which a text is found in Milvus, in a form that every analyzer leaves as it is.

Milvus's default analyzer takes a whole Chinese sentence for one word, and Milvus Lite has no other without further
packages. So we find the words ourselves, as highlighting does: without endings and accents; in scripts without spaces,
every character and every pair of neighbors. A word with other characters than a-z and 0-9 is written as their code
points in hexadecimal, since the analyzer would split it.
"""

from __future__ import annotations

import re

from search_r3.index.results.query_words import WORD, composed, has_no_spaces
from search_r3.index.results.word_marks import comparable

PLAIN = re.compile("[a-z0-9]+")
ENCODED = "u0"
"""Begins the form of a word with other characters. A plain word that begins like this is encoded as well."""


def search_words(text: str) -> list[str]:
    """The words of `text` in their order, as often as they occur."""
    words: list[str] = []
    for match in WORD.finditer(composed(text)):
        word = match.group()
        if has_no_spaces(word):
            words += [*word, *(word[start : start + 2] for start in range(len(word) - 1))]
        else:
            words.append(comparable(word))
    return [_plain(word) for word in words]


def _plain(word: str) -> str:
    if PLAIN.fullmatch(word) and not word.startswith(ENCODED):
        return word
    return ENCODED + "x".join(f"{ord(character):x}" for character in word)

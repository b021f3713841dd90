"""Texts written all in capitals, brought to ordinary case before they are tokenized, where a contract says so.

A subword tokenizer cuts "PHOTOSYNTHESIS" into other and more pieces than "photosynthesis", of which a model has seen
little: nDCG@10 of such queries fell by a third to a half (LOG.md). Only whole texts are folded, so that no acronym in a
text of ordinary case is touched.
"""

from __future__ import annotations

import re
from typing import Any

WORDS = 4
"""Minimum number of capitalized words for a text to count as prose: a few may be acronyms."""
LONG_WORD = 7
"""Minimum length of a single word that counts: acronyms are shorter."""
INSPECTED = 10_000
"""Characters at the beginning of a text that are inspected, where none of the text is in lower case."""
_LETTERS = re.compile(r"[^\W\d_]+")
_NAME = re.compile(r"[\d_]")
_TOKEN = re.compile(r"\S+")
_SENTENCE_ENDS = (".", "!", "?")
_CLOSING = "\"')]}’”»"


def fold_capitals(text: str) -> str:
    """`text` in sentence case if it is all in capitals (see `is_all_capitals`), else `text` itself.

    Words with a digit or an underscore ("COVID-19", "CUDA_VISIBLE_DEVICES") stay as they are. The text is folded as a
    whole or not at all: a heading in capitals above ordinary text stays.
    """
    if not is_all_capitals(text):
        return text
    begins = True

    def folded(token: re.Match[str]) -> str:
        nonlocal begins
        word, first = token[0], begins
        begins = word.rstrip(_CLOSING).endswith(_SENTENCE_ENDS)
        if _NAME.search(word):
            return word
        lowered = word.lower()
        letter = _LETTERS.search(lowered) if first else None
        if letter is None:
            return lowered
        place = letter.start()
        return lowered[:place] + lowered[place].title() + lowered[place + 1 :]

    return _TOKEN.sub(folded, text)


def capitals_note(model: Any) -> list[str]:
    """What an export's README says to those who tokenize texts by themselves (lines of Markdown); nothing where the
    model's contract does not fold capitals."""
    if not model.contract.fold_capitals:
        return []
    return [
        "Its contract folds texts that are all in capitals before they are tokenized "
        "(`search_r3.model.capitals.fold_capitals`, which needs nothing but Python). Other libraries do not: "
        "fold such texts first, or their embeddings will differ. All other texts are the same.",
        "",
    ]


def is_all_capitals(text: str) -> bool:
    """Whether a text is prose in capitals: no letter of it is in lower case, at least half of its letters are capitals
    (else it is in a script without case, with acronyms), and it has `WORDS` words in capitals or one of `LONG_WORD`
    letters. Cherokee, whose ordinary letters Unicode calls capitals, is not."""
    if not text.isupper():  # ends at the first small letter
        return False
    words = letters = capitals = 0
    long = False
    for token in _TOKEN.findall(text[:INSPECTED]):
        runs = _LETTERS.findall(token)
        upper = [sum(map(_is_capital, run)) for run in runs]
        letters += sum(map(len, runs))
        capitals += sum(upper)
        if not _NAME.search(token) and any(upper):
            words += 1
            long = long or any(count >= LONG_WORD for count in upper)
    return (words >= WORDS or long) and 2 * capitals >= letters


def _is_capital(letter: str) -> bool:
    return letter.isupper() and not "\u13a0" <= letter <= "\u13f5"

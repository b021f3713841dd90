"""When two texts count as the same: normal form, words, and the share of words that they have in common."""

from __future__ import annotations

import re

SIZE_RATIO = 2.0
"""Texts whose numbers of distinct words differ by more than this factor are never near copies of each other."""
_WORD = re.compile(r"\w+")


def normalize(text: str) -> str:
    """Lower case with single spaces: what is equal after this is the same text."""
    return " ".join(text.casefold().split())


def words_of(text: str) -> list[str]:
    """The lower-case words of a text, in order; an identifier such as read_text is one word."""
    return _WORD.findall(text.casefold())


def word_set(text: str) -> frozenset[str]:
    """The distinct lower-case words of a text."""
    return frozenset(words_of(text))


def near_identical(a: frozenset[str], b: frozenset[str], share: float) -> bool:
    """Whether the smaller set of words lies in the larger one, up to 1 - `share`, and the larger is no other text.

    An abstract without its last sentence is a near copy of the abstract; one sentence of it is not.
    """
    small, large = sorted((len(a), len(b)))
    if not small or large > SIZE_RATIO * small:
        return False
    return len(a & b) >= share * small

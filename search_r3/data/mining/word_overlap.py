"""When two texts count as the same: normalization, words, and the share of common words."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

SIZE_RATIO = 2.0
"""Texts whose numbers of distinct words differ by more than this factor are never near copies of each other."""
_WORD = re.compile(r"\w+")


def normalize(text: str) -> str:
    """Lower case with single spaces; texts that are equal after this count as the same."""
    return " ".join(text.casefold().split())


def words_of(text: str) -> list[str]:
    """The lower-case words of a text in order; an identifier such as read_text is one word."""
    return _WORD.findall(text.casefold())


def word_set(text: str) -> frozenset[str]:
    """The distinct lower-case words of a text."""
    return frozenset(words_of(text))


def near_twins(texts: Sequence[str], of: Iterable[str], share: float) -> list[bool]:
    """Whether each text has at least `share` of its words in common with one of the texts `of` (Jaccard).

    Only texts that share one of a text's rarest words are compared with it: the others cannot have enough in common.
    """
    others = list({word_set(text) for text in of})
    frequency = Counter(word for words in others for word in words)
    having: dict[str, list[int]] = defaultdict(list)
    for number, words in enumerate(others):
        for word in words:
            having[word].append(number)
    found = []
    for text in texts:
        words = word_set(text)
        rarest_first = sorted(words, key=lambda word: (frequency[word], word))
        needed = math.ceil(share * len(words))
        near = {number for word in rarest_first[: len(words) - needed + 1] for number in having.get(word, ())}
        found.append(any(len(words & others[i]) >= share * len(words | others[i]) for i in near))
    return found


def near_identical(a: frozenset[str], b: frozenset[str], share: float) -> bool:
    """Whether at least `share` of the smaller set of words is in the larger one, and the larger one is not a different
    text.

    An abstract without its last sentence is a near copy of the abstract; one sentence of it is not.
    """
    small, large = sorted((len(a), len(b)))
    if not small or large > SIZE_RATIO * small:
        return False
    return len(a & b) >= share * small

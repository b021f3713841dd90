"""Noisy queries: the same text in other case, with typos, without punctuation, or as keywords alone.

Training mixes them in and `search-r3 evaluate --queries` measures their effect. The typos are those of Zhuang and
Zuccon (arXiv 2204.00716): letters swapped, dropped, doubled, or replaced by a neighbor on the keyboard.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from search_r3.data.stop_words import FUNCTION_WORDS
from search_r3.errors import InputError
from search_r3.hints import refuse_unknown
from search_r3.model.keyboard import NEIGHBORS

ORIGINAL = "original"
"""The name of a query as it is."""
TYPO_SHARE = 0.3
"""Of the words that are long enough, how many get a typo."""
TYPO_LETTERS = 4
"""Letters of a word that may get one."""
_PUNCTUATION = ".,;:?!\"'()[]{}…“”‘’«»„¿¡。，、；：？！「」『』（）"
_FURTHER_STOP_WORDS = """
about above after again against all also am aren't because before being below between both but can't cannot couldn't
didn't doesn't doing don't down during each few further had hadn't hasn't haven't having he her here hers herself him
himself his isn't it's itself just me might more most must mustn't myself nor now off once only other ours ourselves
out over own please same shall she should shouldn't some such tell theirs themselves those through too under until up
us very wasn't weren't what's while who's whom whose will won't would wouldn't yours yourself yourselves
"""
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
STOP_WORDS = FUNCTION_WORDS | frozenset(_FURTHER_STOP_WORDS.split())
"""English words that say nothing of a query's topic, question words and auxiliary verbs among them."""

Variant = Callable[[str, np.random.Generator], str]


def upper(text: str, rng: np.random.Generator) -> str:
    """All letters in capitals."""
    return text.upper()


def lower(text: str, rng: np.random.Generator) -> str:
    """All letters in lower case."""
    return text.lower()


def title(text: str, rng: np.random.Generator) -> str:
    """The first letter of every word in capitals; the others as they are."""
    return _WORD.sub(lambda word: word[0][:1].upper() + word[0][1:], text)


def no_punctuation(text: str, rng: np.random.Generator) -> str:
    """Without punctuation at the ends of words, and words one space apart; a text of nothing else stays as it is."""
    words = (word.strip(_PUNCTUATION) for word in text.split())
    return " ".join(word for word in words if word) or text


def keywords(text: str, rng: np.random.Generator) -> str:
    """`no_punctuation`, and without `STOP_WORDS`; a text of nothing else stays as it is."""
    plain = no_punctuation(text, rng)
    return " ".join(word for word in plain.split() if word.lower().replace("’", "'") not in STOP_WORDS) or text


def typos(text: str, rng: np.random.Generator) -> str:
    """A typo in `TYPO_SHARE` of the words of at least `TYPO_LETTERS` letters, and in one at least if there are any.

    A letter after the first is swapped with the next, dropped, doubled, or replaced by a neighbor on a QWERTY
    keyboard, each equally often. Words with digits or underscores, and those of scripts without case, stay as they are.
    """
    places = [match.span() for match in re.finditer(r"[^\W_]+", text) if _takes_typo(match[0], text, match.span())]
    if not places:
        return text
    chosen = rng.random(len(places)) < TYPO_SHARE
    chosen[rng.integers(len(places))] |= not chosen.any()
    pieces, done = [], 0
    for (start, end), changed in zip(places, chosen, strict=True):
        pieces += [text[done:start], _misspelled(text[start:end], rng) if changed else text[start:end]]
        done = end
    return "".join([*pieces, text[done:]])


VARIANTS: dict[str, Variant] = {
    "upper": upper,
    "lower": lower,
    "title": title,
    "typos": typos,
    "keywords": keywords,
    "no_punctuation": no_punctuation,
}
"""Every kind of perturbed query, by its name in recipes and on the command line."""
CASE_VARIANTS = ("upper", "lower", "title")
"""Those that make sense for a document too."""


def vary(text: str, kind: str, seed: int = 0) -> str:
    """`text`, perturbed: a function of the text, the kind and the seed alone, so that all systems that are
    compared get the same queries.

    Raises:
        InputError: an unknown kind.
    """
    check_kinds([kind])
    if kind == ORIGINAL:
        return text
    words = hashlib.blake2b(f"{kind}/{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return VARIANTS[kind](text, np.random.default_rng([seed, int.from_bytes(words, "big")]))


def draw_variants(texts: Sequence[str], shares: Mapping[str, float], rng: np.random.Generator) -> list[str | None]:
    """For each text, the same text written in a kind that is drawn with these shares; None where none is drawn.

    Args:
        shares: kind -> the expected share of the texts; together at most 1, see `check_shares`.
    """
    kinds, bounds = list(shares), np.cumsum(list(shares.values()))
    drawn = np.searchsorted(bounds, rng.random(len(texts)), side="right")
    return [
        VARIANTS[kinds[place]](text, rng) if place < len(kinds) else None
        for text, place in zip(texts, drawn.tolist(), strict=True)
    ]


def check_kinds(kinds: Iterable[str]) -> None:
    """Raise InputError unless each is `ORIGINAL` or one of `VARIANTS`."""
    refuse_unknown(kinds, (ORIGINAL, *VARIANTS), "queries", "kind of query")


def check_shares(shares: Mapping[str, float], key: str, known: Sequence[str] = tuple(VARIANTS)) -> None:
    """Raise InputError, which names `key`, unless all kinds are known and the shares are 0 or more and 1 at most
    together."""
    refuse_unknown(shares, known, key, "kind")
    for kind, share in shares.items():
        if not (math.isfinite(share) and share >= 0):
            raise InputError(f"{key}.{kind} must be a share from 0 to 1, got {share}")
    if sum(shares.values()) > 1 + 1e-9:
        raise InputError(f"{key}: the shares are {sum(shares.values()):g} together, more than 1; lower them")


def _takes_typo(word: str, text: str, span: tuple[int, int]) -> bool:
    start, end = span
    joined = text[start - 1 : start] == "_" or text[end : end + 1] == "_"
    return len(word) >= TYPO_LETTERS and not joined and all(letter.lower() != letter.upper() for letter in word)


def _misspelled(word: str, rng: np.random.Generator) -> str:
    place = int(rng.integers(1, len(word)))
    letter, rest = word[place], word[place + 1 :]
    kind = int(rng.integers(4))
    if kind == 0:  # the last letter, and one that equals the next, has nothing to be swapped with
        swaps = [i for i in range(1, len(word) - 1) if word[i] != word[i + 1]]
        if swaps:
            place = swaps[int(rng.integers(len(swaps)))]
            return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    neighbors = NEIGHBORS.get(letter.lower(), "")
    if kind == 1 and neighbors:
        other = neighbors[int(rng.integers(len(neighbors)))]
        return word[:place] + (other.upper() if letter.isupper() else other) + rest
    return word[:place] + (letter * 2 if kind == 2 else "") + rest

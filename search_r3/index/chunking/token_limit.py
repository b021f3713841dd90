"""Whether texts exceed the model's token limit, mostly decided without tokenizing.

Nearly all chunks are far below the limit. An upper bound summed over their words, with the token counts of frequent
words cached, proves that at about a twentieth of the cost; only texts that it cannot decide are tokenized.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from search_r3.index.encoder_protocol import CountTokens

RUN = re.compile(r" ?[^\W\d_]+| ?[^\w\s]+")  # letters or marks, with the space before: tokenizers merge within these
UNSPACED = re.compile(r"(?:^|[^\S ])([^\s]+)")  # words with no space before them
PART = re.compile(r"[A-Za-z]+|[^\sA-Za-z]")
LONGEST_RUN = 24  # characters; longer ones hardly ever occur twice
MOST_WORDS = 200_000
LETTERS_PER_TOKEN = 4
BYTES_PER_WORD = 8  # with a space; in source code and the like there are more, and the bound seldom decides
TOKENS_PER_CHARACTER = 2  # in other scripts, if the tokenizer is unknown


class TokenLimit:
    """The token limit of a chunk, and how tokens are counted: by a model, or estimated.

    Args:
        limit: maximum number of tokens, at least 1.
        count: returns the exact number of tokens of each text. None estimates it conservatively for common tokenizers:
            one token per four ASCII letters, one per digit or mark, two per other character.
    """

    def __init__(self, limit: int, count: CountTokens | None = None) -> None:
        self.limit = limit
        self._count = count or estimated_tokens
        self._runs: dict[str, int] = {}
        self._spaced, self._unspaced = _Bounds(self._runs, " "), _Bounds(self._runs, "")

    def count(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text; 0 for an empty text."""
        filled = [text for text in texts if text]
        counts = iter(self._count(filled) if filled else [])
        return [next(counts) if text else 0 for text in texts]

    def exceeded(self, texts: Sequence[str]) -> list[bool]:
        """Which of the texts have more tokens than the limit."""
        unsure = [number for number, text in enumerate(texts) if not self._surely_fits(text)]
        out = [False] * len(texts)
        for number, tokens in zip(unsure, self.count([texts[number] for number in unsure]), strict=True):
            out[number] = tokens > self.limit
        return out

    def _surely_fits(self, text: str) -> bool:
        """Whether an upper bound of the text's tokens is within the limit; if not, the text may still fit.

        The bound is the sum of the words' bounds, one token for each blank character other than a single space, and
        what Unicode normalization may add.
        """
        plain = text.isascii()
        size = len(text) if plain else _bytes(text)
        grown = 1 if plain else 1 + max(0, _bytes(unicodedata.normalize("NFKD", text)) - size)
        if size + grown <= self.limit:
            return True
        words = text.split()
        if size > BYTES_PER_WORD * len(words):
            return False
        unspaced = words[:1] if len(words) == text.count(" ") + 1 else UNSPACED.findall(text)
        blanks = len(text) - len("".join(words)) - (len(words) - len(unspaced))
        room = self.limit - grown - blanks
        if len(words) > room:
            return False
        bound = self._bound(words, unspaced)
        if bound > room and (new := self._unknown(words)):
            spared = sum(len(run) - 1 - len(run) // LETTERS_PER_TOKEN for run in new)
            if bound - spared <= room:  # counting these few runs may decide, and later texts will contain them too
                self._learn(new, words)
                bound = self._bound(words, unspaced)
        return bound <= room

    def _bound(self, words: list[str], unspaced: list[str]) -> int:
        if len(self._spaced) > MOST_WORDS:
            self._spaced.clear()
            self._unspaced.clear()
        lower = sum(max(0, self._unspaced[word] - self._spaced[word]) for word in unspaced)
        return lower + sum(map(self._spaced.__getitem__, words))

    def _unknown(self, words: list[str]) -> list[str]:
        if len(self._runs) > MOST_WORDS:
            return []
        runs = {run: None for word in words for run in RUN.findall(" " + word) if run not in self._runs}
        return [run for run in runs if 1 < len(run) <= LONGEST_RUN]

    def _learn(self, runs: list[str], words: list[str]) -> None:
        self._runs.update(zip(runs, self._count(runs), strict=True))
        for word in words:
            self._spaced.pop(word, None)
            self._unspaced.pop(word, None)


class _Bounds(dict[str, int]):
    """Word -> upper bound of its tokens when it follows `space`. A run of letters or marks that was never counted gets
    one token per byte, as every token covers at least one."""

    def __init__(self, runs: dict[str, int], space: str) -> None:
        self.runs, self.space = runs, space

    def __missing__(self, word: str) -> int:
        text = self.space + word
        if word.isalpha():
            return self.setdefault(word, self.runs.get(text) or _bytes(text))
        runs = RUN.findall(text)
        bound = _bytes(text) - _bytes("".join(runs)) + sum(self.runs.get(run) or _bytes(run) for run in runs)
        return self.setdefault(word, bound)


def estimated_tokens(texts: Sequence[str]) -> list[int]:
    """A conservative estimate for a model whose tokenizer is unknown: see `TokenLimit`."""
    return [sum(_tokens_of(part) for part in PART.findall(text)) for text in texts]


def _tokens_of(part: str) -> int:
    return -(-len(part) // LETTERS_PER_TOKEN) if part.isascii() else TOKENS_PER_CHARACTER


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))

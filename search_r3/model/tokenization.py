"""Tokenizes users' texts so that no text can become a special token, and refuses invalid ones.

It also has `Tokens`, a text given as token ids, and `TextStream`, which decodes a reasoning trace while it is
generated.
"""

from __future__ import annotations

import copy
import itertools
import re
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from search_r3.errors import InputError

MAX_CHARACTERS = 100_000
"""Maximum length of a query: a longer one is probably a document given by mistake."""
DEFAULT_QUERY_TOKENS = 512
"""Tokens that are read of a query."""
CHARACTERS_PER_TOKEN = 8
"""Characters of a long text that are tokenized first, per token that is kept; English has four or five per token."""
MARGIN = 64
"""Tokens at the end of a cut text that are ignored, because the text after the cut could change them."""
CUTS = (0, 1, 2)
"""The text is cut at these offsets, one character apart; tokens are used if all cuts agree on them."""
SPACES = 64
"""Characters kept at each end of a run of white space that contains the cut."""
TOGETHER = 250_000
"""Characters tokenized per call; other threads can run between two calls."""
_TOKENIZING = threading.Lock()
"""Fast tokenizers keep `split_special_tokens` as state, so two threads could fail or let a special token through."""
_COPIES: weakref.WeakKeyDictionary[Any, tuple[int, Any]] = weakref.WeakKeyDictionary()
"""Tokenizer -> its vocabulary size, and a copy of its backend with fixed settings."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNFINISHED = "\ufffd"
"""How a decoder shows the bytes of an incomplete character."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text as token ids of the model's vocabulary, without special tokens; accepted wherever a text is."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WholeTokens(Tokens):
    """Token ids that are all read: whoever made them has applied a limit, and no other one is applied."""


@dataclass(frozen=True, slots=True)
class ReadingTurn(WholeTokens):
    """A query with the passages that follow it (`search_r3.model.reading`).

    It is accepted wherever a query is, and embedded in the reading conversation, or reasoned about.
    """


Text = str | Tokens


def encode_as_text(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of users' texts, in which "<|embed_token|>" and the like are plain characters, never special tokens."""
    if not texts:
        return []
    with _TOKENIZING:
        return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """The number of tokens of each text, as in `encode_as_text`; 0 for an empty text.

    Capitals are not folded here: the callers count the parts of a text, and only a whole text can be folded (which
    makes it shorter).
    """
    return [len(ids) for ids in _counted_ids(tokenizer, texts)]


def _counted_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    encode, _ = _encoder(tokenizer)
    return [encoding.ids for encoding in encode(list(texts))]


class CountedTexts:
    """Counts the tokens of texts and remembers the ids of the newest, as whoever builds an index first measures a chunk
    and then embeds it. Safe for concurrent use.

    Args:
        most: how many texts are remembered.
    """

    def __init__(self, tokenizer: Any, most: int = 4096) -> None:
        self._tokenizer, self._most = tokenizer, most
        self._ids: dict[str, array[int]] = {}
        self._lock = threading.Lock()

    def count(self, texts: Sequence[str]) -> list[int]:
        """`count_tokens`."""
        rows = _counted_ids(self._tokenizer, texts)
        with self._lock:
            self._ids.update((text, array("I", row)) for text, row in zip(texts, rows, strict=True) if text.strip())
            for text in list(itertools.islice(self._ids, max(0, len(self._ids) - self._most))):
                del self._ids[text]
        return [len(row) for row in rows]

    def take(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """The ids of those of the texts that are remembered, which are then forgotten."""
        with self._lock:
            return {text: self._ids.pop(text).tolist() for text in texts if text in self._ids}


def token_rows(
    tokenizer: Any,
    texts: Sequence[Text],
    limit: int | None = None,
    between: Callable[[Sequence[list[int]]], None] = lambda rows: None,
    *,
    normalize: Callable[[str], str] | None = None,
) -> list[list[int]]:
    """The token ids of each text; those of `Tokens` are unchanged.

    Args:
        tokenizer: a transformers tokenizer.
        texts: strings of any length, or Tokens.
        limit: return only the first `limit` ids of each text, except of `WholeTokens`. They equal those of the whole
            text, but only as much of a long text is tokenized as needed.
        between: called with the rows so far about every 250,000 characters; an exception in it ends the call.
        normalize: what strings go through first, as the contract states (`Checkpoint.normalizer`).

    Raises:
        InputError: a text is empty, or neither a string nor Tokens; or an id is unknown or a special token's.
    """
    check_texts(texts)
    special = special_ids(tokenizer) if any(isinstance(text, Tokens) for text in texts) else frozenset()
    rows: list[list[int]] = []
    for start, end in _groups(texts, limit):
        if start:
            between(rows)
            time.sleep(0.001)  # so that a waiting thread gets the lock
        strings = normalized([text for text in texts[start:end] if isinstance(text, str)], normalize)
        string_ids = iter(_string_rows(tokenizer, strings, limit))
        for i, text in enumerate(texts[start:end], start + 1):
            if isinstance(text, Tokens):
                _check_ids(tokenizer, special, text.ids, f"text {i} of {len(texts)}")
                rows.append(list(text.ids if isinstance(text, WholeTokens) else text.ids[:limit]))
            else:
                rows.append(next(string_ids))
    return rows


def normalized(texts: Sequence[str], normalize: Callable[[str], str] | None) -> list[str]:
    """`normalize` of each text; the texts unchanged if it is None."""
    return list(texts) if normalize is None else list(map(normalize, texts))


def _groups(texts: Sequence[Text], limit: int | None) -> Iterator[tuple[int, int]]:
    """(start, end) of groups of texts that have about `TOGETHER` characters to tokenize."""
    start = size = 0
    for end, text in enumerate(texts, 1):
        if isinstance(text, str):
            size += len(text) if limit is None else min(len(text), len(CUTS) * _beginning(limit))
        if size >= TOGETHER or end == len(texts):
            yield start, end
            start, size = end, 0


def _string_rows(tokenizer: Any, texts: Sequence[str], limit: int | None) -> list[list[int]]:
    if limit is None:
        return encode_as_text(tokenizer, texts)
    long = [text for text in texts if len(text) > 2 * _beginning(limit)]
    cut = iter(_first_ids(tokenizer, long, limit))
    whole = iter(encode_as_text(tokenizer, [text for text in texts if len(text) <= 2 * _beginning(limit)]))
    return [next(cut) if len(text) > 2 * _beginning(limit) else next(whole)[:limit] for text in texts]


def _beginning(limit: int) -> int:
    """How many characters of a long text are tokenized first."""
    return (limit + MARGIN) * CHARACTERS_PER_TOKEN


def _first_ids(tokenizer: Any, texts: Sequence[str], limit: int) -> list[list[int]]:
    """The first `limit` ids of each text, from its beginning if that is enough.

    A tokenizer's decisions depend on one or a few words, and BPE's on a few merges, so text far after a token does not
    change it. This is checked for each text: the ids must be the same for all cuts, else a longer beginning is used.
    Unigram scores a whole word at once, and WordPiece maps a word that is too long to one unknown token; with these, a
    word must end between the last id and the cut.
    """
    if not texts:
        return []
    encode, by_word = _encoder(tokenizer)
    rows: list[list[int]] = [[] for _ in texts]
    size, left = _beginning(limit), list(range(len(texts)))
    while left:
        cuts = [CUTS if 2 * size < len(texts[i]) else (0,) for i in left]
        heads = [
            _head(texts[i], size - cut) if len(cut_at) > 1 else texts[i]
            for i, cut_at in zip(left, cuts, strict=True)
            for cut in cut_at
        ]
        encodings = iter(encode(heads))
        uncertain = []
        for i, cut_at in zip(left, cuts, strict=True):
            tried = [next(encodings) for _ in cut_at]
            rows[i] = tried[0].ids[:limit]
            if len(tried) > 1 and not all(_certain(one, rows[i], limit, by_word) for one in tried):
                uncertain.append(i)
        size, left = 2 * size, uncertain
    return rows


def _head(text: str, end: int) -> str:
    """The first `end` characters, extended to the end of a run of white space at the cut, whose middle is left out.

    Many tokenizers treat a run of white space as one piece that depends on its line breaks and on what follows.
    """
    if not text[end - 1].isspace():
        return text[:end]
    stop = end
    while part := text[stop : stop + TOGETHER]:
        stop += len(part) - len(part.lstrip())
        if not part.isspace():
            break
    run = text[end:stop]
    if len(run) > 2 * SPACES:
        middle = run[SPACES:-SPACES]
        run = run[:SPACES] + "".join(c for c in "\r\n" if c in middle) + run[-SPACES:]
    return text[:end] + run + text[stop : stop + SPACES]


def _certain(encoding: Any, ids: list[int], limit: int, by_word: bool) -> bool:
    """Whether a cut text's first `limit` ids are `ids`, far enough from the cut to be those of the whole text."""
    if len(encoding.ids) < limit + MARGIN or encoding.ids[:limit] != ids:
        return False
    return not by_word or encoding.word_ids[limit - 1] != encoding.word_ids[limit + MARGIN - 1]


def _encoder(tokenizer: Any) -> tuple[Callable[[list[str]], Sequence[Any]], bool]:
    """A function like `encode_as_text` whose results have `ids` and `word_ids`; and whether it scores whole words.

    It uses a copy of the tokenizer's backend with fixed settings, so it needs no lock.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "encode_batch_fast"):  # a pure Python tokenizer, without word ids
        return lambda texts: [_Plain(ids) for ids in encode_as_text(tokenizer, texts)], True
    size, kept = _COPIES.get(tokenizer, (0, None))
    if kept is None or size != len(tokenizer):
        with _TOKENIZING:  # only to copy, as another thread may hold it while it tokenizes many texts
            kept = copy.deepcopy(backend)
        kept.encode_special_tokens = True
        kept.no_truncation()
        kept.no_padding()
        _COPIES[tokenizer] = len(tokenizer), kept
    by_word = type(kept.model).__name__ != "BPE"
    return lambda texts: kept.encode_batch_fast(texts, add_special_tokens=False), by_word


@dataclass(frozen=True, slots=True)
class _Plain:
    ids: list[int]

    @property
    def word_ids(self) -> list[int]:
        return [0] * len(self.ids)


def _check_ids(tokenizer: Any, special: frozenset[int], ids: Sequence[int], name: str) -> None:
    size = len(tokenizer)
    for start in range(0, len(ids), TOGETHER):
        part = ids[start : start + TOGETHER]
        if min(part) >= 0 and max(part) < size and special.isdisjoint(part):
            continue
        token = next(token for token in part if not 0 <= token < size or token in special)
        raise InputError(
            f"{name} contains token {token}; expected ids of this model's vocabulary, from 0 to {size - 1}, without "
            "special tokens"
        )


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that no text can be tokenized to: special tokens, including the embed token, and other added tokens."""
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.get_added_vocab().values())


def reasoning_tokens(
    tokenizer: Any, reasoning: str | Sequence[int], embed_id: int, limit: int | None = None
) -> list[int]:
    """The first `limit` token ids of a reasoning trace given as text (none if it is blank) or as ids.

    Raises:
        InputError: the text is no valid Unicode, or an id is unknown or the embed token's.
    """
    if isinstance(reasoning, str):
        return token_rows(tokenizer, [reasoning], limit)[0] if reasoning.strip() else []
    ids = [int(token) for token in reasoning[:limit]]
    for token in ids:
        if not 0 <= token < len(tokenizer) or token == embed_id:
            raise InputError(
                f"the reasoning contains token {token}; expected ids from 0 to {len(tokenizer) - 1} without the embed "
                f"token {embed_id}, which is appended"
            )
    return ids


def check_texts(texts: Sequence[Text]) -> None:
    """Raise InputError, naming the position, if a text is empty, neither a string nor Tokens, or invalid Unicode."""
    if isinstance(texts, str):
        raise InputError("give a list of texts, not one string")
    for i, text in enumerate(texts):
        if not isinstance(text, str | Tokens):
            raise InputError(f"text {i + 1} of {len(texts)} is a {type(text).__name__}, not a string")
        if not (text.strip() if isinstance(text, str) else text.ids):
            raise InputError(f"text {i + 1} of {len(texts)} is empty; there is nothing to embed")
        if isinstance(text, str) and not text.isascii() and (half := _SURROGATE.search(text)):
            raise InputError(
                f"text {i + 1} of {len(texts)} contains half of a surrogate pair (\\u{ord(half[0]):04x} at character "
                f"{half.start() + 1}), which is not valid text; remove it where the text is read"
            )


def check_queries(texts: Sequence[Text]) -> None:
    """`check_texts`, and raise InputError if a string has over MAX_CHARACTERS characters."""
    check_texts(texts)
    for i, text in enumerate(texts):
        if isinstance(text, str) and len(text) > MAX_CHARACTERS:
            raise InputError(
                f"query {i + 1} of {len(texts)} has {len(text):,} characters, over the limit of {MAX_CHARACTERS:,}; "
                "shorten it, or embed it as a document"
            )


class TextStream:
    """Decodes a reasoning trace piece by piece; the concatenation of all pieces is `Reasoned.text`.

    A character that consists of several tokens is returned with the last one, white space with the text that follows.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """Add a token; returns the characters that are now certain, perhaps none."""
        self._ids.append(token)
        return self._new(self._tokenizer.decode(self._ids).strip().rstrip(_UNFINISHED).rstrip())

    def finish(self) -> str:
        """End the trace; returns the rest of the text."""
        return self._new(self._tokenizer.decode(self._ids).strip())

    def _new(self, text: str) -> str:
        piece = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return piece

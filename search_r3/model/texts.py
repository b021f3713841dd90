"""Users' texts on their way to token ids: what is refused, and that no text can ever hold a special token.

Also `Tokens`, a text that is token ids already, and `TextStream`, which turns the tokens of an analysis into text while
they are still being written.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from search_r3.errors import InputError

MAX_CHARACTERS = 100_000
"""A longer query is refused: it is a document given by mistake."""
_TOKENIZING = threading.Lock()
"""Fast tokenizers keep `split_special_tokens` as state: two threads could fail, or let a special token through."""
_UNFINISHED = "\ufffd"
"""How a decoder shows bytes that are no character yet."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text as ids of the model's own vocabulary, without special tokens; taken wherever a text is taken."""

    ids: tuple[int, ...]


Text = str | Tokens


def encode_as_text(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of users' texts, in which "<|embed_token|>" and its like are plain characters, never special tokens."""
    if not texts:
        return []
    with _TOKENIZING:
        return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def token_rows(tokenizer: Any, texts: Sequence[Text]) -> list[list[int]]:
    """The ids of each text; those of `Tokens` as they are.

    Raises:
        InputError: a text is empty or neither a string nor Tokens, or an id is unknown or a special token's.
    """
    check_texts(texts)
    rows = iter(encode_as_text(tokenizer, [text for text in texts if isinstance(text, str)]))
    special = special_ids(tokenizer) if any(isinstance(text, Tokens) for text in texts) else frozenset()
    out = []
    for i, text in enumerate(texts):
        if isinstance(text, str):
            out.append(next(rows))
            continue
        for token in text.ids:
            if not 0 <= token < len(tokenizer) or token in special:
                raise InputError(
                    f"text {i + 1} of {len(texts)} holds token {token}; expected ids of this model's vocabulary, from "
                    f"0 to {len(tokenizer) - 1}, without special tokens"
                )
        out.append(list(text.ids))
    return out


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that no text can give: special tokens, the embed token among them, and other added ones."""
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.get_added_vocab().values())


def analysis_tokens(tokenizer: Any, analysis: str | Sequence[int], embed_id: int) -> list[int]:
    """The ids of an analysis that is given as text or as ids; raises InputError for an id it cannot hold."""
    if isinstance(analysis, str):
        return encode_as_text(tokenizer, [analysis])[0] if analysis else []
    ids = [int(token) for token in analysis]
    for token in ids:
        if not 0 <= token < len(tokenizer) or token == embed_id:
            raise InputError(
                f"the analysis holds token {token}; expected ids from 0 to {len(tokenizer) - 1} without the embed "
                f"token {embed_id}, which is put behind them"
            )
    return ids


def check_texts(texts: Sequence[Text]) -> None:
    """Raise InputError, naming the position, for a text that is empty or not a string (nor Tokens)."""
    if isinstance(texts, str):
        raise InputError("give a list of texts, not one string")
    for i, text in enumerate(texts):
        if not isinstance(text, str | Tokens):
            raise InputError(f"text {i + 1} of {len(texts)} is a {type(text).__name__}, not a string")
        if not (text.strip() if isinstance(text, str) else text.ids):
            raise InputError(f"text {i + 1} of {len(texts)} is empty; there is nothing to embed")


def check_queries(texts: Sequence[Text]) -> None:
    """`check_texts`, and no string over MAX_CHARACTERS."""
    check_texts(texts)
    for i, text in enumerate(texts):
        if isinstance(text, str) and len(text) > MAX_CHARACTERS:
            raise InputError(
                f"query {i + 1} of {len(texts)} has {len(text):,} characters, over the limit of {MAX_CHARACTERS:,}; "
                "shorten it, or embed it as a document"
            )


class TextStream:
    """The text of an analysis, piece by piece: what `push` and `finish` return, put together, is `Reasoned.text`.

    A character of several tokens comes when its last token is there, white space when something follows it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """One more token; returns the characters that are certain now, perhaps none."""
        self._ids.append(token)
        return self._new(self._tokenizer.decode(self._ids).strip().rstrip(_UNFINISHED).rstrip())

    def finish(self) -> str:
        """What is left."""
        return self._new(self._tokenizer.decode(self._ids).strip())

    def _new(self, text: str) -> str:
        piece = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return piece

"""How much of a text is read: at most so many tokens, and what happens to a longer one.

A longer text is refused, or read from its beginning or end; a document can also be embedded in parts, whose mean,
weighted by their lengths, is its embedding (as for long inputs in OpenAI's cookbook, and in vLLM's chunked processing).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from search_r3.errors import InputError
from search_r3.model.reading import MAX_PASSAGES, has_reading
from search_r3.model.tokenization import DEFAULT_QUERY_TOKENS, MAX_CHARACTERS, Text, WholeTokens, encode_as_text

TooLong = Literal["error", "truncate", "split"]
"""What happens to a text of too many tokens; only documents are split."""
Side = Literal["left", "right"]
"""The side from which a text is truncated: "right" reads its first tokens."""


class TextTooLong(InputError):
    """A text has more tokens than the limit."""


@dataclass(frozen=True, slots=True)
class TextLimit:
    """A limit on the tokens of one text, without prompt and special tokens, and what happens to a longer one."""

    tokens: int = DEFAULT_QUERY_TOKENS
    too_long: TooLong = "truncate"
    side: Side = "right"

    @classmethod
    def of(cls, tokens: int | None, too_long: TooLong = "truncate") -> TextLimit:
        """A limit of so many tokens, by default 512."""
        return cls(DEFAULT_QUERY_TOKENS if tokens is None else tokens, too_long)


@dataclass(frozen=True, slots=True)
class ReadTexts:
    """Texts, as far as they are read.

    Attributes:
        rows: the tokens of each text; of a text that is split, those of its parts, one after the other.
        parts: the number of rows of each text.
        truncated: the number of texts that lost their end or beginning.
    """

    rows: list[WholeTokens]
    parts: list[int]
    truncated: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens that are read."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def split(self) -> int:
        """The number of texts that are embedded in parts."""
        return sum(count > 1 for count in self.parts)


def longest_text(model: Any, reasoning_tokens: int = 0) -> int | None:
    """The number of tokens of one text for which a SearchR3's context has room, or None if its config names no context.

    Args:
        reasoning_tokens: tokens of reasoning that must fit, too, without the embed token.
    """
    return _room(model, reasoning_tokens)  # what embeds a query adapter's documents has the same base and fewer prompts


def check_room(model: Any, tokens: int, reasoning_tokens: int = 0, name: str = "max_tokens") -> None:
    """Raise InputError if so many tokens of a text do not fit into the context of a SearchR3 (`longest_text`).

    Args:
        name: of the setting, for the message.
    """
    room = longest_text(model, reasoning_tokens)
    if room is not None and tokens > room:
        raise InputError(
            f"{name} is {tokens:,}, but the context of {model.name} has room for {room:,} tokens of a text beside its "
            "prompt and reasoning; give at most that"
        )


def _room(model: Any, reasoning_tokens: int) -> int | None:
    config = model.checkpoint.model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return None
    prompt = max(len(template.prefix) + len(template.suffix) for template in model.templates.values())
    passages = 0
    if has_reading(model):
        reading = model.reading
        markers = encode_as_text(model.tokenizer, [reading.marker_of(n) for n in range(1, MAX_PASSAGES + 1)])
        passages = sum(map(len, markers)) + MAX_PASSAGES * reading.passage_tokens
    return max(0, int(context) - prompt - passages - reasoning_tokens - 1)


def read_texts(
    model: Any,
    texts: Sequence[Text],
    limit: TextLimit,
    between: Callable[[int], None] = lambda tokens: None,
    most: int | None = None,
    *,
    queries: bool = False,
) -> ReadTexts:
    """The tokens of each text, within the limit.

    Args:
        model: a SearchR3, by whose contract the texts become tokens.
        between: called between texts and at the end with the number of tokens to read so far; may raise to end the
            call.
        most: a number of tokens of which `between` refuses one more, so that no text needs to be tokenized further.
        queries: the texts are queries, not documents.

    Raises:
        TextTooLong: a text has more tokens than the limit and is to be refused; or its last tokens are to be read, and
            it has over 100,000 characters.
        InputError: see `SearchR3.token_rows`.
    """
    if limit.too_long == "split":
        rows = model.token_rows(
            texts,
            None if most is None else most + 1,
            lambda rows: between(sum(map(len, rows))),
            queries=queries,
        )
        between(sum(map(len, rows)))
        pieces = [list(_pieces(row, limit.tokens)) for row in rows]
        return ReadTexts([WholeTokens(tuple(one)) for piece in pieces for one in piece], list(map(len, pieces)))

    def count(rows: Sequence[list[int]]) -> None:
        between(sum(min(len(row), limit.tokens) for row in rows))

    from_end = limit.too_long == "truncate" and limit.side == "left"
    if from_end:
        _check_characters(texts)
    rows = model.token_rows(texts, None if from_end else limit.tokens + 1, count, queries=queries)
    count(rows)
    longer = [number for number, row in enumerate(rows, 1) if len(row) > limit.tokens]
    if longer and limit.too_long == "error":
        what = "the text" if len(rows) == 1 else f"text {longer[0]} of {len(rows)}"
        raise TextTooLong(
            f"{what} has over {limit.tokens:,} tokens, the limit; shorten it, or set too_long to truncate"
        )
    read = (row[-limit.tokens :] if from_end else row[: limit.tokens] for row in rows)
    return ReadTexts([WholeTokens(tuple(row)) for row in read], [1] * len(rows), len(longer))


def _check_characters(texts: Sequence[Text]) -> None:
    """Refuse texts that would be tokenized whole for their last tokens."""
    for number, text in enumerate(texts, 1):
        if isinstance(text, str) and len(text) > MAX_CHARACTERS:
            raise TextTooLong(
                f"text {number} of {len(texts)} has {len(text):,} characters; the last tokens are read only of texts "
                f"of at most {MAX_CHARACTERS:,}: shorten it, or truncate it from the right"
            )


def _pieces(row: list[int], limit: int) -> Iterator[list[int]]:
    """The row in as few pieces as the limit allows, whose lengths differ by at most one."""
    count = max(1, -(-len(row) // limit))
    ends = [len(row) * number // count for number in range(count + 1)]
    yield from (row[start:end] for start, end in itertools.pairwise(ends))


def mean_of_parts(vectors_ND: np.ndarray, lengths_N: Sequence[int]) -> np.ndarray:
    """The embedding of a text from those of its parts: their mean, weighted by their numbers of tokens, of length 1.

    Args:
        vectors_ND: unit rows.
        lengths_N: tokens of each part.

    Returns:
        float32 (D,).
    """
    mean_D = np.average(np.asarray(vectors_ND, dtype=np.float64), axis=0, weights=lengths_N)
    return (mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)).astype(np.float32)


class LimitedQueries:
    """A model whose queries are read within a limit; all else is the model's own.

    Attributes:
        tokens: tokens that were read of the latest query.
        truncated: whether it had more.
    """

    def __init__(self, model: Any, limit: TextLimit) -> None:
        self._model, self._limit = model, limit
        self.tokens = 0
        self.truncated = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_query(self, texts: Sequence[Text], **options: Any) -> np.ndarray:
        """See `SearchR3.encode_query`. Raises TextTooLong by the limit."""
        return self._model.encode_query(self._read(texts), **options)

    def reason(self, texts: Sequence[Text], **options: Any) -> Any:
        """See `SearchR3.reason`. Raises TextTooLong by the limit."""
        return self._model.reason(self._read(texts), **options)

    def encode_with_reasoning(self, texts: Sequence[Text], reasoning: Any, **options: Any) -> np.ndarray:
        """See `SearchR3.encode_with_reasoning`. Raises TextTooLong by the limit."""
        return self._model.encode_with_reasoning(self._read(texts), reasoning, **options)

    def _read(self, texts: Sequence[Text]) -> list[WholeTokens]:
        read = read_texts(self._model, texts, self._limit, queries=True)
        self.tokens, self.truncated = read.tokens, read.truncated > 0
        return read.rows

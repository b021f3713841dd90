"""Reading: the first hits of a search follow the query, so that its embedding (and the reasoning before it) knows them.

`prompts.ReadingConversation` defines the conversation; this module makes its user's turn. Passages are data: they are
tokenized as text, so that no special token comes out of them, and cut, so that a turn stays short.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from search_r3.errors import InputError
from search_r3.model.tokenization import (
    DEFAULT_QUERY_TOKENS,
    ReadingTurn,
    Text,
    check_queries,
    check_texts,
    encode_as_text,
)

if TYPE_CHECKING:
    from search_r3.prompts import ReadingConversation

MAX_PASSAGES = 10
"""Passages that a query may come with."""
Passages = Sequence[Sequence[Text]]
"""For each query, the full texts of the documents that a search found, best first; may be empty."""


def has_reading(model: Any) -> bool:
    """Whether `check_reading` accepts the model."""
    return getattr(model, "reading", None) is not None


def check_reading(model: Any) -> ReadingConversation:
    """The reading conversation of a SearchR3. Raises InputError if its checkpoint was not trained to read."""
    if (conversation := getattr(model, "reading", None)) is None:
        raise InputError(
            f"{getattr(model, 'name', 'the model')} has no reading mode: it was not trained with reading_ratio; search "
            "without reading"
        )
    return conversation


def check_count(passages: int, name: str = "passages") -> None:
    """Raise InputError unless so many passages can be read."""
    if isinstance(passages, bool) or not isinstance(passages, int) or not 0 <= passages <= MAX_PASSAGES:
        raise InputError(f"{name} is {passages!r}; give a whole number from 0 to {MAX_PASSAGES}")


def join_turn(query: Sequence[int], markers: Sequence[Sequence[int]], passages: Sequence[Sequence[int]]) -> list[int]:
    """The ids of a user's turn: the query, then each passage after the marker with its number."""
    turn = list(query)
    for marker, passage in zip(markers, passages, strict=False):
        turn += [*marker, *passage]
    return turn


def with_passages(model: Any, texts: Sequence[Text], passages: Passages | None) -> Sequence[Text]:
    """`reading_turns`, or the texts unchanged if `passages` is None."""
    return texts if passages is None else reading_turns(model, texts, passages)


def reading_turns(model: Any, texts: Sequence[Text], passages: Passages) -> list[ReadingTurn]:
    """Queries with the passages that follow each.

    Args:
        model: a SearchR3.
        texts: non-empty queries, of which the first 512 tokens are used (all of `WholeTokens`).
        passages: one sequence per query, of at most 10 non-empty texts; only the first tokens of each are used, as the
            checkpoint's conversation says.

    Raises:
        InputError: the checkpoint has no reading mode, the numbers of queries and sequences differ, a query has too
            many passages, or a text is invalid; the message names its position.
    """
    conversation = check_reading(model)
    check_queries(texts)
    if len(passages) != len(texts):
        raise InputError(f"passages has {len(passages)} entries for {len(texts)} texts; give one per text")
    for i, of_query in enumerate(passages, 1):
        try:
            check_texts(of_query)
        except InputError as error:
            raise InputError(f"passages of query {i} of {len(texts)}: {error}") from error
        if len(of_query) > MAX_PASSAGES:
            raise InputError(f"query {i} of {len(texts)} has {len(of_query)} passages; give at most {MAX_PASSAGES}")
    queries = model.token_rows(texts, DEFAULT_QUERY_TOKENS, queries=True)
    cut = iter(model.token_rows([text for of_query in passages for text in of_query], conversation.passage_tokens))
    numbers = range(1, max(map(len, passages), default=0) + 1)
    markers = encode_as_text(model.tokenizer, [conversation.marker_of(number) for number in numbers])
    return [
        ReadingTurn(tuple(join_turn(query, markers, [next(cut) for _ in of_query])))
        for query, of_query in zip(queries, passages, strict=True)
    ]


def conversation_of(model: Any, texts: Sequence[Text]) -> str:
    """The conversation in which queries are embedded directly: "reading" with passages, otherwise "query".

    Raises:
        InputError: only some of them come with passages, or the checkpoint has no reading mode.
    """
    reading = [isinstance(text, ReadingTurn) for text in texts]
    if not any(reading):
        return "query"
    if not all(reading):
        raise InputError("some queries come with passages and some without; embed them in separate calls")
    check_reading(model)
    return "reading"


def what_is_read(model: Any, passages: Sequence[Text]) -> list[str]:
    """The part of each passage that a SearchR3 reads. Raises InputError as `reading_turns` does."""
    conversation = check_reading(model)
    return [model.tokenizer.decode(row) for row in model.token_rows(passages, conversation.passage_tokens)]

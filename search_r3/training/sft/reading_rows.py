"""Rows of stage 1 in which a query is followed by passages (`search_r3.model.reading`), and what is changed in them.

At search time the first search may fail. So some rows read fewer passages, another query's, or only passages that do
not answer the query: the embedding must not believe all that it reads. What a row reads is a function of the seed, the
step and the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from search_r3.data.pairs import TrainingPair
from search_r3.model.reading import join_turn
from search_r3.model.tokenization import ReadingTurn, Text, encode_as_text, normalized, token_rows
from search_r3.prompts import PromptTemplate, ReadingConversation
from search_r3.training.lora.policy import Rows
from search_r3.training.sft.contrastive import document_key
from search_r3.training.sft.sft_config import SFTConfig

READING_STREAM = 41
"""Seed offset, so that what is read does not affect a batch's pairs and other rows."""


@dataclass
class ReadingPlan:
    """What the pairs of a batch read, by index: before the direct embedding, and before the reasoning."""

    direct: dict[int, tuple[str, ...]] = field(default_factory=dict)
    before_reasoning: dict[int, tuple[str, ...]] = field(default_factory=dict)


def plan_reading(
    config: SFTConfig,
    step: int,
    pairs: Sequence[TrainingPair],
    with_reasoning: Sequence[int],
    answers: Mapping[str, Mapping[int, float]],
) -> ReadingPlan:
    """Choose what a batch reads, as the recipe's `reading_*` keys say.

    Args:
        with_reasoning: indices of the pairs that are also trained with reasoning.
        answers: query -> the keys of the documents known to answer it (`document_key`).
    """
    if not config.reading_ratio:
        return ReadingPlan()
    rng = np.random.default_rng([config.loop.seed, step, READING_STREAM])
    direct_B, reasoned_B, kind_B = rng.random((3, len(pairs)))
    kept_B, shift = rng.integers(config.reading_passages, size=len(pairs)), int(rng.integers(len(pairs)))
    have = [i for i, pair in enumerate(pairs) if pair.passages]
    shown: dict[int, tuple[str, ...]] = {}
    for place, i in enumerate(have):
        other = pairs[have[(place + 1 + shift % max(len(have) - 1, 1)) % len(have)]]
        known = answers.get(pairs[i].query, {})
        shown[i] = _shown(config, pairs[i], other, float(kind_B[i]), int(kept_B[i]), known)
    return ReadingPlan(
        {i: shown[i] for i in have if direct_B[i] < config.reading_ratio},
        {i: shown[i] for i in with_reasoning if i in shown and reasoned_B[i] < config.reading_reasoning_ratio},
    )


def _shown(
    config: SFTConfig, pair: TrainingPair, other: TrainingPair, kind: float, kept: int, known: Mapping[int, float]
) -> tuple[str, ...]:
    """The passages of a row; `kind`, from 0 to 1, chooses among the shares of the recipe."""
    most = config.reading_passages
    if kind < config.reading_dropped:
        return pair.passages[: min(kept, most)]
    kind -= config.reading_dropped
    if kind < config.reading_shuffled:
        return other.passages[:most]
    kind -= config.reading_shuffled
    if kind < config.reading_without_positive:
        wrong = (text for text in pair.passages if text not in pair.relevant and document_key(text) not in known)
        return tuple(wrong)[:most]
    return pair.passages[:most]


class ReadingRows:
    """The user's turns of queries with passages.

    Args:
        conversation: how many tokens of each passage are read, and what stands between them.
        max_query_tokens: queries are truncated to this many tokens.
        normalize_query, normalize_passage: what they go through before they are tokenized.
    """

    def __init__(
        self,
        conversation: ReadingConversation,
        tokenizer: Any,
        max_query_tokens: int,
        normalize_query: Callable[[str], str] | None = None,
        normalize_passage: Callable[[str], str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._normalize_query, self._normalize_passage = normalize_query, normalize_passage
        self._query_tokens, self._passage_tokens = max_query_tokens, conversation.passage_tokens
        numbers = range(1, conversation.passages + 1)
        self._markers = encode_as_text(tokenizer, [conversation.marker_of(number) for number in numbers])

    def turns(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[list[int]]:
        """The ids of each query, followed by those of its passages, if it has any."""
        flat = [text for of_query in passages for text in of_query]
        ids = iter(token_rows(self._tokenizer, flat, self._passage_tokens, normalize=self._normalize_passage))
        return [
            join_turn(query[: self._query_tokens], self._markers, [next(ids) for _ in of_query])
            for query, of_query in zip(
                encode_as_text(self._tokenizer, normalized(queries, self._normalize_query)), passages, strict=True
            )
        ]

    def rows(
        self, template: PromptTemplate, queries: Sequence[str], passages: Sequence[Sequence[str]], answers: int
    ) -> Rows:
        """Rows of a conversation with a given answer, of which `answers` tokens are training targets."""
        rows = [[*turn, *template.suffix] for turn in self.turns(queries, passages)]
        return Rows(template.prefix, rows, [answers] * len(rows))

    def to_reason_about(
        self, pairs: Sequence[TrainingPair], chosen: Sequence[int], read: Mapping[int, Sequence[str]]
    ) -> list[tuple[str, Text]]:
        """The name and the query of each reasoning that the model is to generate, with what it reads before."""
        turns = self.turns([pairs[i].query for i in chosen], [read.get(i, ()) for i in chosen])
        return [
            (trace_name(pairs[i], i in read), ReadingTurn(tuple(turn)) if i in read else pairs[i].query)
            for i, turn in zip(chosen, turns, strict=True)
        ]


def trace_name(pair: TrainingPair, reads: bool) -> str:
    """The name of a pair's self-generated reasoning; that which follows passages is another one."""
    return f"{pair.id} after reading" if reads else pair.id

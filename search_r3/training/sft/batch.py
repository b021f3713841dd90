"""The batch of a step: rows of each conversation, and what they were made from."""

from __future__ import annotations

from dataclasses import dataclass, field

from search_r3.data.pairs import TrainingPair
from search_r3.training.lora.policy import Rows
from search_r3.training.sft.in_batch_lm import QueryDocumentPairs


@dataclass
class Batch:
    """The batch of a step: this process's rows of each conversation, and the texts of all processes' rows.

    Attributes:
        parts: "document", "query", "reasoning" if a pair of the batch has reasoning, and "latent" if one is trained in
            latent mode. With W processes, each has every W-th row.
        pairs: the training pairs; document i answers query i.
        documents: the pairs' positives, followed by further positives, then by their explicit negatives.
        with_reasoning: indices of the pairs that are also trained with reasoning.
        self_generated: for each of `with_reasoning`, whether the model generated the reasoning.
        false_words: by index, the pairs whose reasoning is another query's or empty, with it (`trust`); those of them
            that are not in `with_reasoning` are not trained with it.
        changed_of: for self-teaching, indices of the pairs whose query is also embedded as a rewritten variant.
        with_latent: indices of the pairs that are also trained in latent mode.
        with_passages: indices of the pairs that are also trained in the reading conversation, part "reading".
        query_documents: which queries are predicted from which documents, in the part "in_batch_lm"; None: no such
            part.

    `pairs` and `documents` are the original texts, by which answers are known, even where variants are embedded.
    """

    parts: dict[str, Rows]
    pairs: list[TrainingPair]
    documents: list[str]
    with_reasoning: list[int]
    self_generated: list[bool]
    changed_of: list[int] = field(default_factory=list)
    with_latent: list[int] = field(default_factory=list)
    with_passages: list[int] = field(default_factory=list)
    query_documents: QueryDocumentPairs | None = None
    false_words: dict[int, str] = field(default_factory=dict)

"""Mode `given`: each query is embedded with the reasoning that was written for it, `reasoning.jsonl` of its data set.

It shows what a model gains from true words, in place of those that it writes itself. Its control, `given.shuffled`,
gives each query the reasoning of another one: a model that trusts words only as far as they are true loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_r3.data.beir import read_reasoning
from search_r3.errors import InputError
from search_r3.evaluation.embedding_cache import content_hash
from search_r3.evaluation.shuffling import derangement
from search_r3.model.reasoned import REASONING_TEXT_TOKENS

SHUFFLED = "given.shuffled"
WRITTEN = "written"
"""The mode in which another model has written the reasoning (`ReasoningWriter`)."""
GIVEN_MODES = ("given", SHUFFLED, WRITTEN)
FILE = "reasoning.jsonl"
SEED = 0
"""Seed of the assignment of other queries' reasoning. It is constant, so that systems get the same."""
UPPER_BOUNDS = frozenset({"entailmentbank"})
"""Data sets whose reasoning states the answer: what they show is an upper bound."""


@dataclass(frozen=True)
class GivenReasoning:
    """The reasoning of a data set's queries.

    Attributes:
        texts: query id -> reasoning.
        writer: `ReasoningWriter.identity` of the model that wrote it; None if it belongs to the data set.
    """

    texts: Mapping[str, str]
    writer: Mapping[str, Any] | None = None

    @classmethod
    def of_split(cls, folder: Path, split: str) -> GivenReasoning | None:
        """That of a BEIR folder's split; None if there is no `reasoning.jsonl`.

        Raises:
            InputError: the file is broken, or has no reasoning for the split.
        """
        path = folder / FILE
        return cls(read_reasoning(path, split)) if path.is_file() else None

    def identity(self, mode: str) -> dict[str, Any]:
        """What the reasoning adds to a system's identity in a mode of `GIVEN_MODES`."""
        identity: dict[str, Any] = {
            "max_reasoning_tokens": REASONING_TEXT_TOKENS,
            "reasoning_hash": content_hash(list(self.texts), list(self.texts.values())),
        }
        if self.writer is not None:
            identity["writer"] = dict(self.writer)
        return identity | ({"seed": SEED} if mode == SHUFFLED else {})

    def traces(
        self, mode: str, qids: Sequence[str], count_tokens: Callable[[Sequence[str]], list[int]]
    ) -> list[dict[str, Any]]:
        """One record for each query, see `systems.Answers.reasoning`.

        Raises:
            InputError: a query has no reasoning, or there is only one to shuffle.
        """
        if missing := [qid for qid in qids if qid not in self.texts]:
            raise InputError(
                f"{FILE} has no reasoning for {len(missing):,} of {len(qids):,} queries, such as {missing[0]}; add it, "
                "or evaluate in other modes"
            )
        order = derangement(len(qids), SEED) if mode == SHUFFLED else range(len(qids))
        words = [self.texts[qids[i]] for i in order]
        return [
            {
                "qid": qid,
                "text": text,
                "num_tokens": min(count, REASONING_TEXT_TOKENS),
                "forced": count > REASONING_TEXT_TOKENS,
                **({} if qids[i] == qid else {"from": qids[i]}),
            }
            for qid, i, text, count in zip(qids, order, words, count_tokens(words), strict=True)
        ]


def check_reasoning_files(modes: Sequence[str], folders: Sequence[Path]) -> None:
    """Raise InputError if a mode needs given reasoning and no data set has any."""
    needed = [mode for mode in modes if mode in ("given", SHUFFLED)]
    if needed and not any((folder / FILE).is_file() for folder in folders):
        raise InputError(
            f"mode {needed[0]} needs a data set with {FILE} (lines of _id, split and reasoning beside queries.jsonl); "
            "none of the data sets has one"
        )

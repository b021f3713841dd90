"""Questions of a fresh set written by an LLM, with the prompts, parsing, budget and resuming of `data/synthesis`.

The committee checks the questions afterwards, so the check of `synthesize` itself is disabled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.data.beir import stable_order
from search_r3.data.fresh.fresh_config import FreshConfig
from search_r3.data.fresh.passages import Passage
from search_r3.data.fresh.questions import leak
from search_r3.data.io.jsonl import write_jsonl
from search_r3.data.mining.scorers import Report
from search_r3.data.mining.word_overlap import words_of
from search_r3.data.pairs import read_pairs
from search_r3.data.synthesis.pipeline import synthesize
from search_r3.data.synthesis.synthesis_plan import NO_BUDGET, SynthesisSettings
from search_r3.data.synthesis.writers import Budget, Writer

KINDS = ("question", "keywords")
"""The kinds of `synthesis.instructions.KINDS` that resemble searches in documentation."""
SPARE = 2
"""Documents prompted for each question needed, since some replies are dropped."""


class _Anything:
    """A scorer that gives every document the same score."""

    name = "none"
    zero_is_no_match = False
    identity: dict[str, Any] = {"retriever": "none"}  # noqa: RUF012 (never written to)

    def prepare(self, documents: list[str], folder: Path, report: Report | None = None) -> None:
        self._size = len(documents)

    def score(self, queries: list[str]) -> np.ndarray:
        return np.zeros((len(queries), self._size), dtype=np.float32)


def written_questions(
    passages: Sequence[Passage],
    config: FreshConfig,
    writer: Writer,
    budget: Budget | None,
    scratch: Path,
    dropped: dict[str, Counter[str]],
    report: Callable[[str], None],
) -> dict[str, str]:
    """{document id: question} for at most `SPARE` times the wanted number of each package's documents.

    An interrupted call resumes from `scratch`, so no document is paid for twice.

    Raises:
        InputError: the writer is not available, or the budget is too small for one document.
    """
    by_id = {one.id: one for one in passages}
    wanted: list[str] = []
    for package in dict.fromkeys(one.package for one in passages):
        own = [one.id for one in passages if one.package == package]
        wanted += stable_order(own, config.seed)[: SPARE * config.questions_per_package]
    scratch.mkdir(parents=True, exist_ok=True)
    source, output = scratch / "documents.jsonl", scratch / "written.jsonl"
    write_jsonl(source, ({"id": one, "title": by_id[one].title, "text": by_id[one].text} for one in wanted))
    settings = SynthesisSettings(kinds=KINDS, negatives=0, top_k=len(wanted), seed=config.seed)
    manifest = synthesize(
        source,
        output,
        writer,
        _Anything(),
        settings,
        budget=budget or NO_BUDGET,
        report=lambda what, done, total: report(f"{done:,} of {total:,} {what}"),
    )
    dropped["(an LLM's replies)"].update(manifest["dropped"])
    texts = {_text(one): one for one in passages}
    questions: dict[str, str] = {}
    for pair in read_pairs(output):
        passage = texts[pair.positive]
        if leak(passage, pair.query, pair.query):
            dropped[passage.package]["stands in its own document"] += 1
        else:
            questions[passage.id] = pair.query
    asked = Counter(" ".join(words_of(question)) for question in questions.values())
    return {one: text for one, text in questions.items() if asked[" ".join(words_of(text))] == 1}


def _text(passage: Passage) -> str:
    return f"{passage.title} {passage.text}".strip()

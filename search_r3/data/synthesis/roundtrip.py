"""Round-trip consistency: a text written for a document must retrieve that document (Alberti et al. 2019, arXiv
1906.05416; used as a filter by Promptagator, Dai et al. 2022, arXiv 2209.11755, section 3.3).

A written passage is not in the corpus, so it is scored together with its positive in a separate small index.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from search_r3.data.beir import stable_order
from search_r3.data.mining.scorers import Report, Scorer

BACKGROUND = 5000
"""Documents scored together with written passages, since scores may depend on the corpus (BM25's word frequencies)."""


class RoundTrip:
    """A retriever over the documents' full texts, prepared on first use.

    Args:
        scorer: not prepared yet.
        texts: distinct full texts.
        folder: where the scorer stores expensive results.
    """

    def __init__(self, scorer: Scorer, texts: list[str], folder: Path, report: Report | None = None) -> None:
        self.scorer, self.texts = scorer, texts
        self._folder, self._report = folder, report
        self._ready = False
        self._background: list[str] | None = None

    def ranks(self, queries: Sequence[str], own: Sequence[int]) -> list[int | None]:
        """For each query, the rank of text number `own[i]` from 1, or None if the two have nothing in common."""
        if not queries:
            return []
        if not self._ready:
            self.scorer.prepare(self.texts, self._folder, self._report)
            self._ready = True
        scores_QN = self.scorer.score(list(queries))
        ranks: list[int | None] = []
        for scores_N, target in zip(scores_QN, own, strict=True):
            score = scores_N[target]
            if self.scorer.zero_is_no_match and score <= 0:
                ranks.append(None)
            else:
                before = np.count_nonzero(scores_N[:target] == score)  # on ties the earlier document comes first
                ranks.append(1 + int(np.count_nonzero(scores_N > score)) + int(before))
        return ranks

    def faults(self, queries: Sequence[str], own: Sequence[int], passages: Sequence[str]) -> list[str]:
        """For each written passage, the reason why it is not a hard negative of its query, or "".

        "preferred to the positive": the retriever ranks it above text number `own[i]`, so it may well answer the query.
        "no word in common": it shares nothing with the query, so it is not hard.
        """
        if not queries:
            return []
        positives = [self.texts[target] for target in own]
        scorer = copy.copy(self.scorer)  # the same model over other texts; the corpus index is unchanged
        with tempfile.TemporaryDirectory() as scratch:
            scorer.prepare([*passages, *positives, *self._others()], Path(scratch) / "rows", None)
            scores_QN = scorer.score(list(queries))
        faults = []
        for i, scores_N in enumerate(scores_QN):
            passage, positive = scores_N[i], scores_N[len(passages) + i]
            if scorer.zero_is_no_match and passage <= 0:
                faults.append("no word in common")
            else:
                faults.append("preferred to the positive" if passage > positive else "")
        return faults

    def _others(self) -> list[str]:
        if not self.scorer.zero_is_no_match:
            return []
        if self._background is None:
            chosen = stable_order(map(str, range(len(self.texts))), 0)[:BACKGROUND]
            self._background = [self.texts[int(i)] for i in chosen]
        return self._background

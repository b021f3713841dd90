"""The interface of a reward: a callable that gets a batch of rollouts and returns one number per rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RankedRollouts:
    """R rollouts, and the cosines by which their embeddings rank N documents.

    The direct embeddings of the queries are scored too, for comparison: as rollouts with an empty text.

    Attributes:
        queries: the text of each rollout's query.
        texts: each rollout's reasoning trace, without the embed token.
        token_ids: the same traces as token ids.
        emitted_R: boolean; True where the model sampled the embed token itself, after at least `min_reasoning_tokens`
            tokens. Where it is False, because the token was forced or the trace is too short, `missing_token_reward`
            replaces the reward.
        cosines_RN: float32 cosines of each embedding with the documents that are judged for a query of the batch or are
            in some rollout's top k, in corpus order.
        grades_RN: float32 grades of the documents for each rollout's query; 0 where not judged.
        k: the rank cutoff (`k` in the recipe's section `environment`).
        ranks_RN: int64; for each relevant document, 1 + the number of documents of the whole corpus that are not
            relevant and at least as similar; 0 for all others. None unless a reward has the attribute `needs_ranks`
            (True), or if the columns are all documents there are.
        documents: the size of that corpus; None with `ranks_RN`.
    """

    queries: Sequence[str]
    texts: Sequence[str]
    token_ids: Sequence[Sequence[int]]
    emitted_R: Tensor
    cosines_RN: Tensor
    grades_RN: Tensor
    k: int
    ranks_RN: Tensor | None = None
    documents: int | None = None

    @classmethod
    def without_text(
        cls, cosines_RN: Tensor, grades_RN: Tensor, k: int, queries: Sequence[str] | None = None
    ) -> RankedRollouts:
        """Rankings of embeddings that have no reasoning trace, such as direct ones."""
        rollouts = len(cosines_RN)
        texts = [""] * rollouts
        emitted_R = torch.ones(rollouts, dtype=torch.bool)
        return cls(queries or texts, texts, [()] * rollouts, emitted_R, cosines_RN, grades_RN, k)


class Reward(Protocol):
    """Scores rollouts. A complete example, the module `my_rewards.py` of a package:

        from dataclasses import dataclass

        @dataclass(frozen=True)
        class Brevity:
            '''1 for a reasoning trace of 1 to `limit` tokens, else 0 (also for direct embeddings, which have none).'''

            limit: int = 16

            def __call__(self, rollouts):
                return [float(0 < len(ids) <= self.limit) for ids in rollouts.token_ids]

    The package's pyproject.toml, and a recipe that adds the reward to that of the ranking:

        [project.entry-points."search_r3.rewards"]
        brevity = "my_rewards:Brevity"

        environment:
          rewards: [{name: dcg_scaled}, {name: brevity, weight: 0.1, limit: 12}]

    A function of `RankedRollouts` (and keyword parameters) is a reward as well. The policy is trained on the weighted
    sum of all rewards.
    """

    def __call__(self, rollouts: RankedRollouts, /) -> Tensor | Sequence[float]:
        """One finite number per rollout, (R,), without gradient; larger is better."""
        ...

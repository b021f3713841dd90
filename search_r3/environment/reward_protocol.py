"""What a reward is: a callable that sees a batch of rollouts and returns one number for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RankedRollouts:
    """Rollouts, and the cosines by which their embeddings rank the documents. R rollouts, N documents.

    The direct embeddings of the queries are scored too, for comparison: as rollouts with an empty text.

    Attributes:
        queries: the text of each rollout's query.
        texts: each rollout's reasoning trace, without the embed token.
        token_ids: the same as token ids.
        emitted_R: boolean; False where the embed token was forced (`missing_token_reward` then replaces the reward).
        cosines_RN: float32, of each embedding with every document that is judged for a query of the batch or stands in
            some top k, in the corpus's order.
        grades_RN: float32, the documents' relevance to each rollout's query; 0 where not judged.
        k: the ranks that count (`k` of the recipe's section `environment`).
    """

    queries: Sequence[str]
    texts: Sequence[str]
    token_ids: Sequence[Sequence[int]]
    emitted_R: Tensor
    cosines_RN: Tensor
    grades_RN: Tensor
    k: int

    @classmethod
    def without_text(
        cls, cosines_RN: Tensor, grades_RN: Tensor, k: int, queries: Sequence[str] | None = None
    ) -> RankedRollouts:
        """Embeddings alone, such as direct ones."""
        rollouts = len(cosines_RN)
        texts = [""] * rollouts
        emitted_R = torch.ones(rollouts, dtype=torch.bool)
        return cls(queries or texts, texts, [()] * rollouts, emitted_R, cosines_RN, grades_RN, k)


class Reward(Protocol):
    """Scores rollouts. A complete example, a package's `my_rewards.py`:

        from dataclasses import dataclass

        @dataclass(frozen=True)
        class Brevity:
            '''1 for a reasoning trace of 1 to `limit` tokens, else 0 (direct embeddings have an empty one).'''

            limit: int = 16

            def __call__(self, rollouts):
                return [float(0 < len(ids) <= self.limit) for ids in rollouts.token_ids]

    Its pyproject.toml, and a recipe that adds it to the ranking's reward:

        [project.entry-points."search_r3.rewards"]
        brevity = "my_rewards:Brevity"

        environment:
          rewards: [{name: dcg_scaled}, {name: brevity, weight: 0.1, limit: 12}]

    A function of `RankedRollouts` (and keyword parameters) is a reward as well. The policy sees the weighted sum.
    """

    def __call__(self, rollouts: RankedRollouts, /) -> Tensor | Sequence[float]:
        """One finite number for each rollout, larger is better; (R,), without gradient."""
        ...

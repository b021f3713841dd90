"""The rewards of a recipe: looked up by name, created with their parameters, and summed with their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from search_r3.environment.recipe_registry import RecipeRegistry
from search_r3.environment.reward_protocol import RankedRollouts, Reward
from search_r3.environment.rewards import REWARDS
from search_r3.errors import InputError

REGISTRY = RecipeRegistry("reward", "rewards", REWARDS)
"""All rewards that a recipe can name: the built-in ones and those of installed packages."""


class WeightedRewards:
    """A weighted sum of rewards, which is a reward itself.

    Attributes:
        terms: (name, weight, reward) of each.
    """

    def __init__(self, terms: Sequence[tuple[str, float, Reward]]) -> None:
        self.terms = tuple(terms)

    @classmethod
    def from_recipe(cls, entries: Sequence[Mapping[str, Any]]) -> WeightedRewards:
        """The rewards of a recipe's list, with entries {"name", "weight" (1 by default), parameters of the reward}.

        Raises:
            InputError: the list is empty, an entry has no name, a weight is not a finite number, or as
                `RecipeRegistry.create`.
        """
        if not entries:
            raise InputError("rewards is empty: name at least one reward")
        terms = []
        for entry in entries:
            if not isinstance(entry.get("name"), str):
                raise InputError(f"an entry of rewards needs a name, such as {{name: dcg_scaled}}, got {dict(entry)}")
            weight = entry.get("weight", 1.0)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise InputError(f"reward {entry['name']}: weight must be a finite number, got {weight!r}")
            parameters = {key: value for key, value in entry.items() if key not in ("name", "weight")}
            terms.append((entry["name"], float(weight), REGISTRY.create(entry["name"], parameters)))
        return cls(terms)

    @property
    def needs_ranks(self) -> bool:
        """Whether a reward reads `RankedRollouts.ranks_RN`."""
        return any(getattr(reward, "needs_ranks", False) for _, _, reward in self.terms)

    def __call__(self, rollouts: RankedRollouts, /) -> Tensor:
        """The weighted sum, (R,) float32 on the device of the cosines.

        Raises:
            InputError: a reward did not return one finite number per rollout.
        """
        cosines_RN = rollouts.cosines_RN
        total_R: Tensor | None = None
        for name, weight, reward in self.terms:
            values_R = torch.as_tensor(reward(rollouts), dtype=torch.float32, device=cosines_RN.device).detach()
            if values_R.shape != cosines_RN.shape[:1] or not bool(torch.isfinite(values_R).all()):
                raise InputError(
                    f"reward {name} must return one finite number for each of the {len(cosines_RN)} rollouts, but it "
                    f"returned the shape {tuple(values_R.shape)}, or NaN or infinity"
                )
            total_R = weight * values_R if total_R is None else total_R + weight * values_R
        assert total_R is not None  # from_recipe refuses an empty list
        return total_R

"""The `environment` section of a stage 2 recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from search_r3.environment.refresh_policies import complete_settings
from search_r3.environment.reward_terms import WeightedRewards
from search_r3.environment.rewards import MISSING_TOKEN_REWARD
from search_r3.errors import InputError


@dataclass
class EnvironmentConfig:
    """How rollouts are rewarded, and how the corpus is kept current."""

    reward: str = "dcg_scaled"
    """"dcg_scaled", "dcg" (nDCG@k), "margin_rank", or a reward that an installed package adds; short for a list of one
    in `rewards`."""
    rewards: list[dict[str, Any]] = field(default_factory=list)
    """Several rewards, or one with parameters, in place of `reward`: {name, weight (1 by default), parameters}."""
    k: int = 10
    """Ranks that the reward looks at."""
    candidates: int = 20
    """Rows that each rollout's search passes to the refresh policy."""
    missing_token_reward: float = MISSING_TOKEN_REWARD
    """Reward of a rollout without the embed token; below 0, which is a miss."""
    gain_weight: float = 0.0
    """Bonus for each point above the reward of the query's direct embedding; 0 pays none."""
    length_weight: float = 0.0
    """Cost of a rollout that uses its whole token budget; 0 charges nothing."""
    length_free: int = 0
    """Reasoning tokens that cost nothing."""
    graph_width: int = 16
    """Neighbors kept for each document, at most."""
    graph_links: int = 8
    """Nearest documents that each document links to."""
    refresh: dict[str, Any] = field(default_factory=dict)
    """Which documents are re-encoded, and how many: {policy, parameters of the policy}; "selective" by default."""

    @property
    def reward_terms(self) -> list[dict[str, Any]]:
        """`rewards`, or `reward` as a list."""
        return self.rewards or [{"name": self.reward}]

    def __post_init__(self) -> None:
        if self.rewards and self.reward != "dcg_scaled":
            raise InputError(f"give reward ({self.reward!r}) or rewards (a list), not both")
        WeightedRewards.from_recipe(self.reward_terms)
        self.refresh = complete_settings(self.refresh)
        for name in ("k", "candidates"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("gain_weight", "length_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{name} must be a finite number, 0 or above, got {getattr(self, name)}")
        if not (math.isfinite(self.missing_token_reward) and self.missing_token_reward < -self.length_weight):
            raise InputError(
                f"missing_token_reward must be below {-self.length_weight:g}, the worst that a rollout with the token "
                f"can earn, got {self.missing_token_reward}"
            )
        if self.length_free < 0:
            raise InputError(f"length_free must be 0 or more, got {self.length_free}")
        if not 1 <= self.graph_links <= self.graph_width:
            raise InputError(f"graph_links must be 1 to graph_width ({self.graph_width}), got {self.graph_links}")

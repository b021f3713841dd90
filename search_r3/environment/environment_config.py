"""The `environment` section of a stage 2 recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from search_r3.config import at_least, require
from search_r3.environment.refresh_policies import complete_settings
from search_r3.environment.reward_terms import WeightedRewards
from search_r3.environment.rewards import MISSING_TOKEN_REWARD
from search_r3.errors import InputError


@dataclass
class EnvironmentConfig:
    """How rollouts are rewarded, and how the corpus is kept up to date."""

    reward: str = "dcg_scaled"
    """"dcg_scaled" (the paper's DCG), "dcg" (which is nDCG@k), "margin_rank", "log_rank", or a reward added by an
    installed package; short for `rewards` with one entry."""
    rewards: list[dict[str, Any]] = field(default_factory=list)
    """Several rewards, or one with parameters, instead of `reward`: {name, weight (1 by default), parameters}."""
    k: int = 10
    """Rank cutoff of the reward."""
    candidates: int = 20
    """Number of rows from each rollout's search that are passed to the refresh policy."""
    missing_token_reward: float = MISSING_TOKEN_REWARD
    """Reward of a rollout without the embed token, or whose trace is shorter than the recipe's `min_reasoning_tokens`;
    negative, as 0 is the reward of a miss."""
    gain_weight: float = 0.0
    """Weight of the bonus for exceeding the reward of the query's direct embedding; 0 turns it off."""
    length_weight: float = 0.0
    """Cost of using the whole token budget; 0 turns it off."""
    length_free: int = 0
    """Number of reasoning tokens without a cost."""
    graph_width: int = 16
    """Maximum number of neighbors of a document in the graph."""
    graph_links: int = 8
    """Number of nearest documents that each document is linked to."""
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
        at_least(self, k=1, candidates=1, gain_weight=0, length_weight=0, length_free=0)
        worst, missing = -self.length_weight, self.missing_token_reward
        expected = f"below {worst:g}, the lowest reward with the token"
        require(-math.inf < missing < worst, "missing_token_reward", missing, expected)
        links, width = self.graph_links, self.graph_width
        require(1 <= links <= width, "graph_links", links, f"from 1 to graph_width ({width})")

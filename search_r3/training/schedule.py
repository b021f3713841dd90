"""The learning rate and the random states of a training step, as functions of the step's number."""

from __future__ import annotations

import math
import random

import numpy as np
import torch

from search_r3.training.config import LoopConfig


def learning_rate_at(step: int, config: LoopConfig) -> float:
    """The learning rate of the optimizer step with 0-based index `step`.

    A linear warm-up reaches the peak at its last step. After it, with x in [0, 1) the finished fraction of the
    remaining steps, the rate is peak * (m + (1 - m) * fall(x)), where m = min_lr_ratio and fall is (1 + cos(pi x)) / 2,
    1 - x or 1.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    fall = {"cosine": (1 + math.cos(math.pi * share)) / 2, "linear": 1 - share, "constant": 1.0}[config.schedule]
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fall)


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed Python, NumPy and torch (all devices) as a function of (seed, step, process).

    No random state has to be saved: a resumed run gets the same one, and nothing between two steps can change it.
    """
    words = np.random.SeedSequence([seed, step, process]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))

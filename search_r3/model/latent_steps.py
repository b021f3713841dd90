"""Checks for latent mode, in which queries are followed by soft tokens instead of words (LaSER, arXiv 2603.01425).

`prompts.LatentConversation` defines what is computed; `TorchEngine.embed_latent` computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from search_r3.errors import InputError
from search_r3.model.tokenization import ReadingTurn, Text

if TYPE_CHECKING:
    import numpy as np


class LatentEngine(Protocol):
    """An engine whose `EngineSpec.latent_steps` is true: it has this method in addition to those of `Engine`."""

    def embed_latent(
        self,
        prefix: Sequence[int],
        rows: list[list[int]],
        steps: int,
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Feed `steps` soft tokens after each `prefix + row`; return the unit mean of their states, float32 (N, D)."""
        ...


def has_latent(model: Any) -> bool:
    """Whether `check_latent` accepts the model."""
    spec = getattr(model, "engine_spec", None)
    return bool(getattr(model, "latent_steps", 0)) and (spec is None or spec.latent_steps)


def check_latent(model: Any, texts: Sequence[Text] = ()) -> None:
    """Check that queries can be embedded with `reasoning="latent"`.

    Args:
        model: a SearchR3; anything else has no latent mode.
        texts: the queries.

    Raises:
        InputError: the checkpoint was not trained for latent mode, the engine cannot feed soft tokens, or a query comes
            with passages.
    """
    if any(isinstance(text, ReadingTurn) for text in texts):
        raise InputError('reasoning="latent" reads no passages; embed them with reasoning True or False')
    if not getattr(model, "latent_steps", 0):
        raise InputError(
            f"{getattr(model, 'name', 'the model')} has no latent mode: it was not trained with latent_steps; search "
            "with reasoning on or off"
        )
    spec = getattr(model, "engine_spec", None)
    if spec is not None and not spec.latent_steps:
        raise InputError(f"engine {spec.name} has no latent mode; use engine torch, or search with reasoning on or off")


def latent_engine(model: Any) -> LatentEngine:
    """The engine of a model that `check_latent` accepts."""
    return cast(LatentEngine, model.engine)

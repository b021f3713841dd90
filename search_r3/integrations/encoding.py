"""What every framework's embedder shares: settings, a model that is loaded on first use, lists of floats out.

Frameworks call from several threads and know queries from documents; the model does one thing at a time, and only
queries are reasoned about.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from search_r3.errors import InputError


@dataclass(frozen=True)
class EncodingConfig:
    """How texts are embedded."""

    model: str = ""
    """What `SearchR3.from_pretrained` takes; "" is the newest adapter, else the untrained base."""
    reasoning: bool = True
    """Let the model analyse a query before it embeds it. Documents are never reasoned about."""
    max_reasoning_tokens: int = 32
    """Tokens that it may reason at most."""
    batch_size: int = 32
    """Texts in one pass; it does not change the result."""
    max_length: int | None = None
    """Tokens kept of each document; 512 by default."""
    device: str | None = None
    """ "cpu", "cuda", ...; None takes a GPU where there is one."""
    dtype: str = "auto"
    """ "auto" (float32 on a CPU, bfloat16 on a GPU), "float32" or "bfloat16"."""

    def __post_init__(self) -> None:
        if not isinstance(self.reasoning, bool):
            raise InputError(f"reasoning must be True or False, not {self.reasoning!r}")
        limits = (("max_reasoning_tokens", 0), ("batch_size", 1), ("max_length", 1))
        for name, least in limits:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InputError(f"{name} must be a whole number of {least} or more, not {value!r}")


class TextEncoder:
    """Queries and documents to lists of floats, by a SearchR3 model; safe to call from several threads.

    Args:
        config: the settings.
        loaded: a model that is loaded already; `config.model`, `device` and `dtype` are not looked at then.
    """

    def __init__(self, config: EncodingConfig, loaded: Any = None) -> None:
        self.config = config
        self._model = loaded
        self._lock = threading.Lock()

    @property
    def model(self) -> Any:
        """The SearchR3 model, loaded now if it was not yet.

        Raises:
            InputError: an unknown or damaged model, an unknown device or dtype.
        """
        with self._lock:
            if self._model is None:
                from search_r3.model.listing import default_model
                from search_r3.model.searchr3 import SearchR3

                name = self.config.model or default_model()
                self._model = SearchR3.from_pretrained(name, device=self.config.device, dtype=self.config.dtype)
            return self._model

    def queries(self, texts: Sequence[str]) -> list[list[float]]:
        """One unit vector a query, as a list of `dimension` floats. Raises InputError for an empty text."""
        model = self.model
        with self._lock:
            rows = model.encode_query(
                list(texts),
                reasoning=self.config.reasoning,
                max_reasoning_tokens=self.config.max_reasoning_tokens,
                batch_size=self.config.batch_size,
            )
        return rows.tolist()

    def documents(self, texts: Sequence[str]) -> list[list[float]]:
        """One unit vector a document, as a list of `dimension` floats. Raises InputError for an empty text."""
        model, config = self.model, self.config
        with self._lock:
            rows = model.encode_document(
                list(texts), batch_size=config.batch_size, show_progress_bar=False, max_length=config.max_length
            )
        return rows.tolist()


def split_model(model: Any) -> tuple[str, Any]:
    """What a framework's user gave as the model -> (name, loaded model or None).

    Raises:
        InputError: it is neither a name, nor a path, nor a model.
    """
    from os import PathLike, fspath

    if model is None:
        return "", None
    if isinstance(model, str | PathLike):
        return str(fspath(model)), None
    if hasattr(model, "encode_query") and hasattr(model, "encode_document"):
        return str(getattr(model, "source", getattr(model, "name", ""))), model
    raise InputError(f"model is a {type(model).__name__}; give a name, a folder, a hub id or a loaded SearchR3")

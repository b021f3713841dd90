"""The encoder shared by all framework adapters: settings, a model loaded on first use, and lists of floats as output.

Frameworks call it from several threads and distinguish queries and documents; calls to the model are serialized, and
only queries are reasoned about.
"""

from __future__ import annotations

import threading
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from search_r3.errors import InputError
from search_r3.files import expand_user

UNSEEN = frozenset({"Cc", "Cf", "Cs"})
"""Unicode categories of control characters, format characters and lone surrogates."""
MAX_NAMED = 5
"""Number of texts that a warning names."""


@dataclass(frozen=True)
class EncodingConfig:
    """How texts are embedded."""

    model: str = ""
    """Name of the model, as for `SearchR3.from_pretrained`; "" is the package's default adapter."""
    reasoning: bool = True
    """Let the model reason about a query before it embeds it. Documents are embedded directly."""
    max_reasoning_tokens: int = 32
    """Maximum number of reasoning tokens."""
    batch_size: int = 32
    """Texts per forward pass; it does not change the result."""
    max_length: int | None = None
    """Tokens kept of each document; 512 by default."""
    device: str | None = None
    """ "cpu", "cuda", ...; None uses a GPU if there is one."""
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
    """Embeds queries and documents as lists of floats with a SearchR3 model. Thread-safe.

    Pickling saves only the settings: the other process loads the model at first use, and it must be the same. A copy
    shares the model.

    Args:
        config: the settings.
        loaded: an already loaded model; `config.model`, `device` and `dtype` are then ignored.
    """

    def __init__(self, config: EncodingConfig, loaded: Any = None) -> None:
        self.config = config
        self._model = loaded
        self._given = loaded is not None
        self._engine = "auto"
        self._contract_hash: str | None = None
        self._unfindable: list[float] | None = None
        self._lock = threading.Lock()

    @property
    def model(self) -> Any:
        """The SearchR3 model, loaded on first use.

        Raises:
            InputError: the model is unknown or damaged, the device or dtype is unknown, or the model is not the one
                that was pickled.
        """
        with self._lock:
            if self._model is None:
                from search_r3.model.resolve import default_model
                from search_r3.model.searchr3 import SearchR3

                config = self.config
                name = config.model or default_model()
                model = SearchR3.from_pretrained(name, config.device, engine=self._engine, dtype=config.dtype)
                if self._contract_hash not in (None, model.contract_hash):
                    raise InputError(
                        f"{name} is another model here (contract {model.contract_hash[:12]}) than where it was pickled "
                        f"({str(self._contract_hash)[:12]}); their embeddings cannot be compared"
                    )
                self._model = model
            return self._model

    def embed_query(self, text: str) -> list[float]:
        """The unit vector of a query, as a list of `dimension` floats.

        Raises:
            InputError: it contains no visible character, or is not a string.
        """
        if isinstance(text, str) and not has_visible_character(text):
            raise InputError("the query is empty: it contains no visible character")
        (row,) = self._encode(
            [replace_lone_surrogates(text)],
            "encode_query",
            reasoning=self.config.reasoning,
            max_reasoning_tokens=self.config.max_reasoning_tokens,
        )
        return row

    def embed_documents(self, texts: Sequence[str]) -> list[list[float]]:
        """One unit vector per document, as a list of `dimension` floats.

        A text without any visible character gets a vector that no search retrieves: the negative of a full stop's, as
        all embeddings lie in one half-space (a zero vector would be closer than most by Euclidean distance). A warning
        names such texts.

        Raises:
            InputError: a text is not a string; the message names its position.
        """
        rows = self.embed_documents_or_none(texts)
        empty = [position for position, row in enumerate(rows) if row is None]
        if not empty:
            return [row for row in rows if row is not None]
        if self._unfindable is None:
            self._unfindable = [-value for value in self._encode(["."], "encode_document")[0]]
        named = ", ".join(str(position + 1) for position in empty[:MAX_NAMED]) + (
            ", ..." if len(empty) > MAX_NAMED else ""
        )
        warnings.warn(
            f"{len(empty)} of {len(rows)} texts contain no visible character (number {named}): they get a vector "
            "that no search finds",
            stacklevel=3,
        )
        return [row or list(self._unfindable) for row in rows]

    def embed_documents_or_none(self, texts: Sequence[str]) -> list[list[float] | None]:
        """`embed_documents`, with None for a text without any visible character, and no warning."""
        filled = [i for i, text in enumerate(texts) if not isinstance(text, str) or has_visible_character(text)]
        rows: list[list[float] | None] = [None] * len(texts)
        for i in filled:
            if not isinstance(texts[i], str):
                raise InputError(f"text {i + 1} of {len(texts)} is a {type(texts[i]).__name__}, not a string")
        if filled:
            chosen = [replace_lone_surrogates(texts[i]) for i in filled]
            for i, row in zip(filled, self._encode(chosen, "encode_document"), strict=True):
                rows[i] = row
        return rows

    def _encode(self, texts: list[str], method: str, **settings: Any) -> list[list[float]]:
        model, config = self.model, self.config
        if method == "encode_document":
            settings = {"show_progress_bar": False, "max_length": config.max_length}
        with self._lock:
            return getattr(model, method)(texts, batch_size=config.batch_size, **settings).tolist()

    def __deepcopy__(self, memo: Any) -> TextEncoder:
        return self

    def __copy__(self) -> TextEncoder:
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The settings without the model and the lock, and the contract hash of the model if it was loaded."""

        model, config = self._model, self.config
        state: dict[str, Any] = {"engine": self._engine, "contract_hash": self._contract_hash}
        if model is not None:
            state["contract_hash"] = model.contract_hash
        if model is not None and self._given:
            if not config.model:
                raise InputError("a model that does not say where it was loaded from cannot be pickled; give its name")
            own_precision = model.engine_spec.precision is not None
            state["engine"] = model.engine_spec.name if own_precision else "auto"
            device = str(model.checkpoint.model.device)
            config = replace(config, device=device, dtype="auto" if own_precision else model.dtype)
        config = replace(config, model=absolute_model_name(config.model))
        return state | {"config": config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]
        self._engine, self._contract_hash = state["engine"], state["contract_hash"]


def absolute_model_name(model: str) -> str:
    """The model's name in another process, which may have another working folder; "" remains the default model."""
    folder = expand_user(model)
    return str(folder.resolve()) if model and folder.is_dir() else model


def has_visible_character(text: str) -> bool:
    """Whether a text has a visible character: not a space, control or format character, or lone surrogate."""
    return any(not (char.isspace() or unicodedata.category(char) in UNSEEN) for char in text)


def replace_lone_surrogates(text: str) -> str:
    """The text with lone surrogates, which no tokenizer accepts, replaced by U+FFFD; matching pairs are joined."""
    if not isinstance(text, str) or text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def name_and_model(model: Any) -> tuple[str, Any]:
    """The model argument of an adapter as (name, loaded model or None).

    Raises:
        InputError: it is not a name, path or model.
    """
    from os import PathLike, fspath

    if model is None:
        return "", None
    if isinstance(model, str | PathLike):
        return str(fspath(model)), None
    if hasattr(model, "encode_query") and hasattr(model, "encode_document"):
        return str(getattr(model, "source", getattr(model, "name", ""))), model
    raise InputError(f"model is a {type(model).__name__}; give a name, a folder, a hub id or a loaded SearchR3")

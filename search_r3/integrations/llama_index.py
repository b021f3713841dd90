"""SearchR3 as LlamaIndex's `embed_model`: it reasons about queries and embeds texts directly.

Written against llama-index-core's `BaseEmbedding`, which distinguishes queries and texts.
"""

from __future__ import annotations

import asyncio
from typing import Any

from search_r3.errors import InputError
from search_r3.integrations.framework_encoder import EncodingConfig, TextEncoder, name_and_model
from search_r3.optional import optional_imports

with optional_imports("llama-index", "the LlamaIndex adapter"):
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from pydantic import Field, PrivateAttr


class SearchR3Embedding(BaseEmbedding):
    """A SearchR3 model as LlamaIndex's embedding.

    Example:
        >>> Settings.embed_model = SearchR3Embedding("search-r3-smollm2-135m-sft")  # doctest: +SKIP

    Args:
        model: a name, a folder, a hub id or a loaded SearchR3; None is the package's default adapter.
        reasoning, max_reasoning_tokens, max_length, device, dtype: see
            `search_r3.integrations.framework_encoder.EncodingConfig`.
        others: LlamaIndex's settings, such as embed_batch_size.

    Raises:
        InputError: a setting is invalid. The model is loaded at first use, and refused then if it is damaged.
    """

    reasoning: bool = Field(default=True, description="Reason about a query before it is embedded.")
    max_reasoning_tokens: int = Field(default=32, description="Maximum number of reasoning tokens.")
    max_length: int | None = Field(default=None, description="Tokens kept of each text.")
    device: str | None = Field(default=None, description="cpu, cuda, ...; a GPU if there is one.")
    dtype: str = Field(default="auto", description="auto, float32 or bfloat16.")

    _encoder: TextEncoder = PrivateAttr()

    def __init__(self, model: Any = None, **settings: Any) -> None:
        if unknown := sorted(settings.keys() - type(self).model_fields.keys()):
            known = ", ".join(type(self).model_fields)
            raise InputError(f"unknown setting {unknown[0]!r} of {type(self).__name__}; known are model, {known}")
        name, loaded = name_and_model(settings.pop("model_name", None) if model is None else model)
        super().__init__(**{"embed_batch_size": 32, **settings, "model_name": name})
        config = EncodingConfig(
            model=name,
            reasoning=self.reasoning,
            max_reasoning_tokens=self.max_reasoning_tokens,
            batch_size=self.embed_batch_size,
            max_length=self.max_length,
            device=self.device,
            dtype=self.dtype,
        )
        self._encoder = TextEncoder(config, loaded)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """LlamaIndex recreates the object from its fields; the encoder keeps the model, device and dtype."""
        super().__setstate__(state)
        encoder = (state.get("__pydantic_private__") or {}).get("_encoder")
        if encoder is not None:
            self._encoder = encoder

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex records it."""
        return "SearchR3Embedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._encoder.embed_query(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._encoder.embed_documents([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._encoder.embed_documents(texts)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

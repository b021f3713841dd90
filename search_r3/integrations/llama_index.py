"""SearchR3 as LlamaIndex's `embed_model`: it reasons about queries and embeds texts directly. `SearchR3Reranker` is a
postprocessor that puts retrieved nodes in a better order.

Written against llama-index-core's `BaseEmbedding`, which distinguishes queries and texts.
"""

from __future__ import annotations

import asyncio
from typing import Any

from search_r3.errors import InputError
from search_r3.integrations.document_ranker import DocumentRanker
from search_r3.integrations.framework_encoder import EncodingConfig, TextEncoder, name_and_model
from search_r3.optional import optional_imports

with optional_imports("llama-index", "the LlamaIndex adapter"):
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
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


class SearchR3Reranker(BaseNodePostprocessor):
    """Puts retrieved nodes in a better order; their scores become the relevance, 0 to 1.

    A node's text is that which LlamaIndex embeds, metadata included.

    Example:
        >>> reranker = SearchR3Reranker(reranker="cross-encoder/ms-marco-MiniLM-L6-v2", top_n=3)  # doctest: +SKIP
        >>> index.as_query_engine(similarity_top_k=20, node_postprocessors=[reranker])

    Args:
        reranker: a sentence-transformers CrossEncoder, by folder or hub id; None compares the embeddings of `model`.
        top_n: number of nodes to return; None returns all.
        model: for embeddings: a name, a folder or a hub id; None is the package's default adapter.
        reasoning, max_reasoning_tokens: for embeddings: see
            `search_r3.integrations.framework_encoder.EncodingConfig`.
        device: "cpu", "cuda", ...; None uses a GPU if there is one.

    Raises:
        InputError: a setting is invalid. Models are loaded at first use.
    """

    reranker: str | None = Field(default=None, description="A CrossEncoder, by folder or hub id.")
    top_n: int | None = Field(default=None, description="Number of nodes to return; all by default.")
    model: str | None = Field(default=None, description="The embedding model, without a reranker.")
    reasoning: bool = Field(default=True, description="Reason about the query before it is embedded.")
    max_reasoning_tokens: int = Field(default=32, description="Maximum number of reasoning tokens.")
    device: str | None = Field(default=None, description="cpu, cuda, ...; a GPU if there is one.")

    _ranker: DocumentRanker = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Set up the ranker, also of a copy that was read from JSON."""
        super().model_post_init(context)
        self._ranker = DocumentRanker(
            self.reranker,
            self.model,
            reasoning=self.reasoning,
            max_reasoning_tokens=self.max_reasoning_tokens,
            device=self.device,
        )

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex records it."""
        return "SearchR3Reranker"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise InputError("SearchR3Reranker needs the query; give query_str or query_bundle")
        texts = [one.node.get_content(metadata_mode=MetadataMode.EMBED) for one in nodes]
        ranked = self._ranker.rank(query_bundle.query_str, texts, self.top_n)
        return [NodeWithScore(node=nodes[i].node, score=relevance) for i, relevance in ranked]

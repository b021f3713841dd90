"""SearchR3 as Haystack components: `SearchR3TextEmbedder` for queries, `SearchR3DocumentEmbedder` for documents, and
`SearchR3Ranker`, which puts documents in a better order.

All can be serialized to a pipeline's YAML, so their arguments are plain values; `warm_up` loads the model.
"""

# No "from __future__ import annotations" here: Haystack reads the annotations of `run` as objects.

import warnings
from dataclasses import replace
from typing import Any, ClassVar, Self

from search_r3.errors import InputError
from search_r3.integrations.document_ranker import DocumentRanker
from search_r3.integrations.framework_encoder import MAX_NAMED, EncodingConfig, TextEncoder
from search_r3.optional import optional_imports

with optional_imports("haystack", "Haystack's components"):
    from haystack import Document, component, default_from_dict, default_to_dict


class _Embedder:
    """The serialization and warm-up of both components."""

    SETTINGS: ClassVar[tuple[str, ...]]
    """The init parameters: attributes of the component or of the encoder's configuration."""
    encoder: TextEncoder

    def to_dict(self) -> dict[str, Any]:
        """The component's init parameters, for a pipeline's YAML."""
        holders = {name: self if hasattr(self, name) else self.encoder.config for name in self.SETTINGS}
        return default_to_dict(self, **{name: getattr(holder, name) for name, holder in holders.items()})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return default_from_dict(cls, data)

    def warm_up(self) -> None:
        """Load the model. Raises InputError if it does not exist or is damaged."""
        _ = self.encoder.model


@component
class SearchR3TextEmbedder(_Embedder):
    """Embeds a query, after reasoning about it.

    Args:
        model: a name, a folder or a hub id; "" is the package's default adapter.
        reasoning, max_reasoning_tokens, device, dtype: see `search_r3.integrations.framework_encoder.EncodingConfig`.

    Raises:
        InputError: a setting is invalid.
    """

    SETTINGS = ("model", "reasoning", "max_reasoning_tokens", "device", "dtype")

    def __init__(
        self,
        model: str = "",
        reasoning: bool = True,
        max_reasoning_tokens: int = 32,
        device: str | None = None,
        dtype: str = "auto",
    ) -> None:
        config = EncodingConfig(
            model=str(model), reasoning=reasoning, max_reasoning_tokens=max_reasoning_tokens, device=device, dtype=dtype
        )
        self.encoder = TextEncoder(config)

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    def run(self, text: str) -> dict[str, Any]:
        """Embed a query; `meta` names the model and its contract. Raises InputError for a query without a visible
        character."""
        if not isinstance(text, str):
            raise InputError(
                f"SearchR3TextEmbedder takes one string, not a {type(text).__name__}; documents go to "
                "SearchR3DocumentEmbedder"
            )
        return {"embedding": self.encoder.embed_query(text), "meta": _meta(self.encoder)}


@component
class SearchR3DocumentEmbedder(_Embedder):
    """Embeds documents, without reasoning.

    Args:
        model: a name, a folder or a hub id; "" is the package's default adapter.
        batch_size, max_length, device, dtype: see `search_r3.integrations.framework_encoder.EncodingConfig`.
        meta_fields_to_embed: fields of `meta` prepended to the content, such as "title".
        embedding_separator: their separator; a space, as in the model's training and in Search-R3's own index.

    Raises:
        InputError: a setting is invalid.
    """

    SETTINGS = (
        "model",
        "batch_size",
        "max_length",
        "meta_fields_to_embed",
        "embedding_separator",
        "device",
        "dtype",
    )

    def __init__(
        self,
        model: str = "",
        batch_size: int = 32,
        max_length: int | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = " ",
        device: str | None = None,
        dtype: str = "auto",
    ) -> None:
        config = EncodingConfig(
            model=str(model), batch_size=batch_size, max_length=max_length, device=device, dtype=dtype
        )
        self.encoder = TextEncoder(config)
        self.meta_fields_to_embed = list(meta_fields_to_embed or [])
        self.embedding_separator = embedding_separator

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Copies of the documents with their embeddings; the originals are unchanged.

        A document that has no text to embed (its content is None or has no visible character) is passed on without an
        embedding, and a warning names it.

        Raises:
            InputError: `documents` is not a list of documents.
        """
        if not isinstance(documents, list) or any(not isinstance(document, Document) for document in documents):
            raise InputError("SearchR3DocumentEmbedder takes a list of Documents; a query goes to SearchR3TextEmbedder")
        rows = self.encoder.embed_documents_or_none([self._text(document) for document in documents])
        if empty := [document.id for document, row in zip(documents, rows, strict=True) if row is None]:
            named = ", ".join(empty[:MAX_NAMED]) + (", ..." if len(empty) > MAX_NAMED else "")
            warnings.warn(
                f"{len(empty)} of {len(documents)} documents have no text to embed and are passed on without an "
                f"embedding: {named}",
                stacklevel=2,
            )
        embedded = [replace(document, embedding=row) for document, row in zip(documents, rows, strict=True)]
        return {"documents": embedded, "meta": _meta(self.encoder)}

    def _text(self, document: Document) -> str:
        return _text_of(document, self.meta_fields_to_embed, self.embedding_separator)


@component
class SearchR3Ranker:
    """Puts documents in a better order for a query, by a cross-encoder or by embeddings.

    Args:
        reranker: a sentence-transformers CrossEncoder, by folder or hub id; None compares the embeddings of `model`.
        top_k: number of documents to return; None returns all.
        model: for embeddings: a name, a folder or a hub id; "" is the package's default adapter.
        reasoning, max_reasoning_tokens: for embeddings: see
            `search_r3.integrations.framework_encoder.EncodingConfig`.
        meta_fields_to_embed: fields of `meta` prepended to the content, such as "title".
        embedding_separator: their separator.
        device: "cpu", "cuda", ...; None uses a GPU if there is one.

    Raises:
        InputError: a setting is invalid.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = (
        "reranker", "top_k", "model", "reasoning", "max_reasoning_tokens", "meta_fields_to_embed",
        "embedding_separator", "device",
    )  # fmt: skip

    def __init__(
        self,
        reranker: str | None = None,
        top_k: int | None = None,
        model: str = "",
        reasoning: bool = True,
        max_reasoning_tokens: int = 32,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = " ",
        device: str | None = None,
    ) -> None:
        self.reranker, self.top_k, self.model = reranker, top_k, str(model)
        self.reasoning, self.max_reasoning_tokens, self.device = reasoning, max_reasoning_tokens, device
        self.meta_fields_to_embed = list(meta_fields_to_embed or [])
        self.embedding_separator = embedding_separator
        self.ranker = DocumentRanker(
            reranker, self.model, reasoning=reasoning, max_reasoning_tokens=max_reasoning_tokens, device=device
        )

    def to_dict(self) -> dict[str, Any]:
        """The component's init parameters, for a pipeline's YAML."""
        return default_to_dict(self, **{name: getattr(self, name) for name in self.SETTINGS})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return default_from_dict(cls, data)

    def warm_up(self) -> None:
        """Load the model. Raises InputError if it does not exist, or is no cross-encoder."""
        _ = self.ranker.reranker if self.reranker is not None else self.ranker.encoder.model

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, Any]:
        """Copies of the best documents, best first; `score` is the relevance, 0 to 1. The originals are unchanged.

        Raises:
            InputError: the query has no visible character, or `top_k` is below 1.
        """
        texts = [_text_of(document, self.meta_fields_to_embed, self.embedding_separator) for document in documents]
        ranked = self.ranker.rank(query, texts, self.top_k if top_k is None else top_k)
        return {"documents": [replace(documents[i], score=relevance) for i, relevance in ranked]}


def _text_of(document: Document, fields: list[str], separator: str) -> str:
    values = [document.meta.get(name) for name in fields]
    return separator.join([str(value) for value in values if value is not None] + [document.content or ""])


def _meta(encoder: TextEncoder) -> dict[str, Any]:
    return {"model": encoder.model.name, "contract_hash": encoder.model.contract_hash}

"""SearchR3 for LangChain: `SearchR3Embeddings` for any vector store, `SearchR3Retriever` for a Search-R3 index, and
`SearchR3Reranker` for documents that any retriever found.

The first two pass `langchain-tests`' standard suites (https://docs.langchain.com/oss/python/contributing/standard-tests-langchain).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from search_r3.integrations.document_ranker import DocumentRanker
from search_r3.integrations.framework_encoder import EncodingConfig, TextEncoder, name_and_model
from search_r3.integrations.index_searcher import IndexSearcher
from search_r3.optional import optional_imports

with optional_imports("langchain", "the LangChain adapter"):
    from langchain_core.callbacks import CallbackManagerForRetrieverRun, Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.retrievers import BaseRetriever
    from pydantic import ConfigDict, PrivateAttr


class SearchR3Embeddings(Embeddings):
    """A SearchR3 model as LangChain's `Embeddings`; queries are reasoned about first, documents are not.

    It can be pickled and copied; the model is loaded again in another process.

    Example:
        >>> embeddings = SearchR3Embeddings("search-r3-smollm2-135m-sft", reasoning=False)  # doctest: +SKIP
        >>> embeddings.embed_query("how do I delete a folder")

    Args:
        model: a name, a folder, a hub id or a loaded SearchR3; None is the package's default adapter.
        settings: the fields of `search_r3.integrations.framework_encoder.EncodingConfig`: reasoning,
            max_reasoning_tokens, batch_size, max_length, device, dtype.

    Raises:
        InputError: a setting is invalid. The model is loaded at first use, and refused then if it is damaged.
    """

    def __init__(self, model: Any = None, **settings: Any) -> None:
        name, loaded = name_and_model(model)
        self.encoder = TextEncoder(EncodingConfig(model=name, **settings), loaded)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One unit vector per text; a text without a visible character gets a vector that no search retrieves, and a
        warning names it."""
        return self.encoder.embed_documents(texts)

    def embed_query(self, text: str) -> list[float]:
        """The unit vector of a query. Raises InputError for one without a visible character."""
        return self.encoder.embed_query(text)


class SearchR3Retriever(BaseRetriever):
    """A `search-r3` index as a LangChain retriever. Its documents are chunks; `metadata` gives their locations.

    `metadata` has the document's fields, overridden by document, title, path, start_line, end_line and score.

    Example:
        >>> retriever = SearchR3Retriever(index="notes-index", k=3)  # doctest: +SKIP
        >>> retriever.invoke("where did we decide on the license", where="path LIKE '%.md'")
        >>> retriever.invoke("its license", reasoning_text="The license of the project is chosen in its first meeting.")

    `invoke(query, reasoning_text=...)` embeds the query with an agent's own reasoning, in place of the model's.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())

    index: str | Path
    """The index's folder, made by `search-r3 index`, or its location on object storage ("s3://bucket/name")."""
    model: Any = None
    """The index's model, if the name recorded in the index does not work; or a loaded SearchR3."""
    k: int = 5
    """Number of chunks; `invoke(query, k=...)` overrides it."""
    mode: Literal["hybrid", "vector", "text"] = "hybrid"
    """Search by vectors and words, by vectors, or by words."""
    vector_weight: float | None = None
    """Weight of the vectors in a hybrid search, 0 to 1; the rest is the weight of the words. None: as `search-r3 tune`
    stored it with the index, else 0.65."""
    reasoning: bool | Literal["auto", "latent"] = True
    """Whether the model reasons about the query first; "auto" does so if its rule expects that to help."""
    max_reasoning_tokens: int = 32
    """Maximum number of reasoning tokens."""
    read: int = 0
    """Embed the query again with the first so many hits of a direct search, if the model was trained to read."""
    hops: int = 1
    """With `read`: 2 reads, searches, and reads again before the last search."""
    where: str | None = None
    """An SQL condition on the metadata, see `search-r3 search --help`."""
    device: str | None = None
    """ "cpu", "cuda", ...; None uses a GPU if there is one."""
    dtype: str = "auto"
    """See `SearchR3.from_pretrained`."""

    _searcher: IndexSearcher = PrivateAttr()

    def __init__(self, **settings: Any) -> None:
        """Open the index; raises InputError if it does not exist. The model is loaded at the first search."""
        super().__init__(**settings)
        index = settings[
            "index"
        ]  # the argument itself: pydantic would turn a location with storage options into a plain string
        self._searcher = IndexSearcher(index, self.model, device=self.device, dtype=self.dtype)

    def __getstate__(self) -> dict[Any, Any]:
        """A loaded model is loaded again by name in the process that unpickles."""
        state = super().__getstate__()
        fields = dict(state["__dict__"])
        fields["model"] = name_and_model(fields["model"])[0] or None
        return state | {"__dict__": fields}

    def __deepcopy__(self, memo: Any = None) -> SearchR3Retriever:
        """A copy that shares index and model."""
        return self.model_copy()

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        where: str | None = None,
        reasoning: bool | Literal["auto", "latent"] | None = None,
        reasoning_text: str | None = None,
        read: int | None = None,
    ) -> list[Document]:
        if reasoning is None:
            reasoning = self.reasoning if reasoning_text is None else True
        result = self._searcher.search(
            query,
            k=self.k if k is None else k,
            mode=self.mode,
            vector_weight=self.vector_weight,
            reasoning=reasoning,
            max_reasoning_tokens=self.max_reasoning_tokens,
            reasoning_text=reasoning_text,
            read=self.read if read is None else read,
            hops=self.hops,
            where=self.where if where is None else where,
        )
        return [Document(page_content=hit.text, id=hit.id, metadata=_metadata(hit)) for hit in result.hits]


class SearchR3Reranker(BaseDocumentCompressor):
    """Puts retrieved documents in a better order, for LangChain's `ContextualCompressionRetriever` or by itself.

    A document's `metadata` gets `relevance_score`, 0 to 1; the documents that were given stay as they are.

    Example:
        >>> reranker = SearchR3Reranker(reranker="cross-encoder/ms-marco-MiniLM-L6-v2", top_n=3)  # doctest: +SKIP
        >>> reranker.compress_documents(documents, "how do I delete a folder")
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())

    reranker: Any = None
    """A sentence-transformers CrossEncoder, by folder or hub id; None compares the embeddings of `model`."""
    top_n: int | None = None
    """Number of documents to return; None returns all."""
    model: Any = None
    """For embeddings: a name, a folder, a hub id or a loaded SearchR3; None is the package's default adapter."""
    reasoning: bool = True
    """For embeddings: whether the model reasons about the query first."""
    max_reasoning_tokens: int = 32
    """Maximum number of reasoning tokens."""
    device: str | None = None
    """ "cpu", "cuda", ...; None uses a GPU if there is one."""

    _ranker: DocumentRanker = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Raises InputError for an invalid setting. Models are loaded at first use."""
        self._ranker = DocumentRanker(
            self.reranker,
            self.model,
            reasoning=self.reasoning,
            max_reasoning_tokens=self.max_reasoning_tokens,
            device=self.device,
        )

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The best `top_n` documents, best first. Raises InputError for a query without a visible character."""
        ranked = self._ranker.rank(query, [document.page_content for document in documents], self.top_n)
        return [
            documents[i].model_copy(update={"metadata": {**documents[i].metadata, "relevance_score": relevance}})
            for i, relevance in ranked
        ]


def _metadata(hit: Any) -> dict[str, Any]:
    fields = ("document", "title", "path", "start_line", "end_line", "score")
    return {**hit.metadata, **{name: getattr(hit, name) for name in fields}}

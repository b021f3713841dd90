"""The bodies of responses as pydantic models, by which FastAPI describes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from search_r3.index.run_search import MAX_HOPS
from search_r3.server.embedding_types import EmbeddingType


class Answer(BaseModel):
    """A response's body. The model only describes it: it is written as a dictionary, which is faster."""

    model_config = ConfigDict(extra="forbid")


_NAME = "search-r3-smollm2-135m-v2"


def _like(example: dict[str, Any]) -> ConfigDict:
    """The configuration of a body with an example, for the API page."""
    return ConfigDict(extra="forbid", json_schema_extra={"example": example})


Count = Annotated[int, Field(ge=0)]
RerankerKind = Annotated[
    Literal["cross-encoder", "embeddings"],
    Field(
        description="what reranks: a model that reads query and document together, or, if the server has none, the "
        "cosine of this model's embeddings"
    ),
]


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: Annotated[str, Field(description="an identifier for programs")]


class Error(Answer):
    """An error in OpenAI's form."""

    model_config = _like(
        {
            "error": {
                "message": "the query is empty; give some words",
                "type": "invalid_request_error",
                "param": "query",
                "code": "invalid_value",
            }
        }
    )

    error: ErrorDetail


class Health(Answer):
    model_config = _like({"status": "ready", "reason": None, "model": _NAME, "index": True, "in_flight": 0})

    status: Literal["ready", "loading", "terminating", "stopping", "failed", "index_unavailable"]
    reason: Annotated[
        str | None, Field(description="why not ready, or a warning; null without a key if the server has keys")
    ]
    model: str | None
    index: bool
    in_flight: Annotated[Count, Field(description="requests waiting or being answered")]


class Alive(Answer):
    model_config = _like({"status": "alive"})

    status: Literal["alive"]


_MODEL = {"id": _NAME, "object": "model", "created": 0, "owned_by": "search-r3", "dimension": 576,
          "dimensions": [576], "contract_hash": "9f2c4e", "adaptive": False, "latent": False,
          "reading": 0, "reranker": "ms-marco-MiniLM-L6-v2", "reranker_kind": "cross-encoder"}  # fmt: skip


class Model(Answer):
    """OpenAI's fields, and properties of the model's vectors."""

    model_config = _like(_MODEL)

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    dimension: Count
    dimensions: Annotated[list[Count], Field(description="allowed values of `dimensions`")]
    contract_hash: Annotated[str, Field(description="vectors with equal hashes can be compared")]
    adaptive: Annotated[bool, Field(description='whether reasoning may be "auto"')]
    latent: Annotated[bool, Field(description='whether reasoning may be "latent"')]
    reading: Annotated[
        Count, Field(description="how many passages the model was trained to read in a search; 0: it cannot read")
    ]
    reranker: Annotated[str, Field(description="the model of /v1/rerank")]
    reranker_kind: RerankerKind


class Models(Answer):
    model_config = _like({"object": "list", "data": [_MODEL]})

    object: Literal["list"]
    data: list[Model]


class Usage(Answer):
    prompt_tokens: Annotated[Count, Field(description="tokens of the texts, as far as they were read")]
    completion_tokens: Annotated[Count, Field(description="tokens of reasoning")]
    total_tokens: Count


class SearchUsage(Usage):
    truncated_texts: Annotated[Count, Field(description="1 if only a part of the query was read")]


class EmbeddingsUsage(Usage):
    truncated_texts: Annotated[Count, Field(description="texts of which only a part was read")]
    split_texts: Annotated[Count, Field(description="documents that were embedded in parts")]


_Numbers = list[float] | Annotated[str, Field(description="base64 of float32, little-endian")]


class Embedding(Answer):
    object: Literal["embedding"]
    index: Count
    embedding: Annotated[
        _Numbers | dict[EmbeddingType, _Numbers],
        Field(
            description="whole numbers with `int8` and `uint8`; with `binary` and `ubinary` an eighth as many; an "
            "object with one embedding of each type if `embedding_types` was sent"
        ),
    ]


class Embeddings(Answer):
    model_config = _like(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": [0.021, -0.043, 0.008]}],
            "model": _NAME,
            "usage": {
                "prompt_tokens": 9,
                "completion_tokens": 0,
                "total_tokens": 9,
                "truncated_texts": 0,
                "split_texts": 0,
            },
        }
    )

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


class Reranked(Answer):
    index: Annotated[Count, Field(description="the document's place in the request, from 0")]
    relevance_score: Annotated[
        float, Field(ge=0, le=1, description="higher is better; comparable only within one model")
    ]
    document: Annotated[dict[str, Any] | None, Field(description="with `return_documents`: its text and fields")] = None


class Reranking(Answer):
    model_config = _like(
        {
            "object": "list",
            "model": "ms-marco-MiniLM-L6-v2",
            "kind": "cross-encoder",
            "results": [{"index": 1, "relevance_score": 0.93}, {"index": 0, "relevance_score": 0.02}],
            "usage": {"prompt_tokens": 24, "completion_tokens": 0, "total_tokens": 24},
        }
    )

    object: Literal["list"]
    model: str
    kind: RerankerKind
    results: Annotated[list[Reranked], Field(description="best first")]
    usage: Usage


class TeiEmbeddings(RootModel[list[list[float]]]):
    """One unit vector for each text."""

    model_config = ConfigDict(json_schema_extra={"example": [[0.021, -0.043, 0.008]]})


class TeiRank(Answer):
    index: Count
    score: float
    text: str | None = None


class TeiRanks(RootModel[list[TeiRank]]):
    """The texts, best first."""

    model_config = ConfigDict(json_schema_extra={"example": [{"index": 1, "score": 0.93}, {"index": 0, "score": 0.02}]})


class TeiInfo(Answer):
    """What a client of Text Embeddings Inference asks for first."""

    model_config = ConfigDict(
        extra="forbid",
        protected_namespaces=(),
        json_schema_extra={
            "example": {
                "model_id": _NAME,
                "model_sha": None,
                "model_dtype": "float32",
                "model_type": {"embedding": {"pooling": "last_token"}},
                "max_concurrent_requests": 256,
                "max_input_length": 512,
                "max_batch_tokens": 300_000,
                "max_client_batch_size": 2048,
                "auto_truncate": True,
                "version": "0.1.0",
                "reranker_id": "ms-marco-MiniLM-L6-v2",
            }
        },
    )

    model_id: str
    model_sha: None
    model_dtype: str
    model_type: dict[str, dict[str, str]]
    max_concurrent_requests: Count
    max_input_length: Annotated[Count, Field(description="tokens that are read of one text")]
    max_batch_tokens: Annotated[Count, Field(description="tokens of one request")]
    max_client_batch_size: Annotated[Count, Field(description="texts of one request")]
    auto_truncate: Annotated[bool, Field(description="whether longer texts are truncated unless a request says so")]
    version: str
    reranker_id: Annotated[str, Field(description="what /rerank uses")]


class Hit(Answer):
    """A chunk that was found."""

    id: str
    document: str
    title: str
    text: str
    snippet: str
    highlights: Annotated[list[tuple[Count, Count]], Field(description="(start, end) in the snippet, in characters")]
    snippet_line: int
    score: float
    metadata: dict[str, str | float | bool | None]
    path: str
    start_line: int
    end_line: int
    ranks: dict[str, float]
    scores: dict[str, float]


class ReasoningTrace(Answer):
    text: str
    num_tokens: Count
    forced: Annotated[bool, Field(description="whether it was cut off at the budget")]


class ReadPassage(Answer):
    """A chunk that the query was embedded together with."""

    id: str
    document: str
    title: str
    text: Annotated[str, Field(description="the part that was read, the title first")]
    path: str
    start_line: int
    hop: Annotated[int, Field(ge=1, le=MAX_HOPS)]


class EqualPassage(Answer):
    id: str
    document: str
    path: str
    start_line: int


class HitExplanation(Answer):
    marks: Annotated[
        list[tuple[Count, Count, Literal["question", "reasoning"]]],
        Field(description="(start, end, whose word it is) in the hit's text, in characters"),
    ]
    snippet_marks: Annotated[
        list[tuple[Count, Count, Literal["question", "reasoning"]]], Field(description="the same in the snippet")
    ]
    snippet_span: Annotated[tuple[Count, Count], Field(description="(start, end) of the snippet in the hit's text")]
    weak: Annotated[
        bool, Field(description="its cosine is below the floor, and it has fewer than half of the question's words")
    ]
    same: Annotated[list[EqualPassage], Field(description="passages of other documents with the same text")]


class Explanation(Answer):
    hits: Annotated[list[HitExplanation], Field(description="for each hit, in their order")]
    floor: Annotated[
        float | None, Field(description="the cosine that unrelated questions reach in this index, if it was measured")
    ]
    missing_words: Annotated[list[str], Field(description="words of the query that no passage of the index has")]


class Timings(Answer):
    """Milliseconds."""

    reason_ms: float
    search_ms: float


_HIT = {"id": "tides.md", "document": "tides.md", "title": "Tides", "text": "The moon pulls the sea.",
        "snippet": "The moon pulls the sea.", "highlights": [[4, 8]], "snippet_line": 3, "score": 0.0325,
        "metadata": {}, "path": "tides.md", "start_line": 1, "end_line": 3, "ranks": {"vector": 1, "text": 2},
        "scores": {"vector": 0.742, "text": 5.81}}  # fmt: skip


class SearchResult(Answer):
    model_config = _like({"query": "what does the moon do", "mode": "hybrid", "hits": [_HIT],
                          "reasoning": {"text": "moon, tide, sea", "num_tokens": 6, "forced": False},
                          "timings": {"reason_ms": 148.2, "search_ms": 6.1}, "read": [],
                          "normalized_query": "What does the moon do",
                          "index": "notes-index", "model": _NAME,
                          "usage": {"prompt_tokens": 12, "completion_tokens": 6, "total_tokens": 18,
                                    "truncated_texts": 0},
                          "remembered_ms": None})  # fmt: skip

    query: str
    mode: str
    hits: list[Hit]
    reasoning: ReasoningTrace | None
    timings: Timings
    read: list[ReadPassage]
    explanation: Annotated[Explanation | None, Field(description="with `explain`")] = None
    normalized_query: Annotated[
        str | None,
        Field(
            description="what was embedded in place of the query, with typos corrected and case restored; null if the "
            "query was embedded as it is, or not at all"
        ),
    ]
    index: Annotated[str, Field(description="the name of the index that was searched")]
    model: str
    usage: SearchUsage
    remembered_ms: Annotated[
        float | None,
        Field(
            description="if the reasoning was remembered from an earlier question: what question, reasoning and "
            "embedding took then, in milliseconds"
        ),
    ]


class Event(BaseModel):
    """A server-sent event."""

    event: Literal["reasoning", "result", "error"]
    data: Annotated[str, Field(json_schema_extra={"contentMediaType": "application/json"})]


class ListedDocument(Answer):
    object: Literal["document"]
    id: str
    title: str
    path: str


class Documents(Answer):
    model_config = _like(
        {
            "object": "list",
            "total": 2,
            "has_more": False,
            "data": [{"object": "document", "id": "tides.md", "title": "Tides", "path": "tides.md"}],
        }
    )

    object: Literal["list"]
    data: list[ListedDocument]
    total: Count
    has_more: bool


class ServedIndex(Answer):
    object: Literal["index"]
    name: str
    available: Annotated[bool, Field(description="whether it can be searched now")]
    chunks: Annotated[Count | None, Field(description="null while it is not available")]


class Indexes(Answer):
    """The first is the default."""

    model_config = _like(
        {"object": "list", "data": [{"object": "index", "name": "notes-index", "available": True, "chunks": 919}]}
    )

    object: Literal["list"]
    data: list[ServedIndex]


class CountedDocuments(Answer):
    name: str
    documents: Count


class IndexOverview(Answer):
    model_config = _like(
        {
            "name": "notes-index",
            "created": "2026-01-31T12:00:00+00:00",
            "chunks": 919,
            "documents": 230,
            "folders": [{"name": "docs/", "documents": 18}],
            "types": [{"name": ".md", "documents": 212}],
            "headings": ["How are versions numbered"],
        }
    )

    name: str
    created: Annotated[str, Field(description="when the index was made, UTC in ISO 8601")]
    chunks: Count
    documents: Annotated[Count | None, Field(description="null in an index so large that they are not counted here")]
    folders: Annotated[list[CountedDocuments], Field(description="outermost folders that differ, largest first")]
    types: Annotated[list[CountedDocuments], Field(description="suffixes of files, most frequent first")]
    headings: Annotated[list[str], Field(description="headings of up to three documents, to ask about")]


class AddedDocument(Answer):
    object: Literal["document"]
    id: str


class Added(Answer):
    model_config = _like({"object": "list", "data": [{"object": "document", "id": "license"}], "chunks": 1})

    object: Literal["list"]
    data: list[AddedDocument]
    chunks: Count


class Deleted(Answer):
    model_config = _like({"object": "document", "id": "license", "deleted": True, "chunks": 1})

    object: Literal["document"]
    id: str
    deleted: Literal[True]
    chunks: Count

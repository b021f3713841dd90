"""The bodies of responses as pydantic models, by which FastAPI describes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from search_r3.index.run_search import MAX_HOPS


class Answer(BaseModel):
    """A response's body. The model only describes it: it is written as a dictionary, which is faster."""

    model_config = ConfigDict(extra="forbid")


Count = Annotated[int, Field(ge=0)]


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: Annotated[str, Field(description="an identifier for programs")]


class Error(Answer):
    """An error in OpenAI's form."""

    error: ErrorDetail


class Health(Answer):
    status: Literal["ready", "loading", "terminating", "stopping", "failed", "index_unavailable"]
    reason: Annotated[
        str | None, Field(description="why not ready, or a warning; null without a key if the server has keys")
    ]
    model: str | None
    index: bool
    in_flight: Annotated[Count, Field(description="requests waiting or being answered")]


class Alive(Answer):
    status: Literal["alive"]


class Model(Answer):
    """OpenAI's fields, and properties of the model's vectors."""

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


class Models(Answer):
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


class Embedding(Answer):
    object: Literal["embedding"]
    index: Count
    embedding: list[float] | Annotated[str, Field(description="base64 of float32, little-endian")]


class Embeddings(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


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


class SearchResult(Answer):
    query: str
    mode: str
    hits: list[Hit]
    reasoning: ReasoningTrace | None
    timings: Timings
    read: list[ReadPassage]
    explanation: Annotated[Explanation | None, Field(description="with `explain`")] = None
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
    object: Literal["list"]
    data: list[ListedDocument]
    total: Count
    has_more: bool


class CountedDocuments(Answer):
    name: str
    documents: Count


class IndexOverview(Answer):
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
    object: Literal["list"]
    data: list[AddedDocument]
    chunks: Count


class Deleted(Answer):
    object: Literal["document"]
    id: str
    deleted: Literal[True]
    chunks: Count

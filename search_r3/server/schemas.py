"""The bodies of requests as pydantic models, which validate them; those of responses are in `response_schemas`.

Types are strict: "1" is not a number, 1 is not a boolean. Rules that are known only at run time (a server's limits, its
model's vocabulary, its index's columns) are checked where they are used; `openapi` adds them to the named types
(`TokenId`, `Filter`, ...) of the description.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from typing_extensions import TypeAliasType

from search_r3.index.run_search import MAX_HITS, MAX_HOPS, MAX_QUERY_CHARACTERS, Mode
from search_r3.model.reading import MAX_PASSAGES
from search_r3.model.tokenization import MAX_CHARACTERS
from search_r3.rank_fusion import VECTOR_WEIGHT, Fusion
from search_r3.server.embedding_types import EMBEDDING_TYPES, EmbeddingType
from search_r3.server.where_filter import MAX_FILTER_CHARACTERS

VISIBLE = "[^\\u0000-\\u0020\\u007f-\\u00a0\\u00ad\\u1680\\u2000-\\u200f\\u2028-\\u202f\\u205f-\\u206f\\u3000\\ufeff]"
"""A text must contain such a character: not a space, control or zero-width character."""
FIELD_NAME = "^[a-z][a-z0-9_]{0,63}$"
MAX_NUMBER = 10**15
MAX_FIELDS = 50
MAX_DOCUMENT_CHARACTERS = 1_000_000
MAX_TITLE_CHARACTERS = 1000
MAX_ID_CHARACTERS = 4096  # the longest path of a file, as paths are ids
PAGE, MAX_PAGE = 100, 1000
_FIELD_NAME = re.compile(FIELD_NAME.replace("$", "\\Z"))


class Strict(BaseModel):
    """A request's body: no conversions, no unknown fields, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _in_one_line(message: str) -> WrapValidator:
    """The type's validation with a single message for all of its alternatives."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(message) from None

    return WrapValidator(check)


def _field_name(name: str) -> str:
    if not _FIELD_NAME.match(name):
        raise ValueError(
            f"the field {name[:64]!a} is not allowed; names consist of lower-case letters, digits and _, begin with a "
            "letter, and have at most 64 characters"
        )
    return name


def _metadata(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError('metadata must be an object of text, numbers, true or false, as in {"lang": "en"}')
    return value


def _no_reasoning(value: Any) -> Any:
    if value is not None and value is not False:
        raise ValueError('documents are embedded without reasoning; set "input_type": "query"')
    return value


def _alone(value: Any) -> list[Any]:
    return [value]


def _form_of_input(value: Any) -> str | None:
    """The tag of OpenAI's form of `input`, by its first item."""
    if isinstance(value, str):
        return "[text]"
    if not isinstance(value, list) or not value:
        return None
    return "[texts]" if isinstance(value[0], str) else "[token lists]" if isinstance(value[0], list) else "[tokens]"


ModelName = TypeAliasType("ModelName", str)
Dimensions = TypeAliasType("Dimensions", int)
TokenId = TypeAliasType("TokenId", Annotated[int, Field(ge=0)])
IndexName = TypeAliasType("IndexName", str)
Filter = TypeAliasType("Filter", Annotated[str, Field(max_length=MAX_FILTER_CHARACTERS)])
Reasoning = TypeAliasType(
    "Reasoning",
    Annotated[
        bool | Annotated[int, Field(ge=0)] | Literal["auto", "latent"],
        _in_one_line('expected true, false, "auto", "latent", or a number of tokens from 0'),
    ],
)
ReasoningText = Annotated[str, Field(max_length=MAX_CHARACTERS)]
ReasoningTexts = TypeAliasType("ReasoningTexts", Annotated[list[ReasoningText], Field(min_length=1, fail_fast=True)])
TruncateTokens = TypeAliasType("TruncateTokens", Annotated[int, Field(ge=1)])
RerankModelName = TypeAliasType("RerankModelName", str)
Rerank = TypeAliasType("Rerank", Annotated[int, Field(ge=0, le=MAX_HITS)])
Read = TypeAliasType("Read", Annotated[int, Field(ge=0, le=MAX_PASSAGES)])
Text = Annotated[str, Field(pattern=VISIBLE)]
QueryText = Annotated[str, Field(pattern=VISIBLE, max_length=MAX_CHARACTERS)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = TypeAliasType("Texts", Annotated[list[Text], Field(min_length=1, fail_fast=True)])
QueryTexts = TypeAliasType("QueryTexts", Annotated[list[QueryText], Field(min_length=1, fail_fast=True)])
TokenLists = TypeAliasType("TokenLists", Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)])
_OneList = Annotated[TokenIds, AfterValidator(_alone), Tag("[tokens]")]
_Lists = Annotated[TokenLists, Tag("[token lists]")]
_INPUT = Field(
    description="a text, texts, token ids of this model, or several lists of them; `too_long` says what happens to a "
    "text of more tokens than the server reads"
)
_FORM = Discriminator(
    _form_of_input,
    custom_error_type="input_form",
    custom_error_message="give a text, or a list of texts, of token ids, or of lists of token ids, that is not empty",
)


QueryTooLong = Annotated[
    Literal["error", "truncate"] | None,
    _in_one_line('expected "error" or "truncate"; only documents are split'),
    Field(description="what happens to a query of more tokens than the server reads; by default as it was started"),
]


ChosenIndex = Annotated[
    IndexName | None, Field(description="one of the indexes that are served; by default the first of them")
]


class _EmbeddingRequest(Strict):
    model: ModelName
    encoding_format: Annotated[
        EmbeddingType | None,
        _in_one_line(f"expected one of {', '.join(EMBEDDING_TYPES)}"),
        Field(
            description="numbers, base64 of float32, numbers rounded to float16, or as sentence-transformers' "
            "quantize_embeddings: int8 and uint8 with the ranges -1 to 1, binary (in int8) and ubinary (in uint8) are "
            "the signs of the values, 8 in a number"
        ),
    ] = "float"
    embedding_types: Annotated[
        Annotated[list[EmbeddingType], Field(min_length=1, max_length=len(EMBEDDING_TYPES))] | None,
        _in_one_line(f"expected a list of {', '.join(EMBEDDING_TYPES)}"),
        Field(description="as in Cohere's embed: `embedding` is then an object with each of these types"),
    ] = None
    dimensions: Dimensions | None = None
    truncate: Annotated[
        bool | None,
        Field(description="as in Text Embeddings Inference: true is `too_long` truncate, false is error"),
    ] = None
    truncate_prompt_tokens: Annotated[
        Literal[-1] | TruncateTokens | None,
        _in_one_line("expected a number of tokens from 1, or -1 for the most that the server reads"),
        Field(description="as in vLLM: read so many tokens of a longer text; -1 is the most that the server reads"),
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"] | None,
        _in_one_line('expected "left" or "right"'),
        Field(description="as in vLLM, if a text is truncated: right keeps its first tokens, left its last ones"),
    ] = None
    user: Annotated[str | None, Field(description="ignored")] = None


class DocumentEmbeddings(_EmbeddingRequest):
    """POST /v1/embeddings for documents. `input` becomes a list of texts, or of lists of token ids."""

    input: Annotated[
        Annotated[Text, AfterValidator(_alone), Tag("[text]")] | Annotated[Texts, Tag("[texts]")] | _OneList | _Lists,
        _FORM,
        _INPUT,
    ]
    input_type: Annotated[Literal["document"] | None, _in_one_line('expected "document" or "query"')] = "document"
    too_long: Annotated[
        Literal["error", "truncate", "split"] | None,
        _in_one_line('expected "error", "truncate" or "split"'),
        Field(
            description="what happens to a longer text: it is refused, truncated, or embedded in parts, whose mean is "
            "its embedding; by default as the server was started"
        ),
    ] = None
    reasoning: Annotated[Literal[False] | None, BeforeValidator(_no_reasoning)] = None


class QueryEmbeddings(_EmbeddingRequest):
    """POST /v1/embeddings for queries. `input` becomes a list of texts, or of lists of token ids."""

    input: Annotated[
        Annotated[QueryText, AfterValidator(_alone), Tag("[text]")]
        | Annotated[QueryTexts, Tag("[texts]")]
        | _OneList
        | _Lists,
        _FORM,
        _INPUT,
    ]
    input_type: Literal["query"]
    too_long: QueryTooLong = None
    reasoning: Reasoning | None = False
    reasoning_text: Annotated[
        ReasoningText | ReasoningTexts | None,
        _in_one_line(
            f"expected a text, or a list of one text for each query, of at most {MAX_CHARACTERS:,} characters each"
        ),
        Field(
            description="reasoning about each query in your own words, which the model reads (up to 512 tokens) in "
            "place of its own; reasoning must then be true, or omitted"
        ),
    ] = None


def _kind_of_embeddings(value: Any) -> str:
    return "[query]" if isinstance(value, dict) and value.get("input_type") == "query" else "[document]"


EmbeddingRequest = Annotated[
    Annotated[DocumentEmbeddings, Tag("[document]")] | Annotated[QueryEmbeddings, Tag("[query]")],
    Discriminator(_kind_of_embeddings),
]


class SearchRequest(Strict):
    """POST /v1/search."""

    query: Annotated[str, Field(pattern=VISIBLE, max_length=MAX_QUERY_CHARACTERS)]
    index: ChosenIndex = None
    k: Annotated[int, Field(ge=1, le=MAX_HITS)] = 10
    mode: Mode = "hybrid"
    vector_weight: Annotated[
        Annotated[float, Field(ge=0, le=1)] | None,
        Field(
            description="the weight of the vectors in a hybrid search; the words have the rest. By default as "
            f"`search-r3 tune` stored it with the index, else {VECTOR_WEIGHT}"
        ),
    ] = None
    fusion: Annotated[
        Fusion | None,
        _in_one_line(f"expected one of {', '.join(get_args(Fusion))}"),
        Field(
            description="how a hybrid search fuses its lists; dbsf: distribution-based, rsf: relative score fusion, "
            "rrf: by reciprocal rank, without a weight. By default as tuned, else linear"
        ),
    ] = None
    reasoning_words: Annotated[
        bool | None,
        Field(
            description="search for the words of the reasoning too, in a hybrid search; by default as tuned, else false"
        ),
    ] = None
    reasoning: Reasoning = True
    reasoning_text: Annotated[
        ReasoningText | None,
        Field(
            description="reasoning about the query in your own words, which the model reads (up to 512 tokens) in "
            "place of its own; reasoning must then be true, or omitted, and the mode not text"
        ),
    ] = None
    read: Annotated[
        Read,
        Field(
            description="embed the query again with the first so many hits of a direct search; the reasoning follows"
        ),
    ] = 0
    hops: Annotated[
        int,
        Field(ge=1, le=MAX_HOPS, description="with `read`: 2 reads, searches, and reads again before the last search"),
    ] = 1
    rerank: Annotated[
        Rerank,
        Field(
            description="let the cross-encoder read the first so many hits, and return its `k` best; `score` is then "
            "its relevance. It cannot be less than `k`; 0 is off"
        ),
    ] = 0
    where: Annotated[Filter | None, Field(description="a condition on columns, as in title = 'Guide'")] = None
    too_long: QueryTooLong = None
    explain: Annotated[
        bool,
        Field(
            description="also explain the hits: marked words, weak hits, words that occur nowhere; passages with the "
            "same text become one hit"
        ),
    ] = False
    stream: Annotated[bool, Field(description="server-sent events")] = False


class RerankDocument(BaseModel):
    """A document as an object; further fields are returned with it."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    text: Text


def _form_of_document(value: Any) -> str | None:
    return "[text]" if isinstance(value, str) else "[object]" if isinstance(value, dict | RerankDocument) else None


RerankDocuments = TypeAliasType(
    "RerankDocuments",
    Annotated[
        list[
            Annotated[
                Annotated[Text, Tag("[text]")] | Annotated[RerankDocument, Tag("[object]")],
                Discriminator(
                    _form_of_document,
                    custom_error_type="document_form",
                    custom_error_message='expected a text, or an object with the field "text"',
                ),
            ]
        ],
        Field(min_length=1, fail_fast=True),
    ],
)


class RerankRequest(Strict):
    """POST /v1/rerank, as Cohere's and Jina's."""

    model: Annotated[RerankModelName | None, Field(description="the `reranker` of /v1/models; may be omitted")] = None
    query: Annotated[str, Field(pattern=VISIBLE, max_length=MAX_QUERY_CHARACTERS)]
    documents: Annotated[RerankDocuments, Field(description="texts, or objects with a text, to put in order")]
    top_n: Annotated[int | None, Field(ge=1, description="return only so many; by default all")] = None
    return_documents: Annotated[bool | None, Field(description="return the documents too")] = False
    max_tokens_per_doc: Annotated[
        int | None, Field(ge=1, description="read only so many tokens of each document, if the model reads more")
    ] = None


def _form_of_texts(value: Any) -> str | None:
    return "[text]" if isinstance(value, str) else "[texts]" if isinstance(value, list) else None


class TeiEmbedRequest(Strict):
    """POST /embed, as of Text Embeddings Inference."""

    inputs: Annotated[
        Annotated[Text, AfterValidator(_alone), Tag("[text]")] | Annotated[Texts, Tag("[texts]")],
        Discriminator(
            _form_of_texts, custom_error_type="input_form", custom_error_message="expected a text, or a list of texts"
        ),
        Field(description="a text or texts; the answer is a list of vectors in any case"),
    ]
    normalize: Annotated[
        bool | None,
        Field(description="the embeddings are unit vectors in any case; Haystack's client sends false by itself"),
    ] = True
    prompt_name: Annotated[
        Literal["query", "document"] | None,
        _in_one_line('expected "query" or "document"'),
        Field(description="by default the texts are documents; queries are embedded without reasoning here"),
    ] = None
    truncate: Annotated[
        bool | None, Field(description="true truncates longer texts, false refuses them; by default as it was started")
    ] = None
    truncation_direction: Annotated[
        Literal["left", "right", "Left", "Right"] | None,
        _in_one_line('expected "left" or "right"'),
        Field(description="right keeps the first tokens of a longer text, left its last ones"),
    ] = None
    dimensions: Dimensions | None = None
    encoding_format: Annotated[Literal["float"] | None, _in_one_line('expected "float"')] = None


class TeiRerankRequest(Strict):
    """POST /rerank, as of Text Embeddings Inference."""

    query: Annotated[str, Field(pattern=VISIBLE, max_length=MAX_QUERY_CHARACTERS)]
    texts: Texts
    raw_scores: Annotated[
        bool | None, Field(description="a cross-encoder's logits, or cosines, rather than 0 to 1")
    ] = False
    return_text: Annotated[bool | None, Field(description="return the texts too")] = False
    truncate: Annotated[
        bool | None, Field(description="true truncates longer texts, false refuses them; by default as it was started")
    ] = None
    truncation_direction: Annotated[
        Literal["right", "Right"] | None, _in_one_line('expected "right": a pair is truncated at its end')
    ] = None


Scalar = Annotated[
    str
    | bool
    | Annotated[int, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]
    | Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)],
    _in_one_line(
        "expected text, a number, true or false, numbers from -1e15 to 1e15; omit the field if it has no value"
    ),
]


class NewDocument(Strict):
    """A document to add."""

    id: Annotated[str, Field(pattern=VISIBLE, max_length=MAX_ID_CHARACTERS)]
    text: Annotated[str, Field(pattern=VISIBLE, max_length=MAX_DOCUMENT_CHARACTERS)]
    title: Annotated[str, Field(max_length=MAX_TITLE_CHARACTERS)] = ""
    metadata: Annotated[
        dict[Annotated[str, AfterValidator(_field_name)], Scalar],
        Field(max_length=MAX_FIELDS, json_schema_extra={"propertyNames": {"pattern": FIELD_NAME}}),
        BeforeValidator(_metadata),
    ] = {}


NewDocuments = TypeAliasType("NewDocuments", Annotated[list[NewDocument], Field(min_length=1, fail_fast=True)])


class DocumentsRequest(Strict):
    """POST /v1/documents."""

    documents: NewDocuments
    index: ChosenIndex = None


EMBEDDINGS: TypeAdapter[DocumentEmbeddings | QueryEmbeddings] = TypeAdapter(EmbeddingRequest)
SEARCH = TypeAdapter(SearchRequest)
RERANK = TypeAdapter(RerankRequest)
TEI_EMBED = TypeAdapter(TeiEmbedRequest)
TEI_RERANK = TypeAdapter(TeiRerankRequest)
DOCUMENTS = TypeAdapter(DocumentsRequest)


def _page_size(limit: Any) -> int:
    if isinstance(limit, str) and re.fullmatch("[1-9][0-9]{0,3}", limit, re.ASCII) and int(limit) <= MAX_PAGE:
        return int(limit)
    raise ValueError(f"expected 1 to {MAX_PAGE}, not {str(limit)[:20]!a}")


class IndexChoice(Strict):
    """The parameter of routes for one index."""

    index: ChosenIndex = None


class DocumentsPage(IndexChoice):
    """The parameters of GET /v1/documents."""

    limit: Annotated[int, Field(ge=1, le=MAX_PAGE), BeforeValidator(_page_size)] = PAGE
    after: Annotated[
        str, Field(min_length=1, max_length=MAX_ID_CHARACTERS, description="the last id of the previous page")
    ] = ""

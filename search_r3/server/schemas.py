"""The bodies that requests may have. Types are held to strictly: "1" is no number, 1 is no truth value.

What depends on the model or the index that is served (names, sizes, columns) is checked where it is used; `components`
describes all of it as JSON Schema.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from search_r3.errors import InputError
from search_r3.index.search import MAX_HITS, MAX_QUERY_CHARACTERS, Mode
from search_r3.model.tokenization import MAX_CHARACTERS
from search_r3.rank_fusion import VECTOR_WEIGHT

VISIBLE = "[^\\u0000-\\u0020\\u007f-\\u00a0\\u00ad\\u1680\\u2000-\\u200f\\u2028-\\u202f\\u205f-\\u206f\\u3000\\ufeff]"
"""A text must have such a character: any but spaces, control and zero-width characters."""
FIELD_NAME = "^[a-z][a-z0-9_]{0,63}$"
MAX_NUMBER = 1e15
MAX_FILTER_CHARACTERS = 2000
_SQL_WORDS = (
    "all and any as asc between by case cast create cross current delete desc distinct drop else end except "
    "exists false fetch for from full group having in inner insert intersect interval into is join left like "
    "limit natural not null offset on or order outer right select set some table then to true union unique update "
    "using values when where with"
)
RESERVED = frozenset(_SQL_WORDS.split())
MAX_FIELDS = 50
MAX_DOCUMENT_CHARACTERS = 1_000_000
MAX_TITLE_CHARACTERS = 1000
MAX_ID_CHARACTERS = 4096  # the longest path of a file, which is its id
_VISIBLE = re.compile(VISIBLE)
_FIELD_NAME = re.compile(FIELD_NAME.replace("$", "\\Z"))


def _visible(text: str) -> str:
    if not _VISIBLE.search(text):
        raise ValueError("the text is empty; give at least one visible character")
    return text


def _id(text: str) -> str:
    if not _VISIBLE.search(text):
        raise ValueError("the id is empty; give at least one visible character")
    return text


def _field_name(name: str) -> str:
    if not _FIELD_NAME.match(name):
        raise ValueError(
            f"the field {name[:64]!a} cannot be used; a name is of small letters, digits and _, begins with a letter, "
            "and has at most 64 characters"
        )
    return name


def _reasoning(value: Any) -> bool | int | str:
    if isinstance(value, bool) or value == "auto" or (isinstance(value, int) and value >= 0):
        return value
    raise ValueError('expected true, false, "auto", or a number of tokens from 0')


def _metadata(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError('metadata must be an object of text, numbers, true or false, as in {"lang": "en"}')
    return value


def _scalar(value: Any) -> Any:
    if isinstance(value, bool | str) or (isinstance(value, int | float) and abs(value) <= MAX_NUMBER):
        return value
    if isinstance(value, int | float):
        raise ValueError(f"expected a number from -{MAX_NUMBER:.0e} to {MAX_NUMBER:.0e}".replace("+", ""))
    raise ValueError("expected text, a number, true or false; leave the field out if there is no value")


Reasoning = Annotated[bool | int | str, PlainValidator(_reasoning)]


class Strict(BaseModel):
    """No conversions, no unknown fields, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def check_input(value: Any) -> list[str] | list[list[int]]:
    """OpenAI's four forms of input as a list of texts, or of lists of token ids; raises ValueError."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("give a text, or a list of texts, of token ids, or of lists of token ids, that is not empty")
    if isinstance(value[0], str):
        for i, text in enumerate(value):
            if not isinstance(text, str):
                raise ValueError(f"item {i + 1} of {len(value)} is no text, unlike the first")
            if not _VISIBLE.search(text):
                raise ValueError(f"item {i + 1} of {len(value)} is empty; give at least one visible character")
        return value
    if not isinstance(value[0], list):
        for i, token in enumerate(value):
            if type(token) is not int or token < 0:
                raise ValueError(f"item {i + 1} of {len(value)} is neither a text nor a token id")
        return [value]
    rows = value
    for i, row in enumerate(rows):
        if not isinstance(row, list) or not row or not all(type(token) is int and token >= 0 for token in row):
            raise ValueError(f"item {i + 1} of {len(rows)} is no list of token ids, whole numbers from 0")
    return rows


class EmbeddingRequest(Strict):
    """POST /v1/embeddings."""

    model: str
    input: Annotated[Any, PlainValidator(check_input)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    input_type: Literal["document", "query"] | None = None
    reasoning: Reasoning | None = None

    @model_validator(mode="after")
    def _only_queries_reason(self) -> EmbeddingRequest:
        if self.input_type != "query":
            if self.reasoning is not None and self.reasoning is not False:
                raise ValueError('documents are embedded without reasoning; say "input_type": "query"')
        elif any(isinstance(text, str) and len(text) > MAX_CHARACTERS for text in self.input):
            raise ValueError(f"a query has over {MAX_CHARACTERS:,} characters; shorten it, or embed it as a document")
        return self


class SearchRequest(Strict):
    """POST /v1/search."""

    query: Annotated[str, Field(max_length=MAX_QUERY_CHARACTERS), AfterValidator(_visible)]
    k: Annotated[int, Field(ge=1, le=MAX_HITS)] = 10
    mode: Mode = "hybrid"
    vector_weight: Annotated[float, Field(ge=0, le=1)] = VECTOR_WEIGHT
    reasoning: Reasoning = True
    where: Annotated[str, Field(max_length=MAX_FILTER_CHARACTERS)] | None = None
    stream: bool = False


Scalar = Annotated[bool | int | float | str, PlainValidator(_scalar)]


class DocumentIn(Strict):
    """A document to be added."""

    id: Annotated[str, Field(max_length=MAX_ID_CHARACTERS), AfterValidator(_id)]
    text: Annotated[str, Field(max_length=MAX_DOCUMENT_CHARACTERS), AfterValidator(_visible)]
    title: Annotated[str, Field(max_length=MAX_TITLE_CHARACTERS)] = ""
    metadata: Annotated[
        dict[Annotated[str, AfterValidator(_field_name)], Scalar],
        Field(max_length=MAX_FIELDS),
        BeforeValidator(_metadata),
    ] = {}


class DocumentsRequest(Strict):
    """POST /v1/documents."""

    documents: Annotated[list[DocumentIn], Field(min_length=1, fail_fast=True)]


def filter_pattern(columns: dict[str, str]) -> str:
    """The filters that a search takes over these columns, as a regular expression.

    Comparisons of a column with a value of its type, IN, LIKE, IS NULL and NOT, joined by AND and OR, in parentheses
    one deep: SQL that is always valid and calls no functions. Columns whose names have other characters, or are
    words of SQL, cannot be named.
    """
    text, whole, number = "'([^'\\u0000-\\u001f]|'')*'", "-?[0-9]{1,18}", "-?[0-9]{1,15}([.][0-9]{1,10})?"
    kinds = {
        "text": f" *(=|!=|<>|<=|>=|<|>) *{text}| (NOT )?LIKE {text}| (NOT )?IN \\({text}(, *{text})*\\)",
        "integer": f" *(=|!=|<>|<=|>=|<|>) *{whole}| (NOT )?IN \\({whole}(, *{whole})*\\)",
        "number": f" *(=|!=|<>|<=|>=|<|>) *{number}| (NOT )?IN \\({number}(, *{number})*\\)",
        "true/false": " *(=|!=) *(true|false)",
    }
    usable = [name for name in columns if re.fullmatch("[a-z][a-z0-9_]*", name) and name not in RESERVED]
    conditions = []
    for kind, comparisons in kinds.items():
        names = [name for name in usable if columns[name] == kind]
        if names:
            conditions.append(f"({'|'.join(names)})({comparisons}| IS (NOT )?NULL)")
    simple = f"(NOT )?({'|'.join(conditions)})"
    joined = f"{simple}( (AND|OR) {simple})*"
    term = f"({simple}|(NOT )?\\({joined}\\))"
    return f"^{term}( (AND|OR) {term})*$"


def check_filter(where: str, columns: dict[str, str]) -> str:
    """`where` if `filter_pattern` allows it. Raises InputError that says what is allowed."""
    if not re.search(filter_pattern(columns).replace("$", "\\Z"), where):
        names = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
        raise InputError(
            "the filter is not one that this server takes: compare columns with values of their type (= != < > <= >= "
            "IN LIKE IS NULL), joined by AND, OR and NOT in capitals, as in title = 'Guide' AND start_line > 10; "
            f"columns: {names}"
        )
    return where

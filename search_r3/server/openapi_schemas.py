"""The JSON Schemas of every body, exact for the model and the index that are served: what they allow is accepted.

What JSON Schema cannot say (tokens in all, a document's id that is taken) is answered by 409 or 413.
"""

from __future__ import annotations

from typing import Any

from search_r3.index.search import MAX_HITS, MAX_QUERY_CHARACTERS
from search_r3.model.tokenization import MAX_CHARACTERS, special_ids
from search_r3.rank_fusion import VECTOR_WEIGHT
from search_r3.server.schemas import (
    FIELD_NAME,
    MAX_DOCUMENT_CHARACTERS,
    MAX_FIELDS,
    MAX_FILTER_CHARACTERS,
    MAX_ID_CHARACTERS,
    MAX_NUMBER,
    MAX_TITLE_CHARACTERS,
    VISIBLE,
    filter_pattern,
)
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}


def components(config: ServerConfig, loaded: Loaded | None) -> dict[str, Schema]:
    """The schemas by name; before the model is loaded, without what it decides."""
    found = {
        "Error": record(
            error=record(
                message=STRING,
                type=STRING,
                param={"type": ["string", "null"]},
                code={"type": "string", "description": "a word that programs can compare"},
            )
        ),
        "Health": record(
            status={"enum": ["ready", "loading", "stopping", "failed", "index_unavailable"]},
            reason={
                "type": ["string", "null"],
                "description": "why it is not ready, or what else is to be known; null without a key if there are any",
            },
            model={"type": ["string", "null"]},
            index={"type": "boolean"},
            in_hand=COUNT,
        ),
        "Alive": record(status={"const": "alive"}),
        "Model": record(
            id=STRING,
            object={"const": "model"},
            created=COUNT,
            owned_by=STRING,
            dimension=COUNT,
            dimensions={"type": "array", "items": COUNT, "description": "what `dimensions` may be"},
            contract_hash={"type": "string", "description": "vectors with equal hashes can be compared"},
            adaptive={"type": "boolean", "description": 'whether reasoning may be "auto"'},
        ),
        "Usage": record(
            prompt_tokens={**COUNT, "description": "tokens of the texts, as far as they were read"},
            completion_tokens={**COUNT, "description": "tokens of reasoning"},
            total_tokens=COUNT,
        ),
        **_embeddings(config, loaded),
    }
    found["Models"] = record(object={"const": "list"}, data={"type": "array", "items": ref("Model")})
    if loaded is None or loaded.index is not None:
        found |= _search(config, loaded)
        found |= _documents(config)
    return found


def ref(name: str) -> Schema:
    """A reference to a schema of `components`."""
    return {"$ref": f"#/components/schemas/{name}"}


def record(**properties: Schema) -> Schema:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _body(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _text(longest: int | None = None) -> Schema:
    return {"type": "string", "pattern": VISIBLE, **({"maxLength": longest} if longest else {})}


def _reasoning(config: ServerConfig, loaded: Loaded | None, **more: Any) -> Schema:
    choices: list[Schema] = [
        {"type": "boolean", "description": f"true is a budget of {config.reasoning_tokens} tokens"},
        {"type": "integer", "minimum": 0, "maximum": config.max_reasoning_tokens, "description": "a budget in tokens"},
    ]
    if loaded is None or loaded.adaptive:
        choices.append({"const": "auto", "description": "reason where the model's rule expects it to help"})
    return {"anyOf": choices, **more}


def _embeddings(config: ServerConfig, loaded: Loaded | None) -> dict[str, Schema]:
    token: Schema = {"type": "integer", "minimum": 0}
    if loaded is not None:
        special = special_ids(loaded.model.tokenizer)
        usable = [i for i in range(len(loaded.model.tokenizer)) if i not in special]
        token |= {"minimum": usable[0], "maximum": usable[-1]}
        if holes := sorted(i for i in special if usable[0] < i < usable[-1]):
            token["not"] = {"enum": holes}
    row = {"type": "array", "items": token, "minItems": 1}

    def given(longest: int | None) -> Schema:
        one = _text(longest)
        many = {"minItems": 1, "maxItems": config.max_items}
        return {
            "description": "a text, texts, token ids of this model, or several lists of them; each text is read up to "
            "512 tokens",
            "anyOf": [one, {"type": "array", "items": one, **many}, row, {"type": "array", "items": row, **many}],
        }

    shared: dict[str, Schema] = {
        "model": {"type": "string"} if loaded is None else {"const": loaded.model.name},
        "encoding_format": {"enum": ["float", "base64", None], "default": "float"},
        "dimensions": {"type": ["integer", "null"]} if loaded is None else {"enum": [*loaded.dimensions, None]},
        "user": {"type": ["string", "null"], "description": "ignored"},
    }
    needed = ["model", "input"]
    documents = _body(
        needed,
        input=given(None),
        **shared,
        input_type={"enum": ["document", None], "default": "document"},
        reasoning={"enum": [False, None]},
    )
    queries = _body(
        [*needed, "input_type"],
        input=given(MAX_CHARACTERS),
        **shared,
        input_type={"const": "query"},
        reasoning={"anyOf": [_reasoning(config, loaded), {"type": "null"}], "default": False},
    )
    coded = {"type": "string", "description": "base64 of float32, little-endian"}
    vector = {"anyOf": [{"type": "array", "items": NUMBER}, coded]}
    usage = record(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT, truncated_texts=COUNT)
    return {
        "DocumentEmbeddings": documents,
        "QueryEmbeddings": queries,
        "Embeddings": record(
            object={"const": "list"},
            data={"type": "array", "items": record(object={"const": "embedding"}, index=COUNT, embedding=vector)},
            model=STRING,
            usage=usage,
        ),
    }


def _search(config: ServerConfig, loaded: Loaded | None) -> dict[str, Schema]:
    where: Schema = {"type": ["string", "null"], "description": "a condition on columns, as in title = 'Guide'"}
    if loaded is not None and loaded.index is not None:
        where |= {"pattern": filter_pattern(loaded.index.columns), "maxLength": MAX_FILTER_CHARACTERS}
    scalar = {"type": ["string", "number", "boolean", "null"]}
    spans = {"type": "array", "items": {"type": "array", "items": COUNT, "minItems": 2, "maxItems": 2}}
    by_list: Schema = {"type": "object", "additionalProperties": NUMBER}
    hit = record(
        id=STRING,
        document=STRING,
        title=STRING,
        text=STRING,
        snippet=STRING,
        highlights={**spans, "description": "(start, end) within the snippet, in characters"},
        snippet_line={"type": "integer"},
        score=NUMBER,
        metadata={"type": "object", "additionalProperties": scalar},
        path=STRING,
        start_line={"type": "integer"},
        end_line={"type": "integer"},
        ranks=by_list,
        scores=by_list,
    )
    trace = record(text=STRING, num_tokens=COUNT, forced={"type": "boolean"})
    return {
        "Search": _body(
            ["query"],
            query=_text(MAX_QUERY_CHARACTERS),
            k={"type": "integer", "minimum": 1, "maximum": MAX_HITS, "default": 10},
            mode={"enum": ["hybrid", "vector", "text"], "default": "hybrid"},
            vector_weight={
                "type": "number",
                "minimum": 0,
                "maximum": 1,
                "default": VECTOR_WEIGHT,
                "description": "how much the vectors count in a hybrid search; the words count the rest",
            },
            reasoning=_reasoning(config, loaded, default=True),
            where=where,
            stream={"type": "boolean", "default": False, "description": "server-sent events"},
        ),
        "Hit": hit,
        "Event": {
            "type": "object",
            "properties": {
                "event": {"enum": ["reasoning", "result", "error"]},
                "data": {"type": "string", "contentMediaType": "application/json"},
            },
            "required": ["event", "data"],
        },
        "SearchResult": record(
            query=STRING,
            mode=STRING,
            hits={"type": "array", "items": ref("Hit")},
            reasoning={"anyOf": [trace, {"type": "null"}]},
            timings=record(reason_ms=NUMBER, search_ms=NUMBER),
            model=STRING,
            usage=ref("Usage"),
        ),
    }


def _documents(config: ServerConfig) -> dict[str, Schema]:
    scalar: list[Schema] = [
        {"type": "string"},
        {"type": "boolean"},
        {"type": "number", "minimum": -MAX_NUMBER, "maximum": MAX_NUMBER},
    ]
    metadata = {
        "type": "object",
        "propertyNames": {"pattern": FIELD_NAME},
        "additionalProperties": {"anyOf": scalar},
        "maxProperties": MAX_FIELDS,
    }
    document = _body(
        ["id", "text"],
        id=_text(MAX_ID_CHARACTERS),
        text=_text(MAX_DOCUMENT_CHARACTERS),
        title={"type": "string", "maxLength": MAX_TITLE_CHARACTERS},
        metadata=metadata,
    )
    shown = record(object={"const": "document"}, id=STRING, title=STRING, path=STRING)
    added = record(object={"const": "document"}, id=STRING)
    return {
        "AddDocuments": _body(
            ["documents"],
            documents={"type": "array", "items": document, "minItems": 1, "maxItems": config.max_items},
        ),
        "Documents": record(
            object={"const": "list"},
            data={"type": "array", "items": shown},
            total=COUNT,
            has_more={"type": "boolean"},
        ),
        "Added": record(object={"const": "list"}, data={"type": "array", "items": added}, chunks=COUNT),
        "Deleted": record(object={"const": "document"}, id=STRING, deleted={"const": True}, chunks=COUNT),
    }

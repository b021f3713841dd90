"""Collections of Milvus that hold an index: their fields, their description, and the alias by which they are found.

The name that users give is an alias. It leads to a collection of its own, `NAME_` with the time it was made, so that a
new build can take its place in one step. What the index was made with (`IndexInfo`), and the types of the metadata
columns, are properties of the collection.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import NamedTuple
from urllib.parse import quote

from search_r3.errors import InputError
from search_r3.hybrid_fusion import HybridFusion
from search_r3.index.backends.index_backend import FloorRecord
from search_r3.index.backends.milvus.connection import CollectionGone, connect, milvus_errors, seconds_of
from search_r3.index.backends.milvus.filters import METADATA_FIELD
from search_r3.index.index_info import IndexInfo, migrate
from search_r3.index.row_keys import ROW_HASH, SOURCE, TEXT_HASH, VECTOR
from search_r3.index.storage.location import CollectionUri, IndexBusy

INFO, COLUMN_TYPES = "search_r3.info", "search_r3.columns"
"""Properties of a collection: the description, and {column: type} of the metadata."""
FLOOR, FUSION = "search_r3.relevance_floor", "search_r3.hybrid_fusion"
"""Properties that not every collection has; "null" means none."""
KEY, ROW, WORDS, SPARSE = "key", "row", "words", "sparse"
"""Fields: the primary key, what is only returned, what is searched by words, and its BM25 vector, which Milvus
computes."""
LONGEST = 65_535  # bytes of a text or of JSON; Milvus Lite counts the characters of a text, and limits no JSON
OWN_FIELDS = ("id", "document", "title", "path", "start_line", "end_line")
TEXTS = ("id", "document", "title", "path", SOURCE, TEXT_HASH, ROW_HASH)


def key_of(identifier: str) -> str:
    """The primary key of a row: its id, percent-encoded. pymilvus puts keys into filters without escaping them (3.0.2:
    `delete(ids=...)` and the iterator's cursor), so that a quote in an id would break the filter, or widen it."""
    return quote(identifier, safe="/")


def create_collection(uri: CollectionUri, info: IndexInfo) -> str:
    """Create an empty collection for an index described by `info`; returns its name. No alias leads to it yet."""
    from pymilvus import DataType, Function, FunctionType

    client = connect(uri)
    made = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]  # milliseconds: `drop_before` compares names
    name = f"{uri.name}_{made}_{uuid.uuid4().hex[:6]}"
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    for field in (KEY, *TEXTS):
        schema.add_field(field, DataType.VARCHAR, max_length=LONGEST, is_primary=field == KEY)
    schema.add_field("start_line", DataType.INT64)
    schema.add_field("end_line", DataType.INT64)
    schema.add_field(METADATA_FIELD, DataType.JSON)
    schema.add_field(ROW, DataType.JSON)
    schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=info.dimension)
    analyzer = {"tokenizer": "standard"}
    schema.add_field(WORDS, DataType.VARCHAR, max_length=LONGEST, enable_analyzer=True, analyzer_params=analyzer)
    schema.add_field(SPARSE, DataType.SPARSE_FLOAT_VECTOR)
    schema.add_function(
        Function(name="bm25", function_type=FunctionType.BM25, input_field_names=[WORDS], output_field_names=[SPARSE])
    )
    indexes = client.prepare_index_params()
    indexes.add_index(VECTOR, index_type="FLAT", metric_type="COSINE")
    indexes.add_index(SPARSE, index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
    properties = {INFO: json.dumps(asdict(info)), COLUMN_TYPES: "{}"}
    with milvus_errors(uri):
        client.create_collection(
            name,
            schema=schema,
            index_params=indexes,
            consistency_level="Strong",
            properties=properties,
            timeout=seconds_of(uri),
        )
    return name


def resolve(uri: CollectionUri) -> str | None:
    """The collection that the alias leads to now, or None if there is no such alias."""
    client = connect(uri)
    with milvus_errors(uri):
        if not client.has_collection(uri.name, timeout=seconds_of(uri)):  # an alias counts
            return None
    try:
        with milvus_errors(uri):
            return str(client.describe_collection(uri.name, timeout=seconds_of(uri))["collection_name"])
    except CollectionGone:  # since
        return None


def load(uri: CollectionUri, name: str) -> None:
    """Let the collection be searched. A server keeps it loaded; Milvus Lite forgets that when its process ends."""
    if (uri.server, name) not in _loaded:
        with milvus_errors(uri):
            connect(uri).load_collection(name, timeout=seconds_of(uri))
        _loaded.add((uri.server, name))


_loaded: set[tuple[str, str]] = set()
"""Collections that this process has loaded, by server and name."""


class Description(NamedTuple):
    """What a collection says of its index: how it was made, {column: type} of the metadata, and what was measured."""

    info: IndexInfo
    columns: dict[str, str]
    floor: FloorRecord | None = None
    fusion: HybridFusion | None = None


def describe(uri: CollectionUri, name: str) -> Description:
    """The description of the index in the collection `name`.

    Raises:
        InputError: search-r3 did not make the collection, or a newer version did.
    """
    client = connect(uri)
    with milvus_errors(uri):
        properties = client.describe_collection(name, timeout=seconds_of(uri))["properties"]
    try:
        info, columns = IndexInfo(**migrate(json.loads(properties[INFO]), uri)), json.loads(properties[COLUMN_TYPES])
    except (KeyError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{uri} is a collection that search-r3 did not make; give another name") from error
    floor, fusion = properties.get(FLOOR), properties.get(FUSION)
    return Description(
        info,
        columns,
        FloorRecord.from_json(floor) if floor else None,
        HybridFusion.from_json(fusion) if fusion else None,
    )


def write_properties(uri: CollectionUri, name: str, properties: Mapping[str, str]) -> None:
    """Set these properties of the collection; it keeps the others."""
    with milvus_errors(uri):
        connect(uri).alter_collection_properties(name, properties=dict(properties), timeout=seconds_of(uri))


def publish(uri: CollectionUri, name: str, instead_of: str | None) -> None:
    """Let the alias lead to the collection `name`, in one step.

    Args:
        instead_of: the collection that it led to when the build began, or None if there was none.

    Raises:
        IndexBusy: it leads to another one by now.
    """
    if resolve(uri) != instead_of:
        raise IndexBusy(f"{uri} was exchanged by another build meanwhile; nothing was changed: run the command again")
    client = connect(uri)
    with milvus_errors(uri):
        if instead_of is None:
            client.create_alias(name, uri.name, timeout=seconds_of(uri))
        else:
            client.alter_alias(name, uri.name, timeout=seconds_of(uri))


def drop_before(uri: CollectionUri, former: str) -> None:
    """Remove the builds of this index that are older than `former`, which running searches may still read."""
    client = connect(uri)
    pattern = re.compile(rf"{re.escape(uri.name)}_\d{{8}}T\d{{9}}_[0-9a-f]{{6}}")
    with milvus_errors(uri):
        for name in client.list_collections(timeout=seconds_of(uri)):
            if pattern.fullmatch(name) and name < former:
                client.drop_collection(name, timeout=seconds_of(uri))

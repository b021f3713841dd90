"""`MilvusBackend`: an index in a collection of Milvus, which many servers search at the same time.

Searches have the meaning that they have in LanceDB: cosine over all vectors (the collection's index is exact unless its
owner makes another), BM25 over the words of `search_words`, SQL conditions, equal scores by id, and the same fusion.
A search stays with the collection that it began with, even if the alias is led to another one meanwhile.

Seen in pymilvus 3.0.2 and Milvus Lite 3.2.2: the scores of BM25 are below 0, the best lowest; a filter on a missing key
depends on the operator (`filters`); keys get into filters without being escaped (`collections.key_of`); a collection is
not loaded after a restart (`collections.load`); lengths count characters, where a server counts bytes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa

from search_r3.errors import InputError
from search_r3.hybrid_fusion import HybridFusion
from search_r3.index.backends.index_backend import Capability, FloorRecord, IndexBackend, Row, Scored
from search_r3.index.backends.lance.table_columns import (
    TYPE_NAMES,
    TYPES,
    VISIBLE,
    ColumnTypes,
    as_type,
    in_parts,
    metadata_columns,
)
from search_r3.index.backends.milvus.collections import (
    COLUMN_TYPES,
    FLOOR,
    FUSION,
    KEY,
    LONGEST,
    OWN_FIELDS,
    ROW,
    SPARSE,
    TEXTS,
    WORDS,
    Description,
    create_collection,
    describe,
    drop_before,
    key_of,
    load,
    publish,
    resolve,
    write_properties,
)
from search_r3.index.backends.milvus.connection import RequestTimeout, connect, exclusive, milvus_errors, seconds_of
from search_r3.index.backends.milvus.filters import METADATA_FIELD, literal, milvus_filter
from search_r3.index.backends.milvus.search_words import search_words
from search_r3.index.backends.sql_condition import parse_condition
from search_r3.index.index_info import IndexInfo
from search_r3.index.row_keys import COLUMNS, CONTENT, METADATA, VECTOR
from search_r3.index.storage.location import CollectionUri

AT_ONCE = 256  # rows of one request: 4 MB of vectors of 4,096 dimensions, of the 64 MB that a server takes
LEAST_AT_ONCE = 64  # rows of a request that is not repeated in halves
IDS_AT_ONCE = 1000  # in one filter
MOST = 16_384  # rows that Milvus returns for one search
TIES = 100  # rows beyond those asked for, among which equal scores are put in order
SHOWN = [*TEXTS, "start_line", "end_line", ROW]
"""Fields of a row."""


class MilvusBackend(IndexBackend):
    """One collection with its description.

    Args:
        uri: where users find it.
        collection: the collection that the alias led to when it was opened.
        about: how it was described then.
    """

    name: ClassVar[str] = "milvus"
    capabilities: ClassVar[frozenset[Capability]] = frozenset({"text", "filter", "records", "exchange"})

    def __init__(self, uri: CollectionUri, collection: str, about: Description) -> None:
        self.uri, self.collection = uri, collection
        self.info, self._metadata, self.floor_record, self.tuned_fusion = about
        self._client = connect(uri)
        self._former: str | None = None  # where the alias leads until this collection is published

    @classmethod
    def create(cls, path: CollectionUri, info: IndexInfo) -> Self:  # type: ignore[override]
        made = cls.create_beside(path, info)
        made.publish()
        return made

    @classmethod
    def create_beside(cls, path: CollectionUri, info: IndexInfo) -> Self:
        former = resolve(path)
        fusion = describe(path, former).fusion if former is not None else None
        made = cls(path, create_collection(path, info), Description(info, {}))
        made._former = former
        if fusion is not None:  # a search with another model does not use it
            made.write_fusion(fusion)
        return made

    def publish(self) -> None:
        publish(self.uri, self.collection, self._former)
        if self._former is not None:
            drop_before(self.uri, self._former)

    @classmethod
    def open(cls, path: CollectionUri) -> Self | None:  # type: ignore[override]
        collection = resolve(path)
        if collection is None:
            return None
        opened = cls(path, collection, describe(path, collection))
        load(path, collection)
        return opened

    @classmethod
    def writing(cls, path: CollectionUri, *, make: bool = False, wait: float = 0.0) -> AbstractContextManager[None]:
        return exclusive(path, wait)

    # ------------------------------------------------------------------------------------------------------ what it is

    @property
    def columns(self) -> dict[str, str]:
        return VISIBLE | self._metadata

    def count(self) -> int:
        with milvus_errors(self.uri):
            (counted,) = self._client.query(
                self.collection, filter="", output_fields=["count(*)"], timeout=seconds_of(self.uri)
            )
        return int(counted["count(*)"])

    def current_info(self) -> IndexInfo:
        collection = resolve(self.uri)
        if collection is None:
            raise InputError(f"{self.uri} is gone")
        return self.info if collection == self.collection else describe(self.uri, collection).info

    def probe(self, thorough: bool = True) -> None:
        self.search(np.ones(self.info.dimension, dtype=np.float32), 1)

    def write_floor(self, record: FloorRecord) -> None:
        write_properties(self.uri, self.collection, {FLOOR: record.to_json()})
        self.floor_record = record

    def write_fusion(self, fusion: HybridFusion | None) -> None:
        write_properties(self.uri, self.collection, {FUSION: fusion.to_json() if fusion else "null"})
        self.tuned_fusion = fusion

    # ------------------------------------------------------------------------------------------------------- searching

    def check_filter(self, where: str) -> str:
        return milvus_filter(parse_condition(where, self.columns), OWN_FIELDS)

    def search(self, vector: np.ndarray, k: int, where: str | None = None, exact: bool = False) -> list[Scored]:
        return self._scored(VECTOR, vector.astype(np.float32).tolist(), k, where, "COSINE")

    def search_text(self, query: str, k: int, where: str | None = None) -> list[Scored]:
        words = " ".join(dict.fromkeys(search_words(query)))
        if not words:
            return []
        return self._scored(SPARSE, words, k, where, "BM25")

    def _scored(self, field: str, query: Any, k: int, where: str | None, metric: str) -> list[Scored]:
        """The `k` rows nearest to `query`; those that Milvus returns for equal scores are put in order by id."""
        with milvus_errors(self.uri):
            (hits,) = self._client.search(
                self.collection,
                data=[query],
                anns_field=field,
                limit=min(k + TIES, MOST),
                filter=where or "",
                output_fields=SHOWN,
                search_params={"metric_type": metric},
                timeout=seconds_of(self.uri),
            )
        # BM25 is never below 0: a sign only says that Milvus Lite returns distances
        score = float if metric == "COSINE" else lambda distance: abs(float(distance))
        return sorted(((_row(hit["entity"]), score(hit["distance"])) for hit in hits), key=_best_first)[:k]

    # ------------------------------------------------------------------------------------------------------------ rows

    def add(self, rows: Sequence[Row], vectors: np.ndarray) -> None:
        columned = [row | {COLUMNS: metadata_columns(json.loads(row[METADATA]), row["id"])} for row in rows]
        types = ColumnTypes(pa.schema([(name, TYPES[kind]) for name, kind in self._metadata.items()]))
        types.fit(columned)
        metadata = {name: TYPE_NAMES[kind] for name, kind in types.known.items()}
        if metadata != self._metadata:
            write_properties(self.uri, self.collection, {COLUMN_TYPES: json.dumps(metadata)})
            self._metadata = metadata
        stored = [self._entity(row, vector) for row, vector in zip(columned, vectors, strict=True)]
        for start in range(0, len(stored), AT_ONCE):
            self._upsert(stored[start : start + AT_ONCE])

    def _upsert(self, entities: list[dict[str, Any]]) -> None:
        """Write them; if that takes too long, in two halves, as far as LEAST_AT_ONCE. What was written already is only
        replaced, as every row has a key."""
        try:
            with milvus_errors(self.uri):
                self._client.upsert(self.collection, entities, timeout=seconds_of(self.uri))
        except RequestTimeout:
            if len(entities) <= LEAST_AT_ONCE:
                raise
            middle = len(entities) // 2
            self._upsert(entities[:middle])
            self._upsert(entities[middle:])

    def _entity(self, row: Row, vector: np.ndarray) -> dict[str, Any]:
        values = {
            name: as_type(value, TYPES[self._metadata[name]])
            for name, value in row[COLUMNS].items()
            if value is not None
        }
        entity = {KEY: key_of(row["id"])} | {name: row[name] for name in (*TEXTS, "start_line", "end_line")}
        entity |= {METADATA_FIELD: values, ROW: {name: row[name] for name in (CONTENT, METADATA)}}
        entity[WORDS] = " ".join(search_words(row[CONTENT]))
        for name, value in entity.items():
            size = len((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode())
            if size > LONGEST:
                raise InputError(
                    f"{row['id'][:100]}: its {name} has {size:,} bytes, and Milvus holds at most {LONGEST:,}; shorten "
                    "the document's metadata or id, or index it in LanceDB"
                )
        return entity | {VECTOR: vector.astype(np.float32).tolist()}

    def delete(self, ids: Collection[str]) -> None:
        with milvus_errors(self.uri):
            for keys in in_parts(map(key_of, ids), IDS_AT_ONCE):
                self._client.delete(self.collection, ids=keys, timeout=seconds_of(self.uri))

    def partial_rows(self, fields: Sequence[str]) -> Iterable[Row]:
        return self._read(list(fields))

    def rows(self) -> Iterable[Row]:
        return (_row(entity) for entity in self._read(SHOWN))

    def vectors(self, ids: Sequence[str]) -> np.ndarray:
        vector_of: dict[str, Any] = {}
        with milvus_errors(self.uri):
            for some in in_parts(dict.fromkeys(ids), IDS_AT_ONCE):
                where, fields = f"{KEY} in [{', '.join(literal(key_of(one)) for one in some)}]", ["id", VECTOR]
                found = self._client.query(
                    self.collection, filter=where, output_fields=fields, timeout=seconds_of(self.uri)
                )
                vector_of |= {entity["id"]: entity[VECTOR] for entity in found}
        matrix = [vector_of[identifier] for identifier in ids]
        return np.asarray(matrix, dtype=np.float32).reshape(len(ids), self.info.dimension)

    def _read(self, fields: list[str]) -> Iterator[dict[str, Any]]:
        """These fields of all rows."""
        with milvus_errors(self.uri):
            batches = self._client.query_iterator(
                self.collection, batch_size=IDS_AT_ONCE, output_fields=fields, timeout=seconds_of(self.uri)
            )
            try:
                while batch := batches.next():
                    yield from batch
            finally:
                batches.close()


def _best_first(pair: Scored) -> tuple[float, str]:
    return -pair[1], pair[0]["id"]


def _row(entity: dict[str, Any]) -> Row:
    """A row as other backends store it."""
    row = {name: entity[name] for name in SHOWN if name != ROW}
    kept = entity[ROW]
    return row | (json.loads(kept) if isinstance(kept, str | bytes) else kept)

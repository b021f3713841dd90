"""Queries with their relevant documents, by the documents' ids: judgments or clicks, for adapting to an index.

A BEIR folder, or JSONL with `query` and either `relevant` (ids, or `{"id": ..., "grade": ...}`) or `clicked` (ids).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_r3.data.beir import available_splits, load_judgments
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.io.jsonl import id_field, read_jsonl, string_field
from search_r3.data.mining.word_overlap import near_twins
from search_r3.data.sources.beir_pairs import NEAR_COPY, is_held_out
from search_r3.errors import InputError
from search_r3.hints import refuse_unknown

FIELDS = ("id", "query", "relevant", "clicked")


@dataclass(frozen=True)
class JudgedQuery:
    """A query and the grades of its relevant documents, above 0; of clicks, their number."""

    id: str
    text: str
    relevant: dict[str, float]


@dataclass(frozen=True)
class QuerySplit:
    """Queries to train on and queries held out for validation, and what was left out.

    Attributes:
        near_copies: training queries that nearly equal a held-out or excluded query.
        without_documents: queries of whose relevant documents none is in the index.
        unknown_documents: relevant documents, over all queries, that are not in the index.
    """

    train: list[JudgedQuery]
    held_out: list[JudgedQuery]
    near_copies: int
    without_documents: int
    unknown_documents: int

    def describe(self, purpose: str) -> str:
        """How many queries are used, `purpose` being "to train on", and which were left out."""
        said = f"{len(self.train):,} queries {purpose}, {len(self.held_out):,} held out"
        if self.near_copies:
            said += f"; {self.near_copies:,} left out as near copies of held-out or excluded queries"
        if self.without_documents:
            said += f"; {self.without_documents:,} left out, as none of their documents is in the index"
        return said


def read_judged_queries(
    path: str | Path, split: str = "train", data_root: str | Path | None = None
) -> list[JudgedQuery]:
    """Read a BEIR folder (or the name of a data set), or a JSONL file.

    Lines with the same query are one: clicks add up, of grades the highest counts. Without an id, the query's text is
    its id.

    Args:
        split: the split of a BEIR folder.

    Raises:
        InputError: the path does not exist; or a line is broken, has an unknown field, no relevant document, or a grade
            not above 0 (file, line and field are named).
    """
    if not Path(path).is_file():
        queries, qrels = load_judgments(find_dataset(path, data_root), split)
        graded = {i: {d: float(grade) for d, grade in judged.items() if grade > 0} for i, judged in qrels.items()}
        return [JudgedQuery(i, queries[i], graded[i]) for i in queries if graded[i]]
    found: dict[str, JudgedQuery] = {}
    for number, value in read_jsonl(path):
        where = f"{path}, line {number}"
        refuse_unknown(value, FIELDS, where, what="field")
        text = string_field(value, "query", path, number, empty=False).strip()
        identity = id_field(value, path, number, ("id",))[1] if "id" in value else text
        if ("relevant" in value) == ("clicked" in value):
            raise InputError(
                f'{where}: give either "relevant" or "clicked", the ids of documents that answer the query'
            )
        into = found.setdefault(text, JudgedQuery(identity, text, {})).relevant
        if "clicked" in value:
            for document, clicks in Counter(_ids(value["clicked"], "clicked", where)).items():
                into[document] = into.get(document, 0) + clicks
        else:
            for document, grade in _grades(value["relevant"], where).items():
                into[document] = max(grade, into.get(document, grade))
    if not found:
        raise InputError(f"{path} has no queries; expected lines of JSON with query and relevant, or query and clicked")
    return list(found.values())


def read_excluded_queries(
    queries: str | Path, split: str, others: Sequence[str | Path] = (), data_root: str | Path | None = None
) -> list[str]:
    """The texts of queries whose near copies must not be trained on: of a BEIR folder's other splits, and of `others`.

    Args:
        queries, split: what is trained on, as in `read_judged_queries`.
        others: more BEIR folders or data sets, all of whose queries count, or JSONL files ("query" or "text"). The
            folder of `queries` itself adds nothing: its other splits are excluded anyway.

    Raises:
        InputError: a path does not exist, or a line is broken.
    """
    folder = None if Path(queries).is_file() else find_dataset(queries, data_root)
    texts: list[str] = []
    if folder is not None:
        trained = load_judgments(folder, split)[0]
        for part in available_splits(folder):
            texts += (text for i, text in load_judgments(folder, part)[0].items() if i not in trained)
    for other in others:
        file = Path(other)
        if not file.is_file():
            place = find_dataset(other, data_root)
            if folder is not None and place.resolve() == folder.resolve():
                continue
            file = place / "queries.jsonl"
        name = "text" if file.name == "queries.jsonl" else "query"
        for number, value in read_jsonl(file):
            texts.append(string_field(value, name if name in value else "text", file, number, empty=False))
    return texts


def split_queries(
    queries: Sequence[JudgedQuery], documents: Collection[str], modulus: int = 8, excluded: Sequence[str] = ()
) -> QuerySplit:
    """Hold queries out by the CRC-32 of their ids, and leave out near copies of them and of the excluded queries.

    Args:
        documents: the ids in the index.
        modulus: every query with zlib.crc32(id) % modulus == 0 is held out.
        excluded: texts of queries that must not be trained on, such as those of a test set.

    Raises:
        InputError: no query is left to train on, or none is held out.
    """
    kept: list[JudgedQuery] = []
    unknown = 0
    for query in queries:
        known = {document: grade for document, grade in query.relevant.items() if document in documents}
        unknown += len(query.relevant) - len(known)
        if known:
            kept.append(JudgedQuery(query.id, query.text, known))
    held_out = [query for query in kept if is_held_out(query.id, modulus, "crc32")]
    others = [query for query in kept if not is_held_out(query.id, modulus, "crc32")]
    near = near_twins([query.text for query in others], [*(query.text for query in held_out), *excluded], NEAR_COPY)
    train = [query for query, twin in zip(others, near, strict=True) if not twin]
    if not train or not held_out:
        raise InputError(
            f"{len(kept)} of {len(queries)} queries have a relevant document in the index: {len(held_out)} are held "
            f"out and {len(train)} are left, but both are needed; give more queries, or documents by the index's ids"
        )
    return QuerySplit(train, held_out, sum(near), len(queries) - len(kept), unknown)


def _ids(value: Any, field: str, where: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise InputError(f'{where}: the field "{field}" must be a list of at least one id, got {str(value)[:80]}')
    if not all(isinstance(one, str | int) and not isinstance(one, bool) and str(one).strip() for one in value):
        raise InputError(f'{where}: the field "{field}" must hold ids, strings or whole numbers, got {str(value)[:80]}')
    return [str(one) for one in value]


def _grades(value: Any, where: str) -> dict[str, float]:
    if not isinstance(value, list) or not any(isinstance(one, dict) for one in value):
        return dict.fromkeys(_ids(value, "relevant", where), 1.0)
    found: dict[str, float] = {}
    for one in value:
        record = one if isinstance(one, dict) else {"id": one}
        refuse_unknown(record, ("id", "grade"), f"{where}, relevant", what="field")
        (document,) = _ids([record.get("id")], "relevant", where)
        grade = record.get("grade", 1)
        number = isinstance(grade, int | float) and not isinstance(grade, bool)
        if not number or not (math.isfinite(grade) and grade > 0):
            raise InputError(f'{where}, relevant: "grade" must be a number above 0, got {str(grade)[:80]}')
        found[document] = float(grade)
    return found

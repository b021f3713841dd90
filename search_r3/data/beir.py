"""Data sets as BEIR folders (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv), read with errors that name the line.

The layout is BEIR's (Thakur et al. 2021, https://arxiv.org/abs/2104.08663), which `mteb` and most public collections
can write. It is read strictly, since a silently skipped line would change every score after it; only a
build of training data may skip broken lines (`on_fault`).
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_r3.data.io.jsonl import OnFault, id_field, read_jsonl, string_field, tell, text_lines, write_jsonl
from search_r3.errors import InputError
from search_r3.files import atomic_path
from search_r3.model.resolve import cache_dir

DATA_VARIABLE = "SEARCH_R3_DATA"
QRELS_HEADER = ("query-id", "corpus-id", "score")


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a corpus; `title` may be empty."""

    id: str
    title: str
    text: str

    @property
    def full_text(self) -> str:
        """The text that is encoded and indexed: "title text", or the text alone when there is no title."""
        return f"{self.title} {self.text}".strip()


@dataclass
class BeirDataset:
    """A corpus, its queries and the relevance judgments: `qrels[query id][document id] = grade`.

    A grade above 0 means relevant; 0 and below mean judged and not relevant. All three keep the files' order.
    With `ignore_identical_ids`, as in MTEB, a document with the query's own id is not counted as a result: in some data
    sets (ArguAna, Quora) the queries are documents of the corpus.
    """

    name: str
    corpus: dict[str, Document]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]] = field(default_factory=dict)
    ignore_identical_ids: bool = False
    reasoning: dict[str, str] = field(default_factory=dict)
    """What was written about some queries (`read_reasoning`), by query id; only read by `dev_pools`."""

    def identical_ids(self) -> list[str]:
        """The judged queries whose id is that of a document, in the order of the judgments."""
        return [qid for qid in self.qrels if qid in self.queries and qid in self.corpus]

    def queries_in_corpus(self) -> list[str]:
        """The `identical_ids` whose query text equals the document's, with or without title, ignoring white space."""

        def same(qid: str) -> bool:
            query, document = self.queries[qid].split(), self.corpus[qid]
            return query in (document.text.split(), document.full_text.split())

        return [qid for qid in self.identical_ids() if same(qid)]


# ---------------------------------------------------------------------------------------------------------- reading


def load_beir(
    folder: str | Path,
    split: str | None = None,
    name: str | None = None,
    on_fault: OnFault | None = None,
    allow_missing: bool = False,
) -> BeirDataset:
    """Read a BEIR folder.

    Args:
        folder: contains `corpus.jsonl`, `queries.jsonl` and, if there are judgments, `qrels/SPLIT.tsv`.
        split: keep only the queries judged in this split; None loads all queries and the judgments of all splits.
        name: the data set's name; by default its path relative to the data root ("mkqa/en"), else the folder's name.
        on_fault: called for every broken line, which is then skipped, and for an empty file. Do not use it for
            evaluation.
        allow_missing: keep judgments of documents that are not in the corpus and so cannot be retrieved. Use it only if
            this is reported with every result, as `evaluate` does.

    Raises:
        InputError: a file is missing or cannot be read; a line is broken (file, line and field are named); an id
            comes twice; a judgment names a query or (without `allow_missing`) a document that does not exist; the
            split is unknown.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {problem}; give a folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv")
    splits = available_splits(folder)
    if split is not None and split not in splits:
        listed = ", ".join(splits) or "none"
        raise InputError(f'{folder} has no split "{split}"; splits there (qrels/SPLIT.tsv): {listed}')
    corpus = _read_corpus(folder / "corpus.jsonl", on_fault)
    queries = _read_queries(folder / "queries.jsonl", on_fault)
    qrels: dict[str, dict[str, int]] = {}
    known = None if allow_missing else corpus
    for part in splits if split is None else [split]:
        for query_id, judged in _read_qrels(folder / "qrels" / f"{part}.tsv", queries, known, on_fault).items():
            qrels.setdefault(query_id, {}).update(judged)
    if split is not None:
        queries = {query_id: text for query_id, text in queries.items() if query_id in qrels}
    return BeirDataset(name or dataset_name(folder), corpus, queries, qrels)


def load_judgments(folder: str | Path, split: str) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """The queries judged in a split of a BEIR folder, and their judgments, without its corpus.

    Raises:
        InputError: see `load_beir`; the documents are not checked.
    """
    folder = Path(folder)
    if split not in (splits := available_splits(folder)):
        raise InputError(f'{folder} has no split "{split}"; splits there: {", ".join(splits) or "none"}')
    queries = _read_queries(folder / "queries.jsonl", None)
    qrels = _read_qrels(folder / "qrels" / f"{split}.tsv", queries, None, None)
    return {query_id: text for query_id, text in queries.items() if query_id in qrels}, qrels


def available_splits(folder: str | Path) -> list[str]:
    """The names of the splits that a BEIR folder has judgments for, sorted."""
    return sorted(path.stem for path in (Path(folder) / "qrels").glob("*.tsv"))


def beir_files(folder: Path, split: str | None) -> dict[str, Path]:
    """The files read when a split of a BEIR folder is loaded (None: all splits), by their name in the folder; includes
    SOURCE.txt, which documents the origin and may be in the parent folder.
    """
    files = {name: folder / name for name in ("corpus.jsonl", "queries.jsonl")}
    for part in available_splits(folder) if split is None else [split]:
        files[f"qrels/{part}.tsv"] = folder / "qrels" / f"{part}.tsv"
    for place in (folder, folder.parent):
        if (place / "SOURCE.txt").is_file():
            return files | {"SOURCE.txt": place / "SOURCE.txt"}
    return files


def read_reasoning(path: Path, split: str, on_fault: OnFault | None = None) -> dict[str, str]:
    """Query id -> reasoning written for it, from `reasoning.jsonl` of a data set (`_id`, `split`, `reasoning`); only
    the lines of `split`, and of these only those whose reasoning is not empty.

    Raises:
        InputError: the file cannot be read, a line is broken or an id comes twice (without `on_fault`), or no line is
            of this split.
    """
    found: dict[str, str] = {}
    seen: dict[str, int] = {}
    lines = 0
    for number, value in read_jsonl(path, on_fault):
        try:
            if string_field(value, "split", path, number) != split:
                continue
            lines += 1
            query_id = _read_id(value, path, number, seen)
            text = " ".join(string_field(value, "reasoning", path, number).split())
        except InputError as error:
            tell(on_fault, error, "broken field", path, number)
            continue
        seen[query_id] = number
        if text:
            found[query_id] = text
    if not lines:
        raise InputError(f'{path} has no reasoning for the split "{split}"; name another, or remove "reasoning"')
    return found


def _read_corpus(path: Path, on_fault: OnFault | None) -> dict[str, Document]:
    """Empty documents are kept with a warning: real collections contain them, even judged relevant (995 in
    Cranfield)."""
    corpus: dict[str, Document] = {}
    empty: list[str] = []
    seen: dict[str, int] = {}
    for number, value in read_jsonl(path, on_fault):
        try:
            document_id = _read_id(value, path, number, seen)
            title = string_field(value, "title", path, number, default="")
            text = string_field(value, "text", path, number)
            if on_fault:
                _refuse_binary(title + text, path, number)
        except InputError as error:
            tell(on_fault, error, "broken field", path, number)
            continue
        seen[document_id] = number
        if not title.strip() and not text.strip():
            empty.append(f'"{document_id}" in line {number}')
        corpus[document_id] = Document(document_id, title, text)
    if not corpus:
        nothing = InputError(f"{path} has no documents; expected one JSON object per line")
        tell(on_fault, nothing, "nothing in it", path)
    elif len(empty) == len(corpus):
        raise InputError(f'{path}: every document has an empty "title" and an empty "text"; fill the field "text"')
    if empty:
        warnings.warn(
            f'{path}: {len(empty)} of {len(corpus)} documents have an empty "title" and an empty "text" (first: '
            f"{empty[0]}); they are kept, since judgments may name them, but cannot be retrieved",
            stacklevel=3,
        )
    return corpus


def _read_queries(path: Path, on_fault: OnFault | None) -> dict[str, str]:
    queries: dict[str, str] = {}
    seen: dict[str, int] = {}
    for number, value in read_jsonl(path, on_fault):
        try:
            query_id = _read_id(value, path, number, seen)
            text = string_field(value, "text", path, number, empty=False)
            if on_fault:
                _refuse_binary(text, path, number)
        except InputError as error:
            tell(on_fault, error, "broken field", path, number)
            continue
        seen[query_id] = number
        queries[query_id] = text
    if not queries:
        tell(on_fault, InputError(f"{path} has no queries; expected one JSON object per line"), "nothing in it", path)
    return queries


def _refuse_binary(text: str, path: Path, number: int) -> None:
    if "\0" in text:
        raise InputError(f"{path}, line {number}: a NUL character, expected text; fix or remove this line")


def _read_id(value: dict[str, Any], path: Path, number: int, seen: dict[str, int]) -> str:
    key, name = id_field(value, path, number)
    if name.split() != [name]:
        raise InputError(
            f'{path}, line {number}: the field "{key}" is {name!r}, which contains white space; '
            "ids are columns of qrels and run files, so use none"
        )
    if name in seen:
        raise InputError(
            f'{path}, line {number}: the {key} "{name}" was already used in line {seen[name]}; ids are unique'
        )
    return name


def _read_qrels(
    path: Path, queries: dict[str, str], corpus: dict[str, Document] | None, on_fault: OnFault | None
) -> dict[str, dict[str, int]]:
    """The judgments in a file; with `corpus` None, the documents need not exist."""
    qrels: dict[str, dict[str, int]] = {}
    seen: dict[tuple[str, str], int] = {}
    for number, line in text_lines(path, on_fault):
        columns = line.rstrip("\r\n").split("\t")
        if columns == [""] or (number == 1 and columns[-1].strip() == QRELS_HEADER[-1]):
            continue
        try:
            query_id, document_id, grade = _judgment(columns, f"{path}, line {number}", queries, corpus)
            judged = qrels.setdefault(query_id, {})
            if judged.get(document_id, grade) != grade:
                raise InputError(
                    f'{path}, line {number}: query "{query_id}" and document "{document_id}" were already judged '
                    f"{judged[document_id]} in line {seen[query_id, document_id]}, and are {grade} here; keep one"
                )
        except InputError as error:
            tell(on_fault, error, "no judgment", path, number)
            continue
        judged[document_id] = grade
        seen[query_id, document_id] = number
    if not qrels:
        nothing = InputError(f"{path} has no judgments; expected lines of {', '.join(QRELS_HEADER)} split by tabs")
        tell(on_fault, nothing, "nothing in it", path)
    return qrels


def _judgment(
    columns: list[str], where: str, queries: dict[str, str], corpus: dict[str, Document] | None
) -> tuple[str, str, int]:
    if len(columns) != 3:
        found = "\t".join(columns).strip()[:80]
        raise InputError(
            f"{where}: expected 3 columns split by tabs ({', '.join(QRELS_HEADER)}), got {len(columns)}: {found!r}"
        )
    query_id, document_id, score = (column.strip() for column in columns)
    try:
        grade = int(score)
    except ValueError:
        raise InputError(f"{where}: the score must be a whole number such as 0 or 1, got {score!r}") from None
    if query_id not in queries:
        raise InputError(f'{where}: the query-id "{query_id}" is not in queries.jsonl')
    if corpus is not None and document_id not in corpus:
        raise InputError(
            f'{where}: the corpus-id "{document_id}" is not in corpus.jsonl; fix one of the two (to evaluate '
            "anyway, counting the document as not found: --allow-missing)"
        )
    return query_id, document_id, grade


# ---------------------------------------------------------------------------------------------------------- writing


def write_beir(folder: str | Path, dataset: BeirDataset, split: str) -> None:
    """Write a data set as a BEIR folder, each file atomically; other splits already there are kept.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(folder)
    documents = dataset.corpus.values()
    write_jsonl(folder / "corpus.jsonl", ({"_id": d.id, "title": d.title, "text": d.text} for d in documents))
    write_jsonl(folder / "queries.jsonl", ({"_id": i, "text": text} for i, text in dataset.queries.items()))
    with atomic_path(folder / "qrels" / f"{split}.tsv") as scratch:
        rows = [
            QRELS_HEADER,
            *((q, d, str(grade)) for q, judged in dataset.qrels.items() for d, grade in judged.items()),
        ]
        scratch.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- naming


def resolve_root(root: str | Path | None = None) -> Path:
    """The data root: `root`, else the environment variable SEARCH_R3_DATA, else `data` in the cache folder.

    Raises:
        InputError: neither is set, and there is no cache folder.
    """
    given = root or os.environ.get(DATA_VARIABLE)
    return Path(given) if given else cache_dir() / "data"


def dataset_name(folder: Path, root: str | Path | None = None) -> str:
    """A data set's name: its path relative to the data root ("mkqa/en"), else its folder's name."""
    place = folder.resolve()
    try:
        base = resolve_root(root).resolve()
    except InputError:  # without a home folder there is no default root, but an explicit folder still works
        return place.name
    return place.relative_to(base).as_posix() if place != base and place.is_relative_to(base) else place.name


# ---------------------------------------------------------------------------------------------------------- choosing


def stable_order(ids: Iterable[str], seed: int) -> list[str]:
    """`ids` shuffled by a hash of (seed, id): the same on every machine, whatever the files' order."""
    return sorted(ids, key=lambda name: hashlib.blake2b(f"{seed}\t{name}".encode(), digest_size=16).digest())


def choose_pool(dataset: BeirDataset, queries: int, documents: int, seed: int = 0) -> BeirDataset:
    """A fixed subset of a data set: at most `queries` queries with a relevant document, all documents judged for them,
    and random others up to `documents` in total. All judged documents are kept, even if there are more.
    """
    answerable = [q for q in dataset.queries if any(grade > 0 for grade in dataset.qrels.get(q, {}).values())]
    chosen = set(stable_order(answerable, seed)[:queries])
    kept = {document for query in chosen for document in dataset.qrels[query]}
    rest = stable_order((d for d in dataset.corpus if d not in kept), seed)
    kept.update(rest[: max(0, documents - len(kept))])
    return BeirDataset(
        dataset.name,
        {d: document for d, document in dataset.corpus.items() if d in kept},
        {q: text for q, text in dataset.queries.items() if q in chosen},
        {q: dict(judged) for q, judged in dataset.qrels.items() if q in chosen},
        dataset.ignore_identical_ids,
        {q: text for q, text in dataset.reasoning.items() if q in chosen},
    )


def small(dataset: BeirDataset, queries: int = 50, documents: int = 500, seed: int = 0) -> BeirDataset:
    """The fixed sub-corpus "NAME.small": every document judged for 50 queries plus random ones, 500 in all."""
    part = choose_pool(dataset, queries, documents, seed)
    part.name = f"{dataset.name}.small"
    return part

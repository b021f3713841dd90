"""Data sets of ir_datasets, MTEB and the Hugging Face hub by name, downloaded once and kept as BEIR folders.

`ir_datasets:beir/scifact/test` (https://ir-datasets.com) has judgments for one split, here called "test";
`mteb:SciFact` has those that MTEB evaluates on; `hf:OWNER/NAME` and `nanobeir:SciFact` are read by `hub_beir`. Each
requires its package, and a network on first use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from search_r3.data.beir import DATA_VARIABLE, BeirDataset, Document, resolve_root, write_beir
from search_r3.data.io.hub_beir import HubBeir, nanobeir_name, open_hub_beir, stamp_of
from search_r3.errors import InputError
from search_r3.files import atomic_path
from search_r3.optional import require

SPLIT = "test"
"""The split used for ir_datasets, whose names already select the judgments."""
MAX_LISTED = 20


@dataclass
class Fetched:
    """A data set as its package provides it: one BEIR data set per split, and notes on its origin."""

    splits: dict[str, BeirDataset]
    origin: list[str]
    left_out: dict[str, int] = field(default_factory=dict)
    """What was left out -> how often."""

    def drop(self, why: str) -> None:
        self.left_out[why] = self.left_out.get(why, 0) + 1


def is_remote(name: str | Path) -> bool:
    """Whether `fetch` can download a data set of this name."""
    return str(name).partition(":")[0] in _PACKAGES and ":" in str(name)


def fetch(name: str, data_root: str | Path | None = None) -> Path:
    """The BEIR folder of `name`, downloaded if it does not exist: `ROOT/ir_datasets/...` or `ROOT/mteb/...`.

    The folder is written atomically, so an interrupted download leaves nothing behind, and two processes download only
    once. SOURCE.txt documents the origin and what was left out.

    Raises:
        InputError: the package is not installed, it has no such data set, there is no network, the data do not fit into
            a BEIR folder, or the data root that was given does not exist.
    """
    from filelock import FileLock

    package, _, rest = name.partition(":")
    root = resolve_root(data_root)
    if package == "nanobeir":
        rest = nanobeir_name(rest)
    slug = re.sub(r"[^\w.-]+", "_", rest.strip("/")).strip("._") + (stamp_of(rest) if package == "hf" else "")
    if not slug:
        raise InputError(f"{name} is not the name of a data set; expected a name such as {_EXAMPLES[package]}")
    target = root / package / slug
    if _complete(target):
        return target
    if not root.is_dir() and (data_root or os.environ.get(DATA_VARIABLE)):
        raise InputError(
            f"there is no folder {root} to download {name} into; create it, or change --data or {DATA_VARIABLE}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(target) + ".lock"):
            if not _complete(target):  # another process may have downloaded it meanwhile
                _write(target, name, _PACKAGES[package](rest))
    except PermissionError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror}; point --data at a folder you may write to"
        ) from error
    return target


def _complete(folder: Path) -> bool:
    return (folder / "corpus.jsonl").is_file()


def _write(target: Path, name: str, fetched: Fetched) -> None:
    left_out = [f"left out: {count:,} {why}" for why, count in fetched.left_out.items()]
    with atomic_path(target) as scratch:
        for split, dataset in fetched.splits.items():
            if not dataset.qrels:
                raise InputError(f"{name} has no judged query in {split}; there is nothing to evaluate")
            write_beir(scratch, dataset, split)
        (scratch / "SOURCE.txt").write_text("\n".join([name, *fetched.origin, *left_out]) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- ir_datasets


def _from_ir_datasets(name: str) -> Fetched:
    ir_datasets = require("ir_datasets", "ir-datasets", "the name")
    try:
        dataset = ir_datasets.load(name)
    except KeyError as error:
        raise InputError(f"ir_datasets has no data set {name!r}; its names are at https://ir-datasets.com") from error
    lacking = [part for part in ("docs", "queries", "qrels") if not getattr(dataset, f"has_{part}")()]
    if lacking:
        raise InputError(
            f"ir_datasets:{name} has no {' and no '.join(lacking)}; name a subset that has, often NAME/test or NAME/dev"
        )
    fetched = Fetched({}, [f"https://ir-datasets.com, version {getattr(ir_datasets, '__version__', 'unknown')}"])

    def documents() -> Iterator[Document]:
        for row in dataset.docs_iter():
            title, text = getattr(row, "title", None), getattr(row, "text", getattr(row, "body", None))
            if isinstance(title, str) and isinstance(text, str):
                yield Document(row.doc_id, title, text)
            else:
                yield Document(row.doc_id, "", _plain_text(row, name))

    with _told(f"ir_datasets:{name}"):
        queries = ((row.query_id, _plain_text(row, name)) for row in dataset.queries_iter())
        judgments = ((row.query_id, row.doc_id, row.relevance) for row in dataset.qrels_iter())
        fetched.splits[SPLIT] = _dataset(name, documents(), queries, judgments, fetched)
    return fetched


def _plain_text(row: Any, name: str) -> str:
    text = row.default_text() if hasattr(row, "default_text") else getattr(row, "text", None)
    if not isinstance(text, str):
        raise InputError(f"ir_datasets:{name} holds rows without a text ({type(row).__name__}); it cannot be used here")
    return text


# -------------------------------------------------------------------------------------------------------------- MTEB


def _from_mteb(name: str) -> Fetched:
    mteb = require("mteb", "mteb", "the name")
    task_name, _, subset = name.partition("/")
    try:
        task = mteb.get_task(task_name, hf_subsets=[subset]) if subset else mteb.get_task(task_name)
    except (KeyError, ValueError) as error:
        raise InputError(f"mteb:{name}: {str(error).strip(chr(34))}") from error
    metadata = task.metadata
    if metadata.type != "Retrieval":
        raise InputError(f"mteb:{name} is a task of type {metadata.type}; only Retrieval tasks can be used")
    subsets = list(task.hf_subsets)
    if len(subsets) > 1:
        listed = ", ".join(subsets[:MAX_LISTED]) + (", ..." if len(subsets) > MAX_LISTED else "")
        raise InputError(f"mteb:{name} has several subsets; name one, mteb:{task_name}/SUBSET: {listed}")
    with _told(f"mteb:{name}"):
        task.load_data()
        task.convert_v1_dataset_format_to_v2(num_proc=None)
        (parts,) = task.dataset.values()
    origin = [f"{metadata.dataset.get('path')} at revision {metadata.dataset.get('revision')}"]
    origin += [f"license: {metadata.license or 'not specified'}", str(metadata.reference or "")]
    if getattr(task, "ignore_identical_ids", False):
        origin.append("MTEB leaves out documents with a query's own id here: evaluate it with --ignore-identical-ids")
    fetched = Fetched({}, [line for line in origin if line])
    for split, part in parts.items():
        if part.get("top_ranked"):
            raise InputError(f"mteb:{name} reranks given candidates; only tasks that search a whole corpus can be used")
        documents = (Document(row["id"], row.get("title") or "", _mteb_text(row, name)) for row in part["corpus"])
        queries = ((row["id"], _mteb_text(row, name)) for row in part["queries"])
        judgments = ((q, d, grade) for q, grades in part["relevant_docs"].items() for d, grade in grades.items())
        fetched.splits[split] = _dataset(name, documents, queries, judgments, fetched)
    return _one_corpus(fetched, name)


def _mteb_text(row: Mapping[str, Any], name: str) -> str:
    """The text as MTEB gives it to a model, a query followed by its instruction; documents' titles are kept
    separate."""
    text, instruction = row.get("text"), row.get("instruction")
    if not isinstance(text, str):
        raise InputError(f"mteb:{name} holds conversations or images, not texts; it cannot be used here")
    return f"{text} {instruction}" if instruction else text


def _one_corpus(fetched: Fetched, name: str) -> Fetched:
    """A BEIR folder has one corpus and one file of queries for all splits, so these are joined."""
    if len(fetched.splits) > 1:
        corpus: dict[str, Document] = {}
        queries: dict[str, str] = {}
        for dataset in fetched.splits.values():
            clash = next((i for i, d in dataset.corpus.items() if corpus.setdefault(i, d) != d), None)
            clash = clash or next((i for i, q in dataset.queries.items() if queries.setdefault(i, q) != q), None)
            if clash is not None:
                raise InputError(
                    f"mteb:{name}: its splits use the id {clash!r} for different texts; it cannot be used here"
                )
        for dataset in fetched.splits.values():
            dataset.corpus, dataset.queries = corpus, queries
    return fetched


# ----------------------------------------------------------------------------------------------------------- the hub


def _from_hub(name: str) -> Fetched:
    return _read_hub(f"hf:{name}", lambda: open_hub_beir(name))


def _from_nanobeir(name: str) -> Fetched:
    return _read_hub(f"nanobeir:{name}", lambda: open_hub_beir(f"{NANOBEIR}/Nano{name}"))


def _read_hub(name: str, opened: Callable[[], HubBeir]) -> Fetched:
    with _told(name):
        found = opened()
        fetched = Fetched({}, found.origin)
        corpus = [Document(row_id, title, text) for row_id, title, text in found.documents()]
        queries = list(found.queries())
        for split in found.splits:
            fetched.splits[split] = _dataset(name, corpus, queries, found.judgments(split), fetched)
    return fetched


# --------------------------------------------------------------------------------------------------------------- all


def _dataset(
    name: str,
    documents: Iterable[Document],
    queries: Iterable[tuple[str, str]],
    judgments: Iterable[tuple[str, str, float]],
    fetched: Fetched,
) -> BeirDataset:
    """A data set that `load_beir` reads: no white space in ids, no blank query, whole grades, each pair judged once.

    Judgments of documents missing from the corpus are kept; an evaluation reports them.
    """
    corpus: dict[str, Document] = {}
    for document in documents:
        document = replace(document, id=_id(document.id))
        if corpus.setdefault(document.id, document) != document:
            fetched.drop("documents with an id already used")
    kept: dict[str, str] = {}
    for query_id, text in queries:
        if text.strip():
            kept.setdefault(_id(query_id), text)
        else:
            fetched.drop("blank queries")
    qrels: dict[str, dict[str, int]] = {}
    for query_id, document_id, grade in judgments:
        query, judged = _id(query_id), _id(document_id)
        if query not in kept:
            fetched.drop("judgments of blank or missing queries")
            continue
        if grade != int(grade):
            raise InputError(f"{name} judges {query_id} and {document_id} by {grade}; expected whole numbers")
        grades = qrels.setdefault(query, {})
        if grades.get(judged, grade) != grade:
            fetched.drop("judgments below a higher one of the same query and document")
        grades[judged] = max(int(grade), grades.get(judged, int(grade)))
    return BeirDataset(name, corpus, kept, qrels)


def _id(name: Any) -> str:
    """An id without white space, which separates the columns of qrels and runs."""
    return re.sub(r"\s", lambda found: f"%{ord(found[0]):02X}", str(name))


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Convert a package's errors while downloading (network, disk, format) into one InputError that says what to do."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"cannot download {name}: {said}. The first use requires a network; the resulting folder can be copied to "
            "another machine's data root"
        ) from error


NANOBEIR = "sentence-transformers/NanoBEIR-en"
"""The data set of the hub that sentence-transformers' NanoBEIREvaluator reads too."""
_PACKAGES: dict[str, Callable[[str], Fetched]] = {
    "ir_datasets": _from_ir_datasets,
    "mteb": _from_mteb,
    "hf": _from_hub,
    "nanobeir": _from_nanobeir,
}
_EXAMPLES = {
    "ir_datasets": "ir_datasets:beir/scifact/test",
    "mteb": "mteb:SciFact",
    "hf": "hf:mteb/scifact",
    "nanobeir": "nanobeir:SciFact",
}

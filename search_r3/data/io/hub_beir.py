"""Retrieval data sets of the Hugging Face hub in BEIR's layout: subsets corpus and queries, and judgments.

The judgments are in the subset "qrels" (NanoBEIR) or "default" (mteb/scifact), or in the data set NAME-qrels
(BeIR/scifact). A local folder has such subsets, or files and folders of these names: corpus.parquet, queries.parquet,
qrels/test.parquet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_r3.data.io.hf_datasets import BUILDERS, Rows, commit_of, local_files, open_splits, subsets
from search_r3.errors import InputError
from search_r3.hints import nearest

PURPOSE = "the name"
IDS = ("_id", "id")
NANOBEIR_NAMES = (
    "ClimateFEVER", "DBPedia", "FEVER", "FiQA2018", "HotpotQA", "MSMARCO", "NFCorpus", "NQ", "QuoraRetrieval",
    "SCIDOCS", "ArguAna", "SciFact", "Touche2020",
)  # fmt: skip
"""The parts of NanoBEIR: at most 50 queries of a BEIR data set's test split over some thousand documents."""
ALL_OF_NANOBEIR = "nanobeir"


@dataclass
class HubBeir:
    """A data set's tables, which are read when they are asked for."""

    name: str
    corpus: Rows
    query_rows: Rows
    qrels: dict[str, Rows]
    origin: list[str]

    @property
    def splits(self) -> list[str]:
        """The splits that have judgments."""
        return list(self.qrels)

    def documents(self) -> Iterator[tuple[str, str, str]]:
        """(id, title, text) of every document."""
        for row in self.corpus:
            yield self._id(row), str(row.get("title") or ""), self._text(row)

    def queries(self) -> Iterator[tuple[str, str]]:
        """(id, text) of every query."""
        return ((self._id(row), self._text(row)) for row in self.query_rows)

    def judgments(self, split: str) -> Iterator[tuple[str, str, float]]:
        """(query id, document id, grade); without a column of grades, each is 1."""
        for row in self.qrels[split]:
            if missing := [key for key in ("query-id", "corpus-id") if row.get(key) is None]:
                raise InputError(f'hf:{self.name}: the judgments have no column "{missing[0]}" ({", ".join(row)})')
            documents = row["corpus-id"] if isinstance(row["corpus-id"], list) else [row["corpus-id"]]
            for document in documents:
                yield str(row["query-id"]), str(document), self._grade(row)

    def _grade(self, row: dict[str, Any]) -> float:
        try:
            return float(row.get("score", 1))
        except (TypeError, ValueError) as error:
            raise InputError(f"hf:{self.name}: a judgment's score is {row['score']!r}, expected a number") from error

    def _id(self, row: dict[str, Any]) -> str:
        key = next((key for key in IDS if row.get(key) is not None), None)
        if key is None:
            raise InputError(f'hf:{self.name}: a row without an "_id" ({", ".join(row)}); it cannot be used here')
        return str(row[key])

    def _text(self, row: dict[str, Any]) -> str:
        if not isinstance(row.get("text"), str):
            raise InputError(f'hf:{self.name}: a row without a "text" ({", ".join(row)}); it cannot be used here')
        return str(row["text"])


def open_hub_beir(name: str) -> HubBeir:
    """Open a data set by name.

    Args:
        name: OWNER/NAME, OWNER/NAME/SPLIT (the split of that name in all subsets; its judgments are then the split
            "test") or either with @REVISION; or a local folder.

    Raises:
        InputError: there is no such data set or split, it has another layout, or the package `datasets` is missing.
    """
    if Path(name).is_dir():
        return _opened(name, None, None)
    address, _, revision = name.partition("@")
    parts = address.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise InputError(f"hf:{name} is no data set: expected hf:OWNER/NAME, hf:OWNER/NAME/SPLIT or a local folder")
    return _opened("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, revision or None)


def nanobeir_name(name: str) -> str:
    """A part of NanoBEIR as it is written, whatever the case of `name`. Raises InputError for an unknown one."""
    found = next((known for known in NANOBEIR_NAMES if known.lower() == name.lower()), None)
    if found is None:
        near = nearest(name, NANOBEIR_NAMES, cutoff=0.4)
        hint = f'did you mean "{near}"? ' if near else ""
        raise InputError(f'NanoBEIR has no part "{name}"; {hint}it has: {", ".join(NANOBEIR_NAMES)}')
    return found


def with_nanobeir(names: Iterable[str]) -> list[str]:
    """The names, with "nanobeir" replaced by all its parts ("nanobeir:ClimateFEVER", ...)."""
    return [
        one
        for name in names
        for one in ([f"nanobeir:{part}" for part in NANOBEIR_NAMES] if name == ALL_OF_NANOBEIR else [name])
    ]


def stamp_of(name: str) -> str:
    """What distinguishes the states of a local folder (sizes and times of its files), for the name of its copy; "" for
    a data set of the hub.
    """
    if not Path(name).is_dir():
        return ""
    digest = hashlib.blake2b(str(Path(name).resolve()).encode("utf-8", "surrogatepass"), digest_size=4)
    for file in local_files(name):
        stat = file.stat()
        digest.update(f"\n{file}\t{stat.st_size}\t{stat.st_mtime_ns}".encode("utf-8", "surrogatepass"))
    return f"-{digest.hexdigest()}"


def _opened(path: str, split: str | None, revision: str | None) -> HubBeir:
    local = Path(path).is_dir()
    if local and (named := {part: _named_files(Path(path), part) for part in ("corpus", "queries", "qrels")})["corpus"]:
        if missing := [part for part, files in named.items() if not files]:
            raise InputError(f"{path} has no file or folder {missing[0]}; expected corpus, queries and qrels")
        tables = {part: open_splits(path, files=files, purpose=PURPOSE) for part, files in named.items()}
        qrels = {"test" if name == "qrels" else name: rows for name, rows in tables["qrels"].items()}
        corpus, queries = (next(iter(tables[part].values())) for part in ("corpus", "queries"))
        return HubBeir(path, corpus, queries, qrels, [f"files of {path}"])
    known = subsets(path, revision, PURPOSE)
    if missing := [part for part in ("corpus", "queries") if part not in known]:
        raise InputError(
            f"hf:{path} has no subset {missing[0]} (it has: {', '.join(known)}); expected BEIR's layout: corpus, "
            "queries, and qrels or default"
        )
    judged = next((part for part in ("qrels", "default") if part in known), None)
    if judged is None and local:
        raise InputError(f"{path} has no subset qrels or default with judgments (it has: {', '.join(known)})")
    opened = {part: open_splits(path, part, revision=revision, purpose=PURPOSE) for part in ("corpus", "queries")}
    qrels = open_splits(path, judged, revision=revision) if judged else open_splits(f"{path}-qrels", purpose=PURPOSE)
    corpus, queries = (_chosen(opened[part], split, f"{path}, subset {part}") for part in ("corpus", "queries"))
    if split is not None:
        qrels = {"test": _chosen(qrels, split, f"{path}, judgments")}
    origin = [path] if local else [f"https://huggingface.co/datasets/{path} at commit {commit_of(path, revision)}"]
    return HubBeir(path, corpus, queries, qrels, [*origin, "license: see the data set's card"])


def _named_files(folder: Path, part: str) -> dict[str, list[Path]]:
    """Split -> files of a part: PART.parquet or several PART-*.parquet ("PART"), or the files in a folder PART."""
    kinds = tuple(BUILDERS)
    listed = sorted(file for file in folder.glob(f"{part}[-.]*") if file.name.endswith(kinds))
    if listed:
        return {part: listed}
    found: dict[str, list[Path]] = {}
    for file in sorted((folder / part).glob("*")):
        if file.name.endswith(kinds):
            found.setdefault(file.name.split(".")[0].split("-")[0], []).append(file)
    return found


def _chosen(tables: dict[str, Rows], split: str | None, where: str) -> Rows:
    if split is None and len(tables) == 1:
        return next(iter(tables.values()))
    if split not in tables:
        listed = ", ".join(list(tables)[:20])
        problem = "has several splits; name one, hf:OWNER/NAME/SPLIT" if split is None else f"has no split {split}"
        raise InputError(f"hf:{where} {problem}: {listed}")
    return tables[split]

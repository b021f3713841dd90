"""The training data of stage 2: queries, the environment's documents, and which documents answer which query.

Documents are identified by their text, so data sets may share them. The recipe refuses test splits; held-out queries
and the queries of the dev pools are never trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from search_r3.data.beir import load_beir, stable_order
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.pairs import read_pairs
from search_r3.data.sources.beir_pairs import is_held_out
from search_r3.errors import InputError
from search_r3.training.grpo.grpo_config import GRPOConfig, QuerySet

ORDER_STREAM, RESAMPLE_STREAM = 91, 92
"""Keys of separate random streams: the shuffle of an epoch, and the queries that replace groups without variance."""


@dataclass
class Query:
    """A query with its relevance judgments: `grades` maps rows of the corpus to grades."""

    id: str
    text: str
    grades: dict[int, float] = field(default_factory=dict)

    @property
    def positive(self) -> int:
        """The row with the highest grade; of several, the first."""
        return max(self.grades, key=lambda row: (self.grades[row], -row))


@dataclass
class RLDataset:
    """The documents (document i is row i of the corpus), the training queries, and the held-out queries."""

    documents: list[str]
    train: list[Query]
    held_out: list[Query]

    @property
    def sha256(self) -> str:
        """Hash of the documents and of the queries with their grades; a run resumes only if it is unchanged."""
        digest = hashlib.sha256("\0".join(self.documents).encode("utf-8", "surrogatepass"))
        for query in (*self.train, *self.held_out):
            digest.update(f"\0{query.text}\0{sorted(query.grades.items())}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def load_rl_dataset(config: GRPOConfig, never: Collection[str] = ()) -> RLDataset:
    """Read the sets that the recipe names.

    Args:
        never: texts of queries to leave out of training, such as the dev pools'.

    Raises:
        InputError: a file or a data set cannot be read, a query's positive is not in the corpus, or there is nothing to
            train on.
    """
    texts = dict.fromkeys(text for source in config.corpus for text in _documents(config, source) if text.strip())
    sets = {part: _merged(config, part) for part in ("train", "held_out")}
    avoid = {text.strip() for text in never} | sets["held_out"].keys()
    sets["train"] = {text: entry for text, entry in sets["train"].items() if text not in avoid}
    if not sets["train"]:
        raise InputError("no query is left to train on: all are held out, in a dev pool, or without a positive")
    positives: dict[str, None] = {}
    for identity, judged in (entry for part in sets.values() for entry in part.values()):
        for text, grade in judged.items():
            if grade > 0 and text not in texts:
                raise InputError(
                    f'query "{identity}" is answered by a document that is not in the corpus ("{text[:60]}..."); '
                    "name its set under corpus"
                )
            if grade > 0:
                positives[text] = None
    documents = list(texts)
    if config.max_documents is not None and len(documents) > config.max_documents:
        if len(positives) > config.max_documents:
            raise InputError(
                f"max_documents is {config.max_documents}, but the queries have {len(positives)} positives; raise it, "
                "or set limit in a query set"
            )
        others = stable_order((text for text in documents if text not in positives), config.loop.seed)
        kept = positives.keys() | set(others[: config.max_documents - len(positives)])
        documents = [text for text in documents if text in kept]
    row_of = {text: row for row, text in enumerate(documents)}

    def numbered(part: dict[str, tuple[str, dict[str, float]]]) -> list[Query]:
        return [
            Query(identity, text, {row_of[doc]: grade for doc, grade in judged.items() if doc in row_of})
            for text, (identity, judged) in part.items()
        ]

    held_out = numbered(sets["held_out"])
    by_id = {query.id: query for query in held_out}
    mixed = [by_id[key] for key in stable_order(by_id, config.loop.seed)]  # so that the first few come from every set
    return RLDataset(documents, numbered(sets["train"]), mixed)


class TrainingQueries:
    """The queries that are trained on (all of them, or those passed to `keep`), and their order in batches.

    Args:
        every: all training queries of the data set.
        batch_size: queries per batch, over all processes.

    Attributes:
        kept: indices into `every` of the queries that are trained on; None for all.
        queries: the queries that are trained on.
        order: which of `queries` are in which batch.
    """

    def __init__(self, every: Sequence[Query], batch_size: int, seed: int) -> None:
        self._every, self._batch_size, self._seed = every, batch_size, seed
        self.keep(None)

    def keep(self, numbers: list[int] | None) -> None:
        """Train only on the queries with these indices; None for all.

        Raises:
            InputError: there are too few for one batch.
        """
        self.kept = numbers
        self.queries = list(self._every) if numbers is None else [self._every[number] for number in numbers]
        self.order = QueryOrder(len(self.queries), self._batch_size, self._seed)


class QueryOrder:
    """Which queries are in which batch: a pure function of the seed and the batch's number.

    Args:
        queries: the number of training queries.
        size: queries per batch, over all processes.
    """

    def __init__(self, queries: int, size: int, seed: int) -> None:
        """Raises InputError for too few queries."""
        self.queries, self.size, self.seed = queries, size, seed
        self.per_epoch = queries // size
        if not self.per_epoch:
            raise InputError(
                f"{queries} queries are too few for a batch of {size}; lower queries_per_step or name more"
            )

    def batch(self, number: int) -> list[int]:
        """The queries of a batch; each occurs at most once per epoch."""
        epoch, index = divmod(number, self.per_epoch)
        order = np.random.default_rng([self.seed, ORDER_STREAM, epoch]).permutation(self.queries)
        return order[index * self.size : (index + 1) * self.size].tolist()

    def others(self, number: int, attempt: int, count: int) -> list[int]:
        """`count` different queries (or all, if there are fewer), drawn at random to replace some of a batch."""
        rng = np.random.default_rng([self.seed, RESAMPLE_STREAM, number, 0, attempt])
        return rng.permutation(self.queries)[:count].tolist()


def _documents(config: GRPOConfig, source: Any) -> Iterator[str]:
    if source.pairs:
        for pair in read_pairs(source.pairs):
            yield from (*pair.relevant, *pair.negatives)
    else:
        folder = find_dataset(source.beir, config.data_root)
        yield from (document.full_text for document in load_beir(folder).corpus.values())


def _merged(config: GRPOConfig, part: str) -> dict[str, tuple[str, dict[str, float]]]:
    """Query text -> (id, document text -> grade), over all sets; repeated queries get all their answers."""
    merged: dict[str, tuple[str, dict[str, float]]] = {}
    for source in config.queries:
        queries = _queries(config, source, held_out=part == "held_out")
        if part == "train" and source.limit is not None:
            kept = set(stable_order(queries, config.loop.seed)[: source.limit])
            queries = {key: value for key, value in queries.items() if key in kept}
        for key, (text, judged) in queries.items():
            grades = merged.setdefault(text.strip(), (f"{source.name}/{key}", {}))[1]
            for document, grade in judged.items():
                grades[document] = max(grade, grades.get(document, grade))
    return {text: entry for text, entry in merged.items() if any(grade > 0 for grade in entry[1].values())}


def _queries(config: GRPOConfig, source: QuerySet, held_out: bool) -> dict[str, tuple[str, dict[str, float]]]:
    """Id -> (query text, document text -> grade) of one set: either the held-out queries or the others."""
    modulus = source.hold_out_modulus
    if held_out and not modulus:
        return {}
    queries: dict[str, tuple[str, dict[str, float]]] = {}
    if source.pairs:
        for pair in read_pairs(source.pairs):
            digest = hashlib.blake2b(pair.query.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()
            if not modulus or (int.from_bytes(digest, "little") % modulus == 0) == held_out:
                queries[pair.id] = (pair.query, pair.relevant)
        return queries
    dataset = load_beir(find_dataset(str(source.beir), config.data_root), source.split)
    for key, text in dataset.queries.items():
        if not modulus or is_held_out(key, modulus, source.hold_out) == held_out:
            judged = {dataset.corpus[did].full_text: float(grade) for did, grade in dataset.qrels[key].items()}
            queries[key] = (text, judged)
    return queries

"""Fixed pools for comparing checkpoints during training: small enough to encode often, never trained on.

A pool is a subset of a data set, chosen by a seeded hash of the ids, so all runs are compared on the same texts. No
pool uses a test split, except those of NanoBEIR, whose queries are from BEIR's test splits. Scores on a pool are higher
than on the whole corpus, since it has fewer distractors; `dev_set` gives the same queries over the whole corpus.
"""

from __future__ import annotations

from pathlib import Path

from search_r3.data.beir import BeirDataset, choose_pool, load_beir, read_reasoning
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.io.hub_beir import ALL_OF_NANOBEIR, nanobeir_name
from search_r3.data.sources.beir_pairs import is_held_out
from search_r3.errors import InputError
from search_r3.hints import refuse_unknown

SCIFACT_DEV_MODULUS = 8  # the data's README: train claims with int(_id) % 8 == 0 are dev
CRC32_DEV_MODULUS = 8  # and of three further sets, the train queries with zlib.crc32(_id) % 8 == 0
MAX_JUDGED = 20
"""Judged documents of a query from which a pool leaves it out: half of NFCorpus's queries, which have up to 900."""


def dev_pool(
    kind: str,
    data_root: str | Path | None = None,
    max_queries: int = 200,
    max_documents: int = 1000,
    seed: int = 0,
) -> BeirDataset:
    """A fixed dev pool: at most `max_queries` queries, every document judged for them, and random others.

    Args:
        kind: "cosqa" or "nfcorpus" (their split dev), "scifact" (the train claims with int(_id) % 8 == 0, which recipes
            leave out with `hold_out_modulus: 8`), "hotpotqa_more", "entailmentbank" or "strategyqa" (the train
            queries with zlib.crc32(_id) % 8 == 0, left out with `hold_out: crc32` as well; their split dev is a test),
            or "nanobeir:SciFact" (a part of NanoBEIR: do not report BEIR's measures of a checkpoint chosen by it).
        data_root: where the data sets are (see `find_dataset`).
        max_queries, max_documents: limits; fewer queries are used if their judged documents would be too many. A query
            with more than `MAX_JUDGED` of them is never used.
        seed: selects the pool.

    Returns:
        The data set, named "KIND.dev" ("NanoSciFact.dev").

    Raises:
        InputError: the kind is unknown, a limit is below 1, or the data set is missing or broken.
    """
    whole = dev_set(kind, data_root)
    whole.qrels = {q: judged for q, judged in whole.qrels.items() if len(judged) <= MAX_JUDGED}
    for name, value in (("max_queries", max_queries), ("max_documents", max_documents)):
        if value < 1:
            raise InputError(f"dev pool {kind}: {name} must be 1 or more, got {value}")
    pool = choose_pool(whole, max_queries, max_documents, seed)
    while len(pool.corpus) > max_documents and len(pool.queries) > 1:
        pool = choose_pool(whole, len(pool.queries) - 1, max_documents, seed)
    if not pool.queries:
        raise InputError(f"dev pool {kind}: no query has a relevant document; check the data set")
    if len(pool.corpus) > max_documents:
        raise InputError(
            f"dev pool {kind}: one query alone has {len(pool.corpus)} judged documents, more than max_documents "
            f"{max_documents}; raise it"
        )
    pool.name = f"{whole.name}.dev"
    return pool


def dev_set(kind: str, data_root: str | Path | None = None) -> BeirDataset:
    """All dev queries of a kind over the whole corpus, and their reasoning if the data set has a `reasoning.jsonl`.

    See `dev_pool` for the kinds.

    Raises:
        InputError: the kind is unknown, or the data set is missing or broken.
    """
    if kind.startswith(f"{ALL_OF_NANOBEIR}:"):
        part = nanobeir_name(kind.partition(":")[2])
        return load_beir(find_dataset(kind, data_root), "test", name=f"Nano{part}")
    refuse_unknown([kind], tuple(POOLS), "dev pool", what="kind")
    split, modulus, rule = POOLS[kind]
    folder = find_dataset(kind, data_root)
    dataset = load_beir(folder, split, name=kind)
    if (reasoning := folder / "reasoning.jsonl").is_file():
        dataset.reasoning = read_reasoning(reasoning, split)
    if modulus is not None:
        dataset.queries = {q: text for q, text in dataset.queries.items() if is_held_out(q, modulus, rule)}
        dataset.qrels = {q: judged for q, judged in dataset.qrels.items() if q in dataset.queries}
    return dataset


POOLS: dict[str, tuple[str, int | None, str]] = {
    "cosqa": ("dev", None, ""),
    "scifact": ("train", SCIFACT_DEV_MODULUS, "number"),
    "nfcorpus": ("dev", None, ""),
    "hotpotqa_more": ("train", CRC32_DEV_MODULUS, "crc32"),
    "entailmentbank": ("train", CRC32_DEV_MODULUS, "crc32"),
    "strategyqa": ("train", CRC32_DEV_MODULUS, "crc32"),
}
"""Kind -> the split, and of its queries those that are held out: modulus and rule of `is_held_out`."""

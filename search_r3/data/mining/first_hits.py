"""Passages that training reads with each query: the first hits of a retriever in the corpus of the query's own source.

A model that is to read a search's hits (`search_r3.model.reading`) needs hits as they are, answers and near misses, so
nothing is filtered here; what training leaves out, the recipe says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.data.mining.hard_negatives import BLOCK, Candidates, gather, write_with_manifest
from search_r3.data.mining.scorers import Report, Scorer
from search_r3.data.mining.word_overlap import normalize
from search_r3.data.pairs import TrainingPair, read_pairs
from search_r3.data.shard_checkpoints import ShardCheckpoints
from search_r3.errors import InputError
from search_r3.files import sha256_of
from search_r3.ranking import top_k


def corpus_tag(source: str) -> str:
    """The tag that a source's documents share: "scifact" for "queries:scifact/train", its kind without a data set."""
    kind, _, origin = source.partition(":")
    return origin.split("/")[0] or kind


def own_documents(candidates: Candidates, tag: str) -> np.ndarray:
    """The indices of the candidates with this tag; of all candidates for ""."""
    return np.array([j for j, tags in enumerate(candidates.tags) if not tag or tag in tags], dtype=np.int64)


def first_hits(scores_N: np.ndarray, own: np.ndarray, count: int, zero_is_no_match: bool) -> list[int]:
    """The `count` best of the candidates `own`, best first; of equal scores, the lower index first."""
    scores_1K, order_1K = top_k(scores_N[None, own], count)
    matched = scores_1K[0] > 0 if zero_is_no_match else np.isfinite(scores_1K[0])
    return own[order_1K[0][matched]].tolist()


def add_first_hits(
    source: str | Path,
    output: str | Path,
    scorer: Scorer,
    count: int = 8,
    *,
    corpora: Sequence[str | Path] = (),
    data_root: str | Path | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Write the pairs of `source` to `output` with their first `count` hits as `passages`, and OUTPUT.manifest.json.

    The corpus of a pair consists of the documents that answer queries of its data set or package (of its kind, if it
    has none), and of those of `corpora` with that name. Passages that a pair had are replaced. The same input and
    scorer give the same file. An interrupted run leaves OUTPUT.partial, from which the same call resumes.

    Args:
        corpora: BEIR data sets (see `find_dataset` for `data_root`).

    Returns:
        The manifest, with the counts of pairs, passages, pairs without any, and pairs with an answer among theirs.

    Raises:
        InputError: `source` or a corpus cannot be read, `output` cannot be written, OUTPUT.partial belongs to another
            run, `count` is below 1, or no query has a hit.
    """
    if count < 1:
        raise InputError(f"passages must be 1 or more, got {count}")
    pairs = read_pairs(source)
    candidates = gather(pairs, corpora, data_root)
    record = {
        "pairs_sha256": sha256_of(source),
        "candidates_sha256": hashlib.sha256("\0".join(candidates.texts).encode()).hexdigest(),
        "retriever": {"name": scorer.name, **scorer.identity},
        "corpora": [str(name) for name in corpora],
        "count": count,
    }
    with closing(ShardCheckpoints(Path(f"{output}.partial"), record)) as checkpoints:
        found = _search(pairs, candidates, scorer, count, checkpoints, report)
        if not any(line["hits"] for line in found):
            raise InputError(f"{source}: no query has a hit; add a corpus, or search with another retriever")
        texts = candidates.texts
        read = (
            replace(pair, passages=tuple(texts[j] for j in line["hits"]))
            for pair, line in zip(pairs, found, strict=True)
        )
        manifest = write_with_manifest(output, read, {**_counts(pairs, candidates, found), **record})
        checkpoints.remove()
    return manifest


def _search(
    pairs: Sequence[TrainingPair],
    candidates: Candidates,
    scorer: Scorer,
    count: int,
    checkpoints: ShardCheckpoints,
    report: Report | None,
) -> list[dict[str, Any]]:
    found = checkpoints.finished([pair.id for pair in pairs], "pairs")
    if len(found) < len(pairs):
        scorer.prepare(candidates.texts, checkpoints.folder / "retriever", report)
    own = {tag: own_documents(candidates, tag) for tag in {corpus_tag(pair.source) for pair in pairs}}
    for start in range(len(found), len(pairs), BLOCK):
        block = pairs[start : start + BLOCK]
        scores_QN = scorer.score([pair.query for pair in block])
        lines = [
            {"id": pair.id, "hits": first_hits(row_N, own[corpus_tag(pair.source)], count, scorer.zero_is_no_match)}
            for pair, row_N in zip(block, scores_QN, strict=True)
        ]
        checkpoints.add_block(lines)
        found += lines
        if report:
            report("queries searched", len(found), len(pairs))
    return found


def _counts(pairs: Sequence[TrainingPair], candidates: Candidates, found: Sequence[dict[str, Any]]) -> dict[str, int]:
    answered = [
        not candidates.answers[normalize(pair.query)].isdisjoint(line["hits"])
        for pair, line in zip(pairs, found, strict=True)
    ]
    return {
        "pairs": len(pairs),
        "passages": sum(len(line["hits"]) for line in found),
        "pairs_with_none": sum(not line["hits"] for line in found),
        "pairs_with_an_answer": sum(answered),
        "candidates": len(candidates.texts),
    }

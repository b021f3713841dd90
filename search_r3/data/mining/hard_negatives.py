"""Hard negatives for training pairs: texts that a retriever ranks high for a query and that do not answer it.

Candidates are the pairs' own positives and, optionally, a corpus. Answers are kept out by excluding known positives and
near copies of them, by a margin and a share of the positive's own score (the positive-aware mining of NV-Retriever,
Moreira et al. 2024, arXiv 2407.15831, section 3), by a window of ranks, and by a teacher's scores.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.data.beir import load_beir, stable_order
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.mining.scorers import Report, Scorer
from search_r3.data.mining.word_overlap import near_identical, normalize, word_set
from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs
from search_r3.data.shard_checkpoints import ShardCheckpoints
from search_r3.errors import InputError
from search_r3.files import atomic_write_text, sha256_of
from search_r3.ranking import rank_of_best_positive, top_k

BLOCK = 128
"""Queries whose negatives are written to disk together; an interrupted run resumes after the last complete block."""
GUARDS = ("known positive", "near copy", "no match", "other source", "margin", "share", "teacher", "had it already")


@dataclass(frozen=True, slots=True)
class MineSettings:
    """How many negatives to mine, from which ranks, and which candidates count as false negatives."""

    per_pair: int = 4
    """Maximum number of new negatives for each pair."""
    range_max: int = 100
    """The last rank from which candidates are taken, known positives not counted."""
    range_min: int = 0
    """Number of top ranks that are skipped."""
    margin: float | None = None
    """Keep a candidate only if score <= score(positive) - margin, in the retriever's own units."""
    share: float | None = 0.95
    """Keep a candidate only if score <= share * score(positive)."""
    teacher_share: float = 0.95
    """The same for the teacher's scores, if there is a teacher."""
    near: float = 0.85
    """Maximum share of its words that a candidate may have in common with a known positive of the query."""
    same_source: bool = False
    """Only candidates of the pair's own kind or data set: functions for docstrings, abstracts for scifact's claims."""
    sample: bool = False
    """Choose at random among the candidates that pass, instead of the highest first."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("per_pair", 1), ("range_max", 1), ("range_min", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.range_min >= self.range_max:
            raise InputError(
                f"range_min is {self.range_min} and range_max {self.range_max}: no rank is left; raise range_max"
            )
        if self.margin is not None and not self.margin >= 0:
            raise InputError(f"margin must be 0 or more, got {self.margin}")
        for name in ("share", "teacher_share", "near"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InputError(f"{name} must be above 0 and at most 1, got {value}")


@dataclass(frozen=True, slots=True)
class Candidates:
    """The texts that negatives are taken from, and which of them answer which query.

    Attributes:
        texts: distinct texts, in order of first occurrence.
        tags: for each text, the source kinds and data sets that it belongs to ("titles", "scifact").
        positive_of: for each pair, the index of its positive.
        answers: normalized query -> indices of all its known positives.
    """

    texts: list[str]
    tags: list[set[str]]
    positive_of: list[int]
    answers: dict[str, set[int]]


def mine_negatives(
    source: str | Path,
    output: str | Path,
    scorer: Scorer,
    settings: MineSettings | None = None,
    *,
    corpora: Sequence[str | Path] = (),
    data_root: str | Path | None = None,
    teacher: Scorer | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Write the pairs of `source` to `output`, with new negatives after existing ones, and OUTPUT.manifest.json.

    The same input, scorer and settings give the same file. An interrupted run leaves OUTPUT.partial, from which the
    same call resumes.

    Args:
        corpora: BEIR data sets whose documents are candidates too (see `find_dataset` for `data_root`).
        teacher: a second scorer; candidates it scores above `teacher_share` of the positive's score are dropped.

    Returns:
        The manifest: counts of pairs and negatives, and of the candidates that each guard dropped. Guards are applied
        in the order of `GUARDS`, and only until a pair has enough negatives (with `sample`, to all candidates).

    Raises:
        InputError: `source` or a corpus cannot be read, `output` cannot be written, OUTPUT.partial belongs to another
            run, or no negative passes.
    """
    settings = settings or MineSettings()
    pairs = read_pairs(source)
    candidates = gather(pairs, corpora, data_root)
    record = {
        "pairs_sha256": sha256_of(source),
        "candidates_sha256": hashlib.sha256("\0".join(candidates.texts).encode()).hexdigest(),
        "retriever": {"name": scorer.name, **scorer.identity},
        "teacher": {"name": teacher.name, **teacher.identity} if teacher else None,
        "corpora": [str(name) for name in corpora],
        "settings": asdict(settings),
    }
    with closing(ShardCheckpoints(Path(f"{output}.partial"), record)) as checkpoints:
        found = _mine(pairs, candidates, scorer, teacher, settings, checkpoints, report)
        counts = _counts(found, settings.per_pair)
        if not counts["negatives"]:
            raise InputError(
                f"{source}: no candidate passed the guards ({counts['dropped']}); loosen them, raise range_max "
                "or add a corpus"
            )
        texts = candidates.texts
        mined = (
            replace(pair, negatives=(*pair.negatives, *(texts[j] for j in line["negatives"])))
            for pair, line in zip(pairs, found, strict=True)
        )
        manifest = write_with_manifest(output, mined, {**counts, "candidates": len(texts), **record})
        checkpoints.remove()
    return manifest


def write_with_manifest(output: str | Path, pairs: Iterable[TrainingPair], about: dict[str, Any]) -> dict[str, Any]:
    """Write the pairs to `output`, and its name, its hash and `about` to OUTPUT.manifest.json; returns the manifest."""
    write_pairs(output, pairs)
    manifest = {"output": Path(output).name, "sha256": sha256_of(output), **about}
    atomic_write_text(f"{output}.manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def _mine(
    pairs: Sequence[TrainingPair],
    candidates: Candidates,
    scorer: Scorer,
    teacher: Scorer | None,
    settings: MineSettings,
    checkpoints: ShardCheckpoints,
    report: Report | None,
) -> list[dict[str, Any]]:
    """One record per pair: its negatives, its positive's rank, and how many candidates each guard dropped."""
    found = checkpoints.finished([pair.id for pair in pairs], "pairs")
    if len(found) < len(pairs):
        for role, one in (("retriever", scorer), ("teacher", teacher)):
            if one:
                one.prepare(candidates.texts, checkpoints.folder / role, report)
    for start in range(len(found), len(pairs), BLOCK):
        block = range(start, min(start + BLOCK, len(pairs)))
        queries = [pairs[i].query for i in block]
        scores_QN = scorer.score(queries)
        teacher_QN = teacher.score(queries) if teacher else None
        lines = []
        for line, i in enumerate(block):
            row = None if teacher_QN is None else teacher_QN[line]
            chosen, dropped = choose(i, pairs[i], candidates, scores_QN[line], row, settings, scorer)
            rank = _rank_of_positive(i, pairs[i], candidates, scores_QN[line])
            lines.append({"id": pairs[i].id, "negatives": chosen, "rank": rank, "dropped": dict(dropped)})
        checkpoints.add_block(lines)
        found += lines
        if report:
            report("queries mined", len(found), len(pairs))
    return found


def gather(
    pairs: Sequence[TrainingPair], corpora: Sequence[str | Path] = (), data_root: str | Path | None = None
) -> Candidates:
    """All positives, then the documents of `corpora`; duplicate texts are one candidate."""
    index: dict[str, int] = {}
    tags: list[set[str]] = []
    answers: dict[str, set[int]] = defaultdict(set)

    def add(text: str, of: set[str]) -> int:
        if text not in index:
            index[text] = len(index)
            tags.append(set())
        tags[index[text]] |= of
        return index[text]

    positive_of = []
    for pair in pairs:
        places = [add(text, tags_of(pair.source)) for text in pair.relevant]
        positive_of.append(places[0])
        answers[normalize(pair.query)].update(places)
    for name in corpora:
        dataset = load_beir(find_dataset(name, data_root))
        tags_of_corpus = tags_of(f"corpus:{Path(name).name if Path(name).is_dir() else name}")
        for document in dataset.corpus.values():
            if document.full_text:
                add(document.full_text, tags_of_corpus)
    return Candidates(list(index), tags, positive_of, dict(answers))


def tags_of(source: str) -> set[str]:
    """{"queries", "scifact"} for "queries:scifact/train": a source's kind and its data set or package."""
    kind, _, origin = source.partition(":")
    return {kind, origin.split("/")[0]} - {""}


def choose(
    i: int,
    pair: TrainingPair,
    candidates: Candidates,
    scores_N: np.ndarray,
    teacher_N: np.ndarray | None,
    settings: MineSettings,
    scorer: Scorer,
) -> tuple[list[int], Counter[str]]:
    """Indices of the negatives of pair number `i`, the nearest first, and how many candidates each guard dropped."""
    answers = candidates.answers[normalize(pair.query)]
    _, order_1K = top_k(scores_N[None], settings.range_max + len(answers))
    window = [j for j in order_1K[0].tolist() if j not in answers]
    dropped: Counter[str] = Counter()
    if len(window) < order_1K.shape[1]:
        dropped["known positive"] = order_1K.shape[1] - len(window)
    guards = _Guards(i, pair, candidates, scores_N, teacher_N, settings, scorer)
    passed: list[int] = []
    for j in window[settings.range_min : settings.range_max]:
        if (reason := guards.reason_to_drop(j)) is not None:
            dropped[reason] += 1
            continue
        passed.append(j)
        if len(passed) == settings.per_pair and not settings.sample:
            break
    if settings.sample and len(passed) > settings.per_pair:
        kept = set(stable_order((f"{pair.id}\t{j}" for j in passed), settings.seed)[: settings.per_pair])
        passed = [j for j in passed if f"{pair.id}\t{j}" in kept]
    return passed, dropped


class _Guards:
    """Keeps answers out of the negatives of pair number `i`; arguments as for `choose`."""

    def __init__(
        self,
        i: int,
        pair: TrainingPair,
        candidates: Candidates,
        scores_N: np.ndarray,
        teacher_N: np.ndarray | None,
        settings: MineSettings,
        scorer: Scorer,
    ) -> None:
        positive = candidates.positive_of[i]
        self.candidates, self.settings, self.scores_N, self.teacher_N = candidates, settings, scores_N, teacher_N
        self.answers = candidates.answers[normalize(pair.query)]
        self.limit = float(scores_N[positive])
        self.teacher_limit = 0.0 if teacher_N is None else part_of(float(teacher_N[positive]), settings.teacher_share)
        self.tags, self.own = tags_of(pair.source), set(pair.negatives)
        self.zero_is_no_match = scorer.zero_is_no_match

    def reason_to_drop(self, j: int) -> str | None:
        """The first of `GUARDS` that candidate `j` fails; None if it passes all."""
        settings, score, text = self.settings, float(self.scores_N[j]), self.candidates.texts[j]
        if self.zero_is_no_match and score <= 0:
            return "no match"
        if settings.same_source and self.tags.isdisjoint(self.candidates.tags[j]):
            return "other source"
        if settings.margin is not None and score > self.limit - settings.margin:
            return "margin"
        if settings.share is not None and score > part_of(self.limit, settings.share):
            return "share"
        if self.teacher_N is not None and float(self.teacher_N[j]) > self.teacher_limit:
            return "teacher"
        if text in self.own:
            return "had it already"
        near = any(_near(text, self.candidates.texts[a], settings.near) for a in self.answers)
        return "near copy" if near else None


def part_of(score: float, share: float) -> float:
    """`share` of a score. For a negative score, which a share would raise, the score is lowered by as much instead."""
    return score - (1 - share) * abs(score)


def _near(text: str, answer: str, share: float) -> bool:
    return normalize(text) == normalize(answer) or near_identical(_cached_words(text), _cached_words(answer), share)


@lru_cache(maxsize=20_000)
def _cached_words(text: str) -> frozenset[str]:
    return word_set(text)


def _rank_of_positive(i: int, pair: TrainingPair, candidates: Candidates, scores_N: np.ndarray) -> int:
    """The rank of the positive from 1, the query's other positives not counted."""
    scores_N = scores_N.copy()
    scores_N[list(candidates.answers[normalize(pair.query)] - {candidates.positive_of[i]})] = -np.inf
    positive_N = np.zeros(len(scores_N), dtype=bool)
    positive_N[candidates.positive_of[i]] = True
    return int(rank_of_best_positive(scores_N[None], positive_N[None])[0])


def _counts(found: Sequence[dict[str, Any]], per_pair: int) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    for line in found:
        dropped.update(line["dropped"])
    numbers = [len(line["negatives"]) for line in found]
    ranks = sorted(line["rank"] for line in found)
    return {
        "pairs": len(found),
        "negatives": sum(numbers),
        "pairs_with_all": sum(1 for number in numbers if number == per_pair),
        "pairs_with_none": numbers.count(0),
        "positive_first": sum(1 for rank in ranks if rank == 1),
        "median_rank_of_positive": ranks[len(ranks) // 2],
        "dropped": {guard: dropped[guard] for guard in GUARDS if dropped[guard]},
    }

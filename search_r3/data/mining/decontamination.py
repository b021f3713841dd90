"""Cleaning pairs: removes overlap with evaluation sets (word n-grams), then exact and near duplicates (MinHash).

Near duplicates are found as in Broder (1997): MinHash signatures of word shingles in bands (LSH), and every candidate
is verified by its exact Jaccard similarity, so none is dropped by a hash collision. The overlap rule follows GPT-3's
(Brown et al. 2020, appendix C). A few lines of NumPy replace the library datasketch, so that the output is the same
under any version, and because the check needs the shingles anyway.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache as cached
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from search_r3.config import from_mapping
from search_r3.data.beir import beir_files, load_beir
from search_r3.data.build_cache import BuildCache, key_of
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.io.input_stamps import stamps
from search_r3.data.mining.word_overlap import normalize, word_set, words_of
from search_r3.data.pairs import TrainingPair
from search_r3.data.sources.beir_pairs import is_held_out
from search_r3.errors import InputError

SHINGLE = 3
"""Words in a shingle."""
BANDS, ROWS = 20, 6
"""Two texts of similarity s meet in a band with probability 1 - (1 - s^ROWS)^BANDS: 0.998 at 0.8, 0.014 at 0.3."""
MIN_CONTAINED = 4
"""A test query of fewer words counts as overlap only if it is the whole training query."""
EXAMPLES = 3
"""Number of examples per reason in a report."""
KEYS = ("decontaminate", "deduplicate")
"""The keys of a recipe that this module reads."""


@dataclass(frozen=True, slots=True)
class DeduplicateSettings:
    """`deduplicate:` of a recipe."""

    near: float = 0.8
    """Jaccard similarity (positives: of word triples; queries: of words) from which two texts are duplicates."""
    by: Literal["pair", "positive"] = "pair"
    """pair: query and positive must both duplicate an earlier pair's. positive: only the positive must."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.near <= 1:
            raise InputError(f"near must be a number from 0.5 to 1, got {self.near!r}")


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """One entry under `against:`: a data set and the parts of it that must not be trained on."""

    dataset: str
    """A name below the data root, or a BEIR folder."""
    split: str = "test"
    """The split whose queries must not be trained on."""
    documents: bool = False
    """Whether its judged documents must not be trained on either."""
    hold_out_modulus: int | None = None
    """Only queries with int(_id) % this == 0, as for SciFact's dev claims."""
    hold_out: Literal["number", "crc32"] = "number"
    """What is divided by `hold_out_modulus`: an id that is a whole number, or the CRC-32 of any id."""

    def __post_init__(self) -> None:
        if self.hold_out_modulus is not None and self.hold_out_modulus < 1:
            raise InputError(f'"hold_out_modulus" must be a whole number from 1, got {self.hold_out_modulus!r}')


@dataclass(frozen=True, slots=True)
class DecontaminateSettings:
    """`decontaminate:` of a recipe."""

    against: tuple[EvaluationSet, ...] = ()
    """The evaluation sets that must not be trained on; at least one."""
    ngram: int = 8
    """A training query that shares this many consecutive words with a test query is dropped."""
    document_share: float = 0.5
    """Share of the shorter text's n-grams from which a positive counts as a judged test document; a pair with one such
    positive is dropped."""

    def __post_init__(self) -> None:
        if not self.against:
            raise InputError('"against" must be a list of evaluation sets, such as [{dataset: scifact, split: test}]')
        if self.ngram < 2:
            raise InputError(f'"ngram" must be a whole number from 2, got {self.ngram!r}')
        if not 0 < self.document_share <= 1:
            raise InputError(f'"document_share" must be a number above 0 and at most 1, got {self.document_share!r}')


@dataclass
class Dropped:
    """What was dropped and why: counts by reason and by source, and a few examples of each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    by_source: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    examples: dict[str, list[dict[str, str]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, pair: TrainingPair, reason: str, because: str) -> None:
        self.counts[reason] += 1
        self.by_source[pair.source][reason] += 1
        if len(self.examples[reason]) < EXAMPLES:
            self.examples[reason].append({"id": pair.id, "query": pair.query[:200], "because": because[:200]})

    def restore(self, record: dict[str, Any]) -> None:
        """Restore the state described by `as_record`."""
        self.counts = Counter(record["dropped"])
        self.by_source = defaultdict(Counter, {name: Counter(found) for name, found in record["by_source"].items()})
        self.examples = defaultdict(list, record["examples"])

    def as_record(self) -> dict[str, Any]:
        return {
            "dropped": dict(sorted(self.counts.items())),
            "by_source": {source: dict(sorted(found.items())) for source, found in sorted(self.by_source.items())},
            "examples": dict(sorted(self.examples.items())),
        }


def clean_pairs(
    pairs: list[TrainingPair],
    recipe: dict[str, Any],
    where: str,
    data_root: str | Path | None = None,
    cache: BuildCache | None = None,
) -> tuple[list[TrainingPair], dict[str, Any] | None]:
    """The pairs cleaned by a recipe's `decontaminate` and `deduplicate`, and the report for the manifest (None without
    either).

    With `cache`, the result of each step is stored there, and reused if it was computed before.

    Raises:
        InputError: a setting is wrong, an evaluation set is missing, or no pair is left; the message starts with
            `where`.
    """
    if not any(key in recipe for key in KEYS):
        return pairs, None
    against, copies = read_cleaning(recipe, where)
    dropped = Dropped()
    if against:  # first, or a contaminated pair could be the copy that is kept
        sets = against
        reads = [_files_of(one, data_root) for one in sets.against]
        pairs = _step(
            "decontaminate",
            [asdict(sets), reads],
            cache,
            pairs,
            dropped,
            lambda: decontaminate(pairs, sets, dropped, data_root),
        )
    if copies:
        rule = copies
        pairs = _step("deduplicate", [asdict(rule)], cache, pairs, dropped, lambda: deduplicate(pairs, rule, dropped))
    if not pairs:
        raise InputError(f"{where}: cleaning leaves no pair ({dict(dropped.counts)})")
    return pairs, dropped.as_record()


def _files_of(one: EvaluationSet, data_root: str | Path | None) -> list[list[Any]]:
    return stamps(beir_files(find_dataset(one.dataset, data_root), one.split))


def _step(
    name: str,
    settings: list[Any],
    cache: BuildCache | None,
    pairs: list[TrainingPair],
    dropped: Dropped,
    run: Callable[[], list[TrainingPair]],
) -> list[TrainingPair]:
    """The pairs that `run` keeps, or those it kept of the same pairs in an interrupted build."""
    if cache is None:
        return run()
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr((pair.id, pair.query, pair.relevant, pair.source)).encode())
    key = key_of(name, settings, digest.hexdigest(), dropped.as_record())
    found = cache.load(name, key)
    if found:
        head, ids = found
        dropped.restore(head["report"])
        by_id = {pair.id: pair for pair in pairs}
        return [by_id[identity] for identity in ids]
    kept = run()
    cache.save(name, key, {"report": dropped.as_record()}, (pair.id for pair in kept))
    return kept


def read_cleaning(
    recipe: dict[str, Any], where: str
) -> tuple[DecontaminateSettings | None, DeduplicateSettings | None]:
    """The settings under `decontaminate:` and `deduplicate:` (`true` means the defaults); None if absent.

    Raises:
        InputError: a key is unknown or a value is wrong; the message starts with `where`.
    """
    against = copies = None
    if "decontaminate" in recipe:
        place, value = f"{where}, decontaminate", recipe["decontaminate"]
        if isinstance(value, dict):
            entries = value.get("against")
            entries = entries if isinstance(entries, list) else []
            sets = [
                from_mapping(EvaluationSet, entry, f"{place}, against {i}") for i, entry in enumerate(entries, start=1)
            ]
            value = value | {"against": tuple(sets)}
        against = from_mapping(DecontaminateSettings, value, place)
    if "deduplicate" in recipe:
        value = recipe["deduplicate"]
        copies = from_mapping(DeduplicateSettings, {} if value is True else value, f"{where}, deduplicate")
    return against, copies


# ------------------------------------------------------------------------------------------------------- duplicates


def deduplicate(pairs: Sequence[TrainingPair], settings: DeduplicateSettings, dropped: Dropped) -> list[TrainingPair]:
    """The pairs without duplicates of earlier ones, in order; `dropped` records the removed pairs and what they
    duplicate.

    A pair is compared only with the pairs kept before it, so a chain of small changes is not removed entirely.
    """
    exact: dict[tuple[str, str], TrainingPair] = {}
    rest: list[TrainingPair] = []
    for pair in pairs:
        key = ("" if settings.by == "positive" else normalize(pair.query), normalize(pair.positive))
        if key in exact:
            dropped.add(pair, "exact duplicate", f"copy of {exact[key].id}")
        else:
            exact[key] = pair
            rest.append(pair)
    shingled = [shingles(pair.positive) for pair in rest]
    queries = [word_set(pair.query) for pair in rest]
    buckets_of = _buckets([signature(hashes) for hashes in shingled])
    members: dict[int, list[int]] = defaultdict(list)
    kept: list[TrainingPair] = []
    for j, pair in enumerate(rest):
        earlier = sorted({i for bucket in buckets_of[j] for i in members[bucket]})
        for i in earlier:
            if settings.by == "pair" and jaccard(queries[i], queries[j]) < settings.near:
                continue
            if jaccard_of_hashes(shingled[i], shingled[j]) >= settings.near:
                dropped.add(pair, "near duplicate", f"near {rest[i].id}")
                break
        else:
            kept.append(pair)
            for bucket in buckets_of[j]:
                members[bucket].append(j)
    return kept


def shingles(text: str) -> np.ndarray:
    """Sorted distinct 64-bit hashes of the text's word triples, uint64; a text with fewer words is one shingle."""
    words = words_of(text)
    grams = set(ngrams(words, SHINGLE)) or {" ".join(words) or normalize(text)}
    return np.sort(np.array([_hash(gram) for gram in grams], dtype=np.uint64))


def signature(hashes: np.ndarray) -> np.ndarray:
    """MinHash: (BANDS * ROWS,) uint32, each the minimum of the hashes under a different permutation.

    The permutations are multiply-shift hashing (Dietzfelbinger et al. 1997): the upper half of a * x + b modulo 2^64.
    """
    permuted_PN = (_FACTORS[:, None] * hashes[None] + _OFFSETS[:, None]) >> np.uint64(32)
    return permuted_PN.min(axis=1).astype(np.uint32)


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """|a and b| / |a or b|; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 1.0


def jaccard_of_hashes(a: np.ndarray, b: np.ndarray) -> float:
    """The same for two sorted arrays of distinct hashes."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def _buckets(signatures: Sequence[np.ndarray]) -> list[list[int]]:
    """For each text, the numbers of the buckets that it shares with another text."""
    buckets: list[list[int]] = [[] for _ in signatures]
    if not signatures:
        return buckets
    number = 0
    stacked = np.stack(signatures).reshape(len(signatures), BANDS, ROWS)
    for band in range(BANDS):
        _, group, size = np.unique(stacked[:, band], axis=0, return_inverse=True, return_counts=True)
        group = group.reshape(-1)
        for i in np.flatnonzero(size[group] > 1):
            buckets[i].append(number + int(group[i]))
        number += len(size)
    return buckets


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


_FACTORS = np.array([_hash(f"factor {i}") | 1 for i in range(BANDS * ROWS)], dtype=np.uint64)
_OFFSETS = np.array([_hash(f"offset {i}") for i in range(BANDS * ROWS)], dtype=np.uint64)


# ---------------------------------------------------------------------------------------------------- contamination


def decontaminate(
    pairs: Sequence[TrainingPair],
    settings: DecontaminateSettings,
    dropped: Dropped,
    data_root: str | Path | None = None,
) -> list[TrainingPair]:
    """The pairs that overlap no evaluation set, in order; `dropped` records the removed pairs and what they overlap.

    Raises:
        InputError: an evaluation set is missing or broken, or has no query left to compare with.
    """
    n = settings.ngram
    queries: dict[int, dict[str, str]] = defaultdict(dict)
    documents: dict[str, list[int]] = defaultdict(list)
    described: list[tuple[str, int]] = []
    for one in settings.against:
        label = f"{one.dataset}/{one.split}"
        dataset = load_beir(find_dataset(one.dataset, data_root), one.split)
        asked = {
            identity: text
            for identity, text in dataset.queries.items()
            if one.hold_out_modulus is None or is_held_out(identity, one.hold_out_modulus, one.hold_out)
        }
        if not asked:
            raise InputError(f"decontaminate: {label} has no query left; check hold_out_modulus")
        for text in asked.values():
            words = words_of(text)
            for gram in ngrams(words, min(n, len(words))):
                queries[min(n, len(words))].setdefault(gram, label)
        if one.documents:
            for identity in dict.fromkeys(d for query in asked for d in dataset.qrels[query]):
                grams = set(ngrams(words_of(dataset.corpus[identity].full_text), n))
                for gram in grams:
                    documents[gram].append(len(described))
                described.append((label, len(grams)))
    judged = cached(partial(_judged_before, documents=documents, described=described, settings=settings))
    kept = []
    for pair in pairs:
        if found := _asked_before(words_of(pair.query), queries):
            gram, label = found
            dropped.add(pair, f"query of {label}", gram)
        elif described and (document := next(filter(judged, pair.relevant), None)) is not None:
            dropped.add(pair, f"judged document of {judged(document)}", document)
        else:
            kept.append(pair)
    return kept


def ngrams(words: Sequence[str], n: int) -> Iterable[str]:
    """All runs of n consecutive words; none if there are fewer, or if n is 0."""
    return (" ".join(words[i : i + n]) for i in range(len(words) - n + 1)) if n else ()


def _asked_before(words: Sequence[str], queries: dict[int, dict[str, str]]) -> tuple[str, str] | None:
    """The run of words shared with a test query, and that query's data set."""
    for length in sorted(queries):
        if length < MIN_CONTAINED and length != len(words):
            continue
        for gram in ngrams(words, length):
            if gram in queries[length]:
                return gram, queries[length][gram]
    return None


def _judged_before(
    text: str, documents: dict[str, list[int]], described: Sequence[tuple[str, int]], settings: DecontaminateSettings
) -> str | None:
    grams = set(ngrams(words_of(text), settings.ngram))
    shared = Counter(document for gram in grams for document in documents.get(gram, ()))
    for document, count in sorted(shared.items()):
        label, size = described[document]
        if count >= settings.document_share * min(len(grams), size):
            return label
    return None


# --------------------------------------------------------------------------------------------------------- settings

"""Which pairs are in which batch: a pure function of the seed and the batch's number, so that a run can resume.

An epoch shuffles each source (or all of them together) and cuts it into full batches; what remains of a source is
skipped until the next epoch. Batches of similar lengths need less padding (length bucketing), sources can be weighted,
and batches can be kept free of duplicate queries and documents, which would be false negatives of each other.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from search_r3.data.mining.teacher import TeacherRows
from search_r3.data.pairs import TrainingPair
from search_r3.errors import InputError
from search_r3.hints import nearest
from search_r3.training.sft.sft_config import SFTConfig
from search_r3.training.sft.topics import topics_of

EPOCH_STREAM, PASS_STREAM, MIX_STREAM = 77, 78, 79
"""Keys of separate random streams: the shuffle of an epoch, a pass over a weighted source, and the final mixing."""


class BatchSampler:
    """Batches of `size` pairs.

    Args:
        pairs: all training pairs.
        size: pairs per batch.
        seed: seed of the shuffles.
        one_source: take all pairs of a batch from one `source`, which makes in-batch negatives similar and so harder.
        lengths: the length of each pair (in tokens or characters), for bucketing.
        bucket: if above 1, pools of `bucket * size` shuffled pairs are sorted by length before they are cut into
            batches, so that the pairs of a batch have similar lengths. The order of the batches stays random.
        weights: how many times an epoch goes through a source, 1.0 by default. 2.0 yields every pair twice; 0.5 yields
            half of the pairs in one epoch and the other half in the next; 0 leaves the source out.
        topics: each pair's topic, a number. The shuffled pairs of a source are sorted by topic before they are cut, so
            that a batch has one topic, or two where one topic ends.
        no_duplicates: avoid two pairs with the same query or positive in a batch, as far as swaps with other batches
            of the epoch allow. Batches without duplicates stay unchanged.

    Attributes:
        per_epoch: batches per epoch.

    Raises:
        InputError: there are too few pairs for one batch, `weights` has an unknown source or an invalid weight, or
            `bucket` is below 1.
        ValueError: the number of lengths or topics differs from the number of pairs, or `bucket` is above 1 without
            lengths.
    """

    def __init__(
        self,
        pairs: Sequence[TrainingPair],
        size: int,
        seed: int,
        one_source: bool,
        *,
        lengths: Sequence[int] | None = None,
        bucket: int = 1,
        weights: Mapping[str, float] | None = None,
        no_duplicates: bool = False,
        topics: Sequence[int] | None = None,
    ) -> None:
        if bucket < 1:
            raise InputError(f"bucket must be 1 batch or more, got {bucket}; 1 turns bucketing off")
        if bucket > 1 and lengths is None:
            raise ValueError("bucketing needs the pairs' lengths")
        for what, values in (("lengths", lengths), ("topics", topics)):
            if values is not None and len(values) != len(pairs):
                raise ValueError(f"there are {len(values)} {what} for {len(pairs)} pairs; give one per pair")
        self.pairs, self.size, self.seed = pairs, size, seed
        self.bucket, self.no_duplicates = bucket, no_duplicates
        self._topic_N = None if topics is None else np.asarray(topics)
        self._length_N = None if lengths is None else np.asarray(lengths)
        self.groups: dict[str, list[int]] = defaultdict(list)  # each group is cut into batches separately
        self._members: dict[str, list[int]] = defaultdict(list)  # the pairs of each source
        for i, pair in enumerate(pairs):
            self.groups[pair.source if one_source else ""].append(i)
            self._members[pair.source].append(i)
        _check_weights(weights or {}, self._members)
        # For each group, the sources with a weight other than 1: source -> pairs per epoch.
        self._takes: dict[str, dict[str, int]] = defaultdict(dict)
        for source, weight in (weights or {}).items():
            if weight != 1:
                count = math.floor(weight * len(self._members[source]) + 0.5)
                self._takes[source if one_source else ""][source] = count
        self.per_epoch = sum(self._size_of(name) // size for name in self.groups)
        if self.per_epoch == 0:
            raise InputError(self._too_few())
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def _too_few(self) -> str:
        """Error text: why the pairs do not fill one batch, and what to change."""
        sizes = {name: self._size_of(name) for name in self.groups}
        largest = max(sizes, key=lambda name: sizes[name], default="")
        total = sum(sizes.values())
        if len(sizes) > 1 and total >= self.size:
            return (
                f"a batch of {self.size} comes from one source or kind, but none of the {len(sizes)} is that large "
                f"({largest!r} has {sizes[largest]}); lower global_batch_size to that, or set batch_sampler to any"
            )
        weighted = f" ({total} after source_weights)" if total != len(self.pairs) else ""
        todo = f"lower global_batch_size to {sizes[largest]}, or give more pairs" if total else "give more pairs"
        return f"{len(self.pairs)} pairs{weighted} are too few for a batch of {self.size}; {todo}"

    def batch(self, number: int) -> list[TrainingPair]:
        """The pairs of batch `number`, counted over all epochs."""
        epoch, index = divmod(number, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._cut(epoch))
        return [self.pairs[i] for i in self._epoch[1][index]]

    def _cut(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch, EPOCH_STREAM])
        batches = []
        for name in sorted(self.groups):
            # Drawn even if unused, so that the weight of one source does not change the batches of the others.
            order = rng.permutation(self.groups[name]).tolist()
            if self._takes[name]:
                order = self._weighted(name, order, epoch)
            rest = len(order) % self.size
            order, over = order[: len(order) - rest], order[len(order) - rest :]
            if self._topic_N is not None:
                order = np.asarray(order)[np.argsort(self._topic_N[order], kind="stable")].tolist()
            order = self._by_length(order)
            cut = [order[i : i + self.size] for i in range(0, len(order), self.size)]
            if self.no_duplicates:
                _separate_duplicates(cut, over, self.pairs)
            batches += cut
        return [batches[i] for i in rng.permutation(len(batches))]

    def _size_of(self, group: str) -> int:
        takes = self._takes[group]
        return len(self.groups[group]) + sum(count - len(self._members[source]) for source, count in takes.items())

    def _weighted(self, group: str, order: list[int], epoch: int) -> list[int]:
        """The group's pairs in this epoch, shuffled: `order` with the pairs of weighted sources replaced."""
        takes = self._takes[group]
        chosen = [i for i in order if self.pairs[i].source not in takes]
        for source in sorted(takes):
            chosen += self._stream(source, epoch * takes[source], takes[source])
        return np.random.default_rng([self.seed, epoch, MIX_STREAM]).permutation(chosen).tolist()

    def _stream(self, source: str, start: int, count: int) -> list[int]:
        """`count` pairs from position `start` of a source's endless stream: one shuffle of the source after another."""
        members = self._members[source]
        word = int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest(), "big")
        stream: list[int] = []
        first, last = start // len(members), (start + max(count, 1) - 1) // len(members)
        for number in range(first, last + 1):
            stream += np.random.default_rng([self.seed, number, PASS_STREAM, word]).permutation(members).tolist()
        return stream[start - first * len(members) :][:count]

    def _by_length(self, order: list[int]) -> list[int]:
        """`order` with each pool of `bucket` batches sorted by length."""
        if self.bucket == 1 or self._length_N is None:
            return order
        pool = self.bucket * self.size
        pools = [np.asarray(order[i : i + pool], dtype=np.int64) for i in range(0, len(order), pool)]
        return [int(i) for part in pools for i in part[np.argsort(self._length_N[part], kind="stable")]]


def make_sampler(pairs: Sequence[TrainingPair], config: SFTConfig, teacher: TeacherRows | None) -> BatchSampler:
    """The batch sampler of a recipe: by source, kind, topic or none of them; weighted, and bucketed by length."""
    named = list(pairs)
    if config.batch_sampler in ("kind", "topic"):
        named = [replace(pair, source=pair.source.partition(":")[0]) for pair in pairs]
    return BatchSampler(
        named,
        config.global_batch_size,
        config.loop.seed,
        config.batch_sampler != "any",
        lengths=[len(pair.positive) for pair in named],
        bucket=config.length_bucket,
        weights=config.source_weights,
        no_duplicates=True,
        topics=topics_of(named, config, teacher) if teacher and config.batch_sampler == "topic" else None,
    )


def _check_weights(weights: Mapping[str, float], sources: Mapping[str, object]) -> None:
    for source, weight in weights.items():
        if source not in sources:
            near = nearest(source, sources)
            hint = f"did you mean {near!r}?" if near else f"there are {', '.join(sorted(sources))}"
            raise InputError(f"source_weights names the source {source!r}, but no pair has it; {hint}")
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"the weight of source {source!r} must be a finite number, 0 or more, got {weight}")


def _separate_duplicates(batches: list[list[int]], over: list[int], pairs: Sequence[TrainingPair]) -> None:
    """Separate pairs with the same query or positive by single swaps between batches, in place, as far as possible.

    A duplicate is swapped with a pair of the nearest batch (which has similar lengths, if they are sorted) such that
    neither is a duplicate afterwards, or else with a pair that was left `over`.
    """

    def keys(i: int) -> tuple[tuple[str, str], tuple[str, str]]:
        return ("query", pairs[i].query), ("positive", pairs[i].positive)

    bins = [*batches, over]
    counts = [Counter(key for i in batch for key in keys(i)) for batch in batches]

    def is_free(new: int, old: int, where: int) -> bool:
        """Whether `new` is not a duplicate in bin `where` once `old` has left; the leftover pairs accept any."""
        leaving = keys(old)
        return where == len(batches) or all(counts[where][key] == (key in leaving) for key in keys(new))

    for here, batch in enumerate(batches):
        for index, old in enumerate(batch):
            if all(counts[here][key] == 1 for key in keys(old)):
                continue
            for there in (*_outwards(here, len(batches)), len(batches)):
                if there < len(batches) and sum(counts[there][key] for key in keys(old)) > 2:
                    continue  # two pairs there share a text with `old`, so no single swap helps
                swaps = (j for j, new in enumerate(bins[there]) if is_free(new, old, here) and is_free(old, new, there))
                other = next(swaps, None)
                if other is None:
                    continue
                new = bins[there][other]
                batch[index], bins[there][other] = new, old
                for where, came, went in ((here, new, old), (there, old, new)):
                    if where < len(batches):
                        counts[where].subtract(keys(went))
                        counts[where].update(keys(came))
                break


def _outwards(center: int, count: int) -> Iterator[int]:
    """The numbers below `count` other than `center`, the nearest first."""
    for step in range(1, count):
        for other in (center + step, center - step):
            if 0 <= other < count:
                yield other

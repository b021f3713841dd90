"""The sampler: the same batches from the same seed, and what lengths, weights and equal texts change in them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from search_r3.data.pairs import TrainingPair
from search_r3.errors import InputError
from search_r3.training.sft.batch_sampler import BatchSampler


def make(count: int, source: str = "a", start: int = 0) -> list[TrainingPair]:
    return [TrainingPair(f"{source}{i}", f"query {source}{i}", f"text {source}{i}", source=source)
            for i in range(start, start + count)]  # fmt: skip


def epoch_of(sampler: BatchSampler, epoch: int = 0) -> list[list[str]]:
    first = epoch * sampler.per_epoch
    return [[pair.id for pair in sampler.batch(number)] for number in range(first, first + sampler.per_epoch)]


PAIRS = make(23, "b") + make(10, "a") + make(3, "c")
GOLDEN = [["b9", "b14", "b18", "b4"], ["b12", "b20", "b7", "b2"]]
GOLDEN_TOGETHER = ["b20", "a3", "a6", "b11"]


def test_batches_are_those_that_the_first_adapter_was_trained_on() -> None:
    """Written down from the sampler that trained it: a recipe with its seed must go on giving the same batches."""
    sampler = BatchSampler(PAIRS, 4, 7, True)
    assert sampler.per_epoch == 7
    assert [epoch_of(sampler, epoch)[0] for epoch in (0, 1)] == GOLDEN
    together = BatchSampler(PAIRS, 4, 7, False)
    assert together.per_epoch == 9
    assert epoch_of(together)[0] == GOLDEN_TOGETHER


def test_a_batch_is_a_function_of_its_number_and_an_epoch_has_no_pair_twice() -> None:
    forwards, jumping = BatchSampler(PAIRS, 4, 0, True), BatchSampler(PAIRS, 4, 0, True)
    batches = [forwards.batch(number) for number in range(20)]
    assert [jumping.batch(number) for number in (13, 2, 19)] == [batches[13], batches[2], batches[19]]
    ids = [i for batch in epoch_of(forwards, 3) for i in batch]
    assert len(ids) == len(set(ids)) == 28
    assert all(len({pair.source for pair in batch}) == 1 for batch in batches)


def test_too_few_pairs_are_refused() -> None:
    expected = r"none of the 3 is that large \('b' has 23\); lower global_batch_size to that, or set batch_sampler"
    with pytest.raises(InputError, match=expected):
        BatchSampler(PAIRS, 24, 0, True)
    assert BatchSampler(PAIRS, 23, 0, True).per_epoch == 1
    assert BatchSampler(PAIRS, 24, 0, False).per_epoch == 1


@pytest.mark.parametrize("one_source", [True, False])
def test_pairs_that_are_too_few_even_together_are_not_told_to_be_taken_together(one_source: bool) -> None:
    with pytest.raises(
        InputError, match="36 pairs are too few for a batch of 40; lower global_batch_size to"
    ) as caught:
        BatchSampler(PAIRS, 40, 0, one_source)
    assert "batch_sampler" not in str(caught.value)
    most = int(str(caught.value).split("global_batch_size to ")[1].split(",")[0])
    assert BatchSampler(PAIRS, most, 0, one_source).per_epoch == 1  # the advice helps
    with pytest.raises(InputError, match=r"36 pairs \(18 after source_weights\) are too few") as caught:
        BatchSampler(PAIRS, 30, 0, one_source, weights={"b": 0.2})
    assert "batch_sampler" not in str(caught.value)


# --- lengths


def padding(sampler: BatchSampler, lengths: dict[str, int]) -> float:
    """The share of a batch's tokens that is padding, over an epoch."""
    batches = [[lengths[i] for i in batch] for batch in epoch_of(sampler)]
    return 1 - sum(sum(batch) for batch in batches) / sum(max(batch) * len(batch) for batch in batches)


def test_bucketing_puts_like_lengths_together_and_leaves_out_no_pair() -> None:
    pairs = make(192)
    lengths = np.random.default_rng(0).integers(5, 129, len(pairs)).tolist()
    by_id = {pair.id: length for pair, length in zip(pairs, lengths, strict=True)}
    plain, bucketed = BatchSampler(pairs, 8, 0, True), BatchSampler(pairs, 8, 0, True, lengths=lengths, bucket=6)
    assert padding(plain, by_id) > 0.35
    assert padding(bucketed, by_id) < 0.15
    assert sorted(i for batch in epoch_of(bucketed, 2) for i in batch) == sorted(pair.id for pair in pairs)
    means = [np.mean([by_id[i] for i in batch]) for batch in epoch_of(bucketed)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4  # long batches do not come last
    assert epoch_of(bucketed, 0) != epoch_of(bucketed, 1)
    again = BatchSampler(pairs, 8, 0, True, lengths=lengths, bucket=6)
    assert epoch_of(again, 1) == epoch_of(bucketed, 1)


def test_bucketing_leaves_it_to_chance_who_meets_whom() -> None:
    sampler = BatchSampler(make(192), 8, 0, True, lengths=list(range(192)), bucket=6)
    first, second = ({frozenset(batch) for batch in epoch_of(sampler, epoch)} for epoch in (0, 1))
    assert not first & second  # sorting all of the pairs at once would give the same batches in each epoch


def test_a_bucket_of_one_batch_changes_nothing() -> None:
    lengths = list(range(len(PAIRS)))
    assert epoch_of(BatchSampler(PAIRS, 4, 1, True, lengths=lengths)) == epoch_of(BatchSampler(PAIRS, 4, 1, True))


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="35 lengths for 36 pairs"):
        BatchSampler(PAIRS, 4, 0, True, lengths=[1] * 35)
    with pytest.raises(ValueError, match="needs the pairs' lengths"):
        BatchSampler(PAIRS, 4, 0, True, bucket=2)
    with pytest.raises(InputError, match="bucket must be 1 batch or more"):
        BatchSampler(PAIRS, 4, 0, True, bucket=0)


# --- weights


@pytest.mark.parametrize("one_source", [True, False])
def test_a_weight_says_how_often_an_epoch_goes_through_a_source(one_source: bool) -> None:
    pairs = make(16, "a") + make(16, "b") + make(16, "c")
    sampler = BatchSampler(pairs, 4, 0, one_source, weights={"a": 2.0, "b": 0.5})
    assert sampler.per_epoch == 8 + 2 + 4
    first, second = (Counter(i for batch in epoch_of(sampler, epoch) for i in batch) for epoch in (0, 1))
    assert all(first[f"a{i}"] == second[f"a{i}"] == 2 for i in range(16))
    assert all(first[f"c{i}"] == second[f"c{i}"] == 1 for i in range(16))
    assert all(first[f"b{i}"] + second[f"b{i}"] == 1 for i in range(16))  # the other half in the next epoch
    assert sum(first[f"b{i}"] for i in range(16)) == 8


def test_a_weight_leaves_the_other_sources_batches_as_they_are() -> None:
    pairs = make(16, "a") + make(16, "b")

    def of_b(sampler: BatchSampler) -> set[tuple[str, ...]]:
        return {tuple(batch) for batch in epoch_of(sampler, 1) if batch[0].startswith("b")}

    plain = of_b(BatchSampler(pairs, 4, 3, True))
    for weight in (0.0, 0.3, 1.7):
        assert of_b(BatchSampler(pairs, 4, 3, True, weights={"a": weight})) == plain
    assert epoch_of(BatchSampler(pairs, 4, 3, True, weights={"a": 1.0})) == epoch_of(BatchSampler(pairs, 4, 3, True))


def test_a_weight_of_zero_leaves_a_source_out() -> None:
    sampler = BatchSampler(make(8, "a") + make(8, "b"), 4, 0, False, weights={"a": 0})
    assert {i[0] for batch in epoch_of(sampler) for i in batch} == {"b"}
    with pytest.raises(InputError, match="too few"):
        BatchSampler(make(8, "a"), 4, 0, True, weights={"a": 0})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"docstring": 1.0}, "names the source 'docstring', but no pair has it; did you mean 'docstrings'"),
        ({"zzz": 1.0}, "names the source 'zzz', but no pair has it; there are docstrings"),
        ({"docstrings": -1.0}, "weight of source 'docstrings' must be a finite number, 0 or more"),
        ({"docstrings": float("nan")}, "got nan"),
    ],
)
def test_a_wrong_weight_is_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BatchSampler(make(8, "docstrings"), 4, 0, True, weights=weights)


# --- equal texts


def clashes(sampler: BatchSampler, epoch: int = 0) -> int:
    first = epoch * sampler.per_epoch
    found = 0
    for number in range(first, first + sampler.per_epoch):
        batch = sampler.batch(number)
        found += 2 * len(batch) - len({pair.query for pair in batch}) - len({pair.positive for pair in batch})
    return found


def claims(documents: int, each: int, queries: int) -> list[TrainingPair]:
    """`each` pairs of every document, with queries that come back too."""
    return [TrainingPair(f"{d}-{k}", f"query {(d * each + k) % queries}", f"text {d}", source="claims")
            for d in range(documents) for k in range(each)]  # fmt: skip


@pytest.mark.parametrize("bucket", [1, 3])
def test_pairs_with_one_text_are_kept_apart_and_none_is_lost(bucket: int) -> None:
    pairs = claims(16, 6, 40)
    plain = BatchSampler(pairs, 12, 0, True)
    apart = BatchSampler(
        pairs, 12, 0, True, lengths=[len(pair.positive) for pair in pairs], bucket=bucket, no_duplicates=True
    )
    for epoch in range(3):
        assert clashes(plain, epoch) > 20
        assert clashes(apart, epoch) == 0
        assert sorted(i for batch in epoch_of(apart, epoch) for i in batch) == sorted(pair.id for pair in pairs)


def test_a_source_taken_twice_meets_itself_in_no_batch() -> None:
    sampler = BatchSampler(make(32), 8, 0, True, weights={"a": 2.0}, no_duplicates=True)
    assert clashes(BatchSampler(make(32), 8, 0, True, weights={"a": 2.0})) > 0
    assert clashes(sampler) == 0


def test_what_was_left_over_takes_the_place_of_a_pair_that_cannot_stay() -> None:
    pairs = [TrainingPair(str(i), f"query {i}", "same" if i < 2 else f"text {i}", source="a") for i in range(5)]
    for seed in range(20):
        assert clashes(BatchSampler(pairs, 4, seed, True, no_duplicates=True)) == 0


def test_batches_without_equal_texts_stay_as_they_are_and_what_cannot_be_fixed_stays() -> None:
    assert epoch_of(BatchSampler(PAIRS, 4, 7, True, no_duplicates=True)) == epoch_of(BatchSampler(PAIRS, 4, 7, True))
    hopeless = claims(2, 8, 16)  # two documents cannot fill a batch of four
    sampler = BatchSampler(hopeless, 4, 0, True, no_duplicates=True)
    assert sorted(i for batch in epoch_of(sampler) for i in batch) == sorted(pair.id for pair in hopeless)

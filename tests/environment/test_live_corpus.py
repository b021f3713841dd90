"""LiveCorpus: exact search, rewriting by rows, versions and ages, memory, and state that comes back bit for bit."""

from __future__ import annotations

import gc
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.environment import live_corpus
from search_r3.environment.live_corpus import LiveCorpus
from search_r3.environment.topk import top_k
from search_r3.errors import InputError
from search_r3.training.run_checkpoint import TrainingState, read_checkpoint, write_checkpoint

CORNERS = torch.tensor(
    [[a, b, c, d] for a in (0.5, -0.5) for b in (0.5, -0.5) for c in (0.5, -0.5) for d in (0.5, -0.5)]
)
"""Sixteen unit rows whose products are exact in every dtype: ties are real ties."""


def unit(rows: int, dimension: int, seed: int = 0) -> torch.Tensor:
    matrix = torch.randn(rows, dimension, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(matrix, dim=1)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(0, 15), min_size=1, max_size=30),
    queries=st.lists(st.integers(0, 15), max_size=4),
    k=st.integers(1, 35),
    chunk=st.integers(1, 200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_search_is_exact_and_breaks_ties_by_row_whatever_the_chunks(rows, queries, k, chunk, dtype):
    corpus = LiveCorpus.from_vectors(CORNERS[rows], dtype=dtype, chunk_cells=chunk)
    scores, found = corpus.search(CORNERS[queries], k)
    expected_scores, expected = top_k(CORNERS[queries] @ CORNERS[rows].T, k)
    assert scores.dtype == torch.float32
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)
    assert torch.equal(scores, expected_scores)


def test_search_finds_what_numpy_finds_on_ordinary_vectors():
    vectors, queries = unit(300, 24), unit(5, 24, seed=1)
    corpus = LiveCorpus.from_vectors(vectors.numpy(), chunk_cells=1000)
    scores, rows = corpus.search(queries.numpy(), 10)
    cosines = queries.double().numpy() @ vectors.double().numpy().T
    assert np.array_equal(rows.numpy(), np.argsort(-cosines, axis=1)[:, :10])
    assert scores.numpy() == pytest.approx(-np.sort(-cosines, axis=1)[:, :10], abs=1e-6)


def test_more_queries_than_a_block_are_all_answered(monkeypatch):
    monkeypatch.setattr("search_r3.environment.live_corpus.QUERY_BLOCK", 3)
    corpus = LiveCorpus.from_vectors(CORNERS)
    assert corpus.search(CORNERS, 1)[1][:, 0].tolist() == list(range(16))


def test_scores_are_of_the_rows_asked_for_in_their_order():
    vectors, queries = unit(30, 8), unit(3, 8, seed=1)
    corpus = LiveCorpus.from_vectors(vectors, chunk_cells=16)
    asked = [29, 0, 7, 7]
    assert torch.allclose(corpus.scores(queries, asked), queries @ vectors[asked].T, atol=1e-6)
    assert corpus.scores(queries, []).shape == (3, 0)
    assert torch.equal(corpus.vectors(asked), vectors[asked])


def test_an_update_rewrites_its_rows_and_nothing_else():
    corpus = LiveCorpus.from_vectors(CORNERS)
    corpus.update([3, 1], CORNERS[[12, 14]], step=5)
    expected = CORNERS.clone()
    expected[3], expected[1] = CORNERS[12], CORNERS[14]
    assert torch.equal(corpus.vectors(range_of(corpus)), expected)
    assert corpus.versions_N.tolist() == [1, 2, 1, 2] + [1] * 12
    assert corpus.steps_N.tolist() == [0, 5, 0, 5] + [0] * 12
    assert corpus.ages(7).tolist() == [7, 2, 7, 2] + [7] * 12
    assert corpus.search(CORNERS[14:15], 2)[1].tolist() == [[1, 14]]  # equal scores: the smaller row first
    corpus.update([], torch.zeros(0, 4), step=6)
    assert corpus.steps_N.max() == 5


def range_of(corpus: LiveCorpus) -> torch.Tensor:
    return torch.arange(len(corpus))


@pytest.mark.parametrize(
    ("rows", "vectors", "step", "words"),
    [
        ([1, 16], CORNERS[:2], 3, "no row 16"),
        ([-1, 1], CORNERS[:2], 3, "no row -1"),
        ([1, 1], CORNERS[:2], 3, "row 1 is given twice"),
        ([1.0, 2.0], CORNERS[:2], 3, "integers"),
        ([1, 2, 3], CORNERS[:2], 3, "3 rows but 2 vectors"),
        ([1, 2], CORNERS[:2] * 3, 3, "row 0 of the vectors has the norm 3"),
        ([1, 2], CORNERS[:2] * torch.tensor([[1.0], [math.nan]]), 3, "row 1 of the vectors has the norm nan"),
        ([1, 2], torch.zeros(2, 4), 3, "norm 0"),
        ([1, 2], CORNERS[:2, :3], 3, "4 columns"),
        ([1, 2], CORNERS[:2].long(), 3, "float matrix"),
        ([1, 2], CORNERS[:2], 1, "step 1 is earlier"),
        ([3], CORNERS[:1], -1, "step -1 is earlier"),
    ],
)
def test_a_bad_update_is_refused_whole(rows, vectors, step, words):
    corpus = LiveCorpus.from_vectors(CORNERS)
    corpus.update([1], CORNERS[1:2], step=2)
    with pytest.raises(ValueError, match=words):
        corpus.update(rows, vectors, step)
    assert torch.equal(corpus.vectors(range_of(corpus)), CORNERS)
    assert corpus.versions_N.sum() == 17


def test_bad_queries_and_sizes_are_refused():
    corpus = LiveCorpus.from_vectors(CORNERS)
    with pytest.raises(ValueError, match="k must be"):
        corpus.search(CORNERS, 0)
    with pytest.raises(ValueError, match="row 0 of the queries has the norm nan"):
        corpus.search(torch.full((1, 4), math.nan), 1)
    with pytest.raises(ValueError, match="expected unit rows"):
        corpus.scores(CORNERS * 2, [0])
    for arguments in ((0, 4), (4, 0), (2**31, 4)):
        with pytest.raises(ValueError, match="a corpus has"):
            LiveCorpus(*arguments)
    with pytest.raises(ValueError, match="dtype"):
        LiveCorpus(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="matrix"):
        LiveCorpus.from_vectors(torch.ones(3))


def test_rows_never_written_are_not_searched():
    corpus = LiveCorpus(16, 4)
    corpus.update(range(15), CORNERS[:15], step=0)
    for ask in (
        lambda: corpus.search(CORNERS, 1),
        lambda: corpus.vectors([3, 15]),
        lambda: corpus.scores(CORNERS, [15]),
    ):
        with pytest.raises(ValueError, match=r"1 rows were never written .*first is 15"):
            ask()
    assert corpus.vectors([3]).shape == (1, 4)
    corpus.update([15], CORNERS[15:], step=0)
    assert corpus.search(CORNERS, 1)[1][:, 0].tolist() == list(range(16))


def test_the_corpus_copies_what_it_is_given_and_gives_copies():
    vectors = CORNERS.clone()
    corpus = LiveCorpus.from_vectors(vectors)
    vectors.zero_()
    corpus.vectors([0, 1]).zero_()
    assert torch.equal(corpus.vectors(range_of(corpus)), CORNERS)


def tensor_bytes() -> int:
    """Bytes of all the distinct storages that live tensors hold."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_within_a_tenth_of_the_matrix_also_after_searching_and_updating(dtype):
    rows, dimension = 4000, 64
    vectors = unit(rows, dimension)
    gc.collect()
    before = tensor_bytes()
    corpus = LiveCorpus.from_vectors(vectors, dtype=dtype)
    corpus.search(vectors[:7], 5)
    corpus.update(range(100), vectors[:100], step=1)
    gc.collect()
    matrix = rows * dimension * torch.empty(0, dtype=dtype).element_size()
    assert matrix <= tensor_bytes() - before <= 1.1 * matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_through_a_training_checkpoint(dtype, tmp_path):
    corpus = LiveCorpus.from_vectors(unit(20, 8), dtype=dtype)
    corpus.update([4, 2], unit(2, 8, seed=3), step=9)
    facts = {name: value for name, value in corpus.state_dict().items() if not isinstance(value, torch.Tensor)}
    assert json.loads(json.dumps(facts)) == facts
    path = write_checkpoint(tmp_path, TrainingState(1, {}, {}, {"corpus": corpus.state_dict()}, None), keep=1)
    back = LiveCorpus.from_vectors(unit(20, 8, seed=7), dtype=dtype)
    back.load_state_dict(read_checkpoint(path).task["corpus"])
    same(back, corpus)


def same(one: LiveCorpus, other: LiveCorpus) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == second[name].dtype
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name]


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    corpus = LiveCorpus.from_vectors(CORNERS)
    damaged = LiveCorpus.from_vectors(CORNERS.flip(0)).state_dict()
    damaged["vectors"] = damaged["vectors"].clone()
    damaged["vectors"][3] = math.nan
    for state, words in (
        (LiveCorpus.from_vectors(CORNERS[:15]).state_dict(), "the run that saved it"),
        (LiveCorpus.from_vectors(CORNERS, dtype=torch.bfloat16).state_dict(), "bfloat16"),
        ({**corpus.state_dict(), "format": 2}, "format 2"),
        ({**corpus.state_dict(), "steps": corpus.steps_N[:3]}, "damaged"),
        (damaged, "not all unit rows"),
    ):
        with pytest.raises(InputError, match=words):
            corpus.load_state_dict(state)
    assert torch.equal(corpus.vectors(range_of(corpus)), CORNERS)


@pytest.mark.parametrize("chunk", [1, 7, 2**22])
def test_rows_at_least_as_near_are_counted_without_those_left_out(chunk, monkeypatch):
    monkeypatch.setattr(live_corpus, "QUERY_BLOCK", 3)
    vectors = torch.nn.functional.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(5, 6, generator=torch.Generator().manual_seed(2)), dim=1)
    corpus = LiveCorpus.from_vectors(vectors, chunk_cells=chunk)
    cosines = queries @ vectors.T
    thresholds = torch.stack([torch.full((5,), 0.1), torch.full((5,), -1.1), torch.full((5,), torch.inf)], 1)
    left_out = torch.tensor([[0, 39], [5, -1], [-1, -1], [7, 8], [39, 0]])
    kept = torch.ones(5, 40, dtype=torch.bool)
    for query, rows in enumerate(left_out.tolist()):
        kept[query, [row for row in rows if row >= 0]] = False
    expected = torch.stack([((cosines >= t[:, None]) & kept).sum(1) for t in thresholds.T], 1)
    assert torch.equal(corpus.count_at_least(queries, thresholds, left_out), expected)
    assert expected[:, 1].tolist() == [38, 39, 40, 38, 38]
    with pytest.raises(ValueError, match="5 queries, 4 rows of cosines"):
        corpus.count_at_least(queries, thresholds[:4], left_out)

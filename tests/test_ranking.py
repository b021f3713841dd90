"""One order: score descending, the smaller row number first among equals; the rank of the best positive in it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.ranking import full_ranking, rank_of_best_positive, top_k

MATRICES = st.lists(st.lists(st.integers(-2, 2), min_size=9, max_size=9), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(
    values=MATRICES,
    k=st.integers(1, 12),
)
def test_top_k_is_a_stable_sort_cut_at_k(values, k):
    matrix = np.array(values, dtype=np.float32)
    scores, indices = top_k(matrix, k)
    expected = np.argsort(-matrix, axis=1, kind="stable")[:, :k]
    assert indices.tolist() == expected.tolist()
    assert scores.tolist() == np.take_along_axis(matrix, expected, axis=1).tolist()
    assert np.array_equal(full_ranking(matrix)[:, :k], expected)


def test_scores_are_compared_in_float32():
    assert top_k(np.array([[0.25, 0.25 + 1e-12]]), 1)[1].tolist() == [[0]]
    assert full_ranking([[0.25, 0.25 + 1e-12, 0.5]]).tolist() == [[2, 0, 1]]


@settings(max_examples=80, deadline=None)
@given(values=MATRICES, data=st.data())
def test_the_rank_of_the_best_positive_is_its_place_in_the_ranking(values, data):
    matrix = np.array(values, dtype=np.float32)
    size = matrix.size
    positive = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).reshape(matrix.shape)
    ranked = np.take_along_axis(positive, full_ranking(matrix), axis=1)
    expected = [int(row.argmax()) + 1 if row.any() else 0 for row in ranked]
    assert rank_of_best_positive(matrix, positive).tolist() == expected


def test_nothing_to_rank_and_bad_shapes():
    assert rank_of_best_positive(np.zeros((3, 0)), np.zeros((3, 0), dtype=bool)).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="two equal matrices"):
        rank_of_best_positive(np.zeros((3, 2)), np.zeros((3, 1), dtype=bool))
    with pytest.raises(ValueError, match="NaN"):
        full_ranking([[np.nan, 1.0]])

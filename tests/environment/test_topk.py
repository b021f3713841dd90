"""The order of `search_r3.ranking`: score descending, then row number ascending; over shards too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3 import ranking
from search_r3.environment.topk import merge_top_k, pack, top_k, unpack

SCORES = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 1e-40, -3.0]) | st.floats(-2, 2, width=32)


@settings(max_examples=100, deadline=None)
@given(row=st.lists(SCORES, min_size=1, max_size=20), k=st.integers(1, 25))
def test_top_k_is_that_of_numpy(row, k):
    scores = torch.tensor([row, row[::-1]])
    values, columns = top_k(scores, k)
    expected, places = ranking.top_k(scores.numpy(), k)
    assert np.array_equal(columns.numpy(), places)
    assert np.array_equal(columns.numpy(), ranking.full_ranking(scores.numpy())[:, :k])
    assert np.array_equal(values.numpy(), expected)
    assert torch.equal(values, scores.gather(1, columns))


@settings(max_examples=100, deadline=None)
@given(row=st.lists(SCORES, min_size=1, max_size=20), shards=st.integers(1, 4), k=st.integers(1, 8), data=st.data())
def test_merged_shards_give_what_one_search_gives(row, shards, k, data):
    scores = torch.tensor([row, row[::-1]])
    owner = torch.tensor(data.draw(st.lists(st.integers(0, shards - 1), min_size=len(row), max_size=len(row))))
    parts = []
    for shard in range(shards):
        rows = (owner == shard).nonzero()[:, 0]
        values, columns = top_k(scores[:, rows], k)
        short = k - columns.shape[1]
        parts.append(
            (
                torch.nn.functional.pad(values, (0, short), value=-torch.inf),
                torch.nn.functional.pad(rows[columns], (0, short), value=-1),
            )
        )
    values, rows = merge_top_k(parts, min(k, len(row)))
    expected_values, expected_rows = top_k(scores, k)
    assert torch.equal(rows, expected_rows)
    assert torch.equal(values, expected_values)


def test_scores_and_rows_survive_packing():
    scores = torch.tensor([1.5, -1.5, 0.0, -torch.inf, torch.inf, 1e-45])
    rows = torch.tensor([0, 2**31 - 1, 7, -1, 3, 4])
    back, back_rows = unpack(pack(scores, rows))
    assert torch.equal(back, scores)
    assert torch.equal(back_rows, rows)


def test_bad_parts_are_refused():
    good = (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one part"):
        merge_top_k([], 3)
    with pytest.raises(ValueError, match="part 1 has scores"):
        merge_top_k([good, (torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.int64))], 3)
    with pytest.raises(ValueError, match="NaN"):
        merge_top_k([(good[0] * torch.nan, good[1])], 3)
    with pytest.raises(ValueError, match="k must be"):
        merge_top_k([good], 0)

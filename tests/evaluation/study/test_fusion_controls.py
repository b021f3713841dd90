"""Fused answers: the formula of the source, the order of the parts never matters."""

from __future__ import annotations

import numpy as np
import pytest

from search_r3.evaluation.study.fusion_controls import fuse_rows, fuse_runs
from search_r3.metrics import rank_documents
from search_r3.rank_fusion import reciprocal_rank_fusion


def test_rank_fusion_is_the_sum_of_reciprocal_ranks():
    a, b = {"q": {"x": 9.0, "y": 8.0}}, {"q": {"y": 0.3, "z": 0.2, "x": 0.1}, "r": {"x": 1.0}}
    fused = fuse_runs([a, b])
    assert fused["q"] == pytest.approx({"y": 1 / 62 + 1 / 61, "x": 1 / 61 + 1 / 63, "z": 1 / 62})
    assert fused["r"] == {"x": 1 / 61}
    assert rank_documents(fused["q"]) == ["y", "x", "z"]
    assert dict(reciprocal_rank_fusion([["x", "y"], ["y", "z", "x"]])) == pytest.approx(fused["q"])  # as the index does


def test_rank_fusion_cuts_its_parts_and_itself_at_the_depth_and_does_not_mind_their_order():
    rng = np.random.default_rng(0)
    runs = [{"q": {f"d{i:02d}": float(rng.integers(9)) for i in rng.permutation(40)}} for _ in range(5)]
    fused = fuse_runs(runs, depth=10)
    assert len(fused["q"]) == 10
    assert fused == fuse_runs(runs[::-1], depth=10)
    assert fuse_runs([runs[0]], depth=3)["q"] == {
        did: 1 / (61 + i) for i, did in enumerate(rank_documents(runs[0]["q"], 3))
    }


def test_mean_embeddings_are_unit_rows_between_their_parts():
    a, b = np.eye(3, dtype=np.float32)[:2], np.eye(3, dtype=np.float32)[1:]
    fused = fuse_rows([a, b])
    assert fused.dtype == np.float32
    assert np.linalg.norm(fused, axis=1) == pytest.approx([1, 1])
    assert fused[0] == pytest.approx([0.5**0.5, 0.5**0.5, 0])
    assert fuse_rows([a, a]) == pytest.approx(a)
    assert fuse_rows([a, -a]) == pytest.approx(a)  # they cancel out: the first stands
    with pytest.raises(ValueError, match="shape"):
        fuse_rows([a, b[:1]])

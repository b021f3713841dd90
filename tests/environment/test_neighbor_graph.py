"""NeighborGraph: the definition by hand, its invariants after any relinking, and that a local relink is local."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.environment.approximate_neighbors import nearest_in_buckets
from search_r3.environment.live_corpus import LiveCorpus
from search_r3.environment.neighbor_graph import NeighborGraph
from search_r3.environment.topk import top_k
from search_r3.errors import InputError

SIGNS = (0.5, -0.5)
CORNERS = torch.tensor([[a, b, c, d] for a in SIGNS for b in SIGNS for c in SIGNS for d in SIGNS])
"""Sixteen unit rows whose products are exact: equal rows and equal cosines abound."""


def unit(rows: int, dimension: int, seed: int = 0) -> torch.Tensor:
    matrix = torch.randn(rows, dimension, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(matrix, dim=1)


def by_hand(vectors: torch.Tensor, width: int, links: int) -> list[list[int]]:
    """The definition, in loops: choose `links`, both directions, keep the `width` nearest."""
    cosines, rows = (vectors @ vectors.T).tolist(), range(len(vectors))

    def nearest(row: int, among: set[int], count: int) -> list[int]:
        return sorted(among, key=lambda other: (-cosines[row][other], other))[:count]

    chosen = [set(nearest(row, set(rows) - {row}, links)) for row in rows]
    edges = [chosen[row] | {other for other in rows if row in chosen[other]} for row in rows]
    return [nearest(row, edges[row], width) for row in rows]


def lists(graph: NeighborGraph) -> list[list[int]]:
    return [[int(i) for i in row if i >= 0] for row in graph.ids_NM]


def check_invariants(graph: NeighborGraph, corpus: LiveCorpus, width: int) -> None:
    ids, cosines = graph.ids_NM, graph.cosines_NM
    assert ids.shape == cosines.shape == (len(corpus), width)
    assert ids.dtype == np.int32
    assert ids.min() >= -1
    assert ids.max() < len(corpus)
    assert (np.isfinite(cosines) == (ids >= 0)).all()
    true = corpus.vectors(range(len(corpus))).numpy()
    for row, (near, values) in enumerate(zip(ids, cosines, strict=True)):
        real = near[near >= 0]
        assert row not in real
        assert len(set(real.tolist())) == len(real)
        assert (near[len(real) :] == -1).all()  # no gaps
        assert (np.diff(values[: len(real)]) <= 0).all()
        assert values[: len(real)] == pytest.approx(true[real] @ true[row], abs=1e-5)  # no edge is out of date


CASES = {
    "rows": st.lists(st.integers(0, 15), min_size=1, max_size=24),
    "links": st.integers(1, 6),
    "more": st.integers(0, 4),
}


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_a_build_is_the_definition(rows, links, more):
    corpus = LiveCorpus.from_vectors(CORNERS[rows])
    graph = NeighborGraph.build(corpus, width=links + more, links=links)
    assert lists(graph) == by_hand(CORNERS[rows], links + more, links)
    check_invariants(graph, corpus, links + more)
    again = NeighborGraph.build(corpus, width=links + more, links=links, approximate=True)  # fits one bucket: exact
    assert (again.ids_NM == graph.ids_NM).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), **CASES)
def test_any_relinking_keeps_the_invariants_and_relinking_all_is_a_fresh_build(data, rows, links, more):
    count, width = len(rows), links + more
    corpus = LiveCorpus.from_vectors(CORNERS[rows])
    graph = NeighborGraph.build(corpus, width=width, links=links)
    for step in range(1, 4):
        moved = data.draw(st.lists(st.integers(0, count - 1), max_size=count, unique=True))
        places = data.draw(st.lists(st.integers(0, 15), min_size=len(moved), max_size=len(moved)))
        corpus.update(moved, CORNERS[places], step)
        before = lists(graph)
        graph.relink(moved, corpus)
        check_invariants(graph, corpus, width)
        after, gone = lists(graph), set(moved)
        vectors = corpus.vectors(range(count))
        cosines = (vectors @ vectors.T).fill_diagonal_(-9.0)
        for row in moved:  # what a relinked row chooses is exact, and is linked back unless nearer rows fill the list
            chosen = top_k(cosines[row : row + 1], min(links, count - 1))[1][0].tolist() if count > 1 else []
            assert set(chosen) <= set(after[row])
            for other in chosen:
                nearer = [n for n in after[other] if (-cosines[other, n], n) < (-cosines[other, row], row)]
                assert row in after[other] or len(nearer) == width
        for row in set(range(count)) - gone:  # the others keep their edges to rows that did not move, but for pruning
            kept = [other for other in before[row] if other not in gone]
            assert [other for other in after[row] if other not in gone] == kept or len(after[row]) == width
    graph.relink(range(count), corpus)
    assert lists(graph) == by_hand(corpus.vectors(range(count)), width, links)


def test_a_relink_drops_edges_to_where_a_row_was_and_adds_them_where_it_went():
    corpus = LiveCorpus.from_vectors(
        torch.nn.functional.normalize(torch.tensor([[1, 0.0], [1, 0.1], [0, 1.0], [0.1, 1]]))
    )
    graph = NeighborGraph.build(corpus, width=2, links=1)
    assert lists(graph) == [[1], [0], [3], [2]]
    corpus.update([1], torch.nn.functional.normalize(torch.tensor([[0.02, 1.0]])), step=1)
    graph.relink([1, 1], corpus)
    assert lists(graph) == [[], [2], [1, 3], [2]]


def test_pruning_keeps_the_nearest():
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.05])
    corpus = LiveCorpus.from_vectors(torch.stack([angles.cos(), angles.sin()], dim=1))
    graph = NeighborGraph(5, width=2, links=1)
    graph._link(np.array([1, 2, 3, 4]), np.zeros((4, 1), dtype=np.int32), angles[1:, None].cos().numpy())
    assert lists(graph) == [[4, 1], [0], [0], [0], [0]]
    check_invariants(graph, corpus, 2)


def test_neighbors_are_reached_hop_by_hop_nearest_first_without_the_start():
    graph = NeighborGraph(7, width=3, links=1)
    for row, near in enumerate(([1, 2], [0, 3], [0, 4, 3], [1, 2], [2, 5], [4], [])):
        graph.ids_NM[row, : len(near)] = near
    assert graph.neighbors([0]).tolist() == [1, 2]
    assert graph.neighbors([0], hops=0).tolist() == []
    assert graph.neighbors([0], hops=2).tolist() == [1, 2, 3, 4]
    assert graph.neighbors([0], hops=9).tolist() == [1, 2, 3, 4, 5]
    assert graph.neighbors([2, 1]).tolist() == [0, 4, 3]
    assert graph.neighbors(torch.tensor([6, 6])).tolist() == []
    assert graph.neighbors([]).tolist() == []
    with pytest.raises(ValueError, match="no row 7"):
        graph.neighbors([7])
    with pytest.raises(ValueError, match="hops"):
        graph.neighbors([0], hops=-1)


def test_blocks_of_a_build_do_not_change_it(monkeypatch):
    corpus = LiveCorpus.from_vectors(unit(50, 8))
    whole = NeighborGraph.build(corpus, width=6, links=3)
    monkeypatch.setattr("search_r3.environment.neighbor_graph.BLOCK", 7)
    assert lists(NeighborGraph.build(corpus, width=6, links=3)) == lists(whole)


def test_buckets_find_most_neighbors_with_true_cosines_and_are_repeatable():
    centres = unit(12, 16, seed=1)
    vectors = torch.nn.functional.normalize(centres[torch.arange(600) % 12] + 0.15 * unit(600, 16, seed=2), dim=1)
    corpus = LiveCorpus.from_vectors(vectors)
    ids, cosines = nearest_in_buckets(corpus, 5, largest=100)
    assert (ids != np.arange(600)[:, None]).all()
    assert (np.diff(cosines, axis=1) <= 0).all()
    rows, places = np.nonzero(ids >= 0)
    true = (vectors @ vectors.T).numpy()
    assert cosines[rows, places] == pytest.approx(true[rows, ids[rows, places]], abs=1e-5)
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in ids)
    exact = top_k((vectors @ vectors.T).fill_diagonal_(-9.0), 5)[1].numpy()
    found = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(ids, exact, strict=True)])
    assert found > 0.6
    more = nearest_in_buckets(corpus, 5, largest=100, rounds=6)[0]
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(more, exact, strict=True)]) > max(found, 0.85)
    assert (nearest_in_buckets(corpus, 5, largest=100)[0] == ids).all()
    graph = NeighborGraph.build(corpus, width=10, links=5, approximate=True)
    check_invariants(graph, corpus, 10)


def test_a_collapsed_corpus_is_cut_into_buckets_of_bounded_size(monkeypatch):
    sizes = []
    from search_r3.environment import approximate_neighbors

    plain = approximate_neighbors._within
    monkeypatch.setattr(
        approximate_neighbors,
        "_within",
        lambda c, members, links: sizes.append(len(members)) or plain(c, members, links),
    )
    corpus = LiveCorpus.from_vectors(CORNERS[[3] * 100])
    nearest_in_buckets(corpus, 3, largest=16, rounds=1)
    assert sum(sizes) == 100
    assert max(sizes) <= 16
    with pytest.raises(ValueError, match="1 or more"):
        nearest_in_buckets(corpus, 0)


def test_state_comes_back_bit_for_bit_and_another_shape_is_refused():
    corpus = LiveCorpus.from_vectors(unit(20, 8))
    graph = NeighborGraph.build(corpus, width=6, links=3)
    back = NeighborGraph(20, width=6, links=3)
    back.load_state_dict(
        {name: value.clone() if torch.is_tensor(value) else value for name, value in graph.state_dict().items()}
    )
    assert (back.ids_NM == graph.ids_NM).all()
    assert (back.cosines_NM == graph.cosines_NM).all()
    for other in (
        NeighborGraph(19, width=6, links=3),
        NeighborGraph(20, width=7, links=3),
        NeighborGraph(20, width=6, links=2),
    ):
        with pytest.raises(InputError, match="the run that saved it"):
            other.load_state_dict(graph.state_dict())
    with pytest.raises(InputError, match="format"):
        back.load_state_dict({**graph.state_dict(), "format": 0})


def test_wrong_sizes_are_refused():
    corpus = LiveCorpus.from_vectors(CORNERS)
    for width, links in ((4, 5), (4, 0), (0, 0)):
        with pytest.raises(InputError, match="links must be from 1 to"):
            NeighborGraph(4, width=width, links=links)
    with pytest.raises(ValueError, match="rows must be 1 or more"):
        NeighborGraph(0)
    with pytest.raises(ValueError, match="the corpus has 16 rows, the graph 15"):
        NeighborGraph(15).relink([0], corpus)
    with pytest.raises(ValueError, match="no row 16"):
        NeighborGraph(16).relink([16], corpus)

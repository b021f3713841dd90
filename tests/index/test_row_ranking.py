"""On object storage words and vectors are searched for at the same time, in a folder one after the other."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from search_r3.index.row_keys import CONTENT
from search_r3.index.row_ranking import RowRanking
from search_r3.index.run_search import DEFAULT_FUSION

VECTOR = np.ones(4, dtype=np.float32)


class Waiting:
    """A backend whose two searches wait for each other, at most a moment."""

    def __init__(self, remote: bool) -> None:
        self.remote, self.met = remote, threading.Barrier(2)
        self.began, self.threads = threading.Event(), set()

    def _found(self):
        self.began.set()
        self.threads.add(threading.get_ident())
        self.met.wait(0.2 if not self.remote else 20)
        return [({"id": "d", "document": "d", "title": "", CONTENT: "water"}, 1.0)]

    def search(self, vector, k, where, exact):
        return self._found()

    def search_text(self, words, k, where):
        return self._found()


def ranking_of(backend) -> RowRanking:
    return RowRanking(backend, "water", "hybrid", None, False, False, DEFAULT_FUSION)


def test_both_lists_of_a_far_index_are_asked_for_at_once():
    far, near = Waiting(remote=True), Waiting(remote=False)
    assert [row["id"] for row, *_ in ranking_of(far).best(VECTOR, 1)] == ["d"]
    assert len(far.threads) == 2
    with pytest.raises(threading.BrokenBarrierError):
        ranking_of(near).best(VECTOR, 1)
    assert near.threads == {threading.get_ident()}


def test_words_are_searched_for_while_a_query_is_embedded():
    far, near = Waiting(remote=True), Waiting(remote=False)
    ranking = ranking_of(far)
    ranking.begin(1)
    assert far.began.wait(20)
    assert len(ranking.best(VECTOR, 1)) == 1
    ranking_of(near).begin(1)
    assert not near.began.is_set()


def test_an_error_of_the_words_is_that_of_the_search():
    far = Waiting(remote=True)
    far.search_text = lambda *_: {}["gone"]
    far.search = lambda *_: []
    with pytest.raises(KeyError, match="gone"):
        ranking_of(far).best(VECTOR, 1)

"""Threads that share a pass see at each barrier what the others wrote before it, however many they are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("numba")
from numba import njit

from search_r3.model.engines.int8.thread_team import MAX_THREADS, ThreadTeam, barrier_intrinsic

wait = barrier_intrinsic()


@njit(nogil=True)
def relay(board: np.ndarray, rounds: int, share: int, shares: int, barrier: int) -> None:
    """Each share adds up what all wrote in the round before, and writes that in its own place."""
    arrived = 0
    for turn in range(1, rounds):
        total = 0
        for place in range(shares):
            total += board[turn - 1, place]
        board[turn, share] = total % 1_000_003 + share
        if shares > 1:
            arrived += shares
            wait(barrier, arrived)


@pytest.fixture
def sharers() -> Iterator[ThreadTeam]:
    before = torch.get_num_threads()
    yield ThreadTeam()
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3, MAX_THREADS + 3])
def test_each_sees_what_the_others_wrote(sharers: ThreadTeam, threads: int) -> None:
    torch.set_num_threads(threads)
    shares, rounds = min(threads, MAX_THREADS), 50
    expected = np.zeros((rounds, shares), dtype=np.int64)
    expected[0] = np.arange(shares) + 1
    found = expected.copy()
    for turn in range(1, rounds):
        expected[turn] = expected[turn - 1].sum() % 1_000_003 + np.arange(shares)
    for _ in range(2):  # the helpers are there already
        found[1:] = 0
        sharers.run(lambda *share: relay(found, rounds, *share))
        assert np.array_equal(found, expected)


def test_more_threads_later_are_more_shares(sharers: ThreadTeam) -> None:
    seen: list[tuple[int, int]] = []
    for threads in (1, 2, 4, 2):
        torch.set_num_threads(threads)
        seen.clear()
        sharers.run(lambda share, shares, _: seen.append((share, shares)))
        assert sorted(seen) == [(share, threads) for share in range(threads)]

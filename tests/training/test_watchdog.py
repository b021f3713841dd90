"""Several processes of a training run: when one is lost or keeps the others waiting, all end, with one line."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from nightly import nightly
from processes import Child, start

from search_r3.errors import InputError
from search_r3.training.distributed import sharding
from search_r3.training.distributed.watchdog import Heartbeat, seconds_from, too_long

SCRIPT = """
import sys, time
from search_r3.cli.process import quiet_lost_connections

quiet_lost_connections()
from search_r3.training.distributed import collectives, watchdog
from search_r3.training.distributed.sharding import end_processes, start_processes

def hang():
    time.sleep(1000)

@watchdog.limited_step()
def step():
    if collectives.rank() == 1 and "hang" in sys.argv:
        hang()
    collectives.all_reduce_max(1)

start_processes()
step_by_step, failed = "steps" in sys.argv, True
time.sleep(1)  # the first heartbeats, with the processes' names
try:
    print("joined", flush=True)
    while True:
        if step_by_step or "hang" in sys.argv:
            step()
        if collectives.rank() == 1 and "fail" in sys.argv:
            raise ValueError("the disk is full")
        time.sleep(0.05)
except RuntimeError as error:
    watchdog.end_if_lost(error)
    raise
finally:
    end_processes(failed)
"""


@contextmanager
def launched(count: int, *words: str, lost: float = 3.0, step: float = 0.0) -> Iterator[list[Child]]:
    """Processes of one group that have joined it, and go on until they are ended."""
    with socket.socket() as free, ExitStack() as stack:
        free.bind(("127.0.0.1", 0))
        env = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_PORT": str(free.getsockname()[1]), "LOCAL_WORLD_SIZE": str(count)}
        env |= {"SEARCH_R3_LOST_TIMEOUT": str(lost), "SEARCH_R3_STEP_TIMEOUT": str(step)}
        free.close()
        children = [
            stack.enter_context(
                start([sys.executable, "-c", SCRIPT, *words], env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            )
            for rank in range(count)
        ]
        for child in children:
            child.line("joined")
        yield children


def lines(children: list[Child]) -> list[str]:
    """What they have written to standard error, after their end."""
    for child in children:
        assert child.wait(40) == 1
    return [line for child in children for line in child.stderr.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "how"),
    [(1, "stopped"), *nightly((0, "stopped"), (0, "killed"), (1, "killed"), (1, "killed in a collective"))],
)
def test_the_loss_of_one_process_ends_the_others_with_one_line(rank: int, how: str) -> None:
    with launched(2, *["steps"] * (how == "killed in a collective")) as children:
        children[rank].send_signal(signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
        [line] = lines([children[1 - rank]])
        assert line.startswith(f"error: rank {rank} (process {children[rank].pid} on ")
        assert "has given no sign of life for" in line
        assert line.endswith("run the same command again to resume from the last checkpoint")
        if how == "stopped":
            children[rank].send_signal(signal.SIGCONT)
            assert len(lines([children[rank]])) <= 1  # it says so of the other one, if it held the store


@pytest.mark.nightly
def test_a_step_that_takes_too_long_ends_all_and_shows_who_is_waited_for() -> None:
    with launched(3, "hang", lost=30, step=3) as children:
        [line] = lines(children)
        assert "a step takes longer than 3 s (SEARCH_R3_STEP_TIMEOUT)" in line
        assert "2 processes are at training/distributed/collectives.py:" in line
        assert f"rank 1 (process {children[1].pid} on " in line


@pytest.mark.nightly
def test_an_error_in_one_process_ends_the_others_and_is_printed_once() -> None:
    with launched(2, "fail", lost=30) as children:
        assert [line for line in lines(children) if "]:   " not in line] == [
            "[rank1]: Traceback (most recent call last):",
            "[rank1]: ValueError: the disk is full",
        ]


def test_the_places_with_few_processes_come_first() -> None:
    beats = {rank: Heartbeat(9, 11.0, "a.py:1" if rank % 2 else "b.py:2", f"process {rank}") for rank in range(3)}
    line = too_long(beats, 10)
    assert line is not None
    assert "rank 1 (process 1) is at a.py:1, 2 processes are at b.py:2" in line
    assert too_long(beats, 12) is None


@pytest.mark.parametrize("given", ["soon", "-1", "nan"])
def test_a_timeout_is_a_number_of_seconds(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCH_R3_LOST_TIMEOUT", given)
    with pytest.raises(InputError, match=f"SEARCH_R3_LOST_TIMEOUT is '{given}'; give a number of seconds"):
        seconds_from("SEARCH_R3_LOST_TIMEOUT", 1.0)
    monkeypatch.setenv("SEARCH_R3_LOST_TIMEOUT", "0")
    assert seconds_from("SEARCH_R3_LOST_TIMEOUT", 1.0) == float("inf")


def test_one_process_where_several_were_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*sharding.MPI_SIZES, "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    sharding.check_launch(0)  # accelerate launch of one process
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(InputError, match="asked for several processes but started one"):
        sharding.check_launch(0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    sharding.check_launch(0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    sharding.check_launch(1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    sharding.check_launch(2)
    with pytest.raises(InputError, match="2 processes were started on this machine, which has 1 GPU; start one for"):
        sharding.check_launch(1)

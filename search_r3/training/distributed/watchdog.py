"""Ends all processes of a training run, with one line, when one of them is lost or keeps the others waiting.

A collective waits for every process. If one is killed, stopped or cut off, the others wait for torch's own timeout (10
minutes with NCCL, 30 with gloo), or fail with a traceback about a closed connection. Here a thread of every process
writes a heartbeat to the launcher's store once a second; the first process reads all of them, the others the first
one's. One that is silent for too long is taken for lost: the failure detector of Chandra and Toueg (1996).

A process can also live and stand still, in a deadlock or on a dead file system. Therefore a training step has a limit
too, and a heartbeat says where the main thread is, so that the line shows which process the others wait for.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from search_r3.errors import InputError

LOST_VARIABLE, LOST_SECONDS = "SEARCH_R3_LOST_TIMEOUT", 120.0
"""Seconds without a heartbeat after which a process is taken for lost; 0: never. More than any garbage collection or
pause of a virtual machine."""
STEP_VARIABLE, STEP_SECONDS = "SEARCH_R3_STEP_TIMEOUT", 1800.0
"""Seconds that an optimizer step may take; 0: any. Torch's limit for a collective over gloo."""
BEAT_SECONDS = 1.0
BROKEN_SECONDS = 5.0
"""What replaces LOST_SECONDS once a connection broke off: then it is only asked who was lost."""
TERMINATED_SECONDS = 15.0
"""What replaces LOST_SECONDS after SIGTERM, which a launcher sends when a process has ended; torchrun's SIGKILL follows
after 30 s."""
GRACE_SECONDS = 10.0
"""For a process to end by itself after another one has failed, as all do that find the same mistake."""
RESUME = "run the same command again to resume from the last checkpoint"
EXIT_CODE = 1
LOST = "{} has given no sign of life for {:.0f} s: it was killed or stopped, or its machine is gone"
ENDED = "ended"
SHOWN = 3
"""Places that a line names at most."""
PACKAGE = Path(__file__).parents[2]
SIGNS_OF_A_LOSS = ("connection", "gloo", "nccl", "timed out", "broken pipe")
"""Found in the messages of torch's backends when a peer is gone, in lower case."""

_running: Watchdog | None = None
_step_began: float | None = None


def seconds_from(variable: str, default: float) -> float:
    """The timeout in the environment, in seconds; infinity for 0.

    Raises:
        InputError: it is not a number of seconds.
    """
    given = os.environ.get(variable, "").strip()
    try:
        seconds = float(given) if given else default
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise InputError(f"{variable} is {given!r}; give a number of seconds, or 0 to wait for ever")
    return seconds or math.inf


def start_watchdog(rank: int, processes: int) -> None:
    """Watch over the processes of this run, if there are several. Further calls have no effect.

    Raises:
        InputError: a timeout in the environment is not a number of seconds.
    """
    global _running
    lost, step = seconds_from(LOST_VARIABLE, LOST_SECONDS), seconds_from(STEP_VARIABLE, STEP_SECONDS)
    if processes > 1 and _running is None and lost < math.inf and "MASTER_ADDR" in os.environ:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        _running = Watchdog(Peers(host, port, rank, processes), lost, step)
        _running.start()
        atexit.register(stop_watchdog)


def stop_watchdog(failed: bool = False) -> None:
    """Stop watching, and tell the others that this process has ended; if it `failed`, they end too."""
    global _running
    if _running is not None:
        _running.stop(failed)
        _running = None


@contextmanager
def limited_step() -> Iterator[None]:
    """Around an optimizer step, whose time is limited."""
    global _step_began
    _step_began = time.monotonic()
    try:
        yield
    finally:
        _step_began = None


def hurry() -> None:
    """Decide within seconds whether a process is lost: SIGTERM arrived, which a launcher sends if one has ended."""
    if _running is not None:
        _running.lost = min(_running.lost, TERMINATED_SECONDS)


def end_if_lost(error: BaseException) -> None:
    """End this process with the watchdog's line if `error` comes from the loss of another one; else return."""
    message = str(error).lower()
    if _running is not None and isinstance(error, RuntimeError) and any(sign in message for sign in SIGNS_OF_A_LOSS):
        _running.lost = min(_running.lost, BROKEN_SECONDS)
        time.sleep(2 * BROKEN_SECONDS + GRACE_SECONDS)  # the watchdog's thread ends the process meanwhile


@dataclass(frozen=True)
class Heartbeat:
    """What a process says of itself."""

    count: int
    """One more than in the one before."""
    step: float
    """Seconds since the optimizer step began; 0 outside of one."""
    place: str
    """The line that the main thread executes."""
    name: str
    """ "process 123 on host"."""
    done: bool = False


class Peers:
    """The processes' heartbeats in the launcher's store, which every process has a connection of its own to."""

    def __init__(self, host: str, port: int, rank: int, processes: int) -> None:
        self.rank = rank
        self.watched = range(processes if rank == 0 else 1)
        """The ranks whose heartbeats this process reads."""
        store = TCPStore(host, port, None, False, timeout=timedelta(seconds=30), wait_for_workers=False)
        self._store, self._prefix = store, "search_r3/watchdog/"

    def beat(self, heartbeat: Heartbeat) -> None:
        """Publish this process's heartbeat. May block for as long as the store does not answer."""
        self._store.set(self._key(self.rank), json.dumps(vars(heartbeat)))

    def heartbeats(self) -> dict[int, Heartbeat]:
        """The heartbeats that this process watches, by rank."""
        there = [rank for rank in self.watched if self._store.check([self._key(rank)])]
        values = self._store.multi_get([self._key(rank) for rank in there]) if there else []
        return {rank: Heartbeat(**json.loads(value)) for rank, value in zip(there, values, strict=True)}

    def ended(self) -> dict[str, str] | None:
        """What was given to `end` by the first process that called it."""
        key = self._prefix + ENDED
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def end(self, line: str) -> bool:
        """Tell all processes to end; returns whether this is the first to say so, which then prints the line."""
        mine = json.dumps({"line": line, "host": socket.gethostname(), "rank": self.rank})
        return bool(self._store.compare_set(self._prefix + ENDED, "", mine).decode() == mine)

    def _key(self, rank: int) -> str:
        return f"{self._prefix}{rank}"


class Watchdog:
    """Two threads: one exchanges heartbeats, which may block for ever; the other one decides, and ends the process.

    Args:
        peers: the heartbeats of all processes.
        lost, step: the two timeouts, in seconds.
    """

    def __init__(self, peers: Peers, lost: float, step: float) -> None:
        self.peers, self.lost, self.step = peers, lost, step
        self._interval = min(BEAT_SECONDS, lost / 10)
        self._name = f"process {os.getpid()} on {socket.gethostname()}"
        self._answered = time.monotonic()
        unknown = Heartbeat(0, 0.0, "", "")
        self._heard = dict.fromkeys(peers.watched, (unknown, self._answered))  # and when it changed, monotonic seconds
        self._ended: dict[str, str] | None = None
        self._stopped = threading.Event()
        self._failed = False
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._exchange, self._watch)]

    def start(self) -> None:
        """Start both threads."""
        for thread in self._threads:
            thread.start()

    def stop(self, failed: bool) -> None:
        """See `stop_watchdog`."""
        self._failed = failed
        self._stopped.set()
        self._threads[0].join(3 * self._interval)  # of a store that does not answer, nothing more is expected

    def _exchange(self) -> None:
        count = 0
        while not self._stopped.is_set():
            count += 1
            step = 0.0 if (began := _step_began) is None else time.monotonic() - began
            with suppress(RuntimeError, ValueError):  # if the store is gone or slow, its last answer gets old
                self.peers.beat(Heartbeat(count, step, place_of_main_thread(), self._name))
                self._hear(self.peers.heartbeats())
                self._ended = self.peers.ended()
                self._answered = time.monotonic()
            self._stopped.wait(self._interval)
        with suppress(RuntimeError, ValueError):
            self.peers.beat(Heartbeat(count, 0.0, "", self._name, done=True))
            if self._failed:
                self.peers.end(f"{_of(self.peers.rank, self._name)} ended with an error, which it has printed")

    def _hear(self, heartbeats: dict[int, Heartbeat]) -> None:
        for rank, heartbeat in heartbeats.items():
            if self._heard[rank][0].count != heartbeat.count or heartbeat.done:
                self._heard[rank] = (heartbeat, time.monotonic())

    def _watch(self) -> None:
        tick = time.monotonic()
        while not self._stopped.wait(self._interval):
            now = time.monotonic()
            if now - tick > self.lost / 2:  # this process was stopped itself: the others may have been, too
                self._answered = now
                self._heard = {rank: (heartbeat, now) for rank, (heartbeat, _) in self._heard.items()}
            tick = now
            if self._ended is not None:
                self._follow(self._ended)
            elif now - self._answered > self.lost:
                self._say(LOST.format(_of(0, self._heard[0][0].name), now - self._answered), answers=False)
            elif (line := self._verdict()) is not None:
                self._say(line, answers=True)

    def _verdict(self) -> str | None:
        """Who is lost or keeps the others waiting, if anyone, as of the store's last answer."""
        alive = {rank: heard for rank, heard in self._heard.items() if not heard[0].done}
        for rank, (heartbeat, since) in alive.items():
            if self._answered - since > self.lost:
                return LOST.format(_of(rank, heartbeat.name), self._answered - since)
        if self.peers.rank > 0:
            return None
        return too_long({rank: heartbeat for rank, (heartbeat, _) in alive.items()}, self.step)

    def _say(self, line: str, answers: bool) -> None:
        """Print the line, unless the store `answers` that another process does, and end this one."""
        line = f"{line}; all processes end: {RESUME}"
        first = self.peers.rank < 2 or os.environ.get("LOCAL_RANK") == "0"
        if answers:
            with suppress(RuntimeError):
                first = self.peers.end(line)
        self._exit(line if first else None)

    def _follow(self, ended: dict[str, str]) -> None:
        """End as another process has said; on its machine it has printed the line itself."""
        self._stopped.wait(GRACE_SECONDS)
        if not self._stopped.is_set():
            elsewhere = ended["host"] != socket.gethostname() and os.environ.get("LOCAL_RANK") == "0"
            self._exit(ended["line"] if elsewhere else None)

    def _exit(self, line: str | None) -> None:
        if line is not None:
            print(f"error: {line}", file=sys.stderr, flush=True)
        time.sleep(3 * self._interval)  # the first process may hold the store, where the others read why
        os._exit(EXIT_CODE)  # the main thread is in a collective, which nothing interrupts


def _of(rank: int, name: str) -> str:
    return f"rank {rank}" + (f" ({name})" if name else "")


def too_long(heartbeats: dict[int, Heartbeat], seconds: float) -> str | None:
    """Where all processes are if a step takes longer than that, those that are alone first; else None.

    Args:
        heartbeats: by rank, of those that have not ended.
        seconds: what a step may take.
    """
    if not any(heartbeat.step > seconds for heartbeat in heartbeats.values()):
        return None
    ranks: dict[str, list[int]] = {}
    for rank, heartbeat in heartbeats.items():
        ranks.setdefault(heartbeat.place, []).append(rank)
    parts = []
    for place, here in sorted(ranks.items(), key=lambda item: len(item[1])):
        name = _of(here[0], heartbeats[here[0]].name) if len(here) == 1 else f"{len(here)} processes"
        parts.append(f"{name} {'is' if len(here) == 1 else 'are'} at {place}")
    rest = f", {len(parts) - SHOWN} more elsewhere" if len(parts) > SHOWN else ""
    return f"a step takes longer than {seconds:g} s ({STEP_VARIABLE}): {', '.join(parts[:SHOWN])}{rest}"


def place_of_main_thread() -> str:
    """The innermost line of this package that the main thread executes: "training/loop.py:210"."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "a line outside search_r3"

"""A process that is watched from outside and killed with SIGKILL: at a share of its CPU time, or at a file event.

The parent has imported everything, each victim is forked off it: a kill costs no start of Python. CPU time, not the
clock, so that a busy machine does not move the moments; file events come from the kernel (inotify), so Rust's writes
count as Python's do.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import re
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIMEOUT = 900.0
"""Seconds after which a process that should have ended counts as hanging; a quiet machine needs two."""
POLL = 0.0005
"""Seconds between two looks at a victim's CPU time."""
NAMES = {0x2: "written", 0x8: "closed", 0x40: "moved away", 0x80: "moved in", 0x100: "created", 0x200: "deleted"}
_MASK = sum(NAMES) | 0x1000000  # IN_ONLYDIR
_IS_FOLDER = 0x40000000


@dataclass(frozen=True)
class Moment:
    """When to kill: at `share` of the CPU time that an undisturbed run takes, or `delay` seconds after its file event
    number `event`."""

    share: float | None = None
    event: int | None = None
    delay: float = 0.0


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code, -9 if it was killed.
        cpu: its seconds of CPU time.
        last: what happened last before it ended or was killed (the kernel closes a dead process's files).
        events: what happened in the watched folder, in order: (what, path below it). Writes to one file that follow
            each other are one event: the kernel merges them by chance.
    """

    code: int
    cpu: float
    last: tuple[str, str] | None = None
    events: list[tuple[str, str]] = field(default_factory=list)

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    def moved_in(self, pattern: str) -> list[re.Match[str]]:
        """Matches of `pattern` with the paths that came to be under their final name."""
        wanted = ("moved in", "created")
        return [found for what, path in self.events if what in wanted and (found := re.fullmatch(pattern, path))]


class Watch:
    """What happens to the files below a folder that exists; folders made later are watched from then on."""

    def __init__(self, folder: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify cannot be had")
        self._root, self._folders = folder, dict[int, Path]()
        self._add(folder)

    def read(self) -> list[tuple[str, str]]:
        """The events since the last call."""
        events = []
        with suppress(BlockingIOError):
            while True:
                data, place = os.read(self.descriptor, 65536), 0
                while place < len(data):
                    number, mask, _, length = struct.unpack_from("iIII", data, place)
                    place += 16 + length
                    name = data[place - length : place].rstrip(b"\0").decode("utf-8", "replace")
                    if what := next((NAMES[bit] for bit in NAMES if mask & bit), None):
                        path = self._folders[number] / name
                        events.append((what, str(path.relative_to(self._root))))
                        if mask & _IS_FOLDER and what in ("created", "moved in"):
                            events += self._add(path)
        return events

    def close(self) -> None:
        os.close(self.descriptor)

    def _add(self, folder: Path) -> list[tuple[str, str]]:
        """Watch `folder` and what is in it; returns the files that were there before the watch was."""
        number = self._libc.inotify_add_watch(self.descriptor, os.fsencode(folder), _MASK)
        if number < 0:
            return []  # it is gone already
        self._folders[number] = folder
        found = []
        with suppress(OSError):
            for item in sorted(folder.iterdir()):
                found.append(("created", str(item.relative_to(self._root))))
                if item.is_dir() and not item.is_symlink():
                    found += self._add(item)
        return found if folder != self._root else []


def start(work: Callable[[], int | None], log: Path) -> int:
    """Fork a process that does `work` with its output in `log` and ends with the code that it returns; its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70  # EX_SOFTWARE, unless the work says otherwise
    try:
        place = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(place, 1)
        os.dup2(place, 2)
        code = work() or 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run(
    work: Callable[[], int | None],
    log: Path,
    watched: Path,
    moment: Moment | None = None,
    cpu_of_whole: float = 0.0,
    beside: Callable[[int], Callable[[], int | None]] | None = None,
) -> Ended:
    """Run `work` in a process, watch what it does to `watched`, and kill it at `moment`.

    `beside(pid)` is the work of a second process that runs meanwhile (a server's client); it must end by itself soon
    after the first. Raises SystemExit with the log's end if either hangs.
    """
    watch = Watch(watched)
    pid = start(work, log)
    other = start(beside(pid), log.with_suffix(".client.log")) if beside else None
    clock, cpu, code = (~pid << 3) | 2, 0.0, None  # what clock_getcpuclockid(3) computes
    events: list[tuple[str, str]] = []
    last: tuple[str, str] | None = None
    deadline, planned = time.monotonic() + TIMEOUT, math.inf
    while code is None:
        done, status = os.waitpid(pid, os.WNOHANG)
        _append(events, watch.read())
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        with suppress(OSError):
            cpu = time.clock_gettime(clock)
        now = time.monotonic()
        if moment is not None and moment.event is not None and len(events) >= moment.event:
            planned = min(planned, now + moment.delay)
        if moment is not None and moment.share is not None and cpu >= moment.share * cpu_of_whole:
            planned = now
        if now >= min(planned, deadline):
            os.kill(pid, signal.SIGKILL)
            last = events[-1] if events else None
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            _append(events, watch.read())
            if planned > now:
                raise SystemExit(f"a process hangs; the end of its log {log}:\n{tail(log)}")
        select.select([watch.descriptor], [], [], POLL)
    watch.close()
    if other is not None:
        wait(other, log.with_suffix(".client.log"))
    return Ended(code, cpu, last, events)


def _append(events: list[tuple[str, str]], new: list[tuple[str, str]]) -> None:
    for event in new:
        if not events or events[-1] != event:
            events.append(event)


def wait(pid: int, log: Path) -> int:
    """A process's exit code; SystemExit with the log's end if it does not end."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise SystemExit(f"a process hangs; the end of its log {log}:\n{tail(log)}")
        time.sleep(0.002)


def ask(work: Callable[[], Any], scratch: Path) -> Any:
    """What `work` returns (JSON) when done in a process of its own: the parent must not start threads before it forks.

    Raises RuntimeError with the end of its log if it fails.
    """
    answer, log = scratch / "answer.json", scratch / "answer.log"
    answer.unlink(missing_ok=True)

    def write() -> None:
        answer.write_text(json.dumps(work()), encoding="utf-8")

    if code := wait(start(write, log), log):
        raise RuntimeError(f"a check ended with code {code}:\n{tail(log)}")
    return json.loads(answer.read_text(encoding="utf-8"))


def modules_of(work: Callable[[], Any], scratch: Path) -> list[str]:
    """The modules that `work` loads beyond what is loaded here, in the order in which it loads them."""

    def names() -> list[str]:
        before = set(sys.modules)
        work()
        return [name for name in sys.modules if name not in before]

    return ask(names, scratch)


def import_all(names: list[str]) -> None:
    """Import what a victim would import, once and for all victims; what cannot be imported by name is left out."""
    for name in names:
        with suppress(Exception):
            importlib.import_module(name)


def tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-3000:] if log.exists() else "(there is none)"

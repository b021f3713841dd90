"""Child processes for tests: every one has a time limit, loses no output and ends with the test, whatever fails.

`run` waits for a program to end, `start` is for one that is watched or signaled while it runs, and `run_processes` is
for work in several processes that find each other through gloo. Output goes to files, so that no pipe fills up and no
grandchild that keeps one open is waited for. Each child leads a process group, which is killed with it; a reaper does
so when this process itself is killed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

SECONDS = 100.0  # the limit where a test names none; below pytest's own, so that the child's output is reported
GRACE = 5.0  # between SIGTERM and SIGKILL
POLL = 0.01

REAPER = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


class Child:
    """A running program. Use it as a context manager (`with start(...) as child`): leaving the block ends it.

    Raises AssertionError when it is not done in time. The program's output is added to whatever is raised in the block.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        given: bytes | None = None,
        stdout: int | None = None,
    ) -> None:
        self._command = [str(part) for part in command]
        self._files = {name: tempfile.TemporaryFile() for name in ("stdin", "stdout", "stderr")}  # noqa: SIM115
        self._files["stdin"].write(given or b"")
        self._files["stdin"].seek(0)
        streams: dict[str, Any] = self._files | ({} if stdout is None else {"stdout": stdout})
        self.process = subprocess.Popen(self._command, env=env, cwd=cwd, start_new_session=True, **streams)
        self.pid = self.process.pid
        self._written: dict[str, str] = {}  # once the files are closed
        _reaper_is_to(f"+{self.pid}")

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._read("stdout")

    @property
    def stderr(self) -> str:
        """What it has written to standard error so far."""
        return self._read("stderr")

    def line(self, pattern: str, stream: Literal["stdout", "stderr"] = "stdout", seconds: float = SECONDS) -> str:
        """The first complete line in which `pattern` (a regular expression) is found, once it is there."""
        end = time.monotonic() + seconds
        while True:
            over = self.process.poll() is not None or time.monotonic() > end
            lines = self._read(stream).splitlines(keepends=True)
            found = next((line for line in lines if line.endswith("\n") and re.search(pattern, line)), None)
            if found is not None:
                return found.rstrip("\n")
            if over:
                why = f"not within {seconds:g} s" if self.process.returncode is None else "and the program has ended"
                raise AssertionError(f"no line with {pattern!r} on {stream}, {why}")
            time.sleep(POLL)

    def wait(self, seconds: float) -> int:
        """Its exit status (negative: the signal that ended it), once it has ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the program has not ended within {seconds:g} s") from None

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it and everything that it has started, with SIGKILL."""
        self._signal_group(signal.SIGKILL)
        self.process.wait(GRACE)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with suppress(subprocess.TimeoutExpired):
            if error is None and self.process.poll() is None:
                self._signal_group(signal.SIGTERM)
                self.process.wait(GRACE)
        self.kill()
        _reaper_is_to(f"-{self.pid}")
        self._written = {name: self._read(name) for name in ("stdout", "stderr")}
        for file in self._files.values():
            file.close()
        if error is not None:
            error.add_note(self.report())

    def report(self) -> str:
        """Command, exit status and the end of its output, for a person who asks why a test failed."""
        command = " ".join(part if len(part) < 200 else part[:200] + "..." for part in self._command)
        parts = [f"$ {command}", f"exit status: {self.process.returncode}"]
        parts += [f"{name}:\n{text[-4000:]}" for name in ("stdout", "stderr") if (text := self._read(name))]
        return "\n".join(parts)

    def _read(self, name: str) -> str:
        if self._written:
            return self._written[name]
        file = self._files[name].fileno()  # pread leaves the offset, which the program's writes share, as it is
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def _signal_group(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):  # of a group that has ended (macOS: PermissionError)
            os.killpg(self.pid, number)


def start(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Child:
    """Start a program that is watched while it runs; ended with the `with` block. `env` replaces the environment."""
    return Child(command, env=env, cwd=cwd)


def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    given: bytes | None = None,
    stdout: int | None = None,
    check: bool = True,
    seconds: float = SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return its status and output.

    Args:
        command: The program and its arguments.
        env: Replaces the environment.
        cwd: The folder to run it in.
        given: What it reads from standard input.
        stdout: A file descriptor to write to; by default its output is kept.
        check: Raise AssertionError, with its output, if the exit status is not 0.
        seconds: The time it may take; AssertionError after that.
    """
    with Child(command, env=env, cwd=cwd, given=given, stdout=stdout) as child:
        status = child.wait(seconds)
        assert not check or status == 0, f"exit status {status}"
        return subprocess.CompletedProcess(child._command, status, child.stdout, child.stderr)


def eventually(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until `true()`; AssertionError if it is not within `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"it did not come about within {seconds:g} s"
        time.sleep(POLL)


def run_processes(work: Callable[..., None], *args: Any, processes: int = 2, seconds: float = SECONDS) -> None:
    """`work(rank, *args)` in each of new processes; what one raises is raised here, and all end within `seconds`.

    A process that is done ends at once: gloo's threads sometimes abort an interpreter that shuts down in order
    ("terminate called without an active exception"), after all the work.
    """
    import torch.multiprocessing as mp

    context = mp.spawn(_call, args=(work, args), nprocs=processes, join=False)
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1.0):
            assert time.monotonic() < end, f"the {processes} processes have not ended within {seconds:g} s"
    finally:
        for process in context.processes:
            process.kill()
            process.join(GRACE)


def _call(rank: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    work(rank, *args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@cache
def _reaper() -> subprocess.Popen[str]:
    """Kills what children are left as soon as this process is gone, which its end of the pipe shows."""
    command = [sys.executable, "-S", "-c", REAPER]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)


def _reaper_is_to(line: str) -> None:
    reaper = _reaper()
    assert reaper.stdin is not None
    print(line, file=reaper.stdin, flush=True)

"""One victim with its inputs and the runs that nobody disturbs, killed at one moment after the other.

Half of the moments are shares of an undisturbed run's CPU time, half are its file events: writes, renames and removals
are brief, and shares of the time alone would seldom meet them.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

from kill_process import Ended, Moment, ask, import_all, modules_of, start, tail
from kill_process import run as run_process
from kill_victims import Victim

ATTEMPTS = 6
"""Times that an earlier moment is tried where the victim had ended before it was killed."""
KILLED_TWICE = 5
"""Every fifth kill hits a run that goes on after a kill already."""


MOST_DELAY = 0.004
"""Seconds between a file event and the kill, at most: about what is written in a go."""


class Whole:
    """An undisturbed run: its folder, and by which the moments of kills are measured."""

    def __init__(self, folder: Path, ended: Ended) -> None:
        self.folder, self.cpu, self.events = folder, ended.cpu, len(ended.events)


class Subject:
    """A victim with its inputs and undisturbed runs, ready to be killed."""

    def __init__(self, victim: type[Victim], scratch: Path, seed: int) -> None:
        self.scratch = scratch / victim.name
        (self.scratch / "inputs").mkdir(parents=True)
        self.victim, self.seed = victim(self.scratch / "inputs"), seed
        self.wholes: dict[str, Whole] = {}
        import_all(modules_of(self.victim.prepare, self.scratch))

    def whole(self, kill: int) -> Whole:
        """The undisturbed run of this kill's kind; the first is run twice, the second time with everything imported."""
        kind = self.victim.kind(kill)
        if kind not in self.wholes:
            if not self.wholes:
                folder = self._folder("warm", kill)
                import_all(modules_of(lambda: self._quietly(folder), self.scratch))
            folder = self._folder(f"whole-{kind}", kill)
            ended = self.run(folder)
            if ended.code:
                raise SystemExit(f"{kind} fails undisturbed, code {ended.code}:\n{tail(self.log(folder))}")
            self.wholes[kind] = Whole(folder, ended)
        return self.wholes[kind]

    def kill(self, kill: int, kills: int) -> dict[str, Any]:
        """Kill number `kill` of `kills`: what, when, what was found, what is wrong."""
        whole, name = self.whole(kill), self.victim.kind(kill)
        rng = random.Random(f"{self.seed} {self.victim.name} {kill} of {kills}")
        begun, first = time.monotonic(), kill % KILLED_TWICE == KILLED_TWICE - 1
        moment = _moment(kill, kills, whole, rng)
        for _ in range(ATTEMPTS):
            folder = self._folder(f"kill-{kill}", kill)
            said = f"{_said(moment, whole)}"
            if first:
                once = self.run(folder, Moment(share=rng.random() * 0.6), whole)
                said = f"again, after a kill at {once.cpu / whole.cpu:.0%}: {said}"
            ended = self.run(folder, moment, whole)
            if ended.killed:
                break
            moment = _earlier(moment)
        else:
            raise SystemExit(f"{name}: it ends before it can be killed:\n{tail(self.log(folder))}")
        last = " ".join(ended.last) if ended.last else "nothing yet"
        try:
            found, wrong = ask(lambda: self.victim.inspect(folder, whole.folder, ended), self.scratch)
            self.log(folder).unlink(missing_ok=True)
            again = self.run(folder)
            log = self.log(folder).read_text(encoding="utf-8", errors="replace")
            if again.code:
                after = f"going on ended with code {again.code}"
                wrong.append(f"{after}: {log.strip().splitlines()[-1:]}")
            else:
                after, differs = ask(lambda: self.victim.compare(folder, whole.folder, log, found), self.scratch)
                wrong += differs
        except RuntimeError as error:  # what was left could not even be looked at
            found, after, wrong = "cannot be read", "", [str(error).strip().splitlines()[-1]]
        if not wrong:
            shutil.rmtree(folder)
        return {
            "what": name, "kill": kill, "when": said, "cpu_share": round(ended.cpu / whole.cpu, 3),
            "last_event": _short(last), "found": found, "then": after, "wrong": wrong,
            "seconds": round(time.monotonic() - begun, 2),
        }  # fmt: skip

    def run(self, folder: Path, moment: Moment | None = None, whole: Whole | None = None) -> Ended:
        log = self.log(folder)
        log.unlink(missing_ok=True)
        beside = self.victim.beside(folder, log)
        return run_process(
            lambda: self.victim.command(folder), log, folder, moment, whole.cpu if whole else 0.0, beside
        )

    def _quietly(self, folder: Path) -> None:
        """The command in this process (that of `modules_of`); a server is asked to end by its client."""
        log = self.log(folder)
        log.touch()
        place = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(place, 2)
        if beside := self.victim.beside(folder, log):
            start(beside(os.getpid()), log.with_suffix(".client.log"))
        self.victim.command(folder)

    def _folder(self, name: str, kill: int) -> Path:
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.victim.fresh(folder, kill)
        return folder

    def log(self, folder: Path) -> Path:
        return folder.with_suffix(".log")


def _moment(kill: int, kills: int, whole: Whole, rng: random.Random) -> Moment:
    """Half of the moments are random shares of the run's CPU time, half random file events of it; each half is spread
    evenly over the whole run."""
    halves = (kills + 1) // 2, kills // 2
    share = (kill // 2 + rng.random()) / halves[kill % 2]
    if kill % 2:
        return Moment(share=share)
    return Moment(event=1 + int(share * (whole.events - 1)), delay=rng.random() * MOST_DELAY)


def _earlier(moment: Moment) -> Moment:
    if moment.event is not None:
        return Moment(event=max(1, int(moment.event * 0.85)), delay=moment.delay)
    return Moment(share=(moment.share or 0.0) * 0.85)


def _said(moment: Moment, whole: Whole) -> str:
    if moment.event is not None:
        return f"{1e3 * moment.delay:.1f} ms after file event {moment.event} of {whole.events}"
    return f"{moment.share:.1%} of {whole.cpu:.2f} s of CPU time"


def _short(path: str) -> str:
    return re.sub(r"[0-9a-f-]{30,}|[0-9a-f]{8}(?=\.)|\d{16,}", "*", path)

"""What the parts of the serving benchmark share: processes that start when needed, texts, measuring in turns, goals."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from common import Kept, Worker, in_turns, rounded, say, shrunk
from serve_client import Engine, ServerProcess, closed_loop, embedding_body
from serve_systems import Spec

SEED = 0
Made = TypeVar("Made")
Record = dict[str, Any]


class Lazy(Generic[Made]):
    """A process that is started when it is first needed: what a killed run has measured already needs none."""

    def __init__(self, start: Callable[[], Made], stop: Callable[[Made], None]) -> None:
        self._start, self._stop = start, stop
        self._made: Made | None = None

    def __call__(self) -> Made:
        if self._made is None:
            self._made = self._start()
        return self._made

    def close(self) -> None:
        if self._made is not None:
            self._stop(self._made)
            self._made = None


@dataclass
class Bench:
    """What all parts share. `goals` gathers what was found against what was wanted, in the order of measuring."""

    options: argparse.Namespace
    kept: Kept
    work: Path
    model: str
    texts: dict[str, Any]
    script: str
    goals: list[Record] = field(default_factory=list)

    @property
    def engines(self) -> list[Engine]:
        return self.options.engines

    def goal(self, name: str, found: float, wanted: float, *, at_most: bool = False) -> str:
        """Note whether a goal is met; returns the table's cell."""
        met = found <= wanted if at_most else found >= wanted
        self.goals.append(
            {"name": name, "found": rounded(found), ("at_most" if at_most else "at_least"): wanted, "met": bool(met)}
        )
        return f"{wanted:g} {'met' if met else 'missed'}"

    def worker(self, job: str, engine: Engine, stack: ExitStack, budget: int | None = None) -> Lazy[Worker]:
        """A worker of this engine (see `serve_systems.Spec`), not yet started."""
        spec = Spec(
            job=job,
            model=self.model,
            engine=engine.name,
            dtype=engine.dtype,
            device=self.options.device,
            threads=self.options.threads,
            texts=str(self.work / "texts.json"),
            document_tokens=self.options.document_tokens,
            budget=self.options.budget if budget is None else budget,
            tiny=self.options.tiny,
        )

        def start() -> Worker:
            worker = Worker(self.script, asdict(spec))
            about = worker.ready()
            say(f"{job}, {engine}: {about['model']} in {about['dtype']} loaded in {about['load_seconds']} s")
            if job == "texts":
                worker.ask("warm")
            return worker

        lazy = Lazy(start, Worker.close)
        stack.callback(lazy.close)
        return lazy

    def server(self, engine: Engine, stack: ExitStack, warm: int, **more: Any) -> Lazy[ServerProcess]:
        """A server of this engine, not yet started; it answers `warm` clients at once before it is measured."""

        def start() -> ServerProcess:
            options = {"model": self.model, "engine": engine.name, "dtype": engine.dtype, "device": self.options.device}
            server = ServerProcess(threads=self.options.threads, **{**options, "cache": 0, **more}).ready()
            say(f"server of {engine}{f', {more}' if more else ''} is ready; warming up")
            for clients in sorted({1, warm}):
                closed_loop(server, self.bodies(server, -2 * clients, 2 * clients, self.options.budget), clients)
            return server

        lazy = Lazy(start, ServerProcess.stop)
        stack.callback(lazy.close)
        return lazy

    def queries(self, first: int, count: int) -> list[str]:
        """`count` queries from place `first` on, going round at the end."""
        every = self.texts["queries"]
        return [every[(first + i) % len(every)] for i in range(count)]

    def bodies(self, server: ServerProcess, first: int, count: int, budget: int | Sequence[int]) -> list[bytes]:
        """Requests of one reasoned query each; of several budgets, one is drawn for each request."""
        draw = random.Random(f"{SEED} {first}")
        budgets = [budget] if isinstance(budget, int) else budget
        texts = self.queries(first, count)
        return [embedding_body(server.model, text, budget=draw.choice(budgets)) for text in texts]

    def in_turns(
        self, part: str, names: Sequence[str], rounds: int, measure: Callable[[str, int], Record]
    ) -> dict[str, list[Record]]:
        """`measure(name, turn)` for every name in turns; each returns a record with "seconds", kept for a next run."""
        found: dict[str, list[Record]] = {name: [] for name in names}

        def run(name: str, turn: int) -> float:
            record = self.kept.measure(f"{part}/{name}/{turn}", lambda: measure(name, turn))
            found[name].append(record)
            say(f"{part}, {name}, round {turn + 1}: {record['seconds']:.3g} s")
            return record["seconds"]

        in_turns({name: partial(run, name) for name in names}, rounds)
        return found


def tiny_model(model: str, folder: Path) -> Path:
    """`folder` with random weights of `model`'s architecture, of an adapter its bundled base's; made only once."""
    if not (folder / "tokenizer_config.json").exists():
        shrunk("smollm2-135m" if model.startswith("search-r3-") else model, folder, SEED)
    return folder


def seconds_of(records: Sequence[Record]) -> list[float]:
    """The seconds of each round."""
    return [record["seconds"] for record in records]

"""The engine for machines without int8 products: llama.cpp runs the model, rounded to 8 bits in blocks of 32 (Q8_0).

The merged model is written once as GGUF (`search_r3.model.gguf_file`) and cached. llama.cpp schedules rows by itself,
so every row has a thread here that waits for its tokens.
"""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import InputError
from search_r3.files import atomic_write_text, sha256_of
from search_r3.model.engines.base import EngineInputs, Generation, broadcast_budget
from search_r3.model.engines.continuous_batching import Step
from search_r3.model.engines.llama_cpp.llama_server import LlamaServer
from search_r3.model.gguf_file import OutType, write_gguf

OUTTYPE: OutType = "q8_0"
FORMAT = 1
"""Increased when what is written to the file changes, so that cached files are replaced."""
SEQUENCES = 8
"""Rows that llama.cpp runs at once."""
CONTEXT = 1024
"""Tokens of such a row, with the prompt and what is generated; a longer one is run alone, in a context of its own."""
ENDING = 2
"""Tokens of a row beyond its prompt and its budget: one that is sampled and not kept, and the embed token."""


class LlamaCppEngine:
    """Runs the GGUF file at `path` with llama.cpp. Methods can be called from any thread.

    Args:
        path: the file, see `write_gguf`.
        dimension: of an embedding.
        embed_id, stop_ids: see `TorchEngine`. Padding ids are not in the file, so they are never generated.
        positions: the longest row that the model reads, in tokens.
        threads: of a pass.
        folder: a temporary folder with the file, which is removed with the engine.

    Raises:
        InputError: llama.cpp is missing, or cannot read the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        dimension: int,
        embed_id: int,
        stop_ids: Sequence[int],
        positions: int,
        threads: int,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self._folder = folder
        self.dimension, self.embed_id = dimension, embed_id
        self._path, self._positions, self._threads = path, positions, threads
        self._stop_ids = frozenset(stop_ids) - {embed_id}
        self._context = min(CONTEXT, positions)
        self._server = LlamaServer(path, sequences=SEQUENCES, context=self._context, threads=threads)
        self._pool = ThreadPoolExecutor(SEQUENCES, "llama.cpp")
        self._long: LlamaServer | None = None
        self._long_lock = threading.Lock()

    def embed(
        self,
        prefix: Sequence[int],
        rows: list[list[int]],
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """See `Engine.embed`.

        Raises:
            InputError: a row is longer than the model reads.
        """
        out = np.empty((len(rows), self.dimension), dtype=np.float32)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        while order:
            chosen = order[:batch_size]
            if self._is_long(len(prefix) + len(rows[order[0]])):
                chosen = order[:1]
            order = order[len(chosen) :]
            with self._running(len(prefix) + len(rows[chosen[0]])) as server:
                out[chosen] = server.embed([[*prefix, *rows[i]] for i in chosen])
            if progress:
                progress(len(chosen))
        return out

    def generate(
        self,
        prefix: Sequence[int],
        rows: list[list[int]],
        *,
        max_new_tokens: int | Sequence[int] = 32,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
        samples: int = 1,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        """See `Engine.generate`. llama.cpp schedules the rows, `SEQUENCES` at once; `batch_size` is not used.

        A sample depends on its seed, or on `seed` and its position.

        Raises:
            InputError: a row and its budget are longer than the model reads.
        """
        budgets = [budget for budget in broadcast_budget(max_new_tokens, len(rows)) for _ in range(samples)]
        words = [[seed % 2**63, i] for i in range(len(budgets))] if isinstance(seed, int) else [[own] for own in seed]
        running = RunningRows(self, prefix)
        done: list[Generation | None] = [None] * len(budgets)
        left = [samples] * len(rows)
        try:
            for i, budget in enumerate(budgets):
                own = int(np.random.SeedSequence(words[i]).generate_state(1)[0]) if temperature > 0 else 0
                running.add(rows[i // samples], budget, temperature, own)
            while len(running):
                for step in running.step():
                    if step.token is not None and on_token is not None:
                        on_token(step.handle, step.token)
                    if step.done is not None:
                        done[step.handle] = step.done
                        left[step.handle // samples] -= 1
                        if progress and not left[step.handle // samples]:
                            progress(1)
        finally:
            running.clear()
        return [generation for generation in done if generation is not None]

    def continuous_batch(self, prefix: Sequence[int]) -> RunningRows:
        """Rows that begin with `prefix`, which can join and leave; llama.cpp schedules them."""
        return RunningRows(self, prefix)

    def close(self) -> None:
        """End llama.cpp, and free its memory."""
        self._pool.shutdown()
        self._server.close()
        if self._long is not None:
            self._long.close()

    def continue_row(
        self, row: _Row, ids: Sequence[int], temperature: float, seed: int, on_token: Callable[[int], None]
    ) -> Generation | None:
        """Continue `ids` until the embed token, and embed it; None if the row was cancelled meanwhile."""
        written: list[int] = []
        forced, ended = True, None
        ends = self._stop_ids | {self.embed_id}
        with self._running(len(ids) + row.budget + ENDING) as server:
            with closing(server.generate(ids, row.budget + 1, ends, temperature, seed)) as tokens:
                for token in tokens:
                    if row.cancelled:
                        return None
                    if token in ends:
                        forced, ended = token != self.embed_id, token if token != self.embed_id else None
                        break
                    if len(written) == row.budget:
                        break
                    written.append(token)
                    on_token(token)
            embedding = server.embed([[*ids, *written, self.embed_id]])[0]
        return Generation(written, embedding, forced, ended)

    def check_length(self, tokens: int) -> None:
        """Raise InputError if the model does not read rows of so many tokens."""
        if tokens >= self._positions:
            raise InputError(
                f"a row of {tokens} tokens is too long for this model, which reads fewer than {self._positions}; "
                "shorten the text or the reasoning"
            )

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` in one of the threads that wait for rows."""
        self._pool.submit(work)

    def _is_long(self, tokens: int) -> bool:
        return tokens >= self._context

    @contextmanager
    def _running(self, tokens: int) -> Iterator[LlamaServer]:
        """A server with a context of more than `tokens` tokens. A long row waits for the other long ones."""
        if not self._is_long(tokens):
            yield self._server
            return
        self.check_length(tokens)
        with self._long_lock:
            if self._long is None or self._long.context <= tokens:
                if self._long is not None:
                    self._long.close()
                    self._long = None
                context = min(self._positions, 1 << tokens.bit_length())
                self._long = LlamaServer(self._path, sequences=1, context=context, threads=self._threads)
            yield self._long


@dataclass(eq=False, slots=True)
class _Row:
    budget: int
    cancelled: bool = False


class RunningRows:
    """Rows with one prefix, each continued in a thread; `ContinuousBatch` with llama.cpp's scheduler.

    Use one thread at a time.
    """

    def __init__(self, engine: LlamaCppEngine, prefix: Sequence[int]) -> None:
        self.prefix = tuple(prefix)
        self._engine = engine
        self._rows: dict[int, _Row] = {}
        self._news: queue.SimpleQueue[Step | tuple[int, BaseException]] = queue.SimpleQueue()
        self._handles = 0

    def __len__(self) -> int:
        return len(self._rows)

    def join(self, rows: Sequence[Sequence[int]], budgets: Sequence[int]) -> list[int]:
        """See `ContinuousBatch.join`. Raises InputError if a row is longer than the model reads."""
        for row, budget in zip(rows, budgets, strict=True):
            self._engine.check_length(len(self.prefix) + len(row) + budget + ENDING)
        return [self.add(row, budget) for row, budget in zip(rows, budgets, strict=True)]

    def add(self, ids: Sequence[int], budget: int, temperature: float = 0.0, seed: int = 0) -> int:
        """Start a row; returns its handle, a number from 0 on."""
        handle, row = self._handles, _Row(budget)
        self._handles += 1
        self._rows[handle] = row

        def work() -> None:
            if row.cancelled:
                return
            try:
                done = self._engine.continue_row(
                    row,
                    [*self.prefix, *ids],
                    temperature,
                    seed,
                    lambda token: self._news.put(Step(handle, token=token)),
                )
                if done is not None:
                    self._news.put(Step(handle, done=done))
            except BaseException as error:  # raised by `step`, in the caller's thread
                self._news.put((handle, error))

        self._engine.submit(work)
        return handle

    def step(self) -> list[Step]:
        """See `ContinuousBatch.step`; waits for the next token of some row, and returns all that have come."""
        steps: list[Step] = []
        while self._rows and (not steps or not self._news.empty()):
            news = self._news.get()
            if isinstance(news, tuple):
                if news[0] in self._rows:
                    raise news[1]
            elif news.handle in self._rows:
                steps.append(news)
                if news.done is not None:
                    del self._rows[news.handle]
        return steps

    def leave(self, handles: Sequence[int]) -> None:
        """See `ContinuousBatch.leave`."""
        for handle in handles:
            if (row := self._rows.pop(handle, None)) is not None:
                row.cancelled = True

    def clear(self) -> None:
        """Drop all rows."""
        self.leave(list(self._rows))


def open_llama_cpp(inputs: EngineInputs, cache: Path | None) -> LlamaCppEngine:
    """The engine for a loaded checkpoint; its GGUF file is kept in the folder `cache`, or for this process alone.

    Raises:
        InputError: the weights are not float32 on a CPU, GGUF cannot hold the model, or llama.cpp cannot run it.
    """
    import torch

    model = inputs.checkpoint.model
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise InputError(
            f"engine llama.cpp is made from float32 weights on a cpu, not {str(model.dtype).removeprefix('torch.')} on "
            f"{model.device}; do not set device and dtype, or use engine torch"
        )
    config = model.config.get_text_config()
    settings: dict[str, Any] = {
        "dimension": config.hidden_size,
        "embed_id": inputs.checkpoint.contract.embed_token_id,
        "stop_ids": inputs.stop_ids,
        "positions": config.max_position_embeddings,
        "threads": torch.get_num_threads(),
    }
    name = f"{inputs.checkpoint.contract.hash}-{OUTTYPE}-{FORMAT}.gguf"
    if cache is not None and _cached(cache / name, inputs):
        return LlamaCppEngine(cache / name, **settings)
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / name
    _write(file, inputs)
    return LlamaCppEngine(file, **settings, folder=folder)


def _cached(file: Path, inputs: EngineInputs) -> bool:
    """Whether the file is in the cache, where it is written if it is missing or damaged."""
    if _intact(file):
        return True
    try:
        _write(file, inputs)
    except InputError:  # it is written at every start
        return False
    return True


def _write(file: Path, inputs: EngineInputs) -> None:
    write_gguf(file, inputs.checkpoint, inputs.templates, OUTTYPE, stop_ids=tuple(inputs.stop_ids))
    atomic_write_text(_digest_of(file), sha256_of(file))


def _digest_of(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _intact(file: Path) -> bool:
    """Whether the file is the one that was written."""
    try:
        return _digest_of(file).read_text(encoding="ascii") == sha256_of(file)
    except (OSError, UnicodeDecodeError):
        return False

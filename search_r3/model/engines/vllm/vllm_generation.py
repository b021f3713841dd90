"""Generation with vLLM until the embed token: its requests, and how its outputs are read.

vLLM's loop is run step by step (`LLMEngine.add_request`, `step`, `abort_request`, which `vllm.LLM.generate` uses too),
because only then are tokens available as they are generated, and can rows join or leave while others are generated. The
API was taken from the source of vLLM 0.33.
"""

from __future__ import annotations

import importlib
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import InputError, first_line
from search_r3.model.engines.base import Generation, broadcast_budget
from search_r3.optional import optional_imports, require

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: scripts need no main guard, and weights can be shared
    "VLLM_NO_USAGE_STATS": "1",  # otherwise it sends usage data
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for results
}
"""Environment variables for vLLM; values set by the user are kept."""
NEVER = -100.0
"""Added to the logits of padding ids: the lowest value that vLLM accepts. (Its list of allowed ids is limited to
1,024.)"""
Embed = Callable[[Sequence[int], list[list[int]], int, Callable[[int], None] | None], np.ndarray]
"""The type of `Engine.embed`."""


def import_vllm() -> Any:
    """The package vllm, configured by `SETTINGS`.

    Raises:
        InputError: vllm is not installed, or cannot be imported.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    vllm = require("vllm", "vllm", "engine vllm, which takes a GPU,")
    with optional_imports("vllm", "engine vllm"):
        for part in ("platforms", "sampling_params"):
            importlib.import_module(f"vllm.{part}")
        with suppress(ImportError):  # older versions raise only ValueError
            importlib.import_module("vllm.exceptions")
    return vllm


def check_device(vllm: Any, device: Any) -> None:
    """Raise InputError if vLLM does not run on the torch device of the model."""
    runs_on = vllm.platforms.current_platform.device_type
    if not runs_on:
        raise InputError("engine vllm needs a GPU, and vLLM finds none; use engine torch, or int8")
    if device.type != runs_on:
        raise InputError(
            f"engine vllm runs on {runs_on} here, but the model is on {device.type}; omit device, or use engine torch"
        )
    if device.index:
        raise InputError(
            f"engine vllm uses the first visible GPU, not {device}; set CUDA_VISIBLE_DEVICES={device.index} and "
            "omit device"
        )


@dataclass(eq=False, slots=True)
class Row:
    """One row that vLLM continues.

    Attributes:
        key: vLLM's request id.
        budget: maximum number of tokens, without the embed token.
        token_ids: the tokens generated so far, without the embed token.
        over: whether the row is complete; `forced` and `ended` are then as in `Generation`.
    """

    key: str
    budget: int
    token_ids: list[int] = field(default_factory=list)
    over: bool = False
    forced: bool = False
    ended: int | None = None


class VllmWriter:
    """A vLLM engine for one model, and the rows that it continues. Methods can be called from any thread.

    Args:
        folder: the merged model with its tokenizer, as saved by transformers.
        vllm: the package, or a substitute in tests.
        dtype: "float32" or "bfloat16".
        embed_id: the token that ends a row.
        stop_ids: end-of-turn tokens, which end a row as well.
        padding: ids that are never generated.
        gpu_memory: the share of the GPU's memory that vLLM may use for weights, keys and values.

    Raises:
        InputError: vLLM cannot run this model, or does not have enough memory.
    """

    def __init__(
        self,
        folder: Path,
        vllm: Any,
        *,
        dtype: str,
        embed_id: int,
        stop_ids: Iterable[int],
        padding: Iterable[int],
        gpu_memory: float,
    ) -> None:
        self.embed_id = embed_id
        self._vllm = vllm
        own = getattr(getattr(vllm, "exceptions", None), "VLLMClientError", ValueError)
        self._refusals: tuple[type[Exception], ...] = (ValueError, own)
        self._stop_ids = sorted({*stop_ids} - {embed_id})
        self._bias = dict.fromkeys(padding, NEVER) or None
        try:
            with _random_state_kept():
                self._llm = vllm.LLM(
                    model=str(folder),
                    dtype=dtype,
                    gpu_memory_utilization=gpu_memory,
                    enable_prefix_caching=True,  # for the conversation's prefix, and for queries with several samples
                )
        except self._refusals as error:
            raise InputError(f"vLLM does not start on {folder}: {first_line(error)}; or use engine torch") from error
        self._rows: dict[str, Row] = {}
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    def add(self, ids: Sequence[int], budget: int, temperature: float = 0.0, seed: int | None = None) -> Row:
        """Continue `ids` by at most `budget` tokens; greedy at temperature 0.

        Raises:
            InputError: vLLM rejects the row (too long for the model, or a temperature above 2).
        """
        row = Row(str(next(self._numbers)), budget)
        try:
            settings = self._vllm.SamplingParams(
                temperature=temperature,
                seed=seed,
                max_tokens=budget + 1,  # the embed token may still follow
                stop_token_ids=[self.embed_id, *self._stop_ids],
                logit_bias=self._bias,
                detokenize=False,
                output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
            )
            with self._lock:
                prompt = {"type": "token", "prompt_token_ids": list(ids)}
                self._llm.llm_engine.add_request(row.key, prompt, settings)
                self._rows[row.key] = row
        except self._refusals as error:
            raise InputError(f"vLLM rejects a row of {len(ids)} tokens: {first_line(error)}") from error
        return row

    def step(self) -> list[Row]:
        """Run one step of vLLM, which generates a token for each scheduled row whose prompt has been prefilled.

        Returns:
            The rows that have new tokens or are complete, whoever added them.
        """
        engine = self._llm.llm_engine
        with self._lock:
            if not self._rows:
                return []
            updated = []
            for output in engine.step():
                row = self._rows.get(output.request_id)
                if row is None:  # dropped
                    continue
                self._read(row, output)
                updated.append(row)
                if row.over:
                    del self._rows[row.key]
                    if not output.finished:
                        engine.abort_request([row.key])
            if not updated and not engine.has_unfinished_requests():
                raise RuntimeError(f"vLLM has nothing left to do, but {len(self._rows)} rows have not ended")
            return updated

    def drop(self, rows: Iterable[Row]) -> None:
        """Cancel these rows; complete ones are ignored."""
        with self._lock:
            keys = [row.key for row in rows if self._rows.pop(row.key, None) is not None]
            if keys:
                self._llm.llm_engine.abort_request(keys)

    def load_weights(self, named: list[tuple[str, Any]]) -> None:
        """Use these weights from now on, named as in the folder. vLLM itself merges q, k, v and gate, up."""

        def load(model: Any) -> None:
            model.load_weights(named)

        self._llm.apply_model(load)
        self._llm.reset_prefix_cache()  # it has keys and values of the old weights

    def _read(self, row: Row, output: Any) -> None:
        """Append a step's tokens to the row, which ends as in our engines: a row past its budget is forced."""
        (answer,) = output.outputs
        if answer.finish_reason in ("abort", "error"):
            raise RuntimeError(f"vLLM gave up a row: {answer.finish_reason}")
        tokens = list(answer.token_ids)
        if output.finished and isinstance(answer.stop_reason, int) and answer.stop_reason not in tokens[-1:]:
            tokens.append(answer.stop_reason)  # some versions omit the token that stopped the row
        for token in tokens:
            if token == self.embed_id:
                row.over = True
            elif token in self._stop_ids:
                row.over, row.forced, row.ended = True, True, token
            elif len(row.token_ids) == row.budget:
                row.over, row.forced = True, True
            else:
                row.token_ids.append(token)
            if row.over:
                return
        if output.finished:  # the context is full
            row.over, row.forced = True, True


def continue_rows(
    writer: VllmWriter,
    embed: Embed,
    prefix: Sequence[int],
    rows: list[list[int]],
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float,
    seed: int | Sequence[int],
    batch_size: int,
    progress: Callable[[int], None] | None,
    samples: int,
    on_token: Callable[[int, int], None] | None,
) -> list[Generation]:
    """`Engine.generate` with `writer`, which gets all rows at once; `batch_size` applies to the prefills by `embed`."""
    seeds: list[int | None] = [None] * (len(rows) * samples)
    if temperature > 0:
        every = [[seed % 2**63, i] for i in range(len(seeds))] if isinstance(seed, int) else [[own] for own in seed]
        seeds = [int(np.random.SeedSequence(words).generate_state(1)[0]) for words in every]
    prompts = [row for row in rows for _ in range(samples)]
    budgets = [budget for budget in broadcast_budget(max_new_tokens, len(rows)) for _ in range(samples)]
    written: list[Row] = []
    try:
        for ids, budget, own in zip(prompts, budgets, seeds, strict=True):
            written.append(writer.add([*prefix, *ids], budget, temperature, own))
        index_of = {row: index for index, row in enumerate(written)}
        reported, left = [0] * len(written), [samples] * len(rows)
        while index_of:
            for row in writer.step():
                index = index_of.get(row)
                if index is None:  # a row of another call
                    continue
                if on_token is not None:
                    for token in row.token_ids[reported[index] :]:
                        on_token(index, token)
                    reported[index] = len(row.token_ids)
                if row.over:
                    del index_of[row]
                    left[index // samples] -= 1
                    if progress and not left[index // samples]:
                        progress(1)
    finally:
        writer.drop(written)
    return embed_rows(writer, embed, prefix, prompts, written, batch_size)


def embed_rows(
    writer: VllmWriter,
    embed: Embed,
    prefix: Sequence[int],
    prompts: Sequence[Sequence[int]],
    written: Sequence[Row],
    batch_size: int,
) -> list[Generation]:
    """The generations of complete rows, with one prefill each of the prompt, the tokens and the embed token."""
    whole = [[*ids, *row.token_ids, writer.embed_id] for ids, row in zip(prompts, written, strict=True)]
    embeddings = embed(prefix, whole, batch_size, None)
    return [
        Generation(row.token_ids, embedding, row.forced, row.ended)
        for row, embedding in zip(written, embeddings, strict=True)
    ]


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """A context that restores the random states, because vLLM seeds all generators of its process when it starts."""
    import torch

    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(arrays)

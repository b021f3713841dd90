"""Generation by vLLM until the embed token: what is requested of it, and how its outputs are read.

vLLM's own loop is driven step by step (`LLMEngine.add_request`, `step`, `abort_request`, of which `vllm.LLM.generate`
consists): only then is a token known when it is generated, and can a row join or leave while others are generated. The
names and their meaning were read in vLLM 0.33's source.
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
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: a script needs no main guard, weights can be handed over
    "VLLM_NO_USAGE_STATS": "1",  # it would send usage data
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for the answer
}
"""Environment variables that vLLM reads; those that the user has set are kept."""
NEVER = -100.0
"""Added to the logits of padding ids: the most that vLLM accepts. (Its list of allowed ids ends at 1,024.)"""
Embed = Callable[[Sequence[int], list[list[int]], int, Callable[[int], None] | None], np.ndarray]
"""`Engine.embed`."""


def import_vllm() -> Any:
    """The package vllm, quiet and in this process.

    Raises:
        InputError: it is not installed, or cannot be loaded.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    vllm = require("vllm", "vllm", "engine vllm, which takes a GPU,")
    with optional_imports("vllm", "engine vllm"):
        for part in ("platforms", "sampling_params"):
            importlib.import_module(f"vllm.{part}")
        with suppress(ImportError):  # older ones raise ValueError everywhere
            importlib.import_module("vllm.exceptions")
    return vllm


def check_device(vllm: Any, device: Any) -> None:
    """Raises InputError if vLLM would not run on the torch device that a model is on."""
    runs_on = vllm.platforms.current_platform.device_type
    if not runs_on:
        raise InputError("engine vllm needs a GPU that vLLM can use, and it finds none; use engine torch, or int8")
    if device.type != runs_on:
        raise InputError(
            f"engine vllm runs on {runs_on} here, and the model is on {device.type}; omit device, or use engine torch"
        )
    if device.index:
        raise InputError(
            f"engine vllm takes the first GPU that it sees, not {device}; set CUDA_VISIBLE_DEVICES={device.index} and "
            "omit device"
        )


@dataclass(eq=False, slots=True)
class Row:
    """One row that vLLM continues.

    Attributes:
        key: vLLM's request id.
        budget: tokens at most, without the embed token.
        token_ids: the tokens so far, before the embed token.
        over: it is complete; then `forced` and `ended` are as in `Generation`.
    """

    key: str
    budget: int
    token_ids: list[int] = field(default_factory=list)
    over: bool = False
    forced: bool = False
    ended: int | None = None


class VllmWriter:
    """A vLLM engine on one model, and the rows that it continues. It may be used from any thread.

    Args:
        folder: the merged model with its tokenizer, as transformers saves them.
        vllm: the package, or a substitute in tests.
        dtype: "float32" or "bfloat16".
        embed_id: the token that ends a row.
        stop_ids: end-of-turn tokens, which end a row too.
        padding: ids that are never generated.
        gpu_memory: the share of the GPU's memory that vLLM may take, for weights, keys and values.

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
                    enable_prefix_caching=True,  # the conversation's prefix, and a query that is sampled often
                )
        except self._refusals as error:
            raise InputError(f"vLLM does not start on {folder}: {first_line(error)}; or use engine torch") from error
        self._rows: dict[str, Row] = {}
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    def add(self, ids: Sequence[int], budget: int, temperature: float = 0.0, seed: int | None = None) -> Row:
        """Continue `ids` by at most `budget` tokens; greedy at temperature 0.

        Raises:
            InputError: vLLM refuses it (too long for the model, or a temperature over 2).
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
            raise InputError(f"vLLM refuses a row of {len(ids)} tokens: {first_line(error)}") from error
        return row

    def step(self) -> list[Row]:
        """One step of vLLM: a token for each scheduled row whose prompt has been prefilled.

        Returns:
            The rows that have new tokens or are over, whoever added them.
        """
        engine = self._llm.llm_engine
        with self._lock:
            if not self._rows:
                return []
            further = []
            for output in engine.step():
                row = self._rows.get(output.request_id)
                if row is None:  # dropped
                    continue
                self._read(row, output)
                further.append(row)
                if row.over:
                    del self._rows[row.key]
                    if not output.finished:
                        engine.abort_request([row.key])
            if not further and not engine.has_unfinished_requests():
                raise RuntimeError(f"vLLM has nothing left to do, but {len(self._rows)} rows have not ended")
            return further

    def drop(self, rows: Iterable[Row]) -> None:
        """Cancel these rows; those that are over are ignored."""
        with self._lock:
            keys = [row.key for row in rows if self._rows.pop(row.key, None) is not None]
            if keys:
                self._llm.llm_engine.abort_request(keys)

    def load_weights(self, named: list[tuple[str, Any]]) -> None:
        """Use these weights from now on, named as in the folder. vLLM merges q, k, v and gate, up by itself."""

        def load(model: Any) -> None:
            model.load_weights(named)

        self._llm.apply_model(load)
        self._llm.reset_prefix_cache()  # its keys and values are those of the old weights

    def _read(self, row: Row, output: Any) -> None:
        """Append a step's tokens to the row, ending it as our engines do: a row past its budget is forced."""
        (answer,) = output.outputs
        if answer.finish_reason in ("abort", "error"):
            raise RuntimeError(f"vLLM gave up a row: {answer.finish_reason}")
        tokens = list(answer.token_ids)
        if output.finished and isinstance(answer.stop_reason, int) and answer.stop_reason not in tokens[-1:]:
            tokens.append(answer.stop_reason)  # some versions omit the token that stopped a row
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
    """`Engine.generate` by `writer`, which gets all rows at once; `batch_size` is that of the prefills by `embed`."""
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
        places = {row: place for place, row in enumerate(written)}
        reported, left = [0] * len(written), [samples] * len(rows)
        while places:
            for row in writer.step():
                place = places.get(row)
                if place is None:  # of another call
                    continue
                if on_token is not None:
                    for token in row.token_ids[reported[place] :]:
                        on_token(place, token)
                    reported[place] = len(row.token_ids)
                if row.over:
                    del places[row]
                    left[place // samples] -= 1
                    if progress and not left[place // samples]:
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
    """The generations of rows that are over: one prefill each, of the prompt, the tokens and the embed token."""
    whole = [[*ids, *row.token_ids, writer.embed_id] for ids, row in zip(prompts, written, strict=True)]
    embeddings = embed(prefix, whole, batch_size, None)
    return [
        Generation(row.token_ids, embedding, row.forced, row.ended)
        for row, embedding in zip(written, embeddings, strict=True)
    ]


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds all random number generators of its process when it starts; keep the present state."""
    import torch

    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(arrays)

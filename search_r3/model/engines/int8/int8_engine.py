"""The engine for CPUs: `TorchEngine`'s batching and stopping, with int8 products in the forward pass.

Weights are rounded once (a scale for each output), activations dynamically (a scale for each token), so a result does
not depend on its batch, as with every engine. The prefix that all texts share is computed once, in float32.
docs/engines.md measures these products against other runtimes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.errors import InputError
from search_r3.model.engines.int8 import attention_kernels, elementwise_kernels
from search_r3.model.engines.int8.calibration import CalibrationRow
from search_r3.model.engines.int8.int8_forward import Int8Model, Int8Session
from search_r3.model.engines.int8.int8_weights import check_processor, load_or_make, merged_layers, quantize_model
from search_r3.model.engines.llama_forward import LlamaSession, Prefix, Session
from search_r3.model.engines.torch_engine import TorchEngine, batches_by_length
from search_r3.optional import optional_imports

TOKENS_A_PASS = 1024
"""Maximum number of tokens per pass of one thread."""
TOKENS_A_THREAD = 128
"""Minimum number of tokens per thread that makes another thread worthwhile."""


class Int8Engine(TorchEngine):
    """Runs `model` with int8 products on the CPU.

    Args:
        model: a float32 causal LM of the Llama family. If its weights change between calls, they are quantized again.
        embed_id, stop_ids, vocab_size: see `TorchEngine`.
        contract_hash: contract of the checkpoint; files with another contract are not used.
        samples: returns the calibration rows; called whenever the weights are quantized.
        paths: files that may have the int8 matrices (from an export).
        cache_dir: the folder where they are cached; None disables caching.

    Raises:
        InputError: the architecture, dtype or device is not supported, numba is not installed, or the processor has no
            int8 products.
    """

    def __init__(
        self,
        model: Any,
        *,
        embed_id: int,
        stop_ids: Sequence[int],
        vocab_size: int,
        contract_hash: str,
        cache_dir: Path | None,
        samples: Callable[[], Sequence[CalibrationRow]] = tuple,
        paths: Iterable[Path] = (),
    ) -> None:
        check_processor()
        with optional_imports("int8", "engine int8"):
            elementwise_kernels.compile_kernels()
            attention_kernels.compile_attention()
        if model.device.type != "cpu" or model.dtype != torch.float32:
            raise InputError(
                f"engine int8 needs float32 weights on a cpu, not {str(model.dtype).removeprefix('torch.')} on "
                f"{model.device}; do not set device and dtype, or use engine torch"
            )
        super().__init__(model, embed_id=embed_id, stop_ids=stop_ids, vocab_size=vocab_size)
        self._float_head = self.head
        self._samples = samples
        self._merge()
        cache = cache_dir / f"{contract_hash}.safetensors" if cache_dir is not None else None
        self._pack(load_or_make(self._round, contract_hash, paths, cache))
        self.head = lambda state_BD: self._packed.logits(state_BD)
        self._pool: ThreadPoolExecutor | None = None
        self._pool_lock = threading.Lock()

    def embed(
        self,
        prefix: Sequence[int],
        rows: list[list[int]],
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """See `Engine.embed`. Batches run in parallel, one per thread, so that all cores are busy."""
        threads = _cores()
        tokens = sum(len(row) for row in rows)
        wanted = min(threads, len(rows), tokens // TOKENS_A_THREAD)
        if wanted < 2:
            return super().embed(prefix, rows, batch_size, progress)
        share = -(-tokens // wanted)
        batches = list(batches_by_length(rows, min(batch_size, -(-len(rows) // wanted)), min(TOKENS_A_PASS, share)))
        out = np.empty((len(rows), self.dimension), dtype=np.float32)
        self._known(prefix)  # computes the prefix once, not in each thread

        def one(chosen: list[int]) -> int:
            out[chosen] = TorchEngine.embed(self, prefix, [rows[i] for i in chosen], len(chosen))
            return len(chosen)

        running = [self._threads(threads).submit(one, chosen) for chosen in batches]
        try:
            for future in running:
                done = future.result()
                if progress:
                    progress(done)
        finally:
            for future in running:
                future.cancel()
        return out

    def _session(self, prefix: Prefix, size: int, room: int, fine: bool = False) -> Session:
        return Int8Session(self.backbone, self._packed, prefix, size, room, fine)

    def _prefix_session(self, room: int) -> Session:
        """A float32 session: the prefix has the largest activations, and its error would affect every text."""
        assert self._layers is not None
        return LlamaSession(self.backbone, self._layers, [], 1, room)

    def _known(self, prefix: Sequence[int]) -> Prefix:
        with self._lock:
            if self._weights_now() != self._weights:  # the weights were trained after quantization
                self._prefixes.clear()
                self._merge()
                self._pack(self._round())
        return super()._known(prefix)

    def _merge(self) -> None:
        self._layers = merged_layers(self.model)
        self._weights = self._weights_now()

    def _round(self) -> dict[str, Tensor]:
        assert self._layers is not None
        return quantize_model(self.model, self._layers, self._float_head.weight.detach(), self._samples())

    def _pack(self, tensors: dict[str, Tensor]) -> None:
        assert self._layers is not None
        config = self.backbone.config.get_text_config()
        self._packed = Int8Model.of(self._layers, tensors, self._float_head.weight.detach(), config)

    def _threads(self, count: int) -> ThreadPoolExecutor:
        """A pool of threads in which torch uses one core each."""
        with self._pool_lock:
            if self._pool is None:
                before, started = torch.get_num_threads(), threading.Barrier(count)
                pool = ThreadPoolExecutor(count, "int8", _take_one_core)
                list(pool.map(lambda _: started.wait(), range(count)))
                torch.set_num_threads(before)  # for threads that are started elsewhere
                self._pool = pool
            return self._pool


def _cores() -> int:
    return torch.get_num_threads()


def _take_one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread adopts the number on the first query and keeps it

"""The engine for GPUs with vLLM, which generates the tokens; `TorchEngine` computes the embeddings with one prefill.

vLLM's pooling runner is not used, because a `vllm.LLM` either generates or pools (its `runner`): pooling would take a
second vLLM with its own weights and memory. The torch model is needed anyway (the adapter is merged into it and the
contract is checked on it), and its prefill makes the embeddings of documents, direct queries and golden texts equal to
the reference engine's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.files import atomic_path
from search_r3.model import checkpoint as checkpoints
from search_r3.model.checkpoint import Checkpoint
from search_r3.model.engines.base import EngineInputs, Generation
from search_r3.model.engines.continuous_batching import Step
from search_r3.model.engines.torch_engine import TorchEngine
from search_r3.model.engines.vllm.vllm_generation import (
    Row,
    VllmWriter,
    check_device,
    continue_rows,
    embed_rows,
    import_vllm,
)

MEMORY_VARIABLE = "SEARCH_R3_VLLM_MEMORY"
GPU_MEMORY = 0.5
"""Default share of the GPU's memory that vLLM may use; the torch model needs some of the rest."""
TRAINING_GPU_MEMORY = 0.3
"""The same during training, which needs the rest."""


class VllmEngine(TorchEngine):
    """`TorchEngine` with generation by vLLM, which has a copy of the weights: if they change, call `load_weights`.

    Args:
        model: the merged causal LM, on the device that vLLM runs on.
        embed_id, stop_ids, vocab_size: see `TorchEngine`.
        folder: the same model in the format that vLLM reads.
        vllm: the package, or a substitute in tests.
        gpu_memory: the share of the GPU's memory that vLLM may use.

    Raises:
        InputError: vLLM does not start on the model.
    """

    def __init__(
        self,
        model: Any,
        *,
        embed_id: int,
        stop_ids: Sequence[int],
        vocab_size: int,
        folder: Path,
        vllm: Any,
        gpu_memory: float,
    ) -> None:
        super().__init__(model, embed_id=embed_id, stop_ids=stop_ids, vocab_size=vocab_size)
        self.writer = VllmWriter(
            folder,
            vllm,
            dtype=str(model.dtype).removeprefix("torch."),
            embed_id=embed_id,
            stop_ids=stop_ids,
            padding=range(vocab_size, self.head.weight.shape[0]),
            gpu_memory=gpu_memory,
        )
        self._generating = threading.Lock()

    def load_weights(self, model: Any) -> None:
        """See `TorchEngine.load_weights`; vLLM gets a copy of the current weights."""
        super().load_weights(model)
        # Separate matrices, because vLLM itself merges q, k, v and gate, up. A tied head has no separate weights.
        weights = model.state_dict(keep_vars=True)
        tied = getattr(model.config, "tie_word_embeddings", False)
        self.writer.load_weights(
            [(name, value.data) for name, value in weights.items() if not (tied and name == "lm_head.weight")]
        )

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
        """See `Engine.generate`. vLLM schedules the generation; `batch_size` applies to the embeddings.

        A sample depends on its seed, or on `seed` and its position, as far as vLLM's kernels are deterministic.

        Raises:
            InputError: vLLM rejects a row (too long for the model) or the temperature (above 2).
        """
        with self._generating:
            return continue_rows(
                self.writer,
                self.embed,
                prefix,
                rows,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
                samples=samples,
                on_token=on_token,
            )

    def continuous_batch(self, prefix: Sequence[int]) -> Any:
        """A batch of rows that begin with `prefix`, in which rows can join and leave, scheduled by vLLM."""
        return VllmContinuousBatch(self, prefix)


class VllmContinuousBatch:
    """`ContinuousBatch` with vLLM's scheduler. Greedy; use one thread at a time."""

    def __init__(self, engine: VllmEngine, prefix: Sequence[int]) -> None:
        self.prefix = tuple(prefix)
        self._engine = engine
        self._rows: dict[int, tuple[list[int], Row]] = {}  # handle -> the prompt, and its continuation
        self._reported: dict[int, int] = {}  # handle -> number of tokens that steps have returned
        self._handles = 0

    def __len__(self) -> int:
        return len(self._rows)

    def join(self, rows: Sequence[Sequence[int]], budgets: Sequence[int]) -> list[int]:
        """See `ContinuousBatch.join`."""
        writer = self._engine.writer
        added: list[Row] = []
        try:
            for row, budget in zip(rows, budgets, strict=True):
                added.append(writer.add([*self.prefix, *row], budget))
        except BaseException:
            writer.drop(added)
            raise
        handles = list(range(self._handles, self._handles + len(added)))
        self._handles += len(added)
        for handle, row, one in zip(handles, rows, added, strict=True):
            self._rows[handle], self._reported[handle] = (list(row), one), 0
        return handles

    def step(self) -> list[Step]:
        """See `ContinuousBatch.step`. Empty while vLLM prefills a long prompt."""
        if not self._rows:
            return []
        if not any(self._has_news(handle) for handle in self._rows):  # a step for another batch may have produced some
            self._engine.writer.step()
        moved = [handle for handle in self._rows if self._has_news(handle)]
        finished = [handle for handle in moved if self._rows[handle][1].over]
        prompts = [self._rows[handle][0] for handle in finished]
        written = [self._rows[handle][1] for handle in finished]
        generations = embed_rows(
            self._engine.writer, self._engine.embed, self.prefix, prompts, written, max(1, len(finished))
        )
        steps = []
        for handle in moved:
            row = self._rows[handle][1]
            steps += [Step(handle, token=token) for token in row.token_ids[self._reported[handle] :]]
            self._reported[handle] = len(row.token_ids)
        for handle, done in zip(finished, generations, strict=True):
            steps.append(Step(handle, done=done))
            del self._rows[handle], self._reported[handle]
        return steps

    def leave(self, handles: Sequence[int]) -> None:
        """See `ContinuousBatch.leave`."""
        known = [handle for handle in handles if handle in self._rows]
        self._engine.writer.drop([self._rows[handle][1] for handle in known])
        for handle in known:
            del self._rows[handle], self._reported[handle]

    def clear(self) -> None:
        """Drop all rows."""
        self.leave(list(self._rows))

    def _has_news(self, handle: int) -> bool:
        row = self._rows[handle][1]
        return row.over or len(row.token_ids) > self._reported[handle]


def open_vllm(inputs: EngineInputs, cache: Callable[[], Path]) -> VllmEngine:
    """The engine for a loaded checkpoint. Merged weights are kept in the folder returned by `cache`.

    In training, the weights are written to the training folder instead, overwriting what is there.

    Raises:
        InputError: vLLM is not installed, finds no GPU, or cannot run this model.
    """
    vllm, checkpoint = import_vllm(), inputs.checkpoint
    check_device(vllm, checkpoint.model.device)
    if inputs.training_folder is None:
        folder, gpu_memory = merged_folder(checkpoint, cache() / "vllm"), _gpu_memory()
    else:
        folder, gpu_memory = inputs.training_folder, TRAINING_GPU_MEMORY
        checkpoint.model.save_pretrained(str(folder))
        checkpoint.tokenizer.save_pretrained(str(folder))
    return VllmEngine(checkpoint.model, **inputs.settings, folder=folder, vllm=vllm, gpu_memory=gpu_memory)


def merged_folder(checkpoint: Checkpoint, cache: Path) -> Path:
    """A folder with the merged weights and the tokenizer, in the format that vLLM reads.

    For a merged checkpoint it is its own folder; otherwise one in `cache`, written on first use. That is a merged
    checkpoint without golden vectors, whose record has the contract and the SHA-256 of the weights. If it is damaged,
    it is written again.
    """
    record = checkpoints.read_record(checkpoint.path)
    if record is not None and record["kind"] == "merged":
        return checkpoint.path
    contract = checkpoint.contract
    folder = cache / f"{contract.hash}-{str(checkpoint.model.dtype).removeprefix('torch.')}"
    try:
        kept = checkpoints.read_record(folder)
        whole = kept is not None and kept.get("contract_hash") == contract.hash
        if whole and kept is not None and checkpoints.weights_sha256(folder) == kept.get("weights"):
            return folder
    except InputError:  # damaged
        pass
    with atomic_path(folder) as scratch:
        scratch.mkdir()
        checkpoint.model.save_pretrained(str(scratch))
        checkpoint.tokenizer.save_pretrained(str(scratch))
        weights = checkpoints.weights_sha256(scratch)
        checkpoints.write_record(scratch, "merged", contract, name=checkpoint.name, weights=weights)
    return folder


def _gpu_memory() -> float:
    given = os.environ.get(MEMORY_VARIABLE, str(GPU_MEMORY))
    try:
        share = float(given)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"{MEMORY_VARIABLE} is {given!r}; give the share of the GPU's memory for vLLM, such as 0.5")
    return share

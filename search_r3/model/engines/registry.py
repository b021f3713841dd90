"""Which engine runs a checkpoint: the one that is asked for by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from search_r3.errors import InputError
from search_r3.model.resolve import cache_dir, optional_cache_dir

if TYPE_CHECKING:
    from search_r3.model.checkpoint import Checkpoint
    from search_r3.model.engines.torch_engine import TorchEngine
    from search_r3.prompts import Frame

ENGINES = ("auto", "torch", "int8", "vllm")


def check_engine(name: str) -> None:
    """Raises InputError if there is no such engine, or vLLM is wanted and missing: before weights are read."""
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}: choose {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    if name == "vllm":
        from search_r3.model.engines.vllm.vllm_generation import import_vllm

        import_vllm()


def open_engine(
    name: str, checkpoint: Checkpoint, frames: Mapping[str, Frame], stop_ids: list[int], vocabulary: int
) -> TorchEngine:
    """The engine "int8" or "vllm", or for every other name the torch engine.

    `frames` are the conversations of the checkpoint's contract, by "document", "query" and "reasoning".

    Raises:
        InputError: the engine cannot run this model, or not on this machine.
    """
    common: dict[str, Any] = {
        "embed_id": checkpoint.contract.embed_token_id,
        "stop_ids": stop_ids,
        "vocabulary": vocabulary,
    }
    if name == "vllm":
        from search_r3.model.engines.vllm.vllm_engine import open_vllm

        return open_vllm(checkpoint, cache_dir() / "vllm", **common)
    if name != "int8":
        from search_r3.model.engines.torch_engine import TorchEngine

        return TorchEngine(checkpoint.model, **common)
    from search_r3.model.engines.int8 import calibration
    from search_r3.model.engines.int8.int8_engine import Int8Engine
    from search_r3.model.engines.int8.int8_weights import INT8_FILE

    return Int8Engine(
        checkpoint.model,
        **common,
        contract_hash=checkpoint.contract.hash,
        cache_dir=cache / "int8" if (cache := optional_cache_dir()) is not None else None,
        samples=lambda: calibration.samples(frames, checkpoint.tokenizer, checkpoint.contract.embed_token_id),
        places=[checkpoint.path / INT8_FILE],
    )

"""The engines by name: the built-in ones, and those of other packages (entry point `search_r3.engines`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from search_r3.errors import InputError
from search_r3.model.engines.base import EngineInputs, EngineSpec
from search_r3.plugins import Registry

if TYPE_CHECKING:
    from search_r3.model.engines.llama_cpp.llama_cpp_engine import LlamaCppEngine
    from search_r3.model.engines.torch_engine import TorchEngine

AUTO = "auto"
"""The name that stands for the reference engine."""
FASTEST = "fastest"
"""The name that stands for the first of `FASTEST_ENGINES` that runs the model here."""


def _open_torch(inputs: EngineInputs) -> TorchEngine:
    from search_r3.model.engines.torch_engine import TorchEngine

    return TorchEngine(inputs.checkpoint.model, **inputs.settings)


def _open_int8(inputs: EngineInputs) -> TorchEngine:
    from search_r3.model.engines.int8 import calibration
    from search_r3.model.engines.int8.int8_engine import Int8Engine
    from search_r3.model.engines.int8.int8_weights import INT8_FILE
    from search_r3.model.resolve import optional_cache_dir

    checkpoint, cache = inputs.checkpoint, optional_cache_dir()
    embed_id = checkpoint.contract.embed_token_id
    return Int8Engine(
        checkpoint.model,
        **inputs.settings,
        contract_hash=checkpoint.contract.states_hash,
        cache_dir=cache / "int8" if cache is not None else None,
        samples=lambda: calibration.calibration_rows(inputs.templates, checkpoint.tokenizer, embed_id),
        paths=[checkpoint.path / INT8_FILE],
    )


def _open_llama_cpp(inputs: EngineInputs) -> LlamaCppEngine:
    from search_r3.model.engines.llama_cpp.llama_cpp_engine import open_llama_cpp
    from search_r3.model.resolve import optional_cache_dir

    cache = optional_cache_dir()
    return open_llama_cpp(inputs, cache / "llama.cpp" if cache is not None else None)


def _check_llama_cpp() -> Any:
    from search_r3.model.engines.llama_cpp.llama_server import import_xllamacpp

    return import_xllamacpp()


def _open_vllm(inputs: EngineInputs) -> TorchEngine:
    from search_r3.model.engines.vllm.vllm_engine import open_vllm
    from search_r3.model.resolve import cache_dir

    return open_vllm(inputs, cache_dir)


def _check_vllm() -> Any:
    from search_r3.model.engines.vllm.vllm_generation import import_vllm

    return import_vllm()


TORCH = EngineSpec(
    "torch",
    "the reference, for any causal LM of transformers, on a CPU or a GPU",
    _open_torch,
    continuous_batching=True,
    supports_weight_sync=True,
    latent_steps=True,
    query_adapters=True,
)
INT8 = EngineSpec(
    "int8",
    "fastest on CPUs with VNNI or AMX, with embeddings that differ slightly from float32's",
    _open_int8,
    device="cpu",
    precision="int8",
    golden_tolerance=1e-2,
    continuous_batching=True,
    busy_threads=True,
    latent_steps=True,
    query_adapters=True,
)
LLAMA_CPP = EngineSpec(
    "llama.cpp",
    "llama.cpp in 8 bits, for CPUs without VNNI or AMX",
    _open_llama_cpp,
    check=_check_llama_cpp,
    device="cpu",
    precision="q8_0",
    golden_tolerance=1e-2,
    continuous_batching=True,
    query_adapters=True,
)
VLLM = EngineSpec(
    "vllm",
    "vLLM generates the reasoning on a GPU (experimental)",
    _open_vllm,
    check=_check_vllm,
    continuous_batching=True,
    supports_weight_sync=True,
)


def _checked(name: str, spec: Any) -> EngineSpec:
    if not isinstance(spec, EngineSpec) or spec.name != name:
        raise InputError(
            f"the entry point {name!r} of search_r3.engines must be an EngineSpec called {name!r}, got {spec!r}; "
            "fix or uninstall the package that adds it"
        )
    return spec


ENGINES = {spec.name: spec for spec in (TORCH, INT8, LLAMA_CPP, VLLM)}
"""The built-in engines; "auto" stands for `torch`."""
FASTEST_ENGINES = (INT8.name, LLAMA_CPP.name, TORCH.name)
"""On a CPU, fastest first; on a GPU it is torch."""
REGISTRY = Registry("engine", "engines", {AUTO: TORCH} | ENGINES, _checked)


def engine_spec(name: str) -> EngineSpec:
    """The engine `name`: a built-in one ("auto" is the torch engine), or one of an installed package.

    Raises:
        InputError: the name is unknown (the message gives the nearest one), or the package is broken.
    """
    return REGISTRY.get(name)


def training_engine(name: str) -> EngineSpec:
    """`engine_spec(name)` for an engine that samples rollouts during training.

    Raises:
        InputError: see `engine_spec`; or the engine cannot load new weights.
    """
    spec = engine_spec(name)
    if not spec.supports_weight_sync:
        raise InputError(f"engine {name} cannot load new weights during training; use engine torch")
    return spec

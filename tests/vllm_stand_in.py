"""vLLM's interface as far as we use it, over a model that runs greedily on a CPU: names and behaviour of vLLM 0.33.

What was read there: `LLM.__init__`, `LLM.apply_model`, `LLM.reset_prefix_cache`, `LLMEngine.add_request`, `step`,
`abort_request` and `has_unfinished_requests`, `SamplingParams`, `CompletionOutput`. `test_vllm_engine.py` holds the
names to the real ones where vLLM is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

MOST_BIASES = 1024
"""vLLM takes no more in `logit_bias`."""


class VLLMClientError(Exception):
    """What vLLM raises about a request that it cannot take; no ValueError."""


class RequestOutputKind(Enum):
    """How a step's outputs are told."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(kw_only=True)
class SamplingParams:
    """What a request asks for; any other name is refused, as by vLLM."""

    temperature: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    detokenize: bool = True
    logit_bias: dict[int, float] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise VLLMClientError(f"temperature must be in [0, 2], got {self.temperature}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise VLLMClientError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        assert len(self.logit_bias or {}) <= MOST_BIASES
        assert self.logit_bias is None or all(-100 <= bias <= 100 for bias in self.logit_bias.values())


@dataclass
class _Request:
    prompt: list[int]
    params: SamplingParams
    random: torch.Generator
    read: int = 0  # tokens of the prompt
    written: list[int] = field(default_factory=list)


class StandInVllm(ModuleType):
    """The package.

    Args:
        will: what to write, as a function of the request's number and the tokens so far; None lets the model write.
        keeps_stop_token: whether the token that stopped a request is among its ids (it is in 0.33).
        side_by_side: requests that are written at once; the others wait.
        chunk: tokens of a prompt that a step reads.
        device_type: what vLLM runs on here; "" if it finds nothing.
    """

    def __init__(
        self,
        will: Callable[[int, list[int]], int] | None = None,
        *,
        keeps_stop_token: bool = True,
        side_by_side: int = 3,
        chunk: int = 64,
        device_type: str = "cpu",
    ) -> None:
        super().__init__("vllm")
        self.will, self.keeps_stop_token, self.side_by_side, self.chunk = will, keeps_stop_token, side_by_side, chunk
        self.platforms = ModuleType("vllm.platforms")
        self.platforms.current_platform = SimpleNamespace(device_type=device_type)  # type: ignore[attr-defined]
        self.exceptions = ModuleType("vllm.exceptions")
        self.exceptions.VLLMClientError = VLLMClientError  # type: ignore[attr-defined]
        self.sampling_params = ModuleType("vllm.sampling_params")
        self.sampling_params.RequestOutputKind = RequestOutputKind  # type: ignore[attr-defined]
        self.SamplingParams = SamplingParams
        self.started: list[LLM] = []

    def LLM(self, **settings: Any) -> LLM:
        self.started.append(LLM(self, **settings))
        return self.started[-1]

    def install(self, patch: pytest.MonkeyPatch) -> StandInVllm:
        """Let `import vllm` find it."""
        patch.setitem(sys.modules, "vllm", self)
        for part in ("exceptions", "platforms", "sampling_params"):
            patch.setitem(sys.modules, f"vllm.{part}", getattr(self, part))
        return self

    @property
    def engine(self) -> LLMEngine:
        """The one that was started last."""
        return self.started[-1].llm_engine


class LLM:
    """`vllm.LLM`, started on a folder."""

    def __init__(
        self,
        package: StandInVllm,
        *,
        model: str,
        dtype: str,
        gpu_memory_utilization: float,
        enable_prefix_caching: bool,
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)  # vLLM does that to its process
        self.folder, self.gpu_memory_utilization = Path(model), gpu_memory_utilization
        AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.llm_engine = LLMEngine(package, self.model)
        self.pushed: list[dict[str, torch.Tensor]] = []
        self.resets = 0

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        return [func(SimpleNamespace(load_weights=self._load))]

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True

    def _load(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self.pushed.append({name: value.clone() for name, value in named})
        self.model.load_state_dict(dict(named), strict=False)


class LLMEngine:
    """`vllm.v1.engine.llm_engine.LLMEngine`: first come, first served, a token a step."""

    def __init__(self, package: StandInVllm, model: Any) -> None:
        self._package, self._model = package, model
        self._longest = model.config.max_position_embeddings
        self._requests: dict[str, _Request] = {}
        self.seen: list[_Request] = []  # all that there ever were
        self.aborted: list[str] = []

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> str:
        assert isinstance(request_id, str)
        assert request_id not in self._requests
        assert prompt.keys() == {"type", "prompt_token_ids"}
        ids = prompt["prompt_token_ids"]
        assert prompt["type"] == "token"
        assert all(isinstance(token, int) and 0 <= token < self._model.config.vocab_size for token in ids)
        assert not params.detokenize
        assert params.output_kind is RequestOutputKind.DELTA
        if len(ids) >= self._longest:
            raise VLLMClientError(f"The decoder prompt (length {len(ids)}) is longer than {self._longest}.\nMore.")
        random = torch.Generator().manual_seed(params.seed or 0)
        self._requests[request_id] = _Request(ids, params, random)
        self.seen.append(self._requests[request_id])
        return request_id

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if self._requests.pop(request_id, None) is not None:
                self.aborted.append(request_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[Any]:
        outputs = []
        for request_id, request in list(self._requests.items())[: self._package.side_by_side]:
            request.read += self._package.chunk
            if request.read < len(request.prompt):
                continue
            token = self._next(request)
            request.written.append(token)
            stopped = token in (request.params.stop_token_ids or [])
            used_up = len(request.prompt) + len(request.written) >= self._longest
            finished = stopped or len(request.written) == request.params.max_tokens or used_up
            if finished:
                del self._requests[request_id]
            answer = SimpleNamespace(
                index=0,
                text="",
                token_ids=[token] if self._package.keeps_stop_token or not stopped else [],
                finish_reason=("stop" if stopped else "length") if finished else None,
                stop_reason=token if stopped else None,
            )
            outputs.append(SimpleNamespace(request_id=request_id, outputs=[answer], finished=finished))
        return outputs

    @torch.inference_mode()
    def _next(self, request: _Request) -> int:
        if self._package.will is not None:
            return self._package.will(self.seen.index(request), request.written)
        ids = torch.tensor([request.prompt + request.written])
        logits_V = self._model(input_ids=ids).logits[0, -1].float()
        for token, bias in (request.params.logit_bias or {}).items():
            logits_V[token] += bias
        if request.params.temperature == 0:
            return int(logits_V.argmax())
        probabilities_V = torch.softmax(logits_V / request.params.temperature, -1)
        return int(torch.multinomial(probabilities_V, 1, generator=request.random))

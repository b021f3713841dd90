"""The policy as a `SearchR3` with its current weights: a merged copy that is updated in place.

Decoding with a separate adapter is several times slower than with plain matrices, and copying the whole model at each
step would cost more than merging, so only the matrices that training changes are written.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from search_r3.environment.live_corpus import Corpus, LiveCorpus
from search_r3.model.checkpoint import Checkpoint
from search_r3.model.searchr3 import SearchR3
from search_r3.training.distributed import sharding
from search_r3.training.lora.policy import Policy
from search_r3.training.precision import resolve_mixed_precision

COPIED_PARAMETERS = 4_000_000_000
"""Unless it is sharded, a model with more parameters is used in place, with its adapter: a copy would not fit."""


class LiveEncoder:
    """Keeps the merged copy up to date.

    Args:
        policy: the model that is trained.
        checkpoint: provides the tokenizer, the contract and, of a query adapter, the model that embeds documents.
        dtype: the dtype of the copy, or a `mixed_precision` setting that is resolved for the policy's device at the
            first `sync`.
    """

    def __init__(self, policy: Policy, checkpoint: Checkpoint, dtype: torch.dtype | str) -> None:
        self.policy, self.checkpoint, self.dtype = policy, checkpoint, dtype
        self._copy: SearchR3 | None = None

    def sync(self) -> SearchR3:
        """The encoder with the policy's current weights. Encoders returned earlier are updated too.

        A collective if the policy is sharded; every process then has a full copy, whatever its size.
        """
        model = self.policy.causal_lm
        device = next(model.parameters()).device
        if self._copy is not None and self._copy.checkpoint.model.device == device:
            copied = self._copy.checkpoint.model
            if copied is not model:
                merge_into(self.policy.model, copied, self.policy.unsharded_model())
            return self._copy
        if sharding.is_sharded(self.policy):
            model = self._from_shards(device)
        elif sum(parameter.numel() for parameter in model.parameters()) <= COPIED_PARAMETERS:
            with torch.no_grad():
                model = copy.deepcopy(self.policy.model).merge_and_unload()
            model = model.to(self._dtype_on(device)).eval().requires_grad_(False)
        now, documents = self.checkpoint, self.checkpoint.documents
        if documents is not None:
            documents.to(device=device, dtype=self._dtype_on(device))
        live = Checkpoint(
            "live", model, now.tokenizer, now.contract, now.path, documents, query_normalizer=now.query_normalizer
        )
        self._copy = SearchR3(live)
        return self._copy

    def _from_shards(self, device: torch.device) -> Any:
        trained, dtype = self.policy.unsharded_model(), self._dtype_on(device)
        with torch.no_grad():
            model = sharding.copy_without_weights(trained, keep_trainable=False).merge_and_unload()
        copies: dict[int, nn.Parameter] = {}  # tied matrices stay tied
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if id(weight) not in copies:
                    empty = torch.empty(weight.shape, dtype=dtype, device=device)
                    copies[id(weight)] = nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = copies[id(weight)]
        plain = dict(model.named_parameters())
        for name, weight in self.policy.causal_lm.named_parameters():
            if not weight.requires_grad:  # PEFT nests the weights of wrapped layers one level deeper
                own = re.sub(r"\.(token_adapter|base_layer|original_module)(?=\.)", "", name)
                values = sharding.full_tensor(weight.detach())
                if own in plain:  # a tied matrix appears under one name only
                    plain[own].copy_(values)
        model = model.to(device).eval()
        merge_into(self.policy.model, model, trained)
        return model

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        return torch.bfloat16 if resolve_mixed_precision(self.dtype, device) == "bf16" else torch.float32


def encode_rows(
    encoder: SearchR3, documents: Sequence[str], max_tokens: int, corpus: Corpus | None = None
) -> Callable[[np.ndarray], Any]:
    """A function from row numbers to the embeddings of those documents, with the encoder's current weights.

    Args:
        corpus: holds the documents' embeddings. If the encoder is a query adapter, whose documents do not change, they
            are read from it (unless it is sharded, where reading rows is a collective).
    """
    if isinstance(corpus, LiveCorpus) and encoder.is_query_adapter:
        return corpus.vectors

    def encode(rows: np.ndarray) -> np.ndarray:
        return encoder.encode_document(
            [documents[row] for row in rows], max_length=max_tokens, show_progress_bar=False, batch_size=64
        )

    return encode


@torch.no_grad()
def merge_into(adapted: Any, merged: nn.Module, trained: Any) -> None:
    """Write the merged weights of a PEFT model's adapted layers into the plain layers of `merged`, in place.

    All other weights are frozen and stay as they were copied. Views of the weights see the change.

    Args:
        adapted: the PEFT model.
        merged: its merged copy.
        trained: the model with unsharded adapter weights (`Policy.unsharded_model`).
    """
    plain: dict[str, Any] = dict(merged.named_modules())
    layers: list[tuple[str, Any]] = list(adapted.get_base_model().named_modules())
    unsharded: dict[str, Any] = dict(trained.get_base_model().named_modules())
    for name, layer in layers:
        own = unsharded[name]
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            weight = sharding.full_tensor(layer.base_layer.weight)
            for adapter in own.active_adapters:
                if adapter in own.lora_A:
                    weight = weight + own.get_delta_weight(adapter)
            plain[name].weight.copy_(weight)
        elif hasattr(layer, "token_adapter"):
            rows = own.token_adapter
            for adapter in rows.active_adapters:
                plain[name].weight[rows.token_indices[adapter]] = rows.trainable_tokens_delta[adapter].to(
                    plain[name].weight
                )

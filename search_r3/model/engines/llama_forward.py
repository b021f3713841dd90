"""Sessions: a batch of rows with its keys and values, which takes tokens and returns the states after them.

`LlamaSession` implements the forward pass of the Llama family (Llama, SmolLM2, Qwen2, Mistral without a window):
projections of the same input share one matrix, the cache is allocated once, and the last layer computes only the
requested positions. `TransformersSession` runs any other decoder, and models whose adapter is not merged. Both give the
same states (tested).

Shape suffixes: B rows, L new tokens, T tokens in the cache, D dimension, H heads, K key-value heads, G = H / K,
E dimension of a head, F width of the MLP, P tokens of the shared prefix, Q queries of one key-value head (G * L).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from search_r3.model.engines.chunked_prefill import SessionInput, feed_together

FAMILY = ("LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM")
"""Architectures that `LlamaSession` supports; training has a separate list, `fused_llama.FAMILY`."""
Prefix = list[tuple[Tensor, Tensor]]
"""Keys and values (1, K, P, E) of the shared prefix, one pair per layer."""


class Session(Protocol):
    """A batch in progress."""

    in_place: bool
    """Whether the session has the attributes `keys` and `values` (one (B, K, T, E) tensor per layer) and `length`,
    which continuous batching replaces by views of its own memory, and `feed_together` (see `chunked_prefill`)."""

    def feed(self, ids_BL: Tensor, position_BL: Tensor, mask_BT: Tensor | None, last_B: Tensor | None) -> Tensor:
        """Append tokens; returns the states (B, D) after the final norm at column `last_B` (None: the last column).

        `mask_BT` is 0 at padding columns of the cache, including the new tokens' columns; None if there are none.
        """
        ...

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows."""
        ...

    def prefix(self) -> Prefix:
        """A copy of the first row's keys and values."""
        ...

    def keys_and_values(self) -> Prefix:
        """The keys and values of all rows, (B, K, T, E), one pair per layer."""
        ...


class SoftSession(Session, Protocol):
    """A session that also takes embeddings in place of tokens."""

    def feed_embeddings(self, input_BLD: Tensor, position_BL: Tensor, mask_BT: Tensor | None) -> Tensor:
        """`Session.feed` of soft tokens, given as input embeddings; the states (B, D) at the last column."""
        ...


class TransformersSession:
    """Runs any transformers decoder through its own forward pass and cache."""

    in_place = False

    def __init__(self, backbone: Any, prefix: Prefix, size: int) -> None:
        from transformers import DynamicCache

        self.backbone = backbone
        self.cache: Any = DynamicCache()
        for index, (keys, values) in enumerate(prefix):
            self.cache.update(keys.expand(size, -1, -1, -1), values.expand(size, -1, -1, -1), index)

    def feed(
        self, ids_BL: Tensor, position_BL: Tensor, mask_BT: Tensor | None = None, last_B: Tensor | None = None
    ) -> Tensor:
        """See `Session.feed`."""
        return self._feed({"input_ids": ids_BL}, position_BL, mask_BT, last_B)

    def feed_embeddings(self, input_BLD: Tensor, position_BL: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """See `SoftSession.feed_embeddings`."""
        return self._feed({"inputs_embeds": input_BLD}, position_BL, mask_BT, None)

    def _feed(
        self, inputs: dict[str, Tensor], position_BL: Tensor, mask_BT: Tensor | None, last_B: Tensor | None
    ) -> Tensor:
        hidden_BLD = self.backbone(
            **inputs,
            attention_mask=mask_BT,
            position_ids=position_BL,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return _at(hidden_BLD, last_B)

    def keep(self, rows: Tensor) -> None:
        """See `Session.keep`."""
        self.cache.batch_select_indices(rows)

    def prefix(self) -> Prefix:
        """See `Session.prefix`."""
        return [(keys[:1], values[:1]) for keys, values in self.keys_and_values()]

    def keys_and_values(self) -> Prefix:
        """See `Session.keys_and_values`."""
        layers: list[Any] = self.cache.layers
        return [(layer.keys, layer.values) for layer in layers]


@dataclass
class Layer:
    """The merged weights of one decoder layer."""

    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    gate_up: Tensor
    down: Tensor
    norm_attention: Tensor
    norm_mlp: Tensor


class LlamaCache:
    """The key-value cache of a Llama session, with a fixed size: (B, K, T, E) per layer.

    Args:
        backbone: the transformers decoder.
        layers: number of layers.
        head_dim: E.
        like: a tensor with the dtype and device of the cache.
        prefix: the initial content of the cache; may be empty.
        size: number of rows.
        room: number of tokens per row that will be fed.
    """

    in_place = True

    def __init__(
        self, backbone: Any, layers: int, head_dim: int, like: Tensor, prefix: Prefix, size: int, room: int
    ) -> None:
        config = backbone.config.get_text_config()
        self.backbone, self.head_dim = backbone, head_dim
        self.heads, self.groups = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        self.eps = config.rms_norm_eps
        self.length = prefix[0][0].shape[2] if prefix else 0
        self.shared = self.length  # number of columns that are the same in all rows
        shape = (size, self.heads, self.length + room, self.head_dim)
        self.keys = [like.new_empty(shape) for _ in range(layers)]
        self.values = [like.new_empty(shape) for _ in range(layers)]
        for index, (keys, values) in enumerate(prefix):
            self.keys[index][:, :, : self.length] = keys
            self.values[index][:, :, : self.length] = values

    def keep(self, rows: Tensor) -> None:
        """See `Session.keep`."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]

    def prefix(self) -> Prefix:
        """See `Session.prefix`."""
        return [(keys[:1].clone(), values[:1].clone()) for keys, values in self.keys_and_values()]

    def keys_and_values(self) -> Prefix:
        """See `Session.keys_and_values`."""
        end = self.length
        return [(k[:, :, :end], v[:, :, :end]) for k, v in zip(self.keys, self.values, strict=True)]

    def attention_mask(self, new: int, mask_BT: Tensor | None, device: torch.device) -> Tensor | None:
        """Which of the T columns each new token attends to, bool (1 or B, L, T); None if all attend to all."""
        if new == 1:
            return None if mask_BT is None else mask_BT.bool()[:, None]
        causal_LT = torch.ones(new, self.length + new, dtype=torch.bool, device=device).tril(self.length)
        if mask_BT is None:
            return causal_LT[None]
        # A padding column attends to itself: without a prefix, its softmax would otherwise be empty, which gives NaN.
        own_LT = torch.eye(new, dtype=torch.bool, device=device)
        own_LT = functional.pad(own_LT, (self.length, 0))
        return causal_LT[None] & (mask_BT.bool()[:, None] | own_LT[None])


class LlamaSession(LlamaCache):
    """The Llama family's forward pass with merged weights.

    Args:
        backbone: the transformers decoder, for its embeddings, rotary embedding and final norm.
        layers: see `merge_projections`.
        prefix, size, room: see `LlamaCache`.
    """

    def __init__(self, backbone: Any, layers: list[Layer], prefix: Prefix, size: int, room: int) -> None:
        head_dim = layers[0].out.shape[1] // backbone.config.get_text_config().num_attention_heads
        super().__init__(backbone, len(layers), head_dim, layers[0].qkv, prefix, size, room)
        self.layers = layers

    def feed(
        self, ids_BL: Tensor, position_BL: Tensor, mask_BT: Tensor | None = None, last_B: Tensor | None = None
    ) -> Tensor:
        """See `Session.feed`."""
        return self._feed(self.backbone.embed_tokens(ids_BL), position_BL, mask_BT, last_B)

    def feed_embeddings(self, input_BLD: Tensor, position_BL: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """See `SoftSession.feed_embeddings`."""
        return self._feed(input_BLD, position_BL, mask_BT, None)

    def _feed(self, hidden_BLD: Tensor, position_BL: Tensor, mask_BT: Tensor | None, last_B: Tensor | None) -> Tensor:
        size, new = hidden_BLD.shape[:2]
        rotation = self.rotation(hidden_BLD, position_BL)
        mask_BLT = self.attention_mask(new, mask_BT, hidden_BLD.device)
        for index in range(len(self.layers) - 1):
            hidden_BLD = self._layer(index, hidden_BLD, rotation, mask_BLT, None)
        picked = None
        if new > 1:
            last_B = torch.full((size,), new - 1, device=hidden_BLD.device) if last_B is None else last_B
            picked = torch.arange(size, device=last_B.device), last_B
        hidden_BLD = self._layer(len(self.layers) - 1, hidden_BLD, rotation, mask_BLT, picked)
        self.length += new
        return self.norm(hidden_BLD, self.backbone.norm.weight)[:, -1]

    def feed_together(self, parts: Sequence[SessionInput]) -> list[Tensor]:
        """See `chunked_prefill.feed_together`."""
        return feed_together(parts)

    def _layer(
        self,
        index: int,
        hidden_BLD: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask_BLT: Tensor | None,
        picked: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        qk_BLHE, value_BLKE = self.project(index, hidden_BLD, rotation)
        attended_BLD = self.attend(index, qk_BLHE, value_BLKE, mask_BLT, picked)
        if picked is not None:
            hidden_BLD = hidden_BLD[picked][:, None]
        return self.finish(index, hidden_BLD, attended_BLD)

    # A layer in three steps. Only `attend` uses the cache; the others also process the tokens of several sessions, with
    # (N, ...) instead of (B, L, ...): see `chunked_prefill`.

    def rotation(self, hidden_BLD: Tensor, position_BL: Tensor) -> tuple[Tensor, Tensor]:
        """The cosines and sines (B, L, 1, E) with which `project` rotates queries and keys, in `hidden_BLD`'s dtype."""
        cos_BLE, sin_BLE = self.backbone.rotary_emb(hidden_BLD, position_BL)
        # rotate_half(x) * sin is x with its halves swapped, times sin with the first half negated.
        half = self.head_dim // 2
        sin_BLE = torch.cat([-sin_BLE[..., :half], sin_BLE[..., half:]], -1)
        return cos_BLE[:, :, None], sin_BLE[:, :, None]

    def project(self, index: int, hidden_BLD: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A layer's rotated queries and keys, concatenated to (B, L, H + K, E), and its values (B, L, K, E)."""
        layer = self.layers[index]
        qkv_BLD = functional.linear(self.norm(hidden_BLD, layer.norm_attention), layer.qkv, layer.qkv_bias)
        qkv_BLHE = qkv_BLD.view(*hidden_BLD.shape[:-1], -1, self.head_dim)
        qk_BLHE, value_BLKE = qkv_BLHE.split([self.heads * (self.groups + 1), self.heads], -2)
        half = self.head_dim // 2
        swapped_BLHE = torch.cat([qk_BLHE[..., half:], qk_BLHE[..., :half]], -1)
        return (qk_BLHE * rotation[0]).addcmul_(swapped_BLHE, rotation[1]), value_BLKE

    def attend(
        self,
        index: int,
        qk_BLHE: Tensor,
        value_BLKE: Tensor,
        mask_BLT: Tensor | None,
        picked: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Append the keys and values of `project` to the cache and attend to the whole cache: (B, L, H * E).

        With `picked`, the row and column of one query per row, only these queries attend: (B, 1, H * E).
        """
        heads, groups = self.heads, self.groups
        size, new = qk_BLHE.shape[:2]
        query_BLHE, key_BLKE = qk_BLHE.split([heads * groups, heads], 2)
        end = self.length + new
        self.keys[index][:, :, self.length : end] = key_BLKE.transpose(1, 2)
        self.values[index][:, :, self.length : end] = value_BLKE.transpose(1, 2)
        if picked is not None:
            query_BLHE = query_BLHE[picked][:, None]
            if mask_BLT is not None:
                mask_BLT = mask_BLT.expand(size, -1, -1)[picked][:, None]
            new = 1
        # The G heads that share keys become G * L queries of one head, so that no key is repeated.
        query_BKQE = query_BLHE.view(size, new, heads, groups, self.head_dim).permute(0, 2, 3, 1, 4)
        query_BKQE = query_BKQE.reshape(size, heads, groups * new, self.head_dim)
        attended_BKQE = functional.scaled_dot_product_attention(
            query_BKQE,
            self.keys[index][:, :, :end],
            self.values[index][:, :, :end],
            attn_mask=None if mask_BLT is None else mask_BLT.repeat(1, groups, 1)[:, None],
        )
        return attended_BKQE.view(size, heads, groups, new, self.head_dim).permute(0, 3, 1, 2, 4).flatten(2)

    def finish(self, index: int, hidden_BLD: Tensor, attended_BLD: Tensor) -> Tensor:
        """A layer's output (B, L, D) from its input and `attend`'s output."""
        layer = self.layers[index]
        hidden_BLD = hidden_BLD + functional.linear(attended_BLD, layer.out, layer.out_bias)
        gate_BLF, up_BLF = functional.linear(self.norm(hidden_BLD, layer.norm_mlp), layer.gate_up).chunk(2, -1)
        return hidden_BLD + functional.linear(functional.silu(gate_BLF).mul_(up_BLF), layer.down)

    def norm(self, hidden_BLD: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm with the model's epsilon."""
        return functional.rms_norm(hidden_BLD, (hidden_BLD.shape[-1],), weight, self.eps)


def merge_projections(model: Any) -> list[Layer] | None:
    """Merge q, k, v and gate, up in each layer of `model`; None if `LlamaSession` cannot run it.

    The model's own weights become views of the merged ones, so that no memory is added and in-place changes are shared.
    """
    if type(model).__name__ not in FAMILY:
        return None
    config = model.config.get_text_config()
    if config.hidden_act != "silu" or _has_window(config):
        return None
    merged = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        q_k_v, gate_up = [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]
        linears = [*q_k_v, attention.o_proj, *gate_up, mlp.down_proj]
        if any(type(linear) is not nn.Linear for linear in linears):  # an adapter, or a quantized matrix
            return None
        if any(linear.bias is not None for linear in [*gate_up, mlp.down_proj]):
            return None
        merged.append(
            Layer(
                qkv=_as_one([linear.weight for linear in q_k_v]),
                qkv_bias=None if q_k_v[0].bias is None else _as_one([linear.bias for linear in q_k_v]),
                out=attention.o_proj.weight.detach(),
                out_bias=None if attention.o_proj.bias is None else attention.o_proj.bias.detach(),
                gate_up=_as_one([linear.weight for linear in gate_up]),
                down=mlp.down_proj.weight.detach(),
                norm_attention=layer.input_layernorm.weight.detach(),
                norm_mlp=layer.post_attention_layernorm.weight.detach(),
            )
        )
    return merged


def _has_window(config: Any) -> bool:
    if hasattr(config, "use_sliding_window"):
        return bool(config.use_sliding_window)
    return getattr(config, "sliding_window", None) is not None


def _as_one(parameters: Sequence[nn.Parameter]) -> Tensor:
    with torch.no_grad():
        whole = torch.cat([p.detach() for p in parameters])
        start = 0
        for parameter in parameters:
            parameter.data = whole[start : start + len(parameter)]
            start += len(parameter)
    return whole


def _at(hidden_BLD: Tensor, last_B: Tensor | None) -> Tensor:
    if last_B is None:
        return hidden_BLD[:, -1]
    return hidden_BLD[torch.arange(len(last_B), device=last_B.device), last_B]

"""The Llama family's forward pass with int8 products: a session like the float32 `LlamaSession`.

Between two products a row is scaled, added and quantized in one pass (`elementwise_kernels`). Everything else stays
float32: the residual stream, keys, values and attention (`attention_kernels`, or torch's where a mask hides padding).
bfloat16 attention would not be faster, and its rounding would make a text's result depend on its batch.

Letters in shapes: B rows, L new tokens, N tokens of all rows (B * L), T tokens in the cache, D dimension, C columns of
queries, keys and values, H heads, K key-value heads, G = H / K, E dimension of a head, F width of the MLP, Q queries of
one key-value head (G * L).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from search_r3.model.engines.chunked_prefill import SessionInput
from search_r3.model.engines.int8 import attention_kernels, elementwise_kernels
from search_r3.model.engines.int8.decode_step import SHORTLIST, CacheRows, Decoder, Matrices, prepared
from search_r3.model.engines.int8.int8_weights import MATRICES, Int8Matrix
from search_r3.model.engines.llama_forward import Layer, LlamaCache, Prefix

ROWS_A_BLOCK = 128
"""Number of tokens that the MLP processes at a time, so that its intermediate values (12 kB per token in SmolLM2) stay
in the L2 cache."""
NOTHING = np.empty(0, dtype=np.float32)


@dataclass
class Int8Layer:
    """One decoder layer: matrices in int8, the rest as float32 arrays; an empty bias means no bias."""

    qkv: Int8Matrix
    out: Int8Matrix
    gate_up: Int8Matrix
    down: Int8Matrix
    qkv_bias: np.ndarray
    out_bias: np.ndarray
    norm_attention: np.ndarray
    norm_mlp: np.ndarray


@dataclass
class Int8Model:
    """All layers and the head, and the decoder for few tokens if this machine can run it."""

    layers: list[Int8Layer]
    head: Int8Matrix
    float_head_VD: Tensor
    decoder: Decoder | None

    @classmethod
    def of(cls, layers: list[Layer], tensors: dict[str, Tensor], float_head_VD: Tensor, config: Any) -> Int8Model:
        """Pack the matrices of `quantize_model`; biases and norms come from `layers`. `config` is the decoder's."""
        packed = []
        for index, layer in enumerate(layers):
            names = {name: f"{index}.{name}" for name in MATRICES}
            packed.append(
                Int8Layer(
                    **{name: Int8Matrix.of(tensors[key], tensors[f"{key} scale"]) for name, key in names.items()},
                    qkv_bias=_array(layer.qkv_bias),
                    out_bias=_array(layer.out_bias),
                    norm_attention=_array(layer.norm_attention / tensors.get(f"{index}.qkv divisor", 1)),
                    norm_mlp=_array(layer.norm_mlp / tensors.get(f"{index}.gate_up divisor", 1)),
                )
            )
        head = Int8Matrix.of(tensors["head"], tensors["head scale"])
        return cls(packed, head, float_head_VD, _decoder(layers, tensors, config))

    def logits(self, state_BD: Tensor) -> Tensor:
        """Logits, float32 (B, vocabulary). The float head recomputes the `SHORTLIST` largest and decides the best."""
        state_BD = state_BD.float().contiguous()
        if self.decoder is not None and len(state_BD) <= self.decoder.few:
            logits_BV, best_BS = self.decoder.logits(state_BD)
        else:
            q_BD, scale_B = _room(*state_BD.shape)
            elementwise_kernels.quantize(state_BD.numpy(), q_BD.numpy(), scale_B.numpy())
            logits_BV = self.head(q_BD).mul_(scale_B[:, None])
            best_BS = logits_BV.topk(min(SHORTLIST, logits_BV.shape[1])).indices
        exact_BS = (self.float_head_VD[best_BS] @ state_BD[:, :, None])[:, :, 0]
        return logits_BV.scatter_(1, best_BS, exact_BS)


@dataclass
class EmbeddedInput:
    """A `SessionInput` with input embeddings, float (B, L, D), in place of token ids."""

    session: Int8Session
    input_BLD: Tensor
    position_BL: Tensor
    mask_BT: Tensor | None
    last_B: Tensor | None


class Int8Session(LlamaCache):
    """A batch in progress.

    Args:
        backbone: the transformers decoder, for its embeddings, rotary embedding and final norm.
        model: the int8 weights.
        prefix, size, room: see `LlamaCache`.
        fine: round less, for generation: the rounding errors of all products' inputs except attention's output are
            kept, and passes over few tokens use the decoder.
    """

    def __init__(
        self, backbone: Any, model: Int8Model, prefix: Prefix, size: int, room: int, fine: bool = False
    ) -> None:
        layers = model.layers
        head_dim = layers[0].out.inputs // backbone.config.get_text_config().num_attention_heads
        super().__init__(backbone, len(layers), head_dim, torch.empty(0), prefix, size, room)
        self.layers, self.decoder, self.fine = layers, model.decoder, fine

    def feed(
        self, ids_BL: Tensor, position_BL: Tensor, mask_BT: Tensor | None = None, last_B: Tensor | None = None
    ) -> Tensor:
        """See `Session.feed`."""
        return self._feed(EmbeddedInput(self, self.backbone.embed_tokens(ids_BL), position_BL, mask_BT, last_B))

    def feed_embeddings(self, input_BLD: Tensor, position_BL: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """See `SoftSession.feed_embeddings`."""
        return self._feed(EmbeddedInput(self, input_BLD, position_BL, mask_BT, None))

    def _feed(self, part: EmbeddedInput) -> Tensor:
        size, new = part.input_BLD.shape[:2]
        if self.fine and self.decoder is not None and self.decoder.takes(size * new, new):
            return self._decode([part])[0]
        position_BL, mask_BT, last_B = part.position_BL, part.mask_BT, part.last_B
        x_ND = part.input_BLD.float().flatten(0, 1)
        cos_NE, sin_NE = (part.numpy() for part in self._rotation(x_ND, position_BL))
        by_blocks = mask_BT is None and new > 1 and attention_kernels.takes(self.head_dim)
        mask_BQT = None if by_blocks else self._additive(self.attention_mask(new, mask_BT, x_ND.device))
        eps = np.float32(self.eps)
        # The residual stream starts at zero, and the embeddings are added first.
        y_ND, x_ND, scale_N, bias = x_ND, torch.zeros_like(x_ND), torch.ones(len(x_ND)), NOTHING
        (q_ND, q_scale_N), fine_ND = _room(*x_ND.shape), self._fine(x_ND.shape)
        for index, layer in enumerate(self.layers):
            elementwise_kernels.add_norm_quantize(
                x_ND.numpy(), y_ND.numpy(), scale_N.numpy(), bias, layer.norm_attention, eps, q_ND.numpy(),
                fine_ND.numpy(), q_scale_N.numpy(),
            )  # fmt: skip
            y_NC = layer.qkv(q_ND)
            if self.fine:
                y_NC.add_(layer.qkv(fine_ND), alpha=1 / elementwise_kernels.FINE)
            query_BKGLE = torch.empty(size, self.heads, self.groups, new, self.head_dim)
            elementwise_kernels.rotate(
                y_NC.numpy(), q_scale_N.numpy(), layer.qkv_bias, cos_NE, sin_NE, query_BKGLE.numpy(),
                self.keys[index].numpy(), self.values[index].numpy(), self.length,
            )  # fmt: skip
            picked_B = None
            if index == len(self.layers) - 1 and new > 1:  # keys and values of all tokens, the rest of one per row
                picked_B = torch.full((size,), new - 1) if last_B is None else last_B
                x_ND = x_ND.view(size, new, -1)[torch.arange(size), picked_B]
                q_ND, q_scale_N = _room(*x_ND.shape)
            attended_BQKE = self._attend(index, query_BKGLE, mask_BQT, picked_B)
            wide_ND = q_ND if layer.out.inputs == q_ND.shape[1] else _room(len(q_ND), layer.out.inputs)[0]
            scale_N = q_scale_N
            elementwise_kernels.quantize_heads(attended_BQKE.numpy(), wide_ND.numpy(), scale_N.numpy())
            y_ND = layer.out(wide_ND)
            q_scale_N = torch.empty_like(scale_N)
            elementwise_kernels.add_norm_quantize(
                x_ND.numpy(), y_ND.numpy(), scale_N.numpy(), layer.out_bias, layer.norm_mlp, eps, q_ND.numpy(),
                fine_ND[: len(q_ND)].numpy(), q_scale_N.numpy(),
            )  # fmt: skip
            y_ND, scale_N = self._mlp(layer, q_ND, fine_ND, q_scale_N)
        self.length += new
        x_ND.addcmul_(y_ND, scale_N[:, None])
        return functional.rms_norm(x_ND, x_ND.shape[-1:], self.backbone.norm.weight.float(), self.eps)

    def feed_together(self, parts: Sequence[SessionInput]) -> list[Tensor]:
        """See `chunked_prefill.feed_together`; one pass if there are few tokens."""
        tokens, longest = sum(part.ids_BL.numel() for part in parts), max(part.ids_BL.shape[1] for part in parts)
        if self.fine and self.decoder is not None and self.decoder.takes(tokens, longest):
            return self._decode(
                [
                    EmbeddedInput(
                        part.session,
                        self.backbone.embed_tokens(part.ids_BL),
                        part.position_BL,
                        part.mask_BT,
                        part.last_B,
                    )
                    for part in parts
                ]
            )
        return [part.session.feed(part.ids_BL, part.position_BL, part.mask_BT, part.last_B) for part in parts]

    def _decode(self, parts: Sequence[EmbeddedInput]) -> list[Tensor]:
        """The states (B, D) of each part, by the decoder, in passes of at most `few` tokens."""
        assert self.decoder is not None
        states: list[Tensor] = []
        waiting: list[tuple[EmbeddedInput, slice]] = []
        tokens = 0
        for part in parts:
            size, new = part.input_BLD.shape[:2]
            for first in range(0, size, step := max(1, self.decoder.few // new)):
                rows = slice(first, min(first + step, size))
                more = (rows.stop - first) * new
                if waiting and tokens + more > self.decoder.few:
                    states.append(self._pass(waiting))
                    waiting, tokens = [], 0
                waiting.append((part, rows))
                tokens += more
        states.append(self._pass(waiting))
        for part in parts:
            part.session.length += part.input_BLD.shape[1]
        return list(torch.cat(states).split([len(part.input_BLD) for part in parts]))

    def _pass(self, pieces: Sequence[tuple[EmbeddedInput, slice]]) -> Tensor:
        """The states (B, D) of the selected rows of all parts, by one pass."""
        assert self.decoder is not None
        shapes = [part.input_BLD[rows].shape[:2] for part, rows in pieces]
        x_ND = torch.cat([part.input_BLD[rows].flatten(0, 1) for part, rows in pieces]).float()  # a copy: overwritten
        cos_NE, sin_NE = self._rotation(
            x_ND, torch.cat([part.position_BL[rows].flatten() for part, rows in pieces])[None]
        )
        caches = []
        for part, rows in pieces:
            session, new = part.session, part.input_BLD.shape[1]
            seen_BT = None if part.mask_BT is None else part.mask_BT[rows].to(torch.uint8)
            keys, values = ([one[rows] for one in of] for of in (session.keys, session.values))
            caches.append(CacheRows(keys, values, session.length, new, session.shared, seen_BT))
        self.decoder.step(x_ND, cos_NE, sin_NE, caches)
        picked = []
        sizes = [shape.numel() for shape in shapes]
        for (part, rows), shape, x in zip(pieces, shapes, x_ND.split(sizes), strict=True):
            x_BLD = x.unflatten(0, shape)
            picked.append(x_BLD[:, -1] if part.last_B is None else x_BLD[torch.arange(len(x_BLD)), part.last_B[rows]])
        state_BD = torch.cat(picked)
        return functional.rms_norm(state_BD, state_BD.shape[-1:], self.backbone.norm.weight.float(), self.eps)

    def _rotation(self, x_ND: Tensor, position_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (N, E) of the rotation, float32 and contiguous."""
        cos_BLE, sin_BLE = self.backbone.rotary_emb(x_ND, position_BL)
        cos_NE, sin_NE = (part.float().reshape(-1, self.head_dim).contiguous() for part in (cos_BLE, sin_BLE))
        return cos_NE, sin_NE

    def _attend(self, index: int, query_BKGLE: Tensor, mask_BQT: Tensor | None, picked_B: Tensor | None) -> Tensor:
        """Attention of all new tokens, or of one per row, to the cache with the new tokens: float32 (B, Q, K, E).

        Without a mask each of several new tokens sees the columns up to its own.
        """
        size, _, groups, new, _ = query_BKGLE.shape
        end = self.length + new
        if mask_BQT is None and picked_B is None and new > 1:
            attended_BQKE = torch.empty(size, groups * new, self.heads, self.head_dim)
            attention_kernels.attend(
                query_BKGLE.numpy(), self.keys[index].numpy(), self.values[index].numpy(), self.length,
                attended_BQKE.numpy(),
            )  # fmt: skip
            return attended_BQKE
        if picked_B is not None:
            rows_B = torch.arange(size)
            query_BKGLE = query_BKGLE[rows_B, :, :, picked_B]
            if mask_BQT is None:  # only what follows is hidden
                seen_BT = torch.arange(end) <= self.length + picked_B[:, None]
                mask_BQT = self._additive(seen_BT[:, None])
            else:
                mask_BGLT = mask_BQT.view(len(mask_BQT), groups, new, -1).expand(size, -1, -1, -1)
                mask_BQT = mask_BGLT[rows_B, :, picked_B][:, None]
            new = 1
        # The G heads that share keys become G * L queries of one head, so that no key is repeated.
        attended_BKQE = functional.scaled_dot_product_attention(
            query_BKGLE.view(size, self.heads, groups * new, self.head_dim),
            self.keys[index][:, :, :end],
            self.values[index][:, :, :end],
            attn_mask=mask_BQT,
        )
        return attended_BKQE.transpose(1, 2).contiguous()

    def _mlp(self, layer: Int8Layer, q_ND: Tensor, fine_ND: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
        """The MLP's output (N, D), unscaled, and each row's scale (N,)."""
        q_NF, q_scale_N = _room(len(q_ND), layer.down.inputs)
        fine_NF = self._fine(q_NF.shape)
        for start in range(0, len(q_ND), ROWS_A_BLOCK):
            block = slice(start, start + ROWS_A_BLOCK)
            y_N2F = layer.gate_up(q_ND[block])
            if self.fine:
                y_N2F.add_(layer.gate_up(fine_ND[block][: len(y_N2F)]), alpha=1 / elementwise_kernels.FINE)
            elementwise_kernels.gate_quantize(
                y_N2F.numpy(), scale_N[block].numpy(), q_NF[block].numpy(), fine_NF[block].numpy(),
                q_scale_N[block].numpy(),
            )  # fmt: skip
        y_ND = layer.down(q_NF)
        if self.fine:
            y_ND.add_(layer.down(fine_NF), alpha=1 / elementwise_kernels.FINE)
        return y_ND, q_scale_N

    def _fine(self, shape: Sequence[int]) -> Tensor:
        """Memory for the rounding errors of int8 inputs; empty if they are not kept."""
        return torch.empty(tuple(shape) if self.fine else (0, shape[-1]), dtype=torch.int8)

    def _additive(self, mask_BLT: Tensor | None) -> Tensor | None:
        """The mask to add to attention scores, in all layers: float32 (1 or B, 1, Q, T)."""
        if mask_BLT is None:
            return None
        added_BLT = torch.zeros(mask_BLT.shape).masked_fill_(~mask_BLT, float("-inf"))
        return added_BLT.repeat(1, self.groups, 1)[:, None]


def _decoder(layers: list[Layer], tensors: dict[str, Tensor], config: Any) -> Decoder | None:
    """The decoder for few tokens, with the "fine" matrices where they exist; None if it does not run here."""
    none = [NOTHING] * len(layers)
    biases = {
        "qkv": [_array(layer.qkv_bias) for layer in layers],
        "out": [_array(layer.out_bias) for layer in layers],
    }
    matrices = {}
    for name in MATRICES:
        keys = [f"{index}.{name}" for index in range(len(layers))]
        keys = [f"{key} fine" if f"{key} fine" in tensors else key for key in keys]
        matrices[name] = Matrices.of(
            [tensors[key] for key in keys], [tensors[f"{key} scale"] for key in keys], biases.get(name, none)
        )
    matrices["head"] = Matrices.of([tensors["head"]], [tensors["head scale"]], [NOTHING])
    ready = prepared(matrices)
    if ready is None:
        return None
    return Decoder(
        **ready,
        norm_attention=np.stack([_array(layer.norm_attention) for layer in layers]),
        norm_mlp=np.stack([_array(layer.norm_mlp) for layer in layers]),
        heads=config.num_key_value_heads,
        eps=config.rms_norm_eps,
    )


def _room(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Uninitialized int8 rows and their scales."""
    return torch.empty(rows, width, dtype=torch.int8), torch.empty(rows)


def _array(tensor: Tensor | None) -> np.ndarray:
    return NOTHING if tensor is None else tensor.detach().float().contiguous().numpy()

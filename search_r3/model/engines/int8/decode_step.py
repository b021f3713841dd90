"""Runs `decode_kernels`: provides the weights and caches in its layout, scratch memory and a team of threads.

Letters in shapes are those of `decode_kernels`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_r3.model.engines.int8 import amx, avx512, decode_kernels
from search_r3.model.engines.int8.amx import ROWS
from search_r3.model.engines.int8.avx512 import OUTPUTS, PIECE
from search_r3.model.engines.int8.decode_kernels import compile_decode
from search_r3.model.engines.int8.thread_team import ThreadTeam

FEW, FEW_WITH_TILES = 32, 512
"""Number of tokens per pass up to which this is at least as fast as the products of `int8_forward`."""
SHORTLIST = 16
"""Number of tokens whose logits are recomputed with float weights; reading 16 rows of the head takes no time."""
PAD = 16
"""Extra columns in rows of sums, so that row length is not a power of two."""


@dataclass
class Matrices:
    """The matrices of one kind (such as qkv) of all layers.

    Attributes:
        weight: int8 (A, O, I), or the layout of `amx.lay_out`.
        scale: float32 (A, O), the scale of each output.
        bias: float32 (A, O), or (A, 0) without biases.
    """

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(cls, weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[np.ndarray]) -> Matrices:
        """Stack copies of the layers' matrices."""
        return cls(torch.stack(list(weights)).numpy(), torch.stack(list(scales)).numpy(), np.stack(biases))

    def laid_out(self) -> Matrices:
        """The same matrices in the layout for AMX tiles."""
        return Matrices(amx.lay_out(self.weight), self.scale, self.bias)


@dataclass
class CacheRows:
    """Rows of one key-value cache, and the columns for their new tokens.

    Attributes:
        keys, values: for each layer (B, K, T, E), float32 and contiguous; columns from `start` on are written.
        start: the first column of the new tokens.
        new: L, the number of new tokens per row.
        shared: number of leading columns that are equal in all rows.
        seen_BT: uint8 (B, start + L), 0 for columns that a row does not see; None if none is hidden. Attention is
            always causal in addition.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    start: int
    new: int
    shared: int = 0
    seen_BT: Tensor | None = None


class Decoder:
    """A model's weights in the layout of `decode_kernels.decode`.

    Args:
        qkv, out, gate_up, down: see `Matrices`.
        norm_attention, norm_mlp: float32 (A, D).
        head: the output matrix as a single layer, (1, vocabulary, D).
        heads: number of key-value heads.
        eps: epsilon of the norms.
    """

    def __init__(
        self,
        qkv: Matrices,
        out: Matrices,
        gate_up: Matrices,
        down: Matrices,
        norm_attention: np.ndarray,
        norm_mlp: np.ndarray,
        head: Matrices,
        heads: int,
        eps: float,
    ) -> None:
        self._layers = (
            qkv.weight, qkv.scale, qkv.bias, out.weight, out.scale, out.bias, gate_up.weight, gate_up.scale,
            down.weight, down.scale, norm_attention, norm_mlp,
        )  # fmt: skip
        self._head, self._heads, self._eps = head, heads, np.float32(eps)
        self._width, self._inner = norm_mlp.shape[1], gate_up.scale.shape[1] // 2
        self._team, self._lock = ThreadTeam(), threading.Lock()
        self._rooms: tuple[np.ndarray, ...] | None = None
        self._sums: np.ndarray | None = None
        self._tiles = head.weight.ndim == 4
        self.few = FEW_WITH_TILES if self._tiles else FEW
        compile_decode()

    def takes(self, tokens: int, longest: int) -> bool:
        """Whether this decoder should handle this many tokens; with AMX tiles, also more than fit in one pass."""
        return tokens <= self.few or (self._tiles and longest <= self.few)

    def step(self, x_ND: Tensor, cos_NE: Tensor, sin_NE: Tensor, parts: Sequence[CacheRows]) -> None:
        """Replace the embeddings `x` by the last layer's output, and extend the caches of all parts.

        Args:
            x_ND: float32, contiguous: the tokens part by part, and row by row within a part.
            cos_NE, sin_NE: float32, the rotation of the new tokens.
            parts: the caches of this pass, which only attention uses.

        Raises:
            ValueError: the number of tokens or the shape of a mask does not match the parts.
        """
        fitting = all(p.seen_BT is None or p.seen_BT.shape == (len(p.keys[0]), p.start + p.new) for p in parts)
        if not fitting or sum(len(p.keys[0]) * p.new for p in parts) != len(x_ND):  # a thread would wait forever
            raise ValueError(f"{len(x_ND)} tokens for {[(len(p.keys[0]), p.start, p.new) for p in parts]}")
        cache_PA2 = np.array(
            [[[k.data_ptr(), v.data_ptr()] for k, v in zip(p.keys, p.values, strict=True)] for p in parts]
        )
        shape_P5 = np.array([[len(p.keys[0]), p.keys[0].shape[2], p.start, p.new, p.shared] for p in parts])
        hidden = [p.seen_BT for p in parts if p.seen_BT is not None]
        seen_X = torch.cat([one.flatten() for one in hidden]).numpy() if hidden else np.empty(0, np.uint8)
        hides_P = np.array([p.seen_BT is not None for p in parts])
        given: tuple[Any, ...] = (
            x_ND.numpy(), cos_NE.numpy(), sin_NE.numpy(), *self._layers, self._eps, self._heads, cache_PA2, shape_P5,
            hides_P, seen_X,
        )  # fmt: skip
        with self._lock:
            given += self._room(len(x_ND), cos_NE.shape[1])
            self._team.run(lambda *share: decode_kernels.decode(*given, *share))

    def logits(self, state_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, float32 (N, vocabulary), and the indices of the `SHORTLIST` largest, (N, S)."""
        size, scale = len(state_ND), self._head.scale[0]
        state, out_NV = state_ND.float().contiguous().numpy(), np.empty((size, len(scale)), np.float32)
        together = OUTPUTS if self._head.weight.ndim == 3 else amx.OUTPUTS
        best_NR = np.empty((size, len(scale) // together), np.float32)
        with self._lock:
            if self._sums is None or size > len(self._sums):
                self._sums = np.empty((size, len(scale) + PAD), np.int32)
            room = self._quantized(size, self._width), np.empty(size, np.float32), self._sums
            weight = self._head.weight[0]
            self._team.run(lambda *share: decode_kernels.outputs(state, weight, scale, out_NV, best_NR, *room, *share))
        out = torch.from_numpy(out_NV)
        # The largest outputs are in the runs with the largest maxima.
        runs_NS = torch.from_numpy(best_NR).topk(min(SHORTLIST, best_NR.shape[1]), sorted=False).indices
        among = (runs_NS[:, :, None] * together + torch.arange(together)).flatten(1)
        best_NS = out.gather(1, among).topk(min(SHORTLIST, among.shape[1]), sorted=False).indices
        return out, among.gather(1, best_NS)

    def _room(self, size: int, dim: int) -> tuple[np.ndarray, ...]:
        """Scratch memory that the shares of a pass exchange; kept for the next pass, because allocation takes time."""
        if self._rooms is None or size > len(self._rooms[-1]):
            size = -(-size // ROWS) * ROWS
            columns, width, inner = self._layers[1].shape[1], self._width, self._inner
            groups = columns // dim // self._heads - 2
            heads = groups * self._heads * dim
            self._rooms = (
                self._quantized(size, width), np.empty((size, columns + PAD), np.int32),
                np.empty((size, width + PAD), np.int32), np.empty((size, 2 * inner + PAD), np.int32),
                self._quantized(size, inner), np.empty((size, self._heads, groups, dim), np.float32),
                np.empty((size, heads), np.float32), self._quantized(size, heads), np.empty(size, np.float32),
            )  # fmt: skip
        return self._rooms

    def _quantized(self, size: int, width: int) -> np.ndarray:
        if self._head.weight.ndim == 3:
            return np.empty((size, width), np.int16)
        return np.empty((2, -(-size // ROWS) * ROWS, width), np.int8)


def prepared(matrices: dict[str, Matrices]) -> dict[str, Matrices] | None:
    """The matrices in the layout that `decode` needs on this machine; None if it cannot run them."""
    shapes = [m.weight.shape for m in matrices.values()]

    def whole(outputs: int, inputs: int) -> bool:
        return all(o % outputs == 0 and i % inputs == 0 for _, o, i in shapes)

    if amx.runs_here() and whole(amx.OUTPUTS, amx.PIECE):
        return {name: one.laid_out() for name, one in matrices.items()}
    return matrices if avx512.runs_here() and whole(OUTPUTS, PIECE) else None

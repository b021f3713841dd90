"""Linear layers with LoRA (arXiv 2106.09685) as one matrix product, forward and backward.

The low-rank matrices are concatenated with the frozen one, not multiplied separately: y = [x, xA'] [W, sB]'.
Letters in shapes: N tokens, `in` and `out` features, R ranks of all adapters together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class _Adapter:
    """One LoRA pair, and its place in the merged matrix."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    rows: slice
    ranks: slice


class Projection:
    """Linear layers with the same input, and their LoRA, as one matrix.

    `matrix` is [[W, sB], [A, 0]], (out + R, in + R): its upper rows map [x, h] to y, where h = x A'; its left columns
    map [dy, dh] to dx, where dh = dy sB.
    """

    def __init__(self, linears: Sequence[Any], dtype: torch.dtype) -> None:
        bases = [getattr(linear, "base_layer", linear) for linear in linears]
        self.inputs = bases[0].weight.shape[1]
        self.outputs = sum(base.weight.shape[0] for base in bases)
        self.adapters: list[_Adapter] = []
        row = rank = 0
        for linear, base in zip(linears, bases, strict=True):
            end = row + base.weight.shape[0]
            if base is not linear:
                name = linear.active_adapters[0]
                a, b = linear.lora_A[name].weight, linear.lora_B[name].weight
                ranks = slice(rank, rank + a.shape[0])
                self.adapters.append(_Adapter(a, b, linear.scaling[name], slice(row, end), ranks))
                rank = ranks.stop
            row = end
        self.rank = rank
        device = bases[0].weight.device
        self.matrix = torch.zeros(self.outputs + rank, self.inputs + rank, dtype=dtype, device=device)
        with torch.no_grad():
            torch.cat([base.weight for base in bases], out=self.matrix[: self.outputs, : self.inputs])
            biases = [base.bias for base in bases]
            self.bias = None if biases[0] is None else torch.cat(biases).to(dtype)

    def refresh(self) -> None:
        """Copy the adapters' current weights into the matrix."""
        for adapter in self.adapters:
            first, last = self.outputs + adapter.ranks.start, self.outputs + adapter.ranks.stop
            self.matrix[first:last, : self.inputs].copy_(adapter.a)
            start, stop = self.inputs + adapter.ranks.start, self.inputs + adapter.ranks.stop
            torch.mul(adapter.b, adapter.scale, out=self.matrix[adapter.rows, start:stop])

    def parameters(self) -> list[nn.Parameter]:
        """A and B of each adapter, in the order of `gradients`."""
        return [weight for adapter in self.adapters for weight in (adapter.a, adapter.b)]

    def empty_inputs(self, tokens: int) -> Tensor:
        """Uninitialized [x, h], (N, in + R); the caller fills in x."""
        return self.matrix.new_empty(tokens, self.inputs + self.rank)

    def empty_gradients(self, tokens: int) -> Tensor:
        """Uninitialized [dy, dh], (N, out + R); the caller fills in dy."""
        return self.matrix.new_empty(tokens, self.outputs + self.rank)

    def forward(self, x: Tensor, adapted: bool) -> Tensor:
        """y (N, out) from [x, h]; h is filled in."""
        if not (adapted and self.rank):
            return functional.linear(x[:, : self.inputs], self.matrix[: self.outputs, : self.inputs], self.bias)
        torch.mm(x[:, : self.inputs], self.matrix[self.outputs :, : self.inputs].T, out=x[:, self.inputs :])
        return functional.linear(x, self.matrix[: self.outputs], self.bias)

    def backward(self, dy: Tensor) -> Tensor:
        """dx (N, in) from [dy, dh]; dh is filled in."""
        if self.rank:
            torch.mm(dy[:, : self.outputs], self.matrix[: self.outputs, self.inputs :], out=dy[:, self.outputs :])
        return torch.mm(dy, self.matrix[:, : self.inputs])

    def gradients(self, x: Tensor, h: Tensor, dy: Tensor) -> list[Tensor]:
        """The gradients of `parameters` from x (N, in), h (N, R) and [dy, dh]."""
        if not self.rank:
            return []
        da = torch.mm(dy[:, self.outputs :].T, x)
        found = []
        for adapter in self.adapters:
            db = torch.mm(h[:, adapter.ranks].T, dy[:, adapter.rows]).T
            found.append(da[adapter.ranks].to(adapter.a.dtype))
            found.append(db.to(adapter.b.dtype, memory_format=torch.contiguous_format).mul_(adapter.scale))
        return found

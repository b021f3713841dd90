"""Linear layers with LoRA (arXiv 2106.09685) as one matrix product, forward and backward.

The low-rank matrices are concatenated with the frozen one instead of being multiplied separately:
y = [x, xA'] [W, sB]'.

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
    """One LoRA pair and its rows and columns in the merged matrix."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    rows: slice
    ranks: slice


class Projection:
    """Linear layers that share an input, merged with their LoRA weights into one matrix.

    `matrix` is [W, sB], (out, in + R): it maps [x, h] to y, where h = x A', and dy to [dy W, dh], where dh = dy sB.
    All products use whole contiguous tensors, because PyTorch would copy others before each product. The rows of x
    therefore have R extra columns.
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
        self.matrix = torch.zeros(self.outputs, self.inputs + rank, dtype=dtype, device=device)
        self._down = torch.zeros(rank, self.inputs, dtype=dtype, device=device)
        self._wide_down = torch.zeros(rank, self.inputs + rank, dtype=dtype, device=device)
        with torch.no_grad():
            torch.cat([base.weight for base in bases], out=self.matrix[:, : self.inputs])
            biases = [base.bias for base in bases]
            self.bias = None if biases[0] is None else torch.cat(biases).to(dtype)

    def refresh(self) -> None:
        """Copy the adapters' current weights into the matrix."""
        for adapter in self.adapters:
            self._down[adapter.ranks].copy_(adapter.a)
            self._wide_down[adapter.ranks, : self.inputs].copy_(adapter.a)
            start, stop = self.inputs + adapter.ranks.start, self.inputs + adapter.ranks.stop
            torch.mul(adapter.b, adapter.scale, out=self.matrix[adapter.rows, start:stop])

    def parameters(self) -> list[nn.Parameter]:
        """A and B of each adapter, in the order of `gradients`."""
        return [weight for adapter in self.adapters for weight in (adapter.a, adapter.b)]

    def empty_inputs(self, tokens: int) -> Tensor:
        """Uninitialized [x, h], (N, in + R); the caller writes x and sets h to 0."""
        return self.matrix.new_empty(tokens, self.inputs + self.rank)

    def forward(self, x: Tensor, adapted: bool) -> Tensor:
        """y (N, out) from [x, 0]; writes h in place if `adapted`."""
        if adapted and self.rank:
            x[:, self.inputs :] = torch.mm(x, self._wide_down.T)
        return functional.linear(x, self.matrix, self.bias)

    def backward(self, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """[dy W, dh], (N, in + R), and dh A, (N, in), or None without adapters.

        dx is the sum of the first result's first `in` columns and the second result.
        """
        dx = torch.mm(dy, self.matrix)
        return dx, torch.mm(self.ranks_of(dx), self._down) if self.rank else None

    def ranks_of(self, x: Tensor) -> Tensor:
        """The last R columns (h of [x, h], or dh), contiguous, (N, R)."""
        return x[:, self.inputs :].contiguous()

    def gradients(self, x: Tensor, h: Tensor, dy: Tensor, dx: Tensor) -> list[Tensor]:
        """The gradients of `parameters`, in their order and dtypes.

        Args:
            x: (N, in) or [x, h].
            h: (N, R), see `ranks_of`.
            dy: gradient of the output, (N, out).
            dx: the first result of `backward`.
        """
        if not self.rank:
            return []
        da = torch.mm(self.ranks_of(dx).T, x)
        db = torch.mm(h.T, dy)
        found = []
        for adapter in self.adapters:
            found.append(da[adapter.ranks, : self.inputs].to(adapter.a.dtype))
            own = db[adapter.ranks, adapter.rows].T
            found.append(own.to(adapter.b.dtype, memory_format=torch.contiguous_format).mul_(adapter.scale))
        return found

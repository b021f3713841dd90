"""An exponential moving average of the trainable weights (Polyak and Juditsky 1992), which replaces them in evaluation
and in the saved adapter.

a_0 = w_0 and a_t = d_t a_{t-1} + (1 - d_t) w_t with d_t = min(decay, (1 + t) / (10 + t)), as in TensorFlow and
diffusers: with a constant decay, the average of a short run would still be close to its initial weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from search_r3.errors import InputError
from search_r3.training.distributed.sharding import copy_into, full_tensor, is_sharded, local_tensor, reshard


def decay_at(step: int, decay: float) -> float:
    """d_t, the weight of the previous average after optimizer step `step` (from 1)."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """The average of a module's trainable weights; if the module is sharded, each process averages its shard.

    Training does not use it: gradients and the optimizer work with the weights themselves.
    """

    def __init__(self, module: nn.Module, parameters: dict[str, nn.Parameter], decay: float) -> None:
        """Start with the current weights.

        Args:
            module: the module that the parameters belong to.
            parameters: its trainable parameters, by name.
            decay: in (0, 1).
        """
        self.module, self.parameters, self.decay = module, parameters, decay
        self.values: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after optimizer step `step` (from 1)."""
        share = 1 - decay_at(step, self.decay)
        for name, parameter in self.parameters.items():
            local_tensor(self.values[name]).lerp_(local_tensor(parameter).float(), share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the average replaces the weights; they are restored exactly afterwards."""
        self._drop_gathered()
        kept = {name: local_tensor(parameter).clone() for name, parameter in self.parameters.items()}
        self._write({name: local_tensor(value) for name, value in self.values.items()})
        try:
            yield
        finally:
            self._drop_gathered()
            self._write(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Unsharded copies on the CPU, float32, by parameter name: a collective if the module is sharded."""
        return {name: full_tensor(value).to("cpu", copy=True).contiguous() for name, value in self.values.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            InputError: the state is empty or belongs to other parameters.
        """
        if {name: value.shape for name, value in state.items()} != {n: v.shape for n, v in self.values.items()}:
            raise InputError(
                "the checkpoint has no average of these weights; start over without resuming, or set loop.ema to 0"
            )
        for name, value in state.items():
            copy_into(self.values[name], value)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            local_tensor(parameter).copy_(values[name])

    def _drop_gathered(self) -> None:
        """Make FSDP gather the weights again, because it computes with a gathered copy."""
        if is_sharded(self.module):
            reshard(self.module)

"""Several processes, and FSDP2: matrices, gradients and optimiser spread over them, and whole where one must see all.

What `accelerate launch --use_fsdp --fsdp_version 2` asks for, done with torch's `fully_shard` (arXiv 2304.11277): each
decoder layer is one unit, all else another. Accelerate itself shards on accelerators only; here CPUs do too, by gloo.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from search_r3.errors import InputError


def start_processes() -> Accelerator:
    """Join the other processes that the launcher has started, if any. A second call changes nothing.

    To be called before a model is loaded: transformers would load it on the first process only, for FSDP.
    """
    accelerator = Accelerator(
        mixed_precision="no",  # the loop autocasts by itself: accelerate would also copy all logits to fp32
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return accelerator


def end_processes() -> None:
    """Leave the other processes. To be called last: torch's threads, still running at exit, would abort the process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def settings_of(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """What the launcher says about FSDP; None if the model stays whole.

    Raises:
        InputError: another kind of sharding than FSDP2, or FSDP2 with its weights on the CPU.
    """
    kind = str(accelerator.distributed_type.value)
    if kind in ("DEEPSPEED", "MEGATRON_LM", "TP"):
        raise InputError(f"{kind} is not supported for training; launch it with DDP or FSDP2 (see docs/multi-gpu.md)")
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if accelerator.num_processes == 1 or not (asked or kind == "FSDP"):
        return None
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise InputError(
            f"FSDP of version {plugin.fsdp_version} is not supported for training; set fsdp_version: 2 in accelerate's "
            "configuration (or --fsdp_version 2)"
        )
    if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy":
        raise InputError(
            "FSDP's offloading of parameters is not supported for training; set fsdp_offload_params: false"
        )
    return plugin


def shard(module: nn.Module, accelerator: Accelerator, settings: FullyShardedDataParallelPlugin) -> nn.Module:
    """Spread the module over all processes, in place. One that has `before_sharding` names its units by it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    options: dict[str, Any] = {"mesh": mesh}
    before = getattr(module, "before_sharding", None)
    for unit in before() if before is not None else []:
        fully_shard(unit, reshard_after_forward=settings.reshard_after_forward, **options)
    fully_shard(module, **options)
    return module.to(accelerator.device)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was here."""
    return hasattr(module, "set_reshard_after_backward")  # the class that fully_shard gives a module


def reshard(module: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has gathered, so that `parameters()` are the shards."""
    for part in module.modules():
        if is_sharded(part):
            part.reshard()  # type: ignore[operator]


def whole(value: Any) -> Tensor:
    """A tensor as if it were not spread over processes: for a shard, a collective."""
    tensor = torch.as_tensor(value)
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def write(into: Tensor, values: Tensor) -> None:
    """Write whole values (the same on every process) into a tensor, or into this process's shard of it."""
    if hasattr(into, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        shards: Any = into
        values = values.to(shards.to_local().device, into.dtype)
        shards.to_local().copy_(
            distribute_tensor(values, shards.device_mesh, shards.placements, src_data_rank=None).to_local()
        )
    else:
        into.copy_(values)


def like(values: Tensor, parameter: Tensor) -> Tensor:
    """A copy of whole values that is spread as the parameter is."""
    if not hasattr(parameter, "full_tensor"):
        return values.to(parameter.device, copy=True)
    out = torch.zeros_like(parameter, dtype=values.dtype, requires_grad=False)
    write(out, values)
    return out


def without_weights(model: nn.Module, kept: bool = True) -> Any:
    """A copy of the model that takes no memory: weights on "meta", but the trainable ones real if they are `kept`."""
    memo: dict[int, Any] = {}
    for weight in model.parameters():
        if not (kept and weight.requires_grad):
            memo[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
    return copy.deepcopy(model, memo)

"""Joining the process group, and FSDP2: weights, gradients and optimizer state sharded over the processes.

Implements what `accelerate launch --use_fsdp --fsdp_version 2` requests with torch's `fully_shard` (arXiv 2304.11277):
each decoder layer is one unit, everything else another. Accelerate shards only on accelerators; this also shards on
CPUs, with gloo.
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
    """Join the launcher's process group, if there is one. Further calls have no effect.

    Call it before loading a model: with FSDP, transformers would otherwise load it on the first process only.
    """
    accelerator = Accelerator(
        mixed_precision="no",  # the loop uses autocast itself: accelerate would also convert all logits to fp32
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return accelerator


def end_processes() -> None:
    """Leave the process group. Call it last: torch's threads abort the process if they are still running at exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fsdp_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """The launcher's FSDP settings; None if the model is not sharded.

    Raises:
        InputError: the launcher requests another kind of sharding than FSDP2, or offloading to the CPU.
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
    """Shard the module over all processes, in place. Its `pre_shard_hook`, if any, returns the units to shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    options: dict[str, Any] = {"mesh": mesh}
    hook = getattr(module, "pre_shard_hook", None)
    for unit in hook() if hook is not None else []:
        fully_shard(unit, reshard_after_forward=settings.reshard_after_forward, **options)
    fully_shard(module, **options)
    return module.to(accelerator.device)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has sharded the module."""
    return hasattr(module, "set_reshard_after_backward")  # a method of the class that fully_shard gives a module


def reshard(module: nn.Module) -> None:
    """Free the weights gathered by a forward pass without a backward pass, so that `parameters()` returns shards."""
    for part in module.modules():
        if is_sharded(part):
            part.reshard()  # type: ignore[operator]


def full_tensor(value: Any) -> Tensor:
    """The unsharded tensor. A collective if `value` is a shard."""
    tensor = torch.as_tensor(value)
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_tensor(value: Tensor) -> Tensor:
    """This process's shard of a sharded tensor, or the tensor itself; a view without gradient."""
    own: Any = value.detach()
    return own.to_local() if hasattr(own, "to_local") else own


@torch.no_grad()
def copy_into(into: Tensor, values: Tensor) -> None:
    """Copy unsharded values, equal on every process, into a tensor or into this process's shard of it."""
    if hasattr(into, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        shards: Any = into
        values = values.to(shards.to_local().device, into.dtype)
        shards.to_local().copy_(
            distribute_tensor(values, shards.device_mesh, shards.placements, src_data_rank=None).to_local()
        )
    else:
        into.copy_(values)


def shard_like(values: Tensor, parameter: Tensor) -> Tensor:
    """A copy of unsharded values, sharded like the parameter."""
    if not hasattr(parameter, "full_tensor"):
        return values.to(parameter.device, copy=True)
    out = torch.zeros_like(parameter, dtype=values.dtype, requires_grad=False)
    copy_into(out, values)
    return out


def copy_without_weights(model: nn.Module, keep_trainable: bool = True) -> Any:
    """A copy of the model with its weights on "meta", except the trainable ones if `keep_trainable`."""
    memo: dict[int, Any] = {}
    for weight in model.parameters():
        if not (keep_trainable and weight.requires_grad):
            memo[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
    return copy.deepcopy(model, memo)

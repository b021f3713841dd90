"""Several processes, and FSDP2: weights, gradients and optimizer state sharded over them, and gathered where needed.

What `accelerate launch --use_fsdp --fsdp_version 2` requests, done with torch's `fully_shard` (arXiv 2304.11277): each
decoder layer is one unit, everything else another. Accelerate shards on accelerators only; here gloo shards on CPUs.
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
    """Join the process group of the launcher, if there is one. A second call changes nothing.

    Call it before a model is loaded: for FSDP, transformers would otherwise load it on the first process only.
    """
    accelerator = Accelerator(
        mixed_precision="no",  # the loop uses autocast itself: accelerate would also copy all logits to fp32
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return accelerator


def end_processes() -> None:
    """Leave the process group. Call it last: torch's threads, if still running at exit, abort the process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fsdp_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """The launcher's FSDP settings; None if the model is not sharded.

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
    """Shard the module over all processes, in place. A module's `pre_shard_hook`, if it has one, returns its units."""
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
    return hasattr(module, "set_reshard_after_backward")  # the class that fully_shard gives a module


def reshard(module: nn.Module) -> None:
    """Free what a forward pass without a backward pass has gathered, so that `parameters()` are the shards."""
    for part in module.modules():
        if is_sharded(part):
            part.reshard()  # type: ignore[operator]


def full_tensor(value: Any) -> Tensor:
    """The unsharded tensor: for a shard, a collective."""
    tensor = torch.as_tensor(value)
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_tensor(value: Tensor) -> Tensor:
    """This process's shard of a sharded tensor, or the tensor itself; a view without gradient."""
    own: Any = value.detach()
    return own.to_local() if hasattr(own, "to_local") else own


@torch.no_grad()
def copy_into(into: Tensor, values: Tensor) -> None:
    """Copy unsharded values (the same on every process) into a tensor, or into this process's shard of it."""
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
    """A copy of unsharded values, sharded as the parameter is."""
    if not hasattr(parameter, "full_tensor"):
        return values.to(parameter.device, copy=True)
    out = torch.zeros_like(parameter, dtype=values.dtype, requires_grad=False)
    copy_into(out, values)
    return out


def copy_without_weights(model: nn.Module, keep_trainable: bool = True) -> Any:
    """A copy of the model with its weights on "meta"; the trainable ones are real with `keep_trainable`."""
    memo: dict[int, Any] = {}
    for weight in model.parameters():
        if not (keep_trainable and weight.requires_grad):
            memo[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
    return copy.deepcopy(model, memo)

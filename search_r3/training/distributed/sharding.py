"""Joining the process group, and FSDP2: weights, gradients and optimizer state sharded over the processes.

Implements what `accelerate launch --use_fsdp --fsdp_version 2` requests with torch's `fully_shard` (arXiv 2304.11277):
each decoder layer is one unit, everything else another. Accelerate shards only on accelerators; this also shards on
CPUs, with gloo.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import sys
import traceback
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from torch import Tensor, nn

from search_r3.errors import InputError
from search_r3.training.distributed.watchdog import (
    STEP_SECONDS,
    STEP_VARIABLE,
    seconds_from,
    start_watchdog,
    stop_watchdog,
)

MPI_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables in which launchers give the number of processes."""


def start_processes() -> Accelerator:
    """Join the launcher's process group, if there is one, and watch over it. Further calls have no effect.

    Call it before loading a model: with FSDP, transformers would otherwise load it on the first process only. Several
    processes on a machine without GPUs join over gloo, whether or not the launcher was told to use CPUs.

    Raises:
        InputError: the launcher was asked for several processes and started one, or more than there are GPUs; or a
            timeout of the watchdog is not a number of seconds.
    """
    check_launch(torch.cuda.device_count())
    step = seconds_from(STEP_VARIABLE, STEP_SECONDS)
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    if step < math.inf:  # a little more, as torch does not say which process is waited for
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(seconds=step + 60)))
    accelerator = Accelerator(
        cpu=_launched() > 1 and not torch.accelerator.is_available(),
        mixed_precision="no",  # the loop uses autocast itself: accelerate would also convert all logits to fp32
        kwargs_handlers=handlers,
    )
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    start_watchdog(accelerator.process_index, accelerator.num_processes)
    return accelerator


def check_launch(gpus: int) -> None:
    """Check that the launcher has started the processes it was asked for, and that there are enough GPUs for them.

    Raises:
        InputError: otherwise.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    asked = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ  # as accelerate sets both
    if asked and on_cpu and _launched() == 1:
        raise InputError(
            "accelerate launch was asked for several processes but started one, as it does for CPUs (--cpu, use_cpu) "
            "without an MPI host file; leave --cpu out and give --multi_gpu, which works on CPUs too, or use torchrun "
            "(see docs/multi-gpu.md)"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < gpus < here and not on_cpu:
        raise InputError(
            f"{here} processes were started on this machine, which has {gpus} GPU{'s' * (gpus > 1)}; start one for "
            "each GPU, or set ACCELERATE_USE_CPU=true"
        )


def _launched() -> int:
    """The number of processes that the launcher has started, on all machines."""
    return max(int(os.environ.get(name) or "1") for name in MPI_SIZES)


def end_processes(failed: bool = False) -> None:
    """Leave the process group, and end the other processes too if this one has `failed`.

    Call it last: torch's threads abort the process if they are still running at exit.
    """
    stop_watchdog(failed)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _free_modules()
        torch.distributed.destroy_process_group()


def _free_modules() -> None:
    """Free the DDP modules that the frames of an error hold, and what is in reference cycles.

    Freed after its process group is destroyed, a module joins the group's threads with the GIL held, which one of these
    may be waiting for: the process would never end.
    """
    error = sys.exception()
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()


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

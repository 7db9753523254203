"""The target behind DistributedDataParallel."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from training.distributed.powersgd import PowerSGD
from training.distributed.process_group import World

# The newer name of DDP's setting, where torch has it: the older one warns there.
_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"


_ROUNDED = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


def wrap(
    model: nn.Module, world: World, *, static_graph: bool, sync_bn: bool, compression: str | PowerSGD = "none"
) -> nn.Module:
    """``model`` in DistributedDataParallel; without it in a single process, and where nothing is to be trained.

    ``sync_bn`` first replaces BatchNorm layers by ones whose statistics are over all ranks. ValueError: torch has
    such layers for GPUs only. ``compression``: 'none'; 'bf16' or 'fp16', the type in which ranks send and sum
    gradients; or PowerSGD.
    """
    if not world.distributed:
        return model
    on_cuda = world.device.type == "cuda"
    if sync_bn:
        check_sync_bn(world)
        from timm.layers import convert_sync_batchnorm  # seconds to import, for a rare flag

        model = convert_sync_batchnorm(model)  # unlike torch's it keeps the activation of timm's BatchNormAct
    if not any(p.requires_grad for p in model.parameters()):
        return model
    settings: dict[str, Any] = {
        "device_ids": [world.device] if on_cuda else None,
        "gradient_as_bucket_view": True,
        "static_graph": static_graph,
        # Only running statistics differ between ranks; open_clip's attention masks need no broadcast per forward.
        _SYNC_BUFFERS: any(isinstance(module, _BatchNorm) for module in model.modules()),
    }
    wrapped = DistributedDataParallel(model, **settings)
    if isinstance(compression, PowerSGD):
        wrapped.register_comm_hook(None, compression.hook)
    elif compression in _ROUNDED:
        wrapped.register_comm_hook(None, _ROUNDED[compression])
    return wrapped


def check_sync_bn(world: World) -> None:
    """ValueError: the ranks of ``world`` cannot share BatchNorm statistics."""
    if world.distributed and world.device.type != "cuda":
        raise ValueError(
            "--use-bn-sync needs GPUs: torch cannot synchronize BatchNorm on the CPU; leave the flag out"
        )

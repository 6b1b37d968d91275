"""Student and teacher on many processes: whole in each (DDP), or a part of each parameter in each (FSDP2)."""

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from stillroom.distributed.group import RankGroup
from stillroom.models.hidden_states import backbone, blocks
from stillroom.models.safetensors_io import local_part, materialize


def shard_trained(
    module: nn.Module,
    model: PreTrainedModel,
    projectors: Iterable[nn.Module],
    ranks: RankGroup,
    *,
    precision: torch.dtype = torch.float32,
    reshard: bool = True,
    offload: bool = False,
) -> None:
    """Shards a module that is trained over the mesh: each layer of its model and each projector is a group of its own,
    and all else is one group with the head, which the losses use beside the backbone. Parameters may lie on the meta
    device.

    Gradients are summed and not averaged, since each rank's loss is its part of the step's.

    Args:
        model: the model inside ``module``.
        projectors: modules beside the model, which keep their own precision.
        precision: the type of the model's arithmetic.
    """
    mixed = MixedPrecisionPolicy()
    if precision not in (torch.float32, torch.float64):
        mixed = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    settings = _settings(ranks, offload)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    untied = [embeddings] if _weight(embeddings) is not _weight(head) else []
    for part in (*blocks(model), *untied):
        fully_shard(part, mp_policy=mixed, reshard_after_forward=reshard, **settings)
    for projector in projectors:
        if any(True for _ in projector.parameters()):
            fully_shard(projector, **settings)
    fully_shard(module, mp_policy=mixed, reshard_after_forward=False, **settings)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(module, "within")


def shard_teacher(model: PreTrainedModel, ranks: RankGroup, *, offload: bool) -> None:
    """Shards a teacher's backbone; its head, which the losses use, stays whole in each process."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    whole = set(head.parameters()) if head is not None else set()
    untied = [] if whole & set(embeddings.parameters()) else [embeddings]
    settings = _settings(ranks, offload)
    for part in (*blocks(model), *untied):
        fully_shard(part, reshard_after_forward=True, **settings)
    fully_shard(backbone(model), reshard_after_forward=True, ignored_params=whole, **settings)


def _settings(ranks: RankGroup, offload: bool) -> dict[str, Any]:
    return {"mesh": ranks.mesh, "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy()}


def reshard(module: nn.Module) -> None:
    """Takes a sharded module's parameters apart again. After a forward pass without a backward pass some stay whole:
    its own, and with ``reshard: false`` those of every layer."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def materialize_sharded(module: nn.Module, device: str, *, offload: bool) -> None:
    """Gives the parameters of a sharded module memory: this process's parts."""
    materialize(module, "cpu" if offload else device)
    if offload:  # what is not sharded stays on the device
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(device)
            for name, parameter in part.named_parameters(recurse=False):
                if not isinstance(parameter, DTensor):
                    part._parameters[name] = nn.Parameter(parameter.to(device), parameter.requires_grad)


def _weight(module: nn.Module | None) -> Tensor | None:
    """Returns the weight of embeddings or of a head, without an adapter beside it."""
    weight: Any = getattr(getattr(module, "base_layer", module), "weight", None)
    return weight


def replicate(module: nn.Module, ranks: RankGroup, *, has_unused: bool) -> DistributedDataParallel:
    """Wraps a module that is whole on each rank. Gradients are summed, since each rank's loss is its part.

    Args:
        has_unused: whether some parameters may get no gradient in a step.
    """
    assert ranks.mesh is not None
    buffers = "forward_sync_buffers"  # as PyTorch calls from 2.13 on what was broadcast_buffers
    if buffers not in inspect.signature(DistributedDataParallel).parameters:
        buffers = "broadcast_buffers"
    settings: dict[str, Any] = {buffers: False}  # no buffer changes in training
    ddp = DistributedDataParallel(
        module,
        process_group=ranks.mesh.get_group(),
        **settings,
        gradient_as_bucket_view=True,
        find_unused_parameters=has_unused,
    )

    def sum_bucket(group, bucket):  # the default hook averages
        work: Any = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    ddp.register_comm_hook(ranks.mesh.get_group(), sum_bucket)
    return ddp


def gradients_summed_later(forward: Callable[..., Any], later: bool) -> AbstractContextManager[None]:
    """Returns a context in which gradients stay in each process where ``later``, to be summed with those of the next
    backward pass. Sharded gradients are summed each time: a whole gradient would need the memory that sharding saves.
    """
    return forward.no_sync() if later and isinstance(forward, DistributedDataParallel) else nullcontext()


@torch.no_grad()
def squared_norm(gradients: list[Tensor], ranks: RankGroup, device: torch.device) -> Tensor:
    """Returns this process's share of the squared norm of all gradients, a float64 number [] on ``device``: the shares
    of all processes add up to it. A part that lies in several processes counts once. Where the gradients lie on
    ``device``, the host does not wait for them."""
    parts, copies = [], []
    for gradient in gradients:
        if not local_part(gradient).numel():
            continue
        parts.append(local_part(gradient))
        sharded = 1
        if isinstance(gradient, DTensor):
            for dimension, placement in enumerate(gradient.placements):
                sharded *= gradient.device_mesh.size(dimension) if placement.is_shard() else 1
        copies.append(ranks.world_size // sharded)
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.stack(torch._foreach_norm(parts)).to(device)  # pyright: ignore[reportPrivateImportUsage]
    counts = torch.tensor(copies, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return (norms.double().square() / counts).sum()

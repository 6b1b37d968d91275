"""Parts: which rows of a parameter this process holds."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def own_rows(parameter: Tensor) -> slice:
    """The rows (of the first dimension) of a parameter that lie in this process; all where it is not sharded.

    FSDP2 shards as ``torch.chunk`` does: as many rows in each part as in the first, and fewer or none in the last ones.
    """
    if not parameter.ndim:
        return slice(0, 1)
    if not isinstance(parameter, DTensor):
        return slice(0, parameter.shape[0])
    assert all(placement.is_shard(0) for placement in parameter.placements if placement.is_shard())
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    start = min(offset[0], parameter.shape[0])
    return slice(start, start + shape[0])


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process: itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill_local(parameter: Tensor, rows: Tensor) -> None:
    """Sets this process's part of a parameter: ``rows`` are those of ``own_rows``."""
    local_part(parameter).copy_(rows.reshape(local_part(parameter).shape))


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor whole, put together from the parts of all processes, each of which must ask for it."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if tensor.device.type != tensor.device_mesh.device_type:  # offloaded
        return full_tensor(tensor.to(tensor.device_mesh.device_type))
    return tensor.full_tensor().detach()


def materialize(module: nn.Module, device: torch.device | str) -> None:
    """Gives parameters without memory ("meta") some, on ``device``, with whatever lies there; others move there."""

    def there(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    module._apply(there)


def named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers by their names in the model's files, each name of a tied one.

    Adapters are left out, and the weights beside them have the names that they had before.
    """
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not is_adapter(name):
            yield name.replace(".base_layer.", "."), tensor


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is part of a low-rank adapter."""
    return ".lora_" in name

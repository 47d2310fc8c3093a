"""DTensors, without importing what is slow to import where there is none."""

import sys

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # where it is not imported, no DTensor exists
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor on this rank, without grad; another tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        shard = tensor.to_local()  # type: ignore[attr-defined]
    return shard.wait() if hasattr(shard, "wait") else shard  # one that a collective still writes


def same_placement(a: Tensor, b: Tensor) -> bool:
    """Whether the shards of two tensors of one shape hold the same elements; two tensors that are no DTensors do."""
    if is_dtensor(a) and is_dtensor(b):
        return (a.device_mesh, a.placements) == (b.device_mesh, b.placements)  # type: ignore[attr-defined]
    return is_dtensor(a) == is_dtensor(b)


def whole(tensor: Tensor) -> Tensor:
    """A DTensor's value on every rank, without grad; another tensor itself. Collective."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()  # type: ignore[attr-defined]


def has_whole_channels(param: Tensor) -> bool:
    """Whether a rank has rows of the parameter viewed as [out, rest], and of a row all of it."""
    placements = param.placements if is_dtensor(param) else ()  # type: ignore[attr-defined]
    return all(placement.is_replicate() or getattr(placement, "dim", None) == 0 for placement in placements)


def gathered_channels(rows: Tensor, param: Tensor) -> Tensor:
    """[C, ...] from the ranks' rows of it, which are those they have of the parameter [C, ...]. Collective of a DTensor."""
    if not is_dtensor(param):
        return rows
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    shape = torch.Size([param.shape[0], *rows.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return whole(DTensor.from_local(rows.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride))


def own_channels(values: Tensor, param: Tensor) -> Tensor:
    """The rows of [C, ...], which every rank has, that this rank has of the parameter [C, ...]."""
    if not is_dtensor(param):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local(everywhere.redistribute(mesh, placements))


def placed_like(shard: Tensor, param: Tensor) -> Tensor:
    """The tensor whose shard on this rank is ``shard``, if the parameter is a DTensor; ``shard`` otherwise."""
    if not is_dtensor(param):
        return shard
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())

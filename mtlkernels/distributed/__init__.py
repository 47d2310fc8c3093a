"""Training in several processes, on torch.distributed."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtensor import is_dtensor
from .ranks import Ranks, check_single_process
from .replicated import Replicated
from .sharded import Sharded

__all__ = ["Ranks", "Replicated", "Sharded", "check_single_process", "ranks_of"]


def ranks_of(
    params: Sequence[Tensor], process_group: Any = None, mesh: Any = None, name: Callable[[Tensor], str] = str
) -> Ranks:
    """The ranks that train the parameters together.

    Args:
        params: all that the optimizer holds.
        process_group: of plain parameters: the ranks whose losses are averaged.
        mesh: the same as a device mesh of one dimension; of DTensors: one that has the ranks of all, None for the largest.
        name: names a parameter.

    Raises:
        ValueError: plain parameters in a world of several processes with neither, or one that does not fit.
    """
    if any(is_dtensor(param) for param in params):
        if process_group is not None:
            raise ValueError(
                "process_group is given, but a parameter is a DTensor, whose mesh says what is reduced; pass "
                "process_group=None, and mesh=None or a mesh that has the ranks of every parameter."
            )
        if mesh is not None and not _is_mesh(mesh):
            raise ValueError(f"mesh is a {type(mesh).__name__}; pass a torch.distributed.device_mesh.DeviceMesh, or None.")
        return Sharded(params, mesh, name)
    if process_group is not None and mesh is not None:
        raise ValueError("process_group and mesh are both given; pass one of them.")
    if mesh is not None:
        if not _is_mesh(mesh):
            raise ValueError(f"mesh is a {type(mesh).__name__}; pass a torch.distributed.device_mesh.DeviceMesh, or None.")
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh has {mesh.ndim} dimensions, and plain parameters are averaged over one; pass a slice, as mesh['dp']."
            )
        process_group = mesh.get_group()
    if process_group is None:
        check_single_process(params)
        return Ranks()
    if not (torch.distributed.is_available() and isinstance(process_group, torch.distributed.ProcessGroup)):
        raise ValueError(
            f"process_group is a {type(process_group).__name__}; pass a torch.distributed.ProcessGroup that has this rank, as "
            "torch.distributed.group.WORLD after init_process_group."
        )
    return Replicated(process_group, name) if torch.distributed.get_world_size(process_group) > 1 else Ranks()


def _is_mesh(value: object) -> bool:
    module = sys.modules.get("torch.distributed.device_mesh")
    return module is not None and isinstance(value, module.DeviceMesh)

"""Distributed training: refused in this version, so that ranks never diverge in silence."""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor


def check_single_process(params: Iterable[Tensor] = (), process_group: object = None, mesh: object = None) -> None:
    """Raises a ``ValueError`` where training would span more than one process.

    Args:
        params: the parameters about to be trained; a DTensor among them means a device mesh.
        process_group: what the caller passed for it.
        mesh: what the caller passed for it.
    """
    for name, value in (("process_group", process_group), ("mesh", mesh)):
        if value is not None:
            raise ValueError(f"{name} is given, but distributed training is not supported in this version; pass {name}=None.")
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError(
            f"process_group is None in a world of {torch.distributed.get_world_size()} processes, which would diverge; "
            "distributed training is not supported in this version, train in one process."
        )
    tensor_module = sys.modules.get("torch.distributed.tensor")  # not imported: no DTensor exists, and importing it is slow
    if tensor_module is None:
        return
    for n, param in enumerate(params):
        if isinstance(param, tensor_module.DTensor):
            raise ValueError(
                f"parameter {n} of the optimizer, of shape {tuple(param.shape)}, is a DTensor, but distributed training is not "
                "supported in this version; train on plain parameters."
            )

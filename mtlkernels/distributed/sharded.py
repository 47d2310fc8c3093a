"""Training of DTensor parameters: FSDP2, HSDP, tensor parallelism and mixes of them."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtensor import is_dtensor, local, placed_like, same_placement
from ..gradients import update_buffers
from ..granularity import Problems
from .ranks import Ranks, Row, all_reduced, gathered_objects


class Sharded(Ranks):
    """Parameters that are DTensors of one device mesh (FSDP2, HSDP, tensor parallelism and mixes), and plain ones that every
    rank holds alike (the norms of a tensor-parallel model).

    What produced the gradients has reduced them; their shards are the parts. A rank's summand of a Gram is divided by the
    number of ranks that hold the same shard, so that one sum over the whole mesh is right for every mix of placements.

    Args:
        params: all parameters.
        mesh: has every rank that holds one. None: the largest mesh of a parameter.
        name: names a parameter.
    """

    hides_leaves = True

    def __init__(self, params: Sequence[Any], mesh: Any, name: Callable[[Tensor], str]) -> None:
        super().__init__(name)
        self.mesh = mesh or max((p.device_mesh for p in params if is_dtensor(p)), key=lambda m: m.size())
        self._members = set(self.mesh.mesh.flatten().tolist())
        coordinate = self.mesh.get_coordinate()
        if coordinate is None:
            raise ValueError(f"mesh has no place for rank {torch.distributed.get_rank()}; pass the mesh of the parameters.")
        self.size = self.mesh.size()
        self.is_first = not any(coordinate)
        whole = self.size == torch.distributed.get_world_size()
        self._groups = [torch.distributed.group.WORLD] if whole else self.mesh.get_all_groups()  # one all-reduce for each
        self.check(params)

    def check(self, params: Iterable[Any] = ()) -> None:
        for param in params:
            if not is_dtensor(param):
                continue
            own = set(param.device_mesh.mesh.flatten().tolist())
            if not own <= self._members or self.size % len(own):
                raise ValueError(
                    f"the {self._name(param)} is on ranks {sorted(own)}, which are no part of the mesh of ranks "
                    f"{sorted(self._members)}; pass mesh=the device mesh that has the ranks of every parameter."
                )
            if any(placement.is_partial() for placement in param.placements):
                raise ValueError(f"the {self._name(param)} is placed {param.placements}; redistribute it to Replicate().")

    def check_gradients(self, source: str | None) -> None:
        if source == "autograd":
            raise ValueError(
                'gradients is "autograd", which gives none for DTensors under fully_shard; pass gradients=None, or "backward".'
            )

    def compare_row(self, row: Row, params: Sequence[Tensor]) -> None:
        super().compare_row(row, params)
        plain = {n: grad.double() for n, grad in enumerate(row) if grad is not None and not is_dtensor(params[n])}
        if not plain:
            return
        here = {n: [grad.sum().item(), grad.norm().item()] for n, grad in plain.items()}
        by_rank = torch.tensor([list(there.values()) for there in self.objects(here)])  # [ranks, N, 2]
        differ = by_rank.amax(0) - by_rank.amin(0) > _rounding(row) * by_rank[..., 1:].amax(0)
        for n, wrong in zip(plain, differ.any(1).tolist(), strict=True):
            if wrong:
                raise RuntimeError(
                    f"the gradient of the {self._name(params[n])}, which is no DTensor, differs between ranks; shard its "
                    "module with fully_shard, too, or distribute it with parallelize_module."
                )

    def scatter(self, row: Row, params: Sequence[Tensor]) -> list[Tensor | None]:
        return [self._shard(grad, param) for grad, param in zip(row, params, strict=True)]

    def gram(self, problems: Problems, rows: Sequence[Row], params: Sequence[Tensor]) -> Tensor:
        replicas = [self._replicas(param) for param in params]
        kinds = sorted(set(replicas)) or [1]
        if len(kinds) == 1:
            return problems.gram(rows) / kinds[0]
        of_kind = [[[g if r == kind else None for g, r in zip(row, replicas, strict=True)] for row in rows] for kind in kinds]
        grams = [problems.gram(part) / kind for part, kind in zip(of_kind, kinds, strict=True)]
        return torch.stack([gram.to(params[0].device) for gram in grams]).sum(0)

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        return all_reduced(tensors, self._groups)

    def buffers(self, rows: Sequence[Row], params: Sequence[Tensor]) -> list[Tensor | None]:
        return update_buffers(rows, [local(param) for param in params])

    def gather(self, parts: Row, params: Sequence[Tensor]) -> list[Tensor | None]:
        return [None if part is None else placed_like(part, param) for part, param in zip(parts, params, strict=True)]

    def whole_squares(self, squares: Tensor, params: Sequence[Tensor]) -> Tensor:
        replicas = [self._replicas(param) for param in params]
        if len(set(replicas)) == 1:
            return self.sum(squares / replicas[0])[0]
        return self.sum(torch.stack(torch._foreach_div(squares.unbind(), replicas)))[0]  # no copy to the device

    def objects(self, value: object) -> list[Any]:
        values = [value]
        for group in self._groups:
            values = [v for part in gathered_objects(values, group) for v in part]
        return values

    def place_of(self, param: Any) -> object:
        if not is_dtensor(param):
            return None
        where = zip(param.device_mesh.get_coordinate(), param.placements, strict=True)
        return tuple(None if placement.is_replicate() else index for index, placement in where)

    def _replicas(self, param: Any) -> int:
        """How many ranks hold the same shard."""
        if not is_dtensor(param):
            return self.size
        mesh = param.device_mesh
        shards = [mesh.size(dim) for dim, placement in enumerate(param.placements) if not placement.is_replicate()]
        return self.size // math.prod(shards)

    def _shard(self, grad: Tensor | None, param: Any) -> Tensor | None:
        if grad is None or not is_dtensor(param):
            return grad
        if not same_placement(grad, param):
            raise ValueError(
                f"the gradient of the {self._name(param)} is placed {getattr(grad, 'placements', None)}, the parameter "
                f"{param.placements}; wrap its module with fully_shard, or add param.register_hook(lambda grad: "
                "grad.redistribute(param.device_mesh, param.placements))."
            )
        return local(grad)


def _rounding(row: Row) -> float:
    """Relative difference of sums over a gradient that ranks compute each for themselves."""
    eps = max((torch.finfo(grad.dtype).eps for grad in row if grad is not None), default=0.0)
    return min(1024 * eps, 0.05)

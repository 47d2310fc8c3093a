"""Data-parallel training of plain parameters, as under DistributedDataParallel."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtensor import is_dtensor
from .ranks import Ranks, Row, all_reduced, gathered_objects


class Replicated(Ranks):
    """Plain parameters, of which every rank of a process group holds the whole (DDP).

    A row is reduce-scattered in buckets while the next task's backward pass runs, so rank r gets the r-th of ``size`` equal
    slices of every flattened parameter; one combined row is all-gathered. That moves K + 1 times the parameters' bytes where K
    tasks reach them, 2 where one does, in place of 2 K for an all-reduce of every row, and K rows never exist in full.

    With P bytes of shared parameters and Q of others, each parameter padded to a multiple of 16 n bytes, a rank of a ring of n
    sends (n - 1) / n ((K + 1) P + 2 Q) bytes a step, and the small all-reduce of :meth:`decisive`.
    """

    communicates = True
    BUCKET = 25 * 2**20
    """Bytes of a row that one collective moves."""

    def __init__(self, group: "torch.distributed.ProcessGroup", name: Callable[[Tensor], str]) -> None:
        super().__init__(name)
        self.group = group
        self.size = torch.distributed.get_world_size(group)
        self.is_first = torch.distributed.get_rank(group) == 0
        self.scale = 1 / self.size
        self._pending: list[tuple[torch.distributed.Work, Tensor]] = []  # with what it reads, kept alive

    def check_gradients(self, source: str | None) -> None:
        if source == "backward":
            raise ValueError(
                'gradients is "backward", under which DistributedDataParallel would reduce in every backward pass, too; pass '
                "gradients=None, or wrap the model with fully_shard in place of it."
            )

    def check(self, params: Iterable[Tensor] = ()) -> None:
        for param in params:
            if is_dtensor(param):
                raise ValueError(f"the {self._name(param)} is a DTensor; pass process_group=None and mesh=None with DTensors.")

    def scatter(self, row: Row, params: Sequence[Tensor]) -> list[Tensor | None]:
        self.wait()  # one row in flight is enough: its full gradients are freed here
        for grad, param in zip(row, params, strict=True):
            if grad is not None and (grad.layout != torch.strided or grad.is_complex()):
                raise ValueError(
                    f"the gradient of the {self._name(param)} is {grad.layout}, {grad.dtype}; the optimizer takes dense, real "
                    "ones: build the layer with sparse=False, or on torch.view_as_real."
                )
        result: list[Tensor | None] = list(row)  # empty tensors have nothing to send
        for bucket in _buckets(row, self.BUCKET):
            grads = _chosen(row, bucket)
            slices = torch.cat([self._slices(grad) for grad in grads], 1)
            part = slices.new_empty(slices.shape[1])
            work = _reduce_scatter(part, slices.view(-1), group=self.group, async_op=True)
            self._pending.append((work, slices))
            for n, piece in zip(bucket, part.split([self._slice_size(grad) for grad in grads]), strict=True):
                result[n] = piece
        return result

    def wait(self) -> None:
        for work, _ in self._pending:
            work.wait()
        self._pending.clear()

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        return all_reduced(tensors, [self.group])

    def buffers(self, rows: Sequence[Row], params: Sequence[Tensor]) -> list[Tensor | None]:
        return [next((part for part in column if part is not None), None) for column in zip(*rows, strict=True)]

    def gather(self, parts: Row, params: Sequence[Tensor]) -> list[Tensor | None]:
        flights = []
        for bucket in _buckets(parts, self.BUCKET // self.size):
            part = torch.cat(_chosen(parts, bucket))
            slices = part.new_empty(self.size, len(part))
            work = _all_gather(slices.view(-1), part, group=self.group, async_op=True)
            flights.append((bucket, part, slices, work))
        result: list[Tensor | None] = list(parts)
        for bucket, _, slices, work in flights:
            work.wait()
            for n, own in zip(bucket, slices.split([own.numel() for own in _chosen(parts, bucket)], 1), strict=True):
                values = own.reshape(-1)[: params[n].numel()].view(params[n].shape)
                dense = params[n].is_contiguous()
                result[n] = values if dense else torch.empty_like(params[n], dtype=own.dtype).copy_(values)
        return result

    def held(self, parts: Row, params: Sequence[Tensor]) -> list[Tensor | None]:
        return self.gather(parts, params)

    def objects(self, value: object) -> list[Any]:
        return gathered_objects(value, self.group)

    def _slice_size(self, grad: Tensor) -> int:
        """Elements of a rank's slice: a multiple of 16 bytes, so that every slice in a bucket is aligned."""
        step = 16 // grad.element_size()
        return -(-grad.numel() // (self.size * step)) * step

    def _slices(self, grad: Tensor) -> Tensor:
        """[size, slice], zeros at the end."""
        flat, length = grad.reshape(-1), self._slice_size(grad) * self.size
        if flat.numel() != length:
            flat = torch.nn.functional.pad(flat, (0, length - flat.numel()))
        return flat.view(self.size, -1)


def _buckets(row: Row, limit: int) -> list[list[int]]:
    """Indices of tensors of one dtype and device, together up to ``limit`` bytes, or one tensor."""
    buckets: list[list[int]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    for n, tensor in enumerate(row):
        if tensor is None or tensor.numel() == 0:
            continue
        kind = tensor.dtype, tensor.device
        bucket, filled = open_buckets.get(kind, ([], limit))
        if filled + tensor.nbytes > limit:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(n)
        open_buckets[kind] = bucket, filled + tensor.nbytes
    return buckets


def _chosen(row: Row, indices: Sequence[int]) -> list[Tensor]:
    return [tensor for tensor in (row[n] for n in indices) if tensor is not None]


def _collective(new: str, old: str) -> Any:
    """A collective of one tensor under the name that this torch has for it."""
    return getattr(torch.distributed, new, None) or getattr(torch.distributed, old, None)


_reduce_scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")  # the former from torch 2.14 on
_all_gather = _collective("all_gather_single", "all_gather_into_tensor")

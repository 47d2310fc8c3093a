"""How task gradients reach the kernels of a rank, and how results return.

Everything that decides an update is a function of one small all-reduced vector, so every rank decides the same.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtensor import is_dtensor
from ..gradients import update_buffers
from ..granularity import Problems
from .agreement import Entries, require_equal

Row = Sequence[Tensor | None]
"""Gradients of one task, one for each of some parameters; None where it has none."""


class Ranks:
    """The processes that train together; this class: only this one, where everything stays as it is.

    In the order of a step: each row of gradients goes through :meth:`scatter` as soon as it is there, which gives this rank's
    part of it; :meth:`wait`; :meth:`gram` of the parts; :meth:`sum` over the ranks; the combination of the parts into
    :meth:`buffers`; :meth:`gather`. A part is a plain tensor, and sum_k w_k of the parts is the part of sum_k w_k.

    Attributes:
        size: how many ranks there are.
        is_first: whether this is the one whose random numbers count.
        scale: what a part is to be multiplied by: 1 / ``size`` where parts are sums over the ranks, of whose losses the
            gradient is the mean.
        communicates: whether :meth:`scatter` moves gradients between ranks.
        hides_leaves: whether a parameter need not be the leaf of the graph that it is in (FSDP2).
    """

    size = 1
    is_first = True
    scale = 1.0
    communicates = False
    hides_leaves = False

    def __init__(self, name: Callable[[Tensor], str] = str) -> None:
        self._name = name

    def check(self, params: Iterable[Tensor] = ()) -> None:
        """Raises a ``ValueError`` where training would span processes that this object does not know of."""
        check_single_process(params)

    def check_gradients(self, source: str | None) -> None:
        """Raises a ``ValueError`` for a source of gradients that would give wrong ones."""

    def scatter(self, row: Row, params: Sequence[Tensor]) -> list[Tensor | None]:
        """This rank's part of one task's gradients of ``params``, to be read after :meth:`wait`. Collective."""
        return list(row)

    def wait(self) -> None:
        """Returns when what :meth:`scatter` gave can be read."""

    def gram(self, problems: Problems, rows: Sequence[Row], params: Sequence[Tensor]) -> Tensor:
        """This rank's summand of the Grams of ``params``; ``rows`` are parts."""
        return problems.gram(rows)

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """Each tensor summed over the ranks, in one all-reduce of float64 for all. The same bits on every rank."""
        return list(tensors)

    def mean(self, *tensors: Tensor) -> list[Tensor]:
        """Each tensor's mean over the ranks, as :meth:`sum`; as they are in one process."""
        return list(tensors) if self.size == 1 else [total / self.size for total in self.sum(*tensors)]

    def decisive(
        self, gram: Tensor, own_gram: Tensor | None, losses: Tensor, seed: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """What the weights and every decision of a step are made from, the same on every rank, in one :meth:`sum`.

        Args:
            gram: this rank's summand of the shared parameters' Grams, float64.
            own_gram: that of the others' Gram; None where there are none.
            losses: float64 [K] of this rank.
            seed: int64 [S], drawn on this rank; None where nothing is random.

        Returns:
            Grams of the mean gradients, the mean losses, and the first rank's seeds.
        """
        if self.size == 1:
            return gram, own_gram, losses, seed
        seeds = losses.new_zeros(2, 0 if seed is None else len(seed))
        if seed is not None and self.is_first:
            seeds = torch.stack([seed >> 32, seed & 0xFFFFFFFF]).double()  # exact, as int64 is not
        own = losses.new_zeros(0) if own_gram is None else own_gram
        gram, own, losses, seeds = self.sum(gram, own, losses, seeds)
        high, low = seeds.long()
        return (
            gram * self.scale**2,
            None if own_gram is None else own * self.scale**2,
            losses / self.size,
            None if seed is None else high << 32 | low,
        )

    def scaled(self, weights: Tensor) -> Tensor:
        """The weights of parts."""
        return weights if self.scale == 1 else weights * self.scale

    def buffers(self, rows: Sequence[Row], params: Sequence[Tensor]) -> list[Tensor | None]:
        """Where the combination of the parts goes, as :func:`mtlkernels.gradients.update_buffers` says."""
        return update_buffers(rows, params)

    def gather(self, parts: Row, params: Sequence[Tensor]) -> list[Tensor | None]:
        """What ``.grad`` becomes, from every rank's part of it. Collective."""
        return list(parts)

    def held(self, parts: Row, params: Sequence[Tensor]) -> list[Tensor | None]:
        """Of a row that :meth:`scatter` gave, what a rank holds of the parameters: all of it, or its shards. Collective."""
        return list(parts)

    def whole_squares(self, squares: Tensor, params: Sequence[Tensor]) -> Tensor:
        """Squared norms [N] of whole tensors like the parameters from those of what a rank holds of them. Collective."""
        return squares

    def objects(self, value: object) -> list[Any]:
        """``value`` of every rank. Reads the device; for checks."""
        return [value]

    def place_of(self, param: Tensor) -> object:
        """Ranks with the same place must hold the same values of the parameter."""
        return None

    def require_equal(self, entries: Entries) -> None:
        """Raises a ``RuntimeError`` on every rank where the ranks differ: {what: (place, value)}. Collective."""
        require_equal(self.objects(entries))

    def compare_row(self, row: Row, params: Sequence[Tensor]) -> None:
        """As :meth:`require_equal`, of what :meth:`scatter` takes for granted of a row. Collective."""
        missing = [n for n, grad in enumerate(row) if grad is None]
        dtypes = sorted({str(grad.dtype) for grad in row if grad is not None})
        self.require_equal(
            {
                "parameters without a gradient": (None, ", ".join(self._name(params[n]) for n in missing) or "none"),
                "dtypes of the gradients": (None, ", ".join(dtypes)),
            }
        )


def check_single_process(params: Iterable[Tensor] = (), process_group: object = None, mesh: object = None) -> None:
    """Raises a ``ValueError`` where training would span more than one process.

    Args:
        params: the parameters about to be trained; a DTensor among them means a device mesh.
        process_group: what the caller passed for it.
        mesh: what the caller passed for it.
    """
    for name, value in (("process_group", process_group), ("mesh", mesh)):
        if value is not None:
            raise ValueError(f"{name} is given, but distributed training is not supported here; pass {name}=None.")
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError(
            f"process_group is None in a world of {torch.distributed.get_world_size()} processes, which would diverge; pass "
            "process_group=torch.distributed.group.WORLD, or the group of the ranks that train together."
        )
    for n, param in enumerate(params):
        if is_dtensor(param):
            raise ValueError(
                f"parameter {n} of the optimizer, of shape {tuple(param.shape)}, is a DTensor, which this optimizer was not "
                "made for; train on plain parameters."
            )


def all_reduced(tensors: Sequence[Tensor], groups: Sequence[Any]) -> list[Tensor]:
    """Each tensor as float64, summed over each of the groups in turn, in one all-reduce a group."""
    flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
    for group in groups:
        torch.distributed.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def gathered_objects(value: object, group: Any) -> list[Any]:
    """``value`` of every rank of the group."""
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values

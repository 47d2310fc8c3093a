"""Task gradients of micro-batches, summed until one update is made of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..gradients import Rows, own_memory
from .roles import Task


class MicroBatch(NamedTuple):
    """What the backward passes of a micro-batch, or of a whole batch, give."""

    tasks: tuple[Task, ...]
    losses: list[Tensor | None]
    """Unscaled, in the order of the tasks; None for an absent one."""
    rows: Rows
    """Those of the shared parameters, then one for each task of the others. The lists hold the only references."""
    params: list[list[Tensor]]
    """What the gradients of each row are of."""
    scale: Tensor | None
    """What the gradients are multiplied by; None: 1."""


class Accumulated(NamedTuple):
    """Sums over the micro-batches since the last update. Nothing is averaged.

    Replaced as a whole, so that a failed call leaves it as it was; :meth:`plus` writes into the gradients it holds when all
    that can fail has run. Gradients are summed in their dtype, as in ``.grad``.
    """

    batches: int = 0
    losses: tuple[Tensor | None, ...] = ()
    rows: tuple[dict[Tensor, Tensor], ...] = ()
    """For each row: parameter -> the sum of its gradients, a buffer that keeps its address until the update."""
    scale: Tensor | None = None

    def plus(self, batch: MicroBatch) -> "Accumulated":
        """These sums and a micro-batch. A gradient that nobody else can see becomes the buffer, without a copy."""
        rows = self._sums(batch, in_place=True)
        pairs = [zip(params, row, strict=True) for params, row in zip(batch.params, rows, strict=True)]
        held = tuple({param: grad for param, grad in row if grad is not None} for row in pairs)
        return Accumulated(self.batches + 1, tuple(self._losses(batch)), held, batch.scale)

    def added_to(self, batch: MicroBatch) -> MicroBatch:
        """The last micro-batch with these sums, in its own memory: what is held stays, should the update fail."""
        if not self.batches:
            return batch
        return batch._replace(losses=self._losses(batch), rows=self._sums(batch, in_place=False))

    def _sums(self, batch: MicroBatch, in_place: bool) -> Rows:
        """held * scale / scale before + gradient, in one pass.

        The quotient is 1 or a power of two of a ``GradScaler`` that was updated between; the host does not wait to know.
        """
        rescales = self.scale is not None or batch.scale is not None
        result: Rows = []
        held: list[Tensor | None] = []
        added: list[Tensor | None] = []
        out: list[Tensor] = []
        for r, (row, params) in enumerate(zip(batch.rows, batch.params, strict=True)):
            sums: list[Tensor | None] = []
            for param, grad, own in zip(params, row, own_memory(row), strict=True):
                before = self.rows[r].get(param) if self.batches else None
                if before is None:
                    target = own if in_place else grad
                elif in_place:
                    target = before
                else:
                    target = torch.empty_like(before) if own is None else own
                sums.append(target)
                done = target is grad if before is None else target is before and grad is None and not rescales
                if target is not None and not done:
                    held.append(before)
                    added.append(grad)
                    out.append(target)
            result.append(sums)
        if out:
            one = torch.ones((), dtype=torch.float64, device=out[0].device)
            now, before_now = (one if scale is None else scale.double() for scale in (batch.scale, self.scale))
            ops.combine([held, added], torch.stack([now / before_now, one]), out=out)
        return result

    def _losses(self, batch: MicroBatch) -> list[Tensor | None]:
        before = self.losses or [None] * len(batch.losses)
        return [_total(*pair) for pair in zip(before, batch.losses, strict=True)]


def _total(before: Tensor | None, loss: Tensor | None) -> Tensor | None:
    """Their sum, float64; None counts as nothing."""
    if loss is None:
        return before
    loss = loss.detach().reshape(()).double()
    return loss if before is None else before + loss.to(before.device)

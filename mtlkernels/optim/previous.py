"""Weights of the previous Gram: the update is written in the read of the gradients that this Gram takes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ..checks import TaskGradients
from ..gradients import Rows, check_dense
from ..gram_combine import gram_combine_
from ..granularity import Problems
from ..weightings import Elementwise, MemoryWeighting, Weighting
from ..weightings.cross.base import of_both

if TYPE_CHECKING:
    from .multitask import MultiTaskOptimizer

WeightsFrom = Literal["current", "previous"]


def check_previous(method: Weighting | Elementwise, loss_only: bool, options: Mapping[str, object]) -> None:
    """Raises a ``ValueError`` for what ``weights_from="previous"`` of :class:`MultiTaskOptimizer` rules out."""
    name = type(method).__name__
    if loss_only or isinstance(method, Elementwise):
        raise ValueError(
            f'weights_from is "previous", but {name} has no weights of a Gram and takes one pass as it is; pass '
            'weights_from="current".'
        )
    if isinstance(method, MemoryWeighting):
        raise ValueError(
            f'weights_from is "previous", but {name} weighs memories of gradients, which move by the Gram of this step; pass '
            'weights_from="current".'
        )
    if options["per"] != "model":
        raise ValueError('weights_from is "previous": one read has one set of weights; pass per="model".')
    if options["on_nonfinite"] == "drop_task":
        raise ValueError(
            'weights_from is "previous": the update is written before a task is known to be not finite, so that none can be '
            'dropped from it; pass on_nonfinite="skip" or "raise".'
        )


class OneRead(Problems):
    """The problem of the whole model, the combination of whose rows is written in the read that its Gram takes.

    Args:
        tensors: the N parameters.
        buffers: N tensors for the combination, None where there is none.
        weights: float64, one of each row.
    """

    def __init__(self, tensors: Sequence[Tensor], buffers: list[Tensor | None], weights: Tensor) -> None:
        super().__init__("model", tensors)
        self.buffers, self.weights = buffers, weights

    @classmethod
    def of(
        cls, optimizer: "MultiTaskOptimizer", rows: Rows, tasks: Sequence[object], weights: Tensor, factor: Tensor | None
    ) -> "OneRead":
        """Of the shared parameters' rows, with weights [K] of the tasks; the combination is divided by ``factor``."""
        shared, ranks = optimizer._roles.shared, optimizer.ranks
        try:
            buffers = ranks.buffers(rows, shared)
        except Exception:
            check_dense(tasks, rows, shared, optimizer.name_of)
            raise
        of_rows = weights if len(rows) == len(weights) else of_both(weights)
        return cls(shared, buffers, ranks.scaled(of_rows if factor is None else of_rows / factor))

    def gram(self, rows: TaskGradients) -> Tensor:
        return gram_combine_(self.buffers, rows, self.weights)

    def finish(self, applied: Tensor, max_norm: float | None) -> list[Tensor | None]:
        """The combination times ``applied``, [1], in one more pass over it where it is clipped.

        Otherwise that is 1, or NaN where the update is not finite, which shows in one element, where ``SkipFlag`` looks.
        """
        if max_norm is not None:
            return self.combine([self.buffers], applied, self.buffers)
        written = next((buffer for buffer in self.buffers if buffer is not None and buffer.numel()), None)
        if written is not None:
            written[(0,) * written.dim()].mul_(applied[0])
        return self.buffers

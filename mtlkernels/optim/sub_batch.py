"""Weights from the gradients of a sub-batch, with an estimate of their Gram's error."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..gradients import Rows, Source, autograd_nodes, check_graph, task_gradients, weighted_gradients
from .gram_source import GramSource
from .info import StepInfo
from .losses import Losses, order_losses
from .roles import Task
from .undo import Snapshot

if TYPE_CHECKING:
    from .multitask import MultiTaskOptimizer

SubBatch: TypeAlias = Losses | Sequence[Losses] | Callable[[], Losses | Sequence[Losses]]
"""The losses of a sub-batch, or those of its two halves, or a function that returns either."""


class SubBatchGram(GramSource):
    """K backward passes of a sub-batch's losses, and one of the weighted losses of the whole batch.

    With the gradients a_k, b_k of two independent halves the Gram is that of their means (a_k + b_k) / 2, and its error is
    estimated. This is the package's own, after the half-samples of McCarthy 1969: the Gram of (a_k - b_k) / 2 is what noise
    adds to it on average, since <a_i, b_j> has no such part (``"modo"`` uses that, too); |<a_i, a_j> - <b_i, b_j>| / 2 is its
    standard error to first order, with one degree of freedom.
    """

    def __init__(self, optimizer: "MultiTaskOptimizer", gram_losses: SubBatch, kept: Snapshot) -> None:
        super().__init__(optimizer, kept)
        if callable(gram_losses):
            with torch.enable_grad():
                gram_losses = gram_losses()
        self.has_halves = _are_halves(gram_losses)
        self.parts: list[Any] = list(gram_losses) if self.has_halves else [gram_losses]
        self.error: Tensor | None = None
        self.bias: Tensor | None = None

    def weigh(
        self, tasks: tuple[Task, ...], losses: list[Tensor | None], scaled: list[Tensor | None], scale: Tensor | None
    ) -> None:
        optimizer, ranks = self.optimizer, self.optimizer.ranks
        roles = optimizer._roles
        shared = [p for p in roles.shared if p.requires_grad]
        others = [p for p in roles.own(tasks)[0] if p.requires_grad]
        # Under "backward" the passes reach the others' .grad, too, which is put back.
        inputs = [[*shared, *others] if optimizer.gradients == "backward" else shared for _ in tasks]
        rows: Rows = []
        nodes = autograd_nodes(losses)
        parts, self.parts = [self._checked(part, tasks, losses, nodes) for part in self.parts], []
        for ordered in parts:
            if scale is not None:
                ordered = [None if loss is None else loss * scale.to(loss.device) for loss in ordered]
            rows += task_gradients(
                ordered,
                inputs,
                optimizer.gradients,
                lambda row, _: optimizer._scatter_row(row[: len(shared)], shared),
                arrived=optimizer._arrived(shared),
            )
        rows = [row[: len(shared)] for row in rows]
        ranks.wait()
        with torch.no_grad():
            gram = optimizer._unscaled(optimizer._gram(optimizer._problems("model", shared), rows, shared, tasks), scale)
            self._hold(tasks, losses, gram, None)

    def _taken(self, gram: Tensor) -> Tensor:
        if self.has_halves:
            gram, self.error, self.bias = of_halves(gram)
        return gram

    def _checked(
        self, part: Losses, tasks: tuple[Task, ...], losses: list[Tensor | None], others: set[Any]
    ) -> list[Tensor | None]:
        """The losses of a part in the order of the tasks. Their graph, which must have none of the ``others``, joins them."""
        _, ordered = order_losses(part, tasks)
        for task, whole, loss in zip(tasks, losses, ordered, strict=True):
            if (whole is None) != (loss is None):
                raise ValueError(f"task {task!r} is in one of losses and gram_losses only; pass its loss in both, or in none.")
        check_graph(ordered, self.optimizer.gradients, by_reach=False)
        nodes = autograd_nodes(ordered)
        if any(type(node).__name__ != "AccumulateGrad" for node in nodes & others):
            raise ValueError(
                "gram_losses share a graph with losses, or the two halves share one, and each backward pass runs all of it; "
                "run the model on each by itself."
            )
        others |= nodes
        return ordered

    def gradients(
        self,
        losses: Sequence[Tensor | None],
        weights: Tensor,
        shared: Sequence[Tensor],
        own: Sequence[Sequence[Tensor]],
        source: Source,
        hidden: bool = False,
    ) -> tuple[list[Tensor | None], Rows]:
        row, heads = weighted_gradients(losses, weights, shared, own, source, hidden)
        return row, self._without_dropped(heads)

    def complete(self, info: StepInfo) -> None:
        super().complete(info)
        info.gram_error, info.gram_bias = self.error, self.bias


def of_halves(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the Gram [2K, 2K] of one half's gradients and the other's after them: that of their means, its error and its bias.

    Each is a float64 [K, K], as :class:`SubBatchGram` says.
    """
    count = len(gram) // 2
    first, second, cross = gram[:count, :count], gram[count:, count:], gram[:count, count:]
    within, between = first + second, cross + cross.mT
    mean, bias = (within + between) / 4, (within - between) / 4
    for squares in (mean, bias):
        squares.diagonal().clamp_(min=0.0)  # rounding, where the halves cancel
    return mean, (first - second).abs() / 2, bias


def _are_halves(value: object) -> bool:
    """Whether it is two sets of losses, rather than one; a ``ValueError`` for another number of them."""
    if not isinstance(value, (list, tuple)) or not any(isinstance(part, (Mapping, list, tuple)) for part in value):
        return False
    if len(value) != 2 or not all(isinstance(part, (Mapping, list, tuple)) for part in value):
        raise ValueError("gram_losses lists several sets of losses; pass one, or those of two halves of the sub-batch.")
    return True

"""Where the weights of a step come from if not from the gradients of all parameters at once.

A source gives the weights of one step, which holds them as steps between updates of the weights do: one backward pass of the
weighted losses follows, whose result alone decides whether the step is finite and how it is clipped.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..gradients import Rows, Source
from ..granularity import Problems
from .decide import Batch
from .held import HeldWeights
from .info import StepInfo
from .roles import Task
from .undo import Snapshot

if TYPE_CHECKING:
    from .multitask import MultiTaskOptimizer

Edge = tuple[Any, int]
"""An autograd node and which of its outputs."""


class GramSource(ABC):
    """Gives the weights of one step, before the backward pass that uses them."""

    info: StepInfo
    """What the weights were computed from."""
    differentiates_heads = True
    """Whether :meth:`gradients` takes the heads' gradients by ``torch.autograd.grad``, which finds no head that is hidden."""

    def __init__(self, optimizer: "MultiTaskOptimizer", kept: Snapshot) -> None:
        self.optimizer, self.kept, self.before = optimizer, kept, optimizer._held

    @abstractmethod
    def weigh(
        self, tasks: tuple[Task, ...], losses: list[Tensor | None], scaled: list[Tensor | None], scale: Tensor | None
    ) -> None:
        """Computes the weights and makes the optimizer hold them.

        Args:
            tasks: K names.
            losses: K scalars, None for a task that is absent.
            scaled: the losses as they are differentiated.
            scale: the factor between them, where there is one.
        """

    @abstractmethod
    def gradients(
        self,
        losses: Sequence[Tensor | None],
        weights: Tensor,
        shared: Sequence[Tensor],
        own: Sequence[Sequence[Tensor]],
        source: Source,
        hidden: bool = False,
    ) -> tuple[list[Tensor | None], Rows]:
        """As :func:`mtlkernels.gradients.weighted_gradients`."""

    def complete(self, info: StepInfo) -> None:
        """After the update: what the weights came from goes into its info, and they are held as by any other update."""
        optimizer, own, done = self.optimizer, self.info, ~info.skipped
        info.gram, info.weights, info.active = own.gram, own.weights, own.active
        info.host_reads += own.host_reads
        every = optimizer.update_every
        optimizer._held = self.before.updated(own.weights, own.active & done, every) if every > 1 else self.before
        if optimizer.on_nonfinite != "raise":
            self.kept.restore_buffers_unless(done)

    def _hold(self, tasks: tuple[Task, ...], losses: list[Tensor | None], gram: Tensor, own_gram: Tensor | None) -> None:
        """Holds the weights of a Gram, this rank's summand of it; NaN, which makes the step skip, where they cannot be used."""
        optimizer, complete = self.optimizer, all(loss is not None for loss in losses)
        values, present = optimizer._loss_values(losses)
        gram, own_gram, values, seed = optimizer.ranks.decisive(gram, own_gram, values, optimizer._seed(True))
        self.info, *_ = optimizer._solve(Batch(tasks, values, present, complete, seed), self._taken(gram), own_gram, self.kept)
        optimizer._held = HeldWeights(1, torch.where(self.info.skipped, torch.nan, self.info.weights))

    def _taken(self, gram: Tensor) -> Tensor:
        """What the weights are computed from, of the Gram of all ranks."""
        return gram

    def _own_gram(self, live: list[list[Tensor]], own: Rows, tasks: tuple[Task, ...]) -> Tensor:
        """Squared norms of the heads' gradients on the diagonal, to tell which are finite."""
        squares = [
            self.optimizer._gram(Problems("model", params), [row], params, [task])[0, 0]
            for row, params, task in zip(own, live, tasks, strict=True)
        ]
        return torch.stack(squares).diag()

    def _without_dropped(self, own: Rows) -> Rows:
        """The heads' gradients; zero, whatever they were, where ``on_nonfinite`` drops the task."""
        if self.optimizer.on_nonfinite != "drop_task":
            return own
        active = self.info.active
        return [[None if g is None else torch.where(active[k].to(g.device), g, 0.0) for g in row] for k, row in enumerate(own)]


def leaves_of(nodes: Iterable[Any]) -> set[int]:
    """``id`` of each leaf whose gradient ends at one of the nodes."""
    return {id(node.variable) for node in nodes if type(node).__name__ == "AccumulateGrad"}


def walk(roots: Iterable[Edge], ends: set[Edge]) -> tuple[set[Any], set[Edge]]:
    """The autograd nodes that lead to the roots, not past the ``ends``; and which of those are met. 0.2 us a node."""
    nodes: set[Any] = set()
    met: set[Edge] = set()
    stack = list(roots)
    while stack:
        edge = stack.pop()
        if edge in ends:
            met.add(edge)
        elif edge[0] is not None and edge[0] not in nodes:
            nodes.add(edge[0])
            stack.extend(edge[0].next_functions)
    return nodes, met


def edge_of(tensor: Tensor) -> Edge:
    return tensor.grad_fn, tensor.output_nr

"""Weights from the gradients at a representation: K short backward passes, and one through the trunk."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from .. import ops
from ..gradients import Rows, Source, task_gradients, update_buffers
from ..granularity import Problems
from .gram_source import GramSource, edge_of, leaves_of, walk
from .roles import Task
from .undo import Snapshot

if TYPE_CHECKING:
    from .multitask import MultiTaskOptimizer

Representation: TypeAlias = Tensor | Sequence[Tensor] | Callable[[], Tensor | Sequence[Tensor]]
"""What all losses are computed from, or a function that returns it, called after the one that returns the losses."""


class RepresentationGram(GramSource):
    """K backward passes from the losses to a representation, and one from there with the combined gradient.

    MGDA-UB (Sener and Koltun 2018, section 3.3): with the Jacobian J of the representation z, |sum_k w_k dL_k/dtheta| is at
    most |J| |sum_k w_k dL_k/dz|, and the weights are those of the latter. The update J' sum_k w_k dL_k/dz is the gradient of
    the weighted losses itself.
    """

    def __init__(self, optimizer: "MultiTaskOptimizer", representation: Representation, kept: Snapshot) -> None:
        super().__init__(optimizer, kept)
        if callable(representation) and not isinstance(representation, Tensor):
            representation = representation()
        self.tensors: list[Tensor] = [representation] if isinstance(representation, Tensor) else _listed(representation)
        check_tensors(self.tensors)

    def weigh(
        self, tasks: tuple[Task, ...], losses: list[Tensor | None], scaled: list[Tensor | None], scale: Tensor | None
    ) -> None:
        optimizer, tensors = self.optimizer, self.tensors
        shared, (own, own_of_task) = optimizer._roles.shared, optimizer._roles.own(tasks)
        check_between(tasks, losses, tensors, shared, optimizer.name_of)
        live = [[own[m] for m in indices if own[m].requires_grad] for indices in own_of_task]
        below = leaves_below(tensors)
        # What a task has below the representation for itself is differentiated with its loss, through what comes again.
        again = any(id(p) in below for params in live for p in params)
        rows = task_gradients(scaled, [tensors + params for params in live], "autograd", retain=again)
        size = len(tensors)
        self.own = [row[size:] for row in rows]
        self.rows = [row[:size] for row in rows]
        del rows
        if all(grad is None for row in self.rows for grad in row):
            raise ValueError("no loss reaches the representation; pass what the heads were given.")
        with torch.no_grad():
            gram = optimizer._unscaled(optimizer._gram(Problems("model", tensors), self.rows, tensors, tasks), scale)
            own_gram = self._own_gram(live, self.own, tasks) if optimizer.on_nonfinite == "drop_task" and own else None
            self._hold(tasks, losses, gram, own_gram)

    def gradients(
        self,
        losses: Sequence[Tensor | None],
        weights: Tensor,
        shared: Sequence[Tensor],
        own: Sequence[Sequence[Tensor]],
        source: Source,
        hidden: bool = False,
    ) -> tuple[list[Tensor | None], Rows]:
        tensors = self.tensors
        with torch.no_grad():
            rows, self.rows = self.rows, []
            combined = ops.combine(rows, weights, out=update_buffers(rows, tensors))
            del rows
            heads, self.own = self._without_dropped(self.own), []
        total = weights.new_zeros(())
        with torch.enable_grad():  # whose gradient with respect to each tensor is what was combined
            for tensor, grad in zip(tensors, combined, strict=True):
                if grad is not None:
                    total = total + (tensor * grad).sum().to(total.device, total.dtype)
        # Under "backward" the pass reaches the others' .grad, too, which is put back.
        inputs = list({id(t): t for params in ([shared, *own] if source == "backward" else [shared]) for t in params}.values())
        return task_gradients([total], [inputs], source)[0][: len(shared)], heads


def check_tensors(tensors: Sequence[Tensor]) -> None:
    """Raises a ``ValueError`` unless each has a graph, and none is in another's, or is another."""
    if not tensors:
        raise ValueError("representation is empty; pass the tensors that the heads were given.")
    for n, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"representation[{n}] is a {type(tensor).__name__}; pass tensors.")
        if tensor.grad_fn is None:
            raise ValueError(
                f"representation[{n}], of shape {tuple(tensor.shape)}, has no graph; pass the trunk's result as the heads were "
                "given it, and no detached copy."
            )
    edges = [edge_of(tensor) for tensor in tensors]
    for n, tensor in enumerate(tensors):
        others = {edge for m, edge in enumerate(edges) if m != n}
        if others and (edges[n] in others or walk(edges[n][0].next_functions, others)[1]):
            raise ValueError(
                f"representation[{n}], of shape {tuple(tensor.shape)}, is computed from another of them, or is there twice; "
                "its gradient would count twice: pass one of the two."
            )


def check_between(
    tasks: Sequence[Task],
    losses: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    shared: Sequence[Tensor],
    name: Callable[[Tensor], str],
) -> None:
    """Raises a ``ValueError`` where a loss reaches a shared parameter past the representation, or may do so unseen.

    Args:
        tasks: K names.
        losses: K scalars, None for a task that is absent.
        tensors: the representation.
        shared: the shared parameters.
        name: names a parameter.
    """
    ends = {edge_of(tensor) for tensor in tensors}
    params = {id(p): p for p in shared if p.requires_grad}
    for task, loss in zip(tasks, losses, strict=True):
        if loss is None:
            continue
        nodes, _ = walk([edge_of(loss)], ends)
        if any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes):
            raise ValueError(
                f"a reentrant checkpoint between the representation and the loss of task {task!r} allows whole backward passes "
                "only; use checkpoint(..., use_reentrant=False) there."
            )
        leaves = leaves_of(nodes) if loss.grad_fn is not None else {id(loss)}
        past = next((params[leaf] for leaf in leaves if leaf in params), None)
        if past is not None:
            raise ValueError(
                f"the loss of task {task!r} reaches the shared {name(past)} past the representation; pass all tensors that "
                "lead from the shared parameters to the losses, and compile trunk and heads apart where they are compiled."
            )


def leaves_below(tensors: Sequence[Tensor]) -> set[int]:
    """``id`` of each leaf that the tensors are computed from."""
    return leaves_of(walk([edge_of(tensor) for tensor in tensors], set())[0])


def _listed(value: object) -> list[Tensor]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"representation is a {type(value).__name__}; pass a tensor, a list of tensors, or a function.")
    return list(value)

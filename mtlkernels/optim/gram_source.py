"""Weights from a Gram that costs less than K backward passes: of the gradients at a representation, or of a sub-batch's.

Either gives the weights of one step, which holds them as steps between updates of the weights do: one backward pass of the
weighted losses follows, whose result alone decides whether the step is finite and how it is clipped.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from .. import ops
from ..gradients import (
    Rows,
    Source,
    autograd_nodes,
    check_graph,
    task_gradients,
    update_buffers,
    weighted_gradients,
)
from ..granularity import Problems
from ..weightings import MemoryWeighting, Weighting
from .decide import Batch
from .held import HeldWeights
from .info import StepInfo
from .losses import Losses, order_losses
from .roles import Task
from .undo import Snapshot

if TYPE_CHECKING:
    from .multitask import MultiTaskOptimizer
    from .streamed import Cuts

Representation: TypeAlias = Tensor | Sequence[Tensor] | Callable[[], Tensor | Sequence[Tensor]]
"""What all losses are computed from, or a function that returns it, called after the one that returns the losses."""

SubBatch: TypeAlias = Losses | Sequence[Losses] | Callable[[], Losses | Sequence[Losses]]
"""The losses of a sub-batch, or those of its two halves, or a function that returns either."""

Edge = tuple[Any, int]
"""An autograd node and which of its outputs."""


def gram_source(
    optimizer: "MultiTaskOptimizer",
    representation: Representation | None,
    gram_losses: SubBatch | None,
    cuts: "Cuts | None",
    kept: Snapshot,
) -> "GramSource | None":
    """Where the weights of the step come from; None: from the gradients of all parameters, or none are computed in it.

    Args:
        optimizer: that is about to take the step.
        representation: as of :meth:`MultiTaskOptimizer.backward`.
        gram_losses: likewise.
        cuts: likewise.
        kept: the weighting's buffers as they go back where the update is not finite.

    Raises:
        ValueError: both, or an optimizer whose weights one Gram does not give.
    """
    from .streamed import StreamedGram

    options = {"representation": representation, "gram_losses": gram_losses, "cuts": cuts}
    names = [name for name, value in options.items() if value is not None]
    if not names:
        return None
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} are both given; pass one of them.")
    (name,) = names
    method = optimizer.weighting
    plain = isinstance(method, Weighting) and not isinstance(method, MemoryWeighting)
    if not plain or optimizer._one_pass or optimizer._crosses:
        raise ValueError(
            f"{name} is given, but {type(method).__name__} takes more, or less, than the Gram of one batch; leave it out, or "
            "pass a weighting of a Gram."
        )
    if optimizer.per != "model":
        raise ValueError(f'{name} is given: one backward pass has one set of weights; pass per="model".')
    if optimizer._held.left > 0:
        return None
    if optimizer._accumulated.batches:
        raise ValueError(
            f"{name} is given, but the gradients of {optimizer._accumulated.batches} micro-batches wait for weights of "
            "their own; leave it out, or call backward, instead of accumulate, for every micro-batch."
        )
    if gram_losses is not None:
        return SubBatchGram(optimizer, gram_losses, kept)
    if optimizer.ranks.hides_leaves:
        raise ValueError(
            f"{name} is given, but the parameters are DTensors, whose gradients come from whole backward passes; pass "
            "gram_losses, or update_every."
        )
    if cuts is not None:
        return StreamedGram(optimizer, cuts, kept)
    return RepresentationGram(optimizer, cast(Representation, representation), kept)


class GramSource(ABC):
    """Gives the weights of one step, before the backward pass that uses them."""

    info: StepInfo
    """What the weights were computed from."""

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
            ranks = optimizer.ranks
            gram = optimizer._unscaled(optimizer._gram(Problems("model", tensors), self.rows, tensors, tasks), scale)
            gram = gram / (ranks.size * ranks.scale) ** 2  # of the losses' means over ranks, each with a batch of its own
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
            heads = self._without_dropped(self.own)
        total = weights.new_zeros(())
        with torch.enable_grad():  # whose gradient with respect to each tensor is what was combined
            for tensor, grad in zip(tensors, combined, strict=True):
                if grad is not None:
                    total = total + (tensor * grad).sum().to(total.device, total.dtype)
        # Under "backward" the pass reaches the others' .grad, too, which is put back.
        inputs = list({id(t): t for params in ([shared, *own] if source == "backward" else [shared]) for t in params}.values())
        return task_gradients([total], [inputs], source)[0][: len(shared)], heads


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
                ordered, inputs, optimizer.gradients, lambda row, _: optimizer._scatter_row(row[: len(shared)], shared)
            )
        rows = [row[: len(shared)] for row in rows]
        ranks.wait()
        with torch.no_grad():
            gram = optimizer._unscaled(optimizer._gram(Problems("model", shared), rows, shared, tasks), scale)
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


# --- checks ---------------------------------------------------------------------------------------------------------------


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
    edges = [_edge(tensor) for tensor in tensors]
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
    ends = {_edge(tensor) for tensor in tensors}
    params = {id(p): p for p in shared if p.requires_grad}
    for task, loss in zip(tasks, losses, strict=True):
        if loss is None:
            continue
        nodes, _ = walk([_edge(loss)], ends)
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
    return leaves_of(walk([_edge(tensor) for tensor in tensors], set())[0])


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


def _edge(tensor: Tensor) -> Edge:
    return tensor.grad_fn, tensor.output_nr


def _listed(value: object) -> list[Tensor]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"representation is a {type(value).__name__}; pass a tensor, a list of tensors, or a function.")
    return list(value)


def _are_halves(value: object) -> bool:
    """Whether it is two sets of losses, rather than one; a ``ValueError`` for another number of them."""
    if not isinstance(value, (list, tuple)) or not any(isinstance(part, (Mapping, list, tuple)) for part in value):
        return False
    if len(value) != 2 or not all(isinstance(part, (Mapping, list, tuple)) for part in value):
        raise ValueError("gram_losses lists several sets of losses; pass one, or those of two halves of the sub-batch.")
    return True

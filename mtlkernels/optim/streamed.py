"""The Gram of all gradients without all gradients: a graph in segments, whose gradients are there for one segment at a time."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .. import ops
from ..gradients import Rows, Source, update_buffers, weighted_sum
from ..granularity import Problems
from .gram_source import GramSource, leaves_of, walk
from .roles import Task
from .undo import Snapshot

if TYPE_CHECKING:
    from .multitask import MultiTaskOptimizer


class Cuts:
    """Where a graph is cut: tensors, and the leaves that the rest of the model was given in their place; see :func:`cut`."""

    def __init__(self) -> None:
        self._calls: list[list[tuple[Tensor, Tensor]]] = []  # of each call of a module, in the order in which they returned

    def taken(self) -> list[list[tuple[Tensor, Tensor]]]:
        """The pairs (tensor, leaf) of each call, which from then on only the caller has."""
        if not self._calls:
            raise ValueError(
                "cuts has no cut, or one that a step has used; run the forward pass in `with cut(modules) as cuts:`, with grad "
                "enabled, and pass it to one step."
            )
        calls, self._calls = self._calls, []
        return calls

    def _cut(self, module: torch.nn.Module, arguments: object, result: Any) -> Any:
        """A forward hook: the module's result, without its graph."""
        pairs: dict[int, tuple[Tensor, Tensor]] = {}

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.grad_fn is None:
                return value
            return pairs.setdefault(id(value), (value, value.detach().requires_grad_()))[1]

        result = tree_map(leaf, result)
        if pairs:
            self._calls.append(list(pairs.values()))
        return result


@contextmanager
def cut(modules: Iterable[torch.nn.Module]) -> Iterator[Cuts]:
    """Cuts the graph of a forward pass behind each of the modules, for :meth:`MultiTaskOptimizer.step`'s ``cuts``.

    The optimizer goes through the segments between the cuts one by one, from the losses down: K backward passes through a
    segment, the Gram of its parameters, whose gradients are freed; then one backward pass of the weighted losses through all of
    them. K gradients are there of one segment's parameters, and at the cuts, never of the model. The Gram is that of all
    gradients, exactly, whatever leads past a module; so a few of the blocks that a model is made of are enough. ::

        with mtl.cut(model.blocks) as cuts:
            losses = model(inputs)
        optimizer.step(losses, cuts=cuts)

    Without ``cuts``, nothing below the last cut has a gradient, and the optimizer says so.

    Args:
        modules: whose results' graphs end there: tensors, or any nesting of lists, tuples and dicts. What comes next must not
            change them in place.
    """
    cuts = Cuts()
    hooks = [module.register_forward_hook(cuts._cut) for module in modules]
    try:
        yield cuts
    finally:
        for hook in hooks:
            hook.remove()


class _Segment:
    """What lies between cuts: the graph of some tensors down to leaves.

    Attributes:
        roots: K lists of tensors; below the losses the same ones for every task.
        leaves: those of the cuts that the segment starts from, then parameters.
        again: whether a later segment runs through a part of this one.
    """

    def __init__(self, roots: Sequence[Sequence[Tensor]]) -> None:
        self.roots = roots
        self.leaves: list[Tensor] = []
        self.again = False


class StreamedGram(GramSource):
    """K backward passes through one segment of the graph after the other, and one of the weighted losses through all.

    G = sum over segments of the Gram of their parameters' gradients. A parameter that several segments use (tied weights, or a
    path past a cut) counts in the last of them, with the sum of its gradients.
    """

    def __init__(self, optimizer: "MultiTaskOptimizer", cuts: Cuts, kept: Snapshot) -> None:
        super().__init__(optimizer, kept)
        if not isinstance(cuts, Cuts):
            raise ValueError(f"cuts is a {type(cuts).__name__}; pass what `with mtl.cut(modules) as cuts:` gave.")
        if optimizer.gradients != "autograd":
            raise ValueError(
                f"cuts is given, but gradients is {optimizer.gradients!r}, which takes whole backward passes; pass "
                'gradients="autograd", or gram_losses in place of cuts.'
            )
        if optimizer.update_every > 1:
            raise ValueError(
                f"cuts is given, but update_every is {optimizer.update_every}, and steps between updates take one backward "
                "pass as they are; pass update_every=1, or leave cuts out."
            )
        if optimizer._roles.pending():
            raise ValueError(
                "cuts is given, but shared parameters are to be told from heads by graphs, which are cut; pass "
                "shared=parameters, heads={task: parameters}, or both."
            )
        self.calls = cuts.taken()

    def weigh(
        self, tasks: tuple[Task, ...], losses: list[Tensor | None], scaled: list[Tensor | None], scale: Tensor | None
    ) -> None:
        optimizer = self.optimizer
        roles = optimizer._roles
        own, own_of_task = roles.own(tasks)
        self.live = [[own[m] for m in indices if own[m].requires_grad] for indices in own_of_task]
        shared = {id(p): p for p in roles.shared if p.requires_grad}
        mine = [{id(p): m for m, p in enumerate(params)} for params in self.live]
        self.own: Rows = [[None] * len(params) for params in self.live]
        params = shared | {id(p): p for params in self.live for p in params}
        self.segments = self._segmented(scaled, params)
        uses: dict[int, int] = defaultdict(int)
        for segment in self.segments:
            for leaf in segment.leaves:
                uses[id(leaf)] += 1
        at: dict[int, list[Tensor | None]] = defaultdict(lambda: [None] * len(tasks))  # at cuts, and of shared parameters
        gram = torch.zeros(len(tasks), len(tasks), dtype=torch.float64, device=optimizer.device)
        for segment, pairs in zip(self.segments, [[], *self.calls[::-1]], strict=True):
            above = [at.pop(id(leaf), [None] * len(tasks)) for _, leaf in pairs]
            for k, loss in enumerate(losses):
                if loss is None:
                    continue
                inputs = [t for t in segment.leaves if id(t) not in params or id(t) in shared or id(t) in mine[k]]
                given = [column[k] for column in above]
                for leaf, grad in zip(inputs, _passed(segment.roots[k], given, inputs, retain=True), strict=True):
                    rows, place = (self.own[k], mine[k][id(leaf)]) if id(leaf) in mine[k] else (at[id(leaf)], k)
                    rows[place] = _added(rows[place], grad)
                for column in above:
                    column[k] = None  # passed on: K gradients are there at one end of a segment, not at both
            done = []
            for leaf in segment.leaves:
                uses[id(leaf)] -= 1
                if id(leaf) in shared and uses[id(leaf)] == 0:
                    done.append(leaf)
            if done:
                gram += self._gram_of(done, [at.pop(id(leaf)) for leaf in done], tasks, scale)
        with torch.no_grad():
            own_gram = self._own_gram(self.live, self.own, tasks) if optimizer.on_nonfinite == "drop_task" and own else None
            self._hold(tasks, losses, gram, own_gram)

    def _gram_of(
        self, params: list[Tensor], columns: list[list[Tensor | None]], tasks: tuple[Task, ...], scale: Tensor | None
    ) -> Tensor:
        """This rank's summand of the Gram of parameters; ``columns`` holds the K gradients of each."""
        optimizer = self.optimizer
        rows = [optimizer._scatter_row([column[k] for column in columns], params) for k in range(len(tasks))]
        columns.clear()
        optimizer.ranks.wait()
        with torch.no_grad():
            return optimizer._unscaled(optimizer._gram(Problems("model", params), rows, params, tasks), scale)

    def gradients(
        self,
        losses: Sequence[Tensor | None],
        weights: Tensor,
        shared: Sequence[Tensor],
        own: Sequence[Sequence[Tensor]],
        source: Source,
        hidden: bool = False,
    ) -> tuple[list[Tensor | None], Rows]:
        wanted = {id(p) for p in shared}
        held = {id(p) for params in own for p in params} | wanted
        at: dict[int, Tensor | None] = defaultdict(lambda: None)
        segments, calls, self.segments, self.calls = self.segments, self.calls, [], []
        for pairs in [[], *calls[::-1]]:
            segment = segments.pop(0)  # and with it its graph
            given = [at.pop(id(leaf), None) for _, leaf in pairs]
            inputs = [t for t in segment.leaves if id(t) not in held or id(t) in wanted]
            if not pairs and self.optimizer.on_nonfinite == "drop_task":  # whose gradient times 0 may be NaN
                grads = self._combined(segment, weights, inputs)
            else:
                roots = segment.roots[0] if pairs else [weighted_sum(losses, weights)]
                grads = _passed(roots, given, inputs, retain=segment.again)
            for leaf, grad in zip(inputs, grads, strict=True):
                at[id(leaf)] = _added(at[id(leaf)], grad)
            pairs.clear()
        heads, self.own = self.own, []  # so that the update can be written where they are
        with torch.no_grad():
            return [at[id(p)] for p in shared], self._without_dropped(heads)

    def _combined(self, segment: _Segment, weights: Tensor, inputs: list[Tensor]) -> Sequence[Tensor | None]:
        """The gradients of the segment's K roots, combined without those of weight 0."""
        last = len(segment.roots) - 1
        rows = [list(_passed(roots, [], inputs, segment.again or k < last)) for k, roots in enumerate(segment.roots)]
        with torch.no_grad():
            return ops.combine(rows, weights, out=update_buffers(rows, inputs))

    def _segmented(self, losses: Sequence[Tensor | None], params: dict[int, Tensor]) -> list[_Segment]:
        """The segments from the losses down to the first cut.

        Raises:
            ValueError: a reentrant checkpoint, which hides leaves.
        """
        leaves = params | {id(leaf): leaf for pairs in self.calls for _, leaf in pairs}
        segments = [_Segment([[] if loss is None else [loss] for loss in losses])]
        segments += [_Segment([[tensor for tensor, _ in pairs]] * len(losses)) for pairs in self.calls[::-1]]
        later: set[Any] = set()
        for segment in segments[::-1]:
            roots = {id(t): t for tensors in segment.roots for t in tensors}.values()
            nodes, _ = walk([(t.grad_fn, t.output_nr) for t in roots], set())
            if any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes):
                raise ValueError(
                    "cuts is given, but a reentrant checkpoint allows whole backward passes only; use "
                    "checkpoint(..., use_reentrant=False)."
                )
            reached = leaves_of(nodes) | {id(t) for t in roots if t.grad_fn is None}
            segment.leaves = [leaf for key, leaf in leaves.items() if key in reached]
            nodes = {node for node in nodes if type(node).__name__ != "AccumulateGrad"}
            segment.again = not later.isdisjoint(nodes)
            later |= nodes
        return segments


def _passed(
    roots: Sequence[Tensor], grads: Sequence[Tensor | None], inputs: Sequence[Tensor], retain: bool
) -> Sequence[Tensor | None]:
    """The gradients of some roots passed on to the inputs. Without ``grads`` the roots are scalars, whose gradients are 1."""
    pairs = [
        (root, grad) for root, grad in zip(roots, grads or [None] * len(roots), strict=True) if grad is not None or not grads
    ]
    if not pairs or not inputs:
        return [None] * len(inputs)
    tensors, given = [root for root, _ in pairs], [grad for _, grad in pairs] if grads else None
    return torch.autograd.grad(tensors, list(inputs), given, retain_graph=retain, allow_unused=True)


def _added(before: Tensor | None, grad: Tensor | None) -> Tensor | None:
    return grad if before is None else before if grad is None else before + grad

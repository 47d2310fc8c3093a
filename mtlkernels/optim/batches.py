"""From the losses of a batch to its gradients, after everything that can be checked before."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..gradients import (
    Arrived,
    Received,
    Rows,
    Source,
    check_grads,
    check_graph,
    check_heads_in_graph,
    check_hooks,
    scattered,
    task_gradients,
    weighted_gradients,
)
from .accumulated import Accumulated, MicroBatch
from .compare import step_entries
from .decide import Decisions
from .gram_source import GramSource
from .losses import Losses, order_losses
from .roles import Task
from .rows import ARRIVED, RowsKind
from .scaler import enabled_scaler
from .second import second_losses


class Batches(Decisions):
    """The part of :class:`MultiTaskOptimizer` that comes before the Gram."""

    tasks: tuple[Task, ...] | None
    gradients: Source
    rows: RowsKind
    _accumulated: Accumulated
    _compares: bool
    """Whether this step compares the ranks."""
    _one_pass: bool
    """Whether a step is one backward pass of losses that the weighting weighs."""

    def _micro_batch(
        self,
        losses: Losses,
        scaler: torch.amp.GradScaler | None,
        accumulate: bool,
        other: Losses | None = None,
        last: bool = False,
        source: GramSource | None = None,
    ) -> MicroBatch:
        """The gradients of a batch, and of the ``other`` after them; ``accumulate``: they are to be added to ``.grad``.

        Those of a batch in one piece are this rank's part of them, on their way while the next task's are computed.
        """
        tasks, ordered, scaled, scale = self._begin(losses, scaler, accumulate)
        if source is not None:
            source.weigh(tasks, ordered, scaled, scale)
        shared = self._roles.shared
        own, own_of_task = self._roles.own(tasks)
        whole = self.ranks.communicates and (not last or self._accumulated.batches > 0)
        received: Received = (lambda row, _: row) if whole else self._scatter_row
        rows = partial(
            self._rows, tasks=tasks, shared=shared, own=own, own_of_task=own_of_task, received=received, source=source
        )
        shared_rows, own_rows = rows(scaled)
        if other is not None:
            second = second_losses(other, tasks, ordered)
            check_graph(second, self.gradients, any(p.requires_grad for p in self._roles.found))
            if scale is not None:
                second = [None if loss is None else loss * scale.to(loss.device) for loss in second]
            more_shared, more_own = rows(second)
            shared_rows, own_rows = [*shared_rows, *more_shared], [*own_rows, *more_own]
        params = [shared for _ in shared_rows] + [own for _ in own_rows]
        return MicroBatch(tasks, ordered, [*shared_rows, *own_rows], params, scale)

    def _begin(
        self, losses: Losses, scaler: torch.amp.GradScaler | None, accumulate: bool
    ) -> tuple[tuple[Task, ...], list[Tensor | None], list[Tensor | None], Tensor | None]:
        """Checks everything that can be checked before a gradient is computed, and decides the roles.

        Returns:
            The task names, the losses in their order, what to differentiate, and the scaler's factor where there is one.
        """
        tasks, ordered = order_losses(losses, self.tasks)
        params = self.params
        self.ranks.check()
        roles = self._roles.refreshed(params)  # the inner optimizer's groups may have changed
        if roles is not self._roles:
            self.ranks.check(params)
            self._compares = self.ranks.size > 1
        if self._compares:
            self.ranks.require_equal(step_entries(self, self.ranks, tasks, ordered, {"weighting": self.weighting}))
        self._check_heads(tasks)  # where ranks have other tasks, every rank has been told
        by_reach = any(p.requires_grad for p in roles.found)
        decides = not self._one_pass
        undecided = decides and len(tasks) > 1 and bool(roles.pending())
        if undecided and self.ranks.hides_leaves:
            raise ValueError(
                "shared parameters cannot be told from heads in graphs that do not have DTensor parameters as leaves; pass "
                "shared=parameters, heads={task: parameters}, or both."
            )
        check_graph(ordered, self.gradients, by_reach and decides, undecided)
        if self.gradients == "autograd":
            check_hooks(params, self.name_of)
        if accumulate:
            check_grads(params, self.name_of)
        self._roles = roles.decided(ordered) if decides else roles
        scale = None
        scaled = ordered
        enabled = enabled_scaler(scaler, self.on_nonfinite)
        if enabled is not None:
            scaled = [None if loss is None else enabled.scale(loss) for loss in ordered]
            scale = enabled.scale(torch.ones((), device=self.device))  # the factor, without a host read
        return tasks, ordered, scaled, scale

    def _check_heads(self, tasks: Sequence[Task]) -> None:
        for task in self._roles.heads:
            if task not in tasks:
                raise ValueError(
                    f"heads names the unknown task {task!r}; the tasks are {', '.join(map(repr, tasks))}. Pass tasks=[...] at "
                    "construction where the first losses may lack a task."
                )

    def _rows(
        self,
        losses: Sequence[Tensor | None],
        tasks: Sequence[Task],
        shared: list[Tensor],
        own: list[Tensor],
        own_of_task: list[list[int]],
        received: Received,
        source: GramSource | None,
    ) -> tuple[Rows, Rows]:
        """Gradients as K x N rows of the shared and K x M rows of the other parameters, None for frozen ones.

        Where no weights are computed, the shared parameters have one row, the gradient of the weighted losses.
        """
        live = [n for n, p in enumerate(shared) if p.requires_grad]
        own_live = [[m for m in indices if own[m].requires_grad] for indices in own_of_task]
        bodies, heads = [shared[n] for n in live], [[own[m] for m in indices] for indices in own_live]
        if self._held.left <= 0:
            inputs = [bodies + head for head in heads]
            rows = task_gradients(losses, inputs, self.gradients, received, arrived=self._arrived(bodies))
            shared_rows = [scattered(row[: len(live)], live, len(shared)) for row in rows]
            own_grads = [row[len(live) :] for row in rows]
        else:
            hidden = self.ranks.hides_leaves
            if self.gradients == "backward" and not hidden and (source is None or source.differentiates_heads):
                check_heads_in_graph(losses, [self._roles.heads.get(task, []) for task in tasks], self.name_of)
            weights = self._held.of_tasks(torch.empty(len(losses), dtype=torch.float64, device=self.device))
            weighted = weighted_gradients if source is None else source.gradients
            row, own_grads = weighted(losses, weights, bodies, heads, self.gradients, hidden)
            own_grads = [received(grads, head) for grads, head in zip(own_grads, heads, strict=True)]
            shared_rows = [scattered(received(row, bodies), live, len(shared))]
        self.ranks.wait()
        own_rows = [scattered(grads, indices, len(own)) for grads, indices in zip(own_grads, own_live, strict=True)]
        return shared_rows, own_rows

    def _arrived(self, params: Sequence[Tensor]) -> Arrived | None:
        """What becomes of each of K gradients of these parameters, and of no other's, as ``rows`` says."""
        change, chosen = ARRIVED.get(self.rows), {id(p) for p in params}
        return None if change is None else lambda param, grad: change(param, grad) if id(param) in chosen else grad

    def _scatter_row(self, row: list[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
        with torch.no_grad():
            if self._compares:
                self.ranks.compare_row(row, params)
            return self.ranks.scatter(row, params)

"""The multi-task optimizer: task losses in, one combined gradient and a torch optimizer's step out."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast, get_args, overload

import torch
from torch import Tensor

from ..distributed import ranks_of
from ..gradients import (
    SOURCES,
    Received,
    Rows,
    Source,
    add_to_grad,
    check_dense,
    check_grads,
    check_graph,
    check_heads_in_graph,
    check_hooks,
    combine_own,
    task_gradients,
    weighted_gradients,
)
from ..granularity import KINDS, Problems
from ..reference import Granularity
from ..weightings import Elementwise, MemoryWeighting, Weighting, as_method
from ..weightings.cross.base import takes_cross
from .accumulated import Accumulated, MicroBatch
from .compare import step_entries
from .decide import Batch, check_options
from .gram_source import GramSource, Representation, SubBatch, gram_source
from .held import HeldWeights
from .info import StepInfo
from .losses import Losses, order_losses, task_names
from .one_pass import backward_of_losses, observe
from .roles import Roles, Task
from .saved import SavedState
from .scaler import check_not_float16, enabled_scaler, update_scale
from .second import check_second, second_losses
from .skip import SkipFlag, first_written
from .streamed import Cuts
from .tracked import Tracked
from .undo import Snapshot
from .wrapper import eager, with_step_hooks

Nonfinite = Literal["skip", "drop_task", "raise"]


class MultiTaskOptimizer(SavedState):
    """A torch optimizer that steps along a weighted combination of task gradients.

    Shared parameters get sum_k w_k g_k with weights from the Gram matrix of the task gradients; head parameters get their
    own task's gradient unweighted; ``.grad`` stays None where no task reaches a parameter.

    Args:
        optimizer: the torch optimizer that applies the update; ``.optimizer`` afterwards.
        weighting: a :class:`Weighting`, an :class:`Elementwise` method or its registry string; ``.weighting`` afterwards, on
            the parameters' device. With one that is ``loss_only`` a step takes one backward pass, of the weighted losses: heads
            get their task's weight, too, ``shared`` and ``heads`` make no difference, and neither ``per`` nor ``update_every``
            nor ``"drop_task"`` applies. An element-wise method replaces sum_k w_k g_k: with ``on_nonfinite="skip"`` in one read
            of the gradients, without their Gram. It and one that keeps a memory of gradients take ``per="model"`` and
            ``update_every=1``.
        shared: the shared parameters. None with ``heads``: every parameter of the optimizer that is not in them. None without:
            what two or more tasks reach in the first ``backward``, which must have every task; the others belong to the task
            that reaches them. With one task in all, everything is shared. Parameters that are added or unfrozen later are told
            apart by the next ``backward`` in the same way. Roles are no part of the state dict.
        heads: {task: parameters}. A parameter in neither ``shared`` nor ``heads`` belongs to the task whose graph reaches it,
            and gets the sum where several do. What is found from graphs needs eager mode: of a compiled model name all.
        tasks: the task names. None: fixed by the keys of the first dict, or by the number of losses of the first sequence.
        per: one set of weights for the ``"model"``, or one for each shared ``"tensor"``, for each ``"channel"`` of them (a row
            of a parameter viewed as [out, rest]), or for each group {name: parameters}. Shared parameters in no group form one
            more; what is in a group and not shared has no part in it.
        update_every: n: only every n-th ``backward`` (or ``step`` with losses), the first included, computes weights, from K
            backward passes. Those between take one of the weighted sum of the losses with the last weights; a head still gets
            its own task's gradient, from the part of the graph above it (in a compiled model nothing can be left out). A task
            keeps the weight of the last update that had it, finite, and 1 / K until then. With ``per="model"`` only.
        max_norm: clips the norm of the update over all parameters, as ``clip_grad_norm_`` after ``backward`` would. Each
            ``backward`` clips its own update; what :meth:`accumulate` has added up is part of it.
        on_nonfinite: what a gradient that is not finite does. ``"skip"``: the step changes nothing, nor does the weighting's
            state. ``"drop_task"``: the task counts as absent, but its head gets a zero gradient, since the host does not know;
            a step with no finite task left is skipped; between updates of the weights tasks cannot be told apart, and the step
            is skipped. ``"raise"``: a ``RuntimeError`` that names the tasks.
        gradients: ``"autograd"`` for plain eager and compiled models, ``"backward"`` for models that need ``loss.backward()``
            itself (post-accumulate-grad hooks, reentrant checkpoints, FSDP2). None: the latter where a parameter is a DTensor.
        process_group: of plain parameters, whether or not in DistributedDataParallel: the ranks that train together. The update
            is that of the losses' means over them.
        mesh: the same as a device mesh of one dimension. Of DTensors: a mesh that has the ranks of all; None for the largest.
        check_ranks: compares tasks, parameters, the weighting's state and the weights over the ranks in every step, in place
            of the first only; it reads the device, and those reads are not counted in ``host_reads``.

    Raises:
        ValueError: an argument that does not fit; the message names it and the fix.
    """

    _takes_loss_only = True
    """Whether a loss-only weighting makes a step one backward pass; otherwise it weighs gradients as any other."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weighting: str | Weighting | Elementwise = "mean",
        *,
        shared: Iterable[Tensor] | None = None,
        heads: Mapping[Any, Iterable[Tensor]] | None = None,
        tasks: Sequence[Task] | None = None,
        per: Granularity | Mapping[str, Iterable[Tensor]] = "model",
        update_every: int = 1,
        max_norm: float | None = None,
        on_nonfinite: Nonfinite = "skip",
        gradients: Source | None = None,
        process_group: object = None,
        mesh: object = None,
        check_ranks: bool = False,
    ) -> None:
        super().__init__(optimizer)
        weighting = as_method(weighting)
        for name, value, known in (
            ("on_nonfinite", on_nonfinite, get_args(Nonfinite)),
            ("gradients", gradients, (*SOURCES, None)),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; pass one of {', '.join(map(repr, known))}.")
        groups = per if isinstance(per, Mapping) else None
        if groups is None and per not in KINDS:
            raise ValueError(f'per is {per!r}; pass "model", "tensor", "channel" or {{name: parameters}}.')
        if groups is not None and not groups:
            raise ValueError('per has no group; pass {name: parameters}, or "model".')
        if isinstance(update_every, bool) or not isinstance(update_every, int) or update_every < 1:
            raise ValueError(f"update_every is {update_every!r}; pass a whole number, 1 or more.")
        if update_every > 1 and per != "model":
            raise ValueError(f'update_every is {update_every}: one backward pass has one set of weights; pass per="model".')
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm!r}; pass a positive number, or None not to clip.")
        self._crosses = takes_cross(weighting)
        self._one_pass = self._takes_loss_only and isinstance(weighting, Weighting) and weighting.loss_only
        check_options(weighting, self._one_pass, {"per": per, "update_every": update_every, "on_nonfinite": on_nonfinite})
        params = self.params
        self.ranks = ranks_of(params, process_group, mesh, self.name_of)
        self.ranks.check_gradients(gradients)
        if self.ranks.size > 1 and isinstance(weighting, (Elementwise, MemoryWeighting)):
            raise ValueError(
                f"{type(weighting).__name__} takes whole gradients, of which a rank has a part; train in one process."
            )
        if self.ranks.size > 1 and per == "channel":
            raise ValueError('per="channel" needs whole channels, which a rank does not have; pass per="tensor" or "model".')
        self._roles = Roles(params, shared, heads, groups)
        self.tasks = None if tasks is None else task_names(tasks)
        if self.tasks is not None:
            self._check_heads(self.tasks)
        self.per: Granularity | None = None if isinstance(per, Mapping) else per
        self.update_every, self._held = update_every, HeldWeights()
        self.max_norm, self.on_nonfinite = max_norm, on_nonfinite
        self.gradients: Source = gradients or ("backward" if self.ranks.hides_leaves else "autograd")
        self.check_ranks, self._compares = check_ranks, self.ranks.size > 1
        self.weighting = weighting.to(self.device)
        self._tasks_given = tasks is not None
        self._forget()

    def _forget(self) -> None:
        """Drops what belongs to the update in progress."""
        self._skip = SkipFlag()
        self._info: StepInfo | None = None
        self._accumulated = Accumulated()

    # --- the update ------------------------------------------------------------------------------------------------------

    @eager
    def backward(
        self,
        losses: Losses,
        scaler: torch.amp.GradScaler | None = None,
        *,
        other: Losses | None = None,
        representation: Representation | None = None,
        gram_losses: SubBatch | None = None,
        cuts: Cuts | None = None,
    ) -> StepInfo:
        """Fills ``.grad`` from the task losses; adds to what is there, as ``loss.backward()`` does.

        Follow with ``step()``, or ``scaler.step(optimizer)`` and ``scaler.update()``. An update that is not finite leaves NaN
        in ``.grad`` and makes that step skip (or the scaler, when one is given).

        Args:
            losses: {task: scalar loss}, or a sequence in the order of ``tasks``; unscaled. A task that is missing or None is
                absent: no weight, and its state in the weighting stays.
            scaler: scales the losses; ``.grad`` stays scaled until ``scaler.unscale_``, weights and clipping are those of
                the unscaled gradients.
            other: the losses of a second, independent batch at the same parameters, for weightings that take a cross Gram
                (``"modo"``, ``"sdmgrad"``), and for these only; the same tasks are there. The update, the heads' as well, is
                the mean of both batches'; the info's losses and Gram are the first's.
            representation: what the heads were given, a tensor or several: the Gram is that of the gradients with respect to
                it, from K backward passes through the heads, and one backward pass goes through the trunk (MGDA-UB, Sener and
                Koltun 2018). Every path from a loss to a shared parameter leads through it. Or a function that returns it.
            gram_losses: the losses of a sub-batch, from a forward pass of its own, of the size of ``losses`` (means, say): the
                Gram is that of their gradients, and one backward pass takes the weighted ``losses``. A pair of such of two
                halves of the sub-batch: of the halves' mean, with ``gram_error`` and ``gram_bias`` in the info. Or a function
                that returns either, which is called when weights are computed.
            cuts: of the forward pass, made by :func:`mtlkernels.cut`: the exact Gram, segment by segment of the graph, then one
                backward pass of the weighted losses; K gradients of the model are never there at once.

        Raises:
            ValueError: losses that do not fit, a shared parameter that no loss reaches, gradients that no op takes.
            RuntimeError: ``on_nonfinite="raise"`` and a task is not finite.
            Whatever is raised, parameters, ``.grad`` and the weighting's state are as before.
        """
        with self._undone_on_error() as before:
            source = gram_source(self, representation, gram_losses, cuts, before)
            return self._backward(losses, scaler, accumulate=True, kept=before, other=other, source=source)

    @eager
    def accumulate(self, losses: Losses, scaler: torch.amp.GradScaler | None = None) -> None:
        """Adds a micro-batch to the next update: to the gradient of each task, before weights are computed.

        Call it for every micro-batch but the last, whose losses go to ``backward`` or ``step``. That update is the one of a
        single batch whose losses are the sums of those passed: the Gram, the weights, the clipping and ``info.losses`` are of
        the sums. Nothing is averaged; for losses that are means, divide by the number of micro-batches, as for
        ``loss.backward()``. A task may be absent from some micro-batches; it is absent from the update if it was from all.

        Holds a gradient for each task and parameter (between updates of the weights one for all tasks), and as much again while
        a micro-batch is added. ``.grad`` is left alone. ``zero_grad()`` drops the sums, and they are no part of the state dict.
        A gradient that is not finite shows in the update, as ``on_nonfinite`` says.

        Args:
            losses: as in :meth:`backward`.
            scaler: as there; call its ``update()`` after the step. Sums follow a scale that has changed nevertheless.

        Raises:
            As :meth:`backward`. Whatever is raised, the sums are as before, too.
        """
        if self._crosses:
            raise ValueError(
                f"accumulate takes one batch, and {type(self.weighting).__name__} two; call backward for every micro-batch."
            )
        if self._one_pass:
            raise ValueError(
                f"accumulate adds up the gradients of tasks, and {type(self.weighting).__name__} weighs losses; call backward "
                "for every micro-batch."
            )
        with self._undone_on_error():
            batch = self._micro_batch(losses, scaler, accumulate=False)
            for task, row, params in zip(itertools.cycle(batch.tasks), batch.rows, batch.params, strict=False):
                check_dense([task], [row], params, self.name_of)
            with torch.no_grad():
                self._accumulated = self._accumulated.plus(batch)
            self.tasks = batch.tasks

    @overload  # type: ignore[override]  # losses instead of a closure that returns a number
    def step(self, losses: None = None, *, closure: None = None) -> None: ...

    @overload
    def step(
        self,
        losses: Losses | Callable[[], Losses],
        *,
        closure: None = None,
        scaler: torch.amp.GradScaler | None = None,
        other: Losses | None = None,
        representation: Representation | None = None,
        gram_losses: SubBatch | None = None,
        cuts: Cuts | None = None,
    ) -> StepInfo: ...

    @overload
    def step(
        self,
        losses: None = None,
        *,
        closure: Callable[[], Losses],
        scaler: torch.amp.GradScaler | None = None,
        other: Losses | None = None,
        representation: Representation | None = None,
        gram_losses: SubBatch | None = None,
        cuts: Cuts | None = None,
    ) -> StepInfo: ...

    @with_step_hooks
    def step(
        self,
        losses: Losses | Callable[[], Losses] | None = None,
        *,
        closure: Callable[[], Losses] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        other: Losses | None = None,
        representation: Representation | None = None,
        gram_losses: SubBatch | None = None,
        cuts: Cuts | None = None,
    ) -> StepInfo | None:
        """One optimization step.

        Args:
            losses: as in :meth:`backward`, whose result then replaces ``.grad``; or a closure that returns them, which a
                weighting that ``observes`` runs again after the step. None: steps from ``.grad`` as :meth:`backward` or the
                caller left it.
            closure: the closure under the name that callers of torch optimizers use.
            scaler: scales the losses, and is updated after the step; leave out ``scaler.step`` and ``scaler.update``. The
                update is unscaled as it is combined, and the Gram's diagonal tells an overflow, so that nothing reads the
                gradients for the scaler. ``.grad`` is left unscaled.
            other: as in :meth:`backward`.
            representation: as there.
            gram_losses: as there.
            cuts: as there.

        Returns:
            The update's info; None without losses.

        Raises:
            As :meth:`backward`, and a ``ValueError`` for both losses and a closure, or for no losses after
            :meth:`accumulate`, whose sums no update has used. An exception of the inner optimizer's step puts
            ``.grad`` and the weighting's state back (but not that of one with a memory of gradients, which has moved); what
            that step had changed by then stays changed.
        """
        if closure is not None:
            if losses is not None:
                raise ValueError("losses and closure are both given; pass one of them.")
            losses = closure
        if losses is None:
            if scaler is not None:
                raise ValueError("scaler is given without losses; pass the losses, or call scaler.step(optimizer).")
            if other is not None:
                raise ValueError("other is given without losses; pass the losses of both batches.")
            if any(given is not None for given in (representation, gram_losses, cuts)):
                raise ValueError("representation, gram_losses or cuts is given without losses; pass the losses of the batch.")
            if self._accumulated.batches:
                raise ValueError(
                    f"losses is None, but no update has used the gradients of {self._accumulated.batches} calls of accumulate; "
                    "pass the last micro-batch's losses to backward or step, or drop the gradients with zero_grad()."
                )
            reads = self._step_inner(self._skip.on_device())
            if self._info is not None:
                self._info.host_reads += reads
            self._forget()
            return None
        if callable(losses):
            closure = losses
            losses = cast(Losses, self._evaluated(losses))
        scaler = enabled_scaler(scaler, self.on_nonfinite)
        if scaler is not None:
            check_not_float16(self.params)
        with self._undone_on_error() as before:
            source = gram_source(self, representation, gram_losses, cuts, before)
            info = self._backward(losses, scaler, accumulate=False, kept=before, other=other, source=source)
            info.host_reads += self._step_inner(self._skip.on_device())
            if scaler is not None:
                update_scale(scaler, info.skipped)
        self._forget()
        if closure is not None and self._one_pass and self.weighting.observes:
            observe(self, closure, info.tasks)
        return info

    def _evaluated(self, closure: Callable[[], Losses]) -> Any:
        """What :meth:`_backward` takes of a closure."""
        with torch.enable_grad():
            return closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._forget()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any], *, shared: bool | None = None) -> None:
        """Adds a group to the inner optimizer.

        Args:
            param_group: as for any optimizer.
            shared: whether its parameters are shared; otherwise they belong to the tasks that reach them. None: shared
                when ``heads`` alone was given at construction, told apart by the next ``backward`` when neither was.
        """
        roles = self._roles.refreshed(self.params)
        self.optimizer.add_param_group(param_group)
        self._roles = roles.refreshed(self.params, shared)

    def _backward(
        self,
        losses: Losses,
        scaler: torch.amp.GradScaler | None,
        accumulate: bool,
        kept: Snapshot,
        other: Losses | None = None,
        source: GramSource | None = None,
    ) -> StepInfo:
        check_second(self.weighting, self._crosses, other)
        if self._one_pass:
            return backward_of_losses(self, *self._begin(losses, scaler, accumulate), accumulate, kept)
        computes, ranks = self._held.left <= 0 and source is None, self.ranks
        batch = self._micro_batch(losses, scaler, accumulate, other, last=True, source=source)
        with torch.no_grad():
            tasks, ordered, rows, params, scale = self._accumulated.added_to(batch)
            if self._accumulated.batches and ranks.communicates:
                rows = [self._scatter_row(*row) for row in zip(rows, params, strict=True)]
                ranks.wait()
            roles = self._roles
            shared, own = roles.shared, roles.own(tasks)[0]
            count = len(tasks) if other is None else 2 * len(tasks)
            shared_rows, own_rows = rows[:-count], rows[-count:]
            complete = all(loss is not None for loss in ordered)
            if complete:
                self._check_reached(shared_rows, shared)
            factor = None if accumulate else scale  # .grad is left unscaled
            weighted = self.max_norm is not None or self.on_nonfinite == "drop_task" or ranks.scale != 1 or factor is not None
            problems = Problems(self.per or roles.group_of_shared(), shared)
            kind = self.weighting
            tracked = Tracked(kind, shared_rows, scale) if isinstance(kind, MemoryWeighting) else None
            gram, own_gram = self._squares(tasks, problems, shared_rows, own_rows, own, scale, tracked)
            values, present = self._loss_values(ordered)
            gram, own_gram, values, seed = ranks.decisive(gram, own_gram, values, self._seed(computes))
            facts = Batch(tasks, values, present, complete, seed, tracked)
            if isinstance(kind, Elementwise):
                info, buffers, own_weights = self._by_element(facts, shared_rows, gram, own_gram, scale, factor, kept)
            else:
                solve = self._solve if computes else self._keep
                info, applied, own_weights = solve(facts, gram, own_gram, kept)
                if self._compares:
                    ranks.require_equal({"weights": (None, str(info.weights.tolist()))})
                buffers = ranks.buffers(shared_rows, shared)
                if tracked is None:
                    problems.combine(shared_rows, ranks.scaled(applied if factor is None else applied / factor), buffers)
            own_weights = own_weights if factor is None else own_weights / factor
            shows_nan = first_written(shared, buffers)
            own_buffers = ranks.buffers(own_rows, own)
            own_buffers = combine_own(own_rows, own_buffers, ranks.scaled(own_weights), weighted or shows_nan is None)
            if tracked is not None:
                tracked.combine(applied, ~info.skipped, buffers, scaled=accumulate)
                kept.forget_buffers()  # which belong to the memories as they are now
            shows_nan = first_written(own, own_buffers) if shows_nan is None else shows_nan
            every = [*shared, *own]
            self._fill(every, ranks.gather([*buffers, *own_buffers], every), accumulate)
            if source is not None:
                source.complete(info)
        self._accumulated = Accumulated()
        self._note(info, shows_nan, scaled=scale is not None and accumulate)
        return info

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
        weighted = weighted_gradients if source is None else source.gradients
        rows = partial(
            self._rows, tasks=tasks, shared=shared, own=own, own_of_task=own_of_task, received=received, weighted=weighted
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

    def _fill(self, params: Sequence[Tensor], grads: Sequence[Tensor | None], accumulate: bool) -> None:
        """Puts the update into ``.grad``: adds it to what is there, or replaces it for every parameter."""
        if not accumulate:
            self._skip = SkipFlag()
            for param in self.params:
                param.grad = None
        add_to_grad(params, grads)

    def _note(self, info: StepInfo, shows_nan: Tensor | None, scaled: bool) -> None:
        """Notes the update for the step that follows. ``scaled``: it is left scaled, and the scaler decides about a skip."""
        self.tasks, self._info, self._compares = info.tasks, info, self.check_ranks and self.ranks.size > 1
        if scaled or self.on_nonfinite == "raise":
            self._skip = SkipFlag()
        elif shows_nan is not None:
            self._skip = self._skip.with_update(shows_nan, info.skipped)

    def _check_heads(self, tasks: Sequence[Task]) -> None:
        for task in self._roles.heads:
            if task not in tasks:
                raise ValueError(f"heads names the unknown task {task!r}; the tasks are {', '.join(map(repr, tasks))}.")

    def _rows(
        self,
        losses: Sequence[Tensor | None],
        tasks: Sequence[Task],
        shared: list[Tensor],
        own: list[Tensor],
        own_of_task: list[list[int]],
        received: Received,
        weighted: Callable[..., tuple[list[Tensor | None], Rows]],
    ) -> tuple[Rows, Rows]:
        """Gradients as K x N rows of the shared and K x M rows of the other parameters, None for frozen ones.

        Where no weights are computed, the shared parameters have one row, the gradient of the weighted losses.
        """
        live = [n for n, p in enumerate(shared) if p.requires_grad]
        own_live = [[m for m in indices if own[m].requires_grad] for indices in own_of_task]
        bodies, heads = [shared[n] for n in live], [[own[m] for m in indices] for indices in own_live]
        if self._held.left <= 0:
            rows = task_gradients(losses, [bodies + head for head in heads], self.gradients, received)
            shared_rows = [_scatter(row[: len(live)], live, len(shared)) for row in rows]
            own_grads = [row[len(live) :] for row in rows]
        else:
            hidden = self.ranks.hides_leaves
            if self.gradients == "backward" and not hidden:
                check_heads_in_graph(losses, [self._roles.heads.get(task, []) for task in tasks], self.name_of)
            weights = self._held.of_tasks(torch.empty(len(losses), dtype=torch.float64, device=self.device))
            row, own_grads = weighted(losses, weights, bodies, heads, self.gradients, hidden)
            own_grads = [received(grads, head) for grads, head in zip(own_grads, heads, strict=True)]
            shared_rows = [_scatter(received(row, bodies), live, len(shared))]
        self.ranks.wait()
        own_rows = [_scatter(grads, indices, len(own)) for grads, indices in zip(own_grads, own_live, strict=True)]
        return shared_rows, own_rows

    def _scatter_row(self, row: list[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
        with torch.no_grad():
            if self._compares:
                self.ranks.compare_row(row, params)
            return self.ranks.scatter(row, params)

    def _check_reached(self, rows: Rows, shared: list[Tensor]) -> None:
        for param, column in zip(shared, zip(*rows, strict=True), strict=True):
            if column[0] is None and param.requires_grad and all(row is None for row in column):
                raise ValueError(
                    f"no loss reaches the shared {self.name_of(param)}; leave it out of shared, freeze it with "
                    'requires_grad_(False), or use gradients="backward" where a reentrant checkpoint hides it.'
                )

    # --- failing ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _undone_on_error(self) -> Iterator[Snapshot]:
        """Puts ``.grad``, the weighting's state and this object's own back when the block raises."""
        before = Snapshot(self.params, self.weighting)
        own = self.tasks, self._skip, self._info, self._roles, self._held, self._accumulated
        try:
            yield before
        except BaseException:
            before.restore()
            self.tasks, self._skip, self._info, self._roles, self._held, self._accumulated = own
            raise


def _scatter(values: Sequence[Tensor | None], indices: Sequence[int], size: int) -> list[Tensor | None]:
    row: list[Tensor | None] = [None] * size
    for index, value in zip(indices, values, strict=True):
        row[index] = value
    return row

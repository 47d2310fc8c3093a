"""The multi-task optimizer: task losses in, one combined gradient and a torch optimizer's step out."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args, overload

import torch
from torch import Tensor

from ..distributed import ranks_of
from ..gradients import (
    SOURCES,
    Source,
    add_to_grad,
    check_dense,
    check_reached,
    combine_own,
)
from ..granularity import KINDS, Groups, Problems
from ..reference import Granularity
from ..weightings import Elementwise, MemoryWeighting, Weighting, as_method
from ..weightings.cross.base import takes_cross
from .accumulated import Accumulated
from .decide import Batch, check_options
from .finish import Finish, Part
from .gram_source import GramSource
from .held import HeldWeights
from .host import HostProblems
from .info import StepInfo
from .losses import Losses, check_without_losses, task_names
from .one_pass import backward_of_losses, observe
from .previous import OneRead, WeightsFrom
from .representation import Representation
from .roles import Roles, Task
from .rows import RowsKind, check_rows, widen_
from .saved import SavedState
from .scaler import check_not_float16, enabled_scaler, update_scale
from .second import check_second
from .skip import SkipFlag, first_written
from .sources import gram_source
from .streamed import Cuts
from .sub_batch import SubBatch
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
        weights_from: ``"previous"``: the update takes the weights of the update before, as the line above keeps them, and this
            step's Gram gives the next one's, so that both are one read of the gradients; ``max_norm`` adds a pass over the
            update. The first update takes its own weights. With ``per="model"``, weightings of a Gram, and not ``"drop_task"``.
        max_norm: clips the norm of the update over all parameters, as ``clip_grad_norm_`` after ``backward`` would. Each
            ``backward`` clips its own update; what :meth:`accumulate` has added up is part of it.
        on_nonfinite: what a gradient that is not finite does. ``"skip"``: the step changes nothing, nor does the weighting's
            state. ``"drop_task"``: the task counts as absent, but its head gets a zero gradient, since the host does not know;
            a step with no finite task left is skipped; between updates of the weights tasks cannot be told apart, and the step
            is skipped. ``"raise"``: a ``RuntimeError`` that names the tasks.
        gradients: ``"autograd"`` for plain eager and compiled models, ``"backward"`` for models that need ``loss.backward()``
            itself (post-accumulate-grad hooks, reentrant checkpoints, FSDP2). None: the latter where a parameter is a DTensor.
        rows: how the K gradients of the shared parameters are held until they are combined. ``"stored"``: as autograd gives
            them. ``"bfloat16"``: rounded, each the moment that it is there, and the update as well; half of float32's memory, a
            relative error of 2^-9. ``"host"``: in the host's memory, copied while the backward passes go on; the device has the
            update and two blocks of rows that come back. Neither with ``fused``; ``"host"`` for weightings of a Gram, without
            ``per="channel"`` and :meth:`accumulate`. ``"online"``: with ``"pcgrad"`` only, each gradient and the sum of those
            before it are taken off each other, in random order; two gradients at a time, an approximation of three or more
            tasks, no ``info.gram``. None of them on several ranks, or with ``weights_from="previous"``. What a step makes of
            ``cuts`` or a ``representation`` has no such rows.
        fused: ``step(losses)`` takes the torch optimizer's step in the read that combines the gradients: no combined gradient
            is ever in memory, and ``.grad`` is None afterwards, for hooks of the optimizer, too. With torch.optim.SGD, Adam and
            AdamW, any option but ``differentiable``; in float32 of 16-bit parameters; a step that is skipped is skipped on the
            device whatever the optimizer's flags. ``backward`` and ``step()`` are as ever, on the same state. Not with
            ``per="channel"``, a method without weights of gradients, or plain parameters on several ranks.
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
        weights_from: WeightsFrom = "current",
        max_norm: float | None = None,
        on_nonfinite: Nonfinite = "skip",
        gradients: Source | None = None,
        rows: RowsKind = "stored",
        fused: bool = False,
        process_group: object = None,
        mesh: object = None,
        check_ranks: bool = False,
    ) -> None:
        super().__init__(optimizer)
        weighting = as_method(weighting)
        for name, value, known in (
            ("on_nonfinite", on_nonfinite, get_args(Nonfinite)),
            ("gradients", gradients, (*SOURCES, None)),
            ("weights_from", weights_from, get_args(WeightsFrom)),
            ("rows", rows, get_args(RowsKind)),
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
        options = {"per": per, "update_every": update_every, "weights_from": weights_from, "on_nonfinite": on_nonfinite}
        check_options(weighting, self._one_pass, options)
        params = self.params
        self.ranks = ranks_of(params, process_group, mesh, self.name_of)
        self.ranks.check_gradients(gradients)
        if self.ranks.size > 1 and isinstance(weighting, (Elementwise, MemoryWeighting)):
            raise ValueError(
                f"{type(weighting).__name__} takes whole gradients, of which a rank has a part; train in one process."
            )
        if self.ranks.size > 1 and per == "channel":
            raise ValueError('per="channel" needs whole channels, which a rank does not have; pass per="tensor" or "model".')
        check_rows(rows, weighting, self._one_pass, self.ranks, {"per": per, "weights_from": weights_from, "fused": fused})
        self._finish = Finish(self, weighting, per) if fused else None
        self._roles = Roles(params, shared, heads, groups)
        self.tasks = None if tasks is None else task_names(tasks)
        if self.tasks is not None:
            self._check_heads(self.tasks)
        self.per: Granularity | None = None if isinstance(per, Mapping) else per
        self.update_every, self.weights_from, self._held = update_every, weights_from, HeldWeights()
        self.max_norm, self.on_nonfinite = max_norm, on_nonfinite
        self.rows: RowsKind = rows
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
        if self.rows in ("host", "online"):
            raise ValueError(
                f'accumulate adds up gradients on the device, and rows is "{self.rows}"; pass rows="bfloat16" or "stored", or '
                "call backward for every micro-batch."
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
                caller left it; so does a closure of torch's convention, which calls :meth:`backward` itself and returns a
                scalar or nothing.
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
        from_grad = losses is None
        if callable(losses):
            closure = losses
            losses = cast(Losses, self._evaluated(losses))
            from_grad = self._info is not None and (losses is None or isinstance(losses, Tensor))
        if from_grad:
            given = {
                "scaler": scaler,
                "other": other,
                "representation": representation,
                "gram_losses": gram_losses,
                "cuts": cuts,
            }
            check_without_losses(given, self._accumulated.batches)
            reads = self._step_inner(self._skip.on_device())
            if self._info is not None:
                self._info.host_reads += reads
            self._forget()
            return None
        scaler = enabled_scaler(scaler, self.on_nonfinite)
        if scaler is not None:
            check_not_float16(self.params)
        with self._undone_on_error() as before:
            source = gram_source(self, representation, gram_losses, cuts, before)
            info = self._backward(cast(Losses, losses), scaler, accumulate=False, kept=before, other=other, source=source)
            if self._finish is None:
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
                check_reached(shared_rows, shared, self.name_of)
            factor = None if accumulate else scale  # .grad is left unscaled
            weighted = self.max_norm is not None or self.on_nonfinite == "drop_task" or ranks.scale != 1 or factor is not None
            values, present = self._loss_values(ordered)
            previous = self._held.of_present(present) if computes and self.weights_from == "previous" else None
            divided = factor if self._finish is None else None  # by the finish, else
            one_read = None if previous is None else OneRead.of(self, shared_rows, tasks, previous, divided)
            per = self.per or roles.group_of_shared()
            problems = one_read or (self._problems(per, shared) if computes else Problems(per, shared))
            kind = self.weighting
            tracked = Tracked(kind, shared_rows, scale) if isinstance(kind, MemoryWeighting) else None
            gram, own_gram = self._squares(tasks, problems, shared_rows, own_rows, own, scale, tracked)
            gram, own_gram, values, seed = ranks.decisive(gram, own_gram, values, self._seed(computes))
            facts = Batch(tasks, values, present, complete, seed, tracked, previous)
            if isinstance(kind, Elementwise):
                info, buffers, own_weights = self._by_element(facts, shared_rows, gram, own_gram, scale, factor, kept)
            else:
                solve = self._solve if computes else self._keep
                info, applied, own_weights = solve(facts, gram, own_gram, kept)
                if self._compares:
                    ranks.require_equal({"weights": (None, str(info.weights.tolist()))})
                if self._finish is not None and not accumulate:
                    rows, applied = ([one_read.buffers], applied) if one_read else (shared_rows, problems.by_tensor(applied))
                    self._finish.update(info, Part(shared, rows, applied), Part(own, own_rows, own_weights), factor=factor)
                    if source is not None:
                        source.complete(info)
                    return info
                if one_read is not None:
                    buffers = one_read.finish(applied, self.max_norm)
                elif tracked is not None:
                    buffers = ranks.buffers(shared_rows, shared)
                else:
                    out = None if isinstance(problems, HostProblems) else ranks.buffers(shared_rows, shared)
                    scaled = ranks.scaled(applied if factor is None else applied / factor)
                    buffers = problems.combine(shared_rows, scaled, out)
                    del out  # the buffers have no other reference then, as widening them wants
            own_weights = own_weights if factor is None else own_weights / factor
            shows_nan = first_written(shared, buffers)
            own_buffers = ranks.buffers(own_rows, own)
            own_buffers = combine_own(own_rows, own_buffers, ranks.scaled(own_weights), weighted or shows_nan is None)
            if tracked is not None:
                tracked.combine(applied, ~info.skipped, buffers, scaled=accumulate)
                kept.forget_buffers()  # which belong to the memories as they are now
            if self.rows == "bfloat16" and computes:
                widen_(buffers, shared_rows, shared)
            shows_nan = first_written(own, own_buffers) if shows_nan is None else shows_nan
            every = [*shared, *own]
            self._fill(every, ranks.gather([*buffers, *own_buffers], every), accumulate)
            if source is not None:
                source.complete(info)
        self._accumulated = Accumulated()
        self._note(info, shows_nan, scaled=scale is not None and accumulate)
        return info

    def _problems(self, per: Granularity | Groups, tensors: Sequence[Tensor]) -> Problems:
        """Of rows that are held as ``rows`` says."""
        return (HostProblems if self.rows == "host" else Problems)(per, tensors)

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

    # --- failing ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _undone_on_error(self) -> Iterator[Snapshot]:
        """Puts ``.grad``, the weighting's state and this object's own back when the block raises."""
        before = Snapshot(self.params, self.weighting)
        own = self.tasks, self._skip, self._info, self._roles, self._held.copied(), self._accumulated
        try:
            yield before
        except BaseException:
            before.restore()
            self.tasks, self._skip, self._info, self._roles, self._held, self._accumulated = own
            raise

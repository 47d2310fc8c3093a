"""Task priority by connection strength: learn priorities in steps of one task, keep them in steps of all (Jeong, Yoon 2024)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .. import ops
from ..distributed import ranks_of
from ..dtensor import has_whole_channels, local, placed_like
from ..gradients import (
    SOURCES,
    Rows,
    Source,
    check_dense,
    check_graph,
    check_hooks,
    combine_own,
    task_gradients,
    update_buffers,
)
from ..granularity import Problems
from ..nn.context import Task, index_of
from ..nn.context import task as current_task
from ..nn.convert import task_norms
from ..nn.layers import Layer, common, given_layers, pairs
from ..nn.norms import TaskNorm
from ..nn.record import recorded_calls
from ..priority import connection_strength, priority_combine
from ..weightings import Weighting, as_weighting
from ..weightings.seeded import drawn_seed
from .compare import step_entries
from .info import PriorityInfo
from .losses import Closures, check_loss, loaded_names, order_closures, task_names
from .phases import Draw, Mode, Phases
from .priority_shards import combine_shards
from .scaler import enabled_scaler
from .statistics import RunningStatistics
from .undo import Snapshot, load_buffers
from .visits import BatchSnapshot, visit
from .wrapper import WrappedOptimizer, with_step_hooks

STATE_KEY = "priority"
"""Entry of the state dict that holds tasks, epoch and draws; optimizers of torch ignore it."""


class TaskPriorityOptimizer(WrappedOptimizer):
    """Connection-strength-based optimization (Jeong and Yoon 2024, Algorithm 1) around a torch optimizer.

    Each task runs its own forward pass, through the same shared weights and its own norms (:mod:`mtlkernels.nn`).

    Phase 1 learns the priorities: one task after the other, on the same batch and in the order of ``tasks``, gets a visit: its
    loss and gradient at the current parameters, then an inner step, which leaves parameters that the task does not reach alone.
    Phase 2 keeps them: the gradients of all tasks at the same parameters, then one inner step. A shared weight with task norms
    gets :func:`mtlkernels.priority_combine` of them, any other parameter their sum.
    A batch is in phase 1 if P >= e / E, else in phase 2, with P uniform in [0, 1), e the epoch and E the number of epochs.

    What runs around a step: ``max_norm`` clips every visit's update on its own. A scheduler steps once a batch or epoch, by the
    caller, so all visits of a batch have one learning rate; moments of the inner optimizer move once a visit. A ``GradScaler``
    is given to :meth:`step`, which unscales and updates it once a visit: its ``growth_interval`` counts visits, K a batch in
    phase 1. Step hooks of this object run once a batch, those of the inner optimizer once a visit.

    Args:
        optimizer: the torch optimizer that applies the updates; ``.optimizer`` afterwards.
        model: the model whose parameters it holds, with task norms.
        epochs: E; needed by the modes ``"mixed"`` and ``"sequential"``, see :meth:`set_epoch`.
        mode: ``"mixed"``; ``"phase1"`` or ``"phase2"`` alone; ``"sequential"``: phase 1 in the first half of the epochs.
        draw: whether P is drawn for each ``"batch"``, as in the released code, or each ``"epoch"``, as the paper's text.
        tasks: the task names. None: those of the model's task norms, or the keys of the first step.
        layers: {weight: the task norm after it}, or :class:`mtlkernels.nn.Layer` objects. None: found from the graphs of the
            first step, as :func:`mtlkernels.nn.find_layers` says, which needs eager mode and every task, and again after
            parameters are added or unfrozen; ``.layers`` and :meth:`describe` list them.
        weighting: combines the gradients of phase 2 instead of priority, over all parameters that two or more tasks reach.
        loss_weights: {task: positive number}, multiplies the task's loss in both phases; 1 for others.
        skip_degenerate: whether a layer with one top task for all channels gets the plain sum, as in the released code.
        max_norm: clips the norm of each visit's update over all parameters, as ``clip_grad_norm_``.
        on_nonfinite: ``"skip"``: a visit whose update is not finite changes nothing, running statistics included. ``"raise"``:
            a ``RuntimeError`` that names the tasks.
        gradients: as for :class:`MultiTaskOptimizer`.
        transactional: whether a step that raises undoes the visits before, too; holds a copy of parameters and state.
        seed: of the draws of P, on the host and the same on every rank.
        process_group, mesh, check_ranks: as of :class:`MultiTaskOptimizer`. Every visit's update is that of the losses' means
            over the ranks. Priorities are of running variances averaged over the ranks, whose buffers stay each rank's own. Of
            DTensors ``layers`` must be given, and a rank must have whole channels of their weights.

    Raises:
        ValueError: an argument that does not fit; the message names it and the fix.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        epochs: int | None = None,
        mode: Mode = "mixed",
        draw: Draw = "batch",
        tasks: Sequence[Task] | None = None,
        layers: Mapping[Tensor, TaskNorm] | Iterable[Layer] | None = None,
        weighting: str | Weighting | None = None,
        loss_weights: Mapping[Any, float] | None = None,
        skip_degenerate: bool = True,
        max_norm: float | None = None,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        gradients: Source | None = None,
        transactional: bool = False,
        seed: int = 0,
        process_group: object = None,
        mesh: object = None,
        check_ranks: bool = False,
    ) -> None:
        super().__init__(optimizer)
        if not isinstance(model, torch.nn.Module):
            raise ValueError(f"model is a {type(model).__name__}; pass the torch.nn.Module whose norms are task norms.")
        for name, value, known in (
            ("on_nonfinite", on_nonfinite, ("skip", "raise")),
            ("gradients", gradients, (*SOURCES, None)),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; pass one of {', '.join(map(repr, known))}.")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm!r}; pass a positive number, or None not to clip.")
        self.ranks = ranks_of(self.params, process_group, mesh, self.name_of)
        self.ranks.check_gradients(gradients)
        self.check_ranks, self._compares = check_ranks, self.ranks.size > 1
        self.model, self.phases = model, Phases(mode, draw, epochs, seed)
        self.skip_degenerate, self.max_norm, self.on_nonfinite = skip_degenerate, max_norm, on_nonfinite
        self.gradients: Source = gradients or ("backward" if self.ranks.hides_leaves else "autograd")
        self.transactional = transactional
        self.weighting = None if weighting is None else as_weighting(weighting).to(self.device)
        self.loss_weights = dict(loss_weights or {})
        self._layers = None if layers is None else self._held(given_layers(layers))
        self._layers_given = layers is not None
        if self.ranks.hides_leaves and not self._layers_given:
            if self._needs_layers:
                raise ValueError(
                    "layers is None, and those of DTensor parameters cannot be found from graphs that do not have them as "
                    "leaves; pass layers={weight: the task norm after it}, of the sharded model."
                )
            self._layers, self._layers_given = (), True
        self._live: set[int] = set()  # what the layers were found among
        self._found: dict[Task, dict[int, Layer]] = {}
        self._tasks_given = tasks is not None
        self.tasks = self._names(tasks)
        self.completed: tuple[Task, ...] = ()
        """Tasks whose visit of the last step was completed; fewer than all after a step that raised."""

    def _names(self, tasks: Sequence[Task] | None) -> tuple[Task, ...] | None:
        """The task names, checked against norms, layers and loss weights."""
        norms = dict(task_norms(self.model))
        if self._needs_layers and not norms and self._layers is None:
            raise ValueError(
                "model has no task norms, without which no task has priority; pass mtlkernels.nn.to_task_norms(model, tasks), "
                "or weighting= to combine the gradients in another way."
            )
        first = next(iter(norms.values()), None)
        names = task_names(tasks) if tasks is not None else None if first is None else first.tasks
        for name, weight in self.loss_weights.items():
            if names is not None and name not in names:
                raise ValueError(f"loss_weights has the unknown task {name!r}; the tasks are {', '.join(map(repr, names))}.")
            if not 0 < weight < float("inf"):
                raise ValueError(f"loss_weights[{name!r}] is {weight!r}; pass a positive number, or leave the task out.")
        for path, norm in norms.items():
            for name in names or ():
                index_of(name, norm.tasks, f"the {type(norm).__name__} {path!r}")
        return names

    @property
    def _needs_layers(self) -> bool:
        return self.weighting is None and self.phases.mode != "phase1"

    # --- layers ----------------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> dict[str, Layer]:
        """Name of each weight whose channels have a priority -> its :class:`mtlkernels.nn.Layer`; empty until found."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {names.get(id(layer.weight), f"layer {n}"): layer for n, layer in enumerate(self._layers or ())}

    def describe(self) -> str:
        """A line for each parameter of two or more dimensions: its shape and its task norm, or that it gets the plain sum."""
        if self._layers is None:
            return "layers are found in the first step that has every task"
        norms = {id(norm): path for path, norm in task_norms(self.model)}
        lines = []
        for name, param in self.model.named_parameters():
            layer = self.layers.get(name)
            if param.dim() > 1:
                fate = "plain sum" if layer is None else f"norm {layer.side} it: {norms.get(id(layer.norm), 'not in model')}"
                lines.append(f"{name} {tuple(param.shape)}: {fate}")
        return "\n".join(lines)

    @torch.no_grad()
    def top_tasks(self) -> dict[str, Tensor]:
        """Name of each weight in ``layers`` -> the top task of its channels now, int64 [C] of indices into ``tasks``.

        The same on all ranks, which must call it together.
        """
        return dict(zip(self.layers, self._tops(list(self._layers or ())), strict=True))

    def _tops(self, layers: Sequence[Layer]) -> list[Tensor]:
        if not layers:
            return []
        parts = [layer.strength(cast(tuple[Task, ...], self.tasks)) for layer in layers]
        weights, scales, variances = (list(part) for part in zip(*parts, strict=True))
        variances = self.ranks.mean(*variances)
        return connection_strength(weights, scales, variances)[1]

    def _held(self, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        held = {id(p) for p in self.params}
        for n, layer in enumerate(layers):
            if id(layer.weight) not in held:
                raise ValueError(
                    f"layers[{n}] has a weight of shape {tuple(layer.weight.shape)} that the optimizer does not hold; add it "
                    "to the optimizer, or leave the layer out."
                )
            if not has_whole_channels(layer.weight):
                raise ValueError(
                    f"layers[{n}] has a weight of shape {tuple(layer.weight.shape)} whose channels are split between ranks; "
                    "shard dimension 0, as fully_shard and ColwiseParallel do, or leave the layer out."
                )
        return layers

    def _find_again(self) -> None:
        """Forgets found layers where parameters were added or unfrozen since."""
        live = {id(p) for p in self.params if p.requires_grad}
        if not self._layers_given and not live <= self._live:
            self._layers, self._found, self._live = None, {}, live

    def _decide_layers(self, tasks: tuple[Task, ...]) -> None:
        """Takes the layers that every task's graph has shown, once all have."""
        if self._layers is not None:
            return
        if len(self._found) == len(tasks):
            held = {id(p) for p in self.params}
            self._layers = tuple(x for x in common([self._found[t] for t in tasks]) if id(x.weight) in held)
            self._found = {}
        elif self._needs_layers:
            raise ValueError(
                "closure lacks a task, and layers are found in the first batch, which must have every task; pass "
                "layers=mtlkernels.nn.find_layers(model, forward), or start with a full batch."
            )

    # --- the phases ------------------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch e begins, 0 .. E - 1. With ``draw="epoch"`` it draws P, unless that is the epoch already.

        Raises:
            ValueError: no such epoch.
        """
        self.phases.set_epoch(epoch)

    @with_step_hooks
    def step(  # type: ignore[override]  # a closure for each task
        self, closure: Closures | None = None, *, scaler: torch.amp.GradScaler | None = None
    ) -> PriorityInfo | None:
        """One batch: K visits in phase 1, one visit of all tasks in phase 2.

        Args:
            closure: {task: a function that runs that task's forward pass and returns its scalar loss, unweighted and unscaled};
                a task that is missing or None is absent. Each runs in ``mtl.nn.task(task)``, once. None: an inner step from
                ``.grad`` as the caller left it.
            scaler: scales the losses, and is unscaled and updated after each visit. ``scaler.step`` is not called.

        Returns:
            What the visits did; None without closures. ``.grad`` is left as the last visit's update, unscaled and clipped.

        Raises:
            ValueError: closures or losses that do not fit; ``layers`` that cannot be found.
            RuntimeError: ``on_nonfinite="raise"`` and an update is not finite.
            A visit that raises, for whatever reason, leaves parameters, ``.grad``, running statistics and draws as before it;
            only an exception of the inner step itself may leave what that had changed by then. The visits before it stay: the
            error's note counts them and ``completed`` names them. ``transactional=True`` undoes everything.
        """
        if closure is None:
            self._step_inner(None)
            return None
        tasks, closures = order_closures(closure, self.tasks)
        scaler = enabled_scaler(scaler, self.on_nonfinite)
        self.ranks.check(self.params if self._compares or self.ranks.size == 1 else ())
        if self.gradients == "autograd":
            check_hooks(self.params, self.name_of)
        self._find_again()
        drawn, names = self.phases.state_dict(), self.tasks
        before = BatchSnapshot(self.optimizer, [self.model, self._state_of_weighting]) if self.transactional else None
        self.completed = ()
        try:
            info = PriorityInfo(tasks, self.phases.next())
            self.tasks = tasks
            if self._compares:
                self._compare(tasks, closures, info.phase)
            if info.phase == 1:
                for k, run in enumerate(closures):
                    if run is not None:
                        with visit(len(self.completed), f"of task {tasks[k]!r}", self.transactional):
                            self._visit(tasks, [run if k == j else None for j in range(len(tasks))], scaler, info)
                if len(self._found) == len(tasks):
                    self._decide_layers(tasks)
            else:
                with visit(0, "of all tasks", self.transactional):
                    self._visit(tasks, closures, scaler, info)
            self._compares = self.check_ranks and self.ranks.size > 1
            return info
        except BaseException:
            self.phases.load_state_dict(drawn)
            if before is not None:
                before.restore()
                self.completed = ()
            if not self.completed:
                self.tasks = names
            raise

    def _compare(self, tasks: tuple[Task, ...], closures: Sequence[object], phase: int) -> None:
        """Raises a ``RuntimeError`` where the ranks do not start the batch alike."""
        entries = dict(step_entries(self, self.ranks, tasks, closures, {"weighting": self._state_of_weighting}))
        entries["phase and epoch"] = None, f"{phase}, {self.phases.epoch}"
        self.ranks.require_equal(entries)

    def _visit(
        self, tasks: tuple[Task, ...], closures: list[Callable[[], Tensor] | None], scaler: Any, info: PriorityInfo
    ) -> None:
        """Gradients of the tasks that have a closure, combined, and one inner step."""
        here = tuple(task for task, run in zip(tasks, closures, strict=True) if run is not None)
        with self._undone_on_error() as (before, statistics):
            params = [p for p in self.params if p.requires_grad]
            rows: Rows = []
            losses: list[Tensor | None] = []
            for task, run in zip(tasks, closures, strict=True):
                loss, row = self._gradients(task, run, params, scaler)
                losses.append(loss)
                rows.append(row)
            if info.phase == 2:
                self._decide_layers(tasks)
            with torch.no_grad():
                losses = self._means(losses)
                finite = self._finite_tasks(rows, params) if self.on_nonfinite == "raise" else None
                grads = self._combined(rows, params, losses, scaler, info.phase)
                for param in self.params:
                    param.grad = None
                for param, grad in zip(params, grads, strict=True):
                    param.grad = None if grad is None else placed_like(grad, param)
                del grads
                if scaler is not None:
                    scaler.unscale_(self.optimizer)
                    scaler.update()  # before the step, which may raise
                update = [None if p.grad is None else local(p.grad) for p in params]
                square = self._square(update, params)
                usable = square < torch.inf  # false for NaN, too
                if finite is not None:
                    self._raise_nonfinite(tasks, torch.stack([*finite, usable]).tolist())
                    info.host_reads += 1
                norm = square.sqrt()
                if self.max_norm is not None:
                    factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's clip_grad_norm_
                    torch._foreach_mul_([grad for grad in update if grad is not None], factor)
                skip = None
                if finite is None:
                    skip = ~usable
                    before.restore_buffers_unless(usable)
                    statistics.restore(unless=usable)
                info.host_reads += self._step_inner(skip)
        self.completed += here
        info.add_visit(here, losses, norm, ~usable)

    def _gradients(
        self, task: Task, run: Callable[[], Tensor] | None, params: list[Tensor], scaler: Any
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """A task's loss, and the gradients of its weighted and scaled loss; None where its graph does not reach.

        They are this rank's shards of DTensors, and of other parameters the whole means over the ranks.
        """
        if run is None:
            return None, [None] * len(params)
        with torch.enable_grad(), current_task(task), recorded_calls() as calls:
            loss = run()
            check_loss(loss, "the loss of task {!r}", task)
            weight = self.loss_weights.get(task, 1.0)
            weight *= self.ranks.scale
            scaled = loss if weight == 1.0 else loss * weight
            if scaler is not None:
                scaled = scaler.scale(scaled)
            check_graph([scaled], self.gradients, by_reach=False)
            if self._layers is None:
                if self._needs_layers and not calls:
                    raise ValueError(
                        f"no task norm was seen in the forward pass of task {task!r}, whose model is compiled perhaps; pass "
                        "layers=mtlkernels.nn.find_layers(model, forward) of the eager model."
                    )
                self._found[task] = pairs(calls, [loss])
            (row,) = task_gradients([scaled], [params], self.gradients)
        if not any(grad is not None for grad in row):
            raise ValueError(f"the loss of task {task!r} reaches no parameter of the optimizer; compute it from the model.")
        check_dense([task], [row], params, self.name_of)
        with torch.no_grad():
            if self._compares:
                self.ranks.compare_row(row, params)
            parts = self.ranks.scatter(row, params)
            del row
            self.ranks.wait()
            return loss.detach(), self.ranks.held(parts, params)

    def _means(self, losses: list[Tensor | None]) -> list[Tensor | None]:
        """The losses' means over the ranks; None for an absent one."""
        if self.ranks.size == 1:
            return losses
        (means,) = self.ranks.mean(self._loss_values(losses)[0])
        return [None if own is None else mean for own, mean in zip(losses, means, strict=True)]

    def _square(self, row: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
        """Squared norm of a row, scalar."""
        if not self.ranks.hides_leaves:  # every rank has all of it
            return cast(Tensor, ops.gram([row])).reshape(())
        return self.ranks.sum(self.ranks.gram(Problems("model", params), [row], params))[0].reshape(())

    def _combined(
        self, rows: Rows, params: list[Tensor], losses: Sequence[Tensor | None], scaler: Any, phase: int
    ) -> list[Tensor | None]:
        """The update of every parameter, still scaled."""
        weights = torch.ones(len(rows), dtype=torch.float64, device=self.device)
        if phase == 1:
            return combine_own(rows, self._buffers(rows, params), weights, weighted=False)
        present = [k for k, loss in enumerate(losses) if loss is not None]
        many = [n for n in range(len(params)) if sum(rows[k][n] is not None for k in present) > 1]
        # Moved, not copied: what no other list holds may become .grad itself.
        columns = [[_taken(row, n) for n in many] for row in rows]
        shared = [params[n] for n in many]
        buffers = self._buffers(columns, shared)
        if self.weighting is not None:
            ops.combine(columns, self._weights(self.weighting, columns, shared, losses, scaler), out=buffers)
        elif many:
            layer_of = {id(layer.weight): layer for layer in self._layers or ()}
            everywhere = [all(columns[k][m] is not None for k in present) for m in range(len(many))]
            found = [layer_of.get(id(p)) if there else None for p, there in zip(shared, everywhere, strict=True)]
            tops = iter(self._tops([layer for layer in found if layer is not None]))
            top = [None if layer is None else next(tops) for layer in found]
            if self.ranks.hides_leaves:
                combine_shards(self.ranks, columns, shared, top, self.skip_degenerate, buffers)
            else:
                priority_combine(columns, top, self.skip_degenerate, out=buffers)
        result = combine_own(rows, self._buffers(rows, params), weights, weighted=False)
        for n, buffer in zip(many, buffers, strict=True):
            result[n] = buffer
        return result

    def _buffers(self, rows: Rows, params: Sequence[Tensor]) -> list[Tensor | None]:
        return update_buffers(rows, [local(param) for param in params] if self.ranks.hides_leaves else params)

    def _weights(
        self, weighting: Weighting, rows: Rows, params: list[Tensor], losses: Sequence[Tensor | None], scaler: Any
    ) -> Tensor:
        gram = cast(Tensor, ops.gram(rows)).to(self.device)
        if self.ranks.hides_leaves:
            (gram,) = self.ranks.sum(self.ranks.gram(Problems("model", params), rows, params).to(self.device))
        seed = drawn_seed(weighting, self.device) if self.ranks.size > 1 else None
        if seed is not None:
            none = gram.new_zeros(0)
            seed = self.ranks.decisive(none, None, none, seed)[3]
        if scaler is not None:
            gram = gram / scaler.scale(torch.ones((), device=self.device)).double().square()
        values, active = self._loss_values(losses)
        finite = (gram.diagonal() < torch.inf).all()  # squared norms: false for inf and NaN
        known = torch.where(active, values, 0.0)
        weights = weighting(torch.where(finite, gram, 0.0), active=active, losses=known, seed=seed)
        return torch.where(finite, weights, torch.nan)  # which the update shows, even where a weight was to be 0

    # --- failing ---------------------------------------------------------------------------------------------------------

    def _finite_tasks(self, rows: Rows, params: Sequence[Tensor]) -> list[Tensor]:
        return [self._square(row, params) < torch.inf for row in rows]

    def _raise_nonfinite(self, tasks: tuple[Task, ...], verdict: list[bool]) -> None:
        """``verdict``: whether each task's gradients are finite, and whether the update is."""
        named = ", ".join(repr(task) for task, finite in zip(tasks, verdict, strict=False) if not finite)
        if named:
            raise RuntimeError(f"gradients of task {named} are not finite; this visit changed nothing.")
        if not verdict[-1]:
            raise RuntimeError("the combined gradient is not finite; this visit changed nothing.")

    @property
    def _state_of_weighting(self) -> torch.nn.Module:
        return torch.nn.Module() if self.weighting is None else self.weighting

    @contextmanager
    def _undone_on_error(self) -> Iterator[tuple[Snapshot, RunningStatistics]]:
        """Puts ``.grad``, the weighting's state, running statistics and what was found back when the block raises."""
        before = Snapshot(self.params, self._state_of_weighting)
        found = self._layers, dict(self._found)
        try:
            with RunningStatistics(self.model).watched() as statistics:
                yield before, statistics
        except BaseException:
            before.restore()
            self._layers, self._found = found
            raise

    # --- checkpoints -----------------------------------------------------------------------------------------------------

    def _extra_state(self) -> dict[str, Any]:
        """``{"priority": {...}}``: task names, epoch, draws and the weighting's state. Layers and options are not in it."""
        own = {
            "tasks": None if self.tasks is None else list(self.tasks),
            **self.phases.state_dict(),
            "weighting": dict(self._state_of_weighting.state_dict()),
        }
        return {STATE_KEY: own}

    def _load(self, state_dict: dict[str, Any]) -> None:
        """A state dict without the entry of its own leaves epoch, draws and the weighting's state as they are."""
        own = state_dict.pop(STATE_KEY, None)
        with self._undone_on_error():
            if own is None:
                super()._load(state_dict)
                return
            tasks = loaded_names(own["tasks"], self.tasks, self._tasks_given)
            self.phases.check(own)
            if self.weighting is not None:
                load_buffers(self.weighting, own["weighting"], self.device)
            elif own["weighting"]:
                raise ValueError("the state dict holds a weighting's state; pass the same weighting= to go on with it.")
            super()._load(state_dict)
        self.tasks = tasks
        self.phases.load_state_dict(own)


def _taken(row: list[Tensor | None], n: int) -> Tensor | None:
    value, row[n] = row[n], None
    return value

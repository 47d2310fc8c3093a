"""The passes of a flatness-seeking step: gradients at the parameters, and at those of each task's perturbation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import ops
from ..distributed import Ranks
from ..dtensor import local
from ..flat import perturb_, restore_
from ..gradients import Received, Rows, Source, task_gradients
from .losses import Losses, order_losses
from .roles import Task
from .statistics import RunningStatistics

LossesFn = Callable[[], Losses] | Mapping[Any, Callable[[], Tensor] | None]
"""A function that returns the losses of all tasks at the current parameters, or {task: a function that returns its loss}."""


class Inputs(NamedTuple):
    """The parameters that require grad: the shared ones, the others, and which of those each task may reach."""

    shared: list[Tensor]
    own: list[Tensor]
    own_of_task: list[list[int]]

    def of_task(self, k: int) -> list[Tensor]:
        return [*self.shared, *(self.own[m] for m in self.own_of_task[k])]


class Gradients(NamedTuple):
    """K rows each of the shared parameters, at the parameters (None: not kept) and at the perturbed ones; K of the others."""

    loss: Rows | None
    sam: Rows
    own: Rows
    perturbed_losses: Tensor


class Settings(NamedTuple):
    """What a step perturbs by, as :class:`FlatMinimaOptimizer` takes it; ``keeps``: whether the loss gradients are kept."""

    rho: float
    head_rho: float
    adaptive: bool
    joint: bool
    beta: float
    probe: float
    keeps: bool
    gradients: Source
    device: torch.device


class Passes:
    """The passes of one step: gradients at the parameters and at perturbed ones, in the order that holds the least memory.

    Every row becomes this rank's part of it as soon as it is there. A perturbation is that of the mean gradient over the ranks,
    so that all of them differentiate at the same parameters.

    Args:
        settings: what a step perturbs by.
        losses_fn: the losses at the current parameters.
        tasks: K names.
        inputs: the parameters.
        statistics: of norms, put back after every perturbed pass.
        scaler: scales the losses.
        ranks: that train together.
        received: makes a row this rank's part of it.
    """

    def __init__(
        self,
        settings: Settings,
        losses_fn: LossesFn,
        tasks: tuple[Task, ...],
        inputs: Inputs,
        statistics: RunningStatistics,
        scaler: torch.amp.GradScaler | None,
        ranks: Ranks,
        received: Received,
    ) -> None:
        self.settings, self.losses_fn, self.tasks, self.inputs = settings, losses_fn, tasks, inputs
        self.statistics, self.scaler, self.ranks, self.received = statistics, scaler, ranks, received
        self._buffers: dict[int, Tensor] = {}

    def along_tasks(self, losses: Sequence[Tensor | None]) -> Gradients:
        """Each task perturbed along its own gradient."""
        present = [loss is not None for loss in losses]
        inputs = [self.inputs.of_task(k) for k in range(len(self.tasks))]
        rows = task_gradients(losses, inputs, self.settings.gradients, self.received)
        self.ranks.wait()
        count = len(self.inputs.shared) if self.settings.keeps else 0

        def direction(k: int) -> list[Tensor | None]:
            row, rows[k] = rows[k], rows[k][:count]
            return self.ranks.held(row, inputs[k])

        result = self._at_perturbed(present, direction)
        return result._replace(loss=[row[:count] for row in rows]) if self.settings.keeps else result

    def samo(self, losses: Sequence[Tensor | None]) -> Gradients:
        """Each task perturbed along (1 - beta) g + beta |g| z_k / |z_k|, tensor by tensor, g the gradient of the mean loss.

        z_k is z times the difference of the task's losses at theta + probe z and theta - probe z, z standard normal and the
        same for all tasks; the difference matters by its sign alone. Heads are perturbed along g.
        """
        shared, own, _ = self.inputs
        there = [loss for loss in losses if loss is not None]
        everything = [*shared, *own]
        (mean_row,) = task_gradients([torch.stack(there).mean()], [everything], self.settings.gradients)
        present = [loss is not None for loss in losses]
        with torch.no_grad():
            probes = [torch.randn_like(p) for p in shared]
            above, below = (self._losses_at(probes, sign * self.settings.probe, present) for sign in (1.0, -1.0))
            signs = (above - below).sign()
            shared_row, own_row = mean_row[: len(shared)], mean_row[len(shared) :]
            norms, lengths = (cast(Tensor, ops.gram([row], per="tensor"))[:, 0, 0].sqrt() for row in (shared_row, probes))
            ratio = self.settings.beta * norms / torch.where(lengths > 0, lengths, 1.0)

        def direction(k: int) -> list[Tensor | None]:
            weights = torch.stack([torch.full_like(ratio, 1 - self.settings.beta), signs[k] * ratio], -1)
            mixed = ops.combine([shared_row, list[Tensor | None](probes)], weights)
            return [*mixed, *(own_row[m] for m in self.inputs.own_of_task[k])]

        return self._at_perturbed(present, direction)

    def _losses_at(self, probes: list[Tensor], distance: float, present: list[bool]) -> Tensor:
        """Losses at theta + distance * probes, float64 [K], 0 for an absent task."""
        shared = self.inputs.shared
        originals = [p.detach() for p in shared]
        device = self.settings.device
        radii = torch.full((len(shared),), distance, dtype=torch.float64, device=device)
        after = [self._buffer(p) for p in shared]
        torch.ops.mtlkernels.perturb_(after, originals, probes, radii, False)
        try:
            for param, value in zip(shared, after, strict=True):
                param.data = value
            torch.clear_autocast_cache()
            _, losses = order_losses(call(self.losses_fn), self.tasks)
        finally:
            restore_(shared, originals)
            self.statistics.restore()
        _check_present(losses, present)
        zero = torch.zeros((), device=device)
        return torch.stack([zero if loss is None else loss.detach().reshape(()).to(device) for loss in losses]).double()

    def _at_perturbed(self, present: list[bool], direction: Callable[[int], list[Tensor | None]]) -> Gradients:
        """Gradients of each task's loss at its own perturbed parameters; ``direction(k)``: along what, of its inputs."""
        count, num_own = len(self.inputs.shared), len(self.inputs.own)
        sam: Rows = [[None] * count for _ in self.tasks]
        own: Rows = [[None] * num_own for _ in self.tasks]
        device = self.settings.device
        values = [torch.full((), torch.nan, device=device) for _ in self.tasks]
        for k, there in enumerate(present):
            if not there:
                continue
            inputs = self.inputs.of_task(k)
            loss, row = self._gradient_at(k, inputs, direction(k), present)
            sam[k], values[k] = row[:count], loss.detach().reshape(()).to(device)
            for m, grad in zip(self.inputs.own_of_task[k], row[count:], strict=True):
                own[k][m] = grad
            del row
        self.ranks.wait()
        return Gradients(None, sam, own, torch.stack(values).double())

    def _gradient_at(
        self, k: int, inputs: list[Tensor], along: list[Tensor | None], present: list[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        settings, count = self.settings, len(self.inputs.shared)
        groups, rho = [len(inputs)], [settings.rho]
        if not settings.joint:
            groups, rho = [count, len(inputs) - count], [settings.rho, settings.head_rho]
        originals = self._originals(inputs)
        try:
            self._perturb(inputs, originals, along, rho, groups)
            del along
            _, losses = order_losses(call(self.losses_fn, self.tasks[k]), self.tasks)
            _check_present(losses, present, k)
            loss = losses[k]
            assert loss is not None
            scaled = loss if self.scaler is None else self.scaler.scale(loss)
            only = [scaled if j == k else None for j in range(len(self.tasks))]
            of_task = [inputs if j == k else [] for j in range(len(self.tasks))]
            row = task_gradients(only, of_task, settings.gradients, self.received)[k]
        finally:
            self._restore(inputs, originals)
            self.statistics.restore()
        return loss, row

    # The shards of DTensors are written where they are, since fully_shard gathers from the memory that it knows: that costs a
    # copy of them before, and one back. Other parameters get other memory.

    @torch.no_grad()
    def _originals(self, inputs: list[Tensor]) -> list[Tensor]:
        """What gives the parameters their values back."""
        if not self.ranks.hides_leaves:
            return [p.detach() for p in inputs]
        kept = [self._buffer(p) for p in inputs]
        torch._foreach_copy_(kept, [local(p) for p in inputs])
        return kept

    def _perturb(
        self, inputs: list[Tensor], originals: list[Tensor], along: list[Tensor | None], rho: list[float], groups: list[int]
    ) -> None:
        adaptive, ranks = self.settings.adaptive, self.ranks
        if not ranks.hides_leaves:
            perturb_(inputs, along, rho, adaptive=adaptive, groups=groups, buffers=[self._buffer(p) for p in inputs])
            return

        def whole(squares: Tensor, keep: list[int]) -> Tensor:
            return ranks.whole_squares(squares, [inputs[n] for n in keep])

        before, after = [t.detach() for t in originals], [local(p) for p in inputs]
        perturb_(before, along, rho, adaptive=adaptive, groups=groups, buffers=after, whole=whole)

    @torch.no_grad()
    def _restore(self, inputs: list[Tensor], originals: list[Tensor]) -> None:
        if not self.ranks.hides_leaves:
            restore_(inputs, originals)
            return
        torch._foreach_copy_([local(p) for p in inputs], originals)
        torch.clear_autocast_cache()

    def _buffer(self, param: Tensor) -> Tensor:
        """Memory like what this rank has of a parameter, the same for all tasks of the step."""
        if id(param) not in self._buffers:
            self._buffers[id(param)] = torch.empty_like(local(param), requires_grad=False)
        return self._buffers[id(param)]


def check_function(losses_fn: Any) -> None:
    if isinstance(losses_fn, Mapping):
        for task, function in losses_fn.items():
            if function is not None and not callable(function):
                raise ValueError(
                    f"losses_fn[{task!r}] is a {type(function).__name__}; pass a function that returns the task's loss, which "
                    "is needed at perturbed parameters, too."
                )
    elif not callable(losses_fn):
        raise ValueError(
            f"losses_fn is a {type(losses_fn).__name__}; pass a function without arguments that returns the losses, which are "
            "needed at perturbed parameters, too."
        )


def call(losses_fn: LossesFn, task: Task | None = None) -> Losses:
    """The losses at the current parameters; of functions for each task, of one ``task`` where it is given."""
    with torch.enable_grad():
        if not isinstance(losses_fn, Mapping):
            return losses_fn()
        wanted = losses_fn.items() if task is None else [(task, losses_fn[task])]
        return {name: None if function is None else function() for name, function in wanted}


def _check_present(losses: Sequence[Tensor | None], present: list[bool], of: int | None = None) -> None:
    """Raises a ``ValueError`` where a perturbed pass lacks a loss that the first one had; ``of`` a task, that task's."""
    for k, (loss, there) in enumerate(zip(losses, present, strict=True)):
        if (of is None or of == k) and there and loss is None:
            raise ValueError("losses_fn returned fewer tasks at perturbed parameters than before; return the same ones.")

"""How flat the losses are: sharpness of each task, slices through the losses, and how often task gradients conflict."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .flat import perturb_, restore_
from .gradients import task_gradients
from .ops import combine
from .optim.losses import order_losses
from .optim.perturbed import LossesFn, call, check_function
from .optim.statistics import RunningStatistics


def sharpness(
    losses_fn: LossesFn,
    params: Iterable[Tensor],
    rho: float = 0.05,
    *,
    adaptive: bool = False,
    module: torch.nn.Module | None = None,
) -> Tensor:
    """How much each task's loss rises along its own ascent direction, L_k(theta + eps_k) - L_k(theta) (Foret et al. 2021).

    Args:
        losses_fn: the losses at the current parameters, as of :class:`mtlkernels.FlatMinimaOptimizer`; called 1 + K times.
        params: the parameters to move; one norm over those that a task reaches.
        rho: the radius.
        adaptive: whether eps is in units of the parameters.
        module: the model, whose running statistics stay as they are; None: its norms are found while they run.

    Returns:
        float64 [K]; NaN for a task that is absent. Parameters and ``.grad`` are as before.

    Raises:
        ValueError: losses or parameters that do not fit.
    """
    check_function(losses_fn)
    params = [p for p in params if p.requires_grad]
    with RunningStatistics(module).watched() as statistics:
        tasks, losses = order_losses(call(losses_fn), None)
        rows = task_gradients(losses, [params] * len(tasks), "autograd")
        statistics.restore()  # after the backward passes, which look at what norms saved
        rises = []
        for k, loss in enumerate(losses):
            if loss is None:
                rises.append(torch.full((), torch.nan, dtype=torch.float64))
                continue
            originals = [p.detach() for p in params]
            try:
                perturb_(params, rows[k], rho, adaptive=adaptive)
                _, moved = order_losses(call(losses_fn, tasks[k]), tasks)
            finally:
                restore_(params, originals)
                statistics.restore()
            there = moved[k]
            if there is None:
                raise ValueError(f"losses_fn returned no loss of task {tasks[k]!r} at perturbed parameters.")
            rises.append((there.detach().double() - loss.detach().double()).reshape(()))
    return torch.stack([rise.to(rises[0].device) for rise in rises])


class LossSlice(NamedTuple):
    """Losses in a plane through the parameters."""

    values: Tensor
    """float64 [K, S, S]: the loss of task k at theta + axis[i] first + axis[j] second."""
    axis: Tensor
    """float64 [S], 0 in the middle."""


def loss_slice(
    losses_fn: LossesFn,
    params: Iterable[Tensor],
    directions: Sequence[Sequence[Tensor]] | None = None,
    *,
    radius: float = 1.0,
    steps: int = 21,
    generator: torch.Generator | None = None,
    module: torch.nn.Module | None = None,
) -> LossSlice:
    """The losses in a plane through the parameters (Li et al. 2018).

    Args:
        losses_fn: as of :func:`sharpness`; called steps^2 times, without gradients.
        params: N parameters.
        directions: two lists of N tensors that span the plane. None: random ones, each channel as long as the parameter's.
        radius: of the axis, in units of the directions.
        steps: points of an axis, an odd number of them.
        generator: draws the random directions; None: torch's default generator.
        module: as of :func:`sharpness`.

    Raises:
        ValueError: an even number of steps, or directions that do not fit.
    """
    check_function(losses_fn)
    if steps < 1 or steps % 2 == 0:
        raise ValueError(f"steps is {steps}; pass an odd number, so that the parameters themselves are in the middle.")
    params = list(params)
    originals = [p.detach() for p in params]
    if directions is None:
        directions = [[_like_channels(p, generator) for p in originals] for _ in range(2)]
    if len(directions) != 2:
        raise ValueError(f"directions lists {len(directions)}; pass two lists of {len(params)} tensors.")
    axis = torch.linspace(-radius, radius, steps, dtype=torch.float64)
    rows, names = [], None
    with RunningStatistics(module).watched() as statistics:
        for a in axis.tolist():
            for b in axis.tolist():
                weights = torch.tensor([1.0, a, b], dtype=torch.float64, device=originals[0].device)
                with torch.no_grad():
                    moved = combine([originals, *directions], weights)
                try:
                    for param, value in zip(params, moved, strict=True):
                        param.data = value  # type: ignore[assignment]  # no column is None
                    torch.clear_autocast_cache()
                    names, losses = order_losses(call(losses_fn), names)
                finally:
                    restore_(params, originals)
                    statistics.restore()
                rows.append(torch.stack([_value(loss) for loss in losses]))
    return LossSlice(torch.stack(rows, -1).unflatten(-1, (steps, steps)), axis)


class ConflictShare:
    """Share of steps in which task gradients conflict, on the device (Phan et al. 2025, Figure 3).

    Feed it ``info.gram`` of each step.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._counts: Tensor | None = None
        self._any: Tensor | None = None

    def add(self, gram: Tensor) -> None:
        """Counts the conflicts of one step; ``gram`` is [K, K]."""
        conflicts = (gram < 0).to(torch.int64)
        some = conflicts.amax()
        self._counts = conflicts if self._counts is None else self._counts + conflicts
        self._any = some if self._any is None else self._any + some
        self.steps += 1

    @property
    def share(self) -> Tensor:
        """Share of the steps in which some pair conflicted, float64 scalar; NaN before the first."""
        return torch.full((), torch.nan, dtype=torch.float64) if self._any is None else self._any.double() / self.steps

    @property
    def pairs(self) -> Tensor | None:
        """Share of the steps in which each pair conflicted, float64 [K, K]; None before the first."""
        return None if self._counts is None else self._counts.double() / self.steps


def _value(loss: Tensor | None) -> Tensor:
    return torch.full((), torch.nan, dtype=torch.float64) if loss is None else loss.detach().double().reshape(()).cpu()


def _like_channels(param: Tensor, generator: torch.Generator | None) -> Tensor:
    """Normal values, every channel scaled to the length of the parameter's (filter normalisation); zero for vectors."""
    if param.dim() < 2:
        return torch.zeros_like(param)
    device = param.device if generator is None else generator.device
    noise = torch.randn(param.shape, generator=generator, device=device).to(param)
    length, own = noise.flatten(1).norm(dim=1), param.flatten(1).norm(dim=1)
    scale = own / torch.where(length > 0, length, 1.0)
    return noise * scale.view(-1, *[1] * (param.dim() - 1))

"""The update of loss-only weightings: one backward pass of the weighted losses."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..gradients import task_gradients, weighted_gradients
from ..granularity import Problems
from ..weightings import Weighting
from .finish import Part
from .info import StepInfo, UpdateNorm
from .losses import Losses, by_task
from .roles import Task
from .skip import first_written
from .undo import Snapshot

if TYPE_CHECKING:
    from .multitask import MultiTaskOptimizer


def check_loss_only(weighting: Weighting, options: Mapping[str, object]) -> None:
    """Raises a ``ValueError`` for an option of :class:`MultiTaskOptimizer` that needs the gradients of tasks."""
    for name, fits in (("per", ("model",)), ("update_every", (1,)), ("on_nonfinite", ("skip", "raise"))):
        if options[name] not in fits:
            raise ValueError(
                f"{name} is {options[name]!r}, but {type(weighting).__name__} takes one backward pass of the weighted losses, "
                f"which has no gradients of tasks; pass {name}={fits[0]!r}, or a weighting of gradients."
            )


def backward_of_losses(
    optimizer: "MultiTaskOptimizer",
    tasks: tuple[Task, ...],
    losses: list[Tensor | None],
    scaled: list[Tensor | None],
    scale: Tensor | None,
    accumulate: bool,
    kept: Snapshot,
) -> StepInfo:
    """Fills ``.grad`` of all parameters with the gradient of sum_k w_k L_k, clipped, or NaN where it is not finite.

    Args:
        optimizer: whose parameters and weighting are meant.
        tasks: K names.
        losses: K scalars, None for a task that is absent.
        scaled: the losses as they are differentiated.
        scale: the factor between them, where there is one.
        accumulate: whether ``.grad`` is added to, instead of replaced.
        kept: the weighting's buffers as they go back where the update is not finite.
    """
    ranks, weighting = optimizer.ranks, cast(Weighting, optimizer.weighting)
    params, layer = [p for p in optimizer.params if p.requires_grad], list(weighting.layer)
    source, received = optimizer.gradients, optimizer._scatter_row
    layer_rows = task_gradients(scaled, [layer] * len(tasks), source, received, retain=True) if layer else []
    with torch.no_grad():
        values, present = optimizer._loss_values(losses)
        gram = values.new_zeros(2 * values.shape)
        if layer:
            ranks.wait()
            gram = optimizer._unscaled(optimizer._gram(Problems("model", layer), layer_rows, layer, tasks), scale)
        gram, _, values, seed = ranks.decisive(gram, None, values, optimizer._seed(True))
        missing = any(loss is None for loss in losses)
        weights = weighting(gram, active=present if missing else None, losses=values, seed=seed)
    row, _ = weighted_gradients(scaled, weights, params, [[] for _ in tasks], source)
    with torch.no_grad():
        rows, problems = [received(row, params)], Problems("model", params)
        del row  # so that the update can be written where the gradient is
        ranks.wait()
        square = optimizer._unscaled(optimizer._gram(problems, rows, params, tasks), scale)
        square = ranks.sum(square)[0] * ranks.scale**2
        ones = torch.ones_like(square[0])
        update = UpdateNorm(square, ones, None, ones)
        info = StepInfo(tasks, values, None, weights, present, update)
        usable = square[0, 0] < torch.inf
        applied, _ = optimizer._checked(info, update, (ones, ones), values.isfinite() | ~present, usable)
        applied = applied if scale is None or accumulate else applied / scale
        if optimizer.on_nonfinite != "raise":
            kept.restore_buffers_unless(usable)
        if optimizer._finish is not None and not accumulate:
            return optimizer._finish.update(info, Part(params, rows, applied))
        buffers = ranks.buffers(rows, params)
        problems.combine(rows, ranks.scaled(applied), buffers)
        optimizer._fill(params, ranks.gather(buffers, params), accumulate)
        optimizer._note(info, first_written(params, buffers), scaled=scale is not None and accumulate)
    return info


def observe(optimizer: "MultiTaskOptimizer", closure: Callable[[], Losses], tasks: tuple[Task, ...]) -> None:
    """Shows the weighting the losses after the step, their mean over the ranks."""
    with torch.no_grad():
        values, _ = optimizer._loss_values(by_task(closure(), tasks)[1])
        cast(Weighting, optimizer.weighting).observe(optimizer.ranks.mean(values)[0])

"""The task losses as one scalar, for loops that call its ``backward()`` themselves."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..optim import FlatMinimaOptimizer, MultiTaskOptimizer, StepInfo
from ..optim.losses import Losses, order_losses


def joint_loss(
    optimizer: torch.optim.Optimizer,
    losses: Losses,
    *,
    scaler: torch.amp.GradScaler | None = None,
    last: bool = True,
    report: Callable[[StepInfo], object] | None = None,
) -> Tensor:
    """The sum of the task losses, a scalar whose ``backward()`` is :meth:`MultiTaskOptimizer.backward` of the losses.

    Whatever a loop multiplies the scalar by before it calls ``backward()``, 1 / micro-batches or a scale, the losses are
    multiplied by: ``.grad`` is what the loop expects to clip, to unscale and to step from. The scalar is no part of the
    graph of the losses, but keeps it alive; its ``backward()`` frees that graph as theirs would.

    Args:
        optimizer: a :class:`MultiTaskOptimizer`, or a trainer's wrapper of one. Accelerate's has ``scaler`` and knows
            ``last``: leave out both.
        losses: as in :meth:`MultiTaskOptimizer.backward`.
        scaler: the ``GradScaler`` that the loop scales the scalar with: Gram and weights are those of unscaled gradients.
        last: whether ``step()`` follows. False, for a micro-batch that others follow, adds its gradients up instead, as
            :meth:`MultiTaskOptimizer.accumulate`: weights are those of the whole batch.
        report: called with the info of each update.

    Raises:
        ValueError: an optimizer that needs more than one forward pass, a weighting that ``observes``, and as
            :meth:`MultiTaskOptimizer.backward`, which raises what it finds from the scalar's ``backward()``.
    """
    wrapper: Any = optimizer
    if hasattr(wrapper, "gradient_state"):
        optimizer, scaler, last = wrapper.optimizer, wrapper.scaler, wrapper.gradient_state.sync_gradients
    while isinstance(inner := getattr(optimizer, "optimizer", None), MultiTaskOptimizer):
        optimizer = inner  # Lightning's wrappers are of its class, too, and would keep what an update leaves to the step
    if not isinstance(optimizer, MultiTaskOptimizer) or isinstance(optimizer, FlatMinimaOptimizer):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}, which has no backward(losses); pass a MultiTaskOptimizer, as "
            'MultiTaskOptimizer(torch.optim.AdamW(...), "cagrad", shared=...).'
        )
    if getattr(optimizer.weighting, "observes", False):
        raise ValueError(
            f"{type(optimizer.weighting).__name__} looks at the losses after the step, which a loop that calls backward() does "
            "not compute; call optimizer.step(closure) in a loop of your own, or pass another weighting."
        )
    tasks, ordered = order_losses(losses, optimizer.tasks)
    values = [loss.detach().reshape(()) for loss in ordered if loss is not None]
    values = [value.to(values[0].device, torch.promote_types(value.dtype, torch.float32)) for value in values]
    joint = torch.stack(values).sum().requires_grad_()

    @torch.enable_grad()
    def backward(factor: Tensor) -> None:
        if scaler is not None:
            factor = factor / scaler.scale(torch.ones_like(factor))
        given = dict.fromkeys(tasks) | {
            task: loss * factor.to(loss.device) for task, loss in zip(tasks, ordered, strict=True) if loss is not None
        }
        if not last:
            optimizer.accumulate(given, scaler)
            return
        info = optimizer.backward(given, scaler)
        if report is not None:
            report(info)

    joint.register_hook(backward)
    return joint


def metrics(info: StepInfo) -> dict[str, Tensor]:
    """What an update tells, by the names under which trainers log it; scalars on the device.

    ``loss/TASK`` and ``weight/TASK`` for each task, the mean weight where tensors, channels or groups have their own, and
    ``conflicts``, the share of pairs of tasks in conflict, where the Gram was computed.
    """
    weights = info.weights.reshape(-1, len(info.tasks)).mean(0)
    result = {f"loss/{task}": loss for task, loss in zip(info.tasks, info.losses, strict=True)}
    result |= {f"weight/{task}": weight for task, weight in zip(info.tasks, weights, strict=True)}
    conflicts = info.conflicts
    return result if conflicts is None else {**result, "conflicts": conflicts.double().mean()}


def total(losses: Losses) -> Tensor:
    """The sum of the losses that are there, for evaluation."""
    values = losses.values() if isinstance(losses, Mapping) else losses
    return torch.stack([loss.reshape(()).float() for loss in values if loss is not None]).sum()

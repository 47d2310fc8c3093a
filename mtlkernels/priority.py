"""Task priority by connection strength (Jeong and Yoon 2024): the ops, their schemas, fakes and references.

A channel is a row of a layer's weight viewed as [out, rest]. Its top task is the one it is connected to most strongly, by the
task-specific batch norm behind the layer; conflicting gradients of the other tasks are projected off the top task's, over all
channels of the layer that share the top task together.
"""

from collections.abc import Sequence
from functools import reduce
from typing import cast, overload

import torch
from torch import Tensor

from . import reference
from ._library import define
from .checks import check_buffers, check_fit, check_floating, check_gradients, check_kind
from .ops import Flat, Gradients, _call, _columns, _nest, _rows

Tops = Sequence[Tensor | None]
"""Top tasks int64 [C_n] of each tensor; None where there are none."""

# --- connection_strength ------------------------------------------------------------------------------------------------


def _strength_of_layer(squares: Tensor, scale: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The specification: S [K, C] in float64 and the top tasks [C] of one layer, from its channels' |W_p|^2."""
    strength = squares * scale.detach().double().square() / (running_var.detach().double() + eps)
    total = torch.stack([row.sum() for row in strength]).unsqueeze(1)  # row by row: equal rows have equal sums
    strength = torch.where(total == 0, 0.0, strength / torch.where(total == 0, 1.0, total))
    ranked = torch.where(strength.isnan(), -torch.inf, strength)
    task = torch.arange(len(scale), device=scale.device).unsqueeze(1)
    return strength, torch.where(ranked == ranked.amax(0), task, len(scale)).amin(0)


def _connection_strength_reference(
    squares: Tensor, scales: Sequence[Tensor], running_vars: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    parts = squares.split([scale.shape[1] for scale in scales])
    layers = [_strength_of_layer(*layer, eps) for layer in zip(parts, scales, running_vars, strict=True)]
    strengths = [squares.new_zeros(0), *(strength.flatten() for strength, _ in layers)]
    return torch.cat(strengths), torch.cat([squares.new_zeros(0, dtype=torch.int64), *(top for _, top in layers)])


def _connection_strength_fake(
    squares: Tensor, scales: Sequence[Tensor], running_vars: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    return squares.new_empty(sum(scale.numel() for scale in scales)), squares.new_empty(squares.shape, dtype=torch.int64)


define(
    "connection_strength(Tensor squares, Tensor[] scales, Tensor[] running_vars, float eps) -> (Tensor, Tensor)",
    fake=_connection_strength_fake,
    reference=_connection_strength_reference,
)


def check_layers(weights: Sequence[Tensor], scales: Sequence[Tensor], running_vars: Sequence[Tensor]) -> None:
    """Raises a ``ValueError`` for the first layer whose weight [C, ...], scale [K, C] and running_var [K, C] do not fit."""
    for name, tensors in (("scale", scales), ("running_var", running_vars)):
        if len(tensors) != len(weights):
            raise ValueError(f"{name} lists {len(tensors)} tensors, weight lists {len(weights)}; pass one for each layer.")
    for n, layer in enumerate(zip(weights, scales, running_vars, strict=True)):
        for name, tensor in zip((f"weight[{n}]", f"scale[{n}]", f"running_var[{n}]"), layer, strict=True):
            check_floating(tensor, name)
            check_kind(tensor, name)
            if tensor.device != weights[0].device:
                raise ValueError(f"{name} is on {tensor.device}, weight[0] is on {weights[0].device}; move all to one device.")
        weight, scale, running_var = layer
        if weight.dim() == 0:
            raise ValueError(f"weight[{n}] is a scalar; pass a weight [C, ...], whose first dimension is the channels.")
        if scale.dim() != 2 or scale.shape[1] != weight.shape[0]:
            raise ValueError(
                f"scale[{n}] has shape {tuple(scale.shape)}; a weight of shape {tuple(weight.shape)} takes "
                f"[K, {weight.shape[0]}], a row for each task: torch.stack the tasks' scales."
            )
        if scale.shape[0] == 0 or scale.shape[0] != scales[0].shape[0]:
            raise ValueError(
                f"scale[{n}] has {scale.shape[0]} tasks, scale[0] has {scales[0].shape[0]}; "
                "pass the same tasks, at least one, for every layer."
            )
        if running_var.shape != scale.shape:
            raise ValueError(
                f"running_var[{n}] has shape {tuple(running_var.shape)}, scale[{n}] has {tuple(scale.shape)}; pass both alike."
            )


@overload
def connection_strength(weight: Tensor, scale: Tensor, running_var: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]: ...


@overload
def connection_strength(
    weight: Sequence[Tensor], scale: Sequence[Tensor], running_var: Sequence[Tensor], eps: float = 1e-5
) -> tuple[list[Tensor], list[Tensor]]: ...


def connection_strength(
    weight: Tensor | Sequence[Tensor],
    scale: Tensor | Sequence[Tensor],
    running_var: Tensor | Sequence[Tensor],
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Connection strength of each task with each channel, and each channel's top task (Jeong and Yoon 2024, Eq. 4-7, 10).

    S[i, p] = |W_p|^2 scale[i, p]^2 / (running_var[i, p] + eps), divided by its sum over the channels p of the layer, task by
    task. The top task of a channel is argmax_i S[i, p], of equals the one with the lowest index. Nothing is differentiated:
    the tensors may require grad.

    Args:
        weight: [C, ...], a layer's weight; or one for each of N layers, in one call.
        scale: [K, C], the scale (gamma) of each task's batch norm behind the layer; or N of them.
        running_var: [K, C], the running variance of each task's batch norm; or N of them.
        eps: of the batch norms.

    Returns:
        S, float64 [K, C], and the top tasks, int64 [C]; or a list of N each. Rows of S add up to 1; a task whose strengths are
        all 0 has a row of zeros. A strength that is NaN is never the top one; where all are, the top task is 0. Tasks with
        equal scales and variances have equal strengths to the last bit, on every backend.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, no task, or integers.
    """
    single = isinstance(weight, Tensor)
    given = []
    for name, tensors in (("weight", weight), ("scale", scale), ("running_var", running_var)):
        if not isinstance(tensors, Tensor | Sequence):
            raise ValueError(f"{name} is a {type(tensors).__name__}; pass a tensor, or one for each layer.")
        given.append([tensors] if isinstance(tensors, Tensor) else list(tensors))
    check_layers(*given)
    weights, scales, variances = ([t.detach() for t in tensors] for tensors in given)
    wide = [reduce(torch.promote_types, (a.dtype, b.dtype, torch.float32)) for a, b in zip(scales, variances, strict=True)]
    scales = [t.to(dtype) for t, dtype in zip(scales, wide, strict=True)]
    variances = [t.to(dtype) for t, dtype in zip(variances, wide, strict=True)]
    squares = torch.ops.mtlkernels.gram(weights, 1, "channel").flatten()
    strengths, tops = torch.ops.mtlkernels.connection_strength(squares, scales, variances, float(eps))
    if single:
        return strengths.view(scales[0].shape), tops
    parts = strengths.split([s.numel() for s in scales])
    return [p.view(s.shape) for p, s in zip(parts, scales, strict=True)], list(tops.split([len(w) for w in weights]))


# --- priority_combine ---------------------------------------------------------------------------------------------------


def _combine_layer(rows: Tensor, top: Tensor, skip_degenerate: bool) -> Tensor:
    """The specification: [C, rest] for the K rows [K, C, rest] of one layer, in float64."""
    task = torch.arange(len(rows), device=rows.device).unsqueeze(1)
    member = top == task  # [K, C]
    own = torch.where(member.unsqueeze(2), rows, 0.0).sum(0)  # the top task's row of each channel
    dots = torch.where(member.any(0), (own * rows).sum(2), 0.0)  # [K, C]
    inner = torch.where(member.unsqueeze(1), dots, 0.0).sum(2)  # D [K, K]
    square = inner.diagonal()
    conflict = torch.where(inner < 0, -inner, 0.0).sum(1)
    alpha = torch.where(square > 0, conflict / torch.where(square > 0, square, 1.0), 0.0)
    if skip_degenerate:
        alpha = torch.where((top == top[:1]).all(), 0.0, alpha)
    return rows.sum(0) + torch.where(member, alpha.unsqueeze(1), 0.0).sum(0).unsqueeze(1) * own


def _priority_combine_reference(flat: Flat, top: Tops, num_tasks: int, skip_degenerate: bool) -> list[Tensor]:
    check_gradients(_nest(flat, num_tasks))
    columns = _columns(flat, num_tasks)
    check_tops(top, columns)
    results = []
    for column, tasks in zip(columns, top, strict=True):
        model = cast(Tensor, reference.like(column))
        rows = reference.stack_rows(column)
        total = rows.sum(0) if tasks is None else _combine_layer(rows, tasks, skip_degenerate)
        results.append(torch.empty_like(model).copy_(total.reshape(model.shape)))
    return results


def _priority_combine_fake(flat: Flat, top: Tops, num_tasks: int, skip_degenerate: bool) -> list[Tensor]:
    check_gradients(_nest(flat, num_tasks))
    columns = _columns(flat, num_tasks)
    check_tops(top, columns)
    return [torch.empty_like(cast(Tensor, reference.like(column))) for column in columns]


def _priority_combine_inplace_reference(
    out: Sequence[Tensor], flat: Flat, top: Tops, num_tasks: int, skip_degenerate: bool
) -> None:
    check_buffers(out, _columns(flat, num_tasks))
    for buffer, value in zip(out, _priority_combine_reference(flat, top, num_tasks, skip_degenerate), strict=True):
        buffer.copy_(value)


def _priority_combine_inplace_fake(out: Sequence[Tensor], flat: Flat, top: Tops, num_tasks: int, skip_degenerate: bool) -> None:
    check_gradients(_nest(flat, num_tasks))
    columns = _columns(flat, num_tasks)
    check_tops(top, columns)
    check_fit(out, columns)


define(
    "priority_combine(Tensor?[] grads, Tensor?[] top, int num_tasks, bool skip_degenerate) -> Tensor[]",
    fake=_priority_combine_fake,
    reference=_priority_combine_reference,
)
define(
    "priority_combine_(Tensor(a!)[] out, Tensor?[] grads, Tensor?[] top, int num_tasks, bool skip_degenerate) -> ()",
    fake=_priority_combine_inplace_fake,
    reference=_priority_combine_inplace_reference,
)


def check_tops(top: Tops, columns: Sequence[Sequence[Tensor | None]]) -> None:
    """Raises a ``ValueError`` unless ``top`` holds int64 [C_n], or None, for each tensor's K gradients."""
    if len(top) != len(columns):
        raise ValueError(f"top lists {len(top)} tensors, grads list {len(columns)}; pass one for each, None for a plain sum.")
    for n, (tasks, column) in enumerate(zip(top, columns, strict=True)):
        model = reference.like(column)
        if tasks is None or model is None:
            continue
        channels = reference.num_channels(model)
        if not isinstance(tasks, Tensor) or tasks.dtype != torch.int64:
            kind = tasks.dtype if isinstance(tasks, Tensor) else type(tasks).__name__
            raise ValueError(f"top[{n}] is {kind}; pass int64 [{channels}], as mtlkernels.connection_strength returns it.")
        if tasks.shape != (channels,):
            raise ValueError(
                f"top[{n}] has shape {tuple(tasks.shape)}; gradients of shape {tuple(model.shape)} take [{channels}], "
                "a task for each channel."
            )
        if tasks.device != model.device:
            raise ValueError(
                f"top[{n}] is on {tasks.device}, the gradients are on {model.device}; pass top[{n}].to({str(model.device)!r})."
            )


@overload
def priority_combine(
    grads: Sequence[Tensor | None] | Tensor, top: Tensor, skip_degenerate: bool = True, out: Tensor | None = None
) -> Tensor: ...


@overload
def priority_combine(
    grads: Gradients, top: Tops, skip_degenerate: bool = True, out: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]: ...


def priority_combine(
    grads: Gradients | Sequence[Tensor | None],
    top: Tensor | Tops,
    skip_degenerate: bool = True,
    out: Tensor | Sequence[Tensor | None] | None = None,
) -> Tensor | list[Tensor | None]:
    """Sum of task gradients, those that conflict with the top task's projected off it (Jeong and Yoon 2024, Algorithm 1).

    Per layer, with i the top task of channel p, D[i, j] = sum over the channels q of top task i of <G_i[q], G_j[q]>:
    out[p] = sum_j G_j[p] + alpha_i G_i[p], alpha_i = sum over j != i of max(0, -D[i, j]) / D[i, i], 0 where D[i, i] = 0.
    That is each G_j taken off G_i over the channels of top task i together where D[i, j] < 0, and summed.

    Args:
        grads: K sequences of N tensors, task-major, None where a task has no gradient, as in :func:`mtlkernels.gram`; or, with
            a tensor for ``top``, the K gradients [C, ...] of one layer.
        top: int64 [C_n] for each of N tensors, the top task of each channel (a row of the tensor viewed as [out, rest]); None
            for a tensor that gets the plain sum. An index that is no task leaves its channel with the plain sum.
        skip_degenerate: where all channels of a layer have one top task, its gradients are summed as they are. Decided on the
            device.
        out: N buffers (or one), as in :func:`mtlkernels.combine`.

    Returns:
        N tensors (or one) with the dtype and layout of the gradients, None where every task is None; with ``out``, the
        buffers.

    Raises:
        ValueError: as in :func:`mtlkernels.combine`, or ``top`` does not fit.
        RuntimeError: an input requires grad; pass ``.detach()``ed tensors.
    """
    if isinstance(top, Tensor):
        layer = [[t] for t in cast(Sequence[Tensor | None], grads)]
        if not any(isinstance(t, Tensor) for (t,) in layer):
            raise ValueError("grads holds no tensor; leave out a layer that no task reaches.")
        (result,) = _combine_model(layer, [top], skip_degenerate, None if out is None else [cast(Tensor, out)])
        return cast(Tensor, result)
    return _combine_model(_rows(cast(Gradients, grads), "grads"), top, skip_degenerate, cast(Sequence[Tensor | None], out))


def _combine_model(
    rows: Sequence[Sequence[Tensor | None]], top: Tops, skip_degenerate: bool, out: Sequence[Tensor | None] | None
) -> list[Tensor | None]:
    num_tensors = len(rows[0]) if rows else 0
    keep = [n for n in range(num_tensors) if any(row[n] is not None for row in rows)]
    flat = [row[n] for row in rows for n in keep]

    def check() -> None:
        check_gradients(rows)
        check_tops(top, list(zip(*rows, strict=True)))
        if out is not None:
            check_buffers(out, zip(*rows, strict=True))

    if len(top) != num_tensors or (out is not None and (len(out) != num_tensors or any(out[n] is None for n in keep))):
        check()
    tops = [top[n] for n in keep]
    if out is None:
        op = torch.ops.mtlkernels.priority_combine.default
        values = iter(_call(op, "priority_combine", check, flat, tops, len(rows), skip_degenerate))
        kept = set(keep)
        return [next(values) if n in kept else None for n in range(num_tensors)]
    buffers = [cast(Tensor, out[n]) for n in keep]
    if keep:
        op = torch.ops.mtlkernels.priority_combine_.default
        _call(op, "priority_combine", check, buffers, flat, tops, len(rows), skip_degenerate)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(buffers)
    return [buffer if n in set(keep) else None for n, buffer in enumerate(out)] if len(keep) < num_tensors else list(out)

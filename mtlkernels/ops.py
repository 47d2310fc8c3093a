"""The ops: schema, fake and reference side by side, then the function people call.

Every op takes task gradients as one flat task-major list with the number of tasks. The functions take them as autograd
leaves them: K sequences of N tensors, None where a task does not touch a tensor, or one [K, ...] tensor.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from ._library import define
from .checks import TaskGradients, check_buffers, check_gradients, check_lengths, check_weights, refuse_grad
from .reference import Granularity

Gradients = TaskGradients | Sequence[Tensor] | Tensor
"""What the functions take: K sequences of N tensors, K tensors, or one tensor [K, ...]."""
Flat = Sequence[Tensor | None]


def _nest(flat: Flat, num_tasks: int) -> list[list[Tensor | None]]:
    size = len(flat) // num_tasks if num_tasks else 0
    return [list(flat[k * size : (k + 1) * size]) for k in range(num_tasks)]


# --- gram ---------------------------------------------------------------------------------------------------------------


def _gram_rows(columns: Sequence[Sequence[Tensor | None]], per: str) -> int:
    models = [reference.like(column) for column in columns]
    return len(models) if per == "tensor" else sum(reference.num_channels(m) for m in models if m is not None)


def _gram_fake(flat: Flat, num_tasks: int, per: str) -> Tensor:
    return _cross_gram_fake(flat, flat, num_tasks, num_tasks, per)


def _cross_gram_fake(flat: Flat, other: Flat, num_tasks: int, num_other: int, per: str) -> Tensor:
    rows = _nest(flat, num_tasks) + _nest(other, num_other)
    device = reference.device_of(rows)
    lead = [] if per == "model" else [_gram_rows(list(zip(*rows, strict=True)), per)]
    return torch.empty([*lead, num_tasks, num_other], dtype=torch.float64, device=device)


def _gram_reference(flat: Flat, num_tasks: int, per: str) -> Tensor:
    return reference.gram(_nest(flat, num_tasks), per=cast(Granularity, per))


def _cross_gram_reference(flat: Flat, other: Flat, num_tasks: int, num_other: int, per: str) -> Tensor:
    return reference.gram(_nest(flat, num_tasks), _nest(other, num_other), cast(Granularity, per))


define("gram(Tensor?[] grads, int num_tasks, str per) -> Tensor", fake=_gram_fake, reference=_gram_reference)
define(
    "cross_gram(Tensor?[] grads, Tensor?[] other, int num_tasks, int num_other, str per) -> Tensor",
    fake=_cross_gram_fake,
    reference=_cross_gram_reference,
)


def _batch_as_channels(flat: Flat, dims: Sequence[int | None], batch: int, per: str) -> list[Tensor | None]:
    """The gradients of ``batch`` samples as tensors whose channels are the samples (times their own channels)."""
    result: list[Tensor | None] = []
    for tensor, dim in zip(flat, dims, strict=True):
        if tensor is None:
            result.append(None)
            continue
        samples = tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        channels = reference.num_channels(samples[0]) if per == "channel" else 1
        result.append(samples.reshape(batch * channels, samples[0].numel() // channels if channels else 0))
    return result


def _channels_as_batch(stacked: Tensor, columns: Sequence[Sequence[Tensor | None]], batch: int, per: str) -> Tensor:
    parts = stacked.split([m.shape[0] for m in map(reference.like, columns) if m is not None])
    samples = torch.stack([part.unflatten(0, (batch, -1)) for part in parts]) if per != "channel" else None
    if samples is None:
        return torch.cat([part.unflatten(0, (batch, -1)) for part in parts], dim=1)
    tensors = samples.squeeze(2).transpose(0, 1)
    return tensors.sum(1) if per == "model" else tensors


def _gram_vmap(info: Any, in_dims: Any, flat: Flat, num_tasks: int, per: str) -> tuple[Tensor, int]:
    moved = _batch_as_channels(flat, in_dims[0], info.batch_size, per)
    columns = [c for c in zip(*_nest(moved, num_tasks), strict=True)]
    stacked = torch.ops.mtlkernels.gram(moved, num_tasks, "channel")
    return _channels_as_batch(stacked, columns, info.batch_size, per), 0


def _cross_gram_vmap(info: Any, in_dims: Any, flat: Flat, other: Flat, num_tasks: int, num_other: int, per: str) -> tuple[Tensor, int]:
    moved = _batch_as_channels(flat, in_dims[0], info.batch_size, per)
    against = _batch_as_channels(other, in_dims[1], info.batch_size, per)
    columns = list(zip(*_nest(moved, num_tasks), *_nest(against, num_other), strict=True))
    stacked = torch.ops.mtlkernels.cross_gram(moved, against, num_tasks, num_other, "channel")
    return _channels_as_batch(stacked, columns, info.batch_size, per), 0


torch.library.register_vmap("mtlkernels::gram", _gram_vmap)
torch.library.register_vmap("mtlkernels::cross_gram", _cross_gram_vmap)


def gram(grads: Gradients, other: Gradients | None = None, *, per: Granularity = "model") -> Tensor | list[Tensor | None]:
    """Gram matrix of task gradients in one read, G[i, j] = sum_n <grads[i][n], grads[j][n]>.

    Args:
        grads: K sequences of N tensors (float32, bfloat16, float16 or float64), task-major; None counts as zero and costs no
            read. Or one [K, ...] tensor. Tensors of one column share shape, dtype and device; any strides.
        other: K' sequences of the same N tensors, for the cross Gram <grads[i], other[j]>.
        per: one Gram for the whole ``"model"``, for each ``"tensor"`` or for each ``"channel"`` (a row of a tensor viewed as
            [out, rest]).

    Returns:
        float64 on the gradients' device, exactly symmetric without ``other``: [K, K']; [N, K, K'] per tensor; per channel a
        list of N tensors [C_n, K, K'], None where no task has a gradient. Squared units of the gradient. A gradient that is
        not finite shows only in its own row and column.

    Raises:
        ValueError: ragged lists, or rows of one tensor that differ in shape, dtype or device.
        RuntimeError: an input requires grad; pass ``.detach()``ed tensors.
    """
    if per not in ("model", "tensor", "channel"):
        raise ValueError(f'per is {per!r}; pass "model", "tensor" or "channel".')
    rows = _rows(grads, "grads")
    if other is None:
        flat = [t for row in rows for t in row]
        result = _call(torch.ops.mtlkernels.gram.default, "gram", lambda: check_gradients(rows), flat, len(rows), per)
        columns = rows
    else:
        against = _rows(other, "other")
        columns = [*rows, *against]
        check_lengths(columns, "[*grads, *other]")
        flat, flat_other = [t for row in rows for t in row], [t for row in against for t in row]

        def check() -> None:
            check_gradients(rows)
            check_gradients(columns, "[*grads, *other]")

        op = torch.ops.mtlkernels.cross_gram.default
        result = _call(op, "gram", check, flat, flat_other, len(rows), len(against), per)
    if per != "channel":
        return cast(Tensor, result)
    models = [reference.like(column) for column in zip(*columns, strict=True)]
    parts = iter(result.split([reference.num_channels(m) for m in models if m is not None]))
    return [None if m is None else next(parts) for m in models]


# --- combine ------------------------------------------------------------------------------------------------------------


def _columns(flat: Flat, num_tasks: int) -> list[tuple[Tensor | None, ...]]:
    return list(zip(*_nest(flat, num_tasks), strict=True))


def _combine_fake(flat: Flat, weights: Tensor) -> list[Tensor]:
    return [torch.empty_like(cast(Tensor, reference.like(c))) for c in _columns(flat, weights.shape[-1])]


def _combine_reference(flat: Flat, weights: Tensor) -> list[Tensor]:
    return cast(list[Tensor], reference.combine(_nest(flat, weights.shape[-1]), weights))


def _combine_setup(ctx: Any, inputs: tuple[Flat, Tensor], output: list[Tensor]) -> None:
    flat, weights = inputs
    ctx.present = [t is not None for t in flat]
    ctx.weights_need_grad = weights.requires_grad
    saved = [t for t in flat if t is not None] if weights.requires_grad else []
    ctx.save_for_backward(weights, *saved)


def _combine_backward(ctx: Any, grad_outputs: Sequence[Tensor]) -> tuple[list[Tensor | None], Tensor | None]:
    """d out[n] / d grads[k][n] = weights[k]; d out[n] / d weights[k] = grads[k][n]. Plain ops, so that it differentiates again."""
    weights, *saved = ctx.saved_tensors
    num_tensors = len(grad_outputs)
    table = weights.expand(num_tensors, weights.shape[-1])
    rows = iter(saved)
    gradients: list[Tensor | None] = []
    inner = []
    for index, present in enumerate(ctx.present):
        k, n = divmod(index, num_tensors)
        gradients.append(grad_outputs[n] * table[n, k].to(grad_outputs[n].dtype) if present else None)
        if ctx.weights_need_grad:
            product = (grad_outputs[n].double() * next(rows).double()).sum() if present else torch.zeros_like(weights[..., 0].sum().double())
            inner.append(product)
    if not ctx.weights_need_grad:
        return gradients, None
    by_tensor = torch.stack(inner).view(-1, num_tensors).T
    return gradients, (by_tensor if weights.dim() == 2 else by_tensor.sum(0)).to(weights.dtype)


def _combine_inplace_reference(out: Sequence[Tensor], flat: Flat, weights: Tensor) -> None:
    for buffer, value in zip(out, _combine_reference(flat, weights), strict=True):
        buffer.copy_(value)


define(
    "combine(Tensor?[] grads, Tensor weights) -> Tensor[]",
    fake=_combine_fake,
    reference=_combine_reference,
    backward=_combine_backward,
    setup_context=_combine_setup,
)
define(
    "combine_(Tensor(a!)[] out, Tensor?[] grads, Tensor weights) -> ()",
    fake=lambda out, flat, weights: None,
    reference=_combine_inplace_reference,
)


def combine(grads: Gradients, weights: Tensor, out: Sequence[Tensor | None] | None = None) -> list[Tensor | None]:
    """Weighted sum of task gradients in one read, out[n] = sum_k weights[k] * grads[k][n].

    Differentiable in the gradients and the weights when ``out`` is not given. A row whose weight is exactly 0 is not read.

    Args:
        grads: as in :func:`gram`.
        weights: [K], or [N, K] for one set per tensor, on the gradients' device.
        out: N buffers of the gradients' shapes and dtypes, written in place. A buffer may be one of its own tensor's
            gradients (the first non-None row needs no memory at all); other overlaps cost one temporary copy.

    Returns:
        N tensors with the dtype and layout of the gradients, None where every task is None; with ``out``, the buffers.

    Raises:
        ValueError: as in :func:`gram`, a wrong weight shape, or buffers that do not fit.
    """
    rows = _rows(grads, "grads")
    num_tensors = len(rows[0]) if rows else 0
    keep = [n for n in range(num_tensors) if any(row[n] is not None for row in rows)]
    flat = [row[n] for row in rows for n in keep]

    def check() -> None:
        check_gradients(rows)
        check_weights(weights, len(rows), num_tensors)
        _check_device(flat, weights, "weights")
        if out is not None:
            check_buffers(out, zip(*rows, strict=True))

    if weights.shape != (len(rows),):
        check_weights(weights, len(rows), num_tensors)
        weights = weights if len(keep) == num_tensors else weights[keep]
    if out is None:
        values = _call(torch.ops.mtlkernels.combine.default, "combine", check, flat, weights, differentiable=True)
        result: list[Tensor | None] = [None] * num_tensors
        for n, value in zip(keep, values, strict=True):
            result[n] = value
        return result
    if len(out) != num_tensors or any(out[n] is None for n in keep):
        check()
    buffers = [cast(Tensor, out[n]) for n in keep]
    if keep:
        _call(torch.ops.mtlkernels.combine_.default, "combine", check, buffers, flat, weights)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(buffers)
    return [buffer if n in set(keep) else None for n, buffer in enumerate(out)] if len(keep) < num_tensors else list(out)


# --- mix and project ----------------------------------------------------------------------------------------------------


def _mix_fake(flat: Flat, coefficients: Tensor) -> list[Tensor]:
    columns = _columns(flat, coefficients.shape[1])
    return [torch.empty_like(cast(Tensor, reference.like(c))) for _ in range(coefficients.shape[0]) for c in columns]


def _mix_reference(flat: Flat, coefficients: Tensor) -> list[Tensor]:
    rows = reference.mix(_nest(flat, coefficients.shape[1]), coefficients)
    return [cast(Tensor, t) for row in rows for t in row]


define("mix(Tensor?[] grads, Tensor coefficients) -> Tensor[]", fake=_mix_fake, reference=_mix_reference)


def mix(grads: Gradients, coefficients: Tensor) -> list[list[Tensor | None]]:
    """M weighted sums of the K task gradients in one read, out[m][n] = sum_k coefficients[m, k] * grads[k][n].

    Args:
        grads: as in :func:`gram`.
        coefficients: [M, K] on the gradients' device. An entry of exactly 0 leaves the row out.

    Returns:
        M lists of N new tensors with the dtype and layout of the gradients, None where every task is None.

    Raises:
        ValueError: as in :func:`gram`, or a wrong shape of ``coefficients``.
    """
    rows = _rows(grads, "grads")
    if coefficients.dim() != 2 or coefficients.shape[1] != len(rows):
        raise ValueError(f"coefficients has shape {tuple(coefficients.shape)}; {len(rows)} tasks take [M, {len(rows)}].")
    num_tensors = len(rows[0]) if rows else 0
    keep = [n for n in range(num_tensors) if any(row[n] is not None for row in rows)]
    flat = [row[n] for row in rows for n in keep]

    def check() -> None:
        check_gradients(rows)
        _check_device(flat, coefficients, "coefficients")

    values = iter(_call(torch.ops.mtlkernels.mix.default, "mix", check, flat, coefficients))
    kept = set(keep)
    return [[next(values) if n in kept else None for n in range(num_tensors)] for _ in range(coefficients.shape[0])]


def project(
    grads: Gradients, onto: int | Sequence[Tensor | None] | None = None, conflict_only: bool = True
) -> list[list[Tensor | None]]:
    """Each task gradient off the gradients it conflicts with: g_i - <g_i, g_j> / |g_j|^2 g_j where <g_i, g_j> < 0.

    One read for the Gram, one read and K writes for the result.

    Args:
        grads: as in :func:`gram`.
        onto: project off this gradient only: a task index (that row stays as it is) or N tensors. None: off every other
            row, successively in task order, as PCGrad does (Yu et al. 2020, Algorithm 1); the rows projected off are the
            original ones.
        conflict_only: leave rows alone whose inner product is not negative. False: always project.

    Returns:
        K lists of N new tensors, None where every task is None.

    Raises:
        ValueError: as in :func:`gram`, or ``onto`` out of range.
    """
    rows = _rows(grads, "grads")
    num_tasks = len(rows)
    if onto is None:
        order: Sequence[int] = range(num_tasks)
    elif isinstance(onto, int):
        if not -num_tasks <= onto < num_tasks:
            raise ValueError(f"onto is {onto}; {num_tasks} tasks take an index from {-num_tasks} to {num_tasks - 1}, or N tensors.")
        order = [onto % num_tasks]
    else:
        rows = [*rows, list(onto)]
        order = [num_tasks]
    coefficients = reference.projection_coefficients(cast(Tensor, gram(rows)), order, conflict_only)
    return mix(rows, coefficients[:num_tasks])


# --- what a Gram tells --------------------------------------------------------------------------------------------------

define("cosine(Tensor gram) -> Tensor", fake=torch.empty_like, reference=reference.cosine)
define("magnitude_similarity(Tensor gram) -> Tensor", fake=torch.empty_like, reference=reference.magnitude_similarity)
define("conflict_rate(Tensor gram) -> Tensor", fake=lambda gram: gram.new_empty(gram.shape[:-2]), reference=reference.conflict_rate)
define("condition_number(Tensor gram) -> Tensor", fake=lambda gram: gram.new_empty(gram.shape[:-2]), reference=reference.condition_number)


def cosine(gram: Tensor) -> Tensor:
    return cast(Tensor, _call_gram(torch.ops.mtlkernels.cosine.default, "cosine", gram))


def magnitude_similarity(gram: Tensor) -> Tensor:
    return cast(Tensor, _call_gram(torch.ops.mtlkernels.magnitude_similarity.default, "magnitude_similarity", gram))


def conflict_rate(gram: Tensor) -> Tensor:
    return cast(Tensor, _call_gram(torch.ops.mtlkernels.conflict_rate.default, "conflict_rate", gram))


def condition_number(gram: Tensor) -> Tensor:
    return cast(Tensor, _call_gram(torch.ops.mtlkernels.condition_number.default, "condition_number", gram))


for _function in (cosine, magnitude_similarity, conflict_rate, condition_number):
    _function.__doc__ = getattr(reference, _function.__name__).__doc__


def check_gram(gram: Tensor, argument: str = "gram") -> None:
    """Raises a ``ValueError`` unless ``gram`` is a floating-point tensor [..., K, K]."""
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"{argument} has shape {tuple(gram.shape)}; pass [..., K, K], as mtlkernels.gram returns it.")
    if gram.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{argument} is {gram.dtype}; pass float64 (as mtlkernels.gram returns it) or float32.")


# --- calling ------------------------------------------------------------------------------------------------------------


def _rows(grads: Gradients, argument: str) -> list[Sequence[Tensor | None]]:
    rows: list[Sequence[Tensor | None]] = [[row] if isinstance(row, Tensor) else list(row) for row in grads]
    for row in rows:
        if len(row) != len(rows[0]):
            check_lengths(rows, argument)
    return rows


def _check_device(flat: Flat, tensor: Tensor, argument: str) -> None:
    device = reference.device_of([flat])
    if any(t is not None for t in flat) and tensor.device != device:
        raise ValueError(f"{argument} is on {tensor.device}, the gradients are on {device}; pass {argument}.to({str(device)!r}).")


def _call(op: Callable[..., Any], name: str, check: Callable[[], None], *args: Any, differentiable: bool = False) -> Any:
    """Calls an op; when it refuses, lets ``check`` say why. Skips the autograd keys where there is nothing to differentiate."""
    if torch.compiler.is_compiling():
        return op(*args)
    tensors = [t for arg in args if isinstance(arg, (list, Tensor)) for t in ([arg] if isinstance(arg, Tensor) else arg)]
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    try:
        if needs_grad:
            if not differentiable:
                refuse_grad(tensors, name)
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    except (RuntimeError, AttributeError, TypeError):
        check()
        raise


def _call_gram(op: Callable[..., Any], name: str, matrix: Tensor) -> Any:
    check_gram(matrix)
    return _call(op, name, lambda: None, matrix)

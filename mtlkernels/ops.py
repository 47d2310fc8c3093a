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
from .checks import (
    TaskGradients,
    check_buffers,
    check_channel_weights,
    check_fit,
    check_floating,
    check_gradients,
    check_lengths,
    check_weights,
    refuse_grad,
)
from .reference import Granularity

Gradients = TaskGradients | Sequence[Tensor] | Tensor
"""What the functions take: K sequences of N tensors, K tensors, or one tensor [K, ...]."""
Flat = Sequence[Tensor | None]


def _nest(flat: Flat, num_tasks: int) -> list[list[Tensor | None]]:
    size = len(flat) // num_tasks if num_tasks > 0 else 0
    if len(flat) != num_tasks * size:
        raise ValueError(
            f"grads lists {len(flat)} tensors, which are not {num_tasks} rows of one length; pass N for each task."
        )
    return [list(flat[k * size : (k + 1) * size]) for k in range(num_tasks)]


# --- gram ---------------------------------------------------------------------------------------------------------------


def _gram_rows(columns: Sequence[Sequence[Tensor | None]], per: str) -> int:
    models = [reference.like(column) for column in columns]
    return len(models) if per == "tensor" else sum(reference.num_channels(m) for m in models if m is not None)


def _gram_fake(flat: Flat, num_tasks: int, per: str) -> Tensor:
    return _cross_gram_fake(flat, flat, num_tasks, num_tasks, per)


def _cross_gram_fake(flat: Flat, other: Flat, num_tasks: int, num_other: int, per: str) -> Tensor:
    rows = _nest(flat, num_tasks) + _nest(other, num_other)
    check_gradients(rows)
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
        names = [*(f"grads[{k}]" for k in range(len(rows))), *(f"other[{k}]" for k in range(len(against)))]
        check_lengths(columns, names=names)
        flat, flat_other = [t for row in rows for t in row], [t for row in against for t in row]

        def check() -> None:
            check_gradients(rows)
            check_gradients(columns, names=names)

        op = torch.ops.mtlkernels.cross_gram.default
        result = _call(op, "gram", check, flat, flat_other, len(rows), len(against), per)
    return result if per != "channel" else split_channels(cast(Tensor, result), columns)


def split_channels(stacked: Tensor, rows: TaskGradients) -> list[Tensor | None]:
    """A tensor [sum of the tensors' channels, ...] as N of [C_n, ...], None where no task has a gradient."""
    models = [reference.like(column) for column in zip(*rows, strict=True)]
    parts = iter(stacked.split([reference.num_channels(m) for m in models if m is not None]))
    return [None if m is None else next(parts) for m in models]


# --- combine ------------------------------------------------------------------------------------------------------------


def _columns(flat: Flat, num_tasks: int) -> list[tuple[Tensor | None, ...]]:
    return list(zip(*_nest(flat, num_tasks), strict=True))


def _check_traced(flat: Flat, weights: Tensor, argument: str) -> None:
    """What a kernel refuses, refused at tracing; also where one tensor on the meta device brings all others here."""
    check_gradients(_nest(flat, weights.shape[-1]))
    _check_device(flat, weights, argument)


def _combine_fake(flat: Flat, weights: Tensor) -> list[Tensor]:
    _check_traced(flat, weights, "weights")
    return [torch.empty_like(cast(Tensor, reference.like(c))) for c in _columns(flat, weights.shape[-1])]


def _combine_reference(flat: Flat, weights: Tensor) -> list[Tensor]:
    return cast(list[Tensor], reference.combine(_nest(flat, weights.shape[-1]), weights))


class _Combine(torch.autograd.Function):
    """The derivatives: d out[n] / d grads[k][n] = weights[k], d out[n] / d weights[k] = grads[k][n].

    Of our own because ``torch.library.register_autograd`` loses the gradients of a list that holds None.
    """

    @staticmethod
    def forward(present: Sequence[bool], weights: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows = iter(tensors)
        return tuple(torch.ops.mtlkernels.combine([next(rows) if there else None for there in present], weights))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        present, weights, *tensors = inputs
        ctx.present = present
        ctx.save_for_backward(weights, *(tensors if weights.requires_grad else []))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # plain ops, so that it differentiates again
        weights, *tensors = ctx.saved_tensors
        num_tensors = len(grad_outputs)
        table = weights.expand(num_tensors, weights.shape[-1])
        places = [divmod(index, num_tensors) for index, there in enumerate(ctx.present) if there]
        gradients = [_scaled(grad_outputs[n], table[n, k]) for k, n in places]
        if not tensors:
            return None, None, *gradients
        inner = {place: _inner(grad_outputs[place[1]], row) for place, row in zip(places, tensors, strict=True)}
        zero = torch.zeros((), dtype=torch.float64, device=weights.device)
        rows = [torch.stack([inner.get((k, n), zero) for k in range(weights.shape[-1])]) for n in range(num_tensors)]
        by_tensor = torch.stack(rows)
        return None, (by_tensor if weights.dim() == 2 else by_tensor.sum(0)).to(weights.dtype), *gradients


def _scaled(tensor: Tensor, weight: Tensor) -> Tensor:
    """tensor * weight in float32 or wider: a weight need not be within the range of a 16-bit dtype."""
    return (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * weight).to(tensor.dtype)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum()


def _combine_autograd(flat: Flat, weights: Tensor) -> list[Tensor]:
    tensors = [t for t in flat if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in [weights, *tensors]):
        return list(_Combine.apply([t is not None for t in flat], weights, *tensors))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.mtlkernels.combine(flat, weights)


def _combine_inplace_fake(out: Sequence[Tensor], flat: Flat, weights: Tensor) -> None:
    _check_traced(flat, weights, "weights")
    check_fit(out, _columns(flat, weights.shape[-1]))


def _combine_inplace_reference(out: Sequence[Tensor], flat: Flat, weights: Tensor) -> None:
    check_buffers(out, _columns(flat, weights.shape[-1]))
    for buffer, value in zip(out, _combine_reference(flat, weights), strict=True):
        buffer.copy_(value)


define(
    "combine(Tensor?[] grads, Tensor weights) -> Tensor[]",
    fake=_combine_fake,
    reference=_combine_reference,
    autograd=_combine_autograd,
)
define(
    "combine_(Tensor(a!)[] out, Tensor?[] grads, Tensor weights) -> ()",
    fake=_combine_inplace_fake,
    reference=_combine_inplace_reference,
)


def _combine_channels_fake(flat: Flat, weights: Tensor) -> list[Tensor]:
    results = _combine_fake(flat, weights)
    _check_rows(results, weights)
    return results


def _check_rows(models: Sequence[Tensor], weights: Tensor) -> None:
    count = sum(map(reference.num_channels, models))
    if weights.dim() != 2 or weights.shape[0] != count:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; {count} channels take [{count}, K].")


def _combine_channels_reference(flat: Flat, weights: Tensor) -> list[Tensor]:
    return cast(list[Tensor], reference.combine_channels(_nest(flat, weights.shape[-1]), weights))


def _combine_channels_autograd(flat: Flat, weights: Tensor) -> list[Tensor]:
    """Where a gradient is asked for, in torch ops that have their own."""
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in [weights, *flat])):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.mtlkernels.combine_channels(flat, weights)
    columns = _columns(flat, weights.shape[-1])
    models = [cast(Tensor, reference.like(column)) for column in columns]
    _check_rows(models, weights)
    results = []
    for column, model, own in zip(columns, models, weights.split(list(map(reference.num_channels, models))), strict=True):
        pairs = zip(column, reference.by_channel(own, model), strict=True)
        wide = torch.promote_types(model.dtype, torch.float32)
        terms = [
            weight.to(wide) * torch.where((weight == 0) & ~row.isfinite(), 0.0, row.to(wide))
            for row, weight in pairs
            if row is not None
        ]
        results.append(torch.stack(terms).sum(0).to(model.dtype))
    return results


def _combine_channels_inplace_fake(out: Sequence[Tensor], flat: Flat, weights: Tensor) -> None:
    _combine_inplace_fake(out, flat, weights)
    _check_rows(out, weights)


def _combine_channels_inplace_reference(out: Sequence[Tensor], flat: Flat, weights: Tensor) -> None:
    check_buffers(out, _columns(flat, weights.shape[-1]))
    for buffer, value in zip(out, _combine_channels_reference(flat, weights), strict=True):
        buffer.copy_(value)


define(
    "combine_channels(Tensor?[] grads, Tensor weights) -> Tensor[]",
    fake=_combine_channels_fake,
    reference=_combine_channels_reference,
    autograd=_combine_channels_autograd,
)
define(
    "combine_channels_(Tensor(a!)[] out, Tensor?[] grads, Tensor weights) -> ()",
    fake=_combine_channels_inplace_fake,
    reference=_combine_channels_inplace_reference,
)


def combine(
    grads: Gradients, weights: Tensor | Sequence[Tensor | None], out: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]:
    """Weighted sum of task gradients in one read, out[n] = sum_k weights[k] * grads[k][n].

    Differentiable in the gradients and the weights when ``out`` is not given. A row whose weight is exactly 0 is not read.

    Args:
        grads: as in :func:`gram`.
        weights: [K], or [N, K] for one set per tensor, on the gradients' device. Or a list of N tensors [C_n, K], one set per
            channel as ``gram(grads, per="channel")`` has them; None where every task is.
        out: N buffers of the gradients' shapes and dtypes, written in place. A buffer may be one of its own tensor's
            gradients (the first non-None row needs no memory at all); other overlaps cost one temporary copy.

    Returns:
        N tensors with the dtype and layout of the gradients, None where every task is None; with ``out``, the buffers.

    Raises:
        ValueError: as in :func:`gram`, a wrong weight shape, or buffers that do not fit.
    """
    rows = _rows(grads, "grads")
    if not isinstance(weights, (list, tuple)) or not all(own is None or isinstance(own, Tensor) for own in weights):
        return combine_rows(rows, cast(Tensor, weights), out)
    models = [reference.like(column) for column in zip(*rows, strict=True)]
    check_channel_weights(weights, rows, [0 if model is None else reference.num_channels(model) for model in models])
    kept = [cast(Tensor, own) for own, model in zip(weights, models, strict=True) if model is not None]
    return combine_rows(rows, torch.cat(kept) if kept else torch.zeros(0, len(rows)), out, per_channel=True)


def combine_rows(
    rows: Sequence[Sequence[Tensor | None]],
    weights: Tensor,
    out: Sequence[Tensor | None] | None = None,
    per_channel: bool = False,
) -> list[Tensor | None]:
    """:func:`combine` on K lists of N tensors; ``per_channel``: weights [sum of the tensors' channels, K]."""
    num_tensors = len(rows[0]) if rows else 0
    keep = _reached(rows)
    flat = [row[n] for row in rows for n in keep]

    def check() -> None:
        check_gradients(rows)
        if not per_channel:
            check_weights(weights, len(rows), num_tensors)
        _check_device(flat, weights, "weights")
        if out is not None:
            check_buffers(out, zip(*rows, strict=True))

    if not per_channel and (not isinstance(weights, Tensor) or weights.shape != (len(rows),)):
        check_weights(weights, len(rows), num_tensors)
        weights = weights if len(keep) == num_tensors else weights[keep]
    if weights.dtype in (torch.bfloat16, torch.float16):
        weights = weights.float()
    ops = torch.ops.mtlkernels
    if out is None:
        op, autograd = (
            (ops.combine_channels.default, _combine_channels_autograd)
            if per_channel
            else (ops.combine.default, _combine_autograd)
        )
        values = _call(op, "combine", check, flat, weights, autograd=autograd)
        result: list[Tensor | None] = [None] * num_tensors
        for n, value in zip(keep, values, strict=True):
            result[n] = value
        return result
    if len(out) != num_tensors or any(out[n] is None for n in keep):
        check()
    buffers = [cast(Tensor, out[n]) for n in keep]
    if keep:
        inplace = ops.combine_channels_.default if per_channel else ops.combine_.default
        _call(inplace, "combine", check, buffers, flat, weights)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(buffers)
    return [buffer if n in set(keep) else None for n, buffer in enumerate(out)] if len(keep) < num_tensors else list(out)


# --- mix and project ----------------------------------------------------------------------------------------------------


def _mix_fake(flat: Flat, coefficients: Tensor) -> list[Tensor]:
    _check_traced(flat, coefficients, "coefficients")
    columns = _columns(flat, coefficients.shape[1])
    return [torch.empty_like(cast(Tensor, reference.like(c))) for _ in range(coefficients.shape[0]) for c in columns]


def _mix_reference(flat: Flat, coefficients: Tensor) -> list[Tensor]:
    rows = reference.mix(_nest(flat, coefficients.shape[1]), coefficients)
    return [cast(Tensor, t) for row in rows for t in row]


define("mix(Tensor?[] grads, Tensor coefficients) -> Tensor[]", fake=_mix_fake, reference=_mix_reference)


def mix(grads: Gradients, coefficients: Tensor) -> list[list[Tensor | None]]:
    """M weighted sums of the K task gradients, out[m][n] = sum_k coefficients[m, k] * grads[k][n].

    One read of the gradients for all M results (on CUDA, for 64 at a time and up to 64 tasks).

    Args:
        grads: as in :func:`gram`.
        coefficients: [M, K] on the gradients' device. An entry of exactly 0 leaves the row out.

    Returns:
        M lists of N new tensors with the dtype and layout of the gradients, None where every task is None.

    Raises:
        ValueError: as in :func:`gram`, or a wrong shape of ``coefficients``.
    """
    rows = _rows(grads, "grads")
    check_floating(coefficients, "coefficients")
    if coefficients.dim() != 2 or coefficients.shape[1] != len(rows):
        raise ValueError(f"coefficients has shape {tuple(coefficients.shape)}; {len(rows)} tasks take [M, {len(rows)}].")
    if coefficients.dtype in (torch.bfloat16, torch.float16):
        coefficients = coefficients.float()
    num_tensors = len(rows[0]) if rows else 0
    keep = _reached(rows)
    flat = [row[n] for row in rows for n in keep]

    def check() -> None:
        check_gradients(rows)
        _check_device(flat, coefficients, "coefficients")

    values = iter(_call(torch.ops.mtlkernels.mix.default, "mix", check, flat, coefficients))
    kept = set(keep)
    return [[next(values) if n in kept else None for n in range(num_tensors)] for _ in range(coefficients.shape[0])]


define(
    "projection_coefficients(Tensor gram, Tensor order, bool conflict_only) -> Tensor",
    fake=lambda gram, order, conflict_only: gram.new_empty(gram.shape),
    reference=reference.projection_coefficients,
)


def project(
    grads: Gradients, onto: int | Sequence[Tensor | None] | None = None, conflict_only: bool = True
) -> list[list[Tensor | None]]:
    """Each task gradient off the gradients it conflicts with: g_i - <g_i, g_j> / |g_j|^2 g_j where <g_i, g_j> < 0.

    One read for the Gram; the result as by :func:`mix`.

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
    names: list[str] | None = None
    if onto is None:
        first, steps = 0, num_tasks
    elif not isinstance(onto, Tensor | Sequence):
        if not isinstance(onto, int) or not -num_tasks <= onto < num_tasks:
            raise ValueError(
                f"onto is {onto}; {num_tasks} tasks take an index from {-num_tasks} to {num_tasks - 1}, or N tensors."
            )
        first, steps = onto % num_tasks, 1
    else:
        names = [*(f"grads[{k}]" for k in range(num_tasks)), "onto"]
        rows = [*rows, [onto] if isinstance(onto, Tensor) else list(onto)]
        first, steps = num_tasks, 1
        check_lengths(rows, names=names)
    try:
        matrix = cast(Tensor, gram(rows))
    except ValueError:
        check_gradients(rows[:num_tasks])
        check_gradients(rows, names=names)
        raise
    order = torch.arange(first, first + steps, device=matrix.device).expand(len(rows), steps)
    return mix(rows, torch.ops.mtlkernels.projection_coefficients(matrix, order, conflict_only)[:num_tasks])


# --- what a Gram tells --------------------------------------------------------------------------------------------------

define("cosine(Tensor gram) -> Tensor", fake=lambda gram: gram.new_empty(gram.shape), reference=reference.cosine)
define(
    "magnitude_similarity(Tensor gram) -> Tensor",
    fake=lambda gram: gram.new_empty(gram.shape),
    reference=reference.magnitude_similarity,
)
define(
    "conflict_rate(Tensor gram) -> Tensor", fake=lambda gram: gram.new_empty(gram.shape[:-2]), reference=reference.conflict_rate
)
define(
    "condition_number(Tensor gram) -> Tensor",
    fake=lambda gram: gram.new_empty(gram.shape[:-2]),
    reference=reference.condition_number,
)


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
    if not isinstance(gram, Tensor):
        raise ValueError(f"{argument} is a {type(gram).__name__}; pass a tensor [..., K, K], as mtlkernels.gram returns it.")
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"{argument} has shape {tuple(gram.shape)}; pass [..., K, K], as mtlkernels.gram returns it.")
    if gram.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{argument} is {gram.dtype}; pass float64 (as mtlkernels.gram returns it) or float32.")


# --- calling ------------------------------------------------------------------------------------------------------------


def _rows(grads: Gradients, argument: str) -> list[Sequence[Tensor | None]]:
    """K lists of N tensors; a ``ValueError`` for anything else."""
    try:
        rows: list[Sequence[Tensor | None]] = [[row] if isinstance(row, Tensor) else list(row) for row in grads]
    except TypeError:
        raise ValueError(f"{argument} is not K sequences of N tensors, K tensors, or one tensor [K, ...].") from None
    for row in rows:
        if len(row) != len(rows[0]):
            check_lengths(rows, argument)
    return rows


def _reached(rows: Sequence[Sequence[Tensor | None]]) -> list[int]:
    """The tensors that some task has a gradient of."""
    first = rows[0] if rows else []
    return [n for n, t in enumerate(first) if t is not None or any(row[n] is not None for row in rows)]


def _check_device(flat: Flat, tensor: Tensor, argument: str) -> None:
    device = reference.device_of([flat])
    if any(t is not None for t in flat) and tensor.device != device:
        raise ValueError(
            f"{argument} is on {tensor.device}, the gradients are on {device}; pass {argument}.to({str(device)!r})."
        )


def _call(
    op: Callable[..., Any], name: str, check: Callable[[], None], *args: Any, autograd: Callable[..., Any] | None = None
) -> Any:
    """Calls an op; when it refuses, lets ``check`` say why.

    Skips the autograd keys where there is nothing to differentiate. Where there is, ``autograd`` is called, in front of the
    dispatcher, where torch.func sees it.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        if torch.is_grad_enabled() and _requires_grad(args):
            if autograd is not None:
                return autograd(*args)
            refuse_grad([t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, Tensor)], name)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    except (RuntimeError, AttributeError, TypeError, ValueError):
        check()
        raise


def _requires_grad(args: Sequence[Any]) -> bool:
    """Whether a tensor, alone or in a list, requires grad. A plain loop: it costs a small model microseconds."""
    for arg in args:
        if isinstance(arg, list):
            for t in arg:
                if t is not None and t.requires_grad:
                    return True
        elif isinstance(arg, Tensor) and arg.requires_grad:
            return True
    return False


def _call_gram(op: Callable[..., Any], name: str, matrix: Tensor) -> Any:
    check_gram(matrix)
    return _call(op, name, lambda: None, matrix)

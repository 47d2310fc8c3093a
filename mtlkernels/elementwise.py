"""Task gradients combined element by element, without weights: the ops, their schemas, fakes and references.

GradDrop keeps the positive or the negative parts of an element's K gradients, the trimmed mean drops the extreme ones. Each is
one read of the gradients and one write of the result, 1 + 1/K times the gradients' bytes.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from ._library import define
from .checks import check_buffers, check_fit, check_gradients
from .ops import Flat, _call, _check_device, _columns, _nest
from .random import element_words, to_uniform

Columns = Sequence[Sequence[Tensor | None]]


def _kept(active: Tensor | None, task: int, row: Tensor) -> Tensor:
    """A task's row in float32 or wider, zeros where the task is not active."""
    value = row.detach().to(torch.promote_types(row.dtype, torch.float32))
    return value if active is None else torch.where(active[task], value, 0.0)


def _into(out: Sequence[Tensor], columns: Columns, values: Sequence[Tensor]) -> None:
    check_buffers(out, columns)
    for buffer, value in zip(out, values, strict=True):
        buffer.copy_(value)


def _empty_results(flat: Flat, num_tasks: int) -> list[Tensor]:
    check_gradients(_nest(flat, num_tasks))
    return [torch.empty_like(cast(Tensor, reference.like(column))) for column in _columns(flat, num_tasks)]


# --- graddrop -----------------------------------------------------------------------------------------------------------


def drop_signs(column: Sequence[Tensor | None], leak: Tensor, active: Tensor | None, uniforms: Tensor) -> Tensor:
    """The specification of :func:`graddrop`, for the K gradients of one tensor and a uniform number for each element.

    In float32 (float64 for float64 gradients), in the order of the tasks and without fused multiply-adds, as all backends do
    it: they agree to the last bit.
    """
    model = cast(Tensor, reference.like(column))
    wide = torch.promote_types(model.dtype, torch.float32)
    up = down = leaked_up = leaked_down = torch.zeros(model.shape, dtype=wide, device=model.device)
    for k, row in enumerate(column):
        if row is None:
            continue
        value = _kept(active, k, row)
        rise, fall = torch.where(value <= 0, 0.0, value), torch.where(value >= 0, 0.0, -value)  # both NaN where it is
        up, down = up + rise, down + fall
        leaked_up, leaked_down = leaked_up + leak[k].to(wide) * rise, leaked_down + leak[k].to(wide) * fall
    total = up + down
    kept = torch.where(up > uniforms.view(model.shape).to(wide) * total, up - leaked_down, leaked_up - down)
    return torch.empty_like(model).copy_(kept + 0.0 * total)  # NaN, and never less, where a gradient is not finite


def _graddrop_reference(flat: Flat, leak: Tensor, active: Tensor | None, seed: Tensor, places: Sequence[int]) -> list[Tensor]:
    check_gradients(_nest(flat, leak.shape[-1]))
    columns = _columns(flat, leak.shape[-1])
    _check_places(places, columns)
    results = []
    for column, place in zip(columns, places, strict=True):
        words = element_words(seed, place, cast(Tensor, reference.like(column)).numel())
        results.append(drop_signs(column, leak, active, to_uniform(words)))
    return results


def _check_places(places: Sequence[int], columns: Columns) -> None:
    if len(places) != len(columns) or not all(0 <= place < 2**32 for place in places):
        raise ValueError(f"places is {list(places)}; pass an index from 0 to 2^32 - 1 for each of {len(columns)} tensors.")


def _graddrop_fake(flat: Flat, leak: Tensor, active: Tensor | None, seed: Tensor, places: Sequence[int]) -> list[Tensor]:
    results = _empty_results(flat, leak.shape[-1])
    for name, tensor in (("leak", leak), ("active", active), ("seed", seed)):
        if tensor is not None:
            _check_device(flat, tensor, name)
    return results


def _graddrop_inplace_fake(
    out: Sequence[Tensor], flat: Flat, leak: Tensor, active: Tensor | None, seed: Tensor, places: Sequence[int]
) -> None:
    _graddrop_fake(flat, leak, active, seed, places)
    check_fit(out, _columns(flat, leak.shape[-1]))


def _graddrop_inplace_reference(
    out: Sequence[Tensor], flat: Flat, leak: Tensor, active: Tensor | None, seed: Tensor, places: Sequence[int]
) -> None:
    _into(out, _columns(flat, leak.shape[-1]), _graddrop_reference(flat, leak, active, seed, places))


define(
    "graddrop(Tensor?[] grads, Tensor leak, Tensor? active, Tensor seed, int[] places) -> Tensor[]",
    fake=_graddrop_fake,
    reference=_graddrop_reference,
)
define(
    "graddrop_(Tensor(a!)[] out, Tensor?[] grads, Tensor leak, Tensor? active, Tensor seed, int[] places) -> ()",
    fake=_graddrop_inplace_fake,
    reference=_graddrop_inplace_reference,
)


def graddrop(
    rows: Columns,
    leak: Tensor,
    seed: Tensor,
    active: Tensor | None = None,
    out: Sequence[Tensor | None] | None = None,
    uniforms: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """Sum of an element's positive or of its negative gradients, drawn at random (Chen et al. 2020, Algorithm 1).

    With P = 1/2 (1 + sum_k g_k / sum_k |g_k|), the positive share of |g|, and U uniform in (0, 1), one for each element:
    M_k = [P > U] [g_k > 0] + [P <= U] [g_k < 0] and out = sum_k (leak_k + (1 - leak_k) M_k) g_k. Without a leak, the mean of
    out over U is sum_k g_k. P > U is decided as sum of g_k > 0 > U sum |g_k|, in float32 (float64 for float64 gradients) in
    the order of the tasks, which gives the same bits on every backend. U is :func:`mtlkernels.random.element_words` of the
    seed and the tensor's index, as :func:`mtlkernels.random.to_uniform`.

    Args:
        rows: K lists of N tensors; None counts as zero.
        leak: float64 [K] in [0, 1] on the gradients' device; a task of leak 1 is never dropped.
        seed: int64, one element, on the gradients' device. Not read on the host.
        active: bool [K]; a task that is not active counts as zero.
        out: N buffers, as in :func:`mtlkernels.combine`.
        uniforms: U for each tensor, of its shape, in place of the seed's: for tests, by the reference.

    Returns:
        N tensors with the dtype and layout of the gradients, None where every task is None; with ``out``, the buffers. An
        element with a gradient that is not finite is NaN.
    """

    def call(kept: tuple[int, ...], flat: Flat, buffers: list[Tensor] | None) -> list[Tensor]:
        ops = torch.ops.mtlkernels
        if uniforms is not None:
            values = [
                drop_signs(column, leak, active, cast(Tensor, uniforms[n]))
                for n, column in zip(kept, _columns(flat, len(rows)), strict=True)
            ]
            if buffers is not None:
                _into(buffers, _columns(flat, len(rows)), values)
            return values
        if buffers is None:
            return _call(ops.graddrop.default, "graddrop", check, flat, leak, active, seed, kept)
        _call(ops.graddrop_.default, "graddrop", check, buffers, flat, leak, active, seed, kept)
        return buffers

    def check() -> None:
        check_gradients(rows)
        for name, tensor in (("leak", leak), ("active", active), ("seed", seed)):
            if tensor is not None:
                _check_device([t for row in rows for t in row], tensor, name)
        if out is not None:
            check_buffers(out, list(zip(*rows, strict=True)))

    return _reached(rows, out, check, call)


# --- trimmed_mean -------------------------------------------------------------------------------------------------------


def trim_extremes(column: Sequence[Tensor | None], trim: int, active: Tensor | None) -> Tensor:
    """The specification of :func:`trimmed_mean`, for the K gradients of one tensor: sorted, then the ranks between averaged."""
    model = cast(Tensor, reference.like(column))
    values = torch.stack([torch.zeros_like(model) if row is None else row.detach() for row in column])
    values = values.to(torch.promote_types(model.dtype, torch.float32))
    shape = (-1, *[1] * model.dim())
    count = torch.full((), len(column), device=model.device)
    if active is not None:
        count = active.sum()
        values = torch.where(active.view(shape), values, torch.nan)  # to the ranks from count on: NaN sorts last
    dropped = ((count - 1) // 2).clamp(0, trim)
    rank = torch.arange(len(column), device=model.device).view(shape)
    left = (rank >= dropped) & (rank < count - dropped)
    mean = torch.where(left, values.sort(0).values, 0.0).sum(0) / (count - 2 * dropped).clamp(min=1)
    return torch.empty_like(model).copy_(mean)


def _check_trim(trim: int, num_tasks: int) -> None:
    if trim < 0 or (num_tasks > 0 and num_tasks < 2 * trim + 1):
        raise ValueError(
            f"trim is {trim} and there are {num_tasks} tasks, of which that many on each side would leave none; "
            f"pass a trim from 0 to {max(num_tasks - 1, 0) // 2}."
        )


def _trimmed_mean_reference(flat: Flat, num_tasks: int, trim: int, active: Tensor | None) -> list[Tensor]:
    check_gradients(_nest(flat, num_tasks))
    _check_trim(trim, num_tasks)
    return [trim_extremes(column, trim, active) for column in _columns(flat, num_tasks)]


def _trimmed_mean_fake(flat: Flat, num_tasks: int, trim: int, active: Tensor | None) -> list[Tensor]:
    results = _empty_results(flat, num_tasks)
    if active is not None:
        _check_device(flat, active, "active")
    _check_trim(trim, num_tasks)
    return results


def _trimmed_mean_inplace_fake(out: Sequence[Tensor], flat: Flat, num_tasks: int, trim: int, active: Tensor | None) -> None:
    _trimmed_mean_fake(flat, num_tasks, trim, active)
    check_fit(out, _columns(flat, num_tasks))


def _trimmed_mean_inplace_reference(
    out: Sequence[Tensor], flat: Flat, num_tasks: int, trim: int, active: Tensor | None
) -> None:
    _into(out, _columns(flat, num_tasks), _trimmed_mean_reference(flat, num_tasks, trim, active))


define(
    "trimmed_mean(Tensor?[] grads, int num_tasks, int trim, Tensor? active) -> Tensor[]",
    fake=_trimmed_mean_fake,
    reference=_trimmed_mean_reference,
)
define(
    "trimmed_mean_(Tensor(a!)[] out, Tensor?[] grads, int num_tasks, int trim, Tensor? active) -> ()",
    fake=_trimmed_mean_inplace_fake,
    reference=_trimmed_mean_inplace_reference,
)


def trimmed_mean(
    rows: Columns, trim: int, active: Tensor | None = None, out: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]:
    """Mean of an element's gradients without the ``trim`` smallest and the ``trim`` largest (Yin et al. 2018, Definition 2).

    out = 1 / (K - 2 b) sum_{r = b}^{K - b - 1} g_(r), where g_(0) <= ... <= g_(K - 1) are the element's K gradients and b is
    ``trim``. NaN sorts past the largest: up to b of them are left out with it, more make the element NaN. Sums in float32
    (float64 for float64 gradients).

    Args:
        rows: K lists of N tensors, K >= 2 trim + 1; None counts as zeros.
        trim: b, the number left out on each side; 0 gives the mean.
        active: bool [K] on the gradients' device; of K, the tasks that are not active are not counted. Where fewer than
            2 trim + 1 are active, all but the middle one or two are left out, and zero is the result where none is. Not read on
            the host.
        out: N buffers, as in :func:`mtlkernels.combine`.

    Returns:
        N tensors with the dtype and layout of the gradients, None where every task is None; with ``out``, the buffers.
    """

    def call(kept: tuple[int, ...], flat: Flat, buffers: list[Tensor] | None) -> list[Tensor]:
        ops = torch.ops.mtlkernels
        if buffers is None:
            return _call(ops.trimmed_mean.default, "trimmed_mean", check, flat, len(rows), trim, active)
        _call(ops.trimmed_mean_.default, "trimmed_mean", check, buffers, flat, len(rows), trim, active)
        return buffers

    def check() -> None:
        check_gradients(rows)
        _check_trim(trim, len(rows))
        if active is not None:
            _check_device([t for row in rows for t in row], active, "active")
        if out is not None:
            check_buffers(out, list(zip(*rows, strict=True)))

    return _reached(rows, out, check, call)


# --- calling ------------------------------------------------------------------------------------------------------------


def _reached(
    rows: Columns,
    out: Sequence[Tensor | None] | None,
    check: Callable[[], None],
    call: Callable[[tuple[int, ...], Flat, list[Tensor] | None], Any],
) -> list[Tensor | None]:
    """Calls ``call`` with the tensors that a task reaches: their indices, task-major gradients and buffers."""
    num_tensors = len(rows[0]) if rows else 0
    kept = [n for n in range(num_tensors) if any(row[n] is not None for row in rows)]
    flat = [row[n] for row in rows for n in kept]
    if out is not None and (len(out) != num_tensors or any(out[n] is None for n in kept)):
        check()
    buffers = None if out is None else [cast(Tensor, out[n]) for n in kept]
    values = call(tuple(kept), flat, buffers) if kept else []
    if buffers and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(buffers)
    result: list[Tensor | None] = [None] * num_tensors
    for n, value in zip(kept, values if buffers is None else buffers, strict=True):
        result[n] = value
    return result

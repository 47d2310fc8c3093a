"""Gradients of every shape, layout and size, and their float64 results computed with NumPy alone."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Rows = Sequence[Sequence[Tensor | None]]

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
"""Largest relative error of rounding to the dtype."""
DTYPES = list(UNIT_ROUNDOFF)
NUM_TASKS = [1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 17, 33, 40, 64]
"""On and around the classes of K that kernels specialise for (1, 2, 3, 4, 8, 16, 64)."""
CHUNK = 65536

# A dot product of float32, bfloat16 or float16 rows is a sum of float32 products. Each product is off by one unit roundoff u
# at most; a float32 chain of c of them adds about sqrt(c) u of the sum of absolute values (random signs of the rounding
# errors), which the product of norms bounds. Chains are a few hundred elements at most before float64 takes over, so 16 u.
# A float64 chain may be as long as the tensor: sqrt(65536) u.
GRAM_TOLERANCE = dict.fromkeys(DTYPES, 16 * 2.0**-24) | {torch.float64: 256 * 2.0**-53}


def random_gradients(
    num_tasks: int, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0
) -> list[list[Tensor]]:
    """Normal gradients with a common part of alternating sign, so that cosines are far from 0 and pairs conflict."""
    generator = torch.Generator().manual_seed(seed)
    common = [torch.randn(list(shape), generator=generator, dtype=torch.float64) for shape in shapes]
    rows = []
    for k in range(num_tasks):
        own = [torch.randn(list(shape), generator=generator, dtype=torch.float64) for shape in shapes]
        rows.append([((o + (-1) ** k * 0.7 * c) * scale).to(dtype) for o, c in zip(own, common, strict=True)])
    return rows


def drop(grads: Rows, *missing: tuple[int, int]) -> list[list[Tensor | None]]:
    """The gradients with None at the (task, tensor) pairs given."""
    return [[None if (k, n) in missing else g for n, g in enumerate(row)] for k, row in enumerate(grads)]


def snapshot(grads: Rows) -> list[tuple[Tensor, Tensor]]:
    """Every tensor with a copy of its values, for :func:`assert_unchanged`."""
    return [(t, t.detach().clone()) for row in grads for t in row if isinstance(t, Tensor) and t.layout == torch.strided]


def assert_unchanged(before: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in before:
        torch.testing.assert_close(tensor.detach(), value, rtol=0, atol=0, equal_nan=True)


# --- float64 results ----------------------------------------------------------------------------------------------------


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).contiguous().numpy()


def numpy_rows(column: Sequence[Tensor | None]) -> np.ndarray | None:
    """[tasks, channels, rest] in float64, zeros for None; None when every task is None."""
    model = next((t for t in column if t is not None), None)
    if model is None:
        return None
    channels = model.shape[0] if model.dim() else 1
    rest = math.prod(model.shape[1:])
    return np.stack([np.zeros((channels, rest)) if t is None else to_numpy(t).reshape(channels, rest) for t in column])


def expected_gram(grads: Rows, other: Rows | None = None, per: str = "model") -> list[np.ndarray | None]:
    """Grams of the columns: one [K, K'] in all, one per tensor, or one [C, K, K'] (None if all None) per tensor."""
    against = grads if other is None else other
    blocks: list[np.ndarray | None] = []
    for column, columns in zip(zip(*grads, strict=True), zip(*against, strict=True), strict=True):
        rows = numpy_rows([*column, *columns])
        if rows is None:
            blocks.append(None)
            continue
        blocks.append(np.matmul(rows[: len(grads)].transpose(1, 0, 2), rows[len(grads) :].transpose(1, 2, 0)))
    if per == "channel":
        return blocks
    empty = np.zeros((len(grads), len(against)))
    tensors = [empty if block is None else block.sum(0) for block in blocks]
    return tensors if per == "tensor" else [sum(tensors, empty)]


def expected_norms(grads: Rows, per: str = "model") -> list[np.ndarray | None]:
    """Norms |g_k| at the granularity of :func:`expected_gram`, with the task as the last dimension."""
    channels = [numpy_rows(column) for column in zip(*grads, strict=True)]
    squares = [None if rows is None else (rows**2).sum(2).T for rows in channels]
    if per == "channel":
        return [None if s is None else np.sqrt(s) for s in squares]
    tensors = [np.zeros(len(grads)) if s is None else s.sum(0) for s in squares]
    return [np.sqrt(s) for s in (tensors if per == "tensor" else [sum(tensors, np.zeros(len(grads)))])]


def assert_gram(
    actual: Tensor | list[Tensor | None],
    grads: Rows,
    other: Rows | None = None,
    per: str = "model",
    tolerance: float | None = None,
) -> None:
    """``actual`` is the float64 Gram of ``grads`` within ``tolerance`` of the product of norms; exactly 0 where a norm is 0."""
    if tolerance is None:
        tolerance = max(
            (GRAM_TOLERANCE[t.dtype] for row in [*grads, *(other or [])] for t in row if t is not None), default=0.0
        )
    num_tasks, num_other = len(grads), len(grads if other is None else other)
    expected = expected_gram(grads, other, per)
    left, right = expected_norms(grads, per), expected_norms(grads if other is None else other, per)
    if per == "model":
        assert isinstance(actual, Tensor)
        parts: Sequence[Tensor | None] = [actual]
    elif per == "tensor":
        assert isinstance(actual, Tensor)
        assert actual.shape == (len(expected), num_tasks, num_other)
        parts = list(actual)
    else:
        assert isinstance(actual, list)
        parts = actual
    assert len(parts) == len(expected)
    for part, value, a, b in zip(parts, expected, left, right, strict=True):
        if value is None:
            assert part is None
            continue
        assert part is not None
        assert part.dtype == torch.float64
        assert part.shape == value.shape
        # One side may be None in a column where the other side is not: its norms are 0 then.
        a = np.zeros(value.shape[:-1]) if a is None else a
        b = np.zeros((*value.shape[:-2], num_other)) if b is None else b
        scale = a[..., :, None] * b[..., None, :]
        error = np.abs(part.numpy() - value)
        assert (error[scale == 0] == 0).all()
        worst = (error / np.where(scale == 0, 1.0, scale)).max(initial=0.0)
        assert worst <= tolerance, f"error over the product of norms is {worst:.2e}, bound {tolerance:.2e}"


def expected_combine(grads: Rows, weights: Tensor) -> list[tuple[np.ndarray, np.ndarray] | None]:
    """For each tensor sum_k w_k g_k and sum_k |w_k g_k|, rows of weight 0 left out; None where every task is None."""
    num_tensors = len(grads[0]) if grads else 0
    table = np.broadcast_to(to_numpy(weights), (num_tensors, len(grads)))
    results: list[tuple[np.ndarray, np.ndarray] | None] = []
    for n in range(num_tensors):
        column = [row[n] for row in grads]
        if all(t is None for t in column):
            results.append(None)
            continue
        terms = [table[n, k] * to_numpy(t) for k, t in enumerate(column) if t is not None and table[n, k] != 0]
        shape = next(t.shape for t in column if t is not None)
        zero = np.zeros(tuple(shape))
        results.append((sum(terms, zero), sum((np.abs(t) for t in terms), zero)))
    return results


def assert_combined(
    actual: Sequence[Tensor | None], grads: Rows, weights: Tensor, same_layout: bool = True, expected: list | None = None
) -> None:
    """``actual`` is sum_k w_k g_k within rounding, in the dtype and layout of each column's first gradient.

    The result is rounded once to its dtype (u of it). Before that each of the K terms carries the rounding of its weight, of
    its product and of at most K additions in the accumulation dtype: (K + 2) u of sum_k |w_k g_k|.
    """
    expected = expected_combine(grads, weights) if expected is None else expected
    assert len(actual) == len(expected)
    for n, (result, value) in enumerate(zip(actual, expected, strict=True)):
        if value is None:
            assert result is None
            continue
        assert result is not None
        model = next(row[n] for row in grads if row[n] is not None)
        assert result.dtype == model.dtype
        assert result.shape == model.shape
        if same_layout:
            assert result.stride() == torch.empty_like(model).stride()
        exact, magnitude = value
        unit = UNIT_ROUNDOFF[model.dtype]
        accumulation = 2.0**-53 if model.dtype == torch.float64 else 2.0**-24
        subnormal = torch.finfo(model.dtype).smallest_normal * torch.finfo(model.dtype).eps
        bound = unit * np.abs(exact) + (len(grads) + 2) * accumulation * magnitude * (1 + unit) + subnormal
        error = np.abs(to_numpy(result) - exact)
        assert (error <= bound).all(), f"tensor {n}: error {error.max():.3e}, largest bound {bound.max():.3e}"


# --- layouts ------------------------------------------------------------------------------------------------------------


def _into(base: Tensor, values: Tensor) -> Tensor:
    base.copy_(values)
    return base


def _misaligned(values: Tensor) -> Tensor:
    return _into(torch.empty(values.numel() + 1, dtype=values.dtype)[1:].view(values.shape), values)


def _stepped(values: Tensor, dim: int, step: int) -> Tensor:
    shape = list(values.shape)
    shape[dim] = shape[dim] * step
    index = [slice(None)] * values.dim()
    index[dim] = slice(None, None, step)
    return _into(torch.full(shape, math.nan, dtype=values.dtype)[tuple(index)], values)


def _window(values: Tensor) -> Tensor:
    return _into(
        torch.full([s + 3 for s in values.shape], math.nan, dtype=values.dtype)[(slice(2, -1),) * values.dim()], values
    )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.clone,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed_last": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "reversed_dims": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last) if x.dim() == 4 else x.T.contiguous().T,
    "step_last": lambda x: _stepped(x, -1, 2),
    "step_first": lambda x: _stepped(x, 0, 3),
    "window": _window,
    "misaligned": _misaligned,
    "expanded_channel": lambda x: x[:1].clone().expand(x.shape),
    "expanded_last": lambda x: x[..., :1].clone().expand(x.shape),
    "expanded_scalar": lambda x: x.flatten()[0].clone().expand(x.shape),
    "sliding_windows": lambda x: x.flatten().clone().as_strided(x.shape, [1] * x.dim()),
    "flipped": lambda x: x.flip(0, -1),
}
"""Layouts by name: each takes a contiguous tensor of at least two dimensions and returns one of its shape. NaN fills the
elements in between that no op may read. The expanded and sliding ones share elements, so their values differ."""
EXPANDED = ("expanded_channel", "expanded_last", "expanded_scalar", "sliding_windows")
"""Layouts in which several indices address one element: no op may write to them."""
LAYOUT_SHAPES = [(6, 4, 5, 3), (37, 67), (3, 1, 1, 1), (1, 130)]

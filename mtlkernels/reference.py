"""The specification: every op in readable PyTorch, float64 inside, on any device.

These functions are the oracle of the tests and benchmarks, and the implementation on devices that have no kernels.
Notation: K tasks, N tensors, g_k the gradient of task k over all tensors.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .checks import TaskGradients, check_gradients, check_lengths, check_weights

Granularity = Literal["model", "tensor", "channel"]


def device_of(grads: TaskGradients) -> torch.device:
    """Device of the first gradient; the CPU when there is none."""
    return next((row.device for rows in grads for row in rows if row is not None), torch.device("cpu"))


def like(column: Sequence[Tensor | None]) -> Tensor | None:
    """First gradient of a tensor's column, whose shape, dtype and layout all others share; None when no task has one."""
    return next((row for row in column if row is not None), None)


def num_channels(tensor: Tensor) -> int:
    """Rows of a tensor viewed as [out, rest]: its first dimension, 1 for a scalar."""
    return tensor.shape[0] if tensor.dim() else 1


def stack_rows(column: Sequence[Tensor | None]) -> Tensor:
    """[K, C, rest] in float64 for the K gradients of one tensor with C channels; zeros where a gradient is None."""
    model = like(column)
    if model is None:
        return torch.zeros(len(column), 0, 0, dtype=torch.float64)
    channels = num_channels(model)
    shape = (channels, model.numel() // channels if channels else 0)
    zero = torch.zeros(shape, dtype=torch.float64, device=model.device)
    return torch.stack([zero if row is None else row.detach().double().reshape(shape) for row in column])


def gram(grads: TaskGradients, other: TaskGradients | None = None, per: Granularity = "model") -> Tensor:
    """Gram matrix of task gradients, G[i, j] = sum_n <grads[i][n], grads[j][n]>; with ``other`` the cross Gram.

    Args:
        grads: K sequences of N tensors, task-major. None counts as zero. Tensors of one column share shape, dtype and device.
        other: K' sequences of the same N tensors; G[i, j] = sum_n <grads[i][n], other[j][n]>.
        per: one Gram for the model, for each tensor, or for each channel (row of a tensor viewed as [out, rest]).

    Returns:
        float64 tensor on the gradients' device: [K, K'], [N, K, K'], or [sum of the tensors' channels, K, K'].
        Exactly symmetric without ``other``. Squared units of the gradient.

    Raises:
        ValueError: a column mixes shapes, dtypes or devices; the message names the task and the tensor.
    """
    if per not in ("model", "tensor", "channel"):
        raise ValueError(f'per is {per!r}; pass "model", "tensor" or "channel".')
    columns = [*grads] if other is None else [*grads, *other]
    check_gradients(columns)
    num_tasks, num_other = len(grads), len(grads) if other is None else len(other)
    device = device_of(columns)
    blocks = []
    for column in zip(*columns, strict=True):
        rows = stack_rows(column).to(device)
        left = rows[:num_tasks].transpose(0, 1)
        right = left if other is None else rows[num_tasks:].transpose(0, 1)
        channels = left @ right.mT
        blocks.append(channels if per == "channel" else channels.sum(0, keepdim=True))
    empty = torch.zeros(0, num_tasks, num_other, dtype=torch.float64, device=device)
    stacked = torch.cat([empty, *blocks])
    result = stacked.sum(0) if per == "model" else stacked
    return result if other is not None else (result + result.mT) / 2  # exact symmetry whatever the BLAS and the sums do


def combine(grads: TaskGradients, weights: Tensor) -> list[Tensor | None]:
    """Weighted sum of task gradients, out[n] = sum_k weights[k] * grads[k][n].

    A row whose weight is exactly 0 is left out, so that dropping a task also drops its NaNs.

    Args:
        grads: as in :func:`gram`.
        weights: [K], or [N, K] with one set of weights per tensor; any floating dtype.

    Returns:
        N tensors with the dtype and layout of the gradients, None where every task is None. Accumulated in float64.
    """
    num_tensors = len(grads[0]) if len(grads) else 0
    check_gradients(grads)
    check_weights(weights, len(grads), num_tensors)
    table = weights.double().expand(num_tensors, len(grads))
    return [
        None if like(column) is None else _combine_column(column, w)
        for column, w in zip(zip(*grads, strict=True), table, strict=True)
    ]


def combine_channels(grads: TaskGradients, weights: Tensor) -> list[Tensor | None]:
    """:func:`combine` with weights for each channel (row of a tensor viewed as [out, rest]): [sum of the tensors' channels, K].

    Tensors where every task is None have no channels.
    """
    check_gradients(grads)
    columns = list(zip(*grads, strict=True))
    models = [like(column) for column in columns]
    sizes = [0 if model is None else num_channels(model) for model in models]
    if weights.shape != (sum(sizes), len(grads)):
        raise ValueError(f"weights has shape {tuple(weights.shape)}; the channels take {(sum(sizes), len(grads))}.")
    return [
        None if model is None else _combine_column(column, by_channel(own, model))
        for column, model, own in zip(columns, models, weights.double().split(sizes), strict=True)
    ]


def by_channel(weights: Tensor, model: Tensor) -> Tensor:
    """Weights [C, K] of a tensor's channels as [K, C, 1, ...], which broadcast with the tensor; [K] for a scalar."""
    return weights.T.reshape(weights.shape[1], *model.shape[:1], *[1] * (model.dim() - 1))


def mix(grads: TaskGradients, coefficients: Tensor) -> list[list[Tensor | None]]:
    """M weighted sums of the K task gradients at once, out[m][n] = sum_k coefficients[m, k] * grads[k][n].

    Args:
        grads: as in :func:`gram`.
        coefficients: [M, K]. An entry of exactly 0 leaves the row out.

    Returns:
        M lists of N tensors as :func:`combine` returns them.
    """
    check_lengths(grads)
    return [combine(grads, row) for row in coefficients]


def _combine_column(column: Sequence[Tensor | None], weights: Tensor) -> Tensor:
    model = like(column)
    assert model is not None
    total = torch.zeros_like(model, dtype=torch.float64)
    for row, weight in zip(column, weights, strict=True):
        if row is not None:
            total = total + torch.where(weight == 0, 0.0, weight * row.double())
    return torch.empty_like(model).copy_(total)


def projection_coefficients(gram: Tensor, order: Tensor, conflict_only: bool = True) -> Tensor:
    """Coefficients C of successive projections: row i of C @ grads is g_i taken off g_j for each j in its order.

    PCGrad's recurrence (Yu et al. 2020, Algorithm 1) on coefficients: with c = e_i, for j != i: s = (c G)_j, and
    c_j -= s / G_jj where s < 0. A zero g_j is skipped. Only the gradients a row is made of are read, so that a NaN stays in
    its own task.

    Args:
        gram: float64 [..., K, K].
        order: int64 [..., K, S]: the tasks that each row is projected off, in order; a row skips itself.
        conflict_only: project only where the inner product is negative; otherwise always.

    Returns:
        float64 [..., K, K].
    """
    num_tasks = gram.shape[-1]
    task = torch.arange(num_tasks, device=gram.device)
    coefficients = torch.eye(num_tasks, dtype=gram.dtype, device=gram.device).expand(gram.shape).clone()
    squares = gram.diagonal(dim1=-2, dim2=-1)
    for onto in order.unbind(-1):  # [..., K]: the task that each row is taken off next
        columns = gram.gather(-2, onto.unsqueeze(-1).expand(gram.shape))  # G is symmetric: row i holds G[onto[i], :]
        inner = torch.where(coefficients == 0, 0.0, coefficients * columns).sum(-1)
        square = squares.gather(-1, onto)
        moves = (square > 0) & (onto != task)
        if conflict_only:
            moves = moves & (inner < 0)
        step = torch.where(moves, inner / torch.where(square > 0, square, 1.0), 0.0)
        coefficients.scatter_add_(-1, onto.unsqueeze(-1), -step.unsqueeze(-1))
    return coefficients


def cosine(gram: Tensor) -> Tensor:
    """Cosines of task gradients, G[i, j] / sqrt(G[i, i] G[j, j]): unit diagonal, 0 in the row and column of a zero gradient.

    Args:
        gram: [..., K, K].

    Returns:
        [..., K, K] in the Gram's dtype, within [-1, 1]; NaN only in the rows and columns of gradients that are not finite.
    """
    scale = _inverse_norms(gram)
    result = (gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)).clamp(-1.0, 1.0).contiguous()
    diagonal = result.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(torch.where(diagonal.isnan(), diagonal, (scale != 0).to(gram.dtype)))
    return result


def magnitude_similarity(gram: Tensor) -> Tensor:
    """Gradient magnitude similarity 2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2) (Yu et al. 2020, Definition 3).

    Args:
        gram: [..., K, K].

    Returns:
        [..., K, K] in [0, 1], 1 for equal norms; 0 where a gradient is 0.
    """
    square = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    norm = square.sqrt()
    left, right = norm.unsqueeze(-1), norm.unsqueeze(-2)
    largest = torch.maximum(left, right)
    safe = torch.where(largest > 0, largest, 1.0)
    a, b = left / safe, right / safe  # scaled, so that squares of large norms stay finite
    total = a * a + b * b
    return (2 * a * b / torch.where(total > 0, total, 1.0)).contiguous()


def conflict_rate(gram: Tensor) -> Tensor:
    """Share of the K (K - 1) / 2 task pairs whose gradients conflict, <g_i, g_j> < 0 (Yu et al. 2020, Definition 1).

    Args:
        gram: [..., K, K].

    Returns:
        [...] in [0, 1]; 0 for a single task.
    """
    num_tasks = gram.shape[-1]
    pairs = max(num_tasks * (num_tasks - 1) // 2, 1)
    return (gram < 0).triu(1).sum((-2, -1)).to(gram.dtype) / pairs


def condition_number(gram: Tensor) -> Tensor:
    """Condition number of the gradient matrix, sigma_max / sigma_min (Senushkin et al. 2023, Section 3).

    The square root of the Gram's own condition number.

    Args:
        gram: [..., K, K].

    Returns:
        [...], at least 1; inf where gradients are linearly dependent to working precision (lambda_min <= K eps lambda_max) or
        all zero; NaN where the Gram is not finite.
    """
    if gram.shape[-1] == 0:
        return gram.new_full(gram.shape[:-2], torch.inf)
    finite = gram.isfinite().all(-1).all(-1)
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[..., None, None], gram, 0.0))
    smallest, largest = eigenvalues[..., 0], eigenvalues[..., -1]
    regular = smallest > gram.shape[-1] * torch.finfo(gram.dtype).eps * largest
    ratio = torch.where(regular, (largest / torch.where(regular, smallest, 1.0)).clamp(min=0).sqrt(), torch.inf)
    return torch.where(finite, ratio, torch.nan)


def _inverse_norms(gram: Tensor) -> Tensor:
    """[..., K]: 1 / |g_k|, 0 for a zero gradient."""
    square = gram.diagonal(dim1=-2, dim2=-1)
    return torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).rsqrt())

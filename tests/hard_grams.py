"""Gram matrices that solvers find hard, and how well weights solve their problem."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

KINDS = (
    "random", "common", "duplicates", "opposites", "scales", "zero_task", "nearly_parallel", "parallel_scales",
    "antiparallel_scales", "signs", "tiny", "huge", "small_mean",
)  # fmt: skip
"""Names for :func:`hard_gradients`."""


def hard_gradients(kind: str, num_tasks: int, numel: int, seed: int) -> np.ndarray:
    """[K, P] float64 gradients; rank-deficient where P < K."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_tasks, numel))
    again, signs = rng.integers(0, num_tasks, num_tasks), rng.choice([-1.0, 1.0], (num_tasks, 1))
    scales = 10.0 ** rng.uniform(-10, 10, (num_tasks, 1))
    half = num_tasks // 2
    if kind == "common":
        rows += rng.standard_normal(numel) * rng.choice([0.1, 1, 10, 1e4])
    elif kind in ("duplicates", "opposites"):
        rows[half : 2 * half] = rows[:half] if kind == "duplicates" else -rows[:half]
    elif kind == "scales":
        rows *= scales
    elif kind == "zero_task":
        rows[rng.integers(num_tasks)] = 0
    elif kind == "nearly_parallel":
        rows = rows[:, :1] @ rng.standard_normal((1, numel)) + 10.0 ** rng.uniform(-16, -2) * rows
    elif kind == "parallel_scales":
        rows = rows[again] * scales
    elif kind == "antiparallel_scales":
        rows = rows[again] * signs * scales
    elif kind == "signs":
        rows = np.sign(rows)
    elif kind == "tiny":
        rows *= 1e-10
    elif kind == "huge":
        rows *= 1e10
    elif kind == "small_mean":
        rows -= rows.mean(0) * (1 - 10.0 ** rng.uniform(-14, 0))
    return rows


def gram_of(rows: np.ndarray) -> Tensor:
    """[K, K], exactly symmetric."""
    gram = torch.from_numpy(rows @ rows.T)
    return (gram + gram.mT) / 2


def batch_of_grams(num_tasks: int, lead: tuple[int, ...]) -> Tensor:
    """[*lead, K, K]: Grams of full rank, of one kind after the other."""
    count = int(np.prod(lead))
    grams = [gram_of(hard_gradients(KINDS[i % len(KINDS)], num_tasks, num_tasks + 3, seed=i)) for i in range(count)]
    return torch.stack(grams).view(*lead, num_tasks, num_tasks)


def filled(num_tasks: int, value: float) -> Tensor:
    return torch.full((num_tasks,), value, dtype=torch.float64)


def one_hot(num_tasks: int, task: int) -> Tensor:
    return filled(num_tasks, 0.0).index_fill(0, torch.tensor(task), 1.0)


def units(gram: Tensor, weights: Tensor) -> Tensor:
    """[K]: n_j sum_k |w_k| n_k."""
    norm = gram.diagonal().sqrt()
    return norm * (weights.abs() * norm).sum()


def jacobian(kind: str, num_tasks: int) -> np.ndarray:
    """[K, P] gradients for comparisons with other programs; of low rank or badly scaled where ``kind`` says so."""
    numel = max(2, num_tasks // 2) if kind == "low_rank" else num_tasks + 3
    rows = hard_gradients(kind if kind in KINDS else "random", num_tasks, numel, seed=num_tasks + 7)
    return rows * np.logspace(-3, 3, num_tasks)[:, None] if kind == "small_scales" else rows


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Equal to the sign of zero; NaN is NaN."""
    integers = torch.int32 if expected.dtype == torch.float32 else torch.int64
    equal = actual.view(integers) == expected.view(integers)
    return actual.shape == expected.shape and bool((equal | (actual.isnan() & expected.isnan())).all())


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[int]:
    """[calls of a function from now on]; set it to 0 to start over."""
    calls, function = [0], getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def optimality_error(gram: Tensor, weights: Tensor, update: Tensor) -> float:
    """Largest <g_w, d> - <g_i, d>, in units of n_i sum_j |d_j| n_j, for d = sum_j d_j g_j: 0 at the optimum of MGDA and CAGrad.

    In units of what rounding alone does to <g_i, d>; the gap relative to max_i G_ii sum_j |d_j| is no larger.
    """
    norm = gram.diagonal().sqrt()
    inner = gram @ update
    unit = norm * (update.abs() * norm).sum()
    there = unit > 0
    return float(((weights @ inner - inner)[there] / unit[there]).max()) if there.any() else 0.0

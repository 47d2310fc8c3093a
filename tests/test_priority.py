"""Task priority by connection strength: strengths and the combination against their written definition, in NumPy alone."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    EXPANDED,
    LAYOUT_SHAPES,
    LAYOUTS,
    UNIT_ROUNDOFF,
    assert_unchanged,
    drop,
    numpy_rows,
    random_gradients,
    snapshot,
    to_numpy,
)
from torch import Tensor

import mtlkernels as mtl
from mtlkernels import _library

NUM_TASKS = [1, 2, 3, 5, 8, 9, 17, 64]
SHAPES = [(6,), (7, 3), (33, 5), (4, 2, 3, 3), (2, 1030), (12, 64)]


# --- the definition -----------------------------------------------------------------------------------------------------


def double_loop(rows: np.ndarray, top: np.ndarray | None, skip_degenerate: bool = True) -> np.ndarray:
    """The combination of one layer's rows [K, C, rest] as Algorithm 1 is written: a loop over groups and tasks."""
    rows = rows.copy()
    plain = top is None or (skip_degenerate and len(set(top.tolist())) <= 1)
    for i in [] if plain else range(len(rows)):
        group = top == i
        reference = rows[i][group].ravel()
        for j in range(len(rows)):
            row = rows[j][group].ravel()
            inner = reference @ row
            if j != i and inner < 0:
                rows[j][group] -= (inner / (reference @ reference) * reference).reshape(rows[j][group].shape)
    return rows.sum(0)


def double_loop_strength(weight: np.ndarray, scale: np.ndarray, variance: np.ndarray, eps: float) -> np.ndarray:
    """S [K, C], a channel at a time."""
    channels = len(weight)
    strength = np.zeros(scale.shape)
    for i in range(len(scale)):
        for p in range(channels):
            connection = sum(float(w) ** 2 for w in weight[p].ravel())
            strength[i, p] = scale[i, p] ** 2 / (variance[i, p] + eps) * connection
        total = math.fsum(strength[i])
        strength[i] = strength[i] / total if total else 0.0
    return strength


def random_tops(num_tasks: int, channels: list[int], seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(num_tasks, (c,), generator=generator) for c in channels]


def channels_of(grads: list) -> list[int]:
    models = [next(t for t in column if t is not None) for column in zip(*grads, strict=True)]
    return [t.shape[0] if t.dim() else 1 for t in models]


def assert_combined(actual: list, grads: list, top: list, skip_degenerate: bool = True) -> None:
    """``actual`` is the double loop's result within rounding.

    Once to the dtype (u), sums of K rows in float32 (K u of their magnitudes, float64 for float64), and the top task's row
    times alpha, whose relative error is that of D over |D|: with D in float64 about 2^-53 sqrt(n) |G_i| |G_j| / |G_i|^2.
    """
    for n, result in enumerate(actual):
        rows = numpy_rows([row[n] for row in grads])
        if rows is None:
            assert result is None
            continue
        model = next(row[n] for row in grads if row[n] is not None)
        assert (result.shape, result.dtype) == (model.shape, model.dtype)
        expected = double_loop(rows, None if top[n] is None else top[n].numpy(), skip_degenerate)
        magnitude = np.abs(rows).sum(0)
        if top[n] is not None:  # alpha's error moves an element by that much of the top task's
            norms = np.sqrt((rows**2).sum((1, 2)))
            own = np.take_along_axis(rows, np.clip(top[n].numpy(), 0, len(rows) - 1)[None, :, None], 0)[0]
            group = [np.sqrt((rows[i][top[n].numpy() == i] ** 2).sum()) for i in range(len(rows))]
            ratio = max((norms.sum() / g for g in group if g > 0), default=0.0)
            magnitude = magnitude + ratio * np.abs(own)
        accumulation = 2.0**-53 if model.dtype == torch.float64 else 2.0**-24
        unit = UNIT_ROUNDOFF[model.dtype]
        bound = 1.01 * unit * np.abs(expected) + (len(rows) + 4) * accumulation * magnitude
        bound += torch.finfo(model.dtype).smallest_normal * torch.finfo(model.dtype).eps + 64 * 2.0**-53 * magnitude
        error = np.abs(to_numpy(result).reshape(expected.shape) - expected)
        assert (error <= bound).all(), f"tensor {n}: error {error.max():.3e}, bound there {bound.flat[error.argmax()]:.3e}"


@pytest.mark.parametrize("seed", range(300))
def test_equals_the_double_loop_to_1e_12(backend, seed):
    """300 random layers: K = 2..6, kernels 1x1 to 7x7, 1 to 512 channels, with ties and with one top task for all."""
    random = np.random.default_rng(seed)
    num_tasks, kernel = int(random.integers(2, 7)), int(random.choice([1, 2, 3, 5, 7]))
    channels, inputs = int(random.choice([1, 2, 3, 16, 37, 64, 512])), int(random.choice([1, 3, 8]))
    shape = (channels, inputs, kernel, kernel)
    weight = torch.from_numpy(random.standard_normal(shape))
    scale = torch.from_numpy(random.standard_normal((num_tasks, channels)))
    variance = torch.from_numpy(random.random((num_tasks, channels)) + 0.1)
    if seed % 5 == 1:  # two tasks tie everywhere: the first of them wins
        scale[-1], variance[-1] = scale[0], variance[0]
    if seed % 5 == 2:  # all tie: degenerate
        scale, variance = scale[:1].expand(num_tasks, -1), variance[:1].expand(num_tasks, -1)

    strength, top = mtl.connection_strength(weight, scale, variance)

    expected = double_loop_strength(weight.numpy(), scale.numpy(), variance.numpy(), 1e-5)
    np.testing.assert_allclose(strength.numpy(), expected, rtol=1e-12, atol=1e-300)
    assert (strength.gather(0, top[None])[0] == strength.amax(0)).all()
    if seed % 5 == 1:
        assert not (top == num_tasks - 1).any()
    if seed % 5 == 2:
        assert not top.any()

    grads = [t[0] for t in random_gradients(num_tasks, [shape], torch.float64, seed=seed)]
    if seed % 7 == 3:
        grads[0].zero_()  # a top task without gradient
    rows = np.stack([g.numpy().reshape(channels, -1) for g in grads])
    for skip in (True, False):
        actual = mtl.priority_combine(grads, top, skip_degenerate=skip)
        np.testing.assert_allclose(
            actual.numpy().reshape(channels, -1), double_loop(rows, top.numpy(), skip), rtol=1e-12, atol=1e-12
        )

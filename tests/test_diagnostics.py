"""What a Gram tells: cosine, magnitude similarity, conflict rate and condition number against their definitions."""

import math

import numpy as np
import pytest
import torch
from hard_grams import gram_of, hard_gradients

import mtlkernels as mtl

DIAGNOSTICS = {
    "cosine": mtl.cosine,
    "magnitude_similarity": mtl.magnitude_similarity,
    "conflict_rate": mtl.conflict_rate,
    "condition_number": mtl.condition_number,
}
DTYPES = (torch.float64, torch.float32)


def tolerance(dtype: torch.dtype) -> float:
    """A handful of roundings of numbers of size 1."""
    return 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 11, 64])
def test_definitions(backend, dtype, num_tasks):
    rows = hard_gradients("random", num_tasks, num_tasks + 4, seed=num_tasks)
    gram = gram_of(rows).to(dtype)
    norm = np.linalg.norm(rows, axis=1)
    similarity = 2 * np.outer(norm, norm) / (norm[:, None] ** 2 + norm[None, :] ** 2)
    pairs = [rows[i] @ rows[j] < 0 for i in range(num_tasks) for j in range(i)]
    bound = tolerance(dtype)
    np.testing.assert_allclose(mtl.cosine(gram).numpy(), rows @ rows.T / np.outer(norm, norm), rtol=0, atol=bound)
    np.testing.assert_allclose(mtl.magnitude_similarity(gram).numpy(), similarity, rtol=0, atol=bound)
    np.testing.assert_allclose(float(mtl.conflict_rate(gram)), np.mean(pairs) if pairs else 0.0, rtol=0, atol=bound)
    # lambda_min is known to K eps lambda_max, and sigma is its square root.
    expected = np.linalg.cond(rows)
    relative = num_tasks * torch.finfo(dtype).eps * expected**2
    assert float(mtl.condition_number(gram)) == pytest.approx(expected, rel=relative + bound)
    for function in DIAGNOSTICS.values():
        assert function(gram).dtype == dtype


@pytest.mark.parametrize("power", [-600, -300, 0, 300, 600])
def test_any_unit_of_the_gradients(backend, power):
    gram = gram_of(hard_gradients("common", 5, 8, seed=0))
    for function in DIAGNOSTICS.values():
        torch.testing.assert_close(function(gram * 2.0**power), function(gram), rtol=1e-13, atol=0)


def test_norms_that_differ_by_many_orders(backend):
    rows = hard_gradients("scales", 6, 9, seed=0)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(mtl.cosine(gram_of(rows)).numpy(), (rows / norm) @ (rows / norm).T, rtol=0, atol=1e-14)


def test_zero_gradients(backend):
    gram = torch.tensor([[4.0, 0, -2], [0, 0, 0], [-2, 0, 9]], dtype=torch.float64)
    third = -1 / 3
    assert mtl.cosine(gram).tolist() == [[1, 0, pytest.approx(third / 1)], [0, 0, 0], [pytest.approx(third), 0, 1]]
    similarity = pytest.approx(12 / 13)
    assert mtl.magnitude_similarity(gram).tolist() == [[1, 0, similarity], [0, 0, 0], [similarity, 0, 1]]
    assert float(mtl.conflict_rate(gram)) == pytest.approx(1 / 3)
    assert float(mtl.condition_number(gram)) == math.inf
    assert float(mtl.condition_number(gram * 0)) == math.inf
    assert (mtl.cosine(gram * 0) == 0).all()
    assert (mtl.magnitude_similarity(gram * 0) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stays_in_its_row_and_column(backend, bad):
    gram = gram_of(hard_gradients("random", 4, 6, seed=1))
    rows = (0, 1, 3)
    expected = {name: DIAGNOSTICS[name](gram) for name in ("cosine", "magnitude_similarity")}
    gram[2] = gram[:, 2] = bad
    for name, value in expected.items():
        actual = DIAGNOSTICS[name](gram)
        assert torch.equal(actual[rows, :][:, rows], value[rows, :][:, rows])
    assert mtl.cosine(gram)[2].isnan().all()
    assert float(mtl.condition_number(gram)) != float(mtl.condition_number(gram))
    conflicts = (expected["cosine"][rows, :][:, rows] < 0).triu(1).sum()
    assert float(mtl.conflict_rate(gram)) == pytest.approx(int(conflicts) / 6)


def test_parallel_gradients(backend):
    gram = torch.full((3, 3), 0.1, dtype=torch.float64)
    gram[0] *= -1
    gram[:, 0] *= -1
    assert mtl.cosine(gram).abs().max() == 1
    assert float(mtl.condition_number(gram)) == math.inf
    assert float(mtl.conflict_rate(gram)) == pytest.approx(2 / 3)


@pytest.mark.parametrize("exponent", [0, 2, 4, 6, 7])
def test_condition_number_of_known_singular_values(backend, exponent):
    """lambda_min right to K eps lambda_max: the square of the condition number times K eps is the relative error."""
    rng = np.random.default_rng(exponent)
    left, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    right, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    rows = left @ np.diag(np.logspace(0, -exponent, 20)) @ right
    gram = gram_of(rows)
    expected = 10.0**exponent
    error = 20 * np.finfo(float).eps * expected**2
    assert float(mtl.condition_number(gram)) == pytest.approx(expected, rel=error + 1e-12)


@pytest.mark.parametrize("name", DIAGNOSTICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batches_and_strides(backend, name, dtype):
    grams = torch.stack([gram_of(hard_gradients("common", 5, 7, seed)) for seed in range(6)]).to(dtype).view(2, 3, 5, 5)
    function = DIAGNOSTICS[name]
    together = function(grams)

    def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
        # LAPACK may round a batch otherwise than a matrix: lambda_min by K eps lambda_max, which is K eps times the square of
        # the condition number.
        magnified = 5 * torch.finfo(dtype).eps * expected.square() if name == "condition_number" else 0.0
        error = torch.where(actual == expected, 0.0, (actual - expected).abs())  # inf is inf
        assert (error <= (tolerance(dtype) + magnified) * expected.abs()).all()

    for i in range(2):
        for j in range(3):
            close(together[i, j], function(grams[i, j]))
    wide = torch.full((3, 2, 5, 11), math.nan, dtype=dtype)
    view = wide.transpose(0, 1)[..., 1::2]
    view.copy_(grams)
    close(function(view), together)
    close(function(grams.mT), together)
    expanded = grams[0, 0].expand(4, 5, 5)
    close(function(expanded)[3], together[0, 0])
    assert function(grams[:0]).shape == together[:0].shape


def test_bad_input():
    for function in DIAGNOSTICS.values():
        with pytest.raises(ValueError, match=r"gram has shape \(2, 3\)"):
            function(torch.zeros(2, 3))
        with pytest.raises(ValueError, match=r"gram is torch\.int64"):
            function(torch.zeros(3, 3, dtype=torch.int64))

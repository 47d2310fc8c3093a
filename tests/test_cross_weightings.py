"""Weightings of two batches against TorchJD, published figures and their definitions."""

import io

import pytest
import torch
from helpers import random_gradients
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.weightings.cross import CROSS

G = torch.tensor([[18.0, -22.0], [-22.0, 38.0]], dtype=torch.float64)


def cross(num_tasks: int, seed: int) -> Tensor:
    rows = torch.randn(2, num_tasks, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows[0] @ (rows[0] + 0.3 * rows[1]).T


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (mtl.MoDo(), [(1, 0), (0, 1), (1, 0)]),
        (mtl.MoDo(gamma=0.001), [(0.505, 0.495), (0.5097495, 0.4902505), (0.51426105, 0.48573895)]),
        (mtl.SDMGrad(), [(0.1153846154, 0.8846153846)]),
        (mtl.SDMGrad(lr=5.0), [(0.1153846154, 0.8846153846)]),
    ],
)
def test_published_figures(method, expected):
    for weights in expected:
        torch.testing.assert_close(method(G), torch.tensor(weights, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("modo", {}),
        ("modo", {"gamma": 0.01, "rho": 0.5}),
        ("sdmgrad", {}),
        ("sdmgrad", {"lr": 0.3, "n_iter": 7, "momentum": 0.9}),
    ],
)
def test_agrees_with_torchjd(name, options, num_tasks):
    torchjd = pytest.importorskip("torchjd.aggregation")
    own = mtl.get_weighting(name, **options)
    theirs = {"modo": "MoDoWeighting", "sdmgrad": "SDMGradWeighting"}[name]
    if not hasattr(torchjd, theirs):
        pytest.skip(f"this torchjd has no {theirs}")
    other = getattr(torchjd, theirs)(**options)
    for seed in range(5):
        matrix = cross(num_tasks, seed)
        torch.testing.assert_close(own(matrix), other(matrix), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CROSS)
def test_a_cross_gram_is_not_made_symmetric(name):
    options = {"gamma": 0.01} if name == "modo" else {"lr": 0.1, "n_iter": 2}
    matrix = cross(3, 0)
    assert not torch.equal(mtl.get_weighting(name, **options)(matrix), mtl.get_weighting(name, **options)(matrix.T))


@pytest.mark.parametrize("name", CROSS)
def test_batches_state_and_absent_tasks(name):
    options = {"gamma": 0.01} if name == "modo" else {"lr": 0.1}
    method, alone = mtl.get_weighting(name, **options), mtl.get_weighting(name, **options)
    matrices = torch.stack([cross(3, seed) for seed in range(4)])
    for a, matrix in zip(method(matrices), matrices, strict=True):
        torch.testing.assert_close(a, mtl.get_weighting(name, **options)(matrix), rtol=1e-12, atol=1e-14)
    method.reset()
    method(matrices[0])
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    alone.load_state_dict(torch.load(file, weights_only=True))
    before = [value.clone() for value in method.state_dict().values()]
    assert torch.equal(method(matrices[1]), alone(matrices[1]))
    alone.load_state_dict(dict(zip(alone.state_dict(), before, strict=True)))
    assert alone(torch.full_like(G, torch.nan).new_full((3, 3), torch.nan)).isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), before, strict=True))
    weights = alone(matrices[2], active=torch.tensor([True, False, True]))
    assert weights[1] == 0
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    (state,) = alone.state_dict().values()
    assert state[1] == before[0][1]
    torch.testing.assert_close(state.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("per", ["model", "tensor", "channel", {"a": [0], "b": [2]}])
@pytest.mark.parametrize("name", CROSS)
def test_aggregate_is_the_weighted_mean_of_both_batches(backend, name, per):
    options = {"gamma": 0.001} if name == "modo" else {}
    shapes = [(5, 6), (7,), (3, 2)]
    grads, other = random_gradients(3, shapes), random_gradients(3, shapes, seed=1)
    update = mtl.aggregate(grads, mtl.get_weighting(name, **options), per=per, other=other)
    if per != "model":
        assert [t.shape for t in update] == [t.shape for t in grads[0]]
        return
    weights = mtl.get_weighting(name, **options)(mtl.gram(grads, other))
    for n, value in enumerate(update):
        expected = sum(w * (g[n] + h[n]).double() / 2 for w, g, h in zip(weights, grads, other, strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CROSS)
def test_a_single_batch_is_an_error(name):
    grads = random_gradients(3, [(4,)])
    for method in (mtl.get_weighting(name), mtl.CRMOGM(name)):
        with pytest.raises(ValueError, match="other="):
            mtl.aggregate(grads, method)
    with pytest.raises(ValueError, match="other is given"):
        mtl.aggregate(grads, "mgda", other=grads)
    with pytest.raises(ValueError, match="other is given"):
        mtl.aggregate(grads, mtl.MoCo(), other=grads, losses=torch.ones(3))
    with pytest.raises(ValueError, match="other lists 2 tasks"):
        mtl.aggregate(grads, name, other=grads[:2])
    with pytest.raises(ValueError, match=r"other\[0\]"):
        mtl.aggregate(grads, name, other=[[t, t] for (t,) in grads])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("modo", {"gamma": 0.0}),
        ("modo", {"rho": -1.0}),
        ("sdmgrad", {"lr": 0.0}),
        ("sdmgrad", {"momentum": 1.0}),
        ("sdmgrad", {"n_iter": 0}),
        ("sdmgrad", {"lambda_": -0.1}),
        ("sdmgrad", {"preference": [0.0, 0.0]}),
    ],
)
def test_bad_options(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        mtl.get_weighting(name, **options)

"""GradVac: Algorithm 1 on the gradients themselves, golden numbers, TorchJD, state, the CUDA kernel."""

import copy

import numpy as np
import pytest
import torch
from device import requires_nvcc
from hard_grams import KINDS, gram_of, hard_gradients, same_bits
from simulated import simulated_cuda
from torch import Tensor

import mtlkernels as mtl
from mtlkernels._library import REFERENCES
from mtlkernels.random import random_orders

OPS = torch.ops.mtlkernels
GOLDEN = np.array([[-4.0, 1, 1], [6, 1, 1]])
SEED = torch.tensor([6])


def vaccinated(rows: np.ndarray, phi: np.ndarray, orders: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """The update and the new targets."""
    rows, result, phi = rows.astype(np.longdouble), rows.astype(np.longdouble), phi.astype(np.longdouble)
    for i, order in enumerate(orders):
        for j in order:
            lengths = np.linalg.norm(result[i]), np.linalg.norm(rows[j])
            if j == i or 0 in lengths:
                continue
            cosine = result[i] @ rows[j] / (lengths[0] * lengths[1])
            if cosine < phi[i, j]:
                sine, target = np.sqrt(max(1 - cosine**2, 0)), np.sqrt(1 - phi[i, j] ** 2)
                result[i] += lengths[0] * (phi[i, j] * sine - cosine * target) / (lengths[1] * target) * rows[j]
            phi[i, j] = (1 - beta) * phi[i, j] + beta * cosine
    return result.sum(0).astype(float), phi.astype(float)


@pytest.mark.parametrize("beta", [0.01, 0.5, 0.9])
@pytest.mark.parametrize(("num_tasks", "numel"), [(1, 2), (2, 3), (3, 8), (8, 20), (16, 40), (64, 100)], ids=str)
def test_algorithm_1_on_the_gradients(backend, num_tasks, numel, beta):
    rng = np.random.default_rng(num_tasks)
    weighting = mtl.GradVac(beta)
    phi = np.zeros((num_tasks, num_tasks))
    for seed in range(3):
        rows = rng.standard_normal((num_tasks, numel)) + rng.standard_normal(numel) * rng.choice([0, 1])
        rows[num_tasks // 2] *= num_tasks < 8 or seed != 1
        orders = random_orders(torch.tensor([seed]), 1, num_tasks)[0]
        expected, phi = vaccinated(rows, phi, orders.numpy(), beta)
        weights = weighting(gram_of(rows), seed=torch.tensor([seed]))
        np.testing.assert_allclose(weights.numpy() @ rows, expected, rtol=0, atol=1e-9 * np.abs(rows).sum())
        np.testing.assert_allclose(weighting.phi.numpy(), phi, rtol=0, atol=1e-9)


def test_golden_numbers(backend):
    weighting = mtl.GradVac(eps=1e-8)
    expected = [(0.584795, 3.801170, -0.420596), (1.006540, 3.264403, -0.630893), (1.324535, 2.859683, -0.736042)]
    for first, second, phi in expected:
        update = weighting(gram_of(GOLDEN), seed=SEED).numpy() @ GOLDEN
        np.testing.assert_allclose([*update, float(weighting.phi[0, 1])], [first, second, second, phi], rtol=0, atol=1e-6)


def test_two_tasks_as_torchjd(backend):
    torchjd = pytest.importorskip("torchjd.aggregation")
    theirs, ours = torchjd.GradVacWeighting(), mtl.GradVac(eps=1e-8)
    for seed in range(20):
        gram = gram_of(hard_gradients("common", 2, 5, seed))
        torch.testing.assert_close(ours(gram), theirs(gram), rtol=1e-6, atol=0)


def test_the_first_call_is_pcgrad(backend):
    gram = gram_of(hard_gradients("random", 7, 6, seed=0))
    torch.testing.assert_close(mtl.GradVac()(gram, seed=SEED), mtl.PCGrad()(gram, seed=SEED), rtol=1e-11, atol=1e-13)
    order = torch.tensor([2, 0, 5, 1, 3, 6, 4])
    torch.testing.assert_close(mtl.GradVac(order=order)(gram), mtl.PCGrad(order)(gram), rtol=1e-11, atol=1e-13)


def hard(num_tasks: int) -> Tensor:
    return torch.stack([gram_of(hard_gradients(kind, num_tasks, num_tasks + 2, seed)) for seed, kind in enumerate(KINDS)])


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 16])
def test_hard_grams_stay_finite(backend, num_tasks):
    weighting = mtl.GradVac()
    for seed in range(4):
        assert weighting(hard(num_tasks), seed=torch.tensor([seed])).isfinite().all()
        assert (weighting.phi.abs() <= 1).all()


@pytest.mark.parametrize("kind", ["random", "common", "scales", "zero_task", "tiny"])
def test_kernel_agrees_with_reference(cpu_library, kind):
    gram = gram_of(hard_gradients(kind, 6, 9, seed=1)).expand(3, 6, 6)
    phi = torch.rand(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    order = torch.randint(0, 6, (3, 6, 9), generator=torch.Generator().manual_seed(1))
    for orders, seed in ((order, None), (None, SEED)):
        for actual, expected in zip(
            OPS.gradvac_weights(gram, phi, orders, seed, 0.3, 0.0),
            REFERENCES["gradvac_weights"](gram, phi, orders, seed, 0.3, 0.0),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_masks_and_what_is_not_finite_leave_the_state(backend):
    gram = hard(5)
    weighting = mtl.GradVac()
    weighting(gram, seed=SEED)
    before, other = weighting.phi.clone(), copy.deepcopy(weighting)
    active = torch.tensor([True, False, True, True, False])
    pair = active.unsqueeze(-1) & active
    poisoned = torch.where(pair, gram, torch.nan)
    weights = weighting(poisoned, active=active, seed=SEED)
    assert weights.isfinite().all()
    assert (weights[:, ~active] == 0).all()
    assert torch.equal(weighting.phi[:, ~pair], before[:, ~pair])
    assert not torch.equal(weighting.phi, before)
    broken = gram.clone()
    broken[1, 2, 2] = torch.inf
    assert other(broken, seed=SEED)[1].isnan().all()
    assert torch.equal(other.phi[1], before[1])
    assert not torch.equal(other.phi[0], before[0])


def test_state_and_generator_resume_to_the_bit():
    grams = [gram_of(hard_gradients("random", 4, 3, seed)) for seed in range(6)]
    weighting = mtl.GradVac(generator=torch.Generator().manual_seed(1))
    for gram in grams[:3]:
        weighting(gram)
    fresh = mtl.GradVac(generator=torch.Generator())
    fresh.load_state_dict(weighting.state_dict())
    for gram in grams[3:]:
        assert torch.equal(fresh(gram), weighting(gram))
    weighting.reset()
    torch.testing.assert_close(weighting(grams[0], seed=SEED), mtl.PCGrad()(grams[0], seed=SEED), rtol=1e-11, atol=1e-13)
    with pytest.raises(ValueError, match=r"keeps phi of shape \(4, 4\)"):
        weighting(torch.eye(3))


def test_compiles_without_graph_breaks(backend):
    torch._dynamo.reset()
    weighting, eager = mtl.GradVac(order=torch.arange(3)), mtl.GradVac(order=torch.arange(3))
    grads = [[torch.randn(4, 3, generator=torch.Generator().manual_seed(k)), torch.ones(5) * k] for k in range(3)]
    compiled = torch.compile(mtl.aggregate, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(grads, weighting), mtl.aggregate(grads, eager), rtol=1e-12, atol=0)


def test_opcheck(backend):
    gram = hard(3)
    order = torch.arange(3).expand(gram.shape)
    for case in ((order, None), (None, SEED)):
        results = torch.library.opcheck(OPS.gradvac_weights.default, (gram, gram * 0, *case, 0.5, 0.0))
        assert set(results.values()) == {"SUCCESS"}


def test_bad_input(cpu_library):
    with pytest.raises(ValueError, match=r"beta is 1\.5"):
        mtl.GradVac(beta=1.5)
    with pytest.raises(ValueError, match="eps is -1"):
        mtl.GradVac(eps=-1)
    with pytest.raises(ValueError, match="both given"):
        mtl.GradVac(order=torch.arange(2), generator=torch.Generator())
    gram = torch.eye(3, dtype=torch.float64)
    for message, arguments in {
        "phi must be": (gram, gram[:2], None, SEED),
        "either order or seed": (gram, gram, None, None),
        "task indices": (gram, gram, torch.full((3, 2), 3), None),
        "seed must be": (gram, gram, None, torch.zeros(2, dtype=torch.int64)),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            OPS.gradvac_weights(*arguments, 0.5, 0.0)


@requires_nvcc
@pytest.mark.parametrize("num_tasks", [1, 3, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 17, 64))])
def test_the_cuda_kernel_gives_the_bits_of_the_host(cpu_library, num_tasks):
    gram = hard(num_tasks)
    gram = torch.cat([gram, gram[:1] * torch.nan])[:: 1 if num_tasks < 64 else 4]
    phi = torch.rand(gram.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    order = torch.randint(0, num_tasks, (*gram.shape[:-1], 5), generator=torch.Generator().manual_seed(1))
    for orders, seed in ((order, None), (None, SEED)):
        expected = OPS.gradvac_weights(gram, phi, orders, seed, 0.3, 0.0)
        with simulated_cuda() as device:
            actual = OPS.gradvac_weights(gram, phi, orders, seed, 0.3, 0.0)
        assert len(device.launches) == 1
        for a, b in zip(actual, expected, strict=True):
            assert same_bits(a, b)

"""Weightings with a memory of gradients, against NumPy transcriptions of their definitions and published figures."""

import copy
import io

import numpy as np
import pytest
import torch
from helpers import DTYPES, LAYOUTS, UNIT_ROUNDOFF, random_gradients, to_numpy
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.weightings.memory import MEMORY

J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
LOSSES = torch.tensor([1.0, 2.0], dtype=torch.float64)
SHAPES = [(5, 7), (), (3, 2, 3, 3), (1000,)]
METHODS = {
    "moco": {},
    "moco official": {"beta": 0.1, "gamma": 0.2, "normalize": "none", "simplex": "proj"},
    "moco rho": {"rho": 0.3, "gamma_sigma": 0.0, "beta_sigma": 0.1},
    "db_mtl": {},
    "db_mtl falling": {"beta": 0.5, "beta_sigma": 0.5},
    "db_mtl none": {"beta": 0.0},
    "excess_mtl": {},
    "excess_mtl libmtl": {"eta": 1e-2, "first_update": "none"},
    "excess_mtl warm": {"n_warmup": 2},
}


def make(name: str) -> mtl.MemoryWeighting:
    return mtl.get_weighting(name.split()[0], **METHODS[name])


def flat(rows) -> np.ndarray:
    return np.stack([np.concatenate([to_numpy(t).ravel() for t in row]) for row in rows])


def simplex(v: np.ndarray) -> np.ndarray:
    s = -np.sort(-v)
    sums = np.cumsum(s)
    r = np.nonzero(s * np.arange(1, len(v) + 1) > sums - 1)[0].max()
    return np.maximum(v - (sums[r] - 1) / (r + 1), 0)


class Moco:
    def __init__(self, beta=0.5, beta_sigma=0.5, gamma=0.1, gamma_sigma=0.5, rho=0.0, normalize="loss", simplex="softmax"):
        self.__dict__.update(locals())
        self.step, self.y = 0, 0.0

    def __call__(self, g: np.ndarray, losses: np.ndarray) -> np.ndarray:
        if self.step == 0:
            self.lam = np.full(len(g), 1 / len(g))
        self.step += 1
        beta, gamma = self.beta / self.step**self.beta_sigma, self.gamma / self.step**self.gamma_sigma
        h = g if self.normalize == "none" else losses[:, None] * g / (np.linalg.norm(g, axis=1, keepdims=True) + 1e-8)
        self.y = self.y - beta * (self.y - h)
        v = self.lam - gamma * (self.y @ self.y.T + self.rho * np.eye(len(g))) @ self.lam
        self.lam = np.exp(v) / np.exp(v).sum() if self.simplex == "softmax" else simplex(v)
        return self.lam @ self.y


class DbMtl:
    def __init__(self, beta=0.9, beta_sigma=0.0):
        self.beta, self.beta_sigma, self.step, self.y = beta, beta_sigma, 0, 0.0

    def __call__(self, g: np.ndarray, losses: np.ndarray) -> np.ndarray:
        self.step += 1
        h = g / (losses[:, None] + 1e-8)
        self.y = h + self.beta / self.step**self.beta_sigma * (self.y - h)
        norms = np.linalg.norm(self.y, axis=1)
        return (norms.max() / (norms + 1e-8)) @ self.y


class Excess:
    def __init__(self, eta=1.0, n_warmup=0, first_update="raw"):
        self.eta, self.n_warmup, self.first_update = eta, n_warmup, first_update
        self.step, self.sums, self.baseline = 0, 0.0, 0.0

    def __call__(self, g: np.ndarray, losses: np.ndarray) -> np.ndarray:
        if self.step == 0:
            self.w = np.full(len(g), 1 / len(g))
        self.sums = self.sums + g**2
        e = (g**2 / np.sqrt(self.sums + 1e-7)).sum(1)
        warm = self.step < self.n_warmup
        first = self.step == 0 and not self.n_warmup
        if warm or first:
            self.baseline = self.baseline + e / max(self.n_warmup, 1)
        self.step += 1
        if not (warm or (first and self.first_update == "none")):
            v = np.log(self.w) + self.eta * (e if first else e / (self.baseline + 1e-7))
            self.w = np.exp(v - v.max()) / np.exp(v - v.max()).sum()
        return self.w @ g


ORACLES = {"excess_mtl": Excess, "moco": Moco, "db_mtl": DbMtl}


def batch(seed: int, num_tasks: int = 3, dtype=torch.float32, shapes=SHAPES) -> tuple[list[list[Tensor]], Tensor]:
    losses = torch.rand(num_tasks, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    return random_gradients(num_tasks, shapes, dtype, seed), losses


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("moco", [(0.2374192175, 0.1396203527), (0.3080272687, 0.1885741428)]),
        ("moco official", [(0.09, 0.1), (0.1193892256, 0.1636396103)]),
        ("db_mtl", [(0.0129483169, 0.1688247139), (0.0246018056, 0.3207669605)]),
        ("db_mtl none", [(0.1294832097, 1.6882472016)]),
        ("excess_mtl", [(4.8079707842, 1)]),
        ("excess_mtl libmtl", [(1, 1)]),  # LibMTL's weights have sum K
    ],
)
def test_published_figures(backend, name, expected):
    method = make(name)
    atol = 1e-7 if name == "db_mtl none" else 1e-10  # that figure is without the 1e-8 beside losses and norms
    for first, others in expected:
        (update,) = mtl.aggregate(J, method, losses=LOSSES)
        torch.testing.assert_close(update, torch.tensor([first, others, others], dtype=torch.float64), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 11])
@pytest.mark.parametrize("name", METHODS)
def test_matches_the_definition(backend, name, num_tasks, dtype):
    method, oracle = make(name), ORACLES[name.split()[0]](**METHODS[name])
    for seed in range(4):
        grads, losses = batch(seed, num_tasks, dtype)
        before = [[t.clone() for t in row] for row in grads]
        expected = oracle(flat(grads), losses.numpy())
        update = mtl.aggregate(grads, method, losses=losses)
        assert [t.dtype for t in update] == [dtype] * len(SHAPES)
        actual = np.concatenate([to_numpy(t).ravel() for t in update])
        # Memories of 16-bit gradients are float32; the update is rounded once to the gradients' dtype.
        size = np.abs(expected).max()
        assert np.abs(actual - expected).max() <= (1e-6 + UNIT_ROUNDOFF[dtype]) * size
        assert all(torch.equal(a, b) for one, two in zip(grads, before, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_state_resumes_to_the_bit_in_a_fresh_object(backend, name):
    method, torn = make(name), make(name)

    def calls(own: mtl.MemoryWeighting, first: int) -> list[Tensor]:
        layout = LAYOUTS["channels_last"]
        out = []
        for seed in range(first, first + 3):
            grads, losses = batch(seed)
            grads = [[layout(t) if t.dim() == 4 else t for t in row] for row in grads]
            out += mtl.aggregate(grads, own, losses=losses)
        return out

    expected = calls(method, 0) + calls(method, 3)
    before = calls(torn, 0)
    file = io.BytesIO()
    torch.save(torn.state_dict(), file)
    file.seek(0)
    fresh = make(name)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(before + calls(fresh, 3), expected, strict=True))
    if name != "db_mtl none":
        assert not all(torch.equal(a, b) for a, b in zip(calls(make(name), 3), expected[len(before) :], strict=True))
    method.reset()
    assert all(torch.equal(a, b) for a, b in zip(calls(method, 0), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(calls(copy.deepcopy(torn), 3), expected[len(before) :], strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fault", ["nan", "inf", "loss"])
def test_what_is_not_finite_changes_nothing(backend, name, fault):
    method, same = make(name), make(name)
    for own in (method, same):
        grads, losses = batch(0)
        mtl.aggregate(grads, own, losses=losses)
    grads, losses = batch(1)
    if fault == "loss":
        if not method.reads_losses:
            return
        losses[1] = torch.nan
    else:
        grads[1][0][0, 0] = float(fault)
    assert all(t.isnan().all() for t in mtl.aggregate(grads, method, losses=losses))
    for (key, a), b in zip(method.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
@pytest.mark.parametrize("n_warmup", [0, 2])
def test_excess_mtl_agrees_with_torchjd(backend, num_tasks, n_warmup):
    torchjd = pytest.importorskip("torchjd.aggregation")
    if not hasattr(torchjd, "ExcessMTL"):
        pytest.skip("this torchjd has no ExcessMTL")
    own, other = mtl.ExcessMTL(0.3, n_warmup), torchjd.ExcessMTL(0.3, n_warmup)
    for seed in range(5):
        matrix = torch.randn(num_tasks, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        (update,) = mtl.aggregate(matrix, own)
        torch.testing.assert_close(update, other(matrix), rtol=1e-9, atol=1e-12)


def test_a_loss_that_is_not_positive_has_no_logarithm(backend):
    method = mtl.DBMTL()
    (update,) = mtl.aggregate(J, method, losses=torch.tensor([1.0, 0.0]))
    assert update.isnan().all()
    assert not method.state_dict()["memory.0"].any()


@pytest.mark.parametrize("name", METHODS)
def test_an_absent_task_changes_nothing_of_its_own(backend, name):
    """The others' update is that of a method that knows them alone, and afterwards the absent task goes on where it was."""
    method, others = make(name), make(name)
    first, losses = batch(0, 3)
    if not name.startswith("db_mtl"):  # equal shares, so that the others' are those of a method of two tasks
        others.load_state_dict(make(name).state_dict())
    else:
        mtl.aggregate(first, method, losses=losses)
        mtl.aggregate(first[:2], others, losses=losses[:2])
    kept = {n: m[2].clone() for n, m in enumerate(method._memory) if m is not None}
    grads, losses = batch(1, 3)
    rows = [*grads[:2], [None] * len(SHAPES)]
    memory = method.memory_of(rows)
    losses[2] = torch.nan
    excess = method.measure(rows, memory, torch.ones(3, dtype=torch.float64))
    update = method.update(method.gram(rows, memory), active=torch.tensor([True, True, False]), losses=losses, excess=excess)
    actual = method.combine(update, rows, memory)
    expected = mtl.aggregate(grads[:2], others, losses=losses[:2])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert update.weights[2] == 0
    assert all(torch.equal(method._memory[n][2], value) for n, value in kept.items())
    assert method.steps[2] == (1 if kept else 0)


@pytest.mark.parametrize("name", METHODS)
def test_none_counts_as_zero_where_some_task_has_a_gradient(backend, name):
    method, zeros = make(name), make(name)
    for seed in range(3):
        grads, losses = batch(seed)
        grads[1][0] = None
        for row in grads:
            row[3] = None
        filled = [[torch.zeros(SHAPES[n]) if t is None else t for n, t in enumerate(row)] for row in grads]
        actual = mtl.aggregate(grads, method, losses=losses)
        expected = mtl.aggregate(filled, zeros, losses=losses)
        assert actual[3] is None
        # Without a row the Gram adds its float32 sums in another order, so that weights differ in their last bits; where terms
        # cancel, by those of the terms.
        largest = max(float(b.abs().max()) for b in expected[:3])
        for a, b in zip(actual[:3], expected[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=2**-22 * largest)


def test_out_may_be_the_first_gradient(backend):
    grads, losses = batch(0)
    expected = mtl.aggregate(grads, mtl.MoCo(), losses=losses)
    out = mtl.aggregate(grads, mtl.MoCo(), list(grads[0]), losses=losses)
    assert all(a is b for a, b in zip(out, grads[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("name", MEMORY)
def test_bad_use(backend, name):
    method = mtl.get_weighting(name)
    with pytest.raises(ValueError, match="aggregate"):
        method(torch.eye(2, dtype=torch.float64))
    if method.reads_losses:
        with pytest.raises(ValueError, match="losses"):
            mtl.aggregate(J, method)
    with pytest.raises(ValueError, match="losses has shape"):
        mtl.aggregate(J, method, losses=torch.ones(3))
    with pytest.raises(ValueError, match="model"):
        mtl.aggregate(J, method, per="tensor", losses=LOSSES)
    mtl.aggregate(J, method, losses=LOSSES)
    for rows, losses in ((torch.ones(3, 3), torch.ones(3)), (torch.ones(2, 4), LOSSES)):
        with pytest.raises(ValueError, match="reset"):
            mtl.aggregate(rows.double(), method, losses=losses)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("moco", {"beta": 0.0}),
        ("moco", {"gamma": -1.0}),
        ("moco", {"rho": -1.0}),
        ("moco", {"simplex": "l2"}),
        ("moco", {"normalize": "l2"}),
        ("excess_mtl", {"eta": 0.0}),
        ("excess_mtl", {"n_warmup": -1}),
        ("excess_mtl", {"first_update": "libmtl"}),
        ("db_mtl", {"beta": 1.5}),
        ("db_mtl", {"beta_sigma": -0.5}),
    ],
)
def test_bad_options(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        mtl.get_weighting(name, **options)

"""Gradient dropout against its definition, differentiated, in an inner loop, and bit for bit across backends."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import (
    CHUNK,
    DTYPES,
    EXPANDED,
    LAYOUT_SHAPES,
    LAYOUTS,
    UNIT_ROUNDOFF,
    assert_unchanged,
    random_gradients,
    snapshot,
    to_numpy,
)
from scipy import stats
from test_graddrop import EDGES, SEED, SHAPES, assert_same_bits
from torch import Tensor

import mtlkernels as mtl
from mtlkernels._library import REFERENCES
from mtlkernels.dispatch import CAPABILITIES, cpu_capability
from mtlkernels.gradient_dropout import MODES, noise
from mtlkernels.random import element_normals, element_words

OPS = torch.ops.mtlkernels
modes = pytest.mark.parametrize("mode", MODES)


def gradients(shapes: list, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    return random_gradients(1, shapes, dtype, seed)[0]


def rate(p: float) -> Tensor:
    return torch.tensor(p, dtype=torch.float64)


def expected(grads: list, p: float, mode: str, seed: Tensor = SEED) -> list[Tensor | None]:
    """By the reference op, whatever the backend."""
    kept = [n for n, grad in enumerate(grads) if grad is not None]
    values = REFERENCES["gradient_dropout"]([grads[n] for n in kept], rate(p), mode, seed, kept)
    result: list[Tensor | None] = [None] * len(grads)
    for n, value in zip(kept, values, strict=True):
        result[n] = value
    return result


# --- the definition -----------------------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_definition(backend, dtype, p, mode):
    grads = gradients(SHAPES, dtype)
    before = snapshot([grads])
    actual = mtl.gradient_dropout(grads, p, mode, SEED)
    assert_unchanged(before)
    unit, wide = UNIT_ROUNDOFF[dtype], UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    for n, (grad, result) in enumerate(zip(grads, actual, strict=True)):
        if mode == "gaussian":
            factor = 1 + math.sqrt(p / (1 - p)) * element_normals(SEED, n, grad.numel()).double().numpy()
            size = 1 + math.sqrt(p / (1 - p)) * 6.7
        else:
            factor = (element_words(SEED, n, grad.numel()).double().numpy() / 2.0**32 >= p) / (1 - p)
            size = 1 / (1 - p)
        exact = to_numpy(grad) * factor.reshape(grad.shape)
        # Two roundings of 1 - p and the quotient, one of the root, product and sum; one of g n, one to the dtype.
        bound = 6 * wide * size * np.abs(to_numpy(grad)) + unit * np.abs(exact) + torch.finfo(dtype).tiny * 2 * unit
        assert (np.abs(to_numpy(result) - exact) <= bound).all()
        assert (result.dtype, result.shape, result.stride()) == (dtype, grad.shape, torch.empty_like(grad).stride())


@modes
@pytest.mark.parametrize("p", [0.1, 0.4])
def test_noise_has_mean_1_and_the_variance_that_p_gives(backend, p, mode):
    size = 1_000_000
    (drawn,) = mtl.gradient_dropout([torch.ones(size)], p, mode, torch.tensor([2]))
    values, variance = drawn.double().numpy(), p / (1 - p)
    assert abs(values.mean() - 1) < 4 * math.sqrt(variance / size)
    fourth = 3 * variance**2 if mode == "gaussian" else variance**2 * (1 / (p * (1 - p)) - 3)
    assert abs(values.var() - variance) < 4 * math.sqrt((fourth - variance**2) / size)
    if mode == "gaussian":
        assert stats.kstest(values, "norm", (1, math.sqrt(variance))).pvalue > 0.01
    else:
        assert set(values.tolist()) == {0.0, float(np.float32(1) / np.float32(1 - p))}
        assert stats.binomtest(int((values == 0).sum()), size, p).pvalue > 0.01


@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rate_of_0_gives_the_gradients_back(backend, dtype, mode):
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, torch.finfo(dtype).tiny / 2, torch.finfo(dtype).max], dtype=dtype)
    grads = [*gradients([(2500,), (33, 5)], dtype), special]
    for p in (0, 0.0, rate(0.0), torch.zeros(1, dtype=torch.bfloat16)):
        result = mtl.gradient_dropout(grads, p, mode, SEED)
        for a, b in zip(result, grads, strict=True):
            assert a.view(torch.int16).equal(b.view(torch.int16))
    assert mtl.gradient_dropout([torch.full((3,), math.nan)], 0, mode, SEED)[0].isnan().all()


def test_extremes_of_the_rate(backend):
    """The smallest that drops anything is 2^-32; just below 1 nothing overflows."""
    grads = [torch.ones(100_000)]
    assert mtl.gradient_dropout(grads, 1e-12, "bernoulli", SEED)[0].equal(grads[0])
    for p in (1 - 2.0**-53, 1 - 1e-9):
        assert mtl.gradient_dropout(grads, p, "gaussian", SEED)[0].isfinite().all()
        (dropped,) = mtl.gradient_dropout(grads, p, "bernoulli", SEED)
        assert set(dropped.tolist()) <= {0.0, float(1 / torch.tensor(1 - p))}
        assert (dropped == 0).double().mean() > 0.999


def test_signs_of_zeros_and_values_that_are_not_finite(backend):
    """What is dropped is multiplied by 0, as the definition has it."""
    grads = [torch.tensor([-1.0, 1.0, math.inf, math.nan]).repeat(50)]
    for result in (mtl.gradient_dropout(grads, 0.5, "bernoulli", SEED)[0], expected(grads, 0.5, "bernoulli")[0]):
        rows = result.view(50, 4).T
        assert set(rows[0].tolist()) == {-2.0, -0.0}
        assert rows[0].signbit().all()
        assert not rows[1].signbit().any()
        assert (rows[2].isnan() | rows[2].isposinf()).all()
        assert rows[2].isnan().any()
        assert rows[3].isnan().all()


# --- bits ---------------------------------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("numel", EDGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_vectors_blocks_and_chunks(backend, dtype, numel, mode):
    grads = gradients([(numel,), (3,), (numel,)], dtype)
    assert_same_bits(mtl.gradient_dropout(grads, 0.3, mode, SEED), expected(grads, 0.3, mode))


@modes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_change_no_bit(backend, dtype, layout, mode):
    grads = [LAYOUTS[layout](g) for g in gradients(LAYOUT_SHAPES, dtype)]
    actual = mtl.gradient_dropout(grads, 0.2, mode, SEED)
    assert_same_bits(actual, expected([g.contiguous() for g in grads], 0.2, mode))
    assert all(a.stride() == torch.empty_like(g).stride() for a, g in zip(actual, grads, strict=True))


@modes
def test_random_numbers_do_not_depend_on_other_tensors(backend, mode):
    grads = gradients([(40,), (5000,), (33, 5)])
    whole = mtl.gradient_dropout(grads, 0.3, mode, SEED)
    alone = mtl.gradient_dropout([None, *grads[1:]], 0.3, mode, SEED)
    assert alone[0] is None
    assert_same_bits(alone[1:], whole[1:])
    assert mtl.gradient_dropout([None, grads[1][:1003]], 0.3, mode, SEED)[1].equal(whole[1][:1003])
    assert not mtl.gradient_dropout(grads, 0.3, mode, SEED + 1)[1].equal(whole[1])
    assert not mtl.gradient_dropout(grads[1:], 0.3, mode, SEED)[0].equal(whole[1])
    assert not mtl.gradient_dropout(grads, 0.31, mode, SEED)[1].equal(whole[1])


@modes
def test_a_rate_may_be_a_tensor(backend, mode):
    grads = gradients([(40,), (3, 3)])
    wanted = mtl.gradient_dropout(grads, 0.25, mode, SEED)
    for p in (rate(0.25), torch.tensor([[0.25]]), torch.tensor(0.25, dtype=torch.float16)):
        assert_same_bits(mtl.gradient_dropout(grads, p, mode, SEED), wanted)


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_every_instruction_set_gives_the_same_bits(cpu_library, capability, tmp_path):
    if CAPABILITIES.index(capability) > CAPABILITIES.index(cpu_capability()):
        pytest.skip(f"this processor has no {capability}")
    lists = {dtype: gradients([(70_001,), (33, 5), (3,)], dtype) for dtype in DTYPES}
    torch.save(lists, tmp_path / "grads.pt")
    code = (
        "import sys, torch, mtlkernels as mtl\n"
        f"lists, seed = torch.load(sys.argv[1]), torch.tensor([{SEED.item()}])\n"
        f"results = [mtl.gradient_dropout(g, 0.3, mode, seed) for g in lists.values() for mode in {MODES}]\n"
        "torch.save(results, sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "grads.pt", tmp_path / "out.pt"],
        env={**os.environ, "MTLKERNELS_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    results = iter(torch.load(tmp_path / "out.pt"))
    for grads in lists.values():
        for mode in MODES:
            assert_same_bits(next(results), expected(grads, 0.3, mode))


@modes
def test_threads_change_no_bit(cpu_library, mode):
    grads = gradients([(3 * CHUNK + 5,), (100, 33), (CHUNK,)])
    one = mtl.gradient_dropout(grads, 0.3, mode, SEED)
    try:
        torch.set_num_threads(2)
        two = mtl.gradient_dropout(grads, 0.3, mode, SEED)
    finally:
        torch.set_num_threads(1)
    assert_same_bits(one, two)
    assert_same_bits(one, expected(grads, 0.3, mode))


def test_results_past_the_caches(cpu_library):
    grads = gradients([(2**21 + 77,), (5,)])  # 8 MiB are stored past them
    assert_same_bits(mtl.gradient_dropout(grads, 0.3, "gaussian", SEED), expected(grads, 0.3, "gaussian"))


# --- into buffers -------------------------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_buffers_and_in_place(backend, dtype, mode):
    grads = gradients([*SHAPES, (CHUNK + 1,)], dtype)
    wanted = expected(grads, 0.4, mode)
    out = [torch.full_like(g, math.nan) for g in grads]
    before = snapshot([grads])
    returned = mtl.gradient_dropout(grads, 0.4, mode, SEED, out=out)
    assert all(a is b for a, b in zip(returned, out, strict=True))
    assert_same_bits(out, wanted)
    assert_unchanged(before)
    versions = [g._version for g in grads]
    mtl.gradient_dropout(grads, 0.4, mode, SEED, out=grads)
    assert_same_bits(grads, wanted)
    assert all(g._version > version for g, version in zip(grads, versions, strict=True))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in EXPANDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_buffers_of_any_layout(backend, dtype, layout):
    grads = gradients(LAYOUT_SHAPES, dtype)
    wanted = expected(grads, 0.4, "gaussian")
    out = [LAYOUTS[layout](torch.zeros_like(g)) for g in grads]
    mtl.gradient_dropout(grads, 0.4, "gaussian", SEED, out=out)
    assert_same_bits(out, wanted)
    own = [LAYOUTS[layout](g) for g in grads]
    wanted = expected([g.contiguous() for g in own], 0.4, "gaussian")
    mtl.gradient_dropout(own, 0.4, "gaussian", SEED, out=own)
    assert_same_bits(own, wanted)


@pytest.mark.parametrize("offset", [1, 64, -7])
def test_buffer_that_overlaps_its_gradients(backend, offset):
    (flat,) = gradients([(9000,)])
    grads = [flat[100:4100], flat[4500:8500]]
    wanted = expected(grads, 0.4, "gaussian")
    out = [flat[4500 + offset : 8500 + offset], torch.zeros(4000)]
    assert_same_bits(mtl.gradient_dropout(grads, 0.4, "gaussian", SEED, out=out), wanted)


def test_absent_gradients_and_nothing_to_do(backend):
    assert mtl.gradient_dropout([]) == []
    assert mtl.gradient_dropout((None, None), out=[None, None]) == [None, None]
    grads = [torch.ones(0, 3), None, torch.ones(())]
    result = mtl.gradient_dropout(grads, 0.1, "gaussian", SEED)
    assert_same_bits(result, expected(grads, 0.1, "gaussian"))
    mixed = [g.to(dtype) for g, dtype in zip(gradients([(40,), (30,), (20,), (10,)]), DTYPES, strict=True)]
    assert_same_bits(mtl.gradient_dropout(mixed, 0.1, "gaussian", SEED), expected(mixed, 0.1, "gaussian"))


# --- derivatives --------------------------------------------------------------------------------------------------------


@modes
def test_derivatives_of_first_and_second_order(backend, mode):
    leaves = [g.requires_grad_() for g in gradients([(3,), (2, 2), ()], torch.float64)]

    def function(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t in mtl.gradient_dropout([a, None, b, c], 0.4, mode, SEED) if t is not None)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(lambda a: function(a, leaves[1].detach(), a.sum())[0].sin(), leaves[:1])


@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_derivative_is_the_noise(backend, dtype, mode):
    """To the bit, in whatever layout gradients come in, and for those results alone that something depends on."""
    values = gradients([(6, 4, 5, 3), (37, 67), (5,)], dtype)
    grads = [g.to(memory_format=torch.channels_last) if g.dim() == 4 else g.requires_grad_() for g in values]
    leaves = [g.detach().requires_grad_() for g in grads]
    upstream = gradients([(6, 4, 5, 3), (67, 37)], dtype, seed=4)
    results = mtl.gradient_dropout([leaves[0], None, leaves[1], leaves[2]], 0.4, mode, SEED)
    torch.autograd.backward([results[0], results[2].T], upstream)
    assert leaves[0].grad.equal(expected([upstream[0]], 0.4, mode)[0])
    assert leaves[1].grad.equal(expected([None, None, upstream[1].T], 0.4, mode)[2])
    assert leaves[2].grad is None
    (drawn,) = torch.autograd.grad(mtl.gradient_dropout([leaves[2]], 0.4, mode, SEED)[0].sum(), leaves[2])
    wide = torch.promote_types(dtype, torch.float32)
    assert drawn.equal(noise(rate(0.4), mode, SEED, 0, 5, wide).to(dtype))


def test_nothing_is_stored_for_the_backward_pass(backend):
    sizes: list[int] = []
    leaf = torch.ones(10_000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        (result,) = mtl.gradient_dropout([leaf], 0.4, "gaussian", SEED)
    assert sizes == [1, 1]  # the rate and the seed
    assert result.requires_grad
    with torch.no_grad():
        assert not mtl.gradient_dropout([leaf], 0.4, "gaussian", SEED)[0].requires_grad
    assert not mtl.gradient_dropout([leaf.detach()], 0.4, "gaussian", SEED)[0].requires_grad


def test_functional_gradients(backend):
    (x,) = gradients([(7,)], torch.float64)

    def loss(x: Tensor) -> Tensor:
        return (mtl.gradient_dropout([x], 0.4, "gaussian", SEED)[0] ** 2).sum()

    factor = noise(rate(0.4), "gaussian", SEED, 0, 7, torch.float64)
    torch.testing.assert_close(torch.func.grad(loss)(x), 2 * factor**2 * x)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(loss))(x), (2 * factor**2).diag())


@modes
def test_vmap_gives_each_sample_what_it_gets_alone(backend, mode):
    """Samples with one seed share its noise, samples with seeds of their own do not; gradients of each sample, too."""
    stacked, other = gradients([(4, 6, 5), (5, 4)], torch.float64)
    seeds = torch.arange(4)[:, None]
    rates = torch.tensor([0.0, 0.1, 0.2, 0.3])

    def own(a: Tensor, b: Tensor, seed: Tensor = SEED, p: Tensor | float = 0.4) -> tuple[Tensor, ...]:
        return tuple(mtl.gradient_dropout([a, b], p, mode, seed))

    def slope(a: Tensor, seed: Tensor) -> Tensor:
        return torch.func.grad(lambda a: (own(a, other, seed)[0] ** 3).sum())(a)

    for actual, alone in (
        (torch.vmap(own, (0, 1))(stacked, other), [own(stacked[i], other[:, i]) for i in range(4)]),
        (torch.vmap(own, (0, None, 0))(stacked, other, seeds), [own(stacked[i], other, seeds[i]) for i in range(4)]),
        (
            torch.vmap(own, (None, 1, None, 0))(stacked[0], other, SEED, rates),
            [own(stacked[0], other[:, i], SEED, rates[i]) for i in range(4)],
        ),
        ((torch.vmap(slope)(stacked, seeds),), [(slope(stacked[i], seeds[i]),) for i in range(4)]),
    ):
        for part, parts in zip(actual, zip(*alone, strict=True), strict=True):
            assert part.equal(torch.stack(parts))


# --- an inner loop ------------------------------------------------------------------------------------------------------


def adapt(
    model: torch.nn.Module, params: dict, inputs: Tensor, targets: Tensor, seeds: list[Tensor], p: Tensor | float
) -> dict:
    """MAML's inner loop with gradient dropout (Tseng et al. 2020, Algorithm 1)."""
    for seed in seeds:
        loss = (torch.func.functional_call(model, params, (inputs,)) - targets).square().mean()
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        grads = mtl.gradient_dropout(grads, p, "gaussian", seed)
        params = {name: value - 0.05 * grad for (name, value), grad in zip(params.items(), grads, strict=True)}
    return params


def test_meta_gradients_of_an_inner_loop_are_those_with_the_noise_by_hand(backend):
    """Five inner steps in float64, and the outer gradient through all of them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    params = dict(model.named_parameters())
    inputs, targets = torch.randn(10, 3).double(), torch.randn(10, 1).double()
    seeds = [torch.tensor([n]) for n in range(5)]

    def outer(params: dict) -> tuple[Tensor, ...]:
        loss = (torch.func.functional_call(model, params, (inputs,)) - targets).square().mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    actual = outer(adapt(model, params, inputs, targets, seeds, 0.2))
    by_hand = params
    for seed in seeds:
        loss = (torch.func.functional_call(model, by_hand, (inputs,)) - targets).square().mean()
        grads = torch.autograd.grad(loss, list(by_hand.values()), create_graph=True)
        factors = [noise(rate(0.2), "gaussian", seed, n, g.numel(), g.dtype).view(g.shape) for n, g in enumerate(grads)]
        steps = zip(by_hand.items(), grads, factors, strict=True)
        by_hand = {name: value - 0.05 * grad * factor for (name, value), grad, factor in steps}
    torch.testing.assert_close(actual, outer(by_hand), rtol=1e-9, atol=1e-12)
    plain = outer(adapt(model, params, inputs, targets, seeds, 0.0))
    assert not torch.allclose(actual[0], plain[0], rtol=1e-2)


def test_meta_training_learns_sines():
    """MAML on sines of random amplitude and phase: after training with dropout, three steps adapt to a new sine."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def episode(train: bool) -> Tensor:
        x, amplitude, phase = torch.rand(20, 1) * 6 - 3, 0.5 + 2 * torch.rand(1), 3 * torch.rand(1)
        y = amplitude * (x + phase).sin()
        seeds = [torch.randint(2**62, (1,)) for _ in range(3)]
        adapted = adapt(model, dict(model.named_parameters()), x[:10], y[:10], seeds, 0.1 if train else 0.0)
        return (torch.func.functional_call(model, adapted, (x[10:],)) - y[10:]).square().mean()

    def test_loss() -> float:
        return float(torch.stack([episode(False).detach() for _ in range(60)]).mean())

    before = test_loss()
    for _ in range(250):
        optimizer.zero_grad()
        (sum(episode(True) for _ in range(4)) / 4).backward()
        optimizer.step()
    assert test_loss() < 0.5 * before


# --- compiled, seeds and bad input --------------------------------------------------------------------------------------


@modes
def test_compiled_in_one_graph(backend, mode):
    grads = gradients([(40,), (5, 5)])

    def function(grads: list[Tensor], p: float | Tensor, seed: Tensor) -> list[Tensor | None]:
        return mtl.gradient_dropout([grads[0], None, grads[1]], p, mode, seed)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for p in (0.1, 0.2, rate(0.3), rate(0.0)):
        assert_same_bits(compiled(grads, p, SEED), function(grads, p, SEED))


def test_compiled_inner_step_differentiates(backend):
    """One graph of the inner step, differentiated from outside and again."""
    (x,) = gradients([(6,)], torch.float64)

    def step(w: Tensor, p: Tensor, seed: Tensor) -> Tensor:
        (grad,) = mtl.gradient_dropout([2 * w**3], p, "gaussian", seed)
        return ((w - 0.1 * grad) ** 2).sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    own, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    (actual,) = torch.autograd.grad(compiled(own, rate(0.3), SEED), own)
    (wanted,) = torch.autograd.grad(step(plain, rate(0.3), SEED), plain)
    torch.testing.assert_close(actual, wanted)


def test_seeds_are_drawn_by_the_generator():
    grads = gradients([(400,)])
    draws = [mtl.gradient_dropout(grads, 0.2, generator=torch.Generator().manual_seed(n)) for n in (8, 8, 9)]
    assert_same_bits(draws[0], draws[1])
    assert not draws[0][0].equal(draws[2][0])
    torch.manual_seed(3)
    first, second = mtl.gradient_dropout(grads), mtl.gradient_dropout(grads)
    torch.manual_seed(3)
    assert_same_bits(mtl.gradient_dropout(grads), first)
    assert not first[0].equal(second[0])
    generator = torch.Generator()
    with pytest.raises(Exception, match="generator cannot be used inside a compiled graph"):
        torch.compile(lambda g: mtl.gradient_dropout(g, generator=generator), backend="eager", fullgraph=True)(grads)


BAD = {
    "p is -0.1; pass a probability": {"p": -0.1},
    "p is 1; pass a probability": {"p": 1},
    "p is nan; pass a probability": {"p": math.nan},
    r"p is a str; pass a number": {"p": "0.1"},
    r"p is torch.int64; pass a floating-point tensor": {"p": torch.tensor(0)},
    r"p has shape \(2,\); pass one rate": {"p": torch.rand(2)},
    'mode is \'binary\'; pass "gaussian" or "bernoulli"': {"mode": "binary"},
    r"seed is a int; pass one int64, for example torch.tensor\(\[3\]\)": {"seed": 3},
    r"seed is torch.float32 of shape \(1,\); pass one int64": {"seed": torch.ones(1)},
    "seed and generator are both given": {"generator": torch.Generator()},
    "grads is a Tensor; pass a list of tensors": {"grads": torch.ones(3)},
    "grads is a dict; pass a list of tensors": {"grads": {"a": torch.ones(3)}},
    r"grads\[1\] is a float, not a tensor": {"grads": [torch.ones(3), 1.0]},
    r"grads\[2\] is torch.int64": {"grads": [torch.ones(3), None, torch.tensor([1])]},
    r"grads\[0\] is sparse": {"grads": [torch.ones(3).to_sparse(), torch.ones(3)]},
    r"out lists 1 tensors, grads list 2": {"out": [torch.zeros(4)]},
    r"out\[1\] is NoneType; tensor 1 has gradients": {"out": [torch.zeros(4), None]},
    r"out\[1\] is \(4,\) torch.float32": {"out": [torch.zeros(4), torch.zeros(4)]},
    r"out\[1\] shares memory with out\[0\]": {"out": (lambda t: [t[:4], t])(torch.zeros(5))},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_says_what_and_where(backend, message):
    grads = gradients([(4,), (5,)])
    before = snapshot([grads, [t for t in BAD[message].get("out", []) if t is not None]])
    arguments = {"grads": grads, "seed": SEED} | BAD[message]
    with pytest.raises(ValueError, match=message):
        mtl.gradient_dropout(**arguments)
    assert_unchanged(before)


@modes
@pytest.mark.parametrize("p", [-0.5, 1.0, math.nan, math.inf])
def test_a_rate_tensor_that_is_no_probability(backend, p, mode):
    """An error where it is read, NaN where it is not."""
    grads = gradients([(4,), (5,)])
    if backend == "cuda":
        assert all(t.isnan().all() for t in mtl.gradient_dropout(grads, rate(p), mode, SEED))
        return
    before = snapshot([grads])
    for out in (None, grads):
        with pytest.raises(ValueError, match=f"p is {p}; pass a probability"):
            mtl.gradient_dropout(grads, rate(p), mode, SEED, out=out)
    assert_unchanged(before)


def test_the_noise_of_a_rate_that_is_none_is_nan():
    for mode in MODES:
        for p in (-0.5, 1.0, math.nan, math.inf):
            assert noise(rate(p), mode, SEED, 0, 100, torch.float32).isnan().all()


def test_what_requires_grad_and_cannot(backend):
    leaf = torch.ones(4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"not differentiable in p, which requires grad; pass p\.detach\(\)"):
        mtl.gradient_dropout([torch.ones(4)], rate(0.2).requires_grad_(), seed=SEED)
    with pytest.raises(RuntimeError, match=r"gradient_dropout is not differentiable.*\.detach\(\)"):
        mtl.gradient_dropout([leaf], 0.2, seed=SEED, out=[torch.zeros(4)])
    with pytest.raises(RuntimeError, match=r"gradient_dropout is not differentiable.*\.detach\(\)"):
        mtl.gradient_dropout([torch.ones(4)], 0.2, seed=SEED, out=[leaf])
    with pytest.raises(RuntimeError, match=r"gradient_dropout_ is not differentiable.*\.detach\(\)"):
        OPS.gradient_dropout_([torch.zeros(4)], [leaf], rate(0.2), "gaussian", SEED, [0])
    with torch.no_grad():
        mtl.gradient_dropout([leaf], rate(0.2).requires_grad_(), seed=SEED)


def test_ops_refuse_what_they_cannot_read(backend):
    grads = [torch.ones(4)]
    for arguments, message in (
        ((grads, rate(0.2).float(), "gaussian", SEED, [0]), "p is"),
        ((grads, rate(0.2).expand(2), "gaussian", SEED, [0]), "p is"),
        ((grads, rate(0.2), "binary", SEED, [0]), "mode is"),
        ((grads, rate(0.2), "gaussian", SEED.int(), [0]), "seed is"),
        ((grads, rate(0.2), "gaussian", SEED, [0, 1]), "places"),
        ((grads, rate(0.2), "gaussian", SEED, [-1]), "places"),
        ((grads, rate(0.2), "gaussian", SEED, [2**32]), "places"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            OPS.gradient_dropout(*arguments)

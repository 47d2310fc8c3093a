"""Tracing: torch.compile without graph breaks, opcheck, vmap and fake tensors."""

import shutil

import pytest
import torch
from helpers import assert_combined, assert_gram, drop, random_gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mtlkernels as mtl
from mtlkernels import reference
from mtlkernels.weightings import CROSS, MEMORY
from mtlkernels.weightings.memory.m_config import TRACES

OPS = torch.ops.mtlkernels
OPCHECK_TESTS = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def chain(grads: list[list[Tensor]], weights: Tensor) -> tuple:
    """Most of what a user compiles, in one graph."""
    gram = mtl.gram(grads)
    models = [reference.like(column) for column in zip(*grads, strict=True)]
    wide = [t for t in models if t is not None and t.dim() > 1]
    norms = [gram.diagonal().float().unsqueeze(1).expand(-1, len(t)) for t in wide]
    return (
        gram,
        mtl.cosine(gram),
        mtl.gram(grads, per="tensor"),
        mtl.gram(grads, per="channel"),
        mtl.gram(grads, grads[:1]),
        mtl.combine(grads, weights),
        mtl.combine(grads, gram.diagonal()),
        mtl.mix(grads, torch.stack([weights, -weights])),
        mtl.project(grads),
        mtl.project(grads, onto=0, conflict_only=False),
        mtl.conflict_rate(gram),
        mtl.magnitude_similarity(gram),
        mtl.condition_number(gram),
        mtl.aggregate(grads, "mean"),
        mtl.priority_combine(grads, [None if t is None else torch.arange(reference.num_channels(t)) % 2 for t in models]),
        mtl.connection_strength(wide, norms, norms),
        mtl.flat_gram(grads, [[None if t is None else t * 2 for t in row] for row in grads]),
    )


COMPILERS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")),
]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_one_graph_equals_eager(backend, compiler):
    compiled = torch.compile(chain, backend=compiler, fullgraph=True)
    grads = random_gradients(3, [(8, 5), (7,), ()])
    grads[2][0] = grads[2][0].T.contiguous().T
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(compiled(grads, weights), chain(grads, weights))
    assert_gram(compiled(grads, weights)[0], grads)


def test_one_graph_for_all_sizes(backend):
    traces = []

    def counting(module, inputs):
        traces.append(module)
        return module.forward

    compiled = torch.compile(chain, backend=counting, fullgraph=True, dynamic=True)
    weights = torch.tensor([0.5, -1.0], dtype=torch.float64)
    for rows, width in [(8, 5), (9, 6), (31, 17)]:
        grads = random_gradients(2, [(rows, width), (width,)])
        torch.testing.assert_close(compiled(grads, weights), chain(grads, weights))
    assert len(traces) == 1


@pytest.mark.parametrize("name", [*MEMORY, *CROSS])
def test_weightings_of_memories_and_of_two_batches_in_a_graph(backend, name):
    """State moves in the graph as outside it, from the call on that gives it its shape."""
    if name == "m_config" and not TRACES:
        pytest.skip("torch before 2.14 traces it wrongly, and it says so")
    inside, outside = mtl.get_weighting(name), mtl.get_weighting(name)

    def update(grads, losses, other):
        return mtl.aggregate(grads, inside, losses=losses, other=other)

    compiled = torch.compile(update, backend="aot_eager", fullgraph=True)
    for seed in range(4):
        grads = random_gradients(3, [(5, 4), (7,)], seed=seed)
        losses = torch.arange(1, 4, dtype=torch.float64) + seed
        other = random_gradients(3, [(5, 4), (7,)], seed=seed + 10) if name in CROSS else None
        actual, expected = compiled(grads, losses, other), mtl.aggregate(grads, outside, losses=losses, other=other)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inside.state_dict(), outside.state_dict(), rtol=1e-6, atol=1e-6)


def test_none_rows_in_a_graph(backend):
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    grads = drop(random_gradients(2, [(4, 3), (5,), (2,)]), (0, 0), (0, 2), (1, 2))
    weights = torch.tensor([0.5, -1.0], dtype=torch.float64)
    torch.testing.assert_close(compiled(grads, weights), chain(grads, weights))


@pytest.mark.parametrize("target", ["fresh", "in place"])
def test_buffers_in_a_graph(backend, target):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(grads, weights, out):
        mtl.combine(grads, weights, out=out)
        return [t * 2 for t in out]

    grads, weights = random_gradients(2, [(4, 3), (5,)]), torch.tensor([0.5, -1.0], dtype=torch.float64)
    models = [[g.clone() for g in row] for row in grads]
    out = grads[0] if target == "in place" else [torch.zeros_like(g) for g in grads[0]]
    doubled = compiled(grads, weights, out)
    assert_combined(out, models, weights)
    assert_combined([t / 2 for t in doubled], models, weights)


@pytest.mark.parametrize("graphs", ["one graph", "two graphs", "perturb_ alone", "restore_ alone"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_perturbed_parameters_in_a_graph(backend, compiler, graphs):
    """Whatever is compiled: the loss sees theta + eps, and theta is back afterwards, to the bit."""

    def perturb(params, grads):
        return mtl.perturb_(params, grads, [0.1, 0.2], adaptive=True, groups=[1, 2])

    def loss(params):
        return sum((p**3).sum() for p in params)

    def whole(params, grads):
        originals = perturb(params, grads)
        value = loss(params).detach()
        mtl.restore_(params, originals)
        return value

    def compiled(function, *which):
        return torch.compile(function, backend=compiler, fullgraph=True) if graphs in which else function

    (theta,), (row,) = random_gradients(1, [(4, 3), (5,), (2, 2)]), random_gradients(1, [(4, 3), (5,), (2, 2)], seed=1)
    grads = [*row[:2], None]
    params, expected = ([torch.nn.Parameter(t.clone()) for t in theta] for _ in range(2))
    kept = perturb(expected, grads)
    at_perturbed = torch.autograd.grad(loss(expected), expected)
    for _ in range(2):
        if graphs == "one graph":
            value = compiled(whole, "one graph")(params, grads)
        else:
            originals = compiled(perturb, "two graphs", "perturb_ alone")(params, grads)
            torch.testing.assert_close(params, expected)
            value = loss(params)
            torch.testing.assert_close(torch.autograd.grad(value, params), at_perturbed)
            compiled(mtl.restore_, "two graphs", "restore_ alone")(params, originals)
        torch.testing.assert_close(value, loss(expected))
        for param, t in zip(params, theta, strict=True):
            assert torch.equal(param, t)
            assert param.is_leaf
    mtl.restore_(expected, kept)


def test_derivatives_in_a_graph(backend):
    grads = random_gradients(2, [(4, 3), (5,)], torch.float64)
    leaves = [g.requires_grad_() for row in grads for g in row]
    weights = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)

    def loss(grads, weights):
        return sum((t**2).sum() for t in mtl.combine(grads, weights))

    expected = torch.autograd.grad(loss(grads, weights), [weights, *leaves])
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(grads, weights), [weights, *leaves]), expected)


def test_refuses_grad_in_a_graph(backend):
    grads = [[g.requires_grad_() for g in row] for row in random_gradients(2, [(4, 3)])]
    with pytest.raises(Exception, match=r"\.detach\(\)"):
        torch.compile(lambda g: mtl.gram(g), backend="aot_eager", fullgraph=True)(grads)


# --- opcheck ------------------------------------------------------------------------------------------------------------


def flat(*args, **options) -> list[Tensor | None]:
    return [t for row in random_gradients(*args, **options) for t in row]


def strided() -> list[Tensor | None]:
    rows = random_gradients(2, [(4, 6), (2, 3, 5, 4), (8,)])
    return [t for row in rows for t in (row[0].T.contiguous().T, row[1].to(memory_format=torch.channels_last), row[2][::2])]


def leaves(*args, **options) -> list[Tensor | None]:
    return [t.requires_grad_() for t in flat(*args, **options)]


def symmetric(*shape: int) -> Tensor:
    rows = torch.randn(*shape, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return rows @ rows.mT


def rate() -> Tensor:
    return torch.tensor(0.1, dtype=torch.float64)


W2, W3 = torch.tensor([0.5, -2.0], dtype=torch.float64), torch.tensor([0.5, 0.0, 1.0])
TOP = torch.tensor([0, 2, 1, 0, 2])
SEED = torch.tensor([7])
OPCHECKS = {
    "gram": lambda: (OPS.gram, (flat(3, [(4, 3), (5,), ()]), 3, "model")),
    "gram, tensor": lambda: (OPS.gram, (flat(2, [(4, 3), (0, 2)], torch.bfloat16), 2, "tensor")),
    "gram, channel": lambda: (OPS.gram, (flat(2, [(4, 3), (5,), ()]), 2, "channel")),
    "gram, none": lambda: (OPS.gram, ([None, torch.ones(3), torch.ones(2), None], 2, "channel")),
    "gram, strided": lambda: (OPS.gram, (strided(), 2, "channel")),
    "gram, empty": lambda: (OPS.gram, ([], 0, "model")),
    "cross_gram": lambda: (OPS.cross_gram, (flat(3, [(4, 3), (5,)]), flat(2, [(4, 3), (5,)], seed=1), 3, 2, "model")),
    "cross_gram, tensor": lambda: (OPS.cross_gram, (flat(1, [(4, 3)]), flat(2, [(4, 3)], seed=1), 1, 2, "tensor")),
    "cross_gram, channel": lambda: (OPS.cross_gram, ([torch.ones(2, 3), None], [None, torch.ones(2)], 1, 1, "channel")),
    "paired_gram": lambda: (OPS.paired_gram, (flat(2, [(4, 3), ()]), flat(2, [(4, 3), ()], seed=1), 2, "model", "difference")),
    "paired_gram, tensor": lambda: (OPS.paired_gram, ([torch.ones(2, 3), None], [None, None], 1, "tensor", "product")),
    "perturb_": lambda: (OPS.perturb_, (*(flat(1, [(4, 3), (5,)], seed=n) for n in range(3)), W2.abs(), True)),
    "perturb_, strided": lambda: (
        OPS.perturb_,
        ([torch.zeros(6, 4).T], [torch.ones(4, 6)], [torch.ones(6, 4).T], W2[:1], False),
    ),
    "memory_combine_": lambda: (
        OPS.memory_combine_,
        ([torch.zeros(4, 3)], flat(2, [(4, 3)], seed=1), [torch.ones(4, 3), None], torch.rand(3, 2).double(), False),
    ),
    "memory_combine_, squares": lambda: (
        OPS.memory_combine_,
        (flat(1, [(8,)], torch.bfloat16), flat(2, [(8,)], seed=1), flat(2, [(8,)], torch.bfloat16), torch.rand(3, 2), True),
    ),
    "excess_risk": lambda: (
        OPS.excess_risk,
        ([torch.ones(4, 3), None], [torch.ones(4, 3), torch.ones(4, 3)], W2.abs(), 1e-7),
    ),
    "excess_risk, strided": lambda: (
        OPS.excess_risk,
        (strided(), [torch.ones_like(t) for t in strided()], W2.float(), 0.0),
    ),
    "excess_risk, none": lambda: (OPS.excess_risk, ([None, None], flat(2, [(8,)]), W2, 1e-7)),
    "excess_risk, empty": lambda: (OPS.excess_risk, ([], [], W2, 1e-7)),
    "combine_sgd_": lambda: (
        OPS.combine_sgd_,
        (flat(1, [(4, 3), ()], seed=1), [], flat(2, [(4, 3), ()]), W2, rate(), None, 0.0, 0.0, 0.1, False, True, False),
    ),
    "combine_sgd_, momentum": lambda: (
        OPS.combine_sgd_,
        (
            *(flat(1, [(8,)], torch.bfloat16, seed=n) for n in (1, 2)),
            [torch.ones(8).bfloat16(), None],
            *(W2[None], rate(), torch.tensor(False), 0.9, 0.1, 0.0, False, False, False),
        ),
    ),
    "combine_adam_": lambda: (
        OPS.combine_adam_,
        (
            *(flat(1, [(4, 3), (5,)], seed=n) for n in (1, 2)),
            *(flat(1, [(4, 3), (5,)], seed=3, scale=0.1), [], [torch.ones(())] * 2, flat(2, [(4, 3), (5,)]), W2, rate(), None),
            *(0.9, 0.99, 1e-8, 0.1, True, False, False),
        ),
    ),
    "combine_adam_, amsgrad": lambda: (
        OPS.combine_adam_,
        (
            *([torch.ones(6, 4).T], [torch.zeros(4, 6)], [torch.zeros(6, 4).T], [torch.zeros(4, 6)], [torch.ones(())]),
            *([torch.ones(4, 6), None], W2, rate(), torch.tensor(True), 0.9, 0.99, 1e-8, 0.1, False, True, False),
        ),
    ),
    "combine": lambda: (OPS.combine, (flat(2, [(4, 3), (5,), ()]), W2)),
    "combine, per tensor": lambda: (OPS.combine, (flat(3, [(4, 3), (5,)], torch.float16), W3.expand(2, 3).clone())),
    "combine, strided": lambda: (OPS.combine, (strided(), W2)),
    "combine, none": lambda: (OPS.combine, ([None, torch.ones(3), torch.ones(2), None], W2)),
    "combine, empty": lambda: (OPS.combine, ([], W2)),
    "combine, differentiated": lambda: (OPS.combine, (leaves(2, [(4, 3), (5,)]), W2)),
    "combine, weights differentiated": lambda: (OPS.combine, (leaves(2, [(4, 3), (5,)]), W2.clone().requires_grad_())),
    "combine, only weights": lambda: (OPS.combine, (flat(3, [(4, 3), (5,)]), torch.randn(2, 3).requires_grad_())),
    "combine_": lambda: (OPS.combine_, (flat(1, [(4, 3), (5,)], seed=1), flat(2, [(4, 3), (5,)]), W2)),
    "combine_, per tensor": lambda: (
        OPS.combine_,
        (flat(1, [(4,)], torch.bfloat16), flat(3, [(4,)], torch.bfloat16), W3[None]),
    ),
    "combine_, strided": lambda: (OPS.combine_, ([torch.zeros(6, 4).T, torch.zeros(4)], flat(2, [(4, 6), (4,)]), W2)),
    "gram_combine_": lambda: (OPS.gram_combine_, (flat(1, [(4, 3), (5,)], seed=1), flat(2, [(4, 3), (5,)]), W2)),
    "gram_combine_, none": lambda: (
        OPS.gram_combine_,
        (flat(1, [(3,), (2,)], torch.bfloat16), [None, *flat(1, [(2,), (3,)], torch.bfloat16), None], W2.float()),
    ),
    "gram_combine_, strided": lambda: (OPS.gram_combine_, ([torch.zeros(6, 4).T], flat(2, [(4, 6)]), W2)),
    "combine_channels": lambda: (OPS.combine_channels, (flat(2, [(4, 3), (5,), ()]), torch.randn(10, 2))),
    "combine_channels, strided": lambda: (OPS.combine_channels, (strided(), torch.randn(10, 2))),
    "combine_channels, none": lambda: (OPS.combine_channels, ([None, torch.ones(3), torch.ones(2), None], torch.randn(5, 2))),
    "combine_channels, differentiated": lambda: (
        OPS.combine_channels,
        (leaves(2, [(4, 3), (5,)]), torch.randn(9, 2).requires_grad_()),
    ),
    "combine_channels_": lambda: (
        OPS.combine_channels_,
        (flat(1, [(4, 3), (5,)], seed=1), flat(2, [(4, 3), (5,)]), torch.randn(9, 2)),
    ),
    "mix": lambda: (OPS.mix, (flat(2, [(4, 3), (5,)]), torch.stack([W2, -W2, W2 * 3]))),
    "mix, none": lambda: (OPS.mix, ([None, torch.ones(2, 2), torch.ones(3), None], W2[None])),
    "mix, strided": lambda: (OPS.mix, (strided(), torch.eye(2))),
    "mix, nothing": lambda: (OPS.mix, (flat(2, [(4, 3)]), torch.zeros(0, 2))),
    "priority_combine": lambda: (OPS.priority_combine, (flat(3, [(4, 3), (5,), (2, 2)]), [TOP[:4], TOP, None], 3, True)),
    "priority_combine, none": lambda: (
        OPS.priority_combine,
        ([None, torch.ones(3), torch.ones(2), None], [None, TOP[:3]], 2, False),
    ),
    "priority_combine, strided": lambda: (OPS.priority_combine, (strided(), [TOP[:4], TOP[:2], None], 2, True)),
    "priority_combine, empty": lambda: (OPS.priority_combine, ([], [], 2, True)),
    "priority_combine_": lambda: (
        OPS.priority_combine_,
        (flat(1, [(4, 3), (5,)], seed=1), flat(2, [(4, 3), (5,)]), [TOP[:4], None], 2, True),
    ),
    "graddrop": lambda: (OPS.graddrop, (flat(3, [(4, 3), (5,), ()]), W3.double().abs(), None, SEED, [0, 1, 2])),
    "graddrop, none": lambda: (
        OPS.graddrop,
        ([None, torch.ones(3), torch.ones(2), None], W2.abs() / 2, torch.tensor([True, False]), SEED, [4, 7]),
    ),
    "graddrop, strided": lambda: (OPS.graddrop, (strided(), W2 * 0, None, SEED, [0, 1, 2])),
    "graddrop, empty": lambda: (OPS.graddrop, ([], W2 * 0, None, SEED, [])),
    "graddrop_": lambda: (
        OPS.graddrop_,
        (flat(1, [(4, 3), (5,)], seed=1), flat(2, [(4, 3), (5,)]), W2 * 0, None, SEED, [0, 1]),
    ),
    "trimmed_mean": lambda: (OPS.trimmed_mean, (flat(3, [(4, 3), (5,), ()]), 3, 1, torch.tensor([True, False, True]))),
    "trimmed_mean, none": lambda: (OPS.trimmed_mean, ([None, torch.ones(3), torch.ones(2), None], 2, 0, None)),
    "trimmed_mean, strided": lambda: (OPS.trimmed_mean, (strided(), 2, 0, None)),
    "trimmed_mean, empty": lambda: (OPS.trimmed_mean, ([], 2, 0, None)),
    "trimmed_mean_": lambda: (
        OPS.trimmed_mean_,
        (flat(1, [(4, 3), (5,)], seed=1), flat(3, [(4, 3), (5,)]), 3, 1, None),
    ),
    "gradient_dropout": lambda: (
        OPS.gradient_dropout,
        (flat(1, [(4, 3), (5,), ()]), torch.tensor(0.3).double(), "gaussian", SEED, [0, 1, 4]),
    ),
    "gradient_dropout, bernoulli": lambda: (
        OPS.gradient_dropout,
        (flat(1, [(4, 3), (5,)], torch.bfloat16), torch.tensor([0.3]).double(), "bernoulli", SEED, [0, 1]),
    ),
    "gradient_dropout, strided": lambda: (
        OPS.gradient_dropout,
        ([t for t in strided() if t is not None], torch.tensor(0.3).double(), "gaussian", SEED, list(range(6))),
    ),
    "gradient_dropout, differentiated": lambda: (
        OPS.gradient_dropout,
        (leaves(1, [(4, 3), (5,)]), torch.tensor(0.3).double(), "gaussian", SEED, [0, 1]),
    ),
    "gradient_dropout, empty": lambda: (OPS.gradient_dropout, ([], torch.tensor(0.3).double(), "gaussian", SEED, [])),
    "gradient_dropout_": lambda: (
        OPS.gradient_dropout_,
        (flat(1, [(4, 3)], seed=1), flat(1, [(4, 3)]), torch.tensor(0.3).double(), "bernoulli", SEED, [2]),
    ),
    "connection_strength": lambda: (
        OPS.connection_strength,
        (torch.rand(7, dtype=torch.float64), [torch.rand(3, 4), torch.rand(3, 3)], [torch.rand(3, 4), torch.rand(3, 3)], 1e-5),
    ),
    "projection_coefficients": lambda: (
        OPS.projection_coefficients,
        (symmetric(3), torch.arange(3).expand(3, 3).clone(), True),
    ),
    "projection_coefficients, batch": lambda: (
        OPS.projection_coefficients,
        (symmetric(2, 3).mT, torch.tensor([0, 2]).expand(2, 3, 2), False),
    ),
    "pcgrad_weights": lambda: (OPS.pcgrad_weights, (symmetric(3), torch.tensor(7))),
    "pcgrad_weights, batch": lambda: (OPS.pcgrad_weights, (symmetric(2, 3).mT, torch.tensor(7))),
    "mgda_weights": lambda: (OPS.mgda_weights, (symmetric(3), None)),
    "mgda_weights, batch": lambda: (OPS.mgda_weights, (symmetric(2, 3).mT, torch.tensor([[True, False, True]] * 2))),
    "cagrad_weights": lambda: (OPS.cagrad_weights, (symmetric(3), None, 0.4)),
    "cagrad_weights, batch": lambda: (OPS.cagrad_weights, (symmetric(2, 3).mT, torch.tensor([[True, False, True]] * 2), 0.4)),
    "conicgrad_weights": lambda: (OPS.conicgrad_weights, (symmetric(2, 3).mT, torch.tensor([[True, False, True]] * 2), 0.9)),
    "fairgrad_weights": lambda: (OPS.fairgrad_weights, (symmetric(2, 3).mT, None, 2.0)),
    "upgrad_weights": lambda: (OPS.upgrad_weights, (symmetric(2, 3).mT, None, W3.double().abs())),
    "dualproj_weights": lambda: (OPS.dualproj_weights, (symmetric(3), None, None)),
    "pcd_weights": lambda: (OPS.pcd_weights, (symmetric(3), None, W3.double().abs())),
    "config_weights": lambda: (OPS.config_weights, (symmetric(2, 3).mT, None, None, 1e-14)),
    "imtl_g_weights": lambda: (OPS.imtl_g_weights, (symmetric(3), None, 1e-14)),
    "aligned_mtl_weights": lambda: (OPS.aligned_mtl_weights, (symmetric(3), None, W3.double().abs(), 1, 1e-14)),
    "gradvac_weights": lambda: (OPS.gradvac_weights, (symmetric(3), symmetric(3) * 0, None, torch.tensor(7), 0.5, 0.0)),
    "affinity_propagation": lambda: (OPS.affinity_propagation, (symmetric(3), None, 0.5, 200, 15)),
    "affinity_propagation, batch": lambda: (OPS.affinity_propagation, (symmetric(2, 3).mT, 0.5, 0.9, 50, 15)),
    "proximal_affinity_": lambda: (
        OPS.proximal_affinity_,
        (symmetric(3), torch.ones(3).double(), [torch.ones(()), W3[1], torch.ones(1)], [0, 2], [1], 0.5, torch.tensor(True)),
    ),
    "proximal_affinity_, first": lambda: (
        OPS.proximal_affinity_,
        (symmetric(3), torch.full((3,), torch.nan).double(), [torch.ones(()).half()] * 3, [], [0], 0.5, None),
    ),
    "proximal_groups": lambda: (OPS.proximal_groups, (symmetric(3), False, None, 0.5, 200, 50)),
    "proximal_groups, released": lambda: (OPS.proximal_groups, (symmetric(3).mT, True, -1.0, 0.9, 200, 50)),
    **{
        f"{op}, {name}": lambda op=op, make=make: (getattr(OPS, op), (make(),))
        for op in ("cosine", "magnitude_similarity", "conflict_rate", "condition_number")
        for name, make in {
            "matrix": lambda: symmetric(3),
            "batch": lambda: symmetric(2, 4, 3),
            "float32": lambda: symmetric(2, 3).float(),
            "transposed": lambda: symmetric(2, 3).mT,
            "permuted": lambda: symmetric(2, 4, 3).permute(1, 0, 3, 2),
            "expanded": lambda: symmetric(3).expand(5, 3, 3),
            "empty": lambda: symmetric(0, 3),
        }.items()
    },
}


@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(backend, case):
    op, args = OPCHECKS[case]()
    results = torch.library.opcheck(op.default, args)
    assert results == dict.fromkeys(OPCHECK_TESTS, "SUCCESS")


def test_every_op_is_checked():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("mtlkernels::")}
    checked = {case.split(",")[0] for case in OPCHECKS}
    assert {name.split(".")[0] for name in registered} == checked


# --- vmap ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["model", "tensor", "channel"])
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, 1), (None, 2, 0), (1, 1, 1)], ids=str)
def test_vmap_of_gram_equals_a_loop(backend, per, in_dims):
    batch, shape = 4, (5, 3)
    inputs = []
    for n, dim in enumerate(in_dims):
        full = random_gradients(1, [(batch, *shape)], torch.float64, seed=n)[0][0]
        inputs.append(full[0] if dim is None else full.movedim(0, dim))
    scalars = random_gradients(1, [(batch,)], torch.float64, seed=9)[0][0]

    def function(a: Tensor, b: Tensor, c: Tensor, scalar: Tensor):
        return mtl.gram([[a, c, None, scalar], [b, None, None, scalar]], per=per)

    def cross(a: Tensor, b: Tensor, c: Tensor, scalar: Tensor):
        return mtl.gram([[a, c, None, scalar]], [[b, None, None, None], [c, a, None, scalar], [a, None, None, None]], per=per)

    for f in (function, cross):
        actual = torch.vmap(lambda *args, f=f: drop_none(f(*args)), in_dims=(*in_dims, 0))(*inputs, scalars)
        loop = [
            drop_none(f(*[t if d is None else t.select(d, i) for t, d in zip(inputs, in_dims, strict=True)], scalars[i]))
            for i in range(batch)
        ]
        expected = tuple(torch.stack(parts) for parts in zip(*loop, strict=True))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def drop_none(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(t for t in result if t is not None)


def test_vmap_over_the_whole_batch_of_models(backend):
    stacked = random_gradients(1, [(6, 3, 20)], torch.float64)[0][0]
    grams = torch.vmap(mtl.gram)(stacked)
    torch.testing.assert_close(grams, stacked @ stacked.mT)
    torch.testing.assert_close(torch.vmap(mtl.gram, in_dims=2)(stacked), torch.einsum("bkp,ckp->pbc", stacked, stacked))
    nested = torch.vmap(torch.vmap(mtl.gram))(stacked.view(2, 3, 3, 20))
    torch.testing.assert_close(nested.flatten(0, 1), stacked @ stacked.mT)


def test_vmap_of_gram_of_empty_tensors(backend):
    for per in ("model", "tensor", "channel"):
        for shape in [(0,), (0, 3), (3, 0)]:
            x = torch.zeros(4, *shape)
            result = drop_none(torch.vmap(lambda a, per=per: drop_none(mtl.gram([[a], [a]], per=per)))(x))
            lead = {"model": (), "tensor": (1,), "channel": shape[:1]}[per]
            assert result[0].shape == (4, *lead, 2, 2)


# --- fake tensors -------------------------------------------------------------------------------------------------------


def test_fake_tensors_have_the_shapes_dtypes_and_strides_of_real_ones(backend):
    grads = drop(random_gradients(3, [(4, 3), (5,), (2, 3, 5, 4), (0, 2), ()]), (0, 1), (2, 4))
    grads[0][0], grads[1][2] = grads[0][0].T.contiguous().T, grads[1][2].to(memory_format=torch.channels_last)
    weights = torch.ones(3, dtype=torch.float64)
    real = chain(grads, weights)
    with FakeTensorMode() as mode:
        fakes = [[None if t is None else mode.from_tensor(t) for t in row] for row in grads]
        fake = chain(fakes, mode.from_tensor(weights))
    pairs = list(zip(torch.utils._pytree.tree_leaves(real), torch.utils._pytree.tree_leaves(fake), strict=True))
    assert len(pairs) > 20
    for a, b in pairs:
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


def test_huge_sizes_cost_nothing_to_trace(backend):
    with FakeTensorMode():
        grads = [[torch.empty(3, 2**30, 2**30, dtype=torch.bfloat16)] for _ in range(3)]
        assert mtl.gram(grads).shape == (3, 3)
        assert mtl.gram(grads, per="channel")[0].shape == (3, 3, 3)
        assert mtl.combine(grads, torch.ones(3))[0].shape == (3, 2**30, 2**30)


def test_meta_tensors(backend):
    grads = [[g.to("meta") for g in row] for row in random_gradients(2, [(4, 3), (5,)])]
    assert mtl.gram(grads).device.type == "meta"
    assert [t.shape for t in mtl.combine(grads, torch.ones(2, device="meta"))] == [(4, 3), (5,)]

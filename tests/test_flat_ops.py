"""Grams of pairs of rows and perturbed parameters against float64: every dtype, number of tasks, size, layout and magnitude."""

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
    Rows,
    assert_gram,
    assert_unchanged,
    drop,
    random_gradients,
    snapshot,
    to_numpy,
)
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.flat import FlatGram, squared_norms

OPS = torch.ops.mtlkernels
SHAPES = [(), (1,), (7,), (33, 5), (3, 2, 3, 3), (1000,)]
NUM_TASKS = [1, 2, 3, 4, 5, 8, 9, 16, 20, 32]
FORMS = ["difference", "product"]


def sam_gradients(grads: Rows, share: float = 1e-2, seed: int = 7) -> list[list[Tensor | None]]:
    """Gradients at perturbed parameters: ``grads`` plus a flat part of about ``share`` of them, rounded to their dtype."""
    shapes = [next(t for t in column if t is not None).shape for column in zip(*grads, strict=True)]
    parts = random_gradients(len(grads), shapes, torch.float64, seed=seed)
    return [
        [None if g is None else (g.double() * (1 + share) + share * f * g.double().abs().mean()).to(g.dtype) for g, f in pair]
        for pair in (zip(row, own, strict=True) for row, own in zip(grads, parts, strict=True))
    ]


def formed(first: Tensor | None, second: Tensor | None, form: str) -> Tensor | None:
    if form == "product":
        return None if first is None or second is None else first.double() * second.double()
    if first is None or second is None:
        return second.double() if second is not None else None if first is None else -first.double()
    return second.double() - first.double()


def assert_pairs(actual: Tensor, grads: Rows, other: Rows, per: str = "model", form: str = "difference") -> None:
    """The Gram of rows a, p, a, p, ... . What is formed is rounded once to float32: one unit roundoff more of its norm."""
    rows = []
    for a, b in zip(grads, other, strict=True):
        rows += [[None if t is None else t.double() for t in a], [formed(x, y, form) for x, y in zip(a, b, strict=True)]]
    wide = all(t is None or t.dtype == torch.float64 for row in grads for t in row)
    assert_gram(actual, rows, per=per, tolerance=(256 * 2.0**-53 if wide else 17 * 2.0**-24))


def paired(grads: Rows, other: Rows, per: str = "model", form: str = "difference") -> Tensor:
    flat, others = [t for row in grads for t in row], [t for row in other for t in row]
    return OPS.paired_gram(flat, others, len(grads), per, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tasks", NUM_TASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend, dtype, num_tasks, form):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    sam = sam_gradients(grads)
    before = snapshot([*grads, *sam])
    for per in ("model", "tensor"):
        assert_pairs(paired(grads, sam, per, form), grads, sam, per, form)
    assert_unchanged(before)


@pytest.mark.parametrize("numel", [0, 1, 15, 17, 63, 65, 127, 129, 511, 513, 2047, 8193, CHUNK - 1, CHUNK + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_vectors_blocks_and_chunks(backend, dtype, numel):
    for num_tasks in (1, 3, 5):
        grads = random_gradients(num_tasks, [(numel,), (3,), (numel,)], dtype)
        sam = sam_gradients(grads)
        assert_pairs(paired(grads, sam, "tensor"), grads, sam, "tensor")


@pytest.mark.parametrize("share", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_flat_parts_far_smaller_than_the_gradients(backend, share):
    """Also against float64 of the same float32 rows: relative to the flat part, not to the gradient."""
    grads = random_gradients(3, [(5003,), (100, 37)])
    result = mtl.flat_gram(grads, sam_gradients(grads, share))
    assert_pairs(paired(grads, sam_gradients(grads, share)), grads, sam_gradients(grads, share))
    assert (result.flat.diagonal().sqrt() < 3 * share * result.loss.diagonal().sqrt()).all()


def test_a_difference_of_grams_would_not_do():
    """What the op avoids: at flat parts of 1e-4 a float32-accurate difference of Grams is off by more than they are."""
    grads = random_gradients(3, [(50003,)])
    sam = sam_gradients(grads, 1e-4)
    exact = FlatGram.of_pairs(paired([[t.double() for t in row] for row in grads], [[t.double() for t in row] for row in sam]))
    both = mtl.gram([*grads, *sam])
    derived = both[3:, 3:] - both[3:, :3] - both[:3, 3:] + both[:3, :3]
    size = exact.flat.diagonal().max()
    assert (derived - exact.flat).abs().max() > 1e-3 * size
    assert (mtl.flat_gram(grads, sam).flat - exact.flat).abs().max() < 1e-6 * size


def test_the_parts_of_a_flat_gram(backend):
    grads = random_gradients(3, [(40,), (5, 6)], torch.float64)
    sam = sam_gradients(grads, 0.5)
    flat = [[s - g for s, g in zip(*rows, strict=True)] for rows in zip(sam, grads, strict=True)]
    for per in ("model", "tensor"):
        loss, own, cross = mtl.flat_gram(grads, sam, per=per)
        assert_gram(loss, grads, per=per)
        assert_gram(own, flat, per=per)
        assert_gram(cross, grads, flat, per=per)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tasks", [2, 5, 9])
def test_none_counts_as_zero(backend, num_tasks, form):
    grads = random_gradients(num_tasks, [(5, 4), (40,), (), (3, 3), (300,)])
    sam = sam_gradients(grads)
    every = [(k, 1) for k in range(num_tasks)]
    grads = drop(grads, (0, 0), (1, 3), (0, 4), *every)
    sam = drop(sam, (0, 0), (1, 2), (1, 4), *every)
    for per in ("model", "tensor"):
        assert_pairs(paired(grads, sam, per, form), grads, sam, per, form)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in EXPANDED])
def test_layouts(backend, layout):
    grads = random_gradients(3, LAYOUT_SHAPES)
    sam = [[LAYOUTS[layout](t) for t in row] for row in sam_gradients(grads)]
    assert_pairs(paired(grads, sam), grads, sam)
    own = [[LAYOUTS[layout](t) for t in row] for row in grads]
    assert_pairs(paired(own, sam, "tensor"), own, sam, "tensor")


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-22, 1e15, 1e25, 1e37], ids=str)
@pytest.mark.parametrize("num_tasks", [1, 3, 6])
def test_magnitudes(backend, num_tasks, scale):
    grads = [[t * (scale if k else 1.0) for t in row] for k, row in enumerate(random_gradients(num_tasks, [(2003,), (40,)]))]
    sam = sam_gradients(grads, 0.3)
    for per in ("model", "tensor"):
        assert_pairs(paired(grads, sam, per), grads, sam, per)
    opposite = [[-t for t in row] for row in grads]  # at 1e37 and above, a difference may leave float32
    assert_pairs(paired(grads, opposite), grads, opposite)
    if scale > 1e-30:  # products of the smallest are below what float32 holds; there they are float64's
        assert_pairs(paired(grads, sam, "tensor", "product"), grads, sam, "tensor", "product")


def test_tiny_products(backend):
    grads = random_gradients(1, [(2003,)], scale=1e-15)
    assert_pairs(paired(grads, grads, "model", "product"), grads, grads, "model", "product")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("of", ["grads", "sam"])
def test_a_task_that_is_not_finite_stays_in_its_rows(backend, of, value):
    grads = random_gradients(3, [(1003,), (4, 4)])
    sam = sam_gradients(grads)
    clean = mtl.flat_gram(grads, sam)
    (grads if of == "grads" else sam)[1][0][77] = value
    dirty = mtl.flat_gram(grads, sam)
    keep = [0, 2]
    for a, b in zip(clean, dirty, strict=True):
        torch.testing.assert_close(b[keep][:, keep], a[keep][:, keep], rtol=1e-5, atol=0)
    assert not dirty.flat[1, 1].isfinite()
    assert dirty.loss[1, 1].isfinite() == (of == "sam")


def test_equal_gradients_have_no_flat_part(backend):
    grads = random_gradients(3, [(1003,), (4, 4)])
    result = mtl.flat_gram(grads, [[t.clone() for t in row] for row in grads])
    assert not result.flat.any()
    assert not result.cross.any()


@pytest.mark.parametrize("num_tasks", [2, 5])
def test_symmetric_and_the_same_bits_for_any_threads(cpu_library, num_tasks):
    grads = random_gradients(num_tasks, [(3 * CHUNK + 5,), (100, 33)])
    sam = sam_gradients(grads)
    one = paired(grads, sam)
    assert torch.equal(one, one.T)
    try:
        torch.set_num_threads(2)
        assert torch.equal(paired(grads, sam), one)
    finally:
        torch.set_num_threads(1)


def test_combination_without_flat_gradients(backend):
    """sum w_k g_k + v_k f_k, as combine on the rows of both."""
    grads = random_gradients(3, [(40,), (5, 6)], torch.float64)
    sam = sam_gradients(grads, 0.5)
    w, v = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    update = mtl.combine([*grads, *sam], torch.cat([w - v, v]))
    for n, actual in enumerate(update):
        expected = sum(w[k] * grads[k][n] + v[k] * (sam[k][n] - grads[k][n]) for k in range(3))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_nothing_to_do(backend):
    assert mtl.flat_gram([], []).loss.shape == (0, 0)
    assert mtl.flat_gram([[], []], [[], []]).flat.equal(torch.zeros(2, 2, dtype=torch.float64))
    assert not mtl.flat_gram([[None]], [[None]], per="tensor").flat.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, s: (g, s[:1]), "sam lists 1 tasks, grads list 2"),
        (lambda g, s: (g, [s[0], s[1][:1]]), "lists 1 tensors"),
        (lambda g, s: (g, [s[0], [s[1][0], s[1][1][:2]]]), r"sam\[1\]\[1\] \(tensor 1\) has shape"),
        (lambda g, s: (g, [s[0], [s[1][0].half(), s[1][1]]]), r"sam\[1\]\[0\] \(tensor 0\) is torch.float16"),
        (lambda g, s: (g, [s[0], [s[1][0].to_sparse(), s[1][1]]]), r"sam\[1\]\[0\] is sparse"),
    ],
    ids=["tasks", "tensors", "shape", "dtype", "sparse"],
)
def test_bad_gradients(backend, change, message):
    grads = random_gradients(2, [(4,), (5,)])
    with pytest.raises(ValueError, match=message):
        mtl.flat_gram(*change(grads, sam_gradients(grads)))


def test_bad_arguments(backend):
    grads = random_gradients(2, [(4,)])
    with pytest.raises(ValueError, match="per is 'channel'"):
        mtl.flat_gram(grads, grads, per="channel")
    for arguments in (("channel", "difference"), ("model", "sum")):
        with pytest.raises((ValueError, RuntimeError), match=r"form|per"):
            paired(grads, grads, *arguments)
    with pytest.raises(RuntimeError, match=r"flat_gram is not differentiable.*detach"):
        mtl.flat_gram([[t.requires_grad_() for t in row] for row in grads], grads)


# --- perturb_ -----------------------------------------------------------------------------------------------------------


def expected_perturbed(params, grads, rho, adaptive, groups=None) -> list[np.ndarray]:
    """theta + eps in float64, by the formula."""
    sizes = [len(params)] if groups is None else groups
    rho = rho if isinstance(rho, list) else [rho] * len(sizes)
    results, start = [], 0
    for size, radius in zip(sizes, rho, strict=True):
        pairs = [(to_numpy(p), None if g is None else to_numpy(g)) for p, g in zip(params, grads, strict=True)][start:][:size]
        steps = [None if g is None else (p * g if adaptive else g) for p, g in pairs]
        norm = np.sqrt(sum((s**2).sum() for s in steps if s is not None))
        for p, g in pairs:
            results.append(p if g is None else p + radius / (norm + 1e-12) * (p**2 * g if adaptive else g))
        start += size
    return results


def assert_perturbed(actual, originals, expected, dtype) -> None:
    """Rounded once to the dtype; before that come the four products and sums of an element, and 16 u of a Gram's norm."""
    accumulation = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    for result, before, exact in zip(actual, originals, expected, strict=True):
        step = np.abs(exact - to_numpy(before))
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        bound = (
            UNIT_ROUNDOFF[dtype] * np.abs(exact) + 8 * accumulation * (step + np.abs(exact)) + 16 * accumulation * step + tiny
        )
        assert (np.abs(to_numpy(result) - exact) <= bound).all()


def parameters(dtype=torch.float32, seed=3) -> list[Tensor]:
    return random_gradients(1, SHAPES, dtype, seed)[0]


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("groups", [None, [4, 2], [0, 6]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturb_matches_float64_and_restores_to_the_bit(backend, dtype, groups, adaptive):
    params, grads = parameters(dtype), parameters(dtype, 4)
    grads[2] = None
    values, places = [p.clone() for p in params], [p.data_ptr() for p in params]
    rho = 0.3 if groups is None else [0.3, 2.0]
    expected = expected_perturbed(params, grads, rho, adaptive, groups)

    originals = mtl.perturb_(params, grads, rho, adaptive=adaptive, groups=groups)

    assert_perturbed(params, values, expected, dtype)
    assert all(torch.equal(o, v) for o, v in zip(originals, values, strict=True))
    mtl.restore_(params, originals)
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
    assert [p.data_ptr() for p in params] == places


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("numel", [0, 1, 7, 9, 255, 257, 2049, CHUNK - 1, CHUNK + 1, 2**21 + 3])
def test_perturb_sizes(backend, numel, adaptive):
    """The largest is stored past the caches."""
    params = random_gradients(1, [(numel,), (5,)], seed=3)[0]
    grads = random_gradients(1, [(numel,), (5,)], seed=4)[0]
    expected = expected_perturbed(params, grads, 0.5, adaptive)
    values = [p.clone() for p in params]
    mtl.perturb_(params, grads, 0.5, adaptive=adaptive)
    assert_perturbed(params, values, expected, torch.float32)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in EXPANDED])
@pytest.mark.parametrize("of", ["params", "grads", "both"])
def test_perturb_layouts(backend, layout, of):
    params = random_gradients(1, LAYOUT_SHAPES, seed=3)[0]
    grads = random_gradients(1, LAYOUT_SHAPES, seed=4)[0]
    if of != "grads":
        params = [LAYOUTS[layout](p) for p in params]
    if of != "params":
        grads = [LAYOUTS[layout](g) for g in grads]
    expected = expected_perturbed(params, grads, 0.5, True)
    values = [p.clone() for p in params]
    originals = mtl.perturb_(params, grads, 0.5, adaptive=True)
    assert_perturbed(params, values, expected, torch.float32)
    mtl.restore_(params, originals)
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_zero_gradient_moves_nothing(backend, adaptive):
    params = parameters()
    values = [p.clone() for p in params]
    mtl.perturb_(params, [torch.zeros_like(p) for p in params], 0.5, adaptive=adaptive)
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
    mtl.perturb_(params, parameters(seed=4), 0.0, adaptive=adaptive)
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
    originals = mtl.perturb_(params, [None] * len(params), 0.5, adaptive=adaptive)
    assert all(o.data_ptr() == p.data_ptr() for o, p in zip(originals, params, strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_perturb_far_from_unit_scale(backend, scale):
    params, grads = parameters(), [g * scale for g in parameters(seed=4)]
    for adaptive in (False, True):
        own = [p.clone() for p in params]
        expected = expected_perturbed(own, grads, 0.5, adaptive)
        mtl.perturb_(own, grads, 0.5, adaptive=adaptive)
        assert_perturbed(own, params, expected, torch.float32)


def test_squared_norms(backend):
    params, grads = parameters(), parameters(seed=4)
    for adaptive in (False, True):
        expected = [((to_numpy(p) if adaptive else 1) * to_numpy(g)) ** 2 for p, g in zip(params, grads, strict=True)]
        actual = squared_norms(params, grads, adaptive)
        torch.testing.assert_close(actual, torch.tensor([e.sum() for e in expected]), rtol=2e-6, atol=0)


def test_buffers_are_used_again_and_autograd_follows(backend):
    model = torch.nn.Linear(5, 3)
    params = list(model.parameters())
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad(model(x).square().mean(), params)
    buffers = [torch.full_like(p, torch.nan) for p in params]
    for _ in range(2):
        originals = mtl.perturb_(params, grads, 0.1, buffers=buffers)
        assert [p.data_ptr() for p in params] == [b.data_ptr() for b in buffers]
        sam = torch.autograd.grad(model(x).square().mean(), params)
        mtl.restore_(params, originals)
        plain = torch.nn.Linear(5, 3)
        plain.load_state_dict({"weight": buffers[0], "bias": buffers[1]})
        expected = torch.autograd.grad(plain(x).square().mean(), list(plain.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(sam, expected, strict=True))
    assert list(model.parameters()) == params
    assert all(p.requires_grad and p.is_leaf for p in params)


def test_in_place_and_overlapping_buffers_of_the_op(backend):
    params, grads = random_gradients(1, [(40,), (30,)], seed=3)[0], random_gradients(1, [(40,), (30,)], seed=4)[0]
    radii = torch.tensor([0.5, 2.0], dtype=torch.float64)
    expected = [p.double() + r * p.double() ** 2 * g.double() for p, g, r in zip(params, grads, radii, strict=True)]
    for out in (params, grads):
        own = [[t.clone() for t in part] for part in (params, grads)]
        target = own[0] if out is params else own[1]
        OPS.perturb_(target, *own, radii, True)
        torch.testing.assert_close([t.double() for t in target], expected, rtol=1e-6, atol=1e-6)
    base = torch.randn(100, generator=torch.Generator().manual_seed(0))
    first, second = base[:60].clone(), base[30:90].clone()
    OPS.perturb_([base[10:70]], [base[:60]], [base[30:90]], radii[:1], False)
    torch.testing.assert_close(base[10:70], first + 0.5 * second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": 1}, "lists 1 tensors"),
        ({"rho": -1.0}, "rho is -1.0"),
        ({"rho": float("nan")}, "rho is nan"),
        ({"rho": [1.0, 2.0]}, "rho lists 2 radii"),
        ({"groups": [1]}, "sizes that add up to the 2 parameters"),
        ({"shape": True}, r"grads\[1\] \(tensor 1\) has shape|grads.*has shape"),
        ({"integer": True}, r"params\[0\] is torch.int64"),
        ({"buffers": 1}, "lists 1 tensors"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_perturbations_change_nothing(backend, change, message):
    params, grads = [torch.ones(4), torch.ones(5)], [torch.ones(4), torch.ones(5)]
    options = {"groups": change.get("groups")}
    if "grads" in change:
        grads = grads[:1]
    if "shape" in change:
        grads[1] = torch.ones(6)
    if "integer" in change:
        params[0] = torch.ones(4, dtype=torch.int64)
    if "buffers" in change:
        options["buffers"] = [torch.ones(4)]
    places = [p.data_ptr() for p in params]
    with pytest.raises(ValueError, match=message):
        mtl.perturb_(params, grads, change.get("rho", 0.1), **options)
    assert [p.data_ptr() for p in params] == places
    assert all((p == 1).all() for p in params)


def test_autocast_sees_the_perturbed_parameters():
    """Its cache holds 16-bit copies of the parameters for as long as a block lasts."""
    model = torch.nn.Linear(64, 64)
    x = torch.ones(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        originals = mtl.perturb_(list(model.parameters()), [torch.ones_like(p) for p in model.parameters()], 50.0)
        assert not torch.equal(model(x), before)
        mtl.restore_(list(model.parameters()), originals)
        assert torch.equal(model(x), before)

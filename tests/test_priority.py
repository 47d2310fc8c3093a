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


# --- priority_combine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_layers_in_one_call(backend, dtype, num_tasks):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    top = random_tops(num_tasks, channels_of(grads))
    top[1] = None
    top[2] = torch.full_like(top[2], num_tasks - 1)
    before = snapshot(grads)
    for skip in (True, False):
        assert_combined(mtl.priority_combine(grads, top, skip_degenerate=skip), grads, top, skip)
    assert_unchanged(before)
    for n, tops in enumerate(top):
        if tops is not None:
            assert_combined([mtl.priority_combine([row[n] for row in grads], tops)], [[row[n]] for row in grads], [tops])


@pytest.mark.parametrize("rest", [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 511, 512, 513, 2047, 2048, 2049, 65537])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_around_vectors_and_blocks(backend, dtype, rest):
    for num_tasks, channels in ((2, 5), (3, 1), (9, 3)):
        grads = random_gradients(num_tasks, [(channels, rest)], dtype)
        top = random_tops(num_tasks, [channels])
        assert_combined(mtl.priority_combine(grads, top, skip_degenerate=False), grads, top, False)


@pytest.mark.parametrize("shape", [(2048, 64), (1024, 33), (3, 70000), (1, 140000), (140000,)], ids=str)
def test_layers_of_several_chunks(backend, shape):
    grads = random_gradients(3, [shape, (5, 3), shape])
    top = random_tops(3, channels_of(grads))
    assert_combined(mtl.priority_combine(grads, top, skip_degenerate=False), grads, top, False)


def test_results_too_large_for_the_caches(backend):
    """Results of 8 MiB and more are stored past the caches; channels do not begin where cache lines do."""
    grads = random_gradients(2, [(700, 1501), (300, 3500)])
    top = random_tops(2, [700, 300])
    assert_combined(mtl.priority_combine(grads, top), grads, top)
    out = [torch.empty_like(t) for t in grads[0]]
    assert_combined(mtl.priority_combine(grads, top, out=out), grads, top)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 9])
def test_none_rows(backend, num_tasks):
    grads = random_gradients(num_tasks, [(5, 4), (40, 2), (6,), (3, 3), (300,)])
    missing = [(k, 1) for k in range(num_tasks)] + [(k, n) for k in range(num_tasks) for n in (0, 3, 4) if (k + n) % 3 == 0]
    sparse = drop(grads, *missing)
    top = random_tops(num_tasks, channels_of(grads))
    assert_combined(mtl.priority_combine(sparse, top), sparse, top)


def test_an_absent_top_task_projects_nothing(backend):
    grads = drop(random_gradients(3, [(8, 5)]), (1, 0))
    top = [torch.ones(8, dtype=torch.int64)]
    assert_combined(mtl.priority_combine(grads, top, skip_degenerate=False), grads, [None])


def test_an_index_that_is_no_task_leaves_its_channel_plain(backend):
    grads = random_gradients(3, [(6, 5)])
    top = torch.tensor([0, -1, 1, 3, 2, -(2**40)])
    assert_combined(mtl.priority_combine(grads, [top]), grads, [top])


def test_one_top_task_for_all_channels(backend):
    """Degenerate: a plain sum, unless asked otherwise. Channels without a top task count, too."""
    grads = random_gradients(2, [(6, 5)])
    same = torch.ones(6, dtype=torch.int64)
    plain = grads[0][0] + grads[1][0]
    torch.testing.assert_close(mtl.priority_combine(grads, [same])[0], plain)
    assert not torch.allclose(mtl.priority_combine(grads, [same], skip_degenerate=False)[0], plain)
    one_without = same.clone()
    one_without[3] = -1
    assert_combined(mtl.priority_combine(grads, [one_without]), grads, [one_without])
    assert not torch.allclose(mtl.priority_combine(grads, [one_without])[0], plain)


def test_nothing_to_combine(backend):
    assert mtl.priority_combine([[], []], []) == []
    assert mtl.priority_combine([], []) == []
    assert mtl.priority_combine([[None], [None]], [None]) == [None]
    for shape in [(0,), (0, 5), (5, 0)]:
        grads = random_gradients(2, [shape, (3, 2)])
        top = random_tops(2, [shape[0], 3])
        first, second = mtl.priority_combine(grads, top)
        assert first.shape == shape
        assert_combined([second], [[row[1]] for row in grads], top[1:])
    (scalar,) = mtl.priority_combine([[torch.tensor(2.0)], [torch.tensor(-1.0)]], [torch.tensor([0])], False)
    assert scalar == 2  # task 1 is opposite: nothing of it is left


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("num_tasks", [2, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_that_is_not_finite_stays_in_its_channels_and_groups(backend, dtype, num_tasks, bad):
    grads = random_gradients(num_tasks, [(6, 40)], dtype)
    top = torch.tensor([0, 0, 1, 1, 0, 1])
    expected = mtl.priority_combine(grads, [top])[0]
    grads[1][0][2, 3] = bad
    actual = mtl.priority_combine(grads, [top])[0]
    assert not actual[2, 3].isfinite()
    assert actual[top == 0].equal(expected[top == 0])


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("num_tasks", [2, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_and_small_gradients(backend, dtype, num_tasks, scale):
    grads = random_gradients(num_tasks, [(7, 65), (4, 2000)], dtype, scale=scale)
    top = random_tops(num_tasks, [7, 4])
    assert_combined(mtl.priority_combine(grads, top), grads, top)


def test_gradients_of_very_different_size(backend):
    """alpha is about 1e40, beyond float32; what it adds is not."""
    grads = [torch.full((4, 8), 1e-20), torch.full((4, 8), -1e20), torch.zeros(4, 8)]
    top = torch.tensor([0, 0, 2, 2])
    actual = mtl.priority_combine(grads, top)
    assert (actual[:2].abs() <= 1e20 * 2.0**-22).all()  # task 1 is opposite to task 0
    assert (actual[2:] == -1e20).all()


# --- layouts and buffers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(backend, dtype, layout):
    values = random_gradients(3, LAYOUT_SHAPES, dtype)
    grads = [[LAYOUTS[layout](g) for g in row] for row in values]
    top = random_tops(3, channels_of(grads))
    assert_combined(mtl.priority_combine(grads, top), grads, top)
    if layout in EXPANDED:
        return
    expected = [[t.clone() for t in row] for row in grads]
    assert_combined(mtl.priority_combine(grads, top, out=grads[1]), expected, top)


def test_rows_of_one_tensor_may_differ_in_layout(backend):
    layouts = list(LAYOUTS.values())
    values = random_gradients(len(layouts), LAYOUT_SHAPES)
    grads = [[layouts[(k + n) % len(layouts)](g) for n, g in enumerate(row)] for k, row in enumerate(values)]
    top = random_tops(len(layouts), channels_of(grads))
    assert_combined(mtl.priority_combine(grads, top), grads, top)


def test_strided_tops(backend):
    grads = random_gradients(3, [(6, 5)])
    top = random_tops(3, [12])[0][::2]
    assert_combined(mtl.priority_combine(grads, [top]), grads, [top])


@pytest.mark.parametrize("row", [0, 1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(backend, dtype, row):
    grads = random_gradients(3, [*SHAPES, (300, 900)], dtype)
    top = random_tops(3, channels_of(grads))
    expected = [[t.clone() for t in own] for own in grads]
    versions = [t._version for t in grads[row]]
    out = mtl.priority_combine(grads, top, out=grads[row])
    assert all(a is b for a, b in zip(out, grads[row], strict=True))
    assert all(t._version > version for t, version in zip(out, versions, strict=True))
    assert_combined(out, expected, top)
    layer = [t.clone() for t in (own[-1] for own in expected)]
    assert mtl.priority_combine(layer, top[-1], out=layer[0]) is layer[0]


def test_buffers_that_overlap_other_gradients(backend):
    memory = random_gradients(1, [(400,)])[0][0]
    grads = [[memory[:60].view(6, 10), memory[10:50].view(4, 10)], [memory[130:190].view(6, 10), memory[20:60].view(4, 10)]]
    expected = [[t.clone() for t in row] for row in grads]
    top = random_tops(2, [6, 4])
    out = [torch.zeros(6, 10), memory[:40].view(4, 10)]
    assert_combined(mtl.priority_combine(grads, top, out=out), expected, top)
    assert mtl.priority_combine(drop(expected, (0, 1), (1, 1)), [top[0], None], out=[out[0], None])[1] is None


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_with_any_number_of_threads(cpu_library, threads):
    grads = random_gradients(3, [(300, 900), (7, 3), (20, 33), (2, 150000)])
    top = random_tops(3, channels_of(grads))
    with mtl.use_backend("cpp"):
        expected = mtl.priority_combine(grads, top)
        torch.set_num_threads(threads)
        try:
            again = mtl.priority_combine(grads, top)
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


# --- connection_strength ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 9])
def test_strengths_of_all_layers_in_one_call(backend, dtype, num_tasks):
    generator = torch.Generator().manual_seed(num_tasks)
    weights = [torch.randn(s, generator=generator).to(dtype) for s in [(7,), (33, 5), (4, 2, 3, 3), (300, 64), (0, 3)]]
    scales = [torch.randn(num_tasks, len(w), generator=generator).to(dtype).requires_grad_() for w in weights]
    variances = [torch.rand(num_tasks, len(w), generator=generator).to(dtype) for w in weights]
    strengths, tops = mtl.connection_strength(weights, scales, variances, eps=1e-3)
    for weight, scale, variance, strength, top in zip(weights, scales, variances, strengths, tops, strict=True):
        assert (strength.dtype, top.dtype, top.shape) == (torch.float64, torch.int64, (len(weight),))
        expected = double_loop_strength(*(to_numpy(t) for t in (weight, scale, variance)), 1e-3)
        # |W_p|^2 is a sum of products in float32, or float64; all else is float64.
        np.testing.assert_allclose(strength.numpy(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-6)
        if len(weight):
            assert torch.equal(strength.gather(0, top[None])[0], strength.amax(0))


@pytest.mark.parametrize("channels", [1, 2, 5, 8, 33, 511, 512, 513, 2049])
@pytest.mark.parametrize("num_tasks", [2, 3, 4, 5, 8, 17])
def test_equal_tasks_tie_exactly(backend, num_tasks, channels):
    """Whatever sums the tasks in groups of lanes must not tell them apart; of strided rows, too."""
    generator = torch.Generator().manual_seed(channels)
    weight = torch.randn(channels, 9, generator=generator)
    scale, variance = torch.randn(1, channels, generator=generator), torch.rand(1, channels, generator=generator)
    for order in (lambda t: t.expand(num_tasks, -1), lambda t: t.repeat(num_tasks, 1).T.contiguous().T):
        strength, top = mtl.connection_strength(weight, order(scale), order(variance))
        assert (strength == strength[0]).all()
        assert not top.any()
    later = scale.repeat(num_tasks, 1)
    later[0, 1:] = 0  # the first task has only the first channel: the others tie from the second on
    assert torch.equal(
        mtl.connection_strength(weight, later, variance.repeat(num_tasks, 1))[1][1:], torch.ones(channels - 1).long()
    )


def test_tasks_without_strength_and_strengths_that_are_not_finite(backend):
    weight = torch.eye(3)
    scale, variance = torch.ones(3, 3), torch.ones(3, 3)
    scale[0] = 0
    strength, top = mtl.connection_strength(weight, scale, variance)
    assert (strength[0] == 0).all()
    assert torch.equal(top, torch.ones(3).long())
    strength, top = mtl.connection_strength(torch.zeros(3, 2), scale, variance)
    assert not strength.any()
    assert not top.any()
    scale[1, 2] = math.nan  # task 1 has no finite strength; task 2 has
    strength, top = mtl.connection_strength(weight, scale, variance)
    assert strength[1].isnan().all()
    assert torch.equal(top, torch.full((3,), 2))
    assert not mtl.connection_strength(weight, torch.full((2, 3), math.nan), torch.ones(2, 3))[1].any()


def test_scale_and_variance_of_different_dtypes(backend):
    weight, scale, variance = torch.randn(5, 3), torch.rand(2, 5, dtype=torch.bfloat16), torch.rand(2, 5)
    torch.testing.assert_close(
        mtl.connection_strength(weight, scale, variance), mtl.connection_strength(weight, scale.float(), variance)
    )


def test_no_layers(backend):
    assert mtl.connection_strength([], [], []) == ([], [])


# --- bad input ----------------------------------------------------------------------------------------------------------

G23 = [torch.ones(2, 3), torch.ones(2, 3)]
LONG2 = torch.zeros(2, dtype=torch.int64)
BAD_COMBINE = {
    "top too short": (lambda: mtl.priority_combine([[G23[0]], [G23[1]]], []), r"top lists 0 tensors, grads list 1"),
    "top of another size": (lambda: mtl.priority_combine(G23, torch.zeros(3).long()), r"top\[0\] has shape \(3,\).*take \[2\]"),
    "top is float": (lambda: mtl.priority_combine(G23, torch.zeros(2)), r"top\[0\] is torch.float32; pass int64 \[2\]"),
    "top is int32": (lambda: mtl.priority_combine(G23, LONG2.int()), r"top\[0\] is torch.int32"),
    "top is a list": (lambda: mtl.priority_combine([[G23[0]], [G23[1]]], [[0, 1]]), r"top\[0\] is list"),
    "top on another device": (lambda: mtl.priority_combine(G23, LONG2.to("meta")), r"top\[0\] is on meta"),
    "no gradient": (lambda: mtl.priority_combine([None, None], LONG2), "grads holds no tensor"),
    "ragged": (lambda: mtl.priority_combine([[G23[0]], []], [LONG2]), r"grads\[1\] \(task 1\) lists 0 tensors"),
    "shapes": (lambda: mtl.priority_combine([G23[0], torch.ones(2, 2)], LONG2), r"grads\[1\]\[0\].*has shape \(2, 2\)"),
    "dtype": (lambda: mtl.priority_combine([g.int() for g in G23], LONG2), r"grads\[0\]\[0\] is torch.int32"),
    "out too short": (lambda: mtl.priority_combine([[G23[0]], [G23[1]]], [LONG2], out=[]), "out lists 0 tensors"),
    "out of another shape": (lambda: mtl.priority_combine(G23, LONG2, out=torch.ones(3)), r"out\[0\] is \(3,\)"),
    "out overlaps itself": (
        lambda: mtl.priority_combine(G23, LONG2, out=torch.ones(1).expand(2, 3)),
        "shares memory with itself",
    ),
}
W3, ONES = torch.ones(3, 1), torch.ones(2, 3)
BAD_STRENGTH = {
    "lists": (lambda: mtl.connection_strength([W3], [], [ONES]), "scale lists 0 tensors, weight lists 1"),
    "scalar weight": (lambda: mtl.connection_strength(torch.tensor(1.0), ONES, ONES), r"weight\[0\] is a scalar"),
    "scale [C]": (lambda: mtl.connection_strength(W3, torch.ones(3), ONES), r"scale\[0\] has shape \(3,\).*\[K, 3\]"),
    "scale of others": (lambda: mtl.connection_strength(torch.ones(4), ONES, ONES), r"scale\[0\] has shape \(2, 3\).*\[K, 4\]"),
    "variance": (lambda: mtl.connection_strength(W3, ONES, torch.ones(1, 3)), r"running_var\[0\] has shape"),
    "no task": (lambda: mtl.connection_strength(W3, torch.ones(0, 3), torch.ones(0, 3)), "0 tasks"),
    "tasks": (lambda: mtl.connection_strength([torch.ones(3)] * 2, [ONES, ONES[:1]], [ONES, ONES[:1]]), r"scale\[1\] has 1"),
    "integers": (lambda: mtl.connection_strength(W3, ONES.int(), ONES), r"scale\[0\] is torch.int32"),
    "not a tensor": (lambda: mtl.connection_strength(W3, None, ONES), "scale is a NoneType"),
    "device": (lambda: mtl.connection_strength(W3, ONES, ONES.to("meta")), r"running_var\[0\] is on meta"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), (BAD_COMBINE | BAD_STRENGTH).values(), ids=BAD_COMBINE | BAD_STRENGTH)
def test_bad_input_says_what_and_where(backend, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_gradients_that_require_grad_are_refused(backend):
    with pytest.raises(RuntimeError, match=r"mtlkernels.priority_combine is not differentiable.*\.detach\(\)"):
        mtl.priority_combine([G23[0].clone().requires_grad_(), G23[1]], LONG2)


# --- theorem 1 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [2, 3, 5])
def test_theorem_1_on_quadratic_losses(num_tasks):
    """Each parameter subset stepping along its priority task's gradient lowers the joint loss at least as much as all along
    the weighted sum, for small steps (Jeong and Yoon 2024, Theorem 1); the priority task by Definition 3."""
    generator = torch.Generator().manual_seed(num_tasks)
    size, groups, rate = 24, 4, 1e-6
    roots = torch.randn(num_tasks, size, size, dtype=torch.float64, generator=generator)
    targets = torch.randn(num_tasks, size, dtype=torch.float64, generator=generator)
    parts = torch.arange(size).chunk(groups)
    for _ in range(20):
        weights = torch.rand(num_tasks, dtype=torch.float64, generator=generator)
        weights = weights / weights.sum()

        def joint(theta: Tensor, weights: Tensor = weights) -> Tensor:
            return sum(w * (a @ (theta - t)).square().sum() / 2 for w, a, t in zip(weights, roots, targets, strict=True))

        theta = torch.randn(size, dtype=torch.float64, generator=generator)
        grads = torch.stack([a.T @ (a @ (theta - t)) for a, t in zip(roots, targets, strict=True)])
        total = weights @ grads
        by_priority = theta.clone()
        for part in parts:
            steps = [theta.index_add(0, part, -rate * g[part]) for g in grads]
            first = torch.stack([joint(step) for step in steps]).argmin()
            assert first == (grads[:, part] @ total[part]).argmax()  # the proof's reading of Definition 3
            by_priority[part] -= rate * grads[first, part]
        assert joint(by_priority) <= joint(theta - rate * total) < joint(theta)

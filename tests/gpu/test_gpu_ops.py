"""Every op on a GPU against float64 on the CPU: the two backends, all classes of K, layouts, ranges, streams and graphs."""

import math
from collections.abc import Sequence

import pytest
import torch
from helpers import (
    DTYPES,
    EXPANDED,
    GRAM_TOLERANCE,
    LAYOUTS,
    UNIT_ROUNDOFF,
    assert_combined,
    assert_gram,
    drop,
    random_gradients,
)
from test_cross_optimizer import OPTIONS as CROSS_OPTIONS
from test_excess_risk import EPSILON, assert_risks, expected_risks, sums_of_squares
from test_excess_risk import factors_of as risk_factors_of
from test_finish import FEW, Twin, bounds, names, positive
from test_flat_ops import assert_pairs, assert_perturbed, expected_perturbed, paired, sam_gradients
from test_graddrop import SEED, leaks
from test_memory_ops import assert_moved, expected_update, factors_of, memories
from test_trimmed_mean import trims
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.elementwise import graddrop, trimmed_mean
from mtlkernels.gram_combine import gram_combine_
from mtlkernels.memory import excess_risk, memory_combine_
from mtlkernels.weightings import CROSS, MEMORY

Rows = Sequence[Sequence[Tensor | None]]
NUM_TASKS = [1, 2, 3, 4, 5, 8, 9, 16, 17, 40, 64]
SHAPES = [(7,), (129, 65), (64, 32, 3, 3), (), (1, 8191), (2, 8192)]


def onto(device: torch.device, grads: Rows) -> list[list[Tensor | None]]:
    return [[None if t is None else t.to(device) for t in row] for row in grads]


def home(result: Tensor | Sequence[Tensor | None]) -> Tensor | list[Tensor | None]:
    return result.cpu() if isinstance(result, Tensor) else [None if t is None else t.cpu() for t in result]


@pytest.mark.parametrize("per", ["model", "tensor", "channel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_gram(kernels, device, num_tasks, dtype, per):
    grads = drop(random_gradients(num_tasks, SHAPES, dtype), (num_tasks - 1, 1), (0, 2))
    assert_gram(home(mtl.gram(onto(device, grads), per=per)), grads, per=per)


@pytest.mark.parametrize("per", ["model", "tensor", "channel"])
@pytest.mark.parametrize(("num_tasks", "num_other"), [(1, 1), (3, 2), (8, 8), (20, 30)])
def test_cross_gram(kernels, device, num_tasks, num_other, per):
    grads = random_gradients(num_tasks, SHAPES)
    other = drop(random_gradients(num_other, SHAPES, seed=1), (0, 1))
    assert_gram(home(mtl.gram(onto(device, grads), onto(device, other), per=per)), grads, other, per=per)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per", ["model", "channel"])
def test_layouts(kernels, device, layout, per):
    grads = [[LAYOUTS[layout](t.to(device)) for t in row] for row in random_gradients(3, [(6, 4, 5, 3), (37, 67)])]
    plain = [[t.cpu().clone() for t in row] for row in grads]
    assert_gram(home(mtl.gram(grads, per=per)), plain, per=per)
    weights = torch.tensor([0.5, -2.0, 0.25], dtype=torch.float64)
    assert_combined(home(mtl.combine(grads, weights.to(device))), plain, weights, same_layout=False)
    if layout not in EXPANDED:
        first = list(grads[0])
        mtl.combine(grads, weights.to(device), out=first)
        assert_combined(home(first), plain, weights, same_layout=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_combine(kernels, device, num_tasks, dtype):
    grads = drop(random_gradients(num_tasks, SHAPES, dtype), (0, 2))
    if num_tasks == 1:
        grads[0][2] = torch.zeros(SHAPES[2], dtype=dtype)
    weights = torch.randn(num_tasks, dtype=torch.float64)
    weights[-1] = 0 if num_tasks > 2 else weights[-1]
    assert_combined(home(mtl.combine(onto(device, grads), weights.to(device))), grads, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_combine_with_weights_for_each_channel(kernels, device, num_tasks, dtype):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    weights = [torch.randn(t.shape[0] if t.dim() else 1, num_tasks, dtype=torch.float64) for t in grads[0]]
    actual = home(mtl.combine(onto(device, grads), [w.to(device) for w in weights]))
    for n, (result, own) in enumerate(zip(actual, weights, strict=True)):
        for channel, each in enumerate(own):
            rows = [[row[n] if result.dim() == 0 else row[n][channel]] for row in grads]
            assert_combined([result if result.dim() == 0 else result[channel]], rows, each)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tasks", "num_results"), [(2, 2), (3, 5), (8, 8), (17, 4), (64, 64)])
def test_mix(kernels, device, num_tasks, num_results, dtype):
    grads = drop(random_gradients(num_tasks, SHAPES, dtype), (1, 1))
    coefficients = torch.randn(num_results, num_tasks, dtype=torch.float64)
    for weights, row in zip(coefficients, mtl.mix(onto(device, grads), coefficients.to(device)), strict=True):
        assert_combined(home(row), grads, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_graddrop_gives_the_bits_of_the_cpu(kernels, device, num_tasks, dtype):
    rows = random_gradients(num_tasks, [*SHAPES, (2**20 + 3,)], dtype)
    active = torch.arange(num_tasks) % 3 != 1
    expected = graddrop(rows, leaks(num_tasks), SEED, active)
    actual = graddrop(onto(device, rows), leaks(num_tasks).to(device), SEED.to(device), active.to(device))
    assert all(a.cpu().equal(e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("mode", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_dropout_gives_the_bits_of_the_cpu(kernels, device, dtype, mode):
    grads = random_gradients(1, [*SHAPES, (2**20 + 3,)], dtype)[0]
    expected = mtl.gradient_dropout(grads, 0.3, mode, SEED)
    leaves = [g.to(device).requires_grad_() for g in grads]
    actual = mtl.gradient_dropout(leaves, 0.3, mode, SEED.to(device))
    slopes = torch.autograd.grad(actual, leaves, [g.detach() for g in leaves])
    for results in (actual, slopes):
        assert all(a.detach().cpu().equal(e) for a, e in zip(results, expected, strict=True))
    invalid = torch.tensor(1.5, dtype=torch.float64, device=device)
    assert all(t.isnan().all() for t in mtl.gradient_dropout([g.detach() for g in leaves], invalid, mode, SEED.to(device)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_trimmed_mean_gives_the_bits_of_the_cpu(kernels, device, num_tasks, dtype):
    rows = random_gradients(num_tasks, [*SHAPES, (2**20 + 3,)], dtype)
    for trim in trims(num_tasks):
        for active in (None, torch.arange(num_tasks) % 3 != 1):
            expected = trimmed_mean(rows, trim, active)
            actual = trimmed_mean(onto(device, rows), trim, None if active is None else active.to(device))
            assert all(a.cpu().equal(e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("form", ["difference", "product"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 8, 9, 20, 32])
def test_pairs_of_rows(kernels, device, num_tasks, dtype, form):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    sam = sam_gradients(grads)
    grads, sam = drop(grads, (0, 2)), drop(sam, (num_tasks - 1, 1))
    assert_pairs(home(paired(onto(device, grads), onto(device, sam), "tensor", form)), grads, sam, "tensor", form)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturb(kernels, device, dtype, adaptive):
    params, grads = random_gradients(1, SHAPES, dtype, 3)[0], random_gradients(1, SHAPES, dtype, 4)[0]
    grads[1] = None
    moved = [p.to(device) for p in params]
    expected = expected_perturbed(params, grads, [0.3, 2.0], adaptive, [2, 4])
    originals = mtl.perturb_(moved, onto(device, [grads])[0], [0.3, 2.0], adaptive=adaptive, groups=[2, 4])
    assert_perturbed(home(moved), params, expected, dtype)
    mtl.restore_(moved, originals)
    assert all(torch.equal(m.cpu(), p) for m, p in zip(moved, params, strict=True))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_gram_combine(kernels, device, num_tasks, dtype, scale, in_place):
    grads = random_gradients(num_tasks, SHAPES, dtype, scale=1.0 if dtype == torch.float16 else scale)
    weights, moved = torch.randn(num_tasks, dtype=torch.float64), onto(device, grads)
    gram = mtl.gram(moved)
    out = moved[0] if in_place else [torch.full_like(t, math.nan) for t in moved[0]]
    assert torch.equal(gram_combine_(out, moved, weights.to(device)), gram)
    assert_combined(home(out), grads, weights)


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_memory_combine(kernels, device, num_tasks, dtype, squares):
    grads, factors = random_gradients(num_tasks, SHAPES, dtype), factors_of(num_tasks)
    memory = memories(grads)
    expected = expected_update(memory, grads, factors, squares)
    moved, out = onto(device, memory), [torch.full_like(t, math.nan, device=device) for t in grads[0]]
    memory_combine_(out, moved, onto(device, grads), factors.to(device), squares)
    assert_moved(home(out), [home(row) for row in moved], expected, [dtype] * len(SHAPES))


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e22])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_excess_risk(kernels, device, num_tasks, dtype, scale):
    grads = random_gradients(num_tasks, SHAPES, dtype, scale=1.0 if dtype == torch.float16 else scale)
    grads = drop(grads, (num_tasks - 1, 1), (0, 2))
    memory, factor = sums_of_squares(random_gradients(num_tasks, SHAPES, dtype)), risk_factors_of(num_tasks)
    risks = [excess_risk(onto(device, memory), onto(device, grads), factor.to(device), EPSILON) for _ in range(2)]
    assert_risks(risks[0], expected_risks(memory, grads, factor), grads)
    assert torch.equal(*risks)


@pytest.mark.parametrize(("decoupled", "options"), FEW, ids=names)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_finish(kernels, device, num_tasks, dtype, decoupled, options):
    grads, weights = random_gradients(num_tasks, SHAPES, dtype), positive(num_tasks)
    twin = Twin(random_gradients(1, SHAPES, dtype, seed=9)[0], decoupled, **options)
    for _ in range(2):
        before, wide = twin.copy(torch.Tensor.double), twin.copy(torch.Tensor.double)
        wide.step([[t.double() for t in row] for row in grads], weights)
        there = twin.copy(lambda t: t.to(device))
        there.lr = there.lr.to(device)
        with torch.device(device):  # where the step counts are made
            there.step(onto(device, grads), weights.to(device), torch.tensor(False))
        twin = there.copy(torch.Tensor.cpu)
        twin.lr = twin.lr.cpu()
        for actual, expected, bound in zip(
            twin.tensors(), wide.tensors(), bounds(before, wide, grads, weights, dtype), strict=True
        ):
            assert ((actual.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("name", [*MEMORY, *CROSS])
def test_weightings_of_memories_and_of_two_batches_are_those_of_the_cpu(kernels, device, name):
    here, there = (mtl.get_weighting(name, **CROSS_OPTIONS.get(name, {})) for _ in range(2))
    losses = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    for seed in range(4):
        grads = random_gradients(3, SHAPES, torch.float64, seed)
        other = random_gradients(3, SHAPES, torch.float64, seed + 10) if name in CROSS else None
        expected = mtl.aggregate(grads, here, losses=losses, other=other)
        moved = None if other is None else onto(device, other)
        actual = mtl.aggregate(onto(device, grads), there, losses=losses.to(device), other=moved)
        torch.testing.assert_close(home(actual), expected, rtol=1e-9, atol=1e-9)


def test_project_removes_every_conflict_with_one_direction(kernels, device):
    grads = random_gradients(4, SHAPES)
    onto_row = random_gradients(1, SHAPES, seed=3)[0]
    projected = [home(row) for row in mtl.project(onto(device, grads), onto=onto(device, [onto_row])[0])]
    inner = mtl.gram(projected, [onto_row])
    scale = mtl.gram([onto_row]).sqrt() * mtl.gram(projected).diagonal().sqrt()[:, None]
    assert (inner >= -1e-6 * scale).all()


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e25])
@pytest.mark.parametrize("num_tasks", [2, 8, 11, 40])
def test_squares_outside_float32(kernels, device, num_tasks, size):
    grads = [[t * (size if k else 1.0) for t in row] for k, row in enumerate(random_gradients(num_tasks, [(100, 90)]))]
    assert_gram(home(mtl.gram(onto(device, grads))), grads)
    assert_gram(home(mtl.gram(onto(device, grads), per="channel")), grads, per="channel")


@pytest.mark.parametrize("num_tasks", [2, 8, 11, 40])
def test_a_bad_value_stays_in_its_row_and_column(kernels, device, num_tasks):
    grads = random_gradients(num_tasks, [(300, 70)])
    clean = home(mtl.gram(onto(device, grads)))
    grads[1][0][5, 5] = math.nan
    dirty = home(mtl.gram(onto(device, grads)))
    assert dirty[1].isnan().all()
    assert dirty[:, 1].isnan().all()
    keep = torch.arange(num_tasks) != 1
    torch.testing.assert_close(dirty[keep][:, keep], clean[keep][:, keep], rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("num_tasks", [2, 8, 16, 40])
def test_equal_gradients_lose_little(kernels, device, num_tasks):
    # A sum on the tensor cores is cut off rather than rounded: chains are short, so that this does not add up.
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        row = torch.full((3, 8192), 0.1234567, device=device).to(dtype)
        value = row[0, 0].double().item() ** 2 * row.numel()
        assert (mtl.gram([[row]] * num_tasks) / value - 1).abs().max().item() <= 1e-6


def test_any_run_gives_the_same_bits(kernels, device):
    grads = onto(device, random_gradients(11, [(513, 1000), (77,)]))
    first = mtl.gram(grads)
    assert all(torch.equal(first, mtl.gram(grads)) for _ in range(20))


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 8, 16, 40, 64])
def test_the_k_x_k_stage_has_the_bits_of_the_cpu(device, num_tasks):
    grams = mtl.gram(random_gradients(num_tasks, [(40, 300)] * 5), per="tensor")
    grams[1, :, -1] = grams[1, -1, :] = 0  # a task without a gradient
    grams[2, :, -1], grams[2, -1, :] = grams[2, :, 0].clone(), grams[2, 0, :].clone()
    grams[2, -1, -1] = grams[2, 0, 0]  # and one twice
    seed = torch.tensor(7)
    order = torch.stack([torch.randperm(num_tasks) for _ in range(5 * num_tasks)]).view(5, num_tasks, num_tasks)
    active = torch.ones(5, num_tasks, dtype=torch.bool)
    active[3, 0] = num_tasks == 1
    values = torch.full((num_tasks,), 0.25, dtype=torch.float64)
    ops = torch.ops.mtlkernels
    calls = {
        "cosine": lambda d: ops.cosine(grams.to(d)),
        "magnitude_similarity": lambda d: ops.magnitude_similarity(grams.to(d)),
        "conflict_rate": lambda d: ops.conflict_rate(grams.to(d)),
        "condition_number": lambda d: ops.condition_number(grams.to(d)),
        "projection_coefficients": lambda d: ops.projection_coefficients(grams.to(d), order.to(d), True),
        "pcgrad_weights": lambda d: ops.pcgrad_weights(grams.to(d), seed.to(d)),
        "mgda_weights": lambda d: ops.mgda_weights(grams.to(d), active.to(d)),
        "cagrad_weights": lambda d: ops.cagrad_weights(grams.to(d), active.to(d), 0.4),
        "conicgrad_weights": lambda d: ops.conicgrad_weights(grams.to(d), active.to(d), 0.9),
        "fairgrad_weights": lambda d: ops.fairgrad_weights(grams.to(d), active.to(d), 2.0),
        "upgrad_weights": lambda d: ops.upgrad_weights(grams.to(d), active.to(d), None),
        "dualproj_weights": lambda d: ops.dualproj_weights(grams.to(d), active.to(d), None),
        "pcd_weights": lambda d: ops.pcd_weights(grams.to(d), active.to(d), values.to(d)),
        "config_weights": lambda d: ops.config_weights(grams.to(d), active.to(d), None, 1e-14),
        "imtl_g_weights": lambda d: ops.imtl_g_weights(grams.to(d), active.to(d), 1e-14),
        "aligned_mtl_weights": lambda d: ops.aligned_mtl_weights(grams.to(d), active.to(d), values.to(d), 1, 1e-14),
        "gradvac_weights": lambda d: ops.gradvac_weights(grams.to(d), (0 * grams).to(d), None, seed.to(d), 0.5, 0.0)[0],
    }
    for name, call in calls.items():
        assert torch.equal(call(device).cpu().nan_to_num(7.0), call("cpu").nan_to_num(7.0)), name


# --- streams, devices, graphs, size -------------------------------------------------------------------------------------


def test_ops_run_on_the_current_stream(kernels, gpu):
    grads = [[torch.zeros(1 << 20, device=gpu)] for _ in range(3)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a launch on any other stream reads the zeros before they are gone
        for row in grads:
            row[0].fill_(1)
        gram = mtl.gram(grads)
        combined = mtl.combine(grads, torch.ones(3, device=gpu, dtype=torch.float64))
        weights = mtl.CAGrad()(gram)
    stream.synchronize()
    assert (gram == 1 << 20).all()
    assert (combined[0] == 3).all()
    torch.testing.assert_close(weights, torch.full_like(weights, weights[0].item()))


def test_ops_run_on_the_gradients_device(kernels, gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    grads = [[torch.ones(1000, device="cuda:1")] for _ in range(2)]
    with torch.cuda.device(0):
        assert (mtl.gram(grads).cpu() == 1000).all()
        combined = mtl.combine(grads, torch.ones(2, device="cuda:1", dtype=torch.float64))
        assert torch.cuda.current_device() == 0
    assert combined[0].device == torch.device("cuda:1")


@pytest.mark.parametrize("weighting", ["mean", "pcgrad", "mgda", "cagrad"])
def test_a_captured_aggregate_follows_the_gradients(gpu, weighting):
    grads = onto(gpu, random_gradients(5, SHAPES))
    if weighting == "pcgrad":
        call = lambda: mtl.combine(grads, torch.ops.mtlkernels.pcgrad_weights(mtl.gram(grads), seed))  # noqa: E731
        seed = torch.tensor(3, device=gpu)
    else:
        module = mtl.get_weighting(weighting)
        call = lambda: mtl.aggregate(grads, module)  # noqa: E731
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for row, fresh in zip(grads, onto(gpu, random_gradients(5, SHAPES, seed=9)), strict=True):
        for old, new in zip(row, fresh, strict=True):
            old.copy_(new)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, call(), strict=True))


@pytest.mark.parametrize(
    "weighting", ["pcgrad", "gradvac", "mgda", "cagrad", "nash_mtl", "upgrad", "config", "pcd", *MEMORY, *CROSS]
)
def test_a_step_reads_nothing_on_the_host(gpu, weighting):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(64, 64), "a": torch.nn.Linear(64, 1), "b": torch.nn.Linear(64, 1)}).to(
        gpu
    )
    inner = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    optimizer = mtl.MultiTaskOptimizer(inner, weighting, shared=model["body"].parameters())

    def losses() -> dict[str, Tensor]:
        hidden = model["body"](torch.ones(8, 64, device=gpu)).tanh()
        return {"a": model["a"](hidden).square().mean(), "b": (model["b"](hidden) - 1).square().mean()}

    def step() -> None:
        optimizer.step(losses(), other=losses() if weighting in CROSS else None)

    step()  # state is made on first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_is_that_of_the_cpu(device):
    def train(where: str | torch.device) -> list[Tensor]:
        torch.manual_seed(0)
        body, heads = torch.nn.Linear(32, 16).double(), [torch.nn.Linear(16, 1).double() for _ in range(3)]
        model = torch.nn.ModuleList([body, *heads]).to(where)
        data = torch.linspace(-1, 1, 320, dtype=torch.float64).view(10, 32).to(where)
        optimizer = mtl.MultiTaskOptimizer(
            torch.optim.SGD(model.parameters(), 0.1), mtl.CAGrad(c=0.4), shared=body.parameters()
        )
        for _ in range(5):
            hidden = body(data).tanh()
            optimizer.step([(head(hidden) - k).square().mean() for k, head in enumerate(heads)])
        return [p.detach().cpu() for p in model.parameters()]

    for a, b in zip(train(device), train("cpu"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_compiled(device):
    grads = onto(device, random_gradients(3, [(65, 33), (7,)]))
    weighting = mtl.MGDA()
    eager = mtl.aggregate(grads, weighting)
    compiled = torch.compile(lambda rows: mtl.aggregate(rows, weighting), fullgraph=True)(grads)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_more_than_2_to_the_31_elements(kernels, gpu):
    size = (1 << 31) + 8 * 8192 + 3
    if torch.cuda.get_device_properties(gpu).total_memory < 5 * 2 * size:
        pytest.skip("needs 20 GB of GPU memory")
    rows = [torch.zeros(size, dtype=torch.bfloat16, device=gpu) for _ in range(2)]
    rows[0][-2:], rows[1][-2:] = 2, 3
    rows[0][1 << 31], rows[1][1 << 31] = 5, 7
    gram = mtl.gram([[row] for row in rows]).cpu()
    assert gram.tolist() == [[33, 47], [47, 67]]
    (combined,) = mtl.combine([[row] for row in rows], torch.tensor([1.0, 2.0], device=gpu))
    assert combined[-3:].tolist() == [0, 8, 8]
    assert combined[1 << 31].item() == 19
    assert combined.count_nonzero().item() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tasks", [2, 8, 16])
def test_large_gradients(kernels, gpu, num_tasks, dtype):
    torch.manual_seed(0)
    grads = [[torch.randn(23_500_000, device=gpu).to(dtype)] for _ in range(num_tasks)]
    expected = torch.stack([torch.stack([torch.dot(a.double(), b.double()) for (b,) in grads]) for (a,) in grads])
    norms = expected.diagonal().sqrt()
    assert ((mtl.gram(grads) - expected).abs() / (norms[:, None] * norms)).max().item() <= GRAM_TOLERANCE[dtype]
    weights = torch.randn(num_tasks, dtype=torch.float64, device=gpu)
    (combined,) = mtl.combine(grads, weights)
    exact = sum(w * g.double() for w, (g,) in zip(weights, grads, strict=True))
    size = sum(w.abs() * g.double().abs() for w, (g,) in zip(weights, grads, strict=True))
    bound = UNIT_ROUNDOFF[dtype] * exact.abs() + (num_tasks + 2) * 2.0**-24 * size * 1.01
    assert ((combined.double() - exact).abs() <= bound).all()

"""paired_gram and perturb_ on CUDA, launched as the library launches them and run in ptxsim, against float64."""

import numpy as np
import ptxsim
import pytest
import torch
from binding_faults import faulty_library
from device import FLOAT32, address, compile_kernels, requires_nvcc, testing_module
from helpers import DTYPES, LAYOUTS, assert_unchanged, drop, random_gradients, snapshot
from simulated import SimulatedCuda, simulated_cuda
from test_flat_ops import assert_pairs, assert_perturbed, expected_perturbed, paired, sam_gradients

import mtlkernels as mtl

pytestmark = requires_nvcc

CHUNK = 8192
SHAPES = [(3, 5), (), (257,), (0, 4), (CHUNK + 9,)]


@pytest.fixture
def device():
    with simulated_cuda() as device:
        yield device


@pytest.mark.parametrize("form", ["difference", "product"])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 8, 9, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(device, dtype, num_tasks, form):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    sam = sam_gradients(grads)
    before = snapshot([*grads, *sam])
    assert_pairs(paired(grads, sam, "tensor", form), grads, sam, "tensor", form)
    assert_unchanged(before)
    assert len(device.launches) == 2


@pytest.mark.parametrize("num_tasks", [2, 5])
def test_absent_and_misaligned_rows(device, num_tasks):
    grads = random_gradients(num_tasks, [(CHUNK + 5,), (100,), (50,)])
    sam = sam_gradients(grads)
    grads[0] = [LAYOUTS["misaligned"](t.view(1, -1)).view(-1) for t in grads[0]]
    every = [(k, 2) for k in range(num_tasks)]
    grads, sam = drop(grads, (1, 0), *every), drop(sam, (0, 1), *every)
    for form in ("difference", "product"):
        assert_pairs(paired(grads, sam, "tensor", form), grads, sam, "tensor", form)
    assert device.launches


def test_more_rows_than_a_launch_takes(device):
    grads = random_gradients(40, [(300,), (5, 3)])
    sam = sam_gradients(grads)
    assert_pairs(paired(grads, sam), grads, sam)


@pytest.mark.parametrize("num_tasks", [1, 3, 6])
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e25, 3e37])
def test_values_outside_float32(device, num_tasks, scale):
    grads = [
        [t * (scale if k else 1.0) for t in row] for k, row in enumerate(random_gradients(num_tasks, [(CHUNK + 5,), (40,)]))
    ]
    grads[-1][1].zero_()
    for sam in (sam_gradients(grads, 0.3), [[-t for t in row] for row in grads]):
        assert_pairs(paired(grads, sam), grads, sam)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 4, 8, 32])
def test_each_byte_is_read_once(device, dtype, num_tasks):
    grads = random_gradients(num_tasks, [(2 * CHUNK,)], dtype)
    sam = sam_gradients(grads)
    paired(grads, sam)
    report = device.launches[0].report
    for (row,) in [*grads, *sam]:
        assert report.alloc(row).load_bytes == row.nbytes
        assert report.alloc(row).load_sectors <= 1.02 * row.nbytes / 32


@pytest.mark.parametrize("num_tasks", [2, 5, 9])
def test_any_schedule_gives_the_same_bits(num_tasks):
    grads = random_gradients(num_tasks, [(CHUNK + 5,), (77,)])
    sam = sam_gradients(grads)
    results = []
    for seed in (None, 1, 2):
        with simulated_cuda(seed=seed):
            results.append(paired(grads, sam))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("share", [1e-1, 1e-2, 1e-3, 1e-4])
def test_an_update_of_small_flat_parts_loses_what_rounding_the_gradients_has_lost(device, share):
    """combine on the rows g and s with w - v and v, each flat part with a weight of 1 / |f|: sums in float32 cancel.

    g and s are themselves rounded to float32, which costs as many digits of f = s - g; each of the 2 K terms of a sum adds a
    few roundings of that size, at random.
    """
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(3, 4096, dtype=torch.float64, generator=generator)
    parts = share * torch.randn(3, 4096, dtype=torch.float64, generator=generator)
    w, v = 1 / grads.norm(dim=1), 1 / parts.norm(dim=1)
    first, second = grads.float(), (grads + parts).float()
    exact = w @ first.double() + v @ (second.double() - first.double())
    lost_by_inputs = (exact - (w @ grads + v @ parts)).norm()
    update = mtl.combine([[row] for row in (*first, *second)], torch.cat([w - v, v]))[0]
    assert device.launches
    assert (update.double() - exact).norm() < 3 * lost_by_inputs


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturb(device, dtype, adaptive):
    params, grads = random_gradients(1, SHAPES, dtype, 3)[0], random_gradients(1, SHAPES, dtype, 4)[0]
    params[2] = LAYOUTS["misaligned"](params[2].view(1, -1)).view(-1)
    grads[1] = None
    values = [p.clone() for p in params]
    expected = expected_perturbed(params, grads, [0.3, 2.0], adaptive, [2, 3])
    originals = mtl.perturb_(params, grads, [0.3, 2.0], adaptive=adaptive, groups=[2, 3])
    assert_perturbed(params, values, expected, dtype)
    mtl.restore_(params, originals)
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
    assert len(device.launches) == 3


def test_perturb_reads_and_writes_each_byte_once(device):
    params, grads = random_gradients(2, [(2 * CHUNK,)])
    buffers = [torch.empty(2 * CHUNK)]
    torch.ops.mtlkernels.perturb_(buffers, params, grads, torch.ones(1, dtype=torch.float64), True)
    report = device.launches[0].report
    for tensor, kind in ((params[0], "load"), (grads[0], "load"), (buffers[0], "store")):
        assert getattr(report.alloc(tensor), f"{kind}_bytes") == tensor.nbytes
        assert getattr(report.alloc(tensor), f"{kind}_sectors") == tensor.nbytes // 32
    assert report.alloc(buffers[0]).load_bytes == 0


@pytest.mark.parametrize("layout", ["transposed", "step_last", "window"])
def test_perturb_layouts_and_overlaps(device, layout):
    params = [LAYOUTS[layout](t) for t in random_gradients(1, [(37, 67)], seed=3)[0]]
    grads = random_gradients(1, [(37, 67)], seed=4)[0]
    values, expected = [p.clone() for p in params], expected_perturbed(params, grads, 0.5, True)
    mtl.perturb_(params, grads, 0.5, adaptive=True)
    assert_perturbed(params, values, expected, torch.float32)
    base = torch.randn(100, generator=torch.Generator().manual_seed(0))
    first, second = base[:60].clone(), base[30:90].clone()
    torch.ops.mtlkernels.perturb_([base[10:70]], [base[:60]], [base[30:90]], torch.ones(1, dtype=torch.float64), False)
    torch.testing.assert_close(base[10:70], first + second)


# --- the kernels alone, as test_planted_faults.py runs them ------------------------------------------------------------------


def run_kernel(num_rows: int, size: float = 1.0, numel: int = CHUNK + 37) -> None:
    """One tensor of float32 rows in pairs, in its class's kernel and against float64; ``size`` scales all but the first two."""
    random = np.random.default_rng(num_rows)
    rows = FLOAT32.random_row(random, [numel] * num_rows)
    for k, row in enumerate(rows):
        row *= np.float32(size if k > 1 else 1.0)
    rows_class, threads, shared = testing_module().gram_launch(0, num_rows)
    header, name = "paired_gram.cuh", "paired_gram_chunks" if rows_class <= 8 else "paired_gram_tensor_core"
    instance = f"{name}<float, {rows_class}>"
    module = compile_kernels(header, f"{instance}(const __grid_constant__ TensorTable, double*, PairForm)")
    ((table, blocks),) = testing_module().plan([[address(row) for row in rows]], [numel], num_rows)
    partials = ptxsim.empty((blocks, rows_class * (rows_class + 1) // 2), dtype=np.float64)
    module.launch(
        instance, blocks, threads, [table, partials, np.int32(1)], shared=shared, mem=rows, outputs=[partials], readonly=rows
    )
    values = np.stack([row.astype(np.float64) for row in rows])
    values[1::2] -= values[::2]
    expected, norms = values @ values.T, np.sqrt((values**2).sum(1))
    upper = np.triu_indices(num_rows)
    actual = np.zeros((rows_class, rows_class))
    actual[np.triu_indices(rows_class)] = partials.sum(0)
    assert (np.abs(actual[upper] - expected[upper]) <= 70 * FLOAT32.eps * np.outer(norms, norms)[upper]).all()


@pytest.mark.parametrize("num_rows", [2, 6, 8, 12, 34])
@pytest.mark.parametrize("size", [1.0, 1e-30])
def test_kernels_alone(num_rows, size):
    run_kernel(num_rows, size)


# --- faults -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", ["radius of the first", "device guard", "last element", "as they are", "wrong way round", "none"]
)
def test_a_planted_fault_is_caught(monkeypatch, fault):
    monkeypatch.setenv("PLANTED_FAULT", fault)

    def check() -> None:
        with simulated_cuda(faulty_library()) as device:
            test_perturb(device, torch.float32, True)
            grads = random_gradients(2, [(40,)])
            assert_pairs(paired(grads, sam_gradients(grads)), grads, sam_gradients(grads))

    if fault == "none":
        check()
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            check()


def test_the_simulated_device_has_the_ops(device: SimulatedCuda):
    assert {"paired_gram", "perturb_"} <= set(device.library.ops)

"""The Triton kernels of paired_gram and perturb_, run on the CPU from their PTX with their plans' launches, against float64."""

import pytest
import torch
from helpers import DTYPES, drop, random_gradients
from test_flat_ops import assert_pairs, assert_perturbed, sam_gradients
from triton_device import conflicts, misaligned, run

from mtlkernels.triton import gram, perturb

MANY = [pytest.param(k, marks=pytest.mark.slow) for k in (1, 4, 8, 16, 32)]


def run_paired(grads, sam, per="tensor", form="difference", **options) -> torch.Tensor:
    rows = [row for pair in zip(grads, sam, strict=True) for row in pair]
    columns = [list(column) for column in zip(*rows, strict=True)]
    launches, result = gram.plan(columns, len(rows), per, form=form)
    run_paired.reports = run(launches, columns, **options)
    return result


@pytest.mark.parametrize("form", ["difference", "product"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [2, 3, 5, *MANY])
def test_matches_float64_at_tails_and_chunks(dtype, num_tasks, form):
    grads = random_gradients(num_tasks, [(1,), (33, 5), (), (gram.CHUNK + 9,)], dtype)
    sam = sam_gradients(grads)
    assert_pairs(run_paired(grads, sam, form=form), grads, sam, "tensor", form)


@pytest.mark.parametrize("num_tasks", [3, 6])
def test_absent_and_misaligned_rows(num_tasks):
    grads = random_gradients(num_tasks, [(9001,), (100,), (50,)])
    sam = sam_gradients(grads)
    grads[0] = [misaligned(t, 1) for t in grads[0]]
    every = [(k, 2) for k in range(num_tasks)]
    grads, sam = drop(grads, (1, 0), *every), drop(sam, (0, 1), *every)
    for form in ("difference", "product"):
        assert_pairs(run_paired(grads, sam, form=form), grads, sam, "tensor", form)


@pytest.mark.parametrize("num_tasks", [2, 6])
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e25, 3e37])
def test_values_outside_float32(num_tasks, scale):
    grads = [[t * (scale if k else 1.0) for t in row] for k, row in enumerate(random_gradients(num_tasks, [(3000,), (40,)]))]
    for sam in (sam_gradients(grads, 0.3), [[-t for t in row] for row in grads]):
        assert_pairs(run_paired(grads, sam, "model"), grads, sam)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 4, 8])
def test_each_byte_is_read_once(dtype, num_tasks):
    grads = random_gradients(num_tasks, [(gram.CHUNK + 4096,)], dtype)
    sam = sam_gradients(grads)
    run_paired(grads, sam)
    report = run_paired.reports[0]
    for (row,) in [*grads, *sam]:
        assert report.alloc(row).load_bytes == row.nbytes
        assert report.alloc(row).load_sectors <= 1.02 * row.nbytes / 32
    if num_tasks <= 4:
        assert conflicts(report) <= 0.05


def test_any_schedule_gives_the_same_bits():
    for num_tasks in (3, 6):
        grads = random_gradients(num_tasks, [(20003,), (77,)])
        sam = sam_gradients(grads)
        first = run_paired(grads, sam)
        assert torch.equal(first, run_paired(grads, sam, seed=1))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturb(dtype, offset, adaptive):
    shapes = [(1,), (7,), (perturb.CHUNK + 9,), (33, 5)]
    params, grads = random_gradients(1, shapes, dtype, 3)[0], random_gradients(1, shapes, dtype, 4)[0]
    params[2] = misaligned(params[2], offset)
    radii = torch.tensor([0.5, 1e-3, 0.1, 0.0], dtype=torch.float64)
    out = [torch.empty_like(p) for p in params]
    columns = [list(pair) for pair in zip(params, grads, strict=True)]
    (report,) = run(perturb.plan(columns, out, radii, adaptive), columns, out)
    steps = [r.item() * (p.double() ** 2 if adaptive else 1) * g.double() for p, g, r in zip(params, grads, radii, strict=True)]
    expected = [(p.double() + step).numpy() for p, step in zip(params, steps, strict=True)]
    assert_perturbed(out, params, expected, dtype)
    if offset == 0:
        assert report.alloc(params[2]).load_bytes == params[2].nbytes
        assert report.alloc(out[2]).store_bytes == out[2].nbytes


def test_perturb_in_place():
    params, grads = random_gradients(1, [(9001,)], seed=3)[0], random_gradients(1, [(9001,)], seed=4)[0]
    before = [p.clone() for p in params]
    run(
        perturb.plan([[params[0], grads[0]]], params, torch.ones(1, dtype=torch.float64), False),
        [[params[0], grads[0]]],
        params,
    )
    torch.testing.assert_close(params[0], before[0] + grads[0])

"""combine with weights for each channel, on the simulated device through its binding and in Triton's PTX: float64, one read."""

import numpy as np
import pytest
import torch
from device import requires_nvcc
from helpers import CHUNK, DTYPES, LAYOUTS, assert_unchanged, drop, random_gradients, snapshot
from simulated import simulated_cuda
from test_granularity import assert_channels_combined, channel_weights
from torch import Tensor
from triton_device import misaligned, run

import mtlkernels as mtl
from mtlkernels.reference import num_channels
from mtlkernels.triton import combine

SHAPES = [(), (1,), (7,), (33, 5), (3, 2, 3, 3), (40, 9), (2, 1000), (0, 3), (3, 0)]


def in_triton(grads: list[list[Tensor]], weights: list[Tensor]) -> list[Tensor]:
    """The Triton kernel's PTX, run on the CPU."""
    columns = list(zip(*grads, strict=True))
    out = [torch.empty_like(column[0]) for column in columns]
    first = np.cumsum([0, *map(num_channels, out)])
    placed = [combine.Column(rows, [own], int(at)) for rows, own, at in zip(columns, out, first, strict=False)]
    in_triton.reports = run(combine.plan(placed, torch.cat(weights), per_channel=True), columns, out)
    return out


@requires_nvcc
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 8, 9, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cuda_kernel_matches_float64(dtype, num_tasks):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    weights, before = channel_weights(grads), snapshot(grads)
    with simulated_cuda() as device:
        actual = mtl.combine(grads, weights)
    assert len(device.launches) == 1
    assert_channels_combined(actual, grads, weights)
    assert_unchanged(before)


@requires_nvcc
@pytest.mark.parametrize("rest", [1, 4, 127, 128, 129, 255, 512, 2049])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cuda_kernel_at_tails_and_misaligned_rows(dtype, offset, rest):
    grads = random_gradients(3, [(35, rest), (2, rest)], dtype)
    grads[1] = [misaligned(t, offset) for t in grads[1]]
    weights = channel_weights(grads)
    with simulated_cuda():
        assert_channels_combined(mtl.combine(grads, weights), grads, weights)


@requires_nvcc
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cuda_kernel_with_any_layout_in_place_and_rows_that_are_missing(layout):
    plain = drop(random_gradients(3, [(6, 2, 5, 4)] * 2), (0, 1))
    weights = channel_weights(plain)
    own = [[None if t is None else LAYOUTS[layout](t) for t in row] for row in plain]
    plain = [[None if t is None else t.clone(memory_format=torch.contiguous_format) for t in row] for row in own]
    with simulated_cuda():
        assert_channels_combined(mtl.combine(own, weights), plain, weights, same_layout=False)
        out = [torch.empty_like(t) for t in plain[2]]
        mtl.combine(own, weights, out=out)
        assert_channels_combined(out, plain, weights)
        first = [plain[0][0].clone(), plain[1][1].clone()]
        mtl.combine([[first[0], None], [plain[1][0], first[1]], plain[2]], weights, out=first)
        assert_channels_combined(first, plain, weights)


@requires_nvcc
def test_the_cuda_kernel_keeps_what_a_zero_weight_drops_and_weights_outside_float32():
    grads = random_gradients(2, [(3, 40)])
    grads = [[t * 1e-20 for t in row] for row in grads]
    weights = [torch.tensor([[1e45, 1.0], [2.0, 0.0], [1.0, -1.0]], dtype=torch.float64)]
    expected = [[t.clone() for t in row] for row in grads]
    grads[1][0][1] = torch.nan
    with simulated_cuda():
        assert_channels_combined(mtl.combine(grads, weights), expected, weights)


@requires_nvcc
@pytest.mark.parametrize("num_tasks", [3, 11])
def test_the_cuda_kernel_reads_every_row_once_and_any_schedule_gives_its_bits(num_tasks):
    grads = random_gradients(num_tasks, [(64, 64, 3, 3), (65,)])
    weights = [w + 3 for w in channel_weights(grads)]  # none is 0
    results = []
    for seed in (None, 1, 2):
        with simulated_cuda(seed=seed) as device:
            results.append(mtl.combine(grads, weights))
        (launch,) = device.launches
        for row in grads:
            for tensor in row:
                moved = launch.report.alloc(tensor)
                assert moved.load_bytes == tensor.nbytes
                assert moved.store_bytes == 0
        for result in results[-1]:
            assert launch.report.alloc(result).store_bytes == result.nbytes
            assert launch.report.alloc(result).load_bytes == 0
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@requires_nvcc
def test_channels_of_a_chunk_and_more_tensors_than_one_table_holds():
    grads = random_gradients(2, [(2, CHUNK + 1), *[(3,)] * 900])
    weights = channel_weights(grads)
    with simulated_cuda() as device:
        actual = mtl.combine(grads, weights)
    assert_channels_combined(actual, grads, weights)
    assert len(device.launches) == 2  # 901 tensors of five pointers each


@requires_nvcc
def test_weights_that_do_not_fit_are_refused():
    grads = [t for row in random_gradients(2, [(4, 3), (5,)]) for t in row]
    with simulated_cuda() as device:
        for weights in (torch.ones(8, 2, dtype=torch.float64), torch.ones(10, 2, dtype=torch.float64)):
            with pytest.raises(RuntimeError, match="weights has the wrong shape"):
                torch.ops.mtlkernels.combine_channels(grads, weights)
        with pytest.raises(RuntimeError, match="wrong number of dimensions"):
            torch.ops.mtlkernels.combine_channels(grads, torch.ones(2, dtype=torch.float64))
    assert device.launches == []


@pytest.mark.parametrize("num_tasks", [2, 8, pytest.param(17, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_triton_kernel_matches_float64(dtype, num_tasks):
    grads = random_gradients(num_tasks, [(7,), (33, 5), (3, 2, 3, 3), (2, 1000), (2, 5000)], dtype)
    weights = channel_weights(grads)
    assert_channels_combined(in_triton(grads, weights), grads, weights)
    assert len(in_triton.reports) == 1


def test_the_triton_kernel_reads_every_row_once():
    grads = random_gradients(3, [(8, 2048)])
    weights = [w + 3 for w in channel_weights(grads)]
    in_triton(grads, weights)
    for row in grads:
        assert in_triton.reports[0].alloc(row[0]).load_bytes == row[0].nbytes

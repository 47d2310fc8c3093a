"""gram_combine_ on CUDA, launched as the library launches it and run in ptxsim, against float64."""

import math

import pytest
import torch
from device import requires_nvcc
from helpers import DTYPES, LAYOUTS, assert_combined, drop, expected_combine, random_gradients
from simulated import simulated_cuda
from test_combine import random_weights
from test_gram_combine import check

import mtlkernels as mtl
from mtlkernels.gram_combine import gram_combine_

pytestmark = requires_nvcc

CHUNK = 8192


@pytest.fixture
def device():
    with simulated_cuda() as device:
        yield device


def loaded(device, tensor: torch.Tensor) -> int:
    return sum(a.load_bytes for launch in device.launches for a in launch.report.allocs if a.base == tensor.data_ptr())


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_launch_reads_each_gradient_once(device, dtype, num_tasks):
    grads = random_gradients(num_tasks, [(CHUNK + 77,), (33, 5), (1,), (0, 3)], dtype)
    check(grads, random_weights(num_tasks))
    assert len(device.launches) == 2  # and the one that adds the chunks
    for row in grads:
        for tensor in row[:3]:
            assert loaded(device, tensor) == tensor.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 3, 8])
def test_the_gram_has_the_bits_of_gram(device, dtype, num_tasks):
    grads, weights = random_gradients(num_tasks, [(2 * CHUNK + 5,), (100,)], dtype), random_weights(num_tasks)
    gram, update = mtl.gram(grads), mtl.combine(grads, weights)
    out = [torch.empty_like(t) for t in grads[0]]
    actual_gram = gram_combine_(out, grads, weights)
    if dtype.itemsize == 2 and num_tasks > 4:  # on the tensor cores, which add in another order
        torch.testing.assert_close(actual_gram, gram, rtol=1e-6, atol=1e-6 * float(gram.diagonal().max()))
    else:
        assert torch.equal(actual_gram, gram)
    for actual, expected in zip(out, update, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-7 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("num_tasks", [9, 16])
def test_more_tasks_take_two_reads(device, num_tasks):
    grads = random_gradients(num_tasks, [(CHUNK + 77,), (33, 5)])
    check(grads, random_weights(num_tasks))
    check(grads, random_weights(num_tasks), grads[0])


@pytest.mark.parametrize("numel", [1, 3, 4, 31, 32, 255, 1023, 1024, 1025, CHUNK - 1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_vectors_and_chunks(device, dtype, numel):
    for num_tasks in (2, 3):
        check(random_gradients(num_tasks, [(numel,), (3,)], dtype), random_weights(num_tasks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of", ["row", "out"])
def test_misaligned(device, dtype, of):
    grads = random_gradients(3, [(CHUNK + 5,), (100,)], dtype)
    out = [torch.empty_like(t) for t in grads[0]]
    row = grads[1] if of == "row" else out
    row[0] = LAYOUTS["misaligned"](row[0].view(1, -1)).view(-1)
    check(grads, random_weights(3), out)


@pytest.mark.parametrize("layout", ["transposed", "step_last", "window"])
def test_layouts(device, layout):
    change = LAYOUTS[layout]
    grads = random_gradients(3, [(37, 67)], torch.bfloat16)
    check([[change(t) for t in row] for row in grads], random_weights(3))
    check(grads, random_weights(3), [change(torch.empty_like(grads[0][0]))])


def test_absent_rows_and_mixed_dtypes(device):
    grads = drop(random_gradients(4, [(CHUNK + 9,), (100,), (7, 3)]), (0, 0), (3, 1))
    grads = [[row[0], None if row[1] is None else row[1].bfloat16(), row[2].double()] for row in grads]
    check(grads, random_weights(4))


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_task_of_weight_zero_is_in_the_gram_alone(device, dtype, bad):
    grads, weights = random_gradients(3, [(1003,), (5, 3)], dtype), random_weights(3)
    weights[1] = 0.0
    for g in grads[1]:
        g.view(-1)[-1] = bad
    expected = expected_combine(grads, weights)
    out = [torch.empty_like(t) for t in grads[0]]
    gram = gram_combine_(out, grads, weights)
    assert_combined(out, grads, weights, expected=expected)
    assert not gram[1, 1].isfinite()
    assert gram[0::2, 0::2].isfinite().all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("num_tasks", [2, 8])
def test_squares_out_of_range(device, num_tasks, scale, in_place):
    """Chunks are summed again, from the gradients as they were."""
    grads = random_gradients(num_tasks, [(CHUNK + 77,), (300,)], scale=scale)
    check(grads, random_weights(num_tasks), grads[0] if in_place else None)


@pytest.mark.parametrize("weight", [1e-45, 1e50])
def test_weights_outside_float32(device, weight):
    grads = random_gradients(3, [(CHUNK + 7,), (7, 3)], scale=min(1 / weight, 1e30))
    check(grads, random_weights(3) * weight)
    check(grads, random_weights(3) * weight, grads[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(device, dtype):
    for row in (0, 2):
        grads = random_gradients(3, [(CHUNK + 77,), (33, 5)], dtype)
        check(grads, random_weights(3), grads[row])


def test_nothing_to_read(device):
    grads = [[None, None]] * 2
    assert torch.equal(gram_combine_([None, None], grads, random_weights(2)), torch.zeros(2, 2, dtype=torch.float64))
    assert device.launches == []


def test_weights_on_another_device_are_refused(device):
    grads, weights = random_gradients(3, [(5,), (9,)]), random_weights(3)
    device.place(weights, -1)
    with pytest.raises(RuntimeError, match="weights is not on the gradients' device"):
        gram_combine_(grads[0], grads, weights)

"""The Triton kernel of memory_combine_, run on the CPU from its PTX with its plan's launches, against float64."""

import pytest
import torch
from helpers import DTYPES, random_gradients
from test_memory_ops import FACTORS, assert_moved, expected_update, factors_of, memories
from triton_device import misaligned, run

from mtlkernels.triton import memory


def run_memory(grads, kept, out, factors, squares=False, **options):
    columns = [[*column] for column in zip(*grads, *kept, strict=True)]
    written = [*out, *(t for row in kept for t in row if t.numel())]
    return run(memory.plan(columns, out, factors, squares), columns, written, **options)


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("num_tasks", [1, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64_at_tails_and_chunks(dtype, num_tasks, squares):
    grads = random_gradients(num_tasks, [(1,), (33, 5), (memory.CHUNK + 9,)], dtype)
    kept, out, factors = memories(grads), [torch.empty_like(t) for t in grads[0]], factors_of(num_tasks)
    expected = expected_update(kept, grads, factors, squares)
    run_memory(grads, kept, out, factors, squares)
    assert_moved(out, kept, expected, [dtype] * 3)


def test_absent_misaligned_and_in_place():
    grads = random_gradients(4, [(5001,), (100,)])
    grads[2][0] = misaligned(grads[2][0], 1)
    grads[1][1] = grads[3][0] = None
    kept, factors = memories(grads), factors_of(4)
    expected = expected_update(kept, grads, factors, False)
    out = [grads[0][0], torch.empty(100)]
    run_memory(grads, kept, out, factors)
    assert_moved(out, kept, expected, [torch.float32] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_byte_is_read_and_written_once(dtype):
    grads = random_gradients(len(FACTORS), [(memory.CHUNK,)], dtype)
    kept, out = memories(grads), [torch.empty(memory.CHUNK, dtype=dtype)]
    (report,) = run_memory(grads, kept, out, factors_of(len(FACTORS)))
    for k, (keep, scale, weight) in enumerate(FACTORS):
        moves = keep != 1 or scale != 0
        assert report.alloc(grads[k][0]).load_bytes == (scale != 0) * grads[k][0].nbytes
        assert report.alloc(kept[k][0]).load_bytes == (keep != 0 and (moves or weight != 0)) * kept[k][0].nbytes
        assert report.alloc(kept[k][0]).store_bytes == moves * kept[k][0].nbytes
    assert report.alloc(out[0]).store_bytes == out[0].nbytes

"""memory_combine_ on CUDA, launched as the library launches it and run in ptxsim, against float64."""

import pytest
import torch
from binding_faults import faulty_library
from device import requires_nvcc
from helpers import DTYPES, LAYOUTS, random_gradients
from simulated import simulated_cuda
from test_memory_ops import FACTORS, SHAPES, assert_moved, check, expected_update, factors_of, memories

from mtlkernels.memory import memory_combine_

pytestmark = requires_nvcc

CHUNK = 8192


@pytest.fixture
def device():
    with simulated_cuda() as device:
        yield device


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7, 11])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(device, dtype, num_tasks, squares):
    check(random_gradients(num_tasks, SHAPES, dtype), factors_of(num_tasks), squares)
    assert len(device.launches) == 1


def test_as_many_tasks_as_a_launch_takes(device):
    check(random_gradients(64, [(300,), (5, 3)]), factors_of(64))
    with pytest.raises(RuntimeError, match="at most 64 tasks"):
        check(random_gradients(65, [(3,)]), factors_of(65))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absent_and_misaligned_rows(device, dtype):
    grads = random_gradients(4, [(CHUNK + 5,), (100,), (50,)], dtype)
    for n, of in enumerate(("grads", "memory", "out")):
        memory, out = memories(grads), [torch.empty_like(t) for t in grads[0]]
        rows = [[t.clone() for t in row] for row in grads]
        row = {"grads": rows[0], "memory": memory[0], "out": out}[of]
        row[n] = LAYOUTS["misaligned"](row[n].view(1, -1)).view(-1)
        rows[1][0] = rows[3][2] = None
        check(rows, factors_of(4), out=out, memory=memory)


@pytest.mark.parametrize("layout", ["transposed", "step_last", "window"])
def test_layouts(device, layout):
    change = LAYOUTS[layout]
    grads = random_gradients(3, [(37, 67)], torch.bfloat16)
    check([[change(t) for t in row] for row in grads], factors_of(3), out=[torch.empty_like(grads[0][0])])
    check(grads, factors_of(3), memory=[[change(t) for t in row] for row in memories(grads)])
    check(grads, factors_of(3), out=[change(torch.empty_like(grads[0][0]))])


@pytest.mark.parametrize("factor", [1e-35, 1e32])
def test_factors_outside_float32(device, factor):
    grads = [[t / factor for t in row] for row in random_gradients(2, [(100,)])]
    memory = [[t / factor for t in row] for row in memories(grads)]
    check(grads, torch.tensor([[0.5, 0.9], [0.5, 0.1], [factor, factor * 3]]).double(), memory=memory)


def test_in_place(device):
    grads = random_gradients(3, [(CHUNK + 9,), (20, 3)])
    expected = expected_update(memories(grads), grads, factors_of(3), False)
    memory, out = memories(grads), [grads[1][0], grads[2][1]]
    memory_combine_(out, memory, grads, factors_of(3))
    assert_moved(out, memory, expected, [torch.float32] * 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_byte_is_read_and_written_once(device, dtype):
    num_tasks = len(FACTORS)
    grads, out = random_gradients(num_tasks, [(2 * CHUNK,)], dtype), [torch.empty(2 * CHUNK, dtype=dtype)]
    memory, factors = memories(grads), factors_of(num_tasks)
    memory_combine_(out, memory, grads, factors)
    report = device.launches[0].report
    for k, (keep, scale, weight) in enumerate(FACTORS):
        moves = keep != 1 or scale != 0
        traffic = [
            (grads[k][0], "load", scale != 0),
            (grads[k][0], "store", False),
            (memory[k][0], "load", keep != 0 and (moves or weight != 0)),
            (memory[k][0], "store", moves),
        ]
        for tensor, kind, moved in traffic:
            assert getattr(report.alloc(tensor), f"{kind}_bytes") == moved * tensor.nbytes, (k, kind)
            assert getattr(report.alloc(tensor), f"{kind}_sectors") == moved * tensor.nbytes // 32, (k, kind)
    assert report.alloc(out[0]).load_bytes == 0
    assert report.alloc(out[0]).store_bytes == out[0].nbytes


def test_any_schedule_gives_the_same_bits():
    grads, results = random_gradients(5, [(CHUNK + 5,), (77,)]), []
    for seed in (None, 1, 2):
        with simulated_cuda(seed=seed):
            memory, out = memories(grads), [torch.empty_like(t) for t in grads[0]]
            memory_combine_(out, memory, grads, factors_of(5))
            results.append([*out, *(t for row in memory for t in row)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("fault", ["device guard", "last element", "memory aside stays", "none"])
def test_a_planted_fault_is_caught(monkeypatch, fault):
    monkeypatch.setenv("PLANTED_FAULT", fault)

    def run() -> None:
        with simulated_cuda(faulty_library()) as device:
            test_layouts(device, "step_last")

    if fault == "none":
        run()
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            run()

"""The CUDA kernels of task priority as the library launches them: traffic, schedules, blocks that wait, launches.

That they give the right results for every dtype, layout and size is test_simulated_matrix.py's to show; a shard of it is here.
"""

import functools
import runpy
from collections import OrderedDict

import numpy as np
import ptxsim
import pytest
import torch
from device import ROOT, compile_kernels, requires_nvcc, testing_module
from helpers import DTYPES, drop, random_gradients
from simulated import simulated_cuda
from test_priority import SHAPES, assert_combined, channels_of, random_tops

import mtlkernels as mtl

pytestmark = requires_nvcc

MODELS = {
    name: shapes
    for name, shapes in runpy.run_path(str(ROOT / "benchmarks/shapes.py")).items()
    if name in ("resnet18", "resnet50", "hrnet18", "segnet", "vit")
}
TABLE_BYTES = 32764 - 60 - 16 - 4
WORDS = 8
"""Words of a tensor in the table besides its gradients: result, top tasks, scratch and five of its shape."""


def priority_layers(shapes: list) -> list[bool]:
    return [len(shape) >= 2 and shape[0] > 1 for shape in shapes]


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 9, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results(dtype, num_tasks):
    missing = [(k, 2) for k in range(num_tasks)] + [(0, 3)] * (num_tasks > 1)
    grads = drop(random_gradients(num_tasks, [*SHAPES, (9, 514), (3, 4100)], dtype), *missing)
    kept = [[t for n, t in enumerate(row) if n != 2] for row in grads]
    top = random_tops(num_tasks, channels_of(kept))
    top[1] = None
    with simulated_cuda() as device:
        actual = mtl.priority_combine(grads, [*top[:2], None, *top[2:]], skip_degenerate=False)
    assert actual[2] is None
    assert_combined([t for t in actual if t is not None], kept, top, False)
    assert len(device.launches) == 1


# --- traffic ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [2, 3, 8, 17])
@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (128, 512), (3, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_read_twice_and_results_written_once(dtype, shape, num_tasks):
    grads, out = random_gradients(num_tasks, [shape, (4096,)], dtype), [torch.empty(s, dtype=dtype) for s in (shape, (4096,))]
    top = [torch.arange(shape[0]) % num_tasks, None]
    with simulated_cuda() as device:
        mtl.priority_combine(grads, top, skip_degenerate=False, out=out)
    (launch,) = device.launches
    for n, reads in ((0, 2), (1, 1)):  # a tensor without top tasks is read once
        for row in grads:
            assert launch.report.alloc(row[n]).load_bytes == reads * row[n].nbytes
            assert launch.report.alloc(row[n]).load_sectors == reads * row[n].nbytes // 32
        written = launch.report.alloc(out[n])
        assert (written.store_bytes, written.store_sectors) == (out[n].nbytes, out[n].nbytes // 32)
        assert written.load_bytes == 0
    # Products, alphas and top tasks are a few percent of the gradients.
    streams = sum(t.nbytes for row in [*grads, *grads, out] for t in row) - sum(row[1].nbytes for row in grads)
    moved = 32 * (launch.report.global_load_sectors + launch.report.global_store_sectors)
    assert moved <= 1.06 * streams


def memory_traffic(shapes: list, num_tasks: int, dtype: torch.dtype, cache: float) -> list[tuple[float, float]]:
    """For each layer with top tasks, bytes that come from or go to memory over those of its gradients, and over the cache's.

    The cache holds the `cache` bytes that were used last, blocks run in the order of their numbers, and a layer's results come
    last block first: csrc/cuda/priority.cuh.
    """
    held: OrderedDict[tuple[int, str, int], float] = OrderedDict()
    size, result = 0.0, []

    def touch(key: tuple[int, str, int], amount: float) -> float:
        nonlocal size
        missed = 0.0 if key in held else amount
        size += missed
        held[key] = amount
        held.move_to_end(key)
        while size > cache:
            size -= held.popitem(last=False)[1]
        return missed

    for n, (shape, has_top) in enumerate(zip(shapes, priority_layers(shapes), strict=True)):
        total = float(np.prod(shape)) * dtype.itemsize
        channels, rest = (shape[0], int(np.prod(shape[1:]))) if has_top else (1, int(np.prod(shape)))
        blocks = testing_module().priority_shape(channels, rest, dtype.itemsize)[3]
        moved = 0.0
        for block in range(blocks) if has_top else ():
            moved += touch((n, "rows", block), num_tasks * total / blocks)
        for block in reversed(range(blocks)):
            moved += touch((n, "rows", block), num_tasks * total / blocks)
            moved += touch((n, "result", block), total / blocks)
        if has_top:
            result.append((moved / (num_tasks * total), (num_tasks + 1) * total / cache))
    return result


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
@pytest.mark.parametrize("model", MODELS)
def test_a_layer_that_fits_the_l2_cache_is_read_from_memory_once(model, num_tasks):
    """An H100's L2 cache of 50 MB, of which 264 blocks of 512 elements a warp, two on each multiprocessor, are under way."""
    cache = 50e6 - 264 * 4096 * num_tasks * 4
    layers = memory_traffic(MODELS[model](), num_tasks, torch.float32, cache)
    fitting = [traffic for traffic, size in layers if size <= 1]
    assert max(fitting) <= 1.1 * (1 + 1 / num_tasks)
    # Of a layer that does not fit, the cache still holds what it can.
    assert all(traffic <= 2 + 1 / num_tasks - 0.4 / size for traffic, size in layers if size > 1)


# --- schedules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [2, 3, 9])
def test_any_schedule_gives_the_same_bits(num_tasks):
    grads = random_gradients(num_tasks, [(40, 513), (7, 3), (20, 64), (300,)])
    top = random_tops(num_tasks, channels_of(grads))
    results = []
    for seed in (None, 1, 2, 3):
        with simulated_cuda(seed=seed):
            results.append(mtl.priority_combine(grads, top))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("resident", [2, 7, "all"])
@pytest.mark.parametrize("seed", [1, 2])
def test_blocks_that_run_beside_each_other_wait_for_the_products(monkeypatch, resident, seed):
    """Blocks of results start before the products of their layer are there, and find them in the end."""
    grads = random_gradients(3, [(40, 513), (7, 3), (20, 64), (300,)])
    top = random_tops(3, channels_of(grads))
    with simulated_cuda():
        expected = mtl.priority_combine(grads, top)
    monkeypatch.setattr(ptxsim.Module, "launch", functools.partialmethod(ptxsim.Module.launch, resident=resident))
    with simulated_cuda(seed=seed):
        actual = mtl.priority_combine(grads, top)
        in_place = [[t.clone() for t in row] for row in grads]
        mtl.priority_combine(in_place, top, out=in_place[1])
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, in_place[1], strict=True))


def run_kernel(**options: object) -> None:
    """The float32 kernel alone, compiled from csrc/cuda as it is now (a planted fault included), on two layers of 3 tasks."""
    shapes, num_tasks = [(40, 513), (5, 64)], 3
    grads = random_gradients(num_tasks, shapes)
    top = random_tops(num_tasks, [40, 5])
    out = [torch.full(shape, torch.nan) for shape in shapes]
    pointers, sizes, scratch = [], [], []
    for n, (channels, rest) in enumerate(shapes):
        slices, length, run, blocks = testing_module().priority_shape(channels, rest, 4)
        scratch.append(torch.full([(blocks * num_tasks + 1) * num_tasks], torch.nan, dtype=torch.float64))
        buffers = [*(row[n] for row in grads), out[n], top[n], scratch[n]]
        pointers.append([*(t.data_ptr() for t in buffers), channels, rest, slices, blocks, length | run << 32])
        sizes.append(2 * blocks)
    ((table, blocks),) = testing_module().plan(pointers, sizes, num_tasks + WORDS, 1)
    kernel = compile_kernels("priority.cuh", "priority_combine<float>(const __grid_constant__ TensorTable, int32_t*, bool)")
    rows = [t for row in grads for t in row]
    kernel.launch(
        "priority_combine<float>",
        grid=blocks,
        block=256,
        shared=8 * 512,
        args=[table, torch.zeros(3, dtype=torch.int32), np.bool_(False)],
        mem=[*rows, *top, *out, *scratch],
        outputs=[*out, *scratch],
        readonly=[*rows, *top],
        **options,
    )
    assert_combined(out, grads, top, False)


@pytest.mark.parametrize("resident", [1, "all"])
def test_the_kernel_alone(resident):
    run_kernel(resident=resident)


# --- launches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [3, 8])
@pytest.mark.parametrize("model", MODELS)
def test_launches_of_a_model_by_the_formula(model, num_tasks):
    """Every tensor cut to a few elements: launches depend on their number."""
    shapes = [(n % 3 + 2, *(1 for _ in shape[1:])) for n, shape in enumerate(MODELS[model]())]
    grads = random_gradients(num_tasks, shapes)
    top = [
        t if has_top else None
        for t, has_top in zip(random_tops(num_tasks, channels_of(grads)), priority_layers(shapes), strict=True)
    ]
    with simulated_cuda() as device:
        actual = mtl.priority_combine(grads, top)
        assert_combined(actual, grads, top)
        launches = -(-len(shapes) // (TABLE_BYTES // (8 * (num_tasks + WORDS) + 12)))
        assert len(device.launches) == launches
        assert launches <= 4
        device.launches.clear()
        weights = [t for t, has_top in zip(grads[0], priority_layers(shapes), strict=True) if has_top]
        scales = [torch.rand(num_tasks, len(t)) for t in weights]
        mtl.connection_strength(weights, scales, scales)
        # One launch for the squares, one for the rest.
        assert len(device.launches) == -(-len(weights) // (TABLE_BYTES // (8 * 3 + 12))) + -(
            -len(weights) // (TABLE_BYTES // (8 * 7 + 12))
        )


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_whole_models_on_the_cpu(cpu_library, model):
    shapes = MODELS[model]()
    grads = random_gradients(2, shapes)
    top = [
        t if has_top else None for t, has_top in zip(random_tops(2, channels_of(grads)), priority_layers(shapes), strict=True)
    ]
    with mtl.use_backend("cpp"):
        assert_combined(mtl.priority_combine(grads, top), grads, top)


def test_too_many_tasks():
    with simulated_cuda() as device:
        with pytest.raises(RuntimeError, match="at most 64 tasks"):
            mtl.priority_combine(torch.ones(65, 2, 3), torch.zeros(2, dtype=torch.int64))
        assert device.launches == []


def test_tops_on_another_device_are_refused():
    grads, top = random_gradients(2, [(4, 3)]), torch.zeros(4, dtype=torch.int64)
    with simulated_cuda() as device:
        device.place(top, -1)
        with pytest.raises(RuntimeError, match="top is not on the gradients' device"):
            mtl.priority_combine(grads, [top])
        assert device.launches == []

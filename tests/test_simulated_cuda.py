"""The CUDA ops as the library launches them, on CPU tensors: results, launches, streams, devices and errors."""

import re
import runpy
from collections.abc import Iterator
from functools import cache

import ptxsim
import pytest
import torch
from device import ROOT, requires_nvcc
from helpers import DTYPES, EXPANDED, LAYOUTS, assert_combined, assert_gram, assert_unchanged, drop, random_gradients, snapshot
from simulated import LAUNCH_OUT_OF_RESOURCES, TENSOR_DEVICE, LaunchError, Library, SimulatedCuda, library, simulated_cuda
from torch import Tensor
from torch.testing import assert_close

import mtlkernels as mtl
from mtlkernels.dispatch import use_backend
from mtlkernels.finish import combine_adam_, combine_sgd_
from mtlkernels.gram_combine import gram_combine_
from mtlkernels.memory import excess_risk, memory_combine_, memory_dtype

pytestmark = requires_nvcc

SHAPES = [(3, 5), (), (257,), (0, 4), (33, 7)]
NUM_TASKS = [1, 2, 3, 5, 8, 9, 16, 17]
CHUNK = 8192


@pytest.fixture
def device() -> Iterator[SimulatedCuda]:
    with simulated_cuda() as device:
        yield device


def random_weights(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


# --- results ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [*NUM_TASKS, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram(device, dtype, num_tasks):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    before = snapshot(grads)
    for per in ("model", "tensor", "channel"):
        assert_gram(mtl.gram(grads, per=per), grads, per=per)
        assert_gram(mtl.gram(grads, grads[:2], per=per), grads, grads[:2], per=per)
    assert_unchanged(before)
    assert device.launches


@pytest.mark.parametrize("num_tasks", [*NUM_TASKS, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_and_mix(device, dtype, num_tasks):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    before = snapshot(grads)
    for weights in (random_weights(num_tasks), random_weights(len(SHAPES), num_tasks, dtype=torch.float32)):
        assert_combined(mtl.combine(grads, weights), grads, weights)
    coefficients = random_weights(5, num_tasks)
    for row, result in zip(coefficients, mtl.ops.mix(grads, coefficients), strict=True):
        assert_combined(result, grads, row)
    assert_unchanged(before)
    for row in (0, -1):
        own = [[t.clone() for t in column] for column in grads]
        assert_combined(mtl.combine(own, weights, out=own[row]), grads, weights)
    assert device.launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 9])
def test_sizes_around_a_chunk(device, dtype, size):
    grads = random_gradients(3, [(size,), (5,)], dtype)
    weights = random_weights(3)
    assert_gram(mtl.gram(grads), grads)
    assert_combined(mtl.combine(grads, weights), grads, weights)


@pytest.mark.parametrize("num_tasks", [2, 9])
def test_absent_gradients_and_mixed_dtypes(device, num_tasks):
    columns = [random_gradients(num_tasks, [(17, 3), (5,)], dtype, seed=n) for n, dtype in enumerate(DTYPES)]
    grads = drop([[t for column in columns for t in column[k]] for k in range(num_tasks)], (0, 0), (1, 1), (1, 4))
    weights = random_weights(8, num_tasks)
    for per in ("model", "tensor", "channel"):
        assert_gram(mtl.gram(grads, per=per), grads, per=per, tolerance=16 * 2.0**-24)
    assert_combined(mtl.combine(grads, weights), grads, weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    plain = random_gradients(3, [(6, 4, 5, 3), (37, 67)])
    grads = [[LAYOUTS[layout](t) for t in row] for row in plain]
    other = [[LAYOUTS["misaligned"](t) for t in row] for row in random_gradients(1, [(6, 4, 5, 3), (37, 67)], seed=7)]
    rows = [*grads, *other]
    weights = random_weights(4)
    for per in ("model", "channel"):
        assert_gram(mtl.gram(grads, per=per), grads, per=per)
        assert_gram(mtl.gram(rows, per=per), rows, per=per)
    assert_combined(mtl.combine(rows, weights), rows, weights, same_layout=False)
    if layout not in EXPANDED:
        own = [[LAYOUTS[layout](t) for t in row] for row in plain]
        assert_combined(mtl.combine(own, weights[:3], out=own[1]), grads, weights[:3], same_layout=False)


@pytest.mark.parametrize("offset", [1, 64, -1])
def test_buffer_that_overlaps_its_gradients(device, offset):
    memory = random_weights(1000, dtype=torch.float32)
    grads = [[memory[100:400]], [memory[500:800]]]
    expected = [[t.clone() for t in row] for row in grads]
    weights = random_weights(2)
    out = memory[100 + offset : 400 + offset]
    assert_combined(mtl.combine(grads, weights, out=[out]), expected, weights)


def test_more_tensors_than_one_table_holds(device):
    full = random_gradients(8, [(n % 5 + 1,) for n in range(440)])
    grads = drop(full, *((k, n) for k in range(8) for n in range(440) if k not in (0, n % 8)))
    weights = random_weights(440, 8)
    assert_gram(mtl.gram(grads), grads)
    assert_gram(mtl.gram(grads, per="tensor"), grads, per="tensor")
    first = len(device.launches)
    assert_combined(mtl.combine(grads, weights), grads, weights)
    assert len(device.launches) - first == 2


def test_nothing_to_do_launches_nothing(device):
    assert mtl.combine([[], []], torch.ones(2, dtype=torch.float64)) == []
    (result,) = mtl.combine([[torch.ones(0, 3)], [torch.ones(0, 3)]], torch.ones(2))
    assert result.shape == (0, 3)
    assert device.launches == []
    assert mtl.gram([[torch.ones(0)], [torch.ones(0)]]).equal(torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("num_tasks", [3, 8, 9, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_schedule_gives_the_same_bits(dtype, num_tasks):
    grads = random_gradients(num_tasks, [(CHUNK + 5,), (77,)], dtype)
    results = []
    for seed in (None, 1, 2):
        with simulated_cuda(seed=seed):
            gram = mtl.gram(grads)
            results.append([gram, *mtl.combine(grads, mtl.CAGrad()(gram)), *mtl.project(grads)[0]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- K x K --------------------------------------------------------------------------------------------------------------------


def all_but_the_second(gram: Tensor) -> Tensor:
    return (torch.arange(gram.shape[-1]) != 1).expand(gram.shape[:-1])


def descending_orders(gram: Tensor) -> Tensor:
    return torch.arange(gram.shape[-1]).flip(0).expand(gram.shape)


def values(gram: Tensor) -> Tensor:
    return torch.arange(1, gram.shape[-1] + 1, dtype=torch.float64)


OPS = torch.ops.mtlkernels
OF_GRAMS = {
    "cosine": OPS.cosine,
    "magnitude_similarity": OPS.magnitude_similarity,
    "conflict_rate": OPS.conflict_rate,
    "condition_number": OPS.condition_number,
    "mgda_weights": lambda gram: OPS.mgda_weights(gram, None),
    "cagrad_weights": lambda gram: OPS.cagrad_weights(gram, all_but_the_second(gram), 0.4),
    "pcgrad_weights": lambda gram: OPS.pcgrad_weights(gram, torch.tensor(7)),
    "projection_coefficients": lambda gram: OPS.projection_coefficients(gram, descending_orders(gram), True),
    "conicgrad_weights": lambda gram: OPS.conicgrad_weights(gram, all_but_the_second(gram), 0.9),
    "fairgrad_weights": lambda gram: OPS.fairgrad_weights(gram, all_but_the_second(gram), 2.0),
    "upgrad_weights": lambda gram: OPS.upgrad_weights(gram, all_but_the_second(gram), None),
    "dualproj_weights": lambda gram: OPS.dualproj_weights(gram, None, values(gram)),
    "pcd_weights": lambda gram: OPS.pcd_weights(gram, None, 0.02 * values(gram)),
    "config_weights": lambda gram: OPS.config_weights(gram, all_but_the_second(gram), values(gram), 1e-14),
    "imtl_g_weights": lambda gram: OPS.imtl_g_weights(gram, None, 1e-14),
    **{
        f"aligned_mtl_weights, {scale}": lambda gram, scale=scale: OPS.aligned_mtl_weights(gram, None, None, scale, 1e-14)
        for scale in range(3)
    },
    "gradvac_weights": lambda gram: OPS.gradvac_weights(gram, gram * 0, None, torch.tensor(7), 0.5, 0.0),
}


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("op", OF_GRAMS)
def test_ops_of_grams(op, num_tasks):
    grads = random_gradients(num_tasks, [(40,), (5, 30), (100,)], torch.float64)
    grams = mtl.gram(grads, per="tensor")
    with use_backend("reference"):
        expected = OF_GRAMS[op](grams)
    with simulated_cuda() as device:
        actual = OF_GRAMS[op](grams)
        assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert len(device.launches) == 1


def test_every_cuda_op_is_in_one_of_these_tests():
    assert set(library().ops) == {
        "gram",
        "cross_gram",
        "combine",
        "combine_",
        "gram_combine_",  # test_cuda_gram_combine.py
        "combine_channels",
        "combine_channels_",
        "mix",
        "priority_combine",  # these in test_cuda_priority.py
        "priority_combine_",
        "connection_strength",
        "paired_gram",  # test_cuda_flat.py
        "perturb_",
        "memory_combine_",  # test_cuda_memory.py
        "excess_risk",  # test_cuda_excess_risk.py
        "combine_sgd_",  # test_cuda_finish.py
        "combine_adam_",
        "graddrop",  # test_graddrop.py and test_cuda_graddrop.py
        "graddrop_",
        "gradient_dropout",  # test_gradient_dropout.py and test_cuda_gradient_dropout.py
        "gradient_dropout_",
        "trimmed_mean",  # test_cuda_trimmed_mean.py
        "trimmed_mean_",
        *(name.split(",")[0] for name in OF_GRAMS),
    }


# --- launches -----------------------------------------------------------------------------------------------------------------


def move(grads: list[list[Tensor]]) -> None:
    out = [torch.empty_like(t) for t in grads[0]]
    memory = [[torch.zeros_like(t, dtype=memory_dtype(t.dtype)) for t in row] for row in grads]
    memory_combine_(out, memory, grads, torch.ones(3, len(grads), dtype=torch.float64))


def risks(grads: list[list[Tensor]]) -> None:
    memory = [[torch.ones_like(t, dtype=memory_dtype(t.dtype)) for t in row] for row in grads]
    excess_risk(memory, grads, torch.ones(len(grads), dtype=torch.float64), 1e-7)


def finish(grads: list[list[Tensor]]) -> None:
    params, (first, second) = [t.clone() for t in grads[0]], ([torch.zeros_like(t) for t in grads[0]] for _ in range(2))
    weights, lr = random_weights(len(grads)), torch.tensor(0.1, dtype=torch.float64)
    combine_sgd_(params, first, grads, weights, lr, momentum=0.9)
    combine_adam_(params, first, second, [], [torch.ones(()) for _ in params], grads, weights, lr)


def test_every_kernel_is_launched_by_an_op():
    with simulated_cuda() as device:
        for dtype in DTYPES:
            for num_tasks in (1, 2, 3, 4, 8, 16, 64):  # of flat_gram, twice as many rows
                grads = random_gradients(num_tasks, [(2, 3)], dtype)
                gram = mtl.gram(grads)
                mtl.gram(grads, per="channel")
                mtl.combine(grads, random_weights(num_tasks))
                gram_combine_(grads[0], grads, random_weights(num_tasks))
                mtl.combine(grads, [random_weights(2, num_tasks)])
                mtl.ops.mix(grads, random_weights(2, num_tasks))
                mtl.priority_combine(grads, [torch.zeros(2, dtype=torch.int64)])
                if num_tasks <= 32:
                    mtl.flat_gram(grads, grads)
                mtl.perturb_([t.clone() for t in grads[0]], grads[0], 0.1)
                move(grads)
                risks(grads)
                finish(grads)
                mtl.aggregate(grads, "graddrop")
                for trim in {min(trim, (num_tasks - 1) // 2) for trim in (1, 3, 8, 31)}:
                    mtl.TrimmedMean(trim)(grads)
            for mode in ("gaussian", "bernoulli"):
                mtl.gradient_dropout(grads[0], 0.1, mode)
            mtl.connection_strength(grads[0], [torch.ones(2, 2, dtype=dtype)], [torch.ones(2, 2, dtype=dtype)])
        for op in OF_GRAMS.values():
            op(gram)
        for function in (mtl.cosine, mtl.magnitude_similarity, mtl.conflict_rate, mtl.condition_number):
            function(gram.float())
    launched = {launch.kernel for launch in device.launches}
    assert launched == {module.kernel(name).demangled for name, module in library().kernels.items()}


def resnet50(num_tasks: int) -> list[list[Tensor]]:
    """Gradients of as many tensors as ResNet-50 has, each cut to a few elements: launches depend on their number."""
    shapes = runpy.run_path(str(ROOT / "benchmarks/shapes.py"))["resnet50"]()
    assert len(shapes) == 159
    return random_gradients(num_tasks, [(n % 3 + 1,) for n in range(len(shapes))])


def test_launches_of_resnet50_with_8_tasks(device):
    grads, weights = resnet50(8), random_weights(8)
    mtl.gram(grads)
    assert len(device.launches) <= 2
    device.launches.clear()
    mtl.combine(grads, weights)
    assert len(device.launches) == 1
    mtl.combine(grads, weights, out=grads[0])
    assert len(device.launches) == 2


def test_a_training_step_with_cagrad():
    def train() -> list[Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        inner = torch.optim.AdamW(model.parameters(), 1e-2)
        optimizer = mtl.MultiTaskOptimizer(inner, "cagrad", shared=model.parameters())
        inputs, targets = torch.randn(32, 6), torch.randn(4, 32)
        for _ in range(2):
            outputs = model(inputs)
            optimizer.step({k: (outputs[:, k] - targets[k]).square().mean() for k in range(4)})
        return [p.detach() for p in model.parameters()]

    expected = train()
    with simulated_cuda() as device:
        actual = train()
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)
    # Two of the Gram, one each of the weights and of the combination.
    assert len(device.launches) == 2 * 4


def test_launches_go_to_the_current_stream_of_the_tensors_device(device):
    grads = random_gradients(3, [(5,), (9,)])
    gram = mtl.gram(grads)
    mtl.combine(grads, mtl.MGDA()(gram))
    streams = {device.library.c.fake_cuda_stream(TENSOR_DEVICE)}
    assert 0 not in streams
    assert {launch.stream for launch in device.launches} == streams
    assert {launch.device for launch in device.launches} == {TENSOR_DEVICE}


# --- faults -------------------------------------------------------------------------------------------------------------------

STREAM = "static_cast<cudaStream_t>(stream)>>>"
LAUNCHER, BINDING = "cuda/combine.cu", "bindings/combine_cuda.cpp"

READ = 'double read;\n  if (fault("host read")) aoti_torch_item_float64(torch::stable::amax(weights, 0).get(), &read);\n  '

FAULTS = [
    (LAUNCHER, re.escape(STREAM), f'fault("default stream") ? nullptr : {STREAM}'),
    (LAUNCHER, "<<<launch->num_blocks,", '<<<fault("no blocks") ? 0 : launch->num_blocks,'),
    (LAUNCHER, "kCombineThreads, 0,", 'kCombineThreads, fault("shared memory") ? 50000 : 0,'),
    (BINDING, r"guard\((.*)\);", r'guard(fault("device guard") ? 0 : \1);'),
    (BINDING, "(const Tensor table)", f"{READ}\\1"),
    (BINDING, r"(const_cast<double\*>\()(values)", r'\1(fault("out of bounds") ? 1 : 0) + \2'),
    (BINDING, r"(\] = )(columns\.output.*);", r'\1fault("read-only") ? const_cast<void*>(columns[n].rows[0]) : \2;'),
    (BINDING, r"(\] = )(const_cast<void\*>.*);", r'\1fault("uninitialised") ? columns.output(n).rows[0] : \2;'),
]


@cache
def faulty_library() -> Library:
    library()  # shares what has no fault
    return Library("PrivateUse2", FAULTS)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("default stream", LaunchError, "on the default stream"),
        ("device guard", LaunchError, "device 0 is current"),
        ("no blocks", LaunchError, "out of range"),
        ("shared memory", LaunchError, "not asked for"),
        ("host read", LaunchError, "for which the host waits"),
        ("out of bounds", ptxsim.SimError, "out-of-bounds"),
        ("read-only", ptxsim.SimError, "read-only"),
        ("uninitialised", ptxsim.SimError, "never written"),
        ("none", None, ""),
    ],
)
def test_a_planted_fault_is_caught(monkeypatch, fault, kind, message):
    monkeypatch.setenv("PLANTED_FAULT", fault)
    grads, weights = random_gradients(3, [(5,), (9,)]), random_weights(3)
    with simulated_cuda(faulty_library()):
        if kind is None:
            assert_combined(mtl.combine(grads, weights), grads, weights)
        else:
            with pytest.raises(kind, match=message):
                mtl.combine(grads, weights)


FAILING = {
    "gram": lambda grads: mtl.gram(grads),
    "gram per channel": lambda grads: mtl.gram(grads, per="channel"),
    "cross_gram": lambda grads: mtl.gram(grads, grads),
    "combine": lambda grads: mtl.combine(grads, random_weights(3)),
    "combine_": lambda grads: mtl.combine(grads, random_weights(3), out=grads[0]),
    "gram_combine_": lambda grads: gram_combine_(grads[0], grads, random_weights(3)),
    "combine_channels": lambda grads: mtl.combine(grads, [random_weights(5, 3), random_weights(9, 3)]),
    "mix": lambda grads: mtl.ops.mix(grads, random_weights(2, 3)),
    "priority_combine": lambda grads: mtl.priority_combine(grads, [None, torch.zeros(9, dtype=torch.int64)]),
    "connection_strength": lambda grads: mtl.connection_strength(torch.ones(2, 3), torch.ones(1, 2), torch.ones(1, 2)),
    "flat_gram": lambda grads: mtl.flat_gram(grads, grads),
    "perturb_": lambda grads: mtl.perturb_(grads[0], grads[1], 0.1, adaptive=True),
    "memory_combine_": lambda grads: move(grads),
    "excess_risk": lambda grads: risks(grads),
    "gradient_dropout": lambda grads: mtl.gradient_dropout(grads[0]),
    "graddrop": lambda grads: mtl.aggregate(grads, "graddrop"),
    "trimmed_mean": lambda grads: mtl.aggregate(grads, "trimmed_mean"),
    "combine_sgd_ and combine_adam_": lambda grads: finish(grads),
    "cosine": lambda grads: mtl.cosine(torch.eye(3, dtype=torch.float64)),
    "mgda_weights": lambda grads: mtl.MGDA()(torch.eye(3, dtype=torch.float64)),
}


@pytest.mark.parametrize(
    ("call", "number"),
    [
        *((call, 1) for call in ("gram", "excess_risk", "connection_strength", "combine_sgd_ and combine_adam_")),
        *((call, 0) for call in FAILING),
    ],
)
def test_a_launch_that_fails_raises_what_cuda_says(call, number):
    grads = random_gradients(3, [(5,), (9,)])
    with simulated_cuda(fail=(number, LAUNCH_OUT_OF_RESOURCES)) as device:
        with pytest.raises(RuntimeError, match="too many resources requested for launch"):
            FAILING[call](grads)
        assert len(device.launches) == number
        assert device.library.c.fake_cuda_device() == 0  # as before the op
        FAILING[call](grads)  # the error is gone


def test_weights_on_another_device_are_refused(device):
    grads, weights = random_gradients(3, [(5,), (9,)]), random_weights(3)
    for other in (-1, TENSOR_DEVICE + 1):
        device.place(weights, other)
        with pytest.raises(RuntimeError, match="weights is not on the gradients' device"):
            mtl.combine(grads, weights)
    assert device.launches == []

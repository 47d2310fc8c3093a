"""The CUDA kernels of the K x K stage, run on the CPU from their PTX as launched: the bits of the host's."""

import itertools
import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import ptxsim
import pytest
import torch
from device import CSRC, requires_nvcc, setup_script, testing_module
from hard_grams import KINDS, gram_of, hard_gradients, same_bits
from simulated import TENSOR_DEVICE, simulated_cuda
from torch import Tensor

pytestmark = [requires_nvcc, pytest.mark.usefixtures("cpu_library")]

OPS = torch.ops.mtlkernels
FUNCTIONS = ("cosine", "magnitude_similarity", "conflict_rate", "condition_number")  # by their number in kxk_plan.h
SOLVERS = ("mgda", "cagrad")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
NUM_TASKS = (1, 2, 3, 5, 8, 16, 17, 40, 64)
SOURCE = "cuda/kxk.cu"


def flags() -> tuple[str, ...]:
    """What setup.py compiles the kernels with beyond what it compiles all with."""
    return ("-O3", *setup_script()["FLAGS"][f"csrc/{SOURCE}"])


@cache
def library(arch: str = "sm_90") -> "ptxsim.Module":
    return ptxsim.compile_cuda(CSRC / SOURCE, arch=arch, extra_flags=flags())


class Device:
    """The ops on a simulated device; ``report`` tells of the last launch.

    Args:
        module: the compiled kernels.
        seed: order of blocks and warps; None for ascending.
    """

    def __init__(self, module: "ptxsim.Module | None" = None, seed: int | None = None) -> None:
        self.module = module or library()
        self.options = {} if seed is None else {"seed": seed}

    def _launch(self, op: str, kernel: str, gram: Tensor, arguments: list[object], result: Tensor) -> Tensor:
        size = gram.shape[-1]
        threads, shared = testing_module().kxk_launch(op, size)
        self.report = self.module.launch(
            f"mtlkernels::{kernel}",
            grid=gram.shape[:-2].numel(),
            block=threads,
            shared=shared,
            args=[gram, size, *arguments, result],
            outputs=[result],
            readonly=[t for t in (gram, *arguments) if isinstance(t, Tensor)],
            **self.options,
        )
        return result

    def function(self, op: str, gram: Tensor) -> Tensor:
        scalar = op in ("conflict_rate", "condition_number")
        element = "float" if gram.dtype == torch.float32 else "double"
        kernel = f"gram_function<(mtlkernels::GramFunction){FUNCTIONS.index(op)}, {element}>"
        return self._launch(op, kernel, gram, [], gram.new_empty(gram.shape[:-2] if scalar else gram.shape))

    def solve(
        self, solver: str, gram: Tensor, active: Tensor | None = None, number: float = 0.4, values: Tensor | None = None
    ) -> Tensor:
        kernel = f"solve<(mtlkernels::Solver){testing_module().SOLVERS[solver]}>"
        options = ptxsim.Struct(np.float64(number), values)
        return self._launch(solver, kernel, gram, [active, options], gram.new_empty(gram.shape[:-1]))

    def project(self, gram: Tensor, order: Tensor, conflict_only: bool) -> Tensor:
        arguments = [order, order.shape[-1], conflict_only]
        return self._launch("projection_coefficients", "projection_coefficients", gram, arguments, torch.empty_like(gram))

    def pcgrad(self, gram: Tensor, seed: Tensor) -> Tensor:
        return self._launch("pcgrad_weights", "pcgrad_weights", gram, [seed], gram.new_empty(gram.shape[:-1]))


def host_solve(op: str, gram: Tensor, active: Tensor | None = None, c: float = 0.4) -> Tensor:
    return OPS.mgda_weights(gram, active) if op == "mgda" else OPS.cagrad_weights(gram, active, c)


@cache
def grams(num_tasks: int) -> Tensor:
    """[B, K, K]: every kind of hard Gram, of rank 1, half and full rank; only of half where they take the simulator long."""
    ranks = sorted({1, (num_tasks + 1) // 2, num_tasks + 5}) if num_tasks <= 17 else [num_tasks // 2]
    return torch.stack([gram_of(hard_gradients(kind, num_tasks, rank, seed=rank)) for kind in KINDS for rank in ranks])


def broken_grams(num_tasks: int) -> Tensor:
    """[B, K, K]: not finite, not positive semidefinite, not symmetric, at the ends of the range, and one sound Gram last."""
    sound = gram_of(hard_gradients("random", num_tasks, num_tasks + 5, seed=0))
    broken = [sound.clone() for _ in range(4)]
    broken[0][-1], broken[0][:, -1] = torch.nan, torch.nan
    broken[1][0, 1] = torch.inf
    broken[2][0, 0] = -1.0
    broken[3][0, 1] *= 100.0
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((num_tasks, num_tasks)))
    return torch.stack([*broken, -sound, noise, sound * 0, sound * 2.0**-1040, sound * 2.0**1000, sound])


# --- equal bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", SOLVERS)
@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_solvers(op, num_tasks):
    gram = grams(num_tasks)
    assert same_bits(Device().solve(op, gram), host_solve(op, gram))


@pytest.mark.parametrize("c", [0.0, 0.9, 1.0, 3.0])
def test_cagrad_for_any_radius(c):
    gram = grams(5)
    assert same_bits(Device().solve("cagrad", gram, number=c), host_solve("cagrad", gram, c=c))


@pytest.mark.parametrize("op", SOLVERS)
@pytest.mark.parametrize("num_tasks", [1, 3, 8, 17, 40])
def test_solvers_leave_out_inactive_tasks(op, num_tasks):
    gram = grams(num_tasks)
    active = torch.rand(gram.shape[:-1], generator=torch.Generator().manual_seed(num_tasks)) < 0.7
    active[0], active[1] = False, True
    gram = torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), gram, torch.nan)
    actual = Device().solve(op, gram, active)
    assert same_bits(actual, host_solve(op, gram, active))
    assert (actual[~active] == 0).all()
    assert actual.isfinite().all()


@pytest.mark.parametrize("op", [*SOLVERS, *FUNCTIONS])
@pytest.mark.parametrize("num_tasks", [2, 5, 17])
def test_grams_that_are_none_end_as_on_the_host(op, num_tasks):
    gram = broken_grams(num_tasks)
    if op in SOLVERS:
        actual, expected = Device().solve(op, gram), host_solve(op, gram)
        assert actual[:2].isnan().all()
        assert actual[-1].isfinite().all()
    else:
        actual, expected = Device().function(op, gram), getattr(OPS, op)(gram)
    assert same_bits(actual, expected)


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_functions(op, dtype, num_tasks):
    if op == "condition_number" and num_tasks > 17:
        gram = grams(num_tasks)[:1].to(dtype)  # ten sweeps of K^3
    else:
        gram = grams(num_tasks).to(dtype)
    assert same_bits(Device().function(op, gram), getattr(OPS, op)(gram))


@pytest.mark.parametrize("conflict_only", [True, False])
@pytest.mark.parametrize(
    ("num_tasks", "steps"), [(1, 0), (1, 1), (2, 2), (3, 2), (5, 9), (16, 16), (17, 70), (64, 64)], ids=str
)
def test_projections(num_tasks, steps, conflict_only):
    gram = grams(num_tasks)
    order = torch.from_numpy(np.random.default_rng(steps).integers(0, num_tasks, (*gram.shape[:-1], steps)))
    expected = OPS.projection_coefficients(gram, order, conflict_only)
    assert same_bits(Device().project(gram, order, conflict_only), expected)


def test_a_row_whose_order_holds_no_task_is_nan():
    gram = grams(5)[:4]
    order = torch.arange(5).repeat(4, 5, 1)
    expected = OPS.projection_coefficients(gram, order, True)
    for problem, row, bad in ((0, 0, 5), (1, 3, -1), (3, 4, 2**40)):
        order[problem, row, 2] = bad
        expected[problem, row] = torch.nan
    assert same_bits(Device().project(gram, order, True), expected)


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_pcgrad_draws_the_orders_of_the_host(num_tasks):
    gram = grams(num_tasks)
    for seed in (0, -1, 2**62 + 12345) if num_tasks <= 17 else (7,):
        drawn = torch.tensor([seed])
        assert same_bits(Device().pcgrad(gram, drawn), OPS.pcgrad_weights(gram, drawn))


def test_a_nan_stays_in_its_own_task():
    gram = grams(5).clone()
    gram[:, 4] = gram[:, :, 4] = torch.nan
    seed = torch.tensor([3])
    actual = Device().pcgrad(gram, seed)
    assert same_bits(actual, OPS.pcgrad_weights(gram, seed))
    assert actual[:, :4].isfinite().all()


@pytest.mark.parametrize("num_tasks", [2, 8, 17])
def test_any_schedule_gives_the_same_bits(num_tasks):
    gram = grams(num_tasks)[::4]
    drawn, order = torch.tensor([5]), torch.arange(num_tasks).expand(gram.shape).contiguous()
    runs = [
        [
            *(device.solve(op, gram) for op in SOLVERS),
            *(device.function(op, gram) for op in FUNCTIONS),
            device.project(gram, order, True),
            device.pcgrad(gram, drawn),
        ]
        for device in map(Device, [None] * 3, [None, 1, 2])
    ]
    for first, second, third in zip(*runs, strict=True):
        assert same_bits(first, second)
        assert same_bits(first, third)


# --- through the bindings -----------------------------------------------------------------------------------------------------


def calls(gram: Tensor, active: Tensor, order: Tensor, seed: Tensor) -> list[Tensor]:
    """Every op, on arguments of any strides."""
    return [
        *(getattr(OPS, op)(g) for op in FUNCTIONS for g in (gram, gram.mT, gram.float())),
        OPS.mgda_weights(gram, None),
        OPS.mgda_weights(gram.mT, active),
        OPS.cagrad_weights(gram, active, 0.4),
        OPS.projection_coefficients(gram, order, True),
        OPS.projection_coefficients(gram, order[..., :0], False),
        OPS.pcgrad_weights(gram, seed),
    ]


@pytest.mark.parametrize("num_tasks", [0, 1, 5])
@pytest.mark.parametrize("lead", [(), (0,), (2, 3)], ids=str)
def test_any_strides_and_one_launch_a_call(lead, num_tasks):
    """The simulated device refuses what the host would wait for."""
    wide = torch.zeros(*lead, 2 * num_tasks, num_tasks + 2, dtype=torch.float64)
    gram = wide[..., ::2, 1 : num_tasks + 1]
    if gram.numel():
        gram.copy_(grams(num_tasks)[:6].view(2, 3, num_tasks, num_tasks) if lead else grams(num_tasks)[0])
    active = (torch.arange(num_tasks) != 1).expand(*lead, num_tasks)
    order = torch.arange(num_tasks).flip(0).expand(gram.shape)
    arguments = (gram, active, order, torch.tensor(3))
    expected = calls(*arguments)
    with simulated_cuda() as device:
        actual = calls(*arguments)
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))
    assert len(device.launches) == sum(result.numel() > 0 for result in actual)


def test_bindings_refuse_what_they_cannot_read():
    gram, active, order = (
        torch.eye(3, dtype=torch.float64),
        torch.ones(3, dtype=torch.bool),
        torch.zeros(3, 2, dtype=torch.long),
    )
    seed = torch.tensor([1])
    with simulated_cuda() as device:
        for message, call in {
            "gram must be": lambda: OPS.cosine(gram[:2]),
            "float64 or float32": lambda: OPS.conflict_rate(gram.half()),
            "gram must be float64": lambda: OPS.mgda_weights(gram.float(), None),
            "active must be bool": lambda: OPS.mgda_weights(gram, active.int()),
            "active must have": lambda: OPS.cagrad_weights(gram, active[:2], 0.4),
            "order must be int64": lambda: OPS.projection_coefficients(gram, order.int(), True),
            "order must have": lambda: OPS.projection_coefficients(gram, order[:2], True),
            "seed must be one int64": lambda: OPS.pcgrad_weights(gram, torch.tensor([1, 2])),
            "at most 64 tasks": lambda: OPS.cosine(torch.eye(65)),
        }.items():
            with pytest.raises(RuntimeError, match=message):
                call()
        for tensor in (active, order, seed):
            device.place(tensor, TENSOR_DEVICE + 1)
        for name, call in {
            "active": lambda: OPS.mgda_weights(gram, active),
            "order": lambda: OPS.projection_coefficients(gram, order, True),
            "seed": lambda: OPS.pcgrad_weights(gram, seed),
        }.items():
            with pytest.raises(RuntimeError, match=f"{name} is not on gram's device"):
                call()
    assert device.launches == []


# --- what would break them ----------------------------------------------------------------------------------------------------


def planted(folder: Path, path: str, pattern: str, replacement: str, *extra_flags: str) -> "ptxsim.Module":
    """The kernels with the first match of a regular expression in a file of csrc replaced."""
    shutil.copytree(CSRC, folder / "csrc")
    target = folder / "csrc" / path
    text, count = re.subn(pattern, replacement, target.read_text(), count=1)
    assert count == 1, f"{pattern!r} does not occur in {path}; the fault cannot be planted"
    target.write_text(text)
    return ptxsim.compile_cuda(folder / "csrc" / SOURCE, extra_flags=[*flags(), *extra_flags])


SOLVERS_HEADER, FUNCTIONS_HEADER = "common/kxk_solvers.h", "common/kxk.h"
SYNC = r"team\.sync\(\);"
MISSING_SYNCS = {
    "cosine": (FUNCTIONS_HEADER, rf"(void cosine\(.*?\}}\);\s*){SYNC}"),
    "jacobi": (FUNCTIONS_HEADER, rf"(= matrix\[q \* size \+ p\] = 0\.0;\s*\}}\);\s*){SYNC}"),
    "projection": (FUNCTIONS_HEADER, rf"{SYNC}(  // all have read inner)"),
    "order": ("common/philox.h", rf"(bits\.word\[word\];\s*\}}\s*\}}\);\s*){SYNC}"),
    "program": (SOLVERS_HEADER, rf"(order\[i\] = i;\s*\}}\);\s*){SYNC}"),
    "forward": (SOLVERS_HEADER, rf"(factor\[p \* stride \+ q\] \* value; \}}\);\s*){SYNC}"),
    "backward": (SOLVERS_HEADER, rf"(factor\[q \* stride \+ p\] \* value; \}}\);\s*){SYNC}"),
    "enter": (SOLVERS_HEADER, rf"(displaced = order\[last\];\s*){SYNC}"),
    "leave": (SOLVERS_HEADER, rf"(next = p < count \? order\[p \+ 1\] : leaving;\s*){SYNC}"),
    "rotation": (SOLVERS_HEADER, rf"(= reciprocal \* cosine;\s*){SYNC}"),
    "recentre": (SOLVERS_HEADER, rf"(centre\[i\] = solution\[i\]; \}}\);\s*){SYNC}"),
    "trial": (SOLVERS_HEADER, rf"(ridge \* centre\[order\[p\]\]; \}}\);\s*){SYNC}"),
    "update": (SOLVERS_HEADER, rf"(\(trial\[p\] - solution\[order\[p\]\]\); \}}\);\s*){SYNC}"),
    "rate": (SOLVERS_HEADER, rf"(rate\[p\] = slope\[order\[p\]\]; \}}\);\s*){SYNC}"),
}


def run_all(device: Device) -> None:
    gram = grams(8)
    for op in SOLVERS:
        device.solve(op, gram)
    for op in ("cosine", "condition_number"):
        device.function(op, gram)
    device.pcgrad(gram, torch.tensor([1]))


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=[] if place == "rotation" else pytest.mark.slow) for place in MISSING_SYNCS]
)
def test_a_missing_sync_is_a_race(place, tmp_path):
    path, pattern = MISSING_SYNCS[place]
    with pytest.raises(ptxsim.SimError, match=r"race|uninit"):
        run_all(Device(planted(tmp_path, path, f"(?s){pattern}", r"\1")))


OTHER_BITS = {
    "contraction": (SOURCE, "^", "", "-fmad=true"),
    "order of a sum": (
        SOLVERS_HEADER,
        r"for \(int p = 0; p < count; \+\+p\) z \+=",
        "for (int p = count - 1; p >= 0; --p) z +=",
    ),
    "ties": ("cuda/kxk.cuh", "other_index < index", "other_index > index"),
}


@pytest.mark.parametrize("fault", OTHER_BITS)
def test_other_arithmetic_gives_other_bits(fault, tmp_path):
    device = Device(planted(tmp_path, *OTHER_BITS[fault]))
    gram = grams(8)
    assert not all(same_bits(device.solve(op, gram), host_solve(op, gram)) for op in SOLVERS)


# --- what they cost -----------------------------------------------------------------------------------------------------------


def test_the_gram_is_read_once():
    gram, device = grams(16), Device()
    for run in (
        *(lambda op=op: device.function(op, gram) for op in FUNCTIONS),
        *(lambda op=op: device.solve(op, gram) for op in SOLVERS),
        lambda: device.pcgrad(gram, torch.tensor([0])),
    ):
        run()
        assert device.report.alloc(gram).load_bytes == gram.nbytes


def test_shared_memory_fits_every_chip():
    for op, size in itertools.product((*FUNCTIONS, *SOLVERS, "projection_coefficients", "pcgrad_weights"), (1, 8, 63, 64)):
        _, shared = testing_module().kxk_launch(op, size)
        assert shared <= 99 * 1024, (op, size)  # sm_86, 89 and 120 have the least


def test_work_at_eight_tasks_stays_small():
    """Instructions of the one warp that solves a problem: what a step waits for. PTX, where a division counts as one."""
    gram = torch.stack([gram_of(hard_gradients("random", 8, 80, seed)) for seed in range(20)])
    device = Device()
    device.solve("cagrad", gram)
    assert device.report.warp_instructions / 20 <= 16000
    device.pcgrad(gram, torch.tensor([0]))
    assert device.report.warp_instructions / (20 * 8) <= 800  # a warp per row


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_code_has_no_spills_and_no_local_memory(arch):
    resources = library(arch).resources()
    assert sum("gram_function" in name for name in resources) == 2 * len(FUNCTIONS)
    assert len(resources) > 2 * len(FUNCTIONS) + len(SOLVERS) + 2
    assert not re.search(r"fma\S*\.f(32|64)", library(arch).ptx)  # what ptxas sees is rounded step by step, so it stays so
    for name, used in resources.items():
        assert used["spill_loads"] == used["spill_stores"] == used["stack"] == 0, name
        assert used["registers"] <= 128, name  # sixteen problems on a multiprocessor, or a block of sixteen rows

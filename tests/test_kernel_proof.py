"""What the CUDA kernels compile to and move: registers, loads, bytes in flight, traffic, and what bounds them on five chips."""

import random
import re

import kernels
import pytest
import sass
import torch
from device import ROOT, requires_nvcc
from kernels import OPS, bytes_in_flight_bar, catalogue, compiled, run
from ptxsim.roofline import CHIPS

pytestmark = requires_nvcc

DOCUMENT = ROOT / "docs/kernels.md"

slow = pytest.mark.slow
ARCHITECTURES = [pytest.param(arch, marks=[] if arch in ("sm_90", "sm_100") else slow) for arch in kernels.ARCHITECTURES]
QUICK_CHIPS = [pytest.param(n, marks=[] if chip.arch in ("sm_90", "sm_100") else slow) for n, chip in CHIPS.items()]


def test_some_op_launches_every_kernel_of_the_library():
    assert set(catalogue()) == set(compiled("sm_90"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills_or_uses_local_memory(arch):
    assert [complaint for kernel in compiled(arch).values() for complaint in kernels.complaints(kernel)] == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_main_loops_load_gradients_128_bits_at_a_time(arch):
    for name, kernel in catalogue().items():
        if kernel.streams:
            assert sass.count_wide_loads(compiled(arch)[name].function.main_loop) > 0, name


@pytest.mark.parametrize("chip", QUICK_CHIPS)
def test_enough_is_under_way_for_the_bandwidth(chip):
    """Or kernels.BELOW_BAR says why not; an entry that is no longer true is an error, too."""
    bar = bytes_in_flight_bar(CHIPS[chip])
    ratios = {name: kernel.bytes_in_flight(CHIPS[chip]) / bar for name, kernel in catalogue().items() if kernel.streams}
    below = {name: round(ratio, 2) for name, ratio in ratios.items() if ratio < 1}
    known = [kernel for kernel, chips, _ in kernels.BELOW_BAR if chip in chips.split()]
    assert {name: ratio for name, ratio in below.items() if not any(re.fullmatch(k, name) for k in known)} == {}
    assert [k for k in known if not any(re.fullmatch(k, name) for name in below)] == []


@pytest.mark.parametrize("chip", QUICK_CHIPS)
def test_a_large_model_fills_the_chip_four_times(chip):
    waves = {name: kernel.waves(CHIPS[chip]) for name, kernel in catalogue().items() if kernel.streams}
    assert {name: count for name, count in waves.items() if count < 4} == {}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_gradients_are_read_once_in_whole_sectors_without_conflicts(op, dtype):
    for num_tasks in (2, 3, 4, 8, 11, 16, 40, 64):
        done = run(op, dtype, num_tasks)
        groups = -(-num_tasks // (4 if dtype == torch.float64 else 8))  # of a channel's rows: each comes again for every other
        times = groups if op == "gram per channel" and num_tasks > 8 else 1
        if op == "priority_combine":  # gradients twice, the second time from the L2 cache; results once
            times = (2 * num_tasks + 1) / (num_tasks + 1)
        if op == "gram_combine_" and num_tasks > 8:  # by gram and combine
            times = (2 * num_tasks + 1) / (num_tasks + 1)
        if op == "memory_combine_":  # memories, which have 4 bytes an element or more, are read and written
            memories = num_tasks * (2 if dtype.itemsize == 2 else 1)
            times = (num_tasks + 2 * memories + 1) / (num_tasks + memories + 1)
        if op in ("combine_sgd_", "combine_adam_"):  # what moves is read and written
            moved = 2 if op == "combine_sgd_" else 3
            times = (num_tasks + 2 * moved) / (num_tasks + moved)
        assert done.reads == pytest.approx(times, rel=1e-12), num_tasks
        assert done.sectors_over_ideal <= 1.02 * times, num_tasks
        assert done.conflicts <= 0.05, num_tasks


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chip", QUICK_CHIPS)
def test_dram_is_what_bounds_up_to_16_tasks(op, chip):
    """Or kernels.SLOWER_THAN_DRAM says by how much it does not, and why."""
    known = [factor for name, chips, factor, _ in kernels.SLOWER_THAN_DRAM if name == op and chip in chips.split()]
    slowest = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        for num_tasks in (2, 3, 4, 8, 11, 16):
            bounds = run(op, dtype, num_tasks).bounds(CHIPS[chip])
            slowest = max(slowest, bounds.seconds / bounds.times["dram"])
    assert slowest <= max(known, default=1.0)
    assert not known or slowest > 1, "DRAM is the bound; take the entry out of SLOWER_THAN_DRAM"


@pytest.mark.parametrize("num_tasks", [2, 8, 16, 64])
@pytest.mark.parametrize("op", OPS)
def test_counted_machine_code_agrees_with_the_ptx_that_ran(op, num_tasks):
    """A load, shuffle or matrix product of PTX is one machine instruction, so that their counts must come out the same.

    With as many tasks as the class holds: the loads of absent rows are jumped over in PTX and predicated off in machine code.
    """
    launch = run(op, torch.float32, num_tasks).main
    counted = launch.report.warp_by_class
    loads = counted["ld.global"] + launch.report.cp_async_bytes / (32 * 16)
    for names, expected in ((("LDG", "LDGSTS"), loads), (("SHFL", "REDUX"), counted["shuffle"]), (("HMMA",), counted["mma"])):
        executed = sum(kernels.executed(launch, "sm_90", name) for name in names)
        # A shuffle among four threads is there twice, once for warps that have come apart, and the copies share the count.
        rel = 0.3 if op == "median" and "SHFL" in names else 0.05
        assert executed == pytest.approx(expected, rel=rel, abs=128), names


def test_the_document_is_up_to_date():
    """A few kernels of docs/kernels.md, by registers, where it was written with this nvcc; `make kernels` writes it anew."""
    text = DOCUMENT.read_text()
    written_with = re.search(r"with (nvcc [\d.]+)", text)
    assert written_with is not None
    rows = dict(re.findall(r"^\| `(\S+)` +\|[^|]*\| ([\d ]+?) +\|", text, re.MULTILINE))
    assert set(rows) == set(compiled("sm_90"))
    if written_with[1] != sass.nvcc_version():
        pytest.skip(f"docs/kernels.md was written with {written_with[1]}, this is {sass.nvcc_version()}")
    column = kernels.ARCHITECTURES.index("sm_90")
    for name in random.Random(0).sample(sorted(rows), 12):
        assert int(rows[name].split()[column]) == compiled("sm_90")[name].resources.registers, name

"""Table of the CUDA kernels: what they compile to, what they move, and what bounds them. Needs nvcc, no GPU.

make kernels                          # prints the table and writes docs/kernels.md
python -m benchmarks.kernels --print  # prints only
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/ptxsim")]

import kernels  # noqa: E402
import sass  # noqa: E402
import torch  # noqa: E402
from device import setup_script  # noqa: E402
from kernels import (  # noqa: E402
    LATENCY_SECONDS,
    OPS,
    Kernel,
    bytes_in_flight_bar,
    catalogue,
    compiled,
    resident_blocks,
    run,
)
from l2 import share_from_dram  # noqa: E402
from ptxsim.roofline import CHIPS, Chip  # noqa: E402

DOCUMENT = ROOT / "docs/kernels.md"
NUM_TASKS = (2, 3, 4, 8, 11, 16, 40, 64)
DTYPES = (torch.float32, torch.bfloat16)

HEAD = """# The CUDA kernels

Written by `make kernels` with {nvcc}; do not edit.

**Counted lower bounds, not measurements.** None of these figures was taken on a GPU: registers and loads are read from the
machine code, traffic and instructions are counted while the code runs on the CPU (tests/ptxsim), and a chip's time is at
least what its datasheet allows for them.

## Compiled code

- *registers*: of a thread, on {architectures}. No kernel spills or has a stack.
- *shared*: bytes of a block, static and dynamic.
- *loads*: global loads once round the main loop, the innermost loop that loads most, and the bytes that a thread has under way
  at once there: issued before the first of their registers is used. On sm_90.
- *in flight*: KiB under way on one SM, that is a thread's bytes x the threads that fit (limited by registers, shared memory,
  threads and blocks of the SM), over what full bandwidth takes: bandwidth x {latency:.0f} ns / SMs. A bar of 1 is full
  bandwidth. Kernels that do not read gradients have none.
- *waves*: grid of a model with 10^9 elements over the blocks that the chip holds at once, the least of the chips.
"""

BOUNDS = """
## Traffic and bounds

One aligned tensor a task, a whole chunk a block. *read*: times that the op's tensors are read or written. *sectors*: 32-byte
sectors asked for, over those that hold the data. *conflicts*: bank conflicts per wavefront of shared memory. Then what bounds
the op's main launch on each chip and, where that is not DRAM, how much longer it takes than DRAM does. The bounds are
{resources}; instructions
are counted in each chip's machine code, as often as its PTX ran. For cross_gram, K is the rows of both operands together.
"""

SECOND_PASS = """
## What the second pass finds in the L2 cache

`combine` reads what `gram` has just read, chunks and elements from the end, because in order it would find nothing. Bytes of
gradients that then come from DRAM, of all that it reads: in order -> from the end. A model (tests/l2.py) of a cache that keeps
what was used last, with the blocks that each kernel has on the chip at once; real caches keep less. float32.
"""
MODELS = {"1M": 10**6, "5M": 5 * 10**6, "ResNet-50, 23.5M": 23_508_032, "100M": 10**8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="leave docs/kernels.md as it is")
    arguments = parser.parse_args()
    text = document()
    print(text)
    if not arguments.print:
        DOCUMENT.write_text(text)


def document() -> str:
    """The whole document."""
    if sass.find_nvdisasm() is None:
        sys.exit(sass.NO_NVDISASM)
    setup_script()  # once, before threads ask for it: it swaps a function of setuptools meanwhile
    with ThreadPoolExecutor() as pool:
        list(pool.map(compiled, kernels.ARCHITECTURES))
    found = catalogue()
    unlaunched = sorted(set(compiled("sm_90")) - set(found))
    if unlaunched:
        sys.exit(f"no op of tests/kernels.py launches {', '.join(unlaunched)}; add one that does to OPS.")
    names = ", ".join(kernels.ARCHITECTURES)
    text = HEAD.format(nvcc=sass.nvcc_version(), architectures=names, latency=LATENCY_SECONDS * 1e9)
    flight = [f"in flight, {chip}" for chip in CHIPS]
    text += table(["kernel", "of", "registers", "shared", "loads", *flight, "waves"], compiled_rows(found))
    text += listing("Below the bar", kernels.BELOW_BAR)
    bounds = run("gram", torch.float32, 2).bounds(CHIPS["H100"])
    text += BOUNDS.format(resources=", ".join(bounds.times))
    text += table(["op", "dtype", "K", "read", "sectors", "conflicts", *CHIPS], bound_rows())
    slower = [(op, chips, why) for op, chips, _, why in kernels.SLOWER_THAN_DRAM]
    text += listing("Slower than DRAM with 16 tasks or fewer", slower)
    return text + SECOND_PASS + table(["model", "K", *CHIPS], second_pass_rows())


def compiled_rows(found: dict[str, Kernel]) -> list[list[str]]:
    def order(kernel: Kernel) -> tuple[str, int, int]:
        done, _ = kernel.launches[0]
        return kernel.name.split("<")[0], done.dtype.itemsize, done.num_tasks

    rows = []
    for kernel in sorted(found.values(), key=order):
        name = kernel.name
        built = {arch: compiled(arch)[name] for arch in kernels.ARCHITECTURES}
        registers = " ".join(str(b.resources.registers) for b in built.values())
        shared = str(built["sm_90"].resources.shared + kernel.launch.shared_bytes)
        if kernel.streams:
            function = built["sm_90"].function
            load = f"{sass.describe_loads(function.main_loop)}; {function.bytes_in_flight} B"
            flight = [in_flight(kernel, chip) for chip in CHIPS]
            waves = f"{min(kernel.waves(chip) for chip in CHIPS.values()):.0f}"
        else:
            load, flight, waves = "", [""] * len(CHIPS), ""
        rows.append([f"`{name}`", ", ".join(kernel.ops), registers, shared, load, *flight, waves])
    return rows


def in_flight(kernel: Kernel, chip: str) -> str:
    under_way, bar = kernel.bytes_in_flight(CHIPS[chip]), bytes_in_flight_bar(CHIPS[chip])
    return f"{under_way / 1024:.0f} ({under_way / bar:.1f})"


def bound_rows() -> list[list[str]]:
    rows = []
    for op in OPS:
        for dtype in DTYPES:
            for num_tasks in NUM_TASKS:
                done = run(op, dtype, num_tasks)
                bounds = [done.bounds(chip) for chip in CHIPS.values()]
                chips = [b.binding + ("" if b.binding == "dram" else f" {b.seconds / b.times['dram']:.2f}") for b in bounds]
                counted = [f"{done.reads:.2f}", f"{done.sectors_over_ideal:.3f}", f"{100 * done.conflicts:.1f} %"]
                rows.append([op, str(dtype)[6:], str(num_tasks), *counted, *chips])
    return rows


def second_pass_rows() -> list[list[str]]:
    def at_once(chip: Chip, op: str, num_tasks: int) -> int:
        launch = run(op, torch.float32, num_tasks).main
        kernel = compiled(chip.arch)[sass.short_name_of(launch.kernel)]
        return resident_blocks(chip, kernel, launch) * chip.sms

    rows = []
    for model, elements in MODELS.items():
        for num_tasks in (2, 8):
            cells = []
            for chip in CHIPS.values():
                blocks = at_once(chip, "gram", num_tasks), at_once(chip, "combine", num_tasks)
                shares = [
                    share_from_dram(elements, num_tasks, 4, chip.l2_bytes, blocks, order)
                    for order in ("in order", "from the end")
                ]
                cells.append(" -> ".join(f"{100 * share:.0f} %" for share in shares))
            rows.append([model, str(num_tasks), *cells])
    return rows


def listing(title: str, entries: list[tuple[str, str, str]]) -> str:
    """What misses a bar on which chips, with the reason."""
    chips_of: dict[tuple[str, str], list[str]] = {}
    for what, chips, why in entries:
        chips_of.setdefault((what, why), []).extend(chips.split())
    lines = [f"- `{what}` on {', '.join(chips)}: {why}." for (what, why), chips in chips_of.items()]
    return "\n".join([f"\n{title}:\n", *lines, ""]) if lines else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, with its columns lined up."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in [head, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()

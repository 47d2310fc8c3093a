"""Bytes that CPU ops move, counted by valgrind, as multiples of one read of the gradients. Needs valgrind, no quiet machine.

python -m benchmarks.traffic                               # priority_combine on each layer of ResNet-50, a last cache of 32 MiB
python -m benchmarks.traffic --last-level 1 --tasks 3,8    # a last cache of 1 MiB
python -m benchmarks.traffic --ops                         # every op on one layer that no cache holds
python -m benchmarks.traffic --baselines                   # priority_combine against plain PyTorch, eager and compiled
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests")]
sys.path.append(str(HERE))  # last: this file's name is that of the helper in tests

from shapes import resnet50  # noqa: E402
from traffic import Case, Rows, Traffic, count, missing, tops  # noqa: E402

LARGE = (512, 512, 3, 3)
MIDDLE = (256, 256, 3, 3)
BASELINES = ["traffic:priority_combine", *(f"benchmarks.traffic:{name}" for name in ("stacked_eager", "stacked", "masked"))]


def masked(grads: Rows, out: list[Tensor]) -> Callable[[], object]:
    return _compiled("combine_masked", grads, out)


def stacked(grads: Rows, out: list[Tensor]) -> Callable[[], object]:
    return _compiled("combine_model", grads, out)


def stacked_eager(grads: Rows, out: list[Tensor]) -> Callable[[], object]:
    from bench_priority import combine_model

    top = tops(out, len(grads))
    return lambda: combine_model(grads, top)


def _compiled(name: str, grads: Rows, out: list[Tensor]) -> Callable[[], object]:
    import bench_priority

    torch._inductor.config.cpp.simdlen, torch._inductor.config.cpp.march = 256, "x86-64-v3"  # valgrind knows no AVX-512
    call, top = torch.compile(bench_priority.into_buffers(getattr(bench_priority, name))), tops(out, len(grads))
    return lambda: call(grads, top, out)


def report(cases: list[Case], last_level: int) -> None:
    print(f"{'':<34}{'shape':<20}{'K':>3}{'gradients MB':>14}{'fit':>5}{'read':>7}{'written':>9}{'over 1 + 1/K':>14}")
    for case, moved in zip(cases, count(cases, last_level), strict=True):
        print(row_of(case, moved, last_level), flush=True)


def row_of(case: Case, moved: Traffic, last_level: int) -> str:
    size = case.num_tasks * case.row_bytes
    read, written = moved.read / size, moved.written / size
    name, shape, fit = case.prepare.partition(":")[2], "x".join(map(str, case.shapes[0])), "yes" if size <= last_level else "no"
    over = f"{(read + written) / (1 + 1 / case.num_tasks):14.2f}" if written > 0.1 and name != "perturb" else ""
    return f"{name:<34}{shape:<20}{case.num_tasks:>3}{size / 1e6:>14.2f}{fit:>5}{read:>7.2f}{written:>9.2f}{over}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--last-level", type=int, default=32, help="MiB of the last cache, a power of 2")
    parser.add_argument("--tasks", default="3", help="numbers of tasks, comma-separated")
    parser.add_argument("--ops", action="store_true", help="every op")
    parser.add_argument("--baselines", action="store_true", help="priority_combine, and the same in PyTorch")
    arguments = parser.parse_args()
    if missing():
        sys.exit(f"{missing()}; install valgrind.")
    num_tasks = [int(k) for k in arguments.tasks.split(",")]
    if arguments.ops:
        names = ["gram", "combine", "priority_combine", "flat_gram"]
        cases = [Case(f"traffic:{name}", [LARGE], 2 * k if name == "flat_gram" else k) for k in num_tasks for name in names]
        cases.append(Case("traffic:perturb", [LARGE], 2))
    elif arguments.baselines:
        cases = [Case(name, [MIDDLE], k) for k in num_tasks for name in BASELINES]
    else:
        layers = sorted({shape for shape in resnet50() if len(shape) == 4}, key=lambda shape: torch.Size(shape).numel())
        cases = [Case("traffic:priority_combine", [shape], k) for k in num_tasks for shape in layers]
    report(cases, arguments.last_level << 20)


if __name__ == "__main__":
    main()

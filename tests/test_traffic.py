"""Bytes that CPU ops move, counted by valgrind while they run: what the documents promise, and that a second read shows."""

from collections.abc import Callable

import pytest
import traffic
from torch import Tensor
from traffic import Case, Rows

import mtlkernels as mtl

pytestmark = pytest.mark.slow

SMALL, LARGE = [(64, 64, 3, 3)], [(256, 256, 3, 3)]
"""0.15 and 2.4 MB in float32: of 3 tasks, less than a last cache of 1 MiB holds, and much more."""
MIB = 1 << 20


def gram_twice(grads: Rows, out: list[Tensor]) -> Callable[[], object]:
    return lambda: (mtl.gram(grads), mtl.gram(grads))


def priority_combine_twice(grads: Rows, out: list[Tensor]) -> Callable[[], object]:
    call = traffic.priority_combine(grads, out)
    return lambda: (call(), call())


# What moves, and rows of gradients read from and written to memory.
EXPECTED = {
    "gram": (Case("traffic:gram", LARGE, 3), 3, 0),
    "flat_gram": (Case("traffic:flat_gram", LARGE, 4), 4, 0),
    "excess_risk": (Case("traffic:excess", LARGE, 4), 4, 0),
    "combine": (Case("traffic:combine", LARGE, 3), 3, 1),
    # The gradients for the norm, then parameters and gradients.
    "perturb_, beyond the cache": (Case("traffic:perturb", LARGE, 2), 3, 1),
    "priority_combine, fits": (Case("traffic:priority_combine", SMALL, 3), 3, 1),
    "priority_combine, 2 tasks, fits": (Case("traffic:priority_combine", [(128, 256, 1, 1)], 2), 2, 1),
    "priority_combine, many layers, fit one by one": (Case("traffic:priority_combine", SMALL * 6, 3), 3, 1),
    "priority_combine, bfloat16, fits": (Case("traffic:priority_combine", [(64, 128, 3, 3)], 3, "bfloat16"), 3, 1),
    "plain sum, beyond the cache": (Case("traffic:priority_combine", [(256, 2304)], 3), 3, 1),
    # That the counter sees what is read or written again.
    "gram twice": (Case("test_traffic:gram_twice", LARGE, 3), 6, 0),
    "priority_combine twice": (Case("test_traffic:priority_combine_twice", SMALL * 6, 3), 6, 2),
}


def rows_moved(cases: list[Case], last_level: int) -> list[tuple[float, float]]:
    """Read and written, in units of one row of gradients."""
    if reason := traffic.missing():
        pytest.skip(reason)
    moved = zip(cases, traffic.count(cases, last_level), strict=True)
    return [(bytes_.read / case.row_bytes, bytes_.written / case.row_bytes) for case, bytes_ in moved]


def test_rows_are_read_once_and_results_written_once(cpu_library):
    moved = dict(zip(EXPECTED, rows_moved([case for case, *_ in EXPECTED.values()], MIB), strict=True))
    off = {
        name: (moved[name], rows)
        for name, (_, *rows) in EXPECTED.items()
        if moved[name] != (pytest.approx(rows[0], rel=0.05), pytest.approx(rows[1], rel=0.05, abs=0.02))
    }
    assert off == {}


def test_a_layer_beyond_the_cache_is_read_again_but_for_what_the_cache_holds(cpu_library):
    case = Case("traffic:priority_combine", LARGE, 3)
    ((read, written),) = rows_moved([case], MIB)
    held = MIB / case.row_bytes
    assert 6 - held < read < 6 - held / 2
    assert written == pytest.approx(1, rel=0.05)
    ((read, written),) = rows_moved([case], 16 * MIB)
    assert read + written <= 1.1 * (3 + 1)

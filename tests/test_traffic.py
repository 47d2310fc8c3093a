"""Bytes that CPU ops move, counted by valgrind while they run: what the documents promise, and that a second read shows."""

from collections.abc import Callable

import pytest
import traffic
from torch import Tensor
from traffic import Case, Rows, Traffic

import mtlkernels as mtl

pytestmark = pytest.mark.slow

SMALL, LARGE = [(64, 64, 3, 3)], [(256, 256, 3, 3)]
"""0.15 and 2.4 MB in float32: of 3 tasks, less than a last cache of 1 MiB holds, and much more."""
MIB = 1 << 20

CASES = {
    "gram": Case("traffic:gram", LARGE, 3),
    "flat_gram": Case("traffic:flat_gram", LARGE, 4),
    "combine": Case("traffic:combine", LARGE, 3),
    "perturb_, beyond the cache": Case("traffic:perturb", LARGE, 2),
    "priority_combine, fits": Case("traffic:priority_combine", SMALL, 3),
    "priority_combine, 2 tasks, fits": Case("traffic:priority_combine", [(128, 256, 1, 1)], 2),
    "priority_combine, many layers, fit one by one": Case("traffic:priority_combine", SMALL * 6, 3),
    "priority_combine, bfloat16, fits": Case("traffic:priority_combine", [(64, 128, 3, 3)], 3, "bfloat16"),
    "priority_combine, beyond the cache": Case("traffic:priority_combine", LARGE, 3),
    "plain sum, beyond the cache": Case("traffic:priority_combine", [(256, 2304)], 3),
    "gram twice": Case("test_traffic:gram_twice", LARGE, 3),
    "priority_combine twice": Case("test_traffic:priority_combine_twice", SMALL * 6, 3),
}


def gram_twice(grads: Rows, out: list[Tensor]) -> Callable[[], object]:
    return lambda: (mtl.gram(grads), mtl.gram(grads))


def priority_combine_twice(grads: Rows, out: list[Tensor]) -> Callable[[], object]:
    call = traffic.priority_combine(grads, out)
    return lambda: (call(), call())


def reads_and_writes(case: Case, moved: Traffic) -> tuple[float, float]:
    """In units of one row of gradients."""
    return moved.read / case.row_bytes, moved.written / case.row_bytes


@pytest.fixture(scope="module")
def counted(request: pytest.FixtureRequest) -> dict[str, tuple[float, float]]:
    if reason := traffic.missing():
        pytest.skip(reason)
    results = traffic.count(list(CASES.values()), MIB)
    return {name: reads_and_writes(case, moved) for (name, case), moved in zip(CASES.items(), results, strict=True)}


@pytest.mark.parametrize(
    ("name", "rows_read", "rows_written"),
    [
        ("gram", 3, 0),
        ("flat_gram", 4, 0),
        ("combine", 3, 1),
        ("perturb_, beyond the cache", 3, 1),  # the gradients for the norm, then parameters and gradients
        ("priority_combine, fits", 3, 1),
        ("priority_combine, 2 tasks, fits", 2, 1),
        ("priority_combine, many layers, fit one by one", 3, 1),
        ("priority_combine, bfloat16, fits", 3, 1),
        ("plain sum, beyond the cache", 3, 1),
    ],
)
def test_rows_are_read_once_and_results_written_once(cpu_library, counted, name, rows_read, rows_written):
    read, written = counted[name]
    assert read == pytest.approx(rows_read, rel=0.05)
    assert written == pytest.approx(rows_written, rel=0.05, abs=0.02)
    assert read + written <= 1.1 * (rows_read + rows_written)


def test_a_layer_beyond_the_cache_is_read_again_but_for_what_the_cache_holds(cpu_library, counted):
    read, written = counted["priority_combine, beyond the cache"]
    rows = 3 * CASES["priority_combine, beyond the cache"].row_bytes
    assert 6 - 3 * MIB / rows < read < 6 - 3 * 0.5 * MIB / rows
    assert written == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(("name", "rows_read"), [("gram twice", 6), ("priority_combine twice", 6)])
def test_a_second_read_is_counted(cpu_library, counted, name, rows_read):
    read, _ = counted[name]
    assert read == pytest.approx(rows_read, rel=0.05)


def test_a_larger_cache_holds_a_larger_layer(cpu_library):
    if reason := traffic.missing():
        pytest.skip(reason)
    case = CASES["priority_combine, beyond the cache"]
    (moved,) = traffic.count([case], 16 * MIB)
    assert sum(reads_and_writes(case, moved)) <= 1.1 * (3 + 1)

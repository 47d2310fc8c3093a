"""Gram matrices of bfloat16 gradients, which processors with AVX512_BF16 multiply as they are, pair by pair.

That instruction takes denormal elements for zero and drops products below 2^-126; so what these tests try beside sizes are
elements where it would matter. All of it runs with every instruction set that the processor has.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from helpers import assert_gram, random_gradients
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.dispatch import CAPABILITIES, cpu_capability

UNIT = 2.0**-24
BLOCK = 4096  # the longest block whose squares are checked together


def rows(num_tasks: int, numel: int, offset: int = 0, seed: int = 0, scale: float = 1.0) -> list[list[Tensor]]:
    """Random gradients that start ``offset`` elements, of two bytes each, past a cache line."""
    values = random_gradients(num_tasks, [(numel + offset,)], torch.bfloat16, seed, scale)
    return [[row[0][offset:]] for row in values]


def constant(*values: float, numel: int = BLOCK) -> list[list[Tensor]]:
    return [[torch.full((numel,), value, dtype=torch.bfloat16)] for value in values]


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 9])
def test_every_tail_at_every_misalignment(cpu_library, num_tasks):
    for tail in range(66):
        for base in (0, 256):
            grads = rows(num_tasks, base + tail, offset=tail % 33, seed=tail)
            assert_gram(mtl.gram(grads), grads)


@pytest.mark.parametrize("num_tasks", range(1, 41))
def test_every_number_of_tasks(cpu_library, num_tasks):
    grads = rows(num_tasks, 2 * BLOCK + 77, offset=num_tasks % 5)
    assert_gram(mtl.gram(grads), grads)
    assert_gram(mtl.gram(grads, grads[:3]), grads, grads[:3])


@pytest.mark.parametrize("num_tasks", [2, 3, 9, 16])
def test_rounding_stays_small_at_size(cpu_library, num_tasks):
    grads = rows(num_tasks, 1 << 18)
    assert_gram(mtl.gram(grads), grads, tolerance=UNIT)


@pytest.mark.parametrize("value", [1.0, 0.1, 1 / 3, 1.9921875, 3e-5])
def test_constant_gradients(cpu_library, value):
    grads = constant(value, -value, 0.7 * value, 1.3 * value, 1.1 * value, numel=3 * BLOCK + 5)
    for num_tasks in (2, 3, 5):
        assert_gram(mtl.gram(grads[:num_tasks]), grads[:num_tasks], tolerance=UNIT)


@pytest.mark.parametrize("scale", [1e-40, 1e-38, 1e-30, 1e-20, 1e-18, 1e-14, 1e-12, 1e18, 1e25, 1e37], ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 9])
def test_tiny_and_huge_elements(cpu_library, num_tasks, scale):
    grads = rows(num_tasks, BLOCK + 333, scale=scale)
    assert_gram(mtl.gram(grads), grads)
    ordinary = rows(1, BLOCK + 333, seed=1)
    assert_gram(mtl.gram([*grads, *ordinary]), [*grads, *ordinary])
    assert_gram(mtl.gram(grads, ordinary), grads, ordinary)


def test_denormal_elements_alone_in_a_block(cpu_library):
    grads = rows(3, 3 * BLOCK)
    grads[0][0][BLOCK : 2 * BLOCK] = 3e-40
    grads[1][0].fill_(1e-39)
    assert grads[1][0][0] > 0
    assert_gram(mtl.gram(grads), grads)


def test_products_that_the_instruction_drops(cpu_library):
    """The square of one element keeps the block in float32's range; those of the others are denormal, and count."""
    grads = constant(2.0**-64 * 1.375, 2.0**-64 * 1.375)
    grads[0][0][0] = grads[1][0][0] = 2.0**-48 * 1.125
    assert_gram(mtl.gram(grads), grads)
    assert_gram(mtl.gram(grads[:1], grads[1:]), grads[:1], grads[1:])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("position", [0, 255, BLOCK, 2 * BLOCK + 76])
@pytest.mark.parametrize("num_tasks", [2, 5, 9, 40])
def test_a_nonfinite_element_stays_in_its_row_and_column(cpu_library, num_tasks, position, value):
    grads = rows(num_tasks, 2 * BLOCK + 77)
    bad = num_tasks // 2
    grads[0][0][position] = 0.0  # 0 inf is NaN: in the bad row alone
    grads[bad][0][position] = value
    gram, keep = mtl.gram(grads), [k for k in range(num_tasks) if k != bad]
    assert not gram[bad].isfinite().any()
    assert_gram(gram[keep][:, keep], [grads[k] for k in keep])


def test_zero_rows(cpu_library):
    grads = rows(3, BLOCK + 7)
    grads[1][0].fill_(-0.0)
    assert_gram(mtl.gram(grads), grads)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_with_each_instruction_set(cpu_library, capability):
    if CAPABILITIES.index(capability) >= CAPABILITIES.index(cpu_capability()):
        pytest.skip(f"the tests above run with {cpu_capability()}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not each_instruction_set", __file__],
        env={**os.environ, "MTLKERNELS_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout

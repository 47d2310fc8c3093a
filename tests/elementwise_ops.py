"""What the tests of the ops that combine gradients element by element share: sizes, bits, other instruction sets."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CHUNK, DTYPES, random_gradients
from torch import Tensor

from mtlkernels import elementwise
from mtlkernels.dispatch import CAPABILITIES, cpu_capability

SHAPES = [(), (1,), (7,), (33, 5), (3, 2, 3, 3), (2500,)]
EDGES = [0, 1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 2047, 2048, 2049, CHUNK - 1, CHUNK, CHUNK + 1]
"""Sizes around vectors, blocks and chunks of the CPU kernels."""


def assert_same_bits(actual: list, wanted: list) -> None:
    """NaN is no number that it equals."""
    assert len(actual) == len(wanted)
    for a, b in zip(actual, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and a.shape == b.shape and a.equal(b))


def assert_same_bits_on(capability: str, call: str, folder: Path) -> None:
    """``call``, Python of the gradients ``rows`` of 9 tasks, here and with an instruction set, where the processor has it."""
    if CAPABILITIES.index(capability) > CAPABILITIES.index(cpu_capability()):
        pytest.skip(f"this processor has no {capability}")
    given = {dtype: random_gradients(9, [(2500,), (33, 5)], dtype) for dtype in DTYPES}
    torch.save(given, folder / "rows.pt")
    code = "import sys, torch; from mtlkernels.elementwise import graddrop, trimmed_mean\n"
    code += f"torch.save([{call} for rows in torch.load(sys.argv[1]).values()], sys.argv[2])"
    subprocess.run(
        [sys.executable, "-c", code, folder / "rows.pt", folder / "out.pt"],
        env={**os.environ, "MTLKERNELS_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    for rows, wanted in zip(given.values(), torch.load(folder / "out.pt"), strict=True):
        own: list[Tensor] = eval(call, {"torch": torch, "rows": rows, **vars(elementwise)})
        assert_same_bits(own, wanted)


def assert_moved_once(device: Any, rows: Sequence[Tensor], out: Tensor) -> None:
    """The simulated ``device`` has read each row once and written the result once, in whole sectors, in one launch."""
    (launch,) = device.launches
    for row in rows:
        read = launch.report.alloc(row)
        assert (read.load_bytes, read.load_sectors, read.store_bytes) == (row.nbytes, row.nbytes // 32, 0)
    written = launch.report.alloc(out)
    assert (written.store_bytes, written.store_sectors, written.load_bytes) == (out.nbytes, out.nbytes // 32, 0)

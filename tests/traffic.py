"""Bytes that a call moves between memory and the last cache, counted by valgrind's callgrind while it runs on the CPU.

Callgrind simulates a first-level and a last-level cache (write-allocate, the least recently used line goes) under every load
and store of one thread. A call is counted with both empty, so that what it needs comes from memory. Read: lines that a load
misses. Written: lines that a store misses, which are the results' lines once each while they stay. A store past the caches
counts like any other and takes room in them, so where results are streamed the true caches hold more than the simulated ones.
What the same call moves on tensors of one element, Python's and torch's own data, is taken off. Valgrind runs AVX2, but
not AVX-512.
"""

import ctypes
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.memory import excess_risk

ROOT = Path(__file__).parent.parent
LINE = 64

Rows = list[list[Tensor]]
Prepare = Callable[[Rows, list[Tensor]], Callable[[], object]]
"""From K rows of N gradients and N buffers to the call that is counted."""


@dataclass(frozen=True)
class Case:
    """One counted call.

    Args:
        prepare: a :data:`Prepare` as "module:function", importable wherever the caller's modules are.
        shapes: of the N tensors.
        num_tasks: K.
        dtype: of the gradients and buffers.
    """

    prepare: str
    shapes: Sequence[Sequence[int]]
    num_tasks: int
    dtype: str = "float32"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of gradients, as many as of the results."""
        return sum(torch.Size(shape).numel() for shape in self.shapes) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Traffic:
    """Bytes."""

    read: int
    written: int


# --- the ops, each on buffers that are there ------------------------------------------------------------------------------


def gram(grads: Rows, out: list[Tensor]) -> Callable[[], object]:
    return lambda: mtl.gram(grads)


def flat_gram(grads: Rows, out: list[Tensor]) -> Callable[[], object]:
    """Of the first half of the rows, with the second half as SAM gradients."""
    half = len(grads) // 2
    return lambda: mtl.flat_gram(grads[:half], grads[half:])


def excess(grads: Rows, out: list[Tensor]) -> Callable[[], object]:
    """Of the first half of the rows, with the squares of the second half as memories."""
    half = len(grads) // 2
    memory, factor = [[t.square() for t in row] for row in grads[half:]], torch.ones(half, dtype=torch.float64)
    return lambda: excess_risk(memory, grads[:half], factor, 1e-7)


def combine(grads: Rows, out: list[Tensor]) -> Callable[[], object]:
    weights = torch.rand(len(grads), dtype=torch.float64)
    return lambda: mtl.combine(grads, weights, out=out)


def priority_combine(grads: Rows, out: list[Tensor]) -> Callable[[], object]:
    top = tops(out, len(grads))
    return lambda: mtl.priority_combine(grads, top, out=out)


def perturb(grads: Rows, out: list[Tensor]) -> Callable[[], object]:
    """Of row 0 as parameters by row 1 as gradients, and back."""
    params, steps = grads
    return lambda: mtl.restore_(params, mtl.perturb_(params, steps, 0.05, buffers=out))


def tops(like: list[Tensor], num_tasks: int) -> list[Tensor | None]:
    """Top tasks of the convolutions, every other tensor's none."""
    return [torch.randint(num_tasks, t.shape[:1]) if t.dim() == 4 else None for t in like]


# --- counting -------------------------------------------------------------------------------------------------------------


def _compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++")


@cache
def _switch() -> Path:
    """The library of csrc/testing/callgrind.cpp, built on first use and again when it changes."""
    source = ROOT / "csrc/testing/callgrind.cpp"
    target = ROOT / "build/testing/callgrind.so"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([_compiler(), "-O1", "-fPIC", "-shared", str(source), "-o", str(partial)], check=True)
        partial.replace(target)
    return target


def missing() -> str | None:
    """Why nothing can be counted here; None where it can."""
    if shutil.which("valgrind") is None:
        return "valgrind is not on the PATH"
    if _compiler() is None:
        return "there is no C++ compiler"
    header = subprocess.run(
        [shutil.which("c++") or "g++", "-fsyntax-only", str(ROOT / "csrc/testing/callgrind.cpp")],
        capture_output=True,
        check=False,
    )
    return "valgrind's header valgrind/callgrind.h is missing" if header.returncode else None


def count(cases: Sequence[Case], last_level: int, first_level: int = 32 << 10) -> list[Traffic]:
    """What each case moves, in one process with caches of the given bytes (powers of 2)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind"
        caches = {"I1": f"{first_level},8,{LINE}", "D1": f"{first_level},8,{LINE}", "LL": f"{last_level},16,{LINE}"}
        command = ["valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no", "--cache-sim=yes"]
        command += [f"--callgrind-out-file={out}", *(f"--{name}={value}" for name, value in caches.items())]
        command += [sys.executable, __file__, str(_switch()), json.dumps([asdict(case) for case in cases])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path])),
            "OMP_NUM_THREADS": "1",
        }
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError(f"counting failed:\n{ran.stdout}{ran.stderr}")
        counted = dict(_parse(path.read_text()) for path in Path(folder).iterdir() if path.name != out.name)
    pairs = [(counted[f"{n} whole"], counted[f"{n} empty"]) for n in range(len(cases))]
    return [Traffic(*(LINE * (whole[event] - empty[event]) for event in ("DLmr", "DLmw"))) for whole, empty in pairs]


def _parse(text: str) -> tuple[str, dict[str, int]]:
    """Label and totals of one of callgrind's files."""
    found = [re.search(rf"^{key}: (.*)$", text, re.MULTILINE) for key in ("desc: Trigger: Client Request", "events", "totals")]
    label, events, totals = (match[1] for match in found if match)
    return label, dict(zip(events.split(), map(int, totals.split()), strict=False))


def _run(switch: str, cases: list[Case]) -> None:
    """Under valgrind: prepares, warms up and counts."""
    torch.set_num_threads(1)
    library = ctypes.CDLL(switch)
    for n, case in enumerate(cases):
        module, _, function = case.prepare.partition(":")
        prepare: Prepare = getattr(importlib.import_module(module), function)
        for label, shapes in (("empty", [[1] * len(shape) for shape in case.shapes]), ("whole", case.shapes)):
            torch.manual_seed(n)
            dtype = getattr(torch, case.dtype)
            grads = [[torch.randn(*shape).to(dtype) for shape in shapes] for _ in range(case.num_tasks)]
            call = prepare(grads, [torch.zeros(*shape, dtype=dtype) for shape in shapes])
            for _ in range(3):  # what only a first call does is done
                call()
            library.start()
            call()
            library.stop(f"{n} {label}".encode())


if __name__ == "__main__":
    _run(sys.argv[1], [Case(**case) for case in json.loads(sys.argv[2])])

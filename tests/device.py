"""CUDA kernels on the CPU: compiled to PTX as the library compiles them, launched by the launch plan's own packed arguments."""

import hashlib
import importlib.util
import runpy
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import ptxsim
import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
THREADS = 256

_missing = [tool for tool in ("nvcc", "g++") if shutil.which(tool) is None]
requires_nvcc = pytest.mark.skipif(bool(_missing), reason=f"{' and '.join(_missing)} not on the PATH")


@cache
def setup_script() -> dict[str, Any]:
    """What setup.py defines, without a build."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


@cache
def testing_module() -> ModuleType:
    """The pybind11 module of csrc/testing, built on first use and again when a source changes."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("c++") or shutil.which("g++") or pytest.skip("there is no C++ compiler")
    sources = [CSRC / "testing/module.cpp", CSRC / "common/launch_plan.cpp"]
    text = b"".join(path.read_bytes() for path in [*sources, *sorted((CSRC / "common").glob("*.h"))])
    digest = hashlib.sha256(text + sys.version.encode() + pybind11.__version__.encode()).hexdigest()[:16]
    target = ROOT / "build/testing" / digest / f"mtlkernels_testing{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{id(target)}.partial")
        includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", *includes, *map(str, sources), "-o", str(partial)]
        subprocess.run(command, check=True)
        partial.replace(target)  # at once, so that a second process never loads half a file
    spec = importlib.util.spec_from_file_location("mtlkernels_testing", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def compile_kernels(header: str, *instances: str, arch: str = "sm_90", flags: tuple[str, ...] = ()) -> "ptxsim.Module":
    """PTX of a header of csrc/cuda with explicit instances, as ``"combine<float, 2>(const __grid_constant__ TensorTable)"``."""
    lines = "".join(f"template __global__ void {instance};\n" for instance in instances)
    source = f'#include "{header}"\nnamespace mtlkernels {{\n{lines}}}\n'
    return ptxsim.compile_cuda(source, arch=arch, include_dirs=[str(CSRC / "cuda")], extra_flags=flags)


class DType:
    """A gradient dtype: its C++ name, how NumPy stores it, and half a unit in the last place of 1."""

    def __init__(self, name: str, cpp: str, storage: type, eps: float) -> None:
        self.name, self.cpp, self.storage, self.eps = name, cpp, storage, eps

    def __repr__(self) -> str:
        return self.name

    def store(self, values: np.ndarray, to: np.ndarray) -> None:
        """Rounds float64 values into a buffer of this dtype."""
        to[...] = _to_bfloat16(values) if self.name == "bfloat16" else values.astype(self.storage)

    def load(self, stored: np.ndarray) -> np.ndarray:
        if self.name == "bfloat16":
            return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return stored.astype(np.float64)

    def random_row(self, random: np.random.Generator, sizes: list[int], offset: int = 0) -> list[np.ndarray | None]:
        """Normal values for tensors of the given sizes that start ``offset`` elements past an aligned address."""
        row = [self.empty(size, offset) for size in sizes]
        for buffer in row:
            self.store(random.standard_normal(buffer.size), buffer)
        return list(row)

    def assert_weighted_sum(self, actual: np.ndarray, value: np.ndarray, size: np.ndarray, num_rows: int) -> None:
        """``actual`` is a sum of ``num_rows`` weighted rows: ``value`` in float64, ``size`` the sum of the terms' magnitudes.

        Each of the K additions and products rounds by half an ulp of float32 (float64), the result once by its dtype's;
        float16's smallest numbers are 2^-24 apart.
        """
        error = 2 * num_rows * (FLOAT64 if self is FLOAT64 else FLOAT32).eps * size
        error += 1.01 * self.eps * np.abs(value) + (2.0**-25 if self is FLOAT16 else 0)
        assert (np.abs(self.load(actual) - value) <= error).all()

    def empty(self, size: int, offset: int = 0) -> np.ndarray:
        """A buffer of ``size`` elements that starts ``offset`` elements past an aligned address."""
        return ptxsim.empty(size + offset, dtype=self.storage)[offset:]


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


FLOAT32 = DType("float32", "float", np.float32, 2.0**-24)
BFLOAT16 = DType("bfloat16", "mtlkernels::BFloat16", np.uint16, 2.0**-8)
FLOAT16 = DType("float16", "__half", np.float16, 2.0**-11)
FLOAT64 = DType("float64", "double", np.float64, 2.0**-53)
DTYPES = [FLOAT32, BFLOAT16, FLOAT16, FLOAT64]


def weighted_sum(terms: list[np.ndarray], numel: int) -> tuple[np.ndarray, np.ndarray]:
    """The sum of float64 terms, and of their magnitudes."""
    return sum(terms, np.zeros(numel)), sum(map(np.abs, terms), np.zeros(numel))


def address(buffer: np.ndarray | None) -> int:
    return 0 if buffer is None else buffer.ctypes.data

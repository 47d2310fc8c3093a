"""What the machine is and can do: versions and commit, the bandwidth of a plain read, and products in registers."""

import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtlkernels import __version__, dispatch, info

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc/testing/machine.cpp"
PRODUCT_STEPS = 200_000
FLOPS_A_STEP = 2 * 12 * 16


@cache
def library() -> ctypes.CDLL:
    """The library of csrc/testing/machine.cpp, built for this machine on first use and again when it changes."""
    target = ROOT / f"build/testing/machine-{platform.node()}.so"
    if not target.exists() or target.stat().st_mtime < SOURCE.stat().st_mtime:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fPIC", "-shared"]
        subprocess.run(["c++", *flags, str(SOURCE), "-o", str(partial)], check=True)
        partial.replace(target)
    loaded = ctypes.CDLL(str(target))
    loaded.read_memory.restype, loaded.multiply_add.restype = ctypes.c_uint64, ctypes.c_float
    loaded.multiply_add.argtypes = [ctypes.c_int64]
    return loaded


def reader(tensors: Sequence[Tensor], threads: int) -> Callable[[], object]:
    """A call that reads the tensors' memory once, its bytes shared out evenly over threads."""
    total = sum(t.nbytes for t in tensors)
    shares: list[list[tuple[int, int]]] = [[] for _ in range(threads)]
    begin = 0
    for t in tensors:
        end = begin + t.nbytes
        for n, share in enumerate(shares):
            low, high = max(begin, total * n // threads), min(end, total * (n + 1) // threads)
            if low < high:
                share.append((t.data_ptr() + low - begin, high - low))
        begin = end
    arguments = []
    for share in shares:
        pointers = (ctypes.c_void_p * len(share))(*[pointer for pointer, _ in share])
        sizes = (ctypes.c_int64 * len(share))(*[size for _, size in share])
        arguments.append((pointers, sizes, len(share)))
    read = library().read_memory
    if threads == 1:
        return lambda: read(*arguments[0])
    pool = _pool(threads)
    return lambda: list(pool.map(lambda own: read(*own), arguments))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def peak_flops() -> float:
    """float32 operations a second of one thread: independent multiply-adds in registers, the best of a few tries."""
    multiply_add = library().multiply_add
    best = float("inf")
    for _ in range(10):
        start = time.thread_time()
        multiply_add(PRODUCT_STEPS)
        best = min(best, time.thread_time() - start)
    return PRODUCT_STEPS * FLOPS_A_STEP / best


def facts() -> dict[str, Any]:
    """What a figure needs to be understood later."""
    model, features = info._cpuinfo()
    return {
        "mtlkernels": __version__,
        "commit": _git("describe", "--always", "--dirty", "--abbrev=12"),
        "torch": torch.__version__,
        "torchjd": info.installed("torchjd"),
        "python": platform.python_version(),
        "compiler": info._compiler().split(" at ")[0],
        "processor": model,
        "features": features,
        "capability": dispatch.cpu_capability(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None

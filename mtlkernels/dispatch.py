"""Which implementation an op uses on a device, and how to choose another."""

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from ._library import CPU_LIBRARY, HAS_CPU_LIBRARY, NAMESPACE, REFERENCES

CAPABILITIES = ("baseline", "avx2", "avx512")
BACKENDS = ("cpp", "reference")

_forced: list[str] = []  # the innermost use_backend comes last


def backend(op: str, device_type: str) -> str:
    """Backend an op uses now: ``"cpp"`` or ``"cuda"`` for compiled kernels, ``"reference"`` for PyTorch.

    Args:
        op: the op's name, a key of ``torch.ops.mtlkernels``.
        device_type: for example ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: the op does not exist.
    """
    if op not in REFERENCES:
        raise ValueError(f"op {op!r} is unknown; known are {', '.join(sorted(REFERENCES))}.")
    if _forced and device_type == "cpu":
        return _forced[-1]
    compiled = {"cpu": "cpp", "cuda": "cuda"}.get(device_type)
    there = compiled and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", device_type.upper())
    return compiled if compiled and there else "reference"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops on the CPU with one backend inside a ``with`` block, for tests and comparisons.

    It holds for the whole process: other threads are switched, too.

    Args:
        name: ``"cpp"`` or ``"reference"``.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: the backend is not there; the message says what to install.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; known are {', '.join(BACKENDS)}.")
    if name == "cpp" and not HAS_CPU_LIBRARY:
        raise RuntimeError(f"the compiled CPU library is {CPU_LIBRARY}.")
    if name == "cpp" and "reference" in _forced:
        raise RuntimeError('use_backend("cpp") inside use_backend("reference") is not supported; leave the outer block first.')
    library = torch.library.Library(NAMESPACE, "IMPL") if name == "reference" else None
    if library is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch tells of every override
            for op, reference in REFERENCES.items():
                library.impl(op, reference, "CPU", allow_override=True)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
        if library is not None:
            library._destroy()


@cache
def cpu_capability() -> str | None:
    """Instruction set of the CPU kernels, one of ``CAPABILITIES``; None without the compiled library.

    The best one the processor has, unless the environment variable MTLKERNELS_CPU_CAPABILITY names another.

    Raises:
        ValueError: the variable names an instruction set that is unknown or that this processor lacks.
    """
    if not HAS_CPU_LIBRARY:
        return None
    function = ctypes.CDLL(CPU_LIBRARY).mtlkernels_cpu_capability
    function.restype = ctypes.c_char_p
    chosen = str(function().decode())
    asked = os.environ.get("MTLKERNELS_CPU_CAPABILITY") or chosen
    if asked != chosen:
        known = asked in CAPABILITIES
        problem = (
            f"is not one of {', '.join(CAPABILITIES)}"
            if not known
            else f"is not supported by this processor, which has {chosen}"
        )
        raise ValueError(f"MTLKERNELS_CPU_CAPABILITY is {asked!r}, which {problem}; unset it or name another.")
    return chosen


cpu_capability()  # a wrong setting is an error when the package is imported, not a slower run

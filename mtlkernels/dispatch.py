"""Which implementation an op uses on a device, and how to choose another."""

import ctypes
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from . import elementwise, finish, flat, gradient_dropout, gram_combine, memory  # noqa: F401  they define ops asked for below
from ._library import CPU_LIBRARY, HAS_CPU_LIBRARY, NAMESPACE, REFERENCES
from ._optional import require

CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16")
BACKENDS = ("cpp", "reference", "triton")
TRITON_OPS = (
    "gram",
    "cross_gram",
    "paired_gram",
    "combine",
    "combine_",
    "gram_combine_",
    "combine_channels",
    "combine_channels_",
    "mix",
    "combine_sgd_",
    "combine_adam_",
    "perturb_",
    "memory_combine_",
    "excess_risk",
    "priority_combine",
    "priority_combine_",
    "graddrop",
    "graddrop_",
    "gradient_dropout",
    "gradient_dropout_",
    "trimmed_mean",
    "trimmed_mean_",
)
"""Ops with Triton kernels. The others work on K x K matrices, where the reference will do."""
GPUS = ("cuda", "xpu")
"""Device types that Triton compiles for; ROCm's is called cuda, too."""

_forced: list[tuple[str, set[tuple[str, str]]]] = []  # backend, ops and devices that it serves; the innermost comes last


def backend(op: str, device_type: str) -> str:
    """Backend an op uses now: ``"cpp"`` or ``"cuda"`` for compiled kernels, ``"triton"``, or ``"reference"`` for PyTorch.

    Args:
        op: the op's name, a key of ``torch.ops.mtlkernels``.
        device_type: for example ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: the op does not exist.
    """
    if op not in REFERENCES:
        raise ValueError(f"op {op!r} is unknown; known are {', '.join(sorted(REFERENCES))}.")
    for name, served in reversed(_forced):
        if (op, device_type) in served:
            return name
    if (op, device_type) in _AUTOMATIC:
        return "triton"
    compiled = {"cpu": "cpp", "cuda": "cuda"}.get(device_type)
    return compiled if compiled and _has_kernel(op, device_type) else "reference"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops with one backend inside a ``with`` block, for tests and comparisons.

    ``"cpp"`` serves the CPU, ``"triton"`` GPUs (and the CPU in Triton's interpreter, which the environment variable
    TRITON_INTERPRET=1 switches on) and its own ops only, ``"reference"`` everything. It holds for the whole process: other
    threads are switched, too.

    Args:
        name: ``"cpp"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: the backend is not there, or has no device to run on; the message says what to do.
        MissingPackageError: Triton is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown; known are {', '.join(BACKENDS)}.")
    served = {"cpp": _check_cpp, "triton": _check_triton, "reference": lambda: _pairs(REFERENCES, ("cpu", *GPUS))}[name]()
    library = torch.library.Library(NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch tells of every override
        for op, device_type in served if name != "cpp" else ():
            implementation = REFERENCES[op] if name == "reference" else _in_triton(op)
            library.impl(op, implementation, device_type.upper(), allow_override=True)
    _forced.append((name, served))
    try:
        yield
    finally:
        _forced.pop()
        library._destroy()


def _check_cpp() -> set[tuple[str, str]]:
    if not HAS_CPU_LIBRARY:
        raise RuntimeError(f"the compiled CPU library is {CPU_LIBRARY}.")
    for outer, served in _forced:
        if outer != "cpp" and ("gram", "cpu") in served:
            raise RuntimeError(
                f'use_backend("cpp") inside use_backend("{outer}") is not supported; leave the outer block first.'
            )
    return {(op, "cpu") for op in REFERENCES if _has_kernel(op, "cpu")}


def _check_triton() -> set[tuple[str, str]]:
    require("triton", "triton", 'use_backend("triton")')
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _pairs(TRITON_OPS, ("cpu", *GPUS))
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise RuntimeError(
            "Triton has no GPU to run on here; set TRITON_INTERPRET=1 before Triton is imported to interpret its kernels on "
            "the CPU, which is slow."
        )
    return _pairs(TRITON_OPS, GPUS)


def _pairs(ops: Iterable[str], device_types: Iterable[str]) -> set[tuple[str, str]]:
    return {(op, device_type) for op in ops for device_type in device_types}


def _has_kernel(op: str, device_type: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", device_type.upper()))


def _in_triton(op: str) -> Callable[..., Any]:
    """The op in Triton, which is imported when it first runs."""
    return lambda *args: importlib.import_module(".triton", __package__).OPS[op](*args)


def _missing_on_gpus() -> set[tuple[str, str]]:
    """Ops and GPUs for which no compiled kernel is loaded and Triton has one."""
    if importlib.util.find_spec("triton") is None:
        return set()
    return {(op, device) for op, device in _pairs(TRITON_OPS, GPUS) if not _has_kernel(op, device)}


_AUTOMATIC = _missing_on_gpus()
_library = torch.library.Library(NAMESPACE, "IMPL")  # lives as long as the process
for _op, _device_type in _AUTOMATIC:
    _library.impl(_op, _in_triton(_op), _device_type.upper())


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
